//! Those who answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use highwater::Archive;
use highwater::archive::Storage;
use highwater::config::ObjectStorageSettings;
use highwater::reader::{BinnedQuery, FeatureBinProportions};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;

use crate::answer::Answer;
use crate::layout::Layout;
use crate::store::{Counted, Distant};

/// One who answers binned queries.
#[async_trait]
pub(crate) trait Contender {
    fn name(&self) -> &'static str;

    /// Starts anew, knowing nothing; seconds.
    async fn open(&mut self, query: &BinnedQuery) -> f64;

    /// Answers once; seconds.
    async fn run(&mut self, query: &BinnedQuery) -> f64;

    /// What it answered last.
    async fn answer(&mut self, query: &BinnedQuery) -> Answer;

    /// Forgets everything.
    async fn close(&mut self);

    /// Requests and bytes so far, if they are counted.
    fn counted(&self) -> Option<(u64, u64)>;
}

/// What answering took: seconds, and what was asked of the store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) cold: f64,
    pub(crate) warm: f64,
    pub(crate) counted: Option<CountedCost>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CountedCost {
    pub(crate) cold_requests: u64,
    pub(crate) cold_bytes: u64,
    pub(crate) warm_requests: u64,
}

/// A query from nothing, and once more.
pub(crate) async fn cost(contender: &mut dyn Contender, query: &BinnedQuery) -> Cost {
    let before = contender.counted();
    let cold = contender.open(query).await + contender.run(query).await;
    let between = contender.counted();
    let warm = contender.run(query).await;
    let after = contender.counted();
    contender.close().await;
    let counted = before.zip(between).zip(after).map(|((before, between), after)| CountedCost {
        cold_requests: between.0 - before.0,
        cold_bytes: between.1 - before.1,
        warm_requests: after.0 - between.0,
    });
    Cost { cold, warm, counted }
}

/// Where the files are: on the disk, or as if they were far away.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    delay: Option<Duration>,
}

impl Place {
    pub(crate) const fn disk() -> Self {
        Self { delay: None }
    }

    pub(crate) const fn behind(delay: Duration) -> Self {
        Self { delay: Some(delay) }
    }

    /// The file system, as it is read from here, and what is counted.
    pub(crate) fn store(&self) -> (Arc<dyn ObjectStore>, Option<Arc<Counted>>) {
        let disk = LocalFileSystem::new();
        let Some(delay) = self.delay else { return (Arc::new(disk), None) };
        let counted = Arc::new(Counted::default());
        (Arc::new(Distant::new(disk, delay, Arc::clone(&counted))), Some(counted))
    }
}

/// Our archive.
pub(crate) struct Highwater {
    settings: ObjectStorageSettings,
    distant: Option<(Storage, Arc<Counted>)>,
    archive: Option<Archive>,
    found: Vec<FeatureBinProportions>,
}

impl Highwater {
    pub(crate) fn new(layout: &Layout, place: &Place) -> Self {
        let folder = layout.archive.to_str().expect("UTF-8");
        let settings = ObjectStorageSettings::new(folder, "").expect("settings");
        let url = format!("file://{folder}/");
        let (store, counted) = place.store();
        let distant = counted.map(|counted| (Storage::from_store(store, &url).expect("storage"), counted));
        Self { settings, distant, archive: None, found: Vec::new() }
    }
}

#[async_trait]
impl Contender for Highwater {
    fn name(&self) -> &'static str {
        "highwater"
    }

    async fn open(&mut self, _query: &BinnedQuery) -> f64 {
        let start = Instant::now();
        let archive = match &self.distant {
            None => Archive::open(&self.settings).await,
            Some((storage, _)) => Archive::open_in(storage.clone()).await,
        };
        self.archive = Some(archive.expect("an archive"));
        start.elapsed().as_secs_f64()
    }

    async fn run(&mut self, query: &BinnedQuery) -> f64 {
        let start = Instant::now();
        self.found = self.archive.as_ref().expect("open").binned_psi(query).await.expect("an answer");
        start.elapsed().as_secs_f64()
    }

    async fn answer(&mut self, _query: &BinnedQuery) -> Answer {
        Answer::of(&self.found)
    }

    async fn close(&mut self) {
        self.archive = None;
    }

    fn counted(&self) -> Option<(u64, u64)> {
        self.distant.as_ref().map(|(_, counted)| counted.now())
    }
}
