//! The one owner of the header sector, and of the image file's `fdatasync`.
//!
//! One `fdatasync` at a time, and none after one that failed: the host tells a lost write to one
//! caller only, and another whose own call succeeds must not take its data for durable.
//!
//! Every change of the header is one 512-byte write of committed values followed by an
//! `fdatasync`, and changes do not overlap. Bytes of the sector that we do not own stay as they
//! are.

use async_lock::Mutex as AsyncMutex;

use super::error::{Error, ErrorKind};
use crate::format::header::Header;
use crate::storage::{AlignedBuf, FileId, SgList, Storage};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// See the module text.
#[derive(Debug)]
pub(crate) struct HeaderOwner {
    file: FileId,
    header: AsyncMutex<Header>,
    /// Held across an `fdatasync`; true once one has failed.
    sync_failed: AsyncMutex<bool>,
}

impl HeaderOwner {
    pub(crate) fn new(file: FileId, header: Header) -> Self {
        Self {
            file,
            header: AsyncMutex::new(header),
            sync_failed: AsyncMutex::new(false),
        }
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
        self.update_if(storage, |header| {
            change(header);
            true
        })
        .await
    }

    /// As [`Self::update`], unless `change` says that nothing needs to change.
    ///
    /// # Errors
    /// As for [`Self::update`].
    pub(crate) async fn update_if<S: Storage>(
        &self,
        storage: &S,
        change: impl FnOnce(&mut Header) -> bool,
    ) -> Result<(), Error> {
        let mut header = self.header.lock().await;
        let mut changed = header.clone();
        if !change(&mut changed) {
            return Ok(());
        }
        let (read, buf) = storage
            .read_buf(self.file, 0, AlignedBuf::zeroed(SECTOR))
            .await;
        read.map_err(|error| Error::io("cannot read the image header", error))?;
        let mut sector = [0; SECTOR];
        sector.copy_from_slice(&buf[..SECTOR]);
        changed.patch_sector(&mut sector);
        let fault = |error| Error::failed("cannot update the image header", error);
        let sg = SgList::from_buf(AlignedBuf::from_slice(&sector));
        storage.write(self.file, 0, sg).await.map_err(fault)?;
        self.sync_data(storage).await?;
        *header = changed;
        Ok(())
    }

    /// Makes durable what was written to the image file.
    ///
    /// # Errors
    /// `Failed`, now and for ever after.
    pub(crate) async fn sync_data<S: Storage>(&self, storage: &S) -> Result<(), Error> {
        let mut failed = self.sync_failed.lock().await;
        if *failed {
            return Err(Error::new(
                ErrorKind::Failed,
                "an earlier fdatasync of the image failed",
            ));
        }
        if let Err(error) = storage.sync_data(self.file).await {
            *failed = true;
            return Err(Error::failed("cannot make the image durable", error));
        }
        Ok(())
    }
}
