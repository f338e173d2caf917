//! [`SourceConfig`]: which database to archive, and how to reach it. The rules are libpq's (manual 34.1,
//! 34.15): a connection string, completed by a service file and `PG*` variables, completed by defaults.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::conninfo::{Raw, Typed};
use super::parameters::{
    Address, AuthMethod, ChannelBinding, Endpoint, Keepalive, Password, SslMode, Target, TlsVersion,
};
use super::passfile::{self, Wanted};
use crate::error::{Error, Result};

/// Used when neither a URI nor a variable says where the database is.
pub const DEFAULT_URI: &str = "postgresql://postgres:postgres@localhost:5432/postgres";

/// libpq waits for ever by default. Nobody watches a sidecar, so it has to give up and say so.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Where Debian's and most other packages put the socket.
const SOCKET_DIRECTORY: &str = "/var/run/postgresql";

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
mod tests;
