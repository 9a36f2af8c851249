//! The writing half of a check.
//!
//! What is safe to change, and in which order:
//!
//! 0. The dirty bit (v3): from here on a power cut means another repair, never less than that.
//! 1. Entries and snapshot table entries that are wrong in themselves, without touching data.
//! 2. Refcounts that are too low are raised. If the refcount structure itself is damaged, a new one is
//!    written to clusters that nothing uses, and one write of the header's sector puts it in place.
//! 3. Copied flags.
//! 4. Refcounts that are too high are lowered, only if every structure that names clusters could be
//!    read: what looks free may belong to a table that is damaged.
//! 5. The image is checked again. Only if that finds no corruption the dirty and corrupt bits go.
//!
//! Each step is durable before the next begins. After a power cut between any two of them (v2 has no
//! dirty bit, so this matters) no cluster has a refcount lower than before unless it had too many
//! references counted, and no copied flag was set on a cluster with more than one reference.
//!
//! No data is ever given up: an entry that points past the end of the file or between clusters stays
//! as it is and is reported. Nothing is written into a metadata cluster that is also something else.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use super::report::Report;
use super::survey::{Survey, TableUse, survey};
use super::{Phase, Progress, Repair};
use crate::engine::error::{Error, ErrorKind};
use crate::engine::source::{Layout, Source};
use crate::format::geometry::REFTABLE_BYTES_MAX;
use crate::format::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use crate::format::l2::ZERO;
use crate::format::{
    Geometry, Header, L1Entry, L2Entry, RefcountTableEntry, SnapshotEntry, refcount, snapshot,
};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

/// How far past the end of the file a new refcount structure may be placed, in clusters, to stay clear
/// of entries that point there. Beyond that it is placed in free clusters of the file.
const DANGLING_CLUSTERS_MAX: u64 = 1 << 20;

/// A repair under way.
struct Repairer<'r, 's, S> {
    source: &'r mut Source<'s, S>,
    header: Header,
    geometry: Geometry,
    survey: Survey,
}

/// Repairs what `mode` allows, given what `survey` found.
pub(super) async fn repair<S: Storage>(
    source: &mut Source<'_, S>,
    header: Header,
    found: Survey,
    mode: Repair,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Error> {
    if mode == Repair::Leaks && found.rebuild_needed {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the refcount structure is damaged and must be rebuilt: repair all, not only leaks",
        ));
    }
    let before = (found.report.corruptions, found.report.leaks);
    let was_dirty = header.is_dirty();
    let clean = found.report.is_clean();
    let mut repairer = Repairer {
        geometry: header.geometry(),
        source,
        header,
        survey: found,
    };
    let mut report = if clean {
        std::mem::take(&mut repairer.survey.report)
    } else {
        repairer
            .set_incompatible(repairer.header.incompatible | INCOMPAT_DIRTY)
            .await?;
        repairer.steps(mode, progress).await?;
        survey(repairer.source, &Layout::new(&repairer.header), progress)
            .await?
            .report
    };
    report.corruptions_fixed = before.0.saturating_sub(report.corruptions);
    report.leaks_fixed = before.1.saturating_sub(report.leaks);
    let mut incompatible = repairer.header.incompatible;
    if report.is_consistent() {
        incompatible &= !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
    } else if !was_dirty {
        incompatible &= !INCOMPAT_DIRTY;
    }
    repairer.set_incompatible(incompatible).await?;
    Ok(report)
}

/// Makes an image ready for another header, which names another active L1 table: no count may be
/// too low for that, no copied flag of that tree may be set. `raise`: does so, durably; otherwise
/// only finds out whether refcounts have room.
pub(super) async fn prepare_header<S: Storage>(
    source: &mut Source<'_, S>,
    header: Header,
    raise: bool,
) -> Result<(), Error> {
    let found = survey(source, &Layout::new(&header), &mut |_| ()).await?;
    let geometry = header.geometry();
    if let Some(cluster) = found.refs.first_above(geometry.refcount_max()) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "host cluster {cluster:#x} would have {} references, more than its refcount of {} \
                 bits can say: delete a snapshot first",
                found.refs.get(cluster),
                1_u32 << geometry.refcount_order()
            ),
        ));
    }
    if !found.references_trusted || found.rebuild_needed {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image is damaged: repair it first (qblkd check --repair all)",
        ));
    }
    if !raise {
        return Ok(());
    }
    let mut repairer = Repairer {
        geometry,
        source,
        header,
        survey: found,
    };
    repairer.adjust(|found, wanted| found < wanted).await?;
    repairer.fix_flags().await
}

impl<S: Storage> Repairer<'_, '_, S> {
    /// Steps 1 to 4.
    async fn steps(
        &mut self,
        mode: Repair,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let mut step = |done| {
            progress(Progress {
                phase: Phase::Repair,
                done,
                total: 4,
            });
        };
        let all = mode == Repair::All;
        // Lowering leaks makes clusters unshared: flags follow, also where only leaks are repaired,
        // unless there is more wrong that makes the picture unsure.
        let flags = all || self.survey.report.corruptions == self.survey.flag_errors;
        if all && (self.fix_entries().await? | self.complete_snapshots().await?) {
            self.survey = survey(self.source, &Layout::new(&self.header), &mut |_| ()).await?;
        }
        step(1);
        let rebuild = self.survey.rebuild_needed;
        if rebuild && let Some(end) = self.dangling_in_reach() {
            // The new structure goes behind these clusters, which then lie inside of the file:
            // with a count of zero they would be handed out while entries name them.
            self.source.grow(end * self.geometry.cluster_size()).await?;
            self.source.sync().await?;
            self.survey = survey(self.source, &Layout::new(&self.header), &mut |_| ()).await?;
        }
        if rebuild {
            for cluster in &self.survey.refcount_clusters {
                self.survey.refs.remove(*cluster, 1);
            }
        }
        if !self.survey.references_trusted {
            self.keep_all_counts().await?;
        }
        if rebuild {
            self.rebuild().await?;
        } else if all {
            self.adjust(|found, wanted| found < wanted).await?;
        }
        step(2);
        if flags {
            self.fix_flags().await?;
        }
        step(3);
        if !rebuild {
            self.adjust(|found, wanted| found > wanted).await?;
        }
        step(4);
        Ok(())
    }

    /// Changes the incompatible feature bits in the file, if they differ. A v2 image has none.
    async fn set_incompatible(&mut self, bits: u64) -> Result<(), Error> {
        if self.header.version < 3 || self.header.incompatible == bits {
            return Ok(());
        }
        self.header.incompatible = bits;
        self.source.write_header(&self.header).await
    }

    /// Mends L2 entries that are wrong in themselves: zero clusters with a crooked host cluster lose
    /// that (they read as zeroes with and without), compressed clusters lose the copied flag.
    async fn fix_entries(&mut self) -> Result<bool, Error> {
        if self.survey.entry_flaws == 0 {
            return Ok(false);
        }
        let (geometry, version) = (self.geometry, self.header.version);
        self.rewrite_tables(
            |_| true,
            |entry| {
                if entry.is_compressed() {
                    return entry.with_copied(false);
                }
                let crooked = L1Entry(entry.0)
                    .table_offset()
                    .is_some_and(|offset| !geometry.is_cluster_aligned(offset.get()));
                if version >= 3 && entry.0 & ZERO != 0 && crooked {
                    return L2Entry::zero_plain();
                }
                entry
            },
        )
        .await?;
        Ok(true)
    }

    /// Gives snapshot table entries the extra data that a v3 image must have, in a new table. The old
    /// one becomes a leak, which a later step removes.
    async fn complete_snapshots(&mut self) -> Result<bool, Error> {
        let layout = Layout::new(&self.header);
        if layout.snapshot_count == 0 {
            return Ok(false);
        }
        let Ok(mut entries) = self.source.snapshots(&layout).await? else {
            return Ok(false);
        };
        if entries
            .iter()
            .all(|entry| entry.is_complete(self.header.version))
        {
            return Ok(false);
        }
        // A table past the end of the file reads as zeroes: completing those would make it official.
        if layout.snapshot_table_offset >= self.source.len {
            return Ok(false);
        }
        let disk_size = self.header.size;
        for entry in entries.iter_mut().filter(|entry| entry.extra.len() < 16) {
            entry.extra = complete_extra(entry, disk_size);
        }
        let bytes = snapshot::encode_table(&entries)
            .map_err(|error| Error::format("cannot write the snapshot table", error))?;
        let region = self.place(self.geometry.clusters_for(to_u64(bytes.len())))?;
        let offset = region.start * self.geometry.cluster_size();
        self.source
            .grow(region.end * self.geometry.cluster_size())
            .await?;
        self.source.write(offset, &bytes).await?;
        self.source.sync().await?;
        self.header.snapshot_table_offset = HostOffset::new(offset);
        self.source.write_header(&self.header).await?;
        Ok(true)
    }

    /// Makes the refcount in the image the least that is wanted, for every cluster: used where the
    /// references that were found may not be all.
    async fn keep_all_counts(&mut self) -> Result<(), Error> {
        for index in 0..self.survey.reftable.len() {
            let Some(block) = self.block_at(index) else {
                continue;
            };
            let Ok(bytes) = self.load_cluster(block).await else {
                continue;
            };
            for (place, cluster) in self.clusters_of(index).enumerate() {
                let found = refcount::get(&bytes, self.geometry.refcount_order(), place);
                let known = self.survey.refs.get(cluster);
                if found > known {
                    self.survey.refs.add(cluster, found - known);
                }
            }
        }
        self.survey.counts_all()
    }

    /// Sets the refcount of each cluster for which `wrong(found, wanted)` holds. Durable afterwards.
    async fn adjust(&mut self, wrong: impl Fn(u64, u64) -> bool) -> Result<(), Error> {
        let order = self.geometry.refcount_order();
        let refcount_max = self.geometry.refcount_max();
        let mut changed = false;
        for index in 0..self.survey.reftable.len() {
            let Some(block) = self.block_at(index) else {
                continue;
            };
            let clusters = self.clusters_of(index);
            if clusters.is_empty() {
                break;
            }
            let old = self.load_cluster(block).await?;
            let mut new = AlignedBuf::from_slice(&old);
            for (place, cluster) in clusters.enumerate() {
                let found = refcount::get(&old, order, place);
                let wanted = self.survey.refs.get(cluster).min(refcount_max);
                if wrong(found, wanted) {
                    refcount::set(&mut new, order, place, wanted);
                }
            }
            changed |= self.source.write_changes(block, &old, &new).await?;
        }
        if changed {
            self.source.sync().await?;
        }
        Ok(())
    }

    /// Makes the copied flags of the active tree say which clusters have one reference.
    async fn fix_flags(&mut self) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits();
        let (offset, entries) = (
            self.header.l1_table_offset.get(),
            u64::from(self.header.l1_size),
        );
        let shared = (offset >> bits..=(offset + entries * 8) >> bits)
            .any(|cluster| self.survey.conflicts.contains(&cluster));
        if !shared && entries > 0 {
            let (result, old) = self
                .source
                .read(offset, AlignedBuf::zeroed(to_usize(entries * 8)))
                .await;
            result.map_err(|error| Error::io("cannot read the active L1 table", error))?;
            let mut new = AlignedBuf::from_slice(&old);
            for raw in new.as_chunks_mut::<8>().0 {
                let entry = L1Entry(u64::from_be_bytes(*raw));
                let single = entry
                    .table_offset()
                    .is_some_and(|table| self.survey.refs.get(table.get() >> bits) == 1);
                *raw = entry.with_copied(single).0.to_be_bytes();
            }
            self.source.write_changes(offset, &old, &new).await?;
        }
        let refs = std::mem::take(&mut self.survey.refs);
        let result = self
            .rewrite_tables(
                |uses| uses.active() > 0,
                |entry| match L1Entry(entry.0).table_offset() {
                    Some(host) if !entry.is_compressed() => {
                        entry.with_copied(refs.get(host.get() >> bits) == 1)
                    }
                    _ => entry,
                },
            )
            .await;
        self.survey.refs = refs;
        result
    }

    /// Passes each entry of the L2 tables that `chosen` names through `change`. Durable afterwards.
    async fn rewrite_tables(
        &mut self,
        chosen: impl Fn(&TableUse) -> bool,
        change: impl Fn(L2Entry) -> L2Entry,
    ) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits();
        for uses in self.survey.tables.iter().filter(|uses| chosen(uses)) {
            if self.survey.conflicts.contains(&uses.cluster()) {
                continue;
            }
            let offset = uses.cluster() << bits;
            let old = self.load_cluster(offset).await?;
            let mut new = AlignedBuf::from_slice(&old);
            for raw in new.as_chunks_mut::<8>().0 {
                let entry = L2Entry(u64::from_be_bytes(*raw));
                *raw = change(entry).0.to_be_bytes();
            }
            self.source.write_changes(offset, &old, &new).await?;
        }
        self.source.sync().await
    }

    /// Writes a whole new refcount structure and puts it in place. The old one's references are
    /// already taken out of the counts.
    async fn rebuild(&mut self) -> Result<(), Error> {
        let geometry = self.geometry;
        let cluster_size = geometry.cluster_size();
        let per_block = geometry.refcount_block_entries();
        let mut blocks = BTreeSet::new();
        let mut next = 0;
        while let Some(cluster) = self.survey.refs.next_used(next) {
            blocks.insert(cluster / per_block);
            next = (cluster / per_block + 1) * per_block;
        }
        // The new structure counts itself, which may take more blocks, which take more clusters.
        let (region, table_clusters) = loop {
            let table_bytes = (blocks.last().copied().unwrap_or(0) + 1) * 8;
            if table_bytes > REFTABLE_BYTES_MAX {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("the refcount table would need {table_bytes} bytes, too many"),
                ));
            }
            let table_clusters = geometry.clusters_for(table_bytes);
            let region = self.place(to_u64(blocks.len()) + table_clusters)?;
            let known = blocks.len();
            blocks.extend(region.start / per_block..=(region.end - 1) / per_block);
            if blocks.len() == known {
                break (region, table_clusters);
            }
        };
        self.source.grow(region.end * cluster_size).await?;
        self.source.sync().await?;
        let table_start = region.end - table_clusters;
        let mut table = AlignedBuf::zeroed(to_usize(table_clusters * cluster_size));
        for (index, cluster) in blocks.iter().zip(region.clone()) {
            let offset = HostOffset::new(cluster * cluster_size);
            let entry = RefcountTableEntry::new(offset).0.to_be_bytes();
            table.as_chunks_mut::<8>().0[to_usize(*index)] = entry;
            self.source
                .write_buf(offset.get(), self.new_block(*index, &region))
                .await?;
        }
        self.source
            .write_buf(table_start * cluster_size, table)
            .await?;
        self.source.sync().await?;
        self.header.refcount_table_offset = HostOffset::new(table_start * cluster_size);
        let Ok(table_clusters) = u32::try_from(table_clusters) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the refcount table is too long",
            ));
        };
        self.header.refcount_table_clusters = table_clusters;
        self.source.write_header(&self.header).await
    }

    /// A refcount block with the true counts; the clusters of `region` count one.
    fn new_block(&self, index: u64, region: &Range<u64>) -> AlignedBuf {
        let per_block = self.geometry.refcount_block_entries();
        let mut block = AlignedBuf::zeroed(to_usize(self.geometry.cluster_size()));
        let first = index * per_block;
        for (place, cluster) in (first..first + per_block).enumerate() {
            let count = if region.contains(&cluster) {
                1
            } else {
                self.survey.refs.get(cluster)
            };
            let count = count.min(self.geometry.refcount_max());
            if count != 0 {
                refcount::set(&mut block, self.geometry.refcount_order(), place, count);
            }
        }
        block
    }

    /// Finds `count` clusters in a row that nothing uses: past the end of the file, clear of entries
    /// that point there, or else inside.
    fn place(&self, count: u64) -> Result<Range<u64>, Error> {
        let cluster_size = self.geometry.cluster_size();
        let end = self
            .survey
            .cluster_count
            .max(self.geometry.clusters_for(self.source.len));
        let dangling = self.geometry.clusters_for(self.survey.report.dangling_end);
        if self.source.can_grow() && dangling <= end + DANGLING_CLUSTERS_MAX {
            let start = end.max(dangling);
            return Ok(start..start + count);
        }
        let old: HashSet<u64> = self.survey.refcount_clusters.iter().copied().collect();
        let whole = self.source.len / cluster_size;
        let mut start = 1;
        while start + count <= whole {
            let used = self
                .survey
                .refs
                .next_used(start)
                .into_iter()
                .chain((start..start + count).find(|cluster| old.contains(cluster)))
                .min();
            match used {
                Some(cluster) if cluster < start + count => start = cluster + 1,
                _ => return Ok(start..start + count),
            }
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            if self.source.can_grow() {
                format!(
                    "an entry names clusters up to {:#x}, too far past the end of the file for a new \
                     refcount structure behind them, and the file has no {count} free clusters in a row",
                    self.survey.report.dangling_end
                )
            } else {
                format!("no {count} free clusters in a row for a new refcount structure")
            },
        ))
    }

    /// Where the entries end that point past the end of the file, in clusters, if there are any and
    /// the file may grow over them.
    fn dangling_in_reach(&self) -> Option<u64> {
        let end = self.geometry.clusters_for(self.survey.report.dangling_end);
        let file_end = self.geometry.clusters_for(self.source.len);
        let in_reach = file_end + 1..=file_end + DANGLING_CLUSTERS_MAX;
        (self.source.can_grow() && in_reach.contains(&end)).then_some(end)
    }

    /// Where a refcount block is that can be repaired in place.
    fn block_at(&self, index: usize) -> Option<u64> {
        let offset = self.survey.reftable.get(index)?.block_offset()?.get();
        (self.geometry.is_cluster_aligned(offset) && offset < self.source.len).then_some(offset)
    }

    /// The clusters whose refcounts a block holds, as far as the file has them.
    fn clusters_of(&self, index: usize) -> Range<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let first = to_u64(index) * per_block;
        first..(first + per_block).min(self.survey.cluster_count.max(first))
    }

    /// Reads one cluster.
    async fn load_cluster(&self, offset: u64) -> Result<AlignedBuf, Error> {
        let buf = AlignedBuf::zeroed(to_usize(self.geometry.cluster_size()));
        let (result, buf) = self.source.read(offset, buf).await;
        result.map_err(|error| Error::io(format!("cannot read metadata at {offset:#x}"), error))?;
        Ok(buf)
    }
}

/// Extra data for a snapshot table entry that has too little: what it says, and the present size of
/// the disk where it says nothing, as QEMU assumes.
fn complete_extra(entry: &SnapshotEntry, disk_size: u64) -> Vec<u8> {
    let disk_size = entry.disk_size().unwrap_or(disk_size);
    let mut extra = SnapshotEntry::extra_data(entry.vm_state_size(), disk_size, None);
    extra.truncate(16);
    extra
}
