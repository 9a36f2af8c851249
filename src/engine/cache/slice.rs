//! The shared body of an L2 slice.
//!
//! `entries` are raw entries of the format in host byte order. Readers load them without a lock;
//! writers of one slice serialise on `state`. A store to an entry is a release, a load an
//! acquire, so that who sees a mapping also sees everything that had to come before it.
//!
//! A directory keeps a reference to the entries beside the one to the body: a hit loads its entry
//! and does not touch the body. So who changes the marks has to tell the directories
//! (`Directories::announce`); only the store does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::SliceKey;
use crate::engine::error::lock;
use crate::engine::sync::{Mutex, MutexGuard};
use crate::format::l2::L2Entry;

/// What the slice lock protects.
#[derive(Debug, Default)]
pub(crate) struct SliceState {
    /// Differs from the file, and is on the store's list of modified bodies.
    pub(crate) modified: bool,
}

/// The body has left the store. Set once, under the lock. A writer checks it under the lock; a
/// reader before it uses an entry, by way of its directory.
const RETIRED: u8 = 1;
/// Used since the eviction hand last passed.
const VISITED: u8 = 2;

/// An L2 slice in memory, shared by all threads.
#[derive(Debug)]
#[repr(align(64))]
pub struct SliceBody {
    key: SliceKey,
    entries: Arc<[AtomicU64]>,
    /// [`RETIRED`] and [`VISITED`].
    marks: AtomicU8,
    /// Flushes and copies of tables that need the body to stay in the store. Requests pin it in
    /// their worker's directory.
    pins: AtomicU32,
    /// Some entry contradicts the format or points where no data may be: entries of this slice
    /// are judged one by one on the slow path.
    suspicious: bool,
    state: Mutex<SliceState>,
}

impl SliceBody {
    /// A live body with the entries as the file has them, in host byte order. `suspicious`: some
    /// entry must not be used without a closer look.
    #[must_use]
    pub fn new(key: SliceKey, entries: Arc<[AtomicU64]>, suspicious: bool) -> Self {
        Self {
            key,
            entries,
            marks: AtomicU8::new(VISITED),
            pins: AtomicU32::new(0),
            suspicious,
            state: Mutex::new(SliceState::default()),
        }
    }

    /// What stands where a directory has no body: retired, without entries, of no slice.
    pub(super) fn nobody() -> Self {
        let body = Self::new(SliceKey::NONE, Arc::default(), false);
        body.retire();
        body
    }

    /// The slice that this is the body of.
    #[must_use]
    #[inline]
    pub fn key(&self) -> SliceKey {
        self.key
    }

    /// How many entries the slice has: a power of two.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The slice's size, as a power of two of bytes.
    #[inline]
    pub(crate) fn slice_bits(&self) -> u32 {
        size_of_val(&*self.entries).trailing_zeros()
    }

    #[inline]
    pub(crate) fn is_suspicious(&self) -> bool {
        self.suspicious
    }

    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.marks.load(Ordering::Acquire) & RETIRED != 0
    }

    /// Says whether the body is live, and marks it as used if so. Writes only when the mark is not
    /// there.
    pub(crate) fn visit_live(&self) -> bool {
        let marks = self.marks.load(Ordering::Acquire);
        if marks == VISITED {
            return true;
        }
        if marks & RETIRED != 0 {
            return false;
        }
        self.visit();
        true
    }

    /// What a directory keeps beside the body.
    pub(crate) fn shared_entries(&self) -> Arc<[AtomicU64]> {
        Arc::clone(&self.entries)
    }

    /// The entry at `index`.
    ///
    /// # Panics
    /// When the slice has no such entry.
    #[must_use]
    #[inline]
    pub fn entry(&self, index: usize) -> L2Entry {
        L2Entry(self.entries[index].load(Ordering::Acquire))
    }

    /// Changes an entry. The guard proves that the slice lock is held.
    pub(crate) fn set_entry_locked(
        &self,
        _state: &mut MutexGuard<'_, SliceState>,
        index: usize,
        entry: L2Entry,
    ) {
        self.entries[index].store(entry.0, Ordering::Release);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, SliceState> {
        lock(&self.state)
    }

    /// Retires the body if nobody needs it to stay. `false`: it stays. `is_pinned` says whether a
    /// request does.
    pub(super) fn try_retire(&self, is_pinned: impl FnOnce(&Self) -> bool) -> bool {
        let Some(state) = self.state.try_lock() else {
            return false;
        };
        if state.modified || self.pins.load(Ordering::Acquire) > 0 || is_pinned(self) {
            return false;
        }
        self.marks.fetch_or(RETIRED, Ordering::Release);
        true
    }

    /// Retires the body because its table is gone.
    pub(super) fn retire(&self) {
        let _state = self.lock();
        self.marks.fetch_or(RETIRED, Ordering::Release);
    }

    /// Marks the body as used.
    pub(crate) fn visit(&self) {
        self.marks.fetch_or(VISITED, Ordering::Relaxed);
    }

    /// Used since the mark was last taken away?
    pub(super) fn is_visited(&self) -> bool {
        self.marks.load(Ordering::Relaxed) & VISITED != 0
    }

    /// Takes the mark away and says whether it was there.
    pub(crate) fn unvisit(&self) -> bool {
        self.marks.fetch_and(!VISITED, Ordering::Relaxed) & VISITED != 0
    }

    pub(crate) fn pin(&self) {
        self.pins.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn unpin(&self) {
        let before = self.pins.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "slice {:#x} unpinned too often", self.key.get());
    }

    /// The entries as the file holds them.
    pub(crate) fn encode_locked(&self, _state: &MutexGuard<'_, SliceState>, bytes: &mut [u8]) {
        for (chunk, entry) in bytes.chunks_exact_mut(8).zip(&*self.entries) {
            chunk.copy_from_slice(&entry.load(Ordering::Relaxed).to_be_bytes());
        }
    }
}
