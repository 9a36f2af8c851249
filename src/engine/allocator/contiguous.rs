//! Contiguous runs, for tables that must lie in one piece: the L1 table of a snapshot, the snapshot
//! table.
//!
//! Where no free run is known that is long enough the file grows by one (a device, which cannot grow,
//! is searched to its end first, and then for what was freed lately), with the refcount blocks for it behind
//! it (ordinary growth puts a block at the start of the part that it counts, which would cut runs
//! of small clusters).

use super::grow::NewBlock;
use super::{Allocator, GrowthEnd, Need, Run};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::storage::Storage;

impl Allocator {
    /// Takes exactly `count` clusters in one piece. They reach the file like any reserved ones.
    ///
    /// # Errors
    /// As for [`Self::reserve`].
    pub(crate) async fn reserve_contiguous<S: Storage>(
        &self,
        storage: &S,
        count: u64,
    ) -> Result<Run, Error> {
        let entries = self.geometry.refcount_block_entries();
        loop {
            let need = {
                let mut state = lock(&self.state);
                if let Some(start) = state.free.take_contiguous(count, entries) {
                    state.touch(start + count);
                    return Ok(Run {
                        start,
                        count,
                        fresh: false,
                    });
                }
                self.need_locked(&mut state, !self.can_grow)
            };
            match need {
                Need::Scan(block) => self.scan(storage, block).await?,
                Need::WaitForGrowth(listener) => listener.await,
                Need::Grow => {
                    let ending = GrowthEnd { allocator: self };
                    let grown = self.grow_by(storage, count).await;
                    drop(ending);
                    match grown {
                        Ok(Some(run)) => return Ok(run),
                        Ok(None) => {}
                        Err(error) if error.kind() == ErrorKind::NoSpace => {
                            if !self.free_some(storage, usize::MAX).await? {
                                return Err(error);
                            }
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    /// Adds `count` clusters in one piece and takes them; `None` when something else had to grow
    /// first. The caller holds the exclusive right to grow.
    async fn grow_by<S: Storage>(&self, storage: &S, count: u64) -> Result<Option<Run>, Error> {
        let entries = self.geometry.refcount_block_entries();
        let (start, covered) = {
            let state = lock(&self.state);
            (state.end, state.blocks.table_len().saturating_mul(entries))
        };
        let own = start..start + count;
        let mut new_blocks: Vec<NewBlock> = Vec::new();
        let mut counted = Vec::new();
        let mut used_end = own.end;
        let mut block = self.block_index(start);
        while block <= self.block_index(self.page_align_up(used_end) - 1) {
            if lock(&self.state).blocks.table_entry(block) == 0 {
                new_blocks.push(NewBlock {
                    block,
                    cluster: used_end,
                });
                used_end += 1;
            } else {
                counted.extend(self.counted(storage, block, &own).await?);
            }
            block += 1;
        }
        let end = self.page_align_up(used_end);
        let is_new = |block| new_blocks.iter().any(|new| new.block == block);
        let counts_itself = |new: &NewBlock| is_new(self.block_index(new.cluster));
        if end > covered || !counted.is_empty() || !new_blocks.iter().all(counts_itself) {
            // A longer refcount table, or past leaked clusters, or past blocks that are there already
            // and would have to count new ones: then there is room for the run.
            self.grow(storage).await?;
            return Ok(None);
        }
        if !self.can_grow {
            let len = storage
                .len(self.file)
                .map_err(|error| Error::io("cannot get the length of the image", error))?;
            if end > len / self.geometry.cluster_size() {
                return Err(Error::new(ErrorKind::NoSpace, "the image's device is full"));
            }
        }
        self.add_clusters(storage, start..end, &new_blocks, |cluster| {
            !own.contains(&cluster)
        })
        .await?;
        lock(&self.state).touch(own.end);
        Ok(Some(Run {
            start,
            count,
            fresh: false,
        }))
    }
}
