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
mod numeric;
mod relation;
mod row;
mod settled;
mod source_type;
mod transaction;
mod unfit;
mod value;

use std::collections::HashMap;

use serde_json::Value as Json;

use crate::batch::Batches;
use crate::lsn::Lsn;
use crate::pgoutput::{Begin, DecodeError, Delete, Insert, Relation, Tuple, Update, Value};
use crate::tables::{CHANGE, Change, Entity, EntityKey, Kind, PerKind};
use charset::Charset;
pub(crate) use entity::ENTITY_TEXT_BYTES_MAX;
use entity::EntityCache;
use relation::{Known, Role, Table, Target};
pub use relation::{NewColumn, Notice};
use row::{Before, Outcome, Rejection, Row, Scratch, checked};
pub(crate) use settled::Settled;
use source_type::SourceType;
use transaction::Transaction;
use unfit::Unfit;
pub(crate) use unfit::{
    SORTS_OF_REASONS, is_about_column, is_about_length, is_about_version, sort_of_reason,
};

/// Turns the stream's rows into batches.
#[derive(Debug)]
pub struct Decoder {
    known: Known,
    charset: Charset,
    /// Types that are known by their form only, as [`Decoder::learn_type`] was told.
    types: HashMap<u32, SourceType>,
    tables: HashMap<u32, Table>,
    /// By the number of the entity table.
    entities: Vec<EntityCache>,
    /// The entity table that [`Inserted::UnknownEntity`] speaks of.
    asked_entities: usize,
    transaction: Transaction,
    settled: Settled,
    adopted: HashMap<u32, (Kind, String)>,
    scratch: Scratch,
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
    /// Nothing happened: call [`Decoder::resolve`] for this id of [`Decoder::unknown_entity_key`], then hand the row in again.
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

impl Decoder {
    /// A decoder for the tables of these kinds; `schema` is that of the settings.
    #[must_use]
    pub fn new(schema: impl Into<String>, kinds: &[Kind]) -> Self {
        let known = Known::new(schema.into(), kinds);
        let archived = PerKind::new(kinds.iter().copied().chain([Kind::quarantine()]), |_| false);
        Self {
            charset: Charset::default(),
            types: HashMap::new(),
            tables: HashMap::new(),
            entities: known.keys.iter().map(|_| EntityCache::default()).collect(),
            asked_entities: 0,
            transaction: Transaction::new(archived),
            settled: Settled::default(),
            adopted: HashMap::new(),
            scratch: Scratch::default(),
            known,
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

    /// The columns of a table that the archive has not, and could have: rows of it are not to be decoded before it has them.
    #[must_use]
    pub fn new_columns(&self, relation: u32) -> Vec<NewColumn> {
        self.tables.get(&relation).map(|table| table.new_columns().collect()).unwrap_or_default()
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
        let mut table = Table::new(&self.known, relation, &self.types);
        if let Some((kind, name)) = self.adopted.get(&relation.oid) {
            table.adopt(&self.known, *kind, name);
        }
        let (notices, oid) = (table.notices(), relation.oid);
        let before = self.tables.insert(oid, table);
        let gone = before.iter().zip(self.tables.get(&oid)).flat_map(|(before, now)| now.gone_since(before));
        let gone: Vec<Notice> = gone.collect();
        let before = before.map(|table| table.notices()).unwrap_or_default();
        notices.into_iter().filter(|notice| !before.contains(notice)).chain(gone).collect()
    }

    /// Begins a transaction. `table_lsn` has the position of each kind's table.
    pub fn begin(&mut self, begin: Begin, table_lsn: &PerKind<Lsn>) {
        self.transaction.begin(begin, |kind| table_lsn.get(kind).copied().unwrap_or_default());
    }

    /// What the transaction deletes from here on is archived, and is a purge of ours: rows stay as they are in the archive.
    pub(crate) fn purge(&mut self) {
        self.transaction.is_purge = true;
    }

    /// Begins the copy of a table at this position: none of its rows is skipped, but for those of them that are in the quarantine,
    /// which must have the position [`Lsn::ZERO`]. `micros` is the time that newly quarantined ones get.
    pub(crate) fn begin_copy(&mut self, at: Lsn, micros: i64, quarantined: Settled) {
        self.transaction.copied_at = Some(at);
        let begin = Begin { final_lsn: Lsn::ZERO, commit_micros: micros, xid: 0 };
        self.transaction.begin(begin, |kind| if kind.is_quarantine() { Lsn(1) } else { Lsn::ZERO });
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
            table.adopt(&self.known, kind, name);
        }
    }

    /// Whether rows of a table are archived, or taught of entities, as far as is known.
    #[must_use]
    pub fn is_ours(&self, relation: u32) -> bool {
        self.tables.get(&relation).is_some_and(|table| table.target != Target::Nothing)
    }

    /// The name, with its schema, of a table that the stream has described.
    #[must_use]
    pub fn table_name(&self, relation: u32) -> Option<&str> {
        self.tables.get(&relation).map(|table| table.name.as_str())
    }

    /// Where the id of [`Inserted::UnknownEntity`] is to be looked up.
    #[must_use]
    pub fn unknown_entity_key(&self) -> Option<&'static EntityKey> {
        self.known.keys.get(self.asked_entities).copied()
    }

    /// Answers [`Inserted::UnknownEntity`]: `None` if there is no such entity.
    pub fn resolve(&mut self, id: i64, entity: Option<Entity>) {
        self.resolve_names(id, entity.map(|Entity { space, name, version }| vec![space, name, version]));
    }

    /// Answers [`Inserted::UnknownEntity`] by the names in the order of the key's columns: `None` if there is no such entity.
    pub(crate) fn resolve_names(&mut self, id: i64, names: Option<Vec<String>>) {
        let lookup = self.unknown_entity_key().and_then(|key| key.lookup.as_ref());
        let table = lookup.map_or("", |lookup| &lookup.table);
        let entity = names.ok_or_else(|| format!("{} in {table}", Unfit::UnknownEntity));
        self.learn_entity(self.asked_entities, id, entity);
    }

    /// Answers [`Inserted::UnknownEntity`] for an entity that can't be archived: `why` becomes the reason after the id's column.
    pub fn resolve_unfit(&mut self, id: i64, why: String) {
        self.learn_entity(self.asked_entities, id, Err(why));
    }

    fn learn_entity(&mut self, table: usize, id: i64, entity: Result<Vec<String>, String>) {
        if let Some(cache) = self.entities.get_mut(table) {
            cache.insert(id, entity);
        }
    }

    /// Forgets which ids no entity had, so that they are looked up again.
    pub fn forget_unresolved(&mut self) {
        self.entities.iter_mut().for_each(EntityCache::forget_unresolved);
    }

    /// Whether an update has made another row of one: its key or its time was changed, so what was before is to be deleted first. Of a
    /// table that keeps no versions none has.
    ///
    /// # Errors
    ///
    /// As [`Decoder::insert`].
    pub fn has_moved(&self, update: &Update<'_>) -> Result<bool, InsertError> {
        let Some(table) = self.tables.get(&update.relation) else { return Ok(false) };
        let Some(old) = update.old.filter(|_| table.kind().is_some_and(Kind::keeps_versions)) else {
            return Ok(false);
        };
        for ((column, old), new) in
            table.columns.iter().zip(checked(old, table)?).zip(checked(update.tuple, table)?)
        {
            let (old, new) = (old?, new?);
            let identifies = column.is_key || column.role == Some(Role::Time);
            if identifies && old != new && new != Value::Unchanged {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether an update that [has moved](Self::has_moved) a row has left values alone that the log has nowhere: neither what is new nor
    /// what was tells them, and there is no version before.
    ///
    /// # Errors
    ///
    /// As [`Decoder::insert`].
    pub fn has_lost_values(&self, update: &Update<'_>) -> Result<bool, InsertError> {
        let Some(table) = self.tables.get(&update.relation).filter(|_| !update.is_whole) else {
            return Ok(false);
        };
        let mut has_lost = false;
        for (column, value) in table.columns.iter().zip(checked(update.tuple, table)?) {
            has_lost |= value? == Value::Unchanged && column.role.is_some();
        }
        Ok(has_lost)
    }

    /// Appends a row to the batches.
    ///
    /// # Errors
    ///
    /// The bytes are not a row of a known table.
    #[inline]
    pub fn insert(&mut self, insert: &Insert<'_>, batches: &mut Batches) -> Result<Inserted, InsertError> {
        self.change(Change::Insert, insert, Before::Nothing, batches)
    }

    /// Appends what an update has made of a row, if versions of it are kept.
    ///
    /// # Errors
    ///
    /// As [`Decoder::insert`].
    pub fn update(&mut self, update: &Update<'_>, batches: &mut Batches) -> Result<Inserted, InsertError> {
        let row = Insert { relation: update.relation, tuple: update.tuple };
        let before = match update.old {
            Some(old) if update.is_whole => Before::Row(old),
            Some(_) => Before::Nothing,
            None => Before::Unknown,
        };
        self.change(Change::Update, &row, before, batches)
    }

    /// Appends that a row is gone, if versions of it are kept.
    ///
    /// # Errors
    ///
    /// As [`Decoder::insert`].
    pub fn delete(&mut self, delete: &Delete<'_>, batches: &mut Batches) -> Result<Inserted, InsertError> {
        let row = Insert { relation: delete.relation, tuple: delete.old };
        self.change(Change::Delete, &row, Before::Nothing, batches)
    }

    /// Appends a version of a row.
    #[inline]
    fn change(
        &mut self,
        change: Change,
        insert: &Insert<'_>,
        before: Before<'_>,
        batches: &mut Batches,
    ) -> Result<Inserted, InsertError> {
        let table = self.tables.get(&insert.relation).ok_or(InsertError::UnknownRelation(insert.relation))?;
        let kind = match table.target {
            Target::Nothing => return Ok(Inserted::NotArchived),
            Target::Entities(number) if change == Change::Insert => return self.learn(number, insert),
            Target::Entities(_) => return Ok(Inserted::Done),
            Target::Kind(kind, _) => kind,
        };
        let version = kind.keeps_versions().then(|| self.transaction.version(kind, change, before));
        if version.is_none() && change != Change::Insert {
            return Ok(Inserted::Done);
        }
        if change == Change::Delete && self.transaction.is_purge {
            return Ok(Inserted::Done);
        }
        if self.transaction.has(kind) {
            return Ok(Inserted::Done);
        }
        if self.charset.is_foreign()
            && asks(&mut self.charset, table, insert.tuple, |column| column.role.is_some())?
        {
            return Ok(Inserted::UnknownText);
        }
        if self.settled.has_any(self.transaction.final_lsn) && self.transaction.has(Kind::quarantine()) {
            if asks(&mut self.charset, table, insert.tuple, |_| true)? {
                return Ok(Inserted::UnknownText);
            }
            if self.settled.take(self.transaction.final_lsn, table, insert.tuple, &self.charset)? {
                return Ok(Inserted::Done);
            }
        }
        let row = Row { kind, table, charset: &self.charset, version };
        match row.push(insert.tuple, &mut self.scratch, &mut self.entities, batches)? {
            Outcome::Pushed => {
                self.charset.trim();
                Ok(Inserted::Done)
            }
            Outcome::UnknownEntity(number, id) => {
                self.asked_entities = number;
                Ok(Inserted::UnknownEntity(id))
            }
            Outcome::Rejected(Rejection { column, why, .. }) => {
                let reason = match why {
                    Unfit::UnknownEntity => {
                        format!("{column} {}", row.why_unknown(insert.tuple, &self.entities))
                    }
                    why => format!("{column} {why}"),
                };
                if asks(&mut self.charset, table, insert.tuple, |_| true)? {
                    return Ok(Inserted::UnknownText);
                }
                let mut texts = texts(table, insert.tuple, &self.charset, |_| true)?;
                if let Some(version) = version {
                    texts.insert(CHANGE.to_owned(), Json::from(version.change.name()));
                }
                let quarantined = self.transaction.quarantined(table, texts, reason);
                batches.push_quarantine(quarantined);
                self.charset.trim();
                Ok(Inserted::Quarantined)
            }
        }
    }

    /// Learns from a row of an entity table. A row without an id or a usable name is of no use: the look-up
    /// will say so for the rows that name it.
    #[cold]
    fn learn(&mut self, number: usize, insert: &Insert<'_>) -> Result<Inserted, InsertError> {
        let Some(table) = self.tables.get(&insert.relation) else { return Ok(Inserted::Done) };
        if asks(&mut self.charset, table, insert.tuple, |column| column.role.is_some())? {
            return Ok(Inserted::UnknownText);
        }
        let count = self.known.keys.get(number).map_or(0, |key| key.columns.len());
        let (mut id, mut names) = (None, vec![None; count]);
        for (value, column) in checked(insert.tuple, table)?.zip(&table.columns) {
            let value = value?;
            match column.role {
                Some(Role::EntityId) => id = value::integer(value, column.source_type).ok(),
                Some(Role::Entity(place)) => {
                    let text = value::text(value, column.source_type).ok();
                    let text = text.and_then(|text| self.charset.text(text));
                    let text = text.filter(|text| text.len() <= ENTITY_TEXT_BYTES_MAX).map(str::to_owned);
                    if let Some(name) = names.get_mut(place) {
                        *name = text;
                    }
                }
                _ => {}
            }
        }
        if let (Some(id), Some(names)) = (id, names.into_iter().collect()) {
            self.learn_entity(number, id, Ok(names));
        }
        Ok(Inserted::Done)
    }
}

/// Whether the server must be asked for a text of a row, of one of these columns.
fn asks(
    charset: &mut Charset,
    table: &Table,
    tuple: Tuple<'_>,
    of: impl Fn(&relation::SourceColumn) -> bool,
) -> Result<bool, DecodeError> {
    if !charset.is_foreign() {
        return Ok(false);
    }
    let values = tuple.values().zip(&table.columns).filter(|(_, column)| of(column));
    let values = values.map(|(value, column)| Ok((value?, column.source_type)));
    let values: Vec<(Value<'_>, SourceType)> = values.collect::<Result<_, DecodeError>>()?;
    Ok(charset.asks(values.into_iter()))
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

#[cfg(test)]
mod tests;
