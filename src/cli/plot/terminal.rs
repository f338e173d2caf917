use std::fmt::Write as _;

use chrono::{DateTime, Utc};

use super::draw::short;
use super::{Line, Panel, Picture, axis_time, bin_ids, extent};
use crate::reader::FeatureBinProportions;

/// Characters of a plot, without its axis.
const WIDTH: usize = 84;
const HEIGHT: usize = 14;

/// Characters that the numbers of an axis take.
const AXIS: usize = 11;

/// The picture in characters.
pub(super) fn text(picture: &Picture) -> String {
    let mut text = format!("{}\n", picture.title);
    if picture.panels.is_empty() {
        text.push_str("no rows\n");
    }
    for panel in &picture.panels {
        match panel {
            Panel::Line(line) => draw_line(picture, line, &mut text),
            Panel::Shares(feature) => draw_shares(picture, feature, &mut text),
        }
    }
    text
}

/// Dots, two by four in a character (the Braille patterns of Unicode).
struct Dots {
    cells: Vec<u8>,
}

impl Dots {
    /// `x` and `y` are between 0 and 1, from the left and from below.
    fn set(&mut self, x: f64, y: f64) {
        let place = |part: f64, dots: usize| {
            #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
            let place = (part * dots as f64).floor().clamp(0.0, dots as f64 - 1.0);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped above")]
            let place = place as usize;
            place
        };
        let (x, y) = (place(x, WIDTH * 2), place(1.0 - y, HEIGHT * 4));
        // The order of a pattern's bits: three rows of both columns, then the fourth.
        let bit = match (x % 2, y % 4) {
            (0, 3) => 6,
            (_, 3) => 7,
            (column, row) => column * 3 + row,
        };
        if let Some(cell) = self.cells.get_mut(y / 4 * WIDTH + x / 2) {
            *cell |= 1 << bit;
        }
    }

    fn row(&self, row: usize) -> String {
        let cells = self.cells.iter().skip(row * WIDTH).take(WIDTH);
        cells.map(|cell| char::from_u32(0x2800 + u32::from(*cell)).unwrap_or(' ')).collect()
    }
}

/// Where a time is between the start and the end of the picture.
fn part(picture: &Picture, time: DateTime<Utc>) -> f64 {
    let (start, end) = picture.range;
    let seconds = |span: chrono::Duration| span.as_seconds_f64();
    seconds(time - start) / seconds(end - start)
}

fn draw_line(picture: &Picture, line: &Line, text: &mut String) {
    let runs = picture.runs(line);
    let (low, high) = extent(&runs);
    let height = |value: f64| (value - low) / (high - low);
    let mut dots = Dots { cells: vec![0; WIDTH * HEIGHT] };
    for run in &runs {
        for (time, value, bounds) in run {
            dots.set(part(picture, *time), height(*value));
            for bound in bounds.iter().flat_map(|(low, high)| [*low, *high]) {
                dots.set(part(picture, *time), height(bound));
            }
        }
        for pair in run.windows(2) {
            let [(from, from_value, _), (to, to_value, _)] = pair else { continue };
            let (x, y) = (part(picture, *from), height(*from_value));
            let (width, rise) = (part(picture, *to) - x, height(*to_value) - y);
            for step in 0..=200_u32 {
                let along = f64::from(step) / 200.0;
                dots.set(x + width * along, y + rise * along);
            }
        }
    }
    let (value, between) = &line.labels;
    let legend = match line.bounds {
        Some(_) => format!(": {value}; dots: {between}"),
        None => format!(": {value}"),
    };
    let rows = (0..HEIGHT).map(|row| dots.row(row)).collect();
    panel(picture, &format!("{}{legend}", line.name), rows, (&short(low), &short(high)), text);
}

fn draw_shares(picture: &Picture, feature: &FeatureBinProportions, text: &mut String) {
    let ids = bin_ids(feature);
    let symbols: Vec<char> = ('0'..='9').chain('a'..='z').chain('A'..='Z').cycle().take(ids.len()).collect();
    let mut grid = vec![vec![' '; WIDTH]; HEIGHT];
    let column = |time: DateTime<Utc>| {
        #[expect(clippy::cast_precision_loss, reason = "a hundred")]
        let column = (part(picture, time) * WIDTH as f64).floor().max(0.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative")]
        let column = column as usize;
        column
    };
    for (start, shares) in feature.created_at.iter().zip(&feature.bin_proportions) {
        let end = picture.end_of(*start);
        let (first, last) = (column(*start), column(end).max(column(*start) + 1));
        for (row, cells) in grid.iter_mut().rev().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "a few rows")]
            let at = (row as f64 + 0.5) / HEIGHT as f64;
            let mut below = 0.0;
            let symbol = ids.iter().zip(&symbols).find(|(id, _)| {
                below += shares.get(id).copied().unwrap_or_default();
                at < below
            });
            if let Some((_, symbol)) = symbol {
                cells.iter_mut().take(last).skip(first).for_each(|cell| *cell = *symbol);
            }
        }
    }
    let legend: Vec<String> = ids.iter().zip(&symbols).map(|(id, symbol)| format!("{symbol}={id}")).collect();
    let name = format!("{}: share of counts by bin ({})", feature.feature, legend.join(" "));
    let rows = grid.into_iter().map(|cells| cells.into_iter().collect()).collect();
    panel(picture, &name, rows, ("0 %", "100 %"), text);
}

/// A name, the rows with the vertical axis, and the horizontal one.
fn panel(picture: &Picture, name: &str, rows: Vec<String>, (low, high): (&str, &str), text: &mut String) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "\n{name}");
    for (number, row) in rows.iter().enumerate() {
        let label = match number {
            0 => high,
            number if number + 1 == HEIGHT => low,
            _ => "",
        };
        let _ = writeln!(text, "{label:>AXIS$} ┤{}", row.trim_end_matches([' ', '\u{2800}']));
    }
    let (start, end) = picture.range;
    let label = |time| axis_time(time, end - start);
    let (first, middle, last) = (label(start), label(start + (end - start) / 2), label(end));
    let half = WIDTH / 2;
    let _ = writeln!(text, "{:>AXIS$} └{}", "", "─".repeat(WIDTH));
    let _ = writeln!(
        text,
        "{:>AXIS$}  {first:<half$}{middle:<rest$}{last}",
        "",
        rest = half - last.chars().count()
    );
}
