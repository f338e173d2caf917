use super::*;
use crate::tables::Entity;

const HOUR: (i64, i64) = (NOON, NOON + MICROS_PER_HOUR);

/// What a repair finds to be double, of what the source has.
async fn doubles(place: &Place, table: &Table, source: &RecordBatch) -> Doubles {
    let files: Vec<&TableFile> = table.files().collect();
    let mut present = Multiset::new(Kind::psi());
    present.read(&place.storage, &files, &[HOUR]).await.unwrap();
    assert_eq!(present.missing(source).unwrap().num_rows(), 0);
    let mut doubles = Doubles::new(Kind::psi());
    doubles.extend(HOUR, present.doubles());
    doubles
}

async fn archived(place: &Place, table: &Table) -> Multiset {
    let files: Vec<&TableFile> = table.files().collect();
    let mut rows = Multiset::new(Kind::psi());
    rows.read(&place.storage, &files, &[(i64::MIN, i64::MAX)]).await.unwrap();
    rows
}

async fn assert_holds(place: &Place, table: &Table, expected: &[(i64, &str, i32)]) {
    let mut rows = archived(place, table).await;
    assert_eq!((rows.row_count(), table.totals().row_count), (expected.len() as u64, expected.len() as u64));
    assert_eq!(rows.missing(&psi(expected)).unwrap().num_rows(), 0);
}

fn entity(name: &str) -> Entity {
    Entity { space: "space".to_owned(), name: name.to_owned(), version: "1".to_owned() }
}

/// A file with rows in no order, as somebody's OPTIMIZE may leave them; it has no name of ours.
async fn foreign(place: &Place, rows: RecordBatch) -> TableFile {
    let schema = Kind::psi().schema();
    let plain = rows.columns().iter().zip(schema.fields());
    let plain = plain.map(|(column, field)| arrow::compute::cast(column, field.data_type()).unwrap());
    let rows = RecordBatch::try_new(Kind::psi().schema(), plain.collect()).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    let bytes = bytes::Bytes::from(writer.into_inner().unwrap());
    let path = "part-00000-0000.parquet".to_owned();
    let store = place.storage.table_store(Kind::psi());
    let size = bytes.len() as u64;
    object_store::ObjectStoreExt::put(&store, &Path::from(path.as_str()), bytes.into()).await.unwrap();
    TableFile::new(Kind::psi(), path, size, 0, None)
}

#[tokio::test(flavor = "multi_thread")]
async fn surplus_copies_go_and_nothing_else_does() {
    let place = Place::new();
    let mut sidecar = place.claim("sidecar").await;
    let (a, b, late) = ((NOON, "a", 1), (NOON + 1, "b", 2), (NOON + 2 * MICROS_PER_HOUR, "a", 3));
    let history = (NOON + 5, "gone", 4);
    let twins = (NOON + 9, "twins", 5);
    // The source has `a` and `b` once, the twins twice, and nothing of the row that was deleted there.
    let source = psi(&[a, b, twins, twins]);
    let first = psi(&[a, late, b, history, history, twins, twins]);
    sidecar.commit(&[place.file(first, 200).await], Lsn(200), &note()).await.unwrap();
    // Both moved, `a` twice; one file has nothing else.
    sidecar.commit(&[place.file(psi(&[a, b]), 300).await], Lsn(300), &note()).await.unwrap();
    sidecar.commit(&[place.file(psi(&[a]), 400).await], Lsn(400), &note()).await.unwrap();

    let mut repair = Table::claim_for_repair(&place.storage, Kind::psi(), APP, "repair").await.unwrap();
    let found = doubles(&place, &repair, &source).await;
    assert_eq!((found.surplus(), found.copies()), (3, 5));
    let removal = repair.write_without(&place.namer, &found).await.unwrap().unwrap();
    assert_eq!((removal.row_count, removal.total), (3, 3));
    assert_eq!(removal.entities, [(entity("a"), 2), (entity("b"), 1)].into());
    assert!(repair.commit_removal(&removal).await.unwrap());
    let left = [a, late, b, history, history, twins, twins];
    assert_holds(&place, &repair, &left).await;
    // Repeated, as after an answer that was lost, it changes nothing.
    assert!(repair.commit_removal(&removal).await.unwrap());
    assert!(repair.write_without(&place.namer, &found).await.unwrap().is_none(), "no copy is too many now");
    assert_eq!(repair.files().count(), 1, "the small files had nothing else");

    // The session goes on beside it, and counts what was removed; so does its successor.
    sidecar.commit(&[place.file(psi(&[(NOON + 7, "c", 1)]), 500).await], Lsn(500), &note()).await.unwrap();
    let successor = place.claim("successor").await;
    for table in [&sidecar, &successor] {
        assert_eq!((table.totals().doubles_removed, table.lsn()), (3, Lsn(500)));
        assert_holds(&place, table, &[a, late, b, history, history, twins, twins, (NOON + 7, "c", 1)]).await;
    }
    let entry = std::fs::read_to_string(
        place.folder.path().join("psi").join(entry::entry_path(repair.version()).as_ref()),
    );
    let entry = entry.unwrap();
    assert!(
        entry.contains("\"operation\":\"DELETE\"") && entry.contains(&format!("{APP}/repair")),
        "{entry}"
    );
    assert!(entry.contains("\"dataChange\":true") && !entry.contains("\"dataChange\":false"), "{entry}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_file_is_written_anew_as_it_is() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let (a, b, ours) = ((NOON, "a", 1), (NOON + 1, "b", 2), (NOON + 4, "m", 1));
    table.commit(&[place.file(psi(&[ours]), 200).await], Lsn(200), &note()).await.unwrap();
    // Neither its order nor its statistics help.
    let (first, last) = ((NOON + 3, "z", 1), (NOON + 2, "a", 9));
    let file = foreign(&place, psi(&[first, b, last, a, b, a])).await;
    let entry = entry::to_bytes(&[file.add(true)]);
    let store = place.storage.table_store(Kind::psi());
    let version = entry::entry_path(table.version() + 1);
    object_store::ObjectStoreExt::put(&store, &version, entry.into()).await.unwrap();
    table.look().await.unwrap();
    let found = doubles(&place, &table, &psi(&[a, last, b, ours, first])).await;
    assert_eq!(found.surplus(), 2);
    let removal = table.write_without(&place.namer, &found).await.unwrap().unwrap();
    assert!(table.commit_removal(&removal).await.unwrap());
    assert_holds(&place, &table, &[a, last, b, ours, first]).await;
    let anew = table.files().find(|file| file.name.is_none()).unwrap();
    // It can't be merged by rules that hold for ours only, and may be removed by a vacuum once it is not active.
    assert!(anew.path.starts_with("part-") && anew.path != file.path, "{anew:?}");
    assert_eq!((anew.row_count, anew.min_time), (Some(4), Some(NOON)));
    let stats = anew.stats.as_deref().unwrap();
    let bounds = [("minValues", "a"), ("maxValues", "z")];
    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    assert!(bounds.iter().all(|(bound, name)| stats[bound]["name"] == *name), "{stats}");
}

/// Whoever compares rows meanwhile may take a surplus copy for one that the stream has missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_is_void_if_anybody_relies_on_the_copies() {
    let place = Place::new();
    let row = (NOON, "a", 1);
    let mut sidecar = place.claim("sidecar").await;
    for lsn in [200, 300] {
        sidecar.commit(&[place.file(psi(&[row]), lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let repair = async |session: &str| {
        Table::claim_for_repair(&place.storage, Kind::psi(), APP, session).await.unwrap()
    };
    let prepared = async |table: &Table| {
        let found = doubles(&place, table, &psi(&[row])).await;
        table.write_without(&place.namer, &found).await.unwrap().unwrap()
    };
    // A copy of the sidecar's has found nothing missing, in a partition that has the row twice by then.
    let mut first = repair("first").await;
    let removal = prepared(&first).await;
    sidecar.commit_copy(&[], &[("1/16384".to_owned(), 700)], &note()).await.unwrap();
    let conflict = first.commit_removal(&removal).await;
    assert!(matches!(conflict, Err(Error::Conflict { .. })), "{conflict:?}");

    // Another repair has taken over.
    let mut second = repair("second").await;
    let removal = prepared(&second).await;
    let mut third = repair("third").await;
    let fenced = second.commit_removal(&removal).await;
    assert!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");

    // A copy that has to stay is no longer where it was: a merge, or somebody who deletes.
    let removal = prepared(&third).await;
    let plan = sidecar.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY).remove(0);
    let merged = merge(&place.storage, &place.namer, &plan).await.unwrap();
    assert!(sidecar.commit_merge(&merged).await.unwrap());
    assert!(!third.commit_removal(&removal).await.unwrap());
    assert_holds(&place, &third, &[row, row]).await;
    let removal = prepared(&third).await;
    place.observed.lose_next_answer.store(true, Ordering::Relaxed);
    assert!(third.commit_removal(&removal).await.unwrap());
    assert_holds(&place, &third, &[row]).await;

    // And the other way round: a copy that has compared before the removal is void, though all that this did was remove a file.
    sidecar.commit(&[place.file(psi(&[row]), 400).await], Lsn(400), &note()).await.unwrap();
    let mut fourth = repair("fourth").await;
    let removal = prepared(&fourth).await;
    let mut sidecar = place.claim("sidecar again").await;
    assert!(fourth.commit_removal(&removal).await.unwrap());
    let void = sidecar.commit_copy(&[], &[("1/16384".to_owned(), 800)], &note()).await;
    assert!(matches!(void, Err(Error::Conflict { .. })), "{void:?}");
    assert_holds(&place, &fourth, &[row]).await;
}
