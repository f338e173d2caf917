//! [`Setting`]: the names of every setting, in the file, the environment and on the command line.

use crate::error::Error;

/// A setting of Highwater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Setting {
    /// The source database.
    DatabaseUri,
    /// Where the archive is kept.
    StorageUri,
    /// Region of the archive's bucket.
    Region,
    /// Who may read what is made in a local folder.
    LocalAccess,
    /// Days that Postgres keeps a row.
    RetentionDays,
    /// Length of a window.
    Window,
    /// Bound on the staleness of the archive.
    MaxLag,
    /// Bytes for batches.
    Memory,
    /// Schema of the drift tables.
    Schema,
    /// The replication slot.
    Slot,
    /// The publication.
    Publication,
    /// Bound on the speed of the first copy.
    BackfillRowsPerSecond,
    /// Hours of the day in which the sidecar verifies by itself.
    VerifyHours,
    /// How old the last look at the archive's logs may be for a purge.
    PurgeTrust,
    /// Whether the slot is kept on standbys, too.
    Failover,
    /// Address of the HTTP server.
    Http,
    /// What the HTTP server asks for.
    HttpToken,
    /// Whether the HTTP server answers queries in SQL.
    HttpSql,
}

impl Setting {
    /// Every setting, in the order of the documentation.
    pub const ALL: [Self; 18] = [
        Self::DatabaseUri,
        Self::StorageUri,
        Self::Region,
        Self::LocalAccess,
        Self::RetentionDays,
        Self::Window,
        Self::MaxLag,
        Self::Memory,
        Self::Schema,
        Self::Slot,
        Self::Publication,
        Self::BackfillRowsPerSecond,
        Self::VerifyHours,
        Self::PurgeTrust,
        Self::Failover,
        Self::Http,
        Self::HttpToken,
        Self::HttpSql,
    ];

    /// Its key in `highwater.toml`; the flag is the same with dashes.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::DatabaseUri => "database_uri",
            Self::StorageUri => "storage_uri",
            Self::Region => "region",
            Self::LocalAccess => "local_access",
            Self::RetentionDays => "retention_days",
            Self::Window => "window",
            Self::MaxLag => "max_lag",
            Self::Memory => "memory",
            Self::Schema => "schema",
            Self::Slot => "slot",
            Self::Publication => "publication",
            Self::BackfillRowsPerSecond => "backfill_rows_per_second",
            Self::VerifyHours => "verify_hours",
            Self::PurgeTrust => "purge_trust",
            Self::Failover => "failover",
            Self::Http => "http",
            Self::HttpToken => "http_token",
            Self::HttpSql => "http_sql",
        }
    }

    /// Its environment variable.
    #[must_use]
    pub const fn variable(self) -> &'static str {
        match self {
            Self::DatabaseUri => "DATABASE_URI",
            Self::StorageUri => "SCOUTER_STORAGE_URI",
            Self::Region => "AWS_REGION",
            Self::LocalAccess => "HIGHWATER_LOCAL_ACCESS",
            Self::RetentionDays => "DATA_RETENTION_PERIOD",
            Self::Window => "HIGHWATER_WINDOW",
            Self::MaxLag => "HIGHWATER_MAX_LAG",
            Self::Memory => "HIGHWATER_MEMORY",
            Self::Schema => "HIGHWATER_SCHEMA",
            Self::Slot => "HIGHWATER_SLOT",
            Self::Publication => "HIGHWATER_PUBLICATION",
            Self::BackfillRowsPerSecond => "HIGHWATER_BACKFILL_ROWS_PER_SECOND",
            Self::VerifyHours => "HIGHWATER_VERIFY_HOURS",
            Self::PurgeTrust => "HIGHWATER_PURGE_TRUST",
            Self::Failover => "HIGHWATER_FAILOVER",
            Self::Http => "HIGHWATER_HTTP",
            Self::HttpToken => "HIGHWATER_HTTP_TOKEN",
            Self::HttpSql => "HIGHWATER_HTTP_SQL",
        }
    }

    /// The text that is taken when nobody sets it. The source has none here, because what a URL
    /// leaves out comes from the `PG*` variables first; nor has the region, which the AWS tools' own settings may name, nor the token.
    #[must_use]
    pub const fn default_text(self) -> Option<&'static str> {
        match self {
            Self::DatabaseUri | Self::Region | Self::HttpToken => None,
            Self::StorageUri => Some("./scouter-storage"),
            Self::LocalAccess => Some("owner"),
            Self::RetentionDays => Some("60"),
            Self::Window => Some("1h"),
            Self::MaxLag => Some("60s"),
            Self::Memory => Some("256MiB"),
            Self::Schema => Some("scouter"),
            Self::Slot | Self::Publication => Some("highwater"),
            Self::BackfillRowsPerSecond => Some("unlimited"),
            Self::VerifyHours => Some("all"),
            Self::PurgeTrust => Some("1d"),
            Self::Failover => Some("true"),
            Self::Http => Some("127.0.0.1:9808"),
            Self::HttpSql => Some("off"),
        }
    }

    /// Its flag on the command line, with the dashes.
    #[must_use]
    pub fn flag(self) -> String {
        format!("--{}", self.key().replace('_', "-"))
    }

    /// The setting with this key.
    #[must_use]
    pub fn of_key(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.key() == key)
    }
}

/// An [`Error::Setting`].
pub(super) fn setting_error(setting: &str, value: impl Into<String>, accepted: impl Into<String>) -> Error {
    Error::Setting { setting: setting.to_owned(), value: value.into(), accepted: accepted.into() }
}
