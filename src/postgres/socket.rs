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
use tracing::warn;

use super::{pace, tls};
use crate::config::SourceConfig;
use crate::config::{Address, Endpoint, SslMode};
use crate::error::{Error, Result};

/// Notices a silent peer within about a minute and a half. The kernel's default is two hours.
const KEEPALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

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
    /// Connects to the first server that answers, with as much TLS as `ssl_mode` asks for. Each server has
    /// `connect_timeout`. Nobody is logged in yet.
    ///
    /// # Errors
    ///
    /// The last server's failure: [`Error::Io`] (of kind `InvalidData` if its certificate is refused),
    /// [`Error::Protocol`] if it has no TLS though it is required, [`Error::Setting`] if a certificate file
    /// can't be used.
    pub async fn connect(config: &SourceConfig) -> Result<Self> {
        connect(config).await.map(|(socket, _)| socket)
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

/// Also says which server it was: its password may be its own.
pub(super) async fn connect(config: &SourceConfig) -> Result<(Socket, &Endpoint)> {
    let mut failure = None;
    for endpoint in &config.endpoints {
        let attempt = tokio::time::timeout(config.connect_timeout, open(config, &endpoint.address));
        let context = || format!("connecting to {}", endpoint.address);
        let result = match attempt.await {
            Ok(result) => result,
            Err(_) => Err(Error::io(context())(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {} s", config.connect_timeout.as_secs()),
            ))),
        };
        match result {
            Ok(socket) => return Ok((socket, endpoint)),
            Err(error) => {
                if config.endpoints.len() > 1 {
                    warn!(error = error.chain(), "server can't be reached");
                }
                failure = Some(error);
            }
        }
    }
    Err(failure.unwrap_or_else(|| Error::Internal("a source without servers".to_owned())))
}

async fn open(config: &SourceConfig, address: &Address) -> Result<Socket> {
    match address {
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
            let context = format!("connecting to {address}");
            // Tries each address of the name.
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(Error::io(&context))?;
            tune(&stream).map_err(Error::io(&context))?;
            encrypt(config, stream, host, context).await
        }
    }
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    if is_local(stream) {
        socket.set_recv_buffer_size(pace::LOCAL_RECEIVE_BUFFER)?;
    }
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNCONFIRMED_MAX))?;
    Ok(())
}

/// Asks for TLS (manual 55.2.10, `SSLRequest`), unless it is not wanted.
async fn encrypt(
    config: &SourceConfig,
    mut stream: TcpStream,
    host: &str,
    context: String,
) -> Result<Socket> {
    if config.ssl_mode == SslMode::Disable {
        return Ok(Socket::Tcp(stream));
    }
    let mut request = bytes::BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(Error::io(&context))?;
    // Exactly one byte: whatever follows it belongs to TLS. What somebody in between has put there in plain
    // text must not be taken for the server's words.
    let answer = stream.read_u8().await.map_err(Error::io(&context))?;
    match answer {
        b'S' => {
            tls::handshake(config, stream, host, context).await.map(|stream| Socket::Tls(Box::new(stream)))
        }
        b'N' if config.ssl_mode == SslMode::Prefer => Ok(Socket::Tcp(stream)),
        b'N' => Err(Error::Protocol {
            context,
            detail: "the server has no TLS, but sslmode asks for it".to_owned(),
        }),
        _ => Err(Error::Protocol { context, detail: format!("the answer to SSLRequest is {answer:#04x}") }),
    }
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
