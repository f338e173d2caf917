mod versions;

use proptest::prelude::*;

use super::*;
use crate::batch::FileRows;
use crate::pgoutput::Message;
use crate::tables::{MICROS_PER_DAY, WindowWidth};

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
    let [custom, psi, spc, quarantine] = table_lsn.map(Lsn);
    let lsn = |kind| match kind {
        kind if kind == Kind::custom() => custom,
        kind if kind == Kind::psi() => psi,
        kind if kind == Kind::spc() => spc,
        _ => quarantine,
    };
    let kinds = Kind::drift().into_iter().chain([Kind::quarantine()]);
    decoder.begin(begin, &PerKind::new(kinds, lsn));
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
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
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
    let mut decoder = Decoder::new("scouter", &Kind::drift());
    learn(&mut decoder, &relation(1, "psi_drift", PSI));
    let (good, bad) = (psi_row(TIME, Some("m"), Some("3")), psi_row(Some("infinity"), Some("m"), Some("3")));
    // custom, psi, spc, quarantine; the transaction's commit record begins at 100.
    for (lsns, good_rows, bad_rows) in [
        ([0, 100, 0, 0], 1, 1),
        ([0, 101, 0, 101], 0, 0),
        ([101, 0, 101, 0], 1, 1),
        // The quarantine is committed first, so a table that has the transaction speaks for both.
        ([0, 101, 0, 0], 0, 0),
        // The quarantine has the transaction, but not this row of it: it was decided otherwise then.
        ([0, 0, 0, 101], 1, 1),
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
fn types_are_known_by_their_form_and_others_are_readable_as_text() {
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
    let columns =
        [("created_at", 1184), ("name", 25), ("space", 70_001), ("version", 25), ("feature", 70_002)];
    let message = relation(1, "spc_drift", &[&columns[..], &[("value", 600)]].concat());
    let Message::Relation(described) = Message::parse(&message).unwrap() else { panic!("a relation") };
    assert_eq!(decoder.unknown_types(&described), [70_001, 70_002, 600]);
    decoder.learn_type(70_001, Some(25));
    decoder.learn_type(70_002, None);
    decoder.learn_type(600, None);
    assert!(decoder.unknown_types(&described).is_empty());
    decoder.relation(&described);
    assert!(decoder.has_unreadable(1) && !decoder.has_unreadable(2));
    begin(&mut decoder, 100, [0; 4]);
    let row = insert(1, &[TIME, Some("n"), Some("s"), Some("1"), None, Some("1.50")]);
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Quarantined));
    let shown = format!("{batches:?}");
    assert!(shown.contains("value has a type (oid 600) that is not supported"), "{shown}");
    assert!(shown.contains(r#"\"value\":\"1.50\""#), "{shown}");
    assert!(is_about_column("value has a type (oid 600) that is not supported"));
    assert!(is_about_column("feature is missing from the table") && !is_about_column("feature is null"));
    decoder.learn_type(600, Some(701));
    decoder.relation(&described);
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Done), "a null has no type");
}

#[test]
fn texts_of_another_encoding_are_asked_for_once() {
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
    decoder.ask_for_texts();
    learn(&mut decoder, &relation(1, "psi_drift", &[PSI, &[("note", 25)]].concat()));
    begin(&mut decoder, 100, [0; 4]);
    let row = |name, note| {
        let values =
            [TIME, Some(name), Some("s"), Some("1"), Some("f"), Some("3"), Some("5"), None, Some(note)];
        insert(1, &values)
    };
    // In the tests' own UTF-8, which here is any encoding.
    let asked = |decoder: &mut Decoder, batches: &mut Batches, row: &[u8], answer: Option<&str>| {
        assert_eq!(put(decoder, batches, row), Ok(Inserted::UnknownText));
        let text = decoder.unknown_text().to_vec();
        decoder.learn_text(answer.map(str::to_owned));
        String::from_utf8(text).unwrap()
    };
    let good = row("é", "never archived: ü");
    assert_eq!(asked(&mut decoder, &mut batches, &good, Some("café")), "é");
    assert_eq!(put(&mut decoder, &mut batches, &good), Ok(Inserted::Done));
    assert_eq!(put(&mut decoder, &mut batches, &good), Ok(Inserted::Done), "it is known");
    assert_eq!(batches.entity_spans()[0].entity.name, "café");
    let bad = row("ö", "ä");
    assert_eq!(asked(&mut decoder, &mut batches, &bad, None), "ö");
    assert_eq!(asked(&mut decoder, &mut batches, &bad, Some("what is not archived, too")), "ä");
    assert_eq!(put(&mut decoder, &mut batches, &bad), Ok(Inserted::Quarantined));
    let shown = format!("{batches:?}");
    assert!(shown.contains("what is not archived, too") && shown.contains(r"\\\\xc3\\\\xb6"), "{shown}");
    assert!(shown.contains("name has bytes that are not UTF-8"), "{shown}");
}

#[test]
fn an_entity_that_cannot_be_archived_keeps_its_own_rows_with_the_reason() {
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
    let columns = [("created_at", 1184), ("entity_id", 23), ("metric", 25), ("value", 701)];
    learn(&mut decoder, &relation(1, "custom_drift", &columns));
    begin(&mut decoder, 100, [0; 4]);
    let row = insert(1, &[TIME, Some("7"), Some("m"), None]);
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::UnknownEntity(7)));
    decoder.resolve_unfit(7, "names an entity whose space is null".to_owned());
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Quarantined));
    assert!(format!("{batches:?}").contains("\"entity_id names an entity whose space is null\""));
    decoder.forget_unresolved();
    assert_eq!(
        put(&mut decoder, &mut batches, &row),
        Ok(Inserted::UnknownEntity(7)),
        "it may have been mended"
    );
}

#[test]
fn entities_come_from_the_stream_or_a_look_up() {
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
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

/// The rows of a quarantine file, as a session that starts again reads them.
fn settled(batches: &Batches) -> Settled {
    let mut settled = Settled::new(&Kind::drift());
    for file in batches.files().iter().filter(|file| file.kind().is_quarantine()) {
        for batch in file.record_batches() {
            let batch = batch.unwrap();
            let text = |column: usize| arrow::array::AsArray::as_string::<i32>(batch.column(column)).clone();
            for row in 0..batch.num_rows() {
                settled.add(text(1).value(row), text(3).value(row), text(4).value(row));
            }
        }
    }
    settled
}

#[test]
fn after_a_crash_behind_the_quarantine_its_rows_stay_and_all_others_are_decided_anew() {
    let columns = [("created_at", 1184), ("entity_id", 23), ("metric", 25), ("value", 701)];
    let known = |name: &str| Some(Entity { space: "s".into(), name: name.into(), version: "1".into() });
    let row = |id, time| insert(1, &[Some(time), Some(id), Some("m"), None]);
    let time = "2024-10-04 12:00:00+00";
    // 8 is unknown at first and known for its second row; 7 is known; one row has no time that can be kept.
    let rows = [row("8", time), row("7", time), row("7", "infinity"), row("8", time)];
    let (mut decoder, mut first) = (Decoder::new("scouter", &Kind::drift()), batches());
    learn(&mut decoder, &relation(1, "custom_drift", &columns));
    begin(&mut decoder, 100, [0; 4]);
    decoder.resolve(7, known("seven"));
    decoder.resolve(8, None);
    for (position, row) in rows.iter().enumerate() {
        if position == 3 {
            decoder.resolve(8, known("eight"));
        }
        put(&mut decoder, &mut first, row).unwrap();
    }
    assert_eq!(first.files().iter().map(FileRows::row_count).collect::<Vec<_>>(), [2, 2]);

    // The quarantine was committed, custom was not. By now 7 is gone and 8 is known.
    let (mut decoder, mut second) = (Decoder::new("scouter", &Kind::drift()), batches());
    decoder.settle(settled(&first));
    learn(&mut decoder, &relation(1, "custom_drift", &columns));
    begin(&mut decoder, 100, [0, 0, 0, 101]);
    decoder.resolve(7, None);
    decoder.resolve(8, known("eight"));
    for row in &rows {
        put(&mut decoder, &mut second, row).unwrap();
    }
    // One row of 8 is new for custom, one of 7 for the quarantine; with the two that are there that makes four.
    let kinds: Vec<_> = second.files().iter().map(|file| (file.kind(), file.row_count())).collect();
    assert_eq!(kinds, [(Kind::quarantine(), 1), (Kind::custom(), 1)]);
}

#[test]
fn a_partition_that_is_published_as_itself_is_adopted() {
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
    learn(&mut decoder, &relation(7, "psi_drift_p2024_10_04", PSI));
    begin(&mut decoder, 100, [0; 4]);
    let row = insert(7, &[TIME, Some("m"), Some("s"), Some("1"), Some("f"), Some("3"), Some("5"), Some("f")]);
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::NotArchived));
    decoder.adopt(7, Kind::psi(), "scouter.psi_drift");
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Done));
    // ... and stays it when it is described again.
    learn(&mut decoder, &relation(7, "psi_drift_p2024_10_04", PSI));
    assert_eq!(put(&mut decoder, &mut batches, &row), Ok(Inserted::Done));
    assert_eq!(batches.files()[0].kind(), Kind::psi());
}

#[test]
fn a_surprise_is_told_once_by_name() {
    let mut decoder = Decoder::new("scouter", &Kind::drift());
    let mut columns = PSI.to_vec();
    columns.push(("shade", 25));
    columns.push(("a shade", 25));
    let told = learn(&mut decoder, &relation(1, "psi_drift", &columns));
    let notice = Notice::ColumnNotArchived { table: "scouter.psi_drift".into(), column: "a shade".into() };
    assert_eq!(told, [notice], "the other one can be added");
    let new = decoder.new_columns(1);
    assert!(
        matches!(&new[..], [NewColumn { name, type_oid: 25, modifier: -1, .. }] if name == "shade"),
        "{new:?}"
    );
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
    let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
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
        let (mut decoder, mut batches) = (Decoder::new("scouter", &Kind::drift()), batches());
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
