//! What a connection string may ask for, typed.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// How much TLS is asked for (manual 34.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// No TLS.
    Disable,
    /// TLS if the server refuses to talk without.
    Allow,
    /// TLS if the server has it, unverified.
    Prefer,
    /// TLS. Unverified, unless a root certificate is given: then as [`SslMode::VerifyCa`], as in libpq.
    Require,
    /// TLS, with a certificate that the roots vouch for, whoever's it is.
    VerifyCa,
    /// TLS, with a certificate that the roots vouch for and that names the host.
    VerifyFull,
}

impl FromStr for SslMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "disable" => Self::Disable,
            "allow" => Self::Allow,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return Err(()),
        })
    }
}

/// A version of TLS that both sides may agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2.
    V12,
    /// TLS 1.3.
    V13,
}

/// Whether the login is bound to the TLS session, so that nobody in between can pass it on (`SCRAM-SHA-256-PLUS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// Where the server offers it.
    Prefer,
    /// Always; else there is no login.
    Require,
}

/// A way to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// The password in the clear.
    Password,
    /// Its MD5.
    Md5,
    /// SCRAM-SHA-256.
    Scram,
    /// The server asks for nothing (or for a client's certificate).
    None,
}

/// Which of several servers is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// One that is not in recovery: archiving writes to it.
    Primary,
    /// The first that answers, which is enough for reading the watermarks.
    Any,
}

/// When a silent peer is noticed; `None` leaves a part to our default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first question.
    pub idle: Option<Duration>,
    /// Time between questions.
    pub interval: Option<Duration>,
    /// Questions without an answer.
    pub count: Option<u32>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host's name or address, and a port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix {
        /// The directory of the socket file.
        directory: PathBuf,
        /// The number in the socket file's name.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix { directory, port } => write!(f, "{}:{port}", directory.display()),
        }
    }
}

/// A password, which no text shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(pub(super) String);

impl Password {
    /// A secret of that text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The password itself, for what it authenticates only.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One server to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: Address,
    /// The address to connect to, so that the host's name is not looked up (`hostaddr`).
    pub host_address: Option<IpAddr>,
}
