use foldhash::fast::FixedState;
use hashbrown::HashTable;
use std::hash::BuildHasher;

/// Byte strings, each held once and named by a small number. Looking up one that is there allocates
/// nothing.
#[derive(Debug, Default)]
pub(super) struct Interner {
    bytes: Vec<u8>,
    /// Where each string ends in `bytes`; it begins where the one before ends.
    ends: Vec<usize>,
    ids: HashTable<u32>,
    hasher: FixedState,
    /// The number that was asked for last: rows come in runs.
    last: u32,
}

impl Interner {
    /// The number of a string, new if it was not there; `None` if it is not UTF-8, which is checked once per
    /// string.
    #[inline]
    pub(super) fn intern(&mut self, text: &[u8]) -> Option<u32> {
        self.number(text, |text| std::str::from_utf8(text).is_ok())
    }

    #[inline]
    fn number(&mut self, text: &[u8], is_fit: impl FnOnce(&[u8]) -> bool) -> Option<u32> {
        let Self { bytes, ends, ids, hasher, last } = self;
        // A number that is not there yet has the empty string.
        if !text.is_empty() && slice(bytes, ends, *last) == text {
            return Some(*last);
        }
        let hash = hasher.hash_one(text);
        if let Some(id) = ids.find(hash, |id| slice(bytes, ends, *id) == text) {
            *last = *id;
            return Some(*id);
        }
        if !is_fit(text) {
            return None;
        }
        // Memory ends long before 2^32 strings do.
        let id = u32::try_from(ends.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(text);
        ends.push(bytes.len());
        ids.insert_unique(hash, id, |id| hasher.hash_one(slice(bytes, ends, *id)));
        *last = id;
        Some(id)
    }

    /// The string of a number that [`Interner::intern`] gave; empty for any other.
    pub(super) fn get(&self, id: u32) -> &str {
        std::str::from_utf8(slice(&self.bytes, &self.ends, id)).unwrap_or_default()
    }

    /// The number of bytes that need not be UTF-8, as [`Interner::intern`].
    #[inline]
    pub(super) fn intern_bytes(&mut self, bytes: &[u8]) -> u32 {
        self.number(bytes, |_| true).unwrap_or_default()
    }

    /// The bytes of a number that [`Interner::intern_bytes`] gave.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        slice(&self.bytes, &self.ends, id)
    }

    pub(super) const fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes held, roughly.
    pub(super) const fn byte_count(&self) -> usize {
        self.bytes.len() + self.ends.len() * 24
    }
}

fn slice<'a>(bytes: &'a [u8], ends: &[usize], id: u32) -> &'a [u8] {
    let index = id as usize;
    let start = index.checked_sub(1).and_then(|previous| ends.get(previous)).copied().unwrap_or(0);
    ends.get(index).and_then(|end| bytes.get(start..*end)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_keeps_its_number() {
        let mut interner = Interner::default();
        let texts: Vec<Vec<u8>> = (0..1000_u32).map(|n| n.to_string().into_bytes()).collect();
        let ids: Vec<u32> = texts.iter().map(|text| interner.intern(text).unwrap()).collect();
        let empty = interner.intern(b"").unwrap();
        for (text, id) in texts.iter().zip(&ids) {
            assert_eq!(interner.intern(text), Some(*id));
            assert_eq!(interner.get(*id).as_bytes(), text.as_slice());
        }
        assert_eq!(interner.get(empty), "");
        assert_eq!(interner.intern(b""), Some(empty));
        assert_eq!(interner.intern(b"\xff"), None);
        assert_eq!(interner.len(), 1001);
    }
}
