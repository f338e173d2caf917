//! A connection string taken apart, in either of libpq's forms, and completed by a service file and by `PG*`
//! variables (manual 34.1, 34.15, 34.17).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What becomes of a parameter of libpq.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// It is honoured.
    Honoured,
    /// It is accepted, and changes nothing here.
    Ignored,
    /// It asks for security that can't be given. Only these values, which ask for none, are accepted.
    Refused(&'static [&'static str]),
}
use Use::{Honoured, Ignored, Refused};

/// The parameters, each with the variable that stands in for it.
const PARAMETERS: [(&str, &str, Use); 52] = [
    ("host", "PGHOST", Honoured),
    ("hostaddr", "PGHOSTADDR", Honoured),
    ("port", "PGPORT", Honoured),
    ("user", "PGUSER", Honoured),
    ("password", "PGPASSWORD", Honoured),
    ("dbname", "PGDATABASE", Honoured),
    ("passfile", "PGPASSFILE", Honoured),
    ("service", "PGSERVICE", Honoured),
    ("servicefile", "PGSERVICEFILE", Honoured),
    ("sslmode", "PGSSLMODE", Honoured),
    ("sslnegotiation", "PGSSLNEGOTIATION", Honoured),
    ("sslrootcert", "PGSSLROOTCERT", Honoured),
    ("sslcert", "PGSSLCERT", Honoured),
    ("sslkey", "PGSSLKEY", Honoured),
    ("sslcertmode", "PGSSLCERTMODE", Honoured),
    ("sslcrl", "PGSSLCRL", Honoured),
    ("sslcrldir", "PGSSLCRLDIR", Honoured),
    ("sslsni", "PGSSLSNI", Honoured),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Honoured),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Honoured),
    ("channel_binding", "PGCHANNELBINDING", Honoured),
    ("require_auth", "PGREQUIREAUTH", Honoured),
    ("target_session_attrs", "PGTARGETSESSIONATTRS", Honoured),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS", Honoured),
    ("connect_timeout", "PGCONNECT_TIMEOUT", Honoured),
    ("keepalives", "", Honoured),
    ("keepalives_idle", "", Honoured),
    ("keepalives_interval", "", Honoured),
    ("keepalives_count", "", Honoured),
    ("tcp_user_timeout", "", Honoured),
    // Not PGAPPNAME: it names the programs of a person's shell, and the slot's holder must be recognised.
    ("application_name", "", Honoured),
    ("fallback_application_name", "", Honoured),
    ("options", "PGOPTIONS", Honoured),
    ("gssencmode", "PGGSSENCMODE", Refused(&["disable", "prefer"])),
    ("requirepeer", "PGREQUIREPEER", Refused(&[])),
    ("requiressl", "PGREQUIRESSL", Refused(&["0"])),
    ("sslpassword", "", Refused(&[])),
    ("scram_client_key", "", Refused(&[])),
    ("scram_server_key", "", Refused(&[])),
    ("min_protocol_version", "PGMINPROTOCOLVERSION", Refused(&["3.0"])),
    ("max_protocol_version", "", Ignored),
    // What we read is in the encoding that we ask for.
    ("client_encoding", "", Ignored),
    ("sslcompression", "", Ignored),
    ("sslkeylogfile", "", Ignored),
    ("krbsrvname", "", Ignored),
    ("gsslib", "", Ignored),
    ("gssdelegation", "", Ignored),
    ("oauth_issuer", "", Ignored),
    ("oauth_client_id", "", Ignored),
    ("oauth_client_secret", "", Ignored),
    ("oauth_scope", "", Ignored),
    ("replication", "", Ignored),
];

/// No error shows the value of one of these.
const SECRETS: [&str; 5] =
    ["password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"];

/// A value, and where it was written.
#[derive(Debug)]
pub(super) struct Typed {
    setting: String,
    pub(super) value: String,
}

impl Typed {
    pub(super) fn refuse(&self, accepted: &str) -> Error {
        Error::Setting {
            setting: self.setting.clone(),
            value: self.value.clone(),
            accepted: accepted.to_owned(),
        }
    }
}

/// What was typed, by libpq's names.
#[derive(Default)]
pub(super) struct Raw {
    values: BTreeMap<&'static str, Typed>,
}

impl Raw {
    /// Takes a string apart: a URI, or `keyword=value` pairs.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let is_uri = ["postgresql://", "postgres://"].into_iter().any(|scheme| text.starts_with(scheme));
        // A text without either is told what a URI looks like.
        if is_uri || !text.contains('=') || text.split_once('=').is_some_and(|(name, _)| name.contains("://"))
        {
            return parse_uri(text);
        }
        let mut raw = Self::default();
        for (name, value) in keywords(text)? {
            raw.set(&name, value, "DATABASE_URI")?;
        }
        Ok(raw)
    }

    /// Adds what the string leaves out: from the service's section first, then from the environment.
    pub(super) fn complete(mut self, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        for name in ["service", "servicefile"] {
            self.stand_in(name, variable);
        }
        if let Some(service) = self.text("service").map(str::to_owned) {
            let pairs = service_section(&service, self.path("servicefile"), variable)?;
            for (name, value) in pairs {
                if !self.values.contains_key(name.as_str()) {
                    self.set(&name, value, &format!("service {service:?}"))?;
                }
            }
        }
        for (name, _, _) in PARAMETERS {
            self.stand_in(name, variable);
        }
        self.refuse_unfit()?;
        Ok(self)
    }

    fn stand_in(&mut self, wanted: &str, variable: &dyn Fn(&str) -> Option<String>) {
        let found = PARAMETERS.iter().find(|(name, _, _)| *name == wanted);
        let Some((name, stand_in, _)) = found.filter(|(_, stand_in, _)| !stand_in.is_empty()) else { return };
        if !self.values.contains_key(name)
            && let Some(value) = variable(stand_in)
        {
            self.values.insert(name, Typed { setting: (*stand_in).to_owned(), value });
        }
    }

    fn set(&mut self, name: &str, value: String, place: &str) -> Result<()> {
        let Some((known, _, _)) = PARAMETERS.iter().find(|(known, _, _)| *known == name) else {
            let honoured = PARAMETERS.iter().filter(|(_, _, treatment)| *treatment == Honoured);
            let names: Vec<_> = honoured.map(|(known, _, _)| *known).collect();
            return Err(Error::Setting {
                setting: format!("a parameter of {place}"),
                // What is no word may be a piece of a password.
                value: if name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
                    name.to_owned()
                } else {
                    "***".to_owned()
                },
                accepted: format!("one of {}", names.join(", ")),
            });
        };
        self.values.insert(known, Typed { setting: format!("{known} in {place}"), value });
        Ok(())
    }

    /// Refuses, by name, what asks for more than can be given.
    fn refuse_unfit(&self) -> Result<()> {
        for (name, _, treatment) in PARAMETERS {
            let (Refused(harmless), Some(typed)) = (treatment, self.values.get(name)) else { continue };
            if typed.value.is_empty() || harmless.contains(&typed.value.as_str()) {
                continue;
            }
            let value = if SECRETS.contains(&name) { "***" } else { &typed.value }.to_owned();
            let accepted = match (name, harmless) {
                ("sslpassword", _) => {
                    "left out: the key must not be encrypted (`openssl pkey -in key -out key`)".to_owned()
                }
                (_, []) => "left out: Highwater can't honour it".to_owned(),
                _ => format!("{}: Highwater can't honour more", harmless.join(" or ")),
            };
            return Err(Error::Setting { setting: typed.setting.clone(), value, accepted });
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&Typed> {
        self.values.get(name).filter(|typed| !typed.value.is_empty())
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).map(|typed| typed.value.as_str())
    }

    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    /// One of these words, or the default.
    pub(super) fn one_of<T: Copy>(&self, name: &str, words: &[(&str, T)], default: T) -> Result<T> {
        let Some(typed) = self.get(name) else { return Ok(default) };
        let found = words.iter().find(|(word, _)| *word == typed.value);
        found.map(|(_, value)| *value).ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            typed.refuse(&words.join(" or "))
        })
    }

    /// A whole number. As in libpq a negative one stands for the default.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>> {
        let Some(typed) = self.get(name) else { return Ok(None) };
        let number: i32 = typed.value.trim().parse().map_err(|_| typed.refuse("a whole number"))?;
        Ok(u32::try_from(number).ok())
    }
}

/// Takes a URI apart (manual 34.1.1.2): `postgresql://user:password@host:port,host:port/database?name=value`.
fn parse_uri(uri: &str) -> Result<Raw> {
    let refuse = || Error::Setting {
        setting: "DATABASE_URI".to_owned(),
        value: without_secrets(uri),
        accepted: "postgresql://user:password@host:port/database?parameter=value, with %XX for special \
                   characters, or host=... dbname=..."
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
    let mut set = |name: &str, value: String| match value.is_empty() {
        true => Ok(()),
        false => raw.set(name, value, "DATABASE_URI"),
    };
    let hosts = match authority.rsplit_once('@') {
        Some((login, hosts)) => {
            let (user, password) = split_or_all(login, ':');
            set("user", decode(user)?)?;
            set("password", decode(password)?)?;
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
    set("host", names.join(","))?;
    if ports.iter().any(|port| !port.is_empty()) {
        set("port", ports.join(","))?;
    }
    set("dbname", decode(database)?)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(refuse)?;
        match (decode(name)?.as_str(), decode(value)?) {
            // As JDBC writes it.
            ("ssl", value) if value == "true" => raw.set("sslmode", "require".to_owned(), "DATABASE_URI")?,
            (name, value) => raw.set(name, value, "DATABASE_URI")?,
        }
    }
    Ok(raw)
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

/// Takes `keyword=value` pairs apart (manual 34.1.1.1): blanks may stand around the sign; a value with blanks stands in
/// single quotes; a backslash takes the next character as it is.
fn keywords(text: &str) -> Result<Vec<(String, String)>> {
    let refuse = |accepted: &str| Error::Setting {
        setting: "DATABASE_URI".to_owned(),
        // Which part is the password is not known of what can't be read.
        value: "***".to_owned(),
        accepted: accepted.to_owned(),
    };
    if text.contains('\0') {
        return Err(refuse("a text without NUL"));
    }
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((name, after)) = rest.split_once('=') else {
            return Err(refuse("keyword=value pairs: a keyword has no value"));
        };
        let name = name.trim_end();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(refuse("keyword=value pairs, a value with blanks in single quotes"));
        }
        let (value, after) =
            keyword_value(after.trim_start()).ok_or_else(|| refuse("closed by a single quote"))?;
        pairs.push((name.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// The value that begins a text, and what follows it; `None` if its quote is not closed.
fn keyword_value(text: &str) -> Option<(String, &str)> {
    let quoted = text.strip_prefix('\'');
    let mut value = String::new();
    let mut characters = quoted.unwrap_or(text).char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted.is_some() => return Some((value, characters.as_str())),
            blank if quoted.is_none() && blank.is_whitespace() => return Some((value, text.get(at..)?)),
            other => value.push(other),
        }
    }
    quoted.is_none().then_some((value, ""))
}

/// The section of a service: in the user's file, or else in the system's (manual 34.17).
fn service_section(
    service: &str,
    file: Option<PathBuf>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<(String, String)>> {
    let own = file.or_else(|| variable("HOME").map(|home| Path::new(&home).join(".pg_service.conf")));
    // libpq has the folder compiled in; this is Debian's.
    let shared = variable("PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".to_owned());
    let files = own.into_iter().chain([Path::new(&shared).join("pg_service.conf")]);
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        if let Some(pairs) = section(&text, service, &file)? {
            return Ok(pairs);
        }
    }
    Err(Error::Setting {
        setting: "service".to_owned(),
        value: service.to_owned(),
        accepted:
            "a section of ~/.pg_service.conf, of the file that PGSERVICEFILE names, or of pg_service.conf in \
                   PGSYSCONFDIR"
                .to_owned(),
    })
}

fn section(text: &str, service: &str, file: &Path) -> Result<Option<Vec<(String, String)>>> {
    let mut found: Option<Vec<(String, String)>> = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            if found.is_some() {
                break;
            }
            found = (name == service).then(Vec::new);
            continue;
        }
        let Some(pairs) = &mut found else { continue };
        match line.split_once('=').map(|(name, value)| (name.trim(), value.trim())) {
            Some((name, value)) if name != "service" && !name.starts_with("ldap") => {
                pairs.push((name.to_owned(), value.to_owned()));
            }
            _ => {
                return Err(Error::Setting {
                    setting: format!("service {service:?} in {}", file.display()),
                    value: "***".to_owned(),
                    accepted: "lines of parameter=value, without another service and without LDAP".to_owned(),
                });
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keywords_are_read_as_libpq_reads_them() {
        for (text, expected) in [
            (" host = a,b  user='it\\'s' x= 'y z' ", &[("host", "a,b"), ("user", "it's"), ("x", "y z")][..]),
            ("password=a\\ b\\\\", &[("password", "a b\\")]),
            ("host='' port=1", &[("host", ""), ("port", "1")]),
            ("host=", &[("host", "")]),
        ] {
            let pairs = keywords(text).unwrap();
            let pairs: Vec<_> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            assert_eq!(pairs, expected, "{text}");
        }
        for text in ["password='secret", "secret", "host=h secret", "host=h pass secret=x", "=secret"] {
            let error = keywords(text).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn a_service_is_a_section_of_a_file() {
        let text = "# c\n[a]\nhost=x\n\n[b]\nhost = y\n#port=1\nuser=u\n[b]\nhost=z\n[c]\nservice=a\n";
        let found = |name: &str| section(text, name, Path::new("f")).map(|found| found.map(|it| it.len()));
        assert_eq!((found("a").unwrap(), found("b").unwrap(), found("d").unwrap()), (Some(1), Some(2), None));
        assert!(found("c").is_err());
    }
}
