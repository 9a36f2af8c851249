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

mod bitmaps;
mod compare;
mod l1;
mod l2;
mod piecemeal;
mod refcounts;
mod role;
mod snapshots;
mod tables;

use std::collections::{HashMap, HashSet};

use super::Progress;
use super::count::{CLUSTERS_MAX, ClusterSet, RefCounts};
use super::report::{Report, Severity};
use crate::engine::error::{Error, ErrorKind};
use crate::engine::source::{Layout, Source};
use crate::format::geometry::HOST_OFFSET_END;
use crate::format::{Geometry, RefcountTableEntry};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostCluster, to_u64, to_usize};

use self::role::Role;
use self::tables::Tables;

pub(in crate::engine) use self::piecemeal::{COUNTS_BYTES, Counted, Piecemeal};
pub(super) use self::tables::TableUse;

/// Memory for the counts of a check: one byte for each cluster of the largest file.
const COUNTS_BYTES_MAX: usize = 2 << 30;

/// Host offset in an L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

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

    /// Reports a copied flag that does not fit the refcount of `cluster`, if that is known.
    fn wrong_flag(&mut self, cluster: u64, times: u64, text: impl FnOnce() -> String) {
        if !self.judges || self.unknown.iter().any(|range| range.contains(&cluster)) {
            return;
        }
        self.out.flag_errors += times;
        self.corruption(times, text);
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
