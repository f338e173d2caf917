//! The flags of the settings, which are the same for every subcommand.

use std::path::PathBuf;

use clap::Args;

use crate::config::{RawSettings, Setting};

/// One optional flag per [`Setting`], and the settings file.
#[derive(Args, Default)]
#[command(next_help_heading = "Settings")]
pub(super) struct SettingFlags {
    /// Settings file; it must exist [default: highwater.toml, if there is one]
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) config: Option<PathBuf>,

    /// Source database, a libpq URL; other users see a password given here, so prefer the variable
    /// or a password file [env: DATABASE_URI and PG*] [default:
    /// postgresql://postgres:postgres@localhost:5432/postgres]
    #[arg(long, global = true, value_name = "URL")]
    database_uri: Option<String>,

    /// Where the archive is kept: s3://, gs://, az:// or a path [env: SCOUTER_STORAGE_URI] [default:
    /// ./scouter-storage]
    #[arg(long, global = true, value_name = "URI")]
    storage_uri: Option<String>,

    /// Region of the bucket [env: AWS_REGION, AWS_DEFAULT_REGION, or of AWS_PROFILE] [default: us-east-1]
    #[arg(long, global = true)]
    region: Option<String>,

    /// Who may read what is made in a local folder: owner (modes 0700 and 0600), or umask, as that of
    /// the process says [env: HIGHWATER_LOCAL_ACCESS] [default: owner]
    #[arg(long, global = true, value_name = "WHO")]
    local_access: Option<String>,

    /// Days that Postgres keeps a row; setup writes them to highwater.retention, by which the purge
    /// goes [env: DATA_RETENTION_PERIOD] [default: 60]
    #[arg(long, global = true, value_name = "DAYS")]
    retention_days: Option<String>,

    /// Span of created_at that shares a file: whole minutes that divide a day [env: HIGHWATER_WINDOW]
    /// [default: 1h]
    #[arg(long, global = true, value_name = "DURATION")]
    window: Option<String>,

    /// How far the archive may be behind, 100ms to 1d [env: HIGHWATER_MAX_LAG] [default: 60s]
    #[arg(long, global = true, value_name = "DURATION")]
    max_lag: Option<String>,

    /// Memory for rows that are not archived yet, 16MiB or more [env: HIGHWATER_MEMORY] [default:
    /// 256MiB]
    #[arg(long, global = true, value_name = "BYTES")]
    memory: Option<String>,

    /// Schema of the drift tables; those that exist are archived [env: HIGHWATER_SCHEMA] [default:
    /// scouter]
    #[arg(long, global = true, value_name = "NAME")]
    schema: Option<String>,

    /// Replication slot [env: HIGHWATER_SLOT] [default: highwater]
    #[arg(long, global = true, value_name = "NAME")]
    slot: Option<String>,

    /// Publication [env: HIGHWATER_PUBLICATION] [default: highwater]
    #[arg(long, global = true, value_name = "NAME")]
    publication: Option<String>,

    /// Most rows per second that the copy of earlier rows reads [env:
    /// HIGHWATER_BACKFILL_ROWS_PER_SECOND] [default: unlimited]
    #[arg(long, global = true, value_name = "ROWS")]
    backfill_rows_per_second: Option<String>,

    /// Hours of the day, UTC, in which the sidecar reads partitions that near their retention back
    /// from the archive: 22-6, all, or none [env: HIGHWATER_VERIFY_HOURS] [default: all]
    #[arg(long, global = true, value_name = "HOURS")]
    verify_hours: Option<String>,

    /// How old the sidecar's last look at the archive's logs may be for a purge, 1m to 365d [env:
    /// HIGHWATER_PURGE_TRUST] [default: 1d]
    #[arg(long, global = true, value_name = "DURATION")]
    purge_trust: Option<String>,

    /// Whether the slot is kept on standbys, too, which a server can from PostgreSQL 17 on: true or false [env:
    /// HIGHWATER_FAILOVER] [default: true]
    #[arg(long, global = true, value_name = "BOOL")]
    failover: Option<String>,

    /// Where run and serve answer health checks, scrapes, queries and the page: an address and a port, or off [env:
    /// HIGHWATER_HTTP] [default: 127.0.0.1:9808]
    #[arg(long, global = true, value_name = "ADDRESS")]
    http: Option<String>,

    /// What they ask for, by bearer or basic auth; an address that other machines reach needs one, or `none`. Other users
    /// see a token given here, so prefer the variable [env: HIGHWATER_HTTP_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN")]
    http_token: Option<String>,

    /// Whether they answer queries in SQL: on or off [env: HIGHWATER_HTTP_SQL] [default: off]
    #[arg(long, global = true, value_name = "ON")]
    http_sql: Option<String>,
}

impl SettingFlags {
    /// The flags that were typed.
    pub(super) fn raw(&self) -> RawSettings {
        let mut raw = RawSettings::default();
        for setting in Setting::ALL {
            raw.set(setting, self.text(setting).clone());
        }
        raw
    }

    const fn text(&self, setting: Setting) -> &Option<String> {
        match setting {
            Setting::DatabaseUri => &self.database_uri,
            Setting::StorageUri => &self.storage_uri,
            Setting::Region => &self.region,
            Setting::LocalAccess => &self.local_access,
            Setting::RetentionDays => &self.retention_days,
            Setting::Window => &self.window,
            Setting::MaxLag => &self.max_lag,
            Setting::Memory => &self.memory,
            Setting::Schema => &self.schema,
            Setting::Slot => &self.slot,
            Setting::Publication => &self.publication,
            Setting::BackfillRowsPerSecond => &self.backfill_rows_per_second,
            Setting::VerifyHours => &self.verify_hours,
            Setting::PurgeTrust => &self.purge_trust,
            Setting::Failover => &self.failover,
            Setting::Http => &self.http,
            Setting::HttpToken => &self.http_token,
            Setting::HttpSql => &self.http_sql,
        }
    }
}
