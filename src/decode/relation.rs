use std::collections::HashMap;

use super::source_type::SourceType;
use crate::pgoutput::Relation;
use crate::tables::{ColumnSpec, EntityKey, Kind};

/// What a column of a source table is to the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The time of the row.
    Time,
    /// The entity's column of that number.
    Entity(usize),
    /// The entity's id; in an entity table the key.
    EntityId,
    /// The data column of that number.
    Data(usize),
}

/// A source table, as the stream describes it.
#[derive(Debug)]
pub(super) struct Table {
    /// The name with its schema.
    pub(super) name: String,
    pub(super) target: Target,
    pub(super) columns: Vec<SourceColumn>,
    /// The first column of the archive that the table lacks.
    pub(super) missing: Option<Missing>,
}

/// A column of the archive that a source table lacks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing {
    pub(super) rank: usize,
    pub(super) column: &'static str,
}

/// Where a table's rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Rows of a kind.
    Kind(Kind, Shape),
    /// An entity table, by its number: rows teach the entity cache.
    Entities(usize),
    /// Not ours.
    Nothing,
}

/// How a table names the entity of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// By the entity's own columns; or rows belong to none.
    Named,
    /// By an id, which the entity table of that number knows.
    ById(usize),
}

#[derive(Debug)]
pub(super) struct SourceColumn {
    pub(super) name: String,
    pub(super) role: Option<Role>,
    /// Whether it tells rows apart that have versions.
    pub(super) is_key: bool,
    pub(super) source_type: SourceType,
    type_oid: u32,
    modifier: i32,
}

/// A column that a source table has got, and its archive has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewColumn {
    /// The archive's table.
    pub kind: Kind,
    /// The column.
    pub name: String,
    /// Its type (`pg_type.oid`).
    pub type_oid: u32,
    /// The type's modifier, or -1.
    pub modifier: i32,
}

/// Something about a table that its operator should know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A column can't have a place in the archive.
    #[error(
        "column {column:?} of {table} is not archived: no column of an archive has such a name (no space or one of ,;{{}}()=`. in it, \
         and it differs from others not in case alone); rename it, or exclude it in [[table]]"
    )]
    ColumnNotArchived {
        /// The table with its schema.
        table: String,
        /// The column.
        column: String,
    },
    /// A column that the archive has is gone.
    #[error("{table} has no column {column:?} any more: its rows have nulls in it from now on")]
    ColumnGone {
        /// The table with its schema.
        table: String,
        /// The column.
        column: String,
    },
    /// A column that the archive needs is not there, so that every row goes to quarantine.
    #[error("{table} has no column {column:?}: its rows go to quarantine")]
    ColumnMissing {
        /// The table with its schema.
        table: String,
        /// The column.
        column: String,
    },
}

/// What a decoder knows of the tables that it decodes.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) schema: String,
    pub(super) kinds: Vec<Kind>,
    /// How rows name entities by an id; each entity table once.
    pub(super) keys: Vec<&'static EntityKey>,
}

impl Known {
    pub(super) fn new(schema: String, kinds: &[Kind]) -> Self {
        let mut keys: Vec<&'static EntityKey> = Vec::new();
        for key in kinds.iter().filter_map(|kind| kind.entity()).filter(|key| key.lookup.is_some()) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        Self { schema, kinds: kinds.to_vec(), keys }
    }

    /// By the columns alone, so that a table may change from one shape to the other.
    fn target(&self, kind: Kind, has: impl Fn(&str) -> bool) -> Target {
        let named = kind.entity_columns().iter().all(|column| has(column));
        let key = kind.entity().filter(|key| key.lookup.as_ref().is_some_and(|lookup| has(&lookup.id)));
        let key = key.and_then(|key| self.keys.iter().position(|known| *known == key));
        Target::Kind(kind, key.filter(|_| !named).map_or(Shape::Named, Shape::ById))
    }

    fn role(&self, target: Target, column: &str) -> Option<Role> {
        let entity = |columns: &[String]| columns.iter().position(|name| name == column).map(Role::Entity);
        match target {
            Target::Nothing => None,
            Target::Entities(number) => {
                let key = self.keys.get(number)?;
                let is_key = key.lookup.as_ref().is_some_and(|lookup| lookup.key == column);
                if is_key { Some(Role::EntityId) } else { entity(&key.columns) }
            }
            Target::Kind(kind, shape) => {
                if kind.time_column() == column {
                    return Some(Role::Time);
                }
                let is_id = |key: &EntityKey| key.lookup.as_ref().is_some_and(|lookup| lookup.id == column);
                match shape {
                    Shape::ById(_) if kind.entity().is_some_and(is_id) => return Some(Role::EntityId),
                    Shape::ById(_) if entity(kind.entity_columns()).is_some() => return None,
                    Shape::Named => {
                        if let Some(role) = entity(kind.entity_columns()) {
                            return Some(role);
                        }
                    }
                    Shape::ById(_) => {}
                }
                let is_it = |data: &ColumnSpec| data.name == column && !kind.is_change_column(column);
                kind.data_columns().iter().position(is_it).map(Role::Data)
            }
        }
    }
}

fn is_key(target: Target, column: &str) -> bool {
    matches!(target, Target::Kind(kind, _) if kind.row_key().iter().any(|key| key == column))
}

impl Table {
    pub(super) fn new(known: &Known, relation: &Relation<'_>, types: &HashMap<u32, SourceType>) -> Self {
        let has = |name: &str| relation.columns.iter().any(|column| column.name == name.as_bytes());
        let namespace = String::from_utf8_lossy(relation.namespace);
        let name = format!("{namespace}.{}", String::from_utf8_lossy(relation.name));
        let is_source = |kind: &&Kind| kind.source_table(&known.schema).as_ref() == Some(&name);
        let is_entities = |key: &&EntityKey| {
            key.lookup.as_ref().is_some_and(|lookup| lookup.qualified(&known.schema) == name)
        };
        let target = match known.kinds.iter().find(is_source) {
            Some(kind) => known.target(*kind, has),
            None => known.keys.iter().position(is_entities).map_or(Target::Nothing, Target::Entities),
        };
        let columns = relation.columns.iter().map(|column| {
            let name = String::from_utf8_lossy(column.name).into_owned();
            let source_type = SourceType::of(column.type_oid);
            SourceColumn {
                role: known.role(target, &name),
                is_key: is_key(target, &name),
                name,
                source_type: types.get(&column.type_oid).copied().unwrap_or(source_type),
                type_oid: column.type_oid,
                modifier: column.modifier,
            }
        });
        let mut table = Self { name, target, columns: columns.collect(), missing: None };
        table.missing = table.first_missing();
        table
    }

    /// Whether its rows are archived, and it has a column whose binary form nobody can read.
    pub(super) fn has_unreadable(&self) -> bool {
        let is_unreadable = |column: &SourceColumn| matches!(column.source_type, SourceType::Other(_));
        matches!(self.target, Target::Kind(..)) && self.columns.iter().any(is_unreadable)
    }

    /// Whether its rows name their entities by an id.
    pub(super) const fn is_by_id(&self) -> bool {
        matches!(self.target, Target::Kind(_, Shape::ById(_)))
    }

    /// The kind of its rows, if these are archived.
    pub(super) const fn kind(&self) -> Option<Kind> {
        match self.target {
            Target::Kind(kind, _) => Some(kind),
            Target::Entities(_) | Target::Nothing => None,
        }
    }

    /// Takes the table for that of a kind, of that name, whatever it is called.
    pub(super) fn adopt(&mut self, known: &Known, kind: Kind, name: &str) {
        let has = |name: &str| self.columns.iter().any(|column| column.name == name);
        self.target = known.target(kind, has);
        name.clone_into(&mut self.name);
        for column in &mut self.columns {
            column.role = known.role(self.target, &column.name);
            column.is_key = is_key(self.target, &column.name);
        }
        self.missing = self.first_missing();
    }

    /// The columns that the archive lacks, and could have.
    pub(super) fn new_columns(&self) -> impl Iterator<Item = NewColumn> {
        let kind = self.kind();
        let columns = self.columns.iter().filter(|column| column.role.is_none());
        let columns =
            kind.into_iter().flat_map(move |kind| columns.clone().map(move |column| (kind, column)));
        columns.filter(|(kind, column)| kind.lacks(&column.name)).map(|(kind, column)| NewColumn {
            kind,
            name: column.name.clone(),
            type_oid: column.type_oid,
            modifier: column.modifier,
        })
    }

    /// The columns of the archive that must be in the table, with their ranks: where several are unfit, the first is the reason.
    fn needed(&self) -> impl Iterator<Item = (usize, &'static ColumnSpec)> {
        let (kind, by_id) = (self.kind(), self.is_by_id());
        let columns = kind.map_or(&[][..], Kind::columns).iter().enumerate();
        let is_ours = move |name: &str| kind.is_some_and(|kind| kind.is_change_column(name));
        let is_key = move |name: &String| kind.is_some_and(|kind| kind.row_key().contains(name));
        let count = kind.map_or(0, |kind| kind.entity_columns().len());
        let entity = 1..=count;
        columns.filter_map(move |(place, column)| match entity.contains(&place) {
            true if by_id => None,
            // The entity is read last: a row that is unfit whatever its entity is needs no look-up.
            true => Some((usize::MAX, column)),
            false if is_ours(&column.name) => None,
            // It may go: rows have nulls then.
            false if column.source_type.is_some() && !is_key(&column.name) => None,
            false => Some((place.saturating_sub(count), column)),
        })
    }

    fn first_missing(&self) -> Option<Missing> {
        let has = |name: &str| self.columns.iter().any(|column| column.name == name);
        let missing = self.needed().filter(|(_, column)| !has(&column.name));
        missing
            .map(|(rank, column)| Missing { rank, column: &column.name })
            .min_by_key(|missing| missing.rank)
    }

    /// The archive's columns that the table had when it was described before, and has no more.
    pub(super) fn gone_since(&self, before: &Self) -> impl Iterator<Item = Notice> {
        let has = |table: &Self, name: &str| table.columns.iter().any(|column| column.name == name);
        let kind = self.kind();
        let is_key = move |name: &String| kind.is_some_and(|kind| kind.row_key().contains(name));
        let archived = kind.map_or(&[][..], Kind::data_columns).iter();
        // Of a column that must be there another notice tells.
        let archived = archived.filter(move |data| data.source_type.is_some() && !is_key(&data.name));
        let gone = archived.filter(move |data| has(before, &data.name) && !has(self, &data.name));
        gone.map(|data| Notice::ColumnGone { table: self.name.clone(), column: data.name.clone() })
    }

    pub(super) fn notices(&self) -> Vec<Notice> {
        // The stream also describes each partition beside its root, so an unknown table is no surprise yet.
        let Target::Kind(kind, _) = self.target else { return Vec::new() };
        let extra = self.columns.iter().filter(|column| kind.has_no_place_for(&column.name));
        let extra = extra.map(|column| Notice::ColumnNotArchived {
            table: self.name.clone(),
            column: column.name.clone(),
        });
        let missing =
            self.needed().filter(|(_, needed)| !self.columns.iter().any(|column| column.name == needed.name));
        let missing = missing.map(|(_, column)| Notice::ColumnMissing {
            table: self.name.clone(),
            column: column.name.clone(),
        });
        extra.chain(missing).collect()
    }
}
