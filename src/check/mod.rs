//! The preflight: what must be true of the server, the tables and the storage before Highwater can
//! archive them, each with the exact statement that mends it.
//!
//! Only reads catalogs that any role may read, and writes nothing but the storage's probe. A check
//! that can't be made is itself a finding; the others go on.

mod database;
mod partman;
mod publication;
mod purge;
mod report;
mod server;
mod slot;
mod tables;

use std::future::Future;
use std::time::Duration;

use tokio_postgres::Client;

pub use report::{Finding, Report, Severity};

use crate::archive::{self, Storage, View};
use crate::config::{Config, ObjectStorageSettings, SourceConfig, Target};
use crate::error::{Error, Policy, Result};
use crate::postgres::{ReplicationConnection, is_standby, quote_literal as literal, sql};
use crate::source::Source;
use crate::source::unarchived::UnfitColumn;
use crate::tables::Kind;
use crate::watermark::{self, Watermark};

/// The oldest server whose publications can have what ours needs.
const SERVER_VERSION_MIN: i32 = 150_000;

/// How long connecting, one group of catalog queries, or the storage's probe may take. A person waits
/// in front of it; a healthy one takes milliseconds.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks everything that `config` names. Never fails: whatever goes wrong is in the report.
pub async fn check(config: &Config) -> Report {
    look(config, Probing::Writes).await
}

/// The same without the storage's probe, so that nothing at all is written.
pub async fn check_by_reading(config: &Config) -> Report {
    look(config, Probing::Reads).await
}

/// Whether the storage is probed by an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probing {
    Writes,
    Reads,
}

async fn look(config: &Config, probing: Probing) -> Report {
    let mut report = Report::default();
    match within("connecting", connect(&config.source)).await {
        Ok(client) => {
            check_database(&client, config, &mut report).await;
            check_storage(&config.storage, probing, &mut report).await;
            let checked =
                within("looking for the archive", check_archive(&client, config, &mut report)).await;
            if let Err(error) = checked {
                report.failure("archive", &config.storage.storage_uri, &error);
            }
        }
        Err(error) => {
            report.failure("connection", config.source.to_string(), &error);
            check_storage(&config.storage, probing, &mut report).await;
        }
    }
    report
}

/// As everybody connects; and to a standby where there is no primary, which is then a finding of its own.
async fn connect(source: &SourceConfig) -> Result<Client> {
    let client = match sql::connect(source).await {
        Err(error) if is_standby(&error) => {
            sql::connect(&SourceConfig { target: Target::Any, ..source.clone() }).await?
        }
        result => result?,
    };
    sql::see_own_rows(&client).await?;
    Ok(client)
}

/// The stream takes a login of its own, which a pooler may refuse; and it must reach the server that the watermarks speak of.
async fn check_walsender(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let mut connection =
        match within("logging in for replication", ReplicationConnection::connect(&config.source)).await {
            Ok(connection) => connection,
            Err(error) => {
                if !is_standby(&error) {
                    report.failure("replication-login", config.source.to_string(), &error);
                }
                return Ok(());
            }
        };
    report.ok("replication-login", config.source.to_string(), "is accepted");
    if !can_read_watermarks(client).await? {
        return Ok(());
    }
    let failed = || Error::sql("comparing the server with the watermarks");
    let identity = crate::source::slot::identify(&mut connection).await?;
    let others = "select source_table, system_identifier from highwater.watermark
                  where slot_name = $1 and system_identifier <> $2 order by 1 limit 1";
    let slot = config.slot.as_str();
    match client.query_opt(others, &[&slot, &identity.system_identifier]).await.map_err(failed())? {
        None => report.ok("system", "server", format!("is system {}", identity.system_identifier)),
        Some(row) => {
            let (table, other): (String, String) =
                (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
            let message = format!(
                "is system {}, but {table} is archived from system {other}: upgraded, restored or copied, or the wrong one; `run` \
                 refuses it",
                identity.system_identifier
            );
            let remedy = "if it has taken the place of the other for good, start once with `highwater run --accept-new-system`";
            report.error("system", "server", message, remedy);
        }
    }
    Ok(())
}

async fn check_database(client: &Client, config: &Config, report: &mut Report) {
    let server =
        match within("reading the server's settings", server::Server::read(client, &config.slot)).await {
            Ok(server) => server,
            Err(error) => return report.failure("connection", config.source.to_string(), &error),
        };
    server.report(config, report);
    if server.version < SERVER_VERSION_MIN {
        return;
    }
    let steps = "reading the catalogs";
    let may_replicate = match within(steps, server::check_role(client, &server, report)).await {
        Ok(may_replicate) => may_replicate,
        Err(error) => {
            report.failure("role", &server.role, &error);
            false
        }
    };
    // Otherwise the login says the same again.
    if may_replicate && let Err(error) = within(steps, check_walsender(client, config, report)).await {
        report.failure("system", "server", &error);
    }
    if let Err(error) = within(steps, database::check(client, config, &server, report)).await {
        report.failure("state-schema", "highwater", &error);
    }
    if let Err(error) = within(steps, slot::check(client, config, &server, report)).await {
        report.failure("slot", &config.slot, &error);
    }
    let found = match within(steps, tables::check(client, config, &server, report)).await {
        Ok(found) => found,
        Err(error) => return report.failure("tables", &config.schema, &error),
    };
    if let Err(error) = within(steps, publication::check(client, config, &found, report)).await {
        report.failure("publication", &config.publication, &error);
    }
    if let Err(error) = within(steps, partman::check(client, config, &server, &found, report)).await {
        report.failure("partman", &config.schema, &error);
    }
    if let Err(error) = within(steps, purge::check(client, config, report)).await {
        report.failure("purge", "highwater", &error);
    }
}

/// Whether there are watermarks that this role may read.
async fn can_read_watermarks(client: &Client) -> Result<bool> {
    let query = "
        select exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                        where n.nspname = 'highwater' and c.relname = 'watermark'
                          and has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select'))";
    let row = client.query_one(query, &[]).await;
    row.and_then(|row| row.try_get(0)).map_err(Error::sql("looking for the watermarks"))
}

async fn check_storage(settings: &ObjectStorageSettings, probing: Probing, report: &mut Report) {
    if probing == Probing::Reads {
        return;
    }
    let probe = async { Storage::open(settings)?.probe().await };
    match within("probing the storage", probe).await {
        Ok(()) => report.ok("storage", &settings.storage_uri, "can be written"),
        Err(error) => report.failure("storage", &settings.storage_uri, &error),
    }
}

/// Whether the storage is the one that the watermarks speak of, and its tables can hold what the source's have.
async fn check_archive(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    if !can_read_watermarks(client).await? {
        return Ok(());
    }
    let rows = match watermark::read(client).await {
        // A schema of an older version, which is a finding of its own.
        Err(error) if error.is_undefined_column() => return Ok(()),
        rows => rows?,
    };
    let rows: Vec<_> = rows.iter().filter(|row| row.slot_name == config.slot && row.row_count > 0).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let storage = Storage::open_existing(&config.storage)?;
    let mut is_there = true;
    for row in rows {
        let kind = match Kind::of_name(&row.kind) {
            Some(kind) => Some(kind),
            None => archive::described(&storage, &row.kind).await?,
        };
        let view = View::read(&storage, kind.unwrap_or_else(|| Kind::named(&row.kind))).await?;
        if let Some(source) = Source::find(client, row).await? {
            for UnfitColumn { column, problem, remedy } in source.unfit_columns(view.kind()) {
                let column = format!("{}.{column}", row.source_table);
                report.error(
                    "column",
                    column,
                    format!("{problem}, so that no row of the table is purged"),
                    remedy,
                );
            }
        }
        is_there &= holds_rows(&view, row, config, report);
    }
    if is_there {
        report.ok("archive", &config.storage.storage_uri, "has the rows that the watermarks speak of");
    }
    Ok(())
}

/// Whether a table of the archive has as many rows as its watermark says.
fn holds_rows(view: &View, row: &Watermark, config: &Config, report: &mut Report) -> bool {
    // A foreign writer need not have said how many rows its files hold.
    let Some(held) = view.files().map(|file| file.row_count).sum::<Option<u64>>() else { return true };
    if u64::try_from(row.row_count).is_ok_and(|count| count <= held) {
        return true;
    }
    report.error(
        "archive",
        &config.storage.storage_uri,
        format!(
            "has {held} rows in its table {}, though {} rows of {} are archived: `highwater run` refuses it",
            row.kind, row.row_count, row.source_table
        ),
        "set SCOUTER_STORAGE_URI to where the archive is, or mount that",
    );
    false
}

async fn within<T>(what: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(STEP_TIMEOUT, step).await {
        Ok(result) => result,
        Err(_) => {
            let late = std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!("no answer within {} s", STEP_TIMEOUT.as_secs()),
            );
            Err(Error::io(what)(late))
        }
    }
}

impl Report {
    /// A check that could not be made, or a thing that refuses to work.
    fn failure(&mut self, id: &'static str, object: impl Into<String>, error: &Error) {
        let remedy = match error.policy() {
            Policy::Stop { advice: "run `highwater check`: it names the missing grants" } => {
                "grant what the message names"
            }
            Policy::Stop { advice } => advice,
            Policy::Retry => "see the reason; if it is passing, run the check again",
        };
        self.error(id, object, error.chain(), remedy);
    }
}

/// An identifier for a remedy, always quoted: right for every name.
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A quoted schema and name.
fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}

/// Bytes for people, in binary units.
fn human_bytes(bytes: i64) -> String {
    let (mut scaled, mut unit) = (bytes, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if scaled < 10 * 1024 {
            break;
        }
        scaled /= 1024;
        unit = larger;
    }
    format!("{scaled} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_remedies_are_quoted() {
        assert_eq!(qualified("a b", "c\"d"), "\"a b\".\"c\"\"d\"");
        assert_eq!(literal("it's"), "'it''s'");
    }

    #[test]
    fn bytes_are_readable() {
        for (bytes, text) in [(0, "0 B"), (20 << 10, "20 KiB"), (9 << 30, "9216 MiB"), (64 << 30, "64 GiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
