//! Settings: first what was typed ([`RawSettings`], [`Layers`]), then, checked once, [`Config`].
//!
//! ```
//! use std::time::Duration;
//!
//! use highwater::config::{Config, ObjectStorageSettings, SourceConfig};
//!
//! let source = SourceConfig::new(Some("postgresql://drift@localhost/drift"), &|_| None)?;
//! let mut config = Config::new(source, ObjectStorageSettings::new("./archive", "us-east-1")?);
//! config.max_lag = Duration::from_secs(5);
//! config.check()?;
//! # Ok::<(), highwater::Error>(())
//! ```

mod conninfo;
mod hours;
mod http;
mod parameters;
mod parse;
mod passfile;
mod raw;
mod setting;
mod source;
mod storage;
mod table;

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

pub use hours::HoursOfDay;
pub use http::{HttpAccess, HttpSettings};
pub use parameters::{
    Address, AuthMethod, ChannelBinding, Endpoint, Keepalive, Password, SslMode, Target, TlsVersion,
};
pub(crate) use raw::edit_distance;
pub use raw::{FILE_NAME, Layers, RawSettings};
pub use setting::Setting;
pub use source::{DEFAULT_URI, SourceConfig};
pub use storage::{LocalAccess, ObjectStorageSettings, StorageType};
pub use table::{Changes, TableSettings};

use crate::error::{Error, Result};
use crate::tables::{Kind, SCOUTER_TABLES, WindowWidth};
use setting::setting_error;

/// What [`Config::max_lag`] may be. Below a tenth of a second there is no time to archive anything; above a
/// day the slot holds WAL that nobody planned for.
pub const MAX_LAG_RANGE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(86_400);

/// What [`Config::purge_trust`] may be. The sidecar looks several times a minute, and says so once a minute.
pub const PURGE_TRUST_RANGE: RangeInclusive<Duration> =
    Duration::from_mins(1)..=Duration::from_hours(365 * 24);

/// The most bytes of a checkpoint, whatever memory there is: an Arrow string column holds 2 GiB, and the row
/// that passes the bound may have 1 GiB.
const BATCH_BYTES_MAX: usize = 512 << 20;

/// The most bytes of a row, whatever memory there is.
const ROW_BYTES_MAX: usize = 16 << 20;

/// The least [`Config::memory_bytes`]: three checkpoints of 5 MiB, less than which no file pays.
pub const MEMORY_BYTES_MIN: usize = 16 << 20;

/// The longest identifier of PostgreSQL, in bytes (`NAMEDATALEN` less one).
pub const IDENTIFIER_BYTES_MAX: usize = 63;

/// What the name of the publication of updates and deletes has behind that of the other.
pub const VERSIONS_SUFFIX: &str = "_versions";

/// Every setting, ready to use. The fields are public for those who embed Highwater; who sets them by
/// hand calls [`Config::check`] afterwards.
#[derive(Clone, Debug)]
pub struct Config {
    /// The database whose drift tables are archived.
    pub source: SourceConfig,
    /// Where the archive is kept.
    pub storage: ObjectStorageSettings,
    /// Days that Postgres keeps a row before retention may delete it; at least 1.
    pub retention_days: u32,
    /// Length of the windows of `created_at` whose rows share files.
    pub window: WindowWidth,
    /// How old an archived table may be at most, in [`MAX_LAG_RANGE`].
    pub max_lag: Duration,
    /// Bytes for batches that are not in the archive yet; at least [`MEMORY_BYTES_MIN`].
    pub memory_bytes: usize,
    /// Schema of the drift tables.
    pub schema: String,
    /// The replication slot: 1 to 63 of `a-z`, `0-9` and `_`.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// Most rows per second that the first copy reads; `None` for as fast as it goes.
    pub backfill_rows_per_second: Option<NonZeroU32>,
    /// When the sidecar verifies partitions that near their retention.
    pub verify_hours: HoursOfDay,
    /// How old the sidecar's last look at the archive's logs may be for a purge, in [`PURGE_TRUST_RANGE`]: somebody else may
    /// have taken rows out of them since.
    pub purge_trust: Duration,
    /// Whether the server is to keep the slot on its standbys, too, which it can from PostgreSQL 17 on; earlier ones can't.
    pub failover: bool,
    /// Where the HTTP server of the binary listens, and whom it answers.
    pub http: HttpSettings,
    /// Tables that are archived beside the drift tables.
    pub tables: Vec<TableSettings>,
    /// What these are, once that is known.
    pub(crate) described: Vec<Kind>,
    /// Whether a server of another history (restored, promoted) takes the place of the one that was archived so far: its
    /// rows are compared with the archive, and what is missing is added. Only for the first start; not a setting.
    pub accept_new_system: bool,
}

impl Config {
    /// The defaults, for this source and archive.
    #[must_use]
    pub fn new(source: SourceConfig, storage: ObjectStorageSettings) -> Self {
        Self {
            source,
            storage,
            retention_days: 60,
            window: WindowWidth::HOUR,
            max_lag: Duration::from_secs(60),
            memory_bytes: 256 << 20,
            schema: "scouter".to_owned(),
            slot: "highwater".to_owned(),
            publication: "highwater".to_owned(),
            backfill_rows_per_second: None,
            verify_hours: HoursOfDay::ALL,
            purge_trust: Duration::from_hours(24),
            failover: true,
            http: HttpSettings::default(),
            tables: Vec::new(),
            described: Vec::new(),
            accept_new_system: false,
        }
    }

    /// From the environment and the defaults alone; no file is read. For servers that embed Highwater.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names the variable that can't be used.
    pub fn from_env() -> Result<Self> {
        let env = environment_variable;
        let layers = Layers { environment: RawSettings::from_environment(&env), ..Layers::default() };
        Self::from_layers(&layers, &env)
    }

    /// From everything that was typed. `env` is asked for the `PG*` variables.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names the first setting that can't be used as its user wrote it.
    pub fn from_layers(layers: &Layers, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let rename = |error, setting| renamed(error, &layers.name(setting), setting.variable());
        let source = SourceConfig::new(layers.typed(Setting::DatabaseUri), env)
            .map_err(|error| rename(error, Setting::DatabaseUri))?;
        let mut storage =
            ObjectStorageSettings::new(layers.text(Setting::StorageUri), layers.text(Setting::Region))
                .map_err(|error| rename(error, Setting::StorageUri))
                .map_err(|error| rename(error, Setting::Region))?;
        storage.local_access = parse::parsed(layers, Setting::LocalAccess, "owner or umask")?;
        let config = Self {
            source,
            storage,
            retention_days: parse::parsed(layers, Setting::RetentionDays, "1 or more whole days")?,
            window: parse::window(layers)?,
            max_lag: parse::duration(layers, Setting::MaxLag, MAX_LAG_ACCEPTED)?,
            memory_bytes: parse::bytes(layers, Setting::Memory, MEMORY_ACCEPTED)?,
            schema: layers.text(Setting::Schema).to_owned(),
            slot: layers.text(Setting::Slot).to_owned(),
            publication: layers.text(Setting::Publication).to_owned(),
            backfill_rows_per_second: parse::rate(layers)?,
            verify_hours: parse::parsed(layers, Setting::VerifyHours, hours::ACCEPTED)?,
            purge_trust: parse::duration(layers, Setting::PurgeTrust, PURGE_TRUST_ACCEPTED)?,
            failover: parse::parsed(layers, Setting::Failover, "true or false")?,
            http: HttpSettings::from_layers(layers)?,
            tables: layers.file.tables.clone(),
            described: Vec::new(),
            accept_new_system: false,
        };
        config.check_as(&|setting| layers.name(setting))?;
        Ok(config)
    }

    /// The tables that are archived, without the quarantine.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let described = self.described.iter().copied();
        let grown = |drift: Kind| described.clone().find(|kind| kind.name() == drift.name()).unwrap_or(drift);
        let drift = Kind::drift().map(grown).into_iter();
        drift.chain(described.clone().filter(|kind| !kind.is_built_in())).collect()
    }

    /// Days that Postgres keeps a row of a table, which is named with its schema.
    pub(crate) fn retention_days_of(&self, source_table: &str) -> u32 {
        let is_it = |table: &&TableSettings| table.qualified(&self.schema) == source_table;
        let own = self.tables.iter().find(is_it).and_then(|table| table.retention_days);
        let name = source_table.strip_prefix(&format!("{}.", self.schema));
        let scouter = SCOUTER_TABLES.iter().find(|table| Some(table.name) == name);
        // Not less than Scouter itself.
        own.unwrap_or_else(|| self.retention_days.max(scouter.map_or(0, |table| table.retention_days)))
    }

    /// The same settings, of whose tables it is known what they are; of those that come with the program, where they have more
    /// columns.
    pub(crate) fn describing(&self, described: Vec<Kind>) -> Self {
        Self { described, ..self.clone() }
    }

    /// The publication of the tables of which each version of a row is archived. Updates need one of their own: a table without a
    /// replica identity could not be updated any more.
    pub(crate) fn versions_publication(&self) -> String {
        format!("{}{VERSIONS_SUFFIX}", self.publication)
    }

    /// Whether there are tables of which each version of a row is archived.
    pub(crate) fn keeps_versions(&self) -> bool {
        self.kinds().into_iter().any(Kind::keeps_versions)
    }

    /// The archived table of that name.
    pub(crate) fn kind(&self, name: &str) -> Option<Kind> {
        self.kinds().into_iter().find(|kind| kind.name() == name)
    }

    /// Every table of the archive, in the order in which they are committed.
    pub(crate) fn all_kinds(&self) -> Vec<Kind> {
        let mut kinds = self.kinds();
        kinds.push(Kind::quarantine());
        kinds.sort_unstable();
        kinds
    }

    /// How many bytes of rows make a checkpoint, or a part of one: one is gathered, one waits, one is written.
    pub(crate) fn batch_bytes_max(&self) -> usize {
        (self.memory_bytes / 3).min(BATCH_BYTES_MAX)
    }

    /// How many bytes of one row are held. Less than the smallest checkpoint, since ten rows may be on their way at once.
    pub(crate) fn row_bytes_max(&self) -> usize {
        (self.memory_bytes / 32).min(ROW_BYTES_MAX)
    }

    /// Checks every field that a type alone can't keep right.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names the first field that is out of range.
    pub fn check(&self) -> Result<()> {
        self.check_as(&|setting| setting.key().to_owned())
    }

    fn check_as(&self, name: &dyn Fn(Setting) -> String) -> Result<()> {
        let ensure = |good: bool, setting: Setting, value: &dyn Fn() -> String, accepted: &str| match good {
            true => Ok(()),
            false => Err(setting_error(&name(setting), value(), accepted)),
        };
        ensure(self.retention_days >= 1, Setting::RetentionDays, &|| "0".to_owned(), "1 or more whole days")?;
        ensure(
            MAX_LAG_RANGE.contains(&self.max_lag),
            Setting::MaxLag,
            &|| humantime::format_duration(self.max_lag).to_string(),
            MAX_LAG_ACCEPTED,
        )?;
        ensure(
            PURGE_TRUST_RANGE.contains(&self.purge_trust),
            Setting::PurgeTrust,
            &|| humantime::format_duration(self.purge_trust).to_string(),
            PURGE_TRUST_ACCEPTED,
        )?;
        ensure(
            self.memory_bytes >= MEMORY_BYTES_MIN,
            Setting::Memory,
            &|| format!("{} bytes", self.memory_bytes),
            MEMORY_ACCEPTED,
        )?;
        ensure(is_slot_name(&self.slot), Setting::Slot, &|| self.slot.clone(), SLOT_ACCEPTED)?;
        for (setting, text) in [(Setting::Schema, &self.schema), (Setting::Publication, &self.publication)] {
            ensure(is_identifier(text), setting, &|| text.clone(), "a name of 1 to 63 bytes")?;
        }
        self.http.check(name)
    }
}

const PURGE_TRUST_ACCEPTED: &str = "a duration from 1m to 365d, such as 6h or 1d";
const MAX_LAG_ACCEPTED: &str = "a duration from 100ms to 1d, such as 60s or 5m";
const MEMORY_ACCEPTED: &str = "16MiB or more: a number of bytes, or one with KiB, MiB, GiB, kB, MB or GB";
const SLOT_ACCEPTED: &str = "1 to 63 of a-z, 0-9 and _";

/// The value of an environment variable; empty counts as unset. What is not UTF-8 keeps its place
/// with replacement characters, so that it is refused by name instead of being ignored.
#[must_use]
pub fn environment_variable(name: &str) -> Option<String> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    Some(value.to_string_lossy().into_owned())
}

fn is_slot_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    is_identifier(text) && text.bytes().all(allowed)
}

fn is_identifier(text: &str) -> bool {
    (1..=IDENTIFIER_BYTES_MAX).contains(&text.len()) && !text.contains('\0')
}

/// The settings' own types name the environment variable; the user may have used a flag or a file.
fn renamed(error: Error, name: &str, variable: &str) -> Error {
    match error {
        Error::Setting { setting, value, accepted } if setting == variable => {
            Error::Setting { setting: name.to_owned(), value, accepted }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_of(setting: Setting, text: &str) -> Result<Config> {
        let mut layers = Layers::default();
        layers.flags.set(setting, Some(text.to_owned()));
        Config::from_layers(&layers, &|_| None)
    }

    #[test]
    fn nothing_typed_gives_the_defaults_of_new() {
        let typed = Config::from_layers(&Layers::default(), &|_| None).unwrap();
        let made = Config::new(typed.source.clone(), typed.storage.clone());
        assert_eq!(format!("{typed:?}"), format!("{made:?}"));
        assert_eq!(typed.storage.storage_uri, "./scouter-storage");
    }

    #[test]
    fn every_error_names_the_flag_the_value_and_what_is_accepted() {
        for (setting, bad) in [
            (Setting::RetentionDays, "0"),
            (Setting::RetentionDays, "-1"),
            (Setting::Window, "7m"),
            (Setting::Window, "90s"),
            (Setting::Window, "2d"),
            (Setting::Window, "soon"),
            (Setting::MaxLag, "60"),
            (Setting::MaxLag, "99ms"),
            (Setting::MaxLag, "25h"),
            (Setting::Memory, "15MiB"),
            (Setting::Memory, "1XB"),
            (Setting::Memory, "99999999999GiB"),
            (Setting::Slot, "High-Water"),
            (Setting::Slot, ""),
            (Setting::Schema, ""),
            (Setting::Publication, &"x".repeat(64)),
            (Setting::BackfillRowsPerSecond, "0"),
            (Setting::Http, "localhost"),
            (Setting::StorageUri, "ftp://x"),
        ] {
            let error = config_of(setting, bad).unwrap_err();
            let Error::Setting { setting: name, accepted, .. } = error else {
                panic!("{setting:?} {bad}: {error}")
            };
            assert_eq!(name, setting.flag());
            assert!(!accepted.is_empty());
        }
    }

    #[test]
    fn good_values_arrive() {
        assert_eq!(config_of(Setting::Window, "15m").unwrap().window.micros(), 900_000_000);
        assert_eq!(config_of(Setting::MaxLag, "1d").unwrap().max_lag, Duration::from_secs(86_400));
        for (text, bytes) in [
            ("256MiB", 256 << 20),
            ("1GiB", 1 << 30),
            ("64MB", 64_000_000),
            ("33554432", 32 << 20),
            ("20000 kB", 20_000_000),
        ] {
            assert_eq!(config_of(Setting::Memory, text).unwrap().memory_bytes, bytes, "{text}");
        }
        let rate = |text| config_of(Setting::BackfillRowsPerSecond, text).unwrap().backfill_rows_per_second;
        assert_eq!((rate("1000"), rate("unlimited")), (NonZeroU32::new(1000), None));
        assert_eq!(config_of(Setting::Http, "[::1]:80").unwrap().http.listen.unwrap().port(), 80);
    }

    #[test]
    fn errors_hide_a_password_that_went_to_the_wrong_setting() {
        let text = config_of(Setting::Window, "postgresql://me:secret@host/db").unwrap_err().to_string();
        assert!(text.contains("me:***@host") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn check_names_a_field_that_was_set_by_hand() {
        let mut config = Config::from_layers(&Layers::default(), &|_| None).unwrap();
        assert!(config.check().is_ok());
        config.slot = "No".to_owned();
        assert_eq!(
            config.check().unwrap_err().to_string(),
            "slot is \"No\", but must be 1 to 63 of a-z, 0-9 and _"
        );
    }
}
