//! Atomics and mutexes of the small lock-free protocols, in one place: the workspace `loom/` builds
//! those files with loom's instead.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Arc, Mutex};
