//! Binned answers as pictures: SVG or PNG for a page, characters for a terminal.

mod draw;
mod terminal;

use std::ffi::OsStr;
use std::path::Path;

use chrono::{DateTime, Utc};

use super::columns::cell;
use super::print;
use crate::error::{Error, Result};
use crate::reader::drift::{Drift, DriftQuery};
use crate::reader::{
    BinnedMetricStats, BinnedMetrics, BinnedQuery, Bins, FeatureBinProportions, SpcFeatures, Stat, TableBins,
    TableQuery,
};

/// Panels of one picture: more can't be looked at together.
const PANELS_MAX: usize = 24;

/// What is drawn: a panel for each metric or feature.
pub(super) struct Picture {
    title: String,
    /// Start of the first bin and end of the last one that the query's range touches.
    range: (DateTime<Utc>, DateTime<Utc>),
    /// Where bins begin and end.
    bins: Bins,
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
    /// What the values are, and what lies between the bounds.
    labels: (String, &'static str),
}

/// What the bounds of a mean are.
const SPREAD: &str = "mean ± s";

/// A run of bins without a gap: time in the middle of each bin, value, bounds.
type Run = Vec<(DateTime<Utc>, f64, Option<(f64, f64)>)>;

impl Picture {
    pub(super) fn custom(query: &BinnedQuery, found: BinnedMetrics) -> Result<Self> {
        let panels = found.metrics.into_values().map(|metric| {
            let values = metric.stats.iter().map(|stats| drawable(stats.avg)).collect();
            let bound =
                |stats: &BinnedMetricStats| (drawable(stats.lower_bound), drawable(stats.upper_bound));
            let bounds = metric.stats.iter().map(bound).collect();
            let labels = ("mean".to_owned(), SPREAD);
            Panel::Line(Line {
                name: metric.metric,
                times: metric.created_at,
                values,
                bounds: Some(bounds),
                labels,
            })
        });
        Self::of_model("custom", query, panels.collect())
    }

    pub(super) fn spc(query: &BinnedQuery, found: SpcFeatures) -> Result<Self> {
        let panels = found.features.into_iter().map(|(name, feature)| {
            let values = feature.values.into_iter().map(drawable).collect();
            let labels = ("mean".to_owned(), "");
            Panel::Line(Line { name, times: feature.created_at, values, bounds: None, labels })
        });
        Self::of_model("spc", query, panels.collect())
    }

    pub(super) fn psi(query: &BinnedQuery, found: Vec<FeatureBinProportions>) -> Result<Self> {
        Self::of_model("psi", query, found.into_iter().map(Panel::Shares).collect())
    }

    /// A panel for each series: the first of the stats, and the smallest and largest value around it where these were asked for, too.
    pub(super) fn table(query: &TableQuery, by: &[String], found: TableBins) -> Result<Self> {
        let panels = found.series.into_iter().map(|series| {
            let named = by.iter().zip(&series.by);
            let named = named.map(|(column, value)| format!("{column} {}", value.as_deref().unwrap_or("-")));
            let name = named.collect::<Vec<_>>().join(", ");
            let values = |stat: Stat| {
                let values = series.stats.get(&stat.name())?.iter();
                Some(values.map(|value| drawable(value.unwrap_or(f64::NAN))).collect::<Vec<_>>())
            };
            let bounds = values(Stat::Min).zip(values(Stat::Max));
            let bounds = bounds.map(|(low, high)| low.into_iter().zip(high).collect());
            let first = query.asked().first().and_then(|stat| values(*stat)).unwrap_or_default();
            let name = if name.is_empty() { found.value.clone() } else { name };
            let labels = (query.asked().first().map(|stat| stat.name()).unwrap_or_default(), "min to max");
            Panel::Line(Line { name, times: series.created_at.clone(), values: first, bounds, labels })
        });
        let stats: Vec<String> = query.asked().iter().map(|stat| stat.name()).collect();
        let what = format!("{}: {} of {}", found.table, stats.join(", "), found.value);
        Self::new(&what, query.bins(), query.range(), panels.collect())
    }

    /// A panel for each series, the one that moved most first.
    pub(super) fn drift(query: &DriftQuery, found: Drift) -> Result<Self> {
        let label = found.measure;
        let panels = found.series.into_iter().map(|series| {
            let values = series.score.into_iter().map(drawable).collect();
            let labels = (label.to_owned(), "");
            Panel::Line(Line { name: series.name, times: series.created_at, values, bounds: None, labels })
        });
        let what = format!("{} against {}", query.kind().name(), found.against);
        Self::of_model(&what, query.query(), panels.collect())
    }

    fn of_model(kind: &str, query: &BinnedQuery, panels: Vec<Panel>) -> Result<Self> {
        let entity = query.entity();
        let what = format!("{kind}: {} {} {}", entity.space, entity.name, entity.version);
        Self::new(&what, query.bins(), query.range(), panels)
    }

    fn new(what: &str, bins: Bins, (start, end): (i64, i64), mut panels: Vec<Panel>) -> Result<Self> {
        if panels.len() > PANELS_MAX {
            let detail = format!(
                "{} series don't fit into a picture: choose up to {PANELS_MAX} (--metric, or --where)",
                panels.len()
            );
            return Err(Error::Query { detail });
        }
        let time = |micros| DateTime::from_timestamp_micros(micros).unwrap_or_default();
        let range = (time(bins.start_of(start)), time(bins.end_of(end - 1)));
        let title = cell(&format!("{what}, bins of {bins}"), NAME_MAX);
        for panel in &mut panels {
            match panel {
                Panel::Line(line) => line.name = cell(&line.name, NAME_MAX),
                Panel::Shares(feature) => feature.feature = cell(&feature.feature, NAME_MAX),
            }
        }
        Ok(Self { title, range, bins, panels })
    }

    /// Writes the picture to a file, or draws it in the terminal.
    pub(super) fn draw(&self, file: Option<&Path>) -> Result<()> {
        let Some(path) = file else { return print(terminal::text(self).trim_end()) };
        let bytes = match path.extension().and_then(OsStr::to_str) {
            Some("svg") => draw::svg(self)?.into_bytes(),
            Some("png") => draw::png(self)?,
            _ => {
                return Err(Error::Setting {
                    setting: "--plot".to_owned(),
                    value: path.display().to_string(),
                    accepted: "a file that ends in .svg or .png, or nothing to draw in the terminal"
                        .to_owned(),
                });
            }
        };
        std::fs::write(path, bytes).map_err(Error::io(format!("writing {}", path.display())))
    }

    /// The time in the middle of the bin that starts at `start`.
    fn middle(&self, start: DateTime<Utc>) -> DateTime<Utc> {
        start + (self.end_of(start) - start) / 2
    }

    /// The end of the bin that starts at `start`.
    fn end_of(&self, start: DateTime<Utc>) -> DateTime<Utc> {
        let end = self.bins.end_of(start.timestamp_micros());
        DateTime::from_timestamp_micros(end).unwrap_or(start)
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
            let is_next = last == Some(*start);
            let point = (self.middle(*start), *value, bounds);
            match runs.last_mut().filter(|_| is_next) {
                Some(run) => run.push(point),
                None => runs.push(vec![point]),
            }
            last = Some(self.end_of(*start));
        }
        runs
    }
}

/// Characters of a name. Control characters would break a picture's XML, or a terminal.
const NAME_MAX: usize = 200;

/// Values past it are drawn as if they were it: the span of an axis must be a number, too.
const VALUE_MAX: f64 = f64::MAX / 8.0;

fn drawable(value: f64) -> f64 {
    if value.is_finite() { value.clamp(-VALUE_MAX, VALUE_MAX) } else { value }
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
        span if span > chrono::Duration::days(3) => "%b %-d",
        span if span > chrono::Duration::hours(18) => "%b %-d %H:%M",
        span if span > chrono::Duration::minutes(10) => "%H:%M",
        _ => "%H:%M:%S%.3f",
    };
    time.format(form).to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::reader::{BinnedMetric, SpcFeature};
    use crate::tables::Entity;

    fn query() -> BinnedQuery {
        let entity = Entity { space: "shop".into(), name: "rank & <co>".into(), version: "1".into() };
        let time = |hours: i64| DateTime::from_timestamp(hours * 3600 + 60, 0).unwrap();
        BinnedQuery::new(entity, time(0), time(7), Bins::from_minutes(60.0).unwrap()).unwrap()
    }

    fn custom() -> Picture {
        let stats = |avg: f64| BinnedMetricStats {
            avg,
            lower_bound: avg - 1.0,
            upper_bound: avg + 1.0,
            ..BinnedMetricStats::default()
        };
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
            ..FeatureBinProportions::default()
        };
        Picture::psi(&query(), vec![feature]).unwrap()
    }

    fn spc() -> Picture {
        let feature = SpcFeature {
            created_at: [0, 1, 2, 5].map(|hour| DateTime::from_timestamp(hour * 3600, 0).unwrap()).to_vec(),
            values: vec![1e-7, 2e-7, -1e-7, 0.0],
            ..SpcFeature::default()
        };
        let found = SpcFeatures { features: [("länge µ".to_owned(), feature)].into() };
        Picture::spc(&query(), found).unwrap()
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
        let text = draw::svg(&custom()).unwrap();
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
        let text = draw::svg(&psi()).unwrap();
        assert!(text.contains("bin 0") && text.contains("bin 1") && text.contains("100 %"), "{text}");
    }

    /// A page as a decoder of PNG sees it: width, height, and pixels from the top.
    fn decoded(picture: &Picture) -> (usize, usize, Vec<[u8; 3]>) {
        let bytes = draw::png(picture).unwrap();
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n"));
        let page = resvg::tiny_skia::Pixmap::decode_png(&bytes).unwrap();
        let pixels = page.pixels().iter().map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]).collect();
        (page.width() as usize, page.height() as usize, pixels)
    }

    #[test]
    fn a_png_shows_the_same() {
        for (picture, wanted) in [(custom(), [23, 98, 170]), (spc(), [23, 98, 170]), (psi(), [68, 50, 130])] {
            let (width, height, pixels) = decoded(&picture);
            assert_eq!((width, height), (2 * 1080, 2 * (44 + 270)));
            let colors: HashSet<_> = pixels.iter().collect();
            assert!(colors.len() > 20 && colors.contains(&wanted), "{} colours", colors.len());
            assert_eq!((pixels[0], pixels[pixels.len() - 1]), ([255; 3], [255; 3]), "the page is white");
            // Of the title: without its letters there would be nothing but white.
            let ink = pixels.iter().take(width * 2 * 40).filter(|pixel| pixel[0] < 128).count();
            assert!(ink > 1_000, "{ink} dark pixels");
        }
    }

    #[test]
    fn a_png_has_the_letters_of_the_names() {
        let head = |name: &str| {
            let mut picture = Picture::custom(&query(), BinnedMetrics::default()).unwrap();
            picture.title = name.to_owned();
            let mut pixels = draw::pixels(&picture).unwrap().take();
            pixels.truncate(2 * 1080 * 2 * 44 * 4);
            pixels
        };
        assert_ne!(head("shop"), head("ship"));
        let blank = head("");
        assert!(blank.iter().all(|byte| *byte == 255));
        // What the font doesn't have is seen, as boxes; what is from right to left or of no width does no harm.
        assert_ne!(head("模型"), blank);
        assert_eq!(head("模型"), head("排序"));
        for name in ["\u{1f600}\u{200d}\u{1f680}", "דירוג", "a\u{301}\u{0}\n\t\u{feff}\u{10ffff}"] {
            assert_ne!(head(name), blank, "{name:?}");
        }
        assert_ne!(head(&"long ".repeat(1_000)), blank);
    }

    #[test]
    fn a_file_that_cannot_be_written_or_is_none_of_ours_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        psi().draw(Some(&file("psi.png"))).unwrap();
        assert!(std::fs::read(file("psi.png")).unwrap().starts_with(b"\x89PNG"));
        let error = psi().draw(Some(&file("none/psi.png"))).unwrap_err();
        assert!(error.to_string().contains("none/psi.png"), "{error}");
        for name in ["psi.bmp", "psi", ".png"] {
            let error = psi().draw(Some(&file(name))).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("in .svg or .png"), "{error}");
        }
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
        assert!(draw::svg(&nothing).unwrap().contains("no rows"));
        assert!(terminal::text(&nothing).contains("no rows"));
        assert!(decoded(&nothing).2.contains(&[38, 50, 66]));
    }
}
