use std::collections::HashMap;

use super::source_type::SourceType;
use crate::pgoutput::Relation;
use crate::tables::Kind;

/// What a column of a source table is to the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    CreatedAt,
    Space,
    Name,
    Version,
    /// `entity_id` of a drift table, `id` of the entity table.
    EntityId,
    /// `metric` or `feature`.
    Series,
    Value,
    BinId,
    BinCount,
}

/// How many roles there are.
pub(super) const ROLE_COUNT: usize = 9;

/// A source table, as the stream describes it.
#[derive(Debug)]
pub(super) struct Table {
    /// The name with its schema.
    pub(super) name: String,
    pub(super) target: Target,
    pub(super) columns: Vec<SourceColumn>,
}

/// Where a table's rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Rows of a kind; whether they name their entity by `entity_id`.
    Drift(Kind, Shape),
    /// The entity table: rows teach the entity cache.
    Entities,
    /// Not ours.
    Nothing,
}

/// How a drift table names the entity of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// By `space`, `name` and `version`.
    Named,
    /// By `entity_id`, a key of `drift_entities`.
    ById,
}

#[derive(Debug)]
pub(super) struct SourceColumn {
    pub(super) name: String,
    pub(super) role: Option<Role>,
    pub(super) source_type: SourceType,
}

/// The name of the table that maps `entity_id` to an entity.
pub const ENTITY_TABLE: &str = "drift_entities";

/// Columns that every drift table has for its own bookkeeping; not archived, and not worth a notice.
const BOOKKEEPING_COLUMNS: [&str; 3] = ["id", "updated_at", "archived"];

/// Whether a column of a drift table has a part in its archived rows.
pub(super) fn is_archived(column: &str) -> bool {
    let mut archived = Kind::DRIFT.iter().flat_map(|kind| kind.columns());
    column == "entity_id" || archived.any(|archived| archived.name == column)
}

/// Something about a table that its operator should know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A column has no place in the archive.
    #[error("column {column:?} of {table} is not archived: the archive has no such column")]
    ColumnNotArchived {
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

impl Table {
    pub(super) fn new(schema: &str, relation: &Relation<'_>, types: &HashMap<u32, SourceType>) -> Self {
        let has = |name: &str| relation.columns.iter().any(|column| column.name == name.as_bytes());
        let namespace = String::from_utf8_lossy(relation.namespace);
        let name = String::from_utf8_lossy(relation.name);
        let target = match Kind::of_source_table(&name) {
            _ if namespace != schema => Target::Nothing,
            Some(kind) => Target::Drift(kind, shape(has)),
            None if name == ENTITY_TABLE => Target::Entities,
            None => Target::Nothing,
        };
        let columns = relation.columns.iter().map(|column| {
            let name = String::from_utf8_lossy(column.name).into_owned();
            let source_type = SourceType::of(column.type_oid);
            SourceColumn {
                role: role(target, &name),
                name,
                source_type: types.get(&column.type_oid).copied().unwrap_or(source_type),
            }
        });
        Self { name: format!("{namespace}.{name}"), target, columns: columns.collect() }
    }

    /// Whether it is a drift table with a column whose binary form nobody can read.
    pub(super) fn has_unreadable(&self) -> bool {
        let is_unreadable = |column: &SourceColumn| matches!(column.source_type, SourceType::Other(_));
        matches!(self.target, Target::Drift(..)) && self.columns.iter().any(is_unreadable)
    }

    /// Takes the table for a drift table of that kind and name, whatever it is called.
    pub(super) fn adopt(&mut self, kind: Kind, name: &str) {
        let has = |name: &str| self.columns.iter().any(|column| column.name == name);
        self.target = Target::Drift(kind, shape(has));
        name.clone_into(&mut self.name);
        for column in &mut self.columns {
            column.role = role(self.target, &column.name);
        }
    }

    pub(super) fn notices(&self) -> Vec<Notice> {
        // The stream also describes each partition beside its root, so an unknown table is no surprise yet.
        let Target::Drift(kind, shape) = self.target else { return Vec::new() };
        let extra = self
            .columns
            .iter()
            .filter(|column| column.role.is_none() && !BOOKKEEPING_COLUMNS.contains(&column.name.as_str()));
        let extra = extra.map(|column| Notice::ColumnNotArchived {
            table: self.name.clone(),
            column: column.name.clone(),
        });
        let needed = kind
            .columns()
            .iter()
            .map(|column| column.name)
            .filter(|name| shape == Shape::Named || !["space", "name", "version"].contains(name));
        let missing = needed.filter(|name| !self.columns.iter().any(|column| column.name == *name));
        let missing =
            missing.map(|name| Notice::ColumnMissing { table: self.name.clone(), column: name.to_owned() });
        extra.chain(missing).collect()
    }
}

/// By the columns alone, so that a table may change from one shape to the other.
fn shape(has: impl Fn(&str) -> bool) -> Shape {
    let named = has("space") && has("name") && has("version");
    if !named && has("entity_id") { Shape::ById } else { Shape::Named }
}

fn role(target: Target, column: &str) -> Option<Role> {
    match (target, column) {
        (Target::Entities, "id") => Some(Role::EntityId),
        (Target::Entities | Target::Drift(_, Shape::Named), "space") => Some(Role::Space),
        (Target::Entities | Target::Drift(_, Shape::Named), "name") => Some(Role::Name),
        (Target::Entities | Target::Drift(_, Shape::Named), "version") => Some(Role::Version),
        (Target::Drift(_, Shape::ById), "entity_id") => Some(Role::EntityId),
        (Target::Drift(..), "created_at") => Some(Role::CreatedAt),
        (Target::Drift(kind, _), name) if kind.series_column() == Some(name) => Some(Role::Series),
        (Target::Drift(Kind::Custom | Kind::Spc, _), "value") => Some(Role::Value),
        (Target::Drift(Kind::Psi, _), "bin_id") => Some(Role::BinId),
        (Target::Drift(Kind::Psi, _), "bin_count") => Some(Role::BinCount),
        _ => None,
    }
}
