//! `highwater setup`: everything that archiving needs in the source database. Idempotent: what is there
//! stays, what is missing is made, and the report says which was which.
//!
//! # Which rows a new slot misses
//!
//! A slot streams what is committed after its consistent point. Whether a table holds older rows is therefore
//! asked in the slot's own snapshot (`SNAPSHOT 'use'`, manual section 55.4), which sees exactly what the slot
//! will not send. A table that is added to the publication later is asked under a lock that keeps writers out
//! until the publication has it.

mod retention;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::archive::Storage;
use crate::config::Config;
use crate::coverage;
use crate::decode::ENTITY_TABLE;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session, quote_identifier, sql};
use crate::record::Kind;
use crate::slot::{self, Identity, Slot};
use crate::source::{self, Partition};
use crate::unarchived::{self, Part, Told};
use crate::watermark::{self, NewWatermark, State};
pub use retention::schedule_purge;
pub(crate) use retention::{PURGE_COMMAND, PURGE_JOB};

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
    /// What somebody else has to do, with the statement.
    pub todo: Vec<String>,
}

/// A drift table, or the entity table, as the catalog has it.
struct SourceTable {
    /// Without the schema.
    name: String,
    oid: u32,
    kind: Option<Kind>,
    published: bool,
    /// The tables that its rows are in.
    leaves: Vec<Partition>,
    /// ... and those that are not archived.
    parts: Vec<Part>,
}

/// Makes the schema `highwater`, the publication, the slot and the watermark rows, as far as they are
/// missing; before them it proves that the storage can hold an archive.
///
/// # Errors
///
/// The storage is not fit; or the server refused a step; what was made before it stays, and setup may be run again.
pub async fn setup(config: &Config) -> Result<Report> {
    let mut report = Report::default();
    let mut client = sql::connect(&config.source).await?;
    lock_out_others(&client).await?;
    check_server(&client).await?;
    // A slot keeps the server's log until rows are archived, so it is not made for a storage that can't take them.
    Storage::open(&config.storage)?.prove_once().await?;
    migrate(&mut client, &mut report).await?;
    let has_publication = has_publication(&client, &config.publication).await?;
    let tables = find_tables(&client, config).await?;
    let mut replication = ReplicationConnection::connect(&config.source).await?;
    let identity = slot::identify(&mut replication).await?;
    let found = slot::find(&mut Session::new(config.source.clone()), &config.slot).await?;
    match (found, has_publication) {
        (Some(_), false) => return Err(unreadable_slot(config)),
        (Some(found), true) => {
            report.left.push(format!("replication slot {} at {}", config.slot, found.confirmed_flush_lsn));
            keep_on_standbys(config, &mut replication, &found, &mut report).await?;
            let fed = Some((&identity, found.confirmed_flush_lsn));
            alter_publication(&mut client, config, fed, &mut report).await?;
            // Nobody knows any more what the tables held when the slot was made.
            let all = tables.iter().map(|table| (table, State::Snapshot)).collect();
            make_watermarks(&client, config, &identity, found.confirmed_flush_lsn, all, &mut report).await?;
        }
        (None, _) => {
            check_history(&client, config, &identity).await?;
            if has_publication {
                alter_publication(&mut client, config, None, &mut report).await?;
            } else {
                create_publication(&client, config, &tables, &mut report).await?;
            }
            let (start, states) = create_slot(&mut replication, config, &tables).await?;
            report.done.push(format!("made replication slot {} at {start}", config.slot));
            let system = identity.system_identifier.as_str();
            let rebased =
                watermark::rebase(&client, &config.slot, system, identity.timeline_id, start).await?;
            for table in rebased {
                report.done.push(format!("marked a gap in {table}: the slot that fed it is gone"));
            }
            make_watermarks(&client, config, &identity, start, states, &mut report).await?;
        }
    }
    retention::keep(&client, config, &mut report).await?;
    retention::stop_partman(&client, config, &mut report).await?;
    let mut told = Told::default();
    for row in watermark::read(&client).await?.iter().filter(|row| row.slot_name == config.slot) {
        told.tell(&client, &row.source_table).await?;
    }
    Ok(report)
}

/// Has the slot kept on standbys, or not, as the setting says, where the server can.
async fn keep_on_standbys(
    config: &Config,
    replication: &mut ReplicationConnection,
    found: &Slot,
    report: &mut Report,
) -> Result<()> {
    if found.failover.is_none_or(|failover| failover == config.failover) || found.wal_status == "lost" {
        return Ok(());
    }
    if found.active_pid.is_some() {
        let how = if config.failover { "not kept on standbys" } else { "kept on standbys" };
        report.left.push(format!(
            "the slot is {how}; to change that, stop the sidecar, run `highwater setup`, and start it again"
        ));
        return Ok(());
    }
    slot::set_failover(replication, &config.slot, config.failover).await?;
    let how = if config.failover { "will have" } else { "will not have" };
    report.done.push(format!("changed replication slot {}: standbys {how} it", config.slot));
    Ok(())
}

/// Waits until this is the only setup, and says so.
async fn lock_out_others(client: &Client) -> Result<()> {
    let failed = || Error::sql("waiting for another setup to end");
    let row = client.query_one("select pg_try_advisory_lock($1)", &[&SETUP_LOCK]).await.map_err(failed())?;
    if row.try_get(0).map_err(failed())? {
        return Ok(());
    }
    let query = "select string_agg(pid::text, ', ') from pg_locks
                 where locktype = 'advisory' and granted and classid = ($1::bigint >> 32)::oid
                   and objid = ($1::bigint & 4294967295)::oid and database = (select oid from pg_database where datname = current_database())";
    let row = client.query_one(query, &[&SETUP_LOCK]).await.map_err(failed())?;
    let process: Option<String> = row.try_get(0).map_err(failed())?;
    tracing::warn!(process, "waiting for another setup of this database to end");
    client.execute("select pg_advisory_lock($1)", &[&SETUP_LOCK]).await.map_err(failed()).map(drop)
}

/// A slot reads the log with the catalog of that time (manual section 49.2.1): where the publication did not exist, it
/// can't go on, even if the publication exists today.
fn unreadable_slot(config: &Config) -> Error {
    let detail = format!(
        "it exists, but publication {:?} does not, so the slot can't read the log of this time; drop it with `select \
         pg_drop_replication_slot('{}');` and run `highwater setup` again, which makes both and marks the gap",
        config.publication, config.slot
    );
    Error::Slot { slot: config.slot.clone(), detail, transient: false }
}

/// On another timeline, positions that the archive knows may be used again. The archive tells transactions apart by slot
/// name and position, so a new slot there needs a new name.
async fn check_history(client: &Client, config: &Config, identity: &Identity) -> Result<()> {
    let watermarks = watermark::read(client).await?;
    let other = watermarks.iter().find(|row| {
        row.slot_name == config.slot
            && row.system_identifier == identity.system_identifier
            && row.timeline_id != identity.timeline_id
    });
    let Some(other) = other else { return Ok(()) };
    let detail = format!(
        "{} was archived through a slot of this name on timeline {}, and the server is on timeline {}; if it has taken the \
         place of the other for good, nothing is to be set up: start `highwater run --accept-new-system` once",
        other.source_table, other.timeline_id, identity.timeline_id
    );
    Err(Error::Slot { slot: config.slot.clone(), detail, transient: false })
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

/// Refuses a schema that an older release has made: its statements would fail one by one.
///
/// # Errors
///
/// The schema is older, or can't be read.
pub(crate) async fn check_schema(client: &Client) -> Result<()> {
    let newest = migrations::migrations::runner().get_migrations().iter().map(|one| one.version()).max();
    let query = "select coalesce(max(version), 0)::bigint from highwater.migration";
    let found: i64 = match client.query_one(query, &[]).await {
        Ok(row) => row.try_get(0).map_err(Error::sql("reading the version of schema highwater"))?,
        // That there is none is told by what needs it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(()),
        Err(error) => return Err(Error::sql("reading the version of schema highwater")(error)),
    };
    match newest.map(i64::from) {
        Some(newest) if found < newest => Err(Error::Setting {
            setting: "schema highwater".to_owned(),
            value: format!("version {found}"),
            accepted: format!("version {newest}: run `highwater setup`, which migrates it"),
        }),
        _ => Ok(()),
    }
}

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

/// The drift tables that exist, and the entity table if one of them needs it.
async fn find_tables(client: &Client, config: &Config) -> Result<Vec<SourceTable>> {
    let rows = client
        .query(
            "select c.relname::text, c.oid,
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
        let oid = row.try_get(1).map_err(Error::sql(unreadable))?;
        let by_id: bool = row.try_get(2).map_err(Error::sql(unreadable))?;
        let published = row.try_get(3).map_err(Error::sql(unreadable))?;
        let kind = Kind::of_source_table(&name);
        needs_entities |= kind.is_some() && by_id;
        if kind.is_some() || name == ENTITY_TABLE {
            let leaves = source::leaves(client, &format!("{}.{name}", config.schema), oid).await?;
            let parts = unarchived::parts(client, oid).await?;
            tables.push(SourceTable { name, oid, kind, published, leaves, parts });
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

/// Asks whether a table holds rows; of what can't be archived that is not asked, since it may be on another server.
fn holds_rows(config: &Config, table: &SourceTable) -> String {
    if table.parts.is_empty() {
        return format!("select exists (select from {})", qualified(config, table));
    }
    let any =
        table.leaves.iter().map(|leaf| format!("exists (select from {} where {})", leaf.from, leaf.filter));
    let any: Vec<String> = any.collect();
    format!("select {}", if any.is_empty() { "false".to_owned() } else { any.join(" or ") })
}

async fn create_publication(
    client: &Client,
    config: &Config,
    tables: &[SourceTable],
    report: &mut Report,
) -> Result<()> {
    let names: Vec<String> = tables.iter().map(|table| qualified(config, table)).collect();
    // A child by inheritance is not archived (`unarchived`), so it is not published; partitions are all the same.
    // Inserts only: with updates in it, every `update` of a table without a primary key would fail. No column
    // list: it would keep the server's owner from dropping a column.
    let statement = format!(
        "create publication {} for table only {} with (publish = 'insert', publish_via_partition_root = true)",
        quote_identifier(&config.publication),
        names.join(", only ")
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
    fed: Option<(&Identity, Lsn)>,
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
        // A publication that sent no inserts has let rows pass; the running sidecar sees that by itself.
        if fed.is_some() {
            for found in watermark::mark_unpublished(client, &config.slot, &config.publication).await? {
                let table = found.source_table;
                report
                    .done
                    .push(format!("marked a gap in {table}: the publication did not send its inserts"));
            }
        }
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
             alter publication {name} add table only {qualified}"
        );
        transaction.batch_execute(&statement).await.map_err(Error::sql(&context))?;
        if let (Some(_), Some((identity, start))) = (table.kind, fed) {
            let row = transaction.query_one(&holds_rows(config, table), &[]).await;
            let holds_rows: bool = row.and_then(|row| row.try_get(0)).map_err(Error::sql(&context))?;
            let state = if holds_rows { State::Snapshot } else { State::Streaming };
            // A table that was archived before has been out of the publication for a while.
            let source = format!("{}.{}", config.schema, table.name);
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
    let lifetime = slot::Lifetime::Lasting { failover: config.failover };
    let (start, _) =
        slot::create(&config.source, replication, &config.slot, lifetime, slot::SnapshotUse::Take).await?;
    let mut states = Vec::new();
    for table in tables {
        let rows = replication.query(&holds_rows(config, table)).await?;
        let is_empty = rows.first().and_then(|row| row.first()?.as_deref()) == Some("f");
        states.push((table, if is_empty { State::Streaming } else { State::Snapshot }));
    }
    replication.query("commit").await?;
    Ok((start, states))
}

async fn make_watermarks(
    client: &Client,
    config: &Config,
    identity: &Identity,
    start: Lsn,
    states: Vec<(&SourceTable, State)>,
    report: &mut Report,
) -> Result<()> {
    for (table, state) in states {
        let name = format!("{}.{}", config.schema, table.name);
        let Some(new) = new_watermark(config, table, &name, identity, state, start) else { continue };
        let made = watermark::create(client, &new).await?;
        if !made && watermark::table_oid(client, &name).await? != Some(table.oid) {
            watermark::mark_table_gap(client, &name, table.oid).await?;
            report.done.push(format!(
                "marked a gap in {name}: another table had its name when it was archived last"
            ));
            continue;
        }
        // A partition that came since they were read is looked at by the sidecar.
        if made && state == State::Streaming {
            coverage::cover(client, &name, &table.leaves).await?;
        }
        match (made, state) {
            (false, _) => report.left.push(format!("watermark of {name}")),
            (true, State::Snapshot) => report.done.push(format!(
                "made the watermark of {name}: it holds rows from before the slot, which `highwater run` copies first"
            )),
            (true, _) => report.done.push(format!("made the watermark of {name}")),
        }
    }
    Ok(())
}

fn new_watermark<'a>(
    config: &'a Config,
    table: &SourceTable,
    source_table: &'a str,
    identity: &'a Identity,
    state: State,
    lsn: Lsn,
) -> Option<NewWatermark<'a>> {
    Some(NewWatermark {
        source_table,
        table_oid: table.oid,
        kind: table.kind?,
        slot: &config.slot,
        system_identifier: &identity.system_identifier,
        timeline_id: identity.timeline_id,
        state,
        lsn,
    })
}
