//! `highwater query` and `entities`: the history, for people, spreadsheets and programs.

use std::path::PathBuf;

use arrow::array::RecordBatch;
use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use clap::Args;
use datafusion::dataframe::DataFrame;
use futures::stream;
use serde::Serialize;

use super::output::{Style, print_rows};
use super::plot::Picture;
use super::{OutputFormat, json, print};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reader::{Archive, BinnedQuery, Bins, Stat, TableQuery, When, zone};
use crate::tables::{Entity, Kind};

/// Which rows, and in which bins.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct RangeFlags {
    /// Only rows from this time on: RFC 3339, a date, or -30d for 30 days ago
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    from: When,

    /// Only rows before this time [default: now]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    to: Option<When>,

    /// Length of the bins, such as 30s, 15m or 6h; or 1d, 1w, 1mo, 1y for days, weeks from Monday, months and years
    #[arg(long, value_name = "LENGTH", conflicts_with = "points")]
    bin: Option<Bins>,

    /// The time zone in which days begin, such as Europe/Berlin
    #[arg(long, value_name = "ZONE", value_parser = zone, default_value = "UTC")]
    tz: Tz,

    /// Choose the shortest round length of which there are at most so many bins
    #[arg(long, default_value_t = 500)]
    points: u32,
}

impl RangeFlags {
    pub(super) fn range(&self) -> Result<(DateTime<Utc>, DateTime<Utc>)> {
        let end = self.to.map(|to| self.time(to)).transpose()?;
        Ok((self.time(self.from)?, end.unwrap_or_else(Utc::now)))
    }

    pub(super) fn time(&self, when: When) -> Result<DateTime<Utc>> {
        when.time(self.tz, Utc::now())
    }

    pub(super) fn bins(&self, start: DateTime<Utc>, end: DateTime<Utc>) -> Result<Bins> {
        match self.bin {
            Some(bins) => Ok(bins.within(self.tz)),
            None => {
                Bins::at_most_in(self.tz, self.points, (start.timestamp_micros(), end.timestamp_micros()))
            }
        }
    }
}

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct QueryFlags {
    /// What to read: custom (mean of each metric, with a standard deviation to both sides), psi (proportions of each feature's
    /// bins), spc (mean of each feature); or any table, with --value
    #[arg(value_name = "TABLE")]
    table: String,

    /// Space of the model
    #[arg(long)]
    space: Option<String>,

    /// Name of the model
    #[arg(long)]
    name: Option<String>,

    /// Version of the model
    #[arg(long)]
    version: Option<String>,

    /// The column whose values are asked for; the table may then be any, and the model may be left out
    #[arg(long, value_name = "COLUMN")]
    value: Option<String>,

    /// For each value of this column; may be repeated
    #[arg(long, value_name = "COLUMN", requires = "value")]
    by: Vec<String>,

    /// Only rows for which this is true, such as "status >= 500"
    #[arg(long = "where", value_name = "SQL", requires = "value")]
    condition: Option<String>,

    /// What of the values: mean, min, max, count, sum, or a percentile such as p50 or p99.9; several with commas
    #[arg(long, value_name = "STATS", value_delimiter = ',', default_value = "mean", requires = "value")]
    stat: Vec<Stat>,

    #[command(flatten)]
    range: RangeFlags,

    /// Also read the rows from Postgres that are not archived yet: the answer is complete up to now
    #[arg(long, conflicts_with = "value")]
    fresh: bool,

    /// Draw the answer: in the terminal, or into a file that ends in .svg or .png
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "not given, given alone, given with a file")]
    plot: Option<Option<PathBuf>>,

    /// Only this metric (or feature); may be repeated
    #[arg(long, visible_alias = "feature", value_name = "NAME", conflicts_with = "value")]
    metric: Vec<String>,
}

/// The kinds that have queries of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueryKind {
    Custom,
    Psi,
    Spc,
}

impl QueryKind {
    fn of(table: &str) -> Result<Self> {
        match table {
            "custom" => Ok(Self::Custom),
            "psi" => Ok(Self::Psi),
            "spc" => Ok(Self::Spc),
            other => Err(Error::Setting {
                setting: "the table".to_owned(),
                value: other.to_owned(),
                accepted: "custom, psi or spc; or any table of the archive with --value, the column that is asked for"
                    .to_owned(),
            }),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Custom => Kind::custom(),
            Self::Psi => Kind::psi(),
            Self::Spc => Kind::spc(),
        }
    }
}

impl QueryFlags {
    fn query(&self) -> Result<BinnedQuery> {
        let part = |flag: &str, value: &Option<String>| {
            value.clone().ok_or_else(|| Error::Setting {
                setting: flag.to_owned(),
                value: "missing".to_owned(),
                accepted:
                    "given: a model is a --space, a --name and a --version (`highwater entities` lists them)"
                        .to_owned(),
            })
        };
        let entity = Entity {
            space: part("--space", &self.space)?,
            name: part("--name", &self.name)?,
            version: part("--version", &self.version)?,
        };
        let (start, end) = self.range.range()?;
        Ok(BinnedQuery::new(entity, start, end, self.range.bins(start, end)?)?.of_series(self.metric.clone()))
    }

    /// The question of a column of any table.
    fn table_query(&self, value: &str) -> Result<TableQuery> {
        let (start, end) = self.range.range()?;
        let query = TableQuery::new(self.table.as_str(), value, start, end, self.range.bins(start, end)?)?
            .by(self.by.clone())
            .stats(self.stat.iter().copied());
        let entity = [("space", &self.space), ("name", &self.name), ("version", &self.version)];
        let query = entity.into_iter().fold(query, |query, (column, text)| match text {
            Some(text) => query.equal(column, text),
            None => query,
        });
        Ok(match &self.condition {
            Some(condition) => query.only(condition),
            None => query,
        })
    }
}

/// Prints what a column of any table is like, or draws it.
async fn of_table(config: &Config, flags: &QueryFlags, value: &str, style: Style) -> Result<()> {
    let query = flags.table_query(value)?;
    let archive = match flags.condition {
        // It may ask other tables.
        Some(_) => Archive::open_within(&config.storage, config.memory_bytes).await?,
        None => Archive::open_table(&config.storage, query.table(), config.memory_bytes).await?,
    };
    match &flags.plot {
        Some(file) => {
            let found = archive.binned_table(&query).await?;
            Picture::table(&query, flags.by.as_slice(), found)?.draw(file.as_deref())
        }
        None => print_frame(archive.table_frame(&query).await?, style).await,
    }
}

/// Prints a binned query's answer.
pub(super) async fn query(config: &Config, flags: &QueryFlags, style: Style) -> Result<()> {
    if let Some(value) = &flags.value {
        return of_table(config, flags, value, style).await;
    }
    let kind = QueryKind::of(&flags.table)?;
    let query = flags.query()?;
    let mut archive = Archive::open_table(&config.storage, kind.kind().name(), config.memory_bytes).await?;
    if flags.fresh {
        archive = archive.with_database(config.clone());
    }
    if style.format() == OutputFormat::Json || flags.plot.is_some() {
        return collect(&archive, &query, kind, flags).await;
    }
    let frame = match kind {
        QueryKind::Custom => archive.custom_frame(&query).await?,
        QueryKind::Psi => archive.psi_frame(&query).await?,
        QueryKind::Spc => archive.spc_frame(&query).await?,
    };
    let schema = frame.schema().inner().clone();
    // Before anything is printed it must be known whether there is anything.
    let batches = frame.collect().await.map_err(Error::query("running the query"))?;
    let is_empty = batches.iter().all(|batch: &RecordBatch| batch.num_rows() == 0);
    known(&archive, kind.kind(), &query, is_empty).await?;
    print_rows(&schema, stream::iter(batches.into_iter().map(Ok)), style).await
}

/// Prints the answer as a document, or draws it.
async fn collect(archive: &Archive, query: &BinnedQuery, kind: QueryKind, flags: &QueryFlags) -> Result<()> {
    let file = flags.plot.as_ref().map(Option::as_deref);
    match kind {
        QueryKind::Custom => {
            let found = archive.binned_custom(query).await?;
            known(archive, kind.kind(), query, found.metrics.is_empty()).await?;
            match file {
                Some(file) => Picture::custom(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
        QueryKind::Psi => {
            let found = archive.binned_psi(query).await?;
            known(archive, kind.kind(), query, found.is_empty()).await?;
            match file {
                Some(file) => Picture::psi(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
        QueryKind::Spc => {
            let found = archive.binned_spc(query).await?;
            known(archive, kind.kind(), query, found.features.is_empty()).await?;
            match file {
                Some(file) => Picture::spc(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
    }
}

/// An empty answer must not hide a mistyped name.
pub(super) async fn known(archive: &Archive, kind: Kind, query: &BinnedQuery, is_empty: bool) -> Result<()> {
    if is_empty { archive.check_entity(kind, query.entity()).await } else { Ok(()) }
}

pub(super) fn print_json(found: &impl Serialize) -> Result<()> {
    print(&json(found)?)
}

/// Prints which entities the archive has, with their times and rows.
pub(super) async fn entities(config: &Config, style: Style) -> Result<()> {
    let archive = Archive::open_within(&config.storage, config.memory_bytes).await?;
    print_frame(archive.entities_frame().await?, style).await
}

/// Prints the rows of a frame as they come.
pub(super) async fn print_frame(frame: DataFrame, style: Style) -> Result<()> {
    let batches = frame.execute_stream().await.map_err(Error::asked("running the query"))?;
    print_rows(&batches.schema(), batches, style).await
}
