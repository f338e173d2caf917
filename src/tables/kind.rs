use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

/// A kind of record, which is also a table of the archive. Usable as an array index with
/// [`Kind::index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Values of user-defined metrics.
    Custom,
    /// Counts per bin of a feature, for the population stability index.
    Psi,
    /// Values of features for statistical process control.
    Spc,
    /// Rows of the other kinds that their columns can't hold, as text, with the reason.
    Quarantine,
}

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
}

/// One column of an archived table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnSpec {
    /// The column's name, in the source table and in the archive.
    pub name: &'static str,
    /// The column's type.
    pub column_type: ColumnType,
    /// Whether the archive holds nulls in it; where it doesn't, a null sends the row to quarantine.
    pub nullable: bool,
}

/// The most columns that a kind has.
pub const RECORD_COLUMNS_MAX: usize = 7;

const fn column(name: &'static str, column_type: ColumnType) -> ColumnSpec {
    ColumnSpec { name, column_type, nullable: false }
}

const fn nullable(name: &'static str, column_type: ColumnType) -> ColumnSpec {
    ColumnSpec { name, column_type, nullable: true }
}

const CREATED_AT: ColumnSpec = column("created_at", ColumnType::Timestamp);
const SPACE: ColumnSpec = column("space", ColumnType::String);
const NAME: ColumnSpec = column("name", ColumnType::String);
const VERSION: ColumnSpec = column("version", ColumnType::String);

impl Kind {
    /// The kinds that have a drift table in the source database.
    pub const DRIFT: [Self; 3] = [Self::Custom, Self::Psi, Self::Spc];

    /// Every table of the archive.
    pub const ALL: [Self; 4] = [Self::Custom, Self::Psi, Self::Spc, Self::Quarantine];

    /// The kind of a drift table, by [`Kind::name`].
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::DRIFT.into_iter().find(|kind| kind.name() == name)
    }

    /// Position in [`Kind::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Name of the kind, and of its folder under the storage URI.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Custom => "custom",
            Self::Psi => "psi",
            Self::Spc => "spc",
            Self::Quarantine => "quarantine",
        }
    }

    /// Name of the drift table (without its schema) that feeds this kind; none feeds the quarantine
    /// alone.
    #[must_use]
    pub const fn source_table(self) -> Option<&'static str> {
        match self {
            Self::Custom => Some("custom_drift"),
            Self::Psi => Some("psi_drift"),
            Self::Spc => Some("spc_drift"),
            Self::Quarantine => None,
        }
    }

    /// The kind that a drift table (without its schema) feeds.
    #[must_use]
    pub fn of_source_table(table: &str) -> Option<Self> {
        Self::DRIFT.into_iter().find(|kind| kind.source_table() == Some(table))
    }

    /// The archive's columns, in file order.
    #[must_use]
    pub const fn columns(self) -> &'static [ColumnSpec] {
        match self {
            Self::Custom => {
                const {
                    &[
                        CREATED_AT,
                        SPACE,
                        NAME,
                        VERSION,
                        column("metric", ColumnType::String),
                        nullable("value", ColumnType::Double),
                    ]
                }
            }
            Self::Psi => {
                const {
                    &[
                        CREATED_AT,
                        SPACE,
                        NAME,
                        VERSION,
                        column("feature", ColumnType::String),
                        column("bin_id", ColumnType::Int),
                        column("bin_count", ColumnType::Int),
                    ]
                }
            }
            Self::Spc => {
                const {
                    &[
                        CREATED_AT,
                        SPACE,
                        NAME,
                        VERSION,
                        nullable("feature", ColumnType::String),
                        nullable("value", ColumnType::Double),
                    ]
                }
            }
            Self::Quarantine => {
                const {
                    &[
                        column("quarantined_at", ColumnType::Timestamp),
                        column("source_table", ColumnType::String),
                        column("reason", ColumnType::String),
                        column("row", ColumnType::String),
                        column("lsn", ColumnType::String),
                    ]
                }
            }
        }
    }

    /// The column that tells the series of one entity apart: `metric` or `feature`.
    #[must_use]
    pub const fn series_column(self) -> Option<&'static str> {
        match self {
            Self::Custom => Some("metric"),
            Self::Psi | Self::Spc => Some("feature"),
            Self::Quarantine => None,
        }
    }

    /// The columns that a file is sorted by, most significant first. The quarantine keeps the order
    /// of arrival.
    #[must_use]
    pub const fn sort_columns(self) -> &'static [&'static str] {
        match self {
            Self::Custom => &["space", "name", "version", "created_at", "metric"],
            Self::Psi => &["space", "name", "version", "created_at", "feature", "bin_id"],
            Self::Spc => &["space", "name", "version", "created_at", "feature"],
            Self::Quarantine => &["quarantined_at"],
        }
    }

    /// The Arrow schema of the archived table.
    #[must_use]
    pub fn schema(self) -> SchemaRef {
        static SCHEMAS: LazyLock<[SchemaRef; 4]> = LazyLock::new(|| Kind::ALL.map(build_schema));
        let [custom, psi, spc, quarantine] = &*SCHEMAS;
        Arc::clone(match self {
            Self::Custom => custom,
            Self::Psi => psi,
            Self::Spc => spc,
            Self::Quarantine => quarantine,
        })
    }
}

fn build_schema(kind: Kind) -> SchemaRef {
    let field = |spec: &ColumnSpec| {
        let data_type = match spec.column_type {
            ColumnType::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            ColumnType::String => DataType::Utf8,
            ColumnType::Double => DataType::Float64,
            ColumnType::Int => DataType::Int32,
        };
        Field::new(spec.name, data_type, spec.nullable)
    };
    Arc::new(Schema::new(kind.columns().iter().map(field).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sort_column_is_a_column() {
        for kind in Kind::ALL {
            assert!(kind.columns().len() <= RECORD_COLUMNS_MAX);
            for name in kind.sort_columns() {
                assert!(kind.schema().field_with_name(name).is_ok(), "{name} of {}", kind.name());
            }
        }
    }

    #[test]
    fn index_is_the_position_in_all() {
        for (position, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind.index(), position);
        }
    }
}
