//! Counts that change in the background, by whole trees at a time.
//!
//! The work goes from refcount block to refcount block. A block is changed under one hold of the
//! lock, as a whole or (on an error) not at all, and *lags* then: it differs from the file in a way
//! that no flush cares for, and is written by the background work itself. Blocks that were loaded for
//! it are let go when they are in the file, so that the budget stays with the requests.

use std::collections::VecDeque;
use std::ops::Range;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::blocks::BlockCopy;
use super::{Allocator, Quarantined};
use crate::engine::breath::breathe;
use crate::engine::bulk::write_pieces;
use crate::engine::error::{Error, ErrorKind, lock};
use crate::format::refcount;
use crate::storage::{AlignedBuf, Storage};
use crate::units::{to_u64, to_usize};

/// Most runs that are changed under one hold of the lock.
const RUNS_PER_LOCK: usize = 4096;
/// Bytes of refcount blocks that are loaded, changed and written together.
const BYTES_AT_ONCE: u64 = 1 << 20;
/// Bytes of one read of blocks that are only looked at (at least one block).
const PIECE_BYTES: u64 = 256 << 10;
/// Blocks in flight at a time.
const IN_FLIGHT: usize = 16;
/// Clusters of a run in quarantine: what freeing one run does under the lock.
const QUARANTINED_MAX: u64 = 1 << 15;

/// A run of host clusters of one refcount block, in one word that sorts by its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct PackedRun(u64);

impl PackedRun {
    const COUNT_BITS: u32 = 16;
    /// Most clusters of one run.
    pub(crate) const COUNT_MAX: u64 = 1 << Self::COUNT_BITS;

    /// `start` is a host cluster (below 2^47: 2^56 bytes in clusters of 512); `count` is not 0.
    pub(crate) fn new(start: u64, count: u64) -> Self {
        debug_assert!(start >> 47 == 0 && (1..=Self::COUNT_MAX).contains(&count));
        Self(start << Self::COUNT_BITS | (count - 1))
    }

    pub(crate) fn start(self) -> u64 {
        self.0 >> Self::COUNT_BITS
    }

    pub(crate) fn count(self) -> u64 {
        (self.0 & (Self::COUNT_MAX - 1)) + 1
    }
}

/// What to do with the counts of runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// One more reference.
    Raise,
    /// One less, of data or of L2 tables.
    Lower {
        /// The clusters are L2 tables.
        tables: bool,
    },
}

impl Allocator {
    /// Changes the counts of the first of some sorted runs, and says of how many: as far as about
    /// 1 MiB of refcount blocks reaches. Blocks are loaded and written.
    ///
    /// # Errors
    /// `Corrupt` where a count is 0 already, `Unsupported` where it is at its maximum; `Io`. The
    /// runs before the returned number (with an error: before `done`) are changed, no others.
    pub(crate) async fn change<S: Storage>(
        &self,
        storage: &S,
        runs: &[PackedRun],
        change: Change,
        done: &mut usize,
    ) -> Result<(), Error> {
        let (blocks, _) = self.blocks_at_once(runs[*done..].iter().map(|run| run.start()));
        self.borrow_blocks(storage, &blocks).await?;
        let last = blocks.last().copied().unwrap_or(0);
        let mut result = Ok(());
        while let Some(first) = runs.get(*done)
            && self.block_index(first.start()) <= last
        {
            breathe(self.geometry.cluster_size());
            // Still here, unless somebody else used it and the budget was short.
            result = self
                .borrow_block(storage, self.block_index(first.start()))
                .await
                .and_then(|()| self.change_block(&runs[*done..], change))
                .map(|changed| *done += changed);
            if result.is_err() {
                break;
            }
        }
        let written = self.write_lagging(storage).await;
        self.give_back_blocks(&blocks);
        result.and(written.map(drop))
    }

    /// Changes the counts of leading runs in one block; returns of how many, 0 if the block is gone.
    fn change_block(&self, runs: &[PackedRun], change: Change) -> Result<usize, Error> {
        let Some(block) = runs.first().map(|run| self.block_index(run.start())) else {
            return Ok(0);
        };
        let entries = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order();
        let mut state = lock(&self.state);
        let state = &mut *state;
        if change != Change::Raise {
            // A block learns what is free before one of its counts becomes 0.
            self.learn(state, block);
        }
        let Some(counts) = state.blocks.lag(block) else {
            return Ok(0);
        };
        let mut zeroed: Vec<Range<u64>> = Vec::new();
        let mut changed = 0;
        let mut clusters = 0;
        for run in runs.iter().take(RUNS_PER_LOCK) {
            if self.block_index(run.start()) != block || clusters >= entries {
                break;
            }
            let (index, count) = (to_usize(run.start() % entries), to_usize(run.count()));
            let result = match change {
                Change::Raise => refcount::raise(counts, order, index, count),
                Change::Lower { .. } => refcount::lower(counts, order, index, count, |at| {
                    let cluster = block * entries + to_u64(at);
                    match zeroed.last_mut() {
                        Some(last) if last.end == cluster => last.end += 1,
                        _ => zeroed.push(cluster..cluster + 1),
                    }
                }),
            };
            if let Err(at) = result {
                let refcount = refcount::get(counts, order, at);
                for run in &runs[..changed] {
                    undo(counts, order, run, entries, change);
                }
                return Err(stuck(block * entries + to_u64(at), refcount, change));
            }
            changed += 1;
            clusters += run.count();
        }
        if let Change::Lower { tables } = change
            && !zeroed.is_empty()
        {
            // What was unlinked before may still be used by requests of this epoch.
            let epoch = self.board.end_epoch();
            quarantine(&mut state.freed_behind, &zeroed, epoch, tables);
        }
        Ok(changed)
    }

    /// Makes blocks resident for the background work (see [`Self::borrow_block`]), several at a time.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when one of them cannot be loaded.
    pub(crate) async fn borrow_blocks<S: Storage>(
        &self,
        storage: &S,
        blocks: &[u64],
    ) -> Result<(), Error> {
        stream::iter(blocks.iter().map(Ok))
            .try_for_each_concurrent(IN_FLIGHT, |block| self.borrow_block(storage, *block))
            .await
    }

    /// Lets go of blocks that only the background work has used, and that equal the file.
    pub(crate) fn give_back_blocks(&self, blocks: &[u64]) {
        let mut state = lock(&self.state);
        for block in blocks {
            state.blocks.give_back(*block);
        }
    }

    /// For each cluster, in ascending order, whether it has exactly one reference.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when a refcount block cannot be loaded.
    pub(crate) async fn have_one_reference<S: Storage>(
        &self,
        storage: &S,
        clusters: &[u64],
    ) -> Result<Vec<bool>, Error> {
        self.counts_of(storage, clusters, |count| count == 1).await
    }

    /// Something about the count of each cluster, in ascending order.
    ///
    /// # Errors
    /// As for [`Self::have_one_reference`].
    pub(crate) async fn counts_of<S: Storage, T>(
        &self,
        storage: &S,
        clusters: &[u64],
        say: impl Fn(u64) -> T,
    ) -> Result<Vec<T>, Error> {
        let mut said = Vec::with_capacity(clusters.len());
        while said.len() < clusters.len() {
            let rest = &clusters[said.len()..];
            let (blocks, count) = self.blocks_at_once(rest.iter().copied());
            let result = match self.borrow_blocks(storage, &blocks).await {
                Ok(()) => self.ask(storage, &rest[..count], &say, &mut said).await,
                Err(error) => Err(error),
            };
            self.give_back_blocks(&blocks);
            result?;
        }
        Ok(said)
    }

    /// The same for some clusters, whose blocks are resident.
    async fn ask<S: Storage, T>(
        &self,
        storage: &S,
        clusters: &[u64],
        say: impl Fn(u64) -> T,
        said: &mut Vec<T>,
    ) -> Result<(), Error> {
        let entries = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order();
        for here in clusters.chunk_by(|a, b| self.block_index(*a) == self.block_index(*b)) {
            breathe(self.geometry.cluster_size());
            let block = self.block_index(here.first().copied().unwrap_or(0));
            loop {
                // Still here, unless somebody else used it and the budget was short.
                self.borrow_block(storage, block).await?;
                let state = lock(&self.state);
                if let Some(counts) = state.blocks.peek(block) {
                    let place = |cluster: u64| to_usize(cluster % entries);
                    let counts = here
                        .iter()
                        .map(|cluster| refcount::get(counts, order, place(*cluster)));
                    said.extend(counts.map(&say));
                    break;
                }
            }
        }
        Ok(())
    }

    /// The blocks of the first of some ascending clusters, as many as are loaded together, and how many
    /// clusters those are.
    fn blocks_at_once(&self, clusters: impl Iterator<Item = u64>) -> (Vec<u64>, usize) {
        let most = to_usize(BYTES_AT_ONCE >> self.geometry.cluster_bits()).max(1);
        let mut blocks: Vec<u64> = Vec::new();
        let mut count = 0;
        for block in clusters.map(|cluster| self.block_index(cluster)) {
            if blocks.last() != Some(&block) {
                if blocks.len() == most {
                    break;
                }
                blocks.push(block);
            }
            count += 1;
        }
        (blocks, count)
    }

    /// The highest of all counts in some blocks.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when a refcount block cannot be read.
    pub(crate) async fn highest_count<S: Storage>(
        &self,
        storage: &S,
        blocks: Range<u64>,
    ) -> Result<u64, Error> {
        let order = self.geometry.refcount_order();
        let mut highest = 0;
        self.look_through(storage, blocks, |_, counts| {
            highest = refcount::highest(counts, order).max(highest);
            true
        })
        .await?;
        Ok(highest)
    }

    /// A cluster among these whose count is what is looked for, and the count.
    ///
    /// # Errors
    /// As for [`Self::highest_count`].
    pub(crate) async fn find_count<S: Storage>(
        &self,
        storage: &S,
        clusters: Range<u64>,
        is_it: impl Fn(u64, u64) -> bool,
    ) -> Result<Option<(u64, u64)>, Error> {
        let entries = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order();
        let blocks = clusters.start / entries..clusters.end.div_ceil(entries);
        let mut found = None;
        self.look_through(storage, blocks, |block, counts| {
            let first = block * entries;
            let here = clusters.start.max(first)..clusters.end.min(first + entries);
            found = here
                .map(|cluster| {
                    (
                        cluster,
                        refcount::get(counts, order, to_usize(cluster - first)),
                    )
                })
                .find(|(cluster, count)| is_it(*cluster, *count));
            found.is_none()
        })
        .await?;
        Ok(found)
    }

    /// Of these clusters, which are whole blocks, those with exactly one reference, one bit each.
    ///
    /// # Errors
    /// As for [`Self::highest_count`].
    pub(crate) async fn one_reference_bits<S: Storage>(
        &self,
        storage: &S,
        clusters: Range<u64>,
    ) -> Result<Box<[u64]>, Error> {
        let entries = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order();
        let blocks = clusters.start / entries..clusters.end.div_ceil(entries);
        let mut bits = vec![0; to_usize((clusters.end - clusters.start).div_ceil(64))];
        self.look_through(storage, blocks, |block, counts| {
            breathe(self.geometry.cluster_size());
            // A block has at least 64 counts.
            let first = to_usize((block * entries - clusters.start) / 64);
            refcount::ones(
                counts,
                order,
                &mut bits[first..first + to_usize(entries / 64)],
            );
            true
        })
        .await?;
        Ok(bits.into_boxed_slice())
    }

    /// Shows the counts of each block that there is, until `see` says that it has seen enough: from
    /// memory where they are there, else from the file, past the budget. A count that changes meanwhile
    /// is seen before or after.
    async fn look_through<S: Storage>(
        &self,
        storage: &S,
        blocks: Range<u64>,
        mut see: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), Error> {
        let cluster_size = self.geometry.cluster_size();
        let most = (BYTES_AT_ONCE >> self.geometry.cluster_bits()).max(1);
        let piece_max = (PIECE_BYTES >> self.geometry.cluster_bits()).max(1);
        let end = blocks.end.min(self.blocks_max());
        let mut next = blocks.start;
        while next < end {
            // Pieces of the file, each with its first block and how many there are.
            let mut absent: Vec<(u64, u64, u64)> = Vec::new();
            for block in next..end.min(next + most) {
                let (counts, host_offset, end) = {
                    let state = lock(&self.state);
                    let counts: Option<Box<[u8]>> = state.blocks.peek(block).map(Box::from);
                    (counts, state.blocks.table_entry(block), state.end)
                };
                if let Some(counts) = counts {
                    if !see(block, &counts) {
                        return Ok(());
                    }
                    continue;
                }
                if host_offset == 0 {
                    continue;
                }
                self.check_block_offset(block, host_offset, end)?;
                match absent.last_mut() {
                    Some((start, first, count))
                        if *count < piece_max
                            && (*start + *count * cluster_size, *first + *count)
                                == (host_offset, block) =>
                    {
                        *count += 1;
                    }
                    _ => absent.push((host_offset, block, 1)),
                }
            }
            next += most;
            let mut reads = stream::iter(absent)
                .map(|(start, first, count)| async move {
                    let buf = AlignedBuf::zeroed(to_usize(count * cluster_size));
                    let (read, buf) = storage.read_buf(self.file, start, buf).await;
                    let fault = |error| {
                        Error::io(
                            format!("cannot read the refcount block at {start:#x}"),
                            error,
                        )
                    };
                    read.map(|()| (first, buf)).map_err(fault)
                })
                .buffered(IN_FLIGHT);
            while let Some((first, buf)) = reads.try_next().await? {
                for (block, counts) in (first..).zip(buf.chunks_exact(to_usize(cluster_size))) {
                    if !see(block, counts) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes some lagging blocks; returns how many bytes.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: they lag as before.
    pub(crate) async fn write_lagging<S: Storage>(&self, storage: &S) -> Result<u64, Error> {
        let _writer = self.block_writer.lock().await;
        let most = to_usize(BYTES_AT_ONCE >> self.geometry.cluster_bits()).max(1);
        let mut writing = LaggingWrite {
            allocator: self,
            copies: self.collect_lagging(most),
            written: false,
        };
        let copies = writing.copies.iter();
        write_pieces(
            storage,
            self.file,
            copies.map(|copy| (copy.host_offset, &copy.bytes[..])),
        )
        .await
        .map_err(|(host_offset, error)| {
            Error::io(
                format!("cannot write the refcount block at {host_offset:#x}"),
                error,
            )
        })?;
        writing.written = true;
        Ok(to_u64(writing.copies.len()) << self.geometry.cluster_bits())
    }

    /// Writes all lagging blocks but those that the next flush writes.
    ///
    /// # Errors
    /// As for [`Self::write_lagging`].
    pub(crate) async fn write_all_lagging<S: Storage>(&self, storage: &S) -> Result<(), Error> {
        while self.write_lagging(storage).await? > 0 {}
        Ok(())
    }

    /// Waits until no write of a refcount block that has begun is in flight.
    pub(crate) async fn end_background_writes(&self) {
        drop(self.block_writer.lock().await);
    }

    /// Runs that the background work has put in quarantine, and that are there still.
    pub(crate) fn freed_behind(&self) -> usize {
        lock(&self.state).freed_behind.len()
    }

    /// Frees up to `most` runs that the background work has put in quarantine and no request uses
    /// any more. True: at least one.
    pub(crate) async fn reclaim_behind<S: Storage>(&self, storage: &S, most: usize) -> bool {
        self.reclaim_from(storage, most, |state| &mut state.freed_behind)
            .await
    }
}

/// Writes of lagging blocks in flight. Dropped unfinished the blocks lag as before.
struct LaggingWrite<'a> {
    allocator: &'a Allocator,
    copies: Vec<BlockCopy>,
    written: bool,
}

impl Drop for LaggingWrite<'_> {
    fn drop(&mut self) {
        self.allocator.lagging_written(&self.copies, self.written);
    }
}

/// Takes back what was done to a run whose block has met an error.
fn undo(counts: &mut [u8], order: u32, run: &PackedRun, entries: u64, change: Change) {
    let first = to_usize(run.start() % entries);
    for index in first..first + to_usize(run.count()) {
        let changed = refcount::get(counts, order, index);
        let before = match change {
            Change::Raise => changed - 1,
            Change::Lower { .. } => changed + 1,
        };
        refcount::set(counts, order, index, before);
    }
}

#[cold]
fn stuck(cluster: u64, refcount: u64, change: Change) -> Error {
    let what = match change {
        Change::Raise => "is shared with a snapshot",
        Change::Lower { .. } => "is given back by a snapshot",
    };
    if refcount == 0 {
        Error::new(
            ErrorKind::Corrupt,
            format!("host cluster {cluster:#x} {what}, but its refcount is 0"),
        )
    } else {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "host cluster {cluster:#x} {what}, but its refcount cannot be more than {refcount}"
            ),
        )
    }
}

/// Adds ascending runs of clusters without references.
fn quarantine(list: &mut VecDeque<Quarantined>, runs: &[Range<u64>], epoch: u64, tables: bool) {
    for run in runs {
        let mut start = run.start;
        while start < run.end {
            let added = match list.back_mut() {
                Some(last)
                    if last.tables == tables
                        && last.start + last.count == start
                        && last.count < QUARANTINED_MAX =>
                {
                    let added = (run.end - start).min(QUARANTINED_MAX - last.count);
                    // The later epoch holds for both.
                    last.epoch = epoch;
                    last.count += added;
                    added
                }
                _ => {
                    let count = (run.end - start).min(QUARANTINED_MAX);
                    list.push_back(Quarantined {
                        epoch,
                        start,
                        count,
                        tables,
                    });
                    count
                }
            };
            start += added;
        }
    }
}
