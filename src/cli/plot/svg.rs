use std::error::Error as StdError;
use std::fmt::Display;

use chrono::{DateTime, Utc};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::{Line, Panel, Picture, Run, axis_time, bin_ids, extent};
use crate::error::{Error, Result};
use crate::reader::FeatureBinProportions;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = std::result::Result<(), Box<dyn StdError + Send + Sync>>;

const WIDTH: u32 = 1_080;
const TITLE_HEIGHT: u32 = 44;
const PANEL_HEIGHT: u32 = 270;
const LEGEND_WIDTH: u32 = 120;

/// Entries of a legend; of more bins only some are named.
const LEGEND_MAX: usize = 12;

const INK: RGBColor = RGBColor(38, 50, 66);
const GRID: RGBColor = RGBColor(226, 230, 236);
const MEAN: RGBColor = RGBColor(23, 98, 170);

/// The picture as SVG.
pub(super) fn text(picture: &Picture) -> Result<String> {
    let mut text = String::new();
    let rows = u32::try_from(picture.panels.len().max(1)).unwrap_or(1);
    let backend = SVGBackend::with_string(&mut text, (WIDTH, TITLE_HEIGHT + rows * PANEL_HEIGHT));
    draw(picture, backend.into_drawing_area())
        .map_err(|source| Error::Encode { context: "drawing a picture".to_owned(), source })?;
    Ok(text)
}

fn failed(error: impl Display) -> Box<dyn StdError + Send + Sync> {
    error.to_string().into()
}

fn style(size: i32, color: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&color)
}

fn draw(picture: &Picture, page: Area<'_>) -> DrawResult {
    page.fill(&WHITE).map_err(failed)?;
    let (head, body) = page.split_vertically(TITLE_HEIGHT);
    head.draw(&Text::new(picture.title.clone(), (20, 14), style(20, INK))).map_err(failed)?;
    if picture.panels.is_empty() {
        body.draw(&Text::new("no rows", (20, 20), style(16, INK))).map_err(failed)?;
    }
    for (panel, area) in picture.panels.iter().zip(body.split_evenly((picture.panels.len().max(1), 1))) {
        let (plot, legend) = area.split_horizontally(WIDTH - LEGEND_WIDTH);
        match panel {
            Panel::Line(line) => draw_line(picture, line, &plot, &legend)?,
            Panel::Shares(feature) => draw_shares(picture, feature, &plot, &legend)?,
        }
    }
    page.present().map_err(failed)
}

type Plot<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<RangedDateTime<DateTime<Utc>>, plotters::coord::types::RangedCoordf64>,
>;

/// The axes and grid of a panel.
fn axes<'a, 'b>(
    picture: &Picture,
    area: &'a Area<'b>,
    name: &str,
    unit: &str,
    (low, high): (f64, f64),
    value: &dyn Fn(&f64) -> String,
) -> std::result::Result<Plot<'a, 'b>, Box<dyn StdError + Send + Sync>> {
    let (start, end) = picture.range;
    let mut chart = ChartBuilder::on(area)
        .caption(name, style(16, INK))
        .margin(10)
        .x_label_area_size(42)
        .y_label_area_size(72)
        .build_cartesian_2d(start..end, low..high)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(style(12, INK))
        .x_labels(9)
        .y_labels(6)
        .x_label_formatter(&|time| axis_time(*time, end - start))
        .y_label_formatter(&|number| value(number))
        .x_desc("time (UTC)")
        .y_desc(unit)
        .axis_desc_style(style(13, INK))
        .draw()
        .map_err(failed)?;
    Ok(chart)
}

fn draw_line(picture: &Picture, line: &Line, area: &Area<'_>, legend: &Area<'_>) -> DrawResult {
    let runs = picture.runs(line);
    let value = |number: &f64| short(*number);
    let mut chart = axes(picture, area, &line.name, "value", extent(&runs), &value)?;
    for run in &runs {
        if let Some(band) = band(run) {
            chart.draw_series([Polygon::new(band, MEAN.mix(0.18))]).map_err(failed)?;
        }
    }
    for run in &runs {
        let points = run.iter().map(|(time, value, _)| (*time, *value));
        chart.draw_series(LineSeries::new(points, MEAN.stroke_width(2))).map_err(failed)?;
        // A line of one point can't be seen, nor can its bounds.
        if let [(time, value, bounds)] = run[..] {
            if let Some((low, high)) = bounds {
                let bar = PathElement::new([(time, low), (time, high)], MEAN.mix(0.4).stroke_width(2));
                chart.draw_series([bar]).map_err(failed)?;
            }
            chart.draw_series([Circle::new((time, value), 3, MEAN.filled())]).map_err(failed)?;
        }
    }
    legend.draw(&PathElement::new([(4, 50), (28, 50)], MEAN.stroke_width(2))).map_err(failed)?;
    legend.draw(&Text::new("mean", (36, 43), style(13, INK))).map_err(failed)?;
    if line.bounds.is_some() {
        legend.draw(&Rectangle::new([(4, 64), (28, 78)], MEAN.mix(0.18).filled())).map_err(failed)?;
        legend.draw(&Text::new("mean ± s", (36, 64), style(13, INK))).map_err(failed)?;
    }
    Ok(())
}

/// The outline of a run's bounds.
fn band(run: &Run) -> Option<Vec<(DateTime<Utc>, f64)>> {
    let upper = run.iter().filter_map(|(time, _, bounds)| Some((*time, bounds.as_ref()?.1)));
    let lower = run.iter().rev().filter_map(|(time, _, bounds)| Some((*time, bounds.as_ref()?.0)));
    let outline: Vec<_> = upper.chain(lower).collect();
    (outline.len() > 2).then_some(outline)
}

fn draw_shares(
    picture: &Picture,
    feature: &FeatureBinProportions,
    area: &Area<'_>,
    legend: &Area<'_>,
) -> DrawResult {
    let percent = |part: &f64| format!("{:.0} %", part * 100.0);
    let mut chart = axes(picture, area, &feature.feature, "share of counts", (0.0, 1.0), &percent)?;
    let ids = bin_ids(feature);
    let width = chrono::Duration::microseconds(picture.width);
    for (start, shares) in feature.created_at.iter().zip(&feature.bin_proportions) {
        let mut below = 0.0;
        for (place, id) in ids.iter().enumerate() {
            let share = shares.get(id).copied().unwrap_or_default();
            let corners = [(*start, below), (*start + width, below + share)];
            chart.draw_series([Rectangle::new(corners, color(place, ids.len()).filled())]).map_err(failed)?;
            below += share;
        }
    }
    // The topmost share first, as it is in the plot.
    let step = ids.len().div_ceil(LEGEND_MAX).max(1);
    let named = ids.iter().enumerate().rev().step_by(step);
    for ((place, id), y) in named.zip((40..).step_by(16)) {
        let square = Rectangle::new([(4, y), (18, y + 11)], color(place, ids.len()).filled());
        legend.draw(&square).map_err(failed)?;
        legend.draw(&Text::new(format!("bin {id}"), (26, y), style(12, INK))).map_err(failed)?;
    }
    Ok(())
}

/// Colours from blue over green to yellow, by order, so that neighbours look alike and the ends don't.
fn color(place: usize, count: usize) -> RGBColor {
    const STOPS: [(f64, f64, f64); 5] = [
        (68.0, 50.0, 130.0),
        (49.0, 104.0, 142.0),
        (33.0, 145.0, 140.0),
        (94.0, 201.0, 98.0),
        (240.0, 220.0, 60.0),
    ];
    #[expect(clippy::cast_precision_loss, reason = "a feature has few bins")]
    let at = if count > 1 { place as f64 / (count - 1) as f64 * 4.0 } else { 1.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is 0 to 4")]
    let stop = (at as usize).min(3);
    let part = at - f64::from(u32::try_from(stop).unwrap_or_default());
    let (Some(from), Some(to)) = (STOPS.get(stop), STOPS.get(stop + 1)) else { return INK };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two colours")]
    let mix = |from: f64, to: f64| (from + (to - from) * part).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// A number for an axis.
pub(super) fn short(number: f64) -> String {
    let size = number.abs();
    if number == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{number:.2e}")
    } else {
        let text = format!("{number:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}
