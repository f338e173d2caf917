//! `highwater setup`: everything that archiving needs in the source database. Idempotent: what is there
//! stays, what is missing is made, and the report says which was which.
//!
//! # Which rows a new slot misses
//!
//! A slot streams what is committed after its consistent point. Whether a table holds older rows is therefore
//! asked in the slot's own snapshot (`SNAPSHOT 'use'`, manual section 55.4), which sees exactly what the slot
//! will not send. A table that is added to the publication later is asked under a lock that keeps writers out
//! until the publication has it.

mod objects;
mod owner;
mod publication;
mod retention;

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::archive::Storage;
use crate::config::Config;

use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session, quote_identifier, sql};
use crate::source::coverage;
use crate::source::describe;
use crate::source::slot::{self, Identity, Slot};
use crate::source::unarchived::{self, Part, Told};
use crate::source::{self, Partition};
use crate::tables::Kind;
use crate::watermark::{self, NewWatermark, State};
pub(crate) use objects::{HOLDINGS, differences};
use owner::Ownership;
pub(crate) use owner::{newest as newest_version, state_rights};
pub(crate) use publication::has_publication;
pub use retention::schedule_purge;
pub(crate) use retention::{PURGE_COMMAND, PURGE_JOB};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// Key of the advisory lock that lets one setup run at a time (manual section 13.3.5); "highwatr" in ASCII.
const SETUP_LOCK: i64 = 0x6869_6768_7761_7472;

/// The role that archives, where nobody names another.
pub(crate) const SIDECAR_ROLE: &str = "highwater";

/// How long to wait for another setup, which may have to wait for transactions itself before it has its slot.
const SETUP_LOCK_TIMEOUT: Duration = Duration::from_secs(30);

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

/// An archived table, or an entity table, as the catalog has it.
struct SourceTable {
    schema: String,
    /// Without the schema.
    name: String,
    oid: u32,
    kind: Option<Kind>,
    /// Those of our publications that it is in.
    publications: Vec<String>,
    /// The tables that its rows are in.
    leaves: Vec<Partition>,
    /// ... and those that are not archived.
    parts: Vec<Part>,
}

impl SourceTable {
    /// The name with the schema.
    fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    fn is_in(&self, publication: &str) -> bool {
        self.publications.iter().any(|name| name == publication)
    }
}

/// The oids of the archived tables; not those of entity tables, which are only read.
fn drift_oids(tables: &[SourceTable]) -> Vec<u32> {
    tables.iter().filter(|table| table.kind.is_some()).map(|table| table.oid).collect()
}

/// Makes the schema `highwater`, the publication, the slot and the watermark rows, as far as they are
/// missing; before them it proves that the storage can hold an archive. What only the owner of the drift tables may
/// do it does if the role has his rights, and otherwise refuses to go on without.
///
/// # Errors
///
/// The storage is not fit; the owner has something to do first ([`setup_as_owner`]); or the server refused a step. What was made
/// before stays, and setup may be run again.
pub async fn setup(config: &Config) -> Result<Report> {
    let mut report = Report::default();
    let mut client = open(config).await?;
    // A slot keeps the server's log until rows are archived, so it is not made for a storage that can't take them.
    let storage = Storage::open(&config.storage)?;
    storage.prove_once().await?;
    let config = &describe::with_all_tables(config, &client, Some(&storage)).await?;
    let ownership = Ownership::read(&client, &list_tables(&client, config).await?).await?;
    let mut replication = ReplicationConnection::connect(&config.source).await?;
    let identity = slot::identify(&mut replication).await?;
    let found = slot::find(&mut Session::new(config.source.clone()), &config.slot).await?;
    if found.is_some() && !has_publication(&client, &config.publication).await? {
        return Err(unreadable_slot(config));
    }
    if ownership.is_owner() {
        owner::make_schema(&mut client, &ownership, None, &mut report).await?;
    } else {
        ownership.must_be_made()?;
        ownership.warn_of_owner(&mut report);
    }
    let tables = find_tables(&client, config).await?;
    if ownership.is_owner() {
        owner::give_to_purge(&client, &tables).await?;
    }
    if let Some(found) = found {
        report.left.push(format!("replication slot {} at {}", config.slot, found.confirmed_flush_lsn));
        keep_on_standbys(config, &mut replication, &found, &mut report).await?;
        let fed = Some((&identity, found.confirmed_flush_lsn));
        publication::publish(&mut client, config, &tables, &ownership, fed, &mut report).await?;
        // Nobody knows any more what the tables held when the slot was made.
        let all = tables.iter().map(|table| (table, State::Snapshot)).collect();
        make_watermarks(&client, config, &identity, found.confirmed_flush_lsn, all, &mut report).await?;
    } else {
        check_history(&client, config, &identity).await?;
        publication::publish(&mut client, config, &tables, &ownership, None, &mut report).await?;
        let (start, states) = create_slot(&mut replication, config, &tables).await?;
        report.done.push(format!("made replication slot {} at {start}", config.slot));
        let system = identity.system_identifier.as_str();
        for table in watermark::rebase(&client, &config.slot, system, identity.timeline_id, start).await? {
            report.done.push(format!("marked a gap in {table}: the slot that fed it is gone"));
        }
        make_watermarks(&client, config, &identity, start, states, &mut report).await?;
    }
    retention::keep(&client, config, &mut report).await?;
    retention::stop_partman(&client, &tables, &mut report).await?;
    let mut told = Told::default();
    for row in watermark::read(&client).await?.iter().filter(|row| row.slot_name == config.slot) {
        told.tell(&client, &row.source_table).await?;
    }
    Ok(report)
}

/// Does what the owner of the drift tables has to do, and no more: schema `highwater`, which belongs to him, the publication, the rights
/// of the role that archives, pg_partman's retention. An installation whose schema is somebody else's is taken over.
///
/// # Errors
///
/// The session's role has not the rights of the tables' owner; there is no such role; something in the schema was changed; or the server
/// refused a step. What was made before stays, and setup may be run again.
pub async fn setup_as_owner(config: &Config, sidecar_role: &str) -> Result<Report> {
    let mut report = Report::default();
    let mut client = open(config).await?;
    let config = &describe::with_all_tables(config, &client, None).await?;
    let ownership = Ownership::read(&client, &list_tables(&client, config).await?).await?;
    if !ownership.is_owner() {
        return Err(ownership.refusal("making schema highwater"));
    }
    let found = slot::find(&mut Session::new(config.source.clone()), &config.slot).await?;
    if found.is_some() && !has_publication(&client, &config.publication).await? {
        return Err(unreadable_slot(config));
    }
    owner::make_schema(&mut client, &ownership, Some(sidecar_role), &mut report).await?;
    let tables = find_tables(&client, config).await?;
    let identity = slot::identify_by_sql(&client).await?;
    let fed = found.as_ref().map(|found| (&identity, found.confirmed_flush_lsn));
    publication::publish(&mut client, config, &tables, &ownership, fed, &mut report).await?;
    owner::grant(&client, &tables, &ownership, sidecar_role, &mut report).await?;
    owner::give_to_purge(&client, &tables).await?;
    retention::stop_partman(&client, &tables, &mut report).await?;
    Ok(report)
}

/// What [`setup_as_owner`] would do, as a script for psql, as far as any role may see it. Without `sidecar_role` the session's role is
/// the one that archives.
///
/// # Errors
///
/// Something in the schema was changed; or a query failed.
pub async fn owner_script(config: &Config, sidecar_role: Option<&str>) -> Result<String> {
    let client = sql::connect(&config.source).await?;
    check_server(&client).await?;
    let config = &describe::with_all_tables(config, &client, None).await?;
    let tables = list_tables(&client, config).await?;
    let ownership = Ownership::read(&client, &tables).await?;
    let own = if ownership.is_owner() { SIDECAR_ROLE } else { &ownership.user };
    let publication = publication::script(&client, config, &tables).await?;
    owner::script(&client, &tables, &ownership, sidecar_role.unwrap_or(own), &publication).await
}

/// The session of a setup that is the only one.
async fn open(config: &Config) -> Result<Client> {
    let client = sql::connect(&config.source).await?;
    lock_out_others(&client).await?;
    check_server(&client).await?;
    Ok(client)
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

/// Waits until this is the only setup, and says so. Anybody can take the lock, so the wait has an end.
async fn lock_out_others(client: &Client) -> Result<()> {
    let failed = || Error::sql("waiting for another setup to end");
    let query = "select string_agg(format('session %s of role %s', l.pid, a.usename), ', ')
                 from pg_locks l left join pg_stat_activity a on a.pid = l.pid
                 where l.locktype = 'advisory' and l.granted and l.classid = ($1::bigint >> 32)::oid
                   and l.objid = ($1::bigint & 4294967295)::oid and l.database = (select oid from pg_database where datname = current_database())";
    let started = Instant::now();
    let mut is_told = false;
    loop {
        let row =
            client.query_one("select pg_try_advisory_lock($1)", &[&SETUP_LOCK]).await.map_err(failed())?;
        if row.try_get(0).map_err(failed())? {
            return Ok(());
        }
        let row = client.query_one(query, &[&SETUP_LOCK]).await.map_err(failed())?;
        let holder: Option<String> = row.try_get(0).map_err(failed())?;
        let holder = holder.unwrap_or_else(|| "nobody any more".to_owned());
        if started.elapsed() > SETUP_LOCK_TIMEOUT {
            return Err(Error::Setting {
                setting: "another setup of this database".to_owned(),
                value: holder,
                accepted: format!(
                    "over after {} s: if it is none of Highwater's, end it: select pg_terminate_backend(...);",
                    SETUP_LOCK_TIMEOUT.as_secs()
                ),
            });
        }
        if !is_told {
            tracing::warn!(holder, "waiting for another setup of this database to end");
            is_told = true;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
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

/// Refuses a schema that an older release has made: its statements would fail one by one.
///
/// # Errors
///
/// The schema is older, or can't be read.
pub(crate) async fn check_schema(client: &Client) -> Result<()> {
    let query = "select coalesce(max(version), 0)::bigint from highwater.migration";
    let found: i64 = match client.query_one(query, &[]).await {
        Ok(row) => row.try_get(0).map_err(Error::sql("reading the version of schema highwater"))?,
        // That there is none is told by what needs it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(()),
        Err(error) => return Err(Error::sql("reading the version of schema highwater")(error)),
    };
    let newest = owner::newest();
    let way = match found.cmp(&newest) {
        Ordering::Equal => return Ok(()),
        Ordering::Less => "run `highwater setup`, which migrates it (or says who has to)",
        // Its archive may have what this program doesn't know of.
        Ordering::Greater => "run the newer `highwater` that has migrated it",
    };
    Err(Error::Setting {
        setting: "schema highwater".to_owned(),
        value: format!("version {found}"),
        accepted: format!("version {newest}: {way}"),
    })
}

/// The drift tables that exist, and the entity table if one of them needs it, with what their rows are in.
async fn find_tables(client: &Client, config: &Config) -> Result<Vec<SourceTable>> {
    let mut tables = list_tables(client, config).await?;
    for table in &mut tables {
        let name = table.full_name();
        table.leaves = source::leaves(client, &name, table.oid).await?;
        table.parts = unarchived::parts(client, table.oid).await?;
    }
    Ok(tables)
}

/// The same before schema `highwater` is there: without what their rows are in.
async fn list_tables(client: &Client, config: &Config) -> Result<Vec<SourceTable>> {
    let kinds = config.kinds();
    let source_of = |kind: &Kind| kind.source_table(&config.schema).unwrap_or_default();
    let lookup_of = |kind: &Kind| kind.entity().and_then(|entity| entity.lookup.as_ref());
    let names = kinds.iter().map(source_of);
    let lookups = kinds.iter().filter_map(lookup_of).map(|lookup| lookup.qualified(&config.schema));
    let names: Vec<String> = names.chain(lookups).collect();
    let rows = client
        .query(
            "select n.nspname::text, c.relname::text, c.oid,
                    array(select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
                    array(select p.pubname::text from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
                          where r.prrelid = c.oid and p.pubname = any ($2))
             from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname || '.' || c.relname = any ($1) and c.relkind in ('r', 'p')
             order by c.relname, n.nspname",
            &[&names, &[config.publication.clone(), config.versions_publication()].to_vec()],
        )
        .await
        .map_err(Error::sql(format!("looking for drift tables in schema {:?}", config.schema)))?;
    let mut needed = Vec::new();
    let mut tables = Vec::new();
    for row in rows {
        let unreadable = "reading the list of tables";
        let columns: Vec<String> = row.try_get(3).map_err(Error::sql(unreadable))?;
        let mut table = SourceTable {
            schema: row.try_get(0).map_err(Error::sql(unreadable))?,
            name: row.try_get(1).map_err(Error::sql(unreadable))?,
            oid: row.try_get(2).map_err(Error::sql(unreadable))?,
            kind: None,
            publications: row.try_get(4).map_err(Error::sql(unreadable))?,
            leaves: Vec::new(),
            parts: Vec::new(),
        };
        table.kind = kinds.iter().find(|kind| source_of(kind) == table.full_name()).copied();
        let lookup = table.kind.as_ref().and_then(lookup_of).filter(|lookup| columns.contains(&lookup.id));
        needed.extend(lookup.map(|lookup| lookup.qualified(&config.schema)));
        tables.push(table);
    }
    tables.retain(|table| table.kind.is_some() || needed.contains(&table.full_name()));
    if tables.iter().any(|table| table.kind.is_some()) {
        return Ok(tables);
    }
    Err(Error::Setting {
        setting: "schema".to_owned(),
        value: config.schema.clone(),
        accepted: "a schema with custom_drift, psi_drift or spc_drift in it".to_owned(),
    })
}

fn qualified(table: &SourceTable) -> String {
    format!("{}.{}", quote_identifier(&table.schema), quote_identifier(&table.name))
}

/// Asks whether a table holds rows; of what can't be archived that is not asked, since it may be on another server.
fn holds_rows(table: &SourceTable) -> String {
    if table.parts.is_empty() {
        return format!("select exists (select from {})", qualified(table));
    }
    let any =
        table.leaves.iter().map(|leaf| format!("exists (select from {} where {})", leaf.from, leaf.filter));
    let any: Vec<String> = any.collect();
    format!("select {}", if any.is_empty() { "false".to_owned() } else { any.join(" or ") })
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
        let rows = replication.query(&holds_rows(table)).await?;
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
        let name = table.full_name();
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
