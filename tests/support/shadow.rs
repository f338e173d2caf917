//! Every row that was ever committed, kept where no purge reaches: what the archive must hold in the end, and of which
//! every row that is gone from the drift tables must be archived already.

use std::path::Path;

use tokio_postgres::Client;

use super::archive::{Multiset, each_archived_row, each_row_of};
use super::schema::{KINDS, Shape, Source};

const SCHEMA: &str = "shadow";

/// Has a trigger copy every row that is inserted into the drift tables from now on.
pub async fn create(client: &Client, shape: Shape) {
    let mut sql = format!("create schema {SCHEMA};");
    for kind in KINDS {
        let table = kind.table();
        let columns = format!("created_at, {}, {}", shape.entity_columns(), kind.value_columns().join(", "));
        let values = columns.replace(", ", ", new.");
        sql.push_str(&format!(
            "create table {SCHEMA}.{table} as select {columns} from scouter.{table} with no data;
             create function {SCHEMA}.copy_{table}() returns trigger language plpgsql as $$
             begin insert into {SCHEMA}.{table} ({columns}) values (new.{values}); return null; end $$;
             create trigger shadow after insert on scouter.{table} for each row execute function {SCHEMA}.copy_{table}();"
        ));
    }
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("making the shadow: {error:?}"));
}

async fn rows_of(client: &Client, schema: &str, shape: Shape, kind: Source) -> Multiset {
    let mut rows = Multiset::default();
    each_row_of(client, schema, shape, kind, |row| rows.add(row)).await;
    rows
}

fn archived(storage: &Path, kind: Source) -> Multiset {
    let mut rows = Multiset::default();
    each_archived_row(&storage.join(kind.folder()), |row| rows.add(row))
        .unwrap_or_else(|error| panic!("{error}"));
    rows
}

/// The archive holds every row that was ever committed, once. How many there are.
///
/// # Panics
///
/// When it does not.
pub async fn assert_archived(client: &Client, storage: &Path, shape: Shape) -> u64 {
    let mut all = 0;
    for kind in KINDS {
        let (committed, archived) = (rows_of(client, SCHEMA, shape, kind).await, archived(storage, kind));
        let (missing, extra) = (committed.surplus(&archived), archived.surplus(&committed));
        assert!(
            missing.is_empty() && extra.is_empty(),
            "{}: {} rows were committed, {} are archived; {} missing, {} extra",
            kind.table(),
            committed.rows(),
            archived.rows(),
            missing.len(),
            extra.len()
        );
        all += committed.rows();
    }
    all
}

/// Every row that is gone from the drift tables is in the archive now. How many are gone.
///
/// # Panics
///
/// When one is not.
pub async fn assert_gone_is_archived(client: &Client, storage: &Path, shape: Shape) -> u64 {
    let mut gone_rows = 0;
    for kind in KINDS {
        // One snapshot of both tables, and the archive after it: it only grows.
        client.batch_execute("begin isolation level repeatable read").await.expect("begin");
        let committed = rows_of(client, SCHEMA, shape, kind).await;
        let there = rows_of(client, "scouter", shape, kind).await;
        client.batch_execute("commit").await.expect("commit");
        let gone = committed.surplus(&there);
        let archived = archived(storage, kind);
        let lost = gone.iter().filter(|(row, count)| archived.count(**row) < **count).count();
        assert_eq!(lost, 0, "{}: rows were deleted that are not archived", kind.table());
        gone_rows += gone.values().sum::<u64>();
    }
    gone_rows
}
