use chrono::{DateTime, Utc};
use datafusion::common::Column;
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions_aggregate::expr_fn::{count, max, min};
use datafusion::logical_expr::{Expr, col, lit};
use serde::Serialize;

use super::columns::{Columns, each_batch};
use crate::Result;
use crate::config::edit_distance;
use crate::tables::{Entity, Kind};

/// Near names that an unknown entity's error has.
const NEAR_MAX: usize = 3;

/// What a table of the archive holds of an entity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EntitySummary {
    /// The table: `custom`, `psi` or `spc`.
    pub kind: &'static str,
    /// The entity's space.
    pub space: String,
    /// The entity's name.
    pub name: String,
    /// The entity's version.
    pub version: String,
    /// Its first `created_at`.
    pub first: DateTime<Utc>,
    /// Its last `created_at`.
    pub last: DateTime<Utc>,
    /// Its rows.
    pub rows: u64,
}

pub(super) fn frame(kind: Kind, rows: DataFrame) -> QueryResult<DataFrame> {
    let column = |name: &str| Expr::Column(Column::new_unqualified(name));
    // Of more columns than three the first tell, of fewer the rest is empty.
    let columns = kind.entity_columns().iter().map(|name| column(name)).chain((0..3).map(|_| lit("")));
    let keys = ["space", "name", "version"];
    let names = columns.zip(keys).map(|(column, key)| column.alias(key)).collect();
    let time = || column(kind.time_column());
    let values = vec![min(time()).alias("first"), max(time()).alias("last"), count(lit(1)).alias("rows")];
    rows.aggregate(names, values)?.sort(keys.map(|key| col(key).sort(true, false)).to_vec())
}

/// The same, with the name of the table.
pub(super) fn named(kind: Kind, rows: DataFrame) -> QueryResult<DataFrame> {
    let all = ["space", "name", "version", "first", "last", "rows"].map(col);
    frame(kind, rows)?.select([lit(kind.name()).alias("kind")].into_iter().chain(all).collect::<Vec<_>>())
}

/// Collects what [`frame`] describes.
pub(super) async fn collect(kind: Kind, frame: DataFrame) -> Result<Vec<EntitySummary>> {
    let mut found = Vec::new();
    each_batch(frame, "reading the entities", |batch| {
        let columns = Columns::of(batch);
        let names = columns.texts("space")?.zip(columns.texts("name")?).zip(columns.texts("version")?);
        let times = columns.times("first")?.zip(columns.times("last")?);
        for ((((space, name), version), (first, last)), rows) in names.zip(times).zip(columns.longs("rows")?)
        {
            let owned = |text: Option<&str>| text.unwrap_or_default().to_owned();
            let rows = rows.cast_unsigned();
            let (space, name, version) = (owned(space), owned(name), owned(version));
            found.push(EntitySummary { kind: kind.name(), space, name, version, first, last, rows });
        }
        Ok(())
    })
    .await?;
    Ok(found)
}

/// An entity as an error names it.
pub(super) fn shown(space: &str, name: &str, version: &str) -> String {
    format!("{space:?}, {name:?}, {version:?}")
}

/// The entities that a person may have meant, the nearest first.
pub(super) fn near(wanted: &Entity, known: &[EntitySummary]) -> Vec<String> {
    let distance = |found: &EntitySummary| {
        let parts =
            [(&wanted.space, &found.space), (&wanted.name, &found.name), (&wanted.version, &found.version)];
        let plain = |text: &str| text.to_lowercase();
        parts.map(|(wanted, found)| edit_distance(&plain(wanted), &plain(found))).iter().sum::<usize>()
    };
    let length = wanted.space.len() + wanted.name.len() + wanted.version.len();
    let mut near: Vec<(usize, &EntitySummary)> = known.iter().map(|found| (distance(found), found)).collect();
    near.sort_by_key(|(distance, _)| *distance);
    let near = near.into_iter().take_while(|(distance, _)| *distance <= length.div_ceil(2)).take(NEAR_MAX);
    near.map(|(_, found)| shown(&found.space, &found.name, &found.version)).collect()
}
