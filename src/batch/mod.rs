//! Rows become columns: what one checkpoint holds in memory, per kind, window and entity.
//!
//! A row is appended to the columns of its `EntityBatch`; texts and bytes are interned, so that a row costs
//! a few numbers and no allocation. When the checkpoint is cut, each (kind, window) becomes one sorted
//! run of Arrow record batches ([`Batches::files`]): entities in order, each sorted by time and the kind's own order.
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
use columns::{EntityBatch, TextOrder};
pub use file::{FileRows, RecordBatches};
use interner::Interner;
use quarantine::QuarantineBatch;
pub use quarantine::QuarantinedRow;

/// Bytes that the bookkeeping of one entity's batch takes beside its rows.
const ENTITY_BATCH_BYTES: usize = 512;

/// An entity within one [`Batches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntityId(u32);

impl EntityId {
    /// That of rows that belong to no entity.
    pub const NONE: Self = Self(u32::MAX);
}

/// A text, or bytes, within one [`Batches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextId(u32);

/// A value of a row, of its column's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell {
    /// No value.
    Null,
    /// [`ColumnType::Boolean`](crate::tables::ColumnType::Boolean).
    Boolean(bool),
    /// [`ColumnType::Int`](crate::tables::ColumnType::Int), or days since the epoch.
    Int(i32),
    /// [`ColumnType::Long`](crate::tables::ColumnType::Long), or microseconds since the epoch.
    Long(i64),
    /// [`ColumnType::Double`](crate::tables::ColumnType::Double).
    Double(f64),
    /// [`ColumnType::Decimal`](crate::tables::ColumnType::Decimal): an `i128` in the machine's order of bytes, without the point.
    Decimal([u8; 16]),
    /// [`ColumnType::String`](crate::tables::ColumnType::String), by [`Batches::text`].
    Text(TextId),
    /// [`ColumnType::Binary`](crate::tables::ColumnType::Binary), by [`Batches::binary`].
    Binary(TextId),
}

impl From<Option<f64>> for Cell {
    fn from(value: Option<f64>) -> Self {
        value.map_or(Self::Null, Self::Double)
    }
}

impl From<Option<TextId>> for Cell {
    fn from(text: Option<TextId>) -> Self {
        text.map_or(Self::Null, Self::Text)
    }
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
    texts: Interner,
    binaries: Interner,
    kinds: Vec<KindBatches>,
    /// The place in `kinds` of the last row's.
    last_kind: usize,
    quarantine: QuarantineBatch,
    row_count: u64,
    byte_count: usize,
}

/// The batches of one kind, and the one that the last row went to.
#[derive(Debug)]
struct KindBatches {
    kind: Kind,
    row_bytes: usize,
    batches: Vec<EntityBatch>,
    places: HashMap<(EntityId, Window), usize, RandomState>,
    last: usize,
    /// Rows that were appended since somebody last asked.
    new_rows: u64,
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
            texts: Interner::default(),
            binaries: Interner::default(),
            kinds: Vec::new(),
            last_kind: 0,
            quarantine: QuarantineBatch::default(),
            row_count: 0,
            byte_count: 0,
        }
    }

    /// A number that no other batches of this process have: an [`EntityId`] or [`TextId`] belongs to one
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
        self.byte_count
            + self.entities.byte_count()
            // Twice: the texts, and their copy in order.
            + 2 * self.texts.byte_count()
            + self.binaries.byte_count()
    }

    /// The number of an entity in these batches, or `None` if a name is not UTF-8. The names must not contain
    /// a zero byte, which no text of PostgreSQL does.
    #[inline]
    pub fn entity(&mut self, names: &[&[u8]]) -> Option<EntityId> {
        if self.last_entity.is_none() || !is_joined(&self.entity_key, names) {
            self.entity_key.clear();
            for (place, name) in names.iter().enumerate() {
                if place > 0 {
                    self.entity_key.push(0);
                }
                self.entity_key.extend_from_slice(name);
            }
            self.last_entity = self.entities.intern(&self.entity_key).map(EntityId);
        }
        self.last_entity
    }

    /// The number of a text in these batches, or `None` if it is not UTF-8.
    #[inline]
    pub fn text(&mut self, text: &[u8]) -> Option<TextId> {
        self.texts.intern(text).map(TextId)
    }

    /// The number of some bytes in these batches.
    #[inline]
    pub fn binary(&mut self, bytes: &[u8]) -> TextId {
        TextId(self.binaries.intern_bytes(bytes))
    }

    /// Appends a row of a kind: its time (microseconds since the epoch, within [`YEAR_RANGE`](crate::tables::YEAR_RANGE)), and
    /// one cell for each of [`Kind::data_columns`], of the column's type.
    #[inline]
    pub fn push(&mut self, kind: Kind, entity: EntityId, time: i64, cells: &[Cell]) {
        let is_recent = time >= self.recent_since && time < self.recent_since + 3 * MICROS_PER_DAY;
        let width = if is_recent { self.width } else { WindowWidth::DAY };
        if self.kinds.get(self.last_kind).is_none_or(|batches| batches.kind != kind) {
            self.last_kind = self.place_of(kind);
        }
        let Some(batches) = self.kinds.get_mut(self.last_kind) else { return };
        self.row_count += 1;
        self.byte_count += batches.row_bytes;
        batches.new_rows += 1;
        batches.place(entity, time, width, &mut self.byte_count).push(time, cells);
    }

    #[cold]
    fn place_of(&mut self, kind: Kind) -> usize {
        self.kinds.iter().position(|batches| batches.kind == kind).unwrap_or_else(|| {
            self.kinds.push(KindBatches::new(kind));
            self.kinds.len() - 1
        })
    }

    /// How many rows each kind got since this was last asked; the quarantined ones are not among them.
    pub fn take_new_rows(&mut self) -> impl Iterator<Item = (Kind, u64)> {
        let counted = self.kinds.iter_mut().filter(|batches| batches.new_rows > 0);
        counted.map(|batches| (batches.kind, std::mem::take(&mut batches.new_rows)))
    }

    /// Appends a row that its own table can't hold.
    pub fn push_quarantine(&mut self, row: QuarantinedRow) {
        self.row_count += 1;
        self.byte_count += self.quarantine.push(row);
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
        let texts = Arc::new(TextOrder::new(&self.texts));
        for KindBatches { kind, batches, .. } in self.by_kind() {
            let mut windows: BTreeMap<Window, Vec<&EntityBatch>> = BTreeMap::new();
            for batch in batches {
                windows.entry(batch.window()).or_default().push(batch);
            }
            for (window, mut batches) in windows {
                batches.sort_unstable_by_key(|batch| self.entities.get(batch.entity().0));
                files.push(FileRows::of_table(*kind, window, self, Arc::clone(&texts), batches));
            }
        }
        files
    }

    /// The batches in the order of their kinds.
    fn by_kind(&self) -> Vec<&KindBatches> {
        let mut kinds: Vec<&KindBatches> = self.kinds.iter().collect();
        kinds.sort_unstable_by_key(|batches| batches.kind);
        kinds
    }

    /// How far the rows of each kind and entity reach, without the quarantine's and those that belong to no entity.
    #[must_use]
    pub fn entity_spans(&self) -> Vec<EntitySpan> {
        let mut spans = Vec::new();
        for KindBatches { kind, batches, .. } in self.by_kind() {
            let mut by_entity: BTreeMap<u32, EntitySpan> = BTreeMap::new();
            for batch in batches.iter().filter(|batch| batch.entity() != EntityId::NONE) {
                let Some((min, max)) = batch.time_range() else { continue };
                let span = by_entity.entry(batch.entity().0).or_insert_with(|| EntitySpan {
                    kind: *kind,
                    entity: Entity::of_names(self.entities.get(batch.entity().0).split('\0')),
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

/// Whether the key is these names with a zero byte between them.
#[inline]
fn is_joined(key: &[u8], names: &[&[u8]]) -> bool {
    let mut rest = Some(key);
    for (place, name) in names.iter().enumerate() {
        rest = rest.and_then(|rest| if place > 0 { rest.strip_prefix(b"\0") } else { Some(rest) });
        rest = rest.and_then(|rest| rest.strip_prefix(*name));
    }
    rest.is_some_and(<[u8]>::is_empty)
}

impl KindBatches {
    fn new(kind: Kind) -> Self {
        let row_bytes = columns::row_bytes(kind);
        Self { kind, row_bytes, batches: Vec::new(), places: HashMap::default(), last: 0, new_rows: 0 }
    }

    /// The batch for a row: mostly that of the row before.
    #[inline]
    fn place(
        &mut self,
        entity: EntityId,
        time: i64,
        width: WindowWidth,
        byte_count: &mut usize,
    ) -> &mut EntityBatch {
        let is_last = self.batches.get(self.last).is_some_and(|batch| batch.holds(entity, time));
        if !is_last {
            let window = Window::of(time, width);
            let next = self.batches.len();
            self.last = *self.places.entry((entity, window)).or_insert(next);
            if self.last == next {
                self.batches.push(EntityBatch::new(self.kind, entity, window));
                *byte_count += ENTITY_BATCH_BYTES;
            }
        }
        #[expect(clippy::indexing_slicing, reason = "`last` was found above or is the batch just pushed")]
        &mut self.batches[self.last]
    }
}

#[cfg(test)]
mod tests;
