//! The drift tables as one snapshot has them: which tables hold their rows, and reading these, whole or by time.

mod columns;
mod copier;
mod copy;
pub(crate) mod coverage;
mod defaults;
pub(crate) mod describe;
pub(crate) mod growth;
pub(crate) mod identity;
pub(crate) mod lookup;
mod partition;
mod point;
pub(crate) mod scouter;
pub(crate) mod slot;
mod sums;
mod time;
pub mod unarchived;

pub(crate) use copier::Copier;
pub(crate) use copy::{Rows, Source, has_unreadable, insert};
pub(crate) use partition::{Fate, Partition, have_rows, holders, leaves, not_below};
pub(crate) use point::{Point, TemporarySlot};
pub(crate) use sums::PartitionSums;
pub(crate) use time::{Days, Slice, TimeColumn};
