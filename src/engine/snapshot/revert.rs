//! Reverting: the disk becomes what it was in an internal snapshot. Only on an image that nobody
//! serves.
//!
//! A copy of the snapshot's L1 table, without copied flags and as long as the disk of that time
//! needs, becomes the active one with one write of the header. The snapshot stays, and so do all
//! others; what the active tree alone referred to is given back.
//!
//! Allowed outcomes of a power cut: the header names the old tree or the new one, and the image is
//! consistent but for leaks (v2), or the dirty bit is set in the same write (v3): the next open for
//! writing counts everything anew. Until it has, no copied flag of the new tree is set in its L1
//! table, so that nothing of the snapshot is written in place.

use super::table::info;
use super::{Selector, SnapshotInfo};
use crate::engine::check::{self, Repair};
use crate::engine::error::{Error, ErrorKind};
use crate::engine::open::{LayerFormat, LayerSpec, OpenOptions, read_header};
use crate::engine::source::Source;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::engine::{Image, State};
use crate::format::Header;
use crate::format::geometry::L1_BYTES_MAX;
use crate::format::header::INCOMPAT_DIRTY;
use crate::format::l1::L1Entry;
use crate::format::snapshot::SnapshotEntry;
use crate::storage::{FileId, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

/// Fewest bytes of a compressed cluster that are worth a thought: so many of them may share a host
/// cluster.
const COMPRESSED_BYTES_MIN: u64 = 16;

/// What is said when the header may be the old or the new one.
const UNKNOWN: &str = "it is not known whether the disk is reverted: check the image before its next \
                       use";
/// What is said when the header is the new one and the counts may be wrong.
const UNREPAIRED: &str = "the disk is reverted, but its counts are not: repair the image (qblkd check \
                          --repair all)";

/// Makes the disk of the qcow2 image in `file` what it was in an internal snapshot. The caller has
/// the image to itself, and opens it afterwards to go on.
///
/// An image that was not closed in order is repaired first.
///
/// # Errors
/// `NotFound`; `Unsupported` where the format has no room; `Corrupt` for a damaged image; `NoSpace`
/// and `Io` of the host: the disk is what it was before. `Failed`: it is that or the snapshot, which
/// of them is not known, and nobody may write to the image before a power cut or a repair has
/// decided. The error of the repair that a v2 image needs afterwards comes when it is the snapshot.
pub async fn revert<S: Storage>(
    storage: S,
    file: FileId,
    selector: &Selector,
) -> Result<SnapshotInfo, Error> {
    let header = read_header(&storage, file).await?;
    if header.is_corrupt() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image is marked corrupt: repair it first (qblkd check --repair all)",
        ));
    }
    if header.is_dirty() {
        check::repair_dirty(&storage, file).await?;
    } else if header.version < 3 {
        // No dirty bit: what a crash has left shows only in a check.
        check::check(&storage, file, Repair::All, &mut |_| ()).await?;
    }
    let specs = [LayerSpec {
        file,
        format: LayerFormat::Qcow2,
    }];
    let image = Image::open(&storage, &specs, &OpenOptions::default()).await?;
    let worker = image.worker(storage);
    let copied = worker.copy_root(selector).await;
    let closed = worker.close().await;
    if worker.image().state() == State::Failed {
        let cause = copied.err().or(closed.err());
        return Err(cause.map_or_else(Image::failed_error, |error| {
            error.into_failed("the image cannot be written")
        }));
    }
    let (entry, l1_offset, l1_size) = copied?;
    closed?;
    let storage = worker.storage();
    let mut header = read_header(storage, file).await?;
    let before = header.size;
    header.l1_table_offset = l1_offset;
    header.l1_size = l1_size;
    header.size = entry.disk_size().unwrap_or(before);
    // Bitmaps say what has changed since some time: no longer.
    header.autoclear = 0;
    let is_v2 = header.version < 3;
    if is_v2 || !has_room(&header) {
        match check::prepare_header(storage, file, header.clone(), is_v2).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt) => {
                // Found out before anything was written: the copy is a leak now. If that cannot be
                // mended, it stays one.
                if let Err(error) = check::check(storage, file, Repair::Leaks, &mut |_| ()).await {
                    log::warn!("cannot give back a copy of an L1 table: {}", error.chain());
                }
                return Err(error);
            }
            Err(error) if is_v2 => return Err(error.into_failed(UNKNOWN)),
            Err(error) => return Err(error),
        }
    }
    // From here on an error leaves it open which tree the file names. Nothing may be written that is
    // right for only one of them.
    let switched = switch(storage, file, &header).await;
    switched.map_err(|error| error.into_failed(UNKNOWN))?;
    if header.version < 3 {
        let checked = check::check(storage, file, Repair::All, &mut |_| ()).await;
        let report = checked.map_err(|error| error.into_failed(UNREPAIRED))?;
        if !report.is_consistent() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the disk is reverted, but the image is damaged: repair it (qblkd check --repair \
                 all)",
            ));
        }
    }
    Ok(info(&entry, before))
}

/// Puts the header in place that names the new tree.
async fn switch<S: Storage>(storage: &S, file: FileId, header: &Header) -> Result<(), Error> {
    let mut header = header.clone();
    if header.version >= 3 {
        header.incompatible |= INCOMPAT_DIRTY;
    }
    let source = Source::new(storage, file)?;
    source.sync().await?;
    source.write_header(&header).await
}

/// Can refcounts say what they must in any case, so that nobody needs to look?
fn has_room(header: &Header) -> bool {
    let geometry = header.geometry();
    let trees = u64::from(header.snapshot_count) + 1;
    let shared = geometry.cluster_size() / COMPRESSED_BYTES_MIN;
    trees.saturating_mul(shared.max(1)) <= geometry.refcount_max()
}

impl<S: Storage> Worker<S> {
    /// Writes a copy of a snapshot's L1 table to clusters that are counted, durably. Returns the
    /// snapshot, and the copy's place and number of entries.
    async fn copy_root(
        &self,
        selector: &Selector,
    ) -> Result<(SnapshotEntry, HostOffset, u32), Error> {
        let target = self.image.qcow2_target().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "a raw image has no internal snapshots",
            )
        })?;
        let Target {
            mapping, active, ..
        } = target;
        let table = active.snapshots.table.lock().await;
        let Some(entry) = table
            .find(selector)
            .and_then(|index| table.entries.get(index))
        else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the image has no snapshot {selector}"),
            ));
        };
        let geometry = mapping.geometry;
        let disk_size = entry.disk_size().unwrap_or(active.disk_size);
        let entries = geometry.l1_entries_for(disk_size).max(1);
        if entries > L1_BYTES_MAX / 8 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the snapshot's disk of {disk_size:#x} bytes is larger than can be served"),
            ));
        }
        // What lies past the end of the disk is VM state, which stays the snapshot's own.
        let mut l1 = self.read_l1(target, entry).await?.into_vec();
        l1.resize(to_usize(entries), 0);
        let bytes: Vec<u8> = l1
            .iter()
            .flat_map(|raw| L1Entry(*raw).with_copied(false).0.to_be_bytes())
            .collect();
        let count = geometry.clusters_for(to_u64(bytes.len()));
        let mut taken = Vec::new();
        let start = self.counted_run(target, count, &mut taken).await?;
        let offset = active.allocator.offset(start);
        let written = self
            .write_table(target, offset.get(), &bytes, "L1 table")
            .await;
        if let Err(error) = written {
            self.give_up(target, taken).await;
            return Err(error);
        }
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        Ok((entry.clone(), offset, entries))
    }
}
