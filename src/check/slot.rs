//! The replication slot: whether it can be used, and how much log it holds.

use tokio_postgres::{Client, Row};

use super::server::Server;
use super::{Report, can_read_watermarks, human_bytes, literal};
use crate::config::Config;
use crate::error::{Error, Result};

/// Retained log that a healthy archiver never needs, in bytes: at the default staleness bound this is
/// 17 MB/s of changes.
const RETAINED_WARN_BYTES: i64 = 1 << 30;

/// Share of `max_slot_wal_keep_size`, in per cent, past which its end is worth a warning: half leaves
/// as much time as it took to get here.
const LIMIT_WARN_PERCENT: i64 = 50;

struct Slot {
    plugin: Option<String>,
    database: Option<String>,
    is_active: bool,
    wal_status: Option<String>,
    is_temporary: bool,
    retained_bytes: Option<i64>,
    failover: Option<bool>,
    invalidation_reason: Option<String>,
    inactive_since: Option<String>,
    is_ready: bool,
    active_pid: Option<i32>,
}

const SLOT: &str = "
    select plugin::text, database::text, active, wal_status, temporary,
           pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn()
                                else pg_current_wal_lsn() end, restart_lsn)::int8,
           (to_jsonb(s) ->> 'failover')::boolean, to_jsonb(s) ->> 'invalidation_reason',
           to_char((to_jsonb(s) ->> 'inactive_since')::timestamptz at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
           confirmed_flush_lsn is not null or slot_type <> 'logical', active_pid
      from pg_replication_slots s
     where slot_name = $1::text";

const WATERMARK_OF_SLOT: &str = "select exists (select from highwater.watermark where slot_name = $1::text)";

const CONTEXT: &str = "reading the replication slot";

pub(super) async fn check(
    client: &Client,
    config: &Config,
    server: &Server,
    report: &mut Report,
) -> Result<()> {
    let name = config.slot.as_str();
    let Some(row) = client.query_opt(SLOT, &[&name]).await.map_err(Error::sql(CONTEXT))? else {
        return check_missing(client, name, report).await;
    };
    let slot = read(&row).map_err(Error::sql(CONTEXT))?;
    if report_identity(&slot, name, server, report) {
        report_status(&slot, name, report);
        report_failover(&slot, name, config, report);
        report_retained(&slot, name, server, report);
    }
    Ok(())
}

fn read(row: &Row) -> Result<Slot, tokio_postgres::Error> {
    Ok(Slot {
        plugin: row.try_get(0)?,
        database: row.try_get(1)?,
        is_active: row.try_get(2)?,
        wal_status: row.try_get(3)?,
        is_temporary: row.try_get(4)?,
        retained_bytes: row.try_get(5)?,
        failover: row.try_get(6)?,
        invalidation_reason: row.try_get(7)?,
        inactive_since: row.try_get(8)?,
        is_ready: row.try_get(9)?,
        active_pid: row.try_get(10)?,
    })
}

async fn check_missing(client: &Client, name: &str, report: &mut Report) -> Result<()> {
    let context = "looking for the slot's watermark";
    let mut was_used = false;
    if can_read_watermarks(client).await? {
        let row = client.query_one(WATERMARK_OF_SLOT, &[&name]).await.map_err(Error::sql(context))?;
        was_used = row.try_get(0).map_err(Error::sql(context))?;
    }
    if was_used {
        let message = "is gone, though the archive was fed from it: rows may be missing, purges are blocked";
        report.error(
            "slot",
            name,
            message,
            "start `highwater`: it makes a new slot, and adds what is missing",
        );
    } else {
        report.error("slot", name, "does not exist", "run `highwater setup`");
    }
    Ok(())
}

/// Whether the slot is one that Highwater can stream from.
fn report_identity(slot: &Slot, name: &str, server: &Server, report: &mut Report) -> bool {
    let other = "set HIGHWATER_SLOT to another name";
    let drop =
        format!("select pg_drop_replication_slot({}); -- if nobody needs it; or {other}", literal(name));
    let wrong = match (slot.plugin.as_deref(), slot.database.as_deref()) {
        (None, _) => "is a physical slot".to_owned(),
        (Some(plugin), _) if plugin != "pgoutput" => format!("uses the plugin {plugin}, not pgoutput"),
        (_, Some(database)) if database != server.database => {
            format!("belongs to the database {database:?}, not {:?}", server.database)
        }
        _ if !slot.is_ready => {
            let pid = slot.active_pid.unwrap_or_default();
            let message =
                format!("is being made by process {pid}, which waits for transactions that began before");
            let remedy = format!("let them end, or take it back with: select pg_terminate_backend({pid});");
            report.error("slot", name, message, remedy);
            return false;
        }
        _ if slot.is_temporary => "is temporary: it ends with the session that made it".to_owned(),
        _ => return true,
    };
    report.error("slot", name, wrong, drop);
    false
}

fn report_status(slot: &Slot, name: &str, report: &mut Report) {
    match slot.wal_status.as_deref() {
        Some("lost") => {
            let remedy = format!(
                "start `highwater`: it makes a new one, and adds what is missing; or, to free its place, select \
                 pg_drop_replication_slot({});",
                literal(name)
            );
            let reason =
                slot.invalidation_reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            report.error("slot", name, format!("is lost: the log that it needs was removed{reason}"), remedy);
        }
        Some("unreserved") => report.warning(
            "slot",
            name,
            "is about to be lost: it needs more log than max_slot_wal_keep_size allows",
            "start `highwater` at once, or raise max_slot_wal_keep_size",
        ),
        _ if slot.is_active => report.ok("slot", name, "is in use by a running archiver"),
        _ => {
            let since =
                slot.inactive_since.as_ref().map(|since| format!(" (since {since})")).unwrap_or_default();
            report.ok("slot", name, format!("is ready; nobody streams from it now{since}"));
        }
    }
}

fn report_failover(slot: &Slot, name: &str, config: &Config, report: &mut Report) {
    match slot.failover {
        Some(true) => report.ok("slot-failover", name, "is kept on standbys that synchronise slots"),
        Some(false) if config.failover => report.warning(
            "slot-failover",
            name,
            "is not kept on standbys: one that is promoted has every row compared",
            "stop the sidecar and run `highwater setup`; or set HIGHWATER_FAILOVER to false",
        ),
        _ => {}
    }
}

fn report_retained(slot: &Slot, name: &str, server: &Server, report: &mut Report) {
    let Some(retained) = slot.retained_bytes else { return };
    let mut message = format!("holds {} of log", human_bytes(retained));
    let limit = server.wal_keep_mib.saturating_mul(1 << 20);
    let mut is_near_limit = false;
    if limit > 0 {
        let percent = retained.saturating_mul(100) / limit;
        is_near_limit = percent >= LIMIT_WARN_PERCENT;
        message.push_str(&format!(", {percent} % of max_slot_wal_keep_size ({})", human_bytes(limit)));
    }
    if retained > RETAINED_WARN_BYTES || is_near_limit {
        let remedy = if slot.is_active {
            "see in the archiver's log why it is behind"
        } else {
            "start `highwater`, which archives and releases it"
        };
        report.warning("slot-wal", name, message, remedy);
    } else {
        report.ok("slot-wal", name, message);
    }
}
