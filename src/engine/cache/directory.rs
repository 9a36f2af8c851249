//! One worker's direct-mapped directory of slice bodies.
//!
//! Slot `(offset / slice_size) % slots`; a hit is one compare with the slot's *tag*. What a slot
//! conflict displaces goes to the put table. A pin is a count in one of a few *cells*, picked by
//! the slot, so that the ticket is a cell's number and nothing is searched for a put.
//!
//! The threads that evict see the tags and the cells. The directory is registered with the store's
//! [`Directories`]; who changes a body's marks announces it in the tag of its slot in each directory
//! ([`Tag`]), who asks for its pins goes to the cell. So a hit needs no look at the body: it loads a
//! tag, the place of the entries and the entry; the latter two are what an array of arrays loads.
//! Eight tags share a cache line, four places do. `benches/cache.rs` measures it beside such an array.
//!
//! Invariant: the tags, the entries and the bodies are equally many, a power of two, and of one slot
//! belong together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::SliceKey;
use super::put_table::PutTable;
use super::slice::SliceBody;
use super::tag::Tag;
use crate::engine::error::lock;
use crate::engine::sync::Mutex;
use crate::format::l2::L2Entry;

/// Cells of a worker: more than requests that are suspended at one time, and few enough to leave the
/// processor's first cache (32 KiB and up) to tags and entries.
const CELLS: usize = 1024;
/// A cell counts here who holds a slice of its slots now ...
const PIN: u64 = 1;
/// ... and above how often one was got to be held.
const PINNED_HIT: u64 = 1 << 24;

/// Cache counters of one worker: written by it, read by anybody.
#[derive(Debug)]
#[repr(align(128))]
pub struct CacheCounters {
    /// Hits that pinned nothing.
    hits: AtomicU64,
    misses: AtomicU64,
    put_table_hits: AtomicU64,
    /// Pins by suspended requests of the worker, and hits that pinned, by slot. A slot's pins hold the
    /// slice that is there, the ones that it displaced, and those of the other slots with its cell.
    cells: [AtomicU64; CELLS],
}

impl Default for CacheCounters {
    fn default() -> Self {
        Self {
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            put_table_hits: AtomicU64::new(0),
            cells: [const { AtomicU64::new(0) }; CELLS],
        }
    }
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
        let pinned = |cell: &AtomicU64| cell.load(Ordering::Relaxed) / PINNED_HIT;
        let pinned_hits = self.cells.iter().map(pinned).sum::<u64>();
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed) + pinned_hits,
            misses: self.misses.load(Ordering::Relaxed),
            put_table_hits: self.put_table_hits.load(Ordering::Relaxed),
        }
    }

    #[inline]
    fn cell(&self, ticket: &Ticket) -> &AtomicU64 {
        &self.cells[ticket.0 % CELLS]
    }
}

/// Adds to a counter that only this thread writes: no locked instruction.
#[inline]
fn bump(counter: &AtomicU64, by: u64) {
    let before = counter.load(Ordering::Relaxed);
    counter.store(before.wrapping_add(by), Ordering::Release);
}

/// The part of a directory that other threads see.
#[derive(Debug)]
struct Sibling {
    tags: Weak<[Tag]>,
    counters: Weak<CacheCounters>,
}

/// All directories over one store.
#[derive(Debug, Default)]
pub struct Directories(Mutex<Vec<Sibling>>);

impl Directories {
    fn add(&self, tags: &Arc<[Tag]>, counters: &Arc<CacheCounters>) {
        let mut all = lock(&self.0);
        all.retain(|other| other.tags.strong_count() > 0);
        all.push(Sibling {
            tags: Arc::downgrade(tags),
            counters: Arc::downgrade(counters),
        });
    }

    /// Makes every directory that has the body look at its marks again. Call it after they changed.
    pub(super) fn announce(&self, body: &SliceBody) {
        for tags in lock(&self.0).iter().filter_map(|each| each.tags.upgrade()) {
            tags[slot_of(body, tags.len())].announce();
        }
    }

    /// Says whether some worker has pinned the body, or a slice with the same cell.
    ///
    /// A pin that is being made may be missed: nothing on the worker's side waits for its store. So
    /// ask with the slice lock held: who has pinned a slice and then taken its lock finds the body
    /// retired, or is seen here.
    pub(super) fn is_pinned(&self, body: &SliceBody) -> bool {
        lock(&self.0).iter().any(|each| {
            let (Some(tags), Some(counters)) = (each.tags.upgrade(), each.counters.upgrade())
            else {
                // Its worker is gone.
                return false;
            };
            let cell = counters.cell(&Ticket::of(slot_of(body, tags.len())));
            !cell.load(Ordering::Acquire).is_multiple_of(PINNED_HIT)
        })
    }
}

/// Which slot a slice has in a directory of `mask + 1` slots.
#[inline]
fn slot(key: SliceKey, slice_bits: u32, mask: usize) -> usize {
    usize::try_from(key.get() >> slice_bits).unwrap_or(0) & mask
}

fn slot_of(body: &SliceBody, slots: usize) -> usize {
    slot(body.key(), body.slice_bits(), slots - 1)
}

/// A slice that a directory has found.
#[derive(Debug)]
pub struct CachedSlice<'a> {
    entries: &'a [AtomicU64],
    bodies: &'a [Arc<SliceBody>],
    /// The slot.
    index: usize,
    is_suspicious: bool,
}

impl<'a> CachedSlice<'a> {
    /// The body, to keep it. Only this looks at it.
    ///
    /// # Panics
    /// Never: each slot has a body.
    #[must_use]
    #[inline]
    pub fn body(&self) -> &'a Arc<SliceBody> {
        &self.bodies[self.index]
    }

    /// The body's [`SliceBody::is_suspicious`], without a look at the body.
    #[must_use]
    #[inline]
    pub(crate) fn is_suspicious(&self) -> bool {
        self.is_suspicious
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
        // Not by `[index]`, which fetches the length for its message.
        match self.entries.get(index) {
            Some(entry) => L2Entry(entry.load(Ordering::Acquire)),
            None => no_such_entry(index),
        }
    }
}

#[cold]
#[inline(never)]
fn no_such_entry(index: usize) -> ! {
    panic!("a slice has no entry {index}");
}

/// Where a pin is counted. Give it back to the [`Directory`] that made it.
#[derive(Debug)]
#[must_use = "without it the slice stays pinned"]
pub struct Ticket(usize);

impl Ticket {
    /// That of a slot.
    #[inline]
    fn of(index: usize) -> Self {
        Self(index % CELLS)
    }
}

/// A worker's direct-mapped cache of slice bodies with its put table.
#[derive(Debug)]
pub struct Directory {
    tags: Arc<[Tag]>,
    /// Of each slot's slice.
    entries: Box<[Arc<[AtomicU64]>]>,
    counters: Arc<CacheCounters>,
    rest: Box<Rest>,
}

/// What a hit does not need. In memory of its own, and what changes it gets the other parts of the
/// directory one by one: so the compiler sees that a lookup moves none of them, and a run of lookups
/// need not fetch their addresses each time.
#[derive(Debug)]
struct Rest {
    /// Of each slot.
    bodies: Box<[Arc<SliceBody>]>,
    /// What vacant slots have.
    nobody: Arc<SliceBody>,
    put_table: PutTable,
}

/// What a directory has for one slot, but for the [`Rest`].
struct Slot<'a> {
    index: usize,
    tag: &'a Tag,
    entries: &'a mut Arc<[AtomicU64]>,
}

impl Directory {
    /// What counts its lookups.
    #[must_use]
    pub fn counters(&self) -> &Arc<CacheCounters> {
        &self.counters
    }

    /// A directory of at least `slots` slots (rounded up to a power of two). `siblings` are the
    /// directories over the same store; it learns from them what is evicted. `counters` are its own.
    #[must_use]
    pub fn new(slots: usize, counters: Arc<CacheCounters>, siblings: &Directories) -> Self {
        let count = slots.max(16).next_power_of_two();
        let tags = (0..count).map(|_| Tag::vacant()).collect();
        siblings.add(&tags, &counters);
        let nobody = Arc::new(SliceBody::nobody());
        Self {
            tags,
            entries: vec![nobody.shared_entries(); count].into(),
            counters,
            rest: Box::new(Rest {
                bodies: vec![Arc::clone(&nobody); count].into(),
                nobody,
                put_table: PutTable::default(),
            }),
        }
    }

    /// The live body of `key`, if this worker has it. No lock, no shared write.
    #[inline]
    pub fn get(&mut self, key: SliceKey, slice_bits: u32) -> Option<CachedSlice<'_>> {
        let index = self.index_of(key, slice_bits)?;
        let mut is_suspicious = false;
        if self.is_hit(key, index) {
            bump(&self.counters.hits, 1);
        } else {
            is_suspicious = self.look_closer(key, index, 0)?;
        }
        self.found(index, is_suspicious)
    }

    /// [Gets](Self::get) a slice and pins it for a request that may suspend: it stays in the store
    /// until the ticket is [put](Self::put).
    #[inline]
    pub fn get_pinned(
        &mut self,
        key: SliceKey,
        slice_bits: u32,
    ) -> Option<(CachedSlice<'_>, Ticket)> {
        let index = self.index_of(key, slice_bits)?;
        let ticket = Ticket::of(index);
        let mut is_suspicious = false;
        if self.is_hit(key, index) {
            bump(self.counters.cell(&ticket), PINNED_HIT | PIN);
        } else {
            is_suspicious = self.look_closer(key, index, PIN)?;
        }
        Some((self.found(index, is_suspicious)?, ticket))
    }

    /// The slot of a slice.
    #[inline]
    fn index_of(&self, key: SliceKey, slice_bits: u32) -> Option<usize> {
        // Asked here, before anything is looked at, a run of lookups finds it out once, and nothing that
        // follows has bounds to check. `benches/cache.rs` shows when the compiler no longer sees that.
        if self.tags.is_empty() || self.entries.len() != self.tags.len() {
            return None;
        }
        Some(slot(key, slice_bits, self.tags.len() - 1))
    }

    /// Whether the first look finds the slice: it is in its slot, and nothing has happened to it.
    #[inline]
    fn is_hit(&self, key: SliceKey, index: usize) -> bool {
        matches!(self.tags.get(index), Some(tag) if tag.is(key.get()))
    }

    #[inline]
    fn found(&self, index: usize, is_suspicious: bool) -> Option<CachedSlice<'_>> {
        Some(CachedSlice {
            entries: self.entries.get(index)?,
            bodies: &self.rest.bodies,
            index,
            is_suspicious,
        })
    }

    /// What a lookup does when the first look fails. Says whether the slice is suspicious, if it is
    /// there now, and then counts so many pins of it.
    #[inline]
    fn look_closer(&mut self, key: SliceKey, index: usize, pins: u64) -> Option<bool> {
        let mut slot = Slot {
            index,
            tag: self.tags.get(index)?,
            entries: self.entries.get_mut(index)?,
        };
        self.rest.look_closer(key, &mut slot, &self.counters, pins)
    }

    /// Puts a body into its slot; what was there moves to the put table.
    pub fn install(&mut self, body: Arc<SliceBody>, slice_bits: u32) {
        debug_assert_eq!(body.slice_bits(), slice_bits, "a slice of another size");
        let index = slot_of(&body, self.tags.len());
        let mut slot = Slot {
            index,
            tag: &self.tags[index],
            entries: &mut self.entries[index],
        };
        self.rest.fill(body, &mut slot);
    }

    /// Pins a body for a request that is about to suspend: it stays in the store until the ticket
    /// is [put](Self::put).
    pub fn pin(&mut self, body: &SliceBody) -> Ticket {
        let ticket = Ticket::of(slot_of(body, self.tags.len()));
        bump(self.counters.cell(&ticket), PIN);
        ticket
    }

    /// Gives a pin back, without a search.
    #[inline]
    pub fn put(&mut self, ticket: &Ticket) {
        bump(self.counters.cell(ticket), PIN.wrapping_neg());
    }
}

impl Rest {
    /// The slice is not there, or suspicious, or its marks may have changed.
    #[cold]
    #[inline(never)]
    fn look_closer(
        &mut self,
        key: SliceKey,
        slot: &mut Slot<'_>,
        counters: &CacheCounters,
        pins: u64,
    ) -> Option<bool> {
        let index = slot.index;
        let mut is_here = false;
        if slot.tag.names(key.get()) {
            is_here = slot.tag.refresh(|| self.bodies[index].visit_live());
            if !is_here {
                *slot.entries = self.nobody.shared_entries();
                self.bodies[index] = Arc::clone(&self.nobody);
            }
        }
        if is_here {
            bump(&counters.hits, 1);
        } else if let Some(body) = self.put_table.take(key) {
            bump(&counters.put_table_hits, 1);
            self.fill(body, slot);
        } else {
            bump(&counters.misses, 1);
            return None;
        }
        bump(counters.cell(&Ticket::of(index)), pins);
        Some(self.bodies[index].is_suspicious())
    }

    /// Fills a slot; what was there moves to the put table.
    fn fill(&mut self, body: Arc<SliceBody>, slot: &mut Slot<'_>) {
        let key = body.key().get();
        slot.tag
            .fill(key, body.is_suspicious(), || body.visit_live());
        *slot.entries = body.shared_entries();
        let displaced = std::mem::replace(&mut self.bodies[slot.index], body);
        // Nobody is retired.
        if !displaced.is_retired() {
            self.put_table.remember(displaced);
        }
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
    fn a_hit_that_pins_is_counted_once_and_its_put_not_at_all() {
        let mut rig = Rig::new(16);
        let slice = rig.installed(0x1000);
        let (found, first) = rig.directory.get_pinned(slice.key(), BITS).expect("a hit");
        assert!(Arc::ptr_eq(found.body(), &slice));
        let (_, second) = rig.directory.get_pinned(slice.key(), BITS).expect("a hit");
        rig.directory.put(&first);
        assert!(rig.store.directories().is_pinned(&slice));
        rig.directory.put(&second);
        assert!(!rig.store.directories().is_pinned(&slice));
        assert!(rig.has(&slice));
        let stats = rig.counters.stats();
        assert_eq!((stats.hits, stats.misses), (3, 0));
    }

    #[test]
    fn a_pin_of_one_slot_holds_another_of_the_same_cell_only() {
        let store = Store::new(16);
        let mut directory = Directory::new(4 * CELLS, Arc::default(), store.directories());
        let slice = |number: usize| body((number as u64) << BITS, false);
        let ticket = directory.pin(&slice(7));
        let is_pinned = |number| store.directories().is_pinned(&slice(number));
        assert!(is_pinned(7) && is_pinned(7 + CELLS));
        assert!(!is_pinned(6) && !is_pinned(8 + CELLS));
        directory.put(&ticket);
        assert!(!is_pinned(7));
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
