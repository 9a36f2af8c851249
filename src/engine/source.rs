//! The image file as the offline tools see it: whole buffers at given offsets, and a header.
//!
//! Shared by check, repair, info and create. No cache, no order of its own: a caller that needs one
//! thing durable before the next says so with [`Source::sync`].

#![forbid(unsafe_code)]

use std::io;

use super::bulk::{Read, read_clusters};
use super::error::{Error, ErrorKind};
use crate::format::geometry::SNAPSHOT_TABLE_BYTES_MAX;
use crate::format::header::AUTOCLEAR_BITMAPS;
use crate::format::snapshot::{self, SnapshotEntry};
use crate::format::{Extension, FormatError, Geometry, Header};
use crate::storage::{AlignedBuf, FileId, SgList, Storage};
use crate::units::{to_u64, to_usize};

/// Bytes that a device writes whole or not at all.
const SECTOR: usize = 512;

/// The fields of the header that a check needs.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Cluster size and refcount width.
    pub(super) geometry: Geometry,
    /// 2 or 3.
    pub(super) version: u32,
    /// In bytes.
    pub(super) virtual_size: u64,
    /// Where the active L1 table is.
    pub(super) l1_offset: u64,
    /// Entries of the active L1 table.
    pub(super) l1_entries: u64,
    /// Where the refcount table is.
    pub(super) reftable_offset: u64,
    /// Length of the refcount table.
    pub(super) reftable_clusters: u64,
    /// Internal snapshots.
    pub(super) snapshot_count: u32,
    /// Where the snapshot table is.
    pub(super) snapshot_table_offset: u64,
    /// Persistent bitmaps, if they are in force.
    pub(super) bitmaps: Option<BitmapDirectory>,
}

/// The content of a bitmaps extension.
#[derive(Clone, Copy, Debug)]
pub(super) struct BitmapDirectory {
    /// Bitmaps.
    pub(super) count: u64,
    /// Length of the directory.
    pub(super) bytes: u64,
    /// Where it is.
    pub(super) offset: u64,
}

impl Layout {
    /// Picks the fields out of a header.
    pub(super) fn new(header: &Header) -> Self {
        let bitmaps = header
            .extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::Bitmaps(raw) => Some(BitmapDirectory::new(raw)),
                _ => None,
            });
        Self {
            geometry: header.geometry(),
            version: header.version,
            virtual_size: header.size,
            l1_offset: header.l1_table_offset.get(),
            l1_entries: u64::from(header.l1_size),
            reftable_offset: header.refcount_table_offset.get(),
            reftable_clusters: u64::from(header.refcount_table_clusters),
            snapshot_count: header.snapshot_count,
            snapshot_table_offset: header.snapshot_table_offset.get(),
            bitmaps: bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0),
        }
    }
}

impl BitmapDirectory {
    /// Reads the extension, which `Header::decode` has checked if it is in force.
    fn new(raw: &[u8; 24]) -> Self {
        let field = |range: std::ops::Range<usize>| {
            raw[range]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        Self {
            count: field(0..4),
            bytes: field(8..16),
            offset: field(16..24),
        }
    }
}

/// The image file.
pub(super) struct Source<'a, S> {
    /// Where the file is.
    storage: &'a S,
    /// The image file.
    file: FileId,
    /// Its length. What ends past it dangles.
    pub(super) len: u64,
}

impl<'a, S: Storage> Source<'a, S> {
    /// Asks for the length.
    pub(super) fn new(storage: &'a S, file: FileId) -> Result<Self, Error> {
        let len = storage
            .len(file)
            .map_err(|error| Error::io("cannot find out the image file's length", error))?;
        Ok(Self { storage, file, len })
    }

    /// Whether the file may be made longer.
    pub(super) fn can_grow(&self) -> bool {
        self.storage.can_grow(self.file)
    }

    /// Fills `buf`, with zeroes past the end of the file.
    pub(super) async fn read(
        &self,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> (io::Result<()>, AlignedBuf) {
        if offset >= self.len {
            // The host refuses offsets that an image can well name.
            buf.fill(0);
            return (Ok(()), buf);
        }
        self.storage.read_buf(self.file, offset, buf).await
    }

    /// Reads clusters that begin inside the file, ascending where that is possible.
    pub(super) async fn read_clusters(&self, cluster_size: u64, starts: &[u64]) -> Read {
        read_clusters(self.storage, self.file, cluster_size, starts).await
    }

    /// Writes a piece of metadata.
    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.write_buf(offset, AlignedBuf::from_slice(bytes)).await
    }

    /// Writes a buffer that is not needed any more.
    pub(super) async fn write_buf(&self, offset: u64, buf: AlignedBuf) -> Result<(), Error> {
        self.storage
            .write(self.file, offset, SgList::from_buf(buf))
            .await
            .map_err(|error| Error::io(format!("cannot write at {offset:#x}"), error))
    }

    /// Writes those sectors of `new` that differ from `old`, which is what the file holds at `offset`
    /// (a multiple of the sector size, so that a torn write never mixes old and new in one sector).
    /// Tells whether there were any.
    pub(super) async fn write_changes(
        &self,
        offset: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<bool, Error> {
        let mut any = false;
        let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
        for (index, (_, changed)) in sectors.filter(|(_, (old, new))| old != new) {
            self.write(offset + to_u64(index * SECTOR), changed).await?;
            any = true;
        }
        Ok(any)
    }

    /// Makes durable what was written.
    pub(super) async fn sync(&self) -> Result<(), Error> {
        self.storage
            .sync_data(self.file)
            .await
            .map_err(|error| Error::io("cannot make the image file durable", error))
    }

    /// Makes the file `len` bytes long if it is shorter.
    pub(super) async fn grow(&mut self, len: u64) -> Result<(), Error> {
        if self.len >= len {
            return Ok(());
        }
        if !self.can_grow() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "no space left on the block device",
            ));
        }
        self.set_len(len).await
    }

    /// Makes a regular file exactly `len` bytes long.
    pub(super) async fn set_len(&mut self, len: u64) -> Result<(), Error> {
        self.storage
            .set_len(self.file, len)
            .await
            .map_err(|error| Error::io(format!("cannot make the file {len} bytes long"), error))?;
        self.len = len;
        Ok(())
    }

    /// Makes a range read as zeroes; `unmap` if it need not keep its space on the host.
    pub(super) async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<(), Error> {
        self.storage
            .write_zeroes(self.file, offset, len, unmap)
            .await
            .map_err(|error| Error::io(format!("cannot write zeroes at {offset:#x}"), error))
    }

    /// Writes zeroes byte for byte.
    pub(super) async fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.storage
            .write(self.file, offset, SgList::zeroes(len))
            .await
            .map_err(|error| Error::io(format!("cannot write zeroes at {offset:#x}"), error))
    }

    /// Reads and decodes the header.
    pub(super) async fn header(&self) -> Result<Header, Error> {
        super::open::read_header(self.storage, self.file).await
    }

    /// Replaces the changing fields of the header by those of `header`, in one sector, durably.
    pub(super) async fn write_header(&self, header: &Header) -> Result<(), Error> {
        let (result, mut bytes) = self.read(0, AlignedBuf::zeroed(SECTOR)).await;
        result.map_err(|error| Error::io("cannot read the header", error))?;
        let Some(sector) = bytes.first_chunk_mut::<SECTOR>() else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the header is shorter than a sector",
            ));
        };
        header.patch_sector(sector);
        self.write(0, sector).await?;
        self.sync().await
    }

    /// Reads the snapshot table. Its length stands nowhere, so it is read in growing pieces. The
    /// outer error is the host's, the inner one the image's.
    pub(super) async fn snapshots(
        &self,
        layout: &Layout,
    ) -> Result<Result<Vec<SnapshotEntry>, FormatError>, Error> {
        let mut len: u64 = 64 << 10;
        loop {
            let (result, bytes) = self
                .read(
                    layout.snapshot_table_offset,
                    AlignedBuf::zeroed(to_usize(len)),
                )
                .await;
            result.map_err(|error| Error::io("cannot read the snapshot table", error))?;
            match snapshot::decode_table(&bytes, layout.snapshot_count) {
                Err(FormatError::Truncated { .. }) if len < SNAPSHOT_TABLE_BYTES_MAX => len *= 4,
                other => return Ok(other),
            }
        }
    }
}
