use tokio_postgres::Client;

use super::{Fate, Partition};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::{CopyConnection, CopyOut, READING, quote_literal};

/// A session that reads rows as the snapshot of another one has them.
///
/// Each copy is a transaction of its own, which holds the lock on what it reads until it is ended.
pub(crate) struct Copier {
    connection: CopyConnection,
    begin: String,
    slot: String,
    is_in_transaction: bool,
}

impl Copier {
    /// Opens a session that reads as `client` does, whose transaction must be `repeatable read` and outside of savepoints. It can
    /// read as long as that transaction lasts.
    ///
    /// # Errors
    ///
    /// The server can't be reached, or has no session left.
    pub(crate) async fn open(config: &Config, client: &Client) -> Result<Self> {
        let failed = || Error::sql("exporting a snapshot");
        let row = client.query_one("select pg_export_snapshot()", &[]).await.map_err(failed())?;
        let snapshot: String = row.try_get(0).map_err(failed())?;
        let mut connection = CopyConnection::open(&config.source, config.row_bytes_max()).await?;
        connection.query(READING).await?;
        let slot = config.slot.clone();
        Ok(Self { connection, begin: begin_with(&snapshot), slot, is_in_transaction: false })
    }

    /// Starts a copy; `context` names it in errors.
    pub(super) async fn copy_out(&mut self, statement: &str, context: String) -> Result<CopyOut<'_>> {
        self.rollback().await?;
        self.is_in_transaction = true;
        if let Err(error) = self.connection.query(&self.begin).await {
            return Err(not_taken_over(&self.slot, error));
        }
        self.connection.copy_out(statement, context).await
    }

    /// Ends a copy that was read to its end, and says whether what it read is what the snapshot saw.
    ///
    /// # Errors
    ///
    /// The session was lost.
    pub(crate) async fn end(&mut self, partition: &Partition) -> Result<Fate> {
        let fate = self.fate(partition).await?;
        self.rollback().await?;
        Ok(fate)
    }

    /// Ends a copy that was refused, and says what the partition is now.
    ///
    /// # Errors
    ///
    /// The session was lost, or the copy was left before its end.
    pub(crate) async fn end_refused(&mut self, partition: &Partition) -> Result<Fate> {
        self.rollback().await?;
        self.fate(partition).await
    }

    async fn fate(&mut self, partition: &Partition) -> Result<Fate> {
        let rows = self.connection.query(&partition.fate_query()).await?;
        let row = rows.first().map(Vec::as_slice);
        let Some([file, named]) = row else {
            return Err(Error::Internal(format!("no answer about {}", partition.name)));
        };
        Ok(partition.fate_told(file.as_deref(), named.as_deref()))
    }

    async fn rollback(&mut self) -> Result<()> {
        if self.is_in_transaction {
            self.connection.query("rollback").await?;
            self.is_in_transaction = false;
        }
        Ok(())
    }
}

/// Begins a transaction with an exported snapshot.
pub(super) fn begin_with(snapshot: &str) -> String {
    let snapshot = quote_literal(snapshot);
    format!("begin isolation level repeatable read read only; set transaction snapshot {snapshot}")
}

/// The session that exported it is gone, or two sessions reach different servers.
pub(super) fn not_taken_over(slot: &str, error: Error) -> Error {
    let detail = format!("its snapshot can't be taken over: {}", error.chain());
    Error::Slot { slot: slot.to_owned(), detail, transient: true }
}
