//! Those who look at an archive don't hold up the archiving, and can't make it take more memory than it may.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::support::http::Site;
use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(120);

const MODEL: &str = "space=shop&name=ranking&version=1.0.0";

/// Scrapes in a second, and seconds.
const SCRAPERS: u32 = 20;
const SCRAPES_EACH: u32 = 10;
const SECONDS: u32 = 60;

/// How old what is not archived may be meanwhile: ten times what was asked for, on a machine that runs other tests, too.
const LAG_MAX: f64 = 10.0;

/// The memory that is asked for, and all of the process in a debug build: with the answers of eight queries, and what the libraries
/// have outside of it.
const MEMORY: &str = "64MiB";
const RESIDENT_MAX: u64 = 600 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_catch_up_goes_on_beside_200_scrapes_a_second_and_50_browsers() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    create_entities(&client).await;
    stage.launch().must(&["setup"]);
    // What is caught up with while they look.
    let rows = "insert into scouter.custom_drift (created_at, entity_id, metric, value)
                select clock_timestamp() - n * interval '1 second', id, 'm' || n % 5, n
                from scouter.drift_entities, generate_series(1, 60000) n";
    client.batch_execute(rows).await.unwrap();
    let sidecar = stage.launch().with("HIGHWATER_MAX_LAG", "1s").with("HIGHWATER_MEMORY", MEMORY).start();
    let site = Site::of(&sidecar).await;
    let (is_over, scraped, answered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let scrape = async |_: u32| {
        let mut beat = interval(Duration::from_secs(1) / SCRAPES_EACH);
        beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
        for _ in 0..SECONDS * SCRAPES_EACH {
            beat.tick().await;
            let answer = site.get("/metrics").await;
            assert!(answer.status == 200 && answer.text().contains("highwater_build_info"));
            scraped.fetch_add(1, Ordering::Relaxed);
        }
    };
    let browse = async |number: usize| {
        while !is_over.load(Ordering::Relaxed) {
            for path in [
                format!("/api/query/custom?{MODEL}&from=-30d&bin={}s", 3_600 + number),
                format!("/api/query/psi?{MODEL}&from=-30d&bin={}s", 3_600 + number),
                "/api/state".to_owned(),
                "/api/coverage".to_owned(),
                "/api/entities?search=rank".to_owned(),
            ] {
                let answer = site.get(&path).await;
                assert!([200, 404, 429].contains(&answer.status), "{path}: {}", answer.text());
                answered.fetch_add(u64::from(answer.status == 200), Ordering::Relaxed);
            }
        }
    };
    let archive = async {
        // The copy of what was there, or its log.
        stage.assert_archived(DEADLINE).await;
        let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Entity);
        let mut worst = 0.0_f64;
        while !is_over.load(Ordering::Relaxed) {
            worst = worst.max(site.metric("highwater_archive_lag_seconds").await.unwrap_or_default());
            sleep(Duration::from_millis(200)).await;
        }
        load.stop().await;
        worst
    };
    let look = async {
        join_all((0..SCRAPERS).map(scrape)).await;
        is_over.store(true, Ordering::Relaxed);
    };
    let ((), _, worst) = tokio::join!(look, join_all((0..50).map(browse)), archive);
    let (scraped, answered) = (scraped.into_inner(), answered.into_inner());
    let resident = sidecar.resident_bytes_max();
    eprintln!(
        "{scraped} scrapes, {answered} answers, the oldest row {worst:.1} s, {} MiB at most",
        resident >> 20
    );
    assert_eq!(scraped, u64::from(SCRAPERS * SCRAPES_EACH * SECONDS));
    assert!(answered > 1_000, "{answered}");
    assert!(worst < LAG_MAX, "{worst}");
    assert!(resident < RESIDENT_MAX, "{resident}");
    stage.assert_archived(DEADLINE).await;
}

/// A connection in which little waits to be read.
fn narrow(address: &str) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.connect(&address.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    TcpStream::from(socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_no_answer_keeps_a_turn_until_he_is_cut_off() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    create_entities(&client).await;
    let rows = "insert into scouter.custom_drift (created_at, entity_id, metric, value)
                select '2026-01-01'::timestamptz + n * interval '1 minute', id, 'a metric with a long name, number ' || m, n + random()
                from scouter.drift_entities, generate_series(1, 9000) n, generate_series(1, 2) m where version = '1.0.0'";
    client.batch_execute(rows).await.unwrap();
    let sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let site = Site::of(&sidecar).await;
    let path = format!("/api/query/custom?{MODEL}&from=2026-01-01&to=2026-01-07&bin=60s");
    let whole = site.get(&path).await;
    assert!(
        whole.status == 200 && whole.body.len() > 2 << 20,
        "{}: {} bytes",
        whole.status,
        whole.body.len()
    );
    let address = site.url.trim_start_matches("http://").to_owned();
    let mut slow: Vec<TcpStream> = (0..8).map(|_| narrow(&address)).collect();
    for stream in &mut slow {
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    }
    for stream in &mut slow {
        // It begins to answer.
        stream.read_exact(&mut [0; 16]).unwrap();
    }
    assert_eq!(site.get(&path).await.status, 429);
    assert_eq!(site.get("/livez").await.status, 200);
    until("their turns end", DEADLINE, async || (site.get(&path).await.status == 200).then_some(())).await;
    drop(slow);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_an_answer_slowly_gets_all_of_it() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    create_entities(&client).await;
    let rows = "insert into scouter.custom_drift (created_at, entity_id, metric, value)
                select '2026-01-01'::timestamptz + n * interval '1 minute', id, 'a metric with a long name', n + random()
                from scouter.drift_entities, generate_series(1, 9000) n where version = '1.0.0'";
    client.batch_execute(rows).await.unwrap();
    let sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let site = Site::of(&sidecar).await;
    let path = format!("/api/query/custom?{MODEL}&from=2026-01-01&to=2026-01-07&bin=60s");
    let whole = site.get(&path).await.body.len();
    let address = site.url.trim_start_matches("http://").to_owned();
    let taken = tokio::task::spawn_blocking(move || {
        let mut stream = narrow(&address);
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        let (mut piece, mut taken) = (vec![0; 4 << 10], 0);
        // 40 KiB a second: longer than an answer may stand still.
        loop {
            match stream.read(&mut piece).unwrap() {
                0 => return taken,
                count => taken += count,
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let taken = taken.await.unwrap();
    assert!(whole > 1 << 20 && taken > whole, "{taken} of {whole}");
}
