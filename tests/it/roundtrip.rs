//! Postgres is the judge: random values of every column, inserted with SQL, decoded from the stream in its
//! text and in its binary form, are what SQL says was inserted.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use highwater::tables::{Entity, Kind};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio_postgres::Client;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::support::archive::{Cell, cells_text, compare_rows, row_text};
use crate::support::schema::{KINDS, Shape, Source};
use crate::support::stage::Stage;
use crate::support::stream::{Decoded, decode, join, messages, tables};

/// Rows per table: enough for every special value to come up in every column, few enough for seconds.
const ROWS: usize = 1_500;

/// Rows per table in the recorded streams of `tests/golden`.
const GOLDEN_ROWS: usize = 40;

/// Any time will do for the choice of windows; a fixed one lets recorded streams decode the same for ever.
pub(crate) const NOW_MICROS: i64 = 1_795_000_000_000_000;

/// PostgreSQL's timestamps, microseconds since 2000: from 4714-11-24 BC to before the year 294277.
const TIMES: std::ops::Range<i64> = -211_813_488_000_000_000..9_223_371_331_200_000_000;

/// Those of the years 1 to 9999.
const CALENDAR: std::ops::Range<i64> = -63_082_281_600_000_000..252_455_616_000_000_000;

/// A time in the server's own form, so that no library's calendar narrows what is tried.
#[derive(Debug)]
struct Time(i64);

impl ToSql for Time {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.put_i64(self.0);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::TIMESTAMPTZ | Type::TIMESTAMP)
    }

    to_sql_checked!();
}

/// One time in fifteen a null, where the archive may or may not have room for it.
fn maybe<T>(rng: &mut StdRng, value: impl FnOnce(&mut StdRng) -> T) -> Option<T> {
    (!rng.random_bool(1.0 / 15.0)).then(|| value(rng))
}

fn pick<T: Copy>(rng: &mut StdRng, values: &[T]) -> T {
    values[rng.random_range(0..values.len())]
}

fn time(rng: &mut StdRng) -> Time {
    Time(match rng.random_range(0..10) {
        0 => pick(rng, &[i64::MAX, i64::MIN]),
        1 => pick(
            rng,
            &[TIMES.start, TIMES.end - 1, CALENDAR.start, CALENDAR.start - 1, CALENDAR.end, CALENDAR.end - 1],
        ),
        2 => rng.random_range(TIMES),
        3 => rng.random_range(CALENDAR.start - 40_000_000_000_000..CALENDAR.start + 40_000_000_000_000),
        4 => rng.random_range(0..1_000) * 86_400_000_000,
        5 => rng.random_range(-5_000_000..5_000_000),
        _ => rng.random_range(CALENDAR),
    })
}

fn text(rng: &mut StdRng) -> String {
    const ODD: [&str; 12] =
        ["", " ", "'", "\"", "\\", "\n", "\r\n\t", "🦀", "größe", "漢字", "\u{202e}", "{\"a\": null}"];
    let parts = if rng.random_range(0..100) == 0 { 1_000 } else { rng.random_range(0..5) };
    let part = |rng: &mut StdRng| match rng.random_range(0..3) {
        0 => pick(rng, &ODD).to_owned(),
        1 => pick(rng, &["a", "b", "feature_1", "null", "NaN"]).to_owned(),
        // Any character but the zero byte, which no text of PostgreSQL holds.
        _ => char::from_u32(rng.random_range(1..0x11_0000)).unwrap_or('?').to_string(),
    };
    (0..parts).map(|_| part(rng)).collect()
}

/// Any bits; but one NaN only, since the text form knows no other.
fn double(rng: &mut StdRng) -> f64 {
    let value = match rng.random_range(0..6) {
        0 => pick(
            rng,
            &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, f64::MAX, f64::MIN, f64::MIN_POSITIVE],
        ),
        // Subnormal.
        1 => f64::from_bits(rng.random_range(1..1_u64 << 52)),
        2 => f64::from(rng.random_range(-1_000_000..1_000_000)) / 1e3,
        3 => 10_f64.powi(rng.random_range(-8..18)) * f64::from(rng.random_range(1..10)),
        _ => f64::from_bits(rng.random()),
    };
    if value.is_nan() { f64::NAN } else { value }
}

fn float(rng: &mut StdRng) -> f32 {
    let value = match rng.random_range(0..5) {
        0 => pick(
            rng,
            &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE],
        ),
        1 => f32::from_bits(rng.random_range(1..1_u32 << 23)),
        2 => 10_f32.powi(rng.random_range(-8..9)),
        _ => f32::from_bits(rng.random()),
    };
    if value.is_nan() { f32::NAN } else { value }
}

/// Widths of 2, 4 and 8 bytes; the archive has 4.
fn wide(rng: &mut StdRng) -> i64 {
    match rng.random_range(0..4) {
        0 => pick(
            rng,
            &[i64::MIN, i64::MAX, i64::from(i32::MIN), i64::from(i32::MAX), i64::from(i32::MAX) + 1],
        ),
        1 => rng.random(),
        _ => rng.random_range(-100_000..100_000),
    }
}

/// The tables with every type that the decoder takes, and with nulls allowed everywhere. `n` is a column that
/// the archive does not have.
fn tables_sql(shape: Shape) -> String {
    let entity = |id: &str| match shape {
        Shape::Named => "space text, name varchar(9000), version text".to_owned(),
        Shape::Entity => format!("entity_id {id}"),
    };
    format!(
        "drop schema scouter cascade; create schema scouter;
         create table scouter.drift_entities (id bigint, space text, name text, version text);
         create table scouter.custom_drift
             (n bigint, created_at timestamptz, {}, metric text, value double precision);
         create table scouter.psi_drift
             (created_at timestamp, n bigint, {}, feature varchar(9000), bin_id smallint, bin_count bigint);
         create table scouter.spc_drift (created_at timestamptz, {}, n bigint, value real, feature text);
         create publication random for table scouter.custom_drift, scouter.psi_drift, scouter.spc_drift,
             scouter.drift_entities with (publish = 'insert', publish_via_partition_root = true)",
        entity("integer"),
        entity("bigint"),
        entity("smallint"),
    )
}

/// Ids 1 to 20 are there before the slot, 21 to 40 come through it, 41 to 45 never come.
async fn insert_entities(client: &Client, rng: &mut StdRng, ids: std::ops::RangeInclusive<i64>) {
    for id in ids {
        let sql = "insert into scouter.drift_entities values ($1, $2, $3, $4)";
        client.execute(sql, &[&id, &text(rng), &text(rng), &text(rng)]).await.unwrap();
    }
}

async fn insert_row(client: &Client, rng: &mut StdRng, shape: Shape, kind: Source, number: i64) {
    let created_at = maybe(rng, time);
    let names: Vec<Option<String>> = (0..3).map(|_| maybe(rng, text)).collect();
    let id = maybe(rng, |rng| rng.random_range(1..=45_i64));
    let (id_2, id_4) = (id.map(|id| id as i16), id.map(|id| id as i32));
    let series = maybe(rng, text);
    let (value, real) = (maybe(rng, double), maybe(rng, float));
    let (bin_id, bin_count) = (maybe(rng, |rng| rng.random::<i16>()), maybe(rng, wide));
    let mut columns = vec!["n", "created_at"];
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&number, &created_at];
    match shape {
        Shape::Named => {
            columns.extend(["space", "name", "version"]);
            values.extend(names.iter().map(|name| name as &(dyn ToSql + Sync)));
        }
        Shape::Entity => {
            columns.push("entity_id");
            values.push(match kind {
                Source::Custom => &id_4,
                Source::Psi => &id,
                Source::Spc => &id_2,
            });
        }
    }
    columns.extend(kind.value_columns());
    values.push(&series);
    match kind {
        Source::Custom => values.push(&value),
        Source::Spc => values.push(&real),
        Source::Psi => values.extend([&bin_id as &(dyn ToSql + Sync), &bin_count]),
    }
    let places: Vec<String> = (1..=values.len()).map(|place| format!("${place}")).collect();
    let sql = format!(
        "insert into scouter.{} ({}) values ({})",
        kind.table(),
        columns.join(", "),
        places.join(", ")
    );
    let statement = client.prepare(&sql).await.unwrap();
    client.execute(&statement, &values).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// A database with random rows, and a slot that holds them.
async fn fill(stage: &Stage, rng: &mut StdRng, rows: usize) -> Client {
    let client = stage.connect().await;
    // What is compared as text must be rendered in one way.
    client.batch_execute("set timezone = 'UTC'; set datestyle = 'ISO'").await.unwrap();
    client.batch_execute(&tables_sql(stage.shape)).await.unwrap();
    insert_entities(&client, rng, 1..=20).await;
    client
        .execute("select pg_create_logical_replication_slot($1, 'pgoutput')", &[&stage.name])
        .await
        .unwrap();
    insert_entities(&client, rng, 21..=40).await;
    for number in 0..rows {
        // Now and then a transaction of several rows.
        let begins = number % 10 == 0;
        if begins {
            client.batch_execute("begin").await.unwrap();
        }
        for kind in KINDS {
            insert_row(&client, rng, stage.shape, kind, i64::try_from(number).unwrap()).await;
        }
        if number % 10 == 5 {
            client.batch_execute("commit").await.unwrap();
        }
    }
    client.batch_execute("commit").await.unwrap();
    client
}

/// The stream in one of its two forms.
async fn stream(stage: &Stage, client: &Client, binary: bool) -> Vec<Vec<u8>> {
    let sql = format!(
        "select data from pg_logical_slot_peek_binary_changes('{}', null, null, 'proto_version', '1',
                'publication_names', 'random', 'binary', '{binary}')",
        stage.name
    );
    client.query(&sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn entities(client: &Client) -> HashMap<i64, Entity> {
    let rows =
        client.query("select id, space, name, version from scouter.drift_entities", &[]).await.unwrap();
    let entity =
        |row: &tokio_postgres::Row| Entity { space: row.get(1), name: row.get(2), version: row.get(3) };
    rows.iter().map(|row| (row.get(0), entity(row))).collect()
}

/// Which rows the archive has room for.
fn fits(shape: Shape, kind: Source) -> String {
    let entity = match shape {
        Shape::Named => "d.space is not null and d.name is not null and d.version is not null",
        Shape::Entity => "e.id is not null",
    };
    let own = match kind {
        Source::Custom => "d.metric is not null",
        Source::Psi => {
            "d.feature is not null and d.bin_id is not null and d.bin_count between -2147483648 and 2147483647"
        }
        Source::Spc => "true",
    };
    format!(
        "coalesce(isfinite(d.created_at) and d.created_at >= '0001-01-01' and d.created_at < '10000-01-01'
                  and {entity} and {own}, false)"
    )
}

/// What SQL says the archive of a kind must hold.
async fn expected_rows(client: &Client, shape: Shape, kind: Source) -> Vec<String> {
    let names = match shape {
        Shape::Named => "d.space, d.name, d.version",
        Shape::Entity => "e.space, e.name, e.version",
    };
    let values = match kind {
        Source::Custom => "d.metric, d.value, null::int, null::int",
        Source::Spc => "d.feature, d.value::double precision, null::int, null::int",
        Source::Psi => "d.feature, null::double precision, d.bin_id::int, d.bin_count::int",
    };
    let sql = format!(
        "select (extract(epoch from d.created_at) * 1000000)::bigint, {names}, {values}
           from scouter.{} d {} where {}",
        kind.table(),
        join_sql(shape),
        fits(shape, kind)
    );
    let rows = client.query(&sql, &[]).await.unwrap();
    let text = |row: &tokio_postgres::Row| {
        let name = |index| row.get::<_, Option<&str>>(index).map(Cell::Text);
        let mut cells = vec![Some(Cell::Integer(row.get(0))), name(1), name(2), name(3), name(4)];
        match kind {
            Source::Psi => {
                cells.extend([6, 7].map(|index| Some(Cell::Integer(row.get::<_, i32>(index).into()))))
            }
            Source::Custom | Source::Spc => cells.push(row.get::<_, Option<f64>>(5).map(Cell::Double)),
        }
        cells_text(cells)
    };
    rows.iter().map(text).collect()
}

fn join_sql(shape: Shape) -> &'static str {
    match shape {
        Shape::Named => "",
        Shape::Entity => "left join scouter.drift_entities e on e.id = d.entity_id",
    }
}

/// What SQL says the quarantine must hold: the table, and every column as text.
async fn expected_quarantine(client: &Client, shape: Shape) -> Vec<String> {
    let mut expected = Vec::new();
    for kind in KINDS {
        let sql = "select attname::text from pg_attribute where attrelid = $1::text::regclass and attnum > 0";
        let columns = client.query(sql, &[&format!("scouter.{}", kind.table())]).await.unwrap();
        let columns: Vec<String> = columns.iter().map(|row| row.get(0)).collect();
        let texts: Vec<String> = columns.iter().map(|column| format!("d.{column}::text")).collect();
        let sql = format!(
            "select {} from scouter.{} d {} where not {}",
            texts.join(", "),
            kind.table(),
            join_sql(shape),
            fits(shape, kind)
        );
        for row in client.query(&sql, &[]).await.unwrap() {
            let cells = columns.iter().enumerate();
            let cells =
                cells.map(|(index, column)| (column.clone(), row.get::<_, Option<String>>(index).into()));
            let object: serde_json::Map<_, _> = cells.collect();
            let row = serde_json::Value::Object(object);
            expected.push(format!("scouter.{} {}", kind.table(), by_number(kind.table(), row)));
        }
    }
    expected
}

/// The decoded rows of a kind as canonical texts.
pub(crate) fn decoded_rows(decoded: &Decoded, kind: Kind) -> Vec<String> {
    let tables = tables(&decoded.batches).into_iter().filter(|(table, _)| *table == kind);
    tables.flat_map(|(_, batch)| (0..batch.num_rows()).map(move |row| row_text(&batch, row))).collect()
}

/// A quarantined row with its double spelt in one way: of several shortest texts for one number, Postgres and
/// Rust may choose different ones.
fn by_number(table: &str, mut row: serde_json::Value) -> serde_json::Value {
    if let Some(serde_json::Value::String(text)) = row.get_mut("value") {
        *text = match table.ends_with("spc_drift") {
            true => format!("{:?}", text.parse::<f32>().expect("a number")),
            false => format!("{:?}", text.parse::<f64>().expect("a number")),
        };
    }
    row
}

/// The quarantined rows in the form of [`expected_quarantine`].
fn decoded_quarantine(decoded: &Decoded) -> Vec<String> {
    use arrow::array::AsArray as _;
    let tables = tables(&decoded.batches).into_iter().filter(|(kind, _)| kind.is_quarantine());
    let mut rows = Vec::new();
    for (_, batch) in tables {
        let (table, row) = (batch.column(1).as_string::<i32>(), batch.column(3).as_string::<i32>());
        for index in 0..batch.num_rows() {
            let value: serde_json::Value = serde_json::from_str(row.value(index)).unwrap();
            rows.push(format!("{} {}", table.value(index), by_number(table.value(index), value)));
        }
    }
    rows
}

/// Times, reasons and positions of the quarantined rows.
fn reasons(decoded: &Decoded) -> Vec<String> {
    let tables = tables(&decoded.batches).into_iter().filter(|(kind, _)| kind.is_quarantine());
    let without_rows = tables.map(|(_, batch)| batch.project(&[0, 1, 2, 4]).expect("the columns"));
    without_rows.flat_map(|batch| (0..batch.num_rows()).map(move |row| row_text(&batch, row))).collect()
}

fn kind_of(source: Source) -> Kind {
    let table = format!("scouter.{}", source.table());
    Kind::drift().into_iter().find(|kind| kind.source_table("scouter").as_ref() == Some(&table)).unwrap()
}

async fn roundtrip(shape: Shape) {
    let seed = std::env::var("ROUNDTRIP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    eprintln!("roundtrip: ROUNDTRIP_SEED={seed}");
    let stage = Stage::shared(shape).await;
    let client = fill(&stage, &mut StdRng::seed_from_u64(seed), ROWS).await;
    let entities = entities(&client).await;
    let mut forms = Vec::new();
    for binary in [false, true] {
        let stream = stream(&stage, &client, binary).await;
        let messages: Vec<&[u8]> = stream.iter().map(Vec::as_slice).collect();
        let decoded = decode(&messages, NOW_MICROS, |id| entities.get(&id).cloned());
        assert_eq!(decoded.refused, Vec::<String>::new(), "binary {binary}");
        for kind in KINDS {
            let difference = compare_rows(
                &expected_rows(&client, shape, kind).await,
                &decoded_rows(&decoded, kind_of(kind)),
            );
            assert!(difference.is_none(), "{} (binary {binary}): {difference}", kind.table());
            assert!(difference.rows.0 > 200, "too few rows fit: {difference}");
        }
        let difference =
            compare_rows(&expected_quarantine(&client, shape).await, &decoded_quarantine(&decoded));
        assert!(difference.is_none(), "quarantine (binary {binary}): {difference}");
        assert!(difference.rows.0 > 200, "too few rows do not fit: {difference}");
        assert_eq!(decoded.batches.row_count(), 3 * ROWS as u64, "every row is somewhere");
        forms.push((Kind::drift().map(|kind| decoded_rows(&decoded, kind)), reasons(&decoded)));
    }
    assert!(forms[0] == forms[1], "text and binary differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn random_named_rows_are_what_postgres_says() {
    roundtrip(Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_entity_rows_are_what_postgres_says() {
    roundtrip(Shape::Entity).await;
}

/// Rows that fit, and rows that don't, are put into hours of their own; for the former the sums of `highwater verify`, the server's
/// and the archive's, must be equal, so that only the latter are compared row by row.
async fn verified(shape: Shape) {
    let seed = std::env::var("ROUNDTRIP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    eprintln!("roundtrip: ROUNDTRIP_SEED={seed}");
    let stage = Stage::shared(shape).await;
    let client = fill(&stage, &mut StdRng::seed_from_u64(seed), ROWS).await;
    let mut unfit_hours = Vec::new();
    for kind in KINDS {
        let table = kind.table();
        let fit =
            format!("select d.ctid from scouter.{table} d {} where {}", join_sql(shape), fits(shape, kind));
        let sql = format!(
            "update scouter.{table} set created_at =
                 case when ctid in ({fit}) then timestamp '2026-01-01' else '2026-02-01' end
                 + hashtext(ctid::text) % 18000 * interval '1 second' + (created_at - date_trunc('second', created_at))
             where isfinite(created_at) and created_at >= '0001-01-01' and created_at < '10000-01-01'"
        );
        client.batch_execute(&sql).await.unwrap();
        let sql = format!(
            "select count(distinct date_trunc('hour', created_at)) from scouter.{table}
             where created_at between '2026-01-20' and '2026-02-20'"
        );
        let hours: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        unfit_hours.push((format!("scouter.{table}"), hours));
    }
    client.batch_execute(&format!("select pg_drop_replication_slot('{}')", stage.name)).await.unwrap();
    stage.launch().must(&["setup"]);
    let mut sidecar = stage.launch().start();
    sidecar.says("archiving slot", Duration::from_secs(120)).await;
    let report: serde_json::Value =
        serde_json::from_str(&stage.launch().must(&["verify", "--format", "json"])).unwrap();
    for (name, unfit) in unfit_hours {
        let tables = report["tables"].as_array().unwrap();
        let table = tables.iter().find(|table| table["source_table"] == name).unwrap();
        assert_eq!(table["hours_by_row"], unfit, "{table:#}");
        let count = |column: &str| table[column].as_u64().unwrap();
        assert!(count("archive_rows") > 200 && count("archive_rows") < count("postgres_rows"), "{table:#}");
        assert_eq!(count("postgres_rows"), ROWS as u64);
    }
    assert!(sidecar.terminate(Duration::from_secs(60)).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_of_random_named_rows_are_those_of_the_archive() {
    verified(Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_of_random_entity_rows_are_those_of_the_archive() {
    verified(Shape::Entity).await;
}

/// Records the streams of `tests/golden` anew when UPDATE_GOLDEN says so; `fuzz` reads them. The seed is
/// fixed, but oids, positions and times are the server's.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_recorded_on_request() {
    if std::env::var_os("UPDATE_GOLDEN").is_none() {
        return;
    }
    for shape in [Shape::Named, Shape::Entity] {
        let stage = Stage::shared(shape).await;
        let client = fill(&stage, &mut StdRng::seed_from_u64(1), GOLDEN_ROWS).await;
        for binary in [false, true] {
            let stream = stream(&stage, &client, binary).await;
            let bytes = join(stream.iter().map(Vec::as_slice));
            crate::fuzz::record(shape, binary, &bytes);
            assert_eq!(messages(&bytes).len(), stream.len());
        }
    }
}
