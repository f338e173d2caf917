//! The proof that a place keeps two writers apart, and the record of it.
//!
//! That nothing is doubled rests on one property of the store: of several requests to create an object, one
//! succeeds. Where a store lacks it, a process that was paused overwrites its successor's log entry. So no
//! table is claimed before the property was seen, once for each place.

use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use futures::future::join_all;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::storage::Storage;
use super::synced::remove_leftovers;
use crate::error::{Policy, Verdict};
use crate::{Error, Result};

/// The object that says that the proof was made. Engines that are shown the whole folder leave such a name alone.
const RECORD: &str = "_highwater.json";

/// How names of test objects begin.
const PROBE: &str = "_highwater-probe-";

/// What a killed process may have left behind: test objects, also of earlier versions, and half of a record.
const LEFTOVERS: [&str; 3] = [PROBE, "highwater-probe-", "_highwater.json#"];

/// Requests that want to create the same object at the same time. A store that looks first and then writes lets
/// more than one of them succeed.
const CONTENDERS: usize = 4;

/// How often they try, each time another object.
const ROUNDS: usize = 2;

/// How long a proof may take. A healthy store takes a second; a person may wait in front of it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long removing the test object may take.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A test object of this age is nobody's any more. More than a proof takes, with room for clocks that differ.
const LEFTOVER_AGE: Duration = Duration::from_mins(2);

impl Storage {
    /// Proves that the place keeps writers apart, unless that is on record for this very place.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`], to be retried or not as its policy says.
    pub async fn prove_once(&self) -> Result<()> {
        let prove = async || {
            if !self.is_on_record().await? {
                self.probe().await?;
                self.put_on_record().await?;
            }
            Ok(())
        };
        self.proved().get_or_try_init(prove).await.map(drop)
    }

    /// Writes, reads and deletes small objects, and makes sure that of several requests to create an object one
    /// succeeds: without that two writers could commit the same version of a table. Leaves nothing behind, and removes what an
    /// earlier probe did.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] with the step that failed.
    pub async fn probe(&self) -> Result<()> {
        let started = Instant::now();
        self.remove_old_probes().await?;
        for _ in 0..ROUNDS {
            let path = Path::from(format!("{PROBE}{:016x}", rand::random::<u64>()));
            let left = PROBE_TIMEOUT.saturating_sub(started.elapsed());
            let mut tried = timeout(left, self.contend(&path)).await.unwrap_or_else(|_| Err(self.late()));
            // Whoever slept meanwhile may have lost its object to the next probe.
            if started.elapsed() >= PROBE_TIMEOUT && tried.is_ok() {
                tried = Err(self.late());
            }
            let removed = timeout(REMOVE_TIMEOUT, self.store().delete(&path)).await;
            let winners = tried?;
            match removed {
                Ok(Ok(()) | Err(object_store::Error::NotFound { .. })) => {}
                Ok(Err(error)) => return Err(self.failed("deleting", &path)(error)),
                Err(_) => return Err(self.late()),
            }
            if winners > 1 {
                return Err(self.refuse(winners).await);
            }
        }
        Ok(())
    }

    /// How many requests to create the object have succeeded, be it by overwriting.
    async fn contend(&self, path: &Path) -> Result<usize> {
        let store = self.store();
        let create =
            async |text: String| match store.put_opts(path, text.into(), PutMode::Create.into()).await {
                Ok(_) => Ok(true),
                Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
                Err(error) => Err(self.failed("creating", path)(error)),
            };
        let read = async || {
            let read = async { store.get(path).await?.bytes().await };
            read.await.map_err(self.failed("reading", path))
        };
        let texts = || (0..CONTENDERS).map(|contender| format!("highwater {contender}"));
        let created = join_all(texts().map(&create)).await.into_iter().collect::<Result<Vec<_>>>()?;
        let first: Bytes = read().await?;
        if !texts().any(|text| first == text.as_bytes()) {
            return Err(Error::Internal(format!("{path} reads other than it was written")));
        }
        let late = create("highwater late".to_owned()).await?;
        let overwritten = read().await? != first;
        // None: the answer to the one that has landed was lost, and its repetition refused.
        let winners = created.into_iter().filter(|created| *created).count().max(1);
        Ok(winners + usize::from(late || overwritten))
    }

    async fn is_on_record(&self) -> Result<bool> {
        let path = Path::from(RECORD);
        let read = async { self.store().get(&path).await?.bytes().await };
        match read.await {
            Ok(bytes) => {
                let record: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                Ok(record.get("place").and_then(Value::as_str) == Some(self.place()))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("reading", &path)(error)),
        }
    }

    async fn put_on_record(&self) -> Result<()> {
        let path = Path::from(RECORD);
        let record = json!({
            "what": "Highwater has seen that this place keeps two writers apart; a copy elsewhere is asked anew",
            "place": self.place(),
            "provedAt": Utc::now(),
            "by": concat!("highwater/", env!("CARGO_PKG_VERSION")),
        });
        let put = self.store().put(&path, record.to_string().into()).await;
        put.map(drop).map_err(self.failed("writing", &path))
    }

    /// The error of a place that does not keep writers apart. What is on record otherwise, is void.
    async fn refuse(&self, winners: usize) -> Error {
        let _ = timeout(REMOVE_TIMEOUT, self.store().delete(&Path::from(RECORD))).await;
        let detail = format!(
            "of several requests to create the same object one must succeed, and {winners} did: the store ignores \
             `If-None-Match: *`, so that a second writer would overwrite what the first has committed, and rows would be lost or \
             doubled"
        );
        let advice = "take a store that honours `If-None-Match` (Amazon S3, Google, Azure, Cloudflare R2, current MinIO) or \
                      a folder; where a proxy or gateway is in between, connect to the store itself";
        let source = Verdict { detail, policy: Policy::Stop { advice } };
        let source = object_store::Error::NotSupported { source: Box::new(source) };
        Error::storage(format!("{} can't hold an archive", self.url()))(source)
    }

    async fn remove_old_probes(&self) -> Result<()> {
        let is_old = |age: Option<Duration>| age.is_some_and(|age| age > LEFTOVER_AGE);
        let is_leftover = |name: &str| LEFTOVERS.iter().any(|start| name.starts_with(start));
        if let Some(folder) = self.folder() {
            let removed =
                tokio::task::spawn_blocking(move || remove_leftovers(&folder, &is_leftover, &is_old));
            return removed
                .await
                .map_err(|error| Error::Internal(error.to_string()))?
                .map_err(Error::io(format!("removing earlier test objects in {}", self.url())));
        }
        let failed = || self.failed("looking for", &Path::from(format!("{PROBE}*")));
        let listed = timeout(PROBE_TIMEOUT, self.store().list_with_delimiter(None)).await;
        for object in listed.map_err(|_| self.late())?.map_err(failed())?.objects {
            let age = Utc::now().signed_duration_since(object.last_modified).to_std().ok();
            if is_leftover(object.location.as_ref()) && is_old(age) {
                match self.store().delete(&object.location).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(self.failed("deleting", &object.location)(error)),
                }
            }
        }
        Ok(())
    }

    fn failed(&self, step: &str, path: &Path) -> impl FnOnce(object_store::Error) -> Error + use<> {
        Error::storage(format!("{step} the object {}{path}", self.url()))
    }

    fn late(&self) -> Error {
        let source = object_store::Error::Generic {
            store: "highwater",
            source: format!("no answer within {} s", PROBE_TIMEOUT.as_secs()).into(),
        };
        Error::storage(format!("proving that {} keeps two writers apart", self.url()))(source)
    }
}
