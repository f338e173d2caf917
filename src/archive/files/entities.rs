//! Where one entity's rows end in a sorted batch, and what a batch holds of each entity.

use std::collections::BTreeMap;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::{max, min};
use arrow::error::ArrowError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::statistics::Statistics;

use super::columns::{EntityColumns, times};
use super::object_reader::{column, each_batch, each_batch_of, group_times, open};
use crate::archive::error::unreadable;
use crate::archive::store::storage::Storage;
use crate::tables::{Entity, Kind};
use crate::{Error, Result};

/// What some files hold of one entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntityStats {
    /// The entity.
    pub entity: Entity,
    /// Smallest `created_at`, microseconds since the epoch.
    pub min_created_at: i64,
    /// Largest `created_at`, microseconds since the epoch.
    pub max_created_at: i64,
    /// Rows.
    pub row_count: u64,
}

/// A row of the quarantine table, as far as it says why it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuarantinedText<'a> {
    /// Its `source_table`.
    pub source_table: &'a str,
    /// Its `reason`.
    pub reason: &'a str,
    /// Its `row`.
    pub row: &'a str,
    /// Its `lsn`.
    pub lsn: &'a str,
}

/// Hands the rows of quarantine files (paths relative to the table) to `seen`. All tables need it, so a file that is none
/// stops nothing: it is told, and its rows count as not being there, so that they are quarantined again.
///
/// # Errors
///
/// [`Error::Storage`] if a file can't be had.
pub async fn each_quarantined(
    storage: &Storage,
    paths: &[String],
    mut seen: impl FnMut(QuarantinedText<'_>),
) -> Result<()> {
    let store = storage.table_store(Kind::quarantine());
    for path in paths {
        let context = format!("reading the quarantine file {path}");
        let read = each_batch(&store, path, &context, |batch| {
            let column =
                |name: &str| batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
            let (Some(tables), Some(reasons), Some(texts), Some(lsns)) =
                (column("source_table"), column("reason"), column("row"), column("lsn"))
            else {
                let detail = ArrowError::SchemaError("it lacks columns of the quarantine".to_owned());
                return Err(Error::Encode { context: context.clone(), source: Box::new(detail) });
            };
            for (((table, reason), row), lsn) in tables.iter().zip(reasons).zip(texts).zip(lsns) {
                seen(QuarantinedText {
                    source_table: table.unwrap_or_default(),
                    reason: reason.unwrap_or_default(),
                    row: row.unwrap_or_default(),
                    lsn: lsn.unwrap_or_default(),
                });
            }
            Ok(())
        })
        .await;
        match read {
            Err(error @ Error::Encode { .. }) => tracing::error!(
                "a file of the quarantine can't be read, so its rows count as not being there: {}; restore it, or have Delta \
                 forget it",
                error.chain()
            ),
            other => other?,
        }
    }
    Ok(())
}

/// Says what files (paths relative to the table) hold of each entity, sorted by entity: from their footers as far as these
/// tell, else from their entity and time columns. The quarantine has no entities.
///
/// # Errors
///
/// [`Error::Delta`] if a file can't be read.
pub async fn entity_stats(storage: &Storage, kind: Kind, paths: &[String]) -> Result<Vec<EntityStats>> {
    let mut found = BTreeMap::new();
    if kind.entity().is_some() {
        let store = storage.table_store(kind);
        let columns = kind.entity_columns().iter().map(String::as_str);
        let columns: Vec<&str> = columns.chain([kind.time_column()]).collect();
        for path in paths {
            let context = format!("reading the entities of {}{path}", storage.table_url(kind));
            let file = open(&store, path, &context).await.map_err(unreadable(kind))?;
            let mut unknown = Vec::new();
            for (number, group) in file.metadata().row_groups().iter().enumerate() {
                match only_entity(kind, group) {
                    Some(stats) => add(stats, &mut found),
                    None => unknown.push(number),
                }
            }
            if !unknown.is_empty() {
                let file = file.with_row_groups(unknown);
                let seen = |batch: &RecordBatch| add_rows(kind, batch, &mut found);
                each_batch_of(file, Some(&columns), &context, seen).await.map_err(unreadable(kind))?;
            }
        }
    }
    Ok(found.into_values().collect())
}

/// What a row group holds, if its statistics say that it is all of one entity.
fn only_entity(kind: Kind, group: &RowGroupMetaData) -> Option<EntityStats> {
    let only = |name: &str| match column(group, name)?.statistics()? {
        Statistics::ByteArray(texts)
            if texts.min_is_exact() && texts.max_is_exact() && texts.null_count_opt() == Some(0) =>
        {
            let text = texts.min_opt().filter(|low| texts.max_opt() == Some(low))?;
            text.as_utf8().ok().map(str::to_owned)
        }
        _ => None,
    };
    let names: Vec<String> = kind.entity_columns().iter().map(|name| only(name)).collect::<Option<_>>()?;
    let entity = Entity::of_names(names.iter().map(String::as_str));
    let (min_created_at, max_created_at) = group_times(kind, group)?;
    let row_count = u64::try_from(group.num_rows()).ok()?;
    Some(EntityStats { entity, min_created_at, max_created_at, row_count })
}

fn add(more: EntityStats, found: &mut BTreeMap<Entity, EntityStats>) {
    let stats = found.entry(more.entity.clone()).or_insert(EntityStats { row_count: 0, ..more.clone() });
    stats.min_created_at = stats.min_created_at.min(more.min_created_at);
    stats.max_created_at = stats.max_created_at.max(more.max_created_at);
    stats.row_count += more.row_count;
}

fn add_rows(kind: Kind, batch: &RecordBatch, found: &mut BTreeMap<Entity, EntityStats>) -> Result<()> {
    let Some(columns) = EntityColumns::of(kind, batch)? else { return Ok(()) };
    let times = times(kind, batch)?;
    let mut start = 0;
    while let Some(names) = columns.get(start) {
        let end = columns.end_of_run(start);
        let run = times.slice(start, end - start);
        if let (Some(low), Some(high)) = (min(&run), max(&run)) {
            let entity = Entity::of_names(names);
            let row_count = (end - start) as u64;
            add(EntityStats { entity, min_created_at: low, max_created_at: high, row_count }, found);
        }
        start = end;
    }
    Ok(())
}
