//! Writing: in place, into new clusters, or into a cluster that is kept for a zero entry.
//!
//! The data is written first, then the clusters are counted, then the L2 entries change in memory.
//! A later flush brings that to the file in the right order (see `order`). Whatever fails before
//! the link leaves the old mapping, and the clusters are given back.

use event_listener::EventListener;

use super::active::Active;
use super::allocator::Run;
use super::cache::slice::SliceBody;
use super::error::{Error, ErrorKind};
use super::layer::{EntryPlace, LayerKind};
use super::order::keeps;
#[cfg(test)]
use super::order::{Gap, gap};
use super::pin::PinGuard;
use super::table::Target;
use super::taken::TakenGuard;
use super::worker::{PinnedSlice, Worker, in_place};
use super::{Image, State};
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::{SgList, Storage};
use crate::units::{GuestOffset, HostOffset, to_u64, to_usize};

/// Clusters that a worker reserves at a time, in bytes.
const EXTENT_BYTES: u64 = 1 << 20;

/// What became of an attempt to take clusters.
enum Take {
    Taken(TakenGuard),
    Wait(EventListener),
    /// The mapping changed since it was looked at.
    Stale,
}

/// A run of entries of one slice that a write or a discard is about to change.
pub(crate) struct Span<'a, 's> {
    pub(crate) target: Target<'a>,
    pub(crate) generation: u64,
    pub(crate) table: HostOffset,
    pub(crate) place: EntryPlace,
    pub(crate) slice: PinnedSlice<'s>,
    /// Guest offset of the first entry's cluster.
    pub(crate) start: u64,
    /// The entries as they were found.
    pub(crate) entries: Vec<L2Entry>,
}

impl<S: Storage> Worker<S> {
    /// Writes `sg` to the virtual disk. When it returns, the data is readable by everybody; it
    /// survives a power cut after a later [`flush`](Self::flush).
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `Failed`; `NoSpace` and `Io` of the host, after which each sector
    /// holds its old or its new content.
    pub async fn write(
        &self,
        mut pin: PinGuard,
        offset: GuestOffset,
        sg: SgList,
    ) -> Result<(), Error> {
        self.image.check_range(offset, sg.len())?;
        self.prepare_write().await?;
        let result = self.write_range(&mut pin, offset.get(), &sg).await;
        drop(pin);
        self.seen(result).await
    }

    /// Refuses writes that the image does not take, and does what comes before the first one.
    pub(crate) async fn prepare_write(&self) -> Result<(), Error> {
        match self.image.state() {
            State::Ready => return Ok(()),
            State::ReadOnly => {
                return Err(Error::new(
                    ErrorKind::ReadOnly,
                    "the image is opened read-only",
                ));
            }
            State::Failed => return Err(Image::failed_error()),
            State::Opened => {}
        }
        if let Some(active) = &self.image.active
            && active.clear_autoclear
        {
            // Whoever relies on these features (bitmaps) must see that others have written.
            let cleared = active
                .header
                .update(&self.storage, |header| header.autoclear = 0)
                .await;
            self.seen(cleared).await?;
        }
        self.image.become_ready();
        Ok(())
    }

    pub(crate) async fn write_range(
        &self,
        pin: &mut PinGuard,
        offset: u64,
        sg: &SgList,
    ) -> Result<(), Error> {
        let Some(layer) = self.image.layers.first() else {
            return Ok(());
        };
        let (LayerKind::Qcow2(mapping), Some(active)) = (&layer.kind, &self.image.active) else {
            return self
                .write_host(layer.file, offset, sg.slice(0, sg.len()))
                .await;
        };
        let target = Target {
            layer,
            mapping,
            active,
        };
        let mut done = 0;
        let mut may_flush = true;
        while done < sg.len() {
            let stepped = async {
                let span = self
                    .look(target, pin, offset + done, sg.len() - done)
                    .await?;
                self.write_span(&span, pin, offset + done, &sg.slice(done, sg.len() - done))
                    .await
            }
            .await;
            done += match stepped {
                // What was dropped can be used again after a flush, if no older pin is left: nor
                // one of ours.
                Err(error)
                    if error.kind() == ErrorKind::NoSpace && may_flush && active.has_dropped() =>
                {
                    may_flush = false;
                    self.flush().await?;
                    *pin = self.pin();
                    0
                }
                result => result?,
            };
            self.relieve().await?;
        }
        Ok(())
    }

    async fn write_host(
        &self,
        file: crate::storage::FileId,
        host_offset: u64,
        sg: SgList,
    ) -> Result<(), Error> {
        let len = sg.len();
        self.storage
            .write(file, host_offset, sg)
            .await
            .map_err(|error| {
                Error::io(
                    format!("cannot write {len:#x} bytes at {host_offset:#x}"),
                    error,
                )
            })
    }

    /// Finds the entries of the part of a range that lies in one slice of an owned table.
    pub(crate) async fn look<'a>(
        &'a self,
        target: Target<'a>,
        pin: &mut PinGuard,
        position: u64,
        len: u64,
    ) -> Result<Span<'a, 'a>, Error> {
        let (place, count) = Self::span(target.mapping, position, len);
        let table = self.owned_table(target, place.l1_index, pin).await?;
        let generation = pin.generation();
        let slice = self
            .slice(target.layer, target.mapping, table, &place)
            .await?;
        let entries = (place.index..place.index + count)
            .map(|index| slice.body.entry(index))
            .collect();
        let start = target.mapping.geometry.cluster_align_down(position);
        Ok(Span {
            target,
            generation,
            table,
            place,
            slice,
            start,
            entries,
        })
    }

    /// Writes as much as one step can; returns how many bytes (0: look again).
    async fn write_span(
        &self,
        span: &Span<'_, '_>,
        pin: &mut PinGuard,
        position: u64,
        sg: &SgList,
    ) -> Result<u64, Error> {
        let geometry = span.target.mapping.geometry;
        let cluster_size = geometry.cluster_size();
        let inside = geometry.offset_in_cluster(position);
        let first = span.cluster(0)?;
        if let Some(host) = span.entries.first().copied().and_then(in_place) {
            let mut clusters = 1;
            while let Some(entry) = span.entries.get(clusters)
                && in_place(*entry) == Some(host + to_u64(clusters) * cluster_size)
                && span.cluster(clusters).is_ok()
            {
                clusters += 1;
            }
            let len = (to_u64(clusters) * cluster_size - inside).min(sg.len());
            self.write_host(span.target.layer.file, host + inside, sg.slice(0, len))
                .await?;
            return Ok(len);
        }
        // What cannot go in place belongs to the present generation: it waits for the grace of that
        // one where it has to wait.
        if pin.renew() {
            return Ok(0);
        }
        if let Cluster::ZeroAllocated { host, copied: true } = first {
            let len = (cluster_size - inside).min(sg.len());
            return self.write_kept(span, host, inside, &sg.slice(0, len)).await;
        }
        let mut clusters = 1;
        while clusters < span.entries.len()
            && !matches!(
                span.cluster(clusters),
                Err(_)
                    | Ok(Cluster::Standard { copied: true, .. }
                        | Cluster::ZeroAllocated { copied: true, .. })
            )
        {
            clusters += 1;
        }
        self.write_new(span, clusters, inside, sg).await
    }

    /// Writes into the host cluster that a zero entry keeps.
    async fn write_kept(
        &self,
        span: &Span<'_, '_>,
        host: HostOffset,
        inside: u64,
        sg: &SgList,
    ) -> Result<u64, Error> {
        let Some(_taken) = self.take(span, 1).await else {
            return Ok(0);
        };
        let cluster_size = span.target.mapping.geometry.cluster_size();
        let mut whole = SgList::zeroes(inside);
        whole.append(sg.slice(0, sg.len()));
        whole.append(SgList::zeroes(cluster_size - inside - sg.len()));
        self.write_host(span.target.layer.file, host.get(), whole)
            .await?;
        self.link(span, 1, |_, now| {
            // A freeze since then shares the cluster: with a tree that reads zeroes from it.
            let copied = matches!(now, Cluster::ZeroAllocated { copied: true, .. });
            Some(L2Entry::standard(host, copied))
        })
        .await?;
        Ok(sg.len())
    }

    /// Writes into new clusters, with the old bytes around the data.
    async fn write_new(
        &self,
        span: &Span<'_, '_>,
        clusters: usize,
        inside: u64,
        sg: &SgList,
    ) -> Result<u64, Error> {
        // Requests from before the freeze may still write in place what is copied here. Before the
        // cluster is taken: one of them may wait for it.
        if span.copies_old_bytes(clusters, inside, sg.len()) && keeps!(GraceBeforeCopy) {
            #[cfg(test)]
            gap(Gap::Grace);
            self.image.board.grace(span.generation).await;
        }
        let Some(mut taken) = self.take(span, clusters).await else {
            return Ok(0);
        };
        let allocator = &span.target.active.allocator;
        let run = self.allocate(span.target.active, to_u64(clusters)).await?;
        taken.truncate(run.count);
        let reserved = Reserved {
            active: span.target.active,
            run,
            armed: true,
        };
        let cluster_size = span.target.mapping.geometry.cluster_size();
        let bytes = run.count * cluster_size;
        let len = (bytes - inside).min(sg.len());
        let host = allocator.offset(run.start);
        let (start, data) = self
            .surround(span, inside, bytes, run.fresh, sg.slice(0, len))
            .await?;
        let file = span.target.layer.file;
        let linked = |index, _| Some(L2Entry::standard(host + to_u64(index) * cluster_size, true));
        if keeps!(DataBeforeLink) {
            self.write_host(file, host.get() + start, data).await?;
            allocator
                .publish(&self.storage, run.start, run.count)
                .await?;
            reserved.disarm();
            self.link(span, to_usize(run.count), linked).await?;
        } else {
            allocator
                .publish(&self.storage, run.start, run.count)
                .await?;
            reserved.disarm();
            self.link(span, to_usize(run.count), linked).await?;
            self.write_host(file, host.get() + start, data).await?;
        }
        drop(taken);
        Ok(len)
    }

    /// One vectored write: head, guest data, tail. Returns where in the clusters it starts. What
    /// reads as zeroes is left out where the new clusters do so already.
    async fn surround(
        &self,
        span: &Span<'_, '_>,
        head: u64,
        bytes: u64,
        fresh: bool,
        sg: SgList,
    ) -> Result<(u64, SgList), Error> {
        let tail_start = head + sg.len();
        let tail = bytes - tail_start;
        let fresh = fresh || !keeps!(PadReused);
        let mut start = head;
        let mut whole = SgList::empty();
        if head > 0 {
            match self.old_bytes(span.start, head).await? {
                Some(old) => {
                    whole.append(SgList::from_buf(old));
                    start = 0;
                }
                None if !fresh => {
                    whole.append(SgList::zeroes(head));
                    start = 0;
                }
                None => {}
            }
        }
        whole.append(sg);
        if tail > 0 {
            match self.old_bytes(span.start + tail_start, tail).await? {
                Some(old) => whole.append(SgList::from_buf(old)),
                None if !fresh => whole.append(SgList::zeroes(tail)),
                None => {}
            }
        }
        Ok((start, whole))
    }

    /// Takes the first `count` clusters of a span. `None`: the mapping changed, or somebody had
    /// them and is done now; look again.
    pub(crate) async fn take(&self, span: &Span<'_, '_>, count: usize) -> Option<TakenGuard> {
        #[cfg(test)]
        gap(Gap::Take);
        match self.try_take(span, count) {
            Take::Taken(taken) => Some(taken),
            Take::Stale => None,
            Take::Wait(listener) => {
                listener.await;
                None
            }
        }
    }

    fn try_take(&self, span: &Span<'_, '_>, count: usize) -> Take {
        let body = &span.slice.body;
        let _state = body.lock();
        let first = span.place.index;
        let found = span.entries.iter().take(count).enumerate();
        if !span.is_current()
            || found
                .clone()
                .any(|(i, entry)| body.entry(first + i) != *entry)
        {
            return Take::Stale;
        }
        let cluster = span.start >> span.target.mapping.geometry.cluster_bits();
        match span
            .target
            .active
            .taken
            .try_take(cluster..cluster + to_u64(count))
        {
            Ok(taken) => Take::Taken(taken),
            Err(listener) => Take::Wait(listener),
        }
    }

    /// Changes taken entries, in whichever table L1 names now. `change` gets the index within the
    /// span and the present meaning; `None` leaves the entry alone.
    pub(crate) async fn link(
        &self,
        span: &Span<'_, '_>,
        count: usize,
        change: impl Fn(usize, Cluster) -> Option<L2Entry>,
    ) -> Result<(), Error> {
        if self.try_link(span, &span.slice.body, count, &change)? {
            return Ok(());
        }
        loop {
            // The table was frozen or copied meanwhile, or its slice left the store. What is taken
            // has not changed but for its copied flags. The link is of the present generation,
            // whatever the request has pinned.
            let Target { layer, mapping, .. } = span.target;
            let mut pin = self.pin();
            let table = self
                .owned_table(span.target, span.place.l1_index, &mut pin)
                .await?;
            let generation = pin.generation();
            let slice = self.slice(layer, mapping, table, &span.place).await?;
            let again = Span {
                target: span.target,
                generation,
                table,
                place: span.place,
                slice,
                start: span.start,
                entries: Vec::new(),
            };
            if self.try_link(&again, &again.slice.body, count, &change)? {
                return Ok(());
            }
        }
    }

    fn try_link(
        &self,
        span: &Span<'_, '_>,
        body: &std::sync::Arc<SliceBody>,
        count: usize,
        change: &impl Fn(usize, Cluster) -> Option<L2Entry>,
    ) -> Result<bool, Error> {
        let Target {
            mapping, active, ..
        } = span.target;
        let mut state = body.lock();
        if !span.is_current() && keeps!(CheckAtLink) {
            return Ok(false);
        }
        for index in 0..count {
            let at = span.place.index + index;
            let old = body.entry(at);
            let guest =
                GuestOffset::new(span.start + to_u64(index) * mapping.geometry.cluster_size());
            let cluster = mapping.cluster(span.table, guest, old)?;
            let Some(entry) = change(index, cluster) else {
                continue;
            };
            if entry == old {
                continue;
            }
            // On the list before anything is dropped: a flush collects what was dropped first, so
            // that it writes every slice whose drops it saw.
            self.image.store.mark_modified_locked(body, &mut state);
            body.set_entry_locked(&mut state, at, entry);
            let keeps = matches!(
                (cluster, mapping.cluster(span.table, guest, entry)),
                (
                    Cluster::Standard { host: old, .. } | Cluster::ZeroAllocated { host: old, .. },
                    Ok(Cluster::Standard { host: new, .. }
                        | Cluster::ZeroAllocated { host: new, .. })
                ) if old == new
            );
            if !keeps {
                debug_assert!(state.modified, "a drop that no flush would wait for");
                active.drop_cluster(mapping.geometry, cluster);
            }
        }
        Ok(true)
    }

    /// Up to `count` contiguous clusters, at least one, from this worker's extent.
    pub(crate) async fn allocate(&self, active: &Active, count: u64) -> Result<Run, Error> {
        let mut extent = self.extent.replace(Run::EMPTY);
        if extent.count == 0 {
            let size = 1 << self.image.cluster_bits();
            extent = active
                .allocator
                .reserve(&self.storage, count, count.max(EXTENT_BYTES / size).max(1))
                .await?;
            self.image.follow_end();
        }
        let run = Run {
            start: extent.start,
            count: count.min(extent.count),
            fresh: extent.fresh,
        };
        extent.start += run.count;
        extent.count -= run.count;
        // Another request of this worker may have put an extent there while this one waited.
        let other = self.extent.replace(extent);
        active.allocator.give_back(other.start, other.count);
        Ok(run)
    }

    /// Hands unused reserved clusters back.
    pub(crate) fn give_back_extent(&self) {
        let extent = self.extent.replace(Run::EMPTY);
        if let Some(active) = &self.image.active {
            active.allocator.give_back(extent.start, extent.count);
        }
    }
}

impl Span<'_, '_> {
    /// What an entry of the span means.
    pub(crate) fn cluster(&self, index: usize) -> Result<Cluster, Error> {
        let mapping = self.target.mapping;
        let guest = GuestOffset::new(self.start + to_u64(index) * mapping.geometry.cluster_size());
        let entry = self.entries.get(index).copied().unwrap_or_default();
        mapping.cluster(self.table, guest, entry)
    }

    /// Does a write of `len` bytes from `inside` the first cluster need bytes of clusters that were
    /// ours alone in an older generation?
    fn copies_old_bytes(&self, clusters: usize, inside: u64, len: u64) -> bool {
        // Only a standard cluster is ever written in place.
        let is_data = |index| matches!(self.cluster(index), Ok(Cluster::Standard { .. }));
        let end = inside + len;
        let covers_end = end >= to_u64(clusters) * self.target.mapping.geometry.cluster_size();
        (inside > 0 && is_data(0)) || (!covers_end && is_data(clusters - 1))
    }

    /// L1 still names the table, it is ours, and the body is the live one. The slice lock is held.
    fn is_current(&self) -> bool {
        let Target {
            mapping, active, ..
        } = self.target;
        active.is_owned(self.place.l1_index, self.generation)
            && mapping.l1_entry(self.place.l1_index).table_offset() == Some(self.table)
            && !self.slice.body.is_retired()
    }
}

/// Reserved clusters that are given back unless they get linked.
struct Reserved<'a> {
    active: &'a Active,
    run: Run,
    armed: bool,
}

impl Reserved<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.active
                .allocator
                .give_back(self.run.start, self.run.count);
        }
    }
}
