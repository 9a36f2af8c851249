//! The put table: the 64 slices that slot conflicts displaced last, a "cache for the cache".
//!
//! Sixteen sets of four: get and remember look at four entries at most. It holds no pins: those are
//! counted beside the directory's slots, and the store keeps a pinned slice wherever it is.

use std::sync::Arc;

use super::SliceKey;
use super::slice::SliceBody;

const WAYS: usize = 4;
const SETS: usize = 16;
/// Entries in all.
pub(crate) const PUT_TABLE_ENTRIES: usize = WAYS * SETS;

#[derive(Debug)]
struct Entry {
    /// The body's key: looked at without going to the body.
    key: SliceKey,
    body: Arc<SliceBody>,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct PutTable {
    entries: [Option<Entry>; PUT_TABLE_ENTRIES],
    /// Next victim of each set.
    victims: [u8; SETS],
}

impl Default for PutTable {
    fn default() -> Self {
        Self {
            entries: [const { None }; PUT_TABLE_ENTRIES],
            victims: [0; SETS],
        }
    }
}

impl PutTable {
    /// Fibonacci hashing: slices of neighbouring offsets spread over the sets.
    fn set(key: SliceKey) -> usize {
        let hash = (key.get() >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(hash >> 60).unwrap_or(0)
    }

    fn position(&self, key: SliceKey) -> Option<usize> {
        let start = Self::set(key) * WAYS;
        (start..start + WAYS)
            .find(|&index| matches!(&self.entries[index], Some(entry) if entry.key == key))
    }

    /// Takes the live body of `key` out, if it is here.
    pub(crate) fn take(&mut self, key: SliceKey) -> Option<Arc<SliceBody>> {
        let index = self.position(key)?;
        let body = self.entries[index].take()?.body;
        (!body.is_retired()).then_some(body)
    }

    /// Remembers a slice, at the cost of the oldest one of its set.
    pub(crate) fn remember(&mut self, body: Arc<SliceBody>) {
        let key = body.key();
        let index = self.position(key).unwrap_or_else(|| {
            let set = Self::set(key);
            let way = self.victims[set];
            self.victims[set] = (way + 1) % 4;
            set * WAYS + usize::from(way)
        });
        self.entries[index] = Some(Entry { key, body });
    }
}
