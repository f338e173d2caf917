//! Counts and checksums of a partition's rows by hour, computed by the server: those of the rows as the archive has them, so
//! that they can be compared with [`hour_sums`](crate::archive::hour_sums).

use tokio_postgres::Client;

use super::copy::is_text;
use super::time::TimeType;
use super::unarchived::UnfitColumn;
use super::{Partition, Source};
use crate::archive::{HourSums, RowSum};
use crate::error::{Error, Result};
use crate::postgres::{Encoding, quote_identifier};
use crate::tables::{ColumnSpec, ColumnType, Compared, EntityTable, Kind, MICROS_PER_HOUR};

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
        let expression = |column| self.expression(kind, column).unwrap_or_else(unfit);
        let columns = kind.columns().iter().filter(|column| column.compared != Compared::Not);
        let expressions: Vec<Expression> = columns.map(expression).collect();
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
        // Where the id is no number, no row fits.
        if let Some(lookup) = self.lookup(kind).filter(|lookup| self.is_integer(&lookup.id)) {
            let (schema, _) = self.name.split_once('.').unwrap_or_default();
            let table = lookup.qualified(schema);
            let (schema, table) = table.split_once('.').unwrap_or_default();
            from.push_str(&format!(
                " left join {}.{} e on e.{} = t.{}",
                quote_identifier(schema),
                quote_identifier(table),
                quote_identifier(&lookup.key),
                quote_identifier(&lookup.id)
            ));
            fits.push_str(&format!(" and e.{} is not null", quote_identifier(&lookup.key)));
        }
        // 64 bits of the digest that `archive/files/digest` describes. The condition keeps the casts from what they can't take.
        format!(
            "select hour, count(*), count(digest), sum(digest)::text from (
                 select {} as hour,
                        case when {fits} then ('x' || left(md5({}), 16))::bit(64)::bigint end as digest
                 from {from}) d
             group by 1",
            self.time.time_type.units(&format!("t.{}", self.time.name), MICROS_PER_HOUR),
            joined(|expression| &expression.bytes, " || "),
        )
    }

    /// The table that knows the entities of the rows, if these name them by an id.
    fn lookup(&self, kind: Kind) -> Option<&'static EntityTable> {
        let lookup = kind.entity()?.lookup.as_ref()?;
        let is_named = kind.entity_columns().iter().all(|column| self.has_column(column));
        (!is_named && self.has_column(&lookup.id)).then_some(lookup)
    }

    fn is_integer(&self, column: &str) -> bool {
        self.type_of(column).is_some_and(|oid| INTEGERS.contains(&oid))
    }

    /// Whether no row is kept out of the archive by what its columns are.
    pub(crate) fn is_fit(&self, kind: Kind) -> bool {
        let mut columns = kind.columns().iter().filter(|column| column.compared != Compared::Not);
        columns.all(|column| self.expression(kind, column).is_some())
    }

    /// The kind as its rows are compared with those of this table: what the table has no more is left out, and what was renamed is
    /// one column.
    pub(crate) fn compared(&self, kind: Kind) -> Kind {
        let is_gone = |column: &&ColumnSpec| column.source_type.is_some() && !self.still_has(column);
        let gone: Vec<&ColumnSpec> = kind.columns().iter().filter(is_gone).collect();
        let compared = |column: &ColumnSpec| {
            if gone.contains(&column) || kind.is_change_column(&column.name) {
                return Compared::Not;
            }
            let own = column.source_type.as_ref().and_then(|_| self.attribute_of(&column.name));
            let is_former = |other: &&&ColumnSpec| {
                own.is_some() && other.attribute.as_deref() == own && other.column_type == column.column_type
            };
            let formers: Vec<String> =
                gone.iter().filter(is_former).map(|other| other.name.clone()).collect();
            if formers.is_empty() { Compared::Plainly } else { Compared::Or(formers) }
        };
        let columns = kind.columns().iter();
        let columns = columns.map(|column| ColumnSpec { compared: compared(column), ..column.clone() });
        kind.with(columns.collect(), kind.description().left_out.clone())
    }

    /// Whether a column of the archive is the table's of that name, and its values are what they were.
    fn still_has(&self, column: &ColumnSpec) -> bool {
        let now = self.column_types().find(|(name, _)| *name == column.name);
        let (Some((_, now)), Some(before)) = (now, &column.source_type) else { return false };
        let is_other =
            column.attribute.as_deref().zip(self.attribute_of(&column.name)).is_some_and(|(was, is)| {
                let (table, number) = (was.split_once('.'), is.split_once('.'));
                table.zip(number).is_some_and(|(was, is)| was.0 == is.0 && was.1 != is.1)
            });
        !is_other && prints_alike(before, now)
    }

    /// The columns of which a value may not fit in the archive, because they are no longer of the type that it was made for.
    pub(crate) fn unfit_columns(&self, kind: Kind) -> Vec<UnfitColumn> {
        let table = &self.name;
        let unfit = |(name, own): (&str, &str)| {
            let column = kind.columns().iter().find(|column| column.name == name)?;
            let before = column.source_type.as_ref().filter(|_| self.expression(kind, column).is_none())?;
            let column = quote_identifier(name);
            Some(UnfitColumn {
                column: name.to_owned(),
                problem: format!("is of type {own}, and its archive was made for {before}"),
                remedy: format!("alter table {table} alter column {column} type {before}"),
            })
        };
        // What can't have a place in the archive would be gone with its partition.
        let homeless =
            self.column_types().filter(|(name, _)| kind.has_no_place_for(name)).map(|(name, _)| {
                UnfitColumn {
                    column: name.to_owned(),
                    problem: "has a name that no column of the archive can have".to_owned(),
                    remedy: format!("rename it, or exclude it in [[table]] of {table}"),
                }
            });
        self.column_types().filter_map(unfit).chain(homeless).collect()
    }

    /// The columns that the archive lacks, and is to get with the next row or checkpoint.
    pub(crate) fn columns_to_come(&self, kind: Kind) -> Vec<UnfitColumn> {
        let new = self.column_types().map(|(name, _)| name).filter(|name| kind.lacks(name));
        let new = new.map(|name| UnfitColumn {
            column: name.to_owned(),
            problem: "is not in the archive yet".to_owned(),
            remedy: "let `highwater run` add it, and verify again".to_owned(),
        });
        new.collect()
    }

    fn expression(&self, kind: Kind, column: &ColumnSpec) -> Option<Expression> {
        let lookup = self.lookup(kind).filter(|_| kind.entity_columns().contains(&column.name));
        // What the decoder reads as text (`text`, `varchar`, `bpchar`, `name`).
        let (table, type_oid) = match lookup {
            Some(lookup) => ("e", self.is_integer(&lookup.id).then_some(TEXT)),
            None => ("t", self.type_of(&column.name)),
        };
        let type_oid = type_oid?;
        let value = format!("{table}.{}", quote_identifier(&column.name));
        let value = value.as_str();
        if column.name == kind.time_column() {
            let send = match TimeType::of(Some(type_oid)) {
                TimeType::Naive => "timestamp_send",
                TimeType::Zoned => "timestamptz_send",
                TimeType::None => return None,
            };
            let bytes = format!("{send}({value})");
            return Some(Expression { fits: self.time.time_type.is_fit(value), bytes });
        }
        let (is_fit, bytes) = compared_value(column, type_oid, value, self.encoding)?;
        if column.nullable {
            // What rows from before the column have is null in the archive.
            let filled = column.filled.as_ref().map(|filled| {
                let hex: String = filled.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("when {bytes} = decode('{hex}', 'hex') then int4send(-1) ")
            });
            return Some(Expression {
                fits: format!("({value} is null or {is_fit})"),
                bytes: format!(
                    "case when {value} is null then int4send(-1) {}else {bytes} end",
                    filled.unwrap_or_default()
                ),
            });
        }
        Some(Expression { fits: format!("({value} is not null and {is_fit})"), bytes })
    }
}

/// Whether the archive has the same for a value of both types, as SQL writes them, after one was made the other.
fn prints_alike(before: &str, now: &str) -> bool {
    const FAMILIES: [&[&str]; 4] = [
        &["smallint", "integer", "bigint"],
        &["real", "double precision"],
        &["text", "character varying", "citext", "name"],
        &["timestamp without time zone", "timestamp with time zone"],
    ];
    // Without its modifier, which may be in the middle: `timestamp(3) with time zone`.
    let plain = |text: &str| match text
        .split_once('(')
        .and_then(|(head, rest)| Some((head, rest.split_once(')')?.1)))
    {
        Some((head, tail)) => format!("{head}{tail}"),
        None => text.to_owned(),
    };
    let (before, now) = (plain(before), plain(now));
    let has_both = |family: &&[&str]| family.contains(&before.as_str()) && family.contains(&now.as_str());
    before == now || FAMILIES.iter().any(has_both)
}

/// Whether a value that is there fits its column, and its bytes in digests of rows: two expressions in SQL. `None` if no value of the
/// type fits.
pub(super) fn compared_value(
    column: &ColumnSpec,
    type_oid: u32,
    value: &str,
    encoding: Encoding,
) -> Option<(String, String)> {
    let always = || "true".to_owned();
    let sent = |length: u32, bytes: String| format!("int4send({length}) || {bytes}");
    Some(match (column.column_type, type_oid) {
        (ColumnType::Timestamp, TIMESTAMPTZ | TIMESTAMP) => {
            let time = TimeType::of(Some(type_oid));
            let send = if type_oid == TIMESTAMP { "timestamp_send" } else { "timestamptz_send" };
            (time.is_fit(value), sent(8, format!("{send}({value})")))
        }
        (ColumnType::String, oid) if is_text(oid) || column.source_type.is_some() => {
            text_value(column, oid, value, encoding)?
        }
        (ColumnType::Int, oid) if INTEGERS.contains(&oid) => {
            let bytes = format!("int4send({value}::int4)");
            let bytes = if column.nullable { sent(4, bytes) } else { bytes };
            (format!("{value} between -2147483648 and 2147483647"), bytes)
        }
        (ColumnType::Long, oid) if INTEGERS.contains(&oid) => {
            (always(), sent(8, format!("int8send({value}::int8)")))
        }
        (ColumnType::Double, FLOAT4 | FLOAT8) => (always(), sent(8, format!("float8send({value}::float8)"))),
        (ColumnType::Boolean, BOOL) => (always(), sent(1, format!("boolsend({value})"))),
        (ColumnType::Date, DATE) => {
            let fits =
                format!("isfinite({value}) and {value} between date '0001-01-01' and date '9999-12-31'");
            (format!("({fits})"), sent(4, format!("date_send({value})")))
        }
        (ColumnType::Binary, BYTEA) => (always(), format!("int4send(octet_length({value})) || {value}")),
        (ColumnType::Decimal { precision, scale }, NUMERIC) => {
            let digits = u32::from(precision).saturating_sub(scale.unsigned_abs().into());
            let fits = format!(
                "({value} <> 'NaN' and abs({value}) < power(10::numeric, {digits}) and {value} = round({value}, {scale}))"
            );
            let text = format!("convert_to(round({value}, {scale})::text, 'UTF8')");
            (fits, format!("int4send(octet_length({text})) || {text}"))
        }
        _ => return None,
    })
}

fn text_value(
    column: &ColumnSpec,
    type_oid: u32,
    value: &str,
    encoding: Encoding,
) -> Option<(String, String)> {
    // A cast of `bpchar` would take its blanks off.
    let text = match type_oid {
        BPCHAR => format!("textin(bpcharout({value}))"),
        oid if is_text(oid) => format!("{value}::text"),
        // One that has a column of its own, by now, is not what it was.
        INT2 | INT4 | INT8 | FLOAT4 | FLOAT8 | BOOL | DATE | TIMESTAMP | TIMESTAMPTZ | BYTEA => {
            return None;
        }
        // What the type itself writes; a cast to text may be another text.
        _ if column.source_type.is_some() => format!("format('%s', {value})"),
        _ => return None,
    };
    let (utf8, fits) = match encoding {
        Encoding::Utf8 => (format!("convert_to({text}, 'UTF8')"), "true".to_owned()),
        // Null where it can't be converted, which would be an error otherwise.
        Encoding::Unknown | Encoding::Other => {
            let utf8 = format!("highwater.utf8(convert_to({text}, getdatabaseencoding()))");
            let fits = format!("{utf8} is not null");
            (utf8, fits)
        }
    };
    Some((fits, format!("int4send(octet_length({utf8})) || {utf8}")))
}

// `pg_type.oid` of the types that the decoder takes.
const TEXT: u32 = 25;
const BPCHAR: u32 = 1042;
const TIMESTAMPTZ: u32 = 1184;
const TIMESTAMP: u32 = 1114;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const INT2: u32 = 21;
const INT4: u32 = 23;
const INT8: u32 = 20;
const INTEGERS: [u32; 3] = [INT2, INT4, INT8];
const BOOL: u32 = 16;
const DATE: u32 = 1082;
const BYTEA: u32 = 17;
const NUMERIC: u32 = 1700;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_widened_type_prints_alike() {
        for (before, now) in [
            ("integer", "bigint"),
            ("numeric(10,2)", "numeric"),
            ("character varying(5)", "text"),
            ("timestamp(3) with time zone", "timestamp without time zone"),
            ("public.mood", "public.mood"),
        ] {
            assert!(prints_alike(before, now), "{before} {now}");
        }
        for (before, now) in
            [("json", "jsonb"), ("integer", "text"), ("character(5)", "text"), ("integer", "numeric(10,0)")]
        {
            assert!(!prints_alike(before, now), "{before} {now}");
        }
    }
}
