//! An S3 store of our own, in memory, that answers as it is told: what real stores do on bad days, and what others do always.
//!
//! It knows the requests that Highwater sends (PUT, GET, HEAD, DELETE, lists) and looks at no signature.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::sidecar::Launch;

/// The bucket that is there.
pub const BUCKET: &str = "archive";

/// A request, as a test judges it.
#[derive(Clone, Debug)]
pub struct Request {
    /// `PUT`, ...
    pub method: String,
    /// Path without bucket and query.
    pub key: String,
    /// After the question mark.
    pub query: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    /// Whether it must not replace an object.
    pub fn is_conditional(&self) -> bool {
        self.headers.get("if-none-match").is_some_and(|value| value == "*")
    }

    /// Whether it creates an entry of a table's log at this version.
    pub fn is_entry(&self, version: u64) -> bool {
        self.method == "PUT" && self.key.ends_with(&format!("_delta_log/{version:020}.json"))
    }
}

/// An answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    /// An answer with this status.
    pub fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// An error with S3's document.
    pub fn error(status: u16, code: &str, message: &str) -> Self {
        let document = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
             <Token-0>hunter2</Token-0><RequestId>1</RequestId></Error>"
        );
        Self::new(status).body(document)
    }

    /// The same with a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with a body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }
}

/// What the store does with a request.
#[derive(Debug)]
pub enum Turn {
    /// What it should.
    Serve,
    /// What it should; but the answer is this one.
    ServeAndSay(Answer),
    /// Nothing, but for this answer.
    Say(Answer),
    /// What it should of a request without conditions.
    ServeUnconditionally,
}

type Manner = Box<dyn FnMut(&Request) -> Turn + Send>;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    requests: Vec<Request>,
    manner: Option<Manner>,
}

/// The store; ends with the test's runtime.
#[derive(Clone)]
pub struct S3 {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl S3 {
    /// Starts it, empty and well-mannered.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let store = Self { port, state: Arc::default() };
        let state = Arc::clone(&store.state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, Arc::clone(&state)));
            }
        });
        store
    }

    /// From now on it behaves like this.
    pub fn behaves(&self, manner: impl FnMut(&Request) -> Turn + Send + 'static) {
        self.state.lock().expect("the state").manner = Some(Box::new(manner));
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The same launch, into this store, without credentials.
    #[must_use]
    pub fn launch_bare(&self, launch: Launch) -> Launch {
        launch
            .with("SCOUTER_STORAGE_URI", &format!("s3://{BUCKET}/drift/archive"))
            .with("AWS_ENDPOINT_URL", &self.endpoint())
            .with("AWS_ALLOW_HTTP", "true")
            // Nothing of whoever runs the tests, and nobody to ask.
            .with("HOME", "/nonexistent")
            .with("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    }

    /// The same launch, into this store.
    #[must_use]
    pub fn launch(&self, launch: Launch) -> Launch {
        self.launch_bare(launch).with("AWS_ACCESS_KEY_ID", "test").with("AWS_SECRET_ACCESS_KEY", "sesame")
    }

    /// Names of the objects.
    pub fn keys(&self) -> Vec<String> {
        self.state.lock().expect("the state").objects.keys().cloned().collect()
    }

    /// An object's bytes.
    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        self.state.lock().expect("the state").objects.get(key).cloned()
    }

    /// Puts an object.
    pub fn put(&self, key: &str, bytes: &[u8]) {
        self.state.lock().expect("the state").objects.insert(key.to_owned(), bytes.to_owned());
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().expect("the state").requests)
    }

    /// The archive's objects as files of a folder, for the reader of archives.
    pub fn download(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (key, bytes) in &self.state.lock().expect("the state").objects {
            let path = folder.path().join(key.trim_start_matches("drift/archive/"));
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, bytes).expect("a file");
        }
        folder
    }
}

impl std::fmt::Debug for S3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3").field("port", &self.port).finish_non_exhaustive()
    }
}

async fn serve(client: TcpStream, state: Arc<Mutex<State>>) {
    let mut client = BufReader::new(client);
    while let Some(request) = read_request(&mut client).await {
        let answer = {
            let mut state = state.lock().expect("the state");
            state.requests.push(request.clone());
            let turn = match &mut state.manner {
                Some(manner) => manner(&request),
                None => Turn::Serve,
            };
            match turn {
                Turn::Serve => state.answer(&request, request.is_conditional()),
                Turn::ServeUnconditionally => state.answer(&request, false),
                Turn::Say(answer) => answer,
                Turn::ServeAndSay(answer) => {
                    state.answer(&request, request.is_conditional());
                    answer
                }
            }
        };
        let mut head = format!("HTTP/1.1 {} x\r\n", answer.status);
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let is_head = request.method == "HEAD";
        if !(is_head && answer.headers.iter().any(|(name, _)| name == "Content-Length"))
            && answer.status != 204
        {
            head.push_str(&format!("Content-Length: {}\r\n", if is_head { 0 } else { answer.body.len() }));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if !is_head {
            bytes.extend(&answer.body);
        }
        if client.get_mut().write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn read_request(client: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.ok()?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    client.read_exact(&mut body).await.ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let key = decoded(path.trim_start_matches('/'));
    let key = key.strip_prefix(BUCKET).map_or(key.as_str(), |key| key.trim_start_matches('/')).to_owned();
    Some(Request { method, key, query: query.to_owned(), headers, body })
}

fn decoded(text: &str) -> String {
    let text = text.replace('+', " ");
    url::form_urlencoded::parse(format!("x={}", text.replace('&', "%26")).as_bytes())
        .map(|(_, value)| value.into_owned())
        .next()
        .unwrap_or_default()
}

impl State {
    fn answer(&mut self, request: &Request, is_conditional: bool) -> Answer {
        match request.method.as_str() {
            "PUT" if is_conditional && self.objects.contains_key(&request.key) => Answer::error(
                412,
                "PreconditionFailed",
                "At least one of the pre-conditions you specified did not hold",
            ),
            "PUT" => {
                self.objects.insert(request.key.clone(), request.body.clone());
                Answer::new(200).header("ETag", "\"1\"")
            }
            "GET" if request.key.is_empty() => self.list(&request.query),
            "GET" | "HEAD" => self.read(request),
            "DELETE" => {
                self.objects.remove(&request.key);
                Answer::new(204)
            }
            "POST" if request.query.starts_with("delete") => {
                let body = String::from_utf8_lossy(&request.body).into_owned();
                let mut deleted = String::new();
                for key in body.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next()) {
                    self.objects.remove(key);
                    deleted.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
                }
                Answer::new(200).body(format!("<DeleteResult>{deleted}</DeleteResult>"))
            }
            _ => Answer::error(501, "NotImplemented", "this store knows no such request"),
        }
    }

    fn read(&self, request: &Request) -> Answer {
        let Some(bytes) = self.objects.get(&request.key) else {
            return Answer::error(404, "NoSuchKey", "The specified key does not exist.");
        };
        let length = bytes.len();
        let dated = |status| {
            Answer::new(status)
                .header("ETag", &format!("\"{length}\""))
                .header("Last-Modified", "Sun, 22 Nov 2026 23:28:31 GMT")
        };
        let range =
            request.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let (start, end) = match range {
            None => {
                let answer = dated(200).body(bytes.clone());
                let is_head = request.method == "HEAD";
                return if is_head { answer.header("Content-Length", &length.to_string()) } else { answer };
            }
            Some(("", last)) => (length.saturating_sub(last.parse().expect("a length")), length),
            Some((first, "")) => (first.parse().expect("a position"), length),
            Some((first, last)) => (
                first.parse().expect("a position"),
                (last.parse::<usize>().expect("a position") + 1).min(length),
            ),
        };
        dated(206)
            .header("Content-Range", &format!("bytes {start}-{}/{length}", end - 1))
            .body(bytes[start..end].to_vec())
    }

    /// ListObjectsV2, all on one page.
    fn list(&self, query: &str) -> Answer {
        let parameters: BTreeMap<String, String> =
            url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let parameter = |name: &str| parameters.get(name).map_or("", String::as_str);
        let (prefix, delimiter, after) =
            (parameter("prefix"), parameter("delimiter"), parameter("start-after"));
        let (mut contents, mut folders) = (String::new(), std::collections::BTreeSet::new());
        for (key, bytes) in &self.objects {
            let Some(rest) = key.strip_prefix(prefix).filter(|_| key.as_str() > after) else { continue };
            if let Some((folder, _)) = rest.split_once('/').filter(|_| !delimiter.is_empty()) {
                folders.insert(format!("{prefix}{folder}/"));
                continue;
            }
            contents.push_str(&format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-22T23:28:31.000Z</LastModified><ETag>\"1\"</ETag>\
                 <Size>{}</Size></Contents>",
                bytes.len()
            ));
        }
        for folder in folders {
            contents.push_str(&format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"));
        }
        Answer::new(200).header("Content-Type", "application/xml").body(format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix>\
             <IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        ))
    }
}
