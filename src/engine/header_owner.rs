//! The one owner of the header sector.
//!
//! Every change of the header is one 512-byte write of committed values followed by an
//! `fdatasync`, and changes do not overlap. Bytes of the sector that we do not own stay as they
//! are.

use async_lock::Mutex as AsyncMutex;

use super::error::Error;
use crate::format::header::Header;
use crate::storage::{AlignedBuf, FileId, SgList, Storage};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// See the module text.
#[derive(Debug)]
pub(crate) struct HeaderOwner {
    file: FileId,
    header: AsyncMutex<Header>,
}

impl HeaderOwner {
    pub(crate) fn new(file: FileId, header: Header) -> Self {
        Self { file, header: AsyncMutex::new(header) }
    }

    /// Changes the header in the file, durably. What the new values rely on must be durable.
    ///
    /// # Errors
    /// `Io` when the sector cannot be read; `Failed` when it cannot be written or made durable: it
    /// is not known then which header the file has.
    pub(crate) async fn update<S: Storage>(
        &self,
        storage: &S,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), Error> {
        let mut header = self.header.lock().await;
        let mut changed = header.clone();
        change(&mut changed);
        let (read, buf) = storage.read_buf(self.file, 0, AlignedBuf::zeroed(SECTOR)).await;
        read.map_err(|error| Error::io("cannot read the image header", error))?;
        let mut sector = [0; SECTOR];
        sector.copy_from_slice(&buf[..SECTOR]);
        changed.patch_sector(&mut sector);
        let fault = |error| Error::failed("cannot update the image header", error);
        let sg = SgList::from_buf(AlignedBuf::from_slice(&sector));
        storage.write(self.file, 0, sg).await.map_err(fault)?;
        storage.sync_data(self.file).await.map_err(fault)?;
        *header = changed;
        Ok(())
    }
}
