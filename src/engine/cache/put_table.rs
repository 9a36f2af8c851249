//! The put table: the 64 most recently got slices of a worker, a "cache for the cache".
//!
//! It holds the pins of suspended requests, so that a put finds its entry by the ticket without
//! searching the cache, and it catches what a slot conflict of the directory displaces. Sixteen
//! sets of four: get and put look at four entries at most. A slice that was pinned once stays in
//! memory until its entry is needed for another: a worker exceeds the budget by 64 slices at most.

use std::sync::Arc;

use super::SliceKey;
use super::slice::SliceBody;

const WAYS: usize = 4;
const SETS: usize = 16;
/// Entries in all.
pub(crate) const PUT_TABLE_ENTRIES: usize = WAYS * SETS;

#[derive(Debug, Default)]
struct Entry {
    body: Option<Arc<SliceBody>>,
    /// The body's key: looked at without going to the body.
    key: Option<SliceKey>,
    /// Suspended requests of this worker that hold the slice.
    pins: u32,
    /// The body carries a pin of this entry. It is kept beyond the last request, until the entry
    /// is needed for another slice, so that pinning a slice again touches nothing shared.
    held: bool,
}

impl Entry {
    /// Takes in another slice, or none. Nobody may hold the present one.
    fn replace(&mut self, body: Option<&Arc<SliceBody>>) {
        debug_assert_eq!(self.pins, 0, "a held slice is replaced");
        if let Some(old) = self.body.take()
            && std::mem::take(&mut self.held)
        {
            old.unpin();
        }
        self.key = body.map(|body| body.key());
        self.body = body.map(Arc::clone);
    }
}

/// Where a pin is kept. Give it back to the [`Directory`](super::Directory) that made it.
#[derive(Debug)]
pub struct Ticket(Place);

#[derive(Debug)]
enum Place {
    /// In the table, at this index.
    Entry(usize),
    /// All four entries of the set were pinned: on the body itself.
    Body(Arc<SliceBody>),
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct PutTable {
    entries: [Entry; PUT_TABLE_ENTRIES],
    /// Next victim of each set.
    victims: [u8; SETS],
}

impl Default for PutTable {
    fn default() -> Self {
        Self {
            entries: std::array::from_fn(|_| Entry::default()),
            victims: [0; SETS],
        }
    }
}

impl PutTable {
    /// Fibonacci hashing: slices of neighbouring offsets spread over the sets.
    #[inline]
    fn set(key: SliceKey) -> usize {
        let hash = (key.get() >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(hash >> 60).unwrap_or(0)
    }

    #[inline]
    fn position(&self, key: SliceKey) -> Option<usize> {
        let start = Self::set(key) * WAYS;
        (start..start + WAYS).find(|&index| self.entries[index].key == Some(key))
    }

    /// The live body of `key`, if it is here.
    #[inline]
    pub(crate) fn get(&mut self, key: SliceKey) -> Option<Arc<SliceBody>> {
        let index = self.position(key)?;
        let entry = &mut self.entries[index];
        let body = entry.body.as_ref()?;
        if body.is_retired() {
            if entry.pins == 0 {
                entry.replace(None);
            }
            return None;
        }
        Some(Arc::clone(body))
    }

    /// Remembers a slice, at the cost of an unpinned one of its set.
    pub(crate) fn remember(&mut self, body: &Arc<SliceBody>) -> Option<usize> {
        let key = body.key();
        if let Some(index) = self.position(key) {
            let entry = &mut self.entries[index];
            let same = entry
                .body
                .as_ref()
                .is_some_and(|held| Arc::ptr_eq(held, body));
            if !same && entry.pins == 0 {
                entry.replace(Some(body));
            }
            return (same || entry.pins == 0).then_some(index);
        }
        let set = Self::set(key);
        let start = set * WAYS;
        for step in 0..WAYS {
            let way = (usize::from(self.victims[set]) + step) % WAYS;
            let entry = &mut self.entries[start + way];
            if entry.pins == 0 {
                entry.replace(Some(body));
                self.victims[set] = u8::try_from((way + 1) % WAYS).unwrap_or(0);
                return Some(start + way);
            }
        }
        None
    }

    /// Pins a slice for a request that is about to suspend.
    pub(crate) fn pin(&mut self, body: &Arc<SliceBody>) -> Ticket {
        if let Some(index) = self.remember(body) {
            let entry = &mut self.entries[index];
            if !std::mem::replace(&mut entry.held, true) {
                body.pin();
            }
            entry.pins += 1;
            Ticket(Place::Entry(index))
        } else {
            body.pin();
            Ticket(Place::Body(Arc::clone(body)))
        }
    }

    /// Gives a pin back. No search: the ticket says where it is.
    pub(crate) fn put(&mut self, ticket: &Ticket) {
        match &ticket.0 {
            Place::Entry(index) => {
                self.entries[*index].pins -= 1;
            }
            Place::Body(body) => body.unpin(),
        }
    }
}

impl Drop for PutTable {
    fn drop(&mut self) {
        for entry in &mut self.entries {
            entry.pins = 0;
            entry.replace(None);
        }
    }
}
