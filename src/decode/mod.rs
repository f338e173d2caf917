//! Rows of the drift tables become rows of [`Batches`]; a row that its archive column can't hold becomes a
//! quarantined one, and nothing is dropped.
//!
//! Pure: an `entity_id` that is not in the cache is reported as [`Inserted::UnknownEntity`], and whoever
//! drives the decoder looks it up and hands the row in again.
//!
//! # Which rows are skipped
//!
//! After a crash the server sends transactions again that some tables already have. A transaction is in a
//! table if its commit record begins before the table's LSN (see ARCHITECTURE.md, "What is durable when").
//! [`Decoder::begin`] takes that answer for each kind, and rows of such kinds are passed over.

mod entity;
mod relation;
mod value;

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use crate::batch::{Batches, EntityId, QuarantinedRow, SeriesId};
use crate::lsn::Lsn;
use crate::pgoutput::{Begin, DecodeError, Insert, Relation, Tuple, Value};
use crate::record::{Entity, Kind};
use entity::EntityCache;
pub(crate) use entity::Unresolved;
pub use relation::{ENTITY_TABLE, Notice, Shape};
use relation::{ROLE_COUNT, Role, Table, Target};
use value::{SourceType, Unfit};

/// Turns the stream's rows into batches.
#[derive(Debug)]
pub struct Decoder {
    schema: String,
    tables: HashMap<u32, Table>,
    entities: EntityCache,
    transaction: Transaction,
}

/// The transaction whose rows are being decoded.
#[derive(Clone, Copy, Debug, Default)]
struct Transaction {
    final_lsn: Lsn,
    commit_micros: i64,
    /// Whether the table of each kind already has it.
    archived: [bool; Kind::ALL.len()],
}

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is in the batches, or needed not be.
    Done,
    /// It is in the batches as a quarantined row.
    Quarantined,
    /// Its table is not archived.
    NotArchived,
    /// Nothing happened: call [`Decoder::resolve`] for this `entity_id`, then hand the row in again.
    UnknownEntity(i64),
}

/// Why a row can't be decoded at all; the stream must end, since rows would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// The row's bytes are not a tuple.
    #[error(transparent)]
    Tuple(#[from] DecodeError),
    /// The row's table was not described before it.
    #[error("a row of relation {0}, which the stream has not described")]
    UnknownRelation(u32),
    /// The row has more or fewer values than its table has columns.
    #[error("a row of {values} values for a table of {columns} columns")]
    ColumnCount {
        /// Values of the row.
        values: u16,
        /// Columns of the table.
        columns: usize,
    },
}

/// A row's values, by role; what the table lacks is `None`.
type Fields<'a> = [Option<(Value<'a>, SourceType)>; ROLE_COUNT];

/// The column that keeps a row out of its table, and why.
#[derive(Clone, Copy, Debug)]
struct Rejection {
    column: &'static str,
    why: Unfit,
}

enum Outcome {
    Pushed,
    Rejected(Rejection),
    UnknownEntity(i64),
}

impl Decoder {
    /// A decoder for the drift tables of a schema.
    #[must_use]
    pub fn new(schema: impl Into<String>) -> Self {
        Self {
            schema: schema.into(),
            tables: HashMap::new(),
            entities: EntityCache::default(),
            transaction: Transaction::default(),
        }
    }

    /// Learns how a table's rows look. Returns what its operator should know, if this is new.
    pub fn relation(&mut self, relation: &Relation<'_>) -> Vec<Notice> {
        let table = Table::new(&self.schema, relation);
        let notices = table.notices();
        let before = self.tables.insert(relation.oid, table).map(|table| table.notices()).unwrap_or_default();
        notices.into_iter().filter(|notice| !before.contains(notice)).collect()
    }

    /// Begins a transaction. `table_lsn` is each table's LSN, by [`Kind::index`].
    pub fn begin(&mut self, begin: Begin, table_lsn: [Lsn; Kind::ALL.len()]) {
        self.entities.begin(begin.final_lsn);
        self.transaction = Transaction {
            final_lsn: begin.final_lsn,
            commit_micros: begin.commit_micros,
            archived: table_lsn.map(|lsn| begin.final_lsn < lsn),
        };
    }

    /// Takes over what an earlier session has decided: in these transactions, rows with these ids are in the
    /// quarantine. Whether an id names an entity is the one decision that does not follow from the stream alone; were it
    /// made anew, a row could end up in the quarantine and in its table.
    pub(crate) fn settle(&mut self, unresolved: HashSet<Unresolved>) {
        self.entities.settle(unresolved);
    }

    /// The name, with its schema, of a table that the stream has described.
    #[must_use]
    pub fn table_name(&self, relation: u32) -> Option<&str> {
        self.tables.get(&relation).map(|table| table.name.as_str())
    }

    /// Answers [`Inserted::UnknownEntity`]: `None` if there is no such entity.
    pub fn resolve(&mut self, id: i64, entity: Option<Entity>) {
        self.entities.insert(id, entity);
    }

    /// Forgets which ids no entity had, so that they are looked up again.
    pub fn forget_unresolved(&mut self) {
        self.entities.forget_unresolved();
    }

    /// Appends a row to the batches.
    ///
    /// # Errors
    ///
    /// The bytes are not a row of a known table.
    #[inline]
    pub fn insert(&mut self, insert: &Insert<'_>, batches: &mut Batches) -> Result<Inserted, InsertError> {
        let table = self.tables.get(&insert.relation).ok_or(InsertError::UnknownRelation(insert.relation))?;
        let kind = match table.target {
            Target::Nothing => return Ok(Inserted::NotArchived),
            Target::Drift(kind, _) if self.transaction.has(kind) => return Ok(Inserted::Done),
            Target::Drift(kind, _) => Some(kind),
            Target::Entities => None,
        };
        let fields = fields(insert.tuple, table)?;
        let Some(kind) = kind else {
            self.entities.learn(&fields);
            return Ok(Inserted::Done);
        };
        match push(kind, &fields, &mut self.entities, batches) {
            Outcome::Pushed => Ok(Inserted::Done),
            Outcome::UnknownEntity(id) => Ok(Inserted::UnknownEntity(id)),
            Outcome::Rejected(_) if self.transaction.has(Kind::Quarantine) => Ok(Inserted::Done),
            Outcome::Rejected(rejection) => {
                batches.push_quarantine(self.transaction.quarantined(table, insert.tuple, rejection)?);
                Ok(Inserted::Quarantined)
            }
        }
    }
}

impl Transaction {
    fn has(&self, kind: Kind) -> bool {
        self.archived.get(kind.index()).copied().unwrap_or(false)
    }

    #[cold]
    fn quarantined(
        &self,
        table: &Table,
        tuple: Tuple<'_>,
        rejection: Rejection,
    ) -> Result<QuarantinedRow, DecodeError> {
        let mut row = serde_json::Map::new();
        for (column, value) in table.columns.iter().zip(tuple.values()) {
            let text = value::display(value?, column.source_type);
            row.insert(column.name.clone(), text.map_or(Json::Null, Json::String));
        }
        Ok(QuarantinedRow {
            quarantined_at: self.commit_micros,
            source_table: table.name.clone(),
            reason: format!("{} {}", rejection.column, rejection.why),
            row: Json::Object(row).to_string(),
            lsn: self.final_lsn,
        })
    }
}

/// Reads a quarantined row back: the transaction and the id, if that is why it is there.
pub(crate) fn unresolved(reason: &str, row: &str, lsn: &str) -> Option<Unresolved> {
    if reason != format!("entity_id {}", Unfit::UnknownEntity) {
        return None;
    }
    let row: Json = serde_json::from_str(row).ok()?;
    Some((lsn.parse().ok()?, row.get("entity_id")?.as_str()?.parse().ok()?))
}

/// Sorts a row's values by role.
#[inline]
fn fields<'a>(tuple: Tuple<'a>, table: &Table) -> Result<Fields<'a>, InsertError> {
    if usize::from(tuple.column_count()) != table.columns.len() {
        return Err(InsertError::ColumnCount { values: tuple.column_count(), columns: table.columns.len() });
    }
    let mut fields: Fields<'a> = [None; ROLE_COUNT];
    let mut values = tuple.values();
    for column in &table.columns {
        let Some(value) = values.next() else { break };
        let value = value?;
        if let Some(place) = column.role.and_then(|role| fields.get_mut(role as usize)) {
            *place = Some((value, column.source_type));
        }
    }
    // Left-over bytes show up as one more, failed value.
    match values.next() {
        Some(Err(error)) => Err(error.into()),
        _ => Ok(fields),
    }
}

#[inline]
fn field<'a, T>(
    fields: &Fields<'a>,
    role: Role,
    column: &'static str,
    read: impl FnOnce(Value<'a>, SourceType) -> Result<T, Unfit>,
) -> Result<T, Rejection> {
    let (value, source_type) =
        fields.get(role as usize).copied().flatten().ok_or(Rejection { column, why: Unfit::Missing })?;
    read(value, source_type).map_err(|why| Rejection { column, why })
}

#[inline]
fn push(kind: Kind, fields: &Fields<'_>, entities: &mut EntityCache, batches: &mut Batches) -> Outcome {
    match try_push(kind, fields, entities, batches) {
        Ok(None) => Outcome::Pushed,
        Ok(Some(id)) => Outcome::UnknownEntity(id),
        Err(rejection) => Outcome::Rejected(rejection),
    }
}

/// Reads every value before anything is appended, so that a rejected row leaves no trace but perhaps an
/// interned text. The entity is read last: a row that is unfit whatever its entity is needs no look-up.
#[inline]
fn try_push(
    kind: Kind,
    fields: &Fields<'_>,
    entities: &mut EntityCache,
    batches: &mut Batches,
) -> Result<Option<i64>, Rejection> {
    let created_at = field(fields, Role::CreatedAt, "created_at", value::timestamp)?;
    let series_column = kind.series_column().unwrap_or_default();
    let series_text = if kind == Kind::Spc {
        field(fields, Role::Series, series_column, value::optional_text)?
    } else {
        Some(field(fields, Role::Series, series_column, value::text)?)
    };
    let not_utf8 = |column| Rejection { column, why: Unfit::NotUtf8 };
    let series = match series_text {
        Some(text) => batches.series(text).ok_or_else(|| not_utf8(series_column))?,
        None => SeriesId::NULL,
    };
    match kind {
        Kind::Psi => {
            let bin_id = field(fields, Role::BinId, "bin_id", value::int)?;
            let bin_count = field(fields, Role::BinCount, "bin_count", value::int)?;
            match entity(fields, entities, batches)? {
                Ok(entity) => batches.push_psi(entity, created_at, series, bin_id, bin_count),
                Err(id) => return Ok(Some(id)),
            }
        }
        Kind::Custom | Kind::Spc | Kind::Quarantine => {
            let number = field(fields, Role::Value, "value", value::optional_double)?;
            match entity(fields, entities, batches)? {
                Ok(entity) if kind == Kind::Custom => batches.push_custom(entity, created_at, series, number),
                Ok(entity) => batches.push_spc(entity, created_at, series, number),
                Err(id) => return Ok(Some(id)),
            }
        }
    }
    Ok(None)
}

/// The row's entity, or the id to look up.
#[inline]
fn entity(
    fields: &Fields<'_>,
    entities: &mut EntityCache,
    batches: &mut Batches,
) -> Result<Result<EntityId, i64>, Rejection> {
    if fields.get(Role::EntityId as usize).is_some_and(Option::is_some) {
        let id = field(fields, Role::EntityId, "entity_id", value::integer)?;
        return match entities.get(id, batches) {
            entity::Lookup::Known(entity) => Ok(Ok(entity)),
            entity::Lookup::None => Err(Rejection { column: "entity_id", why: Unfit::UnknownEntity }),
            entity::Lookup::Unknown => Ok(Err(id)),
        };
    }
    let space = field(fields, Role::Space, "space", value::text)?;
    let name = field(fields, Role::Name, "name", value::text)?;
    let version = field(fields, Role::Version, "version", value::text)?;
    let rejection = || Rejection { column: "space, name or version", why: Unfit::NotUtf8 };
    batches.entity(space, name, version).map(Ok).ok_or_else(rejection)
}

#[cfg(test)]
mod tests;
