//! The tables that the settings describe, as the archive has them, or, before that, as the catalog does.

use tokio_postgres::Client;

use super::columns::{Found, UNSEEN, columns};
use super::defaults;
use super::identity::RowIdentity;
use crate::archive::{self, Storage};
use crate::config::{Changes, Config, IDENTIFIER_BYTES_MAX, TableSettings, VERSIONS_SUFFIX};
use crate::error::{Error, Result};
use crate::tables::{CHANGE_COLUMNS, ColumnSpec, ColumnType, Description, Kind, change_columns, is_storable};

/// The settings with the descriptions of their tables: a session and a verification each begin with that. A table that is
/// archived already stays what its archive says. Without a storage all are as the catalog has them.
///
/// # Errors
///
/// A table is not there, or can't be archived as its settings say; or a query failed.
pub(crate) async fn with_tables(
    config: &Config,
    client: &Client,
    storage: Option<&Storage>,
) -> Result<Config> {
    let defaults = defaults::sections(config, client, false).await?;
    describing(config, client, storage, &defaults).await
}

/// As [`with_tables`], and with those of Scouter's tables that are not archived yet: so `setup` begins.
///
/// # Errors
///
/// As [`with_tables`].
pub(crate) async fn with_all_tables(
    config: &Config,
    client: &Client,
    storage: Option<&Storage>,
) -> Result<Config> {
    let defaults = defaults::sections(config, client, true).await?;
    describing(config, client, storage, &defaults).await
}

async fn describing(
    config: &Config,
    client: &Client,
    storage: Option<&Storage>,
    defaults: &[TableSettings],
) -> Result<Config> {
    let mut kinds: Vec<Kind> = Vec::new();
    for settings in config.tables.iter().chain(defaults) {
        let mut broken = None;
        let archived = match storage {
            Some(storage) => match archive::described(storage, &settings.folder).await {
                // The claim meets the same, and leaves the table out alone.
                Err(error @ Error::Delta { .. }) => {
                    broken = Some(error);
                    None
                }
                described => described?,
            },
            None => None,
        };
        let kind = match archived {
            Some(kind) => same(config, settings, kind),
            None => from_catalog(config, client, settings).await,
        };
        match (kind, broken) {
            (Ok(kind), _) => kinds.push(kind),
            // Nothing says what it is: neither its log nor the catalog.
            (Err(error @ Error::Setting { .. }), Some(broken)) => tracing::error!(
                table = settings.source,
                error = broken.chain(),
                catalog = error.chain(),
                "the table's archive can't be read, and it can't be described anew; it is left out until the next start"
            ),
            (Err(error), _) => return Err(error),
        }
    }
    // What is archived stays so, whatever becomes of its section.
    if let Some(storage) = storage {
        for name in watermarked(client, &config.slot).await? {
            let is_known = Kind::of_name(&name).is_some() || kinds.iter().any(|kind| kind.name() == name);
            if !is_known && let Some(kind) = archive::described(storage, &name).await? {
                kinds.push(kind);
            }
        }
    }
    Ok(config.describing(kinds))
}

/// The archive's tables that a slot feeds.
async fn watermarked(client: &Client, slot: &str) -> Result<Vec<String>> {
    let failed = || Error::sql("reading which tables are archived");
    match client.query("select kind from highwater.watermark where slot_name = $1 order by 1", &[&slot]).await
    {
        Ok(rows) => rows.iter().map(|row| row.try_get(0).map_err(failed())).collect(),
        // Before `setup`, there is none, or none that this role may see.
        Err(error) => match error.code() {
            Some(code) if UNSEEN.contains(&code.code()) => Ok(Vec::new()),
            _ => Err(failed()(error)),
        },
    }
}

fn refused(settings: &TableSettings, key: &str, value: &str, accepted: impl Into<String>) -> Error {
    let setting = format!("{key} of [[table]] {}", settings.source);
    Error::Setting { setting, value: value.to_owned(), accepted: accepted.into() }
}

/// Makes sure that an archived table is the one of the settings: files are sorted and ranged by what it was when it was made.
fn same(config: &Config, settings: &TableSettings, kind: Kind) -> Result<Kind> {
    let is_at = |what: &str| format!("{what}, as the archive's table {} was made with", kind.name());
    let source = kind.source_table(&config.schema).unwrap_or_default();
    if settings.qualified(&config.schema) != source {
        return Err(refused(
            settings,
            "folder",
            &settings.folder,
            format!("another one: that is the archive of {source}"),
        ));
    }
    if kind.time_column() != settings.time {
        return Err(refused(settings, "time", &settings.time, is_at(kind.time_column())));
    }
    let names = settings.entity.as_ref().map_or(&[][..], |entity| &entity.columns);
    if kind.entity_columns() != names {
        let kept = kind.entity_columns().join(", ");
        return Err(refused(
            settings,
            "entity",
            &names.join(", "),
            is_at(if kept.is_empty() { "none" } else { &kept }),
        ));
    }
    let changes = if kind.keeps_versions() { Changes::Versions } else { Changes::Inserts };
    if changes != settings.changes {
        return Err(refused(settings, "changes", named(settings.changes), is_at(named(changes))));
    }
    Ok(Kind::described(Description { left_out: settings.exclude.clone(), ..kind.description().clone() }))
}

/// As the settings have it.
const fn named(changes: Changes) -> &'static str {
    match changes {
        Changes::Inserts => "inserts",
        Changes::Versions => "versions",
    }
}

async fn from_catalog(config: &Config, client: &Client, settings: &TableSettings) -> Result<Kind> {
    let source = settings.qualified(&config.schema);
    let columns = columns(client, &source).await?;
    if columns.is_empty() {
        return Err(refused(settings, "source", &source, "a plain or partitioned table that there is"));
    }
    let table = Catalog { settings, columns };
    table.check_names()?;
    table.check_time()?;
    table.check_entity()?;
    let data = table.data();
    table.check_sort(&data)?;
    let mut archived = vec![ColumnSpec::required(&settings.time, ColumnType::Timestamp)];
    let entity = settings.entity.iter().flat_map(|entity| &entity.columns);
    archived.extend(entity.map(|name| ColumnSpec::required(name, ColumnType::String)));
    archived.extend(data.into_iter().map(Found::archived));
    let mut row_key = Vec::new();
    if settings.changes == Changes::Versions {
        if config.versions_publication().len() > IDENTIFIER_BYTES_MAX {
            let accepted = format!(
                "inserts, or HIGHWATER_PUBLICATION must be a name of {} bytes at most",
                IDENTIFIER_BYTES_MAX - VERSIONS_SUFFIX.len()
            );
            return Err(refused(settings, "changes", named(settings.changes), accepted));
        }
        let identity = RowIdentity::read(client, &source).await?;
        if let Some(problem) = identity.problem(&source, &settings.time, &archived) {
            return Err(refused(settings, "changes", named(settings.changes), problem));
        }
        row_key = identity.key;
        archived.extend(change_columns());
    }
    Ok(Kind::described(Description {
        name: settings.folder.clone(),
        source: Some(source),
        entity: settings.entity.clone(),
        columns: archived,
        sort: settings.sort.clone(),
        left_out: settings.exclude.clone(),
        row_key,
    }))
}

/// A table as its settings and the catalog have it.
struct Catalog<'a> {
    settings: &'a TableSettings,
    columns: Vec<Found>,
}

impl Catalog<'_> {
    fn refused(&self, key: &str, value: &str, accepted: impl Into<String>) -> Error {
        refused(self.settings, key, value, accepted)
    }

    fn column(&self, name: &str) -> Option<&Found> {
        self.columns.iter().find(|column| column.name == name)
    }

    fn is_excluded(&self, name: &str) -> bool {
        self.settings.exclude.iter().any(|excluded| excluded == name)
    }

    fn check_names(&self) -> Result<()> {
        for (key, names) in [("exclude", &self.settings.exclude), ("sort", &self.settings.sort)] {
            if let Some(unknown) = names.iter().find(|name| self.column(name).is_none()) {
                let known: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
                return Err(self.refused(
                    key,
                    unknown,
                    format!("columns of the table: {}", known.join(", ")),
                ));
            }
        }
        let kept: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let kept: Vec<&str> = kept.into_iter().filter(|name| !self.is_excluded(name)).collect();
        let is_alone =
            |name: &str| kept.iter().filter(|other| other.to_lowercase() == name.to_lowercase()).count() == 1;
        let is_ours =
            |name: &&str| self.settings.changes == Changes::Versions && CHANGE_COLUMNS.contains(name);
        if let Some(ours) = kept.iter().copied().find(is_ours) {
            let accepted = "excluded: with `changes = \"versions\"` the archive has a column of that name";
            return Err(self.refused("the column", ours, accepted));
        }
        match kept.iter().find(|name| !is_storable(name) || !is_alone(name)) {
            None => Ok(()),
            Some(wrong) => Err(self.refused(
                "the column",
                wrong,
                "excluded: readers of Delta tables take no name with a space or one of ,;{}()=`. in it, and none that differs from \
                 another one in case alone",
            )),
        }
    }

    fn check_time(&self) -> Result<()> {
        let is_time = |column: &&Found| column.column_type == ColumnType::Timestamp;
        if self.column(&self.settings.time).as_ref().is_some_and(is_time) {
            return Ok(());
        }
        let times: Vec<&str> =
            self.columns.iter().filter(is_time).map(|column| column.name.as_str()).collect();
        let accepted = format!("a column of type timestamptz or timestamp: {}", times.join(", "));
        Err(self.refused("time", &self.settings.time, accepted))
    }

    fn check_entity(&self) -> Result<()> {
        let Some(entity) = &self.settings.entity else { return Ok(()) };
        let is_of =
            |name: &str, of: ColumnType| self.column(name).is_some_and(|column| column.column_type == of);
        let Some(lookup) = &entity.lookup else {
            let wrong = entity.columns.iter().find(|name| !is_of(name, ColumnType::String));
            return wrong.map_or(Ok(()), |wrong| {
                Err(self.refused("entity", wrong, "columns of the table that hold texts"))
            });
        };
        if !is_of(&lookup.id, ColumnType::Long) {
            return Err(self.refused("entity.id", &lookup.id, "a column of the table that holds integers"));
        }
        let is_double = |name: &&String| self.column(name).is_some() && !self.is_excluded(name);
        entity.columns.iter().find(is_double).map_or(Ok(()), |double| {
            let accepted = "names that the table itself does not have, or has excluded";
            Err(self.refused("entity.columns", double, accepted))
        })
    }

    /// The columns that are archived beside the time and the entity's.
    fn data(&self) -> Vec<&Found> {
        let entity = self.settings.entity.as_ref();
        let is_id = |name: &str| {
            entity.and_then(|entity| entity.lookup.as_ref()).is_some_and(|lookup| lookup.id == name)
        };
        let is_entity =
            |name: &String| entity.is_some_and(|entity| entity.columns.contains(name)) || is_id(name);
        let is_data =
            |name: &String| *name != self.settings.time && !self.is_excluded(name) && !is_entity(name);
        self.columns.iter().filter(|column| is_data(&column.name)).collect()
    }

    fn check_sort(&self, data: &[&Found]) -> Result<()> {
        let is_sorted =
            |name: &String| data.iter().any(|column| column.name == *name && is_sortable(column.column_type));
        self.settings.sort.iter().find(|name| !is_sorted(name)).map_or(Ok(()), |wrong| {
            Err(self.refused("sort", wrong, "archived columns of texts, integers, dates or booleans"))
        })
    }
}

const fn is_sortable(column_type: ColumnType) -> bool {
    matches!(
        column_type,
        ColumnType::String | ColumnType::Int | ColumnType::Long | ColumnType::Date | ColumnType::Boolean
    )
}
