//! The history: binned queries over the archive, and SQL for anything else.
//!
//! ```text
//! Archive::open          the newest version of each table's log: its files, and their bounds of time and entity
//! a query                files by these bounds, then row groups and pages by theirs; 16 parts at a time
//! Archive::refresh       one request a table where nothing has changed; queries that are running keep their version
//! ```
//!
//! A version never changes, and files that were merged away stay for a day. So every row is in the answer once, whatever is
//! written or merged meanwhile. Only `fresh` knows Postgres, from which it takes the rows that are not archived yet.

mod bins;
mod broken;
mod columns;
mod custom;
mod days;
pub mod drift;
mod entities;
mod fresh;
mod load;
mod open;
mod psi;
mod quantile;
mod query;
pub mod scouter;
mod spc;
mod sql;
mod stat;
mod table;
#[cfg(test)]
mod tests;
mod version;
mod when;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use datafusion::dataframe::DataFrame;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::logical_expr::{Expr, col};

pub use bins::Bins;
pub(crate) use bins::zone;
pub use custom::{BinnedMetric, BinnedMetricStats, BinnedMetrics};
pub(crate) use days::DayFiles;
use drift::{Drift, DriftQuery};
pub use entities::EntitySummary;
pub use psi::FeatureBinProportions;
pub use query::BinnedQuery;
pub use spc::{SpcFeature, SpcFeatures};
pub use stat::{Quantile, Stat};
pub use table::{TableBins, TableQuery, TableSeries};
use version::{Found, Tables, all_of, find, planning};
pub(crate) use when::{When, moment};

use crate::archive::{Storage, View};
use crate::config::Config;
use crate::tables::{Entity, Kind};
use crate::{Error, Result};

/// A snapshot of this age is refreshed by the next query: files that were merged away are deleted a day later.
const AGE_MAX: Duration = Duration::from_hours(12);

/// How often the database is asked again because rows were purged meanwhile. A second time is rare: the purge's horizon would
/// have to move twice, which takes a checkpoint each.
const FRESH_ATTEMPTS_MAX: u32 = 5;

/// An archive that is read: one version of each table at a time, shared by all queries. Cheap to clone; clones share the
/// version and what was cached. Wants a multi-threaded runtime.
///
/// ```no_run
/// use chrono::{Duration, Utc};
/// use highwater::Archive;
/// use highwater::config::ObjectStorageSettings;
/// use highwater::reader::BinnedQuery;
/// use highwater::tables::Entity;
///
/// # async fn example() -> highwater::Result<()> {
/// let archive = Archive::open(&ObjectStorageSettings::new("s3://bucket/drift", "eu-west-1")?).await?;
/// let entity = Entity { space: "shop".into(), name: "ranking".into(), version: "2.1.0".into() };
/// let query = BinnedQuery::with_points(entity, Utc::now() - Duration::days(30), Utc::now(), 500)?;
/// for (name, metric) in archive.binned_custom(&query).await?.metrics {
///     println!("{name}: {} bins", metric.created_at.len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Archive {
    shared: Arc<Shared>,
    /// Where rows that are not archived yet are read from.
    database: Option<Arc<Config>>,
}

struct Shared {
    storage: Storage,
    runtime: Arc<RuntimeEnv>,
    memory_bytes: usize,
    tables: RwLock<Arc<Tables>>,
    /// One refresh at a time.
    refreshing: tokio::sync::Mutex<()>,
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tables = self.current();
        let version = |view: &View| (view.kind().name(), view.version());
        let versions: Vec<_> = tables.views.iter().flatten().map(version).collect();
        f.debug_struct("Archive")
            .field("url", &self.shared.storage.url())
            .field("versions", &versions)
            .finish()
    }
}

impl Archive {
    /// The same archive, whose binned queries also have the rows that are committed in the database and not archived yet:
    /// every row that was committed before a query began is in its answer, once, whether `highwater run` is running or not.
    /// The configuration's database, schema, slot and memory count.
    ///
    /// Each query then refreshes the archive, and reads the newest rows from Postgres, which looks through the model's rows of
    /// the range. The role needs `select` on the drift tables and on the tables of the schema `highwater`. A row that was
    /// changed in Postgres after it was archived may be in the answer in both forms.
    #[must_use]
    pub fn with_database(mut self, config: Config) -> Self {
        self.database = Some(Arc::new(config));
        self
    }

    /// Moves to the newest version; `false` if that is the one it was at. Queries that have begun keep theirs. A server calls
    /// this as often as its answers must be fresh: where nothing has changed it costs a request a table.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`]; the version stays the one that it was.
    pub async fn refresh(&self) -> Result<bool> {
        let _one = self.shared.refreshing.lock().await;
        let before = self.current();
        let newer = async |found: &Found| match found {
            Ok(view) => view.newer().await.map(Ok),
            Err(broken) => find(&self.shared.storage, broken.kind()).await,
        };
        let views = all_of(before.views.iter().map(newer)).await?;
        let is_same = views.iter().zip(&before.views).all(|pair| match pair {
            (Ok(new), Ok(old)) => new.version() == old.version(),
            _ => false,
        });
        let tables = if is_same {
            let (scans, session) = (before.scans.clone(), before.session.clone());
            Tables { views, scans, session, read_at: Instant::now() }
        } else {
            Tables::new(views, &self.shared.runtime, self.shared.memory_bytes)?
        };
        *self.shared.tables.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tables);
        Ok(!is_same)
    }

    /// The mean and the spread of each custom metric in each bin. A bin without values is left out.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`], [`Error::Delta`] or [`Error::Encode`] if the archive can't be read.
    pub async fn binned_custom(&self, query: &BinnedQuery) -> Result<BinnedMetrics> {
        let rows = self.rows(Kind::custom(), query).await?;
        custom::collect(custom::bins(rows, query).map_err(planning(Kind::custom()))?).await
    }

    /// The distribution of each feature over its bins, in each bin of time and over the whole range. A bin whose counts add
    /// up to 0 is left out. Sorted by feature.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn binned_psi(&self, query: &BinnedQuery) -> Result<Vec<FeatureBinProportions>> {
        let rows = self.rows(Kind::psi(), query).await?;
        psi::collect(psi::counts(rows, query).map_err(planning(Kind::psi()))?).await
    }

    /// The mean of each feature's values in each bin. A bin without values is left out.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn binned_spc(&self, query: &BinnedQuery) -> Result<SpcFeatures> {
        let rows = self.rows(Kind::spc(), query).await?;
        spc::collect(spc::frame(rows, query).map_err(planning(Kind::spc()))?).await
    }

    /// How far a model's rows are from others, in each bin, and since when.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the question has no answer, or the reference no rows; otherwise as [`Archive::binned_custom`].
    pub async fn drift(&self, query: &DriftQuery) -> Result<Drift> {
        drift::drift(self, query).await
    }

    /// What [`Archive::binned_custom`] collects, to go on with: columns `created_at`, `metric`, `avg`, `lower_bound`,
    /// `upper_bound`, `count`, `nulls`, `nans`, `min`, `max`, sorted by metric and time.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn custom_frame(&self, query: &BinnedQuery) -> Result<DataFrame> {
        let rows = self.rows(Kind::custom(), query).await?;
        custom::frame(rows, query).map_err(planning(Kind::custom()))
    }

    /// What [`Archive::binned_psi`] collects, to go on with: columns `created_at`, `feature`, `bin_id`, `bin_count`,
    /// `proportion`, `rows`, sorted by feature, time and `bin_id`.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn psi_frame(&self, query: &BinnedQuery) -> Result<DataFrame> {
        let rows = self.rows(Kind::psi(), query).await?;
        psi::frame(rows, query).map_err(planning(Kind::psi()))
    }

    /// What [`Archive::binned_spc`] collects, to go on with: columns `created_at`, `feature`, `value`, `count`, `nulls`, `nans`, `min`,
    /// `max`, sorted by feature and time.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn spc_frame(&self, query: &BinnedQuery) -> Result<DataFrame> {
        let rows = self.rows(Kind::spc(), query).await?;
        spc::frame(rows, query).map_err(planning(Kind::spc()))
    }

    /// What the values of a table's column are like in each bin, by what other columns say, as numbers.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if there is no such table or column, or the condition is none; otherwise as [`Archive::binned_custom`].
    pub async fn binned_table(&self, query: &TableQuery) -> Result<TableBins> {
        let kind = self.kind_of(query.table())?;
        table::collect(kind, self.table_frame(query).await?, query).await
    }

    /// What [`Archive::binned_table`] collects, to go on with: the start of each bin under the name of the table's time, the columns
    /// of `by`, and one for each stat, with the types that these have. Sorted by the columns of `by`, then by time.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_table`].
    pub async fn table_frame(&self, query: &TableQuery) -> Result<DataFrame> {
        let kind = self.kind_of(query.table())?;
        let tables = self.tables().await?;
        let rows = table::chosen(&tables.session, kind, tables.table(kind)?, query).await?;
        table::frame(kind, rows, query)
    }

    /// The table of that name, with the columns that it has in this version.
    fn kind_of(&self, name: &str) -> Result<Kind> {
        let kinds = self.kinds();
        kinds.iter().find(|kind| kind.name() == name).copied().ok_or_else(|| Error::Query {
            detail: format!(
                "the archive has no table {name:?}; it has {}",
                kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
            ),
        })
    }

    /// A query in SQL over the tables `custom`, `psi`, `spc` and `quarantine`, in DataFusion's dialect. It can't write.
    ///
    /// A text of more than 100,000 bytes, 200 operators or 500 keywords in an expression, 100 tables or 70 queries in one is refused, and so are recursion and the
    /// functions that make a text or list of any length (`repeat`, `lpad`, `rpad`, `array_repeat`, `array_resize`, `range`).
    /// That keeps mistakes from ending the process, not strangers: for these run `highwater sql`, which has a process, a
    /// deadline and a limit of memory of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if it is not a query that the tables can answer; otherwise as [`Archive::binned_custom`].
    pub async fn sql(&self, query: &str) -> Result<DataFrame> {
        let tables = self.tables().await?;
        let plan = sql::plan(&tables.session, query).await?;
        tables.session.execute_logical_plan(plan).await.map_err(Error::asked("planning the query"))
    }

    /// Rows in memory as a frame of the archive's session.
    fn read_batches(&self, batches: Vec<RecordBatch>) -> Result<DataFrame> {
        self.current().session.read_batches(batches).map_err(Error::query("building a frame"))
    }

    /// The version of each table that queries read, by name; `None` of one without a log, or that can't be read. An answer over
    /// the same versions is the same.
    #[must_use]
    pub fn versions(&self) -> Vec<(&'static str, Option<u64>)> {
        let tables = self.current();
        let version = |found: &Found| match found {
            Ok(view) => (view.kind().name(), view.version()),
            Err(broken) => (broken.kind().name(), None),
        };
        tables.views.iter().map(version).collect()
    }

    /// What the log says of the days that each table's files have rows of.
    pub(crate) fn days(&self) -> Vec<(Kind, BTreeMap<i64, DayFiles>)> {
        let tables = self.current();
        let views = tables.views.iter().filter_map(|found| found.as_ref().ok());
        views.map(|view| (view.kind(), days::of(view.files()))).collect()
    }

    /// The tables of the archive: those that come with the program, and those that were described when it was opened.
    #[must_use]
    pub fn kinds(&self) -> Vec<Kind> {
        self.current().scans.iter().map(|(kind, _)| *kind).collect()
    }

    /// What a table holds, by entity. Reads the entity and time columns of all its files.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn entities(&self, kind: Kind) -> Result<Vec<EntitySummary>> {
        let rows = self.table(kind).await?;
        entities::collect(kind, entities::frame(kind, rows).map_err(planning(kind))?).await
    }

    /// What all tables hold, by entity: columns `kind`, `space`, `name`, `version` (of an entity of more names the first three, of
    /// one of fewer the rest is empty), `first`, `last`, `rows`, sorted by the first four.
    ///
    /// # Errors
    ///
    /// As [`Archive::binned_custom`].
    pub async fn entities_frame(&self) -> Result<DataFrame> {
        let tables = self.tables().await?;
        let of_kind = |kind: Kind| {
            let frame = tables.table(kind).map(|rows| entities::named(kind, rows))?;
            frame.map_err(planning(kind))
        };
        let mut kinds = self.kinds().into_iter().filter(|kind| kind.entity().is_some());
        let first = kinds.next().ok_or_else(|| Error::Internal("no table has entities".to_owned()))?;
        let mut all = of_kind(first)?;
        for kind in kinds {
            all = all.union(of_kind(kind)?).map_err(planning(kind))?;
        }
        let keys = ["kind", "space", "name", "version"];
        all.sort(keys.map(|key| col(key).sort(true, false)).to_vec()).map_err(planning(first))
    }

    /// Tells an entity that the archive has never seen from one without rows in a range.
    ///
    /// # Errors
    ///
    /// [`Error::Query`], with similar names, if the kind's table has no row of the entity; otherwise as
    /// [`Archive::binned_custom`].
    pub async fn check_entity(&self, kind: Kind, entity: &Entity) -> Result<()> {
        let rows = self.table(kind).await?;
        let any = rows.filter(query::is_of(entity)).and_then(|rows| rows.limit(0, Some(1)));
        let any =
            any.map_err(planning(kind))?.collect().await.map_err(Error::query("looking for an entity"))?;
        if any.iter().any(|batch| batch.num_rows() > 0) {
            return Ok(());
        }
        let near = entities::near(entity, &self.entities(kind).await?);
        let wanted = entities::shown(&entity.space, &entity.name, &entity.version);
        let mut detail =
            format!("the archive has no {} records of {wanted} (space, name, version)", kind.name());
        if !near.is_empty() {
            detail.push_str(&format!("; did you mean {}?", near.join(" or ")));
        }
        Err(Error::Query { detail })
    }

    /// The rows of a kind that a query asks for.
    async fn rows(&self, kind: Kind, query: &BinnedQuery) -> Result<DataFrame> {
        let Some(config) = &self.database else {
            return self.tables().await?.rows(kind, query.condition(kind));
        };
        for _ in 0..FRESH_ATTEMPTS_MAX {
            if let Some(rows) = self.rows_of_both(config, kind, query).await? {
                return Ok(rows);
            }
        }
        let detail = format!("rows of {} are purged while they are read; try again", kind.name());
        Err(Error::Query { detail })
    }

    /// The rows of the archive and of the database; `None` if some were purged meanwhile.
    async fn rows_of_both(
        &self,
        config: &Config,
        kind: Kind,
        query: &BinnedQuery,
    ) -> Result<Option<DataFrame>> {
        let wanted = query.condition(kind);
        // In this order: see `fresh`.
        let before = fresh::Before::read(config, kind).await?;
        self.refresh().await?;
        let tables = self.current();
        let archived = tables.rows(kind, wanted.clone())?;
        let Some(before) = before else { return Ok(Some(archived)) };
        before.check_storage(&self.shared.storage).await?;
        let of_entity = |ranges: &[(i64, i64)]| {
            let within = ranges.iter().map(|range| query::is_within("created_at", *range)).reduce(Expr::or);
            let wanted = query::is_of(query.entity());
            let wanted = within.map_or(wanted.clone(), |within| wanted.and(within));
            tables.table(kind)?.filter(wanted).map_err(planning(kind))
        };
        let Some(fresh) = before.fresh(query, of_entity).await? else { return Ok(None) };
        if fresh.is_empty() {
            return Ok(Some(archived));
        }
        let fresh = tables.session.read_batches(fresh).and_then(|rows| rows.filter(wanted));
        fresh.and_then(|fresh| archived.union(fresh)).map(Some).map_err(planning(kind))
    }

    async fn table(&self, kind: Kind) -> Result<DataFrame> {
        self.tables().await?.table(kind)
    }

    async fn tables(&self) -> Result<Arc<Tables>> {
        if self.current().read_at.elapsed() > AGE_MAX {
            self.refresh().await?;
        }
        Ok(self.current())
    }

    fn current(&self) -> Arc<Tables> {
        Arc::clone(&self.shared.tables.read().unwrap_or_else(PoisonError::into_inner))
    }
}
