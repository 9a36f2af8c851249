//! The tag of a directory's slot: which slice is there, and whether a hit may trust that.
//!
//! It is the slice's key, with marks in the low bits, which are 0 in every key: so a tag with a mark
//! matches no key, and one compare is the whole check of a hit. The worker that owns the directory
//! fills slots and looks at them; who retires a body, or changes another of its marks, announces that
//! afterwards in the tag of its slot.
//!
//! Invariant: while a tag has no mark, the body of its slice has been found live after the last
//! announcement that was complete. For that, the worker takes marks off, or replaces a tag, *before*
//! it looks at the body: who announces later puts the mark back. And it never changes a tag by a
//! plain store, which would hide from it what was announced before. `loom/` tries all schedules.

use crate::engine::sync::{AtomicU64, Ordering};

/// The slice is suspicious. Only the worker changes it.
const SUSPICIOUS: u64 = 1;
/// The marks of a body that belongs here may have changed: ask the body.
const STALE: u64 = 2;
/// Nothing is here.
const VACANT: u64 = 4;
/// All of them.
pub(crate) const MARKS: u64 = SUSPICIOUS | STALE | VACANT;

/// See the module text.
#[derive(Debug)]
pub(crate) struct Tag(AtomicU64);

impl Tag {
    pub(crate) fn vacant() -> Self {
        Self(AtomicU64::new(VACANT))
    }

    /// The slice of `key` is here, is not suspicious, and nothing has happened to it.
    #[inline]
    pub(crate) fn is(&self, key: u64) -> bool {
        self.0.load(Ordering::Acquire) == key
    }

    /// The slice of `key` is here, whatever has happened to it. Ask only for what was put here.
    pub(crate) fn names(&self, key: u64) -> bool {
        self.0.load(Ordering::Relaxed) & !MARKS == key
    }

    /// Makes the worker ask the body. Call it after the body's marks changed.
    pub(crate) fn announce(&self) {
        self.0.fetch_or(STALE, Ordering::Release);
    }

    /// Trusts the tag again if the body is live, else the slot is vacant. Says which.
    pub(crate) fn refresh(&self, is_live: impl FnOnce() -> bool) -> bool {
        self.0.fetch_and(!STALE, Ordering::AcqRel);
        let live = is_live();
        if !live {
            self.0.swap(VACANT, Ordering::AcqRel);
        }
        live
    }

    /// Puts another slice here. If its body is not live any more, the next look finds that out.
    pub(crate) fn fill(&self, key: u64, suspicious: bool, is_live: impl FnOnce() -> bool) {
        debug_assert_eq!(key & MARKS, 0, "slice {key:#x} has an odd offset");
        let mark = if suspicious { SUSPICIOUS } else { 0 };
        self.0.swap(key | mark, Ordering::AcqRel);
        if !is_live() {
            self.announce();
        }
    }
}
