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
//! A piece of work is one read of L2 tables or some refcount blocks. What is known between two
//! pieces is only in memory; a piece that fails or is given up makes the work begin again.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use crate::engine::check::{Counted, Piecemeal};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::layer::Mapping;
use crate::engine::source::Layout;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::header::Header;
use crate::storage::Storage;
use crate::units::to_u64;

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
    l1: Box<[u64]>,
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
    /// Bytes of L2 tables that were read.
    tables: u64,
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
        let blocks_bytes = rebuild.blocks_bytes();
        let (done, total) = match phase {
            Phase::Start => {
                let (layout, l1) = (rebuild.layout.clone(), rebuild.l1.clone());
                let survey =
                    Piecemeal::new(&self.storage, file, layout, rebuild.file_len, l1).await?;
                let (all, done) = survey.progress();
                rebuild.phase = Phase::Tables(Box::new(survey));
                (done, all + blocks_bytes)
            }
            Phase::Tables(mut survey) => {
                let (all, _) = survey.progress();
                if survey.step(&self.storage, file, TABLES_BYTES).await? {
                    let (_, done) = survey.progress();
                    rebuild.phase = Phase::Tables(survey);
                    (done, all + blocks_bytes)
                } else {
                    let counted = survey.finish(&self.storage, file).await?;
                    Self::judge_lost(target.mapping, &counted)?;
                    rebuild.phase = Phase::Blocks(Box::new(Blocks {
                        counted,
                        tables: all,
                        next: 0,
                    }));
                    (all, all + blocks_bytes)
                }
            }
            Phase::Blocks(mut blocks) => {
                let all = blocks.tables + blocks_bytes;
                if self.rebuild_blocks(target, &mut blocks).await? {
                    let cluster_size = target.mapping.geometry.cluster_size();
                    let done = (blocks.next * cluster_size).min(blocks_bytes);
                    let done = blocks.tables + done;
                    rebuild.phase = Phase::Blocks(blocks);
                    (done, all)
                } else {
                    self.finish_rebuild(target, rebuild, &blocks.counted)
                        .await?;
                    return Ok(Progress {
                        done: all,
                        total: all,
                        finished: true,
                    });
                }
            }
        };
        Ok(Progress {
            done,
            total,
            finished: false,
        })
    }

    /// Entries that point past the old end are told of. What they name must not be in use.
    fn judge_lost(mapping: &Mapping, counted: &Counted) -> Result<(), Error> {
        if counted.lost == 0 {
            return Ok(());
        }
        log::warn!(
            "{} entries point past the end of the file (up to {:#x}): lost data",
            counted.lost,
            counted.lost_end
        );
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

    /// Rewrites some refcount blocks. False: there are no more.
    async fn rebuild_blocks(&self, target: Target<'_>, blocks: &mut Blocks) -> Result<bool, Error> {
        let allocator = &target.active.allocator;
        let geometry = target.mapping.geometry;
        let per_block = geometry.refcount_block_entries();
        let mut bytes = 0;
        for _ in 0..BLOCKS_MAX {
            let block = blocks.next;
            let used = blocks.counted.next_used(block * per_block);
            if allocator.block_offset(block).is_none() {
                match used {
                    // Only past the end of the table are there no blocks for no reason.
                    None if block >= allocator.blocks_max() => return Ok(false),
                    Some(cluster) if cluster < (block + 1) * per_block => {
                        allocator.add_block(&self.storage, block).await?;
                        self.image.follow_end();
                    }
                    _ => {
                        blocks.next += 1;
                        continue;
                    }
                }
            }
            let overflow = Cell::new(None);
            allocator
                .rebuild_block(&self.storage, block, |cluster, found| {
                    blocks.counted.wanted(cluster, found).unwrap_or_else(|| {
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
            blocks.next += 1;
            bytes += geometry.cluster_size();
            if bytes >= BLOCKS_BYTES {
                break;
            }
        }
        allocator.write_all_lagging(&self.storage).await?;
        Ok(true)
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
