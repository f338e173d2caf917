//! The tables that come with the program: Scouter's three drift tables, and the quarantine.

use std::sync::LazyLock;

use super::change::{CHANGE, COMMITTED_AT, LSN, SEQUENCE, UNCHANGED};
use super::kind::{ColumnSpec, ColumnType, Compared, Description, EntityKey, EntityTable, Kind};

/// The name of the table that maps `entity_id` to an entity.
pub const ENTITY_TABLE: &str = "drift_entities";

/// The names of the tables that feed [`Kind::drift`], in their order.
pub const DRIFT_TABLES: [&str; 3] = ["custom_drift", "psi_drift", "spc_drift"];

/// Columns that every drift table has for its own bookkeeping.
const BOOKKEEPING_COLUMNS: [&str; 3] = ["id", "updated_at", "archived"];

/// A table of Scouter's that is only appended to, beside its drift tables.
#[derive(Clone, Copy, Debug)]
pub struct ScouterTable {
    /// Its name.
    pub name: &'static str,
    /// Whether its rows name a model, by an `entity_id`.
    pub has_entity: bool,
    /// A column that rows of one entity and time are sorted by.
    pub sort: &'static str,
    /// Days that Scouter itself keeps a row.
    pub retention_days: u32,
}

/// Scouter's append-only tables, by their present names and those of before 2026-04. They change in [`OWN_COLUMNS`] alone.
pub const SCOUTER_TABLES: [ScouterTable; 6] = [
    ScouterTable { name: "agent_eval_task", has_entity: true, sort: "task_id", retention_days: 90 },
    ScouterTable { name: "agent_eval_workflow", has_entity: true, sort: "id", retention_days: 90 },
    ScouterTable { name: "genai_eval_task", has_entity: true, sort: "task_id", retention_days: 90 },
    ScouterTable { name: "genai_eval_workflow", has_entity: true, sort: "id", retention_days: 90 },
    ScouterTable {
        name: "observability_metric",
        has_entity: true,
        sort: "request_count",
        retention_days: 60,
    },
    ScouterTable { name: "trace_baggage", has_entity: false, sort: "key", retention_days: 30 },
];

/// What Scouter writes into rows later, for itself.
pub const OWN_COLUMNS: [&str; 2] = ["updated_at", "archived"];

struct BuiltIn {
    custom: Kind,
    psi: Kind,
    spc: Kind,
    quarantine: Kind,
}

static BUILT_IN: LazyLock<BuiltIn> = LazyLock::new(|| {
    let [custom_drift, psi_drift, spc_drift] = DRIFT_TABLES;
    BuiltIn {
        custom: drift(
            "custom",
            custom_drift,
            vec![
                ColumnSpec::required("metric", ColumnType::String),
                ColumnSpec::nullable("value", ColumnType::Double),
            ],
            &["metric"],
        ),
        psi: drift(
            "psi",
            psi_drift,
            vec![
                ColumnSpec::required("feature", ColumnType::String),
                ColumnSpec::required("bin_id", ColumnType::Int),
                ColumnSpec::required("bin_count", ColumnType::Int),
            ],
            &["feature", "bin_id"],
        ),
        spc: drift(
            "spc",
            spc_drift,
            vec![
                ColumnSpec::nullable("feature", ColumnType::String),
                ColumnSpec::nullable("value", ColumnType::Double),
            ],
            &["feature"],
        ),
        quarantine: Kind::described(Description {
            name: "quarantine".to_owned(),
            source: None,
            entity: None,
            columns: vec![
                ColumnSpec::required("quarantined_at", ColumnType::Timestamp),
                ColumnSpec::required("source_table", ColumnType::String),
                ColumnSpec::required("reason", ColumnType::String),
                ColumnSpec::required("row", ColumnType::String),
                ColumnSpec::required("lsn", ColumnType::String),
            ],
            sort: Vec::new(),
            left_out: Vec::new(),
            row_key: Vec::new(),
        }),
    }
});

/// A drift table: of an entity that is named in the row, or by an id.
fn drift(name: &str, source: &str, data: Vec<ColumnSpec>, sort: &[&str]) -> Kind {
    let entity = EntityKey {
        columns: ["space", "name", "version"].map(str::to_owned).to_vec(),
        lookup: Some(EntityTable {
            id: "entity_id".to_owned(),
            table: ENTITY_TABLE.to_owned(),
            key: "id".to_owned(),
        }),
    };
    let mut columns = vec![ColumnSpec::required("created_at", ColumnType::Timestamp)];
    columns.extend(entity.columns.iter().map(|name| ColumnSpec::required(name, ColumnType::String)));
    columns.extend(data);
    Kind::described(Description {
        name: name.to_owned(),
        source: Some(source.to_owned()),
        entity: Some(entity),
        columns,
        sort: sort.iter().map(|name| (*name).to_owned()).collect(),
        left_out: BOOKKEEPING_COLUMNS.map(str::to_owned).to_vec(),
        row_key: Vec::new(),
    })
}

/// [`CHANGE_COLUMNS`](super::CHANGE_COLUMNS), described. No source has them, so they are not compared.
#[must_use]
pub fn change_columns() -> [ColumnSpec; 5] {
    let not_compared = |column: ColumnSpec| ColumnSpec { compared: Compared::Not, ..column };
    [
        ColumnSpec::required(CHANGE, ColumnType::String),
        ColumnSpec::required(LSN, ColumnType::Long),
        ColumnSpec::required(SEQUENCE, ColumnType::Long),
        ColumnSpec::nullable(COMMITTED_AT, ColumnType::Timestamp),
        ColumnSpec::nullable(UNCHANGED, ColumnType::String),
    ]
    .map(not_compared)
}

impl Kind {
    /// Values of user-defined metrics.
    #[must_use]
    pub fn custom() -> Self {
        BUILT_IN.custom
    }

    /// Counts per bin of a feature, for the population stability index.
    #[must_use]
    pub fn psi() -> Self {
        BUILT_IN.psi
    }

    /// Values of features for statistical process control.
    #[must_use]
    pub fn spc() -> Self {
        BUILT_IN.spc
    }

    /// Rows of the other kinds that their columns can't hold, as text, with the reason.
    #[must_use]
    pub fn quarantine() -> Self {
        BUILT_IN.quarantine
    }

    /// Whether it is [`Kind::quarantine`].
    #[must_use]
    pub fn is_quarantine(self) -> bool {
        // By name, since the order of kinds is asked for while the built-in ones are made.
        self.name() == "quarantine"
    }

    /// The kinds of Scouter's drift tables.
    #[must_use]
    pub fn drift() -> [Self; 3] {
        [Self::custom(), Self::psi(), Self::spc()]
    }

    /// The kinds that come with the program.
    #[must_use]
    pub fn built_in() -> [Self; 4] {
        [Self::custom(), Self::psi(), Self::spc(), Self::quarantine()]
    }

    /// Whether it comes with the program, even if its source has got more columns.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        Self::built_in().iter().any(|kind| kind.name() == self.name())
    }

    /// The kind of a drift table, by [`Kind::name`].
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::drift().into_iter().find(|kind| kind.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::{ENTITY_COLUMNS_MAX, SORT_COLUMNS_MAX};

    #[test]
    fn every_sort_column_is_a_column() {
        for kind in Kind::drift().into_iter().chain([Kind::quarantine()]) {
            assert!(kind.entity_columns().len() <= ENTITY_COLUMNS_MAX);
            assert!(kind.data_sort().len() <= SORT_COLUMNS_MAX);
            for name in kind.sort_columns() {
                assert!(kind.schema().field_with_name(name).is_ok(), "{name} of {}", kind.name());
            }
            let named = kind.entity_columns().iter().zip(kind.columns().iter().skip(1));
            assert!(named.into_iter().all(|(name, column)| *name == column.name));
        }
        assert_eq!(
            Kind::psi().sort_columns(),
            ["space", "name", "version", "created_at", "feature", "bin_id"]
        );
        assert_eq!(Kind::quarantine().sort_columns(), ["quarantined_at"]);
    }

    #[test]
    fn equal_descriptions_are_one_kind_and_the_quarantine_comes_first() {
        let again = |name: &str| {
            Kind::described(Description {
                name: name.to_owned(),
                source: Some("log.events".to_owned()),
                entity: None,
                columns: vec![ColumnSpec::required("at", ColumnType::Timestamp)],
                sort: Vec::new(),
                left_out: Vec::new(),
                row_key: Vec::new(),
            })
        };
        assert_eq!(again("events"), again("events"));
        assert_ne!(again("events"), again("others"));
        assert_eq!(again("events").source_table("scouter").as_deref(), Some("log.events"));
        assert_eq!(Kind::psi().source_table("scouter").as_deref(), Some("scouter.psi_drift"));
        let mut kinds = vec![Kind::spc(), again("a"), Kind::quarantine(), Kind::custom()];
        kinds.sort_unstable();
        assert_eq!(kinds, [Kind::quarantine(), again("a"), Kind::custom(), Kind::spc()]);
    }
}
