//! What was typed: [`RawSettings`] of one source, and [`Layers`] of all of them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use super::setting::{Setting, setting_error};
use super::table::{self, TableSettings};
use crate::error::{Error, Result};

/// The file that is read from the working directory when no other is named.
pub const FILE_NAME: &str = "highwater.toml";

/// The texts that one source (flags, environment, file) gives; what it leaves open is absent.
#[derive(Clone, Default)]
pub struct RawSettings {
    texts: HashMap<Setting, String>,
    /// The tables that it describes; only a file does.
    pub(super) tables: Vec<TableSettings>,
}

// By hand, because a text may hold a password.
impl std::fmt::Debug for RawSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.texts.keys()).finish()
    }
}

impl RawSettings {
    /// The text of a setting, if this source has one.
    #[must_use]
    pub fn get(&self, setting: Setting) -> Option<&str> {
        self.texts.get(&setting).map(String::as_str)
    }

    /// Sets or, with `None`, clears the text of a setting.
    pub fn set(&mut self, setting: Setting, text: Option<String>) {
        match text {
            Some(text) => self.texts.insert(setting, text),
            None => self.texts.remove(&setting),
        };
    }

    /// Reads the environment. An empty variable counts as unset.
    #[must_use]
    pub fn from_environment(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let mut raw = Self::default();
        for setting in Setting::ALL {
            raw.set(setting, env(setting.variable()).filter(|text| !text.is_empty()));
        }
        raw
    }

    /// Reads the text of a settings file; `file` is its name in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if it is not TOML, has an unknown key, or a value that is neither a string
    /// nor a number.
    pub fn from_toml(text: &str, file: &str) -> Result<Self> {
        let keys: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            // The error's own text quotes the line, which may hold a password.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            setting_error(
                file,
                format!("unreadable at line {}", before.matches('\n').count() + 1),
                format!("TOML ({})", error.message()),
            )
        })?;
        let mut raw = Self::default();
        for (key, value) in keys {
            if key == "table" {
                raw.tables = table::read(value, file)?;
                continue;
            }
            let setting = Setting::of_key(&key).ok_or_else(|| unknown_key(&key, file))?;
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                other => {
                    let name = format!("{key} in {file}");
                    return Err(setting_error(&name, other.type_str(), "a string or a whole number"));
                }
            };
            raw.set(setting, Some(text));
        }
        Ok(raw)
    }
}

/// The sources of settings, the strongest first: flags, environment, file, defaults.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// What the command line says.
    pub flags: RawSettings,
    /// What the environment says.
    pub environment: RawSettings,
    /// What the file says.
    pub file: RawSettings,
    /// Name of the file, for errors.
    pub file_name: String,
}

impl Layers {
    /// Collects the sources: `flags` as given, the environment through `env`, and the file: the one
    /// at `path`, which must exist, or else `highwater.toml` in the working directory, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the file can't be read or understood.
    pub fn collect(
        flags: RawSettings,
        env: &dyn Fn(&str) -> Option<String>,
        path: Option<&Path>,
    ) -> Result<Self> {
        let file_name = path.map_or_else(|| FILE_NAME.to_owned(), |path| path.display().to_string());
        let file = match fs::read_to_string(path.unwrap_or(Path::new(FILE_NAME))) {
            Ok(text) => RawSettings::from_toml(&text, &file_name)?,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => RawSettings::default(),
            Err(error) => {
                let setting = if path.is_some() { "--config" } else { FILE_NAME };
                return Err(setting_error(setting, file_name, format!("a file that can be read ({error})")));
            }
        };
        Ok(Self { flags, environment: RawSettings::from_environment(env), file, file_name })
    }

    /// The strongest text of a setting, without the default.
    #[must_use]
    pub fn typed(&self, setting: Setting) -> Option<&str> {
        [&self.flags, &self.environment, &self.file].into_iter().find_map(|source| source.get(setting))
    }

    /// The text that counts: the strongest, or the default.
    #[must_use]
    pub fn text(&self, setting: Setting) -> &str {
        self.typed(setting).or(setting.default_text()).unwrap_or_default()
    }

    /// The name of a setting where it was set: `--window`, `HIGHWATER_WINDOW` or
    /// `window in highwater.toml`; the variable's where nobody set it.
    #[must_use]
    pub fn name(&self, setting: Setting) -> String {
        if self.flags.get(setting).is_some() {
            setting.flag()
        } else if self.environment.get(setting).is_none() && self.file.get(setting).is_some() {
            format!("{} in {}", setting.key(), self.file_name)
        } else {
            setting.variable().to_owned()
        }
    }
}

fn unknown_key(key: &str, file: &str) -> Error {
    let mut near: Vec<_> =
        Setting::ALL.into_iter().map(Setting::key).filter(|known| is_near(key, known)).collect();
    if near.is_empty() {
        near.extend(Setting::ALL.map(Setting::key));
    }
    setting_error(&format!("a key in {file}"), key, format!("a setting's name: {}", near.join(" or ")))
}

/// Whether a person may have meant `known`: at most a third of its letters differ, or one name holds
/// the other.
fn is_near(key: &str, known: &str) -> bool {
    let plain = key.to_ascii_lowercase().replace('-', "_");
    let holds = plain.len() >= 4 && (known.contains(&plain) || plain.contains(known));
    holds || edit_distance(&plain, known) <= known.len() / 3
}

/// Letters to insert, remove or replace to get from one text to the other (Levenshtein).
pub(crate) fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (above, from) in from.chars().enumerate() {
        let mut diagonal = above;
        let mut left = above + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(to.chars()) {
            let best = (diagonal + usize::from(from != to)).min(left + 1).min(*cell + 1);
            diagonal = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = above + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_over_environment_over_file_over_default() {
        let env = |name: &str| match name {
            "HIGHWATER_WINDOW" => Some("2h".to_owned()),
            "HIGHWATER_SLOT" => Some("env".to_owned()),
            "HIGHWATER_MEMORY" => Some(String::new()),
            _ => None,
        };
        let mut layers = Layers {
            environment: RawSettings::from_environment(&env),
            file: RawSettings::from_toml("window = '3h'\nslot = 'file'\nmemory = 33554432", "h.toml")
                .unwrap(),
            file_name: "h.toml".to_owned(),
            ..Layers::default()
        };
        layers.flags.set(Setting::Window, Some("1h".to_owned()));
        let seen = |setting| (layers.text(setting).to_owned(), layers.name(setting));
        assert_eq!(seen(Setting::Window), ("1h".into(), "--window".into()));
        assert_eq!(seen(Setting::Slot), ("env".into(), "HIGHWATER_SLOT".into()));
        assert_eq!(seen(Setting::Memory), ("33554432".into(), "memory in h.toml".into()));
        assert_eq!(seen(Setting::MaxLag), ("60s".into(), "HIGHWATER_MAX_LAG".into()));
    }

    #[test]
    fn an_unknown_key_names_the_near_ones() {
        for (key, near) in [("windw", "window"), ("retention", "retention_days"), ("max-lag", "max_lag")] {
            let text = RawSettings::from_toml(&format!("{key} = 1"), "h.toml").unwrap_err().to_string();
            assert_eq!(text, format!("a key in h.toml is {key:?}, but must be a setting's name: {near}"));
        }
        let text = RawSettings::from_toml("qqqqqqqqqqq = 1", "h.toml").unwrap_err().to_string();
        assert!(text.contains("database_uri or storage_uri or region"), "{text}");
    }

    #[test]
    fn a_broken_file_is_named_with_its_line_and_without_its_text() {
        let text = RawSettings::from_toml("slot = 'a'\ndatabase_uri = postgres://u:secret@h/d\n", "h.toml")
            .unwrap_err()
            .to_string();
        assert!(text.contains("h.toml") && text.contains("line 2") && !text.contains("secret"), "{text}");
        let text = RawSettings::from_toml("slot = ['a']", "h.toml").unwrap_err().to_string();
        assert_eq!(text, "slot in h.toml is \"array\", but must be a string or a whole number");
    }

    #[test]
    fn a_named_file_must_exist() {
        let path = Path::new("/nowhere/highwater.toml");
        let text = Layers::collect(RawSettings::default(), &|_| None, Some(path)).unwrap_err().to_string();
        assert!(text.starts_with("--config is \"/nowhere/highwater.toml\", but must be a file"), "{text}");
    }

    #[test]
    fn distance_counts_letters() {
        for (from, to, distance) in
            [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("abc", "", 3)]
        {
            assert_eq!(edit_distance(from, to), distance, "{from} {to}");
        }
    }
}
