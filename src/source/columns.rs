//! The columns of a source table, as the catalog has them, and what they are in the archive.

use tokio_postgres::{Client, Row};

use super::copy::ATTRIBUTE;
use super::lookup::BINARY_FORM;
use crate::decode::NewColumn;
use crate::error::{Error, Result};
use crate::tables::{ColumnSpec, ColumnType, Compared};

/// Most digits of a number that has a decimal column; more are archived as text.
const DECIMAL_DIGITS_MAX: i32 = 38;

/// The schema or the table is not there, or may not be read.
pub(super) const UNSEEN: [&str; 3] = ["3F000", "42P01", "42501"];

/// A column of a source table.
pub(super) struct Found {
    pub(super) name: String,
    pub(super) source_type: String,
    pub(super) column_type: ColumnType,
    /// The built-in type that has the same binary form, or the type itself.
    pub(super) type_oid: u32,
    attribute: Option<String>,
}

impl Found {
    /// A column that the catalog has no more, of a type with this binary form and this name.
    pub(super) fn former(new: &NewColumn, form: Option<u32>, source_type: String) -> Self {
        Self {
            name: new.name.clone(),
            source_type,
            column_type: column_type(form, new.modifier),
            type_oid: form.unwrap_or(new.type_oid),
            attribute: None,
        }
    }

    /// The archive's column for its values.
    pub(super) fn archived(&self) -> ColumnSpec {
        ColumnSpec {
            // A table that loses a column, or the condition that it is never null, goes on.
            nullable: true,
            name: self.name.clone(),
            column_type: self.column_type,
            source_type: Some(self.source_type.clone()),
            attribute: self.attribute.clone(),
            added: false,
            filled: None,
            compared: Compared::Plainly,
        }
    }
}

/// The columns of a table that the stream sends: generated ones are left out.
pub(super) async fn columns(client: &Client, source: &str) -> Result<Vec<Found>> {
    let (schema, table) = source.split_once('.').unwrap_or_default();
    let failed = || Error::sql(format!("reading the columns of {source}"));
    // The modifier of a domain is its base's.
    let query = format!(
        "select a.attname::text, format_type(a.atttypid, a.atttypmod), {BINARY_FORM},
                coalesce(nullif(a.atttypmod, -1), t.typtypmod, -1), a.atttypid, {ATTRIBUTE}
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         join pg_attribute a on a.attrelid = c.oid join pg_type t on t.oid = a.atttypid
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')
           and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
         order by a.attnum"
    );
    let rows = client.query(&query, &[&schema, &table]).await.map_err(failed())?;
    rows.iter().map(found).collect::<Result<Vec<Found>, _>>().map_err(failed())
}

fn found(row: &Row) -> Result<Found, tokio_postgres::Error> {
    let (form, modifier): (Option<u32>, i32) = (row.try_get(2)?, row.try_get(3)?);
    let own: u32 = row.try_get(4)?;
    Ok(Found {
        type_oid: form.unwrap_or(own),
        attribute: Some(row.try_get(5)?),
        name: row.try_get(0)?,
        source_type: row.try_get(1)?,
        column_type: column_type(form, modifier),
    })
}

/// The column for values of this form: one that a widened source column still fits, and text for what has none of its own.
fn column_type(form: Option<u32>, modifier: i32) -> ColumnType {
    match form {
        Some(1184 | 1114) => ColumnType::Timestamp,
        Some(20 | 21 | 23) => ColumnType::Long,
        Some(700 | 701) => ColumnType::Double,
        Some(16) => ColumnType::Boolean,
        Some(1082) => ColumnType::Date,
        Some(17) => ColumnType::Binary,
        Some(1700) => decimal(modifier).unwrap_or(ColumnType::String),
        _ => ColumnType::String,
    }
}

/// The digits of a `numeric(precision, scale)`, by its modifier (`make_numeric_typmod` in the server's `numeric.c`).
fn decimal(modifier: i32) -> Option<ColumnType> {
    let packed = modifier.checked_sub(4).filter(|packed| *packed >= 0)?;
    let (precision, scale) = ((packed >> 16) & 0xffff, packed & 0x7ff);
    // Eleven bits with a sign.
    let scale = (scale ^ 1024) - 1024;
    let fits = (1..=DECIMAL_DIGITS_MAX).contains(&precision) && (0..=precision).contains(&scale);
    let decimal = u8::try_from(precision).ok().zip(i8::try_from(scale).ok()).filter(|_| fits)?;
    Some(ColumnType::Decimal { precision: decimal.0, scale: decimal.1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_of_their_modifier() {
        let modifier = |precision: i32, scale: i32| ((precision << 16) | (scale & 0x7ff)) + 4;
        assert_eq!(decimal(modifier(12, 3)), Some(ColumnType::Decimal { precision: 12, scale: 3 }));
        assert_eq!(decimal(modifier(38, 38)), Some(ColumnType::Decimal { precision: 38, scale: 38 }));
        for other in [-1, modifier(39, 0), modifier(5, -2), modifier(3, 5)] {
            assert_eq!(column_type(Some(1700), other), ColumnType::String, "{other}");
        }
    }
}
