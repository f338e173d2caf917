//! The server's settings, and the role that Highwater connects as.

use tokio_postgres::{Client, Row};

use super::{Report, SERVER_VERSION_MIN, identifier};
use crate::config::Config;
use crate::error::{Error, Result};

/// What one query tells about the server.
#[derive(Debug)]
pub(super) struct Server {
    /// As in `server_version_num`, 150018 for 15.18.
    pub(super) version: i32,
    version_text: String,
    wal_level: String,
    is_standby: bool,
    pub(super) database: String,
    pub(super) role: String,
    slots_max: i64,
    slots_used: i64,
    senders_max: i64,
    senders_used: i64,
    /// Megabytes; -1 for no limit.
    pub(super) wal_keep_mib: i64,
    /// 0 for never; before PostgreSQL 18, always.
    idle_slot_timeout: i64,
    /// Whether the configured slot is one of those in use, and its walsender one of those at work.
    has_own_slot: bool,
    has_own_sender: bool,
}

const SERVER: &str = "
    select current_setting('server_version_num')::int,
           current_setting('server_version'),
           current_setting('wal_level'),
           pg_is_in_recovery(),
           current_database()::text,
           current_user::text,
           current_setting('max_replication_slots')::int8,
           (select count(*) from pg_replication_slots),
           current_setting('max_wal_senders')::int8,
           (select count(*) from pg_stat_replication),
           coalesce((select setting::int8 from pg_settings where name = 'max_slot_wal_keep_size'), -1),
           coalesce((select setting::int8 from pg_settings where name = 'idle_replication_slot_timeout'), 0),
           exists (select from pg_replication_slots where slot_name = $1::text),
           exists (select from pg_replication_slots where slot_name = $1::text and active)";

impl Server {
    pub(super) async fn read(client: &Client, slot: &str) -> Result<Self> {
        let row = client.query_one(SERVER, &[&slot]).await;
        row.and_then(|row| Self::of(&row)).map_err(Error::sql("reading the server's settings"))
    }

    fn of(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            version: row.try_get(0)?,
            version_text: row.try_get(1)?,
            wal_level: row.try_get(2)?,
            is_standby: row.try_get(3)?,
            database: row.try_get(4)?,
            role: row.try_get(5)?,
            slots_max: row.try_get(6)?,
            slots_used: row.try_get(7)?,
            senders_max: row.try_get(8)?,
            senders_used: row.try_get(9)?,
            wal_keep_mib: row.try_get(10)?,
            idle_slot_timeout: row.try_get(11)?,
            has_own_slot: row.try_get(12)?,
            has_own_sender: row.try_get(13)?,
        })
    }

    pub(super) fn report(&self, config: &Config, report: &mut Report) {
        report.ok("connection", config.source.to_string(), format!("connected as {}", self.role));
        if self.version < SERVER_VERSION_MIN {
            let seen = format!("PostgreSQL {} is too old; nothing more of it was checked", self.version_text);
            return report.error("server-version", "server", seen, "upgrade to PostgreSQL 15 or later");
        }
        report.ok("server-version", "server", format!("PostgreSQL {}", self.version_text));
        if self.is_standby {
            report.error(
                "standby",
                "server",
                "is a standby: the watermarks can't be written to it",
                "point DATABASE_URI at the primary",
            );
        }
        self.report_wal_level(report);
        self.report_capacity(config, report);
        self.report_limits(report);
    }

    fn report_wal_level(&self, report: &mut Report) {
        if self.wal_level == "logical" {
            return report.ok("wal-level", "wal_level", "is logical");
        }
        report.error(
            "wal-level",
            "wal_level",
            format!("is {}: rows can't be read from the log", self.wal_level),
            "alter system set wal_level = 'logical'; -- then restart the server",
        );
    }

    fn report_capacity(&self, config: &Config, report: &mut Report) {
        let slots = format!("{} of {} in use", self.slots_used, self.slots_max);
        if self.has_own_slot || self.slots_used < self.slots_max {
            report.ok("replication-slots", "max_replication_slots", slots);
        } else {
            let more = self.slots_max.saturating_add(5);
            let remedy =
                format!("alter system set max_replication_slots = {more}; -- then restart the server");
            let message = format!("{slots}: none is free for {:?}", config.slot);
            report.error("replication-slots", "max_replication_slots", message, remedy);
        }
        let senders = format!("{} of {} in use", self.senders_used, self.senders_max);
        if self.has_own_sender || self.senders_used < self.senders_max {
            report.ok("wal-senders", "max_wal_senders", senders);
        } else {
            let more = self.senders_max.saturating_add(5);
            let remedy = format!("alter system set max_wal_senders = {more}; -- then restart the server");
            report.error("wal-senders", "max_wal_senders", format!("{senders}: none is free"), remedy);
        }
    }

    fn report_limits(&self, report: &mut Report) {
        let name = "max_slot_wal_keep_size";
        if self.wal_keep_mib < 0 {
            report.warning(
                "wal-limit",
                name,
                "is -1: a stopped sidecar can fill the server's disk with log",
                "alter system set max_slot_wal_keep_size = '64GB'; select pg_reload_conf(); \
                 -- less than the disk has free; past it the slot is lost, and rows deleted meanwhile with it",
            );
        } else {
            report.ok("wal-limit", name, format!("is {} MiB", self.wal_keep_mib));
        }
        if self.idle_slot_timeout != 0 {
            report.warning(
                "idle-slot-timeout",
                "idle_replication_slot_timeout",
                "is on: a sidecar that is stopped for that long loses its slot, and has to compare days",
                "alter system set idle_replication_slot_timeout = 0; select pg_reload_conf();",
            );
        }
    }
}

// `rds_replication` stands for `rolreplication` on Amazon RDS, where nobody gets the attribute.
const ROLE: &str = "
    select rolreplication or rolsuper
           or exists (select from pg_roles g where g.rolname = 'rds_replication' and pg_has_role(g.oid, 'member'))
      from pg_roles
     where rolname = current_user";

pub(super) async fn check_role(client: &Client, server: &Server, report: &mut Report) -> Result<()> {
    let context = "reading the role's attributes";
    let row = client.query_one(ROLE, &[]).await.map_err(Error::sql(context))?;
    if row.try_get(0).map_err(Error::sql(context))? {
        report.ok("role", &server.role, "may replicate");
    } else {
        let remedy = format!("alter role {} replication;", identifier(&server.role));
        report.error("role", &server.role, "may not start replication", remedy);
    }
    Ok(())
}
