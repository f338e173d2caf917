//! `[[table]]` in the settings file: a table that is archived because it is described.

use toml::{Table, Value};

use super::setting::setting_error;
use crate::error::{Error, Result};
use crate::tables::{ENTITY_COLUMNS_MAX, EntityKey, EntityTable, SORT_COLUMNS_MAX};

/// What the settings say of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSettings {
    /// The table, with its schema or in the one of the settings.
    pub source: String,
    /// Name of its folder in the archive: `a-z`, `0-9` and `_`.
    pub folder: String,
    /// The column that says when a row is of.
    pub time: String,
    /// How rows name their entity; `None` if they belong to none.
    pub entity: Option<EntityKey>,
    /// The columns that rows of one entity and time are sorted by.
    pub sort: Vec<String>,
    /// Columns that are not archived.
    pub exclude: Vec<String>,
    /// Days that Postgres keeps a row; `None` for those of all tables.
    pub retention_days: Option<u32>,
    /// Whether rows are only added, or change.
    pub changes: Changes,
}

/// What happens to the rows of a table, as far as it is archived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Changes {
    /// They are added, and stay as they are.
    #[default]
    Inserts,
    /// They are updated and deleted, too: each version is archived.
    Versions,
}

impl TableSettings {
    /// The table with its schema; `schema` is that of the settings.
    #[must_use]
    pub fn qualified(&self, schema: &str) -> String {
        if self.source.contains('.') { self.source.clone() } else { format!("{schema}.{}", self.source) }
    }
}

const KEYS: [&str; 8] = ["source", "folder", "time", "entity", "sort", "exclude", "retention", "changes"];
const ENTITY_KEYS: [&str; 4] = ["id", "table", "key", "columns"];

/// Folders that the archive has in any case.
const BUILT_IN: [&str; 4] = ["custom", "psi", "spc", "quarantine"];

/// Reads the value of the key `table`; `file` is the file's name in errors.
pub(super) fn read(value: Value, file: &str) -> Result<Vec<TableSettings>> {
    let Value::Array(tables) = value else {
        return Err(setting_error(&format!("table in {file}"), value.type_str(), "sections [[table]]"));
    };
    let mut found: Vec<TableSettings> = Vec::new();
    for (number, value) in (1..).zip(tables) {
        let Value::Table(table) = value else {
            return Err(setting_error(&format!("table in {file}"), value.type_str(), "sections [[table]]"));
        };
        let source = table.get("source").and_then(Value::as_str).map(str::to_owned);
        let place = Place { file, table: source.unwrap_or_else(|| format!("number {number}")) };
        let settings = place.table(&table)?;
        if found.iter().any(|other| other.source == settings.source) {
            return Err(place.error("source", &settings.source, "a table that has no other section"));
        }
        if found.iter().any(|other| other.folder == settings.folder) {
            return Err(place.error("folder", &settings.folder, "a folder that no other table has"));
        }
        found.push(settings);
    }
    Ok(found)
}

/// Where a value stands, for errors.
struct Place<'a> {
    file: &'a str,
    table: String,
}

impl Place<'_> {
    fn error(&self, key: &str, value: &str, accepted: &str) -> Error {
        let setting = format!("{key} of [[table]] {} in {}", self.table, self.file);
        setting_error(&setting, value, accepted)
    }

    fn table(&self, table: &Table) -> Result<TableSettings> {
        self.known(table, &KEYS)?;
        let source = self.text(table, "source")?.ok_or_else(|| self.error("source", "missing", SOURCE))?;
        let is_name = |name: &str| !name.is_empty() && name.len() <= super::IDENTIFIER_BYTES_MAX;
        if source.split('.').count() > 2 || !source.split('.').all(is_name) {
            return Err(self.error("source", &source, SOURCE));
        }
        let name = source.rsplit('.').next().unwrap_or_default();
        let folder = self.text(table, "folder")?.unwrap_or_else(|| name.to_owned());
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if !is_name(&folder) || !folder.chars().all(is_plain) || folder.starts_with('_') {
            return Err(self.error(
                "folder",
                &folder,
                "a name of a-z, 0-9 and _, that does not begin with _",
            ));
        }
        if BUILT_IN.contains(&folder.as_str()) {
            return Err(self.error("folder", &folder, "another name: the archive has that folder already"));
        }
        let entity = table.get("entity").map(|value| self.entity(value)).transpose()?;
        let sort = self.columns(table, "sort")?;
        if sort.len() > SORT_COLUMNS_MAX {
            let accepted =
                format!("{SORT_COLUMNS_MAX} columns at most: they come after the entity and the time");
            return Err(self.error("sort", &sort.join(", "), &accepted));
        }
        let retention_days = match table.get("retention") {
            None => None,
            Some(value) => {
                let days =
                    value.as_integer().and_then(|days| u32::try_from(days).ok()).filter(|days| *days > 0);
                Some(days.ok_or_else(|| self.error("retention", &shown(value), "days, at least 1"))?)
            }
        };
        let changes = match self.text(table, "changes")?.as_deref() {
            None | Some("inserts") => Changes::Inserts,
            Some("versions") => Changes::Versions,
            Some(other) => return Err(self.error("changes", other, "inserts or versions")),
        };
        Ok(TableSettings {
            changes,
            source,
            folder,
            time: self.text(table, "time")?.unwrap_or_else(|| "created_at".to_owned()),
            entity,
            sort,
            exclude: self.columns(table, "exclude")?,
            retention_days,
        })
    }

    fn entity(&self, value: &Value) -> Result<EntityKey> {
        let key = match value {
            Value::Array(_) => EntityKey { columns: self.list("entity", value)?, lookup: None },
            Value::Table(table) => {
                self.known(table, &ENTITY_KEYS)?;
                let text = |key: &str| {
                    self.text(table, key)?
                        .ok_or_else(|| self.error(&format!("entity.{key}"), "missing", "a name"))
                };
                let key = self.text(table, "key")?.unwrap_or_else(|| "id".to_owned());
                let lookup = Some(EntityTable { id: text("id")?, table: text("table")?, key });
                EntityKey { columns: self.columns(table, "columns")?, lookup }
            }
            other => return Err(self.error("entity", other.type_str(), ENTITY)),
        };
        if key.columns.is_empty() || key.columns.len() > ENTITY_COLUMNS_MAX {
            let accepted = format!("1 to {ENTITY_COLUMNS_MAX} columns");
            return Err(self.error("entity", &format!("{} columns", key.columns.len()), &accepted));
        }
        Ok(key)
    }

    fn known(&self, table: &Table, keys: &[&str]) -> Result<()> {
        match table.keys().find(|key| !keys.contains(&key.as_str())) {
            Some(key) => Err(self.error("a key", key, &keys.join(", "))),
            None => Ok(()),
        }
    }

    fn text(&self, table: &Table, key: &str) -> Result<Option<String>> {
        match table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
            Some(other) => Err(self.error(key, &shown(other), "a name")),
        }
    }

    fn columns(&self, table: &Table, key: &str) -> Result<Vec<String>> {
        table.get(key).map_or(Ok(Vec::new()), |value| self.list(key, value))
    }

    fn list(&self, key: &str, value: &Value) -> Result<Vec<String>> {
        let wrong = || self.error(key, &shown(value), "a list of names of columns, each once");
        let names = value.as_array().ok_or_else(wrong)?.iter().map(|name| name.as_str().map(str::to_owned));
        let names: Vec<String> = names.collect::<Option<_>>().ok_or_else(wrong)?;
        let is_once = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
        if names.iter().all(|name| !name.is_empty() && is_once(name)) { Ok(names) } else { Err(wrong()) }
    }
}

/// A value as an error has it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        other => other.type_str().to_owned(),
    }
}

const SOURCE: &str = "a table, like schema.table";
const ENTITY: &str =
    "a list of columns, or { id = \"...\", table = \"schema.table\", key = \"id\", columns = [...] }";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawSettings;

    fn tables(text: &str) -> Result<Vec<TableSettings>> {
        RawSettings::from_toml(text, "h.toml").map(|raw| raw.tables)
    }

    #[test]
    fn a_table_is_described_by_what_differs() {
        let found = tables(
            "slot = 'a'\n[[table]]\nsource = 'log.events'\n\n[[table]]\nsource = 'scouter.agent_eval_task'\nfolder = 'tasks'\n\
             time = 'start_time'\nsort = ['task_id']\nexclude = ['archived']\nretention = 90\n\
             entity = { id = 'entity_id', table = 'drift_entities', columns = ['space', 'name', 'version', 'uid'] }\n\
             changes = 'versions'",
        );
        let [events, tasks] = found.unwrap().try_into().unwrap();
        assert_eq!((events.folder.as_str(), events.time.as_str()), ("events", "created_at"));
        assert_eq!((events.entity, events.retention_days, events.changes), (None, None, Changes::Inserts));
        assert_eq!((tasks.folder.as_str(), tasks.time.as_str()), ("tasks", "start_time"));
        assert_eq!((tasks.retention_days, tasks.changes), (Some(90), Changes::Versions));
        let entity = tasks.entity.unwrap();
        assert_eq!(entity.columns.len(), 4);
        assert_eq!(entity.lookup.unwrap().key, "id");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_table() {
        for (section, expected) in [
            (
                "folder = 'x'",
                "source of [[table]] number 1 in h.toml is \"missing\", but must be a table, like schema.table",
            ),
            ("source = 'a.b.c'", "source of [[table]] a.b.c in h.toml is \"a.b.c\""),
            ("source = 'a.b'\nfolder = 'psi'", "folder of [[table]] a.b in h.toml is \"psi\""),
            ("source = 'a.b'\nfolder = '../x'", "folder of [[table]] a.b in h.toml is \"../x\""),
            (
                "source = 'a.b'\nretention = 0",
                "retention of [[table]] a.b in h.toml is \"0\", but must be days",
            ),
            ("source = 'a.b'\nentity = 'x'", "entity of [[table]] a.b in h.toml is \"string\""),
            ("source = 'a.b'\nentity = []", "must be 1 to 4 columns"),
            (
                "source = 'a.b'\nentity = { id = 'x' }",
                "entity.table of [[table]] a.b in h.toml is \"missing\"",
            ),
            (
                "source = 'a.b'\nchanges = 'all'",
                "changes of [[table]] a.b in h.toml is \"all\", but must be inserts or versions",
            ),
            ("source = 'a.b'\nsort = ['x', 'x']", "a list of names of columns, each once"),
            ("source = 'a.b'\nsort = ['x', 'y', 'z']", "2 columns at most"),
            (
                "source = 'a.b'\ntimes = 'x'",
                "a key of [[table]] a.b in h.toml is \"times\", but must be source, folder",
            ),
            ("source = 'a.b'\n[[table]]\nsource = 'c.b'", "a folder that no other table has"),
        ] {
            let error = tables(&format!("[[table]]\n{section}")).unwrap_err().to_string();
            assert!(error.contains(expected), "{section}: {error}");
        }
        assert!(tables("table = 'x'").unwrap_err().to_string().contains("must be sections [[table]]"));
    }
}
