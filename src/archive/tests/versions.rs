//! The newest version of each row, whatever files its versions are in.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

use crate::batch::{Batches, Cell, EntityId};
use crate::tables::{Change, ColumnSpec, ColumnType, Description, change_columns};

/// A table of an id, a text that may be left out, and a number.
fn orders() -> Kind {
    let of = |name: &str, column_type, source_type: &str| ColumnSpec {
        source_type: Some(source_type.to_owned()),
        ..ColumnSpec::nullable(name, column_type)
    };
    let mut columns = vec![ColumnSpec::required("at", ColumnType::Timestamp)];
    columns.push(of("id", ColumnType::Long, "bigint"));
    columns.push(of("text", ColumnType::String, "text"));
    columns.push(of("count", ColumnType::Long, "integer"));
    columns.extend(change_columns());
    Kind::described(Description {
        name: "orders".to_owned(),
        source: Some("public.orders".to_owned()),
        entity: None,
        columns,
        sort: Vec::new(),
        left_out: Vec::new(),
        row_key: vec!["id".to_owned()],
    })
}

/// A version of a row; a text that is not sent is `None`, one that is null `Some(None)`.
#[derive(Clone, Debug)]
struct Version {
    id: i64,
    change: Change,
    text: Option<Option<String>>,
    count: Option<i64>,
    lsn: i64,
    sequence: i64,
}

/// What a table holds: text and number by id.
type State = BTreeMap<i64, (Option<String>, Option<i64>)>;

/// The time of a row never changes.
fn time_of(id: i64) -> i64 {
    NOON + id * 600_000_000
}

fn batch(kind: Kind, versions: &[Version]) -> Vec<RecordBatch> {
    let mut batches = Batches::new(WindowWidth::DAY, 0);
    for version in versions {
        let mut text = |text: Option<&str>| Cell::from(text.and_then(|text| batches.text(text.as_bytes())));
        let cells = [
            Cell::Long(version.id),
            text(version.text.as_ref().and_then(|text| text.as_deref())),
            version.count.map_or(Cell::Null, Cell::Long),
            text(Some(version.change.name())),
            Cell::Long(version.lsn),
            Cell::Long(version.sequence),
            Cell::Null,
            text(version.text.is_none().then_some("text")),
        ];
        batches.push(kind, EntityId::NONE, time_of(version.id), &cells);
    }
    let files = batches.files();
    files.iter().flat_map(|file| file.record_batches().map(Result::unwrap).collect::<Vec<_>>()).collect()
}

/// Versions as a table would bring them, and what it holds after each transaction.
fn life(random: &mut StdRng) -> (Vec<Version>, Vec<State>) {
    let mut table = State::new();
    let (mut versions, mut states) = (Vec::new(), vec![table.clone()]);
    for lsn in 1..=60 {
        for sequence in 1..=random.random_range(1..4) {
            let id = random.random_range(0..12);
            let text = random.random_bool(0.8).then(|| format!("t{}", random.random_range(0..5)));
            let count = random.random_bool(0.9).then(|| random.random_range(0..5));
            let (change, sent) = match table.get(&id) {
                None => (if random.random_bool(0.5) { Change::Insert } else { Change::Copy }, Some(text)),
                Some(_) if random.random_bool(0.3) => (Change::Delete, Some(None)),
                Some(_) => (Change::Update, random.random_bool(0.5).then_some(text)),
            };
            if change == Change::Delete {
                table.remove(&id);
            } else {
                let before = table.get(&id).and_then(|row| row.0.clone());
                table.insert(id, (sent.clone().unwrap_or(before), count));
            }
            let count = count.filter(|_| change != Change::Delete);
            versions.push(Version { id, change, text: sent, count, lsn, sequence });
        }
        states.push(table.clone());
    }
    (versions, states)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_versions_are_the_table_at_each_position_apart_and_merged() {
    let kind = orders();
    for seed in 0..2 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut versions, states) = life(&mut random);
        let place = Place::new();
        let mut table = Table::claim(&place.storage, kind, APP, "one", Lsn(100)).await.unwrap();
        // Any version may come in any file.
        for number in 0..6 {
            let part: Vec<Version> = if number == 5 {
                std::mem::take(&mut versions)
            } else {
                let (part, rest) = versions.into_iter().partition(|_| random.random_bool(0.3));
                versions = rest;
                part
            };
            let file = encode(kind, batch(kind, &part)).unwrap().unwrap();
            let window = Window::of(file.stats.min_time, WindowWidth::DAY);
            let lsn = Lsn(200 + number);
            let file = upload(&place.storage, kind, place.namer.name(window, lsn), file).await.unwrap();
            table.commit(&[file], lsn, &note()).await.unwrap();
        }
        for step in ["apart", "merged"] {
            let files: Vec<&TableFile> = table.files().collect();
            for (lsn, state) in states.iter().enumerate() {
                let lsn = lsn as i64;
                let row = |(id, (text, count)): (&i64, &(Option<String>, Option<i64>))| Version {
                    id: *id,
                    change: Change::Insert,
                    text: Some(text.clone()),
                    count: *count,
                    lsn: 0,
                    sequence: 0,
                };
                let expected: Vec<Version> = state.iter().map(row).collect();
                let before = Lsn(lsn as u64 + 1);
                let sums = hour_sums(&place.storage, kind, &files, (0, i64::MAX / 2), before).await.unwrap();
                let mut wanted = Vec::new();
                for rows in batch(kind, &expected) {
                    each_digest(kind, &rows, |time, digest| wanted.push((time, digest))).unwrap();
                }
                assert_eq!(sums, sums_of(wanted.into_iter()), "seed {seed}, {step}, at {lsn}");
            }
            let mut found = Multiset::new(kind).before(Lsn(1_000));
            found
                .read(&place.storage, &files, &[(NOON, time_of(3)), (time_of(5), time_of(20))])
                .await
                .unwrap();
            let newest = states.last().unwrap();
            let within = newest.keys().filter(|id| **id < 3 || **id >= 5).count() as u64;
            assert_eq!(found.row_count(), within, "seed {seed}, {step}: of two ranges");
            if step == "apart" {
                let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
                let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
                assert!(table.commit_merge(&merged).await.unwrap());
            }
        }
    }
}
