//! Readers that share nothing with us, Python's `deltalake`, Polars and DuckDB, open the tables and see the same rows.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::archive::Multiset;
use crate::support::load::Load;
use crate::support::schema::{KINDS, Shape, Source};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

const ENGINES: [&str; 3] = ["deltalake", "polars", "duckdb"];

/// The rows as `reader.py` prints them.
pub(crate) fn read_by_python(table: &Path, engine: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/reader/bin/python");
    assert!(python.exists(), "{} is missing: run `scripts/setup reader`", python.display());
    let script = root.join("tests/it/reader.py");
    let output = Command::new(python).arg(script).arg(table).arg(engine).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
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
                          to_json(version), {}) from scouter.{}",
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

#[tokio::test(flavor = "multi_thread")]
async fn python_sees_the_same_rows() {
    let stage = Stage::shared(Shape::Named).await;
    let _sidecar = stage.start().await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    until("rows are written", DEADLINE, async || (load.committed() > 20_000).then_some(())).await;
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    for kind in KINDS {
        let source = rendered_by_postgres(&stage, kind).await;
        for engine in ENGINES {
            let read = read_by_python(&stage.storage().join(kind.folder()), engine);
            let difference = crate::support::archive::compare_rows(&source, &read);
            assert!(difference.is_none(), "{} by {engine}: {difference}", kind.table());
            assert!(read.iter().collect::<Multiset>().rows() > 1_000);
        }
    }
    for engine in ENGINES {
        // There from the start, though nothing was ever quarantined.
        assert_eq!(read_by_python(&stage.storage().join("quarantine"), engine), Vec::<String>::new());
    }
}
