//! The engine's pins, built with loom's atomics. The tests are in `tests/`.

#[path = "../../src/engine/pin.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod pin;

/// What `pin` takes from `engine::sync`.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Arc, Mutex};
}

/// What `pin` takes from `engine::error`.
mod error {
    pub(crate) fn lock<T>(mutex: &loom::sync::Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
