//! The reading half of a check: counts every reference in an image and compares the counts, and the
//! copied flags of the active tree, with what the image says.
//!
//! Writes nothing. Keeps what a repair needs: the true number of references to each cluster, and
//! whether those numbers can be trusted.
//!
//! Each table is read once, however many L1 tables name it, so that neither many internal snapshots
//! nor a hostile image can make the work grow beyond the size of the metadata; it is counted as
//! often as it is named, which gives the same numbers. Tables are read in the order in which they lie
//! in the file, neighbours together.
//!
//! Memory: [`count`](super::count) for the clusters (at most 2 GiB), 16 bytes for each L2 table, one L1
//! table (at most 32 MiB), the refcount table (at most 8 MiB), and 1 MiB of tables.

mod piecemeal;

use std::collections::{HashMap, HashSet};

use super::count::{CLUSTERS_MAX, ClusterSet, GROUP_CLUSTERS, RefCounts};
use super::report::{Report, Severity};
use super::{Phase, Progress};
use crate::engine::error::{Error, ErrorKind};
use crate::engine::source::{Layout, Source};
use crate::format::geometry::{HOST_OFFSET_END, L1_BYTES_MAX};
use crate::format::l1::COPIED;
use crate::format::l2::{COMPRESSED, ZERO};
use crate::format::{
    Cluster, Geometry, L1Entry, L2Entry, RefcountTableEntry, SnapshotEntry, refcount,
};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostCluster, HostOffset, to_u64, to_usize};

pub(in crate::engine) use self::piecemeal::{COUNTS_BYTES, Counted, Piecemeal};

/// Bytes of tables that are read together (at least one table).
const READ_BYTES: u64 = 1 << 20;

/// Tables that are collected before they are sorted.
const TABLES_MORE: usize = 4096;

/// Memory for the counts of a check: one byte for each cluster of the largest file.
const COUNTS_BYTES_MAX: usize = 2 << 30;

/// Bits of a standard L2 entry that are neither offset nor flag.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | ZERO | OFFSET);

/// Host offset in an L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Bytes of a snapshot table entry before what varies.
const SNAPSHOT_FIXED_BYTES: u64 = 40;

/// What a metadata cluster is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// The header.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// The L1 table of an internal snapshot.
    SnapshotL1,
    /// The snapshot table.
    SnapshotTable,
    /// The refcount table or a refcount block.
    Refcounts,
    /// The bitmap directory, a bitmap table or a bitmap's data.
    Bitmaps,
}

/// An L2 table and how often it is named. There may be many.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct TableUse {
    /// Where it is: a host cluster inside the file, below [`CLUSTERS_MAX`].
    cluster: u32,
    /// By the active L1 table.
    active: u32,
    /// By all L1 tables together.
    pub(super) total: u64,
}

const _: () = assert!(CLUSTERS_MAX <= 1 << 32);

impl TableUse {
    /// Adds the uses of the same table.
    fn join(&mut self, same: &Self) {
        self.active += same.active;
        self.total += same.total;
    }

    /// Where it is.
    pub(super) fn cluster(&self) -> u64 {
        u64::from(self.cluster)
    }

    /// How often the active L1 table names it.
    pub(super) fn active(&self) -> u64 {
        u64::from(self.active)
    }
}

/// The L2 tables that L1 tables name.
#[derive(Default)]
struct Tables {
    /// In file order, each once.
    sorted: Vec<TableUse>,
    /// Those that are not among them yet.
    more: Vec<TableUse>,
}

impl Tables {
    /// A table is named once more, by so many L1 tables at once.
    fn add(&mut self, table: TableUse) {
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

    fn is_empty(&self) -> bool {
        self.sorted.is_empty() && self.more.is_empty()
    }

    /// All of them are sorted.
    fn sort(&mut self) {
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

/// The result.
pub(super) struct Survey {
    /// What was found.
    pub(super) report: Report,
    /// True references to each host cluster.
    pub(super) refs: RefCounts,
    /// The refcount table.
    pub(super) reftable: Vec<RefcountTableEntry>,
    /// All L2 tables, in file order.
    pub(super) tables: Vec<TableUse>,
    /// Host clusters that the file has.
    pub(super) cluster_count: u64,
    /// Every structure that names clusters was read and understood, so that a cluster without a
    /// reference really is free. Otherwise a repair may raise counts, but never lower them.
    pub(super) references_trusted: bool,
    /// Refcount blocks are missing, unreadable or used for something else: counts cannot be repaired
    /// in place.
    pub(super) rebuild_needed: bool,
    /// L2 entries that can be repaired by themselves.
    pub(super) entry_flaws: u64,
    /// Corruptions that are wrong copied flags.
    pub(super) flag_errors: u64,
    /// Corruptions that are snapshot table entries without all the data of their version.
    pub(super) incomplete_snapshots: u64,
    /// Clusters of the refcount structure, as often as they were counted.
    pub(super) refcount_clusters: Vec<u64>,
    /// Metadata clusters that are also something else: a repair must not write into them.
    pub(super) conflicts: HashSet<u64>,
}

/// A survey under way.
struct Surveyor<'a, S> {
    source: &'a Source<'a, S>,
    layout: &'a Layout,
    geometry: Geometry,
    /// Entries of the active L1 table that are not those of the file any more.
    l1_at_open: &'a [u64],
    /// This is a check: copied flags and overlaps are judged, with the refcounts in the image.
    judges: bool,
    out: Survey,
    /// Clusters whose refcount in the image is exactly one.
    singles: ClusterSet,
    /// Clusters whose refcount cannot be read. Their copied flags cannot be judged.
    unknown: Vec<std::ops::Range<u64>>,
    /// L2 tables that are not read yet.
    found_tables: Tables,
    /// Metadata clusters other than L2 tables: what they are, and how often they are named as such.
    /// Only where overlaps are judged.
    roles: HashMap<u64, (Role, u64)>,
}

/// Reads the whole metadata of an image.
pub(super) async fn survey<S: Storage>(
    source: &Source<'_, S>,
    layout: &Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Survey, Error> {
    let mut surveyor = Surveyor::new(source, layout)?;
    surveyor.load_refcounts(progress).await?;
    surveyor.roots().await?;
    surveyor.l2_tables(progress).await?;
    surveyor.bitmaps().await;
    surveyor.refcount_structure();
    surveyor.compare(progress).await;
    surveyor.overlaps();
    surveyor.out.counts_all()?;
    Ok(surveyor.out)
}

impl Survey {
    /// There was memory for the counts of all clusters.
    pub(super) fn counts_all(&self) -> Result<(), Error> {
        if self.refs.window().end == CLUSTERS_MAX {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            "clusters have so many references that a check has no memory to count them",
        ))
    }
}

impl<'a, S: Storage> Surveyor<'a, S> {
    /// A survey that has read nothing.
    fn new(source: &'a Source<'a, S>, layout: &'a Layout) -> Result<Self, Error> {
        let geometry = layout.geometry;
        let cluster_count = geometry.clusters_for(source.len);
        if cluster_count > CLUSTERS_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the image file has {cluster_count} clusters, a check handles at most \
                     {CLUSTERS_MAX}"
                ),
            ));
        }
        Ok(Self {
            source,
            layout,
            geometry,
            l1_at_open: &[],
            judges: true,
            out: Survey {
                report: Report {
                    total_clusters: geometry.clusters_for(layout.virtual_size),
                    ..Report::default()
                },
                refs: RefCounts::new(0, COUNTS_BYTES_MAX),
                reftable: Vec::new(),
                tables: Vec::new(),
                cluster_count,
                references_trusted: true,
                rebuild_needed: false,
                entry_flaws: 0,
                flag_errors: 0,
                incomplete_snapshots: 0,
                refcount_clusters: Vec::new(),
                conflicts: HashSet::new(),
            },
            singles: ClusterSet::default(),
            unknown: Vec::new(),
            found_tables: Tables::default(),
            roles: HashMap::new(),
        })
    }

    /// Counts what the header names, down to the L2 tables.
    async fn roots(&mut self) -> Result<(), Error> {
        self.metadata(0, self.geometry.cluster_size(), 1, Role::Header);
        self.active_l1().await;
        self.snapshots().await
    }

    /// Reports a corruption.
    fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.out.report.add(Severity::Corruption, times, text);
    }

    /// Reads `len` bytes, or reports that they cannot be read.
    async fn read(&mut self, offset: u64, len: u64, what: &str) -> Option<AlignedBuf> {
        let (result, buf) = self
            .source
            .read(offset, AlignedBuf::zeroed(to_usize(len)))
            .await;
        self.readable(result, offset, what).then_some(buf)
    }

    /// Reports a failed read.
    fn readable(&mut self, result: std::io::Result<()>, offset: u64, what: &str) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                self.out.references_trusted = false;
                self.out.report.add(Severity::CheckError, 1, || {
                    format!("cannot read {what} at {offset:#x}: {error}")
                });
                false
            }
        }
    }

    /// Counts `times` references to every cluster of a range. Reports a range that ends a cluster or
    /// more past the end of the file: the file may end inside its last cluster.
    fn count(&mut self, offset: u64, len: u64, times: u64, what: &str) -> bool {
        if len == 0 {
            return true;
        }
        let cluster_size = self.geometry.cluster_size();
        let end = offset.saturating_add(len);
        if end > HOST_OFFSET_END || end.saturating_sub(self.source.len) >= cluster_size {
            self.out.report.dangling_end = self.out.report.dangling_end.max(end);
            self.out.report.dangling += times;
            self.corruption(times, || {
                format!("{what} at {offset:#x} with {len:#x} bytes ends past the end of the file")
            });
            return false;
        }
        let (first, last) = (offset / cluster_size, (end - 1) / cluster_size);
        if last >= CLUSTERS_MAX {
            self.out.references_trusted = false;
            self.out.report.add(Severity::CheckError, times, || {
                format!("{what} at {offset:#x} is past the clusters that a check handles")
            });
            return false;
        }
        for cluster in first..=last {
            self.out.refs.add(cluster, times);
        }
        self.out.cluster_count = self.out.cluster_count.max(last + 1);
        true
    }

    /// Counts a range of metadata and remembers what it is for. The range is short: a table.
    fn metadata(&mut self, offset: u64, len: u64, times: u64, role: Role) -> bool {
        if !self.count(offset, len, times, role.name()) {
            return false;
        }
        if !self.judges {
            return true;
        }
        let cluster_size = self.geometry.cluster_size();
        for cluster in offset / cluster_size..offset.saturating_add(len).div_ceil(cluster_size) {
            let (known, expected) = self.roles.entry(cluster).or_insert((role, 0));
            if *known == role {
                *expected += times;
            }
            // Otherwise the count exceeds what the first role expects, which `overlaps` reports.
        }
        true
    }

    /// Reads the refcount table.
    async fn load_reftable(&mut self) -> Result<(), Error> {
        let bytes = self.layout.reftable_clusters * self.geometry.cluster_size();
        let (result, table) = self
            .source
            .read(
                self.layout.reftable_offset,
                AlignedBuf::zeroed(to_usize(bytes)),
            )
            .await;
        result.map_err(|error| Error::io("cannot read the refcount table", error))?;
        self.out.reftable = table
            .as_chunks::<8>()
            .0
            .iter()
            .map(|raw| RefcountTableEntry(u64::from_be_bytes(*raw)))
            .collect();
        Ok(())
    }

    /// Reads the refcounts and notes which clusters have a refcount of one.
    async fn load_refcounts(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
        self.load_reftable().await?;
        let order = self.geometry.refcount_order();
        let per_block = self.geometry.refcount_block_entries();
        let mut block = AlignedBuf::zeroed(to_usize(self.geometry.cluster_size()));
        let total = to_u64(self.out.reftable.len());
        for index in 0..self.out.reftable.len() {
            let first = to_u64(index) * per_block;
            if first >= CLUSTERS_MAX {
                break;
            }
            let end = per_block.min(CLUSTERS_MAX - first);
            let Some(offset) = self.out.reftable[index].block_offset().map(HostOffset::get) else {
                continue;
            };
            // What is wrong here is reported when the refcounts are compared.
            if !self.geometry.is_cluster_aligned(offset) {
                self.unknown.push(first..first + end);
                continue;
            }
            if offset >= self.source.len {
                continue;
            }
            let (result, back) = self.source.read(offset, block).await;
            block = back;
            if result.is_err() {
                self.unknown.push(first..first + end);
                continue;
            }
            let singles = &mut self.singles;
            each_refcount(&block, order, end, |place, count| {
                if count == 1 {
                    singles.insert(first + place);
                }
            });
            progress(Progress {
                phase: Phase::Refcounts,
                done: to_u64(index) + 1,
                total,
            });
        }
        Ok(())
    }

    /// Walks the active L1 table.
    async fn active_l1(&mut self) {
        let (offset, entries) = (self.layout.l1_offset, self.layout.l1_entries);
        if !self.metadata(offset, entries * 8, 1, Role::ActiveL1) {
            self.out.references_trusted = false;
        }
        let Some(table) = self.read(offset, entries * 8, "the active L1 table").await else {
            return;
        };
        for (index, raw) in table.as_chunks::<8>().0.iter().enumerate() {
            let found = u64::from_be_bytes(*raw);
            let entry = L1Entry(self.l1_at_open.get(index).copied().unwrap_or(found));
            self.l1_entry(index, entry, 1, 1);
            if let Some(offset) = entry.table_offset() {
                let cluster = self.geometry.host_cluster(offset).get();
                if self.singles.contains(cluster) != entry.copied() {
                    self.wrong_flag(cluster, 1, || {
                        format!("L1 entry {index} {:#018x}: copied flag is wrong", entry.0)
                    });
                }
            }
        }
    }

    /// Reports a copied flag that does not fit the refcount of `cluster`, if that is known.
    fn wrong_flag(&mut self, cluster: u64, times: u64, text: impl FnOnce() -> String) {
        if !self.judges || self.unknown.iter().any(|range| range.contains(&cluster)) {
            return;
        }
        self.out.flag_errors += times;
        self.corruption(times, text);
    }

    /// Counts what one L1 entry names; `active` is how many of the `total` L1 tables are the active
    /// one.
    fn l1_entry(&mut self, index: usize, entry: L1Entry, total: u64, active: u64) {
        if entry.0 & !(COPIED | OFFSET) != 0 {
            self.corruption(total, || {
                format!("L1 entry {index} {:#018x} has reserved bits set", entry.0)
            });
        }
        let Some(offset) = entry.table_offset().map(HostOffset::get) else {
            // Harmless when read, but QEMU's check takes it for a table at offset 0.
            if entry.copied() {
                self.out.flag_errors += active;
                self.corruption(total, || {
                    format!("L1 entry {index} has only the copied flag")
                });
            }
            return;
        };
        let inside = self.count(offset, self.geometry.cluster_size(), total, "L2 table");
        if !inside {
            self.out.references_trusted = false;
        }
        if !self.geometry.is_cluster_aligned(offset) {
            self.out.references_trusted = false;
            self.corruption(total, || {
                format!(
                    "L1 entry {index} {:#018x} is not aligned to a cluster",
                    entry.0
                )
            });
            return;
        }
        if !inside {
            return;
        }
        self.found_tables.add(TableUse {
            cluster: small(self.geometry.host_cluster(HostOffset::new(offset)).get()),
            active: small(active),
            total,
        });
    }

    /// Reads the snapshot table and walks the L1 table of each internal snapshot.
    async fn snapshots(&mut self) -> Result<(), Error> {
        if self.layout.snapshot_count == 0 {
            return Ok(());
        }
        let offset = self.layout.snapshot_table_offset;
        let entries = match self.source.snapshots(self.layout).await? {
            Ok(entries) => entries,
            Err(error) => {
                self.out.references_trusted = false;
                self.corruption(1, || format!("snapshot table at {offset:#x}: {error}"));
                return Ok(());
            }
        };
        // Several snapshots may share one L1 table, in a hostile image all of them a large one.
        let mut l1_tables: HashMap<(u64, u64), u64> = HashMap::new();
        let mut bytes = 0;
        for entry in &entries {
            bytes = to_u64(to_usize(bytes).next_multiple_of(8)) + SNAPSHOT_FIXED_BYTES;
            bytes += to_u64(entry.extra.len() + entry.id.len() + entry.name.len());
            if !entry.is_complete(self.layout.version) {
                self.out.incomplete_snapshots += 1;
                self.corruption(1, || {
                    format!("{}: table entry is incomplete", name_of(entry))
                });
            }
            let (l1_offset, l1_bytes) = (entry.l1_offset.get(), u64::from(entry.l1_size) * 8);
            let problem = if !self.geometry.is_cluster_aligned(l1_offset) {
                Some("L1 table is not aligned to a cluster")
            } else if l1_bytes > L1_BYTES_MAX {
                Some("L1 table is too large")
            } else {
                None
            };
            if let Some(problem) = problem {
                self.out.references_trusted = false;
                self.corruption(1, || format!("{}: {problem}", name_of(entry)));
                continue;
            }
            *l1_tables.entry((l1_offset, l1_bytes)).or_insert(0) += 1;
        }
        let mut l1_tables: Vec<_> = l1_tables.into_iter().collect();
        l1_tables.sort_unstable();
        for ((l1_offset, l1_bytes), times) in l1_tables {
            if !self.metadata(l1_offset, l1_bytes, times, Role::SnapshotL1) {
                self.out.references_trusted = false;
                continue;
            }
            let Some(table) = self
                .read(l1_offset, l1_bytes, "a snapshot's L1 table")
                .await
            else {
                continue;
            };
            for (index, raw) in table.as_chunks::<8>().0.iter().enumerate() {
                self.l1_entry(index, L1Entry(u64::from_be_bytes(*raw)), times, 0);
            }
        }
        if !self.metadata(offset, bytes, 1, Role::SnapshotTable) {
            self.out.references_trusted = false;
        }
        Ok(())
    }

    /// The L2 tables that were named, in file order.
    fn take_tables(&mut self) -> Vec<TableUse> {
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
    async fn read_tables(&mut self, tables: &[TableUse]) {
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
    async fn l2_tables(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
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

    /// Counts persistent bitmaps, if the autoclear bit says that they are in force.
    async fn bitmaps(&mut self) {
        let Some(bitmaps) = self.layout.bitmaps else {
            return;
        };
        if !self.metadata(bitmaps.offset, bitmaps.bytes, 1, Role::Bitmaps) {
            self.out.references_trusted = false;
            return;
        }
        let Some(directory) = self
            .read(bitmaps.offset, bitmaps.bytes, "the bitmap directory")
            .await
        else {
            return;
        };
        let mut rest: &[u8] = &directory;
        for _ in 0..bitmaps.count {
            let Some(entry) = BitmapEntry::decode(rest) else {
                self.out.references_trusted = false;
                self.corruption(1, || "bitmap directory is cut short or invalid".to_owned());
                return;
            };
            rest = rest.get(entry.bytes..).unwrap_or_default();
            self.bitmap(entry).await;
        }
    }

    /// Counts the table and data of one bitmap.
    async fn bitmap(&mut self, entry: BitmapEntry) {
        let bytes = entry.table_entries * 8;
        let valid = self.geometry.is_cluster_aligned(entry.table_offset)
            && bytes <= BitmapEntry::TABLE_BYTES_MAX;
        if !valid {
            self.out.references_trusted = false;
            self.corruption(1, || "bitmap table is unaligned or too large".to_owned());
            return;
        }
        if !self.metadata(entry.table_offset, bytes, 1, Role::Bitmaps) {
            self.out.references_trusted = false;
            return;
        }
        let Some(table) = self.read(entry.table_offset, bytes, "a bitmap table").await else {
            return;
        };
        for raw in table.as_chunks::<8>().0 {
            let word = u64::from_be_bytes(*raw);
            let offset = word & OFFSET;
            let reserved = word & !(OFFSET | 1) != 0 || (offset != 0 && word & 1 != 0);
            if reserved || !self.geometry.is_cluster_aligned(offset) {
                self.out.references_trusted = false;
                self.corruption(1, || format!("bitmap table entry {word:#018x} is invalid"));
            } else if offset != 0
                && !self.metadata(offset, self.geometry.cluster_size(), 1, Role::Bitmaps)
            {
                self.out.references_trusted = false;
            }
        }
    }

    /// Counts the refcount table and its blocks, last, so that what else uses their clusters shows.
    fn refcount_structure(&mut self) {
        let cluster_size = self.geometry.cluster_size();
        let (offset, clusters) = (self.layout.reftable_offset, self.layout.reftable_clusters);
        if self.metadata(offset, clusters * cluster_size, 1, Role::Refcounts) {
            let first = offset / cluster_size;
            self.out.refcount_clusters.extend(first..first + clusters);
        } else {
            self.out.rebuild_needed = true;
        }
        for index in 0..self.out.reftable.len() {
            let entry = self.out.reftable[index];
            if entry.0 == 0 {
                continue;
            }
            let offset = entry.0 & !0x1ff;
            if entry.0 != offset {
                self.corruption(1, || {
                    format!(
                        "refcount table entry {index} {:#018x} has reserved bits set",
                        entry.0
                    )
                });
            } else if !self.geometry.is_cluster_aligned(offset) {
                self.corruption(1, || {
                    format!(
                        "refcount table entry {index} {:#018x} is not aligned",
                        entry.0
                    )
                });
            } else if offset >= self.source.len {
                self.corruption(1, || {
                    format!("refcount block {index} at {offset:#x} is outside the file")
                });
            } else if self.metadata(offset, cluster_size, 1, Role::Refcounts) {
                let cluster = offset / cluster_size;
                self.out.refcount_clusters.push(cluster);
                let references = self.out.refs.get(cluster);
                if references == 1 || !self.out.refs.window().contains(&cluster) {
                    continue;
                }
                self.corruption(1, || {
                    format!("refcount block {index} at {offset:#x} has {references} references")
                });
            }
            self.out.rebuild_needed = true;
        }
        if self
            .out
            .refcount_clusters
            .iter()
            .any(|cluster| self.out.refs.get(*cluster) != 1)
        {
            self.out.rebuild_needed = true;
        }
    }

    /// Compares the refcounts of the image with the references that were found.
    async fn compare(&mut self, progress: &mut dyn FnMut(Progress)) {
        let per_block = self.geometry.refcount_block_entries();
        let cluster_size = self.geometry.cluster_size();
        let end = self.out.cluster_count;
        let mut block = AlignedBuf::zeroed(to_usize(cluster_size));
        let mut highest = 0;
        let mut compared = 0;
        for index in 0..self.out.reftable.len() {
            let first = to_u64(index) * per_block;
            if first >= end {
                break;
            }
            let entry = self.out.reftable[index];
            let Some(offset) = entry.block_offset().map(HostOffset::get) else {
                continue;
            };
            self.compare_missing(compared..first, &mut highest);
            let last = (first + per_block).min(end);
            compared = last;
            if !self.geometry.is_cluster_aligned(offset) {
                self.unreadable_refcounts(index, last - first);
                continue;
            }
            if offset >= self.source.len {
                self.compare_missing(first..last, &mut highest);
                continue;
            }
            let (result, back) = self.source.read(offset, block).await;
            block = back;
            if let Err(error) = result {
                log::warn!("cannot read refcount block {index} at {offset:#x}: {error}");
                self.unreadable_refcounts(index, last - first);
                continue;
            }
            self.compare_block(first..last, &block, &mut highest);
            progress(Progress {
                phase: Phase::Compare,
                done: last,
                total: end,
            });
        }
        self.compare_missing(compared..end, &mut highest);
        highest = highest.max(self.out.refs.end());
        self.out.report.image_end_offset = highest * cluster_size;
    }

    /// Reports refcounts that cannot be known, one error for each cluster as QEMU does.
    fn unreadable_refcounts(&mut self, index: usize, clusters: u64) {
        self.out.rebuild_needed = true;
        self.out.report.add(Severity::CheckError, clusters, || {
            format!("refcount block {index} cannot be read: {clusters} refcounts are unknown")
        });
    }

    /// Clusters without a refcount block have a refcount of zero.
    fn compare_missing(&mut self, clusters: std::ops::Range<u64>, highest: &mut u64) {
        let mut next = clusters.start;
        while let Some(cluster) = self.out.refs.next_used(next) {
            if cluster >= clusters.end {
                return;
            }
            self.out.rebuild_needed = true;
            self.compare_cluster(cluster, 0, highest);
            next = cluster + 1;
        }
    }

    /// Compares the refcounts of one block, group by group of the counts where that is possible.
    fn compare_block(&mut self, clusters: std::ops::Range<u64>, block: &[u8], highest: &mut u64) {
        let order = self.geometry.refcount_order();
        let mut from = clusters.start;
        // A block has whole groups.
        while from < clusters.end {
            let to = clusters.end.min(from + to_u64(GROUP_CLUSTERS));
            let places = to_usize(from - clusters.start)..to_usize(to - clusters.start);
            let equal = order == 4
                && self.out.refs.small_group(from).is_some_and(|counts| {
                    equal_counts(&block.as_chunks::<2>().0[places.clone()], &counts)
                });
            if !equal {
                for (cluster, place) in (from..to).zip(places) {
                    self.compare_cluster(cluster, refcount::get(block, order, place), highest);
                }
            }
            from = to;
        }
    }

    /// Compares one refcount with the references that were found.
    #[inline]
    fn compare_cluster(&mut self, cluster: u64, found: u64, highest: &mut u64) {
        let references = self.out.refs.get(cluster);
        if found != 0 || references != 0 {
            *highest = (*highest).max(cluster + 1);
        }
        if found != references {
            self.wrong_refcount(cluster, found, references);
        }
    }

    /// Reports a refcount that differs from the references.
    #[cold]
    fn wrong_refcount(&mut self, cluster: u64, found: u64, references: u64) {
        let wanted = references.min(self.geometry.refcount_max());
        self.corruption(references - wanted, || {
            format!("cluster {cluster} has {references} references, more than a refcount can say")
        });
        let severity = match found.cmp(&wanted) {
            std::cmp::Ordering::Equal => return,
            std::cmp::Ordering::Less => Severity::Corruption,
            std::cmp::Ordering::Greater => Severity::Leak,
        };
        self.out.report.add(severity, 1, || {
            format!("cluster {cluster} has refcount {found}, but {references} references")
        });
    }

    /// Finds metadata clusters that something else uses too.
    fn overlaps(&mut self) {
        let mut conflicts: Vec<u64> = self
            .roles
            .iter()
            .filter(|(cluster, (_, expected))| self.out.refs.get(**cluster) != *expected)
            .map(|(cluster, _)| *cluster)
            .collect();
        let tables = self
            .out
            .tables
            .iter()
            .map(|uses| (uses.cluster(), uses.total));
        conflicts.extend(
            tables
                .filter(|(cluster, total)| self.out.refs.get(*cluster) != *total)
                .map(|(cluster, _)| cluster),
        );
        conflicts.sort_unstable();
        conflicts.dedup();
        self.out.report.overlaps = to_u64(conflicts.len());
        for cluster in &conflicts {
            let role = self
                .roles
                .get(cluster)
                .map_or("L2 table", |(role, _)| role.name());
            let offset = self
                .geometry
                .host_cluster_offset(HostCluster::new(*cluster));
            self.out.report.add(Severity::Warning, 1, || {
                format!("{role} at {offset} shares its cluster with something else")
            });
        }
        self.out.conflicts = conflicts.into_iter().collect();
    }
}

impl Role {
    /// What to call it.
    fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::ActiveL1 => "active L1 table",
            Self::SnapshotL1 => "snapshot's L1 table",
            Self::SnapshotTable => "snapshot table",
            Self::Refcounts => "refcount structure",
            Self::Bitmaps => "bitmap",
        }
    }
}

/// The fixed part of a bitmap directory entry that a check needs.
#[derive(Clone, Copy)]
struct BitmapEntry {
    /// Where the bitmap table is.
    table_offset: u64,
    /// Entries of it.
    table_entries: u64,
    /// Length of this entry with its padding.
    bytes: usize,
}

impl BitmapEntry {
    /// Length of the fixed part.
    const FIXED_BYTES: u64 = 24;

    /// Longest bitmap table, QEMU's limit: 8 Mi entries.
    const TABLE_BYTES_MAX: u64 = 64 << 20;

    /// Reads an entry at the start of `bytes`; `None` if it does not fit in there.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<24>()?;
        let field = |range: std::ops::Range<usize>| {
            fixed[range]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let length = Self::FIXED_BYTES + field(18..20) + field(20..24);
        let entry = Self {
            table_offset: field(0..8),
            table_entries: field(8..12),
            bytes: to_usize(length.next_multiple_of(8)),
        };
        (entry.bytes <= bytes.len()).then_some(entry)
    }
}

/// A number that fits 32 bits: a cluster that is counted, or a number of L1 entries.
fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// What to call a snapshot.
fn name_of(entry: &SnapshotEntry) -> String {
    format!("snapshot {}", String::from_utf8_lossy(&entry.id))
}

/// Calls `visit` with the place and value of the first `end` refcounts of a block.
fn each_refcount(block: &[u8], order: u32, end: u64, mut visit: impl FnMut(u64, u64)) {
    if order == 4 {
        for (place, raw) in (0..end).zip(block.as_chunks::<2>().0) {
            visit(place, u64::from(u16::from_be_bytes(*raw)));
        }
    } else {
        for place in 0..end {
            visit(place, refcount::get(block, order, to_usize(place)));
        }
    }
}

/// Whether 16-bit refcounts equal these counts. No early end, so that the compiler can use vector
/// instructions.
fn equal_counts(refcounts: &[[u8; 2]], counts: &[u16]) -> bool {
    let pairs = refcounts.iter().zip(counts);
    pairs.fold(0, |bits, (raw, count)| {
        bits | (u16::from_be_bytes(*raw) ^ *count)
    }) == 0
}
