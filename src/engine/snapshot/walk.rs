//! Walking a snapshot's tree: its L2 tables in the order of the file, what they reach as runs of
//! clusters, and the counts of those, one refcount block after the other.
//!
//! Tables are read from the file into private buffers: no cached slice moves for it. That is right
//! because nobody but the background work changes the tables of a committed snapshot: they are not
//! owned, and what was modified in memory was flushed before the commit.
//!
//! Restartable: `next` and the batch's `done` say exactly what has been counted.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::Root;
use crate::engine::allocator::{Change, PackedRun};
use crate::engine::error::Error;
use crate::engine::layer::Mapping;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l1::L1Entry;
use crate::format::l2::{Cluster, L2Entry, compressed_host_clusters};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{GuestOffset, HostOffset, to_u64, to_usize};

/// Bytes of L2 tables that are read together (at least one table).
const READ_BYTES: u64 = 1 << 20;
/// Reads in flight at a time.
const READS_IN_FLIGHT: usize = 8;
/// Runs that are gathered before they are counted: 8 MiB of memory. The more, the less often a
/// refcount block comes up where an image is laid out at random.
const RUNS_MAX: usize = 1 << 20;

/// Runs of clusters whose counts are to change.
#[derive(Debug, Default)]
pub(super) struct Batch {
    data: Vec<PackedRun>,
    data_done: usize,
    /// L2 tables: cached slices of those that are freed must go.
    tables: Vec<PackedRun>,
    tables_done: usize,
    sealed: bool,
}

impl Batch {
    /// Adds clusters to a list, joined to its last run where they follow it in the same block.
    pub(super) fn push(&mut self, entries: u64, start: u64, count: u64, tables: bool) {
        let list = if tables {
            &mut self.tables
        } else {
            &mut self.data
        };
        let block_max = entries.min(PackedRun::COUNT_MAX);
        let mut start = start;
        let end = start + count;
        while start < end {
            let piece = (end - start).min(block_max - start % block_max);
            match list.last_mut() {
                Some(last)
                    if last.start() + last.count() == start && !start.is_multiple_of(block_max) =>
                {
                    *last = PackedRun::new(last.start(), last.count() + piece);
                }
                _ => list.push(PackedRun::new(start, piece)),
            }
            start += piece;
        }
    }

    fn len(&self) -> usize {
        self.data.len() + self.tables.len()
    }

    /// What [`Self::restore`] goes back to: the lengths, and the last runs, which may grow.
    fn mark(&self) -> [(usize, Option<PackedRun>); 2] {
        [&self.data, &self.tables].map(|list| (list.len(), list.last().copied()))
    }

    fn restore(&mut self, mark: &[(usize, Option<PackedRun>); 2]) {
        for (list, (len, last)) in [&mut self.data, &mut self.tables].into_iter().zip(mark) {
            list.truncate(*len);
            if let (Some(slot), Some(last)) = (list.last_mut(), last) {
                *slot = *last;
            }
        }
    }

    /// Nothing more is added until everything is counted.
    pub(super) fn seal(&mut self) {
        self.data.sort_unstable();
        self.tables.sort_unstable();
        self.sealed = true;
    }

    fn is_counted(&self) -> bool {
        self.data_done == self.data.len() && self.tables_done == self.tables.len()
    }
}

/// A tree that is being counted.
#[derive(Debug)]
pub(super) struct Walk {
    root: Arc<Root>,
    /// L1 indices that name a table, by its place in the file.
    order: Vec<u32>,
    /// How many of them are in the batch or counted.
    next: usize,
    batch: Batch,
    /// Bytes of tables that nobody was told of.
    done: u64,
}

impl Walk {
    pub(super) fn new(root: &Arc<Root>) -> Self {
        let mut order: Vec<u32> = (0_u32..)
            .zip(&root.l1)
            .filter(|(_, raw)| L1Entry(**raw).table_offset().is_some())
            .map(|(index, _)| index)
            .collect();
        order.sort_unstable_by_key(|index| root.table(*index).map(HostOffset::get));
        Self {
            root: Arc::clone(root),
            order,
            next: 0,
            batch: Batch::default(),
            done: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.next == self.order.len() && self.batch.is_counted()
    }

    /// Bytes of tables since the last call.
    pub(super) fn take_done(&mut self) -> u64 {
        std::mem::take(&mut self.done)
    }

    /// The next tables, as pieces of the file without gaps.
    fn upcoming(&self, mapping: &Mapping) -> Result<Vec<Piece>, Error> {
        let cluster_size = mapping.geometry.cluster_size();
        let mut pieces: Vec<Piece> = Vec::new();
        let most = to_usize((READ_BYTES / cluster_size).max(1));
        for index in self.order[self.next..].iter().take(most) {
            let l1_index = to_usize(u64::from(*index));
            let entry = L1Entry(self.root.l1.get(l1_index).copied().unwrap_or(0));
            let table = mapping
                .table(l1_index, entry)
                .map_err(|error| error.context(format!("snapshot '{}'", self.root.name)))?;
            match pieces.last_mut() {
                Some(last)
                    if last.start + to_u64(last.tables.len()) * cluster_size == table.get() =>
                {
                    last.tables.push(l1_index);
                }
                _ => pieces.push(Piece {
                    start: table.get(),
                    tables: vec![l1_index],
                }),
            }
        }
        Ok(pieces)
    }
}

impl Root {
    pub(super) fn table(&self, l1_index: u32) -> Option<HostOffset> {
        L1Entry(*self.l1.get(to_usize(u64::from(l1_index)))?).table_offset()
    }
}

/// Tables that follow each other in the file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) start: u64,
    /// Their L1 indices.
    pub(super) tables: Vec<usize>,
}

impl<S: Storage> Worker<S> {
    /// Reads some tables, or counts some of what was read. Returns the bytes that it moved.
    pub(super) async fn walk_on(
        &self,
        target: Target<'_>,
        walk: &mut Walk,
        change: Change,
    ) -> Result<u64, Error> {
        if walk.batch.sealed {
            let bytes = self.count_batch(target, &mut walk.batch, change).await?;
            if walk.batch.is_counted() {
                walk.batch = Batch::default();
            }
            return Ok(bytes);
        }
        let mapping = target.mapping;
        let cluster_size = mapping.geometry.cluster_size();
        let pieces = walk.upcoming(mapping)?;
        let read: Vec<(Piece, AlignedBuf)> = stream::iter(pieces)
            .map(|piece| self.read_tables(target, piece))
            .buffered(READS_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut moved = 0;
        for (piece, buf) in &read {
            moved += to_u64(buf.len());
            if change == Change::Raise {
                moved += self.clear_copied_flags(target, piece, buf).await?;
            }
        }
        let mut batch = std::mem::take(&mut walk.batch);
        let before = batch.mark();
        let mut tables = 0;
        for (piece, buf) in &read {
            let bytes = buf.chunks_exact(to_usize(cluster_size));
            for ((number, l1_index), table) in (0_u64..).zip(&piece.tables).zip(bytes) {
                let start = piece.start + number * cluster_size;
                if let Err(error) = gather(mapping, *l1_index, start, table, change, &mut batch) {
                    batch.restore(&before);
                    walk.batch = batch;
                    return Err(error.context(format!("snapshot '{}'", walk.root.name)));
                }
                tables += 1;
            }
        }
        walk.batch = batch;
        walk.next += tables;
        walk.done += to_u64(tables) * cluster_size;
        if walk.batch.len() >= RUNS_MAX || walk.next == walk.order.len() {
            walk.batch.seal();
        }
        Ok(moved)
    }

    pub(super) async fn read_tables(
        &self,
        target: Target<'_>,
        piece: Piece,
    ) -> Result<(Piece, AlignedBuf), Error> {
        let len = to_u64(piece.tables.len()) * target.mapping.geometry.cluster_size();
        let buf = AlignedBuf::zeroed(to_usize(len));
        let (read, buf) = self
            .storage
            .read_buf(target.layer.file, piece.start, buf)
            .await;
        read.map_err(|error| {
            let start = piece.start;
            Error::io(format!("cannot read the L2 table at {start:#x}"), error)
        })?;
        Ok((piece, buf))
    }

    /// Changes some counts of a sealed batch; returns the bytes that it moved.
    pub(super) async fn count_batch(
        &self,
        target: Target<'_>,
        batch: &mut Batch,
        change: Change,
    ) -> Result<u64, Error> {
        let allocator = &target.active.allocator;
        let (runs, done, change) = if batch.data_done < batch.data.len() {
            (&batch.data, &mut batch.data_done, change)
        } else if batch.tables_done < batch.tables.len() {
            let change = match change {
                Change::Raise => Change::Raise,
                Change::Lower { .. } => Change::Lower { tables: true },
            };
            (&batch.tables, &mut batch.tables_done, change)
        } else {
            return Ok(0);
        };
        let before = *done;
        allocator.change(&self.storage, runs, change, done).await?;
        // Each block is read and written.
        let entries = target.mapping.geometry.refcount_block_entries();
        let blocks =
            runs[before..*done].chunk_by(|a, b| a.start() / entries == b.start() / entries);
        Ok(to_u64(blocks.count()) * 2 * target.mapping.geometry.cluster_size())
    }

    /// Everything is counted.
    pub(super) fn is_batch_counted(batch: &Batch) -> bool {
        batch.is_counted()
    }
}

/// Adds what a table reaches, and the table itself.
fn gather(
    mapping: &Mapping,
    l1_index: usize,
    start: u64,
    table: &[u8],
    change: Change,
    batch: &mut Batch,
) -> Result<(), Error> {
    let geometry = mapping.geometry;
    let entries = geometry.refcount_block_entries();
    let raw = || {
        table
            .chunks_exact(8)
            .map(|chunk| chunk.try_into().map_or(0, u64::from_be_bytes))
    };
    let place = HostOffset::new(start);
    let suspicious = mapping.is_suspicious(place, raw());
    if suspicious {
        // Some entry is damaged: which one?
        let first = to_u64(l1_index).saturating_mul(geometry.l2_table_span());
        for (index, raw) in (0_u64..).zip(raw()) {
            let guest = first.saturating_add(index << geometry.cluster_bits());
            if !mapping.is_lost(place, L2Entry(raw)) {
                mapping.cluster(place, GuestOffset::new(guest), L2Entry(raw))?;
            }
        }
    }
    // Joined here, pushed when it ends: most tables are a few long runs.
    let mut run = 0..0;
    for raw in raw() {
        if raw == 0 || (suspicious && mapping.is_lost(place, L2Entry(raw))) {
            continue;
        }
        let (first, last) = match L2Entry(raw).decode(geometry, mapping.version) {
            Ok(Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. }) => {
                let cluster = geometry.host_cluster(host).get();
                (cluster, cluster)
            }
            Ok(Cluster::Compressed { host, bytes }) => {
                let touched = compressed_host_clusters(geometry, host, bytes);
                (touched.start().get(), touched.end().get())
            }
            // An entry that does not decode was an error above.
            Ok(Cluster::Unallocated | Cluster::ZeroPlain) | Err(_) => continue,
        };
        if first != run.end {
            batch.push(entries, run.start, run.end - run.start, false);
            run = first..first;
        }
        run.end = last + 1;
    }
    batch.push(entries, run.start, run.end - run.start, false);
    let own = start >> geometry.cluster_bits();
    batch.push(entries, own, 1, change != Change::Raise);
    Ok(())
}
