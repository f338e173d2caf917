//! Rows of the drift tables become rows of [`Batches`]; a row that its archive column can't hold becomes a
//! quarantined one, and nothing is dropped.
//!
//! Pure: an `entity_id` that is not in the cache is reported as [`Inserted::UnknownEntity`], and a text that only the server can
//! bring to UTF-8 as [`Inserted::UnknownText`]; whoever drives the decoder looks it up and hands the row in again.
//!
//! # Which rows are skipped
//!
//! After a crash the server sends transactions again that some tables already have. A transaction is in a
//! table if its commit record begins before the table's LSN (see ARCHITECTURE.md, "What is durable when").
//! [`Decoder::begin`] takes that answer for each kind, and rows of such kinds are passed over.

mod charset;
mod entity;
mod relation;
mod settled;
mod source_type;
mod value;

use std::collections::HashMap;

use serde_json::Value as Json;

use crate::batch::{Batches, EntityId, QuarantinedRow, SeriesId};
use crate::lsn::Lsn;
use crate::pgoutput::{Begin, DecodeError, Insert, Relation, Tuple, Value};
use crate::tables::{Entity, Kind};
use charset::Charset;
pub(crate) use entity::ENTITY_TEXT_BYTES_MAX;
use entity::EntityCache;
pub use relation::{ENTITY_TABLE, Notice, Shape};
use relation::{ROLE_COUNT, Role, Table, Target};
pub(crate) use settled::Settled;
use source_type::SourceType;
use value::Unfit;

/// Turns the stream's rows into batches.
#[derive(Debug)]
pub struct Decoder {
    schema: String,
    charset: Charset,
    /// Types that are known by their form only, as [`Decoder::learn_type`] was told.
    types: HashMap<u32, SourceType>,
    tables: HashMap<u32, Table>,
    entities: EntityCache,
    transaction: Transaction,
    settled: Settled,
    adopted: HashMap<u32, (Kind, String)>,
}

/// The last microsecond of the archive's calendar.
const COMMIT_MICROS_MAX: i64 = 253_402_300_799_999_999;

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
    /// Nothing happened: call [`Decoder::learn_text`] for [`Decoder::unknown_text`], then hand the row in again.
    UnknownText,
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
            charset: Charset::default(),
            types: HashMap::new(),
            tables: HashMap::new(),
            entities: EntityCache::default(),
            transaction: Transaction::default(),
            settled: Settled::default(),
            adopted: HashMap::new(),
        }
    }

    /// Texts are in the database's own encoding, which is neither UTF-8 nor unknown: the server is asked what they are.
    pub fn ask_for_texts(&mut self) {
        self.charset = Charset::Foreign(charset::Texts::default());
    }

    /// The types of a table's columns that are not known: for each, [`Decoder::learn_type`] is to be called before
    /// [`Decoder::relation`].
    #[must_use]
    pub fn unknown_types(&self, relation: &Relation<'_>) -> Vec<u32> {
        let types = relation.columns.iter().map(|column| column.type_oid);
        let is_known = |oid: &u32| SourceType::is_known(*oid) || self.types.contains_key(oid);
        types.filter(|oid| !is_known(oid)).collect()
    }

    /// Learns which built-in type has the same binary form as a type; `None` if none has.
    pub fn learn_type(&mut self, type_oid: u32, same_as: Option<u32>) {
        let known = same_as.filter(|oid| SourceType::is_known(*oid));
        self.types.insert(type_oid, known.map_or(SourceType::Other(type_oid), SourceType::of));
    }

    /// Whether a table is a drift table with a column whose binary form is not known, so that a person could not read it in
    /// the quarantine.
    #[must_use]
    pub fn has_unreadable(&self, relation: u32) -> bool {
        self.tables.get(&relation).is_some_and(Table::has_unreadable)
    }

    /// The text that [`Inserted::UnknownText`] speaks of.
    #[must_use]
    pub fn unknown_text(&self) -> &[u8] {
        self.charset.asked()
    }

    /// Answers [`Inserted::UnknownText`]: `None` if it can't be written in UTF-8.
    pub fn learn_text(&mut self, text: Option<String>) {
        self.charset.learn(text);
    }

    /// Learns how a table's rows look. Returns what its operator should know, if this is new.
    pub fn relation(&mut self, relation: &Relation<'_>) -> Vec<Notice> {
        let mut table = Table::new(&self.schema, relation, &self.types);
        if let Some((kind, name)) = self.adopted.get(&relation.oid) {
            table.adopt(*kind, name);
        }
        let notices = table.notices();
        let before = self.tables.insert(relation.oid, table).map(|table| table.notices()).unwrap_or_default();
        notices.into_iter().filter(|notice| !before.contains(notice)).collect()
    }

    /// Begins a transaction. `table_lsn` is each table's LSN, by [`Kind::index`].
    pub fn begin(&mut self, begin: Begin, table_lsn: [Lsn; Kind::ALL.len()]) {
        self.transaction = Transaction {
            final_lsn: begin.final_lsn,
            // The quarantine's files are named by it.
            commit_micros: begin.commit_micros.clamp(0, COMMIT_MICROS_MAX),
            archived: table_lsn.map(|lsn| begin.final_lsn < lsn),
        };
    }

    /// Begins the copy of a table: none of its rows is skipped, but for those of them that are in the quarantine, which
    /// must have the position [`Lsn::ZERO`]. `micros` is the time that newly quarantined ones get.
    pub(crate) fn begin_copy(&mut self, micros: i64, quarantined: Settled) {
        let mut table_lsn = [Lsn::ZERO; Kind::ALL.len()];
        if let Some(lsn) = table_lsn.get_mut(Kind::Quarantine.index()) {
            *lsn = Lsn(1);
        }
        self.begin(Begin { final_lsn: Lsn::ZERO, commit_micros: micros, xid: 0 }, table_lsn);
        self.settled = quarantined;
    }

    /// Takes over rows that an earlier session has put into the quarantine: their own tables may not have their
    /// transactions yet. Whether a row fits does not follow from the stream alone (an entity may have come or gone,
    /// this version may know more types), so those rows stay where they are, and all others are decided anew.
    pub(crate) fn settle(&mut self, rows: Settled) {
        self.settled = rows;
    }

    /// Makes a table that has another name than a drift table one of them: a partition that is published as itself,
    /// or a drift table that was renamed. `name` is the drift table's.
    pub(crate) fn adopt(&mut self, relation: u32, kind: Kind, name: &str) {
        self.adopted.insert(relation, (kind, name.to_owned()));
        if let Some(table) = self.tables.get_mut(&relation) {
            table.adopt(kind, name);
        }
    }

    /// The name, with its schema, of a table that the stream has described.
    #[must_use]
    pub fn table_name(&self, relation: u32) -> Option<&str> {
        self.tables.get(&relation).map(|table| table.name.as_str())
    }

    /// Answers [`Inserted::UnknownEntity`]: `None` if there is no such entity.
    pub fn resolve(&mut self, id: i64, entity: Option<Entity>) {
        self.entities.insert(id, entity.ok_or_else(|| Unfit::UnknownEntity.to_string()));
    }

    /// Answers [`Inserted::UnknownEntity`] for an entity that can't be archived: `why` becomes the reason after `entity_id`.
    pub fn resolve_unfit(&mut self, id: i64, why: String) {
        self.entities.insert(id, Err(why));
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
        if self.charset.asks(fields.iter().copied().flatten()) {
            return Ok(Inserted::UnknownText);
        }
        let Some(kind) = kind else {
            self.entities.learn(&fields, &self.charset);
            return Ok(Inserted::Done);
        };
        if self.transaction.has(Kind::Quarantine) && self.settled.has_any(self.transaction.final_lsn) {
            if asks_for_any(&mut self.charset, table, insert.tuple)? {
                return Ok(Inserted::UnknownText);
            }
            if self.settled.take(self.transaction.final_lsn, table, insert.tuple, &self.charset)? {
                return Ok(Inserted::Done);
            }
        }
        match push(kind, &fields, &self.charset, &mut self.entities, batches) {
            Outcome::Pushed => {
                self.charset.trim();
                Ok(Inserted::Done)
            }
            Outcome::UnknownEntity(id) => Ok(Inserted::UnknownEntity(id)),
            Outcome::Rejected(rejection) => {
                if asks_for_any(&mut self.charset, table, insert.tuple)? {
                    return Ok(Inserted::UnknownText);
                }
                let reason = reason(rejection, &fields, &self.entities);
                let quarantined = self.transaction.quarantined(table, insert.tuple, reason, &self.charset)?;
                batches.push_quarantine(quarantined);
                self.charset.trim();
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
        reason: String,
        charset: &Charset,
    ) -> Result<QuarantinedRow, DecodeError> {
        let row = texts(table, tuple, charset, |_| true)?;
        Ok(QuarantinedRow {
            quarantined_at: self.commit_micros,
            source_table: table.name.clone(),
            reason,
            row: Json::Object(row).to_string(),
            lsn: self.final_lsn,
        })
    }
}

/// Whether the server must be asked for a text of a row, of whatever column.
#[cold]
fn asks_for_any(charset: &mut Charset, table: &Table, tuple: Tuple<'_>) -> Result<bool, DecodeError> {
    let values = tuple.values().zip(&table.columns).map(|(value, column)| Ok((value?, column.source_type)));
    let values: Vec<(Value<'_>, SourceType)> = values.collect::<Result<_, DecodeError>>()?;
    Ok(charset.asks(values.into_iter()))
}

/// Why a row is not archived.
#[cold]
fn reason(rejection: Rejection, fields: &Fields<'_>, entities: &EntityCache) -> String {
    if rejection.why == Unfit::UnknownEntity {
        let id = field(fields, Role::EntityId, rejection.column, value::integer);
        if let Some(why) = id.ok().and_then(|id| entities.why(id)) {
            return format!("{} {why}", rejection.column);
        }
    }
    format!("{} {}", rejection.column, rejection.why)
}

/// Whether a quarantined row is there because of what its column was (its type, or that there was none), and not because of
/// its value.
pub(crate) fn is_about_column(reason: &str) -> bool {
    value::is_about_column(reason)
}

/// Whether a quarantined row is there without its long values, which nobody archived.
pub(crate) fn is_about_length(reason: &str) -> bool {
    value::is_about_length(reason)
}

/// The values of a row as texts, by column.
fn texts(
    table: &Table,
    tuple: Tuple<'_>,
    charset: &Charset,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<serde_json::Map<String, Json>, DecodeError> {
    let mut row = serde_json::Map::new();
    for (column, value) in table.columns.iter().zip(tuple.values()) {
        let value = value?;
        if is_wanted(&column.name) {
            let text = value::display(value, column.source_type, charset);
            row.insert(column.name.clone(), text.map_or(Json::Null, Json::String));
        }
    }
    Ok(row)
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
fn push(
    kind: Kind,
    fields: &Fields<'_>,
    charset: &Charset,
    entities: &mut EntityCache,
    batches: &mut Batches,
) -> Outcome {
    match try_push(kind, fields, charset, entities, batches) {
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
    charset: &Charset,
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
        Some(text) => {
            let series = charset.utf8(text).and_then(|text| batches.series(text));
            series.ok_or_else(|| not_utf8(series_column))?
        }
        None => SeriesId::NULL,
    };
    match kind {
        Kind::Psi => {
            let bin_id = field(fields, Role::BinId, "bin_id", value::int)?;
            let bin_count = field(fields, Role::BinCount, "bin_count", value::int)?;
            match entity(fields, charset, entities, batches)? {
                Ok(entity) => batches.push_psi(entity, created_at, series, bin_id, bin_count),
                Err(id) => return Ok(Some(id)),
            }
        }
        Kind::Custom | Kind::Spc | Kind::Quarantine => {
            let number = field(fields, Role::Value, "value", value::optional_double)?;
            match entity(fields, charset, entities, batches)? {
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
    charset: &Charset,
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
    let text = |role, column| {
        let bytes = field(fields, role, column, value::text)?;
        charset.utf8(bytes).ok_or(Rejection { column, why: Unfit::NotUtf8 })
    };
    let (space, name) = (text(Role::Space, "space")?, text(Role::Name, "name")?);
    let version = text(Role::Version, "version")?;
    let rejection = || Rejection { column: "space, name or version", why: Unfit::NotUtf8 };
    batches.entity(space, name, version).map(Ok).ok_or_else(rejection)
}

#[cfg(test)]
mod tests;
