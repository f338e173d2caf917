//! A socket on which a router answers: bounded in connections, in time and in what a request may be.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::Router;
use axum::middleware;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use super::access::{self, Access};
use crate::config::{HttpSettings, Setting};
use crate::error::{Error, Result};

/// Connections that are open at a time. The next one takes the place of the one that has waited longest for a request: whoever opens
/// connections and says nothing can't keep a probe out.
const CONNECTIONS_MAX: usize = 512;

/// How long the head of a request may take, and a connection may be idle before the next one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client may take nothing of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// What of an answer waits in a socket to be sent.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// The most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The most headers of a request.
const HEADERS_MAX: usize = 64;

/// How long a stop waits for answers that are under way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after a connection that could not be accepted: for want of file descriptors, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that is open, for the routes of [`router`](super::router) or [`reader`](super::reader).
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    access: Arc<Access>,
}

impl Server {
    /// Opens the socket that the settings name; `None` if they name none.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the address can't be had: somebody else has it, say.
    pub async fn bind(settings: &HttpSettings) -> Result<Option<Self>> {
        let Some(wanted) = settings.listen else { return Ok(None) };
        let refused = |error: std::io::Error| Error::Setting {
            setting: Setting::Http.variable().to_owned(),
            value: wanted.to_string(),
            accepted: format!(
                "an address that is free ({error}): another program, or another Highwater, listens there; name another one, \
                 or `off`"
            ),
        };
        let listener = TcpListener::bind(wanted).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        Ok(Some(Self { listener, address, access: Arc::new(Access::new(settings.access.clone())) }))
    }

    /// The address, with the port that was chosen if the settings leave that open.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop`; then what is under way is finished, for a few seconds.
    pub async fn serve(self, router: Router, stop: impl Future<Output = ()>) {
        // Around all of it: what a route accepts is not for those to know who may not ask.
        let admitted = middleware::from_fn_with_state(Arc::clone(&self.access), access::admit);
        let router = Router::new().fallback_service(router).layer(admitted);
        let (graceful, mut seats) = (GracefulShutdown::new(), Seats::default());
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stop => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Dropping the stream closes it.
            let Some(seat) = seats.take() else { continue };
            let connection = graceful.watch(connection(stream, router.clone(), Arc::clone(&seat)));
            tokio::spawn(async move {
                tokio::select! {
                    ended = connection => {
                        if let Err(error) = ended {
                            tracing::debug!(%error, "a connection ended");
                        }
                    }
                    () = seat.left.notified() => tracing::debug!("a connection that waits is closed for another one"),
                }
            });
        }
        drop(self.listener);
        if timeout(DRAIN_TIMEOUT, graceful.shutdown()).await.is_err() {
            tracing::warn!("answers that were under way are cut short");
        }
    }
}

/// The connections that are open, the oldest first.
#[derive(Debug, Default)]
struct Seats(VecDeque<Weak<Seat>>);

/// A connection's: it is free when this is dropped.
#[derive(Debug, Default)]
struct Seat {
    /// Requests that are being answered.
    answering: AtomicUsize,
    /// Told when another connection wants the place.
    left: Notify,
}

impl Seats {
    /// A place, if there is one, or one that nobody makes use of.
    fn take(&mut self) -> Option<Arc<Seat>> {
        if self.0.len() >= CONNECTIONS_MAX {
            self.0.retain(|seat| seat.strong_count() > 0);
        }
        if self.0.len() >= CONNECTIONS_MAX {
            let waits = |seat: &Weak<Seat>| {
                seat.upgrade().is_none_or(|seat| seat.answering.load(Ordering::Relaxed) == 0)
            };
            let oldest = self.0.iter().position(waits)?;
            if let Some(seat) = self.0.remove(oldest).and_then(|seat| seat.upgrade()) {
                seat.left.notify_one();
            }
        }
        let seat = Arc::new(Seat::default());
        self.0.push_back(Arc::downgrade(&seat));
        Some(seat)
    }
}

/// A connection, which is bounded in its heads and in how slow it may be.
fn connection(
    stream: TcpStream,
    router: Router,
    seat: Arc<Seat>,
) -> impl GracefulConnection<Error = hyper::Error> + Send {
    let routes = TowerToHyperService::new(router);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (answer, seat) = (routes.call(request), Arc::clone(&seat));
        async move {
            seat.answering.fetch_add(1, Ordering::Relaxed);
            // A request that is given up takes its connection with it.
            let answer = answer.await;
            seat.answering.fetch_sub(1, Ordering::Relaxed);
            answer
        }
    });
    // Small answers go out at once; without it they are slower, no more.
    let _ = stream.set_nodelay(true);
    // Else megabytes lie in it, and a slow reader who takes of them is not seen to take anything.
    let _ = SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER_BYTES);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}
