//! An overlay takes the place of the image that is served, which stays behind as its backing file:
//! what the overlay is like, and the order of the steps.
//!
//! Owns the order and nothing else. Which files there are, the overlay's name, and how requests are
//! held back are the caller's, who says how ([`Handover`]).
//!
//! Allowed outcomes of a power cut at any point: the old image as it was, with at most an overlay
//! beside it that is empty, or that nobody takes for an image; or the overlay in use, found by its
//! name, on a backing file that has everything that was completed before (at most with leaked
//! clusters). An overlay that is found may always be used: as long as it is empty it shows what is
//! below.
//!
//! So, before the first request goes to the overlay, durably:
//! - the overlay as a whole image, and its name: what a guest flushes later is in it;
//! - everything that was written to the old image: whoever flushes later flushes the overlay alone.
//!
//! The device is paused meanwhile, which makes the instant one for all queues. The old image's
//! books are closed afterwards; a failure of that costs clusters, no data.

use std::future::{Future, ready};
use std::sync::Arc;

use super::create::{Backing, CreateOptions, Preallocation};
use super::error::{Error, ErrorKind};
use super::layer::LayerKind;
use super::order::keeps;
use super::worker::Worker;
use super::{Image, LayerSpec, OpenOptions};
use crate::storage::Storage;

/// log2 of the cluster size of an overlay over a raw image: qcow2's usual one.
const CLUSTER_BITS_DEFAULT: u32 = 16;
/// log2 of the usual refcount width.
const REFCOUNT_ORDER: u32 = 4;

/// What going over needs of its surroundings: the overlay's name, and the device.
pub trait Handover {
    /// A device on which nothing is in flight, and nothing is begun until this is dropped.
    type Paused;

    /// Makes the overlay's file durable, and the name that it will be found by.
    fn sync_overlay(&self) -> impl Future<Output = Result<(), Error>>;

    /// A last occasion to do what makes the pause shorter. Nothing depends on it.
    fn before_pause(&self) -> impl Future<Output = Result<(), Error>> {
        ready(Ok(()))
    }

    /// Returns when every request that was begun is complete.
    fn pause(&self) -> impl Future<Output = Self::Paused>;

    /// Gives the device this image instead of the old one, which no request uses any more then.
    ///
    /// # Errors
    /// Nothing has happened.
    fn hand_over(&self, paused: &Self::Paused, image: &Arc<Image>) -> Result<(), Error>;
}

/// What an empty overlay over `image` is like.
#[must_use]
pub fn overlay_options(image: &Image, backing: Backing) -> CreateOptions {
    let cluster_bits = match image.layers.first().map(|layer| &layer.kind) {
        Some(LayerKind::Qcow2(mapping)) => mapping.geometry.cluster_bits(),
        _ => CLUSTER_BITS_DEFAULT,
    };
    CreateOptions {
        virtual_size: image.virtual_size(),
        cluster_bits,
        refcount_order: REFCOUNT_ORDER,
        version: 3,
        lazy_refcounts: false,
        preallocation: Preallocation::Off,
        backing: Some(backing),
    }
}

/// Whether an image can become a backing file now.
///
/// # Errors
/// `ReadOnly`, `Failed`; `Unsupported` while there is background work.
pub fn can_become_backing(image: &Image) -> Result<(), Error> {
    if image.is_read_only() {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            "the image is opened read-only",
        ));
    }
    if image.has_failed() {
        return Err(Error::new(
            ErrorKind::Failed,
            "the image takes no more writes since an earlier failure (see the log)",
        ));
    }
    if !image.background().is_empty() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "background work for internal snapshots is not done yet, and a backing file cannot be \
             worked on; try again when it is",
        ));
    }
    Ok(())
}

/// Goes over from the image of `old` to the chain `specs` in `storage`: an overlay that was made or
/// found, over the files of that image. Returns the image that is served from now on.
///
/// # Errors
/// Those of [`can_become_backing`], of the flush, of opening and of the handover. The device goes on
/// with the old image then, which has failed if a flush of it has; nobody needs the overlay.
pub async fn go_over<O: Storage, S: Storage, H: Handover>(
    old: &Worker<O>,
    storage: &S,
    specs: &[LayerSpec],
    options: &OpenOptions,
    handover: &H,
) -> Result<Arc<Image>, Error> {
    can_become_backing(old.image())?;
    if keeps!(OverlayBeforeUse) {
        handover.sync_overlay().await?;
    }
    handover.before_pause().await?;
    let paused = handover.pause().await;
    // Again: a snapshot may have been taken, or the image have failed, since it was looked at.
    can_become_backing(old.image())?;
    if keeps!(BackingBeforeOverlay) {
        old.flush().await?;
    }
    let image = Image::open(storage, specs, options).await?;
    handover.hand_over(&paused, &image)?;
    drop(paused);
    if let Err(error) = old.close().await {
        log::error!(
            "the backing file may keep some clusters for nothing: {}",
            error.chain()
        );
    }
    Ok(image)
}
