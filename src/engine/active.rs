//! The write side of the active layer: which tables are ours, what is taken, what was dropped.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::allocator::Allocator;
use super::error::lock;
use super::header_owner::HeaderOwner;
use super::order::keeps;
use super::snapshot::Snapshots;
use super::taken::Taken;
use crate::engine::sync::Mutex;
use crate::format::geometry::Geometry;
use crate::format::l2::{Cluster, compressed_host_clusters};

/// Most runs of dropped clusters that wait for a flush of the guest's ...
const DROPPED_RUNS_MAX: usize = 1 << 14;
/// ... and most bytes, unless the file is long: there it is an eighth of it.
const DROPPED_BYTES_MIN: u64 = 64 << 20;

/// Host clusters that lost a reference in memory. Their refcount goes down only after the table
/// that dropped them is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Dropped {
    pub(crate) start: u64,
    pub(crate) count: u64,
    /// They are L2 tables.
    pub(crate) tables: bool,
}

/// References that requests have given up in memory, and the snapshots that may still need them.
///
/// One lock for both: "unsettled? then record, else decrement" and "mark settled, apply" exclude
/// each other.
#[derive(Debug, Default)]
pub(crate) struct Drops {
    /// Taken away after the next flush.
    now: Vec<Dropped>,
    /// How many clusters that are.
    now_count: u64,
    /// What no frozen tree keeps any more. The background work takes it away, bit by bit: there may
    /// be as much of it as the image is large, and no guest's flush must wait for that.
    settled: Vec<Dropped>,
    /// Oldest first.
    unsettled: VecDeque<Unsettled>,
}

/// A frozen tree whose references are not counted yet.
#[derive(Debug)]
struct Unsettled {
    key: u64,
    /// Dropped since this freeze and before the next: taken away when this snapshot and all older
    /// ones are settled.
    recorded: Vec<Dropped>,
}

impl Drops {
    /// A tree was frozen. The L1 lock is held; the generation is raised afterwards.
    pub(crate) fn freeze(&mut self, key: u64) {
        self.unsettled.push_back(Unsettled {
            key,
            recorded: Vec::new(),
        });
    }

    /// No frozen tree waits for its references.
    pub(crate) fn all_settled(&self) -> bool {
        self.unsettled.is_empty()
    }

    /// The references of this tree are counted, or will never be: what was dropped since goes with
    /// the next older tree, or to [`Self::take_settled`].
    pub(crate) fn settle(&mut self, key: u64) {
        let Some(index) = self.unsettled.iter().position(|tree| tree.key == key) else {
            return;
        };
        let Some(tree) = self.unsettled.remove(index) else {
            return;
        };
        let list = match index.checked_sub(1).and_then(|i| self.unsettled.get_mut(i)) {
            Some(older) => &mut older.recorded,
            None => &mut self.settled,
        };
        for dropped in tree.recorded {
            push(list, dropped);
        }
    }

    /// A reference that the active tree alone had.
    fn drop_own(&mut self, dropped: Dropped) {
        self.now_count += dropped.count;
        push(&mut self.now, dropped);
    }

    /// One that a frozen tree may have, too.
    fn drop_shared(&mut self, dropped: Dropped) {
        match self.unsettled.back_mut() {
            Some(newest) if keeps!(DeferDecrement) => push(&mut newest.recorded, dropped),
            _ => self.drop_own(dropped),
        }
    }

    /// What may be taken away by who has flushed since.
    pub(crate) fn take_settled(&mut self) -> Vec<Dropped> {
        std::mem::take(&mut self.settled)
    }

    /// What the next flush may take away when it is done.
    pub(crate) fn take(&mut self) -> Vec<Dropped> {
        self.now_count = 0;
        std::mem::take(&mut self.now)
    }

    /// The next flush has something to take away.
    fn has_some(&self) -> bool {
        !self.now.is_empty()
    }
}

/// Neighbours become one run.
fn push(list: &mut Vec<Dropped>, dropped: Dropped) {
    match list.last_mut() {
        Some(last) if last.tables == dropped.tables && last.start + last.count == dropped.start => {
            last.count += dropped.count;
        }
        _ => list.push(dropped),
    }
}

/// What the L1 lock protects, besides the right to add or replace an L2 table.
#[derive(Debug, Default)]
pub(crate) struct L1State {
    /// Entries that differ from the file.
    pub(crate) modified: Vec<usize>,
    /// Host offsets of tables that no L1 entry in the file names yet: their slices are written
    /// and durable before the entry is.
    pub(crate) unnamed_tables: HashSet<u64>,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Active {
    /// For each L1 entry the generation since which its table is ours alone; 0 is never.
    pub(crate) owned_since: Box<[AtomicU64]>,
    /// Virtual size in bytes, as the header has it.
    pub(crate) disk_size: u64,
    /// Where the active L1 table is.
    pub(crate) l1_offset: u64,
    pub(crate) l1: Mutex<L1State>,
    /// L1 indices whose table is being made or copied.
    pub(crate) taken_tables: Arc<Taken>,
    /// Guest clusters that are being allocated, copied or discarded.
    pub(crate) taken: Arc<Taken>,
    pub(crate) allocator: Allocator,
    pub(crate) drops: Mutex<Drops>,
    pub(crate) snapshots: Snapshots,
    pub(crate) header: Arc<HeaderOwner>,
    /// Some autoclear feature is set in the file that the first write must clear.
    pub(crate) clear_autoclear: bool,
}

impl Active {
    #[inline]
    pub(crate) fn is_owned(&self, l1_index: usize, generation: u64) -> bool {
        self.owned_since
            .get(l1_index)
            .is_some_and(|since| since.load(Ordering::Acquire) == generation)
    }

    /// The L1 entries of these tables are in the file, durably.
    pub(crate) fn name_tables(&self, tables: &[u64]) {
        let mut l1 = lock(&self.l1);
        for table in tables {
            l1.unnamed_tables.remove(table);
        }
    }

    /// So much was dropped since the last flush that one is due: until then it is in memory, and its
    /// clusters cannot be used again. A guest need not ever flush.
    pub(crate) fn wants_release(&self, geometry: Geometry) -> bool {
        let (runs, clusters) = {
            let drops = lock(&self.drops);
            (drops.now.len(), drops.now_count)
        };
        let least = DROPPED_BYTES_MIN >> geometry.cluster_bits();
        runs > DROPPED_RUNS_MAX
            || (clusters > least && clusters > self.allocator.cluster_count() / 8)
    }

    /// Something was dropped that the next flush takes away.
    pub(crate) fn has_dropped(&self) -> bool {
        lock(&self.drops).has_some()
    }

    /// Records that an entry no longer refers to what it did. `own`: the entry had the copied flag,
    /// in a table that is ours or was frozen with the change in it, so that nobody else refers to
    /// the cluster.
    pub(crate) fn drop_cluster(&self, geometry: Geometry, cluster: Cluster) {
        let (start, last, own) = match cluster {
            Cluster::Unallocated | Cluster::ZeroPlain => return,
            Cluster::Standard { host, copied } | Cluster::ZeroAllocated { host, copied } => {
                let index = geometry.host_cluster(host).get();
                (index, index, copied)
            }
            Cluster::Compressed { host, bytes } => {
                let touched = compressed_host_clusters(geometry, host, bytes);
                (touched.start().get(), touched.end().get(), false)
            }
        };
        let dropped = Dropped {
            start,
            count: last - start + 1,
            tables: false,
        };
        let mut drops = lock(&self.drops);
        if own {
            drops.drop_own(dropped);
        } else {
            drops.drop_shared(dropped);
        }
    }

    /// Records that the active tree no longer refers to clusters that a frozen one may refer to.
    pub(crate) fn drop_shared(&self, dropped: Dropped) {
        lock(&self.drops).drop_shared(dropped);
    }

    /// Records that nobody refers to these clusters any more; that is durable already or will be
    /// with the next flush.
    pub(crate) fn drop_own(&self, dropped: Dropped) {
        lock(&self.drops).drop_own(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64) -> Dropped {
        Dropped {
            start,
            count: 1,
            tables: false,
        }
    }

    #[test]
    fn a_shared_drop_waits_for_the_newest_frozen_tree_and_all_older_ones() {
        let mut drops = Drops::default();
        drops.drop_shared(run(1));
        drops.freeze(1);
        drops.drop_shared(run(3));
        drops.drop_own(run(5));
        drops.freeze(2);
        drops.drop_shared(run(7));
        assert_eq!(drops.take(), [run(1), run(5)]);
        drops.settle(2);
        assert_eq!(drops.take_settled(), []);
        drops.settle(1);
        assert_eq!(drops.take_settled(), [run(3), run(7)]);
        assert_eq!(drops.take(), []);
        assert!(drops.all_settled());
    }
}
