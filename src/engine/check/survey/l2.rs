//! L2 tables: in which order they are read, and what their entries name.

use super::tables::TableUse;
use super::{OFFSET, Surveyor};
use crate::engine::check::{Phase, Progress};
use crate::engine::error::Error;
use crate::format::l1::COPIED;
use crate::format::l2::{COMPRESSED, ZERO};
use crate::format::{Cluster, L2Entry};
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Bytes of tables that are read together (at least one table).
const READ_BYTES: u64 = 1 << 20;

/// Bits of a standard L2 entry that are neither offset nor flag.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | ZERO | OFFSET);

impl<S: Storage> Surveyor<'_, S> {
    /// The L2 tables that were named, in file order.
    pub(super) fn take_tables(&mut self) -> Vec<TableUse> {
        let mut tables = std::mem::take(&mut self.found_tables);
        tables.sort();
        tables.sorted
    }

    /// Counts what some tables name, of which the first is at index `first` in `bytes`.
    fn count_tables(&mut self, tables: &[TableUse], bytes: &[u8], first: usize) {
        let cluster_size = to_usize(self.geometry.cluster_size());
        let bytes = bytes.chunks_exact(cluster_size).skip(first);
        for (uses, table) in tables.iter().zip(bytes) {
            self.l2_table(*uses, table);
        }
    }

    /// Counts what some L2 tables name.
    pub(super) async fn read_tables(&mut self, tables: &[TableUse]) {
        let cluster_size = self.geometry.cluster_size();
        let starts: Vec<u64> = tables
            .iter()
            .map(|uses| uses.cluster() << self.geometry.cluster_bits())
            .collect();
        let read = self.source.read_clusters(cluster_size, &starts).await;
        let mut next = 0;
        for (failed, error) in read.failed {
            self.count_tables(&tables[next..failed.start], &read.buf, next);
            next = failed.end;
            self.readable(Err(error), starts[failed.start], "L2 tables");
        }
        self.count_tables(&tables[next..], &read.buf, next);
    }

    /// Walks all L2 tables.
    pub(super) async fn l2_tables(
        &mut self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let tables = self.take_tables();
        let total = to_u64(tables.len());
        let most = to_usize((READ_BYTES / self.geometry.cluster_size()).max(1));
        let mut done = 0;
        for piece in tables.chunks(most) {
            self.read_tables(piece).await;
            self.out.counts_all()?;
            done += to_u64(piece.len());
            progress(Progress {
                phase: Phase::Tables,
                done,
                total,
            });
        }
        self.out.tables = tables;
        Ok(())
    }

    /// Counts what one L2 table names. The loop that a full image spends its time in: anything but
    /// an aligned standard entry inside the file leaves it by `odd_l2_entry`.
    fn l2_table(&mut self, uses: TableUse, table: &[u8]) {
        let cluster_bits = self.geometry.cluster_bits();
        let cluster_size = self.geometry.cluster_size();
        let odd = COMPRESSED | ZERO | L2_RESERVED | (OFFSET & (cluster_size - 1));
        let file_len = self.source.len;
        let judges = self.judges;
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
            if judges && self.singles.contains(cluster) != (entry & COPIED != 0) {
                self.wrong_l2_flag(uses, index, entry);
            }
        }
        self.out.report.allocated_clusters += allocated * uses.active();
        self.out.report.fragmented_clusters += fragmented * uses.active();
    }

    /// Counts what an L2 entry names that is compressed, zero, or wrong. `expected` is where the next
    /// cluster would be if the table were not fragmented.
    #[cold]
    fn odd_l2_entry(&mut self, uses: TableUse, index: usize, entry: u64, expected: &mut u64) {
        let table = uses.cluster() << self.geometry.cluster_bits();
        let place =
            |what: &str| format!("L2 table at {table:#x}, entry {index} {entry:#018x}: {what}");
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
        self.out.report.allocated_clusters += uses.active();
        if *expected != 0 && offset != *expected {
            self.out.report.fragmented_clusters += uses.active();
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
        self.out.report.allocated_clusters += uses.active();
        self.out.report.compressed_clusters += uses.active();
        self.out.report.fragmented_clusters += uses.active();
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
        let table = uses.cluster() << self.geometry.cluster_bits();
        self.wrong_flag(cluster, uses.active(), || {
            format!("L2 table at {table:#x}, entry {index} {entry:#018x}: copied flag is wrong")
        });
    }
}
