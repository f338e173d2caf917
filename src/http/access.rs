//! Who may ask, and what browsers are told of the answers.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::ConstantTimeEq as _;

use super::problem::Problem;
use crate::config::HttpAccess;

/// What is shown to whom a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// Whether all is well, and no more: for probes, which have no token.
    Outcome,
}

/// Whom a server answers, and how often it did not.
#[derive(Debug)]
pub(super) struct Access {
    to: HttpAccess,
    refused: AtomicU64,
    /// When that was last told, microseconds since the epoch.
    told: AtomicI64,
}

/// How often refusals are told: whoever guesses must not fill the log. Microseconds.
const TELL_INTERVAL: i64 = 60_000_000;

impl Access {
    pub(super) fn new(to: HttpAccess) -> Self {
        Self { to, refused: AtomicU64::new(0), told: AtomicI64::new(0) }
    }

    /// Somebody was refused.
    fn tell(&self) {
        let all = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let now = chrono::Utc::now().timestamp_micros();
        if now - self.told.load(Ordering::Relaxed) > TELL_INTERVAL {
            self.told.store(now, Ordering::Relaxed);
            tracing::warn!(all, "requests without the right token are refused");
        }
    }
}

/// The paths that probes may ask for without a token.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/healthz"];

/// Lets through who may ask.
pub(super) async fn admit(State(access): State<Arc<Access>>, mut request: Request, next: Next) -> Response {
    let refusal = match &access.to {
        _ if !has_one_host(&request) => Some(no_host()),
        HttpAccess::Anybody => None,
        HttpAccess::Local => {
            let is_local = is_local(request.headers()) && request.uri().host().is_none_or(is_local_name);
            (!is_local).then(foreign_host)
        }
        HttpAccess::Token(token) => match has_token(request.headers(), token.reveal()) {
            true => None,
            false if PROBES.contains(&request.uri().path()) => {
                request.extensions_mut().insert(Shown::Outcome);
                None
            }
            false => {
                access.tell();
                Some(no_token())
            }
        },
    };
    let mut response = match refusal {
        Some(refusal) => refusal,
        None => next.run(request).await,
    };
    harden(response.headers_mut());
    response
}

/// What browsers are told of every answer. The page has its own policy for what it may load.
fn harden(headers: &mut HeaderMap) {
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
}

/// Whether the request names this machine: the page of another site may have had its name lead here (DNS rebinding).
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    is_local_name(name)
}

fn is_local_name(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let is_name = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    is_name || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether the request names one host, as it has to from HTTP/1.1 on (RFC 9112, section 3.2).
fn has_one_host(request: &Request) -> bool {
    match request.headers().get_all(header::HOST).iter().count() {
        0 => request.version() < Version::HTTP_11,
        hosts => hosts == 1,
    }
}

fn no_host() -> Response {
    Problem::bad("the request has to name one host").into_response()
}

fn foreign_host() -> Response {
    let detail = "the host of the request is not this machine; set HIGHWATER_HTTP_TOKEN to be asked under another name";
    Problem::new(StatusCode::MISDIRECTED_REQUEST, detail).into_response()
}

/// Whether the request has the token: as a bearer (RFC 6750), or as the password of any user (RFC 7617).
fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    // Of two of them somebody before us may have looked at the other one.
    let (Some(given), None) = (given.next(), given.next()) else { return false };
    let given = given.to_str().ok();
    let Some((scheme, credentials)) = given.and_then(|value| value.split_once(' ')) else { return false };
    let credentials = credentials.trim();
    let given = if scheme.eq_ignore_ascii_case("bearer") {
        credentials.as_bytes().to_vec()
    } else if scheme.eq_ignore_ascii_case("basic") {
        let decoded = STANDARD.decode(credentials).unwrap_or_default();
        let colon = decoded.iter().position(|byte| *byte == b':');
        colon.and_then(|colon| decoded.get(colon + 1..)).unwrap_or_default().to_vec()
    } else {
        return false;
    };
    given.ct_eq(token.as_bytes()).into()
}

fn no_token() -> Response {
    let detail = "a token is wanted: `Authorization: Bearer ...`, or basic auth with any name and the token as the password";
    let mut response = Problem::new(StatusCode::UNAUTHORIZED, detail).into_response();
    let challenge = HeaderValue::from_static("Basic realm=\"highwater\", charset=\"UTF-8\"");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: header::HeaderName, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_host_of_another_machine_is_told_from_ours() {
        for host in [
            "localhost",
            "LOCALHOST:9808",
            "127.0.0.1:9808",
            "127.1.2.3",
            "[::1]:9808",
            "[::1]",
            "a.localhost:1",
        ] {
            assert!(is_local(&with(header::HOST, host)), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9808",
            "localhost.evil.example",
            "10.0.0.1",
            "127.0.0.1.evil.example",
            "",
            ":1",
        ] {
            assert!(!is_local(&with(header::HOST, host)), "{host}");
        }
    }

    #[test]
    fn the_token_is_a_bearer_or_a_password() {
        let token = "0123456789abcdef";
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let has = |value: &str| has_token(&with(header::AUTHORIZATION, value), token);
        assert!(has("Bearer 0123456789abcdef") && has("bearer  0123456789abcdef"));
        assert!(has(&basic("me:0123456789abcdef")) && has(&basic(":0123456789abcdef")));
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdef0",
            "Digest 0123456789abcdef",
        ] {
            assert!(!has(wrong), "{wrong}");
        }
        for wrong in ["0123456789abcdef", "0123456789abcdef:", "me:", ""] {
            assert!(!has(&basic(wrong)), "{wrong}");
        }
        let mut two = with(header::AUTHORIZATION, "Bearer 0123456789abcdef");
        two.append(header::AUTHORIZATION, HeaderValue::from_static("Bearer other"));
        assert!(!has_token(&two, token));
        assert!(!has("Basic !!!") && !has_token(&HeaderMap::new(), token));
    }
}
