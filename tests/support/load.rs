//! Mixed load, as unfriendly as real writers: late rows, savepoints rolled back, aborted transactions, COPY,
//! long transactions interleaved with short ones, nulls, rows that are equal in every column.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures::SinkExt as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls, Transaction};

use super::schema::{KINDS, Shape, Source};
use super::wait::until;

/// Sessions that write at the same time, so that transactions overlap in the log.
const WRITERS: u64 = 4;

/// Rows per second of all writers together, and after how many rows a tenth of them: a test that takes long on a busy machine
/// must not have ever more to do because it takes long.
const ROWS_PER_SECOND: u32 = 2_000;
const ROWS_BEFORE_SLOW: u64 = 60_000;

/// The entities that the load writes for: space, name, version.
const ENTITIES: [(&str, &str, &str); 5] = [
    ("shop", "ranking", "1.0.0"),
    ("shop", "ranking", "1.1.0"),
    ("bank", "fraud", "0.3.1"),
    ("bank", "credit/limit", "2.0.0-rc.1"),
    ("labs", "it's a \"model\"", "7"),
];

/// Running load.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    writers: Vec<JoinHandle<()>>,
}

#[derive(Clone)]
struct Shared {
    uri: String,
    shape: Shape,
    writers: u64,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    /// Microseconds; every row takes the next, so that no unique constraint is hit by chance.
    clock: Arc<AtomicI64>,
}

impl Shared {
    /// How long a writer rests after so many rows.
    fn rest(&self, rows: u64, all: u64) -> Duration {
        let slower = if all > ROWS_BEFORE_SLOW { 10 } else { 1 };
        let share = u32::try_from(self.writers).expect("a few writers");
        Duration::from_secs(rows) * share * slower / ROWS_PER_SECOND
    }
}

impl Load {
    /// Starts writing. The seed comes from `LOAD_SEED` or chance, and is printed.
    pub fn start(uri: &str, shape: Shape) -> Self {
        let seed =
            std::env::var("LOAD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
        Self::start_with_seed(uri, shape, seed)
    }

    /// Starts writing with this seed.
    pub fn start_with_seed(uri: &str, shape: Shape, seed: u64) -> Self {
        Self::start_writers(uri, shape, seed, WRITERS)
    }

    /// Starts writing with so many sessions.
    pub fn start_writers(uri: &str, shape: Shape, seed: u64, writers: u64) -> Self {
        eprintln!("load: LOAD_SEED={seed}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
        let shared = Shared {
            uri: uri.to_owned(),
            shape,
            writers,
            stop: Arc::default(),
            committed: Arc::default(),
            clock: Arc::new(AtomicI64::new(i64::try_from(now.as_micros()).expect("a date"))),
        };
        let writer = |number: u64| {
            tokio::spawn(write(shared.clone(), StdRng::seed_from_u64(seed.wrapping_add(number))))
        };
        let writers = (0..writers).map(writer).collect();
        Self { stop: shared.stop, committed: shared.committed, writers }
    }

    /// Rows committed so far; a lower bound, since the answer to a commit may be lost.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Waits until so many more rows are committed.
    pub async fn goes_on(&self, row_count: u64, deadline: Duration) {
        let target = self.committed() + row_count;
        until("the load goes on", deadline, async || (self.committed() > target).then_some(())).await;
    }

    /// Lets the running transactions end, and stops. Returns the rows committed.
    pub async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.expect("a writer of the load panicked");
        }
        self.committed.load(Ordering::Relaxed)
    }
}

async fn connect(uri: &str) -> Option<Client> {
    let (client, connection) = tokio_postgres::connect(uri, NoTls).await.ok()?;
    tokio::spawn(async move { connection.await.ok() });
    Some(client)
}

/// One writer: transactions until told to stop, and a new session whenever the server goes away.
async fn write(shared: Shared, mut rng: StdRng) {
    while !shared.stop.load(Ordering::Relaxed) {
        let Some(mut client) = connect(&shared.uri).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while !shared.stop.load(Ordering::Relaxed) {
            match transaction(&shared, &mut client, &mut rng).await {
                Ok(rows) => {
                    let all = shared.committed.fetch_add(rows, Ordering::Relaxed);
                    tokio::time::sleep(shared.rest(rows, all)).await;
                }
                Err(error) if client.is_closed() || error.is_closed() => break,
                // The server says that it shuts down before it closes the connection.
                Err(error) if error.code().is_some_and(|code| code.code().starts_with("57P")) => break,
                Err(error) => panic!("load: {error:?}"),
            }
        }
    }
}

/// One transaction of some sort; the rows that it committed.
async fn transaction(
    shared: &Shared,
    client: &mut Client,
    rng: &mut StdRng,
) -> Result<u64, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    let mut rows = insert(shared, &transaction, rng).await?;
    match rng.random_range(0..10) {
        // Aborted as a whole.
        0 => {
            transaction.rollback().await?;
            return Ok(0);
        }
        // Rows under savepoints; those of every second one are taken back.
        1 | 2 => {
            for number in 0..rng.random_range(1..5) {
                transaction.batch_execute(&format!("savepoint s{number}")).await?;
                let more = insert(shared, &transaction, rng).await?;
                if rng.random_bool(0.5) {
                    transaction.batch_execute(&format!("rollback to savepoint s{number}")).await?;
                } else {
                    transaction.batch_execute(&format!("release savepoint s{number}")).await?;
                    rows += more;
                }
            }
        }
        // A long one: others begin and end while it is open.
        3 => {
            for _ in 0..rng.random_range(2..8) {
                tokio::time::sleep(Duration::from_millis(rng.random_range(1..60))).await;
                rows += insert(shared, &transaction, rng).await?;
            }
        }
        4 => rows += copy(shared, &transaction, rng).await?,
        _ => {}
    }
    transaction.commit().await?;
    tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
    Ok(rows)
}

/// The text of one value row, in the order of [`columns`], as SQL literals or as COPY text.
struct Values {
    literals: bool,
}

fn columns(shape: Shape, kind: Source) -> String {
    format!("created_at, {}, {}", shape.entity_columns(), kind.value_columns().join(", "))
}

impl Values {
    fn null(&self) -> String {
        if self.literals { "null".to_owned() } else { "\\N".to_owned() }
    }

    fn text(&self, text: &str) -> String {
        if self.literals { format!("'{}'", text.replace('\'', "''")) } else { text.to_owned() }
    }

    fn double(&self, rng: &mut StdRng) -> String {
        let value = match rng.random_range(0..20) {
            0 => return self.null(),
            1 => f64::NAN,
            2 => f64::NEG_INFINITY,
            3 => -0.0,
            _ => rng.random_range(-1e6..1e6),
        };
        let text = match value {
            value if value.is_nan() => "NaN".to_owned(),
            value if value.is_infinite() => "-Infinity".to_owned(),
            // `-0` as a number would be an integer, which has no negative zero.
            value => format!("{value:?}"),
        };
        self.text(&text)
    }

    /// One row.
    fn row(&self, shared: &Shared, kind: Source, rng: &mut StdRng) -> Vec<String> {
        const DAY: i64 = 86_400_000_000;
        let now = shared.clock.fetch_add(1, Ordering::Relaxed);
        // One row in twenty is late: days, for which a partition may be gone, up to years.
        let micros = match rng.random_range(0..40) {
            0 => now - DAY * rng.random_range(1..10),
            1 => now - DAY * rng.random_range(10..2_000),
            _ => now,
        };
        let time = chrono::DateTime::from_timestamp_micros(micros).expect("a date");
        let mut row = vec![self.text(&time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true))];
        let position = rng.random_range(0..ENTITIES.len());
        let (space, name, version) = ENTITIES[position];
        match shared.shape {
            Shape::Named => row.extend([name, space, version].map(|text| self.text(text))),
            Shape::Entity => row.push((position + 1).to_string()),
        }
        match kind {
            Source::Custom => {
                row.push(self.text(["accuracy", "f1 score", "größe"][rng.random_range(0..3)]));
                row.push(self.double(rng));
            }
            Source::Psi => {
                row.push(self.text(["age", "income", "ünïcode"][rng.random_range(0..3)]));
                row.push(rng.random_range(0..10).to_string());
                row.push(rng.random_range(0..5_000).to_string());
            }
            Source::Spc => {
                let has_feature = rng.random_bool(0.9);
                row.push(if has_feature { self.text("feature_1") } else { self.null() });
                row.push(self.double(rng));
            }
        }
        row
    }
}

/// An insert of one or many rows; sometimes of the same row twice, where the table allows that.
async fn insert(
    shared: &Shared,
    transaction: &Transaction<'_>,
    rng: &mut StdRng,
) -> Result<u64, tokio_postgres::Error> {
    let kind = KINDS[rng.random_range(0..KINDS.len())];
    let values = Values { literals: true };
    let count = if rng.random_bool(0.3) { 1 } else { rng.random_range(2..200) };
    let mut rows: Vec<Vec<String>> = (0..count).map(|_| values.row(shared, kind, rng)).collect();
    // Nulls are distinct to a unique constraint, so equal rows are possible, and must stay two.
    let twin =
        rows.first().filter(|row| kind == Source::Spc && row.iter().any(|cell| cell == "null")).cloned();
    rows.extend(twin);
    let rows: Vec<String> = rows.iter().map(|row| format!("({})", row.join(","))).collect();
    let (table, columns) = (kind.table(), columns(shared.shape, kind));
    let sql = format!("insert into scouter.{table} ({columns}) values {}", rows.join(","));
    transaction.execute(&sql, &[]).await
}

/// COPY of some hundred rows.
async fn copy(
    shared: &Shared,
    transaction: &Transaction<'_>,
    rng: &mut StdRng,
) -> Result<u64, tokio_postgres::Error> {
    let kind = KINDS[rng.random_range(0..KINDS.len())];
    let values = Values { literals: false };
    let count = rng.random_range(100..2_000);
    let text: String = (0..count).map(|_| values.row(shared, kind, rng).join("\t") + "\n").collect();
    let sql = format!("copy scouter.{} ({}) from stdin", kind.table(), columns(shared.shape, kind));
    let mut sink = std::pin::pin!(transaction.copy_in::<_, bytes::Bytes>(&sql).await?);
    sink.send(text.into()).await?;
    sink.finish().await
}

/// Makes the entities of the load, so that their ids are their places in its list plus one. For
/// [`Shape::Entity`] only, before the load starts.
pub async fn create_entities(client: &Client) {
    for (space, name, version) in ENTITIES {
        super::schema::entity_id(client, space, name, version).await;
    }
}
