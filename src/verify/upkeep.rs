//! Who brings the archive up to the point: whoever archives; or, where nobody does, a session of our own for as long as the
//! comparison takes.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::{LOOK_INTERVAL, Progress};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::{self, Owned};
use crate::source::slot;
use crate::vitals::{Phase, Vitals};
use crate::watermark::{self, State, Watermark};

/// How long nobody may hold the slot before that is an error: a sidecar that begins anew holds none.
const HOLDER_WAIT: Duration = Duration::from_secs(15);

/// Added to twice the staleness bound: how long the archive of somebody else may take to pass the point.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(60);

/// An archiver of our own, if nobody else archives.
#[derive(Default)]
pub(super) struct Upkeep(Option<Own>);

struct Own {
    task: Owned<Result<()>>,
    shutdown: watch::Sender<()>,
    vitals: Vitals,
}

impl Own {
    fn start(config: &Config) -> Self {
        let (shutdown, stopped) = watch::channel(());
        let vitals = Vitals::default();
        let (config, told) = (config.clone(), vitals.clone());
        let task = tokio::spawn(async move { sidecar::run(config, stopped, &told).await });
        Self { task: Owned(task), shutdown, vitals }
    }

    /// Waits for its end; why that was.
    async fn wait(mut self) -> Result<()> {
        self.task.outcome("the archiver").await
    }
}

impl Upkeep {
    /// Looks whether anybody archives; if not, does so, and waits until every row that the archive lacks was added.
    ///
    /// # Errors
    ///
    /// There is no slot to archive with: a lasting one would keep the server's log when this is over. Or why our own archiver
    /// ended: nobody else can archive either.
    pub(super) async fn begin(
        config: &Config,
        sql: &mut Session,
        chosen: &[Watermark],
        tell: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self> {
        if is_held_soon(config, sql).await? {
            return Ok(Self::default());
        }
        let slot = slot::find(sql, &config.slot).await?;
        if slot.is_none_or(|slot| slot.wal_status == "lost") {
            return Err(Error::Slot {
                slot: config.slot.clone(),
                detail: "nobody archives, and the slot is gone or lost: start `highwater run`, which makes a new one and adds what \
                         the archive lacks"
                    .to_owned(),
                transient: false,
            });
        }
        tracing::info!(
            slot = config.slot,
            "nobody archives: bringing the archive up to date first, and as long as this takes"
        );
        let mut own = Self(Some(Own::start(config)));
        while let Some(Own { vitals, .. }) = &own.0 {
            match vitals.phase() {
                Phase::Streaming => break,
                // Somebody else was quicker.
                Phase::Failed if slot::is_held(sql, &config.slot).await? => {
                    own.end().await;
                    return Ok(Self::default());
                }
                Phase::Opening | Phase::Failed => {}
            }
            own.go_on().await?;
            let rows = sql.run(watermark::read).await?;
            let is_chosen = |row: &&Watermark| chosen.iter().any(|one| one.source_table == row.source_table);
            if let Some(row) = rows.iter().filter(is_chosen).find(|row| row.state != State::Streaming) {
                let step = format!("adding what the archive lacks (state {})", row.state.name());
                tell(Progress { table: row.source_table.clone(), step, done: 0, all: 0, unit: "rows" });
            }
            sleep(LOOK_INTERVAL).await;
        }
        Ok(own)
    }

    /// An error if our own archiver has ended: why.
    async fn go_on(&mut self) -> Result<()> {
        match self.0.take_if(|own| own.task.0.is_finished()) {
            Some(own) => own.wait().await?,
            None => return Ok(()),
        }
        Err(Error::Internal("the archiver of a verification ended early".to_owned()))
    }

    /// Waits until the watermarks of these tables have passed `lsn`.
    ///
    /// # Errors
    ///
    /// Nobody archives (any more), or it takes too long.
    pub(super) async fn wait_until_archived(
        &mut self,
        config: &Config,
        sql: &mut Session,
        chosen: &[Watermark],
        lsn: Lsn,
        tell: &(dyn Fn(Progress) + Sync),
    ) -> Result<()> {
        let begun = Instant::now();
        let mut held = begun;
        let mut first = None;
        loop {
            let rows = sql.run(watermark::read).await?;
            let of = |row: &Watermark| rows.iter().find(|now| now.source_table == row.source_table);
            // The others are not compared.
            let streaming = chosen.iter().filter(|row| row.state == State::Streaming);
            let behind = streaming
                .filter(|row| of(row).is_none_or(|now| now.state == State::Streaming))
                .map(|row| (row, of(row).map_or(Lsn::ZERO, |now| now.flushed_lsn)))
                .filter(|(_, flushed)| *flushed < lsn)
                .min_by_key(|(_, flushed)| *flushed);
            let Some((last, flushed)) = behind else { return Ok(()) };
            let waited = |detail: &str| Error::Slot {
                slot: config.slot.clone(),
                detail: format!(
                    "the archive has not reached {lsn}, where Postgres was when this began: {detail}"
                ),
                transient: true,
            };
            self.go_on().await?;
            if self.0.is_some() {
                let first = *first.get_or_insert(flushed);
                tell(Progress {
                    table: last.source_table.clone(),
                    step: "archiving what was written meanwhile".to_owned(),
                    done: flushed.bytes_since(first),
                    all: lsn.bytes_since(first),
                    unit: "bytes",
                });
            } else if slot::is_held(sql, &config.slot).await? {
                held = Instant::now();
            } else if held.elapsed() > HOLDER_WAIT {
                return Err(waited(
                    "nobody archives; start `highwater run`, which has to go on while this compares",
                ));
            }
            if self.0.is_none() && begun.elapsed() > config.max_lag * 2 + CHECKPOINT_WAIT {
                let busy = rows.iter().find(|row| row.state != State::Streaming);
                let detail = busy.map_or("the sidecar is behind; see its log".to_owned(), |row| {
                    format!(
                        "the sidecar adds the rows of {} first (state {})",
                        row.source_table,
                        row.state.name()
                    )
                });
                return Err(waited(&detail));
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Ends our own archiver, if there is one.
    pub(super) async fn end(self) {
        let Some(own) = self.0 else { return };
        own.shutdown.send_replace(());
        if let Err(error) = own.wait().await {
            tracing::warn!(
                error = error.chain(),
                "what came meanwhile is not archived yet; it waits in Postgres"
            );
        }
    }
}

/// Whether somebody holds the slot, now or soon: one that begins anew holds none for a moment.
async fn is_held_soon(config: &Config, sql: &mut Session) -> Result<bool> {
    let begun = Instant::now();
    while !slot::is_held(sql, &config.slot).await? {
        if begun.elapsed() >= HOLDER_WAIT {
            return Ok(false);
        }
        sleep(LOOK_INTERVAL).await;
    }
    Ok(true)
}
