//! One row: its values as cells, its entity, or why it can't be archived.

use super::InsertError;
use super::charset::Charset;
use super::entity::{self, EntityCache};
use super::relation::{Role, Shape, SourceColumn, Table, Target};
use super::unfit::Unfit;
use super::value;
use crate::batch::{Batches, Cell, EntityId};
use crate::lsn::Lsn;
use crate::pgoutput::{Tuple, Value, Values};
use crate::tables::{Change, ENTITY_COLUMNS_MAX, Kind};

/// The column that keeps a row out of its table, and why.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rejection<'a> {
    /// The smallest of several is the reason.
    rank: usize,
    pub(super) column: &'a str,
    pub(super) why: Unfit,
}

pub(super) enum Outcome<'a> {
    Pushed,
    Rejected(Rejection<'a>),
    /// The number of the entity table, and the id.
    UnknownEntity(usize, i64),
}

/// What was read of a row, beside its cells.
struct Fields<'a> {
    time: i64,
    names: [&'a [u8]; ENTITY_COLUMNS_MAX],
    id: Option<i64>,
}

/// The values of a row of as many as the table has columns. Left-over bytes show up as one more, failed value, which must be
/// asked for.
#[inline]
pub(super) fn checked<'a>(tuple: Tuple<'a>, table: &Table) -> Result<Values<'a>, InsertError> {
    if usize::from(tuple.column_count()) == table.columns.len() {
        return Ok(tuple.values());
    }
    Err(InsertError::ColumnCount { values: tuple.column_count(), columns: table.columns.len() })
}

/// A row that is to be archived.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) kind: Kind,
    pub(super) table: &'a Table,
    pub(super) charset: &'a Charset,
    /// Of a table that keeps versions.
    pub(super) version: Option<Version<'a>>,
}

/// What a row was before an update.
#[derive(Clone, Copy, Debug)]
pub(super) enum Before<'a> {
    /// Nothing that is needed.
    Nothing,
    /// It may have had another time, and nobody says which.
    Unknown,
    /// This: it has the values that the update has left alone.
    Row(Tuple<'a>),
}

/// A version of a row, as the archive has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Version<'a> {
    pub(super) change: Change,
    pub(super) lsn: Lsn,
    pub(super) sequence: i64,
    pub(super) committed_at: Option<i64>,
    pub(super) before: Before<'a>,
}

/// What the rows that are decoded share.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The data of the row.
    cells: Vec<Cell>,
    /// The names of its columns whose values were not sent, with commas between them.
    unchanged: Vec<u8>,
}

impl<'a> Row<'a> {
    /// Reads every value before anything is appended, so that a rejected row leaves no trace but perhaps an interned text. The
    /// entity is resolved last: a row that is unfit whatever its entity is needs no look-up.
    #[inline]
    pub(super) fn push(
        self,
        tuple: Tuple<'_>,
        scratch: &mut Scratch,
        entities: &mut [EntityCache],
        batches: &mut Batches,
    ) -> Result<Outcome<'a>, InsertError> {
        let fields = match self.read(tuple, scratch, batches)? {
            Ok(fields) => fields,
            Err(rejection) => return Ok(Outcome::Rejected(rejection)),
        };
        let entity = match self.entity(&fields, entities, batches) {
            Ok(Ok(entity)) => entity,
            Ok(Err((number, id))) => return Ok(Outcome::UnknownEntity(number, id)),
            Err(rejection) => return Ok(Outcome::Rejected(rejection)),
        };
        if let Some(version) = self.version {
            scratch.say(self.kind, version, batches);
        }
        batches.push(self.kind, entity, fields.time, &scratch.cells);
        Ok(Outcome::Pushed)
    }

    fn is_delete(self) -> bool {
        self.version.is_some_and(|version| version.change == Change::Delete)
    }

    #[inline]
    fn read<'v>(
        self,
        tuple: Tuple<'v>,
        scratch: &mut Scratch,
        batches: &mut Batches,
    ) -> Result<Result<Fields<'v>, Rejection<'a>>, InsertError>
    where
        'a: 'v,
    {
        scratch.clear(self.kind.data_columns().len());
        let missing = self.table.missing.as_ref();
        let mut rejection = missing.map(|missing| Rejection {
            rank: missing.rank,
            column: missing.column,
            why: Unfit::Missing,
        });
        let mut reject = |rank: usize, column: &'a str, why: Unfit| {
            if rejection.is_none_or(|before| rank < before.rank) {
                rejection = Some(Rejection { rank, column, why });
            }
        };
        if self.version.is_some_and(|version| matches!(version.before, Before::Unknown)) {
            reject(0, self.kind.time_column(), Unfit::NoRowBefore);
        }
        // What identifies a row that is gone is all that the log need have of it.
        let is_delete = self.is_delete();
        let mut fields = Fields { time: 0, names: [&[]; ENTITY_COLUMNS_MAX], id: None };
        let mut values = checked(tuple, self.table)?;
        let mut before = match self.version.map(|version| version.before) {
            Some(Before::Row(row)) => Some(checked(row, self.table)?),
            _ => None,
        };
        for column in &self.table.columns {
            let Some(value) = values.next() else { break };
            let mut value = value?;
            if let Some(before) = before.as_mut().and_then(Iterator::next) {
                let before = before?;
                value = if value == Value::Unchanged { before } else { value };
            }
            let Some(role) = column.role else { continue };
            match role {
                Role::Time => match value::timestamp(value, column.source_type) {
                    Ok(time) => fields.time = time,
                    Err(why) => reject(0, &column.name, why),
                },
                Role::Data(place) => {
                    if let Err(why) = self.data(place, column, value, scratch, batches) {
                        reject(1 + place, &column.name, why);
                    }
                }
                Role::EntityId | Role::Entity(_) if is_delete && value == Value::Null => {}
                Role::EntityId => match value::integer(value, column.source_type) {
                    Ok(id) => fields.id = Some(id),
                    Err(why) => reject(ENTITY_RANK, &column.name, why),
                },
                Role::Entity(place) => {
                    let text = value::text(value, column.source_type);
                    match text.and_then(|text| self.charset.utf8(text).ok_or(Unfit::NotUtf8)) {
                        Ok(name) => {
                            if let Some(place) = fields.names.get_mut(place) {
                                *place = name;
                            }
                        }
                        Err(why) => reject(ENTITY_RANK + place, &column.name, why),
                    }
                }
            }
        }
        match values.next() {
            Some(Err(error)) => Err(error.into()),
            _ => Ok(rejection.map_or(Ok(fields), Err)),
        }
    }

    #[inline]
    fn data(
        self,
        place: usize,
        column: &SourceColumn,
        value: Value<'_>,
        scratch: &mut Scratch,
        batches: &mut Batches,
    ) -> Result<(), Unfit> {
        if self.version.is_some() {
            if column.is_key && value == Value::Null {
                return Err(Unfit::Null);
            }
            // Of a row that is gone, too long a value is as good as none.
            let is_long = self.is_delete() && matches!(value, Value::Long(_));
            if (is_long || value == Value::Unchanged) && !column.is_key {
                scratch.leave_out(&column.name);
                return Ok(());
            }
        }
        let Some(spec) = self.kind.data_columns().get(place) else { return Ok(()) };
        let value = value::cell(value, column.source_type, spec, self.charset, batches)?;
        if let Some(cell) = scratch.cells.get_mut(place) {
            *cell = value;
        }
        Ok(())
    }

    /// The row's entity, or the entity table and the id to look up in it.
    #[inline]
    fn entity(
        self,
        fields: &Fields<'_>,
        entities: &mut [EntityCache],
        batches: &mut Batches,
    ) -> Result<Result<EntityId, (usize, i64)>, Rejection<'a>> {
        let reject = |column, why| Rejection { rank: ENTITY_RANK, column, why };
        let count = self.kind.entity_columns().len();
        if self.is_delete() && fields.id.is_none() && self.table.is_by_id() {
            let none = [&[][..]; ENTITY_COLUMNS_MAX];
            let entity = batches.entity(none.get(..count).unwrap_or(&none));
            return entity.map(Ok).ok_or_else(|| reject(self.id_column(), Unfit::Missing));
        }
        if let Target::Kind(_, Shape::ById(number)) = self.table.target {
            let column = self.id_column();
            let (Some(cache), Some(id)) = (entities.get_mut(number), fields.id) else {
                return Err(reject(column, Unfit::Missing));
            };
            return match cache.get(id, batches) {
                entity::Lookup::Known(entity) => Ok(Ok(entity)),
                entity::Lookup::None => Err(reject(column, Unfit::UnknownEntity)),
                entity::Lookup::Unknown => Ok(Err((number, id))),
            };
        }
        if count == 0 {
            return Ok(Ok(EntityId::NONE));
        }
        let names = fields.names.get(..count).unwrap_or(&fields.names);
        batches.entity(names).map(Ok).ok_or_else(|| reject(self.name_columns(), Unfit::NotUtf8))
    }

    fn id_column(self) -> &'static str {
        self.kind.entity().and_then(|key| key.lookup.as_ref()).map_or("", |lookup| &lookup.id)
    }

    /// The entity's columns as a reason has them, since which of their texts is none is not known.
    #[cold]
    fn name_columns(self) -> &'static str {
        match self.kind.entity_columns() {
            [one] => one,
            columns if columns == ["space", "name", "version"] => "space, name or version",
            _ => "a column of the entity",
        }
    }

    /// Why rows can't be archived that name the entity of this one.
    #[cold]
    pub(super) fn why_unknown(self, tuple: Tuple<'_>, entities: &[EntityCache]) -> String {
        let Target::Kind(_, Shape::ById(number)) = self.table.target else { return String::new() };
        let mut columns = tuple.values().zip(&self.table.columns);
        let id = columns.find(|(_, column)| column.role == Some(Role::EntityId));
        let id = id.and_then(|(value, column)| value::integer(value.ok()?, column.source_type).ok());
        let why = id.and_then(|id| entities.get(number)?.why(id));
        why.map_or_else(|| Unfit::UnknownEntity.to_string(), str::to_owned)
    }
}

impl Scratch {
    /// Nothing yet of a row with so many columns of data.
    #[inline]
    fn clear(&mut self, columns: usize) {
        self.cells.clear();
        self.cells.resize(columns, Cell::Null);
        self.unchanged.clear();
    }

    /// The value of this column was not sent.
    fn leave_out(&mut self, column: &str) {
        if !self.unchanged.is_empty() {
            self.unchanged.push(b',');
        }
        self.unchanged.extend(column.as_bytes());
    }

    /// Puts in what a version says of itself.
    fn say(&mut self, kind: Kind, version: Version<'_>, batches: &mut Batches) {
        let Some([change, lsn, sequence, committed_at, unchanged]) = kind.change_places() else { return };
        let names = (!self.unchanged.is_empty()).then(|| batches.text(&self.unchanged)).flatten();
        for (place, cell) in [
            (change, Cell::from(batches.text(version.change.name().as_bytes()))),
            (lsn, Cell::Long(version.lsn.0.cast_signed())),
            (sequence, Cell::Long(version.sequence)),
            (committed_at, version.committed_at.map_or(Cell::Null, Cell::Long)),
            (unchanged, Cell::from(names)),
        ] {
            if let Some(place) = self.cells.get_mut(place) {
                *place = cell;
            }
        }
    }
}

/// The rank of a reason that is about the entity: behind those of all other columns.
const ENTITY_RANK: usize = usize::MAX / 2;
