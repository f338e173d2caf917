//! [`Point`]: a place in the log, and a session that sees what was committed before it.

use tokio_postgres::Client;

use super::copier::{begin_with, not_taken_over};
use super::{Fate, Partition, holders};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{READING, ReplicationConnection, sql};
use crate::source::slot::{self, Lifetime, SnapshotUse};

/// A transaction whose snapshot holds exactly the transactions whose commit records begin before `lsn`.
#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) client: Client,
    pub(crate) lsn: Lsn,
    /// Every transaction with a smaller id had ended: what it committed is seen.
    pub(crate) xmin: u64,
}

/// A slot that lives as long as its connection.
#[derive(Debug)]
pub(crate) struct TemporarySlot {
    pub(crate) connection: ReplicationConnection,
    pub(crate) name: String,
}

impl Point {
    /// Takes one by making a temporary slot (manual section 55.4). Waits for the transactions that are running.
    ///
    /// Also returns the slot, which stands at the point and is gone with its connection: from there on it has every
    /// transaction that the snapshot lacks.
    ///
    /// # Errors
    ///
    /// No slot is free, or the connection was lost.
    pub(crate) async fn take(config: &Config) -> Result<(Self, TemporarySlot)> {
        let mut replication = ReplicationConnection::connect(&config.source).await?;
        let name: String = config.slot.chars().take(50).collect();
        let name = format!("{name}_{:08x}", rand::random::<u32>());
        let (lsn, snapshot) =
            slot::create(&config.source, &mut replication, &name, Lifetime::Connection, SnapshotUse::Export)
                .await?;
        let snapshot = snapshot.ok_or_else(|| Error::Protocol {
            context: "CREATE_REPLICATION_SLOT".to_owned(),
            detail: "the answer has no snapshot".to_owned(),
        })?;
        let client = sql::connect(&config.source).await?;
        let failed = || Error::sql("taking over a snapshot");
        client.batch_execute(READING).await.map_err(failed())?;
        if let Err(error) = client.batch_execute(&begin_with(&snapshot)).await {
            return Err(not_taken_over(&name, failed()(error)));
        }
        // The import has taken hold, so that the exporter may go.
        let query = "select pg_snapshot_xmin(pg_current_snapshot())::text";
        let row = client.query_one(query, &[]).await.map_err(failed())?;
        let xmin: String = row.try_get(0).map_err(failed())?;
        let xmin = xmin.parse().map_err(|_| Error::Internal(format!("{xmin:?} is not a transaction id")))?;
        Ok((Self { client, lsn, xmin }, TemporarySlot { connection: replication, name }))
    }

    /// The tables that the rows of a drift table are in, whose oid is `root`; without the lock on it that telling them apart may
    /// take ([`super::holders`]), or whoever waits for that would keep the copies waiting.
    pub(crate) async fn holders(&self, source_table: &str, root: u32) -> Result<Vec<Partition>> {
        self.savepoint().await?;
        let found = holders(&self.client, source_table, root).await?;
        self.rollback_to_savepoint().await?;
        Ok(found)
    }

    /// Begins a part of the work whose locks [`Point::rollback_to_savepoint`] gives back.
    pub(crate) async fn savepoint(&self) -> Result<()> {
        self.client.batch_execute("savepoint part").await.map_err(Error::sql("setting a savepoint"))
    }

    /// Ends a part that has read a partition, and says whether what it read is what the snapshot saw.
    pub(crate) async fn end_part(&self, partition: &Partition) -> Result<Fate> {
        let fate = partition.fate(&self.client).await?;
        self.rollback_to_savepoint().await?;
        Ok(fate)
    }

    /// Ends a part, also one that has failed. The snapshot stays.
    pub(crate) async fn rollback_to_savepoint(&self) -> Result<()> {
        let statements = "rollback to savepoint part; release savepoint part";
        self.client.batch_execute(statements).await.map_err(Error::sql("going back to a savepoint"))
    }
}
