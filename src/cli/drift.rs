//! `highwater drift`: how far a model has moved, which of its series most, and since when.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use clap::{Args, value_parser};
use futures::stream;

use super::OutputFormat;
use super::output::{Style, print_rows};
use super::plot::Picture;
use super::query::{RangeFlags, known, print_json};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::sql;
use crate::reader::drift::{Against, DriftQuery, Measure, Named, Profile, Smoothing, Threshold};
use crate::reader::{Archive, BinnedQuery};
use crate::source::scouter;
use crate::tables::{Entity, Kind};

#[derive(Args, Clone, Debug, PartialEq)]
pub(super) struct DriftFlags {
    /// What to read: psi (counts of each feature's bins), custom (values of each metric), spc (values of each feature)
    #[arg(value_name = "TABLE", value_parser = kind)]
    table: Kind,

    /// Space of the model
    #[arg(long)]
    space: String,

    /// Name of the model
    #[arg(long)]
    name: String,

    /// Version of the model
    #[arg(long)]
    version: String,

    #[command(flatten)]
    range: RangeFlags,

    /// What each bin is compared with: a time such as 2026-01-01..2026-02-01, previous (the bin before), -365d (the bin that was so long ago),
    /// version:1.3.0 (of the same model, over the same range), profile (Scouter's, from the database) or profile:FILE
    #[arg(long, value_name = "REFERENCE", default_value = "previous", allow_hyphen_values = true)]
    against: Named,

    /// How far is measured by psi, js, hellinger, tvd or chi2, of psi; by smd (standardized mean difference) or ks, of custom and spc
    /// [default: psi, of psi; smd, of custom and spc]
    #[arg(long)]
    measure: Option<Measure>,

    /// What is done about bins that one side has nothing in, by psi, and by chi2 against a profile: scouter (1e-10 is added to each share),
    /// evidently (a share of nothing is 0.0001), count (1 is added to each count) or none [default: scouter]
    #[arg(long)]
    smoothing: Option<Smoothing>,

    /// From where on a bin is over: a number, chi2:0.05 (what chance exceeds so often) or sd:3 (of the reference's own scores)
    /// [default: chi2:0.05; 0.1 of tvd]
    #[arg(long)]
    threshold: Option<Threshold>,

    /// Only this many series: those that moved most
    #[arg(long, value_name = "COUNT", value_parser = value_parser!(u32).range(1..))]
    top: Option<u32>,

    /// A row for each series, the one that moved most first: its highest score, how many bins are over, since when, and the largest step
    #[arg(long)]
    summary: bool,

    /// Draw the scores: in the terminal, or into a file that ends in .svg or .png
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with = "summary")]
    #[expect(clippy::option_option, reason = "not given, given alone, given with a file")]
    plot: Option<Option<PathBuf>>,

    /// Also read the rows from Postgres that are not archived yet: the answer is complete up to now
    #[arg(long)]
    fresh: bool,

    /// Only this metric (or feature); may be repeated
    #[arg(long, visible_alias = "feature", value_name = "NAME")]
    metric: Vec<String>,
}

fn kind(name: &str) -> Result<Kind, String> {
    let kinds = Kind::drift();
    kinds
        .iter()
        .find(|kind| kind.name() == name)
        .copied()
        .ok_or_else(|| format!("{name:?} is none of custom, psi, spc"))
}

/// The reference; a profile is read from its file, or from the database.
async fn against(config: &Config, flags: &DriftFlags, entity: &Entity) -> Result<Against> {
    let profile = match &flags.against {
        Named::Profile(Some(file)) => {
            let text = read(file).map_err(Error::io(format!("reading the profile {:?}", file.display())))?;
            serde_json::from_slice(&text).map_err(|error| Error::Query {
                detail: format!("{} is no profile: it is not JSON ({error})", file.display()),
            })?
        }
        Named::Profile(None) => {
            let client = sql::connect(&config.source).await?;
            let found = scouter::profile(&client, &config.schema, entity, flags.table.name()).await?;
            found.ok_or_else(|| Error::Query {
                detail: format!("the database has no {} profile of this model", flags.table.name()),
            })?
        }
        named => return named.at(|when| flags.range.time(when)),
    };
    Ok(Against::Profile(Profile::new(profile)))
}

/// The most bytes of a profile.
const PROFILE_BYTES_MAX: u64 = 64 << 20;

/// A file that is one, and no more of it than a profile has.
fn read(file: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(PROFILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > PROFILE_BYTES_MAX {
        let limit = format!("it has more than {} MiB", PROFILE_BYTES_MAX >> 20);
        return Err(std::io::Error::other(limit));
    }
    Ok(bytes)
}

/// Prints how far the model has moved.
pub(super) async fn drift(config: &Config, flags: &DriftFlags, style: Style) -> Result<()> {
    let entity =
        Entity { space: flags.space.clone(), name: flags.name.clone(), version: flags.version.clone() };
    let (start, end) = flags.range.range()?;
    let query = BinnedQuery::new(entity.clone(), start, end, flags.range.bins(start, end)?)?;
    let against = against(config, flags, &entity).await?;
    let mut asked = DriftQuery::new(flags.table, query.of_series(flags.metric.clone()), against)?;
    if let Some(measure) = flags.measure {
        asked = asked.by(measure);
    }
    if let Some(smoothing) = flags.smoothing {
        asked = asked.smoothed(smoothing);
    }
    if let Some(threshold) = flags.threshold {
        asked = asked.over(threshold);
    }
    if let Some(top) = flags.top {
        asked = asked.top(top as usize);
    }
    let mut archive = Archive::open_table(&config.storage, flags.table.name(), config.memory_bytes).await?;
    if flags.fresh {
        archive = archive.with_database(config.clone());
    }
    let found = archive.drift(&asked).await?;
    known(&archive, flags.table, asked.query(), found.series.is_empty()).await?;
    if let Some(file) = &flags.plot {
        return Picture::drift(&asked, found)?.draw(file.as_deref());
    }
    if style.format() == OutputFormat::Json && !flags.summary {
        return print_json(&found);
    }
    let rows: RecordBatch = if flags.summary { found.summary()? } else { found.rows()? };
    print_rows(&rows.schema(), stream::iter([Ok(rows)]), style).await
}
