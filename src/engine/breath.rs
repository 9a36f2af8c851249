//! Breath: the processor time that background work takes in one go.
//!
//! Where all processors are busy, a thread that wakes up waits until the scheduler takes one away from
//! whoever runs: some milliseconds, which the guest sees as a gap. So background work offers its
//! processor every [`BREATH`]. It does so between two tables or refcount blocks, where it holds no
//! lock; a low priority would also take its processor away where it holds one that requests wait for.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long the work goes on before it offers its processor again.
const BREATH: Duration = Duration::from_micros(100);

thread_local! {
    static LAST: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Offers this thread's processor to whoever waits for one, if it has not for a while. For places where
/// no lock is held, and where no request waits for anything: nor for a slice that is being loaded.
pub(super) fn breathe() {
    LAST.with(|last| {
        if last.get().is_none_or(|last| last.elapsed() >= BREATH) {
            std::thread::yield_now();
            last.set(Some(Instant::now()));
        }
    });
}
