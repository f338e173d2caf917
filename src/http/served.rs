//! What all requests share.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{self, Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::stream;
use prometheus_client::registry::Registry;
use tokio::sync::{Mutex, OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_postgres::Client;

use super::compute::Compute;
use super::kept::Kept;
use super::problem::Problem;
use super::report::LastReport;
use super::requests::Requests;
use super::tag::Tag;
use crate::apart;
use crate::archive::{self, Storage};
use crate::archiver::Archiver;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::reader::{Archive, EntitySummary};
use crate::sidecar::Owned;
use crate::status::{self, Observer};
use crate::tables::Kind;
use crate::vitals::{Counters, watched};
use crate::watermark::EntityWatermark;

/// Queries that run at a time; they share one pool of memory.
const QUERIES_MAX: usize = 8;

/// How long a query waits for its turn before it is refused.
const TURN_PATIENCE: Duration = Duration::from_secs(2);

/// The most bytes of an answer to a query: as many of them are in memory as queries may run.
pub(super) const ANSWER_BYTES_MAX: usize = 16 << 20;

/// What of it is handed on at a time.
const PIECE_BYTES: usize = 64 << 10;

/// How long the database may take for a short question.
const DATABASE_PATIENCE: Duration = Duration::from_secs(5);

/// How long the database may take to list the entities.
const ENTITIES_PATIENCE: Duration = Duration::from_secs(5);

/// How old the archive's version may be that a query reads.
const VERSION_AGE_MAX: Duration = Duration::from_secs(2);

/// The version of each table.
type Versions = Vec<(&'static str, Option<u64>)>;

/// What all requests share.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) config: Config,
    pub(super) observer: Arc<Observer>,
    pub(super) registry: Registry,
    pub(super) requests: Requests,
    /// Whether `/api/sql` is answered, for which this has to be the program itself.
    pub(super) answers_sql: bool,
    history: Arc<History>,
    /// The entities of these versions.
    entities: Mutex<(Versions, Arc<Vec<EntitySummary>>)>,
    pub(super) report: LastReport,
    pub(super) compute: Compute,
    pub(super) kept: Kept,
    turns: Arc<Semaphore>,
    /// For short questions.
    session: Mutex<Session>,
    /// Watches in place of an archiver.
    _watching: Option<Owned<()>>,
}

impl Served {
    pub(super) fn by_archiver(archiver: &Archiver) -> Self {
        Self::new(Arc::clone(archiver.observer()), None)
    }

    /// The same for the program itself, which can run its queries in SQL in a process of their own.
    pub(super) fn of_program(self) -> Self {
        if self.config.http.sql {
            apart::sweep_temporary();
        }
        Self { answers_sql: self.config.http.sql, ..self }
    }

    pub(super) fn by_reader(config: &Config) -> Self {
        let observer = Arc::new(Observer::of_reader(config.clone()));
        let watched = Arc::clone(&observer);
        let watching = Owned(tokio::spawn(async move { watched.watch().await }));
        Self::new(observer, Some(watching))
    }

    fn new(observer: Arc<Observer>, watching: Option<Owned<()>>) -> Self {
        let mut registry = Registry::default();
        status::register_process(&mut registry);
        let ours = registry.sub_registry_with_prefix("highwater");
        observer.register(ours);
        let requests = Requests::default();
        requests.register(ours);
        let session = Session::new(observer.config.source.clone());
        let history = History {
            config: observer.config.clone(),
            counters: observer.vitals.counters.clone(),
            archive: OnceCell::new(),
            refreshed: Mutex::default(),
        };
        Self {
            config: observer.config.clone(),
            observer,
            registry,
            requests,
            answers_sql: false,
            history: Arc::new(history),
            entities: Mutex::default(),
            report: LastReport::default(),
            compute: Compute::default(),
            kept: Kept::default(),
            turns: Arc::new(Semaphore::new(QUERIES_MAX)),
            session: Mutex::new(session),
            _watching: watching,
        }
    }

    /// The archive, seconds old at most; `None` while nothing is archived.
    pub(super) async fn archive(&self) -> Result<Option<Archive>> {
        let history = Arc::clone(&self.history);
        // The Delta library's tasks don't bear to be given up, and whoever asks may go away.
        let opened = tokio::spawn(async move { history.archive().await }).await;
        opened.unwrap_or_else(|error| Err(Error::Internal(format!("opening the archive failed: {error}"))))
    }

    /// The entities of all tables. The database has them in a table; without one they are read from the archive's files, once for each
    /// version of it.
    pub(super) async fn entities(&self) -> Result<Arc<Vec<EntitySummary>>> {
        let Some(archive) = self.archive().await? else { return Ok(Arc::default()) };
        let kinds = archive.kinds();
        if self.observer.archives()
            && let Ok(Ok(rows)) = timeout(ENTITIES_PATIENCE, self.observer.entities()).await
        {
            return Ok(Arc::new(summaries(&rows, &kinds, &self.config.schema)));
        }
        let mut known = self.entities.lock().await;
        let versions = archive.versions();
        if known.0 != versions {
            let mut all = Vec::new();
            for kind in kinds.into_iter().filter(|kind| kind.entity().is_some()) {
                all.extend(archive.entities(kind).await?);
            }
            *known = (versions, Arc::new(all));
        }
        Ok(Arc::clone(&known.1))
    }

    /// Asks the database, whose schema of drift tables is the second argument.
    pub(super) async fn database<T>(
        &self,
        work: impl AsyncFnOnce(&Client, &str) -> Result<T>,
    ) -> Result<T, Problem> {
        let asked = async {
            let mut session = self.session.lock().await;
            session.run(async |client| work(client, &self.config.schema).await).await
        };
        let silent = |_| Problem::unavailable("the database does not answer");
        Ok(timeout(DATABASE_PATIENCE, asked).await.map_err(silent)??)
    }

    /// A turn for a query, which ends when its answer is sent.
    pub(super) async fn turn(&self) -> Result<Turn, Problem> {
        match timeout(TURN_PATIENCE, Arc::clone(&self.turns).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Turn { _permit: permit }),
            _ => Err(Problem::busy(format!("{QUERIES_MAX} queries are running; ask again"))),
        }
    }
}

/// The archive that is read.
#[derive(Debug)]
struct History {
    config: Config,
    counters: Counters,
    /// Opened when it is first asked for.
    archive: OnceCell<Archive>,
    /// When it was last brought up to date.
    refreshed: Mutex<Option<Instant>>,
}

impl History {
    async fn archive(&self) -> Result<Option<Archive>> {
        let mut refreshed = self.refreshed.lock().await;
        // Each time: a folder that is not mounted any more looks as if nothing had ever been archived.
        if Storage::is_away(&self.config.storage) {
            let context = format!("looking for the archive in {}", self.config.storage.storage_uri);
            return Err(Error::Io { context, source: ErrorKind::NotFound.into() });
        }
        let opened = self.archive.get_or_try_init(async || {
            let storage = Storage::open_existing(&self.config.storage)?;
            let storage = storage.through(|store| watched(store, &self.counters));
            *refreshed = Some(Instant::now());
            Archive::open_in_within(storage, self.config.memory_bytes).await
        });
        let archive = match opened.await {
            Ok(archive) => archive,
            Err(error) if archive::is_nothing(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if refreshed.is_none_or(|at| at.elapsed() > VERSION_AGE_MAX) {
            archive.refresh().await?;
            *refreshed = Some(Instant::now());
        }
        Ok(Some(archive.clone()))
    }
}

/// What the watermark rows say of the entities of these tables, as a reader would find it in the archive.
fn summaries(rows: &[EntityWatermark], kinds: &[Kind], schema: &str) -> Vec<EntitySummary> {
    let summary = |row: &EntityWatermark| {
        let is_its = |kind: &&Kind| kind.source_table(schema).is_some_and(|name| name == row.source_table);
        Some(EntitySummary {
            kind: kinds.iter().find(is_its)?.name(),
            space: row.entity.space.clone(),
            name: row.entity.name.clone(),
            version: row.entity.version.clone(),
            first: row.min_created_at,
            last: row.max_created_at,
            rows: u64::try_from(row.row_count).unwrap_or_default(),
        })
    };
    rows.iter().filter_map(summary).collect()
}

/// A query's turn. Its answer is in memory until the client has taken it, so the turn lasts as long.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
}

impl Turn {
    /// The answer, which ends the turn when it is sent, or given up.
    pub(super) async fn answer(self, response: Response) -> Result<Response, Problem> {
        self.answer_to(response, |_, _| ()).await
    }

    /// The same of an answer that has a tag, and is kept under it.
    pub(super) async fn tagged(
        self,
        response: Response,
        tag: &Tag,
        kept: &Kept,
    ) -> Result<Response, Problem> {
        let response = self.answer_to(response, |kind, bytes| kept.keep(tag, kind, bytes)).await?;
        Ok(tag.put_into(response))
    }

    async fn answer_to(
        self,
        response: Response,
        seen: impl FnOnce(HeaderValue, Bytes),
    ) -> Result<Response, Problem> {
        let (mut parts, body) = response.into_parts();
        let bytes = body::to_bytes(body, ANSWER_BYTES_MAX).await;
        let bytes = bytes.map_err(|_| Problem::too_large(ANSWER_BYTES_MAX))?;
        if let Some(kind) = parts.headers.get(header::CONTENT_TYPE).filter(|_| parts.status.is_success()) {
            seen(kind.clone(), bytes.clone());
        }
        parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
        let pieces = stream::unfold((bytes, self), |(mut bytes, turn)| async {
            let length = bytes.len().min(PIECE_BYTES);
            let piece = bytes.split_to(length);
            (length > 0).then_some((Ok::<_, Infallible>(piece), (bytes, turn)))
        });
        Ok(Response::from_parts(parts, Body::from_stream(pieces)))
    }
}
