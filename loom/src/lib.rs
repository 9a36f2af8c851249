//! The engine's small lock-free protocols under loom: every schedule, and every reordering that the
//! memory model allows, up to a bound on preemptions.
//!
//! `pin` and `tag` are the engine's own files, built with loom's atomics. The tests play the parts around it:
//! requests that write in place or link, the freeze, and who reuses clusters. Each has a twin in
//! which one step is left out or moved, and loom must find the damage: a test that cannot fail
//! proves nothing.

#![cfg(test)]

#[path = "../../src/engine/pin.rs"]
#[expect(dead_code, unreachable_pub, reason = "the engine uses all of it")]
mod pin;

#[path = "../../src/engine/cache/tag.rs"]
mod tag;

/// What `tag` takes from there.
mod engine {
    pub(crate) use crate::sync;
}

/// What `pin` takes from `engine::sync`.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Arc, Mutex};
}

/// What `pin` takes from `engine::error`.
mod error {
    pub(crate) fn lock<T>(mutex: &loom::sync::Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
        mutex
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

mod protocols;
