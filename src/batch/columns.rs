use std::sync::Arc;

use arrow::array::{NullBufferBuilder, StringArray};

use super::interner::Interner;
use super::{EntityId, SeriesId};
use crate::tables::Window;

/// What a row measures.
#[derive(Clone, Copy, Debug)]
pub(super) enum Measure {
    Value(Option<f64>),
    Bin { bin_id: i32, bin_count: i32 },
}

/// Bytes of one row: time, series, and a double or two integers; twice, because vectors double as they
/// grow.
const ROW_BYTES: usize = 2 * (8 + 4 + 8);

/// The rows of one kind, entity and window, in order of arrival. The columns that the kind lacks stay
/// empty.
#[derive(Debug)]
pub(super) struct EntityBatch {
    entity: EntityId,
    window: Window,
    pub(super) created_at: Vec<i64>,
    pub(super) series: Vec<u32>,
    pub(super) bin_id: Vec<i32>,
    pub(super) bin_count: Vec<i32>,
    pub(super) value: Vec<f64>,
    pub(super) value_validity: NullBufferBuilder,
}

impl EntityBatch {
    pub(super) fn new(entity: EntityId, window: Window) -> Self {
        Self {
            entity,
            window,
            created_at: Vec::new(),
            series: Vec::new(),
            bin_id: Vec::new(),
            bin_count: Vec::new(),
            value: Vec::new(),
            value_validity: NullBufferBuilder::new(0),
        }
    }

    pub(super) const fn entity(&self) -> EntityId {
        self.entity
    }

    pub(super) const fn window(&self) -> Window {
        self.window
    }

    pub(super) const fn row_count(&self) -> usize {
        self.created_at.len()
    }

    /// Whether a row of this entity and time belongs here.
    #[inline]
    pub(super) fn holds(&self, entity: EntityId, created_at: i64) -> bool {
        self.entity == entity && self.window.contains(created_at)
    }

    pub(super) fn created_at_range(&self) -> Option<(i64, i64)> {
        Some((self.created_at.iter().min().copied()?, self.created_at.iter().max().copied()?))
    }

    /// Appends a row; returns the bytes of memory it takes.
    #[inline]
    pub(super) fn push(&mut self, created_at: i64, series: SeriesId, measure: Measure) -> usize {
        self.created_at.push(created_at);
        self.series.push(series.0);
        match measure {
            Measure::Value(value) => {
                self.value.push(value.unwrap_or_default());
                self.value_validity.append(value.is_some());
            }
            Measure::Bin { bin_id, bin_count } => {
                self.bin_id.push(bin_id);
                self.bin_count.push(bin_count);
            }
        }
        ROW_BYTES
    }

    /// Row numbers in sort order: by time, series and bin.
    pub(super) fn order(&self, series: &SeriesOrder) -> Vec<u32> {
        let mut keys: Vec<(i64, u32, i32, u32)> = Vec::with_capacity(self.row_count());
        for (row, (created_at, id)) in (0..).zip(self.created_at.iter().zip(&self.series)) {
            let bin_id = self.bin_id.get(row as usize).copied().unwrap_or_default();
            keys.push((*created_at, series.sort_key(*id), bin_id, row));
        }
        // Rows of one writer mostly arrive in order of time; then only those of the same time are left to sort.
        if keys.is_sorted_by_key(|key| key.0) {
            for same_time in keys.chunk_by_mut(|one, next| one.0 == next.0) {
                same_time.sort_unstable();
            }
        } else {
            keys.sort_unstable();
        }
        keys.into_iter().map(|key| key.3).collect()
    }
}

/// The interned series in the order of their texts, so that sorting rows compares no text.
#[derive(Debug)]
pub(super) struct SeriesOrder {
    /// Rank of each series number.
    ranks: Vec<u32>,
    /// Texts by rank.
    pub(super) texts: Arc<StringArray>,
}

impl SeriesOrder {
    pub(super) fn new(series: &Interner) -> Self {
        let count = u32::try_from(series.len()).unwrap_or(u32::MAX);
        let mut ids: Vec<u32> = (0..count).collect();
        ids.sort_unstable_by_key(|id| series.get(*id));
        let mut ranks = vec![0; ids.len()];
        for (rank, id) in (0_u32..).zip(&ids) {
            if let Some(place) = ranks.get_mut(*id as usize) {
                *place = rank;
            }
        }
        let texts = StringArray::from_iter_values(ids.iter().map(|id| series.get(*id)));
        Self { ranks, texts: Arc::new(texts) }
    }

    /// The position of a series' text in `texts`; `None` for [`SeriesId::NULL`].
    #[inline]
    pub(super) fn rank(&self, id: u32) -> Option<u32> {
        self.ranks.get(id as usize).copied()
    }

    /// Null before every text, as Arrow's row format sorts.
    #[inline]
    fn sort_key(&self, id: u32) -> u32 {
        self.rank(id).map_or(0, |rank| rank + 1)
    }
}
