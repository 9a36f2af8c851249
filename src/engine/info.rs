//! What an image says about itself: header fields and internal snapshots.
//!
//! Reads two tables at most, judges nothing beyond what decoding them takes, writes nothing.

#![forbid(unsafe_code)]

use super::error::Error;
use super::source::{Layout, Source};
use crate::format::Header;
use crate::format::snapshot::SnapshotEntry;
use crate::storage::{FileId, Storage};

/// A qcow2 image in words and numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageInfo {
    /// The header.
    pub header: Header,
    /// Internal snapshots, in the order of the table.
    pub snapshots: Vec<SnapshotEntry>,
}

/// Reads what `file` says.
///
/// # Errors
///
/// The header or the snapshot table cannot be read or decoded.
pub async fn info<S: Storage>(storage: &S, file: FileId) -> Result<ImageInfo, Error> {
    let source = Source::new(storage, file)?;
    let header = source.header().await?;
    let layout = Layout::new(&header);
    let snapshots = if layout.snapshot_count == 0 {
        Vec::new()
    } else {
        source
            .snapshots(&layout)
            .await?
            .map_err(|error| Error::format("cannot read the snapshot table", error))?
    };
    Ok(ImageInfo { header, snapshots })
}
