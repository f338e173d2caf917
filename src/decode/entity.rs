use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::charset::Charset;
use super::relation::Role;
use super::{Fields, value};
use crate::batch::{Batches, EntityId};
use crate::tables::Entity;

/// Entities kept before the cache starts over. What was forgotten is looked up again.
const ENTITIES_MAX: usize = 1_000_000;

/// Longest name of an entity that is archived, bytes: it is kept in memory, and is in each of its rows' files.
pub(crate) const ENTITY_TEXT_BYTES_MAX: usize = 1 << 20;

/// Which entity an `entity_id` means.
#[derive(Debug, Default)]
pub(super) struct EntityCache {
    entities: HashMap<i64, Cached, RandomState>,
    last: Option<(u64, i64, EntityId)>,
}

#[derive(Debug)]
struct Cached {
    /// Or why rows can't be archived that name it.
    entity: Result<Entity, String>,
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
            _ => batches.entity(entity.space.as_bytes(), entity.name.as_bytes(), entity.version.as_bytes()),
        };
        // An `Entity` is UTF-8, so it always has a number.
        let Some(number) = number else { return Lookup::None };
        cached.number = Some((generation, number));
        self.last = Some((generation, id, number));
        Lookup::Known(number)
    }

    pub(super) fn insert(&mut self, id: i64, entity: Result<Entity, String>) {
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

    /// Learns from a row of the entity table. A row without an id or a usable text is of no use: the look-up
    /// will say so for the rows that name it.
    pub(super) fn learn(&mut self, fields: &Fields<'_>, charset: &Charset) {
        let text = |role: Role| {
            let (value, source_type) = fields.get(role as usize).copied().flatten()?;
            let bytes = value::text(value, source_type).ok()?;
            charset.text(bytes).filter(|text| text.len() <= ENTITY_TEXT_BYTES_MAX).map(str::to_owned)
        };
        let id = fields.get(Role::EntityId as usize).copied().flatten();
        let id = id.and_then(|(value, source_type)| value::integer(value, source_type).ok());
        if let (Some(id), Some(space), Some(name), Some(version)) =
            (id, text(Role::Space), text(Role::Name), text(Role::Version))
        {
            self.insert(id, Ok(Entity { space, name, version }));
        }
    }

    pub(super) fn forget_unresolved(&mut self) {
        self.entities.retain(|_, cached| cached.entity.is_ok());
    }
}
