//! Counting everything anew while the image is served, after it was not closed in order.
//!
//! The tree as it was at open is treated like a frozen one: no table of it is ours, so that nothing
//! of it is changed in place; what the guest drops of it is recorded; clusters are taken only past
//! the old end (see `allocator::untrusted`). So the references that a survey finds, piece by piece
//! and in whatever time it takes, are those at open. Then the counts of all clusters below the old
//! end are written, blocks that are missing are made, and when that is durable: unreferenced clusters
//! may be used, recorded drops are taken away, and the flags are next (a task of its own).
//!
//! Allowed outcomes of a power cut: the dirty bit is set all the while, what was allocated since is
//! counted before it is linked as ever, and no other count or flag is trusted by the next open,
//! which begins again.
//!
//! Counts are in memory for a window of the file (see [`Piecemeal`]): nearly always for all of it. Where
//! they are not, the tables are read once more for each window, after the counts of the one before are
//! written.
//!
//! A piece of work is one read of L2 tables or some refcount blocks. What is known between two
//! pieces is only in memory; a piece that fails or is given up makes the present window begin again.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::engine::check::{Counted, Piecemeal};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::layer::Mapping;
use crate::engine::source::Layout;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::header::Header;
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Bytes of L2 tables that one piece reads.
const TABLES_BYTES: u64 = 1 << 20;
/// Bytes of refcount blocks that one piece rewrites.
const BLOCKS_BYTES: u64 = 512 << 10;
/// Places in the refcount table that one piece looks at.
const BLOCKS_MAX: u64 = 4096;

/// The rebuild of an image.
#[derive(Debug)]
pub(crate) struct Rebuild {
    /// The key of the tree at open in [`Drops`](crate::engine::active::Drops).
    key: u64,
    layout: Layout,
    file_len: u64,
    /// The active L1 table at open.
    l1: Arc<[u64]>,
    /// Windows that are done, and the cluster where they end.
    windows: u64,
    done_end: u64,
    phase: Phase,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Start,
    /// Finding out what refers to what.
    Tables(Box<Piecemeal>),
    /// Writing counts.
    Blocks(Box<Blocks>),
}

#[derive(Debug)]
struct Blocks {
    counted: Counted,
    /// Bytes of L2 tables that are read for each window, and windows about.
    tables: u64,
    windows: u64,
    /// All blocks before this one are right.
    next: u64,
}

/// How far a rebuild is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Progress {
    /// Bytes of metadata done.
    pub(super) done: u64,
    /// Bytes of metadata in all.
    pub(super) total: u64,
    /// All counts are right.
    pub(super) finished: bool,
}

impl Rebuild {
    /// The rebuild of an image as it is now, at open.
    pub(crate) fn new(key: u64, header: &Header, mapping: &Mapping, file_len: u64) -> Self {
        Self {
            key,
            layout: Layout::new(header),
            file_len,
            l1: mapping
                .l1
                .iter()
                .map(|entry| entry.load(Ordering::Relaxed))
                .collect(),
            windows: 0,
            done_end: 0,
            phase: Phase::Start,
        }
    }

    /// Bytes of metadata, as far as they are known.
    pub(super) fn total(&self) -> u64 {
        self.tables_bytes() + self.blocks_bytes()
    }

    /// Bytes of the L2 tables of the active tree.
    pub(super) fn tables_bytes(&self) -> u64 {
        let tables = self.l1.iter().filter(|entry| **entry != 0).count();
        to_u64(tables) * self.layout.geometry.cluster_size()
    }

    /// Bytes of the refcount blocks that the file needs.
    fn blocks_bytes(&self) -> u64 {
        let geometry = self.layout.geometry;
        let clusters = geometry.clusters_for(self.file_len);
        clusters.div_ceil(geometry.refcount_block_entries()) * geometry.cluster_size()
    }

    /// How many windows there are likely to be, where the present one ends there.
    fn windows(&self, end: u64) -> u64 {
        let clusters = self.layout.geometry.clusters_for(self.file_len);
        let len = end.min(clusters).saturating_sub(self.done_end).max(1);
        self.windows + clusters.saturating_sub(self.done_end).div_ceil(len).max(1)
    }

    /// How far the work is, with so many bytes of tables read of so many for each window.
    fn progress(&self, windows: u64, tables: u64, read: u64, next_block: u64) -> Progress {
        let blocks = self.blocks_bytes();
        let written = (next_block * self.layout.geometry.cluster_size()).min(blocks);
        Progress {
            done: self.windows * tables + read + written,
            total: windows * tables + blocks,
            finished: false,
        }
    }
}

impl<S: Storage> Worker<S> {
    /// Does a piece of the rebuild.
    ///
    /// # Errors
    /// `Corrupt`: the image is damaged, and takes no more writes; `Io`, `NoSpace`: the next call
    /// begins anew; `Failed`.
    pub(super) async fn rebuild_step(&self, target: Target<'_>) -> Result<Progress, Error> {
        let mut slot = target.active.snapshots.rebuild.lock().await;
        let Some(rebuild) = slot.as_mut() else {
            return Ok(Progress {
                done: 0,
                total: 0,
                finished: true,
            });
        };
        let phase = std::mem::take(&mut rebuild.phase);
        let result = self.rebuild_piece(target, rebuild, phase).await;
        if result.as_ref().is_ok_and(|progress| progress.finished) {
            *slot = None;
        }
        result
    }

    async fn rebuild_piece(
        &self,
        target: Target<'_>,
        rebuild: &mut Rebuild,
        phase: Phase,
    ) -> Result<Progress, Error> {
        let file = target.layer.file;
        let per_block = rebuild.layout.geometry.refcount_block_entries();
        let first_block = rebuild.done_end / per_block;
        match phase {
            Phase::Start => {
                let counts_bytes = lock(&target.active.snapshots.limits).counts_bytes;
                let survey = Piecemeal::new(
                    &self.storage,
                    file,
                    rebuild.layout.clone(),
                    rebuild.file_len,
                    Arc::clone(&rebuild.l1),
                    rebuild.done_end,
                    counts_bytes,
                )
                .await?;
                let (tables, read) = survey.progress();
                let windows = rebuild.windows(survey.window_end());
                rebuild.phase = Phase::Tables(Box::new(survey));
                Ok(rebuild.progress(windows, tables, read, first_block))
            }
            Phase::Tables(mut survey) => {
                let (tables, _) = survey.progress();
                let windows = rebuild.windows(survey.window_end());
                if survey.step(&self.storage, file, TABLES_BYTES).await? {
                    let (_, read) = survey.progress();
                    rebuild.phase = Phase::Tables(survey);
                    return Ok(rebuild.progress(windows, tables, read, first_block));
                }
                let counted = survey.finish(&self.storage, file).await?;
                Self::judge_lost(target.mapping, &counted, rebuild.windows == 0)?;
                rebuild.phase = Phase::Blocks(Box::new(Blocks {
                    counted,
                    tables,
                    windows,
                    next: first_block,
                }));
                Ok(rebuild.progress(windows, tables, tables, first_block))
            }
            Phase::Blocks(mut blocks) => {
                let (tables, windows) = (blocks.tables, blocks.windows);
                if self.rebuild_blocks(target, &mut blocks).await? {
                    let progress = rebuild.progress(windows, tables, tables, blocks.next);
                    rebuild.phase = Phase::Blocks(blocks);
                    return Ok(progress);
                }
                if let Some(end) = blocks.counted.window_end() {
                    rebuild.windows += 1;
                    rebuild.done_end = end;
                    return Ok(rebuild.progress(windows, tables, 0, blocks.next));
                }
                self.finish_rebuild(target, rebuild, &blocks.counted)
                    .await?;
                let total = rebuild.progress(windows, tables, tables, blocks.next).total;
                Ok(Progress {
                    done: total,
                    total,
                    finished: true,
                })
            }
        }
    }

    /// Entries that point past the old end are told of, once. What they name must not be in use.
    fn judge_lost(mapping: &Mapping, counted: &Counted, tell: bool) -> Result<(), Error> {
        if counted.lost == 0 {
            return Ok(());
        }
        if tell {
            log::warn!(
                "{} entries point past the end of the file (up to {:#x}): lost data",
                counted.lost,
                counted.lost_end
            );
        }
        if counted.lost_end > mapping.lost.end.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the file was cut short: entries point past its end, up to {:#x}",
                    counted.lost_end
                ),
            ));
        }
        Ok(())
    }

    /// Rewrites some refcount blocks. False: there are no more in the window.
    async fn rebuild_blocks(&self, target: Target<'_>, blocks: &mut Blocks) -> Result<bool, Error> {
        let allocator = &target.active.allocator;
        let (found, next) = Self::upcoming_blocks(target, blocks);
        if next == blocks.next {
            return Ok(false);
        }
        let present: Vec<u64> = (found.iter().copied())
            .filter(|block| allocator.block_offset(*block).is_some())
            .collect();
        let result = match allocator.borrow_blocks(&self.storage, &present).await {
            Ok(()) => self.rebuild_these(target, &blocks.counted, &found).await,
            Err(error) => Err(error),
        };
        allocator.give_back_blocks(&present);
        result?;
        blocks.next = next;
        allocator.write_all_lagging(&self.storage).await?;
        Ok(true)
    }

    /// The next blocks that there are or must be, and the one to go on with. The same again: there are
    /// no more in the window.
    fn upcoming_blocks(target: Target<'_>, blocks: &Blocks) -> (Vec<u64>, u64) {
        let allocator = &target.active.allocator;
        let geometry = target.mapping.geometry;
        let per_block = geometry.refcount_block_entries();
        let most = to_usize((BLOCKS_BYTES / geometry.cluster_size()).max(1));
        let window_end = blocks.counted.window_end();
        let mut found = Vec::new();
        let mut next = blocks.next;
        let mut used = blocks.counted.next_used(next * per_block);
        while found.len() < most && next - blocks.next < BLOCKS_MAX {
            if used.is_some_and(|cluster| cluster < next * per_block) {
                used = blocks.counted.next_used(next * per_block);
            }
            let is_present = allocator.block_offset(next).is_some();
            // Only past the end of the table are there no blocks for no reason.
            let is_past_table = !is_present && used.is_none() && next >= allocator.blocks_max();
            if is_past_table || window_end.is_some_and(|end| next * per_block >= end) {
                break;
            }
            if is_present || used.is_some_and(|cluster| cluster < (next + 1) * per_block) {
                found.push(next);
            }
            next += 1;
        }
        (found, next)
    }

    async fn rebuild_these(
        &self,
        target: Target<'_>,
        counted: &Counted,
        blocks: &[u64],
    ) -> Result<(), Error> {
        let allocator = &target.active.allocator;
        for block in blocks {
            if allocator.block_offset(*block).is_none() {
                allocator.add_block(&self.storage, *block).await?;
                self.image.follow_end();
            }
            let overflow = Cell::new(None);
            allocator
                .rebuild_block(&self.storage, *block, |cluster, found| {
                    counted.wanted(cluster, found).unwrap_or_else(|| {
                        overflow.set(Some(cluster));
                        found
                    })
                })
                .await?;
            if let Some(cluster) = overflow.get() {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "host cluster {cluster:#x} has more references than a refcount can say"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The counts are right: makes that durable, and lets go of what was withheld.
    async fn finish_rebuild(
        &self,
        target: Target<'_>,
        rebuild: &Rebuild,
        counted: &Counted,
    ) -> Result<(), Error> {
        let Target {
            mapping, active, ..
        } = target;
        active.allocator.write_all_lagging(&self.storage).await?;
        // Also makes durable what this process has read of the file: what nothing refers to now, no
        // power cut brings back.
        self.flush().await?;
        let geometry = mapping.geometry;
        let start = geometry.clusters_for(rebuild.file_len);
        let lost = start..geometry.clusters_for(counted.lost_end).max(start);
        {
            let mut protected = lock(&mapping.protected);
            protected.remove(&(start..active.allocator.untrusted_end()));
            if !lost.is_empty() {
                protected.add(lost.clone());
            }
        }
        mapping
            .lost
            .end
            .store(lost.end << geometry.cluster_bits(), Ordering::Release);
        mapping.lost.old_tables_end.store(0, Ordering::Release);
        if counted.lost > 0 {
            active.snapshots.stay_dirty.store(true, Ordering::Release);
        }
        self.forget_flags(target, &rebuild.l1);
        let withheld = active
            .allocator
            .trust_counts(&self.storage, lost.end)
            .await?;
        lock(&active.drops).settle(rebuild.key);
        for dropped in withheld {
            active.drop_own(dropped);
        }
        // What was dropped meanwhile is taken away when this is durable.
        self.flush().await?;
        active.snapshots.show_rebuilt();
        Ok(())
    }
}
