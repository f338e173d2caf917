//! Readers that share nothing with us, Python's `deltalake`, Polars, DuckDB and Spark in several versions, open the tables and
//! see the same rows; what the documentation shows of them runs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Encoding, Type};
use parquet::file::properties::WriterProperties;

use crate::support::archive::{Multiset, assert_portable, compare_rows, files};
use crate::support::load::Load;
use crate::support::schema::{KINDS, Shape, Source};
use crate::support::stage::Stage;
use crate::support::wait::{until, within};

const DEADLINE: Duration = Duration::from_secs(60);

/// Those that `reader.py` knows, in the folder of `scripts/setup reader`, or in one of their own.
const ENGINES: [&str; 5] = ["deltalake", "polars", "duckdb", "duckdb1", "duckdb1.1"];

const SPARKS: [&str; 2] = ["spark35", "spark4"];

/// The documentation's snippets, by what only one of them has, and what they show.
const SNIPPETS: [(&str, &str); 5] = [
    ("to_pyarrow_table(filters", "credit"),
    (r#"scan_delta("archive/custom")"#, "value"),
    ("import duckdb", "age"),
    ("import SparkSession", "age"),
    (r#"scan_delta("archive/quarantine")"#, "scouter.custom_drift"),
];

/// Rows of two months that are long over, with more different numbers than a dictionary takes, and with the ends of each type.
const ROWS: &str = "
    insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
    select day + n * interval '1 second', 'bank', 'credit', '1.4.0', 'age', n % 10, n * 7
      from generate_series(1, 8000) n, unnest($1::timestamptz[]) day;
    insert into scouter.spc_drift (created_at, space, name, version, feature, value)
    select day + n * interval '1 second', 'bank', 'fraud', '1', nullif('x' || n % 3, 'x0'), n / 7.0
      from generate_series(1, 8000) n, unnest($1::timestamptz[]) day;
    insert into scouter.custom_drift (created_at, space, name, version, metric, value)
    select day + n * interval '1 second', 'shop', 'ranking', '2.1.0', 'accuracy', (n % 100) / 100.0
      from generate_series(1, 8000) n, unnest($1::timestamptz[]) day;";

const EXTREMES: &str = "
    insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
    select time, 's', 'ends', '1', 'f', bin, -1 - bin
      from unnest(array['0001-01-01', '1969-12-31 23:59:59.999999Z', '9999-12-31 23:59:59.999999Z']::timestamptz[]) time,
           unnest(array[-2147483648, 0, 2147483647]) bin;
    insert into scouter.custom_drift (created_at, space, name, version, metric, value)
    select '0001-01-01'::timestamptz + n * interval '1 second', 's', 'ends', '1', 'm', value::float8
      from unnest(array['NaN', '-0', 'Infinity', '-Infinity', '5e-324', '1.7976931348623157e308', null])
           with ordinality ends (value, n);";

fn python(folder: &str) -> PathBuf {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(folder).join("bin/python");
    assert!(python.exists(), "{} is missing: run `scripts/setup reader spark`", python.display());
    python
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it").join(name)
}

fn output_of(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The rows as `reader.py` prints them.
pub(crate) fn read_by_python(table: &Path, engine: &str) -> Vec<String> {
    read_columns(table, engine, None)
}

/// The same of these columns, with commas between them.
pub(crate) fn read_columns(table: &Path, engine: &str, columns: Option<&str>) -> Vec<String> {
    let mut command = Command::new(python("reader"));
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(engine);
    if engine != "duckdb" && engine.starts_with("duckdb") {
        assert!(own.exists(), "{} is missing: run `scripts/setup reader`", own.display());
        command.env("PYTHONPATH", own);
    }
    command.arg(script("reader.py")).arg(table).arg(engine).args(columns);
    output_of(&mut command).lines().map(str::to_owned).collect()
}

/// What the documentation's snippet shows, and the rows of each table as `spark.py` prints them, by table and mode.
fn read_by_spark(folder: &Path, spark: &str) -> (String, BTreeMap<String, Vec<String>>) {
    let tables = KINDS.map(Source::folder).into_iter().chain(["quarantine"]);
    let output = output_of(
        Command::new(python(spark))
            .arg(script("spark.py"))
            .arg(folder.join("spark.snippet"))
            .args(tables.map(|table| format!("archive/{table}")))
            .current_dir(folder),
    );
    let mut parts = output.split("# archive/");
    let shown = parts.next().unwrap().to_owned();
    let part = |part: &str| {
        let mut lines = part.lines().map(str::to_owned);
        (lines.next().unwrap(), lines.collect())
    };
    (shown, parts.map(part).collect())
}

/// The documentation's snippets of Python, in the order of [`SNIPPETS`].
fn snippets() -> [String; SNIPPETS.len()] {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/archive.md")).unwrap();
    let all: Vec<&str> =
        page.split("```python\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(all.len(), SNIPPETS.len(), "a snippet is not tested");
    SNIPPETS.map(|(needle, _)| all.iter().find(|snippet| snippet.contains(needle)).expect(needle).to_string())
}

fn run_snippets(folder: &Path) {
    for (snippet, (needle, shown)) in snippets().iter().zip(SNIPPETS) {
        if needle == "import SparkSession" {
            continue;
        }
        let snippet = format!("{snippet}\nfor name in ['rows', 'accuracy']:\n    print(globals().get(name))");
        let output = output_of(Command::new(python("reader")).args(["-c", &snippet]).current_dir(folder));
        assert!(output.contains(shown), "{snippet}: {output}");
    }
}

/// The source's rows in the same form, rendered by Postgres.
pub(crate) async fn rendered_by_postgres(stage: &Stage, kind: Source) -> Vec<String> {
    let values: Vec<String> = kind
        .value_columns()
        .iter()
        .map(|column| match *column {
            "value" => "coalesce(encode(float8send(value), 'hex'), 'null')".to_owned(),
            column => format!("coalesce(to_json({column})::text, 'null')"),
        })
        .collect();
    let sql = format!(
        "select concat_ws('|', (extract(epoch from created_at) * 1000000)::bigint, to_json(space), to_json(name),
                          to_json(version), {}) from scouter.{} where isfinite(created_at)",
        values.join(", "),
        kind.table()
    );
    stage.connect().await.query(&sql, &[]).await.unwrap().iter().map(|row| ascii(row.get(0))).collect()
}

/// Python's JSON escapes whatever is not ASCII; Postgres leaves it.
fn ascii(text: &str) -> String {
    let mut units = [0; 2];
    text.chars()
        .flat_map(|character| match character {
            ' '..='~' => vec![character.to_string()],
            other => other.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
        })
        .collect()
}

/// Makes a file what the first builds wrote: BYTE_STREAM_SPLIT numbers, and a sequence of four digits in its name.
fn make_old(table: &Path, file: &Path) {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(file).unwrap()).unwrap();
    let mut properties = WriterProperties::builder().set_dictionary_enabled(false);
    for column in reader.parquet_schema().columns() {
        if matches!(column.physical_type(), Type::INT32 | Type::DOUBLE) {
            properties = properties.set_column_encoding(column.path().clone(), Encoding::BYTE_STREAM_SPLIT);
        }
    }
    let (front, sequence) = file.to_str().unwrap().rsplit_once("-0").unwrap();
    let old = PathBuf::from(format!("{front}-{sequence}"));
    let mut writer =
        ArrowWriter::try_new(File::create(&old).unwrap(), reader.schema().clone(), Some(properties.build()))
            .unwrap();
    reader.build().unwrap().for_each(|batch| writer.write(&batch.unwrap()).unwrap());
    writer.close().unwrap();
    let path = |file: &Path| file.strip_prefix(table).unwrap().to_str().unwrap().to_owned();
    let size = |file: &Path| format!(r#""size":{}"#, file.metadata().unwrap().len());
    for entry in fs::read_dir(table.join("_delta_log")).unwrap().map(|entry| entry.unwrap().path()) {
        let text = fs::read_to_string(&entry).unwrap();
        let changed = |line: &str| match line.contains(&path(file)) {
            true => line.replace(&path(file), &path(&old)).replace(&size(file), &size(&old)),
            false => line.to_owned(),
        };
        fs::write(&entry, text.lines().map(changed).collect::<Vec<_>>().join("\n")).unwrap();
    }
    fs::remove_file(file).unwrap();
}

/// The files of the two months, which are one each once they are merged.
fn months(table: &Path) -> Vec<PathBuf> {
    let is_one = |file: &PathBuf| {
        let path = file.strip_prefix(table).unwrap().to_str().unwrap();
        path.starts_with("2024/01") || path.starts_with("2024/02")
    };
    files(table).unwrap().into_iter().filter(is_one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_engine_sees_the_same_rows_of_every_path() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let insert = async |day: &str| {
        let days = format!("array['2024-01-{day}', '2024-02-{day}']::timestamptz[]");
        client.batch_execute(&ROWS.replace("$1::timestamptz[]", &days)).await.unwrap();
    };
    // By the first copy, by the stream, and from both by merges; loads are in `scouter`.
    insert("05").await;
    client.batch_execute(EXTREMES).await.unwrap();
    let mut sidecar = stage.start().await;
    insert("06").await;
    client
        .batch_execute(
            "insert into scouter.custom_drift (created_at, space, name, version, metric)
             values ('infinity', 's', 'n', '1', 'm')",
        )
        .await
        .unwrap();
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    until("rows are written", DEADLINE, async || (load.committed() > 5_000).then_some(())).await;
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    let tables = KINDS.map(|kind| stage.storage().join(kind.folder()));
    let merged = async || tables.iter().all(|table| months(table).len() == 2).then_some(());
    let is_merged = within(2 * DEADLINE, merged).await.is_some();
    assert!(is_merged, "not merged: {:?}", tables.each_ref().map(|table| months(table)));
    assert_portable(&stage.storage().join("quarantine"));

    // What the first builds have left is written anew.
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    for table in &tables {
        months(table).iter().for_each(|file| make_old(table, file));
    }
    assert!(std::panic::catch_unwind(|| assert_portable(&tables[1])).is_err(), "they are not old");
    let old =
        |file: &PathBuf| file.to_str().unwrap().rsplit_once('-').unwrap().1.len() == "0000.parquet".len();
    let mut sidecar = stage.launch().start();
    let renewed = async || {
        (!tables.iter().flat_map(|table| files(table).unwrap()).any(|file| old(&file))).then_some(())
    };
    until("the old files are written anew", 2 * DEADLINE, renewed).await;
    assert!(sidecar.log().contains("files_to_rewrite=1"), "{}", sidecar.log());
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    stage.assert_same().await;

    std::os::unix::fs::symlink(stage.storage(), stage.folder().join("archive")).unwrap();
    let [.., spark_snippet, _] = snippets();
    fs::write(stage.folder().join("spark.snippet"), spark_snippet).unwrap();
    let mut sources = Vec::new();
    for kind in KINDS {
        sources.push((kind.folder(), rendered_by_postgres(&stage, kind).await));
    }
    let folder = stage.folder().to_owned();
    tokio::task::spawn_blocking(move || {
        std::thread::scope(|scope| {
            scope.spawn(|| by_spark(&folder, &sources));
            by_python(&folder, &sources);
            run_snippets(&folder);
        });
    })
    .await
    .unwrap();
}

fn assert_equal(source: &[String], read: &[String], reader: &str) {
    let difference = compare_rows(source, read);
    assert!(difference.is_none(), "{reader}: {difference}");
    assert!(read.iter().collect::<Multiset>().rows() > 1_000);
}

fn by_python(folder: &Path, sources: &[(&str, Vec<String>)]) {
    for engine in ENGINES {
        for (table, source) in sources {
            let read = read_by_python(&folder.join("archive").join(table), engine);
            assert_equal(source, &read, &format!("{table} by {engine}"));
        }
        assert_eq!(read_by_python(&folder.join("archive/quarantine"), engine).len(), 1);
    }
}

fn by_spark(folder: &Path, sources: &[(&str, Vec<String>)]) {
    for spark in SPARKS {
        let (shown, read) = read_by_spark(folder, spark);
        let (_, expected) = SNIPPETS[3];
        assert!(shown.contains(expected), "{shown}");
        for mode in ["vectorized", "plain"] {
            for (table, source) in sources {
                assert_equal(
                    source,
                    &read[&format!("{table} {mode}")],
                    &format!("{table} by {spark}, {mode}"),
                );
            }
            assert_eq!(read[&format!("quarantine {mode}")].len(), 1);
        }
    }
}
