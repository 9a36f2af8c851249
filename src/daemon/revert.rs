//! Going back to an internal snapshot while the image stays in the hands of this process: only when
//! no ring runs, so that no guest sees its disk change.
//!
//! The device is paused, the image is closed in order, the file is reverted, and the device gets
//! the image as the file now has it. An error before the file has changed leaves the disk as it was;
//! after one that leaves open whether it has, the old image is only read.

use std::sync::Arc;

use super::chain::{self, Chain};
use crate::config::ImageConfig;
use crate::device::{Paused, Pauser};
use crate::engine::{Error, ErrorKind, Image, LayerSpec, Selector, SnapshotInfo, revert};
use crate::storage::{BlockingStorage, FileId, block_on};

/// What a revert has come to.
pub(super) struct Reverted {
    /// What is served now, also after an error.
    pub(super) chain: Chain,
    /// The snapshot that the disk is now.
    pub(super) result: Result<SnapshotInfo, Error>,
}

/// Refuses where a guest uses the disk.
///
/// # Errors
/// `Invalid`.
pub(super) fn refuse_in_use(paused: &Paused<'_>) -> Result<(), Error> {
    match paused.rings_running() {
        0 => Ok(()),
        count => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "the disk is in use: {count} of its queues run; stop the guest, or detach the disk"
            ),
        )),
    }
}

/// Reverts the image of `old`, which the device of `pauser` serves. `watch` gets the new image
/// before anything happens to it. Blocks: not for the main thread.
///
/// # Errors
/// Nothing has happened: the disk is in use, there is no such snapshot, or the image cannot be
/// closed. When it is not known what the file names now, or it cannot be opened again, the old image
/// takes no more writes.
pub(super) fn take(
    old: &Chain,
    config: &ImageConfig,
    pauser: &Pauser,
    selector: &Selector,
    watch: &dyn Fn(&Image),
) -> Result<Reverted, Error> {
    check_size(old, selector)?;
    let paused = pauser.pause();
    refuse_in_use(&paused)?;
    // Now that nobody can make it fail any more: a failed image is not closed in order.
    if old.image.has_failed() {
        return Err(Error::new(
            ErrorKind::Failed,
            "the image takes no more writes since an earlier failure (see the log)",
        ));
    }
    if !old.image.background().is_empty() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "background work for internal snapshots is not done yet",
        ));
    }
    let files = old.files();
    let Some(active) = files.first() else {
        return Err(Error::new(ErrorKind::Invalid, "there is no image"));
    };
    old.close()?;
    let alone = BlockingStorage::new(vec![Arc::clone(active)]);
    let result = block_on(revert(alone, FileId(0), selector));
    let result = match result {
        Err(error) if error.kind() == ErrorKind::Failed => {
            // The file may name either tree. The old one is all there, to be read.
            old.image.abandon(error.chain());
            return Err(error.context("qblkd has to be restarted"));
        }
        result => result,
    };

    let open = || -> Result<Arc<Image>, Error> {
        let specs: Vec<LayerSpec> = chain::specs(old.nodes.iter().map(|node| &node.layer));
        let storage = BlockingStorage::new(files.clone());
        let options = chain::open_options(config);
        let image = block_on(Image::open(&storage, &specs, &options))?;
        watch(&image);
        paused
            .set_image(&old.image, &image, &files)
            .map_err(|error| Error::new(ErrorKind::Invalid, error.to_string()))?;
        Ok(image)
    };
    match open() {
        Ok(image) => Ok(Reverted {
            chain: Chain {
                image,
                nodes: Arc::clone(&old.nodes),
            },
            result,
        }),
        Err(error) => {
            let message = format!(
                "the image cannot be opened again after a revert: {}",
                error.chain()
            );
            old.image.abandon(message);
            Err(error.context("the image cannot be opened again: qblkd has to be restarted"))
        }
    }
}

/// A guest that comes back must find a disk of the size that it was offered.
fn check_size(old: &Chain, selector: &Selector) -> Result<(), Error> {
    let matches =
        |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
    let snapshots = old.image.snapshots();
    let snapshot = snapshots.iter().find(|snapshot| {
        matches(&selector.id, &snapshot.id) && matches(&selector.name, &snapshot.name)
    });
    let Some(snapshot) = snapshot else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no snapshot {selector}"),
        ));
    };
    let info = old.nodes.first().and_then(|node| node.info.as_ref());
    let size = info.map_or(0, |info| info.header.size);
    if snapshot.disk_size == size {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the disk had {} bytes then, and has {size} now: stop qblkd, and use \
             `qblkd snapshot revert --blk-file`",
            snapshot.disk_size
        ),
    ))
}
