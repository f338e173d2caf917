//! [`SourceConfig`]: which database to archive, and how to reach it. The rules are libpq's (manual 34.1,
//! 34.15): a connection URI, completed by `PG*` variables, completed by defaults.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::passfile::{self, Wanted};
use crate::error::{Error, Result};

/// Used when neither a URI nor a variable says where the database is.
pub const DEFAULT_URI: &str = "postgresql://postgres:postgres@localhost:5432/postgres";

/// libpq waits for ever by default. Nobody watches a sidecar, so it has to give up and say so.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Where Debian's and most other packages put the socket.
const SOCKET_DIRECTORY: &str = "/var/run/postgresql";

/// The parameters of a URI, each with the variable that stands in for it.
const PARAMETERS: [(&str, Option<&str>); 14] = [
    ("host", Some("PGHOST")),
    ("port", Some("PGPORT")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("dbname", Some("PGDATABASE")),
    ("passfile", Some("PGPASSFILE")),
    ("sslmode", Some("PGSSLMODE")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslkey", Some("PGSSLKEY")),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("options", Some("PGOPTIONS")),
    // Not PGAPPNAME: it names the programs of a person's shell, and the slot's holder must be recognised.
    ("application_name", None),
    // Accepted for the default URIs of other drivers; nothing but UTF-8 is ever asked for.
    ("client_encoding", None),
];

/// How much TLS is asked for (manual 34.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// No TLS.
    Disable,
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
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return Err(()),
        })
    }
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

/// One server to try, with the password for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: Address,
    /// The password from the URI, the environment or the password file, in this order.
    pub password: Option<Password>,
}

/// A database to archive. Neither `Debug` nor `Display` shows a password; `Display` is for people:
/// `postgres@localhost:5432/postgres`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// The servers, tried in turn. Never empty.
    pub endpoints: Vec<Endpoint>,
    /// The role to log in as.
    pub user: String,
    /// The database's name.
    pub database: String,
    /// How much TLS.
    pub ssl_mode: SslMode,
    /// PEM file of trusted roots; without it the system's are trusted.
    pub ssl_root_cert: Option<PathBuf>,
    /// PEM files of the client's certificate chain and its key.
    pub ssl_identity: Option<(PathBuf, PathBuf)>,
    /// Bound of the time to reach one server, and again of the time to log in there.
    pub connect_timeout: Duration,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
    /// Command-line options for the server's process, such as `-c statement_timeout=0`.
    pub options: Option<String>,
}

impl SourceConfig {
    /// Checks and completes what was typed. `environment` looks up a variable; the URI wins over it. With no
    /// URI and none of `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD` and `PGDATABASE`, [`DEFAULT_URI`] is taken.
    /// Reads the password file if it is needed.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a URI that can't be read, an unknown parameter or a bad value. Its text
    /// never has the password.
    pub fn new(uri: Option<&str>, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
        let placed = ["PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE"];
        let uri = match uri.filter(|text| !text.trim().is_empty()) {
            Some(text) => Some(text.trim()),
            None if placed.into_iter().any(|name| variable(name).is_some()) => None,
            None => Some(DEFAULT_URI),
        };
        let mut typed = uri.map(parse_uri).transpose()?.unwrap_or_default();
        for (name, stand_in) in PARAMETERS {
            if !typed.values.contains_key(name)
                && let Some((stand_in, value)) =
                    stand_in.and_then(|known| variable(known).map(|value| (known, value)))
            {
                typed.values.insert(name, Typed { setting: stand_in.to_owned(), value });
            }
        }
        typed.check(&variable)
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

/// A value, and where it was written.
#[derive(Debug)]
struct Typed {
    setting: String,
    value: String,
}

impl Typed {
    fn refuse(&self, accepted: &str) -> Error {
        Error::Setting {
            setting: self.setting.clone(),
            value: self.value.clone(),
            accepted: accepted.to_owned(),
        }
    }
}

/// What was typed, by libpq's names.
#[derive(Default)]
struct Raw {
    values: BTreeMap<&'static str, Typed>,
}

impl Raw {
    fn set(&mut self, name: &str, value: String) -> Result<()> {
        let Some((known, _)) = PARAMETERS.iter().find(|(known, _)| *known == name) else {
            let names: Vec<_> = PARAMETERS.iter().map(|(known, _)| *known).collect();
            return Err(Error::Setting {
                setting: "a parameter of DATABASE_URI".to_owned(),
                value: name.to_owned(),
                accepted: format!("one of {}", names.join(", ")),
            });
        };
        self.values.insert(known, Typed { setting: format!("{known} in DATABASE_URI"), value });
        Ok(())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|typed| typed.value.as_str()).filter(|value| !value.is_empty())
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    fn check(self, variable: &dyn Fn(&str) -> Option<String>) -> Result<SourceConfig> {
        let user = match self.text("user") {
            Some(user) => user.to_owned(),
            None => variable("USER").or_else(|| variable("LOGNAME")).unwrap_or_else(|| "postgres".to_owned()),
        };
        let database = self.text("dbname").unwrap_or(&user).to_owned();
        let ssl_mode = match self.values.get("sslmode") {
            Some(typed) => typed
                .value
                .parse()
                .map_err(|()| typed.refuse("disable, prefer, require, verify-ca or verify-full"))?,
            None => SslMode::Prefer,
        };
        let connect_timeout = match self.values.get("connect_timeout") {
            Some(typed) => match typed.value.parse::<u64>() {
                Ok(seconds @ 1..=3600) => Duration::from_secs(seconds),
                _ => return Err(typed.refuse("whole seconds from 1 to 3600")),
            },
            None => CONNECT_TIMEOUT_DEFAULT,
        };
        let ssl_identity = match (self.path("sslcert"), self.path("sslkey")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                return Err(Error::Setting {
                    setting: "sslcert, sslkey".to_owned(),
                    value: "only one of them".to_owned(),
                    accepted: "given together".to_owned(),
                });
            }
        };
        let password_file =
            self.path("passfile").or_else(|| variable("HOME").map(|home| Path::new(&home).join(".pgpass")));
        let endpoints = self.endpoints(&user, &database, password_file.as_deref())?;
        Ok(SourceConfig {
            endpoints,
            ssl_mode,
            ssl_root_cert: self.path("sslrootcert").filter(|path| path.as_os_str() != "system"),
            ssl_identity,
            connect_timeout,
            application_name: self.text("application_name").unwrap_or("highwater").to_owned(),
            options: self.text("options").map(str::to_owned),
            user,
            database,
        })
    }

    /// Pairs hosts with ports (one port serves all) and finds each one's password.
    fn endpoints(&self, user: &str, database: &str, password_file: Option<&Path>) -> Result<Vec<Endpoint>> {
        let has_socket_directory = Path::new(SOCKET_DIRECTORY).is_dir();
        let default_host = if cfg!(unix) && has_socket_directory { SOCKET_DIRECTORY } else { "localhost" };
        let hosts: Vec<&str> = self.text("host").unwrap_or(default_host).split(',').collect();
        let ports = self.ports(hosts.len())?;
        let password = self.text("password").map(|text| Password(text.to_owned()));
        let lines = if password.is_none() { password_file.and_then(passfile::read) } else { None };
        Ok(hosts
            .into_iter()
            .zip(ports)
            .map(|(host, port)| {
                let host = if host.is_empty() { default_host } else { host };
                // The file knows the default socket directory as `localhost`.
                let known_as = if host == SOCKET_DIRECTORY { "localhost" } else { host };
                let wanted = Wanted { host: known_as, port, database, user };
                let from_file =
                    || lines.as_deref().and_then(|text| passfile::find(text, wanted)).map(Password);
                let address = if host.starts_with('/') {
                    Address::Unix { directory: PathBuf::from(host), port }
                } else {
                    Address::Tcp { host: host.to_owned(), port }
                };
                Endpoint { address, password: password.clone().or_else(from_file) }
            })
            .collect())
    }

    fn ports(&self, host_count: usize) -> Result<Vec<u16>> {
        let Some(typed) = self.values.get("port") else { return Ok(vec![5432; host_count]) };
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
}

/// Takes a URI apart (manual 34.1.1.2): `postgresql://user:password@host:port,host:port/database?name=value`.
fn parse_uri(uri: &str) -> Result<Raw> {
    let refuse = || Error::Setting {
        setting: "DATABASE_URI".to_owned(),
        value: without_secrets(uri),
        accepted:
            "postgresql://user:password@host:port/database?parameter=value, with %XX for special characters"
                .to_owned(),
    };
    let rest = ["postgresql://", "postgres://"].into_iter().find_map(|scheme| uri.strip_prefix(scheme));
    let (place, query) = split_or_all(rest.ok_or_else(refuse)?, '?');
    let (authority, database) = split_or_all(place, '/');
    let decode = |text: &str| percent_decode(text).ok_or_else(refuse);
    // A slash that should have been encoded in a password moves its end here; nothing of it may be shown.
    if database.contains('@') {
        return Err(refuse());
    }
    let mut raw = Raw::default();
    let hosts = match authority.rsplit_once('@') {
        Some((login, hosts)) => {
            let (user, password) = split_or_all(login, ':');
            set_unless_empty(&mut raw, "user", decode(user)?)?;
            set_unless_empty(&mut raw, "password", decode(password)?)?;
            hosts
        }
        None => authority,
    };
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = split_host(host).ok_or_else(refuse)?;
        // Not left to the check of the port: it would show the value, which may be half a password.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refuse());
        }
        names.push(decode(name)?);
        ports.push(port);
    }
    set_unless_empty(&mut raw, "host", names.join(","))?;
    if ports.iter().any(|port| !port.is_empty()) {
        raw.set("port", ports.join(","))?;
    }
    set_unless_empty(&mut raw, "dbname", decode(database)?)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(refuse)?;
        raw.set(&decode(name)?, decode(value)?)?;
    }
    Ok(raw)
}

fn set_unless_empty(raw: &mut Raw, name: &str, value: String) -> Result<()> {
    if value.is_empty() { Ok(()) } else { raw.set(name, value) }
}

fn split_or_all(text: &str, separator: char) -> (&str, &str) {
    text.split_once(separator).unwrap_or((text, ""))
}

/// Host and port, each possibly empty; an IPv6 address stands in brackets.
fn split_host(text: &str) -> Option<(&str, &str)> {
    let Some(bracketed) = text.strip_prefix('[') else { return Some(split_or_all(text, ':')) };
    let (address, port) = bracketed.split_once(']')?;
    if port.is_empty() { Some((address, "")) } else { Some((address, port.strip_prefix(':')?)) }
}

/// `None` unless every `%` is followed by two hexadecimal digits and the result is UTF-8 without NUL (which
/// would end a string of the protocol early).
fn percent_decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(high << 4 | low).ok().filter(|byte| *byte != 0)?
            }
            0 => return None,
            _ => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

/// What of a URI may be shown: the part between the last `@` and the parameters, since both the login before
/// it and the parameters may hold a password, and where exactly is not known of a URI that can't be read.
fn without_secrets(uri: &str) -> String {
    let (scheme, rest) = uri.split_once("://").unwrap_or(("", uri));
    match rest.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://***@{}", split_or_all(place, '?').0),
        None if scheme.is_empty() => "***".to_owned(),
        None => format!("{scheme}://{}", split_or_all(rest, '?').0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(config.endpoints[0].password.as_ref().unwrap().reveal(), "s%ecret");
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
        assert_eq!(both.endpoints[0].password.as_ref().unwrap().reveal(), "ep");
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
            ("postgres://u:secret@h/d?sslmode=allow", "verify-full"),
            ("postgres://u:secret@h/d?sslcert=/c", "sslkey"),
            ("postgres://u:secret@h/d?connect_timeout=0", "connect_timeout"),
            ("postgres://u:secret@h/d?pasword=secret", "\"pasword\", but must be one of host, port"),
        ] {
            let error = load(Some(uri), &[]).unwrap_err();
            assert!(matches!(error, Error::Setting { .. }), "{uri}: {error:?}");
            assert!(error.to_string().contains(named), "{uri}: {error}");
            assert!(!format!("{error} {error:?}").contains("secret"), "{uri}: {error}");
        }
        let error = load(None, &[("PGHOST", "h"), ("PGSSLMODE", "x")]).unwrap_err();
        assert!(error.to_string().starts_with("PGSSLMODE is \"x\""), "{error}");
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
            let endpoints = load(Some(uri), environment).unwrap().endpoints;
            endpoints
                .iter()
                .map(|one| one.password.as_ref().map(|it| it.reveal().to_owned()))
                .collect::<Vec<_>>()
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
