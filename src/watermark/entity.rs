//! How many rows the archive has of each entity, and of which times.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::signed;
use crate::batch::EntitySpan;
use crate::error::{Error, Result};
use crate::tables::Entity;

/// Entity spans, a vector for each column.
#[derive(Default)]
pub(super) struct Spans<'a> {
    pub(super) table: Vec<&'a str>,
    pub(super) space: Vec<&'a str>,
    pub(super) name: Vec<&'a str>,
    pub(super) version: Vec<&'a str>,
    pub(super) min_created_at: Vec<Option<DateTime<Utc>>>,
    pub(super) max_created_at: Vec<Option<DateTime<Utc>>>,
    pub(super) row_count: Vec<i64>,
}

impl<'a> Spans<'a> {
    /// The columns as parameters of a statement, in their order.
    fn parameters(&self) -> [&(dyn ToSql + Sync); 7] {
        [
            &self.table,
            &self.space,
            &self.name,
            &self.version,
            &self.min_created_at,
            &self.max_created_at,
            &self.row_count,
        ]
    }

    pub(super) fn new(spans: &'a [(String, EntitySpan)]) -> Self {
        let mut columns = Self::default();
        for (table, span) in spans {
            let Entity { space, name, version } = &span.entity;
            columns.table.push(table);
            columns.space.push(space);
            columns.name.push(name);
            columns.version.push(version);
            columns.min_created_at.push(DateTime::from_timestamp_micros(span.min_created_at));
            columns.max_created_at.push(DateTime::from_timestamp_micros(span.max_created_at));
            columns.row_count.push(signed(span.row_count));
        }
        columns
    }
}

/// How many rows the entities of a table have in sum.
///
/// # Errors
///
/// The query failed.
pub async fn entity_row_count(client: &Client, table: &str) -> Result<i64> {
    let query =
        "select coalesce(sum(row_count), 0)::bigint from highwater.entity_watermark where source_table = $1";
    let context = "adding up the entity watermarks";
    let row = client.query_one(query, &[&table]).await.map_err(Error::sql(context))?;
    row.try_get(0).map_err(Error::sql(context))
}

/// Counts rows that were added to the archive beside the sidecar.
///
/// # Errors
///
/// The statement failed.
pub async fn add_entities(client: &Client, spans: &[(String, EntitySpan)]) -> Result<()> {
    let statement = "
        insert into highwater.entity_watermark as e
            (source_table, space, name, version, min_created_at, max_created_at, row_count)
        select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::bigint[])
        on conflict (source_table, (md5(space) || md5(name) || md5(version))) do update
        set min_created_at = least(e.min_created_at, excluded.min_created_at),
            max_created_at = greatest(e.max_created_at, excluded.max_created_at),
            row_count = e.row_count + excluded.row_count, updated_at = clock_timestamp()";
    client
        .execute(statement, &Spans::new(spans).parameters())
        .await
        .map_err(Error::sql("counting the entities of added rows"))
        .map(drop)
}

/// Counts surplus copies that were removed from the archive, once: `total` is how many ever were, as the table's log says, and
/// does nothing if that is on record. `entities` are those of the last ones; with others between, or without, they add up to less,
/// and the next session counts anew.
///
/// # Errors
///
/// The statement failed; it may be repeated.
pub async fn count_removed(
    client: &Client,
    table: &str,
    total: u64,
    entities: &BTreeMap<Entity, u64>,
) -> Result<()> {
    let statement = "
        with counted as (
            update highwater.watermark
            set row_count = greatest(row_count - ($2 - doubles_removed), 0), doubles_removed = $2, updated_at = clock_timestamp()
            where source_table = $1 and doubles_removed < $2 returning source_table)
        update highwater.entity_watermark e
        set row_count = greatest(e.row_count - s.row_count, 0), updated_at = clock_timestamp()
        from counted c, unnest($3::text[], $4::text[], $5::text[], $6::bigint[]) as s (space, name, version, row_count)
        where e.source_table = c.source_table and (e.space, e.name, e.version) = (s.space, s.name, s.version)";
    let column =
        |of: fn(&Entity) -> &String| entities.keys().map(|entity| of(entity).as_str()).collect::<Vec<_>>();
    let spaces = column(|entity| &entity.space);
    let names = column(|entity| &entity.name);
    let versions = column(|entity| &entity.version);
    let counts: Vec<i64> = entities.values().copied().map(signed).collect();
    client
        .execute(statement, &[&table, &signed(total), &spaces, &names, &versions, &counts])
        .await
        .map_err(Error::sql(format!("counting the rows that were removed from the archive of {table}")))
        .map(drop)
}

/// Replaces a table's entity watermarks.
///
/// # Errors
///
/// The statement failed; it may be repeated.
pub async fn recount(client: &Client, table: &str, spans: &[(String, EntitySpan)]) -> Result<()> {
    let statement = "
        with counted as (
            select * from unnest($2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::bigint[])
                as s (space, name, version, min_created_at, max_created_at, row_count)),
        gone as (
            delete from highwater.entity_watermark e where e.source_table = $1 and not exists (
                select from counted c where (c.space, c.name, c.version) = (e.space, e.name, e.version)))
        insert into highwater.entity_watermark
            (source_table, space, name, version, min_created_at, max_created_at, row_count)
        select $1, * from counted
        on conflict (source_table, (md5(space) || md5(name) || md5(version))) do update
        set min_created_at = excluded.min_created_at, max_created_at = excluded.max_created_at,
            row_count = excluded.row_count, updated_at = clock_timestamp()";
    let spans = Spans::new(spans);
    let [_, space, name, version, low, high, rows] = spans.parameters();
    client
        .execute(statement, &[&table, space, name, version, low, high, rows])
        .await
        .map_err(Error::sql(format!("counting the entities of {table} anew")))
        .map(drop)
}

/// One row of `highwater.entity_watermark`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntityWatermark {
    /// The archived table with its schema.
    pub source_table: String,
    /// The entity.
    pub entity: Entity,
    /// Its oldest archived `created_at`.
    pub min_created_at: DateTime<Utc>,
    /// Its newest archived `created_at`.
    pub max_created_at: DateTime<Utc>,
    /// Its archived rows.
    pub row_count: i64,
}

/// Reads every entity's watermark, by table and entity.
///
/// # Errors
///
/// The query failed.
pub async fn read_entities(client: &Client) -> Result<Vec<EntityWatermark>> {
    let query = "select source_table, space, name, version, min_created_at, max_created_at, row_count
                 from highwater.entity_watermark order by source_table, space, name, version";
    let rows = client.query(query, &[]).await.map_err(Error::sql("reading highwater.entity_watermark"))?;
    rows.iter().map(entity_watermark).collect()
}

fn entity_watermark(row: &Row) -> Result<EntityWatermark> {
    let column = "reading a row of highwater.entity_watermark";
    Ok(EntityWatermark {
        source_table: row.try_get(0).map_err(Error::sql(column))?,
        entity: Entity {
            space: row.try_get(1).map_err(Error::sql(column))?,
            name: row.try_get(2).map_err(Error::sql(column))?,
            version: row.try_get(3).map_err(Error::sql(column))?,
        },
        min_created_at: row.try_get(4).map_err(Error::sql(column))?,
        max_created_at: row.try_get(5).map_err(Error::sql(column))?,
        row_count: row.try_get(6).map_err(Error::sql(column))?,
    })
}
