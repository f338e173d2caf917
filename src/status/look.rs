use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::purge::{self, Summary};
use crate::source::slot::{self, Slot};
use crate::watermark::{self, Watermark};

/// What Postgres says of the archive at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    /// The server's time.
    pub(crate) server_now: DateTime<Utc>,
    /// Where the server's log ends.
    pub(crate) end: Lsn,
    pub(crate) slot: Option<Slot>,
    /// What the server may still write before it gives the slot up, and that as a share of all that a slot may hold; `None` where a
    /// slot may hold any amount (`max_slot_wal_keep_size = -1`).
    pub(crate) safe: Option<(i64, f64)>,
    /// What decoding has sent to the server's disk since its statistics were reset.
    pub(crate) spilled_bytes: Option<i64>,
    /// The watermark rows of all slots.
    pub(crate) watermarks: Vec<Watermark>,
    /// What there is to purge, by table.
    pub(crate) purges: Arc<Vec<(String, Summary)>>,
    /// Rows that were purged so far, by table.
    pub(crate) purged: Arc<Vec<(String, i64)>>,
}

impl Look {
    /// Looks. What there is to purge is looked for only if nobody has lately: it takes the server a look at every partition.
    pub(crate) async fn take(session: &mut Session, slot_name: &str, last: Option<&Self>) -> Result<Self> {
        let watermarks = session.run(watermark::read).await?;
        let slot = slot::find(session, slot_name).await?;
        let (purges, purged) = match last {
            Some(last) => (Arc::clone(&last.purges), Arc::clone(&last.purged)),
            None => {
                let purges = session.run(purge::summaries).await?;
                (Arc::new(purges), Arc::new(session.run(purge::purged_rows).await?))
            }
        };
        let Server { server_now, end, safe, spilled_bytes } =
            session.run(async |client| Server::read(client, slot_name).await).await?;
        Ok(Self { server_now, end, slot, safe, spilled_bytes, watermarks, purges, purged })
    }

    /// The rows of this slot.
    pub(crate) fn rows_of<'a>(&'a self, slot_name: &'a str) -> impl Iterator<Item = &'a Watermark> {
        self.watermarks.iter().filter(move |row| row.slot_name == slot_name)
    }
}

struct Server {
    server_now: DateTime<Utc>,
    end: Lsn,
    safe: Option<(i64, f64)>,
    spilled_bytes: Option<i64>,
}

impl Server {
    /// See `pg_replication_slots` and `pg_stat_replication_slots` in the manual (sections 54.19 and 28.2.5).
    async fn read(client: &Client, slot_name: &str) -> Result<Self> {
        let query = "select clock_timestamp(),
                            case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                            (select safe_wal_size from pg_replication_slots where slot_name = $1),
                            (select setting::bigint * 1048576 from pg_settings where name = 'max_slot_wal_keep_size'),
                            (select spill_bytes from pg_stat_replication_slots where slot_name = $1)";
        let failed = || Error::sql("asking the server where its log ends");
        let row = client.query_one(query, &[&slot_name]).await.map_err(failed())?;
        let end: PgLsn = row.try_get(1).map_err(failed())?;
        let safe: Option<i64> = row.try_get(2).map_err(failed())?;
        let kept: Option<i64> = row.try_get(3).map_err(failed())?;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let safe = safe.zip(kept.filter(|kept| *kept > 0)).map(|(safe, kept)| {
            let safe = safe.max(0);
            (safe, (safe as f64 / kept as f64).min(1.0))
        });
        Ok(Self {
            server_now: row.try_get(0).map_err(failed())?,
            end: Lsn(end.into()),
            safe,
            spilled_bytes: row.try_get(4).map_err(failed())?,
        })
    }
}
