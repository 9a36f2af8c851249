//! Creating and deleting: the steps that a client waits for.
//!
//! Create: prepare (clusters for the L1 copy and the new table, counted; the dirty bit, durable),
//! freeze, grace, flush, write the copy and the table, `fdatasync`, one write of the header,
//! `fdatasync`. On v2, which has no dirty bit, the references are added before the header is
//! written: the snapshot is *pending* until its settle is done.
//!
//! Allowed outcomes of a power cut: the header names the old table or the new one; whichever it
//! names is whole, and so is every L1 table in it. From the first step that makes counts or copied
//! flags in the file lag behind until they have caught up, the dirty bit is set (v3).

use std::sync::Arc;

use super::table::{Table, info};
use super::{NewSnapshot, Root, SNAPSHOT_NAME_BYTES_MAX, Selector, SnapshotInfo, Task};
use crate::engine::active::Dropped;
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::order::keeps;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::header::INCOMPAT_DIRTY;
use crate::format::l1::L1Entry;
use crate::format::refcount;
use crate::format::snapshot::SnapshotEntry;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{HostOffset, to_u64};

/// A snapshot that is committed once its references are counted (v2).
#[derive(Debug)]
pub(crate) struct Pending {
    entry: SnapshotEntry,
}

/// What a create has led to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Created {
    /// The new snapshot.
    pub snapshot: SnapshotInfo,
    /// The number of its settle in the background work.
    pub work: u64,
    /// It survives a power cut. False on v2, until that work is done.
    pub durable: bool,
}

/// A run of clusters that are counted, and given up unless something comes to name them.
pub(super) struct Counted {
    start: u64,
    count: u64,
}

impl<S: Storage> Worker<S> {
    /// Takes internal snapshots of the live disk, all of the same instant. A write that completed
    /// before this call is in them; one that was submitted after it returned is not.
    ///
    /// Runs on a thread of its own: it waits for requests in flight by sleeping.
    ///
    /// # Errors
    /// `Exists` for a name that is taken, `Invalid` for one that cannot be, `Unsupported` for an
    /// image that cannot have (more) snapshots, `ReadOnly`, `Failed`; `NoSpace` and `Io` of the
    /// host. There is no new snapshot then.
    pub async fn create_snapshots(&self, new: &[NewSnapshot]) -> Result<Vec<Created>, Error> {
        let target = self.snapshot_target()?;
        self.prepare_write().await?;
        let result = self.create_locked(target, new).await;
        self.seen(result).await
    }

    /// Removes an internal snapshot; its clusters are given back in the background. Returns what
    /// it was and the number of that work.
    ///
    /// # Errors
    /// `NotFound`; otherwise as for [`Self::create_snapshots`].
    pub async fn delete_snapshot(&self, selector: &Selector) -> Result<(SnapshotInfo, u64), Error> {
        let target = self.snapshot_target()?;
        self.prepare_write().await?;
        let result = self.delete_locked(target, selector).await;
        self.seen(result).await
    }

    fn snapshot_target(&self) -> Result<Target<'_>, Error> {
        self.image.qcow2_target().ok_or_else(|| {
            if self.image.is_read_only() {
                Error::new(ErrorKind::ReadOnly, "the image is opened read-only")
            } else {
                Error::new(
                    ErrorKind::Unsupported,
                    "a raw image cannot hold internal snapshots",
                )
            }
        })
    }

    async fn create_locked(
        &self,
        target: Target<'_>,
        new: &[NewSnapshot],
    ) -> Result<Vec<Created>, Error> {
        let Target {
            mapping, active, ..
        } = target;
        let snapshots = &active.snapshots;
        let mut table = snapshots.table.lock().await;
        self.check_new(target, &table, new).await?;
        let is_v2 = mapping.version < 3;
        let mut entries = self.new_entries(target, &table, new);
        let l1_clusters = mapping.geometry.clusters_for(to_u64(mapping.l1.len()) * 8);
        let mut taken = Vec::new();
        let result: Result<_, Error> = async {
            for entry in &mut entries {
                let start = self.counted_run(target, l1_clusters, &mut taken).await?;
                entry.l1_offset = active.allocator.offset(start);
            }
            let mut all = table.entries.clone();
            all.extend(entries.iter().cloned());
            let bytes = Table::encode(&all)?;
            let place = if is_v2 {
                None
            } else {
                let count = mapping.geometry.clusters_for(to_u64(bytes.len()));
                Some((self.counted_run(target, count, &mut taken).await?, count))
            };
            // What is modified now need not be written while requests wait for the grace.
            self.flush().await?;
            if !is_v2 && keeps!(DirtyBeforeChange) {
                self.set_dirty(target).await?;
            }
            Ok((all, bytes, place))
        }
        .await;
        let (all, bytes, place) = match result {
            Ok(prepared) => prepared,
            Err(error) => {
                self.give_up(target, taken).await;
                return Err(error);
            }
        };

        let keys: Vec<u64> = entries.iter().map(|_| snapshots.next_key()).collect();
        let frozen = self.freeze(target, &keys).await;
        if keeps!(GraceBeforeCommit) {
            self.end_grace(frozen.generation).await;
        }

        let l1: Box<[u64]> = frozen
            .l1
            .iter()
            .map(|raw| L1Entry(*raw).with_copied(false).0)
            .collect();
        let committed: Result<(), Error> = async {
            // Also writes slices of frozen tables that the active L1 table no longer names.
            self.flush().await?;
            let l1_bytes: Vec<u8> = l1.iter().flat_map(|raw| raw.to_be_bytes()).collect();
            for entry in &entries {
                self.write_table(target, entry.l1_offset.get(), &l1_bytes, "L1 table")
                    .await?;
            }
            if let Some((start, count)) = place {
                self.commit_table(target, &mut table, all, &bytes, (start, count))
                    .await?;
            }
            Ok(())
        }
        .await;
        if !keeps!(GraceBeforeCommit) {
            self.end_grace(frozen.generation).await;
        }
        if let Err(error) = committed {
            for key in keys.iter().rev() {
                lock(&active.drops).settle(*key);
            }
            snapshots.push(Task::Reown, self.metadata_bytes(target));
            self.give_up(target, taken).await;
            return Err(error);
        }
        // The file names these tables now, if only from the snapshot.
        let tables: Vec<u64> = l1
            .iter()
            .filter_map(|raw| L1Entry(*raw).table_offset())
            .map(HostOffset::get)
            .collect();
        active.name_tables(&tables);
        let created = entries.into_iter().zip(keys);
        Ok(created
            .map(|(entry, key)| self.begin_settle(target, &mut table, entry, key, &l1))
            .collect())
    }

    /// Shows a new snapshot, whose table is `l1`, and gives the background its settling to do. On v2
    /// it is shown when that is done.
    fn begin_settle(
        &self,
        target: Target<'_>,
        table: &mut Table,
        entry: SnapshotEntry,
        key: u64,
        l1: &[u64],
    ) -> Created {
        let Target {
            mapping, active, ..
        } = target;
        let snapshots = &active.snapshots;
        let is_v2 = mapping.version < 3;
        let mut snapshot = info(&entry, self.disk_size(target));
        snapshot.unsettled = true;
        let root = Arc::new(Root {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            l1: l1.into(),
            l1_offset: entry.l1_offset.get(),
        });
        let commit = is_v2.then(|| {
            table.pending.push(entry.clone());
            Arc::new(Pending { entry })
        });
        if !is_v2 {
            lock(&snapshots.shown).push(snapshot.clone());
        }
        let tables = l1
            .iter()
            .filter(|raw| L1Entry(**raw).table_offset().is_some())
            .count();
        let total = to_u64(tables) * mapping.geometry.cluster_size();
        let work = snapshots.push(Task::Settle { root, key, commit }, total);
        Created {
            snapshot,
            work,
            durable: !is_v2,
        }
    }

    async fn delete_locked(
        &self,
        target: Target<'_>,
        selector: &Selector,
    ) -> Result<(SnapshotInfo, u64), Error> {
        let Target {
            mapping, active, ..
        } = target;
        let snapshots = &active.snapshots;
        let mut table = snapshots.table.lock().await;
        let Some(index) = table.find(selector) else {
            return Err(Error::new(ErrorKind::NotFound, "there is no such snapshot"));
        };
        let mut all = table.entries.clone();
        let entry = all.remove(index);
        // Read before anything changes: what cannot be read cannot be given back.
        let l1 = self.read_l1(target, &entry).await?;
        self.replace_table(target, &mut table, all).await?;
        let disk_size = self.disk_size(target);
        let info = {
            let mut shown = lock(&snapshots.shown);
            if index < shown.len() {
                shown.remove(index)
            } else {
                info(&entry, disk_size)
            }
        };
        let tables = l1.iter().filter(|raw| **raw != 0).count();
        let total = to_u64(tables) * mapping.geometry.cluster_size() + self.metadata_bytes(target);
        let root = Arc::new(Root {
            id: info.id.clone(),
            name: info.name.clone(),
            l1,
            l1_offset: entry.l1_offset.get(),
        });
        let work = snapshots.push(Task::Delete { root }, total);
        Ok((info, work))
    }

    /// Puts these entries in the place of those in the file. Nothing is taken if that fails.
    async fn replace_table(
        &self,
        target: Target<'_>,
        table: &mut Table,
        entries: Vec<SnapshotEntry>,
    ) -> Result<(), Error> {
        let mapping = target.mapping;
        let bytes = Table::encode(&entries)?;
        let count = mapping.geometry.clusters_for(to_u64(bytes.len()));
        let mut taken = Vec::new();
        let committed: Result<(), Error> = async {
            let start = if count > 0 {
                self.counted_run(target, count, &mut taken).await?
            } else {
                0
            };
            self.flush().await?;
            if mapping.version >= 3 && keeps!(DirtyBeforeChange) {
                self.set_dirty(target).await?;
            }
            self.commit_table(target, table, entries, &bytes, (start, count))
                .await
        }
        .await;
        if committed.is_err() {
            self.give_up(target, taken).await;
        }
        committed
    }

    /// On v2: the last act of a settle, when the references in the file are durable.
    pub(super) async fn commit_pending(
        &self,
        target: Target<'_>,
        pending: &Pending,
    ) -> Result<(), Error> {
        let active = target.active;
        let snapshots = &active.snapshots;
        let mut table = snapshots.table.lock().await;
        let mut all = table.entries.clone();
        all.push(pending.entry.clone());
        self.replace_table(target, &mut table, all).await?;
        table.pending.retain(|entry| entry.id != pending.entry.id);
        let shown = info(&pending.entry, self.disk_size(target));
        lock(&snapshots.shown).push(shown);
        Ok(())
    }

    /// Names and numbers that a new snapshot must have.
    async fn check_new(
        &self,
        target: Target<'_>,
        table: &Table,
        new: &[NewSnapshot],
    ) -> Result<(), Error> {
        for (index, snapshot) in new.iter().enumerate() {
            let name = &snapshot.name;
            if name.is_empty() {
                return Err(Error::new(ErrorKind::Invalid, "a snapshot needs a name"));
            }
            if name.len() > SNAPSHOT_NAME_BYTES_MAX {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("a snapshot's name has at most {SNAPSHOT_NAME_BYTES_MAX} bytes"),
                ));
            }
            if name.contains('\0') {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "a snapshot's name cannot hold the byte 0",
                ));
            }
            let twice = new.iter().take(index).any(|earlier| earlier.name == *name);
            if twice || table.has_name(name) {
                return Err(Error::new(
                    ErrorKind::Exists,
                    format!("there is a snapshot named '{name}' already"),
                ));
            }
        }
        // One spare count, which QEMU's revert needs. Deleted snapshots count until their
        // references are gone.
        let geometry = target.mapping.geometry;
        let bits = 1_u32 << geometry.refcount_order();
        let most = refcount::most(geometry.refcount_order());
        let deleted = target.active.snapshots.deleted();
        let present = table.len() + deleted;
        if (present + to_u64(new.len())).saturating_add(1) > most {
            let text = match (present, deleted) {
                (0, _) => format!(
                    "{bits}-bit refcounts have no room for so many snapshots; use an image with \
                     wider refcounts"
                ),
                (_, 0) => format!(
                    "{bits}-bit refcounts have no room for more than {present} snapshots; delete \
                     one first, or use an image with wider refcounts"
                ),
                _ => format!(
                    "{bits}-bit refcounts have no room for more than {present} snapshots; \
                     {deleted} of them are deleted already, try again when the background work of \
                     that is done"
                ),
            };
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let new = to_u64(new.len());
        self.check_room(target, new, present + new + 1).await
    }

    fn new_entries(
        &self,
        target: Target<'_>,
        table: &Table,
        new: &[NewSnapshot],
    ) -> Vec<SnapshotEntry> {
        let disk_size = self.disk_size(target);
        let l1_size = u32::try_from(target.mapping.l1.len()).unwrap_or(u32::MAX);
        new.iter()
            .zip(table.new_ids(new.len()))
            .map(|(snapshot, id)| SnapshotEntry {
                l1_offset: HostOffset::ZERO,
                l1_size,
                id: id.to_string().into_bytes(),
                name: snapshot.name.clone().into_bytes(),
                date_sec: snapshot.date_sec,
                date_nsec: snapshot.date_nsec,
                vm_clock_nsec: snapshot.vm_clock_nsec,
                vm_state_size_32: 0,
                extra: SnapshotEntry::extra_data(0, disk_size, None),
            })
            .collect()
    }

    /// Takes and counts clusters in one piece, and keeps data and tables away from them.
    pub(super) async fn counted_run(
        &self,
        target: Target<'_>,
        count: u64,
        taken: &mut Vec<Counted>,
    ) -> Result<u64, Error> {
        let Target {
            mapping, active, ..
        } = target;
        let allocator = &active.allocator;
        let run = allocator.reserve_contiguous(&self.storage, count).await?;
        self.image.follow_end();
        if let Err(error) = allocator.publish(&self.storage, run.start, count).await {
            allocator.give_back(run.start, count);
            return Err(error);
        }
        lock(&mapping.protected).add(run.start..run.start + count);
        taken.push(Counted {
            start: run.start,
            count,
        });
        Ok(run.start)
    }

    /// Gives clusters back that nothing names.
    pub(super) async fn give_up(&self, target: Target<'_>, taken: Vec<Counted>) {
        for run in taken {
            self.drop_metadata(target, run.start, run.count);
        }
    }

    /// Clusters of tables that the file no longer names (durably), or never did.
    pub(super) fn drop_metadata(&self, target: Target<'_>, start: u64, count: u64) {
        if count == 0 {
            return;
        }
        lock(&target.mapping.protected).remove(&(start..start + count));
        target.active.drop_own(Dropped {
            start,
            count,
            tables: false,
        });
    }

    async fn set_dirty(&self, target: Target<'_>) -> Result<(), Error> {
        target
            .active
            .header
            .update_if(&self.storage, |header| {
                let is_set = header.incompatible & INCOMPAT_DIRTY != 0;
                header.incompatible |= INCOMPAT_DIRTY;
                !is_set
            })
            .await
    }

    pub(super) async fn write_table(
        &self,
        target: Target<'_>,
        host_offset: u64,
        bytes: &[u8],
        what: &str,
    ) -> Result<(), Error> {
        let sg = SgList::from_buf(AlignedBuf::from_slice(bytes));
        self.storage
            .write(target.layer.file, host_offset, sg)
            .await
            .map_err(|error| Error::io(format!("cannot write the snapshot's {what}"), error))
    }

    /// Writes a new snapshot table, which is counted durably, and names it. The old one goes.
    async fn commit_table(
        &self,
        target: Target<'_>,
        table: &mut Table,
        entries: Vec<SnapshotEntry>,
        bytes: &[u8],
        (start, count): (u64, u64),
    ) -> Result<(), Error> {
        let active = target.active;
        let offset = active.allocator.offset(start);
        if count > 0 {
            self.write_table(target, offset.get(), bytes, "table")
                .await?;
        }
        if keeps!(RootBeforeHeader) {
            active.header.sync_data(&self.storage).await?;
        }
        let snapshot_count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        active
            .header
            .update(&self.storage, |header| {
                header.snapshot_count = snapshot_count;
                header.snapshot_table_offset = offset;
            })
            .await?;
        let (old_start, old_count) = (table.start, table.count);
        table.entries = entries;
        (table.start, table.count) = (start, count);
        self.drop_metadata(target, old_start, old_count);
        Ok(())
    }

    /// The L1 table of a snapshot, from the file.
    pub(super) async fn read_l1(
        &self,
        target: Target<'_>,
        entry: &SnapshotEntry,
    ) -> Result<Box<[u64]>, Error> {
        let len = usize::try_from(entry.l1_size)
            .unwrap_or(usize::MAX)
            .saturating_mul(8);
        let (read, buf) = self
            .storage
            .read_buf(
                target.layer.file,
                entry.l1_offset.get(),
                AlignedBuf::zeroed(len),
            )
            .await;
        read.map_err(|error| Error::io("cannot read the snapshot's L1 table", error))?;
        Ok(buf
            .chunks_exact(8)
            .map(|chunk| chunk.try_into().map_or(0, u64::from_be_bytes))
            .collect())
    }

    /// Bytes of all L2 tables of the active tree.
    fn metadata_bytes(&self, target: Target<'_>) -> u64 {
        let mapping = target.mapping;
        let tables = (0..mapping.l1.len()).filter(|index| mapping.l1_entry(*index).0 != 0);
        to_u64(tables.count()) * mapping.geometry.cluster_size()
    }

    /// Virtual size in bytes, as the header has it.
    fn disk_size(&self, target: Target<'_>) -> u64 {
        target.active.disk_size
    }
}
