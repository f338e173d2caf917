//! Servers that lie: what they send is bounded, and a password is not told to whoever asks.

use std::time::{Duration, Instant};

use highwater::config::SourceConfig;
use highwater::postgres::{ReplicationConnection, sql};
use highwater::{Error, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const SENT_MAX: usize = 64 << 20;

/// Authentication done, and ready for a statement.
const LOGGED_IN: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
/// An answer to what a session begins with: not in recovery.
const PREPARED: &[u8] = b"D\0\0\0\x0b\0\x01\0\0\0\x01fC\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I";

fn source(address: &str, parameters: &str) -> SourceConfig {
    let uri = format!("postgresql://keeper:secret@{address}/db?{parameters}");
    SourceConfig::new(Some(&uri), &|_| None).unwrap()
}

/// Reads a message without a tag, as a connection begins with.
async fn untagged(stream: &mut TcpStream) -> Vec<u8> {
    let length = stream.read_u32().await.unwrap();
    let mut message = vec![0; length as usize - 4];
    stream.read_exact(&mut message).await.unwrap();
    message
}

/// Writes the same again and again until nobody reads any more, or that much was taken; how much was.
async fn flood(mut stream: TcpStream, piece: &[u8]) -> usize {
    let mut sent = 0;
    while sent < SENT_MAX {
        match stream.write_all(piece).await {
            Ok(()) => sent += piece.len(),
            Err(_) => break,
        }
    }
    sent
}

/// A server that says this, after the start-up message and after the first statement, and then floods.
async fn lies(said: Vec<&'static [u8]>, flooded: Vec<u8>) -> (SourceConfig, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        untagged(&mut stream).await;
        for (turn, words) in said.iter().enumerate() {
            if turn > 0 {
                // Whatever it is.
                assert!(stream.read(&mut [0; 8 << 10]).await.unwrap() > 0);
            }
            stream.write_all(words).await.unwrap();
        }
        flood(stream, &flooded).await
    });
    (source(&address, "sslmode=disable"), server)
}

fn notices() -> Vec<u8> {
    let mut notice = b"N\0\0\x04\0".to_vec();
    notice.resize(1_025, 0);
    notice.repeat(256)
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_without_end_are_not_listened_to() {
    for said in [vec![&b""[..]], vec![b"R\0\0\0\x08\0\0\0\0"], vec![LOGGED_IN, b""]] {
        let (config, server) = lies(said, notices()).await;
        let begun = Instant::now();
        let error = ReplicationConnection::connect(&config).await.map(drop).unwrap_err();
        assert!(matches!(&error, Error::Protocol { detail, .. } if detail.contains("notices")), "{error:?}");
        let sent = server.await.unwrap();
        assert!(sent < SENT_MAX && begun.elapsed() < Duration::from_secs(5), "{sent} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_claims_to_be_huge_is_not_held() {
    // A row of 2 GB, in each kind of session.
    let huge = b"D\x7f\xff\xff\xff\0\x01\x7f\xff\xff\xf0";
    let (config, server) = lies(vec![LOGGED_IN, huge], vec![b'x'; 1 << 20]).await;
    let error = ReplicationConnection::connect(&config).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    assert!(server.await.unwrap() < SENT_MAX);

    let (config, server) = lies(vec![LOGGED_IN, PREPARED, huge], vec![b'x'; 1 << 20]).await;
    let client = sql::connect(&config).await.unwrap();
    assert!(client.simple_query("select 1").await.is_err());
    let sent = server.await.unwrap();
    assert!(sent < SENT_MAX, "all {sent} bytes were taken");
}

/// An address of this machine that is not the loopback's.
fn own_address() -> std::net::IpAddr {
    // Sends nothing: the system says by which address it would.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").expect("a network interface beside the loopback");
    socket.local_addr().unwrap().ip()
}

/// What a server gets that has no TLS and asks for the password in this way.
async fn asked(host: &str, parameters: &str, request: &'static [u8]) -> (Result<()>, bool) {
    let listener = TcpListener::bind(format!("{host}:0")).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let mut was_told = false;
        loop {
            let next = tokio::time::timeout(Duration::from_millis(500), listener.accept()).await;
            let Ok(Ok((mut stream, _))) = next else { return was_told };
            let mut first = untagged(&mut stream).await;
            if first.starts_with(b"\x04\xd2\x16\x2f") {
                stream.write_all(b"N").await.unwrap();
                let Ok(length) = stream.read_u32().await else { continue };
                first.resize(length as usize - 4, 0);
                stream.read_exact(&mut first).await.unwrap();
            }
            stream.write_all(request).await.unwrap();
            was_told |= stream.read_u8().await.is_ok_and(|tag| tag == b'p');
        }
    });
    let result = ReplicationConnection::connect(&source(&address, parameters)).await.map(drop);
    (result, server.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_not_told_to_a_server_without_tls_that_others_may_listen_to() {
    let away = own_address().to_string();
    let requests = [&b"R\0\0\0\x08\0\0\0\x03"[..], b"R\0\0\0\x0c\0\0\0\x05salt"];
    for request in requests {
        for parameters in ["", "sslmode=prefer", "sslmode=allow"] {
            let (result, was_told) = asked(&away, parameters, request).await;
            assert!(!was_told, "{parameters}: the password was sent");
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Setting { setting, .. } if setting == "sslmode"), "{error:?}");
            assert!(error.to_string().contains("sslmode=disable"), "{error}");
        }
        // Who has said so, or is on the same machine.
        assert!(asked(&away, "sslmode=disable", request).await.1);
        assert!(asked("127.0.0.1", "sslmode=prefer", request).await.1);
    }
    // Of SCRAM an eavesdropper has nothing, and the server has to know the password.
    let scram = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";
    assert!(asked(&away, "sslmode=prefer", scram).await.1);
}
