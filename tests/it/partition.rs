//! Partitions that are gone before their rows are decoded.

use std::time::Duration;

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const ROWS: usize = 500;

/// Rows of a partition that `removal` takes away while no sidecar runs.
async fn arrives_in_spite_of(removal: &str) {
    let stage = Stage::shared(Shape::Named).await;
    stage.launch().must(&["setup"]);
    let client = stage.connect().await;
    let sql = format!(
        "create table scouter.gone partition of scouter.psi_drift for values from ('2020-02-03') to ('2020-02-04');
         insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select '2020-02-03 12:00+00'::timestamptz + n * interval '1 second', 's', 'n', '1', 'f', n, n
           from generate_series(1, {ROWS}) n"
    );
    client.batch_execute(&sql).await.unwrap();
    client.batch_execute(removal).await.unwrap();
    // A row afterwards: the stream goes on under the new shape of the table.
    stage.insert_one(&client, "after", None).await;

    let _sidecar = stage.launch().start();
    let archived = async || (archived_rows(&stage.storage().join("psi")).len() >= ROWS).then_some(());
    until("the rows of the partition arrive", Duration::from_secs(60), archived).await;
    let rows = archived_rows(&stage.storage().join("psi"));
    let bins: std::collections::BTreeSet<&str> =
        rows.iter().filter_map(|row| row.rsplit('|').next()).collect();
    assert_eq!((rows.len(), bins.len()), (ROWS, ROWS), "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_detached_partition_arrive() {
    arrives_in_spite_of("alter table scouter.psi_drift detach partition scouter.gone").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_dropped_partition_arrive() {
    arrives_in_spite_of("drop table scouter.gone").await;
}
