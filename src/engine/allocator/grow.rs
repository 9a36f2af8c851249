//! Growing the file: the next chunk of clusters with the refcount blocks that count them, and a
//! longer refcount table when the present one cannot name more blocks.
//!
//! Allowed outcomes of a power cut: the file is longer or not; a new block is in the file, named
//! or not. A named block always has its content (it counts itself), because its content is
//! durable before its name is written (see `blocks`). The longer table is durable, with its own
//! clusters counted, before the header names it.

use std::ops::Range;

use super::{Allocator, State};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::order::keeps;
use crate::format::geometry::REFTABLE_BYTES_MAX;
use crate::format::refcount;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{HostOffset, to_u64};

/// Growth per chunk: an eighth of the file, at least this many clusters ...
const CHUNK_CLUSTERS_MIN: u64 = 64;
/// ... and at most this many bytes.
const CHUNK_BYTES_MAX: u64 = 64 << 20;
/// The host's pages.
const PAGE_BYTES: u64 = 4096;

/// A refcount block to be made: its index and the cluster that it will live in.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewBlock {
    pub(super) block: u64,
    pub(super) cluster: u64,
}

impl Allocator {
    /// Adds a chunk of clusters. The caller holds the exclusive right to grow.
    pub(super) async fn grow<S: Storage>(&self, storage: &S) -> Result<(), Error> {
        let device_clusters = if self.can_grow {
            u64::MAX
        } else {
            let len = storage
                .len(self.file)
                .map_err(|error| Error::io("cannot get the length of the image", error))?;
            len / self.geometry.cluster_size()
        };
        let (start, covered) = {
            let state = lock(&self.state);
            let entries = self.geometry.refcount_block_entries();
            (state.end, state.blocks.table_len().saturating_mul(entries))
        };
        if start >= device_clusters {
            return Err(Error::new(ErrorKind::NoSpace, "the image's device is full"));
        }
        if start >= covered {
            return self.grow_table(storage, start, device_clusters).await;
        }
        let chunk = (start / 8)
            .min(CHUNK_BYTES_MAX >> self.geometry.cluster_bits())
            .max(CHUNK_CLUSTERS_MIN);
        let end = self
            .page_align_up(start + chunk)
            .min(covered)
            .min(device_clusters);
        let new_blocks = self.plan(start..end);
        // Blocks that exist already may count clusters of the chunk (leaks past the old end).
        let mut counted: Vec<u64> = new_blocks.iter().map(|new| new.cluster).collect();
        for block in self.block_index(start)..=self.block_index(end - 1) {
            if !new_blocks.iter().any(|new| new.block == block) {
                counted.extend(self.counted(storage, block, &(start..end)).await?);
            }
        }
        counted.sort_unstable();
        self.add_clusters(storage, start..end, &new_blocks, |cluster| {
            counted.binary_search(&cluster).is_err()
        })
        .await
    }

    /// To a whole page: a file that is written past the page cache must not end inside one.
    pub(super) fn page_align_up(&self, cluster: u64) -> u64 {
        cluster.next_multiple_of((PAGE_BYTES >> self.geometry.cluster_bits()).max(1))
    }

    /// Makes the file longer by `clusters`, with blocks that count only themselves and each other.
    pub(super) async fn add_clusters<S: Storage>(
        &self,
        storage: &S,
        clusters: Range<u64>,
        new_blocks: &[NewBlock],
        is_free: impl Fn(u64) -> bool,
    ) -> Result<(), Error> {
        self.extend_file(storage, clusters.end).await?;
        let len = (clusters.end - clusters.start) << self.geometry.cluster_bits();
        storage
            .reserve(self.file, self.offset(clusters.start).get(), len)
            .await;
        // One may live where another one counts.
        let own: Vec<_> = new_blocks
            .iter()
            .map(|new| new.cluster..new.cluster + 1)
            .collect();
        let written = self.write_blocks(storage, new_blocks, &own).await;
        let mut state = lock(&self.state);
        let state = &mut *state;
        if written.is_err() && self.can_grow {
            // Some block may be in the file, and the next attempt may put it elsewhere.
            if state.fresh_from == u64::MAX {
                state.fresh_from = clusters.start;
            }
            state.touch(clusters.end);
        }
        written?;
        for new in new_blocks {
            let bytes = self.new_block_bytes(*new, &own);
            state
                .blocks
                .add_unnamed(new.block, self.offset(new.cluster).get(), bytes);
            lock(&self.protected).add(new.cluster..new.cluster + 1);
        }
        self.open_clusters(state, clusters, is_free);
        Ok(())
    }

    /// The clusters of `within` that an existing block counts, once what is free below is known.
    pub(super) async fn counted<S: Storage>(
        &self,
        storage: &S,
        block: u64,
        within: &Range<u64>,
    ) -> Result<Vec<u64>, Error> {
        let entries = self.geometry.refcount_block_entries();
        let part = within.start.max(block * entries)..within.end.min((block + 1) * entries);
        loop {
            self.scan(storage, block).await?;
            self.load_block(storage, block).await?;
            let mut state = lock(&self.state);
            let state = &mut *state;
            let knows = state.free.knows(block);
            if state.untrusted_end > 0 && knows {
                // Nobody has been given anything past the end: what is counted there is not used.
                if !state.blocks.clear_counts(block, state.end) {
                    continue;
                }
                return Ok(Vec::new());
            }
            // Evicted between loading and locking: load again.
            let Some(count) = state.blocks.get(block).filter(|_| knows) else {
                continue;
            };
            let is_counted =
                |cluster: &u64| count(usize::try_from(cluster % entries).unwrap_or(0)) != 0;
            return Ok(part.filter(is_counted).collect());
        }
    }

    /// Which blocks the clusters need, and where those go: into the first cluster of their own
    /// part of the chunk.
    fn plan(&self, clusters: Range<u64>) -> Vec<NewBlock> {
        let entries = self.geometry.refcount_block_entries();
        let state = lock(&self.state);
        let mut new_blocks = Vec::new();
        for block in self.block_index(clusters.start)..=self.block_index(clusters.end - 1) {
            if state.blocks.table_entry(block) == 0 {
                new_blocks.push(NewBlock {
                    block,
                    cluster: clusters.start.max(block * entries),
                });
            }
        }
        new_blocks
    }

    async fn extend_file<S: Storage>(&self, storage: &S, end: u64) -> Result<(), Error> {
        if !self.can_grow || !keeps!(LengthBeforeUse) {
            return Ok(());
        }
        storage
            .set_len(self.file, self.offset(end).get())
            .await
            .map_err(|error| Error::io("cannot extend the image", error))
    }

    /// A block that counts what of `counted` it covers.
    fn new_block_bytes(&self, new: NewBlock, counted: &[Range<u64>]) -> Box<[u8]> {
        let entries = self.geometry.refcount_block_entries();
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut bytes = vec![0; len].into_boxed_slice();
        for range in counted {
            let covered = new.block * entries..(new.block + 1) * entries;
            for cluster in range.start.max(covered.start)..range.end.min(covered.end) {
                let index = usize::try_from(cluster % entries).unwrap_or(0);
                refcount::set(&mut bytes, self.geometry.refcount_order(), index, 1);
            }
        }
        bytes
    }

    async fn write_blocks<S: Storage>(
        &self,
        storage: &S,
        new_blocks: &[NewBlock],
        counted: &[Range<u64>],
    ) -> Result<(), Error> {
        for new in new_blocks {
            let bytes = self.new_block_bytes(*new, counted);
            let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
            storage
                .write(self.file, self.offset(new.cluster).get(), sg)
                .await
                .map_err(|error| Error::io("cannot write a new refcount block", error))?;
        }
        Ok(())
    }

    /// Hands the clusters of a chunk to the free maps.
    fn open_clusters(
        &self,
        state: &mut State,
        clusters: Range<u64>,
        is_free: impl Fn(u64) -> bool,
    ) {
        let entries = self.geometry.refcount_block_entries();
        // Whether old bytes of a device are zero is unknown.
        if self.can_grow && state.fresh_from == u64::MAX {
            state.fresh_from = clusters.start;
        }
        state.end = clusters.end;
        for block in self.block_index(clusters.start)..=self.block_index(clusters.end - 1) {
            let part = clusters.start.max(block * entries)..clusters.end.min((block + 1) * entries);
            if !state.free.knows(block) {
                state.free.learn(block, block * entries, std::iter::empty());
            }
            let protected = lock(&self.protected);
            for cluster in part.filter(|cluster| is_free(*cluster)) {
                if !protected.overlaps(&(cluster..cluster + 1)) {
                    state.free.set_free(cluster, 1, entries);
                }
            }
        }
    }

    /// Clusters of a refcount table twice as long, or long enough to reach `start` with room for a
    /// chunk.
    fn longer_table(&self, start: u64, clusters: u64) -> Result<u64, Error> {
        let entries = self.geometry.refcount_block_entries();
        let per_cluster = self.geometry.cluster_size() / 8;
        let reach = (start + CHUNK_CLUSTERS_MIN).div_ceil(entries) + 1;
        let table_clusters = (clusters * 2).max((reach + 1).div_ceil(per_cluster));
        let bytes_max = REFTABLE_BYTES_MAX.max(self.geometry.cluster_size());
        if table_clusters.saturating_mul(self.geometry.cluster_size()) > bytes_max {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the refcount table is as long as the format's users accept: no more clusters",
            ));
        }
        Ok(table_clusters)
    }

    /// The blocks that count new clusters and themselves, one after the other behind those clusters.
    fn blocks_behind(&self, clusters: &Range<u64>) -> Vec<NewBlock> {
        let mut new_blocks: Vec<NewBlock> = Vec::new();
        let mut end = clusters.end;
        let mut block = self.block_index(clusters.start);
        while block <= self.block_index(end - 1) {
            new_blocks.push(NewBlock {
                block,
                cluster: end,
            });
            end += 1;
            block += 1;
        }
        new_blocks
    }

    /// Moves the refcount table to a longer place past everything it covers now.
    async fn grow_table<S: Storage>(
        &self,
        storage: &S,
        start: u64,
        device_clusters: u64,
    ) -> Result<(), Error> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let (mut table, old_offset, old_clusters) = {
            let state = lock(&self.state);
            (
                state.blocks.table().to_vec(),
                state.table_offset,
                u64::from(state.table_clusters),
            )
        };
        let table_clusters = self.longer_table(start, old_clusters)?;
        // The table first, then every block that is needed to count the table and the blocks.
        let own = start..start + table_clusters;
        let new_blocks = self.blocks_behind(&own);
        let end = own.end + to_u64(new_blocks.len());
        if end > device_clusters {
            return Err(Error::new(ErrorKind::NoSpace, "the image's device is full"));
        }
        let counted = own.start..end;
        self.extend_file(storage, end).await?;
        self.write_blocks(storage, &new_blocks, std::slice::from_ref(&counted))
            .await?;
        let table_len = usize::try_from(table_clusters * per_cluster).unwrap_or(usize::MAX);
        table.resize(table_len, 0);
        for new in &new_blocks {
            if let Some(entry) = usize::try_from(new.block)
                .ok()
                .and_then(|i| table.get_mut(i))
            {
                *entry = self.offset(new.cluster).get();
            }
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table_offset = self.offset(start).get();
        let fault = |error| Error::io("cannot write a longer refcount table", error);
        let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
        storage
            .write(self.file, table_offset, sg)
            .await
            .map_err(fault)?;
        // A failed sync may have lost what guests were told is written.
        if keeps!(TableBeforeHeader) {
            self.header.sync_data(storage).await?;
        }
        let clusters_word = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        self.header
            .update(storage, |header| {
                header.refcount_table_offset = HostOffset::new(table_offset);
                header.refcount_table_clusters = clusters_word;
            })
            .await?;
        {
            let mut state = lock(&self.state);
            let state = &mut *state;
            state.blocks.replace_table(table);
            state.table_offset = table_offset;
            state.table_clusters = clusters_word;
            for new in &new_blocks {
                let bytes = self.new_block_bytes(*new, std::slice::from_ref(&counted));
                state.blocks.insert_named(new.block, bytes);
            }
            lock(&self.protected).add(own.start..end);
            // The table and its blocks take all of it.
            self.open_clusters(state, start..end, |_| false);
        }
        let old_start = old_offset >> self.geometry.cluster_bits();
        lock(&self.protected).remove(&(old_start..old_start + old_clusters));
        let epoch = self.board.end_epoch();
        self.release(storage, old_start, old_clusters, epoch, false)
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunk_limits_agree() {
        const { assert!(CHUNK_BYTES_MAX >> 21 >= 1) };
        const { assert!(CHUNK_CLUSTERS_MIN >= 2) };
    }
}
