//! Breath: the processor time that background work takes in one go.
//!
//! Where all processors are busy, a thread that wakes up waits until the scheduler takes one away from
//! whoever runs: some milliseconds, which the guest sees as a gap. So background work offers its
//! processor every [`BREATH_BYTES`]. It does so between two tables or refcount blocks, where it holds no
//! lock; a low priority would also take its processor away where it holds one that requests wait for.

#![forbid(unsafe_code)]

use std::cell::Cell;

/// Bytes of metadata that are worked through until the processor is offered again: some 100 us.
const BREATH_BYTES: u64 = 256 << 10;

thread_local! {
    static SINCE: Cell<u64> = const { Cell::new(0) };
}

/// So many bytes of metadata were worked through. Offers this thread's processor to whoever waits for one,
/// if it has not for a while. For places where no lock is held, and where no request waits for anything:
/// nor for a slice that is being loaded.
pub(super) fn breathe(bytes: u64) {
    let since = SINCE.get().saturating_add(bytes);
    if since < BREATH_BYTES {
        SINCE.set(since);
        return;
    }
    SINCE.set(0);
    std::thread::yield_now();
}
