//! Questions over HTTP.

use std::process::{Command, Stdio};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Client, Method};
use serde_json::Value;

use super::sidecar::Sidecar;
use super::wait::until;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that is asked.
#[derive(Clone, Debug)]
pub struct Site {
    /// `http://127.0.0.1:1234`.
    pub url: String,
    client: Client,
    headers: HeaderMap,
}

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
}

impl Site {
    /// The server at that address.
    pub fn new(url: &str) -> Self {
        let client = Client::builder().timeout(PATIENCE).build().expect("a client");
        Self { url: url.to_owned(), client, headers: HeaderMap::new() }
    }

    /// That of a sidecar that was started with a port of its own, once it listens.
    pub async fn of(sidecar: &Sidecar) -> Self {
        let url = until("it serves", PATIENCE, async || {
            let log = sidecar.log();
            let start = log.find("serving http://")? + "serving ".len();
            let url = log[start..].split(|letter: char| letter.is_whitespace() || letter == ';').next()?;
            Some(url.to_owned())
        });
        Self::new(&url.await)
    }

    /// The same, asked with a header more.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.insert(name, HeaderValue::from_str(value).expect("a header"));
        self
    }

    /// Asks.
    pub async fn ask(&self, method: Method, path: &str) -> Answer {
        let url = format!("{}{path}", self.url);
        let request = self.client.request(method, url).headers(self.headers.clone());
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, body: response.bytes().await.expect("a body").to_vec() }
    }

    /// Asks with GET.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path).await
    }

    /// The JSON of an answer that must be good.
    pub async fn json(&self, path: &str) -> Value {
        let answer = self.get(path).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json()
    }

    /// The value of a metric, with its labels as they are written.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").await.text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(|value| value.parse().expect("a number"))
    }
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// A header.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// Runs Prometheus' own tool on a text; what it complains about.
pub fn promtool(arguments: &[&str], input: &str) -> Result<(), String> {
    use std::io::Write as _;
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: run `scripts/setup browser`");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if output.status.success() { Ok(()) } else { Err(text) }
}
