//! Binned answers as pictures: SVG for a page, characters for a terminal.

mod svg;
mod terminal;

use std::path::Path;

use chrono::{DateTime, Utc};

use super::print;
use crate::error::{Error, Result};
use crate::reader::{BinnedMetrics, BinnedQuery, FeatureBinProportions, SpcFeatures};

/// Panels of one picture: more can't be looked at together.
const PANELS_MAX: usize = 24;

/// What is drawn: a panel for each metric or feature.
pub(super) struct Picture {
    title: String,
    /// Start of the first bin and end of the last one that the query's range touches.
    range: (DateTime<Utc>, DateTime<Utc>),
    /// Length of a bin, microseconds.
    width: i64,
    panels: Vec<Panel>,
}

enum Panel {
    Line(Line),
    Shares(FeatureBinProportions),
}

/// A value for each bin, with bounds if the kind has them.
struct Line {
    name: String,
    times: Vec<DateTime<Utc>>,
    values: Vec<f64>,
    bounds: Option<Vec<(f64, f64)>>,
}

/// A run of bins without a gap: time in the middle of each bin, value, bounds.
type Run = Vec<(DateTime<Utc>, f64, Option<(f64, f64)>)>;

impl Picture {
    pub(super) fn custom(query: &BinnedQuery, found: BinnedMetrics) -> Result<Self> {
        let panels = found.metrics.into_values().map(|metric| {
            let values = metric.stats.iter().map(|stats| stats.avg).collect();
            let bounds = metric.stats.iter().map(|stats| (stats.lower_bound, stats.upper_bound)).collect();
            Panel::Line(Line { name: metric.metric, times: metric.created_at, values, bounds: Some(bounds) })
        });
        Self::new("custom", query, panels.collect())
    }

    pub(super) fn spc(query: &BinnedQuery, found: SpcFeatures) -> Result<Self> {
        let panels = found.features.into_iter().map(|(name, feature)| {
            Panel::Line(Line { name, times: feature.created_at, values: feature.values, bounds: None })
        });
        Self::new("spc", query, panels.collect())
    }

    pub(super) fn psi(query: &BinnedQuery, found: Vec<FeatureBinProportions>) -> Result<Self> {
        Self::new("psi", query, found.into_iter().map(Panel::Shares).collect())
    }

    fn new(kind: &str, query: &BinnedQuery, panels: Vec<Panel>) -> Result<Self> {
        if panels.len() > PANELS_MAX {
            let detail = format!(
                "{} series don't fit into a picture: choose up to {PANELS_MAX} with --metric",
                panels.len()
            );
            return Err(Error::Query { detail });
        }
        let (width, (start, end)) = (query.width(), query.range());
        let time = |micros| DateTime::from_timestamp_micros(micros).unwrap_or_default();
        let range =
            (time(width.start_of(start)), time(width.start_of(end - 1).saturating_add(width.micros())));
        let entity = query.entity();
        let length = std::time::Duration::from_micros(width.micros().unsigned_abs());
        let title = format!(
            "{kind}: {} {} {}, bins of {}",
            entity.space,
            entity.name,
            entity.version,
            humantime::format_duration(length)
        );
        Ok(Self { title, range, width: width.micros(), panels })
    }

    /// Writes the picture to a file, or draws it in the terminal.
    pub(super) fn draw(&self, file: Option<&Path>) -> Result<()> {
        let Some(path) = file else { return print(terminal::text(self).trim_end()) };
        if path.extension().is_none_or(|extension| extension != "svg") {
            return Err(Error::Setting {
                setting: "--plot".to_owned(),
                value: path.display().to_string(),
                accepted: "a file that ends in .svg, or nothing to draw in the terminal".to_owned(),
            });
        }
        let text = svg::text(self)?;
        std::fs::write(path, text).map_err(Error::io(format!("writing {}", path.display())))
    }

    /// The time in the middle of the bin that starts at `start`.
    fn middle(&self, start: DateTime<Utc>) -> DateTime<Utc> {
        start + chrono::Duration::microseconds(self.width / 2)
    }

    /// The bins of a line that touch one another; a NaN is a gap, too.
    fn runs(&self, line: &Line) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut last = None;
        for (index, (start, value)) in line.times.iter().zip(&line.values).enumerate() {
            if !value.is_finite() {
                last = None;
                continue;
            }
            let bounds = line.bounds.as_ref().and_then(|bounds| bounds.get(index)).copied();
            let bounds = bounds.filter(|(low, high)| low.is_finite() && high.is_finite());
            let is_next = last == Some(*start - chrono::Duration::microseconds(self.width));
            let point = (self.middle(*start), *value, bounds);
            match runs.last_mut().filter(|_| is_next) {
                Some(run) => run.push(point),
                None => runs.push(vec![point]),
            }
            last = Some(*start);
        }
        runs
    }
}

/// Smallest and largest value of a line, bounds included, with some room.
fn extent(runs: &[Run]) -> (f64, f64) {
    let values = runs.iter().flatten().flat_map(|(_, value, bounds)| {
        let (low, high) = bounds.unwrap_or((*value, *value));
        [low, *value, high]
    });
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (0.0, 1.0);
    }
    let room = if high > low { (high - low) * 0.06 } else { low.abs().max(1.0) * 0.1 };
    (low - room, high + room)
}

/// All bins of a feature, ascending.
fn bin_ids(feature: &FeatureBinProportions) -> Vec<i32> {
    feature.overall_proportions.keys().copied().collect()
}

/// A time for an axis over a span: dates for days, clock times for hours.
fn axis_time(time: DateTime<Utc>, span: chrono::Duration) -> String {
    let form = match span {
        span if span > chrono::Duration::days(700) => "%Y-%m",
        span if span > chrono::Duration::days(3) => "%b %e",
        span if span > chrono::Duration::hours(18) => "%b %e %H:%M",
        span if span > chrono::Duration::minutes(10) => "%H:%M",
        _ => "%H:%M:%S%.3f",
    };
    time.format(form).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::{BinWidth, BinnedMetric, BinnedMetricStats};
    use crate::record::Entity;

    fn query() -> BinnedQuery {
        let entity = Entity { space: "shop".into(), name: "rank & <co>".into(), version: "1".into() };
        let time = |hours: i64| DateTime::from_timestamp(hours * 3600 + 60, 0).unwrap();
        BinnedQuery::new(entity, time(0), time(7), BinWidth::from_minutes(60.0).unwrap()).unwrap()
    }

    fn custom() -> Picture {
        let stats = |avg: f64| BinnedMetricStats { avg, lower_bound: avg - 1.0, upper_bound: avg + 1.0 };
        let hours = [0, 1, 2, 4, 5, 6];
        let metric = BinnedMetric {
            metric: "accuracy".into(),
            created_at: hours.map(|hour| DateTime::from_timestamp(hour * 3600, 0).unwrap()).to_vec(),
            stats: [1.0, 2.0, 3.0, 4.0, f64::NAN, 6.0].map(stats).to_vec(),
        };
        let found = BinnedMetrics { metrics: [("accuracy".to_owned(), metric)].into() };
        Picture::custom(&query(), found).unwrap()
    }

    fn psi() -> Picture {
        let feature = FeatureBinProportions {
            feature: "age".into(),
            created_at: [0, 3].map(|hour| DateTime::from_timestamp(hour * 3600, 0).unwrap()).to_vec(),
            bin_proportions: vec![[(0, 0.25), (1, 0.75)].into(), [(0, 1.0)].into()],
            overall_proportions: [(0, 0.5), (1, 0.5)].into(),
        };
        Picture::psi(&query(), vec![feature]).unwrap()
    }

    #[test]
    fn lines_break_at_gaps_and_nans() {
        let picture = custom();
        let Some(Panel::Line(line)) = picture.panels.first() else { panic!() };
        let runs = picture.runs(line);
        assert_eq!(runs.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1]);
        assert_eq!(runs[0][0].0.timestamp(), 1800, "the middle of the bin");
        let (low, high) = extent(&runs);
        assert!(low < 0.0 && high > 7.0, "{low} {high}");
        assert_eq!((picture.range.0.timestamp(), picture.range.1.timestamp()), (0, 8 * 3600));
    }

    #[test]
    fn an_svg_has_titles_axes_legends_and_every_share() {
        let text = svg::text(&custom()).unwrap();
        for part in [
            "<svg",
            "rank &amp; &lt;co&gt;",
            "accuracy",
            "time (UTC)",
            "mean &#177; s",
            "<polygon",
            "<polyline",
            "<circle",
        ] {
            assert!(text.contains(part) || text.contains(&part.replace("&#177;", "±")), "{part}: {text}");
        }
        let text = svg::text(&psi()).unwrap();
        assert!(text.contains("bin 0") && text.contains("bin 1") && text.contains("100 %"), "{text}");
    }

    #[test]
    fn a_terminal_shows_the_same() {
        let text = terminal::text(&custom());
        assert!(text.contains("accuracy") && text.contains("00:00") && text.contains('⠁'), "{text}");
        let text = terminal::text(&psi());
        assert!(text.contains("age") && text.contains('0') && text.contains("100 %"), "{text}");
    }

    #[test]
    fn nothing_is_a_picture_too() {
        let nothing = Picture::custom(&query(), BinnedMetrics::default()).unwrap();
        assert!(svg::text(&nothing).unwrap().contains("no rows"));
        assert!(terminal::text(&nothing).contains("no rows"));
    }
}
