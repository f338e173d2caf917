//! `highwater query` and `entities`: the history, for people, spreadsheets and programs.

use std::path::PathBuf;
use std::time::Duration;

use arrow::array::RecordBatch;
use chrono::{DateTime, Utc};
use clap::{Args, ValueEnum};
use datafusion::dataframe::DataFrame;
use futures::stream;
use serde::Serialize;

use super::output::{Style, print_rows};
use super::plot::Picture;
use super::time::time;
use super::{OutputFormat, json, print};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reader::{Archive, BinWidth, BinnedQuery};
use crate::tables::{Entity, Kind};

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct QueryFlags {
    /// What to read
    kind: QueryKind,

    /// Space of the model
    #[arg(long)]
    space: String,

    /// Name of the model
    #[arg(long)]
    name: String,

    /// Version of the model
    #[arg(long)]
    version: String,

    /// Only rows from this time on: RFC 3339, a date, or -30d for 30 days ago
    #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
    from: DateTime<Utc>,

    /// Only rows before this time [default: now]
    #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
    to: Option<DateTime<Utc>>,

    /// Length of the bins, such as 30s, 15m, 1h or 7d; they are aligned to 1970-01-01T00:00:00Z
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, conflicts_with = "points")]
    bin: Option<Duration>,

    /// Choose the shortest round length of which there are at most so many bins
    #[arg(long, default_value_t = 500)]
    points: u32,

    /// Also read the rows from Postgres that are not archived yet: the answer is complete up to now
    #[arg(long)]
    fresh: bool,

    /// Draw the answer: in the terminal, or into a file that ends in .svg or .png
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "not given, given alone, given with a file")]
    plot: Option<Option<PathBuf>>,

    /// Only this metric (or feature); may be repeated
    #[arg(long, visible_alias = "feature", value_name = "NAME")]
    metric: Vec<String>,
}

/// The kinds that have binned queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum QueryKind {
    /// Mean of each metric, with a standard deviation to both sides
    Custom,
    /// Proportions of each feature's bins
    Psi,
    /// Mean of each feature
    Spc,
}

impl QueryKind {
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
        let entity =
            Entity { space: self.space.clone(), name: self.name.clone(), version: self.version.clone() };
        let (start, end) = (self.from, self.to.unwrap_or_else(Utc::now));
        let query = match self.bin {
            Some(width) => BinnedQuery::new(entity, start, end, BinWidth::new(width)?),
            None => BinnedQuery::with_points(entity, start, end, self.points),
        };
        Ok(query?.of_series(self.metric.clone()))
    }
}

/// Prints a binned query's answer.
pub(super) async fn query(config: &Config, flags: &QueryFlags, style: Style) -> Result<()> {
    let query = flags.query()?;
    let mut archive = Archive::open_within(&config.storage, config.memory_bytes).await?;
    if flags.fresh {
        archive = archive.with_database(config.clone());
    }
    if style.format() == OutputFormat::Json || flags.plot.is_some() {
        return collect(&archive, &query, flags).await;
    }
    let frame = match flags.kind {
        QueryKind::Custom => archive.custom_frame(&query).await?,
        QueryKind::Psi => archive.psi_frame(&query).await?,
        QueryKind::Spc => archive.spc_frame(&query).await?,
    };
    let schema = frame.schema().inner().clone();
    // Before anything is printed it must be known whether there is anything.
    let batches = frame.collect().await.map_err(Error::query("running the query"))?;
    let is_empty = batches.iter().all(|batch: &RecordBatch| batch.num_rows() == 0);
    known(&archive, flags, &query, is_empty).await?;
    print_rows(&schema, stream::iter(batches.into_iter().map(Ok)), style).await
}

/// Prints the answer as a document, or draws it.
async fn collect(archive: &Archive, query: &BinnedQuery, flags: &QueryFlags) -> Result<()> {
    let file = flags.plot.as_ref().map(Option::as_deref);
    match flags.kind {
        QueryKind::Custom => {
            let found = archive.binned_custom(query).await?;
            known(archive, flags, query, found.metrics.is_empty()).await?;
            match file {
                Some(file) => Picture::custom(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
        QueryKind::Psi => {
            let found = archive.binned_psi(query).await?;
            known(archive, flags, query, found.is_empty()).await?;
            match file {
                Some(file) => Picture::psi(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
        QueryKind::Spc => {
            let found = archive.binned_spc(query).await?;
            known(archive, flags, query, found.features.is_empty()).await?;
            match file {
                Some(file) => Picture::spc(query, found)?.draw(file),
                None => print_json(&found),
            }
        }
    }
}

/// An empty answer must not hide a mistyped name.
async fn known(archive: &Archive, flags: &QueryFlags, query: &BinnedQuery, is_empty: bool) -> Result<()> {
    if is_empty { archive.check_entity(flags.kind.kind(), query.entity()).await } else { Ok(()) }
}

fn print_json(found: &impl Serialize) -> Result<()> {
    print(&json(found)?)
}

/// Prints which entities the archive has, with their times and rows.
pub(super) async fn entities(config: &Config, style: Style) -> Result<()> {
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let of_kind = |kind: Kind| {
        let columns = kind.entity_columns().iter().map(|column| quoted(column));
        // Of more than three the first three tell, of fewer the rest is empty.
        let names: Vec<String> = columns.chain((0..3).map(|_| "''".to_owned())).take(3).collect();
        format!(
            "select '{0}' as kind, {names} as space, {1} as name, {2} as version, min({time}) as first, max({time}) as last, \
             count(*) as rows from {table} group by {all}",
            kind.name(),
            names.get(1).map_or("''", String::as_str),
            names.get(2).map_or("''", String::as_str),
            names = names.first().map_or("''", String::as_str),
            time = quoted(kind.time_column()),
            table = quoted(kind.name()),
            all = names.iter().filter(|name| *name != "''").cloned().collect::<Vec<_>>().join(", "),
        )
    };
    let archive = Archive::open_within(&config.storage, config.memory_bytes).await?;
    let kinds = archive.kinds().into_iter().filter(|kind| kind.entity().is_some());
    let tables: Vec<String> = kinds.map(of_kind).collect();
    let query = format!("{} order by kind, space, name, version", tables.join(" union all "));
    print_frame(archive.sql(&query).await?, style).await
}

/// Prints the rows of a frame as they come.
pub(super) async fn print_frame(frame: DataFrame, style: Style) -> Result<()> {
    let batches = frame.execute_stream().await.map_err(Error::asked("running the query"))?;
    print_rows(&batches.schema(), batches, style).await
}
