//! DuckDB, in one Python process that times its own queries.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use async_trait::async_trait;
use highwater::reader::BinnedQuery;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::contender::Contender;
use crate::layout::Layout;
use crate::rows::{DAY, START};

pub(crate) struct DuckDb {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// By day.
    files: Vec<PathBuf>,
}

impl DuckDb {
    pub(crate) fn start(layout: &Layout) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/reader/bin/python");
        assert!(python.exists(), "{} is missing: run `scripts/setup reader`", python.display());
        let mut child = Command::new(python)
            .arg(root.join("benches/history/duck.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut duckdb = Self { child, input, output, files: layout.files.clone() };
        println!("DuckDB {}", duckdb.ask(&json!({"do": "version"})));
        duckdb
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.input, "{request}").expect("Python is there");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("Python is there");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// A request about the files of the query's days.
    fn about(&self, what: &str, query: &BinnedQuery) -> Value {
        let (start, end) = query.range();
        let day = |micros: i64| usize::try_from((micros - START) / DAY).expect("a day");
        let files = &self.files[day(start)..=day(end - 1)];
        let entity = query.entity();
        json!({
            "do": what, "files": files, "space": entity.space, "name": entity.name, "version": entity.version,
            "start": start, "end": end, "width": query.bins().micros(),
        })
    }
}

impl Drop for DuckDb {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[async_trait]
impl Contender for DuckDb {
    fn name(&self) -> &'static str {
        "DuckDB"
    }

    async fn open(&mut self, _query: &BinnedQuery) -> f64 {
        self.ask(&json!({"do": "open"})).as_f64().expect("seconds")
    }

    async fn run(&mut self, query: &BinnedQuery) -> f64 {
        let request = self.about("run", query);
        self.ask(&request).as_f64().expect("seconds")
    }

    async fn answer(&mut self, _query: &BinnedQuery) -> Answer {
        let shares = self.ask(&json!({"do": "answer"}));
        Answer::of_shares(shares.as_array().expect("rows").iter().map(|row| {
            let feature = row[0].as_str().expect("a feature").to_owned();
            (feature, row[1].as_i64(), row[2].as_i64().expect("a bin"), row[3].as_f64().expect("a share"))
        }))
    }

    async fn close(&mut self) {
        self.ask(&json!({"do": "close"}));
    }

    fn counted(&self) -> Option<(u64, u64)> {
        None
    }
}
