//! Rows that change: each version becomes a row.

use super::*;
use crate::batch::QuarantinedRow;
use crate::tables::{ColumnSpec, ColumnType, Description, change_columns};

/// A table that keeps versions: its key, a text that may be long, and an entity by name.
fn orders(key: &[&str]) -> Kind {
    let of = |name: &str, column_type| ColumnSpec {
        source_type: Some("x".to_owned()),
        ..ColumnSpec::nullable(name, column_type)
    };
    let mut columns = vec![ColumnSpec::required("at", ColumnType::Timestamp)];
    columns.push(ColumnSpec::required("shop", ColumnType::String));
    columns.extend([of("id", ColumnType::Long), of("text", ColumnType::String)]);
    columns.extend(change_columns());
    Kind::described(Description {
        name: "orders".to_owned(),
        source: Some("orders".to_owned()),
        entity: Some(EntityKey { columns: vec!["shop".to_owned()], lookup: None }),
        columns,
        sort: Vec::new(),
        left_out: Vec::new(),
        row_key: key.iter().map(|key| (*key).to_owned()).collect(),
    })
}

/// A row behind a tag; `u` stands for a value that is not sent.
fn tuple(tag: u8, values: &[&str]) -> Vec<u8> {
    let message = insert(
        0,
        &values.iter().map(|value| (*value != "-" && *value != "u").then_some(*value)).collect::<Vec<_>>(),
    );
    let mut row = vec![tag];
    row.extend(&message[6..]);
    let mut place = 3;
    for value in values {
        match *value {
            "u" => row[place] = b'u',
            "-" => {}
            value => place += 4 + value.len(),
        }
        place += 1;
    }
    row
}

fn change(decoder: &mut Decoder, batches: &mut Batches, tag: u8, rows: &[Vec<u8>]) -> (bool, Inserted) {
    let mut message = vec![tag];
    message.extend(1_u32.to_be_bytes());
    rows.iter().for_each(|row| message.extend(row));
    match Message::parse(&message).unwrap() {
        Message::Update(update) => {
            (decoder.has_moved(&update).unwrap(), decoder.update(&update, batches).unwrap())
        }
        Message::Delete(delete) => (false, decoder.delete(&delete, batches).unwrap()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions_of_rows_say_what_made_them() {
    let kind = orders(&["id", "at"]);
    let mut decoder = Decoder::new("scouter", &[kind]);
    learn(&mut decoder, &relation(1, "orders", &[("id", 20), ("at", 1184), ("shop", 25), ("text", 25)]));
    let time = "2024-10-04 12:00:00+00";
    let row = |tag: u8, id: &str, shop: &str, text: &str| tuple(tag, &[id, time, shop, text]);
    let none = PerKind::new([kind, Kind::quarantine()], |_| Lsn::ZERO);
    decoder.begin(Begin { final_lsn: Lsn(77), commit_micros: NOW, xid: 7 }, &none);
    let mut batches = batches();
    let first = insert(1, &[Some("1"), TIME, Some("s"), Some("long")]);
    assert_eq!(put(&mut decoder, &mut batches, &first), Ok(Inserted::Done));
    for (tag, rows, expected) in [
        (b'U', vec![row(b'N', "1", "s", "u")], (false, Inserted::Done)),
        (b'U', vec![row(b'K', "1", "-", "-"), row(b'N', "2", "s", "u")], (true, Inserted::Done)),
        (b'U', vec![row(b'O', "2", "s", "long"), row(b'N', "2", "s", "x")], (false, Inserted::Done)),
        // The key alone: it names no shop.
        (b'D', vec![row(b'K', "2", "-", "-")], (false, Inserted::Done)),
        (b'D', vec![tuple(b'K', &["-", time, "-", "-"])], (false, Inserted::Quarantined)),
        (b'U', vec![tuple(b'N', &["1", time, "u", "x"])], (false, Inserted::Quarantined)),
    ] {
        assert_eq!(change(&mut decoder, &mut batches, tag, &rows), expected, "{rows:?}");
    }
    decoder.purge();
    assert_eq!(
        change(&mut decoder, &mut batches, b'D', &[row(b'K', "1", "-", "-")]),
        (false, Inserted::Done)
    );
    let mut found: Vec<String> = Vec::new();
    for file in batches.files().iter().filter(|file| file.kind() == kind) {
        let rows: Vec<_> = file.record_batches().map(Result::unwrap).collect();
        found.push(arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string());
    }
    let found = found.join("\n");
    for line in [
        "| s    | 1  | long | insert  | 77   | 1    |",
        "| s    | 1  |      | update  | 77   | 2    |",
        "| s    | 2  |      | update  | 77   | 3    |",
        "| s    | 2  | x    | update  | 77   | 4    |",
        "|      | 2  |      | delete  | 77   | 5    |",
    ] {
        assert!(found.contains(line), "{line} is not in\n{found}");
    }
    assert_eq!(found.matches("| text       |").count(), 2, "what was not sent is named\n{found}");
    assert_eq!(found.matches("delete").count(), 1, "a purge is no delete");
    let quarantined: Vec<&QuarantinedRow> = batches.quarantined().collect();
    assert!(quarantined[0].row.contains(r#""_change":"delete""#) && quarantined[0].reason == "id is null");
    assert_eq!(quarantined[1].reason, "shop was not sent, since the update has not changed it");
}

#[test]
fn a_copy_stands_before_the_point_and_a_time_that_may_have_changed_unseen_is_no_version() {
    let kind = orders(&["id"]);
    let mut decoder = Decoder::new("scouter", &[kind]);
    learn(&mut decoder, &relation(1, "orders", &[("id", 20), ("at", 1184), ("shop", 25), ("text", 25)]));
    let none = PerKind::new([kind, Kind::quarantine()], |_| Lsn::ZERO);
    decoder.begin(Begin { final_lsn: Lsn(77), commit_micros: NOW, xid: 7 }, &none);
    let mut batches = batches();
    let row = |tag, time| tuple(tag, &["1", time, "s", "x"]);
    let (noon, one) = ("2024-10-04 12:00:00+00", "2024-10-04 13:00:00+00");
    let alone = change(&mut decoder, &mut batches, b'U', &[row(b'N', noon)]);
    assert_eq!(alone, (false, Inserted::Quarantined));
    assert!(batches.quarantined().next().unwrap().reason.contains("replica identity full"));
    let moved = change(&mut decoder, &mut batches, b'U', &[row(b'O', noon), row(b'N', one)]);
    assert_eq!(moved, (true, Inserted::Done));
    decoder.begin_copy(Lsn(500), NOW, Settled::default());
    put(&mut decoder, &mut batches, &insert(1, &[Some("1"), TIME, Some("s"), Some("x")])).unwrap();
    let files = batches.files();
    let rows: Vec<_> = files
        .iter()
        .filter(|file| file.kind() == kind)
        .flat_map(|file| file.record_batches())
        .map(Result::unwrap)
        .collect();
    let found = arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string();
    assert!(found.contains("| copy    | 499  | 0    |"), "{found}");
}
