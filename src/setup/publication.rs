//! The publication, which only the owner of the tables can make and change.

use tokio_postgres::Client;

use super::owner::Ownership;
use super::{LOCK_TIMEOUT, Report, SourceTable, find_tables, holds_rows, new_watermark, qualified};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::quote_identifier;
use crate::source::coverage;
use crate::source::slot::Identity;
use crate::watermark::{self, State};

/// Whether the publication exists.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn has_publication(client: &Client, publication: &str) -> Result<bool> {
    client
        .query_opt("select from pg_publication where pubname = $1", &[&publication])
        .await
        .map(|row| row.is_some())
        .map_err(Error::sql("looking for the publication"))
}

/// The statement that makes it. A child by inheritance is not archived (`unarchived`), so it is not published; partitions are all the
/// same. Inserts only: with updates in it, every `update` of a table without a primary key would fail. No column list: it would keep
/// the tables' owner from dropping a column.
fn creation(config: &Config, tables: &[SourceTable]) -> String {
    let names: Vec<String> = tables.iter().map(qualified).collect();
    format!(
        "create publication {} for table only {} with (publish = 'insert', publish_via_partition_root = true)",
        quote_identifier(&config.publication),
        names.join(", only ")
    )
}

/// The statement that has it send inserts, and nothing else.
fn correction(config: &Config) -> String {
    let name = quote_identifier(&config.publication);
    format!("alter publication {name} set (publish = 'insert', publish_via_partition_root = true)")
}

/// Whether it sends inserts through partition roots, and nothing else.
async fn is_right(client: &Client, config: &Config) -> Result<bool> {
    let query = "select from pg_publication where pubname = $1 and pubinsert and pubviaroot
                 and not (pubupdate or pubdelete or pubtruncate)";
    let found = client.query_opt(query, &[&config.publication]).await;
    found.map(|row| row.is_some()).map_err(Error::sql("reading the publication"))
}

/// Makes the publication, or mends it. See [`mend`] for `fed`.
///
/// # Errors
///
/// The session's role is not the owner, and something is to be done; or the server refused a step.
pub(super) async fn publish(
    client: &mut Client,
    config: &Config,
    tables: &[SourceTable],
    ownership: &Ownership,
    fed: Option<(&Identity, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    if has_publication(client, &config.publication).await? {
        return mend(client, config, ownership, fed, report).await;
    }
    if !ownership.is_owner() {
        return Err(ownership.refusal(&format!("making publication {}", config.publication)));
    }
    let context = format!("making publication {}", config.publication);
    client.batch_execute(&creation(config, tables)).await.map_err(Error::sql(&context))?;
    if ownership.user != ownership.owner {
        let (name, owner) = (quote_identifier(&config.publication), quote_identifier(&ownership.owner));
        // Where he may not have it (without the right to create in the database), it stays with who made it.
        if let Err(error) = client.batch_execute(&format!("alter publication {name} owner to {owner}")).await
        {
            tracing::debug!(error = Error::sql(context)(error).chain(), "the publication stays as it is");
        }
    }
    let names: Vec<String> = tables.iter().map(qualified).collect();
    report.done.push(format!("made publication {} for {}", config.publication, names.join(", ")));
    Ok(())
}

/// The same as statements. What a table that is added holds, the sidecar finds out.
pub(super) async fn script(client: &Client, config: &Config, tables: &[SourceTable]) -> Result<String> {
    if !has_publication(client, &config.publication).await? {
        return Ok(format!("{};\n", creation(config, tables)));
    }
    let mut script = String::new();
    if !is_right(client, config).await? {
        script.push_str(&format!("{};\n", correction(config)));
    }
    for table in tables.iter().filter(|table| !table.published) {
        let name = quote_identifier(&config.publication);
        script.push_str(&format!("alter publication {name} add table only {};\n", qualified(table)));
    }
    Ok(script)
}

/// Mends a publication that is there. Where a slot already reads it (`fed`: the system, and the slot's
/// position), a table is added together with its watermark row: under the lock nobody can write a row that
/// neither the publication nor the look into the table would see.
async fn mend(
    client: &mut Client,
    config: &Config,
    ownership: &Ownership,
    fed: Option<(&Identity, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    let name = quote_identifier(&config.publication);
    let is_right = is_right(client, config).await?;
    let tables = find_tables(client, config).await?;
    if !ownership.is_owner() && (!is_right || tables.iter().any(|table| !table.published)) {
        return Err(ownership.refusal(&format!("changing publication {}", config.publication)));
    }
    if !is_right {
        // A publication that sent no inserts has let rows pass; the running sidecar sees that by itself.
        if fed.is_some() {
            for found in watermark::mark_unpublished(client, &config.slot, &config.publication).await? {
                let table = found.source_table;
                report
                    .done
                    .push(format!("marked a gap in {table}: the publication did not send its inserts"));
            }
        }
        client.batch_execute(&correction(config)).await.map_err(Error::sql("altering the publication"))?;
        report
            .done
            .push(format!("set publication {} to inserts only, through partition roots", config.publication));
    }
    for table in tables.iter().filter(|table| !table.published) {
        let qualified = qualified(table);
        let context = format!("adding {qualified} to publication {}", config.publication);
        let transaction = client.transaction().await.map_err(Error::sql(&context))?;
        let statement = format!(
            "set local lock_timeout = '{LOCK_TIMEOUT}'; lock table {qualified} in share row exclusive mode;
             alter publication {name} add table only {qualified}"
        );
        transaction.batch_execute(&statement).await.map_err(Error::sql(&context))?;
        if let (Some(_), Some((identity, start))) = (table.kind, fed) {
            let row = transaction.query_one(&holds_rows(table), &[]).await;
            let holds_rows: bool = row.and_then(|row| row.try_get(0)).map_err(Error::sql(&context))?;
            let state = if holds_rows { State::Snapshot } else { State::Streaming };
            // A table that was archived before has been out of the publication for a while.
            let source = table.full_name();
            if watermark::mark_table_gap(&transaction, &source, table.oid).await? {
                report.done.push(format!("marked a gap in {source}: the publication lacked it"));
            } else if let Some(new) = new_watermark(config, table, &source, identity, state, start) {
                watermark::create(&transaction, &new).await?;
                if !holds_rows {
                    coverage::cover(&transaction, &source, &table.leaves).await?;
                }
            }
        }
        transaction.commit().await.map_err(Error::sql(&context))?;
        report.done.push(format!("added {qualified} to publication {}", config.publication));
    }
    if tables.iter().all(|table| table.published) && is_right {
        report.left.push(format!("publication {}", config.publication));
    }
    Ok(())
}
