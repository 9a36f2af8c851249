//! One worker's direct-mapped directory of slice bodies.
//!
//! Slot `(offset / slice_size) % slots`; a hit is one compare and a look at the body's marks. What
//! a slot conflict displaces goes to the put table. The directory is owned by one thread; nothing
//! in it is shared but the bodies.
//!
//! A slot holds the key and the place of the entries beside the body. So a hit depends on two loads
//! in a row, the slot and the entry; the body's marks are loaded meanwhile and only confirm it.
//! `benches/cache.rs` measures this beside an array of arrays, which has the same two loads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SliceKey;
use super::put_table::{PutTable, Ticket};
use super::slice::SliceBody;
use crate::format::l2::L2Entry;

/// Cache counters of one worker: written by it, read by anybody.
#[derive(Debug, Default)]
pub struct CacheCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    put_table_hits: AtomicU64,
}

/// A reading of [`CacheCounters`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheStats {
    /// Lookups that the directory answered.
    pub hits: u64,
    /// Lookups that neither the directory nor the put table answered.
    pub misses: u64,
    /// Lookups that the put table answered.
    pub put_table_hits: u64,
}

impl CacheCounters {
    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            put_table_hits: self.put_table_hits.load(Ordering::Relaxed),
        }
    }
}

/// Adds one to a counter that only this thread writes.
#[inline]
fn bump(counter: &AtomicU64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(1),
        Ordering::Relaxed,
    );
}

/// A slice that a directory has found: the body, and a short way to its entries.
#[derive(Debug)]
#[repr(align(32))]
pub struct CachedSlice {
    /// The body's.
    key: SliceKey,
    body: Arc<SliceBody>,
    /// The body's.
    entries: Arc<[AtomicU64]>,
}

// Two to a cache line, and none across two, also as a slot.
const _: () = assert!(size_of::<Option<CachedSlice>>() == 32);

impl CachedSlice {
    fn new(body: Arc<SliceBody>) -> Self {
        Self {
            key: body.key(),
            entries: body.shared_entries(),
            body,
        }
    }

    /// The body, to keep it.
    #[must_use]
    #[inline]
    pub fn body(&self) -> &Arc<SliceBody> {
        &self.body
    }

    /// How many entries the slice has: a power of two.
    #[must_use]
    #[inline]
    pub fn entry_count(&self) -> usize {
        self.entries.len()
    }

    /// The entry at `index`.
    ///
    /// # Panics
    /// When the slice has no such entry.
    #[must_use]
    #[inline]
    pub fn entry(&self, index: usize) -> L2Entry {
        L2Entry(self.entries[index].load(Ordering::Acquire))
    }
}

/// Fills a slot; what was there moves to the put table.
fn fill(slot: &mut Option<CachedSlice>, body: Arc<SliceBody>, put_table: &mut PutTable) {
    if let Some(displaced) = slot.replace(CachedSlice::new(body))
        && !displaced.body.is_retired()
    {
        put_table.remember(&displaced.body);
    }
}

/// Fills the slot of `key` from the put table, if the slice is there.
#[cold]
fn bring_back(
    slot: &mut Option<CachedSlice>,
    key: SliceKey,
    put_table: &mut PutTable,
    counters: &CacheCounters,
) -> Option<()> {
    let Some(body) = put_table.get(key) else {
        bump(&counters.misses);
        return None;
    };
    bump(&counters.put_table_hits);
    body.visit();
    fill(slot, body, put_table);
    Some(())
}

/// A worker's direct-mapped cache of slice bodies with its put table.
#[derive(Debug)]
pub struct Directory {
    slots: Vec<Option<CachedSlice>>,
    mask: usize,
    put_table: PutTable,
    counters: Arc<CacheCounters>,
}

impl Directory {
    /// What counts its lookups.
    #[must_use]
    pub fn counters(&self) -> &Arc<CacheCounters> {
        &self.counters
    }

    /// A directory of at least `slots` slots (rounded up to a power of two).
    #[must_use]
    pub fn new(slots: usize, counters: Arc<CacheCounters>) -> Self {
        let count = slots.max(16).next_power_of_two();
        let mut table = Vec::new();
        table.resize_with(count, || None);
        Self {
            slots: table,
            mask: count - 1,
            put_table: PutTable::default(),
            counters,
        }
    }

    #[inline]
    fn slot(&self, key: SliceKey, slice_bits: u32) -> usize {
        // The layer's bits lie above any realistic slot count: mix them in.
        let number = (key.get() >> slice_bits) ^ (key.get() >> 53);
        usize::try_from(number).unwrap_or(0) & self.mask
    }

    /// The live body of `key`, if this worker has it. No lock, no shared write.
    #[inline]
    pub fn get(&mut self, key: SliceKey, slice_bits: u32) -> Option<&CachedSlice> {
        let index = self.slot(key, slice_bits);
        let slot = self.slots.get_mut(index)?;
        if matches!(slot, Some(found) if found.key == key && found.body.visit_live()) {
            bump(&self.counters.hits);
        } else {
            bring_back(slot, key, &mut self.put_table, &self.counters)?;
        }
        slot.as_ref()
    }

    /// Puts a body into its slot; what was there moves to the put table.
    pub fn install(&mut self, body: Arc<SliceBody>, slice_bits: u32) {
        let index = self.slot(body.key(), slice_bits);
        fill(&mut self.slots[index], body, &mut self.put_table);
    }

    /// Pins a body for a request that is about to suspend: it stays in the store until the ticket
    /// is [put](Self::put).
    pub fn pin(&mut self, body: &Arc<SliceBody>) -> Ticket {
        self.put_table.pin(body)
    }

    /// Gives a pin back, without a search.
    pub fn put(&mut self, ticket: &Ticket) {
        self.put_table.put(ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::super::put_table::PUT_TABLE_ENTRIES;
    use super::*;
    use crate::units::HostOffset;

    fn body(host_offset: u64) -> Arc<SliceBody> {
        let entries = (0..512).map(|_| AtomicU64::new(0)).collect();
        Arc::new(SliceBody::new(
            SliceKey::new(0, HostOffset::new(host_offset)),
            entries,
            false,
        ))
    }

    #[test]
    fn a_displaced_slice_is_found_in_the_put_table() {
        let counters = Arc::new(CacheCounters::default());
        let mut directory = Directory::new(16, Arc::clone(&counters));
        let (first, second) = (body(0x1_0000), body(0x1_0000 + 16 * 4096));
        directory.install(Arc::clone(&first), 12);
        directory.install(Arc::clone(&second), 12);
        assert!(directory.get(second.key(), 12).is_some());
        assert!(
            directory
                .get(first.key(), 12)
                .is_some_and(|found| Arc::ptr_eq(found.body(), &first))
        );
        assert_eq!(
            counters.stats(),
            CacheStats {
                hits: 1,
                misses: 0,
                put_table_hits: 1
            }
        );
    }

    #[test]
    fn a_retired_slice_is_a_miss_in_both_places() {
        let mut directory = Directory::new(16, Arc::new(CacheCounters::default()));
        let (first, second) = (body(0x1_0000), body(0x1_0000 + 16 * 4096));
        directory.install(Arc::clone(&first), 12);
        directory.install(Arc::clone(&second), 12);
        first.retire();
        second.retire();
        assert!(directory.get(first.key(), 12).is_none());
        assert!(directory.get(second.key(), 12).is_none());
    }

    #[test]
    fn a_hit_shows_the_entries_of_the_body_and_marks_it_as_used() {
        let mut directory = Directory::new(16, Arc::new(CacheCounters::default()));
        let slice = body(0x1_0000);
        directory.install(Arc::clone(&slice), 12);
        assert!(slice.unvisit());
        assert!(!slice.unvisit());
        slice.set_entry_locked(&mut slice.lock(), 7, L2Entry(42));
        let found = directory.get(slice.key(), 12).expect("a hit");
        assert_eq!((found.entry(7), found.entry_count()), (L2Entry(42), 512));
        assert!(slice.unvisit());
    }

    #[test]
    fn a_pinned_slice_is_not_retired_by_eviction() {
        let mut directory = Directory::new(16, Arc::new(CacheCounters::default()));
        let slices: Vec<_> = (0..200).map(|n| body(n * 4096)).collect();
        let tickets: Vec<_> = slices.iter().map(|slice| directory.pin(slice)).collect();
        assert!(slices.iter().all(|slice| !slice.try_retire()));
        let again = directory.pin(&slices[3]);
        for ticket in &tickets {
            directory.put(ticket);
        }
        assert!(!slices[3].try_retire());
        directory.put(&again);
        // The table keeps what it remembers, and gives it back with the worker.
        let kept = slices.iter().filter(|slice| !slice.try_retire()).count();
        assert!(kept <= PUT_TABLE_ENTRIES);
        drop(directory);
        assert!(
            slices
                .iter()
                .all(|slice| slice.is_retired() || slice.try_retire())
        );
    }
}
