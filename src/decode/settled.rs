//! [`Settled`]: rows that an earlier session has put into the quarantine.

use std::collections::{HashMap, HashSet};

use md5::{Digest as _, Md5};
use serde_json::Value as Json;

use super::charset::Charset;
use super::relation::Table;
use super::texts;
use crate::lsn::Lsn;
use crate::pgoutput::{DecodeError, Tuple};
use crate::tables::{ColumnSpec, Compared, Kind};

/// Quarantined rows, by the position of their transaction's commit record, and how many of each there are.
///
/// They are told by the columns that are archived: others may be written to later (`archived`, `updated_at`), come and go. Of
/// each only the digest is kept, so that millions of them take little memory.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    rows: HashMap<Lsn, HashMap<u128, u64>>,
    /// The columns that have a part in archived rows, of all tables.
    columns: HashSet<&'static str>,
}

impl Settled {
    /// None of these tables' rows yet.
    pub(crate) fn new(kinds: &[Kind]) -> Self {
        let ids = kinds.iter().filter_map(|kind| Some(kind.entity()?.lookup.as_ref()?.id.as_str()));
        // A column that came later, or is gone, is not in each of them.
        let is_common =
            |column: &&ColumnSpec| column.filled.is_none() && column.compared == Compared::Plainly;
        let columns = kinds.iter().flat_map(|kind| kind.columns()).filter(is_common);
        let columns = columns.map(|column| column.name.as_str());
        Self { rows: HashMap::new(), columns: columns.chain(ids).collect() }
    }

    /// Adds a row as the quarantine has it. A row of another origin, which has no position, is passed over: it
    /// can't come again.
    pub(crate) fn add(&mut self, source_table: &str, row: &str, lsn: &str) {
        // Parsed, so that the text does not have to be what this version would write.
        if let (Ok(lsn), Ok(Json::Object(mut row))) = (lsn.parse(), serde_json::from_str::<Json>(row)) {
            row.retain(|column, _| self.columns.contains(column.as_str()));
            let digest = digest(source_table, row);
            *self.rows.entry(lsn).or_default().entry(digest).or_default() += 1;
        }
    }

    /// Whether any of them is of the transaction whose commit record begins there.
    pub(super) fn has_any(&self, lsn: Lsn) -> bool {
        self.rows.contains_key(&lsn)
    }

    /// Whether the row is one of them, which then is used up.
    pub(super) fn take(
        &mut self,
        lsn: Lsn,
        table: &Table,
        tuple: Tuple<'_>,
        charset: &Charset,
    ) -> Result<bool, DecodeError> {
        let Some(rows) = self.rows.get_mut(&lsn) else { return Ok(false) };
        let is_archived = |column: &str| self.columns.contains(column);
        let digest = digest(&table.name, texts(table, tuple, charset, is_archived)?);
        Ok(match rows.get_mut(&digest) {
            Some(count) if *count > 0 => {
                *count -= 1;
                true
            }
            _ => false,
        })
    }
}

/// The MD5 of a table's name and a row's texts, which come in the order of the columns' names. A null is as good as a column that
/// was not there yet.
fn digest(source_table: &str, mut row: serde_json::Map<String, Json>) -> u128 {
    row.retain(|_, text| !text.is_null());
    // No name has a zero byte.
    let text = format!("{source_table}\0{}", Json::Object(row));
    u128::from_be_bytes(Md5::digest(text).into())
}
