//! Rows become columns: what one checkpoint holds in memory, per kind, window and entity.
//!
//! A row is appended to the columns of its `EntityBatch`; strings are interned, so that a row costs
//! a few numbers and no allocation. When the checkpoint is cut, each (kind, window) becomes one sorted
//! run of Arrow record batches ([`Batches::files`]): entities in order, each sorted by time and series.
//!
//! **Invariant.** Pure. This module knows nothing of Postgres or of storage.

mod columns;
mod file;
mod interner;
mod quarantine;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;

use crate::tables::{Entity, Kind, MICROS_PER_DAY, Window, WindowWidth};
use columns::{EntityBatch, Measure, SeriesOrder};
pub use file::{FileRows, RecordBatches};
use interner::Interner;
use quarantine::QuarantineBatch;
pub use quarantine::QuarantinedRow;

/// Bytes that the bookkeeping of one entity's batch takes beside its rows.
const ENTITY_BATCH_BYTES: usize = 512;

/// An entity within one [`Batches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntityId(u32);

/// A metric or feature within one [`Batches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeriesId(u32);

impl SeriesId {
    /// The series of a row that names none.
    pub const NULL: Self = Self(u32::MAX);
}

/// The columns of one checkpoint.
#[derive(Debug)]
pub struct Batches {
    generation: u64,
    width: WindowWidth,
    recent_since: i64,
    entities: Interner,
    /// The entity of the last row, and its texts as they are interned.
    last_entity: Option<EntityId>,
    entity_key: Vec<u8>,
    series: Interner,
    kinds: [KindBatches; 3],
    quarantine: QuarantineBatch,
    row_count: u64,
    byte_count: usize,
}

/// The batches of one kind, and the one that the last row went to.
#[derive(Debug, Default)]
struct KindBatches {
    batches: Vec<EntityBatch>,
    places: HashMap<(EntityId, Window), usize, RandomState>,
    last: usize,
}

/// How far an entity's rows of one checkpoint reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntitySpan {
    /// The kind of its rows.
    pub kind: Kind,
    /// The entity.
    pub entity: Entity,
    /// Oldest `created_at`, microseconds since the epoch.
    pub min_created_at: i64,
    /// Newest `created_at`, microseconds since the epoch.
    pub max_created_at: i64,
    /// Number of rows.
    pub row_count: u64,
}

impl Batches {
    /// Empty batches. Rows of the current and the previous UTC day (at `now`, microseconds since the epoch)
    /// go to windows of `width`; older and future rows go to a file for their whole day, because a load of
    /// old rows would make a file for each of their windows otherwise.
    #[must_use]
    pub fn new(width: WindowWidth, now: i64) -> Self {
        static GENERATIONS: AtomicU64 = AtomicU64::new(0);
        Self {
            generation: GENERATIONS.fetch_add(1, Ordering::Relaxed),
            width,
            recent_since: Window::of(now, WindowWidth::DAY).start() - MICROS_PER_DAY,
            entities: Interner::default(),
            last_entity: None,
            entity_key: Vec::new(),
            series: Interner::default(),
            kinds: Default::default(),
            quarantine: QuarantineBatch::default(),
            row_count: 0,
            byte_count: 0,
        }
    }

    /// A number that no other batches of this process have: an [`EntityId`] or [`SeriesId`] belongs to one
    /// generation.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether nothing has been appended.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.row_count == 0
    }

    /// Rows appended, the quarantined ones among them.
    #[must_use]
    pub const fn row_count(&self) -> u64 {
        self.row_count
    }

    /// Bytes of memory that the rows take, roughly and rather too many.
    #[must_use]
    pub const fn byte_count(&self) -> usize {
        self.byte_count + self.entities.byte_count() + self.series.byte_count()
    }

    /// The number of an entity in these batches, or `None` if a text is not UTF-8. The texts must not contain
    /// a zero byte, which no text of PostgreSQL does.
    #[inline]
    pub fn entity(&mut self, space: &[u8], name: &[u8], version: &[u8]) -> Option<EntityId> {
        if self.last_entity.is_none() || !is_joined(&self.entity_key, [space, name, version]) {
            self.entity_key.clear();
            for part in [space, b"\0", name, b"\0", version] {
                self.entity_key.extend_from_slice(part);
            }
            self.last_entity = self.entities.intern(&self.entity_key).map(EntityId);
        }
        self.last_entity
    }

    /// The number of a metric or feature in these batches, or `None` if it is not UTF-8.
    #[inline]
    pub fn series(&mut self, text: &[u8]) -> Option<SeriesId> {
        self.series.intern(text).map(SeriesId)
    }

    /// Appends a value of a custom metric. `created_at` is in microseconds since the epoch and within
    /// [`YEAR_RANGE`](crate::tables::YEAR_RANGE).
    #[inline]
    pub fn push_custom(&mut self, entity: EntityId, created_at: i64, metric: SeriesId, value: Option<f64>) {
        self.push(Kind::Custom, entity, created_at, metric, Measure::Value(value));
    }

    /// Appends a value for statistical process control; as [`Batches::push_custom`].
    #[inline]
    pub fn push_spc(&mut self, entity: EntityId, created_at: i64, feature: SeriesId, value: Option<f64>) {
        self.push(Kind::Spc, entity, created_at, feature, Measure::Value(value));
    }

    /// Appends the count of one bin; as [`Batches::push_custom`].
    #[inline]
    pub fn push_psi(
        &mut self,
        entity: EntityId,
        created_at: i64,
        feature: SeriesId,
        bin_id: i32,
        bin_count: i32,
    ) {
        self.push(Kind::Psi, entity, created_at, feature, Measure::Bin { bin_id, bin_count });
    }

    /// Appends a row that its own table can't hold.
    pub fn push_quarantine(&mut self, row: QuarantinedRow) {
        self.row_count += 1;
        self.byte_count += self.quarantine.push(row);
    }

    #[inline]
    fn push(&mut self, kind: Kind, entity: EntityId, created_at: i64, series: SeriesId, measure: Measure) {
        let width = if created_at >= self.recent_since && created_at < self.recent_since + 3 * MICROS_PER_DAY
        {
            self.width
        } else {
            WindowWidth::DAY
        };
        self.row_count += 1;
        // `Kind::DRIFT` are the first three kinds.
        let Some(batches) = self.kinds.get_mut(kind.index()) else { return };
        let batch = batches.place(entity, created_at, width, &mut self.byte_count);
        self.byte_count += batch.push(created_at, series, measure);
    }

    /// The quarantined rows.
    pub fn quarantined(&self) -> impl Iterator<Item = &QuarantinedRow> {
        self.quarantine.rows()
    }

    /// The rows as the files that they become: one per kind and window, the quarantine's first, then by
    /// kind and time.
    #[must_use]
    pub fn files(&self) -> Vec<FileRows<'_>> {
        let windows = self.quarantine.windows(self.width).into_iter();
        let mut files: Vec<_> =
            windows.map(|window| FileRows::quarantine(window, &self.quarantine)).collect();
        let series = Arc::new(SeriesOrder::new(&self.series));
        for (kind, batches) in Kind::DRIFT.into_iter().zip(&self.kinds) {
            let mut windows: BTreeMap<Window, Vec<&EntityBatch>> = BTreeMap::new();
            for batch in &batches.batches {
                windows.entry(batch.window()).or_default().push(batch);
            }
            for (window, mut batches) in windows {
                batches.sort_unstable_by_key(|batch| self.entities.get(batch.entity().0));
                files.push(FileRows::drift(kind, window, &self.entities, Arc::clone(&series), batches));
            }
        }
        files
    }

    /// How far the rows of each kind and entity reach, without the quarantine's.
    #[must_use]
    pub fn entity_spans(&self) -> Vec<EntitySpan> {
        let mut spans = Vec::new();
        for (kind, batches) in Kind::DRIFT.into_iter().zip(&self.kinds) {
            let mut by_entity: BTreeMap<u32, EntitySpan> = BTreeMap::new();
            for batch in &batches.batches {
                let Some((min, max)) = batch.created_at_range() else { continue };
                let span = by_entity.entry(batch.entity().0).or_insert_with(|| EntitySpan {
                    kind,
                    entity: file::entity(self.entities.get(batch.entity().0)),
                    min_created_at: min,
                    max_created_at: max,
                    row_count: 0,
                });
                span.min_created_at = span.min_created_at.min(min);
                span.max_created_at = span.max_created_at.max(max);
                span.row_count += batch.row_count() as u64;
            }
            spans.extend(by_entity.into_values());
        }
        spans
    }
}

/// Whether the key is these texts with a zero byte between them.
#[inline]
fn is_joined(key: &[u8], [space, name, version]: [&[u8]; 3]) -> bool {
    fn after<'a>(key: &'a [u8], text: &[u8]) -> Option<&'a [u8]> {
        key.strip_prefix(text)?.strip_prefix(b"\0")
    }
    after(key, space).and_then(|rest| after(rest, name)) == Some(version)
}

impl KindBatches {
    /// The batch for a row: mostly that of the row before.
    #[inline]
    fn place(
        &mut self,
        entity: EntityId,
        created_at: i64,
        width: WindowWidth,
        byte_count: &mut usize,
    ) -> &mut EntityBatch {
        let is_last = self.batches.get(self.last).is_some_and(|batch| batch.holds(entity, created_at));
        if !is_last {
            let window = Window::of(created_at, width);
            let next = self.batches.len();
            self.last = *self.places.entry((entity, window)).or_insert(next);
            if self.last == next {
                self.batches.push(EntityBatch::new(entity, window));
                *byte_count += ENTITY_BATCH_BYTES;
            }
        }
        #[expect(clippy::indexing_slicing, reason = "`last` was found above or is the batch just pushed")]
        &mut self.batches[self.last]
    }
}

#[cfg(test)]
mod tests;
