//! One worker's direct-mapped directory of slice bodies.
//!
//! Slot `(offset / slice_size) % slots`; a hit is one compare and a look at the slot's [`Flags`].
//! What a slot conflict displaces goes to the put table. A pin is a count beside the slot, so that
//! the ticket is the slot's number and nothing is searched for a put.
//!
//! What is shared with the threads that evict is [`Flags`] alone. The directory is registered with
//! the store's [`Directories`]; who changes a body's marks or asks for its pins goes to the flags
//! of its slot in each directory. So a hit needs no look at the body, whose cache line would be
//! a third to miss: it loads the slot and the entry, as an array of arrays does, and the flags,
//! which lie close together. `benches/cache.rs` measures it beside such an array.
//!
//! Invariants: the slots and the flags are equally many, a power of two. While a slot's `stale` is
//! down, its body has had [`SliceBody::visit_live`] say yes after the last change of its marks.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::SliceKey;
use super::put_table::PutTable;
use super::slice::SliceBody;
use crate::engine::error::lock;
use crate::engine::sync::Mutex;
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

/// What a slot shows to the threads that evict.
#[derive(Debug, Default)]
struct Flags {
    /// Suspended requests of this worker that hold a slice of this slot, be it the one that is there
    /// now or one that it displaced. Only the worker writes it.
    pins: AtomicU32,
    /// The marks of a body that belongs here may have changed: ask the body.
    stale: AtomicBool,
}

impl Flags {
    // Only one thread writes the count, so neither of these takes a locked instruction.

    #[inline]
    fn count_pin(&self) {
        let pins = self.pins.load(Ordering::Relaxed);
        self.pins.store(pins + 1, Ordering::Release);
    }

    #[inline]
    fn count_put(&self) {
        let pins = self.pins.load(Ordering::Relaxed);
        self.pins.store(pins - 1, Ordering::Release);
    }
}

/// The flags of all directories over one store.
#[derive(Debug, Default)]
pub struct Directories(Mutex<Vec<Weak<[Flags]>>>);

impl Directories {
    fn add(&self, flags: &Arc<[Flags]>) {
        let mut all = lock(&self.0);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(flags));
    }

    /// Asks the flags of the body's slot in each directory until one says yes.
    fn any(&self, body: &SliceBody, ask: impl Fn(&Flags) -> bool) -> bool {
        lock(&self.0)
            .iter()
            .filter_map(Weak::upgrade)
            .any(|flags| ask(&flags[slot(body.key(), body.slice_bits(), flags.len() - 1)]))
    }

    /// Makes every directory that has the body look at its marks again. Call it after they changed.
    pub(super) fn announce(&self, body: &SliceBody) {
        self.any(body, |flags| {
            flags.stale.store(true, Ordering::Release);
            false
        });
    }

    /// Says whether some worker has pinned the body, or a slice with the same slot.
    ///
    /// A pin that is being made may be missed: nothing on the worker's side waits for its store. So
    /// ask with the slice lock held: who has pinned a slice and then taken its lock finds the body
    /// retired, or is seen here.
    pub(super) fn is_pinned(&self, body: &SliceBody) -> bool {
        self.any(body, |flags| flags.pins.load(Ordering::Acquire) > 0)
    }
}

/// Which slot a slice has in a directory of `mask + 1` slots.
#[inline]
fn slot(key: SliceKey, slice_bits: u32, mask: usize) -> usize {
    // The layer's bits lie above any realistic slot count: mix them in.
    let number = (key.get() >> slice_bits) ^ (key.get() >> 53);
    usize::try_from(number).unwrap_or(0) & mask
}

/// A slice that a directory has found: the body, and a short way to its entries.
#[derive(Debug)]
#[repr(align(32))]
pub struct CachedSlice {
    /// The body's key, with [`SUSPICIOUS`] in it if the body is.
    tag: u64,
    body: Arc<SliceBody>,
    /// The body's.
    entries: Arc<[AtomicU64]>,
}

/// In a tag. A slice's offset is even, so a suspicious one matches no key at the first look.
const SUSPICIOUS: u64 = 1;

// Two to a cache line, and none across two, also as a slot.
const _: () = assert!(size_of::<Option<CachedSlice>>() == 32);

impl CachedSlice {
    fn new(body: Arc<SliceBody>) -> Self {
        let key = body.key().get();
        debug_assert_eq!(key & SUSPICIOUS, 0, "slice {key:#x} has an odd offset");
        Self {
            tag: if body.is_suspicious() {
                key | SUSPICIOUS
            } else {
                key
            },
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

    /// The body's [`SliceBody::is_suspicious`], without a look at the body.
    #[must_use]
    #[inline]
    pub(crate) fn is_suspicious(&self) -> bool {
        self.tag & SUSPICIOUS != 0
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

/// Where a pin is counted. Give it back to the [`Directory`] that made it.
#[derive(Debug)]
#[must_use = "without it the slice stays pinned"]
pub struct Ticket(usize);

/// A worker's direct-mapped cache of slice bodies with its put table.
#[derive(Debug)]
pub struct Directory {
    slots: Box<[Option<CachedSlice>]>,
    /// One for each slot.
    flags: Arc<[Flags]>,
    /// The number of slots, less 1.
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

    /// A directory of at least `slots` slots (rounded up to a power of two). `siblings` are the
    /// directories over the same store; it learns from them what is evicted.
    #[must_use]
    pub fn new(slots: usize, counters: Arc<CacheCounters>, siblings: &Directories) -> Self {
        let count = slots.max(16).next_power_of_two();
        let flags = (0..count).map(|_| Flags::default()).collect();
        siblings.add(&flags);
        Self {
            slots: (0..count).map(|_| None).collect(),
            flags,
            mask: count - 1,
            put_table: PutTable::default(),
            counters,
        }
    }

    // What follows up to `look_closer` is written so that a hit loads each field once: all that it
    // needs of the directory is fetched before it writes its counter.

    /// The live body of `key`, if this worker has it. No lock, no shared write.
    #[inline]
    pub fn get(&mut self, key: SliceKey, slice_bits: u32) -> Option<&CachedSlice> {
        let index = slot(key, slice_bits, self.mask);
        if !self.is_hit(key, index) {
            return self.look_closer(key, index);
        }
        let found = self.slots.get(index)?.as_ref();
        bump(&self.counters.hits);
        found
    }

    /// [Gets](Self::get) a slice and pins it for a request that may suspend: it stays in the store
    /// until the ticket is [put](Self::put).
    #[inline]
    pub fn get_pinned(&mut self, key: SliceKey, slice_bits: u32) -> Option<(&CachedSlice, Ticket)> {
        let index = slot(key, slice_bits, self.mask);
        if !self.is_hit(key, index) {
            return self.look_closer_and_pin(key, index);
        }
        let found = self.slots.get(index)?.as_ref()?;
        let flags = self.flags.get(index)?;
        bump(&self.counters.hits);
        flags.count_pin();
        Some((found, Ticket(index)))
    }

    /// Whether the first look finds the slice: it is in its slot, and nothing has happened to it.
    #[inline]
    fn is_hit(&self, key: SliceKey, index: usize) -> bool {
        let is_fresh = matches!(
            self.flags.get(index),
            Some(flags) if !flags.stale.load(Ordering::Acquire)
        );
        is_fresh && matches!(self.slots.get(index), Some(Some(found)) if found.tag == key.get())
    }

    /// What [`get`](Self::get) does else: the slice is not there, or suspicious, or its marks may
    /// have changed.
    #[cold]
    #[inline(never)]
    fn look_closer(&mut self, key: SliceKey, index: usize) -> Option<&CachedSlice> {
        let mut is_here = false;
        if let Some(found) = &self.slots[index]
            && found.tag & !SUSPICIOUS == key.get()
        {
            // Taken down before the look at the marks: a change after that puts it up again.
            self.flags[index].stale.swap(false, Ordering::AcqRel);
            is_here = found.body.visit_live();
            if !is_here {
                self.slots[index] = None;
            }
        }
        if is_here {
            bump(&self.counters.hits);
        } else if let Some(body) = self.put_table.take(key) {
            bump(&self.counters.put_table_hits);
            self.fill(body, index);
        } else {
            bump(&self.counters.misses);
            return None;
        }
        self.slots[index].as_ref()
    }

    #[cold]
    #[inline(never)]
    fn look_closer_and_pin(
        &mut self,
        key: SliceKey,
        index: usize,
    ) -> Option<(&CachedSlice, Ticket)> {
        self.look_closer(key, index)?;
        self.flags[index].count_pin();
        Some((self.slots[index].as_ref()?, Ticket(index)))
    }

    /// Fills a slot; what was there moves to the put table.
    fn fill(&mut self, body: Arc<SliceBody>, index: usize) {
        // In the same order as in `look_closer`. A body that is retired by now is left to it.
        let stale = &self.flags[index].stale;
        stale.swap(false, Ordering::AcqRel);
        if !body.visit_live() {
            stale.store(true, Ordering::Release);
        }
        if let Some(displaced) = self.slots[index].replace(CachedSlice::new(body))
            && !displaced.body.is_retired()
        {
            self.put_table.remember(displaced.body);
        }
    }

    /// Puts a body into its slot; what was there moves to the put table.
    pub fn install(&mut self, body: Arc<SliceBody>, slice_bits: u32) {
        debug_assert_eq!(body.slice_bits(), slice_bits, "a slice of another size");
        let index = slot(body.key(), slice_bits, self.mask);
        self.fill(body, index);
    }

    /// Pins a body for a request that is about to suspend: it stays in the store until the ticket
    /// is [put](Self::put).
    pub fn pin(&mut self, body: &SliceBody) -> Ticket {
        let index = slot(body.key(), body.slice_bits(), self.mask);
        self.flags[index].count_pin();
        Ticket(index)
    }

    /// Gives a pin back, without a search.
    #[inline]
    pub fn put(&mut self, ticket: &Ticket) {
        self.flags[ticket.0].count_put();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cache::store::{Lookup, Store};
    use crate::units::HostOffset;

    const BITS: u32 = 12;

    fn body(host_offset: u64, suspicious: bool) -> Arc<SliceBody> {
        let entries = (0..512).map(|_| AtomicU64::new(0)).collect();
        let key = SliceKey::new(0, HostOffset::new(host_offset));
        Arc::new(SliceBody::new(key, entries, suspicious))
    }

    /// A store with one worker's directory of 16 slots.
    struct Rig {
        store: Arc<Store>,
        directory: Directory,
        counters: Arc<CacheCounters>,
    }

    impl Rig {
        /// The store has room for so many bodies, 16 at least.
        fn new(bodies_max: usize) -> Self {
            let store = Store::new(bodies_max);
            let counters = Arc::new(CacheCounters::default());
            let directory = Directory::new(16, Arc::clone(&counters), store.directories());
            Self {
                store,
                directory,
                counters,
            }
        }

        /// A slice that the store has.
        fn stored(&self, host_offset: u64) -> Arc<SliceBody> {
            let body = body(host_offset, false);
            self.store.insert_new(Arc::clone(&body));
            body
        }

        /// One that the directory has got, too.
        fn installed(&mut self, host_offset: u64) -> Arc<SliceBody> {
            let body = self.stored(host_offset);
            self.directory.install(Arc::clone(&body), BITS);
            body
        }

        fn has(&mut self, body: &Arc<SliceBody>) -> bool {
            self.directory
                .get(body.key(), BITS)
                .is_some_and(|found| Arc::ptr_eq(found.body(), body))
        }

        /// Lets the store's hand pass over everything it has, several times.
        fn crowd(&self) {
            for n in 0..200 {
                let number = 1_000 + n;
                self.stored(number << BITS);
            }
        }
    }

    #[test]
    fn a_displaced_slice_is_found_in_the_put_table() {
        let mut rig = Rig::new(100);
        let (first, second) = (rig.installed(0x1_0000), rig.installed(0x1_0000 + 16 * 4096));
        assert!(rig.has(&second) && rig.has(&first) && rig.has(&second));
        assert_eq!(
            rig.counters.stats(),
            CacheStats {
                hits: 1,
                misses: 0,
                put_table_hits: 2
            }
        );
    }

    #[test]
    fn a_retired_slice_is_a_miss_in_both_places() {
        let mut rig = Rig::new(100);
        let (first, second) = (rig.installed(0x1_0000), rig.installed(0x1_0000 + 16 * 4096));
        // Now the directory trusts the flags of the slot.
        assert!(rig.has(&second));
        rig.store.retire(first.key());
        rig.store.retire(second.key());
        assert!(rig.directory.get(first.key(), BITS).is_none());
        assert!(rig.directory.get(second.key(), BITS).is_none());
        assert_eq!(rig.counters.stats().misses, 2);
    }

    #[test]
    fn a_slice_that_is_retired_on_its_way_into_the_slot_is_a_miss() {
        let mut rig = Rig::new(100);
        let neighbour = rig.installed(0x1_0000);
        let slice = rig.stored(0x1_0000 + 16 * 4096);
        rig.store.retire(slice.key());
        // The same slot: this lookup takes down the flag that the retirement put up.
        assert!(rig.has(&neighbour));
        rig.directory.install(Arc::clone(&slice), BITS);
        assert!(rig.directory.get(slice.key(), BITS).is_none());
    }

    #[test]
    fn each_directory_learns_of_a_retirement() {
        let mut rig = Rig::new(100);
        let siblings = rig.store.directories();
        let mut other = Directory::new(1024, Arc::default(), siblings);
        drop(Directory::new(64, Arc::default(), siblings));
        let slice = rig.installed(0x12_3000);
        other.install(Arc::clone(&slice), BITS);
        assert!(rig.has(&slice) && other.get(slice.key(), BITS).is_some());
        rig.store.retire(slice.key());
        assert!(!rig.has(&slice) && other.get(slice.key(), BITS).is_none());
    }

    #[test]
    fn a_hit_shows_the_entries_of_the_body() {
        let mut rig = Rig::new(100);
        let slice = rig.installed(0x1_0000);
        slice.set_entry_locked(&mut slice.lock(), 7, L2Entry(42));
        let found = rig.directory.get(slice.key(), BITS).expect("a hit");
        assert_eq!((found.entry(7), found.entry_count()), (L2Entry(42), 512));
        assert!(!found.is_suspicious());
    }

    #[test]
    fn a_suspicious_slice_is_found_and_says_so() {
        let mut rig = Rig::new(100);
        let slice = body(0x1_0000, true);
        rig.directory.install(Arc::clone(&slice), BITS);
        for _ in 0..2 {
            let found = rig.directory.get(slice.key(), BITS).expect("a hit");
            assert!(found.is_suspicious() && Arc::ptr_eq(found.body(), &slice));
        }
        assert_eq!(rig.counters.stats().hits, 2);
    }

    #[test]
    fn a_slice_in_use_outlives_the_others() {
        let mut rig = Rig::new(16);
        let (used, idle) = (rig.installed(0x1000), rig.installed(0x2000));
        for n in 0..200 {
            assert!(rig.has(&used), "evicted after {n} loads");
            rig.stored((1_000 + n) << BITS);
        }
        assert!(idle.is_retired());
        assert!(matches!(rig.store.look_up(used.key()), Lookup::Live(_)));
    }

    #[test]
    fn a_pinned_slice_is_not_evicted() {
        let mut rig = Rig::new(16);
        // Four of each slot: most are displaced, some from the put table, too.
        let slices: Vec<_> = (0..64).map(|n| rig.installed(n << BITS)).collect();
        let tickets: Vec<_> = slices
            .iter()
            .map(|slice| match rig.directory.get_pinned(slice.key(), BITS) {
                Some((found, ticket)) => {
                    assert_eq!(found.body().key(), slice.key());
                    ticket
                }
                None => rig.directory.pin(slice),
            })
            .collect();
        let live: Vec<_> = slices.iter().filter(|slice| !slice.is_retired()).collect();
        assert!(live.len() >= 16);
        let again = rig.directory.pin(live[3]);
        rig.crowd();
        assert!(live.iter().all(|slice| !slice.is_retired()));
        for ticket in &tickets {
            rig.directory.put(ticket);
        }
        rig.crowd();
        // Those in its slot stay with it.
        assert!(!live[3].is_retired());
        assert!(live.iter().filter(|slice| !slice.is_retired()).count() <= 4);
        rig.directory.put(&again);
        rig.crowd();
        assert!(live.iter().all(|slice| slice.is_retired()));
    }

    #[test]
    fn the_pins_of_a_worker_end_with_it() {
        let mut rig = Rig::new(16);
        let slice = rig.installed(0x1000);
        let _ticket = rig.directory.pin(&slice);
        let Rig {
            store, directory, ..
        } = rig;
        drop(directory);
        for n in 0..200 {
            store.insert_new(body((1_000 + n) << BITS, false));
        }
        assert!(slice.is_retired());
    }
}
