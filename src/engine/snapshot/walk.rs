//! Walking a snapshot's tree: its L2 tables in the order of the file, what they reach as runs of
//! clusters, and the counts of those, one refcount block after the other.
//!
//! Tables are read from the file into private buffers: no cached slice moves for it. That is right
//! because nobody but the background work changes the tables of a committed snapshot: they are not
//! owned, and what was modified in memory was flushed before the commit.
//!
//! Most trees are a few long runs. Where there are too many, since the clusters lie in no order, the
//! walk begins again and marks clusters in a bitmap instead: a *window* of the file at a time, with
//! one pass over the tables for each. So a refcount block is read and written once, or once for each
//! window, however the image is laid out. Nothing is counted before one of the two ways is decided
//! on, and the tables are counted last, since they are read again until then.
//!
//! Restartable: the stage and the batch's `done` say exactly what has been counted.
//!
//! Memory: a window, a batch, the tables and refcount blocks at hand; 13 MiB at most with clusters of
//! 64 KiB.

use std::ops::Range;
use std::sync::Arc;

use super::Root;
use crate::engine::allocator::{Change, PackedRun};
use crate::engine::breath::breathe;
use crate::engine::bulk::read_clusters;
use crate::engine::check::COUNTS_BYTES;
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
/// Runs that are gathered before they are counted: 2 MiB of memory, and what one read adds.
const RUNS_MAX: usize = 1 << 18;
/// Clusters of a window: 6 MiB of memory, more than a 2 TiB disk has with clusters of 64 KiB.
const WINDOW_MAX: u64 = 48 << 20;
/// Runs by which a list grows at least.
const RUNS_MORE: usize = 1 << 14;

/// How much of everything: smaller in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) runs: usize,
    pub(super) window: u64,
    /// Of a rebuild.
    pub(super) counts_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            runs: RUNS_MAX,
            window: WINDOW_MAX,
            counts_bytes: COUNTS_BYTES,
        }
    }
}

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
                _ => {
                    if list.len() == list.capacity() {
                        // Not twice as much: the lists are most of what a walk has in memory.
                        list.reserve_exact(RUNS_MORE.max(list.len() / 8));
                    }
                    list.push(PackedRun::new(start, piece));
                }
            }
            start += piece;
        }
    }

    fn len(&self) -> usize {
        self.data.len() + self.tables.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Nothing more is added until everything is counted.
    pub(super) fn seal(&mut self) {
        self.data.sort_unstable();
        self.tables.sort_unstable();
        self.sealed = true;
    }

    fn is_counted(&self) -> bool {
        self.sealed && self.data_done == self.data.len() && self.tables_done == self.tables.len()
    }
}

/// Clusters of a part of the file, one bit each.
#[derive(Debug)]
struct Window {
    clusters: Range<u64>,
    marks: Vec<u64>,
    /// Every table is read: what is marked is counted.
    is_full: bool,
    /// Clusters before this one are in a batch, or counted.
    taken: u64,
}

impl Window {
    fn new(clusters: Range<u64>) -> Self {
        let words = to_usize((clusters.end - clusters.start).div_ceil(64));
        Self {
            taken: clusters.start,
            clusters,
            marks: vec![0; words],
            is_full: false,
        }
    }

    /// Marks those of some clusters that lie in the window; `again` gets what was marked already.
    fn mark(&mut self, clusters: Range<u64>, mut again: impl FnMut(u64)) {
        let first = clusters.start.max(self.clusters.start);
        for cluster in first..clusters.end.min(self.clusters.end) {
            let at = to_usize(cluster - self.clusters.start);
            let bit = 1 << (at % 64);
            if let Some(word) = self.marks.get_mut(at / 64) {
                if *word & bit != 0 {
                    again(cluster);
                }
                *word |= bit;
            }
        }
    }

    /// Moves marked clusters into a batch, until that has enough of them or nothing is left. Runs end
    /// where refcount blocks do.
    fn take(&mut self, entries: u64, batch: &mut Batch, runs_max: usize) {
        while self.taken < self.clusters.end && batch.len() < runs_max {
            let at = self.taken - self.clusters.start;
            let word = self.marks.get(to_usize(at / 64)).copied().unwrap_or(0) >> (at % 64);
            let left = (64 - at % 64).min(self.clusters.end - self.taken);
            let absent = u64::from(word.trailing_zeros()).min(left);
            let present = u64::from((word >> (absent % 64)).trailing_ones()).min(left - absent);
            if present > 0 {
                batch.push(entries, self.taken + absent, present, false);
            }
            self.taken += absent + present;
        }
    }
}

/// What a walk is doing.
#[derive(Debug)]
enum Stage {
    /// Gathering runs.
    Runs,
    /// Marking clusters of a window, and counting them.
    Window(Window),
    /// Counting the tables from this one on.
    Tables(usize),
}

/// How far a tree is walked.
#[derive(Debug)]
pub(super) struct Walk {
    root: Arc<Root>,
    limits: Limits,
    /// L1 indices that name a table, by its place in the file.
    order: Vec<u32>,
    /// How many of them are read in the present pass.
    next: usize,
    /// How many of them have no copied flags any more.
    cleared: usize,
    stage: Stage,
    batch: Batch,
    /// Where the clusters end that the tree can reach; known from the first window on.
    end: u64,
    /// Bytes of tables that are as good as done, and those that somebody was told of.
    done: u64,
    told: u64,
}

impl Walk {
    pub(super) fn new(root: &Arc<Root>, limits: Limits) -> Self {
        let mut order: Vec<u32> = (0_u32..)
            .zip(&root.l1)
            .filter(|(_, raw)| L1Entry(**raw).table_offset().is_some())
            .map(|(index, _)| index)
            .collect();
        order.sort_unstable_by_key(|index| root.table(*index).map(HostOffset::get));
        Self {
            root: Arc::clone(root),
            limits,
            order,
            next: 0,
            cleared: 0,
            stage: Stage::Runs,
            batch: Batch::default(),
            end: 0,
            done: 0,
            told: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Tables(next) if next == self.order.len())
            && (self.batch.is_empty() || self.batch.is_counted())
    }

    /// Bytes of tables since the last call.
    pub(super) fn take_done(&mut self) -> u64 {
        let more = self.done.saturating_sub(self.told);
        self.told += more;
        more
    }

    /// Some tables more are read: so much of all passes is done.
    fn advance(&mut self, tables: usize, cluster_size: u64) {
        self.next += tables;
        let (pass, passes) = match &self.stage {
            Stage::Window(window) => (
                window.clusters.start / self.limits.window,
                self.end.div_ceil(self.limits.window).max(1),
            ),
            Stage::Runs | Stage::Tables(_) => (0, 1),
        };
        let all = to_u64(self.order.len());
        let read = pass * all + to_u64(self.next);
        self.done = read * cluster_size / passes;
    }

    /// The next tables: host offset and L1 index.
    fn upcoming(&self, mapping: &Mapping) -> Result<Vec<(u64, usize)>, Error> {
        let most = to_usize((READ_BYTES / mapping.geometry.cluster_size()).max(1));
        let table = |index: &u32| {
            let l1_index = to_usize(u64::from(*index));
            let entry = L1Entry(self.root.l1.get(l1_index).copied().unwrap_or(0));
            let table = mapping.table(l1_index, entry)?;
            Ok((table.get(), l1_index))
        };
        let tables = self.order[self.next..].iter().take(most).map(table);
        let tables: Result<_, Error> = tables.collect();
        tables.map_err(|error| error.context(format!("snapshot '{}'", self.root.name)))
    }

    /// Adds what a table reaches, which was judged.
    fn gather(&mut self, mapping: &Mapping, start: u64, table: &[u8], suspicious: bool) {
        let entries = mapping.geometry.refcount_block_entries();
        let Self { stage, batch, .. } = self;
        for_each_run(mapping, start, table, suspicious, |run| match stage {
            Stage::Window(window) => {
                window.mark(run, |cluster| batch.push(entries, cluster, 1, false));
            }
            Stage::Runs | Stage::Tables(_) => {
                batch.push(entries, run.start, run.end - run.start, false);
            }
        });
    }

    /// What to do when some tables are gathered: seals what must be counted first.
    fn decide(&mut self, clusters_end: u64) {
        let all_read = self.next == self.order.len();
        match &mut self.stage {
            Stage::Runs if self.batch.len() > self.limits.runs && !all_read => {
                self.batch = Batch::default();
                self.next = 0;
                self.end = clusters_end;
                let window = 0..clusters_end.min(self.limits.window);
                self.stage = Stage::Window(Window::new(window));
            }
            Stage::Runs if all_read => {
                self.batch.seal();
                self.stage = Stage::Tables(0);
            }
            Stage::Runs => {}
            Stage::Window(window) => {
                // What is named more than once in it is counted on its own.
                window.is_full = all_read;
                if self.batch.len() > self.limits.runs || (all_read && !self.batch.is_empty()) {
                    self.batch.seal();
                }
            }
            Stage::Tables(_) => {}
        }
    }

    /// Fills the batch with what is to be counted next, where all tables are read. False: some are not.
    fn refill(&mut self, mapping: &Mapping) -> bool {
        let entries = mapping.geometry.refcount_block_entries();
        match &mut self.stage {
            Stage::Window(window) if window.is_full => {
                window.take(entries, &mut self.batch, self.limits.runs);
                if self.batch.is_empty() {
                    let start = window.clusters.end;
                    let window = start..self.end.min(start + self.limits.window);
                    self.stage = if window.is_empty() {
                        Stage::Tables(0)
                    } else {
                        self.next = 0;
                        Stage::Window(Window::new(window))
                    };
                } else {
                    self.batch.seal();
                }
                true
            }
            Stage::Tables(next) => {
                let cluster_bits = mapping.geometry.cluster_bits();
                let tables = self.order[*next..].iter().take(self.limits.runs);
                *next += tables.len();
                for table in tables.filter_map(|index| self.root.table(*index)) {
                    let cluster = table.get() >> cluster_bits;
                    self.batch.push(entries, cluster, 1, true);
                }
                self.batch.seal();
                true
            }
            Stage::Runs | Stage::Window(_) => false,
        }
    }
}

impl Root {
    pub(super) fn table(&self, l1_index: u32) -> Option<HostOffset> {
        L1Entry(*self.l1.get(to_usize(u64::from(l1_index)))?).table_offset()
    }
}

impl<S: Storage> Worker<S> {
    /// Reads some tables, or counts some of what was read. Returns the bytes that it moved.
    pub(super) async fn walk_on(
        &self,
        target: Target<'_>,
        walk: &mut Walk,
        change: Change,
    ) -> Result<u64, Error> {
        let mapping = target.mapping;
        if walk.batch.sealed {
            let bytes = self.count_batch(target, &mut walk.batch, change).await?;
            if walk.batch.is_counted() {
                walk.batch = Batch::default();
            }
            return Ok(bytes);
        }
        if walk.refill(mapping) {
            return Ok(0);
        }
        self.flush_many_l1_entries(target).await?;
        let cluster_size = mapping.geometry.cluster_size();
        let tables = walk.upcoming(mapping)?;
        let starts: Vec<u64> = tables.iter().map(|(start, _)| *start).collect();
        let buf = self.read_tables(target, &starts).await?;
        let mut moved = to_u64(buf.len());
        let bytes = || buf.chunks_exact(to_usize(cluster_size));
        let mut suspicious = Vec::with_capacity(tables.len());
        for ((start, l1_index), table) in tables.iter().zip(bytes()) {
            breathe(cluster_size);
            suspicious.push(
                judge(mapping, *l1_index, *start, table)
                    .map_err(|error| error.context(format!("snapshot '{}'", walk.root.name)))?,
            );
        }
        if change == Change::Raise && walk.next >= walk.cleared {
            moved += self.clear_copied_flags(target, &tables, &buf).await?;
            walk.cleared = walk.next + tables.len();
        }
        // Nothing fails from here on.
        for ((start, table), suspicious) in starts.iter().zip(bytes()).zip(suspicious) {
            walk.gather(mapping, *start, table, suspicious);
            breathe(cluster_size);
        }
        walk.advance(tables.len(), cluster_size);
        let end = target.active.allocator.end_offset();
        walk.decide(end.div_ceil(cluster_size));
        Ok(moved)
    }

    /// Reads the L2 tables at these host offsets, one after the other into a buffer.
    pub(super) async fn read_tables(
        &self,
        target: Target<'_>,
        starts: &[u64],
    ) -> Result<AlignedBuf, Error> {
        let cluster_size = target.mapping.geometry.cluster_size();
        let file = target.layer.file;
        let read = read_clusters(&self.storage, file, cluster_size, starts).await;
        if let Some((failed, error)) = read.failed.into_iter().next() {
            let start = starts[failed.start];
            let text = format!("cannot read the L2 table at {start:#x}");
            return Err(Error::io(text, error));
        }
        Ok(read.buf)
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

/// Looks for damage in a table of a snapshot; says whether any entry needs a look of its own.
fn judge(mapping: &Mapping, l1_index: usize, start: u64, table: &[u8]) -> Result<bool, Error> {
    let geometry = mapping.geometry;
    let place = HostOffset::new(start);
    if !mapping.is_suspicious(place, words(table)) {
        return Ok(false);
    }
    // Some entry is damaged, or lost: which one?
    let first = to_u64(l1_index).saturating_mul(geometry.l2_table_span());
    for (index, raw) in (0_u64..).zip(words(table)) {
        let guest = first.saturating_add(index << geometry.cluster_bits());
        if !mapping.is_lost(place, L2Entry(raw)) {
            mapping.cluster(place, GuestOffset::new(guest), L2Entry(raw))?;
        }
    }
    Ok(true)
}

/// Shows the clusters that a table reaches, as runs; none of lost data.
fn for_each_run(
    mapping: &Mapping,
    start: u64,
    table: &[u8],
    suspicious: bool,
    mut see: impl FnMut(Range<u64>),
) {
    let geometry = mapping.geometry;
    let place = HostOffset::new(start);
    // Joined here: most tables are a few long runs.
    let mut run = 0..0;
    for raw in words(table) {
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
            // An entry that does not decode was an error when it was judged.
            Ok(Cluster::Unallocated | Cluster::ZeroPlain) | Err(_) => continue,
        };
        if first != run.end {
            if !run.is_empty() {
                see(run);
            }
            run = first..first;
        }
        run.end = last + 1;
    }
    if !run.is_empty() {
        see(run);
    }
}

fn words(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table
        .chunks_exact(8)
        .map(|chunk| chunk.try_into().map_or(0, u64::from_be_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(window: &mut Window, entries: u64, runs_max: usize) -> Vec<Vec<(u64, u64)>> {
        let mut batches = Vec::new();
        loop {
            let mut batch = Batch::default();
            window.take(entries, &mut batch, runs_max);
            if batch.is_empty() {
                return batches;
            }
            let runs = batch.data.iter().map(|run| (run.start(), run.count()));
            batches.push(runs.collect());
        }
    }

    #[test]
    fn a_window_gives_back_what_was_marked_in_it() {
        let mut window = Window::new(100..1000);
        let mut again = Vec::new();
        for run in [90..103, 500..700, 102..104, 998..1002] {
            window.mark(run, |cluster| again.push(cluster));
        }
        assert_eq!(again, [102]);
        let runs = taken(&mut window, 256, usize::MAX);
        assert_eq!(
            runs,
            [[(100, 4), (500, 12), (512, 188), (998, 2)]],
            "cut at multiples of 256"
        );
    }

    #[test]
    fn a_window_is_given_back_in_parts() {
        let mut window = Window::new(0..64 * 20);
        for cluster in (0..64 * 20).step_by(2) {
            window.mark(cluster..cluster + 1, |_| panic!("marked once"));
        }
        let batches = taken(&mut window, 1 << 20, 100);
        let clusters: Vec<u64> = batches.concat().into_iter().map(|run| run.0).collect();
        assert!(
            batches
                .iter()
                .all(|batch| batch.len() == 100 || batch.len() == 40)
        );
        assert!(clusters.into_iter().eq((0..64 * 20).step_by(2)));
    }
}
