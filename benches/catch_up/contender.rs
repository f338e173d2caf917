//! Who drains the slot, and over what.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use highwater::Lsn;

use super::drain;
use super::measure;
use super::support::cluster::Cluster;
use super::support::sidecar::{Launch, Sidecar};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    Highwater,
    /// The same, whose metrics are scraped 200 times a second.
    Scraped,
    /// The same with a table of the same shape and rows that the settings describe.
    Described,
    /// Another build of the sidecar, to see what a change of it brings.
    Baseline,
    PgRecvlogical,
    /// The sidecar's receiver, and nothing behind it.
    Receiver,
    PlainRecv,
}

impl Contender {
    pub(crate) const ALL: [Self; 7] = [
        Self::Highwater,
        Self::Scraped,
        Self::Described,
        Self::Baseline,
        Self::PgRecvlogical,
        Self::Receiver,
        Self::PlainRecv,
    ];

    pub(crate) fn is_sidecar(self) -> bool {
        matches!(self, Self::Highwater | Self::Scraped | Self::Described | Self::Baseline)
    }

    /// The kind of the rows that it archives.
    pub(crate) fn kind(self) -> &'static str {
        if self == Self::Described { measure::LIKE_PSI } else { "psi" }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Highwater => "highwater",
            Self::Scraped => "scraped",
            Self::Described => "described table",
            Self::Baseline => "baseline",
            Self::PgRecvlogical => "pg_recvlogical",
            Self::Receiver => "our receiver",
            Self::PlainRecv => "plain recv",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

impl Transport {
    pub(crate) const ALL: [Self; 2] = [Self::Tcp, Self::Unix];

    pub(crate) fn uri(self, cluster: &Cluster, database: &str) -> String {
        match self {
            // The cluster has no TLS; asking for it would cost a round trip and nothing else.
            Self::Tcp => cluster.uri_tcp(database) + "?sslmode=disable",
            Self::Unix => cluster.uri_unix(database),
        }
    }

    fn host(self, cluster: &Cluster) -> String {
        match self {
            Self::Tcp => "127.0.0.1".to_owned(),
            Self::Unix => cluster.socket_folder().display().to_string(),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Unix => "Unix",
        })
    }
}

/// What a run drains.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) database: &'a str,
    pub(crate) transport: Transport,
    pub(crate) slot: &'a str,
    pub(crate) publication: &'a str,
    pub(crate) end: Lsn,
    pub(crate) max_lag: &'a str,
    pub(crate) baseline: Option<&'a Path>,
    /// A folder for this run alone.
    pub(crate) folder: &'a Path,
}

/// The pause between two scrapes: a Prometheus makes one in 15 seconds.
const SCRAPE_PAUSE: Duration = Duration::from_millis(5);

/// Scrapes the sidecar whose log is in that folder, until it is gone.
fn scrape(folder: &Path) {
    let log = folder.join("log");
    std::thread::spawn(move || {
        let address = loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(rest) = text.split("serving http://").nth(1) {
                break rest.split_whitespace().next().unwrap_or_default().to_owned();
            }
            std::thread::sleep(SCRAPE_PAUSE);
        };
        while let Ok(mut stream) = TcpStream::connect(&address) {
            let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            // One that ends meanwhile is not connected to again.
            let _ = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut Vec::new()));
            std::thread::sleep(SCRAPE_PAUSE);
        }
    });
}

/// A contender at work.
pub(crate) enum Running {
    Sidecar(Sidecar),
    /// Ends by itself at the end of its task.
    Program(Child),
}

impl Running {
    pub(crate) fn start(contender: Contender, task: &Task<'_>) -> Self {
        let program = match contender {
            Contender::Highwater => return Self::Sidecar(task.launch().start()),
            Contender::Scraped => {
                let sidecar = task.launch().start();
                scrape(task.folder);
                return Self::Sidecar(sidecar);
            }
            Contender::Described => {
                return Self::Sidecar(measure::describing(task.launch(), task.folder).start());
            }
            Contender::Baseline => {
                let program = task.baseline.expect("BENCH_BASELINE names the binary");
                return Self::Sidecar(task.launch().program(program).start());
            }
            Contender::PgRecvlogical => task.pg_recvlogical(),
            Contender::Receiver => task.drain(drain::RECEIVER),
            Contender::PlainRecv => task.drain(drain::PLAIN),
        };
        Self::Program({ program }.stdin(Stdio::null()).spawn().expect("a program"))
    }

    pub(crate) fn pid(&self) -> u32 {
        match self {
            Self::Sidecar(sidecar) => sidecar.pid(),
            Self::Program(child) => child.id(),
        }
    }
}

impl Task<'_> {
    fn launch(&self) -> Launch {
        let uri = self.transport.uri(self.cluster, self.database);
        measure::launch(&uri, self.folder, self.slot)
            .with("HIGHWATER_PUBLICATION", self.publication)
            .with("HIGHWATER_MAX_LAG", self.max_lag)
    }

    fn pg_recvlogical(&self) -> Command {
        let mut command = Command::new(self.cluster.bin().join("pg_recvlogical"));
        command
            .args(["--start", "--no-loop", "--file=/dev/null", "--username=postgres"])
            .arg(format!("--host={}", self.transport.host(self.cluster)))
            .arg(format!("--port={}", self.cluster.port()))
            .arg(format!("--dbname={}", self.database))
            .arg(format!("--slot={}", self.slot))
            .arg(format!("--endpos={}", self.end))
            .args(["--option=proto_version=1", "--option=binary=true"])
            .arg(format!("--option=publication_names={}", self.publication));
        command
    }

    fn drain(&self, reading: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        let uri = self.transport.uri(self.cluster, self.database);
        command.args([drain::COMMAND, reading, &uri, self.slot, &self.end.to_string()]);
        command
    }
}
