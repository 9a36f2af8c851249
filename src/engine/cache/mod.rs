//! Metadata caches: shared slice bodies, a directory per thread, and one store behind them.
//!
//! - `slice` is the shared body of an L2 slice: atomics that every thread reads without a lock.
//! - `directory` is one worker's direct-mapped cache with its put table: a hit is one compare.
//! - `tag` is how a hit learns that a body has been retired.
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
pub(crate) mod tag;

use crate::units::HostOffset;

pub use self::directory::{CacheCounters, CacheStats, CachedSlice, Directories, Directory, Ticket};
pub use self::slice::SliceBody;

/// Names a slice across the backing chain: the layer in the top byte, and below it the host offset,
/// in which each layer but the first has some bits flipped. Layers have their first tables at the
/// same offsets; this way they do not compete for the slots of a directory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SliceKey(u64);

impl SliceKey {
    /// Bits of a host offset (the format allows 2^56 bytes).
    const OFFSET_BITS: u32 = 56;
    const OFFSET_MASK: u64 = (1 << Self::OFFSET_BITS) - 1;
    /// No slice has this key.
    const NONE: Self = Self(u64::MAX);

    /// The key of the slice at `host_offset` in layer `layer` of the chain.
    #[must_use]
    pub fn new(layer: u8, host_offset: HostOffset) -> Self {
        Self(Self::flips(layer)).at(host_offset)
    }

    /// Differs in each layer, 0 in the first. The low bits stay as they are: those of an offset are 0,
    /// and tags have their marks there.
    const fn flips(layer: u8) -> u64 {
        /// 2^64 over the golden ratio: neighbours get far apart.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        let layer = layer as u64;
        layer << Self::OFFSET_BITS | layer.wrapping_mul(SPREAD) & Self::OFFSET_MASK & !0xfff
    }

    /// The key of the slice at `host_offset` in the layer of this key, which is that of offset 0.
    #[inline]
    pub(crate) fn at(self, host_offset: HostOffset) -> Self {
        debug_assert_eq!(host_offset.get() >> Self::OFFSET_BITS, 0);
        Self(self.0 ^ host_offset.get())
    }

    #[inline]
    pub(crate) fn get(self) -> u64 {
        self.0
    }

    pub(crate) fn host_offset(self) -> HostOffset {
        let [layer, ..] = self.0.to_be_bytes();
        HostOffset::new(self.0 ^ Self::flips(layer))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_key_of_a_slice_names_its_layer_and_its_offset() {
        let mut keys = HashSet::new();
        for layer in 0..=u8::MAX {
            for offset in [0, 0x200, 0x4_0000, 0x8000_0000, (1 << 56) - 0x200] {
                let key = SliceKey::new(layer, HostOffset::new(offset));
                assert_eq!(key.host_offset().get(), offset);
                assert_eq!(key.get() & tag::MARKS, 0);
                assert!(keys.insert(key));
            }
        }
    }
}
