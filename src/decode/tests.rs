use proptest::prelude::*;

use super::*;
use crate::pgoutput::Message;
use crate::record::{MICROS_PER_DAY, WindowWidth};

const NOW: i64 = 20_000 * MICROS_PER_DAY;

/// A relation message of `scouter.<name>`.
fn relation(oid: u32, name: &str, columns: &[(&str, u32)]) -> Vec<u8> {
    let mut bytes = vec![b'R'];
    bytes.extend(oid.to_be_bytes());
    bytes.extend(b"scouter\0");
    bytes.extend(name.as_bytes());
    bytes.extend(b"\0d");
    bytes.extend(u16::try_from(columns.len()).unwrap().to_be_bytes());
    for (name, type_oid) in columns {
        bytes.push(0);
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.extend(type_oid.to_be_bytes());
        bytes.extend((-1_i32).to_be_bytes());
    }
    bytes
}

/// An insert message; `None` is null, texts go as text.
fn insert(oid: u32, values: &[Option<&str>]) -> Vec<u8> {
    let mut bytes = vec![b'I'];
    bytes.extend(oid.to_be_bytes());
    bytes.push(b'N');
    bytes.extend(u16::try_from(values.len()).unwrap().to_be_bytes());
    for value in values {
        match value {
            None => bytes.push(b'n'),
            Some(text) => {
                bytes.push(b't');
                bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                bytes.extend(text.as_bytes());
            }
        }
    }
    bytes
}

const PSI: &[(&str, u32)] = &[
    ("created_at", 1184),
    ("name", 25),
    ("space", 25),
    ("version", 25),
    ("feature", 25),
    ("bin_id", 23),
    ("bin_count", 23),
    ("archived", 16),
];

fn begin(decoder: &mut Decoder, final_lsn: u64, table_lsn: [u64; 4]) {
    let begin = Begin { final_lsn: Lsn(final_lsn), commit_micros: NOW, xid: 7 };
    decoder.begin(begin, table_lsn.map(Lsn));
}

fn learn(decoder: &mut Decoder, message: &[u8]) -> Vec<Notice> {
    match Message::parse(message).unwrap() {
        Message::Relation(relation) => decoder.relation(&relation),
        other => panic!("{other:?}"),
    }
}

fn put(decoder: &mut Decoder, batches: &mut Batches, message: &[u8]) -> Result<Inserted, InsertError> {
    match Message::parse(message)? {
        Message::Insert(insert) => decoder.insert(&insert, batches),
        other => panic!("{other:?}"),
    }
}

fn batches() -> Batches {
    Batches::new(WindowWidth::DAY, NOW)
}

const TIME: Option<&str> = Some("2024-10-04 12:00:00+00");

fn psi_row<'a>(created_at: Option<&'a str>, name: Option<&'a str>, bin_id: Option<&'a str>) -> Vec<u8> {
    insert(1, &[created_at, name, Some("s"), Some("1"), Some("f"), bin_id, Some("5"), Some("f")])
}

#[test]
fn a_row_that_fits_is_archived_and_one_that_does_not_is_quarantined_with_its_text() {
    let (mut decoder, mut batches) = (Decoder::new("scouter"), batches());
    assert_eq!(learn(&mut decoder, &relation(1, "psi_drift", PSI)), []);
    begin(&mut decoder, 100, [0; 4]);
    let good = psi_row(TIME, Some("m"), Some("3"));
    assert_eq!(put(&mut decoder, &mut batches, &good), Ok(Inserted::Done));
    for (row, reason) in [
        (psi_row(Some("infinity"), Some("m"), Some("3")), "created_at is infinity"),
        (
            psi_row(Some("20000-01-01 00:00:00+00"), Some("m"), Some("3")),
            "created_at is outside the years 0001 to 9999",
        ),
        (psi_row(TIME, None, Some("3")), "name is null"),
        (psi_row(TIME, Some("m"), Some("99999999999")), "bin_id does not fit 32 bits"),
        (psi_row(TIME, Some("m"), Some("x")), "bin_id has bytes that are not of its type"),
    ] {
        let before = batches.row_count();
        assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Quarantined), "{reason}");
        assert_eq!(batches.row_count(), before + 1);
        assert!(format!("{batches:?}").contains(reason), "{reason}");
    }
    assert!(format!("{batches:?}").contains(r#"\"bin_id\":\"99999999999\""#));
}

#[test]
fn a_table_skips_what_it_already_has() {
    let mut decoder = Decoder::new("scouter");
    learn(&mut decoder, &relation(1, "psi_drift", PSI));
    let (good, bad) = (psi_row(TIME, Some("m"), Some("3")), psi_row(Some("infinity"), Some("m"), Some("3")));
    // custom, psi, spc, quarantine; the transaction's commit record begins at 100.
    for (lsns, good_rows, bad_rows) in [
        ([0, 100, 0, 0], 1, 1),
        ([0, 101, 0, 101], 0, 0),
        ([101, 0, 101, 101], 1, 0),
        // The quarantine is committed first, so a table that has the transaction speaks for both.
        ([0, 101, 0, 0], 0, 0),
    ] {
        let mut batches = batches();
        begin(&mut decoder, 100, lsns);
        put(&mut decoder, &mut batches, &good).unwrap();
        assert_eq!(batches.row_count(), good_rows, "{lsns:?}");
        put(&mut decoder, &mut batches, &bad).unwrap();
        assert_eq!(batches.row_count(), good_rows + bad_rows, "{lsns:?}");
    }
}

#[test]
fn entities_come_from_the_stream_or_a_look_up() {
    let (mut decoder, mut batches) = (Decoder::new("scouter"), batches());
    let columns = [("created_at", 1184), ("entity_id", 23), ("metric", 25), ("value", 701)];
    assert_eq!(learn(&mut decoder, &relation(1, "custom_drift", &columns)), []);
    let entity_columns =
        [("id", 23), ("uid", 25), ("space", 25), ("name", 25), ("version", 25), ("drift_type", 25)];
    assert_eq!(learn(&mut decoder, &relation(2, "drift_entities", &entity_columns)), []);
    begin(&mut decoder, 100, [0; 4]);
    let row = |id| insert(1, &[TIME, Some(id), Some("m"), None]);
    assert_eq!(put(&mut decoder, &mut batches, &row("7")), Ok(Inserted::UnknownEntity(7)));
    assert!(batches.is_empty());
    put(&mut decoder, &mut batches, &insert(2, &[Some("7"), None, Some("s"), Some("n"), Some("1"), None]))
        .unwrap();
    assert_eq!(put(&mut decoder, &mut batches, &row("7")), Ok(Inserted::Done));
    assert_eq!(put(&mut decoder, &mut batches, &row("8")), Ok(Inserted::UnknownEntity(8)));
    decoder.resolve(8, None);
    assert_eq!(put(&mut decoder, &mut batches, &row("8")), Ok(Inserted::Quarantined));
    decoder.forget_unresolved();
    assert_eq!(put(&mut decoder, &mut batches, &row("8")), Ok(Inserted::UnknownEntity(8)));
    decoder.resolve(8, Some(Entity { space: "s".into(), name: "other".into(), version: "1".into() }));
    assert_eq!(put(&mut decoder, &mut batches, &row("8")), Ok(Inserted::Done));
    let names: Vec<String> = batches.entity_spans().into_iter().map(|span| span.entity.name).collect();
    assert_eq!(names, ["n", "other"]);
    // A number belongs to its batches: others start anew.
    let mut next = self::batches();
    put(&mut decoder, &mut next, &row("8")).unwrap();
    assert_eq!(next.entity_spans()[0].entity.name, "other");
}

#[test]
fn what_an_earlier_session_quarantined_stays_there() {
    let (mut decoder, mut batches) = (Decoder::new("scouter"), batches());
    let columns = [("created_at", 1184), ("entity_id", 23), ("metric", 25), ("value", 701)];
    learn(&mut decoder, &relation(1, "custom_drift", &columns));
    let row = insert(1, &[TIME, Some("8"), Some("m"), None]);
    begin(&mut decoder, 100, [0; 4]);
    decoder.resolve(8, None);
    put(&mut decoder, &mut batches, &row).unwrap();
    let quarantined = batches.files()[0].record_batches().next().unwrap().unwrap();
    let text = |column: usize| {
        arrow::array::AsArray::as_string::<i32>(quarantined.column(column)).value(0).to_owned()
    };
    let settled = unresolved(&text(2), &text(3), &text(4));
    assert_eq!(settled, Some((Lsn(100), 8)));

    // The quarantine was committed, custom was not; by now the entity exists.
    let mut decoder = Decoder::new("scouter");
    decoder.settle(settled.into_iter().collect());
    learn(&mut decoder, &relation(1, "custom_drift", &columns));
    decoder.resolve(8, Some(Entity { space: "s".into(), name: "n".into(), version: "1".into() }));
    for (final_lsn, rows) in [(100, 0), (200, 1)] {
        begin(&mut decoder, final_lsn, [0, 0, 0, 101]);
        let mut batches = self::batches();
        put(&mut decoder, &mut batches, &row).unwrap();
        assert_eq!(batches.row_count(), rows, "{final_lsn}");
    }
}

#[test]
fn a_surprise_is_told_once_by_name() {
    let mut decoder = Decoder::new("scouter");
    let mut columns = PSI.to_vec();
    columns.push(("shade", 25));
    let told = learn(&mut decoder, &relation(1, "psi_drift", &columns));
    let notice = Notice::ColumnNotArchived { table: "scouter.psi_drift".into(), column: "shade".into() };
    assert_eq!(told, [notice]);
    assert_eq!(learn(&mut decoder, &relation(1, "psi_drift", &columns)), []);
    let told = learn(&mut decoder, &relation(1, "psi_drift", &PSI[..6]));
    assert!(matches!(&told[..], [Notice::ColumnMissing { column, .. }] if column == "bin_count"), "{told:?}");
    // The stream describes partitions, too; only a row of another table is a surprise.
    assert_eq!(learn(&mut decoder, &relation(3, "psi_drift_default", PSI)), []);
    let mut batches = batches();
    assert_eq!(put(&mut decoder, &mut batches, &insert(3, &[])), Ok(Inserted::NotArchived));
    assert!(batches.is_empty());
}

#[test]
fn a_row_of_the_wrong_width_ends_the_stream() {
    let (mut decoder, mut batches) = (Decoder::new("scouter"), batches());
    assert_eq!(put(&mut decoder, &mut batches, &insert(9, &[])), Err(InsertError::UnknownRelation(9)));
    learn(&mut decoder, &relation(1, "psi_drift", PSI));
    let short = put(&mut decoder, &mut batches, &insert(1, &[TIME]));
    assert_eq!(short, Err(InsertError::ColumnCount { values: 1, columns: 8 }));
    let mut long = psi_row(TIME, Some("m"), Some("3"));
    long.push(0);
    assert_eq!(
        put(&mut decoder, &mut batches, &long),
        Err(InsertError::Tuple(DecodeError::Trailing { bytes: 1 }))
    );
    assert!(batches.is_empty());
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::parse(&bytes);
    }

    /// A well-formed row with bytes changed: whatever comes out, nothing panics, and nothing is half
    /// appended.
    #[test]
    fn no_mutation_panics(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let (mut decoder, mut batches) = (Decoder::new("scouter"), batches());
        learn(&mut decoder, &relation(1, "psi_drift", PSI));
        let mut row = psi_row(TIME, Some("m"), Some("3"));
        for (place, byte) in changes {
            let place = place.index(row.len());
            row[place] = byte;
        }
        if let Ok(Message::Insert(insert)) = Message::parse(&row) {
            let result = decoder.insert(&insert, &mut batches);
            prop_assert_eq!(batches.row_count(), u64::from(matches!(result, Ok(Inserted::Done | Inserted::Quarantined))));
        }
        for file in batches.files() {
            for batch in file.record_batches() {
                prop_assert!(batch.is_ok());
            }
        }
    }
}
