//! One thread's access to an image: its directory, its put table, its pins, its reserved clusters.
//!
//! The two `resolve` functions are the fast path: no lock, no allocation, no write to memory that
//! another worker writes. They answer [`Fast::Slow`] for everything that needs more.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::Image;
use super::allocator::Run;
use super::cache::SliceKey;
use super::cache::directory::{CacheCounters, CachedSlice, Directory, Ticket};
use super::cache::slice::SliceBody;
use super::cache::store::Lookup;
use super::compress::ClusterCache;
use super::error::Error;
use super::extent::{Extent, ExtentList, Fast};
use super::layer::{EntryPlace, Layer, LayerKind, Mapping};
#[cfg(test)]
use super::order::{Gap, gap};
use super::pin::{PinGuard, PinTable};
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{GuestOffset, HostOffset, to_usize};

/// See the module text.
#[derive(Debug)]
pub struct Worker<S: Storage> {
    pub(crate) image: Arc<Image>,
    pub(crate) storage: S,
    pub(crate) pins: Rc<PinTable>,
    pub(crate) directory: RefCell<Directory>,
    /// Reserved clusters, so that neighbours stay neighbours.
    pub(crate) extent: Cell<Run>,
    /// Lately decompressed clusters.
    pub(crate) decompressed: RefCell<ClusterCache>,
}

/// A slice that stays in the store while a request is suspended.
pub(crate) struct PinnedSlice<'a> {
    directory: &'a RefCell<Directory>,
    pub(crate) body: Arc<SliceBody>,
    ticket: Ticket,
}

impl Drop for PinnedSlice<'_> {
    fn drop(&mut self) {
        self.directory.borrow_mut().put(&self.ticket);
    }
}

/// One step of a lookup in one layer.
enum Step {
    Extent(Extent),
    /// This many bytes are for the next layer.
    Next(u64),
    Slow,
}

impl<S: Storage> Worker<S> {
    pub(super) fn new(image: Arc<Image>, storage: S) -> Rc<Self> {
        let counters = Arc::new(CacheCounters::default());
        let slots = image.directory_slots;
        Self::with_directory(image, storage, slots, counters)
    }

    /// A worker whose directory has so many slots.
    pub(super) fn with_directory(
        image: Arc<Image>,
        storage: S,
        slots: usize,
        counters: Arc<CacheCounters>,
    ) -> Rc<Self> {
        let directory = Directory::new(slots, counters, image.store.directories());
        Rc::new(Self {
            pins: PinTable::new(&image.board),
            directory: RefCell::new(directory),
            extent: Cell::new(Run::EMPTY),
            decompressed: RefCell::default(),
            image,
            storage,
        })
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The storage handle of this thread.
    #[must_use]
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// What counts this worker's lookups.
    #[must_use]
    pub fn cache_counters(&self) -> Arc<CacheCounters> {
        Arc::clone(self.directory.borrow().counters())
    }

    /// Pins the present for a batch of requests. Call it *after* the avail index was read; the
    /// batch takes only entries up to that index.
    #[must_use]
    #[inline]
    pub fn pin(&self) -> PinGuard {
        self.pins.pin()
    }

    /// Resolves a read. `Ready`: `out` covers the range. `Slow`: `out` is meaningless.
    #[inline]
    pub fn resolve_read(
        &self,
        _pin: &PinGuard,
        offset: GuestOffset,
        len: u64,
        out: &mut ExtentList,
    ) -> Fast {
        out.clear();
        if !self.image.contains(offset, len) {
            return Fast::Slow;
        }
        let Ok(mut directory) = self.directory.try_borrow_mut() else {
            return Fast::Slow;
        };
        let end = offset.get() + len;
        let mut position = offset.get();
        while position < end {
            let mut left = end - position;
            let mut extent = None;
            for layer in &self.image.layers {
                match step(layer, &mut directory, position, left) {
                    Step::Extent(found) => {
                        extent = Some(found);
                        break;
                    }
                    Step::Next(len) => left = len,
                    Step::Slow => return Fast::Slow,
                }
            }
            let extent = extent.unwrap_or(Extent::Zero { len: left });
            position += match extent {
                Extent::Data { len, .. } | Extent::Zero { len } => len,
            };
            if !out.push(extent) {
                return Fast::Slow;
            }
        }
        Fast::Ready
    }

    /// Resolves a write. `Ready` only where every byte may be written in place: the table is ours
    /// alone in the pinned generation and each entry carries the copied flag.
    #[inline]
    pub fn resolve_write(
        &self,
        pin: &PinGuard,
        offset: GuestOffset,
        len: u64,
        out: &mut ExtentList,
    ) -> Fast {
        out.clear();
        if !self.image.contains(offset, len) || !self.image.may_write_in_place() {
            return Fast::Slow;
        }
        let Some(active) = self.image.layers.first() else {
            return Fast::Slow;
        };
        let mapping = match &active.kind {
            LayerKind::Raw => {
                let whole = Extent::Data {
                    file: active.file,
                    host_offset: offset.get(),
                    len,
                };
                return if out.push(whole) {
                    Fast::Ready
                } else {
                    Fast::Slow
                };
            }
            LayerKind::Qcow2(mapping) => mapping,
        };
        let Ok(mut directory) = self.directory.try_borrow_mut() else {
            return Fast::Slow;
        };
        let end = offset.get() + len;
        let mut position = offset.get();
        while position < end {
            let place = mapping.place(GuestOffset::new(position));
            if !self.image.is_owned(place.l1_index, pin.generation()) {
                return Fast::Slow;
            }
            let Some(table) = mapping.l1_entry(place.l1_index).table_offset() else {
                return Fast::Slow;
            };
            let Some(slice) = resident(active, mapping, &mut directory, table, &place) else {
                return Fast::Slow;
            };
            let mut index = place.index;
            while position < end && index < slice.entry_count() {
                let entry = slice.entry(index);
                let Some(host) = in_place(entry) else {
                    return Fast::Slow;
                };
                let inside = mapping.geometry.offset_in_cluster(position);
                let len = (mapping.geometry.cluster_size() - inside).min(end - position);
                let piece = Extent::Data {
                    file: active.file,
                    host_offset: host + inside,
                    len,
                };
                if !out.push(piece) {
                    return Fast::Slow;
                }
                position += len;
                index += 1;
            }
        }
        Fast::Ready
    }

    /// Gets a slice, from the file if need be, and pins it for the caller.
    ///
    /// # Errors
    /// `Io` when it cannot be read.
    pub(crate) async fn slice<'a>(
        &'a self,
        layer: &Layer,
        mapping: &Mapping,
        table: HostOffset,
        place: &EntryPlace,
    ) -> Result<PinnedSlice<'a>, Error> {
        let key = layer.slice_key(table, place);
        if let Some((found, ticket)) = self
            .directory
            .borrow_mut()
            .get_pinned(key, mapping.slice_bits)
        {
            return Ok(PinnedSlice {
                directory: &self.directory,
                body: Arc::clone(found.body()),
                ticket,
            });
        }
        let body = self.missing_slice(layer, mapping, key).await?;
        #[cfg(test)]
        gap(Gap::Pin);
        let ticket = self.directory.borrow_mut().pin(&body);
        Ok(PinnedSlice {
            directory: &self.directory,
            body,
            ticket,
        })
    }

    /// Finds a slice that the directory does not have and gives it to it.
    async fn missing_slice(
        &self,
        layer: &Layer,
        mapping: &Mapping,
        key: SliceKey,
    ) -> Result<Arc<SliceBody>, Error> {
        loop {
            match self.image.store.look_up(key) {
                Lookup::Live(body) => {
                    let kept = Arc::clone(&body);
                    self.directory
                        .borrow_mut()
                        .install(kept, mapping.slice_bits);
                    return Ok(body);
                }
                Lookup::Loading(listener) => listener.await,
                Lookup::Absent(ticket) => {
                    let body = self.load_slice(layer, mapping, key).await?;
                    let kept = Arc::clone(&body);
                    self.directory
                        .borrow_mut()
                        .install(kept, mapping.slice_bits);
                    ticket.finish(Arc::clone(&body));
                    return Ok(body);
                }
            }
        }
    }

    /// Reads a slice from the file. The caller has the ticket for it.
    pub(crate) async fn load_slice(
        &self,
        layer: &Layer,
        mapping: &Mapping,
        key: SliceKey,
    ) -> Result<Arc<SliceBody>, Error> {
        let host_offset = key.host_offset();
        let buf = AlignedBuf::zeroed(to_usize(mapping.slice_bytes()));
        let (read, buf) = self
            .storage
            .read_buf(layer.file, host_offset.get(), buf)
            .await;
        read.map_err(|error| {
            Error::io(format!("cannot read the L2 slice at {host_offset}"), error)
        })?;
        Ok(Self::new_body(mapping, key, &buf))
    }

    /// The body of a slice that the file holds as `bytes`.
    pub(crate) fn new_body(mapping: &Mapping, key: SliceKey, bytes: &[u8]) -> Arc<SliceBody> {
        let raw = |chunk: &[u8]| chunk.try_into().map_or(0, u64::from_be_bytes);
        let suspicious = mapping.is_suspicious(key.host_offset(), bytes.chunks_exact(8).map(raw));
        let entries = bytes.chunks_exact(8).map(raw).map(AtomicU64::new).collect();
        Arc::new(SliceBody::new(key, entries, suspicious))
    }

    /// The part of the range from `position` on that lies in one slice, as (place, entries).
    pub(crate) fn span(mapping: &Mapping, position: u64, len: u64) -> (EntryPlace, usize) {
        let place = mapping.place(GuestOffset::new(position));
        let inside = mapping.geometry.offset_in_cluster(position);
        let clusters = to_usize((inside + len).div_ceil(mapping.geometry.cluster_size()));
        (place, clusters.min(mapping.slice_entries() - place.index))
    }
}

/// The host offset of a cluster that the entry alone allows to write in place.
#[inline]
pub(crate) fn in_place(entry: L2Entry) -> Option<u64> {
    /// Copied, compressed and zero flags: exactly the copied one must be set.
    const FLAGS: u64 = 1 << 63 | 1 << 62 | 1;
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let host = entry.0 & OFFSET;
    (entry.0 & FLAGS == 1 << 63 && host != 0).then_some(host)
}

/// The slice of an entry of `table`, if this worker has it and it holds nothing odd.
#[inline]
fn resident<'a>(
    layer: &Layer,
    mapping: &Mapping,
    directory: &'a mut Directory,
    table: HostOffset,
    place: &EntryPlace,
) -> Option<CachedSlice<'a>> {
    let found = directory.get(layer.slice_key(table, place), mapping.slice_bits)?;
    (!found.is_suspicious()).then_some(found)
}

/// Resolves the first piece of a read in one layer.
#[inline]
fn step(layer: &Layer, directory: &mut Directory, position: u64, len: u64) -> Step {
    let Some(inside_layer) = layer.size.checked_sub(position).filter(|left| *left > 0) else {
        // A backing file that is shorter than its overlay reads as zeroes from here on.
        return Step::Extent(Extent::Zero { len });
    };
    let len = len.min(inside_layer);
    let mapping = match &layer.kind {
        LayerKind::Raw => {
            return Step::Extent(Extent::Data {
                file: layer.file,
                host_offset: position,
                len,
            });
        }
        LayerKind::Qcow2(mapping) => mapping,
    };
    let geometry = mapping.geometry;
    let place = mapping.place(GuestOffset::new(position));
    let Some(table) = mapping.l1_entry(place.l1_index).table_offset() else {
        let span = geometry.l2_table_span();
        return Step::Next(len.min(span - position % span));
    };
    let Some(slice) = resident(layer, mapping, directory, table, &place) else {
        return Step::Slow;
    };
    let inside = geometry.offset_in_cluster(position);
    let run = (geometry.cluster_size() - inside).min(len);
    match slice.entry(place.index).decode(geometry, mapping.version) {
        Ok(Cluster::Standard { host, .. }) => Step::Extent(Extent::Data {
            file: layer.file,
            host_offset: host.get() + inside,
            len: run,
        }),
        Ok(Cluster::ZeroPlain | Cluster::ZeroAllocated { .. }) => {
            Step::Extent(Extent::Zero { len: run })
        }
        Ok(Cluster::Unallocated) => Step::Next(run),
        Ok(Cluster::Compressed { .. }) | Err(_) => Step::Slow,
    }
}

impl<S: Storage> Drop for Worker<S> {
    fn drop(&mut self) {
        self.give_back_extent();
    }
}
