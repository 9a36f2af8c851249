//! Host clusters: reserve, publish, release.
//!
//! - *Reserving* takes clusters out of the free bitmaps in memory only; nothing reaches the file,
//!   so that a crash leaks nothing.
//! - *Publishing* counts a reserved cluster once, in the resident refcount block. A flush writes
//!   the block before any table entry that needs it.
//! - *Releasing* takes one reference away after the unlinking table is durable. A cluster whose
//!   count reaches zero is *quarantined* until every request that may have resolved it is done
//!   and its hole is punched; only then it is free.
//!
//! Free clusters are found through one bitmap per refcount block, built when the block is first
//! looked at; finding is constant amortised. When nothing is free the file grows in chunks, with
//! the refcount blocks for the chunk made ahead of their use.
//!
//! Invariants: a bit is set only for a cluster that is below `end`, has refcount 0, is reserved by
//! nobody, is not protected and not quarantined. `fresh_from` bounds clusters that were never
//! handed out since the file grew: they read as zeroes. Whoever takes clusters, in whatever way,
//! moves it past them.
//!
//! The counts of an image that was not closed in order are not to be trusted below `untrusted_end`
//! until a rebuild has written them (see `untrusted`).

mod background;
mod blocks;
mod contiguous;
mod free_map;
mod grow;
mod untrusted;

use std::collections::VecDeque;
use std::sync::Arc;

use event_listener::Event;
use futures_util::stream::{self, StreamExt};

use self::blocks::Blocks;
use self::free_map::FreeMaps;
use super::active::Dropped;
use super::cache::SliceKey;
use super::cache::store::Store;
use super::error::{Error, ErrorKind, lock};
use super::header_owner::HeaderOwner;
use super::order::keeps;
use super::pin::PinBoard;
use super::protected::Protected;
use crate::engine::sync::Mutex;
use crate::format::geometry::Geometry;
use crate::format::refcount;
use crate::storage::{FileId, Storage};
use crate::units::{HostOffset, to_u64};

pub(crate) use self::background::{Change, PackedRun};
pub(crate) use self::blocks::{BlockCopy, TableWrite};

/// Runs that a request frees when it needs a cluster: what is left waits for the next one, or for the
/// background.
const FREED_BY_REQUEST: usize = 16;
/// Holes that are punched at a time.
const PUNCHED_AT_ONCE: usize = 8;
/// Bytes of one hole: the host's kernel keeps all other requests to the file waiting while it frees the
/// pages of one (40 ms were seen for the L2 tables of a deleted snapshot of 2 TiB, 256 MiB).
const PUNCHED_BYTES_MAX: u64 = 4 << 20;
/// Blocks that one allocation looks through before it makes the file longer instead: what is free in
/// the others is found by later ones, and no request waits for work that grows with the image.
const SCANS_MAX: u32 = 4;

/// On a device a worker reserves at most this part of what is known to be free.
const RESERVED_SHARE: u64 = 64;

/// A run of host clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) count: u64,
    /// The clusters were never handed out since the file grew: they read as zeroes.
    pub(crate) fresh: bool,
}

impl Run {
    /// No clusters.
    pub(crate) const EMPTY: Self = Self {
        start: 0,
        count: 0,
        fresh: false,
    };
}

/// What `open` knows about the file.
#[derive(Debug)]
pub(crate) struct AllocatorParts {
    pub(crate) geometry: Geometry,
    pub(crate) file: FileId,
    pub(crate) slice_bits: u32,
    /// Raw refcount table entries.
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u32,
    /// Shared with the layer, which judges table entries by it.
    pub(crate) protected: Arc<Mutex<Protected>>,
    /// Length of the host file in bytes.
    pub(crate) file_len: u64,
    pub(crate) can_grow: bool,
    /// Punch holes for freed clusters.
    pub(crate) discard: bool,
    /// Budget for refcount blocks in bytes.
    pub(crate) cache_bytes: u64,
    /// No count of a cluster below `file_len` can be trusted.
    pub(crate) untrusted: bool,
}

/// Clusters without references that may still be in use.
#[derive(Clone, Copy, Debug)]
struct Quarantined {
    /// Pins up to here may use them.
    epoch: u64,
    start: u64,
    count: u64,
    /// L2 tables: cached slices of them go before the clusters can be reused.
    tables: bool,
}

/// References that nobody needs any more, durably.
#[derive(Debug)]
struct Due {
    run: Dropped,
    /// Pins up to here may use the clusters.
    epoch: u64,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    file: FileId,
    can_grow: bool,
    discard: bool,
    board: Arc<PinBoard>,
    header: Arc<HeaderOwner>,
    store: Arc<Store>,
    slice_bits: u32,
    /// Locked after `state`.
    protected: Arc<Mutex<Protected>>,
    state: Mutex<State>,
    /// Notified when growing ends.
    grown: Event,
    /// Held while the background work writes refcount blocks: two writes of one block have no order.
    block_writer: async_lock::Mutex<()>,
}

#[derive(Debug)]
struct State {
    blocks: Blocks,
    free: FreeMaps,
    /// Clusters below this are managed; the file is at least this long.
    end: u64,
    /// `end` at open: the file is never cut below it.
    end_at_open: u64,
    /// Clusters below this may be counted wrong: none of them is free, and references to them are
    /// not taken away but withheld. 0 where all counts are right.
    untrusted_end: u64,
    /// References that were given up while the counts could not be trusted.
    withheld: Vec<Dropped>,
    /// Where the refcount table is.
    table_offset: u64,
    table_clusters: u32,
    fresh_from: u64,
    growing: bool,
    /// References to be taken away, whose unlinking is durable: as many as a guest has discarded or
    /// overwritten.
    due: VecDeque<Due>,
    quarantine: VecDeque<Quarantined>,
    /// What the background work has freed: as much as the image is large, so that no flush deals
    /// with it.
    freed_behind: VecDeque<Quarantined>,
}

/// What must happen before a reservation can succeed.
enum Need {
    Scan(u64),
    Grow,
    WaitForGrowth(event_listener::EventListener),
}

impl Allocator {
    pub(crate) fn new(
        parts: AllocatorParts,
        board: Arc<PinBoard>,
        header: Arc<HeaderOwner>,
        store: Arc<Store>,
    ) -> Self {
        let cluster_size = parts.geometry.cluster_size();
        let mut end = parts.file_len.div_ceil(cluster_size);
        if !parts.can_grow {
            // A device does not grow: its unmanaged part is what lies past the last refcount block.
            let last = parts.table.iter().rposition(|entry| *entry != 0);
            let covered = last.map_or(0, |last| u64::try_from(last).unwrap_or(u64::MAX) + 1);
            end = (parts.file_len / cluster_size)
                .min(covered.saturating_mul(parts.geometry.refcount_block_entries()));
        }
        let blocks_max = parts.cache_bytes / cluster_size;
        Self {
            geometry: parts.geometry,
            file: parts.file,
            can_grow: parts.can_grow,
            discard: parts.discard,
            board,
            header,
            store,
            slice_bits: parts.slice_bits,
            protected: parts.protected,
            state: Mutex::new(State {
                blocks: Blocks::new(parts.geometry, parts.table, blocks_max),
                free: FreeMaps::default(),
                end,
                end_at_open: end,
                untrusted_end: if parts.untrusted { end } else { 0 },
                withheld: Vec::new(),
                table_offset: parts.table_offset,
                table_clusters: parts.table_clusters,
                fresh_from: u64::MAX,
                growing: false,
                due: VecDeque::new(),
                quarantine: VecDeque::new(),
                freed_behind: VecDeque::new(),
            }),
            grown: Event::new(),
            block_writer: async_lock::Mutex::new(()),
        }
    }

    /// The host offset of a cluster index.
    pub(crate) fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.geometry.cluster_bits())
    }

    fn block_index(&self, cluster: u64) -> u64 {
        cluster / self.geometry.refcount_block_entries()
    }

    /// Takes up to `count` contiguous free clusters, at least one; more than `need` only where there
    /// is plenty, since what one worker has reserved no other can have.
    ///
    /// # Errors
    /// `NoSpace` when the host or the device has no more, `Io`/`Corrupt` when a refcount block
    /// cannot be loaded. Nothing is taken then.
    pub(crate) async fn reserve<S: Storage>(
        &self,
        storage: &S,
        need: u64,
        count: u64,
    ) -> Result<Run, Error> {
        let mut freed_all = false;
        let mut scans_left = if self.can_grow { SCANS_MAX } else { u32::MAX };
        loop {
            let need = {
                let mut state = lock(&self.state);
                let count = if self.can_grow {
                    count
                } else {
                    count.min(state.free.count() / RESERVED_SHARE).max(need)
                };
                if let Some(run) = state.take_free(count) {
                    return Ok(run);
                }
                self.need_locked(&mut state, scans_left > 0)
            };
            match need {
                Need::Scan(block) => {
                    scans_left -= 1;
                    self.scan(storage, block).await?;
                }
                Need::WaitForGrowth(listener) => listener.await,
                Need::Grow => {
                    let ending = GrowthEnd { allocator: self };
                    // What nobody uses any more comes before growth: some of it.
                    let grown = if freed_all {
                        self.grow(storage).await
                    } else {
                        match self.free_some(storage, FREED_BY_REQUEST).await {
                            // A device has nothing else.
                            Ok(true) => {
                                freed_all = self.can_grow;
                                Ok(())
                            }
                            Ok(false) => self.grow(storage).await,
                            Err(error) => Err(error),
                        }
                    };
                    drop(ending);
                    grown?;
                }
            }
        }
    }

    /// What must happen where nothing free is known; who is to grow has the exclusive right to it.
    fn need_locked(&self, state: &mut State, may_scan: bool) -> Need {
        match state.next_scan(self.geometry.refcount_block_entries()) {
            Some(block) if may_scan => Need::Scan(block),
            _ if state.growing => Need::WaitForGrowth(self.grown.listen()),
            _ => {
                state.growing = true;
                Need::Grow
            }
        }
    }

    /// Gives reserved clusters back that were never published.
    pub(crate) fn give_back(&self, start: u64, count: u64) {
        if count > 0 {
            let entries = self.geometry.refcount_block_entries();
            lock(&self.state).free.set_free(start, count, entries);
        }
    }

    /// Counts reserved clusters once. They may be linked afterwards.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when a refcount block cannot be loaded; nothing is counted then.
    pub(crate) async fn publish<S: Storage>(
        &self,
        storage: &S,
        start: u64,
        count: u64,
    ) -> Result<(), Error> {
        let mut published = 0;
        let result = self
            .update(storage, start, count, |cluster, refcount, _| {
                if refcount != 0 {
                    // Only an image whose refcount blocks contradict each other gets here.
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("free host cluster {cluster:#x} has refcount {refcount}"),
                    ));
                }
                published += 1;
                Ok(1)
            })
            .await;
        if result.is_err() && published > 0 {
            // Blocks that were just modified are resident: this cannot fail.
            self.update(storage, start, published, |_, _, _| Ok(0))
                .await?;
        }
        result
    }

    /// Takes one reference away from each cluster, now or as soon as its count can be trusted. Their
    /// unlinking must be durable.
    ///
    /// # Errors
    /// `Corrupt` when a count is zero already.
    pub(crate) async fn release<S: Storage>(
        &self,
        storage: &S,
        start: u64,
        count: u64,
        epoch: u64,
        tables: bool,
    ) -> Result<(), Error> {
        let (start, count) = self.withhold(start, count, tables);
        self.update(storage, start, count, |cluster, refcount, quarantine| {
            let Some(less) = refcount.checked_sub(1) else {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("host cluster {cluster:#x} is freed, but its refcount is 0 already"),
                ));
            };
            if less == 0 {
                match quarantine.back_mut() {
                    Some(last)
                        if (last.epoch, last.tables) == (epoch, tables)
                            && last.start + last.count == cluster =>
                    {
                        last.count += 1;
                    }
                    _ => {
                        let start = cluster;
                        quarantine.push_back(Quarantined {
                            epoch,
                            start,
                            count: 1,
                            tables,
                        });
                    }
                }
            }
            Ok(less)
        })
        .await
    }

    async fn update<S: Storage>(
        &self,
        storage: &S,
        start: u64,
        count: u64,
        mut change: impl FnMut(u64, u64, &mut VecDeque<Quarantined>) -> Result<u64, Error>,
    ) -> Result<(), Error> {
        let entries = self.geometry.refcount_block_entries();
        let mut cluster = start;
        while cluster < start + count {
            let block = self.block_index(cluster);
            let run = (start + count - cluster).min((block + 1) * entries - cluster);
            // A block learns what is free before one of its counts changes: a quarantined cluster
            // has refcount 0, but is not free.
            if !lock(&self.state).free.knows(block) {
                self.scan(storage, block).await?;
                // Evicted while it was being looked at: again.
                continue;
            }
            self.load_block(storage, block).await?;
            let mut state = lock(&self.state);
            let state = &mut *state;
            // Evicted between loading and locking: load again.
            let Some(mut counts) = state.blocks.modify(block) else {
                continue;
            };
            for at in cluster..cluster + run {
                let index = usize::try_from(at % entries).unwrap_or(0);
                let value = change(at, counts.get(index), &mut state.quarantine)?;
                counts.set(index, value);
            }
            cluster += run;
        }
        Ok(())
    }

    /// Notes references that [`Self::free_some`] takes away. Their unlinking must be durable.
    pub(crate) fn add_due(&self, runs: Vec<Dropped>, epoch: u64) {
        for run in runs {
            let (start, count) = self.withhold(run.start, run.count, run.tables);
            if count > 0 {
                let run = Dropped {
                    start,
                    count,
                    tables: run.tables,
                };
                lock(&self.state).due.push_back(Due { run, epoch });
            }
        }
    }

    /// Takes some references away that are due, and frees some clusters that no request uses any
    /// more: about `most` runs of each sort. False: there is nothing of either.
    ///
    /// # Errors
    /// As for [`Self::release`].
    pub(crate) async fn free_some<S: Storage>(
        &self,
        storage: &S,
        most: usize,
    ) -> Result<bool, Error> {
        let mut any = self.release_due(storage, most).await?;
        any |= self.reclaim(storage, most).await;
        any |= self.reclaim_behind(storage, most).await;
        Ok(any)
    }

    /// As [`Self::free_some`], without what the background work has freed.
    ///
    /// # Errors
    /// As for [`Self::release`].
    pub(crate) async fn free_own<S: Storage>(
        &self,
        storage: &S,
        most: usize,
    ) -> Result<bool, Error> {
        let released = self.release_due(storage, most).await?;
        Ok(self.reclaim(storage, most).await || released)
    }

    async fn release_due<S: Storage>(&self, storage: &S, most: usize) -> Result<bool, Error> {
        let mut any = false;
        for _ in 0..most {
            let front = lock(&self.state).due.pop_front();
            let Some(Due { run, epoch }) = front else {
                break;
            };
            self.release(storage, run.start, run.count, epoch, run.tables)
                .await?;
            any = true;
        }
        Ok(any)
    }

    /// References are due, or clusters are waiting to be freed that no request uses any more.
    pub(crate) fn has_due(&self) -> bool {
        let oldest = self.board.oldest();
        let state = lock(&self.state);
        let reclaimable = |run: &Quarantined| run.epoch < oldest;
        !state.due.is_empty() || state.quarantine.front().is_some_and(reclaimable)
    }

    /// Frees up to `most` quarantined runs that no request uses any more. True: at least one.
    pub(crate) async fn reclaim<S: Storage>(&self, storage: &S, most: usize) -> bool {
        self.reclaim_from(storage, most, |state| &mut state.quarantine)
            .await
    }

    async fn reclaim_from<S: Storage>(
        &self,
        storage: &S,
        most: usize,
        list: impl Fn(&mut State) -> &mut VecDeque<Quarantined>,
    ) -> bool {
        let mut freed = 0;
        while freed < most {
            let runs: Vec<_> = {
                let mut state = lock(&self.state);
                let list = list(&mut state);
                let next = || self.take_reclaimable(list);
                std::iter::from_fn(next)
                    .take(PUNCHED_AT_ONCE.min(most - freed))
                    .collect()
            };
            if runs.is_empty() {
                break;
            }
            freed += runs.len();
            stream::iter(runs)
                .for_each_concurrent(None, |run| self.free(storage, run))
                .await;
        }
        freed > 0
    }

    /// The oldest run, if no request can use it any more; of a long one the first part.
    fn take_reclaimable(&self, quarantine: &mut VecDeque<Quarantined>) -> Option<Quarantined> {
        let front = quarantine.front_mut()?;
        if front.epoch >= self.board.oldest() && keeps!(PinBeforeReuse) {
            return None;
        }
        let most = (PUNCHED_BYTES_MAX >> self.geometry.cluster_bits()).max(1);
        if front.count <= most {
            return quarantine.pop_front();
        }
        let part = Quarantined {
            count: most,
            ..*front
        };
        front.start += most;
        front.count -= most;
        Some(part)
    }

    async fn free<S: Storage>(&self, storage: &S, run: Quarantined) {
        let Quarantined {
            start,
            count,
            tables,
            ..
        } = run;
        if tables {
            // Who resolved through the old table has finished: nobody loads it again.
            self.retire_tables(start, count);
        }
        if !keeps!(PunchBeforeReuse) {
            self.give_back(start, count);
        }
        if self.discard {
            let len = count << self.geometry.cluster_bits();
            let punched = storage
                .punch_hole(self.file, self.offset(start).get(), len)
                .await;
            if let Err(error) = punched {
                // The clusters are free all the same; only their blocks stay allocated.
                log::warn!(
                    "cannot punch a hole at {:#x} (+{len:#x}): {error}",
                    self.offset(start).get()
                );
            }
        }
        if keeps!(PunchBeforeReuse) {
            self.give_back(start, count);
        }
    }

    fn retire_tables(&self, start: u64, count: u64) {
        let slice_bytes = 1 << self.slice_bits;
        let len = count << self.geometry.cluster_bits();
        let mut at = 0;
        while at < len {
            self.store.retire(SliceKey::new(0, self.offset(start) + at));
            at += slice_bytes;
        }
    }

    /// Builds the free bitmap of a block.
    async fn scan<S: Storage>(&self, storage: &S, block: u64) -> Result<(), Error> {
        let entries = self.geometry.refcount_block_entries();
        let named = lock(&self.state).blocks.table_entry(block) != 0;
        if named {
            self.load_block(storage, block).await?;
        }
        let mut state = lock(&self.state);
        if named {
            self.learn(&mut state, block);
        } else if !state.free.knows(block) {
            // No block covers these clusters, so they cannot be counted: not ours to use.
            state.free.learn(block, block * entries, std::iter::empty());
        }
        Ok(())
    }

    /// Builds the free bitmap of a resident block, unless it is there.
    fn learn(&self, state: &mut State, block: u64) {
        let entries = self.geometry.refcount_block_entries();
        let clusters = block * entries..((block + 1) * entries).min(state.end);
        let untrusted_end = state.untrusted_end;
        let Some(counts) = state.blocks.peek(block) else {
            return;
        };
        if !state.free.knows(block) {
            let order = self.geometry.refcount_order();
            let protected: Vec<_> = lock(&self.protected).within(&clusters).cloned().collect();
            let end = usize::try_from(clusters.end.saturating_sub(clusters.start)).unwrap_or(0);
            let unused = refcount::free_indices(counts, order, end)
                .map(|index| clusters.start + to_u64(index))
                .filter(|cluster| {
                    *cluster >= untrusted_end
                        && !protected.iter().any(|range| range.contains(cluster))
                });
            state.free.learn(block, clusters.start, unused);
        }
    }

    /// Cuts off what growth added and nobody uses. Only when nothing else runs.
    pub(crate) async fn trim<S: Storage>(&self, storage: &S) -> Result<(), Error> {
        if !self.can_grow {
            return Ok(());
        }
        let (end, used_end) = {
            let state = lock(&self.state);
            let entries = self.geometry.refcount_block_entries();
            let mut used_end = state.end;
            while used_end > state.end_at_open && state.free.is_free(used_end - 1, entries) {
                used_end -= 1;
            }
            (state.end, used_end)
        };
        if used_end < end {
            storage
                .set_len(self.file, self.offset(used_end).get())
                .await
                .map_err(|error| Error::io("cannot cut the unused end off the image", error))?;
            let mut state = lock(&self.state);
            state
                .free
                .forget_from(used_end, self.geometry.refcount_block_entries());
            state.end = used_end;
            state.fresh_from = state.fresh_from.min(used_end);
        }
        Ok(())
    }

    /// How many clusters are managed.
    pub(crate) fn cluster_count(&self) -> u64 {
        lock(&self.state).end
    }

    /// Where managed clusters end, in bytes: entries at or past it are dangling.
    pub(crate) fn end_offset(&self) -> u64 {
        self.offset(lock(&self.state).end).get()
    }
}

/// Ends the exclusive right to grow, also when the future is dropped.
struct GrowthEnd<'a> {
    allocator: &'a Allocator,
}

impl Drop for GrowthEnd<'_> {
    fn drop(&mut self) {
        lock(&self.allocator.state).growing = false;
        self.allocator.grown.notify(usize::MAX);
    }
}

impl State {
    fn take_free(&mut self, count: u64) -> Option<Run> {
        let (start, count) = self.free.take(count)?;
        let fresh = start >= self.fresh_from;
        self.touch(start + count);
        Some(Run {
            start,
            count,
            fresh,
        })
    }

    /// Clusters below `end` may have been written to.
    fn touch(&mut self, end: u64) {
        // At the maximum none is fresh.
        self.fresh_from = self.fresh_from.max(end);
    }

    /// The next block whose free clusters are not known, lowest first.
    fn next_scan(&self, entries: u64) -> Option<u64> {
        if self.untrusted_end > 0 {
            // All that may be used is what growth has added, and that is known.
            return None;
        }
        self.free.first_unknown(self.end.div_ceil(entries))
    }
}
