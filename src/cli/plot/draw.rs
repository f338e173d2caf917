//! The picture, drawn once for both formats: as SVG, and as pixels for a PNG.

use std::error::Error as StdError;
use std::fmt::Display;

use chrono::{DateTime, Utc};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::raster::{PIXEL, Page};
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

/// Entries of a legend; of more bins only some are named.
const LEGEND_MAX: usize = 12;

const INK: RGBColor = RGBColor(38, 50, 66);
const GRID: RGBColor = RGBColor(226, 230, 236);
const MEAN: RGBColor = RGBColor(23, 98, 170);

/// The picture as SVG.
pub(super) fn svg(picture: &Picture) -> Result<String> {
    let mut text = String::new();
    let page = SVGBackend::with_string(&mut text, size(picture));
    Drawing { picture, scale: 1 }.draw(&page.into_drawing_area()).map_err(undrawn)?;
    Ok(text)
}

/// The picture as PNG.
pub(super) fn png(picture: &Picture) -> Result<Vec<u8>> {
    let (pixels, (width, height)) = pixels(picture)?;
    lodepng::encode24(&pixels, width as usize, height as usize).map_err(|error| undrawn(error.into()))
}

/// The pixels of a PNG, its width and height.
pub(super) fn pixels(picture: &Picture) -> Result<(Vec<u8>, (u32, u32))> {
    let (width, height) = size(picture);
    let (width, height) = (width * PNG_SCALE, height * PNG_SCALE);
    let mut pixels = vec![0; width as usize * height as usize * PIXEL];
    let page = Page::new(&mut pixels, (width, height)).map_err(|error| undrawn(error.into()))?;
    Drawing { picture, scale: PNG_SCALE }.draw(&page.into_drawing_area()).map_err(undrawn)?;
    Ok((pixels, (width, height)))
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

/// A picture on a page whose units are so many pixels.
struct Drawing<'a> {
    picture: &'a Picture,
    scale: u32,
}

impl Drawing<'_> {
    /// A length in pixels.
    fn px(&self, units: i32) -> i32 {
        units * i32::try_from(self.scale).unwrap_or(1)
    }

    fn at(&self, x: i32, y: i32) -> (i32, i32) {
        (self.px(x), self.px(y))
    }

    fn style(&self, size: i32) -> TextStyle<'static> {
        ("sans-serif", self.px(size)).into_font().color(&INK)
    }

    fn text<'t>(&self, text: impl Into<String>, x: i32, y: i32, size: i32) -> Text<'t, (i32, i32), String> {
        Text::new(text.into(), self.at(x, y), self.style(size))
    }

    fn draw<B: DrawingBackend>(&self, page: &Area<B>) -> DrawResult {
        let panels = &self.picture.panels;
        page.fill(&WHITE).map_err(failed)?;
        let (head, body) = page.split_vertically(TITLE_HEIGHT * self.scale);
        head.draw(&self.text(self.picture.title.clone(), 20, 14, 20)).map_err(failed)?;
        if panels.is_empty() {
            body.draw(&self.text("no rows", 20, 20, 16)).map_err(failed)?;
        }
        for (panel, area) in panels.iter().zip(body.split_evenly((panels.len().max(1), 1))) {
            let (plot, legend) = area.split_horizontally((WIDTH - LEGEND_WIDTH) * self.scale);
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
            .margin(self.px(10))
            .x_label_area_size(self.px(42))
            .y_label_area_size(self.px(72))
            .build_cartesian_2d(start..end, low..high)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(GRID.stroke_width(self.scale))
            .axis_style(INK.stroke_width(self.scale))
            .set_all_tick_mark_size(self.px(5))
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
        let stroke = MEAN.stroke_width(2 * self.scale);
        for run in &runs {
            let points = run.iter().map(|(time, value, _)| (*time, *value));
            chart.draw_series(LineSeries::new(points, stroke)).map_err(failed)?;
            // A line of one point can't be seen, nor can its bounds.
            if let [(time, value, bounds)] = run[..] {
                if let Some((low, high)) = bounds {
                    let faint = MEAN.mix(0.4).stroke_width(2 * self.scale);
                    chart
                        .draw_series([PathElement::new([(time, low), (time, high)], faint)])
                        .map_err(failed)?;
                }
                chart.draw_series([Circle::new((time, value), self.px(3), MEAN.filled())]).map_err(failed)?;
            }
        }
        legend.draw(&PathElement::new([self.at(4, 50), self.at(28, 50)], stroke)).map_err(failed)?;
        legend.draw(&self.text("mean", 36, 46, 13)).map_err(failed)?;
        if line.bounds.is_some() {
            let band = Rectangle::new([self.at(4, 64), self.at(28, 78)], MEAN.mix(0.18).filled());
            legend.draw(&band).map_err(failed)?;
            legend.draw(&self.text("mean ± s", 36, 67, 13)).map_err(failed)?;
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
        let width = chrono::Duration::microseconds(self.picture.width);
        for (start, shares) in feature.created_at.iter().zip(&feature.bin_proportions) {
            let mut below = 0.0;
            for (place, id) in ids.iter().enumerate() {
                let share = shares.get(id).copied().unwrap_or_default();
                let corners = [(*start, below), (*start + width, below + share)];
                let bar = Rectangle::new(corners, color(place, ids.len()).filled());
                chart.draw_series([bar]).map_err(failed)?;
                below += share;
            }
        }
        // The topmost share first, as it is in the plot.
        let step = ids.len().div_ceil(LEGEND_MAX).max(1);
        let named = ids.iter().enumerate().rev().step_by(step);
        for ((place, id), y) in named.zip((40..).step_by(16)) {
            let corners = [self.at(4, y), self.at(18, y + 11)];
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
