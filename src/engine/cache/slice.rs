//! The shared body of an L2 slice.
//!
//! `entries` are raw entries of the format in host byte order. Readers load them without a lock;
//! writers of one slice serialise on `state`. A store to an entry is a release, a load an
//! acquire, so that who sees a mapping also sees everything that had to come before it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::SliceKey;
use crate::engine::error::lock;
use crate::format::l2::L2Entry;

/// What the slice lock protects.
#[derive(Debug, Default)]
pub(crate) struct SliceState {
    /// Differs from the file, and is on the store's list of modified bodies.
    pub(crate) modified: bool,
}

/// An L2 slice in memory, shared by all threads.
#[derive(Debug)]
pub struct SliceBody {
    key: SliceKey,
    entries: Box<[AtomicU64]>,
    /// Set once, under the lock, when the body leaves the store. A writer checks it under the
    /// lock; a reader before it loads an entry.
    retired: AtomicBool,
    /// Used since the eviction hand last passed.
    visited: AtomicBool,
    /// Suspended requests and write-backs that need the body to stay in the store.
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
    pub fn new(key: SliceKey, entries: Box<[AtomicU64]>, suspicious: bool) -> Self {
        Self {
            key,
            entries,
            retired: AtomicBool::new(false),
            visited: AtomicBool::new(true),
            pins: AtomicU32::new(0),
            suspicious,
            state: Mutex::new(SliceState::default()),
        }
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

    #[inline]
    pub(crate) fn is_suspicious(&self) -> bool {
        self.suspicious
    }

    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
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

    /// Retires the body if nobody needs it to stay. `false`: it stays.
    pub(crate) fn try_retire(&self) -> bool {
        let Ok(state) = self.state.try_lock() else { return false };
        if state.modified || self.pins.load(Ordering::Acquire) > 0 {
            return false;
        }
        self.retired.store(true, Ordering::Release);
        true
    }

    /// Retires the body because its table is gone.
    pub(crate) fn retire(&self) {
        let _state = self.lock();
        self.retired.store(true, Ordering::Release);
    }

    /// Marks the body as used. Writes only when the mark is not there.
    #[inline]
    pub(crate) fn visit(&self) {
        if !self.visited.load(Ordering::Relaxed) {
            self.visited.store(true, Ordering::Relaxed);
        }
    }

    /// Takes the mark away and says whether it was there.
    pub(crate) fn unvisit(&self) -> bool {
        self.visited.swap(false, Ordering::Relaxed)
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
