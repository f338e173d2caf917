//! Claims and commits: what counts once, and what does not.

use object_store::ObjectStoreExt as _;

use super::*;
use crate::archive::log::entry::entry_path;
use crate::config::ObjectStorageSettings;

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_upload_and_commit_leaves_the_position() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    assert_eq!(table.lsn(), Lsn(100));
    for (lsn, count) in [(200, 10), (300, 5)] {
        let file = place.file(rows(count), lsn).await;
        table.commit(&[file], Lsn(lsn), &note()).await.unwrap();
    }
    table.commit(&[], Lsn(350), &note()).await.unwrap();
    let orphan = place.file(rows(3), 400).await;
    let before = table.totals();
    drop(table);
    let table = place.claim("two").await;
    assert_eq!(table.lsn(), Lsn(350));
    assert_eq!((table.totals().row_count, table.totals().file_count), (15, 2));
    assert_eq!(table.totals().byte_count, before.byte_count);
    assert_eq!(before.max_created_at, Some(NOON + 9));
    assert_eq!(table.totals().max_created_at, Some(NOON + 1000), "rounded up to a millisecond");
    assert!(table.files().all(|file| file.path != orphan.path && file.name.is_some()));
    let paths: Vec<String> = table.files().map(|file| file.path.clone()).collect();
    let stats = entity_stats(&place.storage, Kind::psi(), &paths).await.unwrap();
    assert_eq!(stats.len(), 1);
    assert_eq!((stats[0].min_created_at, stats[0].max_created_at, stats[0].row_count), (NOON, NOON + 9, 15));
}

/// What a copy is compared with: only what lies in its ranges, also where these are days apart.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_ranges_are_counted_and_taken_in() {
    const MINUTE: i64 = 60_000_000;
    let place = Place::new();
    let mut table = place.claim("one").await;
    // A row every 10 s of an hour, in the order of a file: by entity, then by time.
    let hour = |start: i64, name| (0..360).map(move |row| (start + row * 10_000_000, name, 1));
    let next_week = NOON + 7 * MICROS_PER_DAY;
    for (lsn, start) in [(200, NOON), (300, next_week)] {
        let file = place.file(psi(&hour(start, "a").chain(hour(start, "b")).collect::<Vec<_>>()), lsn).await;
        table.commit(&[file], Lsn(lsn), &note()).await.unwrap();
    }
    let files: Vec<&TableFile> = table.files().collect();
    let day = |time: i64| (time - MICROS_PER_DAY / 2, time + MICROS_PER_DAY / 2);
    let counts =
        minute_counts(&place.storage, Kind::psi(), &files, &[day(NOON), day(next_week)]).await.unwrap();
    assert_eq!(counts.len(), 120);
    assert!(counts.values().all(|count| *count == 12), "{counts:?}");
    let counts_of_a_week =
        minute_counts(&place.storage, Kind::psi(), &files, &[day(next_week)]).await.unwrap();
    assert_eq!(counts_of_a_week.len(), 60, "the other file is not read");
    assert_eq!(counts.first_key_value(), Some((&(NOON / MINUTE), &12)));

    let rows_of = async |ranges: &[(i64, i64)]| {
        let mut found = Multiset::new(Kind::psi());
        found.read(&place.storage, &files, ranges).await.unwrap();
        found.row_count()
    };
    assert_eq!(rows_of(&[]).await, 0);
    assert_eq!(rows_of(&[(i64::MIN, i64::MAX)]).await, 1440);
    assert_eq!(rows_of(&[(NOON, NOON + 1)]).await, 2);
    assert_eq!(rows_of(&[(NOON + 1, NOON + 10_000_000)]).await, 0);
    let apart =
        [(NOON - MINUTE, NOON + MINUTE), (NOON + 5 * MINUTE, NOON + 6 * MINUTE), (next_week, next_week + 1)];
    assert_eq!(rows_of(&apart).await, 26);
}

/// Groups of rows of one entity are counted by their statistics, all others by their rows: small ones that share a group,
/// and names that statistics cut.
#[tokio::test(flavor = "multi_thread")]
async fn entities_are_counted_from_footers_where_these_tell() {
    let place = Place::new();
    let long = ["n".repeat(5_000), "n".repeat(5_000) + "o"];
    let expected =
        [("a", 200_000), ("b", 3), ("c", 4), (&long[0], 131_072), (&long[1], 131_072), ("z", 131_072)];
    let mut all = Vec::new();
    for (name, count) in expected {
        all.extend((0..count).map(|row| (NOON + row, name, 1)));
    }
    let file = place.file(psi(&all), 200).await;
    let paths = [file.path.clone()];
    let found = entity_stats(&place.storage, Kind::psi(), &paths).await.unwrap();
    let found: Vec<_> = found
        .iter()
        .map(|stats| {
            assert_eq!((stats.min_created_at, stats.entity.space.as_str()), (NOON, "space"));
            assert_eq!(stats.max_created_at - NOON + 1, stats.row_count as i64);
            (stats.entity.name.as_str(), stats.row_count as i64)
        })
        .collect();
    assert_eq!(found, expected);

    let requests = async |path: &String| {
        let before = place.observed.requests.load(Ordering::Relaxed);
        entity_stats(&place.storage, Kind::psi(), std::slice::from_ref(path)).await.unwrap();
        place.observed.requests.load(Ordering::Relaxed) - before
    };
    let alone = place.file(rows(1000), 300).await;
    assert_eq!(requests(&alone.path).await, 2, "the size and the footer");
    assert!(requests(&file.path).await > 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_successor_fences_even_before_it_writes() {
    let place = Place::new();
    let mut old = place.claim("old").await;
    let mut new = place.claim("new").await;
    let file = place.file(rows(1), 200).await;
    let error = old.commit(std::slice::from_ref(&file), Lsn(200), &note()).await.unwrap_err();
    assert!(matches!(error, Error::Fenced { .. }), "{error}");
    assert!(matches!(old.vacuum(&place.namer, Duration::ZERO).await, Err(Error::Fenced { .. })));
    new.commit(&[file], Lsn(200), &note()).await.unwrap();
    assert_eq!(new.totals().row_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeper_does_not_trust_a_trimmed_log() {
    let place = Place::new();
    let mut old = place.claim("old").await;
    let mut new = place.claim("new").await;
    for number in 1..=210 {
        new.commit(&[], Lsn(100 + number), &note()).await.unwrap();
        if number % 100 == 0 {
            place.age(Duration::from_hours(2));
        }
        new.maintain().await;
    }
    let next = place.folder.path().join("psi").join(entry_path(old.version() + 1).as_ref());
    assert!(!next.exists(), "the claim itself is trimmed");
    old.looked_at -= Duration::from_mins(90);
    for _ in 0..2 {
        let error = old.commit(&[], Lsn(200), &note()).await.unwrap_err();
        assert!(matches!(error, Error::Fenced { .. }), "{error}");
    }
    assert_eq!(place.claim("third").await.lsn(), Lsn(310), "what it wrote is not in the table");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_and_a_repair_never_add_the_same_rows() {
    let place = Place::new();
    let repair = async |session: &str| {
        Table::claim_for_repair(&place.storage, Kind::psi(), APP, session).await.unwrap()
    };
    let conflicts = |result: crate::Result<()>| matches!(result, Err(Error::Conflict { .. }));

    // A repair goes on beside the stream, and the stream beside it.
    let mut sidecar = place.claim("sidecar").await;
    let mut first = repair("first").await;
    sidecar.commit(&[place.file(rows(1), 200).await], Lsn(200), &note()).await.unwrap();
    first.look().await.unwrap();
    first.commit_copy(&[place.file(rows(2), 150).await], &[], &note()).await.unwrap();
    sidecar.commit(&[place.file(rows(4), 300).await], Lsn(300), &note()).await.unwrap();
    assert_eq!((sidecar.totals().row_count, sidecar.lsn()), (7, Lsn(300)));

    // A copy of the sidecar that was compared before the repair.
    let late = [place.file(rows(8), 300).await];
    let marks = [("1/16384".to_owned(), 700)];
    for _ in 0..2 {
        assert!(conflicts(sidecar.commit_copy(&late, &marks, &note()).await));
    }
    let mut sidecar = place.claim("sidecar again").await;
    let mut second = repair("second").await;
    sidecar.commit_copy(&late, &marks, &note()).await.unwrap();
    assert_eq!(sidecar.marks(&[marks[0].0.clone()]).await.unwrap().get("1/16384"), Some(&700));

    // A repair that was compared before that copy, whether it looks meanwhile or not.
    second.look().await.unwrap();
    assert!(conflicts(second.commit_copy(&[place.file(rows(16), 300).await], &[], &note()).await));
    let mut third = repair("third").await;
    let fenced = second.commit_copy(&[place.file(rows(16), 300).await], &[], &note()).await;
    assert!(fenced.is_err(), "a later repair has taken over");
    third.commit_copy(&[place.file(rows(16), 300).await], &[], &note()).await.unwrap();
    assert_eq!(place.claim("last").await.totals().row_count, 31);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ways_of_adding_up_agree() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let hour = 3_600_000_000;
    let batches = [psi(&[(NOON, "a", 1), (NOON + 1, "a", 2), (NOON + hour, "ü", 3)]), psi(&[(-1, "", -4)])];
    let mut rows = Vec::new();
    for (lsn, batch) in (200..).zip(batches) {
        each_digest(Kind::psi(), &batch, |time, digest| rows.push((time, digest))).unwrap();
        table.commit(&[place.file(batch, lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let expected = sums_of(rows.iter().copied());
    assert_eq!(expected.keys().copied().collect::<Vec<_>>(), [-1, NOON / hour, NOON / hour + 1]);
    let snapshot = Snapshot::read(&place.storage, Kind::psi(), APP).await.unwrap();
    assert_eq!(snapshot.lsn, Some(Lsn(201)));
    let files: Vec<&TableFile> = snapshot.files.iter().collect();
    let read = async |start, end| {
        hour_sums(&place.storage, Kind::psi(), &files, (start, end), Lsn::ZERO).await.unwrap()
    };
    assert_eq!(read(i64::MIN, i64::MAX).await, expected);
    let part = read(NOON + 1, NOON + hour).await;
    assert_eq!(part, sums_of(rows.iter().copied().filter(|row| row.0 == NOON + 1)));
    assert_eq!(part.values().map(|sum| sum.rows).sum::<u64>(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_recognised() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let file = place.file(rows(4), 200).await;
    place.observed.lose_next_answer.store(true, Ordering::Relaxed);
    table.commit(&[file], Lsn(200), &note()).await.unwrap();
    let file = place.file(rows(2), 300).await;
    table.commit(&[file], Lsn(300), &note()).await.unwrap();
    assert_eq!((table.totals().row_count, table.totals().file_count), (6, 2));
    drop(table);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.lsn()), (6, Lsn(300)));
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_entries_are_passed_over_and_foreign_columns_are_not() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let store = place.storage.table_store(Kind::psi());
    let foreign = r#"{"commitInfo":{"operation":"OPTIMIZE"}}
{"txn":{"appId":"somebody else","version":9}}"#;
    store.put(&entry_path(table.version() + 1), foreign.into()).await.unwrap();
    let file = place.file(rows(4), 200).await;
    table.commit(&[file], Lsn(200), &note()).await.unwrap();
    assert_eq!((table.version(), table.lsn()), (3, Lsn(200)));
    let changed = r#"{"metaData":{"schemaString":"{\"type\":\"struct\",\"fields\":[{\"name\":\"x\",\"type\":\"long\",\"nullable\":true,\"metadata\":{}}]}"}}"#;
    store.put(&entry_path(table.version() + 1), changed.into()).await.unwrap();
    let error = table.commit(&[], Lsn(300), &note()).await.unwrap_err();
    assert!(error.chain().contains("it has (x long)"), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_row_counts_that_went_to_another_folder() {
    let base = tempfile::tempdir().unwrap();
    let (folder, away) = (base.path().join("archive"), base.path().join("away"));
    let settings = ObjectStorageSettings::new(folder.to_str().unwrap(), "").unwrap();
    let storage = Storage::open(&settings).unwrap();
    let mut table = Table::claim(&storage, Kind::psi(), APP, "one", Lsn(100)).await.unwrap();
    let file = |lsn| {
        let file = encode(Kind::psi(), [rows(5)]).unwrap().unwrap();
        upload(&storage, Kind::psi(), Namer::new().name(Window::of(NOON, WindowWidth::DAY), Lsn(lsn)), file)
    };
    let uploaded = file(200).await.unwrap();
    std::fs::rename(&folder, &away).unwrap();
    let vanished = |error: Error| {
        let text = error.chain();
        assert!(text.contains("replaced or unmounted"), "{text}");
        assert!(matches!(error, Error::Storage { .. }) && error.is_transient(), "{text}");
    };
    vanished(table.commit(std::slice::from_ref(&uploaded), Lsn(200), &note()).await.unwrap_err());
    vanished(file(300).await.unwrap_err());
    assert!(!folder.exists(), "the path was made anew");
    // The mount point without its volume, even with a log that could go on.
    std::fs::create_dir_all(folder.join("psi/_delta_log")).unwrap();
    vanished(table.commit(std::slice::from_ref(&uploaded), Lsn(200), &note()).await.unwrap_err());
    assert_eq!(std::fs::read_dir(folder.join("psi/_delta_log")).unwrap().count(), 0);
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(&away, &folder).unwrap();
    table.commit(&[uploaded], Lsn(200), &note()).await.unwrap();
    assert_eq!((table.totals().row_count, table.lsn()), (5, Lsn(200)));
    // Only the table's part of it is gone.
    std::fs::rename(folder.join("psi"), &away).unwrap();
    let error = table.commit(&[], Lsn(300), &note()).await.unwrap_err();
    assert!(error.is_transient() && error.chain().contains("has vanished"), "{}", error.chain());
    assert!(!folder.join("psi").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_counts_once_its_name_is_synced() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let file = place.file(rows(5), 200).await;
    let log = place.folder.path().join("psi/_delta_log");
    synced::tests::fail_syncs(&log, 3);
    for _ in 0..4 {
        let landed = table.commit(std::slice::from_ref(&file), Lsn(200), &note()).await.is_ok();
        assert!(log.join("00000000000000000002.json").exists(), "the entry can be read");
        assert_eq!(landed, synced::tests::failures_left(&log) == 0);
        if landed {
            break;
        }
    }
    assert_eq!((table.totals().row_count, table.version()), (5, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_table_is_made_around_the_files_of_others() {
    let place = Place::new();
    let orphan = place.file(rows(1), 200).await;
    let store = place.storage.table_store(Kind::psi());
    let foreign = Path::from("models/x.parquet");
    store.put(&foreign, "x".into()).await.unwrap();
    let claim = || Table::claim(&place.storage, Kind::psi(), APP, "one", Lsn(100));
    let error = claim().await.unwrap_err();
    assert!(!error.is_transient());
    let folder = place.storage.table_url(Kind::psi()).to_string();
    assert!(error.chain().contains(&folder) && error.chain().contains(foreign.as_ref()), "{}", error.chain());
    assert!(!place.folder.path().join("psi/_delta_log").exists());
    store.delete(&foreign).await.unwrap();
    claim().await.unwrap();
    assert!(place.folder.path().join("psi").join(orphan.path).exists());
}
