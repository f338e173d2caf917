//! `highwater setup`: everything that archiving needs in the source database. Idempotent: what is there
//! stays, what is missing is made, and the report says which was which.
//!
//! # Which rows a new slot misses
//!
//! A slot streams what is committed after its consistent point. Whether a table holds older rows is therefore
//! asked in the slot's own snapshot (`SNAPSHOT 'use'`, manual section 55.4), which sees exactly what the slot
//! will not send. A table that is added to the publication later is asked under a lock that keeps writers out
//! until the publication has it.

use tokio_postgres::Client;

use crate::config::Config;
use crate::decode::ENTITY_TABLE;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session, quote_identifier, sql};
use crate::record::Kind;
use crate::slot;
use crate::watermark::{self, State};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// Key of the advisory lock that lets one setup run at a time (manual section 13.3.5); "highwatr" in ASCII.
const SETUP_LOCK: i64 = 0x6869_6768_7761_7472;

/// How long to wait for writers of a table that is added to a live publication.
const LOCK_TIMEOUT: &str = "10s";

/// What setup did, or found done: a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was made or changed.
    pub done: Vec<String>,
    /// What was there already.
    pub left: Vec<String>,
}

/// A drift table, or the entity table, as the catalog has it.
struct SourceTable {
    /// Without the schema.
    name: String,
    kind: Option<Kind>,
    published: bool,
}

/// Makes the schema `highwater`, the publication, the slot and the watermark rows, as far as they are
/// missing.
///
/// # Errors
///
/// The server refused a step; what was made before it stays, and setup may be run again.
pub async fn setup(config: &Config) -> Result<Report> {
    let mut report = Report::default();
    let mut client = sql::connect(&config.source).await?;
    client
        .execute("select pg_advisory_lock($1)", &[&SETUP_LOCK])
        .await
        .map_err(Error::sql("waiting for another setup to end"))?;
    check_server(&client).await?;
    migrate(&mut client, &mut report).await?;
    let has_publication = has_publication(&client, config).await?;
    let tables = find_tables(&client, config).await?;
    if !has_publication {
        create_publication(&client, config, &tables, &mut report).await?;
    }
    let mut replication = ReplicationConnection::connect(&config.source).await?;
    let system_identifier = slot::system_identifier(&mut replication).await?;
    let mut session = Session::new(config.source.clone());
    match slot::find(&mut session, &config.slot).await? {
        Some(found) => {
            report.left.push(format!("replication slot {} at {}", config.slot, found.confirmed_flush_lsn));
            if has_publication {
                let fed = Some((system_identifier.as_str(), found.confirmed_flush_lsn));
                alter_publication(&mut client, config, fed, &mut report).await?;
            }
            // Nobody knows any more what the tables held when the slot was made.
            let all = tables.iter().map(|table| (table, State::Snapshot)).collect();
            make_watermarks(&client, config, &system_identifier, found.confirmed_flush_lsn, all, &mut report)
                .await?;
        }
        None => {
            if has_publication {
                alter_publication(&mut client, config, None, &mut report).await?;
            }
            let (start, states) = create_slot(&mut replication, config, &tables).await?;
            report.done.push(format!("made replication slot {} at {start}", config.slot));
            for table in watermark::mark_gap(&client, &config.slot).await? {
                report.done.push(format!("marked a gap in {table}: the slot that fed it is gone"));
            }
            make_watermarks(&client, config, &system_identifier, start, states, &mut report).await?;
        }
    }
    Ok(report)
}

async fn check_server(client: &Client) -> Result<()> {
    let row = client
        .query_one("select current_setting('server_version_num')::int, current_setting('wal_level')", &[])
        .await
        .map_err(Error::sql("reading the server's settings"))?;
    let version: i32 = row.try_get(0).map_err(Error::sql("reading server_version_num"))?;
    let wal_level: String = row.try_get(1).map_err(Error::sql("reading wal_level"))?;
    let unfit = |setting: &str, value: String, accepted: &str| Error::Setting {
        setting: format!("the server's {setting}"),
        value,
        accepted: accepted.to_owned(),
    };
    if version < 150_000 {
        return Err(unfit("version", version.to_string(), "PostgreSQL 15 or later"));
    }
    if wal_level != "logical" {
        let accepted = "logical: `alter system set wal_level = 'logical'`, then restart the server";
        return Err(unfit("wal_level", wal_level, accepted));
    }
    Ok(())
}

async fn migrate(client: &mut Client, report: &mut Report) -> Result<()> {
    let exists = client
        .query_one("select to_regnamespace('highwater') is not null", &[])
        .await
        .and_then(|row| row.try_get::<_, bool>(0))
        .map_err(Error::sql("looking for schema highwater"))?;
    // `if not exists` would ask for the right to create even where the schema is there.
    if !exists {
        client
            .batch_execute("create schema highwater")
            .await
            .map_err(Error::sql("creating schema highwater"))?;
    }
    let mut runner = migrations::migrations::runner();
    runner.set_migration_table_name("highwater.migration");
    let outcome = runner.run_async(client).await.map_err(|error| Error::Encode {
        context: "migrating schema highwater".to_owned(),
        source: Box::new(error),
    })?;
    match outcome.applied_migrations().as_slice() {
        [] => report.left.push("schema highwater is up to date".to_owned()),
        applied => {
            report.done.extend(applied.iter().map(|step| format!("migrated schema highwater: {step}")))
        }
    }
    Ok(())
}

async fn has_publication(client: &Client, config: &Config) -> Result<bool> {
    client
        .query_opt("select from pg_publication where pubname = $1", &[&config.publication])
        .await
        .map(|row| row.is_some())
        .map_err(Error::sql("looking for the publication"))
}

/// The drift tables that exist, and the entity table if one of them needs it.
async fn find_tables(client: &Client, config: &Config) -> Result<Vec<SourceTable>> {
    let rows = client
        .query(
            "select c.relname::text,
                    exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'entity_id' and not a.attisdropped),
                    exists (select from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
                            where r.prrelid = c.oid and p.pubname = $2)
             from pg_class c where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relkind in ('r', 'p')
             order by c.relname",
            &[&config.schema, &config.publication],
        )
        .await
        .map_err(Error::sql(format!("looking for drift tables in schema {:?}", config.schema)))?;
    let mut needs_entities = false;
    let mut tables = Vec::new();
    for row in rows {
        let unreadable = "reading the list of tables";
        let name: String = row.try_get(0).map_err(Error::sql(unreadable))?;
        let by_id: bool = row.try_get(1).map_err(Error::sql(unreadable))?;
        let published = row.try_get(2).map_err(Error::sql(unreadable))?;
        let kind = Kind::of_source_table(&name);
        needs_entities |= kind.is_some() && by_id;
        if kind.is_some() || name == ENTITY_TABLE {
            tables.push(SourceTable { name, kind, published });
        }
    }
    tables.retain(|table| table.kind.is_some() || needs_entities);
    if tables.iter().any(|table| table.kind.is_some()) {
        return Ok(tables);
    }
    Err(Error::Setting {
        setting: "schema".to_owned(),
        value: config.schema.clone(),
        accepted: "a schema with custom_drift, psi_drift or spc_drift in it".to_owned(),
    })
}

fn qualified(config: &Config, table: &SourceTable) -> String {
    format!("{}.{}", quote_identifier(&config.schema), quote_identifier(&table.name))
}

async fn create_publication(
    client: &Client,
    config: &Config,
    tables: &[SourceTable],
    report: &mut Report,
) -> Result<()> {
    let names: Vec<String> = tables.iter().map(|table| qualified(config, table)).collect();
    // Inserts only: with updates in it, every `update` of a table without a primary key would fail. No column
    // list: it would keep the server's owner from dropping a column.
    let statement = format!(
        "create publication {} for table {} with (publish = 'insert', publish_via_partition_root = true)",
        quote_identifier(&config.publication),
        names.join(", ")
    );
    client
        .batch_execute(&statement)
        .await
        .map_err(Error::sql(format!("creating publication {}", config.publication)))?;
    report.done.push(format!("made publication {} for {}", config.publication, names.join(", ")));
    Ok(())
}

/// Mends a publication that is there. Where a slot already reads it (`fed`: the system, and the slot's
/// position), a table is added together with its watermark row: under the lock nobody can write a row that
/// neither the publication nor the look into the table would see.
async fn alter_publication(
    client: &mut Client,
    config: &Config,
    fed: Option<(&str, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    let name = quote_identifier(&config.publication);
    let is_right = client
        .query_opt(
            "select from pg_publication where pubname = $1 and pubinsert and pubviaroot
             and not (pubupdate or pubdelete or pubtruncate)",
            &[&config.publication],
        )
        .await
        .map_err(Error::sql("reading the publication"))?;
    if is_right.is_none() {
        let statement =
            format!("alter publication {name} set (publish = 'insert', publish_via_partition_root = true)");
        client.batch_execute(&statement).await.map_err(Error::sql("altering the publication"))?;
        report
            .done
            .push(format!("set publication {} to inserts only, through partition roots", config.publication));
    }
    let tables = find_tables(client, config).await?;
    for table in tables.iter().filter(|table| !table.published) {
        let qualified = qualified(config, table);
        let context = format!("adding {qualified} to publication {}", config.publication);
        let transaction = client.transaction().await.map_err(Error::sql(&context))?;
        let statement = format!(
            "set local lock_timeout = '{LOCK_TIMEOUT}'; lock table {qualified} in share row exclusive mode;
             alter publication {name} add table {qualified}"
        );
        transaction.batch_execute(&statement).await.map_err(Error::sql(&context))?;
        if let (Some(kind), Some((system_identifier, start))) = (table.kind, fed) {
            let row = transaction.query_one(&format!("select exists (select from {qualified})"), &[]).await;
            let holds_rows: bool = row.and_then(|row| row.try_get(0)).map_err(Error::sql(&context))?;
            let state = if holds_rows { State::Snapshot } else { State::Streaming };
            let source = format!("{}.{}", config.schema, table.name);
            watermark::create(&transaction, &source, kind, &config.slot, system_identifier, state, start)
                .await?;
        }
        transaction.commit().await.map_err(Error::sql(&context))?;
        report.done.push(format!("added {qualified} to publication {}", config.publication));
    }
    if tables.iter().all(|table| table.published) && is_right.is_some() {
        report.left.push(format!("publication {}", config.publication));
    }
    Ok(())
}

/// Makes the slot, and says of each table whether it holds rows that the slot will not send.
async fn create_slot<'a>(
    replication: &mut ReplicationConnection,
    config: &Config,
    tables: &'a [SourceTable],
) -> Result<(Lsn, Vec<(&'a SourceTable, State)>)> {
    replication.query("begin transaction isolation level repeatable read read only").await?;
    let command = format!(
        "CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'use')",
        quote_identifier(&config.slot)
    );
    let rows = replication.query(&command).await?;
    let start =
        rows.first().and_then(|row| row.get(1)?.as_deref()?.parse().ok()).ok_or_else(|| Error::Protocol {
            context: "CREATE_REPLICATION_SLOT".to_owned(),
            detail: "the answer has no consistent point".to_owned(),
        })?;
    let mut states = Vec::new();
    for table in tables {
        let rows =
            replication.query(&format!("select exists (select from {})", qualified(config, table))).await?;
        let empty = rows.first().and_then(|row| row.first()?.as_deref()) == Some("f");
        states.push((table, if empty { State::Streaming } else { State::Snapshot }));
    }
    replication.query("commit").await?;
    Ok((start, states))
}

async fn make_watermarks(
    client: &Client,
    config: &Config,
    system_identifier: &str,
    start: Lsn,
    states: Vec<(&SourceTable, State)>,
    report: &mut Report,
) -> Result<()> {
    for (table, state) in states {
        let Some(kind) = table.kind else { continue };
        let name = format!("{}.{}", config.schema, table.name);
        let made =
            watermark::create(client, &name, kind, &config.slot, system_identifier, state, start).await?;
        match (made, state) {
            (false, _) => report.left.push(format!("watermark of {name}")),
            (true, State::Snapshot) => report.done.push(format!(
                "made the watermark of {name}: it holds rows from before the slot, which are not archived yet"
            )),
            (true, _) => report.done.push(format!("made the watermark of {name}")),
        }
    }
    Ok(())
}
