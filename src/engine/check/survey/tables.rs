//! The L2 tables that L1 tables name, and how often they do.

use crate::engine::check::count::CLUSTERS_MAX;

/// Tables that are collected before they are sorted.
const TABLES_MORE: usize = 4096;

/// An L2 table and how often it is named. There may be many.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::engine::check) struct TableUse {
    /// Where it is: a host cluster inside the file, below [`CLUSTERS_MAX`].
    pub(super) cluster: u32,
    /// By the active L1 table.
    pub(super) active: u32,
    /// By all L1 tables together.
    pub(in crate::engine::check) total: u64,
}

const _: () = assert!(CLUSTERS_MAX <= 1 << 32);

impl TableUse {
    /// Adds the uses of the same table.
    fn join(&mut self, same: &Self) {
        self.active += same.active;
        self.total += same.total;
    }

    /// Where it is.
    pub(in crate::engine::check) fn cluster(&self) -> u64 {
        u64::from(self.cluster)
    }

    /// How often the active L1 table names it.
    pub(in crate::engine::check) fn active(&self) -> u64 {
        u64::from(self.active)
    }
}

/// The L2 tables that L1 tables name.
#[derive(Default)]
pub(super) struct Tables {
    /// In file order, each once.
    pub(super) sorted: Vec<TableUse>,
    /// Those that are not among them yet.
    more: Vec<TableUse>,
}

impl Tables {
    /// A table is named once more, by so many L1 tables at once.
    pub(super) fn add(&mut self, table: TableUse) {
        match self
            .sorted
            .binary_search_by_key(&table.cluster, |known| known.cluster)
        {
            Ok(index) => self.sorted[index].join(&table),
            Err(_) => self.more.push(table),
        }
        // A part of what there is: neither many copies nor much memory.
        if self.more.len() > TABLES_MORE.max(self.sorted.len() / 4) {
            self.sort();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sorted.is_empty() && self.more.is_empty()
    }

    /// All of them are sorted.
    pub(super) fn sort(&mut self) {
        self.sorted.reserve_exact(self.more.len());
        self.sorted.append(&mut self.more);
        self.sorted.sort_unstable();
        self.sorted.dedup_by(|next, kept| {
            let same = next.cluster == kept.cluster;
            if same {
                kept.join(next);
            }
            same
        });
    }
}
