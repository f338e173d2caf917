//! [`Tables`]: one version of each table of an archive, and what of it can't be read.

use std::sync::Arc;
use std::time::Instant;

use datafusion::catalog::TableProvider;
use datafusion::dataframe::DataFrame;
use datafusion::error::DataFusionError;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::logical_expr::Expr;
use datafusion::prelude::SessionContext;
use futures::future::join_all;

use super::broken::Broken;
use super::sql;
use crate::archive::{self, Scan, Storage, View};
use crate::tables::{COMMITTED_AT, Kind, LSN};
use crate::{Error, Result};

/// Logs that are read at a time.
const READS_MAX: usize = 8;

/// What the name of a table's newest versions has behind the table's own.
const LATEST_SUFFIX: &str = "_latest";

/// One version of each table.
pub(super) struct Tables {
    pub(super) views: Vec<Found>,
    pub(super) scans: Vec<(Kind, Scans)>,
    pub(super) session: SessionContext,
    pub(super) read_at: Instant,
}

/// A table, or what is wrong with it: that is the answer of its queries, and those of others have theirs.
pub(super) type Found = Result<View, Arc<Broken>>;

/// A table's files.
#[derive(Clone)]
pub(super) struct Scans {
    /// As SQL sees them.
    plain: Arc<dyn TableProvider>,
    /// For binned queries, which look at the texts of many rows and hand out few.
    viewed: Arc<dyn TableProvider>,
}

impl Tables {
    pub(super) fn new(views: Vec<Found>, runtime: &Arc<RuntimeEnv>, memory_bytes: usize) -> Result<Self> {
        let session = archive::session(Arc::clone(runtime), memory_bytes);
        sql::prepare(&session);
        let mut scans = Vec::new();
        for found in &views {
            let (kind, of_kind) = match found {
                Ok(view) => {
                    let kind = view.kind();
                    let scan = Scan::new(kind, view.files()).map_err(planning(kind))?;
                    (kind, Scans { viewed: Arc::new(scan.with_text_views()), plain: Arc::new(scan) })
                }
                Err(broken) => {
                    let (plain, viewed) = (Arc::clone(broken) as _, Arc::clone(broken) as _);
                    (broken.kind(), Scans { plain, viewed })
                }
            };
            session.register_table(kind.name(), Arc::clone(&of_kind.plain)).map_err(planning(kind))?;
            scans.push((kind, of_kind));
        }
        for (kind, of_kind) in scans.iter().filter(|(kind, _)| kind.keeps_versions()) {
            register_latest(&session, *kind, of_kind, &scans).map_err(planning(*kind))?;
        }
        Ok(Self { views, scans, session, read_at: Instant::now() })
    }

    /// All rows, as SQL sees them.
    pub(super) fn table(&self, kind: Kind) -> Result<DataFrame> {
        self.read(kind, |scans| &scans.plain)
    }

    /// Rows to be binned: their texts are views.
    pub(super) fn rows(&self, kind: Kind, condition: Expr) -> Result<DataFrame> {
        self.read(kind, |scans| &scans.viewed)?.filter(condition).map_err(planning(kind))
    }

    fn read(&self, kind: Kind, of: fn(&Scans) -> &Arc<dyn TableProvider>) -> Result<DataFrame> {
        let scans = self.scans.iter().find(|(one, _)| one.name() == kind.name());
        let (now, scans) = scans.ok_or_else(|| Error::Internal(format!("{} is not open", kind.name())))?;
        let rows = self.session.read_table(Arc::clone(of(scans))).map_err(planning(kind))?;
        if *now == kind {
            return Ok(rows);
        }
        // The table has got more columns than whoever asks knows of.
        let columns =
            kind.columns().iter().filter(|column| now.columns().iter().any(|one| one.name == column.name));
        let columns: Vec<&str> = columns.map(|column| column.name.as_str()).collect();
        rows.select_columns(&columns).map_err(planning(kind))
    }
}

/// Registers the newest versions of a table's rows as another one, if no table has its name.
fn register_latest(
    session: &SessionContext,
    kind: Kind,
    of_kind: &Scans,
    all: &[(Kind, Scans)],
) -> Result<(), DataFusionError> {
    let name = format!("{}{LATEST_SUFFIX}", kind.name());
    if all.iter().any(|(other, _)| other.name() == name) {
        return Ok(());
    }
    let rows = archive::latest(kind, session.read_table(Arc::clone(&of_kind.plain))?)?;
    // What made a version is of no use where there is one.
    let is_told = |name: &str| !kind.is_change_column(name) || [LSN, COMMITTED_AT].contains(&name);
    let columns: Vec<&str> = kind.columns().iter().map(|column| column.name.as_str()).collect();
    let columns: Vec<&str> = columns.into_iter().filter(|name| is_told(name)).collect();
    session.register_table(name, rows.select_columns(&columns)?.into_view()).map(drop)
}

/// A table, as far as it can be read. What is wrong with the storage is wrong with all tables.
pub(super) async fn find(storage: &Storage, kind: Kind) -> Result<Found> {
    match View::read(storage, kind).await {
        Ok(view) => Ok(Ok(view)),
        Err(error @ Error::Delta { .. }) => {
            tracing::warn!("{}; the other tables can be read", error.chain());
            Ok(Err(Arc::new(Broken::new(kind, error.chain()))))
        }
        Err(error) => Err(error),
    }
}

pub(super) fn planning(kind: Kind) -> impl FnOnce(DataFusionError) -> Error {
    Error::query(format!("preparing to read {}", kind.name()))
}

/// The results, or the first error, once all have ended: the Delta library's tasks don't bear to be given up. So many at a time, since each
/// blocks threads, and needs more of them to go on.
pub(super) async fn all_of<T>(
    reads: impl IntoIterator<Item = impl Future<Output = Result<T>>>,
) -> Result<Vec<T>> {
    let mut reads = reads.into_iter();
    let mut results: Vec<Result<T>> = Vec::new();
    loop {
        let part: Vec<_> = reads.by_ref().take(READS_MAX).collect();
        if part.is_empty() {
            return results.into_iter().collect();
        }
        results.extend(join_all(part).await);
    }
}
