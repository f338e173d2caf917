//! The server's settings, and the role that Highwater connects as.

use tokio_postgres::{Client, Row};

use super::{Report, SERVER_VERSION_MIN, identifier};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::source::slot::MAY_REPLICATE;

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
    encoding: String,
    service: Service,
}

/// Who runs the server, as the roles tell that are there: settings are changed in their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Own,
    AmazonRds,
    CloudSql,
    Azure,
    Supabase,
}

impl Service {
    fn of(role: Option<&str>) -> Self {
        match role {
            Some("rds_superuser") => Self::AmazonRds,
            Some("cloudsqlsuperuser") => Self::CloudSql,
            Some("azure_pg_admin") => Self::Azure,
            Some("supabase_admin") => Self::Supabase,
            _ => Self::Own,
        }
    }

    /// How a setting of the server is changed.
    fn set(self, name: &str, value: &str, needs_restart: bool) -> String {
        let restart = |how: &str| if needs_restart { how.to_owned() } else { String::new() };
        match (self, name) {
            (Self::Own, _) => format!(
                "alter system set {name} = {value};{}",
                if needs_restart { " -- then restart the server" } else { " select pg_reload_conf();" }
            ),
            (Self::AmazonRds, "wal_level") => {
                "set rds.logical_replication = 1 in the instance's parameter group, then reboot it".to_owned()
            }
            (Self::AmazonRds, _) => {
                format!(
                    "set {name} = {value} in the instance's parameter group{}",
                    restart(", then reboot it")
                )
            }
            (Self::CloudSql, "wal_level") => {
                "set the instance's flag cloudsql.logical_decoding = on, which restarts it".to_owned()
            }
            (Self::CloudSql, _) => {
                format!("set the instance's flag {name} = {value}{}", restart(", which restarts it"))
            }
            (Self::Azure, _) => {
                format!("set the server parameter {name} = {value}{}", restart(", then restart it"))
            }
            (Self::Supabase, _) => {
                format!(
                    "supabase postgres-config update --config {name}={value}{}",
                    restart(", which restarts it")
                )
            }
        }
    }

    /// How a role gets the right to replicate.
    fn grant_replication(self, role: &str) -> String {
        let role = identifier(role);
        if self == Self::AmazonRds {
            format!("grant rds_replication to {role};")
        } else {
            format!("alter role {role} replication;")
        }
    }
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
           exists (select from pg_replication_slots where slot_name = $1::text and active),
           current_setting('server_encoding'),
           (select rolname::text from pg_roles
             where rolname in ('rds_superuser', 'cloudsqlsuperuser', 'azure_pg_admin', 'supabase_admin') order by 1 limit 1)";

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
            encoding: row.try_get(14)?,
            service: Service::of(row.try_get(15)?),
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
        self.report_encoding(report);
        self.report_wal_level(report);
        self.report_capacity(config, report);
        self.report_limits(report);
    }

    fn report_encoding(&self, report: &mut Report) {
        match self.encoding.as_str() {
            "UTF8" => report.ok("encoding", &self.database, "is in UTF8"),
            "SQL_ASCII" => report.warning(
                "encoding",
                &self.database,
                "is in SQL_ASCII, so a text in it may be anything: a row with one that is not UTF-8 goes to the quarantine",
                "have the clients write UTF-8; `highwater sql \"select * from quarantine\"` shows what was not",
            ),
            other => report.ok("encoding", &self.database, format!("is in {other}: texts are archived in UTF-8")),
        }
    }

    fn report_wal_level(&self, report: &mut Report) {
        if self.wal_level == "logical" {
            return report.ok("wal-level", "wal_level", "is logical");
        }
        report.error(
            "wal-level",
            "wal_level",
            format!("is {}: rows can't be read from the log", self.wal_level),
            self.service.set("wal_level", "'logical'", true),
        );
    }

    fn report_capacity(&self, config: &Config, report: &mut Report) {
        let slots = format!("{} of {} in use", self.slots_used, self.slots_max);
        if self.has_own_slot || self.slots_used < self.slots_max {
            report.ok("replication-slots", "max_replication_slots", slots);
        } else {
            let more = self.slots_max.saturating_add(5);
            let remedy = self.service.set("max_replication_slots", &more.to_string(), true);
            let message = format!("{slots}: none is free for {:?}", config.slot);
            report.error("replication-slots", "max_replication_slots", message, remedy);
        }
        let senders = format!("{} of {} in use", self.senders_used, self.senders_max);
        if self.has_own_sender || self.senders_used < self.senders_max {
            report.ok("wal-senders", "max_wal_senders", senders);
        } else {
            let more = self.senders_max.saturating_add(5);
            let remedy = self.service.set("max_wal_senders", &more.to_string(), true);
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
                format!(
                    "{} -- less than the disk has free; past it the slot is lost, and rows deleted meanwhile with it",
                    self.service.set(name, "'64GB'", false)
                ),
            );
        } else {
            report.ok("wal-limit", name, format!("is {} MiB", self.wal_keep_mib));
        }
        if self.idle_slot_timeout != 0 {
            report.warning(
                "idle-slot-timeout",
                "idle_replication_slot_timeout",
                "is on: a sidecar that is stopped for that long loses its slot, and has to compare days",
                self.service.set("idle_replication_slot_timeout", "0", false),
            );
        }
    }
}

/// Whether the role may replicate.
pub(super) async fn check_role(client: &Client, server: &Server, report: &mut Report) -> Result<bool> {
    let context = "reading the role's attributes";
    let query = format!("select {MAY_REPLICATE} from pg_roles r where r.rolname = current_user");
    let row = client.query_one(&query, &[]).await.map_err(Error::sql(context))?;
    let may_replicate = row.try_get(0).map_err(Error::sql(context))?;
    if may_replicate {
        report.ok("role", &server.role, "may replicate");
    } else {
        let remedy = server.service.grant_replication(&server.role);
        report.error("role", &server.role, "may not start replication", remedy);
    }
    Ok(may_replicate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_has_its_own_way() {
        let own = Service::of(None);
        assert_eq!(
            own.set("max_wal_senders", "20", true),
            "alter system set max_wal_senders = 20; -- then restart the server"
        );
        for role in ["rds_superuser", "cloudsqlsuperuser", "azure_pg_admin", "supabase_admin"] {
            let service = Service::of(Some(role));
            assert_ne!(service, Service::Own);
            for name in ["wal_level", "max_wal_senders", "max_slot_wal_keep_size"] {
                let remedy = service.set(name, "20", name != "max_slot_wal_keep_size");
                assert!(!remedy.contains("alter system"), "{role}: {remedy}");
            }
        }
        assert_eq!(Service::AmazonRds.grant_replication("a b"), r#"grant rds_replication to "a b";"#);
        assert_eq!(Service::Azure.grant_replication("a"), r#"alter role "a" replication;"#);
    }
}
