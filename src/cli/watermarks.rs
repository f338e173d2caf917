//! `highwater --watermarks`: how far the archive reaches, as the database has it. Needs no running sidecar.

use chrono::{DateTime, SecondsFormat, Utc};

use super::columns::{aligned, cell};
use super::{Format, json, print};
use crate::config::Config;
use crate::error::Result;
use crate::postgres::Session;
use crate::purge::Summary;
use crate::status::{Document, Look};
use crate::watermark::{self, EntityWatermark};

/// Characters of a name, and of anything else: a reason may be a sentence or two.
const NAME_MAX: usize = 40;
const CELL_MAX: usize = 400;

pub(super) async fn watermarks(config: &Config, format: Format) -> Result<()> {
    let mut session = Session::new(config.source.clone());
    let look = Look::take(&mut session, &config.slot, None).await?;
    let entities = session.run(watermark::read_entities).await?;
    match format {
        Format::Table => print(table(&look, &entities, config).trim_end()),
        Format::Json => print(&json(&Document::new(&look, &entities))?),
    }
}

fn table(look: &Look, entities: &[EntityWatermark], config: &Config) -> String {
    let mut text = match &look.slot {
        Some(slot) => format!(
            "slot {}: confirmed {}, WAL {}{}, {} retained{}\n\n",
            slot.name,
            slot.confirmed_flush_lsn,
            slot.wal_status,
            slot.invalidation_reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default(),
            slot.retained_wal_bytes.map_or_else(|| "nothing".to_owned(), bytes),
            slot.inactive_since
                .as_ref()
                .map(|since| format!("; nobody streams since {since}"))
                .unwrap_or_default(),
        ),
        None => format!("slot {}: missing; run `highwater setup`\n\n", config.slot),
    };
    let tables = look.watermarks.iter().map(|row| {
        [
            row.source_table.clone(),
            row.state.name().to_owned(),
            row.row_count.to_string(),
            row.doubles_removed.to_string(),
            row.file_count.to_string(),
            bytes(row.byte_count),
            row.max_created_at.map_or_else(|| "-".to_owned(), seconds),
            row.archived_before.map_or_else(|| "-".to_owned(), |xid| xid.to_string()),
            row.flushed_lsn.to_string(),
            bytes(i64::try_from(look.end.bytes_since(row.flushed_lsn)).unwrap_or(i64::MAX)),
            seconds(row.updated_at),
        ]
    });
    let heads = [
        "TABLE",
        "STATE",
        "ROWS",
        "REMOVED",
        "FILES",
        "SIZE",
        "NEWEST",
        "BEFORE XID",
        "FLUSHED",
        "LAG",
        "UPDATED",
    ];
    align(&mut text, heads, tables);
    text.push('\n');
    if !look.purges.is_empty() {
        let heads = ["TABLE", "RETENTION", "LAST PURGE", "DELETABLE", "BLOCKED", "WHY"];
        align(&mut text, heads, look.purges.iter().map(|(table, summary)| purge_row(table, summary)));
        text.push('\n');
    }
    let entities = entities.iter().map(|row| {
        [
            row.source_table.clone(),
            named(&row.entity.space),
            named(&row.entity.name),
            named(&row.entity.version),
            seconds(row.min_created_at),
            seconds(row.max_created_at),
            row.row_count.to_string(),
        ]
    });
    align(&mut text, ["TABLE", "SPACE", "NAME", "VERSION", "OLDEST", "NEWEST", "ROWS"], entities);
    text
}

fn purge_row(table: &str, summary: &Summary) -> [String; 6] {
    let parts = |partitions: u64, rows: i64| match (partitions, rows) {
        (0, 0) => "-".to_owned(),
        (0, rows) => format!("~{rows} rows"),
        (partitions, rows) => format!("{partitions} partitions, ~{rows} rows"),
    };
    let purged_at = summary.purged_at.as_deref().and_then(|text| text.split_once('.'));
    [
        table.to_owned(),
        summary.retention.clone(),
        purged_at.map_or_else(|| "never".to_owned(), |(seconds, _)| format!("{seconds}Z")),
        parts(summary.deletable_partitions, summary.deletable_rows_estimate),
        parts(summary.blocked_partitions, summary.blocked_rows_estimate),
        summary.blocked_by.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}

/// Appends rows under heads. Most texts come from tables that others write.
fn align<const N: usize>(text: &mut String, heads: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let rows = rows.map(|row| row.map(|value| cell(&value, CELL_MAX)));
    let rows: Vec<[String; N]> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    text.push_str(&aligned(&rows));
}

/// A name, which may be empty.
fn named(name: &str) -> String {
    if name.is_empty() { "\"\"".to_owned() } else { cell(name, NAME_MAX) }
}

fn seconds(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// A size in the largest unit that leaves at least one digit before the point.
pub(super) fn bytes(count: i64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = units.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(i64::MAX), "8388608.0 TiB");
    }
}
