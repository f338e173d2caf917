//! Health, and who may ask: probes that answer whatever hangs, tokens, and bounds.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tokio::time::Instant;

use crate::support::freeze::Frozen;
use crate::support::http::Site;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::store::Store;
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(60);

/// What a probe promises.
const SECOND: Duration = Duration::from_secs(1);

const TOKEN: &str = "a-token-that-nobody-guesses";

/// A status and the text, and that it came within a second.
async fn probe(site: &Site, path: &str) -> (u16, String) {
    let begun = Instant::now();
    let answer = site.get(path).await;
    let took = begun.elapsed();
    assert!(took < SECOND, "{path} took {took:?}: {}", answer.text());
    (answer.status, answer.text())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_archives_is_alive_and_ready_and_tells_its_state() {
    let stage = Stage::shared(Shape::Entity).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let site = Site::of(&sidecar).await;
    assert_eq!(site.get("/livez").await.text(), "ok\n");
    assert_eq!(site.get("/healthz").await.status, 200);
    until("it is ready", DEADLINE, async || (site.get("/readyz").await.status == 200).then_some(())).await;
    let verbose = site.get("/readyz?verbose").await.text();
    for check in
        ["[+] stream:", "[+] database:", "[+] slot:", "[+] tables:", "[+] lag:", "[+] storage:", "ok\n"]
    {
        assert!(verbose.contains(check), "{check} in {verbose}");
    }
    // Positions and times move with each checkpoint.
    let still = |mut status: Value| {
        for table in status["tables"].as_array_mut().unwrap() {
            for moving in
                ["flushed_lsn", "archived_before", "lag_bytes", "updated_at", "file_count", "byte_count"]
            {
                table.as_object_mut().unwrap().remove(moving);
            }
        }
        status["slot"] = status["slot"]["name"].take();
        status
    };
    assert_eq!(still(site.json("/status").await), still(stage.launch().watermarks()));
    let state = site.json("/api/state").await;
    assert_eq!((&state["archives"], &state["is_ready"]), (&true.into(), &true.into()));
    assert_eq!(state["watermarks"]["tables"][0]["row_count"], 1);
    let report = site.json("/api/check").await;
    assert!(report["findings"].as_array().unwrap().iter().any(|finding| finding["id"] == "slot"), "{report}");
    assert!(sidecar.terminate(DEADLINE).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_changed_and_what_is_wrong_is_told_in_json() {
    let stage = Stage::shared(Shape::Entity).await;
    let sidecar = stage.start().await;
    let site = Site::of(&sidecar).await;
    for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
        for path in ["/status", "/api/entities", "/nowhere"] {
            let answer = site.ask(method.clone(), path).await;
            assert_eq!((answer.status, answer.header("allow")), (405, "GET, HEAD"), "{method} {path}");
        }
    }
    let head = site.ask(Method::HEAD, "/metrics").await;
    assert!(head.status == 200 && head.body.is_empty());
    for (path, status, said) in [
        ("/nowhere", 404, "/nowhere"),
        ("/readyz?verbos", 400, "verbos"),
        ("/api/entities?serach=x", 400, "search"),
        ("/api/query/psi", 400, "from"),
        ("/api/query/psi?from=-1d", 400, "space"),
        ("/api/query/psi?from=then&space=&name=&version=", 400, "then"),
        ("/api/query/psi?from=-1d&from=-2d&space=&name=&version=", 400, "twice"),
        ("/api/query/custom?from=-1d&bin=1us&space=a&name=b&version=c", 400, "bins"),
        ("/api/query/custom?from=-1d&points=100000&space=a&name=b&version=c", 400, "points"),
        ("/api/query/nothing?from=-1d&space=a&name=b&version=c", 404, "nothing"),
        ("/api/query/custom?from=-1d&space=a&name=b&version=c", 404, "a"),
        ("/api/query/custom?from=-1d&value=value&where=true", 400, "HIGHWATER_HTTP_SQL"),
        ("/api/query/custom?from=-1d&value=nothing", 400, "nothing"),
    ] {
        let answer = site.get(path).await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (status, "application/problem+json"),
            "{path}"
        );
        let problem = answer.json();
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().unwrap().contains(said), "{path}: {problem}");
    }
    // The page of another site, whose name was made to lead here.
    let rebound = site.clone().with("host", "evil.example").get("/status").await;
    assert_eq!(rebound.status, 421);
    assert!(site.clone().with("host", "localhost:80").get("/status").await.status == 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_token_probes_tell_the_outcome_and_nothing_else_is_told() {
    let stage = Stage::shared(Shape::Entity).await;
    stage.launch().must(&["setup"]);
    let sidecar = stage.launch().with("HIGHWATER_HTTP_TOKEN", TOKEN).start();
    stage.streaming().await;
    let site = Site::of(&sidecar).await;
    until("it is ready", DEADLINE, async || (site.get("/readyz?verbose").await.status == 200).then_some(()))
        .await;
    for (path, text) in [("/livez", "ok\n"), ("/healthz", "ok\n"), ("/readyz?verbose", "ok\n")] {
        assert_eq!(site.get(path).await.text(), text);
    }
    let strangers = [
        site.clone(),
        site.clone().with("authorization", "Bearer wrong-wrong-wrong-wrong"),
        site.clone().with("authorization", "Basic d3Jvbmc6d3Jvbmc="),
        site.clone().with("authorization", "Bearer "),
        site.clone().with("cookie", &format!("token={TOKEN}")),
    ];
    for stranger in &strangers {
        for path in [
            "/",
            "/status",
            "/metrics",
            "/api/entities",
            "/api/openapi.json",
            "/ui/",
            "/nowhere",
            "/livez/",
            "//livez",
            "/LIVEZ",
        ] {
            let answer = stranger.get(path).await;
            assert_eq!(answer.status, 401, "{path}: {}", answer.text());
            assert!(answer.header("www-authenticate").starts_with("Basic"));
            assert!(!answer.text().contains(&stage.name));
            let answer = stranger.ask(Method::OPTIONS, path).await;
            assert_eq!((answer.status, answer.header("allow")), (401, ""), "{path}");
        }
    }
    use base64::Engine as _;
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("me:{TOKEN}"));
    for credentials in [format!("Bearer {TOKEN}"), format!("Basic {basic}")] {
        let friend = site.clone().with("authorization", &credentials).with("host", "archive.example");
        assert!(friend.get("/readyz?verbose").await.text().contains("[+] slot"));
        assert_eq!(friend.get("/status").await.status, 200);
    }
    assert!(!sidecar.log().contains(TOKEN));
    assert!(sidecar.log().contains("without the right token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_open_or_taken_is_refused_before_anything_begins() {
    let stage = Stage::shared(Shape::Entity).await;
    stage.launch().must(&["setup"]);
    let refused = |http: &str| {
        let output = stage.launch().with("HIGHWATER_HTTP", http).output(&["run"]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!text.contains("claimed"), "{text}");
        text
    };
    let text = refused("0.0.0.0:0");
    assert!(text.contains("HIGHWATER_HTTP_TOKEN") && text.contains("127.0.0.1:0"), "{text}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = refused(&address);
    assert!(text.contains(&address) && text.contains("HIGHWATER_HTTP"), "{text}");
    let mut quiet = stage.launch().with("HIGHWATER_HTTP", "off").start();
    stage.streaming().await;
    assert!(!quiet.log().contains("serving"));
    assert!(quiet.terminate(DEADLINE).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_hangs_it_is_alive_and_says_within_a_second_that_it_is_not_ready() {
    let stage = Stage::private(Shape::Entity, &[]).await;
    let store = Store::s3().await;
    let launch = store.launch(stage.launch());
    launch.must(&["setup"]);
    let sidecar = launch.start();
    let site = Site::of(&sidecar).await;
    let ready = async || (probe(&site, "/readyz").await.0 == 200).then_some(());
    until("it is ready", DEADLINE, ready).await;
    let hangs = async |what: &str| {
        let check = format!("[-] {what}:");
        // At once: an answer from before may be told for a second.
        let begun = Instant::now();
        until("it says so", SECOND * 3, async || {
            let (status, text) = probe(&site, "/readyz").await;
            (status == 503 && text.contains(&check)).then_some(())
        })
        .await;
        assert!(begun.elapsed() < SECOND * 2, "{what}: {:?}", begun.elapsed());
        throughout("it stays alive, and says so", SECOND * 3, async || {
            probe(&site, "/livez").await.0 == 200 && probe(&site, "/readyz").await.0 == 503
        })
        .await;
    };
    let server = Frozen::server(&stage.cluster().data());
    hangs("database").await;
    let objects = store.freeze();
    hangs("storage").await;
    drop(server);
    hangs("storage").await;
    drop(objects);
    until("it is ready again", DEADLINE, ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_whose_server_is_gone_is_alive_and_not_ready() {
    let stage = Stage::private(Shape::Entity, &[]).await;
    let sidecar = stage.start().await;
    let site = Site::of(&sidecar).await;
    until("it is ready", DEADLINE, async || (probe(&site, "/readyz").await.0 == 200).then_some(())).await;
    stage.cluster().stop(crate::support::cluster::Stop::Fast);
    until("it is not ready", DEADLINE, async || (probe(&site, "/readyz").await.0 == 503).then_some(())).await;
    assert_eq!(probe(&site, "/livez").await.0, 200);
    until("the page is told", DEADLINE, async || {
        site.json("/api/state").await["watermarks"].is_null().then_some(())
    })
    .await;
    assert_eq!(site.get("/status").await.status, 503);
    // What was committed since the server was last seen is not known, so it counts.
    until("the age grows", DEADLINE, async || {
        site.metric("highwater_archive_lag_seconds").await.is_some_and(|lag| lag > 3.0).then_some(())
    })
    .await;
    stage.cluster().start();
    until("it is ready again", DEADLINE, async || (probe(&site, "/readyz").await.0 == 200).then_some(()))
        .await;
}

/// Sends bytes; what comes back until the other end closes.
fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // It may have been closed before all was sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_malformed_oversized_or_slow_end_and_harm_nobody() {
    let stage = Stage::shared(Shape::Entity).await;
    let sidecar = stage.start().await;
    let site = Site::of(&sidecar).await;
    let address: SocketAddr = site.url.trim_start_matches("http://").parse().unwrap();
    let send = |bytes: Vec<u8>| tokio::task::spawn_blocking(move || raw(address, &bytes));
    let line = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    for (bytes, statuses) in [
        (b"\0\xff\xfe rubbish\r\n\r\n".to_vec(), &["400"][..]),
        (b"GET /livez HTTP/9.9\r\n\r\n".to_vec(), &["400", "505"]),
        (line(&format!("/api/entities?search={}", "a".repeat(100_000))).into_bytes(), &["414", "431"]),
        (
            format!("GET /livez HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(1_000)).into_bytes(),
            &["431"],
        ),
        (
            b"GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: b\r\nconnection: close\r\n\r\n".to_vec(),
            &["400"],
        ),
        (b"GET /livez HTTP/1.1\r\nconnection: close\r\n\r\n".to_vec(), &["400"]),
        (b"GET /livez HTTP/1.0\r\n\r\n".to_vec(), &["200"]),
        (
            b"GET http://evil.example/livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
                .to_vec(),
            &["421"],
        ),
        (line("/api/../../etc/passwd").into_bytes(), &["404"]),
        (line("/ui/../Cargo.toml").into_bytes(), &["404"]),
        (line("/ui/%2e%2e/%2e%2e/etc/passwd").into_bytes(), &["404"]),
        // A body is not read, however long it says it is.
        (
            b"POST /status HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\nx".to_vec(),
            &["405"],
        ),
        // Nothing more comes: closed after the time for a head.
        (b"GET /livez HTTP/1.1\r\nhost: local".to_vec(), &["", "408"]),
    ] {
        let answer = send(bytes.clone()).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(statuses.contains(&status), "{answer:.200} to {:.100}", String::from_utf8_lossy(&bytes));
    }
    // Many that say nothing: more than are open at a time, and a probe still comes through.
    let idle: Vec<TcpStream> = (0..700).map(|_| TcpStream::connect(address).unwrap()).collect();
    for _ in 0..20 {
        let fresh = Site::new(&site.url);
        assert_eq!(probe(&fresh, "/livez").await.0, 200);
    }
    drop(idle);
    assert_eq!(site.get("/readyz").await.status, 200);
}
