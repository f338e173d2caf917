//! What a query reads of the storage, and no more.

use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};

use super::*;
use crate::archive;
use crate::archive::tests::Observed;
use crate::archive::{CommitNote, Namer, Table, encode, upload};
use crate::batch::{Batches, Cell};
use crate::lsn::Lsn;
use crate::tables::{Kind, MICROS_PER_DAY, WindowWidth};

const DAYS: i64 = 6;
const ENTITIES: usize = 10;
/// Three entities fill a row group.
const ROWS_PER_DAY: i64 = 40_000;

/// 2026-11-01.
const START: i64 = 1_793_491_200_000_000;

fn name(entity: usize) -> String {
    format!("model-{entity}")
}

/// A file a day, of all entities.
async fn fill(storage: &Storage) {
    let mut table = Table::claim(storage, Kind::spc(), "highwater/1/test", "session", Lsn(1)).await.unwrap();
    let namer = Namer::new();
    let mut files = Vec::new();
    for day in 0..DAYS {
        let mut batches = Batches::new(WindowWidth::DAY, 0);
        let feature = batches.text(b"age").unwrap();
        for entity in 0..ENTITIES {
            let id = batches.entity(&[b"space", name(entity).as_bytes(), b"1"]).unwrap();
            for row in 0..ROWS_PER_DAY {
                let time = START + day * MICROS_PER_DAY + row * (MICROS_PER_DAY / ROWS_PER_DAY);
                // No two alike, so that the column can't be made small.
                let value = (time.wrapping_mul(6_364_136_223_846_793_005) >> 11) as f64 * (entity + 1) as f64;
                batches.push(Kind::spc(), id, time, &[Cell::Text(feature), Cell::from(Some(value))]);
            }
        }
        for rows in batches.files() {
            let file = encode(Kind::spc(), rows.record_batches().map(Result::unwrap)).unwrap().unwrap();
            files.push(upload(storage, Kind::spc(), namer.name(rows.window(), Lsn(2)), file).await.unwrap());
        }
    }
    table.commit(&files, Lsn(2), &CommitNote::default()).await.unwrap();
}

fn query(entity: usize, days: std::ops::Range<i64>) -> BinnedQuery {
    let time = |day: i64| -> DateTime<Utc> {
        DateTime::from_timestamp_micros(START + day * MICROS_PER_DAY).unwrap()
    };
    let entity = Entity { space: "space".into(), name: name(entity), version: "1".into() };
    BinnedQuery::new(entity, time(days.start), time(days.end), Bins::from_minutes(60.0).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::print_stderr, reason = "the figures themselves are worth a look")]
async fn a_query_reads_little_of_other_entities_and_nothing_of_other_days() {
    let folder = tempfile::tempdir().unwrap();
    let (observed, storage) = Observed::folder(folder.path());
    fill(&storage).await;
    let archive = Archive::open_in(storage).await.unwrap();
    let total: u64 =
        archive.current().views.iter().flatten().flat_map(View::files).map(|file| file.size).sum();
    let cost = async |query: &BinnedQuery| {
        let counted =
            || (observed.requests.load(Ordering::Relaxed), observed.bytes_read.load(Ordering::Relaxed));
        let before = counted();
        let bins = archive.binned_spc(query).await.unwrap().features["age"].values.len();
        let after = counted();
        (bins, after.0 - before.0, after.1 - before.1)
    };
    let days = u64::try_from(DAYS).unwrap();
    let (bins, requests, bytes) = cost(&query(4, 0..DAYS)).await;
    eprintln!("{total} bytes in {days} files; one entity, all days: {requests} requests, {bytes} bytes");
    assert_eq!(bins, 24 * 6);
    assert!(requests <= 3 * days, "{requests} requests for {days} files");
    // Its row group, of three entities of ten, since the gaps between the pages wanted are shorter than what a
    // request is worth (1 MiB); and each footer is read ahead.
    let group = total / 3;
    assert!(bytes < group + days * 70_000, "{bytes} of {total} bytes");

    // Footers are known by now.
    let (bins, again, bytes) = cost(&query(5, 0..DAYS)).await;
    assert!(bins == 24 * 6 && again <= 2 * days && again < requests, "{again} requests after {requests}");
    assert!(bytes < group + days * 10_000, "{bytes} of {total} bytes");
    let (bins, requests, bytes) = cost(&query(5, 2..3)).await;
    assert!(
        bins == 24 && requests <= 2 && bytes < group / days + 10_000,
        "{requests} requests, {bytes} bytes"
    );

    // What the log's bounds rule out costs nothing, and so does a look when there is nothing new but one request a table.
    let nobody = Entity { space: "other".into(), name: "model".into(), version: "1".into() };
    let before = observed.requests.load(Ordering::Relaxed);
    let range = (DateTime::<Utc>::UNIX_EPOCH, Utc::now());
    let nothing = BinnedQuery::with_points(nobody, range.0, range.1, 100).unwrap();
    assert!(archive.binned_spc(&nothing).await.unwrap().features.is_empty());
    assert_eq!(observed.requests.load(Ordering::Relaxed), before);
    assert!(!archive.refresh().await.unwrap());
    let looks = observed.requests.load(Ordering::Relaxed) - before;
    assert!(looks <= 4, "{looks} requests to see that nothing is new");
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::print_stderr, reason = "the figures themselves are worth a look")]
async fn a_query_of_one_table_reads_no_other_log() {
    let folder = tempfile::tempdir().unwrap();
    let (observed, storage) = Observed::folder(folder.path());
    fill(&storage).await;
    for kind in [Kind::custom(), Kind::psi()] {
        Table::claim(&storage, kind, "highwater/1/test", "session", Lsn(1)).await.unwrap();
    }
    let cost = || observed.requests.load(Ordering::Relaxed);
    let before = cost();
    let whole = Archive::open_in(storage.clone()).await.unwrap();
    let all = cost() - before;
    let before = cost();
    let archive = Archive::of_table(storage.clone(), "spc", archive::MEMORY_BYTES).await.unwrap();
    let one = cost() - before;
    eprintln!("{one} requests for one table, {all} for all");
    assert!(one * 5 < all * 2, "{one} of {all}");
    let asked = query(4, 0..DAYS);
    assert_eq!(archive.binned_spc(&asked).await.unwrap(), whole.binned_spc(&asked).await.unwrap());
    assert_eq!(
        archive.versions(),
        [("spc", whole.versions().iter().find(|(name, _)| *name == "spc").unwrap().1)]
    );
    // A table without rows is one of all of them, and one that nobody knows is missed with the names of those there are.
    assert!(
        Archive::of_table(storage.clone(), "quarantine", archive::MEMORY_BYTES)
            .await
            .unwrap()
            .versions()
            .len()
            > 1
    );
    assert!(
        Archive::of_table(storage, "events", archive::MEMORY_BYTES).await.unwrap().kind_of("events").is_err()
    );
}
