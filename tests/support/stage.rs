//! What one test works on: a database with drift tables, a folder for the archive, a slot.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::archive::{assert_same, compare};
use super::cluster::{Cluster, SIDECAR_ROLE};
use super::schema::{self, KINDS, Partitions, Shape};
use super::sidecar::{Launch, Sidecar};
use super::wait::{until, within};

/// The server that a test works with: the shared one or its own.
#[derive(Debug)]
enum Server {
    Shared(&'static Cluster),
    Own(Box<Cluster>),
}

/// A database with drift tables, a folder for the archive, and a slot's name; removed when dropped.
#[derive(Debug)]
pub struct Stage {
    server: Server,
    /// Name of the database, the slot and the publication.
    pub name: String,
    /// The shape of its drift tables.
    pub shape: Shape,
    folder: TempDir,
}

impl Stage {
    /// On the shared server.
    pub async fn shared(shape: Shape) -> Self {
        Self::on(Server::Shared(Cluster::shared()), shape, Partitions::DefaultOnly).await
    }

    /// On the shared server, in a database of another encoding than UTF-8.
    pub async fn encoded(shape: Shape, encoding: &str) -> Self {
        let options = format!("template template0 encoding '{encoding}'");
        Self::with(Server::Shared(Cluster::shared()), shape, Partitions::DefaultOnly, &options).await
    }

    /// On the shared server, partitioned by pg_partman.
    pub async fn partitioned(shape: Shape) -> Self {
        Self::on(Server::Shared(Cluster::shared()), shape, Partitions::Partman).await
    }

    /// On a server of its own.
    pub async fn private(shape: Shape, settings: &[(&str, &str)]) -> Self {
        let cluster = Box::new(Cluster::start_new(settings));
        Self::on(Server::Own(cluster), shape, Partitions::DefaultOnly).await
    }

    /// On a server of its own, of another version.
    pub async fn of_version(major: u32, shape: Shape, settings: &[(&str, &str)]) -> Self {
        let cluster = Box::new(Cluster::start_version(major, settings));
        Self::on(Server::Own(cluster), shape, Partitions::DefaultOnly).await
    }

    /// On a server of its own, partitioned by pg_partman.
    pub async fn private_partitioned(shape: Shape) -> Self {
        Self::on(Server::Own(Box::new(Cluster::start_new(&[]))), shape, Partitions::Partman).await
    }

    async fn on(server: Server, shape: Shape, partitions: Partitions) -> Self {
        Self::with(server, shape, partitions, "").await
    }

    async fn with(server: Server, shape: Shape, partitions: Partitions, options: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("hw_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix("highwater-").tempdir().expect("temporary folder");
        let stage = Self { server, name, shape, folder };
        let admin = stage.cluster().connect("postgres").await;
        admin.batch_execute(&format!("create database {} {options}", stage.name)).await.expect("database");
        let role = format!(
            "do $$ begin create role {SIDECAR_ROLE} login replication; exception when duplicate_object or unique_violation then null; end $$"
        );
        admin.batch_execute(&role).await.expect("the role that archives");
        schema::create(&stage.connect().await, shape, partitions).await;
        stage
    }

    /// The server.
    pub fn cluster(&self) -> &Cluster {
        match &self.server {
            Server::Shared(cluster) => cluster,
            Server::Own(cluster) => cluster,
        }
    }

    /// A session in the stage's database.
    pub async fn connect(&self) -> Client {
        self.cluster().connect(&self.name).await
    }

    /// The folder of the archive.
    pub fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    /// A folder beside the archive, removed with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// How to start the sidecar on this stage, with checkpoints every second.
    pub fn launch(&self) -> Launch {
        let log = self.folder.path().join("sidecar.log");
        let cluster = self.cluster();
        Launch::new(&cluster.uri_of(SIDECAR_ROLE, &self.name), &self.storage(), &self.name, &log)
            .with("HIGHWATER_MAX_LAG", "1s")
            .owned(&cluster.uri_unix(&self.name))
    }

    /// `highwater setup`, then the running sidecar.
    pub async fn start(&self) -> Sidecar {
        self.launch().must(&["setup"]);
        let sidecar = self.launch().start();
        self.streaming().await;
        sidecar
    }

    /// Waits until a sidecar holds the slot.
    pub async fn streaming(&self) {
        let client = self.connect().await;
        until("a sidecar holds the slot", Duration::from_secs(30), async || self.holder(&client).await).await;
    }

    /// The server process that holds the slot for a sidecar.
    pub async fn holder(&self, client: &Client) -> Option<i32> {
        let sql = "select active_pid from pg_replication_slots where slot_name = $1";
        client.query_opt(sql, &[&self.name]).await.expect("slot").and_then(|row| row.get(0))
    }

    /// Cuts the connection of whoever holds the slot.
    pub async fn cut(&self) {
        let sql = "select pg_terminate_backend(active_pid) from pg_replication_slots
                   where slot_name = $1 and active_pid is not null";
        self.connect().await.execute(sql, &[&self.name]).await.expect("pg_terminate_backend");
    }

    /// Waits until the server has sent everything before a position to the sidecar. Whether it has can be
    /// seen only from its side.
    pub async fn sent(&self, client: &Client, target: PgLsn) {
        let sql = "select sent_lsn > $1 from pg_stat_replication r join pg_replication_slots s
                       on s.active_pid = r.pid where slot_name = $2";
        let sent = async || {
            client.query_opt(sql, &[&target, &self.name]).await.unwrap()?.get::<_, bool>(0).then_some(())
        };
        until("the rows are sent", Duration::from_secs(30), sent).await;
    }

    /// The acknowledged position.
    pub async fn confirmed(&self, client: &Client) -> PgLsn {
        let sql = "select confirmed_flush_lsn from pg_replication_slots where slot_name = $1";
        client.query_one(sql, &[&self.name]).await.expect("slot").get(0)
    }

    /// Waits until the server knows everything before a position to be archived.
    pub async fn acknowledged(&self, client: &Client, target: PgLsn, deadline: Duration) {
        // Null while a slot is being made anew.
        let sql =
            "select coalesce(confirmed_flush_lsn, '0/0') from pg_replication_slots where slot_name = $1";
        let acknowledged = async || {
            let row = client.query_opt(sql, &[&self.name]).await.expect("slot")?;
            (row.get::<_, PgLsn>(0) > target).then_some(())
        };
        until(&format!("everything before {target} is acknowledged"), deadline, acknowledged).await;
    }

    /// Inserts one custom metric, through the shape that the table has; the LSN that its commit is beyond.
    pub async fn insert_one(&self, client: &Client, metric: &str, value: Option<f64>) -> PgLsn {
        let sql = match self.shape {
            Shape::Named => {
                "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                 values (clock_timestamp(), 'tests', 'model', '1.0.0', $1, $2)"
            }
            Shape::Entity => {
                schema::entity_id(client, "tests", "model", "1.0.0").await;
                "insert into scouter.custom_drift (created_at, entity_id, metric, value)
                 select clock_timestamp(), id, $1, $2 from scouter.drift_entities
                  where (space, name, version) = ('tests', 'model', '1.0.0')"
            }
        };
        let before = client.query_one("select pg_current_wal_insert_lsn()", &[]).await.expect("lsn").get(0);
        client.execute(sql, &[&metric, &value]).await.expect("insert");
        before
    }

    /// Inserts a last row, waits until a sidecar has archived and acknowledged everything up to it, and
    /// compares all rows.
    ///
    /// # Panics
    ///
    /// When that takes longer than the deadline, or source and archive differ.
    pub async fn assert_archived(&self, deadline: Duration) {
        let client = self.connect().await;
        // The position before the row: whatever else writes WAL, the row's own commit lies beyond it.
        let target = self.insert_one(&client, "last", None).await;
        self.acknowledged(&client, target, deadline).await;
        // Should a keepalive have been acknowledged just before the row's commit, it follows at once.
        within(Duration::from_secs(5), async || {
            let difference = compare(&client, &self.storage(), self.shape, KINDS[0]).await;
            (difference.missing == 0 || difference.extra > 0).then_some(())
        })
        .await;
        assert_same(&client, &self.storage(), self.shape).await;
    }

    /// Waits until everything that another server has in this stage's tables is archived.
    pub async fn assert_archived_from(&self, client: &Client, deadline: Duration) {
        for kind in KINDS {
            until("everything is archived", deadline, async || {
                compare(client, &self.storage(), self.shape, kind).await.is_none().then_some(())
            })
            .await;
        }
    }

    /// Compares all rows, now.
    pub async fn assert_same(&self) {
        assert_same(&self.connect().await, &self.storage(), self.shape).await;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A server of one's own goes with everything on it.
        if let Server::Shared(cluster) = &self.server {
            let name = &self.name;
            // The sidecars of the test are gone or about to be; one that lingers must not keep the slot.
            let sql = format!(
                "select pg_terminate_backend(active_pid) from pg_replication_slots
                  where slot_name like '{name}%' and active_pid is not null"
            );
            cluster.psql_quietly("postgres", &sql);
            let slots =
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name like";
            cluster.psql_quietly("postgres", &format!("{slots} '{name}%'"));
            cluster.psql_quietly("postgres", &format!("drop database if exists {name} with (force)"));
        }
    }
}

/// Waits until everything that was committed so far is below the horizon of all tables.
pub async fn archived(client: &Client) {
    let id =
        client.query_one("select pg_current_xact_id()::text::bigint", &[]).await.unwrap().get::<_, i64>(0);
    until("the horizon has passed what was committed", Duration::from_secs(60), async || {
        // Writes, too, so that there is a position to record.
        client
            .batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key")
            .await
            .unwrap();
        let sql = "select coalesce(min(archived_before::text::bigint), 0) from highwater.watermark";
        (client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > id).then_some(())
    })
    .await;
}
