//! The refcount table and the resident refcount blocks.
//!
//! The table is resident as a whole. Blocks are loaded on demand and evicted in clock order while
//! they equal the file. A block that is new is *unnamed* until the table in the file names it:
//! its content must be durable first, and its name must be durable before any table entry that
//! relies on one of its counts is written.

use std::collections::HashMap;
use std::sync::Arc;

use event_listener::Event;

use super::Allocator;
use crate::engine::cache::sieve::{Sieve, Verdict};
use crate::engine::error::{Error, ErrorKind, lock};
#[cfg(test)]
use crate::engine::order::{Gap, gap};
use crate::format::geometry::Geometry;
use crate::format::refcount;
use crate::storage::{AlignedBuf, Storage};
use crate::units::{to_u64, to_usize};

/// One refcount block.
#[derive(Debug)]
pub(super) struct Block {
    data: AlignedBytes,
    modified: bool,
    /// Which parts of the data are modified, a bit for each.
    parts: u64,
    /// Counts that the background work has changed are not in the file. No flush needs them there:
    /// the dirty bit excuses them, or (v2) no header relies on them yet.
    lagging: bool,
    /// Loaded by the background work, and used by nobody else: goes when it is in the file.
    borrowed: bool,
    /// Copies of it are being written: it must not be loaded from the file meanwhile.
    writing: u32,
    visited: bool,
}

/// Block bytes; a plain boxed slice, so that the state is `Send`.
type AlignedBytes = Box<[u8]>;

/// A block is written in parts of at least this many bytes (or as a whole): what storage writes without
/// reading first.
const PART_BYTES_MIN: u64 = 4096;

/// Bytes of a block's parts: at most 64.
fn part_bytes(geometry: Geometry) -> u64 {
    let cluster_size = geometry.cluster_size();
    (cluster_size / 64).max(PART_BYTES_MIN).min(cluster_size)
}

/// The counts of one block.
pub(super) struct Counts<'a> {
    data: &'a mut [u8],
    order: u32,
    /// Where changes are noted.
    parts: &'a mut u64,
    /// Counts in a part, as a shift.
    part_shift: u32,
}

impl Counts<'_> {
    pub(super) fn get(&self, index: usize) -> u64 {
        refcount::get(self.data, self.order, index)
    }

    pub(super) fn set(&mut self, index: usize, value: u64) {
        *self.parts |= 1 << (index >> self.part_shift);
        refcount::set(self.data, self.order, index, value);
    }
}

/// A block that the table in the file does not name yet.
#[derive(Clone, Copy, Debug)]
struct Unnamed {
    block: u64,
    /// Its content survives a power cut.
    durable: bool,
    /// One of its counts was raised: tables may rely on it.
    used: bool,
}

/// A copy of a modified block, or of a part of it, to be written.
#[derive(Debug)]
pub(crate) struct BlockCopy {
    pub(crate) block: u64,
    pub(crate) host_offset: u64,
    pub(crate) bytes: Box<[u8]>,
    /// The background work was writing an older copy when this one was made.
    pub(crate) busy: bool,
}

/// A refcount table entry to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableWrite {
    pub(crate) block: u64,
    /// Where in the file.
    pub(crate) host_offset: u64,
    pub(crate) entry: u64,
    /// The named block survives a power cut already.
    pub(crate) durable: bool,
    /// Tables may rely on its counts.
    pub(crate) used: bool,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Blocks {
    geometry: Geometry,
    table: Vec<u64>,
    resident: Sieve<Block>,
    resident_max: usize,
    loading: HashMap<u64, Arc<Event>>,
    modified: Vec<u64>,
    /// Blocks that are lagging, or were.
    lagging: Vec<u64>,
    unnamed: Vec<Unnamed>,
}

impl Blocks {
    pub(super) fn new(geometry: Geometry, table: Vec<u64>, resident_max: u64) -> Self {
        Self {
            geometry,
            table,
            resident: Sieve::default(),
            resident_max: usize::try_from(resident_max).unwrap_or(usize::MAX).max(4),
            loading: HashMap::new(),
            modified: Vec::new(),
            lagging: Vec::new(),
            unnamed: Vec::new(),
        }
    }

    /// The raw table entry; 0 where there is no block.
    pub(super) fn table_entry(&self, block: u64) -> u64 {
        usize::try_from(block)
            .ok()
            .and_then(|i| self.table.get(i))
            .copied()
            .unwrap_or(0)
    }

    /// How many blocks the table can name.
    pub(super) fn table_len(&self) -> u64 {
        u64::try_from(self.table.len()).unwrap_or(0)
    }

    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// The counts of a resident block, for reading.
    pub(super) fn get(&mut self, block: u64) -> Option<impl Fn(usize) -> u64> {
        let order = self.geometry.refcount_order();
        let resident = self.resident.get_mut(block)?;
        resident.visited = true;
        let data = &resident.data;
        Some(move |index| refcount::get(data, order, index))
    }

    /// The counts of a resident block, which is modified from now on.
    pub(super) fn modify(&mut self, block: u64) -> Option<Counts<'_>> {
        let order = self.geometry.refcount_order();
        let part_shift = part_bytes(self.geometry).trailing_zeros() + 3 - order;
        let resident = self.resident.get_mut(block)?;
        resident.visited = true;
        if !resident.modified {
            resident.modified = true;
            self.modified.push(block);
        }
        if let Some(unnamed) = self
            .unnamed
            .iter_mut()
            .find(|unnamed| unnamed.block == block)
        {
            unnamed.used = true;
        }
        Some(Counts {
            data: &mut resident.data,
            order,
            parts: &mut resident.parts,
            part_shift,
        })
    }

    /// Passes the counts of a resident block through `change`, which gets cluster and count. Where one
    /// differs the block lags behind, and it is `Some(true)`. `None`: not resident.
    pub(super) fn change_counts(
        &mut self,
        block: u64,
        change: impl Fn(u64, u64) -> u64,
    ) -> Option<bool> {
        let order = self.geometry.refcount_order();
        let entries = self.geometry.refcount_block_entries();
        let clusters = block * entries..(block + 1) * entries;
        let counts = self.peek(block)?;
        let changed: Vec<(usize, u64)> = clusters
            .enumerate()
            .filter_map(|(index, cluster)| {
                let old = refcount::get(counts, order, index);
                let new = change(cluster, old);
                (new != old).then_some((index, new))
            })
            .collect();
        if changed.is_empty() {
            return Some(false);
        }
        let counts = self.lag(block)?;
        for (index, count) in changed {
            refcount::set(counts, order, index, count);
        }
        Some(true)
    }

    /// No cluster of the block from `end` on is counted any more. False: it is not resident.
    pub(super) fn clear_counts(&mut self, block: u64, end: u64) -> bool {
        self.change_counts(
            block,
            |cluster, count| if cluster < end { count } else { 0 },
        )
        .is_some()
    }

    /// The bytes of a resident block, for the background work.
    pub(super) fn peek(&self, block: u64) -> Option<&[u8]> {
        self.resident.get(block).map(|resident| &*resident.data)
    }

    /// As [`Self::peek`], and the block lags behind from now on.
    pub(super) fn lag(&mut self, block: u64) -> Option<&mut [u8]> {
        let resident = self.resident.get_mut(block)?;
        if !resident.lagging {
            resident.lagging = true;
            self.lagging.push(block);
        }
        Some(&mut resident.data)
    }

    /// Lets go of a block that only the background work has used, if it equals the file.
    pub(super) fn give_back(&mut self, block: u64) {
        let idle = |resident: &Block| {
            resident.borrowed && !resident.modified && !resident.lagging && resident.writing == 0
        };
        if self.resident.get(block).is_some_and(idle) {
            self.resident.remove(block);
        }
    }

    fn insert_borrowed(&mut self, block: u64, data: AlignedBytes) {
        self.resident.insert(
            block,
            Block {
                data,
                modified: false,
                parts: 0,
                lagging: false,
                borrowed: true,
                writing: 0,
                visited: false,
            },
        );
    }

    fn insert(&mut self, block: u64, data: AlignedBytes) {
        if self.resident.len() >= self.resident_max {
            let _evicted = self.resident.evict(|resident| {
                let keep = resident.modified
                    || resident.lagging
                    || resident.writing > 0
                    || resident.visited;
                resident.visited = false;
                if keep { Verdict::Keep } else { Verdict::Evict }
            });
        }
        self.resident.insert(
            block,
            Block {
                data,
                modified: false,
                parts: 0,
                lagging: false,
                borrowed: false,
                writing: 0,
                visited: true,
            },
        );
    }

    /// Adds copies of the parts that are modified: all of a block that lags.
    fn copy_modified(&mut self, block: u64, copies: &mut Vec<BlockCopy>) {
        let host_offset = self.table_entry(block);
        let part = to_usize(part_bytes(self.geometry));
        let Some(resident) = self.resident.get_mut(block) else {
            return;
        };
        let busy = resident.writing > 0;
        let parts = std::mem::take(&mut resident.parts);
        let all = std::mem::take(&mut resident.lagging);
        resident.modified = false;
        let count = resident.data.len() / part;
        let mut first = 0;
        while first < count {
            let run = (first..count)
                .take_while(|index| all || parts >> index & 1 != 0)
                .count();
            if run > 0 {
                let start = first * part;
                copies.push(BlockCopy {
                    block,
                    host_offset: host_offset + to_u64(start),
                    bytes: resident.data[start..start + run * part].into(),
                    busy,
                });
                resident.writing += 1;
            }
            first += run + 1;
        }
    }

    /// The copies have reached the file (or the image has failed).
    fn copies_written(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            if let Some(resident) = self.resident.get_mut(copy.block) {
                resident.writing = resident.writing.saturating_sub(1);
            }
        }
    }

    /// Copies up to `most` lagging blocks. Those that a flush writes are left to it.
    fn copy_lagging(&mut self, most: usize) -> Vec<BlockCopy> {
        let mut copies = Vec::new();
        let mut left = Vec::new();
        self.lagging.sort_unstable();
        self.lagging.dedup();
        for block in std::mem::take(&mut self.lagging) {
            let host_offset = self.table_entry(block);
            let Some(resident) = self.resident.get_mut(block) else {
                continue;
            };
            if !resident.lagging {
                continue;
            }
            if copies.len() == most || resident.writing > 0 || resident.modified {
                left.push(block);
                continue;
            }
            resident.lagging = false;
            resident.writing += 1;
            copies.push(BlockCopy {
                block,
                host_offset,
                bytes: resident.data.clone(),
                busy: false,
            });
        }
        self.lagging = left;
        copies
    }

    /// The end of [`Self::copy_lagging`]: the copies are in the file, or the blocks lag again.
    fn lagging_written(&mut self, copies: &[BlockCopy], written: bool) {
        self.copies_written(copies);
        for copy in copies {
            if written {
                self.give_back(copy.block);
            } else {
                let _bytes = self.lag(copy.block);
            }
        }
    }

    /// Takes in a block that growth has written to the file.
    pub(super) fn add_unnamed(&mut self, block: u64, host_offset: u64, data: AlignedBytes) {
        if let Some(entry) = usize::try_from(block)
            .ok()
            .and_then(|i| self.table.get_mut(i))
        {
            *entry = host_offset;
        }
        self.insert(block, data);
        self.unnamed.push(Unnamed {
            block,
            durable: false,
            used: false,
        });
    }

    /// A longer table took the place of this one, with every block of it named and durable.
    pub(super) fn replace_table(&mut self, table: Vec<u64>) {
        self.table = table;
        self.unnamed.clear();
    }

    pub(super) fn insert_named(&mut self, block: u64, data: AlignedBytes) {
        self.insert(block, data);
    }
}

impl Allocator {
    /// Makes a block resident.
    pub(super) async fn load_block<S: Storage>(
        &self,
        storage: &S,
        block: u64,
    ) -> Result<(), Error> {
        self.load(storage, block, false).await
    }

    /// Makes a block resident for the background work, beside the budget: others keep theirs.
    pub(super) async fn borrow_block<S: Storage>(
        &self,
        storage: &S,
        block: u64,
    ) -> Result<(), Error> {
        self.load(storage, block, true).await
    }

    async fn load<S: Storage>(&self, storage: &S, block: u64, borrowed: bool) -> Result<(), Error> {
        let host_offset = loop {
            let listener = {
                let mut state = lock(&self.state);
                if let Some(resident) = state.blocks.resident.get_mut(block) {
                    resident.borrowed &= borrowed;
                    return Ok(());
                }
                if let Some(event) = state.blocks.loading.get(&block) {
                    event.listen()
                } else {
                    let host_offset = state.blocks.table_entry(block);
                    self.check_block_offset(block, host_offset, state.end)?;
                    state.blocks.loading.insert(block, Arc::new(Event::new()));
                    break host_offset;
                }
            };
            listener.await;
        };
        let loading = Loading {
            allocator: self,
            block,
        };
        let cluster_size = usize::try_from(self.geometry.cluster_size()).unwrap_or(usize::MAX);
        let (read, buf) = storage
            .read_buf(self.file, host_offset, AlignedBuf::zeroed(cluster_size))
            .await;
        read.map_err(|error| {
            Error::io(
                format!("cannot read the refcount block at {host_offset:#x}"),
                error,
            )
        })?;
        let bytes = Box::from(&buf[..]);
        if borrowed {
            lock(&self.state).blocks.insert_borrowed(block, bytes);
        } else {
            lock(&self.state).blocks.insert(block, bytes);
        }
        drop(loading);
        Ok(())
    }

    pub(super) fn check_block_offset(
        &self,
        block: u64,
        host_offset: u64,
        end: u64,
    ) -> Result<(), Error> {
        let cluster_size = self.geometry.cluster_size();
        let fault = if host_offset == 0 {
            "is missing"
        } else if !host_offset.is_multiple_of(cluster_size) {
            "is not aligned to a cluster"
        } else if host_offset / cluster_size >= end {
            "lies beyond the end of the file"
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Corrupt,
            format!("refcount block {block} at {host_offset:#x} {fault}"),
        ))
    }

    /// Copies what is modified of every block and lists the table entries that are not in the file.
    /// A copied block stays resident until [`Self::copies_written`].
    pub(crate) fn collect(&self) -> (Vec<BlockCopy>, Vec<TableWrite>) {
        let modified = std::mem::take(&mut lock(&self.state).blocks.modified);
        let mut copies = Vec::new();
        for block in modified {
            // A hold of the lock for each: requests wait for the copy of one block at most.
            lock(&self.state).blocks.copy_modified(block, &mut copies);
            #[cfg(test)]
            gap(Gap::Collect(6));
        }
        #[cfg(test)]
        gap(Gap::Collect(7));
        let state = lock(&self.state);
        let table_offset = state.table_offset;
        let blocks = &state.blocks;
        let names = blocks
            .unnamed
            .iter()
            .map(|unnamed| TableWrite {
                block: unnamed.block,
                host_offset: table_offset + unnamed.block * 8,
                entry: blocks.table_entry(unnamed.block),
                durable: unnamed.durable,
                used: unnamed.used,
            })
            .collect();
        (copies, names)
    }

    /// The copies have reached the file (or the image has failed).
    pub(crate) fn copies_written(&self, copies: &[BlockCopy]) {
        lock(&self.state).blocks.copies_written(copies);
    }

    /// Copies up to `most` lagging blocks. Those that a flush writes are left to it.
    pub(super) fn collect_lagging(&self, most: usize) -> Vec<BlockCopy> {
        lock(&self.state).blocks.copy_lagging(most)
    }

    /// The end of [`Self::collect_lagging`]: the copies are in the file, or the blocks lag again.
    pub(super) fn lagging_written(&self, copies: &[BlockCopy], written: bool) {
        lock(&self.state).blocks.lagging_written(copies, written);
    }

    /// An `fdatasync` that began after these blocks were written has succeeded.
    pub(crate) fn names_durable_content(&self, names: &[TableWrite]) {
        let mut state = lock(&self.state);
        for unnamed in &mut state.blocks.unnamed {
            unnamed.durable |= names.iter().any(|name| name.block == unnamed.block);
        }
    }

    /// The table entries of these blocks are in the file, durably.
    pub(crate) fn named(&self, names: &[TableWrite]) {
        let mut state = lock(&self.state);
        state
            .blocks
            .unnamed
            .retain(|unnamed| !names.iter().any(|name| name.block == unnamed.block));
    }
}

/// Wakes who waits for a block, also when loading failed or its future was dropped.
struct Loading<'a> {
    allocator: &'a Allocator,
    block: u64,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if let Some(event) = lock(&self.allocator.state)
            .blocks
            .loading
            .remove(&self.block)
        {
            event.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four blocks have room, and there are 64 in the table.
    fn blocks() -> Blocks {
        let geometry = Geometry::new(9, 4).expect("valid");
        Blocks::new(geometry, (1..65).map(|block| block << 9).collect(), 0)
    }

    fn bytes() -> AlignedBytes {
        vec![0; 512].into_boxed_slice()
    }

    /// Others are needed, and go through the cache.
    fn crowd(blocks: &mut Blocks) {
        for block in 20..60 {
            blocks.insert(block, bytes());
        }
        assert!(blocks.get(20).is_none(), "nothing is evicted");
    }

    #[test]
    fn a_block_that_differs_from_the_file_is_neither_evicted_nor_given_back() {
        type Differ = fn(&mut Blocks);
        let differ: [(&str, Differ); 4] = [
            ("modified", |blocks| {
                blocks.modify(1).expect("resident").set(3, 1);
            }),
            ("lagging", |blocks| {
                blocks.lag(1).expect("resident")[7] = 1;
            }),
            ("being flushed", |blocks| {
                blocks.modify(1).expect("resident").set(3, 1);
                blocks.copy_modified(1, &mut Vec::new());
            }),
            ("written in the background", |blocks| {
                blocks.lag(1).expect("resident")[7] = 1;
                assert_eq!(blocks.copy_lagging(1).len(), 1);
            }),
        ];
        for (name, differ) in differ {
            for borrowed in [false, true] {
                let mut blocks = blocks();
                if borrowed {
                    blocks.insert_borrowed(1, bytes());
                } else {
                    blocks.insert(1, bytes());
                }
                differ(&mut blocks);
                blocks.give_back(1);
                assert!(blocks.peek(1).is_some(), "{name}: given back");
                crowd(&mut blocks);
                assert!(blocks.peek(1).is_some(), "{name}: evicted");
            }
        }
    }

    #[test]
    fn a_block_that_equals_the_file_goes() {
        let mut blocks = blocks();
        blocks.insert_borrowed(1, bytes());
        blocks.give_back(1);
        assert!(blocks.peek(1).is_none());
        blocks.insert(1, bytes());
        blocks.lag(1).expect("resident")[7] = 1;
        let copies = blocks.copy_lagging(1);
        blocks.lagging_written(&copies, true);
        crowd(&mut blocks);
        assert!(blocks.peek(1).is_none());
    }

    #[test]
    fn a_block_lags_again_when_its_write_has_failed() {
        let mut blocks = blocks();
        blocks.insert_borrowed(1, bytes());
        blocks.lag(1).expect("resident")[7] = 1;
        let copies = blocks.copy_lagging(9);
        blocks.lagging_written(&copies, false);
        crowd(&mut blocks);
        let copies = blocks.copy_lagging(9);
        assert_eq!(copies.len(), 1);
        assert_eq!(copies[0].bytes[7], 1);
    }

    #[test]
    fn a_block_that_is_being_written_is_not_written_in_the_background() {
        let mut blocks = blocks();
        blocks.insert(1, bytes());
        blocks.modify(1).expect("resident").set(3, 1);
        blocks.lag(1).expect("resident")[9] = 1;
        assert!(blocks.copy_lagging(9).is_empty(), "a flush writes it");
        let mut copies = Vec::new();
        blocks.copy_modified(1, &mut copies);
        blocks.lag(1).expect("resident")[10] = 1;
        assert!(blocks.copy_lagging(9).is_empty(), "it is being written");
        blocks.copies_written(&copies);
        let copies = blocks.copy_lagging(9);
        assert_eq!(copies[0].bytes[9..11], [1, 1]);
        assert!(!copies[0].busy);
    }
}
