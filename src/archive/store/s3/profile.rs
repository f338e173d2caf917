//! A profile of the AWS tools' two files ("Configuration and credential file settings" in their manual).

use std::collections::HashMap;
use std::path::PathBuf;

use configparser::ini::{Ini, IniDefault};

use crate::{Error, Result};

/// What one profile says, as far as it concerns us.
#[derive(Default)]
pub(super) struct Profile {
    pub(super) name: String,
    /// Somebody has named it, so it must exist.
    pub(super) is_named: bool,
    pub(super) region: Option<String>,
    pub(super) endpoint_url: Option<String>,
    pub(super) web_identity: Option<WebIdentity>,
    pub(super) source: Option<Source>,
    /// A way to credentials that only the AWS tools know: its key.
    pub(super) needs_tools: Option<&'static str>,
    /// The files that were looked at, for people.
    pub(super) files: String,
}

/// Where a profile's credentials come from.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// They are in the file.
    Keys { key_id: String, secret_key: String, token: Option<String> },
    /// A program prints them.
    Process(String),
}

/// A role, and the file of the token that stands for its bearer.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct WebIdentity {
    pub(super) role_arn: String,
    pub(super) token_file: String,
}

/// Settings of a profile that lead to credentials by requests that we don't make. A role would be more, or less, than the keys
/// beside it may do; the others are ways to the same as a program that stands beside them.
const NEEDS_TOOLS: [&str; 4] = ["role_arn", "sso_session", "sso_start_url", "login_session"];

impl Profile {
    /// Reads the profile that the environment names, from the files that it names.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if a file can't be read, or a profile that was named is in neither.
    pub(super) fn read(env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let named = env("AWS_PROFILE").or_else(|| env("AWS_DEFAULT_PROFILE"));
        let is_named = named.is_some();
        let name = named.unwrap_or_else(|| "default".to_owned());
        let home = env("HOME").unwrap_or_default();
        let config = File::read(env, "AWS_CONFIG_FILE", &home, "config")?;
        let credentials = File::read(env, "AWS_SHARED_CREDENTIALS_FILE", &home, "credentials")?;
        let files = format!("{} or {}", credentials.path.display(), config.path.display());
        let sections = [
            credentials.sections.get(&name),
            config.sections.get(&format!("profile {name}")),
            config.sections.get(&name).filter(|_| name == "default"),
        ];
        if is_named && sections.iter().all(Option::is_none) {
            return Err(Error::Setting {
                setting: "AWS_PROFILE".to_owned(),
                value: name,
                accepted: format!("a profile of {files}"),
            });
        }
        let get = |key: &str| sections.iter().flatten().find_map(|section| text(section, key));
        let web_identity = get("role_arn").zip(get("web_identity_token_file"));
        let web_identity = web_identity.map(|(role_arn, token_file)| WebIdentity { role_arn, token_file });
        let source = sections.iter().flatten().find_map(|section| source(section));
        let counts = |key: &str| if key == "role_arn" { web_identity.is_none() } else { source.is_none() };
        Ok(Self {
            is_named,
            region: get("region"),
            endpoint_url: get("endpoint_url"),
            needs_tools: NEEDS_TOOLS.into_iter().find(|key| counts(key) && get(key).is_some()),
            source,
            web_identity,
            files,
            name,
        })
    }
}

/// The settings of one section; those that are nested are lines of their parent's value.
type Section = HashMap<String, Option<String>>;

/// A value without the comment that may follow it.
fn text(section: &Section, key: &str) -> Option<String> {
    let value = section.get(key)?.as_deref()?;
    let value =
        value.split(" #").next().and_then(|value| value.split(" ;").next()).unwrap_or_default().trim();
    (!value.is_empty()).then(|| value.to_owned())
}

/// A section's own credentials. Keys come before a program, as in the AWS tools.
fn source(section: &Section) -> Option<Source> {
    let keys = text(section, "aws_access_key_id").zip(text(section, "aws_secret_access_key"));
    if let Some((key_id, secret_key)) = keys {
        return Some(Source::Keys { key_id, secret_key, token: text(section, "aws_session_token") });
    }
    // Whatever a shell makes of a # in it.
    let process = section.get("credential_process")?.as_deref()?;
    (!process.is_empty()).then(|| Source::Process(process.to_owned()))
}

struct File {
    path: PathBuf,
    sections: HashMap<String, Section>,
}

impl File {
    /// A file that may be absent, unless a variable names it.
    fn read(env: &dyn Fn(&str) -> Option<String>, variable: &str, home: &str, name: &str) -> Result<Self> {
        let named = env(variable);
        let path = match named.as_deref().map(|path| path.strip_prefix("~/").ok_or(path)) {
            Some(Ok(below)) => PathBuf::from(home).join(below),
            Some(Err(path)) => PathBuf::from(path),
            None => PathBuf::from(home).join(".aws").join(name),
        };
        let refuse = |accepted: String| Error::Setting {
            setting: variable.to_owned(),
            value: path.display().to_string(),
            accepted,
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(refuse(format!("a file that can be read ({error})"))),
        };
        // Comments are lines of their own: a secret may have a # in it.
        let mut format = IniDefault::default();
        format.default_section = String::new();
        format.case_sensitive = true;
        format.delimiters = vec!['='];
        format.enable_inline_comments = false;
        format.multiline = true;
        let mut ini = Ini::new_from_defaults(format);
        let sections =
            ini.read(text).map_err(|error| refuse(format!("a file of sections and settings ({error})")))?;
        Ok(Self { path, sections })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: Option<&str>, config: &str, credentials: &str) -> Result<Profile> {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(home.path().join(".aws/config"), config).unwrap();
        std::fs::write(home.path().join(".aws/credentials"), credentials).unwrap();
        let path = home.path().to_str().unwrap().to_owned();
        Profile::read(&|variable| match variable {
            "HOME" => Some(path.clone()),
            "AWS_PROFILE" => name.map(str::to_owned),
            _ => None,
        })
    }

    #[test]
    fn a_profile_is_read_as_the_aws_tools_do() {
        let config = "[default]\nregion = eu-north-1\n# a comment\n[profile p]\nregion=eu-west-3 # Paris\ns3 =\n  region = x\n\
                      credential_process = \"/opt/a b\" --to 'C:\\d' # kept\n[profile sso]\nsso_session = s\n\
                      [profile web]\nrole_arn = arn\nweb_identity_token_file = /t\n";
        let credentials = "[default]\naws_access_key_id = AK\naws_secret_access_key = a/b+c\\d\"e\n";
        let default = profile(None, config, credentials).unwrap();
        assert_eq!(default.region.as_deref(), Some("eu-north-1"));
        let secret_key = "a/b+c\\d\"e".to_owned();
        assert!(default.source == Some(Source::Keys { key_id: "AK".to_owned(), secret_key, token: None }));
        let named = profile(Some("p"), config, credentials).unwrap();
        assert_eq!(named.region.as_deref(), Some("eu-west-3"));
        let command = "\"/opt/a b\" --to 'C:\\d' # kept".to_owned();
        assert!(named.source == Some(Source::Process(command)));
        assert_eq!(profile(Some("sso"), config, credentials).unwrap().needs_tools, Some("sso_session"));
        let web = profile(Some("web"), config, credentials).unwrap();
        assert!(web.needs_tools.is_none() && web.web_identity.is_some_and(|web| web.role_arn == "arn"));
        let error = profile(Some("gone"), config, credentials).err().unwrap();
        assert!(!error.is_transient() && error.chain().contains(".aws/config"), "{}", error.chain());
    }

    #[test]
    fn a_broken_file_is_refused_without_its_text() {
        let error = profile(None, "", "[default\naws_secret_access_key = hunter2\n").err().unwrap();
        assert!(!error.chain().contains("hunter2"), "{}", error.chain());
    }
}
