//! Atomics and mutexes of the engine, in one place: the workspace `loom/` builds the files of the small
//! lock-free protocols with loom's instead.
//!
//! The mutex hands itself over to who waits, within half a millisecond: background work takes the same
//! lock again and again, and with a mutex that is not fair a request was seen to wait 80 ms for it.

pub(crate) use parking_lot::{Mutex, MutexGuard};
pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
