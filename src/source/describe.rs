//! The tables that the settings describe, as the archive has them, or, before that, as the catalog does.

use tokio_postgres::{Client, Row};

use super::copy::ATTRIBUTE;
use super::lookup::BINARY_FORM;
use crate::archive::{self, Storage};
use crate::config::{Config, TableSettings};
use crate::decode::NewColumn;
use crate::error::{Error, Result};
use crate::tables::{ColumnSpec, ColumnType, Compared, Description, Kind, is_storable};

/// Most digits of a number that has a decimal column; more are archived as text.
const DECIMAL_DIGITS_MAX: i32 = 38;

/// The settings with the descriptions of their tables: a session, a verification and `setup` each begin with that. A table that is
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
    let mut kinds: Vec<Kind> = Vec::new();
    for settings in &config.tables {
        let archived = match storage {
            Some(storage) => match archive::described(storage, &settings.folder).await {
                // The claim meets the same, and leaves the table out alone.
                Err(error @ Error::Delta { .. }) => {
                    tracing::debug!(table = settings.source, error = error.chain(), "its log says nothing");
                    None
                }
                described => described?,
            },
            None => None,
        };
        kinds.push(match archived {
            Some(kind) => same(config, settings, kind)?,
            None => from_catalog(config, client, settings).await?,
        });
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

/// The schema or the table is not there, or may not be read.
const UNSEEN: [&str; 3] = ["3F000", "42P01", "42501"];

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
    Ok(Kind::described(Description { left_out: settings.exclude.clone(), ..kind.description().clone() }))
}

/// A column of a source table.
pub(super) struct Found {
    pub(super) name: String,
    pub(super) source_type: String,
    column_type: ColumnType,
    /// The built-in type that has the same binary form, or the type itself.
    pub(super) type_oid: u32,
    attribute: Option<String>,
}

impl Found {
    /// A column that the catalog has no more, of a type with this binary form and this name.
    pub(super) fn former(new: &NewColumn, form: Option<u32>, source_type: String) -> Self {
        Self {
            name: new.name.clone(),
            source_type,
            column_type: column_type(form, new.modifier),
            type_oid: form.unwrap_or(new.type_oid),
            attribute: None,
        }
    }

    /// The archive's column for its values.
    pub(super) fn archived(&self) -> ColumnSpec {
        ColumnSpec {
            // A table that loses a column, or the condition that it is never null, goes on.
            nullable: true,
            name: self.name.clone(),
            column_type: self.column_type,
            source_type: Some(self.source_type.clone()),
            attribute: self.attribute.clone(),
            added: false,
            filled: None,
            compared: Compared::Plainly,
        }
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
    Ok(Kind::described(Description {
        name: settings.folder.clone(),
        source: Some(source),
        entity: settings.entity.clone(),
        columns: archived,
        sort: settings.sort.clone(),
        left_out: settings.exclude.clone(),
    }))
}

/// The columns of a table that the stream sends: generated ones are left out.
pub(super) async fn columns(client: &Client, source: &str) -> Result<Vec<Found>> {
    let (schema, table) = source.split_once('.').unwrap_or_default();
    let failed = || Error::sql(format!("reading the columns of {source}"));
    // The modifier of a domain is its base's.
    let query = format!(
        "select a.attname::text, format_type(a.atttypid, a.atttypmod), {BINARY_FORM},
                coalesce(nullif(a.atttypmod, -1), t.typtypmod, -1), a.atttypid, {ATTRIBUTE}
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         join pg_attribute a on a.attrelid = c.oid join pg_type t on t.oid = a.atttypid
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')
           and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
         order by a.attnum"
    );
    let rows = client.query(&query, &[&schema, &table]).await.map_err(failed())?;
    rows.iter().map(found).collect::<Result<Vec<Found>, _>>().map_err(failed())
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

fn found(row: &Row) -> Result<Found, tokio_postgres::Error> {
    let (form, modifier): (Option<u32>, i32) = (row.try_get(2)?, row.try_get(3)?);
    let own: u32 = row.try_get(4)?;
    Ok(Found {
        type_oid: form.unwrap_or(own),
        attribute: Some(row.try_get(5)?),
        name: row.try_get(0)?,
        source_type: row.try_get(1)?,
        column_type: column_type(form, modifier),
    })
}

/// The column for values of this form: one that a widened source column still fits, and text for what has none of its own.
fn column_type(form: Option<u32>, modifier: i32) -> ColumnType {
    match form {
        Some(1184 | 1114) => ColumnType::Timestamp,
        Some(20 | 21 | 23) => ColumnType::Long,
        Some(700 | 701) => ColumnType::Double,
        Some(16) => ColumnType::Boolean,
        Some(1082) => ColumnType::Date,
        Some(17) => ColumnType::Binary,
        Some(1700) => decimal(modifier).unwrap_or(ColumnType::String),
        _ => ColumnType::String,
    }
}

/// The digits of a `numeric(precision, scale)`, by its modifier (`make_numeric_typmod` in the server's `numeric.c`).
fn decimal(modifier: i32) -> Option<ColumnType> {
    let packed = modifier.checked_sub(4).filter(|packed| *packed >= 0)?;
    let (precision, scale) = ((packed >> 16) & 0xffff, packed & 0x7ff);
    // Eleven bits with a sign.
    let scale = (scale ^ 1024) - 1024;
    let fits = (1..=DECIMAL_DIGITS_MAX).contains(&precision) && (0..=precision).contains(&scale);
    let decimal = u8::try_from(precision).ok().zip(i8::try_from(scale).ok()).filter(|_| fits)?;
    Some(ColumnType::Decimal { precision: decimal.0, scale: decimal.1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_of_their_modifier() {
        let modifier = |precision: i32, scale: i32| ((precision << 16) | (scale & 0x7ff)) + 4;
        assert_eq!(decimal(modifier(12, 3)), Some(ColumnType::Decimal { precision: 12, scale: 3 }));
        assert_eq!(decimal(modifier(38, 38)), Some(ColumnType::Decimal { precision: 38, scale: 38 }));
        for other in [-1, modifier(39, 0), modifier(5, -2), modifier(3, 5)] {
            assert_eq!(column_type(Some(1700), other), ColumnType::String, "{other}");
        }
    }
}
