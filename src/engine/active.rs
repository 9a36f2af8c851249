//! The write side of the active layer: which tables are ours, what is taken, what was dropped.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::allocator::Allocator;
use super::error::lock;
use super::header_owner::HeaderOwner;
use super::taken::Taken;
use crate::format::geometry::Geometry;
use crate::format::l2::{Cluster, compressed_host_clusters};

/// Host clusters that lost a reference in memory. Their refcount goes down only after the table
/// that dropped them is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Dropped {
    pub(crate) start: u64,
    pub(crate) count: u64,
    /// They are L2 tables.
    pub(crate) tables: bool,
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
    /// Where the active L1 table is.
    pub(crate) l1_offset: u64,
    pub(crate) l1: Mutex<L1State>,
    /// L1 indices whose table is being made or copied.
    pub(crate) taken_tables: Arc<Taken>,
    /// Guest clusters that are being allocated, copied or discarded.
    pub(crate) taken: Arc<Taken>,
    pub(crate) allocator: Allocator,
    pub(crate) dropped: Mutex<Vec<Dropped>>,
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

    /// Records that an entry no longer refers to what it did.
    pub(crate) fn drop_cluster(&self, geometry: Geometry, cluster: Cluster) {
        let (start, last) = match cluster {
            Cluster::Unallocated | Cluster::ZeroPlain => return,
            Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. } => {
                let index = geometry.host_cluster(host).get();
                (index, index)
            }
            Cluster::Compressed { host, bytes } => {
                let touched = compressed_host_clusters(geometry, host, bytes);
                (touched.start().get(), touched.end().get())
            }
        };
        self.drop_clusters(Dropped {
            start,
            count: last - start + 1,
            tables: false,
        });
    }

    /// Records dropped clusters; neighbours become one run.
    pub(crate) fn drop_clusters(&self, dropped: Dropped) {
        let mut list = lock(&self.dropped);
        match list.last_mut() {
            Some(last)
                if last.tables == dropped.tables && last.start + last.count == dropped.start =>
            {
                last.count += dropped.count;
            }
            _ => list.push(dropped),
        }
    }
}
