//! Readers that keep nothing: how fast a stream can be had at all.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::{BufMut as _, BytesMut};
use highwater::Lsn;
use highwater::config::{Address, SourceConfig};
use highwater::postgres::{Chunk, Frame, ReplicationConnection};
use postgres_protocol::message::frontend;
use tokio::sync::{mpsc, watch};

/// The argument that makes this program a drain.
pub(crate) const COMMAND: &str = "drain";
/// The sidecar's receiver.
pub(crate) const RECEIVER: &str = "receiver";
/// Blocking `recv`s.
pub(crate) const PLAIN: &str = "plain";

const PUBLICATION: &str = "bench";
const READ_BYTES: usize = 256 << 10;
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Drains a slot up to a position, acknowledges it, and returns.
pub(crate) fn run(reading: &str, uri: &str, slot: &str, end: Lsn) {
    let config = SourceConfig::new(Some(uri), &|_| None).expect("a source");
    match reading {
        RECEIVER => {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(receive(&config, slot, end));
        }
        PLAIN => receive_plainly(&config, slot, end),
        other => panic!("no such reading: {other}"),
    }
}

async fn receive(config: &SourceConfig, slot: &str, end: Lsn) {
    let connection = ReplicationConnection::connect(config).await.expect("a connection");
    let stream = connection.start(slot, &[PUBLICATION], false).await.expect("a stream");
    // As long as the sidecar's.
    let (sender, mut chunks) = mpsc::channel(8);
    let (durable, watched) = watch::channel(Lsn::ZERO);
    let receiver = stream.spawn(sender, watched);
    let mut reported = Instant::now();
    loop {
        let chunk = chunks.recv().await.expect("the stream goes on");
        let position = position(&chunk);
        if position >= end {
            break;
        }
        if reported.elapsed() > STATUS_INTERVAL {
            durable.send_replace(position);
            reported = Instant::now();
        }
    }
    durable.send_replace(end);
    receiver.finish().await.expect("a clean end");
}

/// How far the stream is; walking the frames is all that is done with them.
fn position(chunk: &Chunk) -> Lsn {
    let position = |frame| match frame {
        Frame::XLogData { wal_start, .. } => wal_start,
        Frame::Keepalive { wal_end, .. } => wal_end,
    };
    chunk.frames().map(|frame| position(frame.expect("a frame"))).max().unwrap_or(Lsn::ZERO)
}

trait Socket: Read + Write {}
impl<T: Read + Write> Socket for T {}

/// The least that a client can do. Only for a server that trusts us.
fn receive_plainly(config: &SourceConfig, slot: &str, end: Lsn) {
    let mut socket = connect(config);
    let mut message = BytesMut::new();
    let parameters = [("user", "postgres"), ("database", &config.database), ("replication", "database")];
    frontend::startup_message(parameters, &mut message).expect("a message");
    let command = format!(
        "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (proto_version '1', publication_names '{PUBLICATION}', binary 'true')"
    );
    socket.write_all(&message).expect("write");
    skip_to(&mut *socket, b'Z');
    message.clear();
    frontend::query(&command, &mut message).expect("a message");
    socket.write_all(&message).expect("write");
    skip_to(&mut *socket, b'W');

    let mut buffer = vec![0; READ_BYTES];
    let mut filled = 0;
    let mut position = Lsn::ZERO;
    let mut reported = Instant::now();
    while position < end {
        match socket.read(&mut buffer[filled..]) {
            Ok(0) => panic!("the server has closed the connection"),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        let walked = walk(&buffer[..filled], &mut position);
        buffer.copy_within(walked..filled, 0);
        filled -= walked;
        if reported.elapsed() > STATUS_INTERVAL {
            report(&mut *socket, position);
            reported = Instant::now();
        }
    }
    report(&mut *socket, end);
    message.clear();
    frontend::copy_done(&mut message);
    socket.write_all(&message).expect("write");
    // What is under way is read, so that the walsender sees the end and not a broken pipe.
    while socket.read(&mut buffer).is_ok_and(|count| count > 0 && !buffer[..count].ends_with(b"Z\0\0\0\x05I"))
    {
    }
}

fn connect(config: &SourceConfig) -> Box<dyn Socket> {
    match &config.endpoints[0].address {
        Address::Tcp { host, port } => {
            let socket = TcpStream::connect((host.as_str(), *port)).expect("a connection");
            socket.set_nodelay(true).expect("an option");
            socket.set_read_timeout(Some(STATUS_INTERVAL)).expect("an option");
            Box::new(socket)
        }
        Address::Unix { directory, port } => {
            let socket =
                UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).expect("a connection");
            socket.set_read_timeout(Some(STATUS_INTERVAL)).expect("an option");
            Box::new(socket)
        }
    }
}

/// Passes over messages up to one of this type.
fn skip_to(socket: &mut dyn Socket, wanted: u8) {
    loop {
        let mut header = [0; 5];
        socket.read_exact(&mut header).expect("a message");
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize - 4;
        let mut body = vec![0; length];
        socket.read_exact(&mut body).expect("a message");
        assert!(header[0] != b'E', "{}", String::from_utf8_lossy(&body));
        if header[0] == wanted {
            return;
        }
    }
}

/// Notes the position of the last whole frame; how many bytes the whole frames have.
fn walk(bytes: &[u8], position: &mut Lsn) -> usize {
    let mut walked = 0;
    while let Some(header) = bytes.get(walked..walked + 14) {
        let whole = u32::from_be_bytes(header[1..5].try_into().expect("four bytes")) as usize + 1;
        if walked + whole > bytes.len() {
            break;
        }
        assert!(header[0] == b'd' && matches!(header[5], b'w' | b'k'), "a message of type {}", header[0]);
        // Of a keepalive it is the end of the log, of a row its own place.
        *position = Lsn(u64::from_be_bytes(header[6..14].try_into().expect("eight bytes"))).max(*position);
        walked += whole;
    }
    walked
}

fn report(socket: &mut dyn Socket, position: Lsn) {
    let mut message = BytesMut::new();
    message.put_slice(b"d\0\0\0\x26r");
    for _ in ["written", "flushed", "applied"] {
        message.put_u64(position.0);
    }
    message.put_u64(0);
    message.put_u8(0);
    socket.write_all(&message).expect("write");
}
