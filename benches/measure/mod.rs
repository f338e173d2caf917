//! What the benches of whole runs share: settings, a server, what a process has used, and how figures are summed up.

pub(crate) mod process;

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::Client;

use crate::support::cluster::Cluster;
use crate::support::schema::{self, Partitions, Shape};
use crate::support::sidecar::Launch;

/// The database with the drift tables.
pub(crate) const DATABASE: &str = "bench";

/// The slot and the publication.
pub(crate) const NAME: &str = "bench";

/// Between two looks at the processes: what is missed of their CPU time is less than a per cent.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Longest time that one run may take.
pub(crate) const RUN_DEADLINE: Duration = Duration::from_secs(600);

/// A setting from the environment; an empty one is none.
pub(crate) fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// A number from the environment, with or without underscores.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    text(name).map_or(default, |text| {
        text.replace('_', "").parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

/// A new server with empty drift tables, and a session in their database.
pub(crate) async fn new_server() -> (Cluster, Client) {
    // Writing the rows is not what is measured, and nothing else should write while something is.
    let cluster = Cluster::start_new(&[("fsync", "off"), ("autovacuum", "off")]);
    let admin = cluster.connect("postgres").await;
    admin.batch_execute(&format!("create database {DATABASE}")).await.expect("database");
    let client = cluster.connect(DATABASE).await;
    schema::create(&client, Shape::Named, Partitions::DefaultOnly).await;
    (cluster, client)
}

/// How to start the sidecar with its archive and its log in a folder.
pub(crate) fn launch(uri: &str, folder: &Path, slot: &str) -> Launch {
    Launch::new(uri, &folder.join("archive"), slot, &folder.join("log"))
}

/// A table of the shape of `psi_drift` that only the settings describe: its name, and that of its folder.
pub(crate) const LIKE_PSI: &str = "like_psi";

/// The same with [`LIKE_PSI`], in schema `public`, in its settings.
pub(crate) fn describing(launch: Launch, folder: &Path) -> Launch {
    let file = folder.join("highwater.toml");
    let section = format!(
        "[[table]]\nsource = 'public.{LIKE_PSI}'\nentity = ['space', 'name', 'version']\nsort = ['feature', 'bin_id']\n\
         exclude = ['updated_at', 'archived']\n"
    );
    std::fs::write(&file, section).expect("settings");
    launch.configured(&file)
}

/// Makes [`LIKE_PSI`], with the columns, the keys and the partitioning of `psi_drift`; partitions are the caller's.
pub(crate) async fn create_like_psi(client: &Client) {
    let sql = format!(
        "create table public.{LIKE_PSI} (like scouter.psi_drift including all) partition by range (created_at)"
    );
    client.batch_execute(&sql).await.expect("a table like psi_drift");
}

/// A folder for one run, removed when dropped.
pub(crate) fn new_folder() -> TempDir {
    tempfile::Builder::new().prefix("highwater-bench-").tempdir().expect("temporary folder")
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// How busy the machine was, to be printed beside the figures.
pub(crate) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
