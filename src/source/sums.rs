//! Counts and checksums of a partition's rows by hour, computed by the server: those of the rows as the archive has them, so
//! that they can be compared with [`hour_sums`](crate::archive::hour_sums).

use tokio_postgres::Client;

use super::copy::is_text;
use super::{Partition, Source, TimeColumn};
use crate::archive::{HourSums, RowSum};
use crate::decode::ENTITY_TABLE;
use crate::error::{Error, Result};
use crate::postgres::{Encoding, quote_identifier};
use crate::tables::{ColumnSpec, ColumnType, Kind, MICROS_PER_HOUR};

/// What a partition holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct PartitionSums {
    /// Rows that the archive can hold.
    pub(crate) fit: HourSums,
    /// Rows of all hours, whether they fit or not.
    pub(crate) rows: u64,
    /// Hours with rows that do not fit for another reason than their time.
    pub(crate) unfit_hours: Vec<i64>,
    /// Rows without a time that the archive can hold.
    pub(crate) timeless: u64,
}

impl PartitionSums {
    /// Rows that the archive can't hold.
    pub(crate) fn unfit_rows(&self) -> u64 {
        self.rows.saturating_sub(self.fit.values().map(|sum| sum.rows).sum())
    }
}

/// How a column of the archive is computed from one of the table: whether it fits, and its bytes.
struct Expression {
    fits: String,
    bytes: String,
}

impl Source {
    /// Adds up the rows of a partition; with a range, only those whose `created_at` lies in it (microseconds since the epoch).
    ///
    /// # Errors
    ///
    /// The query failed.
    pub(crate) async fn sums(
        &self,
        client: &Client,
        partition: &Partition,
        kind: Kind,
        range: Option<(i64, i64)>,
    ) -> Result<PartitionSums> {
        let failed = || Error::sql(format!("adding up the rows of {}", partition.name));
        let query = self.sums_query(partition, kind, range);
        let mut sums = PartitionSums::default();
        for row in client.query(&query, &[]).await.map_err(failed())? {
            let hour: Option<i64> = row.try_get(0).map_err(failed())?;
            let count = |index: usize| row.try_get::<_, i64>(index).map(i64::cast_unsigned).map_err(failed());
            let (rows, fit) = (count(1)?, count(2)?);
            sums.rows += rows;
            let Some(hour) = hour else {
                sums.timeless += rows;
                continue;
            };
            if fit < rows {
                sums.unfit_hours.push(hour);
            }
            if fit > 0 {
                let text: String = row.try_get(3).map_err(failed())?;
                let sum: i128 =
                    text.parse().map_err(|_| Error::Internal(format!("{text:?} is not a sum")))?;
                // The server adds without bounds, the archive modulo 2^64.
                let sum = u64::try_from(sum.rem_euclid(1 << 64)).unwrap_or_default();
                sums.fit.insert(hour, RowSum { rows: fit, sum });
            }
        }
        Ok(sums)
    }

    fn sums_query(&self, partition: &Partition, kind: Kind, range: Option<(i64, i64)>) -> String {
        let unfit = || Expression { fits: "false".to_owned(), bytes: "''::bytea".to_owned() };
        let expression = |column| self.expression(column).unwrap_or_else(unfit);
        let expressions: Vec<Expression> = kind.columns().iter().map(expression).collect();
        let joined = |part: fn(&Expression) -> &str, separator: &str| {
            expressions.iter().map(part).collect::<Vec<_>>().join(separator)
        };
        let mut fits = joined(|expression| &expression.fits, " and ");
        let mut from = format!(
            "(select * from {} where {} and {}) t",
            partition.from,
            partition.filter,
            range.map_or_else(|| "true".to_owned(), |(start, end)| self.time.within(start, end))
        );
        // Where `entity_id` is no number, no row fits.
        if self.is_by_id() && self.type_of("entity_id").is_some_and(|oid| INTEGERS.contains(&oid)) {
            let (schema, _) = self.name.split_once('.').unwrap_or_default();
            let schema = quote_identifier(schema);
            from.push_str(&format!(" left join {schema}.{ENTITY_TABLE} e on e.id = t.entity_id"));
            fits.push_str(" and e.id is not null");
        }
        // 64 bits of the digest that `archive/files/digest` describes. The condition keeps the casts from what they can't take.
        format!(
            "select hour, count(*), count(digest), sum(digest)::text from (
                 select {} as hour,
                        case when {fits} then ('x' || left(md5({}), 16))::bit(64)::bigint end as digest
                 from {from}) d
             group by 1",
            self.time.units_of("t.created_at", MICROS_PER_HOUR),
            joined(|expression| &expression.bytes, " || "),
        )
    }

    /// Whether the rows name their entity by `entity_id`; by the decoder's rule.
    fn is_by_id(&self) -> bool {
        let has = |name: &str| self.type_of(name).is_some();
        has("entity_id") && !(has("space") && has("name") && has("version"))
    }

    /// Whether there is a row of this table that can be archived: each column is there, and of a type that its archive column
    /// holds.
    pub(crate) fn is_fit(&self, kind: Kind) -> bool {
        kind.columns().iter().all(|column| self.expression(column).is_some())
    }

    /// `None` if no value of the column can be archived.
    fn expression(&self, column: &ColumnSpec) -> Option<Expression> {
        let is_of_entity = ["space", "name", "version"].contains(&column.name);
        // What the decoder reads as text (`text`, `varchar`, `bpchar`, `name`).
        let (table, type_oid) = match self.is_by_id() && is_of_entity {
            true => ("e", self.type_of("entity_id").filter(|oid| INTEGERS.contains(oid)).map(|_| TEXT)),
            false => ("t", self.type_of(column.name)),
        };
        let value = format!("{table}.{}", quote_identifier(column.name));
        let is_there = if column.nullable { "true".to_owned() } else { format!("{value} is not null") };
        let type_oid = type_oid?;
        let or_null = |bytes: String| match column.nullable {
            true => format!("case when {value} is null then int4send(-1) else {bytes} end"),
            false => bytes,
        };
        Some(match (column.column_type, type_oid) {
            (ColumnType::Timestamp, TIMESTAMPTZ | TIMESTAMP) => Expression {
                fits: self.time.is_fit_of(&value),
                bytes: match self.time {
                    TimeColumn::Naive => format!("timestamp_send({value})"),
                    TimeColumn::Zoned | TimeColumn::None => format!("timestamptz_send({value})"),
                },
            },
            (ColumnType::String, oid) if is_text(oid) => {
                // A cast of `bpchar` would take its blanks off.
                let text = match type_oid {
                    BPCHAR => format!("textin(bpcharout({value}))"),
                    _ => format!("{value}::text"),
                };
                let (utf8, fits) = match self.encoding {
                    Encoding::Utf8 => (format!("convert_to({text}, 'UTF8')"), is_there),
                    // Null where it can't be converted, which would be an error otherwise.
                    Encoding::Unknown | Encoding::Other => {
                        let utf8 = format!("highwater.utf8(convert_to({text}, getdatabaseencoding()))");
                        let fits = match column.nullable {
                            true => format!("({value} is null or {utf8} is not null)"),
                            false => format!("{utf8} is not null"),
                        };
                        (utf8, fits)
                    }
                };
                Expression { fits, bytes: or_null(format!("int4send(octet_length({utf8})) || {utf8}")) }
            }
            (ColumnType::Int, oid) if INTEGERS.contains(&oid) => Expression {
                fits: format!("{is_there} and {value} between -2147483648 and 2147483647"),
                bytes: format!("int4send({value}::int4)"),
            },
            (ColumnType::Double, FLOAT4 | FLOAT8) => Expression {
                fits: is_there,
                bytes: or_null(format!("int4send(8) || float8send({value}::float8)")),
            },
            _ => return None,
        })
    }
}

// `pg_type.oid` of the types that the decoder takes.
const TEXT: u32 = 25;
const BPCHAR: u32 = 1042;
const TIMESTAMPTZ: u32 = 1184;
const TIMESTAMP: u32 = 1114;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const INTEGERS: [u32; 3] = [21, 23, 20];
