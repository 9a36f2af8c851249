//! Allocating in an image whose counts cannot be trusted, and the way back.
//!
//! Such an image was not closed in order: counts and copied flags in the file may lag behind. Until
//! a rebuild has written the right counts, clusters are taken only from what the file grows by
//! (past the end that it had at open and a guard gap), and references to older clusters are
//! withheld instead of being taken away. The counts of clusters that were allocated since are
//! exact, in whichever block they lie: the rebuild leaves them alone.
//!
//! Allowed outcomes of a power cut: as ever for what was allocated since; for the rest any count,
//! since the dirty bit is set.

use super::{Allocator, GrowthEnd};
use crate::engine::active::Dropped;
use crate::engine::error::{Error, ErrorKind, lock};
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::HostOffset;

impl Allocator {
    /// Keeps the references to clusters with an untrusted count back; returns the rest.
    pub(super) fn withhold(&self, start: u64, count: u64, tables: bool) -> (u64, u64) {
        let mut state = lock(&self.state);
        let old = state.untrusted_end.saturating_sub(start).min(count);
        if old > 0 {
            state.withheld.push(Dropped {
                start,
                count: old,
                tables,
            });
        }
        (start + old, count - old)
    }

    /// Clusters below this have counts that cannot be trusted; 0 where all can.
    pub(crate) fn untrusted_end(&self) -> u64 {
        lock(&self.state).untrusted_end
    }

    /// The host offset of a block; `None` where there is none.
    pub(crate) fn block_offset(&self, block: u64) -> Option<HostOffset> {
        let entry = lock(&self.state).blocks.table_entry(block);
        (entry != 0).then_some(HostOffset::new(entry))
    }

    /// How many blocks the table can name.
    pub(crate) fn blocks_max(&self) -> u64 {
        lock(&self.state).blocks.table_len()
    }

    /// Puts right counts into a block that exists: `wanted` gets a cluster and its present count.
    /// True: something has changed, and the block lags behind.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when the block cannot be loaded.
    pub(crate) async fn rebuild_block<S: Storage>(
        &self,
        storage: &S,
        block: u64,
        wanted: impl Fn(u64, u64) -> u64,
    ) -> Result<bool, Error> {
        loop {
            self.borrow_block(storage, block).await?;
            let mut state = lock(&self.state);
            let (old_end, end) = (state.untrusted_end, state.end);
            let exact = |cluster, count| {
                if cluster < old_end {
                    wanted(cluster, count)
                } else if cluster < end {
                    count
                } else {
                    0
                }
            };
            // Evicted between loading and locking: load again.
            if let Some(changed) = state.blocks.change_counts(block, exact) {
                state.blocks.give_back(block);
                return Ok(changed);
            }
        }
    }

    /// Makes a block that is missing, empty, past the old end. A flush names it once its content is
    /// durable.
    ///
    /// # Errors
    /// `NoSpace`, `Io`; there is no block then.
    pub(crate) async fn add_block<S: Storage>(&self, storage: &S, block: u64) -> Result<(), Error> {
        // Taken first: growth may have to make the refcount table longer, so that it can name the
        // block.
        let run = self.reserve(storage, 1, 1).await?;
        if let Err(error) = self.publish(storage, run.start, 1).await {
            self.give_back(run.start, 1);
            return Err(error);
        }
        let added = self.add_block_at(storage, block, run.start).await;
        if !matches!(added, Ok(true)) {
            let epoch = self.board.end_epoch();
            self.release(storage, run.start, 1, epoch, false).await?;
        }
        added.map(|_| ())
    }

    /// False: somebody else has made it meanwhile.
    async fn add_block_at<S: Storage>(
        &self,
        storage: &S,
        block: u64,
        cluster: u64,
    ) -> Result<bool, Error> {
        let _growing = self.stop_growth().await;
        {
            let state = lock(&self.state);
            if state.blocks.table_entry(block) != 0 {
                return Ok(false);
            }
            if block >= state.blocks.table_len() {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("the refcount table cannot name block {block}"),
                ));
            }
        }
        let bytes = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let sg = SgList::from_buf(AlignedBuf::zeroed(bytes));
        let offset = self.offset(cluster).get();
        storage
            .write(self.file, offset, sg)
            .await
            .map_err(|error| Error::io("cannot write a new refcount block", error))?;
        let mut state = lock(&self.state);
        let empty = vec![0; bytes].into_boxed_slice();
        state.blocks.add_unnamed(block, offset, empty);
        lock(&self.protected).add(cluster..cluster + 1);
        Ok(true)
    }

    /// The exclusive right to grow.
    async fn stop_growth(&self) -> GrowthEnd<'_> {
        loop {
            let listener = {
                let mut state = lock(&self.state);
                if !state.growing {
                    state.growing = true;
                    return GrowthEnd { allocator: self };
                }
                self.grown.listen()
            };
            listener.await;
        }
    }

    /// Every count is right, durably. What nobody refers to can be used from now on, but for
    /// clusters in `0..lost_end` that are protected. Returns the references that were withheld.
    ///
    /// # Errors
    /// `Io`/`Corrupt` when a block cannot be loaded.
    pub(crate) async fn trust_counts<S: Storage>(
        &self,
        storage: &S,
        end_at_open: u64,
    ) -> Result<Vec<Dropped>, Error> {
        let entries = self.geometry.refcount_block_entries();
        loop {
            // The one block that has both old and new clusters is known already, without the old.
            let shared = self.block_index(self.untrusted_end());
            let looked_at = {
                let state = lock(&self.state);
                state.free.knows(shared) && state.blocks.table_entry(shared) != 0
            };
            if looked_at {
                self.load_block(storage, shared).await?;
            }
            let mut state = lock(&self.state);
            let state = &mut *state;
            let old_end = state.untrusted_end;
            if state.free.knows(shared) && state.blocks.table_entry(shared) != 0 {
                // Evicted, or looked at just now: again.
                let Some(count) = state.blocks.get(shared) else {
                    continue;
                };
                let protected = lock(&self.protected);
                for cluster in shared * entries..old_end {
                    let index = usize::try_from(cluster % entries).unwrap_or(0);
                    if count(index) == 0 && !protected.overlaps(&(cluster..cluster + 1)) {
                        state.free.set_free(cluster, 1, entries);
                    }
                }
            }
            state.untrusted_end = 0;
            state.end_at_open = end_at_open.min(state.end_at_open);
            return Ok(std::mem::take(&mut state.withheld));
        }
    }
}
