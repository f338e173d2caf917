//! Columns that a source table has got, and its archive has not.
//!
//! The stream describes a table before the first row of a new shape, so a column is known before a value of it comes. The session
//! ends there, with nothing of that shape archived; the next one has the archive's table get the column by the entry with which it
//! claims it ([`Table::claim_with`](crate::archive::Table::claim_with)), before it archives anything.

use tokio_postgres::Client;

use super::columns::{Found, columns};
use super::lookup::BINARY_FORM;
use super::sums::compared_value;
use crate::decode::NewColumn;
use crate::error::{Error, Result};
use crate::postgres::{Encoding, quote_identifier};
use crate::tables::{ColumnSpec, Kind};

/// The columns that a kind's source has and its archive lacks: by the catalog, and those that the stream has shown, which may be gone
/// again.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn new_columns(
    client: &Client,
    schema: &str,
    kind: Kind,
    shown: &[NewColumn],
) -> Result<Vec<ColumnSpec>> {
    let Some(source) = kind.source_table(schema) else { return Ok(Vec::new()) };
    let mut new = Vec::new();
    for found in columns(client, &source).await?.iter().filter(|found| kind.lacks(&found.name)) {
        let mut column = found.archived();
        column.filled = filled(client, &source, found, &column).await?;
        new.push(column);
    }
    for shown in shown.iter().filter(|shown| shown.kind.name() == kind.name() && kind.lacks(&shown.name)) {
        if new.iter().all(|column| column.name != shown.name) {
            new.push(former(client, shown).await?.archived());
        }
    }
    new.iter_mut().for_each(|column| column.added = true);
    Ok(new)
}

/// Whether the catalog has a column that one of the archive's tables lacks, though nobody has written a row with it: the names of
/// such a table and column.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn find_new(client: &Client, schema: &str, kinds: &[Kind]) -> Result<Vec<NewColumn>> {
    let failed = || Error::sql("looking for new columns");
    let query = "select n.nspname || '.' || c.relname, a.attname::text, a.atttypid, a.atttypmod
                 from highwater.watermark w join pg_class c on c.oid = w.table_oid join pg_namespace n on n.oid = c.relnamespace
                 join pg_attribute a on a.attrelid = c.oid
                 where a.attnum > 0 and not a.attisdropped and a.attgenerated = ''";
    let mut new = Vec::new();
    for row in client.query(query, &[]).await.map_err(failed())? {
        let (table, name): (String, String) =
            (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        let kind = kinds.iter().find(|kind| kind.source_table(schema).as_ref() == Some(&table));
        if let Some(kind) = kind.filter(|kind| kind.lacks(&name)) {
            let (type_oid, modifier) = (row.try_get(2).map_err(failed())?, row.try_get(3).map_err(failed())?);
            new.push(NewColumn { kind: *kind, name, type_oid, modifier });
        }
    }
    Ok(new)
}

/// A column that the catalog has no more.
async fn former(client: &Client, shown: &NewColumn) -> Result<Found> {
    let failed = || Error::sql(format!("looking up the type of {}", shown.name));
    let query = format!("select {BINARY_FORM}, format_type(t.oid, $2) from pg_type t where t.oid = $1");
    let row = client.query_opt(&query, &[&shown.type_oid, &shown.modifier]).await.map_err(failed())?;
    let Some(row) = row else {
        return Ok(Found::former(shown, None, format!("a type that is gone (oid {})", shown.type_oid)));
    };
    Ok(Found::former(shown, row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?))
}

/// What rows from before the column have in Postgres, if it was added with a default: the server stores it once for all of them
/// (manual section 5.7.1, `pg_attribute.attmissingval`).
async fn filled(
    client: &Client,
    source: &str,
    found: &Found,
    column: &ColumnSpec,
) -> Result<Option<Vec<u8>>> {
    let failed = || Error::sql(format!("reading the default of column {} of {source}", found.name));
    let encoding = Encoding::of_database(client).await?;
    let Some((fits, bytes)) = compared_value(column, found.type_oid, "d.value", encoding) else {
        return Ok(None);
    };
    let (schema, table) = source.split_once('.').unwrap_or_default();
    let own = &found.source_type;
    // A partitioned table has no rows of its own, so its partitions have it.
    let query = format!(
        "select {bytes} from (
             select (a.attmissingval::text::{own}[])[1] as value
             from pg_attribute a
             where a.attname = $2 and a.atthasmissing
               and (a.attrelid = $1::text::regclass or a.attrelid in (select relid from pg_partition_tree($1::text::regclass)))
             order by a.attrelid limit 1) d
         where d.value is not null and {fits}"
    );
    let table = format!("{}.{}", quote_identifier(schema), quote_identifier(table));
    let row = client.query_opt(&query, &[&table, &found.name]).await.map_err(failed())?;
    row.map(|row| row.try_get(0)).transpose().map_err(failed())
}
