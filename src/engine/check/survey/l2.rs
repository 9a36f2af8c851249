//! L2 tables: in which order they are read, and what their entries name.

use super::{OFFSET, Surveyor};
use crate::engine::check::{Phase, Progress};
use crate::format::l1::COPIED;
use crate::format::l2::{COMPRESSED, ZERO};
use crate::format::{Cluster, L2Entry};
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Longest single read of tables.
const READ_BYTES: u64 = 4 << 20;

/// Bits of a standard L2 entry that are neither offset nor flag.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | ZERO | OFFSET);

/// An L2 table and how often it is named.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::engine::check) struct TableUse {
    /// Where it is: aligned to a cluster, inside the file.
    pub(in crate::engine::check) offset: u64,
    /// By all L1 tables together.
    pub(in crate::engine::check) total: u64,
    /// By the active L1 table.
    pub(in crate::engine::check) active: u64,
}

impl<S: Storage> Surveyor<'_, S> {
    /// The L2 tables that were named, in file order.
    pub(super) fn sorted_tables(&mut self) -> Vec<TableUse> {
        let mut tables: Vec<TableUse> = self
            .found_tables
            .drain()
            .map(|(offset, (total, active))| TableUse {
                offset,
                total,
                active,
            })
            .collect();
        tables.sort_unstable();
        tables
    }

    /// Counts what L2 tables name that lie next to each other.
    pub(super) async fn l2_run(&mut self, run: &[TableUse]) {
        let Some(first) = run.first() else { return };
        let cluster_size = self.geometry.cluster_size();
        let bytes = to_u64(run.len()) * cluster_size;
        let Some(buf) = self.read(first.offset, bytes, "L2 tables").await else {
            return;
        };
        for (uses, table) in run.iter().zip(buf.chunks_exact(to_usize(cluster_size))) {
            self.l2_table(*uses, table);
        }
    }

    /// Walks all L2 tables, neighbours in one read.
    pub(super) async fn l2_tables(&mut self, progress: &mut dyn FnMut(Progress)) {
        let tables = self.sorted_tables();
        let total = to_u64(tables.len());
        let mut done = 0;
        for run in neighbours(&tables, self.geometry.cluster_size()) {
            done += to_u64(run.len());
            self.l2_run(run).await;
            progress(Progress {
                phase: Phase::Tables,
                done,
                total,
            });
        }
        self.out.tables = tables;
    }

    /// Counts what one L2 table names. The loop that a full image spends its time in: anything but
    /// an aligned standard entry inside the file leaves it by `odd_l2_entry`.
    fn l2_table(&mut self, uses: TableUse, table: &[u8]) {
        let cluster_bits = self.geometry.cluster_bits();
        let cluster_size = self.geometry.cluster_size();
        let odd = COMPRESSED | ZERO | L2_RESERVED | (OFFSET & (cluster_size - 1));
        let file_len = self.source.len;
        let judges_flags = self.judges_flags;
        let mut expected = 0;
        let (mut allocated, mut fragmented) = (0, 0);
        for (index, raw) in table.as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_be_bytes(*raw);
            let offset = entry & OFFSET;
            if entry & odd != 0 || offset >= file_len {
                self.odd_l2_entry(uses, index, entry, &mut expected);
                continue;
            }
            if offset == 0 {
                continue;
            }
            allocated += 1;
            fragmented += u64::from(expected != 0 && offset != expected);
            expected = offset + cluster_size;
            let cluster = offset >> cluster_bits;
            self.out.refs.add(cluster, uses.total);
            if judges_flags && self.singles.contains(cluster) != (entry & COPIED != 0) {
                self.wrong_l2_flag(uses, index, entry);
            }
        }
        self.out.report.allocated_clusters += allocated * uses.active;
        self.out.report.fragmented_clusters += fragmented * uses.active;
    }

    /// Counts what an L2 entry names that is compressed, zero, or wrong. `expected` is where the next
    /// cluster would be if the table were not fragmented.
    #[cold]
    fn odd_l2_entry(&mut self, uses: TableUse, index: usize, entry: u64, expected: &mut u64) {
        let place = |what: &str| {
            format!(
                "L2 table at {:#x}, entry {index} {entry:#018x}: {what}",
                uses.offset
            )
        };
        if entry & COMPRESSED != 0 {
            self.compressed_entry(uses, entry, place);
            return;
        }
        if entry & L2_RESERVED != 0 {
            self.corruption(uses.total, || place("reserved bits are set"));
        }
        let offset = entry & OFFSET;
        if offset == 0 {
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        self.out.report.allocated_clusters += uses.active;
        if *expected != 0 && offset != *expected {
            self.out.report.fragmented_clusters += uses.active;
        }
        *expected = offset + cluster_size;
        if !self.geometry.is_cluster_aligned(offset) {
            if entry & ZERO != 0 {
                self.out.entry_flaws += 1;
                self.corruption(uses.total, || place("zero cluster is not aligned"));
            } else {
                self.out.references_trusted = false;
                self.corruption(uses.total, || place("data cluster is not aligned"));
            }
        }
        if !self.count(offset, cluster_size, uses.total, "data cluster") {
            self.out.references_trusted = false;
        }
        if self
            .singles
            .contains(offset >> self.geometry.cluster_bits())
            != (entry & COPIED != 0)
        {
            self.wrong_l2_flag(uses, index, entry);
        }
    }

    /// Counts what a compressed L2 entry names.
    fn compressed_entry(&mut self, uses: TableUse, entry: u64, place: impl Fn(&str) -> String) {
        if entry & COPIED != 0 {
            self.out.entry_flaws += 1;
            self.corruption(uses.total, || place("copied flag on a compressed cluster"));
        }
        self.out.report.allocated_clusters += uses.active;
        self.out.report.compressed_clusters += uses.active;
        self.out.report.fragmented_clusters += uses.active;
        let trusted = match L2Entry(entry).decode(self.geometry, self.layout.version) {
            Ok(Cluster::Compressed { host, bytes }) => {
                self.count(host.get(), bytes, uses.total, "compressed cluster")
            }
            _ => {
                self.corruption(uses.total, || place("compressed cluster is out of range"));
                false
            }
        };
        if !trusted {
            self.out.references_trusted = false;
        }
    }

    /// Reports the copied flag of an L2 entry, if the table belongs to the active tree.
    #[cold]
    fn wrong_l2_flag(&mut self, uses: TableUse, index: usize, entry: u64) {
        let cluster = (entry & OFFSET) >> self.geometry.cluster_bits();
        self.wrong_flag(cluster, uses.active, || {
            format!(
                "L2 table at {:#x}, entry {index} {entry:#018x}: copied flag is wrong",
                uses.offset
            )
        });
    }
}

/// Cuts sorted tables into runs that lie next to each other and fit in one read.
pub(super) fn neighbours(
    tables: &[TableUse],
    cluster_size: u64,
) -> impl Iterator<Item = &[TableUse]> {
    let run_max = to_usize((READ_BYTES / cluster_size).max(1));
    tables
        .chunk_by(move |one, next| one.offset + cluster_size == next.offset)
        .flat_map(move |run| run.chunks(run_max))
}
