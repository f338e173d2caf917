//! Rows into uploaded files, and how long a storage that fails is tried.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use rand::RngExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::archive::{self, DataFile, EncodedFile, Multiset, Namer, Storage};
use crate::batch::Batches;
use crate::config::Config;
use crate::decode::sort_of_reason;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::tables::{Kind, Window};
use crate::vitals::{OfReason, Vitals};

/// Uploads of one checkpoint under way at once: enough to hide a round trip, few enough for any store.
const UPLOADS_MAX: usize = 4;

/// Encoded files that wait for an upload. Each is a few per cent of the memory that its rows take.
const ENCODED_MAX: usize = 2;

/// First and longest pause between attempts at storage that fails.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));

/// How long a copy out of Postgres tries a storage that fails. It holds locks meanwhile, on which pg_partman may wait, and on
/// that every writer; better it begins again.
pub(crate) const COPY_PATIENCE: Duration = Duration::from_secs(15);

/// Counts the rows that the archive can't hold.
pub(crate) fn count_quarantined(config: &Config, vitals: &Vitals, batches: &Batches) {
    for row in batches.quarantined() {
        let is_its =
            |kind: &Kind| kind.source_table(&config.schema).is_some_and(|name| name == row.source_table);
        let table = config.all_kinds().into_iter().find(is_its).map_or("unknown", Kind::name).to_owned();
        let of = OfReason { table, reason: sort_of_reason(&row.reason) };
        vitals.counters.quarantined_rows.get_or_create(&of).inc();
    }
}

/// Encodes the rows and uploads their files; with `present`, only the rows that are not among these. Storage that fails
/// is tried for ever, or with patience for so long.
///
/// # Errors
///
/// The rows can't be encoded, or storage failed for too long.
pub(crate) async fn write_files(
    storage: &Storage,
    namer: &Namer,
    batches: Box<Batches>,
    lsn: Lsn,
    present: Option<Arc<Mutex<Multiset>>>,
    patience: Option<Duration>,
) -> Result<Vec<(Kind, DataFile)>> {
    if batches.is_empty() {
        return Ok(Vec::new());
    }
    let (sender, encoded) = mpsc::channel(ENCODED_MAX);
    let encoder = tokio::task::spawn_blocking(move || encode_files(&batches, present.as_deref(), &sender));
    let encoded = stream::unfold(encoded, |mut encoded| async {
        let file = encoded.recv().await?;
        Some((file, encoded))
    });
    let uploads =
        encoded.map(|(kind, window, file)| upload(storage, namer, kind, window, lsn, file, patience));
    let files = uploads.buffer_unordered(UPLOADS_MAX).try_collect().await?;
    encoder.await.map_err(|error| Error::Internal(format!("the encoder failed: {error}")))??;
    Ok(files)
}

async fn upload(
    storage: &Storage,
    namer: &Namer,
    kind: Kind,
    window: Window,
    lsn: Lsn,
    file: EncodedFile,
    patience: Option<Duration>,
) -> Result<(Kind, DataFile)> {
    failpoint::hit("after-encode");
    let what = format!("uploading {} rows of {}", file.stats.row_count, kind.name());
    let mut retry = StorageRetry::new(&what).patient_for(patience);
    loop {
        // A new name for each attempt: one that failed may still arrive.
        match archive::upload(storage, kind, namer.name(window, lsn), file.clone()).await {
            Ok(uploaded) => return Ok((kind, uploaded)),
            Err(error) => retry.wait(error).await?,
        }
    }
}

fn encode_files(
    batches: &Batches,
    present: Option<&Mutex<Multiset>>,
    sender: &mpsc::Sender<(Kind, Window, EncodedFile)>,
) -> Result<()> {
    for rows in batches.files() {
        let kind = rows.kind();
        let (mut failure, mut left_out) = (None, 0);
        // Built one by one as the encoder wants them, so that only one sorted copy exists at a time.
        let record_batches = rows.record_batches().map_while(|batch| {
            let missing = batch.and_then(|batch| match present {
                // A quarantined row was compared before it got here.
                Some(present) if !kind.is_quarantine() => {
                    let missing = present.lock().unwrap_or_else(PoisonError::into_inner).missing(&batch)?;
                    left_out += (batch.num_rows() - missing.num_rows()) as u64;
                    Ok(missing)
                }
                _ => Ok(batch),
            });
            missing.map_err(|error| failure = Some(error)).ok()
        });
        let file = archive::encode(kind, record_batches)?;
        if let Some(error) = failure {
            return Err(error);
        }
        let encoded = file.as_ref().map_or(0, |file| file.stats.row_count);
        if encoded + left_out != rows.row_count() {
            let detail =
                format!("{} rows of {} became {encoded} and {left_out}", rows.row_count(), kind.name());
            return Err(Error::Internal(detail));
        }
        let Some(file) = file else { continue };
        // Nobody receives any more: the checkpoint has failed and said why.
        if sender.blocking_send((kind, rows.window(), file)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The pauses between attempts at something that storage does not take.
pub(crate) struct StorageRetry<'a> {
    what: &'a str,
    pause: Duration,
    /// When it is given up.
    end: Option<Instant>,
}

impl<'a> StorageRetry<'a> {
    /// `what` is tried, for the log.
    pub(crate) const fn new(what: &'a str) -> Self {
        Self { what, pause: RETRY_PAUSE.0, end: None }
    }

    /// The same for whoever holds something that others wait for: it gives up after a while.
    pub(crate) fn patient_for(mut self, patience: Option<Duration>) -> Self {
        self.end = patience.map(|patience| Instant::now() + patience);
        self
    }

    /// Logs the error and waits, longer every time, with jitter so that many sidecars don't come back at once.
    ///
    /// # Errors
    ///
    /// The error, if it is not a failure of storage that may pass by itself, or has lasted for too long.
    pub(crate) async fn wait(&mut self, error: Error) -> Result<()> {
        let passes = matches!(&error, Error::Storage { .. } if error.is_transient());
        if !passes && !matches!(error, Error::Io { .. }) {
            return Err(error);
        }
        if self.end.is_some_and(|end| Instant::now() > end) {
            return Err(error);
        }
        tracing::warn!(
            error = error.chain(),
            retry_in = ?self.pause,
            "{} failed; rows wait, the stream stays connected",
            self.what
        );
        let jitter = rand::rng().random_range(0.5..1.0);
        sleep(self.pause.mul_f64(jitter)).await;
        self.pause = (self.pause * 2).min(RETRY_PAUSE.1);
        Ok(())
    }
}
