//! qcow2 semantics over [`Storage`]: resolve, allocate, write order,
//! caches, check.
//!
//! The engine knows nothing of virtio, sockets or JSON and never builds an SQE. An [`Image`] is
//! shared by all threads; each thread works through a [`Worker`] of its own. Requests resolve to
//! extents on a fast path that takes no lock ([`Worker::resolve_read`],
//! [`Worker::resolve_write`]); everything else is an `async fn`.
//!
//! Lock order (outer first): L1 lock, slice locks (ascending host offset), taken shard, lists of
//! modified and dropped things. Allocator state, then protected ranges. No lock is held across an
//! await, except the header owner's asynchronous ones.

#![forbid(unsafe_code)]

mod active;
mod allocator;
mod breath;
mod bulk;
pub mod cache;
pub mod chain;
pub mod check;
mod compress;
pub mod create;
mod discard;
mod error;
mod extent;
mod header_owner;
pub mod info;
mod layer;
mod open;
mod order;
pub mod overlay;
mod pin;
mod protected;
mod read;
mod snapshot;
mod source;
mod sync;
mod table;
mod taken;
mod worker;
mod write;

#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use self::active::Active;
use self::cache::store::Store;
use self::error::lock;
use self::layer::{Layer, LayerKind};
use self::order::FlushGate;
use self::pin::PinBoard;
use crate::engine::sync::Mutex;
use crate::storage::Storage;
use crate::units::{GuestOffset, SECTOR_SIZE};

pub use self::cache::directory::{CacheCounters, CacheStats};
pub use self::error::{Error, ErrorKind};
pub use self::extent::{EXTENTS_MAX, Extent, ExtentList, Fast};
pub use self::open::{LayerFormat, LayerSpec, OpenOptions};
pub use self::pin::PinGuard;
pub(crate) use self::snapshot::snapshot_info;
pub use self::snapshot::{
    BackgroundKind, BackgroundStatus, Created, NewSnapshot, SNAPSHOT_NAME_BYTES_MAX, Selector,
    SnapshotInfo, Step, revert,
};
pub use self::worker::Worker;

/// What an image may do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// Open for writing; the first write has yet to clear autoclear features.
    Opened = 0,
    /// Reads and writes.
    Ready = 1,
    /// Reads only, by request.
    ReadOnly = 2,
    /// Reads only, because a metadata write or a flush failed, or corruption was found.
    Failed = 3,
}

impl State {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Opened,
            1 => Self::Ready,
            2 => Self::ReadOnly,
            _ => Self::Failed,
        }
    }
}

/// Something that happened to an image, for the control socket and the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ImageEvent {
    /// Corruption was found; the image takes no more writes.
    Corrupted {
        /// What was found where.
        message: String,
    },
    /// A metadata write or a flush failed; the image takes no more writes.
    Failed {
        /// What failed.
        message: String,
    },
    /// A request failed on the host; the guest was told.
    RequestFailed {
        /// It would have changed or flushed the image.
        write: bool,
        /// The host had no space.
        no_space: bool,
        /// What failed.
        message: String,
    },
}

/// Slots of a background worker's directory: its walks do not come back to what they have seen.
const BACKGROUND_SLOTS: usize = 64;

type EventSink = Box<dyn Fn(ImageEvent) + Send + Sync>;
type WriteBackSink = Box<dyn Fn() + Send + Sync>;

/// An open virtual disk: the active layer and its backing chain.
pub struct Image {
    layers: Vec<Layer>,
    /// The active layer's write side; `None` for raw and read-only images.
    active: Option<Active>,
    board: Arc<PinBoard>,
    store: Arc<Store>,
    directory_slots: usize,
    state: AtomicU8,
    gate: FlushGate,
    /// Free clusters and discarded ranges give their blocks back to the host.
    discard: bool,
    /// `cache=unsafe`: nothing is ever made durable on purpose.
    no_flush: bool,
    /// What the snapshot table says, where nobody can change it.
    read_only_snapshots: Vec<SnapshotInfo>,
    event_sink: Mutex<Option<EventSink>>,
    write_back_sink: Mutex<Option<WriteBackSink>>,
    /// The sink was called, and the write-back has not begun.
    write_back_asked: AtomicBool,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("virtual_size", &self.virtual_size())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Bytes of the virtual disk that a guest can address: whole sectors. An image whose size is
    /// not a multiple of 512 has its last partial sector padded with zeroes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.layers
            .first()
            .map_or(0, |layer| layer.size.next_multiple_of(SECTOR_SIZE))
    }

    /// Opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.state() == State::ReadOnly
    }

    /// No more writes, since metadata could not be written or was found corrupt.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.state() == State::Failed
    }

    /// What the image may do now.
    #[must_use]
    pub fn state(&self) -> State {
        State::from_byte(self.state.load(Ordering::Acquire))
    }

    /// Bytes per cluster; a sector for raw images.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        match self.layers.first().map(|layer| &layer.kind) {
            Some(LayerKind::Qcow2(mapping)) => mapping.geometry.cluster_size(),
            _ => SECTOR_SIZE,
        }
    }

    /// Whom to tell about failures. The sink is called on the thread that met the failure.
    pub fn set_event_sink(&self, sink: impl Fn(ImageEvent) + Send + Sync + 'static) {
        *lock(&self.event_sink) = Some(Box::new(sink));
    }

    /// Whom to tell that much metadata is modified, or that clusters are waiting to be freed: it should
    /// call [`Worker::write_back_in_background`] soon. Called on a worker's thread, and not again
    /// before that. Without a sink requests and flushes do it themselves, but that nobody flushes for a
    /// guest that only drops clusters and never flushes.
    pub fn set_write_back_sink(&self, sink: impl Fn() + Send + Sync + 'static) {
        *lock(&self.write_back_sink) = Some(Box::new(sink));
        self.write_back_asked.store(false, Ordering::Release);
    }

    fn has_write_back_sink(&self) -> bool {
        lock(&self.write_back_sink).is_some()
    }

    fn ask_for_write_back(&self) {
        if !self.write_back_asked.load(Ordering::Relaxed)
            && !self.write_back_asked.swap(true, Ordering::AcqRel)
            && let Some(sink) = &*lock(&self.write_back_sink)
        {
            sink();
        }
    }

    /// A thread's access to the image. `storage` has the chain's files in the order of its layers.
    pub fn worker<S: Storage>(self: &Arc<Self>, storage: S) -> Rc<Worker<S>> {
        Worker::new(Arc::clone(self), storage)
    }

    /// Takes no more writes from now on: the file may not be what this image knows of it.
    pub fn abandon(&self, message: String) {
        self.fail(ImageEvent::Failed { message });
    }

    /// Access for a thread that does background work: a small directory.
    pub fn background_worker<S: Storage>(self: &Arc<Self>, storage: S) -> Rc<Worker<S>> {
        Worker::with_directory(Arc::clone(self), storage, BACKGROUND_SLOTS, Arc::default())
    }

    #[inline]
    fn contains(&self, offset: GuestOffset, len: u64) -> bool {
        offset
            .get()
            .checked_add(len)
            .is_some_and(|end| end <= self.virtual_size())
    }

    /// Checks a range that came from a device.
    fn check_range(&self, offset: GuestOffset, len: u64) -> Result<(), Error> {
        if self.contains(offset, len) && (offset.get() | len).is_multiple_of(SECTOR_SIZE) {
            return Ok(());
        }
        let size = self.virtual_size();
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!("{len:#x} bytes at {offset} are not whole sectors of a disk of {size:#x}"),
        ))
    }

    #[inline]
    fn may_write_in_place(&self) -> bool {
        self.state.load(Ordering::Relaxed) == State::Ready as u8
    }

    #[inline]
    fn is_owned(&self, l1_index: usize, generation: u64) -> bool {
        self.active
            .as_ref()
            .is_some_and(|active| active.is_owned(l1_index, generation))
    }

    fn become_ready(&self) {
        let (from, to) = (State::Opened as u8, State::Ready as u8);
        // Lost only to a failure or to another first write.
        let _ = self
            .state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
    }

    fn cluster_bits(&self) -> u32 {
        self.cluster_size().trailing_zeros()
    }

    /// Lets entries point to clusters that the file has grown by.
    fn follow_end(&self) {
        if let (Some(layer), Some(active)) = (self.layers.first(), &self.active)
            && let LayerKind::Qcow2(mapping) = &layer.kind
        {
            mapping
                .host_end
                .fetch_max(active.allocator.end_offset(), Ordering::AcqRel);
        }
    }

    /// Takes no more writes. Only the first failure is told.
    fn fail(&self, event: ImageEvent) {
        let before = self.state.swap(State::Failed as u8, Ordering::AcqRel);
        if before == State::Failed as u8 {
            return;
        }
        let (ImageEvent::Corrupted { message }
        | ImageEvent::Failed { message }
        | ImageEvent::RequestFailed { message, .. }) = &event;
        log::error!("{message}; the image takes no more writes until it is opened again");
        self.tell(event);
    }

    fn tell(&self, event: ImageEvent) {
        if let Some(sink) = &*lock(&self.event_sink) {
            sink(event);
        }
    }

    /// Tells that a request failed on the host. For the device, which limits how often.
    pub fn tell_request_failed(&self, write: bool, error: &Error) {
        self.tell(ImageEvent::RequestFailed {
            write,
            no_space: error.kind() == ErrorKind::NoSpace,
            message: error.chain(),
        });
    }

    fn failed_error() -> Error {
        Error::new(
            ErrorKind::Failed,
            "the image takes no more writes since an earlier failure (see the log); check it and \
             start again",
        )
    }
}
