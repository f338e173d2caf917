//! [`SourceConfig`]: which database to archive, and how to reach it. The rules are libpq's (manual 34.1,
//! 34.15): a connection string, completed by a service file and `PG*` variables, completed by defaults.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::conninfo::{Raw, Typed};
use super::passfile::{self, Wanted};
use crate::error::{Error, Result};

/// Used when neither a URI nor a variable says where the database is.
pub const DEFAULT_URI: &str = "postgresql://postgres:postgres@localhost:5432/postgres";

/// libpq waits for ever by default. Nobody watches a sidecar, so it has to give up and say so.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Where Debian's and most other packages put the socket.
const SOCKET_DIRECTORY: &str = "/var/run/postgresql";

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
pub struct Password(String);

impl Password {
    /// The password itself, for the authentication exchange only.
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

/// A database to archive. Neither `Debug` nor `Display` shows a password; `Display` is for people:
/// `postgres@localhost:5432/postgres`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// The servers, tried in turn. Never empty.
    pub endpoints: Vec<Endpoint>,
    /// They are tried in random order (`load_balance_hosts`).
    pub shuffles: bool,
    /// Which of them is taken (`target_session_attrs`).
    pub target: Target,
    /// The role to log in as.
    pub user: String,
    /// The password from the URI, the service or the environment.
    pub password: Option<Password>,
    /// Where it is looked for otherwise, at each login.
    pub password_file: Option<PathBuf>,
    /// The database's name.
    pub database: String,
    /// How much TLS.
    pub ssl_mode: SslMode,
    /// PEM file of trusted roots; without it the system's are trusted.
    pub ssl_root_cert: Option<PathBuf>,
    /// PEM files of the client's certificate chain and its key.
    pub ssl_identity: Option<(PathBuf, PathBuf)>,
    /// PEM files of certificates that were revoked, or folders of such files.
    pub ssl_crls: Vec<PathBuf>,
    /// TLS begins at once, without asking for it first; servers know that from PostgreSQL 17 on.
    pub ssl_direct: bool,
    /// The host's name is told in the handshake.
    pub ssl_sni: bool,
    /// The oldest and the newest version of TLS.
    pub ssl_versions: (TlsVersion, TlsVersion),
    /// Whether the login is bound to the TLS session.
    pub channel_binding: ChannelBinding,
    /// Ways to log in that are acceptable; `None` for all.
    pub require_auth: Option<Vec<AuthMethod>>,
    /// Bound of the time to reach one server, and again of the time to log in there.
    pub connect_timeout: Duration,
    /// `None` to send no keepalives.
    pub keepalive: Option<Keepalive>,
    /// How long sent bytes may stay unconfirmed: `None` for our default, zero for the system's.
    pub tcp_user_timeout: Option<Duration>,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
    /// Command-line options for the server's process, such as `-c work_mem=64MB`. What Highwater relies on is set
    /// after the login, and wins.
    pub options: Option<String>,
}

impl SourceConfig {
    /// Checks and completes what was typed: a URI or `keyword=value` pairs. `environment` looks up a variable; the string
    /// wins over it. With no string and none of `PGHOST`, `PGHOSTADDR`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGDATABASE` and
    /// `PGSERVICE`, [`DEFAULT_URI`] is taken. Reads the service file if it is needed.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a string that can't be read, an unknown parameter or a bad value. Its text
    /// never has the password.
    pub fn new(uri: Option<&str>, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
        let placed = ["PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSERVICE"];
        let uri = match uri.filter(|text| !text.trim().is_empty()) {
            Some(text) => Some(text.trim()),
            None if placed.into_iter().any(|name| variable(name).is_some()) => None,
            None => Some(DEFAULT_URI),
        };
        let typed = uri.map(Raw::parse).transpose()?.unwrap_or_default();
        check(&typed.complete(&variable)?, &variable)
    }

    /// The password for a server, as it is now: the file is read each time, because it may have changed.
    pub(crate) fn password(&self, endpoint: &Endpoint) -> Option<Password> {
        if self.password.is_some() {
            return self.password.clone();
        }
        let text = passfile::read(self.password_file.as_deref()?)?;
        let (host, port) = match &endpoint.address {
            Address::Tcp { host, port } => (host.as_str(), *port),
            // The file knows the default socket directory as `localhost`.
            Address::Unix { directory, port } if directory == Path::new(SOCKET_DIRECTORY) => {
                ("localhost", *port)
            }
            Address::Unix { directory, port } => (directory.to_str()?, *port),
        };
        passfile::find(&text, Wanted { host, port, database: &self.database, user: &self.user }).map(Password)
    }
}

impl fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.user)?;
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", endpoint.address)?;
        }
        write!(f, "/{}", self.database)
    }
}

fn check(raw: &Raw, variable: &dyn Fn(&str) -> Option<String>) -> Result<SourceConfig> {
    let user = match raw.text("user") {
        Some(user) => user.to_owned(),
        None => variable("USER").or_else(|| variable("LOGNAME")).unwrap_or_else(|| "postgres".to_owned()),
    };
    let home = variable("HOME").map(PathBuf::from);
    let (ssl_mode, ssl_root_cert) = ssl_mode(raw, home.as_deref())?;
    let connect_timeout = match raw.get("connect_timeout") {
        // As in libpq, zero and less stand for ever.
        Some(_) => {
            raw.number("connect_timeout")?.filter(|seconds| *seconds > 0).map_or(Duration::MAX, seconds)
        }
        None => CONNECT_TIMEOUT_DEFAULT,
    };
    let binding = [
        ("disable", ChannelBinding::Disable),
        ("prefer", ChannelBinding::Prefer),
        ("require", ChannelBinding::Require),
    ];
    let name = raw.text("application_name").or(raw.text("fallback_application_name"));
    let default_password_file = || home.as_deref().map(|home| home.join(".pgpass"));
    Ok(SourceConfig {
        endpoints: endpoints(raw)?,
        shuffles: raw.one_of("load_balance_hosts", &[("disable", false), ("random", true)], false)?,
        target: target(raw)?,
        database: raw.text("dbname").unwrap_or(&user).to_owned(),
        user,
        password: raw.text("password").map(|text| Password(text.to_owned())),
        password_file: raw.path("passfile").or_else(default_password_file),
        ssl_mode,
        ssl_root_cert,
        ssl_identity: ssl_identity(raw, home.as_deref())?,
        ssl_crls: ssl_crls(raw, home.as_deref()),
        ssl_direct: ssl_direct(raw, ssl_mode)?,
        ssl_sni: raw.one_of("sslsni", &[("0", false), ("1", true)], true)?,
        ssl_versions: ssl_versions(raw)?,
        channel_binding: raw.one_of("channel_binding", &binding, ChannelBinding::Prefer)?,
        require_auth: raw.get("require_auth").map(require_auth).transpose()?,
        connect_timeout,
        keepalive: keepalive(raw)?,
        tcp_user_timeout: raw.number("tcp_user_timeout")?.map(|count| Duration::from_millis(count.into())),
        application_name: name.unwrap_or("highwater").to_owned(),
        options: raw.text("options").map(str::to_owned),
    })
}

const fn seconds(count: u32) -> Duration {
    Duration::from_secs(count as u64)
}

/// Pairs hosts with addresses and ports (one port serves all).
fn endpoints(raw: &Raw) -> Result<Vec<Endpoint>> {
    let has_socket_directory = Path::new(SOCKET_DIRECTORY).is_dir();
    let default_host = if cfg!(unix) && has_socket_directory { SOCKET_DIRECTORY } else { "localhost" };
    let addresses = raw.get("hostaddr").map(host_addresses).transpose()?;
    let names: Option<Vec<&str>> = raw.text("host").map(|text| text.split(',').collect());
    let count = match (&names, &addresses) {
        (Some(names), Some(addresses)) if names.len() != addresses.len() => {
            let typed = raw.get("hostaddr").ok_or_else(|| Error::Internal("no hostaddr".to_owned()))?;
            return Err(typed.refuse("an address for each host"));
        }
        (Some(names), _) => names.len(),
        (None, Some(addresses)) => addresses.len(),
        (None, None) => 1,
    };
    let ports = ports(raw, count)?;
    Ok(ports
        .into_iter()
        .enumerate()
        .map(|(index, port)| {
            let host_address = addresses.as_ref().and_then(|all| all.get(index).copied().flatten());
            let name = names.as_ref().and_then(|all| all.get(index)).filter(|name| !name.is_empty());
            let host = match (name, host_address) {
                (Some(name), _) => (*name).to_owned(),
                (None, Some(address)) => address.to_string(),
                (None, None) => default_host.to_owned(),
            };
            let address = if host.starts_with('/') && host_address.is_none() {
                Address::Unix { directory: PathBuf::from(host), port }
            } else {
                Address::Tcp { host, port }
            };
            Endpoint { address, host_address }
        })
        .collect())
}

fn host_addresses(typed: &Typed) -> Result<Vec<Option<IpAddr>>> {
    let one = |text: &str| match text {
        "" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| typed.refuse("IP addresses")),
    };
    typed.value.split(',').map(one).collect()
}

fn ports(raw: &Raw, host_count: usize) -> Result<Vec<u16>> {
    let Some(typed) = raw.get("port") else { return Ok(vec![5432; host_count]) };
    let accepted = "a port from 1 to 65535, or one for each host";
    let ports = typed
        .value
        .split(',')
        .map(|port| match port {
            "" => Ok(5432),
            _ => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| typed.refuse(accepted)),
        })
        .collect::<Result<Vec<u16>>>()?;
    match ports.as_slice() {
        [port] => Ok(vec![*port; host_count]),
        _ if ports.len() == host_count => Ok(ports),
        _ => Err(typed.refuse(accepted)),
    }
}

/// Archiving wants a server that can be written to; which of these words says so makes no difference to it.
fn target(raw: &Raw) -> Result<Target> {
    let Some(typed) = raw.get("target_session_attrs") else { return Ok(Target::Primary) };
    match typed.value.as_str() {
        "read-write" | "primary" => Ok(Target::Primary),
        "any" => Ok(Target::Any),
        _ => Err(typed.refuse(
            "read-write or primary (the default, since archiving writes watermarks and a standby can't take them), or any",
        )),
    }
}

/// How much TLS, and the roots; as in libpq, those of the user's folder count where they are.
fn ssl_mode(raw: &Raw, home: Option<&Path>) -> Result<(SslMode, Option<PathBuf>)> {
    let is_system = raw.text("sslrootcert") == Some("system");
    let mode = match raw.get("sslmode") {
        Some(typed) => {
            let accepted = "disable, allow, prefer, require, verify-ca or verify-full";
            let mode = typed.value.parse().map_err(|()| typed.refuse(accepted))?;
            if is_system && mode != SslMode::VerifyFull {
                return Err(typed.refuse("verify-full, where sslrootcert is system"));
            }
            mode
        }
        // Anybody may have a certificate that some authority of the system vouches for.
        None if is_system => SslMode::VerifyFull,
        None => SslMode::Prefer,
    };
    let roots = match raw.path("sslrootcert") {
        Some(_) if is_system => None,
        Some(path) => Some(path),
        None => in_home(home, "root.crt"),
    };
    Ok((mode, roots))
}

/// A file of libpq's folder, if it is there.
fn in_home(home: Option<&Path>, name: &str) -> Option<PathBuf> {
    home.map(|home| home.join(".postgresql").join(name)).filter(|path| path.is_file())
}

fn ssl_identity(raw: &Raw, home: Option<&Path>) -> Result<Option<(PathBuf, PathBuf)>> {
    if let Some(typed) = raw.get("sslcertmode") {
        match typed.value.as_str() {
            "disable" => return Ok(None),
            "allow" => {}
            _ => return Err(typed.refuse("disable or allow: Highwater can't honour more")),
        }
    }
    match (raw.path("sslcert"), raw.path("sslkey")) {
        (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
        (None, None) => Ok(in_home(home, "postgresql.crt").zip(in_home(home, "postgresql.key"))),
        _ => Err(Error::Setting {
            setting: "sslcert, sslkey".to_owned(),
            value: "only one of them".to_owned(),
            accepted: "given together".to_owned(),
        }),
    }
}

fn ssl_crls(raw: &Raw, home: Option<&Path>) -> Vec<PathBuf> {
    let typed: Vec<PathBuf> = [raw.path("sslcrl"), raw.path("sslcrldir")].into_iter().flatten().collect();
    if typed.is_empty() { in_home(home, "root.crl").into_iter().collect() } else { typed }
}

fn ssl_direct(raw: &Raw, mode: SslMode) -> Result<bool> {
    let is_direct = raw.one_of("sslnegotiation", &[("postgres", false), ("direct", true)], false)?;
    match raw.get("sslnegotiation") {
        Some(typed) if is_direct && [SslMode::Disable, SslMode::Allow, SslMode::Prefer].contains(&mode) => {
            Err(typed.refuse("postgres, unless sslmode is require, verify-ca or verify-full"))
        }
        _ => Ok(is_direct),
    }
}

fn ssl_versions(raw: &Raw) -> Result<(TlsVersion, TlsVersion)> {
    // Older ones are not spoken: where they are the least that is asked for, more is given.
    let oldest = [
        ("TLSv1", TlsVersion::V12),
        ("TLSv1.1", TlsVersion::V12),
        ("TLSv1.2", TlsVersion::V12),
        ("TLSv1.3", TlsVersion::V13),
    ];
    let oldest = raw.one_of("ssl_min_protocol_version", &oldest, TlsVersion::V12)?;
    let newest = [("TLSv1.2", TlsVersion::V12), ("TLSv1.3", TlsVersion::V13)];
    let newest = raw.one_of("ssl_max_protocol_version", &newest, TlsVersion::V13)?;
    match raw.get("ssl_max_protocol_version") {
        Some(typed) if newest < oldest => Err(typed.refuse("no less than ssl_min_protocol_version")),
        _ => Ok((oldest, newest)),
    }
}

/// A list of ways to log in, or, with exclamation marks, of those that are not wanted.
fn require_auth(typed: &Typed) -> Result<Vec<AuthMethod>> {
    let known = [
        ("password", Some(AuthMethod::Password)),
        ("md5", Some(AuthMethod::Md5)),
        ("scram-sha-256", Some(AuthMethod::Scram)),
        ("none", Some(AuthMethod::None)),
        // Not spoken here.
        ("gss", None),
        ("sspi", None),
        ("oauth", None),
    ];
    let accepted = "a list of password, md5, scram-sha-256 and none, or of those with an exclamation mark";
    let names: Vec<&str> = typed.value.split(',').map(str::trim).collect();
    let unwanted: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix('!')).collect();
    if !unwanted.is_empty() && unwanted.len() < names.len() {
        return Err(typed.refuse(accepted));
    }
    let listed = if unwanted.is_empty() { &names } else { &unwanted };
    if listed.iter().any(|name| !known.iter().any(|(known, _)| known == name)) {
        return Err(typed.refuse(accepted));
    }
    let is_wanted = |name: &str| listed.contains(&name) == unwanted.is_empty();
    let methods: Vec<_> =
        known.iter().filter(|(name, _)| is_wanted(name)).filter_map(|(_, method)| *method).collect();
    if methods.is_empty() { Err(typed.refuse(accepted)) } else { Ok(methods) }
}

fn keepalive(raw: &Raw) -> Result<Option<Keepalive>> {
    if raw.number("keepalives")? == Some(0) {
        return Ok(None);
    }
    // Zero stands for the default.
    let given = |name: &str| raw.number(name).map(|found| found.filter(|count| *count > 0));
    Ok(Some(Keepalive {
        idle: given("keepalives_idle")?.map(seconds),
        interval: given("keepalives_interval")?.map(seconds),
        count: given("keepalives_count")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn load(uri: Option<&str>, environment: &[(&str, &str)]) -> Result<SourceConfig> {
        let variables: BTreeMap<_, _> = environment.iter().copied().collect();
        SourceConfig::new(uri, &|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    fn shown(uri: &str) -> String {
        load(Some(uri), &[("USER", "me")]).unwrap().to_string()
    }

    #[test]
    fn reads_the_forms_of_a_uri() {
        for (uri, expected) in [
            ("postgres://u:p@h:1/d", "u@h:1/d"),
            ("postgresql://h", "me@h:5432/me"),
            ("postgresql://u@h", "u@h:5432/u"),
            ("postgresql://u@[::1]:7/d", "u@[::1]:7/d"),
            ("postgresql://u@[::1]/d", "u@[::1]:5432/d"),
            ("postgresql://a,b:2,c/d", "me@a:5432,b:2,c:5432/d"),
            ("postgresql://a,b/d?port=9", "me@a:9,b:9/d"),
            ("postgresql://u%40x:p%2F%3A@h/d%20e", "u@x@h:5432/d e"),
            ("postgresql:///d?host=/run/postgresql", "me@/run/postgresql:5432/d"),
            ("postgresql://%2Frun%2Fpg:6/d", "me@/run/pg:6/d"),
            ("postgresql:///?host=/s&user=x&dbname=y", "x@/s:5432/y"),
            ("  ", "postgres@localhost:5432/postgres"),
        ] {
            assert_eq!(shown(uri), expected, "{uri}");
        }
    }

    #[test]
    fn keeps_what_the_parameters_say() {
        let config = load(
            Some(
                "postgres://u:s%25ecret@h/d?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c&sslkey=/k\
                 &connect_timeout=3&application_name=x&options=-c%20work_mem%3D1MB",
            ),
            &[],
        )
        .unwrap();
        assert_eq!(config.password.as_ref().unwrap().reveal(), "s%ecret");
        assert_eq!(config.ssl_mode, SslMode::VerifyFull);
        assert_eq!(config.ssl_root_cert, Some("/ca.pem".into()));
        assert_eq!(config.ssl_identity, Some(("/c".into(), "/k".into())));
        assert_eq!(config.connect_timeout, Duration::from_secs(3));
        assert_eq!(config.application_name, "x");
        assert_eq!(config.options.as_deref(), Some("-c work_mem=1MB"));
        assert!(!format!("{config:?} {config}").contains("ecret"));
    }

    #[test]
    fn the_uri_wins_over_the_environment_and_both_over_defaults() {
        let environment =
            [("PGHOST", "e"), ("PGPORT", "7"), ("PGUSER", "eu"), ("PGPASSWORD", "ep"), ("PGDATABASE", "ed")];
        assert_eq!(load(None, &environment).unwrap().to_string(), "eu@e:7/ed");
        let both = load(Some("postgres://u@h"), &environment).unwrap();
        assert_eq!(both.to_string(), "u@h:7/ed");
        assert_eq!(both.password.as_ref().unwrap().reveal(), "ep");
        let neither = load(None, &[("PGSSLMODE", "require")]).unwrap();
        assert_eq!(neither.to_string(), "postgres@localhost:5432/postgres");
        assert_eq!(neither.ssl_mode, SslMode::Require);
        assert_eq!(neither.application_name, "highwater");
    }

    #[test]
    fn refuses_by_name_and_without_the_password() {
        for (uri, named) in [
            ("mysql://u:secret@h/d", "DATABASE_URI"),
            ("secret", "DATABASE_URI"),
            ("postgres://u:secret@h%/d", "DATABASE_URI"),
            ("postgres://u:secret%0@h/d", "DATABASE_URI"),
            ("postgres://u:sec%00ret@h/d", "DATABASE_URI"),
            ("postgres://u:secret@[::1/d", "DATABASE_URI"),
            ("postgres://h/d?password=secret&x", "DATABASE_URI"),
            ("postgres://u:secret@h:port/d", "h:port/d"),
            ("postgres://u:sec/secret@h/d", "***@h/d"),
            ("postgres://u:1/secret@h/d", "***@h/d"),
            ("postgres://u:secret?x@h/d", "***@h/d"),
            ("postgres://u:secret@h/d?port=1,2", "\"1,2\""),
            ("postgres://u:secret@h/d?sslmode=always", "verify-full"),
            ("postgres://u:secret@h/d?sslcert=/c", "sslkey"),
            ("postgres://u:secret@h/d?connect_timeout=soon", "connect_timeout"),
            ("host=h user=u password='secret", "single quote"),
            ("host=h passwort=secret", "\"passwort\", but must be one of host"),
            ("host=h password=my-secret /secret=x", "\"***\", but must be one of"),
            ("postgres://u:secret@h/d?pasword=secret", "\"pasword\", but must be one of host"),
        ] {
            let error = load(Some(uri), &[]).unwrap_err();
            assert!(matches!(error, Error::Setting { .. }), "{uri}: {error:?}");
            assert!(error.to_string().contains(named), "{uri}: {error}");
            assert!(!format!("{error} {error:?}").contains("secret"), "{uri}: {error}");
        }
        let error = load(None, &[("PGHOST", "h"), ("PGSSLMODE", "x")]).unwrap_err();
        assert!(error.to_string().starts_with("PGSSLMODE is \"x\""), "{error}");
    }

    #[test]
    fn what_libpq_takes_is_taken() {
        for text in [
            "host=a,b port=5,6 user=u dbname=d target_session_attrs=read-write load_balance_hosts=random",
            "postgres://u@a:5,b:6/d?target_session_attrs=primary&load_balance_hosts=random&gssencmode=prefer",
            "host=a,b port=5,6 user=u dbname=d load_balance_hosts=random krbsrvname=x sslcompression=0 \
             client_encoding=auto max_protocol_version=latest replication=database",
        ] {
            let config = load(Some(text), &[]).unwrap();
            assert_eq!(config.to_string(), "u@a:5,b:6/d", "{text}");
            assert!(config.shuffles && config.target == Target::Primary, "{text}");
        }
        let config = load(
            Some(
                "host=h hostaddr=::1 sslmode=allow sslcrl=/a sslcrldir=/b sslsni=0 ssl_min_protocol_version=TLSv1.3 \
                 channel_binding=require require_auth='!password, !none' target_session_attrs=any connect_timeout=0 \
                 keepalives_idle=7 keepalives_count=0 tcp_user_timeout=1500 fallback_application_name=y",
            ),
            &[],
        )
        .unwrap();
        assert_eq!(config.endpoints[0].host_address, Some("::1".parse().unwrap()));
        assert_eq!(config.endpoints[0].address, Address::Tcp { host: "h".into(), port: 5432 });
        assert_eq!(config.ssl_crls, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!((config.ssl_mode, config.ssl_sni), (SslMode::Allow, false));
        assert_eq!(config.ssl_versions, (TlsVersion::V13, TlsVersion::V13));
        assert_eq!(config.channel_binding, ChannelBinding::Require);
        assert_eq!(config.require_auth, Some(vec![AuthMethod::Md5, AuthMethod::Scram]));
        assert_eq!((config.target, config.connect_timeout), (Target::Any, Duration::MAX));
        let idle = Some(Duration::from_secs(7));
        assert_eq!(config.keepalive, Some(Keepalive { idle, ..Keepalive::default() }));
        assert_eq!(config.tcp_user_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(config.application_name, "y");
        assert_eq!(load(Some("keepalives=0"), &[]).unwrap().keepalive, None);
        let system = load(Some("host=h sslrootcert=system"), &[]).unwrap();
        assert_eq!((system.ssl_mode, system.ssl_root_cert), (SslMode::VerifyFull, None));
        assert_eq!(load(Some("postgres://h/d?ssl=true"), &[]).unwrap().ssl_mode, SslMode::Require);
        assert!(load(Some("postgres://h/d?sslmode=require&sslnegotiation=direct"), &[]).unwrap().ssl_direct);
    }

    #[test]
    fn what_can_not_be_honoured_is_refused_by_name_wherever_it_was_written() {
        for (name, variable, value) in [
            ("gssencmode", "PGGSSENCMODE", "require"),
            ("requirepeer", "PGREQUIREPEER", "postgres"),
            ("sslcertmode", "PGSSLCERTMODE", "require"),
            ("require_auth", "PGREQUIREAUTH", "gss"),
            ("require_auth", "PGREQUIREAUTH", "md5,!none"),
            ("channel_binding", "PGCHANNELBINDING", "required"),
            ("target_session_attrs", "PGTARGETSESSIONATTRS", "standby"),
            ("target_session_attrs", "PGTARGETSESSIONATTRS", "prefer-standby"),
            ("sslnegotiation", "PGSSLNEGOTIATION", "direct"),
            ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", "TLSv1.1"),
            ("min_protocol_version", "PGMINPROTOCOLVERSION", "3.2"),
            ("sslpassword", "", "secret"),
            ("scram_client_key", "", "secret"),
        ] {
            let mut errors = vec![load(Some(&format!("host=h {name}={value}")), &[]).unwrap_err()];
            if !variable.is_empty() {
                errors.push(load(Some("host=h"), &[(variable, value)]).unwrap_err());
            }
            for error in errors {
                let text = error.to_string();
                assert!(text.starts_with(name) || text.starts_with(variable), "{text}");
                assert!(matches!(error, Error::Setting { .. }) && !text.contains("secret"), "{text}");
            }
        }
        for (text, named) in [
            ("host=h sslrootcert=system sslmode=require", "sslmode"),
            ("host=a,b hostaddr=::1", "hostaddr"),
            ("host=h hostaddr=localhost", "hostaddr"),
            ("host=h ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "ssl_max"),
        ] {
            let error = load(Some(text), &[]).unwrap_err().to_string();
            assert!(error.starts_with(named), "{text}: {error}");
        }
    }

    #[test]
    fn a_service_file_completes_the_string_before_the_environment_does() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().to_str().unwrap();
        std::fs::write(home.path().join(".pg_service.conf"), "[own]\nhost=from_file\nuser=fu\n").unwrap();
        std::fs::write(home.path().join("pg_service.conf"), "[shared]\nhost=sh\nport=9\npassword=p\n")
            .unwrap();
        let variables = [("HOME", folder), ("PGSYSCONFDIR", folder), ("PGUSER", "eu"), ("PGDATABASE", "d")];
        let shown = |uri: &str| load(Some(uri), &variables).unwrap().to_string();
        assert_eq!(shown("service=own"), "fu@from_file:5432/d");
        assert_eq!(shown("postgres://h?service=own"), "fu@h:5432/d");
        assert_eq!(shown("postgres:///?service=shared"), "eu@sh:9/d");
        let by_variable: Vec<_> = variables.iter().copied().chain([("PGSERVICE", "shared")]).collect();
        assert_eq!(load(None, &by_variable).unwrap().to_string(), "eu@sh:9/d");
        let error = load(Some("service=none"), &variables).unwrap_err().to_string();
        assert!(error.contains("\"none\"") && error.contains("pg_service.conf"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn each_host_gets_its_own_line_of_the_password_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(".pgpass");
        std::fs::write(&file, "a:5432:d:u:for a\nlocalhost:*:*:*:socket\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let home = home.path().to_str().unwrap();
        let uri = "postgres://u@a,b/d";
        let found = |uri: &str, environment: &[(&str, &str)]| {
            let config = load(Some(uri), environment).unwrap();
            let of = |one| config.password(one).map(|it| it.reveal().to_owned());
            config.endpoints.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(found(uri, &[("HOME", home)]), [Some("for a".to_owned()), None]);
        assert_eq!(
            found(uri, &[("HOME", home), ("PGPASSWORD", "x")]),
            [Some("x".to_owned()), Some("x".to_owned())]
        );
        assert_eq!(found(uri, &[("PGPASSFILE", file.to_str().unwrap())]), [Some("for a".to_owned()), None]);
        assert_eq!(
            found("postgres://u@/d?host=/var/run/postgresql", &[("HOME", home)]),
            [Some("socket".to_owned())]
        );
    }
}
