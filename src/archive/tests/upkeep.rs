//! Merges, vacuum, and logs that stay short.

use arrow::array::AsArray as _;
use arrow::datatypes::TimestampMicrosecondType;
use object_store::ObjectStoreExt as _;
use parquet::basic::Encoding;
use parquet::file::properties::WriterPropertiesBuilder;
use parquet::schema::types::ColumnPath;

use super::*;
use crate::archive::files::encode::{encode_with, writer_properties};
use crate::archive::log::entry::entry_path;

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_was_given_up_may_still_land() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    for lsn in [200, 300] {
        table.commit(&[place.file(rows(5), lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    // It lands through another handle's eyes: put the very entry, but tell this handle nothing.
    let version = table.version();
    let entry = table.entry_of_merge(&merged).unwrap();
    place.storage.table_store(Kind::psi()).put(&entry_path(version + 1), entry.into()).await.unwrap();
    table.commit(&[place.file(rows(3), 400).await], Lsn(400), &note()).await.unwrap();
    assert_eq!(table.version(), version + 2);
    assert_eq!((table.totals().row_count, table.totals().file_count), (13, 2));
    assert!(!table.commit_merge(&merged).await.unwrap());
    let again = place.claim("two").await;
    assert_eq!((again.totals().row_count, again.totals().file_count, again.lsn()), (13, 2, Lsn(400)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_stays_short_and_opening_cheap() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    for number in 1..=300 {
        table.commit(&[place.file(rows(1), 100 + number).await], Lsn(100 + number), &note()).await.unwrap();
        if number % 100 == 0 {
            place.age(Duration::from_hours(2));
        }
        table.maintain().await;
    }
    let log = std::fs::read_dir(place.folder.path().join("psi/_delta_log")).unwrap().count();
    assert!(log < 110, "{log} files in the log");
    place.observed.requests.store(0, Ordering::Relaxed);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.lsn()), (300, Lsn(400)));
    let requests = place.observed.requests.load(Ordering::Relaxed);
    assert!(requests < 30, "{requests} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_keeps_every_row_and_changes_none() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let mut wanted = Vec::new();
    for number in 0..60_u64 {
        let base = NOON + (number as i64 * 7919) % 60;
        let mut part: Vec<(i64, &str, i32)> = Vec::new();
        for name in ["a", "b", "c"] {
            part.extend((0..500).map(|row| (base + row * 60, name, number as i32)));
        }
        wanted.extend(part.iter().map(|row| (row.1.to_owned(), row.0, row.2)));
        table
            .commit(&[place.file(psi(&part), 200 + number).await], Lsn(200 + number), &note())
            .await
            .unwrap();
    }
    let before = table.totals();
    assert!(table.merge_candidates(NOON, Duration::ZERO, WindowWidth::DAY).is_empty(), "the day is not over");
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    assert_eq!((plans.len(), plans[0].inputs.len()), (1, 60));
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    assert!(!table.commit_merge(&merged).await.unwrap(), "its inputs are gone");
    assert_eq!((table.totals().row_count, table.totals().file_count), (before.row_count, 1));
    assert_eq!(table.lsn(), Lsn(259));
    let file = table.files().next().unwrap().clone();
    assert_eq!(file.name.as_ref().unwrap().lsn, Lsn(259));
    let store = place.storage.table_store(Kind::psi());
    let mut found = Vec::new();
    for batch in read(store.get(&Path::from(file.path.as_str())).await.unwrap().bytes().await.unwrap()) {
        let times = batch.column(0).as_primitive::<TimestampMicrosecondType>();
        let (names, counts) =
            (batch.column(2).as_string::<i32>(), batch.column(6).as_primitive::<Int32Type>());
        let all = (0..batch.num_rows())
            .map(|row| (names.value(row).to_owned(), times.value(row), counts.value(row)));
        found.extend(all);
    }
    assert!(found.is_sorted_by_key(|row| (row.0.clone(), row.1)));
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
    let entry = store.get(&entry_path(table.version())).await.unwrap().bytes().await.unwrap();
    let entry = String::from_utf8(entry.to_vec()).unwrap();
    assert_eq!(entry.matches(r#""dataChange":false"#).count(), 61);
    assert!(!entry.contains(r#""dataChange":true"#));

    table.commit(&[place.file(rows(10), 300).await], Lsn(300), &note()).await.unwrap();
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    drop(table);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.totals().file_count), (before.row_count + 10, 1));
}

/// Windows become a day once that has ended, and days a month; each time with all rows, in one entry of the log.
#[tokio::test(flavor = "multi_thread")]
async fn windows_become_days_and_days_months() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    // In the future: files are as old as they are.
    let midnight =
        "2099-11-14T00:00:00Z".parse::<chrono::DateTime<chrono::Utc>>().unwrap().timestamp_micros();
    let mut lsn = 200;
    for (day, hour) in [(0, 3), (0, 4), (0, 23), (1, 0), (1, 1)] {
        let time = midnight + day * MICROS_PER_DAY + hour * MICROS_PER_HOUR;
        for name in ["a", "b"] {
            lsn += 1;
            let file = encode(Kind::psi(), [psi(&[(time, name, 1), (time + 1, name, 2)])]).unwrap().unwrap();
            let path = place.namer.name(Window::of(time, WindowWidth::HOUR), Lsn(lsn));
            let file = upload(&place.storage, Kind::psi(), path, file).await.unwrap();
            table.commit(&[file], Lsn(lsn), &note()).await.unwrap();
        }
    }
    let windows = |table: &Table| {
        let mut names: Vec<String> = table.files().map(|file| file.name.clone().unwrap().window).collect();
        names.sort();
        names
    };
    let december = midnight + 40 * MICROS_PER_DAY;
    // Half an hour into the second day: the first has ended, but late rows may come; then two hours later; then in December.
    let steps = [
        (
            midnight + MICROS_PER_DAY + MICROS_PER_HOUR / 2,
            vec![
                "2099/11/14/03",
                "2099/11/14/04",
                "2099/11/14/23",
                "2099/11/15/00",
                "2099/11/15/00",
                "2099/11/15/01",
                "2099/11/15/01",
            ],
        ),
        (
            midnight + MICROS_PER_DAY + 5 * MICROS_PER_HOUR,
            vec!["2099/11/14", "2099/11/15/00", "2099/11/15/01"],
        ),
        (midnight + 2 * MICROS_PER_DAY + 2 * MICROS_PER_HOUR, vec!["2099/11/14", "2099/11/15"]),
        (december, vec!["2099/11"]),
    ];
    for (now, expected) in steps {
        while let Some(plan) = table.merge_candidates(now, Duration::ZERO, WindowWidth::HOUR).pop() {
            let merged = merge(&place.storage, &place.namer, &plan).await.unwrap();
            assert!(table.commit_merge(&merged).await.unwrap());
        }
        assert_eq!(windows(&table), expected);
        assert_eq!((table.totals().row_count, table.lsn()), (20, Lsn(lsn)));
    }
    // A late row waits for company, and joins the month.
    for late in 1..=2 {
        table
            .commit(&[place.file(psi(&[(midnight, "c", late)]), lsn + 1).await], Lsn(lsn + 1), &note())
            .await
            .unwrap();
        lsn += 1;
        let plan = table.merge_candidates(december, Duration::ZERO, WindowWidth::HOUR).pop().unwrap();
        assert_eq!((plan.window.as_str(), plan.inputs.len()), ("2099/11", 2));
        let merged = merge(&place.storage, &place.namer, &plan).await.unwrap();
        assert!(table.commit_merge(&merged).await.unwrap());
        assert_eq!(windows(&table), ["2099/11"]);
    }
    drop(table);
    assert_eq!(place.claim("two").await.totals().row_count, 22);
}

/// The encodings of the first builds, under a name as they gave them.
async fn old_file(place: &Place, batch: RecordBatch, lsn: u64) -> DataFile {
    let mut properties = WriterPropertiesBuilder::from(writer_properties(Kind::psi()));
    for column in ["bin_id", "bin_count"] {
        properties = properties
            .set_column_dictionary_enabled(ColumnPath::from(column), false)
            .set_column_encoding(ColumnPath::from(column), Encoding::BYTE_STREAM_SPLIT);
    }
    let file = encode_with(Kind::psi(), properties.build(), [batch]).unwrap().unwrap();
    let name = place.namer.name(Window::of(file.stats.min_time, WindowWidth::DAY), Lsn(lsn));
    let (front, sequence) = name.rsplit_once("-0").unwrap();
    upload(&place.storage, Kind::psi(), format!("{front}-{sequence}"), file).await.unwrap()
}

/// Files that few engines read are written anew, each alone if need be, once all other merges are done.
#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_first_builds_are_written_anew() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let month = |months: i64| NOON + months * 31 * MICROS_PER_DAY;
    let rows_of = |months| psi(&[(month(months), "a", 1), (month(months) + 1, "b", 2)]);
    // In the first month one alone, in the second two, in the third one beside a new one; the fourth has nothing to be done.
    let mut files = Vec::new();
    for months in [0, 1, 1, 2] {
        files.push(old_file(&place, rows_of(months), 200).await);
    }
    for months in [2, 3] {
        files.push(place.file(rows_of(months), 200).await);
    }
    table.commit(&files, Lsn(200), &note()).await.unwrap();
    assert_eq!(table.unportable_file_count(), 4);
    // A file that came a moment ago may get company.
    assert_eq!(table.merge_candidates(later(), Duration::from_hours(1), WindowWidth::DAY), []);
    let mut turns = MergeTurns::default();
    let mut done = Vec::new();
    loop {
        let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
        let Some(plan) = turns.choose(plans, std::time::Instant::now()) else { break };
        done.push((plan.inputs.len(), plan.is_rewrite));
        let merged = merge(&place.storage, &place.namer, &plan).await.unwrap();
        assert!(table.commit_merge(&merged).await.unwrap());
        turns.succeeded();
        assert!(done.len() < 10, "it never ends: {done:?}");
    }
    assert_eq!(done, [(2, false), (2, false), (1, true)]);
    assert_eq!((table.unportable_file_count(), table.totals().row_count), (0, 12));
    assert_eq!(table.files().count(), 4);
    for file in table.files() {
        let bytes = std::fs::read(place.folder.path().join("psi").join(&file.path)).unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes)).unwrap();
        let mut columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
        assert!(columns.all(|column| column.encodings().all(|used| used != Encoding::BYTE_STREAM_SPLIT)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_spares_what_may_still_be_needed() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let earlier = Namer::new();
    for lsn in [200, 300] {
        table.commit(&[place.file_with(&earlier, rows(5), lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let old_orphan = place.file_with(&earlier, rows(5), 400).await;
    let own_orphan = place.file(rows(5), 400).await;
    place.age(Duration::from_hours(48));
    let young_orphan = place.file_with(&earlier, rows(5), 500).await;
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let inputs: Vec<String> = plans[0].inputs.iter().map(|file| file.path.clone()).collect();
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    let day = Duration::from_hours(24);
    assert_eq!(table.vacuum(&place.namer, day).await.unwrap(), 1);
    let exists = |path: &str| place.folder.path().join("psi").join(path).exists();
    assert!(!exists(&old_orphan.path) && exists(&own_orphan.path) && exists(&young_orphan.path));
    assert!(inputs.iter().all(|path| exists(path)), "removed a moment ago: a query may be reading them");
    tokio::time::sleep(Duration::from_millis(5)).await;
    // With no patience at all they go, and the young orphan with them.
    assert_eq!(table.vacuum(&place.namer, Duration::ZERO).await.unwrap(), 3);
    assert!(merged.outputs.iter().all(|file| exists(&file.path)));
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_leaves_alone_what_is_not_ours() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let ours = place.file_with(&Namer::new(), rows(1), 200).await.path;
    let store = place.storage.table_store(Kind::psi());
    let foreign = ["custom/mymodel/x.parquet", "README", "_mine/x.parquet", ".mine/x.parquet"];
    // What was a file of the table goes; in a folder that readers don't look at it stays.
    let (dropped, hidden) = ("part-0.parquet", "_change_data/part-0.parquet");
    let nested = format!("_backup/{ours}");
    let all = foreign.iter().copied().chain([dropped, hidden, nested.as_str()]);
    for path in all.clone() {
        store.put(&Path::from(path), "x".into()).await.unwrap();
    }
    let remove = |path| {
        format!(
            r#"{{"remove":{{"path":"{path}","deletionTimestamp":1,"dataChange":true,"partitionValues":{{}},"size":1}}}}"#
        )
    };
    let entry = format!("{}\n{}", remove(dropped), remove(hidden));
    store.put(&entry_path(table.version() + 1), entry.into()).await.unwrap();
    place.age(Duration::from_hours(48));
    assert_eq!(table.vacuum(&place.namer, Duration::from_hours(24)).await.unwrap(), 2);
    let exists = |path: &str| place.folder.path().join("psi").join(path).exists();
    assert!(!exists(&ours) && !exists(dropped));
    assert!(all.filter(|path| *path != dropped).all(exists));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_unreadable_file_does_not_stop_other_merges() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let mut broken = String::new();
    for month in [0, 1] {
        for lsn in 200..202 {
            let file = place.file(psi(&[(NOON + month * 31 * MICROS_PER_DAY, "a", 1)]), lsn).await;
            if month == 0 {
                broken.clone_from(&file.path);
            }
            table.commit(&[file], Lsn(201), &note()).await.unwrap();
        }
    }
    std::fs::write(place.folder.path().join("psi").join(&broken), "broken").unwrap();
    let plans = || table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let mut turns = MergeTurns::default();
    let mut now = std::time::Instant::now();
    let first = turns.choose(plans(), now).unwrap();
    let error = merge(&place.storage, &place.namer, &first).await.unwrap_err();
    assert!(error.chain().contains(&broken), "{}", error.chain());
    assert_eq!(turns.failed(now), Some((first.window.clone(), Duration::from_mins(10))));
    let second = turns.choose(plans(), now).unwrap();
    assert_ne!(second.window, first.window);
    merge(&place.storage, &place.namer, &second).await.unwrap();
    turns.succeeded();
    // The failed one comes back, less and less often.
    for minutes in [20, 40, 80, 160, 320, 360, 360] {
        let pause = turns.failed.values().map(|(again_at, _)| *again_at - now).next().unwrap();
        assert_eq!(turns.choose(plans().into_iter().take(1), now + pause / 2), None);
        now += pause;
        assert_eq!(turns.choose(plans(), now).map(|plan| plan.window), Some(first.window.clone()));
        assert_eq!(turns.failed(now).unwrap().1, Duration::from_mins(minutes));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_removes_what_a_killed_put_left() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let ours = place.file(rows(1), 200).await.path;
    let folder = place.folder.path().join("psi");
    let left = |name: String| {
        let path = folder.join(name);
        std::fs::write(&path, "x").unwrap();
        path
    };
    let old = left(format!("{ours}#17"));
    let foreign = [left("x.parquet#17".to_owned()), left(format!("{ours}#x"))];
    place.age(Duration::from_hours(48));
    let young = left(format!("{ours}#18"));
    assert_eq!(table.vacuum(&place.namer, Duration::from_hours(24)).await.unwrap(), 1);
    assert!(!old.exists() && young.exists() && foreign.iter().all(|path| path.exists()));
}
