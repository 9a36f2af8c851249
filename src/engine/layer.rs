//! One layer of a backing chain: a raw file, or a qcow2 image's mapping.
//!
//! The L1 table is resident as atomics. `protected` and the file's length judge each slice once,
//! when it is loaded.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cache::SliceKey;
use super::error::{Error, ErrorKind, lock};
use super::protected::Protected;
use crate::engine::sync::Mutex;
use crate::format::geometry::Geometry;
use crate::format::l1::L1Entry;
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::FileId;
use crate::units::{GuestOffset, HostOffset, to_usize};

/// Stands for the L1 table, whose entries are looked at when the image is opened.
const NO_TABLE: HostOffset = HostOffset::new(u64::MAX);

/// A layer; layer 0 of an image is the active one.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) file: FileId,
    /// Its index in the chain.
    pub(crate) index: u8,
    /// The key of offset 0: those of the slices are made from it.
    pub(crate) key: SliceKey,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    pub(crate) kind: LayerKind,
}

/// What the layer's file holds.
#[derive(Debug)]
pub(crate) enum LayerKind {
    /// Guest bytes at the same offset.
    Raw,
    /// A qcow2 image.
    Qcow2(Mapping),
}

/// The mapping of a qcow2 image.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    /// zstd instead of zlib for compressed clusters.
    pub(crate) zstd: bool,
    /// Raw L1 entries.
    pub(crate) l1: Box<[AtomicU64]>,
    /// log2 of the bytes of a slice.
    pub(crate) slice_bits: u32,
    pub(crate) protected: Arc<Mutex<Protected>>,
    /// Bytes of the host file at open; grows with the allocator. An entry at or past it dangles.
    pub(crate) host_end: AtomicU64,
    pub(crate) lost: LostData,
}

/// What entries name past the end that the file had when it was opened, if it was not closed in
/// order: lost data, which nobody may take for what has been allocated there since.
#[derive(Debug)]
pub(crate) struct LostData {
    /// Bytes of the host file at open, in whole clusters.
    pub(crate) start: u64,
    /// Nothing is allocated below this: entries that point to `start..end` are refused for ever.
    pub(crate) end: AtomicU64,
    /// Until all tables were looked at: no entry of a table below this may point past `start`.
    pub(crate) old_tables_end: AtomicU64,
}

impl LostData {
    /// Nothing is lost.
    pub(crate) fn none() -> Self {
        Self {
            start: u64::MAX,
            end: AtomicU64::new(0),
            old_tables_end: AtomicU64::new(0),
        }
    }

    /// Entries that point to this range name lost data. `unknown`: older tables may have more.
    pub(crate) fn new(range: Range<u64>, unknown: bool) -> Self {
        Self {
            start: range.start,
            end: AtomicU64::new(range.end),
            old_tables_end: AtomicU64::new(if unknown { range.start } else { 0 }),
        }
    }

    /// An entry of this table that points to `host` names lost data.
    fn contains(&self, table: HostOffset, host: u64) -> bool {
        host >= self.start
            && (host < self.end.load(Ordering::Acquire)
                || table.get() < self.old_tables_end.load(Ordering::Acquire))
    }
}

/// Where the entry of a guest offset is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryPlace {
    pub(crate) l1_index: usize,
    /// First byte of the slice within its table.
    pub(crate) slice_in_table: u64,
    /// Index of the entry within the slice.
    pub(crate) index: usize,
}

impl Mapping {
    /// Entries per slice.
    #[inline]
    pub(crate) fn slice_entries(&self) -> usize {
        1 << (self.slice_bits - 3)
    }

    /// Bytes of a slice.
    pub(crate) fn slice_bytes(&self) -> u64 {
        1 << self.slice_bits
    }

    #[inline]
    pub(crate) fn place(&self, offset: GuestOffset) -> EntryPlace {
        let l2_index = self.geometry.l2_index(offset);
        let in_slice = l2_index & ((1 << (self.slice_bits - 3)) - 1);
        EntryPlace {
            l1_index: to_usize(self.geometry.l1_index(offset)),
            slice_in_table: (l2_index - in_slice) * 8,
            index: to_usize(in_slice),
        }
    }

    #[inline]
    pub(crate) fn l1_entry(&self, l1_index: usize) -> L1Entry {
        L1Entry(
            self.l1
                .get(l1_index)
                .map_or(0, |entry| entry.load(Ordering::Acquire)),
        )
    }

    /// The table that an L1 entry names, judged.
    ///
    /// # Errors
    /// `Corrupt` when the entry has reserved bits, is not aligned, or points past the end of the
    /// file or into protected clusters.
    pub(crate) fn table(&self, l1_index: usize, entry: L1Entry) -> Result<HostOffset, Error> {
        let table = entry.table_offset().unwrap_or_default();
        entry.validate(self.geometry).map_err(|error| {
            Error::format(format!("L1 entry {l1_index} is {:#018x}", entry.0), error)
        })?;
        self.judge_host(NO_TABLE, table, &format!("L1 entry {l1_index}"))?;
        Ok(table)
    }

    /// May a table or a data cluster be at `host`, according to an entry of `table`?
    fn judge_host(&self, table: HostOffset, host: HostOffset, what: &str) -> Result<(), Error> {
        if self.lost.contains(table, host.get()) {
            // The rest of the image is sound: no reason to take no more writes.
            return Err(Error::new(
                ErrorKind::Io,
                format!("{what} points to {host}, past the end that the file had: lost data"),
            ));
        }
        if host.get() >= self.host_end.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{what} points to {host}, past the end of the file"),
            ));
        }
        let cluster = host.get() >> self.geometry.cluster_bits();
        if lock(&self.protected).overlaps(&(cluster..cluster + 1)) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{what} points to {host}, which holds the image's own metadata"),
            ));
        }
        Ok(())
    }

    /// Decodes an L2 entry of `table` and judges where it points.
    ///
    /// # Errors
    /// `Corrupt` as for [`Self::table`]; `Io` for lost data.
    pub(crate) fn cluster(
        &self,
        table: HostOffset,
        guest: GuestOffset,
        entry: L2Entry,
    ) -> Result<Cluster, Error> {
        let cluster = entry.decode(self.geometry, self.version).map_err(|error| {
            Error::format(
                format!("L2 entry of guest offset {guest} is {:#018x}", entry.0),
                error,
            )
        })?;
        match cluster {
            Cluster::Unallocated | Cluster::ZeroPlain => {}
            Cluster::ZeroAllocated { host, .. } | Cluster::Standard { host, .. } => {
                self.judge_host(table, host, &format!("L2 entry of guest offset {guest}"))?;
            }
            Cluster::Compressed { host, bytes } => {
                let what = format!("compressed L2 entry of guest offset {guest}");
                self.judge_host(table, host, &what)?;
                // The last sector may reach past the end of the file, not past its cluster.
                let end = self.host_end.load(Ordering::Acquire);
                let last = (host.get() + bytes - 1).min(end - 1);
                self.judge_host(table, HostOffset::new(last), &what)?;
            }
        }
        Ok(cluster)
    }

    /// Does this entry of an old table point past everything that is kept free for lost data? A
    /// copy of the table must not hold it: there it would look like an entry of ours.
    pub(crate) fn misleads(&self, table: HostOffset, entry: L2Entry) -> bool {
        let host = match entry.decode(self.geometry, self.version) {
            Ok(Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. }) => host.get(),
            Ok(Cluster::Compressed { host, bytes }) => host.get() + bytes - 1,
            _ => return false,
        };
        host >= self.lost.end.load(Ordering::Acquire) && self.lost.contains(table, host)
    }

    /// Does this entry of `table` name lost data? Nobody counts that.
    pub(crate) fn is_lost(&self, table: HostOffset, entry: L2Entry) -> bool {
        match entry.decode(self.geometry, self.version) {
            Ok(Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. }) => {
                self.lost.contains(table, host.get())
            }
            Ok(Cluster::Compressed { host, bytes }) => {
                let last = host.get().saturating_add(bytes - 1);
                self.lost.contains(table, host.get()) || self.lost.contains(table, last)
            }
            _ => false,
        }
    }

    /// Does any of these raw entries of `table` need a look of its own? Cheap for runs of good
    /// entries.
    pub(crate) fn is_suspicious(
        &self,
        table: HostOffset,
        entries: impl Iterator<Item = u64>,
    ) -> bool {
        let mut end = self.host_end.load(Ordering::Acquire);
        if table.get() < self.lost.old_tables_end.load(Ordering::Acquire) {
            end = end.min(self.lost.start);
        }
        let protected = lock(&self.protected);
        let mut gap = 0..0;
        for raw in entries {
            if raw == 0 {
                continue;
            }
            let Ok(cluster) = L2Entry(raw).decode(self.geometry, self.version) else {
                return true;
            };
            let (first, last) = match cluster {
                Cluster::Unallocated | Cluster::ZeroPlain => continue,
                Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. } => {
                    (host.get(), host.get())
                }
                Cluster::Compressed { host, bytes } => (
                    host.get(),
                    (host.get() + bytes - 1).min(end.saturating_sub(1)),
                ),
            };
            if first >= end {
                return true;
            }
            for cluster in [first, last].map(|byte| byte >> self.geometry.cluster_bits()) {
                if !gap.contains(&cluster) {
                    match protected.gap(cluster) {
                        Some(found) => gap = found,
                        None => return true,
                    }
                }
            }
        }
        false
    }
}

impl Layer {
    /// The key of a slice of this layer.
    #[inline]
    pub(crate) fn slice_key(&self, table: HostOffset, place: &EntryPlace) -> SliceKey {
        self.key.at(table + place.slice_in_table)
    }
}
