use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::batch::{Batches, EntityId};
use crate::tables::ENTITY_COLUMNS_MAX;

/// Entities kept before the cache starts over. What was forgotten is looked up again.
const ENTITIES_MAX: usize = 1_000_000;

/// Longest name of an entity that is archived, bytes: it is kept in memory, and is in each of its rows' files.
pub(crate) const ENTITY_TEXT_BYTES_MAX: usize = 1 << 20;

/// Which entity an id means, by its names.
#[derive(Debug, Default)]
pub(super) struct EntityCache {
    entities: HashMap<i64, Cached, RandomState>,
    last: Option<(u64, i64, EntityId)>,
}

#[derive(Debug)]
struct Cached {
    /// Or why rows can't be archived that name it.
    entity: Result<Vec<String>, String>,
    /// The number in the batches of a generation.
    number: Option<(u64, EntityId)>,
}

pub(super) enum Lookup {
    Known(EntityId),
    /// There is no such entity, or none that can be archived: [`EntityCache::why`].
    None,
    /// Never looked up.
    Unknown,
}

impl EntityCache {
    #[inline]
    pub(super) fn get(&mut self, id: i64, batches: &mut Batches) -> Lookup {
        let generation = batches.generation();
        // Rows mostly come in runs of one entity.
        if let Some((last_generation, last_id, entity)) = self.last
            && last_generation == generation
            && last_id == id
        {
            return Lookup::Known(entity);
        }
        let Some(cached) = self.entities.get_mut(&id) else { return Lookup::Unknown };
        let Ok(entity) = &cached.entity else { return Lookup::None };
        let number = match cached.number {
            Some((number_generation, number)) if number_generation == generation => Some(number),
            _ => {
                let mut names = [&[][..]; ENTITY_COLUMNS_MAX];
                for (place, name) in names.iter_mut().zip(entity) {
                    *place = name.as_bytes();
                }
                batches.entity(names.get(..entity.len()).unwrap_or(&names))
            }
        };
        // The names are UTF-8, so they always have a number.
        let Some(number) = number else { return Lookup::None };
        cached.number = Some((generation, number));
        self.last = Some((generation, id, number));
        Lookup::Known(number)
    }

    pub(super) fn insert(&mut self, id: i64, entity: Result<Vec<String>, String>) {
        if self.entities.len() >= ENTITIES_MAX {
            self.entities.clear();
        }
        self.last = None;
        self.entities.insert(id, Cached { entity, number: None });
    }

    /// Why rows can't be archived that name this entity.
    pub(super) fn why(&self, id: i64) -> Option<&str> {
        self.entities.get(&id).and_then(|cached| cached.entity.as_ref().err()).map(String::as_str)
    }

    pub(super) fn forget_unresolved(&mut self) {
        self.entities.retain(|_, cached| cached.entity.is_ok());
    }
}
