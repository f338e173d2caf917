//! The picture as SVG, and the pixels of that as PNG.

use std::error::Error as StdError;
use std::fmt::Display;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::fontdb::Database;
use resvg::usvg::{Options, Tree};

use super::{Line, Panel, Picture, Run, axis_time, bin_ids, extent};
use crate::error::{Error, Result};
use crate::reader::FeatureBinProportions;

type Area<B> = DrawingArea<B, Shift>;
type DrawResult<T = ()> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

const WIDTH: u32 = 1_080;
const TITLE_HEIGHT: u32 = 44;
const PANEL_HEIGHT: u32 = 270;
const LEGEND_WIDTH: u32 = 120;

/// Pixels of a PNG for each unit of the SVG: as many as a screen of high resolution has.
const PNG_SCALE: u32 = 2;

/// The letters of a PNG; `assets/README.md` says where they come from.
const FONT: &[u8] = include_bytes!("../../../assets/DejaVuSans-subset.ttf");

/// What stands for a letter that the font doesn't have: a box.
const UNKNOWN: char = '\u{25a1}';

/// Entries of a legend; of more bins only some are named.
const LEGEND_MAX: usize = 12;

const INK: RGBColor = RGBColor(38, 50, 66);
const GRID: RGBColor = RGBColor(226, 230, 236);
const MEAN: RGBColor = RGBColor(23, 98, 170);

/// The picture as SVG.
pub(super) fn svg(picture: &Picture) -> Result<String> {
    let mut text = String::new();
    let page = SVGBackend::with_string(&mut text, size(picture));
    Drawing { picture }.draw(&page.into_drawing_area()).map_err(undrawn)?;
    Ok(text)
}

/// The picture as PNG.
pub(super) fn png(picture: &Picture) -> Result<Vec<u8>> {
    let drawn = pixels(picture)?.encode_png();
    drawn.map_err(|error| undrawn(error.to_string().into()))
}

/// The pixels of a PNG.
pub(super) fn pixels(picture: &Picture) -> Result<Pixmap> {
    let mut fonts = Database::new();
    fonts.load_font_data(FONT.to_vec());
    fonts.set_sans_serif_family("DejaVu Sans");
    let options = Options { fontdb: Arc::new(fonts), ..Options::default() };
    // The title may have anything in it.
    let text: String =
        svg(picture)?.chars().map(|letter| if is_drawn(letter) { letter } else { UNKNOWN }).collect();
    let tree = Tree::from_str(&text, &options).map_err(|error| undrawn(error.into()))?;
    let (width, height) = size(picture);
    let pixels = Pixmap::new(width * PNG_SCALE, height * PNG_SCALE);
    let mut pixels = pixels.ok_or_else(|| undrawn("the picture is too large".into()))?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let scale = PNG_SCALE as f32;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    Ok(pixels)
}

/// Whether the font has a letter, or it is none that is seen; `assets/README.md` has its ranges.
fn is_drawn(letter: char) -> bool {
    matches!(letter, '\n' | '\t' | '\r' | '\u{20}'..='\u{52f}' | '\u{1e00}'..='\u{20cf}' | '\u{2100}'..='\u{22ff}' | '\u{25a0}'..='\u{25ff}')
}

fn size(picture: &Picture) -> (u32, u32) {
    let rows = u32::try_from(picture.panels.len().max(1)).unwrap_or(1);
    (WIDTH, TITLE_HEIGHT + rows * PANEL_HEIGHT)
}

fn undrawn(source: Box<dyn StdError + Send + Sync>) -> Error {
    Error::Encode { context: "drawing a picture".to_owned(), source }
}

fn failed(error: impl Display) -> Box<dyn StdError + Send + Sync> {
    error.to_string().into()
}

type Plot<'a, B> = ChartContext<'a, B, Cartesian2d<RangedDateTime<DateTime<Utc>>, RangedCoordf64>>;

/// The areas of a panel: its plot, and the legend beside it.
type Areas<'a, B> = (&'a Area<B>, &'a Area<B>);

/// A picture on a page.
struct Drawing<'a> {
    picture: &'a Picture,
}

impl Drawing<'_> {
    fn style(&self, size: i32) -> TextStyle<'static> {
        ("sans-serif", size).into_font().color(&INK)
    }

    fn text<'t>(&self, text: impl Into<String>, x: i32, y: i32, size: i32) -> Text<'t, (i32, i32), String> {
        Text::new(text.into(), (x, y), self.style(size))
    }

    fn draw<B: DrawingBackend>(&self, page: &Area<B>) -> DrawResult {
        let panels = &self.picture.panels;
        page.fill(&WHITE).map_err(failed)?;
        let (head, body) = page.split_vertically(TITLE_HEIGHT);
        head.draw(&self.text(self.picture.title.clone(), 20, 14, 20)).map_err(failed)?;
        if panels.is_empty() {
            body.draw(&self.text("no rows", 20, 20, 16)).map_err(failed)?;
        }
        for (panel, area) in panels.iter().zip(body.split_evenly((panels.len().max(1), 1))) {
            let (plot, legend) = area.split_horizontally(WIDTH - LEGEND_WIDTH);
            match panel {
                Panel::Line(line) => self.draw_line(line, (&plot, &legend))?,
                Panel::Shares(feature) => self.draw_shares(feature, (&plot, &legend))?,
            }
        }
        page.present().map_err(failed)
    }

    /// The axes and grid of a panel.
    fn axes<'a, B: DrawingBackend>(
        &self,
        area: &'a Area<B>,
        name: &str,
        unit: &str,
        (low, high): (f64, f64),
        value: &dyn Fn(&f64) -> String,
    ) -> DrawResult<Plot<'a, B>> {
        let (start, end) = self.picture.range;
        let mut chart = ChartBuilder::on(area)
            .caption(name, self.style(16))
            .margin(10)
            .x_label_area_size(42)
            .y_label_area_size(72)
            .build_cartesian_2d(start..end, low..high)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(GRID.stroke_width(1))
            .axis_style(INK.stroke_width(1))
            .set_all_tick_mark_size(5)
            .label_style(self.style(12))
            .x_labels(9)
            .y_labels(6)
            .x_label_formatter(&|time| axis_time(*time, end - start))
            .y_label_formatter(&|number| value(number))
            .x_desc("time (UTC)")
            .y_desc(unit)
            .axis_desc_style(self.style(13))
            .draw()
            .map_err(failed)?;
        Ok(chart)
    }

    fn draw_line<B: DrawingBackend>(&self, line: &Line, (area, legend): Areas<'_, B>) -> DrawResult {
        let runs = self.picture.runs(line);
        let value = |number: &f64| short(*number);
        let mut chart = self.axes(area, &line.name, "value", extent(&runs), &value)?;
        for run in &runs {
            if let Some(band) = band(run) {
                chart.draw_series([Polygon::new(band, MEAN.mix(0.18))]).map_err(failed)?;
            }
        }
        let stroke = MEAN.stroke_width(2);
        for run in &runs {
            let points = run.iter().map(|(time, value, _)| (*time, *value));
            chart.draw_series(LineSeries::new(points, stroke)).map_err(failed)?;
            // A line of one point can't be seen, nor can its bounds.
            if let [(time, value, bounds)] = run[..] {
                if let Some((low, high)) = bounds {
                    let faint = MEAN.mix(0.4).stroke_width(2);
                    chart
                        .draw_series([PathElement::new([(time, low), (time, high)], faint)])
                        .map_err(failed)?;
                }
                chart.draw_series([Circle::new((time, value), 3, MEAN.filled())]).map_err(failed)?;
            }
        }
        legend.draw(&PathElement::new([(4, 50), (28, 50)], stroke)).map_err(failed)?;
        legend.draw(&self.text(line.labels.0.clone(), 36, 46, 13)).map_err(failed)?;
        if line.bounds.is_some() {
            let band = Rectangle::new([(4, 64), (28, 78)], MEAN.mix(0.18).filled());
            legend.draw(&band).map_err(failed)?;
            legend.draw(&self.text(line.labels.1, 36, 67, 13)).map_err(failed)?;
        }
        Ok(())
    }

    fn draw_shares<B: DrawingBackend>(
        &self,
        feature: &FeatureBinProportions,
        (area, legend): Areas<'_, B>,
    ) -> DrawResult {
        let percent = |part: &f64| format!("{:.0} %", part * 100.0);
        let mut chart = self.axes(area, &feature.feature, "share of counts", (0.0, 1.0), &percent)?;
        let ids = bin_ids(feature);
        for (start, shares) in feature.created_at.iter().zip(&feature.bin_proportions) {
            let mut below = 0.0;
            for (place, id) in ids.iter().enumerate() {
                let share = shares.get(id).copied().unwrap_or_default();
                let corners = [(*start, below), (self.picture.end_of(*start), below + share)];
                let bar = Rectangle::new(corners, color(place, ids.len()).filled());
                chart.draw_series([bar]).map_err(failed)?;
                below += share;
            }
        }
        // The topmost share first, as it is in the plot.
        let step = ids.len().div_ceil(LEGEND_MAX).max(1);
        let named = ids.iter().enumerate().rev().step_by(step);
        for ((place, id), y) in named.zip((40..).step_by(16)) {
            let corners = [(4, y), (18, y + 11)];
            legend.draw(&Rectangle::new(corners, color(place, ids.len()).filled())).map_err(failed)?;
            legend.draw(&self.text(format!("bin {id}"), 26, y + 2, 12)).map_err(failed)?;
        }
        Ok(())
    }
}

/// The outline of a run's bounds.
fn band(run: &Run) -> Option<Vec<(DateTime<Utc>, f64)>> {
    let upper = run.iter().filter_map(|(time, _, bounds)| Some((*time, bounds.as_ref()?.1)));
    let lower = run.iter().rev().filter_map(|(time, _, bounds)| Some((*time, bounds.as_ref()?.0)));
    let outline: Vec<_> = upper.chain(lower).collect();
    (outline.len() > 2).then_some(outline)
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
