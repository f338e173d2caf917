//! [`Kind`]: a table of the archive, described.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use super::change::CHANGE_COLUMNS;

/// The type of an archived column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// Microseconds since 1970-01-01T00:00:00Z.
    Timestamp,
    /// UTF-8 text.
    String,
    /// IEEE 754 double; NaN and the infinities are values like any other.
    Double,
    /// 32-bit signed integer.
    Int,
    /// 64-bit signed integer.
    Long,
    /// True or false.
    Boolean,
    /// Days since 1970-01-01.
    Date,
    /// Bytes.
    Binary,
    /// A number of so many digits, of which so many are behind the point.
    Decimal {
        /// Digits, 38 at most.
        precision: u8,
        /// Of these behind the point.
        scale: i8,
    },
}

impl ColumnType {
    /// The type of the column in Arrow.
    #[must_use]
    pub fn arrow(self) -> DataType {
        match self {
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Self::String => DataType::Utf8,
            Self::Double => DataType::Float64,
            Self::Int => DataType::Int32,
            Self::Long => DataType::Int64,
            Self::Boolean => DataType::Boolean,
            Self::Date => DataType::Date32,
            Self::Binary => DataType::Binary,
            Self::Decimal { precision, scale } => DataType::Decimal128(precision, scale),
        }
    }
}

/// One column of an archived table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnSpec {
    /// The column's name, in the source table and in the archive.
    pub name: String,
    /// The column's type.
    pub column_type: ColumnType,
    /// Whether the archive holds nulls in it; where it doesn't, a null sends the row to quarantine.
    pub nullable: bool,
    /// The type of the source column, as SQL writes it; `None` in the tables that come with the program, which say by
    /// themselves which types they take.
    pub source_type: Option<String>,
    /// Which column of which table it was when it came into the archive: it stays the same if the column is renamed.
    pub attribute: Option<String>,
    /// Whether it came after rows had been archived, which have nulls in it.
    pub added: bool,
    /// What rows from before the column have in Postgres, where the archive has nulls: the column was added with a default.
    /// A value as digests of rows have it.
    pub filled: Option<Vec<u8>>,
    /// How it takes part where rows of the archive are compared with those of the source.
    pub compared: Compared,
}

/// How a column takes part where rows are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Compared {
    /// As it is.
    #[default]
    Plainly,
    /// Not at all: the source has it no more, or another one of its name, or of another type.
    Not,
    /// With the value of the first of these columns that has one, where it is null: the source column had their names before.
    Or(Vec<String>),
}

impl ColumnSpec {
    /// A column that always has a value.
    #[must_use]
    pub fn required(name: &str, column_type: ColumnType) -> Self {
        Self {
            name: name.to_owned(),
            column_type,
            nullable: false,
            source_type: None,
            attribute: None,
            added: false,
            filled: None,
            compared: Compared::Plainly,
        }
    }

    /// A column that may be null.
    #[must_use]
    pub fn nullable(name: &str, column_type: ColumnType) -> Self {
        Self { nullable: true, ..Self::required(name, column_type) }
    }
}

/// How the rows of a table name their entity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EntityKey {
    /// The columns that tell entities apart, most significant first; at most [`ENTITY_COLUMNS_MAX`].
    pub columns: Vec<String>,
    /// Where they are, if the source table does not have them itself.
    pub lookup: Option<EntityTable>,
}

/// A table that says which entity an id means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EntityTable {
    /// The column of the source table with the id, an integer.
    pub id: String,
    /// The table, in the schema of the settings if it names none.
    pub table: String,
    /// Its column with the ids.
    pub key: String,
}

impl EntityTable {
    /// The table's name with its schema; `schema` is that of the settings.
    #[must_use]
    pub fn qualified(&self, schema: &str) -> String {
        qualified(schema, &self.table)
    }
}

/// The most columns that may name an entity.
pub const ENTITY_COLUMNS_MAX: usize = 4;

/// The most columns that rows of one entity and time are sorted by.
pub const SORT_COLUMNS_MAX: usize = 2;

/// What a table of the archive is made of.
///
/// The columns come in this order: the time, the entity's, all others. A file is sorted by the entity's columns, the time, and
/// the columns of `sort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name of the kind, and of its folder under the storage URI.
    pub name: String,
    /// The source table, in the schema of the settings if it names none. No table feeds the quarantine alone.
    pub source: Option<String>,
    /// How rows name their entity; `None` if they belong to none.
    pub entity: Option<EntityKey>,
    /// The archive's columns, in file order.
    pub columns: Vec<ColumnSpec>,
    /// Columns that rows of one entity and time are sorted by, at most [`SORT_COLUMNS_MAX`].
    pub sort: Vec<String>,
    /// Columns of the source table that are not archived, and need not be told.
    pub left_out: Vec<String>,
    /// The source's primary key, where rows change and each version of a row is archived; the archive then has [`CHANGE_COLUMNS`],
    /// too. Empty where rows are only added.
    pub row_key: Vec<String>,
}

impl Description {
    fn entity_count(&self) -> usize {
        self.entity.as_ref().map_or(0, |entity| entity.columns.len())
    }
}

/// A kind of record, which is also a table of the archive: a [`Description`] that is handed down as one word.
///
/// Equal descriptions are one kind. They stay for as long as the process does: there are as many as tables, and one more for
/// each change of a table's columns.
#[derive(Clone, Copy)]
pub struct Kind(&'static Known);

#[derive(Debug)]
struct Known {
    description: Description,
    schema: SchemaRef,
    /// Positions of the sort columns behind entity and time among the columns that hold data.
    data_sort: Vec<usize>,
    sort_columns: Vec<String>,
    /// Positions of [`CHANGE_COLUMNS`] there, where the table keeps versions.
    changes: Option<[usize; CHANGE_COLUMNS.len()]>,
}

static KNOWN: Mutex<Vec<Kind>> = Mutex::new(Vec::new());

impl Kind {
    /// The kind of this description, whose columns of the entity and of the sort order must be among its columns.
    #[must_use]
    pub fn described(description: Description) -> Self {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kind) = known.iter().find(|kind| kind.0.description == description) {
            return *kind;
        }
        let kind = Self(Box::leak(Box::new(Known::new(description))));
        known.push(kind);
        kind
    }

    /// A table of which nothing but the name is known yet.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let name = name.to_owned();
        Self::described(Description {
            name,
            source: None,
            entity: None,
            columns: Vec::new(),
            sort: Vec::new(),
            left_out: Vec::new(),
            row_key: Vec::new(),
        })
    }

    /// What the kind is.
    #[must_use]
    pub fn description(self) -> &'static Description {
        &self.0.description
    }

    /// Name of the kind, and of its folder under the storage URI.
    #[must_use]
    pub fn name(self) -> &'static str {
        &self.0.description.name
    }

    /// The table that feeds this kind, with its schema (`schema`, if the description has none); none feeds the quarantine alone.
    #[must_use]
    pub fn source_table(self, schema: &str) -> Option<String> {
        self.0.description.source.as_ref().map(|table| qualified(schema, table))
    }

    /// The archive's columns, in file order: the time, the entity's, all others.
    #[must_use]
    pub fn columns(self) -> &'static [ColumnSpec] {
        &self.0.description.columns
    }

    /// The column of times that files are ranged by; the first one.
    #[must_use]
    pub fn time_column(self) -> &'static str {
        self.columns().first().map_or("", |column| &column.name)
    }

    /// How rows name their entity; `None` if they belong to none.
    #[must_use]
    pub fn entity(self) -> Option<&'static EntityKey> {
        self.0.description.entity.as_ref()
    }

    /// The columns that name the entity, in sort order.
    #[must_use]
    pub fn entity_columns(self) -> &'static [String] {
        self.entity().map_or(&[], |entity| &entity.columns)
    }

    /// The columns that are neither the time nor the entity's.
    #[must_use]
    pub fn data_columns(self) -> &'static [ColumnSpec] {
        self.columns().get(1 + self.0.description.entity_count()..).unwrap_or_default()
    }

    /// The columns that a file is sorted by, most significant first. The quarantine keeps the order of arrival.
    #[must_use]
    pub fn sort_columns(self) -> &'static [String] {
        &self.0.sort_columns
    }

    /// The columns that rows of one entity and time are sorted by, as positions in [`Kind::data_columns`].
    #[must_use]
    pub fn data_sort(self) -> &'static [usize] {
        &self.0.data_sort
    }

    /// The source's primary key, where each version of a row is archived; else empty. A row whose time changes is another one, all the
    /// same: so all versions of one are of one time.
    #[must_use]
    pub fn row_key(self) -> &'static [String] {
        &self.0.description.row_key
    }

    /// Whether rows change, and each of their versions is archived.
    #[must_use]
    pub fn keeps_versions(self) -> bool {
        !self.row_key().is_empty()
    }

    /// The positions of [`CHANGE_COLUMNS`] in [`Kind::data_columns`], where the table keeps versions.
    #[must_use]
    #[inline]
    pub fn change_places(self) -> Option<[usize; CHANGE_COLUMNS.len()]> {
        self.0.changes
    }

    /// Whether a column of the archive says what made a version, so that no source has it.
    #[must_use]
    pub fn is_change_column(self, column: &str) -> bool {
        self.keeps_versions() && CHANGE_COLUMNS.contains(&column)
    }

    /// The same table with other columns, and others that are left out.
    #[must_use]
    pub fn with(self, columns: Vec<ColumnSpec>, left_out: Vec<String>) -> Self {
        Self::described(Description { columns, left_out, ..self.description().clone() })
    }

    /// Whether a column of the source has no place in the archive and need not: it is left out, or names the entity, whose own
    /// columns take its place.
    #[must_use]
    pub fn leaves_out(self, column: &str) -> bool {
        let is_id = |key: &EntityKey| key.lookup.as_ref().is_some_and(|lookup| lookup.id == column);
        let description = self.description();
        description.left_out.iter().any(|other| other == column)
            || description.entity.as_ref().is_some_and(is_id)
    }

    /// Whether a column of the source is new: the archive has none of that name, and could have.
    #[must_use]
    pub fn lacks(self, column: &str) -> bool {
        !self.leaves_out(column) && self.may_have(column)
    }

    /// Whether a column of the source can have no place in the archive although it should.
    #[must_use]
    pub fn has_no_place_for(self, column: &str) -> bool {
        let is_it = |own: &ColumnSpec| own.name == column && !self.is_change_column(column);
        !self.columns().iter().any(is_it) && !self.leaves_out(column) && !self.may_have(column)
    }

    /// Whether a column of that name can be added: readers of Delta tables take none with a space or one of `,;{}()=` in its name,
    /// or a point or a backtick, and none whose name differs from another one's in case alone.
    fn may_have(self, column: &str) -> bool {
        let is_other = |other: &ColumnSpec| other.name.to_lowercase() != column.to_lowercase();
        is_storable(column) && self.columns().iter().all(is_other)
    }

    /// The Arrow schema of the archived table.
    #[must_use]
    pub fn schema(self) -> SchemaRef {
        Arc::clone(&self.0.schema)
    }
}

impl Known {
    fn new(description: Description) -> Self {
        let fields = description
            .columns
            .iter()
            .map(|column| Field::new(&column.name, column.column_type.arrow(), column.nullable));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let data = description.columns.iter().skip(1 + description.entity_count());
        let data: Vec<&str> = data.map(|column| column.name.as_str()).collect();
        let place = |name: &String| data.iter().position(|column| column == name);
        let data_sort = description.sort.iter().filter_map(place).collect();
        let changes = CHANGE_COLUMNS.map(|name| data.iter().position(|column| *column == name));
        let changes = match changes {
            [Some(change), Some(lsn), Some(sequence), Some(committed), Some(unchanged)]
                if !description.row_key.is_empty() =>
            {
                Some([change, lsn, sequence, committed, unchanged])
            }
            _ => None,
        };
        let time = description.columns.first().map(|column| &column.name);
        let entity = description.entity.iter().flat_map(|entity| &entity.columns);
        let sort_columns = entity.chain(time).chain(&description.sort).cloned().collect();
        Self { description, schema, data_sort, sort_columns, changes }
    }
}

/// Whether a column may have this name without a mapping of columns (Delta protocol, "Column Mapping"), and Spark SQL needs no
/// quotes within it.
#[must_use]
pub fn is_storable(name: &str) -> bool {
    !name.contains(|c: char| " ,;{}()=`.".contains(c) || c.is_control())
}

fn qualified(schema: &str, table: &str) -> String {
    if table.contains('.') { table.to_owned() } else { format!("{schema}.{table}") }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        ptr::eq(self.0, other.0)
    }
}

impl Eq for Kind {}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        ptr::hash(self.0, state);
    }
}

/// By name, but for the quarantine, which comes first: a row that goes there is skipped if its own table has its transaction, so
/// the quarantine's log must have it before.
impl Ord for Kind {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |kind: &Self| (!kind.is_quarantine(), kind.name(), ptr::from_ref(kind.0));
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Kind {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
