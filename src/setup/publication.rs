//! The publication, which only the owner of the tables can make and change.

use tokio_postgres::Client;

use super::owner::Ownership;
use super::{LOCK_TIMEOUT, Report, SourceTable, find_tables, holds_rows, new_watermark, qualified};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::quote_identifier;
use crate::source::coverage;
use crate::source::identity::RowIdentity;
use crate::source::slot::Identity;
use crate::tables::Kind;
use crate::watermark::{self, State};

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

/// One of our publications.
struct Publication {
    name: String,
    /// Whether it sends updates and deletes, too.
    has_changes: bool,
}

impl Publication {
    /// The one that sends inserts, and, if versions of a table's rows are kept, the one that sends all changes.
    fn all(config: &Config) -> Vec<Self> {
        let inserts = Self { name: config.publication.clone(), has_changes: false };
        let changes = Self { name: config.versions_publication(), has_changes: true };
        if config.keeps_versions() { vec![inserts, changes] } else { vec![inserts] }
    }

    /// Whether a table is to be in it. Entity tables are read by what is inserted.
    fn is_for(&self, table: &SourceTable) -> bool {
        table.kind.is_some_and(Kind::keeps_versions) == self.has_changes
    }

    fn quoted(&self) -> String {
        quote_identifier(&self.name)
    }

    const fn publishes(&self) -> &'static str {
        if self.has_changes { "insert, update, delete" } else { "insert" }
    }

    /// The statement that makes it. A child by inheritance is not archived (`unarchived`), so it is not published; partitions are all
    /// the same. Inserts only where that will do: with updates in it, every `update` of a table without a primary key would fail. No
    /// column list: it would keep the tables' owner from dropping a column.
    fn creation(&self, tables: &[SourceTable]) -> String {
        let names: Vec<String> = tables.iter().filter(|table| self.is_for(table)).map(qualified).collect();
        let tables = if names.is_empty() {
            String::new()
        } else {
            format!(" for table only {}", names.join(", only "))
        };
        format!(
            "create publication {}{tables} with (publish = '{}', publish_via_partition_root = true)",
            self.quoted(),
            self.publishes()
        )
    }

    /// The statement that has it send what it is to send, and nothing else.
    fn correction(&self) -> String {
        format!(
            "alter publication {} set (publish = '{}', publish_via_partition_root = true)",
            self.quoted(),
            self.publishes()
        )
    }

    /// Whether it sends that through partition roots, and nothing else.
    async fn is_right(&self, client: &Client) -> Result<bool> {
        let query = "select from pg_publication where pubname = $1 and pubinsert and pubviaroot
                     and pubupdate = $2 and pubdelete = $2 and not pubtruncate";
        let found = client.query_opt(query, &[&self.name, &self.has_changes]).await;
        found.map(|row| row.is_some()).map_err(Error::sql("reading the publication"))
    }

    /// What it costs the source of a table that this one sends its changes.
    async fn tell_cost(&self, client: &Client, table: &SourceTable, report: &mut Report) -> Result<()> {
        if self.has_changes {
            let name = table.full_name();
            report.left.push(RowIdentity::read(client, &name).await?.cost(&name));
        }
        Ok(())
    }
}

/// Makes the publications, or mends them. See [`mend`] for `fed`.
///
/// # Errors
///
/// The session's role is not the owner, and something is to be done; or the server refused a step.
pub(super) async fn publish(
    client: &mut Client,
    config: &Config,
    tables: &[SourceTable],
    ownership: &Ownership,
    fed: Option<(&Identity, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    for publication in Publication::all(config) {
        if has_publication(client, &publication.name).await? {
            mend(client, config, &publication, ownership, fed, report).await?;
        } else {
            if fed.is_some() {
                mark_unpublished(client, config, report).await?;
            }
            make(client, &publication, tables, ownership, report).await?;
        }
    }
    Ok(())
}

async fn make(
    client: &Client,
    publication: &Publication,
    tables: &[SourceTable],
    ownership: &Ownership,
    report: &mut Report,
) -> Result<()> {
    let Publication { name, .. } = publication;
    if !ownership.is_owner() {
        return Err(ownership.refusal(&format!("making publication {name}")));
    }
    let context = format!("making publication {name}");
    client.batch_execute(&publication.creation(tables)).await.map_err(Error::sql(&context))?;
    if ownership.user != ownership.owner {
        let (name, owner) = (publication.quoted(), quote_identifier(&ownership.owner));
        // Where he may not have it (without the right to create in the database), it stays with who made it.
        if let Err(error) = client.batch_execute(&format!("alter publication {name} owner to {owner}")).await
        {
            tracing::debug!(error = Error::sql(context)(error).chain(), "the publication stays as it is");
        }
    }
    let mut names = Vec::new();
    for table in tables.iter().filter(|table| publication.is_for(table)) {
        names.push(qualified(table));
        publication.tell_cost(client, table, report).await?;
    }
    let names = if names.is_empty() { "no table yet".to_owned() } else { names.join(", ") };
    report.done.push(format!("made publication {name} for {names}"));
    Ok(())
}

/// The same as statements. What a table that is added holds, the sidecar finds out.
pub(super) async fn script(client: &Client, config: &Config, tables: &[SourceTable]) -> Result<String> {
    let mut script = String::new();
    for publication in Publication::all(config) {
        if !has_publication(client, &publication.name).await? {
            script.push_str(&format!("{};\n", publication.creation(tables)));
            continue;
        }
        if !publication.is_right(client).await? {
            script.push_str(&format!("{};\n", publication.correction()));
        }
        let lacks = |table: &&SourceTable| publication.is_for(table) && !table.is_in(&publication.name);
        for table in tables.iter().filter(lacks) {
            let name = publication.quoted();
            script.push_str(&format!("alter publication {name} add table only {};\n", qualified(table)));
        }
    }
    Ok(script)
}

/// A publication that did not send what it should has let rows pass; the running sidecar sees that by itself.
async fn mark_unpublished(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    for found in watermark::mark_unpublished(client, &config.slot, &config.publication).await? {
        let table = found.source_table;
        report
            .done
            .push(format!("marked a gap in {table}: its publication did not send what was written to it"));
    }
    Ok(())
}

/// Mends a publication that is there. Where a slot already reads it (`fed`: the system, and the slot's
/// position), a table is added together with its watermark row: under the lock nobody can write a row that
/// neither the publication nor the look into the table would see.
async fn mend(
    client: &mut Client,
    config: &Config,
    publication: &Publication,
    ownership: &Ownership,
    fed: Option<(&Identity, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    let is_right = publication.is_right(client).await?;
    let tables = find_tables(client, config).await?;
    let lacks = |table: &&SourceTable| publication.is_for(table) && !table.is_in(&publication.name);
    let lacking: Vec<&SourceTable> = tables.iter().filter(lacks).collect();
    if !ownership.is_owner() && (!is_right || !lacking.is_empty()) {
        return Err(ownership.refusal(&format!("changing publication {}", publication.name)));
    }
    if !is_right {
        if fed.is_some() {
            mark_unpublished(client, config, report).await?;
        }
        client
            .batch_execute(&publication.correction())
            .await
            .map_err(Error::sql("altering the publication"))?;
        report.done.push(format!(
            "set publication {} to send {} through partition roots, and nothing else",
            publication.name,
            publication.publishes()
        ));
    }
    for table in &lacking {
        add(client, config, publication, table, fed, report).await?;
    }
    if lacking.is_empty() && is_right {
        report.left.push(format!("publication {}", publication.name));
    }
    Ok(())
}

/// Adds a table to a publication; see [`mend`].
async fn add(
    client: &mut Client,
    config: &Config,
    publication: &Publication,
    table: &SourceTable,
    fed: Option<(&Identity, Lsn)>,
    report: &mut Report,
) -> Result<()> {
    publication.tell_cost(client, table, report).await?;
    let (name, qualified) = (publication.quoted(), qualified(table));
    let context = format!("adding {qualified} to publication {}", publication.name);
    let transaction = client.transaction().await.map_err(Error::sql(&context))?;
    let statement = format!(
        "set local lock_timeout = '{LOCK_TIMEOUT}'; lock table {qualified} in share row exclusive mode;
         alter publication {name} add table only {qualified}"
    );
    transaction.batch_execute(&statement).await.map_err(Error::sql(&context))?;
    if let (Some(_), Some((identity, start))) = (table.kind, fed) {
        let row = transaction.query_one(&holds_rows(table), &[]).await;
        let holds_rows: bool = row.and_then(|row| row.try_get(0)).map_err(Error::sql(&context))?;
        let state = if holds_rows { State::Snapshot } else { State::Streaming };
        // A table that was archived before has been out of the publication for a while.
        let source = table.full_name();
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
    report.done.push(format!("added {qualified} to publication {}", publication.name));
    Ok(())
}
