use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::ObjectStoreExt as _;
use object_store::path::Path;
use prometheus_client::registry::Registry;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};

use super::Look;
use super::coverage::{self, PartitionCover};
use super::metrics::Looks;
use super::probe::Probe;
use crate::archive::Storage;
use crate::config::{Config, ObjectStorageSettings};
use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::vitals::{Counters, Phase, Process, Vitals, now, watched};
use crate::watermark::{self, EntityWatermark, State};

/// How often Postgres is looked at if nobody asks.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// How often without an archiver: when somebody asks.
const FOREVER: Duration = Duration::from_hours(24 * 365);

/// How long the look at all partitions may take.
const COVERAGE_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is asked what there is to purge.
const PURGE_INTERVAL: Duration = Duration::from_secs(60);

/// How often the storage is asked if nobody wants to know.
const PROBE_INTERVAL: Duration = Duration::from_mins(5);

/// How often the runtime has to show that it runs our tasks, and how old that may be for `/livez`.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);
const BEAT_AGE_MAX: i64 = 60_000_000;

/// Samples of the last hours: six at one in ten seconds.
const SAMPLES_MAX: usize = 6 * 360;

/// The archive may be so many times as old as `max_lag` before we are not ready.
const LAG_FACTOR: f64 = 3.0;

/// One of the conditions for being ready.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Check {
    /// Its name, one word.
    pub(crate) name: &'static str,
    /// Whether it holds.
    pub(crate) is_good: bool,
    /// What was found.
    pub(crate) detail: String,
}

impl Check {
    fn new(name: &'static str, is_good: bool, detail: impl Into<String>) -> Self {
        Self { name, is_good, detail: detail.into() }
    }
}

/// How old and how large the part is that is not archived, at one moment.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Sample {
    /// Seconds since the epoch.
    at: i64,
    lag_seconds: Option<f64>,
    lag_bytes: Option<u64>,
    retained_wal_bytes: Option<i64>,
}

/// Watches an archiver, its server and its storage, for as long as its tasks run.
#[derive(Debug)]
pub(crate) struct Observer {
    pub(crate) config: Config,
    pub(crate) vitals: Vitals,
    looks: Probe<Look>,
    storage: StorageProbe,
    samples: Mutex<VecDeque<Sample>>,
    /// Whether there is an archiver; else the archive is only read.
    archives: bool,
}

impl Observer {
    /// Of an archiver.
    pub(crate) fn new(config: Config, vitals: Vitals) -> Self {
        let storage = StorageProbe::new(&config, &vitals);
        Self { config, vitals, looks: Probe::default(), storage, samples: Mutex::default(), archives: true }
    }

    /// Of a process that only reads. It need not have a database, so that is only looked at when somebody asks.
    pub(crate) fn of_reader(config: Config) -> Self {
        Self { archives: false, ..Self::new(config, Vitals::default()) }
    }

    /// Whether there is an archiver.
    pub(crate) const fn archives(&self) -> bool {
        self.archives
    }

    /// Watches until it is dropped.
    pub(crate) async fn watch(&self) {
        tokio::join!(self.beat(), self.look_again(), self.storage.keep());
    }

    async fn beat(&self) {
        loop {
            self.vitals.beat();
            sleep(BEAT_INTERVAL).await;
        }
    }

    async fn look_again(&self) {
        let mut session = Session::new(self.config.source.clone());
        let mut last: Option<Arc<Look>> = None;
        let mut purge_at = Instant::now();
        let mut sample_at = Instant::now();
        loop {
            let known = last.as_deref().filter(|_| Instant::now() < purge_at);
            let has_looked = known.is_none();
            let taken = Look::take(&mut session, &self.config.slot, known).await;
            if let Ok(look) = &taken {
                if last.is_none() {
                    self.look_back(look);
                }
                self.vitals.lag.looked(look.end, look.server_now.timestamp_micros());
                if has_looked {
                    purge_at = Instant::now() + PURGE_INTERVAL;
                }
            }
            if sample_at <= Instant::now() {
                sample_at = Instant::now() + LOOK_INTERVAL.mul_f64(0.9);
                self.sample(taken.as_ref().ok());
            }
            let result = taken.map(Arc::new).map_err(|error| error.chain());
            last = result.as_ref().ok().map(Arc::clone).or(last);
            self.looks.answered(result, if self.archives { LOOK_INTERVAL } else { FOREVER }).await;
        }
    }

    /// What was committed before we began is as old as the last watermark at most.
    fn look_back(&self, look: &Look) {
        let behind = look.rows_of(&self.config.slot).filter(|row| row.flushed_lsn < look.end);
        if let Some(then) = behind.map(|row| row.updated_at.timestamp_micros()).min() {
            self.vitals.lag.archived_until(look.end, then);
        }
    }

    fn sample(&self, look: Option<&Look>) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() >= SAMPLES_MAX {
            samples.pop_front();
        }
        let slot = look.and_then(|look| look.slot.as_ref());
        samples.push_back(Sample {
            at: now() / 1_000_000,
            lag_seconds: self.vitals.lag.seconds(),
            lag_bytes: self.vitals.lag.bytes().map(|(archived, _)| archived),
            retained_wal_bytes: slot.and_then(|slot| slot.retained_wal_bytes),
        });
    }

    /// The samples of the last hours, the oldest first.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// A look that is new; or why there is none.
    pub(crate) async fn look(&self) -> Result<Arc<Look>, String> {
        self.looks.fresh().await
    }

    /// The newest look, however old; `None` if there was none yet, or the newest one has failed.
    pub(crate) fn last_look(&self) -> Option<Arc<Look>> {
        self.looks.last()?.result.ok()
    }

    /// The entities of all tables, in a session of its own: there may be many.
    pub(crate) async fn entities(&self) -> Result<Vec<EntityWatermark>> {
        Session::new(self.config.source.clone()).run(watermark::read_entities).await
    }

    /// Which partitions Postgres has, and what is known of each; or why that is not known.
    pub(crate) async fn coverage(&self) -> Result<Vec<PartitionCover>, String> {
        let mut session = Session::new(self.config.source.clone());
        let read = session.run(async |client| coverage::read(client, &self.config.slot).await);
        match timeout(COVERAGE_PATIENCE, read).await {
            Ok(read) => read.map_err(|error| error.chain()),
            Err(_) => Err("the database does not answer".to_owned()),
        }
    }

    /// Has the registry tell what was found, too.
    pub(crate) fn register(self: &Arc<Self>, registry: &mut Registry) {
        if self.archives {
            self.vitals.register(registry);
        } else {
            self.vitals.counters.register_storage(registry);
        }
        registry.register_collector(Box::new(Looks(Arc::clone(self))));
    }

    /// Whether our tasks are run.
    pub(crate) fn is_alive(&self) -> bool {
        self.vitals.beat_age() < BEAT_AGE_MAX
    }

    /// Whether the archive is as it should be, as far as it is known without asking anybody.
    pub(crate) fn seems_ready(&self) -> bool {
        if !self.archives {
            return true;
        }
        let looked = self.looks.last().map_or_else(|| Err(String::new()), |answer| answer.result);
        self.checks(&looked).iter().all(|check| check.is_good)
    }

    /// Whether it is, and what was found; within a second.
    pub(crate) async fn readiness(&self) -> Vec<Check> {
        if !self.archives {
            return vec![self.storage.check().await];
        }
        let (looked, storage) = tokio::join!(self.look(), self.storage.check());
        let mut checks = self.checks(&looked);
        checks.push(storage);
        checks
    }

    fn checks(&self, looked: &Result<Arc<Look>, String>) -> Vec<Check> {
        let slot = &self.config.slot;
        let mut checks = vec![match self.vitals.phase() {
            Phase::Streaming => Check::new("stream", true, format!("archiving from slot {slot}")),
            Phase::Opening => Check::new("stream", false, "a session is being prepared"),
            Phase::Failed => Check::new("stream", false, "the last session has failed; the log says why"),
        }];
        match looked {
            Ok(look) => {
                checks.push(Check::new("database", true, "it answers"));
                checks.push(self.check_slot(look));
                checks.push(self.check_tables(look));
            }
            Err(why) => checks.push(Check::new("database", false, why.as_str())),
        }
        let bound = self.config.max_lag.as_secs_f64() * LAG_FACTOR;
        checks.push(match self.vitals.lag.seconds() {
            Some(lag) => {
                Check::new("lag", lag <= bound, format!("{lag:.1} s, where {bound:.1} s are allowed"))
            }
            None => Check::new("lag", false, "not known before the database has answered"),
        });
        checks
    }

    fn check_slot(&self, look: &Look) -> Check {
        let name = &self.config.slot;
        match &look.slot {
            None => Check::new("slot", false, format!("slot {name} is missing")),
            Some(slot) if slot.wal_status == "lost" => {
                Check::new("slot", false, format!("slot {name} is lost"))
            }
            Some(slot) if slot.active_pid.is_none() => {
                Check::new("slot", false, format!("nobody streams from slot {name}"))
            }
            Some(slot) => Check::new("slot", true, format!("held, {}", slot.wal_status)),
        }
    }

    fn check_tables(&self, look: &Look) -> Check {
        let rows = look.rows_of(&self.config.slot);
        let others = rows.filter(|row| row.state != State::Streaming);
        let others: Vec<String> =
            others.map(|row| format!("{} is in state {}", row.source_table, row.state.name())).collect();
        match (look.rows_of(&self.config.slot).count(), others.is_empty()) {
            (0, _) => Check::new("tables", false, "no table is archived by this slot"),
            (count, true) => Check::new("tables", true, format!("{count} streaming")),
            (_, false) => Check::new("tables", false, others.join(", ")),
        }
    }
}

/// Asks the storage for an object, again and again.
#[derive(Debug)]
pub(crate) struct StorageProbe {
    settings: ObjectStorageSettings,
    counters: Counters,
    /// Opened when it is first asked: a folder is made by the first session.
    storage: OnceCell<Storage>,
    answers: Probe<()>,
}

impl StorageProbe {
    pub(crate) fn new(config: &Config, vitals: &Vitals) -> Self {
        Self {
            settings: config.storage.clone(),
            counters: vitals.counters.clone(),
            storage: OnceCell::new(),
            answers: Probe::default(),
        }
    }

    /// Asks until it is dropped.
    pub(crate) async fn keep(&self) {
        loop {
            let result = self.ask().await.map(Arc::new);
            self.answers.answered(result, PROBE_INTERVAL).await;
        }
    }

    async fn ask(&self) -> Result<(), String> {
        let open = async || {
            let storage = Storage::open_existing(&self.settings).map_err(|error| error.chain())?;
            Ok::<_, String>(storage.through(|store| watched(store, &self.counters)))
        };
        let storage = self.storage.get_or_try_init(open).await?;
        // That there is none is an answer.
        let store = storage.store();
        match store.head(&Path::from("quarantine/_delta_log/_last_checkpoint")).await {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(Error::storage(format!("asking {}", storage.url()))(error).chain()),
        }
    }

    /// Whether it answers; within a second.
    pub(crate) async fn check(&self) -> Check {
        match self.answers.fresh().await {
            Ok(_) => Check::new("storage", true, "it answers"),
            Err(why) => Check::new("storage", false, why),
        }
    }
}

/// Has the registry tell what every process of ours tells.
pub(crate) fn register_process(registry: &mut Registry) {
    registry.register_collector(Box::new(Process));
}
