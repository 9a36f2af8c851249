//! Going back to an internal snapshot while the image stays in the hands of this process: only when
//! no ring runs, so that no guest sees its disk change. To one of a disk of another size only when no
//! front-end is connected either: those that are have read the size.
//!
//! The device is paused, the image is closed in order, the file is reverted, and the device gets
//! the image as the file now has it. An error before the file has changed leaves the disk as it was;
//! after one that leaves open whether it has, the old image is only read.

use std::sync::Arc;

use super::chain::{self, Chain};
use crate::config::ImageConfig;
use crate::device::{DeviceError, NoFrontEnd, Paused, Pauser};
use crate::engine::{Error, ErrorKind, Image, LayerSpec, Selector, SnapshotInfo, revert};
use crate::storage::{BlockingStorage, FileId, HostFile, block_on};
use crate::units::{SECTOR_SIZE, align_down};

/// What a revert has come to.
pub(super) struct Reverted {
    /// What is served now, also after an error.
    pub(super) chain: Chain,
    /// The snapshot that the disk is now.
    pub(super) result: Result<SnapshotInfo, Error>,
}

/// A disk whose content may change.
pub(super) struct Unused<'a> {
    paused: Paused<'a>,
    /// Its size may change as well.
    nobody: Option<NoFrontEnd<'a>>,
}

impl<'a> Unused<'a> {
    /// Pauses the device of `pauser`, which serves `old`, for a change to a snapshot. Returns at once.
    ///
    /// # Errors
    /// `Invalid` where somebody uses the disk, or knows a size that it will not have. `NotFound`.
    pub(super) fn stop(
        old: &Chain,
        pauser: &'a Pauser,
        selector: &Selector,
    ) -> Result<Self, Error> {
        let paused = pauser.pause();
        let count = paused.rings_running();
        if count > 0 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the disk is in use: {count} of its queues run; stop the guest, or detach the \
                     disk"
                ),
            ));
        }
        let then = size_then(old, selector)?;
        let now = old.image.virtual_size();
        if then == now {
            let nobody = None;
            return Ok(Self { paused, nobody });
        }
        let nobody = pauser.keep_out().ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!(
                    "the disk had {then} bytes then and has {now} now, and a front-end is connected \
                     that goes by its size: end the guest, or detach the disk from it, and try \
                     again; or stop qblkd and use `qblkd snapshot revert --blk-file`"
                ),
            )
        })?;
        Ok(Self {
            paused,
            nobody: Some(nobody),
        })
    }

    fn set_image(
        &self,
        old: &Image,
        image: &Arc<Image>,
        files: &[Arc<HostFile>],
    ) -> Result<(), DeviceError> {
        match &self.nobody {
            None => self.paused.set_image(old, image, files),
            Some(nobody) => self.paused.set_image_of_any_size(nobody, old, image, files),
        }
    }
}

/// Reverts the image of `old`, which the device of `pauser` serves. `watch` gets the new image
/// before anything happens to it. Blocks: not for the main thread.
///
/// # Errors
/// Nothing has happened: what [`Unused::stop`] refuses, or the image cannot be closed. When it is not
/// known what the file names now, or it cannot be opened again, the old image takes no more writes.
pub(super) fn take(
    old: &Chain,
    config: &ImageConfig,
    pauser: &Pauser,
    selector: &Selector,
    watch: &dyn Fn(&Image),
) -> Result<Reverted, Error> {
    let unused = Unused::stop(old, pauser, selector)?;
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
        unused
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

/// Bytes of the disk in a snapshot: whole sectors, as a guest would see it.
fn size_then(old: &Chain, selector: &Selector) -> Result<u64, Error> {
    let matches =
        |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
    let snapshots = old.image.snapshots();
    let snapshot = snapshots.iter().find(|snapshot| {
        matches(&selector.id, &snapshot.id) && matches(&selector.name, &snapshot.name)
    });
    match snapshot {
        Some(snapshot) => Ok(align_down(snapshot.disk_size, SECTOR_SIZE)),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no snapshot {selector}"),
        )),
    }
}
