//! Object stores on this machine, and their objects as files.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tempfile::TempDir;

use super::freeze::Frozen;
use super::sidecar::Launch;
use super::wait::until;

/// Bucket, or container, that every store has.
const BUCKET: &str = "archive";

/// A store on this machine; ends with the value, or with this process.
#[derive(Debug)]
pub struct Store {
    guard: Child,
    /// URI of a prefix in its bucket.
    pub uri: String,
    settings: Vec<(String, String)>,
    objects: Arc<dyn ObjectStore>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn installed(path: &str) -> PathBuf {
    let path = root().join(path);
    assert!(path.exists(), "{} is missing: run `scripts/setup stores`", path.display());
    path
}

/// Starts a program that ends when nobody holds the guard's pipe any more.
fn guarded(program: &str, arguments: &[&str]) -> Child {
    const SCRIPT: &str =
        "program=$1; shift; \"$program\" \"$@\" </dev/null & child=$!; cat >/dev/null; kill $child";
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "guard", program]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("sh")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Sends a request without a body; the first line of the answer, if there is one.
fn request(port: u16, request: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let head = format!(
        "{request} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.lines().next().map(str::to_owned)
}

impl Store {
    /// An S3 store with an empty bucket.
    pub async fn s3() -> Self {
        let port = free_port();
        let python = installed("target/stores/bin/python").display().to_string();
        let moto = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/serial_moto.py");
        let guard = guarded(&python, &[moto, "-H", "127.0.0.1", "-p", &port.to_string()]);
        let made =
            async || request(port, &format!("PUT /{BUCKET}")).filter(|line| line.contains(" 200")).map(drop);
        until("the S3 store makes a bucket", Duration::from_secs(60), made).await;
        let endpoint = format!("http://127.0.0.1:{port}");
        let objects = AmazonS3Builder::new()
            .with_endpoint(&endpoint)
            .with_allow_http(true)
            .with_bucket_name(BUCKET)
            .with_region("us-east-1")
            .with_access_key_id("test")
            .with_secret_access_key("test")
            .build()
            .expect("an S3 client");
        let settings = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
        ];
        Self::new(guard, "s3", &settings, Arc::new(objects))
    }

    /// An Azure store with an empty container.
    pub async fn azure() -> Self {
        let port = free_port();
        let azurite =
            installed("target/azurite/node_modules/azurite/dist/src/blob/main.js").display().to_string();
        let port_text = port.to_string();
        let options = ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"];
        let place = ["--blobHost", "127.0.0.1", "--blobPort", &port_text];
        let arguments: Vec<&str> = [azurite.as_str()].into_iter().chain(options).chain(place).collect();
        let guard = guarded("node", &arguments);
        let endpoint = format!("http://127.0.0.1:{port}");
        let made = async || {
            let output =
                Command::new("node").args(["-e", MAKE_CONTAINER, &port_text, BUCKET]).output().expect("node");
            output.status.success().then_some(())
        };
        until("the Azure store makes a container", Duration::from_secs(60), made).await;
        let objects = MicrosoftAzureBuilder::new()
            .with_endpoint(format!("{endpoint}/devstoreaccount1"))
            .with_allow_http(true)
            .with_account("devstoreaccount1")
            .with_access_key(AZURITE_KEY)
            .with_container_name(BUCKET)
            .build()
            .expect("an Azure client");
        let settings =
            [("AZURE_STORAGE_USE_EMULATOR", "true"), ("AZURITE_BLOB_STORAGE_URL", endpoint.as_str())];
        Self::new(guard, "az", &settings, Arc::new(objects))
    }

    fn new(guard: Child, scheme: &str, settings: &[(&str, &str)], objects: Arc<dyn ObjectStore>) -> Self {
        let settings =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { guard, uri: format!("{scheme}://{BUCKET}/drift/archive"), settings, objects }
    }

    /// The same launch, into this store.
    #[must_use]
    pub fn launch(&self, launch: Launch) -> Launch {
        let launch = launch.with("SCOUTER_STORAGE_URI", &self.uri);
        self.settings.iter().fold(launch, |launch, (name, value)| launch.with(name, value))
    }

    /// The store's process hangs until the value is dropped.
    #[must_use]
    pub fn freeze(&self) -> Frozen {
        Frozen::of(self.guard.id())
    }

    /// The whole bucket.
    #[must_use]
    pub fn objects(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.objects)
    }

    /// The archive's objects as files of a folder, for the reader of archives. Only while nobody writes.
    pub async fn download(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let prefix = "drift/archive".into();
        let found: Vec<_> = self.objects.list(Some(&prefix)).try_collect().await.expect("a list of objects");
        for object in found {
            let name = object.location.as_ref().trim_start_matches("drift/archive/");
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            let bytes = self
                .objects
                .get(&object.location)
                .await
                .expect("an object")
                .bytes()
                .await
                .expect("its bytes");
            std::fs::write(path, bytes).expect("a file");
        }
        folder
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        self.guard.wait().ok();
    }
}

/// Published with the emulator; the same for everybody.
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Containers are not objects, so the client library doesn't make them. Signed with the emulator's key, as
/// "Authorize with Shared Key" of the service's manual has it.
const MAKE_CONTAINER: &str = r#"
const [port, name] = process.argv.slice(1);
const key = Buffer.from("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==", "base64");
const account = "devstoreaccount1", date = new Date().toUTCString();
const path = `/${account}/${name}`;
const text = "PUT" + "\n".repeat(12) + `x-ms-date:${date}\nx-ms-version:2021-08-06\n/${account}${path}\nrestype:container`;
const signature = require("crypto").createHmac("sha256", key).update(text, "utf8").digest("base64");
const headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": 0,
                 Authorization: `SharedKey ${account}:${signature}`};
const request = require("http").request({host: "127.0.0.1", port, path: `${path}?restype=container`, method: "PUT", headers},
    answer => { answer.resume(); process.exitCode = [201, 409].includes(answer.statusCode) ? 0 : 1; });
request.on("error", () => { process.exitCode = 1; });
request.end();
"#;
