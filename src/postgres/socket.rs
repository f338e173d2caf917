//! [`Socket`]: a byte stream to a server, plain or TLS.

use std::io::{self, Read as _};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio_rustls::client::TlsStream;

use super::tls;
use crate::config::{Address, Endpoint, Keepalive, SourceConfig, SslMode};
use crate::error::{Error, Result};

/// `SO_RCVBUF` for a server on the same machine: see [`pace`](super::pace).
pub(super) const LOCAL_RECEIVE_BUFFER: usize = 128 << 10;

/// Notices a silent peer within about a minute and a half. The kernel's default is two hours.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 3);

/// How long sent bytes may stay unconfirmed. Keepalives are not sent while there are such bytes, and the
/// status updates of a replication connection are never far apart, so a cut cable would go unnoticed for the
/// 15 minutes of the kernel's retransmissions.
#[cfg(target_os = "linux")]
const UNCONFIRMED_MAX: Duration = Duration::from_secs(60);

/// A connected stream to a PostgreSQL server, before or after the login.
#[derive(Debug)]
#[non_exhaustive]
pub enum Socket {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket. Never encrypted, as in libpq.
    #[cfg(unix)]
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// A plain socket that the runtime doesn't watch, until it is next used. Without one it is lost: the
    /// runtime refused to watch it again.
    Unwatched(Option<Unwatched>),
}

/// A plain socket outside the runtime.
#[derive(Debug)]
pub enum Unwatched {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// A Unix socket.
    #[cfg(unix)]
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    /// What a login over it can be bound to.
    pub(super) fn end_point(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tls(stream) => tls::end_point(stream),
            _ => None,
        }
    }

    /// It is encrypted.
    pub(super) const fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// The server is on this machine.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(stream) => is_local(stream),
            Self::Tls(stream) => is_local(stream.get_ref().0),
            #[cfg(unix)]
            Self::Unix(_) => true,
            Self::Unwatched(_) => false,
        }
    }

    /// Nobody in between can read what is sent: it is encrypted, or stays on this machine.
    pub(super) fn is_private(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.peer_addr().is_ok_and(|server| server.ip().is_loopback()),
            Self::Tls(_) => true,
            #[cfg(unix)]
            Self::Unix(_) => true,
            Self::Unwatched(_) => false,
        }
    }

    /// Keeps what arrives from waking anybody, until the socket is next used. Not to ask for data isn't enough for that:
    /// the runtime watches a socket edge-triggered, so that each piece of data wakes a thread, whoever waits for it.
    /// Does nothing for TLS.
    pub(super) fn unwatch(&mut self) -> io::Result<()> {
        *self = match std::mem::replace(self, Self::Unwatched(None)) {
            Self::Tcp(stream) => Self::Unwatched(Some(Unwatched::Tcp(stream.into_std()?))),
            #[cfg(unix)]
            Self::Unix(stream) => Self::Unwatched(Some(Unwatched::Unix(stream.into_std()?))),
            other => other,
        };
        Ok(())
    }

    /// Reads from a Unix socket that is not watched, without watching it. `None` if there is nothing, or it is another
    /// socket. (TCP's pauses are so long that watching costs nothing; and the moment that it takes lets the sender
    /// fill the buffer again.)
    pub(super) fn read_unwatched(&mut self, buffer: &mut [u8]) -> Option<io::Result<usize>> {
        match self {
            #[cfg(unix)]
            Self::Unwatched(Some(Unwatched::Unix(stream))) => match stream.read(buffer) {
                // The runtime has made it non-blocking.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                {
                    None
                }
                other => Some(other),
            },
            _ => None,
        }
    }

    fn watch(&mut self) -> io::Result<()> {
        let Self::Unwatched(stream) = self else { return Ok(()) };
        *self = match stream.take().ok_or(io::ErrorKind::NotConnected)? {
            Unwatched::Tcp(stream) => Self::Tcp(TcpStream::from_std(stream)?),
            #[cfg(unix)]
            Unwatched::Unix(stream) => Self::Unix(UnixStream::from_std(stream)?),
        };
        Ok(())
    }
}

/// Nothing that can't be told is taken for local.
fn is_local(stream: &TcpStream) -> bool {
    match (stream.peer_addr(), stream.local_addr()) {
        (Ok(server), Ok(own)) => server.ip() == own.ip(),
        _ => false,
    }
}

/// Whether a connection begins with TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    Plain,
    /// If the server has it.
    Offered,
    Needed,
}

/// What is tried with a server, one after the other (manual 34.19.3); the second one if TLS fails, or if the server wants
/// nothing to do with whoever comes by the first way.
pub(super) const fn attempts(mode: SslMode, address: &Address) -> &'static [Encryption] {
    match (mode, address) {
        (SslMode::Disable, _) | (_, Address::Unix { .. }) => &[Encryption::Plain],
        (SslMode::Allow, _) => &[Encryption::Plain, Encryption::Needed],
        (SslMode::Prefer, _) => &[Encryption::Offered, Encryption::Plain],
        (SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull, _) => &[Encryption::Needed],
    }
}

/// Reaches a server. Nobody is logged in yet.
///
/// # Errors
///
/// [`Error::Io`] (of kind `InvalidData` if its certificate is refused), [`Error::Protocol`] if it has no TLS though it is
/// needed, [`Error::Setting`] if a certificate file can't be used.
pub(super) async fn open(
    config: &SourceConfig,
    endpoint: &Endpoint,
    encryption: Encryption,
) -> Result<Socket> {
    match &endpoint.address {
        #[cfg(unix)]
        Address::Unix { directory, port } => {
            let path = directory.join(format!(".s.PGSQL.{port}"));
            let stream = UnixStream::connect(&path).await;
            stream.map(Socket::Unix).map_err(Error::io(format!("connecting to {}", path.display())))
        }
        #[cfg(not(unix))]
        Address::Unix { directory, .. } => Err(Error::Setting {
            setting: "host".to_owned(),
            value: directory.display().to_string(),
            accepted: "a host's name: this system has no Unix sockets".to_owned(),
        }),
        Address::Tcp { host, port } => {
            let context = format!("connecting to {}", endpoint.address);
            let stream = match endpoint.host_address {
                Some(address) => TcpStream::connect((address, *port)).await,
                // Tries each address of the name.
                None => TcpStream::connect((host.as_str(), *port)).await,
            };
            let stream = stream.map_err(Error::io(&context))?;
            tune(config, &stream).map_err(Error::io(&context))?;
            encrypt(config, stream, host, encryption, context).await
        }
    }
}

fn tune(config: &SourceConfig, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    if is_local(stream) {
        socket.set_recv_buffer_size(LOCAL_RECEIVE_BUFFER)?;
    }
    match config.keepalive {
        Some(Keepalive { idle, interval, count }) => {
            let keepalive = socket2::TcpKeepalive::new()
                .with_time(idle.unwrap_or(KEEPALIVE.0))
                .with_interval(interval.unwrap_or(KEEPALIVE.1))
                .with_retries(count.unwrap_or(KEEPALIVE.2));
            socket.set_tcp_keepalive(&keepalive)?;
        }
        None => socket.set_keepalive(false)?,
    }
    #[cfg(target_os = "linux")]
    match config.tcp_user_timeout {
        // The system's own.
        Some(Duration::ZERO) => {}
        given => socket.set_tcp_user_timeout(Some(given.unwrap_or(UNCONFIRMED_MAX)))?,
    }
    Ok(())
}

/// Asks for TLS (manual 55.2.10, `SSLRequest`), unless it is not wanted, or to begin without a question.
async fn encrypt(
    config: &SourceConfig,
    mut stream: TcpStream,
    host: &str,
    encryption: Encryption,
    context: String,
) -> Result<Socket> {
    if encryption == Encryption::Plain {
        return Ok(Socket::Tcp(stream));
    }
    if !config.ssl_direct {
        let mut request = bytes::BytesMut::new();
        postgres_protocol::message::frontend::ssl_request(&mut request);
        stream.write_all(&request).await.map_err(Error::io(&context))?;
        // Exactly one byte: whatever follows it belongs to TLS. What somebody in between has put there in plain
        // text must not be taken for the server's words.
        let answer = stream.read_u8().await.map_err(Error::io(&context))?;
        match answer {
            b'S' => {}
            b'N' if encryption == Encryption::Offered => return Ok(Socket::Tcp(stream)),
            b'N' => {
                return Err(Error::Setting {
                    setting: "sslmode".to_owned(),
                    value: "it asks for TLS".to_owned(),
                    accepted: format!(
                        "a server that has TLS, which {host} has not (`ssl = on` there), or `prefer` or `disable`, if the \
                         network is trusted"
                    ),
                });
            }
            _ => {
                let detail = format!("the answer to SSLRequest is {answer:#04x}");
                return Err(Error::Protocol { context, detail });
            }
        }
    }
    tls::handshake(config, stream, host, context).await.map(|stream| Socket::Tls(Box::new(stream)))
}

/// After the handshake, bytes that TLS can't accept were damaged on their way, or the server was cut off: a new
/// connection may cure that. [`Error::policy`] takes `InvalidData` for a certificate that was refused, so that
/// kind is kept for the handshake, and for the one part of it that TLS 1.3 tells later: what the server thinks of
/// our certificate.
fn established(error: io::Error) -> io::Error {
    use rustls::AlertDescription as Alert;
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let is_verdict = matches!(
        cause,
        Some(rustls::Error::AlertReceived(
            Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::CertificateRequired
        ))
    );
    match error.kind() {
        io::ErrorKind::InvalidData if !is_verdict => io::Error::new(io::ErrorKind::ConnectionAborted, error),
        _ => error,
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {{
        let socket = $self.get_mut();
        if let Err(error) = socket.watch() {
            return Poll::Ready(Err(error));
        }
        match socket {
            Socket::Tcp($stream) => $call,
            #[cfg(unix)]
            Socket::Unix($stream) => $call,
            Socket::Tls($stream) => $call.map_err(established),
            // It is watched.
            Socket::Unwatched(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }};
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_in_mid_stream_is_worth_a_retry_and_a_refused_certificate_is_not() {
        let wrap = |error: rustls::Error| {
            Error::io("test")(established(io::Error::new(io::ErrorKind::InvalidData, error)))
        };
        for error in [
            rustls::Error::DecryptError,
            rustls::Error::AlertReceived(rustls::AlertDescription::BadRecordMac),
        ] {
            let text = error.to_string();
            let wrapped = wrap(error);
            assert!(wrapped.is_transient() && wrapped.chain().contains(&text), "{wrapped:?}");
        }
        let refused = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired);
        assert!(!wrap(refused).is_transient());
    }
}
