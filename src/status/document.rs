use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::Look;
use crate::purge::Summary;
use crate::source::slot::Slot;
use crate::watermark::{EntityWatermark, State, Watermark};

/// The JSON form of what a look has found. Its names are a promise to programs.
#[derive(Serialize)]
pub(crate) struct Document<'a> {
    system_identifier: Option<&'a str>,
    slot: Option<SlotObject<'a>>,
    tables: Vec<TableObject<'a>>,
    entities: Vec<EntityObject<'a>>,
}

#[derive(Serialize)]
struct SlotObject<'a> {
    name: &'a str,
    confirmed_flush_lsn: String,
    wal_status: &'a str,
    /// Why it is lost, as far as the server says.
    invalidation_reason: Option<&'a str>,
    /// Since when nobody streams from it, as far as the server says.
    inactive_since: Option<&'a str>,
    retained_wal_bytes: Option<i64>,
}

#[derive(Serialize)]
struct TableObject<'a> {
    source_table: &'a str,
    kind: &'a str,
    state: State,
    flushed_lsn: String,
    archived_before: Option<u64>,
    max_created_at: Option<String>,
    row_count: i64,
    file_count: i64,
    byte_count: i64,
    doubles_removed: i64,
    lag_bytes: u64,
    updated_at: String,
    purge: Option<&'a Summary>,
}

#[derive(Serialize)]
struct EntityObject<'a> {
    source_table: &'a str,
    space: &'a str,
    name: &'a str,
    version: &'a str,
    min_created_at: String,
    max_created_at: String,
    row_count: i64,
}

impl<'a> Document<'a> {
    /// Of a look and of the entities.
    pub(crate) fn new(look: &'a Look, entities: &'a [EntityWatermark]) -> Self {
        Self {
            system_identifier: look.watermarks.first().map(|row| row.system_identifier.as_str()),
            slot: look.slot.as_ref().map(slot_object),
            tables: look.watermarks.iter().map(|row| table_object(row, look)).collect(),
            entities: entities.iter().map(entity_object).collect(),
        }
    }
}

fn slot_object(slot: &Slot) -> SlotObject<'_> {
    SlotObject {
        name: &slot.name,
        confirmed_flush_lsn: slot.confirmed_flush_lsn.to_string(),
        wal_status: &slot.wal_status,
        invalidation_reason: slot.invalidation_reason.as_deref(),
        inactive_since: slot.inactive_since.as_deref(),
        retained_wal_bytes: slot.retained_wal_bytes,
    }
}

fn table_object<'a>(row: &'a Watermark, look: &'a Look) -> TableObject<'a> {
    TableObject {
        source_table: &row.source_table,
        kind: &row.kind,
        state: row.state,
        flushed_lsn: row.flushed_lsn.to_string(),
        archived_before: row.archived_before,
        max_created_at: row.max_created_at.map(rfc3339),
        row_count: row.row_count,
        file_count: row.file_count,
        byte_count: row.byte_count,
        doubles_removed: row.doubles_removed,
        lag_bytes: look.end.bytes_since(row.flushed_lsn),
        updated_at: rfc3339(row.updated_at),
        purge: look.purges.iter().find(|(table, _)| *table == row.source_table).map(|(_, summary)| summary),
    }
}

fn entity_object(row: &EntityWatermark) -> EntityObject<'_> {
    EntityObject {
        source_table: &row.source_table,
        space: &row.entity.space,
        name: &row.entity.name,
        version: &row.entity.version,
        min_created_at: rfc3339(row.min_created_at),
        max_created_at: rfc3339(row.max_created_at),
        row_count: row.row_count,
    }
}

fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}
