//! Write order: what must be durable before what, and the flush that sees to it.
//!
//! A link changes only memory. A flush brings it to the file in at most two rounds, each ended by
//! one `fdatasync`:
//!
//! 1. refcount blocks; names of refcount blocks whose content is durable; slices of tables that no
//!    L1 entry in the file names yet. The `fdatasync` also covers all guest data written so far.
//! 2. slices of named tables; L1 entries.
//!
//! Then, and only then, references that the written entries dropped are taken away, in memory; they
//! reach the file with a later flush.
//!
//! Allowed outcomes of a power cut at any point:
//! - an L2 entry is the old one or the new one; the new one has all its data and a refcount of at
//!   least 1 for it;
//! - an L1 entry is the old one or the new one; the new one names a table with all its content;
//! - a refcount is right or too high (a leak), never too low;
//! - a named refcount block has its content.
//!
//! What goes into round 2 is collected *before* the first `fdatasync`, in an order that keeps these
//! true while other workers go on linking: dropped clusters, then L1 entries, then slices, then
//! refcount blocks. Each later list holds at least what the earlier ones rely on.
//!
//! A flush without modified metadata is one `fdatasync` and nothing else. Flushes of several queues
//! join: while one runs, all others wait together for the next.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_listener::Event;

use super::active::Active;
use super::allocator::{BlockCopy, TableWrite};
use super::bulk::write_pieces;
use super::cache::slice::SliceBody;
use super::error::{Error, lock};
use super::layer::{LayerKind, Mapping};
use super::worker::Worker;
use super::{Image, ImageEvent, State};
use crate::engine::sync::Mutex;
use crate::storage::{FileId, Storage};
use crate::units::{to_u64, to_usize};

/// Adjacent slices go into one write of at most this many bytes: guests' writes to the same file wait
/// for one such write in the host's kernel.
const MERGED_BYTES_MAX: usize = 128 << 10;

/// Runs that a flush takes references away from, and frees, before it answers.
const FREED_BY_FLUSH: usize = 64;
/// The same for one turn of the background.
const FREED_IN_BACKGROUND: usize = 256;

/// Ordering rules that a test can switch off, to prove that it would notice.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rule {
    /// Data and refcounts are durable before an L2 entry is written.
    DataBeforeL2,
    /// Refcounts are written before L2 entries (not merely some time later).
    RefcountBeforeL2,
    /// A new table is durable before the L1 entry that names it.
    TableBeforeL1,
    /// An unlink is durable before the refcount goes down.
    UnlinkBeforeRelease,
    /// A freed cluster is not reused while a request may use it.
    PinBeforeReuse,
    /// A refcount block's content is durable before the table names it.
    BlockBeforeName,
    /// A flush ends with an `fdatasync` of what it wrote.
    SyncAtEnd,
    /// Data is written before the entry changes in memory.
    DataBeforeLink,
    /// Whoever allocates, copies or discards a cluster has taken it first.
    TakeBeforeChange,
    /// A flush that waits is served by one that begins later.
    JoinLaterFlush,
    /// The file is long enough before its new clusters are used.
    LengthBeforeUse,
    /// A longer refcount table is durable before the header names it.
    TableBeforeHeader,
    /// A reused cluster is written as a whole: nothing of its former owner shows.
    PadReused,
    /// A new L2 table is zeroed before an L1 entry names it.
    ZeroNewTable,
    /// A hole is punched before the cluster can be reused.
    PunchBeforeReuse,
    /// A request pins after it was submitted (in the device: after the avail index was read).
    PinAfterAvail,
    /// Old bytes are copied only once requests from before the freeze are done.
    GraceBeforeCopy,
    /// A snapshot is committed only once requests from before the freeze are done.
    GraceBeforeCommit,
    /// The generation is raised in the same step that copies the L1 table.
    RaiseUnderL1Lock,
    /// A link looks again whether L1 names the table and it is ours.
    CheckAtLink,
    /// What an unsettled snapshot may share is not given back.
    DeferDecrement,
    /// The dirty bit is durable before a snapshot is committed or deleted.
    DirtyBeforeChange,
    /// A snapshot's L1 table and the snapshot table are durable before the header names them.
    RootBeforeHeader,
    /// Refcounts and copied flags are durable before the dirty bit goes.
    SettledBeforeClean,
    /// A new image's tables are durable before its header makes it one.
    TablesBeforeNewHeader,
    /// The part of a new image's header that lies past the first sector is durable before that.
    TailBeforeNewHeader,
    /// An overlay and its name are durable before requests go to it.
    OverlayBeforeUse,
    /// No request is in flight while the overlay takes the image's place (in the device).
    PauseBeforeOverlay,
    /// What the image below has is durable before requests go to the overlay.
    BackingBeforeOverlay,
}

#[cfg(test)]
impl Rule {
    /// Every rule.
    pub(crate) const ALL: [Self; 15] = [
        Self::DataBeforeL2,
        Self::RefcountBeforeL2,
        Self::TableBeforeL1,
        Self::UnlinkBeforeRelease,
        Self::PinBeforeReuse,
        Self::BlockBeforeName,
        Self::SyncAtEnd,
        Self::DataBeforeLink,
        Self::TakeBeforeChange,
        Self::JoinLaterFlush,
        Self::LengthBeforeUse,
        Self::TableBeforeHeader,
        Self::PadReused,
        Self::ZeroNewTable,
        Self::PunchBeforeReuse,
    ];
}

#[cfg(test)]
impl Rule {
    /// The rules that only snapshots need.
    pub(crate) const SNAPSHOT: [Self; 9] = [
        Self::PinAfterAvail,
        Self::GraceBeforeCopy,
        Self::GraceBeforeCommit,
        Self::RaiseUnderL1Lock,
        Self::CheckAtLink,
        Self::DeferDecrement,
        Self::DirtyBeforeChange,
        Self::RootBeforeHeader,
        Self::SettledBeforeClean,
    ];

    /// The rules that only external snapshots need.
    pub(crate) const OVERLAY: [Self; 5] = [
        Self::TablesBeforeNewHeader,
        Self::TailBeforeNewHeader,
        Self::OverlayBeforeUse,
        Self::PauseBeforeOverlay,
        Self::BackingBeforeOverlay,
    ];
}

#[cfg(test)]
std::thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Switches one rule off on this thread.
#[cfg(test)]
pub(crate) fn break_rule(rule: Option<Rule>) {
    BROKEN.set(rule);
}

#[cfg(test)]
pub(crate) fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Where a test can have another thread come between two statements of this one.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Gap {
    /// Between the steps of a collection; the number is one of [`Self::COLLECT`].
    Collect(u32),
    /// A slice was found, and is not pinned yet.
    Pin,
    /// A request knows that it must wait for its grace, and does not do so yet.
    Grace,
    /// A request has looked at its clusters, and has not taken them yet.
    Take,
    /// A table was looked at that is to be owned again.
    Own,
    /// All is written that the dirty bit excuses, and the bit is set still.
    Clean,
}

#[cfg(test)]
impl Gap {
    /// The gaps of a collection.
    pub(crate) const COLLECT: std::ops::RangeInclusive<u32> = 1..=7;
}

/// What another thread does in a gap.
#[cfg(test)]
type Meanwhile = (Gap, Box<dyn FnOnce()>);

#[cfg(test)]
std::thread_local! {
    static MEANWHILE: std::cell::RefCell<Option<Meanwhile>> =
        const { std::cell::RefCell::new(None) };
}

/// Has whoever next comes to a gap on this thread call `work` there, once.
#[cfg(test)]
pub(crate) fn meanwhile(gap: Gap, work: impl FnOnce() + 'static) {
    MEANWHILE.set(Some((gap, Box::new(work))));
}

/// Nobody has come to the gap.
#[cfg(test)]
pub(crate) fn is_meanwhile_due() -> bool {
    MEANWHILE.with_borrow(Option::is_some)
}

#[cfg(test)]
pub(crate) fn gap(gap: Gap) {
    let is_meant = |meant: &mut Meanwhile| meant.0 == gap;
    let meant = MEANWHILE.with_borrow_mut(|meanwhile| meanwhile.take_if(is_meant));
    if let Some((_, work)) = meant {
        work();
    }
}

/// `true` when the rule is in force: always, outside of tests.
macro_rules! keeps {
    ($rule:ident) => {{
        #[cfg(test)]
        let kept = !$crate::engine::order::is_broken($crate::engine::order::Rule::$rule);
        #[cfg(not(test))]
        let kept = true;
        kept
    }};
}
pub(crate) use keeps;

/// What a joined flush waits for.
#[derive(Debug, Default)]
struct Ticket {
    state: Mutex<TicketState>,
    event: Event,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum TicketState {
    #[default]
    Waiting,
    /// The flush before has ended: one of the waiters runs this one.
    Promoted,
    Running,
    Done,
    Failed,
}

/// Joins flushes: one runs, the others wait for the next one together.
#[derive(Debug, Default)]
pub(crate) struct FlushGate {
    state: Mutex<GateState>,
}

#[derive(Debug, Default)]
struct GateState {
    running: bool,
    next: Option<Arc<Ticket>>,
}

/// The right and duty to run a flush. Dropping it unfinished fails the flush and the image: what it
/// had collected is not written, and nobody else will write it.
struct Lead<'a> {
    image: &'a Image,
    ticket: Arc<Ticket>,
    outcome: TicketState,
}

impl FlushGate {
    /// Waits for a flush that begins after this call, or becomes the one to run it.
    async fn enter<'a>(&self, image: &'a Image) -> Result<Option<Lead<'a>>, Error> {
        let ticket = {
            let mut gate = lock(&self.state);
            if !gate.running {
                gate.running = true;
                let outcome = TicketState::Failed;
                return Ok(Some(Lead {
                    image,
                    ticket: Arc::default(),
                    outcome,
                }));
            }
            if !keeps!(JoinLaterFlush) {
                return Ok(None);
            }
            Arc::clone(gate.next.get_or_insert_with(Arc::default))
        };
        loop {
            let listener = ticket.event.listen();
            {
                let mut state = lock(&ticket.state);
                match *state {
                    TicketState::Waiting | TicketState::Running => {}
                    TicketState::Promoted => {
                        *state = TicketState::Running;
                        drop(state);
                        let outcome = TicketState::Failed;
                        return Ok(Some(Lead {
                            image,
                            ticket,
                            outcome,
                        }));
                    }
                    TicketState::Done => return Ok(None),
                    TicketState::Failed => return Err(Image::failed_error()),
                }
            }
            listener.await;
        }
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        if self.outcome != TicketState::Done {
            // Told already, unless the flush was dropped.
            let message = "a flush was given up half-way".to_owned();
            self.image.fail(ImageEvent::Failed { message });
        }
        *lock(&self.ticket.state) = self.outcome;
        self.ticket.event.notify(usize::MAX);
        let mut gate = lock(&self.image.gate.state);
        match gate.next.take() {
            Some(next) => {
                *lock(&next.state) = TicketState::Promoted;
                next.event.notify(usize::MAX);
            }
            None => gate.running = false,
        }
    }
}

/// What one flush will write.
struct Collected {
    dropped: Vec<super::active::Dropped>,
    /// Runs of bytes of tables that the file does not name yet.
    new_tables: Vec<Piece>,
    slices: Vec<Piece>,
    l1: Vec<Piece>,
    l1_tables: Vec<u64>,
    blocks: Vec<BlockCopy>,
    names: Vec<TableWrite>,
    /// Kept in the store until they are written.
    bodies: Vec<Arc<SliceBody>>,
}

/// Bytes for one place of the file.
struct Piece {
    host_offset: u64,
    bytes: Vec<u8>,
}

impl<S: Storage> Worker<S> {
    /// Makes everything durable that was completed before this call.
    ///
    /// # Errors
    /// `Failed` when metadata could not be written or made durable, now or earlier: the image
    /// takes no more writes then.
    pub async fn flush(&self) -> Result<(), Error> {
        match self.image.state() {
            State::ReadOnly => return Ok(()),
            State::Failed => return Err(Image::failed_error()),
            State::Opened | State::Ready => {}
        }
        let Some(mut lead) = self.image.gate.enter(&self.image).await? else {
            return Ok(());
        };
        // A flush that failed while this one waited has left nothing to be made durable.
        if self.image.has_failed() {
            return Err(Image::failed_error());
        }
        match self.write_back().await {
            Ok(()) => {
                lead.outcome = TicketState::Done;
                Ok(())
            }
            Err(error) => {
                let message = error.chain();
                self.image.fail(ImageEvent::Failed { message });
                Err(error)
            }
        }
    }

    /// Has modified slices written back when they crowd the cache: early enough by whoever does that
    /// in the background, and by this request if they are more than that one has coped with.
    pub(crate) async fn relieve(&self) -> Result<(), Error> {
        if self.image.store.must_write_back() {
            return self.flush().await;
        }
        if self.is_flush_due() {
            self.image.ask_for_write_back();
        }
        Ok(())
    }

    /// More waits for a flush than should, whether the guest flushes or not.
    fn is_flush_due(&self) -> bool {
        self.image.store.wants_write_back()
            || self
                .image
                .qcow2_target()
                .is_some_and(|target| target.active.wants_release(target.mapping.geometry))
    }

    /// Does what [`Image::set_write_back_sink`] was told of: writes metadata back, takes references
    /// away, frees clusters. As much of it as does not take long; what is left is told again.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn write_back_in_background(&self) -> Result<(), Error> {
        // First: what comes from now on may ask again.
        self.image.write_back_asked.store(false, Ordering::Release);
        if self.is_flush_due() {
            self.flush().await?;
        }
        if let Some(active) = &self.image.active
            && !self.image.has_failed()
            && self.free_own(active, FREED_IN_BACKGROUND).await?
            && active.allocator.has_due()
        {
            self.image.ask_for_write_back();
        }
        Ok(())
    }

    /// The last act of an orderly stop, when no request is in flight anywhere: everything
    /// durable, counts and all; the file no longer than it must be.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn close(&self) -> Result<(), Error> {
        self.give_back_extent();
        match self.image.state() {
            State::ReadOnly => return Ok(()),
            State::Failed => {
                // Said when it happened; said again where somebody looks who stops a service.
                log::error!(
                    "the image has failed and is left as it is: check it before its next use"
                );
                return Ok(());
            }
            State::Opened | State::Ready => {}
        }
        if let Some(active) = &self.image.active {
            active.allocator.write_all_lagging(&self.storage).await?;
        }
        self.flush().await?;
        if let Some(active) = &self.image.active {
            while self.free_some(active, usize::MAX).await? {}
            // The second flush writes the counts that the first one allowed to go down.
            self.flush().await?;
            while self.free_some(active, usize::MAX).await? {}
            active.allocator.trim(&self.storage).await?;
            self.seen(self.sync().await).await?;
        }
        Ok(())
    }

    async fn sync(&self) -> Result<(), Error> {
        let Some(layer) = self.image.layers.first() else {
            return Ok(());
        };
        if self.image.no_flush {
            return Ok(());
        }
        if let Some(active) = &self.image.active {
            return active.header.sync_data(&self.storage).await;
        }
        self.storage
            .sync_data(layer.file)
            .await
            .map_err(|error| Error::io("cannot make the image durable", error))
    }

    async fn write_back(&self) -> Result<(), Error> {
        let layer = self.image.layers.first();
        let (Some((file, LayerKind::Qcow2(mapping))), Some(active)) = (
            layer.map(|layer| (layer.file, &layer.kind)),
            &self.image.active,
        ) else {
            return self.sync().await;
        };
        // Places that are collected for writing must not become somebody else's meanwhile: the old
        // refcount table is freed when a longer one takes over.
        let pin = self.pin();
        let mut collected = self.collect(mapping, active);
        if !keeps!(UnlinkBeforeRelease) {
            let dropped = std::mem::take(&mut collected.dropped);
            self.release(active, dropped).await?;
            let (blocks, names) = active.allocator.collect();
            collected.blocks.extend(blocks);
            collected.names = names;
        }
        let written = self.write_collected(file, active, &collected).await;
        active.allocator.copies_written(&collected.blocks);
        // After a failure the bodies stay pinned: the file may not hold what they say, and reads go
        // on.
        written?;
        for body in &collected.bodies {
            body.unpin();
        }
        active.name_tables(&collected.l1_tables);
        drop(pin);
        self.release(active, collected.dropped).await
    }

    fn collect(&self, mapping: &Mapping, active: &Active) -> Collected {
        let dropped = lock(&active.drops).take();
        #[cfg(test)]
        gap(Gap::Collect(1));
        let (l1_indices, l1_values) = {
            let mut l1 = lock(&active.l1);
            let mut indices = std::mem::take(&mut l1.modified);
            indices.sort_unstable();
            indices.dedup();
            let values: Vec<u64> = indices
                .iter()
                .map(|index| mapping.l1[*index].load(Ordering::Acquire))
                .collect();
            (indices, values)
        };
        #[cfg(test)]
        gap(Gap::Collect(2));
        let mut bodies = self.image.store.take_modified();
        bodies.sort_unstable_by_key(|body| body.key().get());
        #[cfg(test)]
        gap(Gap::Collect(3));
        let mut new_tables = Vec::new();
        let mut slices = Vec::new();
        let slice_bytes = to_usize(mapping.slice_bytes());
        // After the bodies were taken, all at once: a copy of a table holds the L1 lock until its
        // slices are listed and it is named here, and who waits for that lock must get it. A named
        // table stays named; one that is not stays so until this flush has written its name.
        let unnamed = lock(&active.l1).unnamed_tables.clone();
        #[cfg(test)]
        gap(Gap::Collect(4));
        for body in &bodies {
            body.pin();
            let host_offset = body.key().host_offset().get();
            let table = mapping.geometry.cluster_align_down(host_offset);
            let is_new = unnamed.contains(&table);
            let mut state = body.lock();
            state.modified = false;
            let pieces = if is_new { &mut new_tables } else { &mut slices };
            let target = extend(pieces, host_offset, slice_bytes);
            body.encode_locked(&state, target);
            drop(state);
        }
        #[cfg(test)]
        gap(Gap::Collect(5));
        let (blocks, names) = active.allocator.collect();
        let mut l1 = Vec::new();
        for (index, value) in l1_indices.iter().zip(&l1_values) {
            let target = extend(&mut l1, active.l1_offset + to_u64(*index) * 8, 8);
            target.copy_from_slice(&value.to_be_bytes());
        }
        // There may be many: each once, without a copy of what is there already.
        let mut l1_tables = l1_values;
        l1_tables.retain_mut(|raw| {
            let table = crate::format::l1::L1Entry(*raw).table_offset();
            *raw = table.map_or(0, crate::units::HostOffset::get);
            table.is_some()
        });
        l1_tables.sort_unstable();
        l1_tables.dedup();
        Collected {
            dropped,
            new_tables,
            slices,
            l1,
            l1_tables,
            blocks,
            names,
            bodies,
        }
    }

    async fn write_collected(
        &self,
        file: FileId,
        active: &Active,
        collected: &Collected,
    ) -> Result<(), Error> {
        let allocator = &active.allocator;
        let relied_on = |name: &TableWrite| name.used && !name.durable;
        if collected.names.iter().any(relied_on) && keeps!(BlockBeforeName) {
            // Rare: blocks are made ahead of their use, so that an earlier flush covers them.
            self.sync().await?;
            allocator.names_durable_content(&collected.names);
        }
        let (first_names, later_names): (Vec<_>, Vec<_>) = collected
            .names
            .iter()
            .partition(|name| name.durable || name.used);
        let late = keeps!(DataBeforeL2);
        let mut first: Vec<(u64, &[u8])> = Vec::new();
        let mut second: Vec<(u64, &[u8])> = Vec::new();
        let blocks = collected
            .blocks
            .iter()
            .map(|copy| (copy.host_offset, &*copy.bytes));
        if keeps!(RefcountBeforeL2) {
            first.extend(blocks);
        } else {
            second.extend(blocks);
        }
        let first_name_bytes = name_bytes(&first_names);
        first.extend(
            first_name_bytes
                .iter()
                .map(|(offset, bytes)| (*offset, &bytes[..])),
        );
        first.extend(pieces(&collected.new_tables));
        let round = if late { &mut second } else { &mut first };
        round.extend(pieces(&collected.slices));
        let round = if keeps!(TableBeforeL1) {
            &mut second
        } else {
            &mut first
        };
        round.extend(pieces(&collected.l1));
        let later_name_bytes = name_bytes(&later_names);
        second.extend(
            later_name_bytes
                .iter()
                .map(|(offset, bytes)| (*offset, &bytes[..])),
        );

        if collected.blocks.iter().any(|copy| copy.busy) {
            // An older copy is still being written, and two writes have no order.
            allocator.end_background_writes().await;
        }
        self.write_all(file, first).await?;
        if !second.is_empty() || keeps!(SyncAtEnd) {
            self.sync().await?;
        }
        allocator.names_durable_content(&collected.names);
        if !second.is_empty() {
            self.write_all(file, second).await?;
            if keeps!(SyncAtEnd) {
                self.sync().await?;
            }
        }
        allocator.named(&collected.names);
        Ok(())
    }

    async fn write_all(&self, file: FileId, pieces: Vec<(u64, &[u8])>) -> Result<(), Error> {
        write_pieces(&self.storage, file, pieces)
            .await
            .map_err(|(host_offset, error)| {
                Error::io(format!("cannot write metadata at {host_offset:#x}"), error)
            })
    }

    /// Takes references away whose unlinking is durable: many of them in the background, if
    /// somebody does that.
    async fn release(
        &self,
        active: &Active,
        mut dropped: Vec<super::active::Dropped>,
    ) -> Result<(), Error> {
        if !dropped.is_empty() {
            // Each refcount block comes up once.
            dropped.sort_unstable_by_key(|run| run.start);
            let epoch = self.image.board.end_epoch();
            active.allocator.add_due(dropped, epoch);
        }
        let most = if self.image.has_write_back_sink() {
            FREED_BY_FLUSH
        } else {
            usize::MAX
        };
        self.free_own(active, most).await?;
        if active.allocator.has_due() {
            self.image.ask_for_write_back();
        }
        Ok(())
    }

    async fn free_own(&self, active: &Active, most: usize) -> Result<bool, Error> {
        let freed = active.allocator.free_own(&self.storage, most).await;
        self.seen(freed).await
    }

    async fn free_some(&self, active: &Active, most: usize) -> Result<bool, Error> {
        let freed = active.allocator.free_some(&self.storage, most).await;
        self.seen(freed).await
    }

    /// Sets the corrupt bit and takes no more writes.
    pub(crate) async fn mark_corrupt(&self, message: &str) {
        if self.image.state() == State::ReadOnly || self.image.has_failed() {
            return;
        }
        self.image.fail(ImageEvent::Corrupted {
            message: message.to_owned(),
        });
        let Some(active) = &self.image.active else {
            return;
        };
        let marked = active
            .header
            .update(&self.storage, |header| {
                if header.version >= 3 {
                    header.incompatible |= crate::format::header::INCOMPAT_CORRUPT;
                }
            })
            .await;
        if let Err(error) = marked {
            log::error!("cannot set the image's corrupt bit: {}", error.chain());
        }
    }
}

/// The buffer for `len` bytes at `host_offset`, joined to the last piece where it follows.
fn extend(pieces: &mut Vec<Piece>, host_offset: u64, len: usize) -> &mut [u8] {
    let follows = pieces.last().is_some_and(|last| {
        last.host_offset + to_u64(last.bytes.len()) == host_offset
            && last.bytes.len() + len <= MERGED_BYTES_MAX
    });
    if !follows {
        pieces.push(Piece {
            host_offset,
            bytes: Vec::new(),
        });
    }
    match pieces.last_mut() {
        Some(last) => {
            let start = last.bytes.len();
            last.bytes.resize(start + len, 0);
            &mut last.bytes[start..]
        }
        None => unreachable!("a piece was just pushed"),
    }
}

fn pieces(pieces: &[Piece]) -> impl Iterator<Item = (u64, &[u8])> {
    pieces
        .iter()
        .map(|piece| (piece.host_offset, &piece.bytes[..]))
}

fn name_bytes(names: &[&TableWrite]) -> Vec<(u64, [u8; 8])> {
    names
        .iter()
        .map(|name| (name.host_offset, name.entry.to_be_bytes()))
        .collect()
}
