//! Metadata caches: shared slice bodies, a directory per thread, and one store behind them.
//!
//! - `slice` is the shared body of an L2 slice: atomics that every thread reads without a lock.
//! - `directory` is one worker's direct-mapped cache with its put table: a hit is one compare.
//! - `store` finds bodies by host offset, holds the byte budget and evicts in constant time.
//! - `sieve` is the eviction order, shared with the refcount block cache.
//!
//! Invariants: there are never two live bodies of one slice; a body that leaves the store is
//! *retired* first, and every hit of a directory checks that; a modified or pinned body stays.
//!
//! Public is what `benches/cache.rs` measures: a [`Directory`] over [`SliceBody`]s. The store and
//! all that changes a body stay inside.

pub(crate) mod directory;
pub(crate) mod put_table;
pub(crate) mod sieve;
pub(crate) mod slice;
pub(crate) mod store;

use crate::units::HostOffset;

pub use self::directory::{CacheCounters, CacheStats, CachedSlice, Directories, Directory, Ticket};
pub use self::slice::SliceBody;

/// Names a slice across the backing chain: layer in the top byte, host offset below it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SliceKey(u64);

impl SliceKey {
    /// Bits of a host offset (the format allows 2^56 bytes).
    const OFFSET_BITS: u32 = 56;

    /// The key of the slice at `host_offset` in layer `layer` of the chain.
    #[must_use]
    #[inline]
    pub fn new(layer: u8, host_offset: HostOffset) -> Self {
        debug_assert_eq!(host_offset.get() >> Self::OFFSET_BITS, 0);
        Self(u64::from(layer) << Self::OFFSET_BITS | host_offset.get())
    }

    #[inline]
    pub(crate) fn get(self) -> u64 {
        self.0
    }

    pub(crate) fn host_offset(self) -> HostOffset {
        HostOffset::new(self.0 & ((1 << Self::OFFSET_BITS) - 1))
    }
}
