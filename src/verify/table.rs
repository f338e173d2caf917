//! One table that is compared.

use super::report::Progress;
use crate::archive::{Storage, TableFile};
use crate::config::Config;
use crate::error::Error;
use crate::source::{Partition, Point};
use crate::tables::Kind;
use crate::watermark::Watermark;

/// One table that is compared.
pub(super) struct Table<'a> {
    pub(super) config: &'a Config,
    pub(super) storage: &'a Storage,
    pub(super) point: &'a Point,
    pub(super) row: &'a Watermark,
    pub(super) kind: Kind,
    /// As its rows are compared.
    pub(super) compared: Kind,
    pub(super) files: &'a [TableFile],
    /// Times that are compared, whole hours.
    pub(super) range: (i64, i64),
    /// What the archive has too much keeps no partition from being verified.
    pub(super) accepts_surplus: bool,
    pub(super) tell: &'a (dyn Fn(Progress) + Sync),
}

impl Table<'_> {
    pub(super) fn told(&self, step: &str, (done, all): (u64, u64), unit: &'static str) {
        let table = self.row.source_table.clone();
        (self.tell)(Progress { table, step: step.to_owned(), done, all, unit });
    }
}

/// The error of a partition that is no longer what the snapshot saw: a rewritten one looks empty to it.
pub(super) fn changed(config: &Config, partition: &Partition) -> Error {
    let detail = format!("{} was dropped, renamed or rewritten meanwhile; verify again", partition.name);
    Error::Slot { slot: config.slot.clone(), detail, transient: true }
}
