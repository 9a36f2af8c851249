//! Bytes to values and back, as the qcow2 specification (`docs/interop/qcow2` of QEMU) lays them out.
//!
//! Pure: no I/O, no locks, no clock, no logging. Every number on disk is big-endian. Nothing here
//! trusts its input: a decoder returns a value that is lawful in itself, or a [`FormatError`] that
//! names what is wrong. What needs more than the bytes at hand (the length of the file, overlaps
//! between tables, refcounts) is the engine's.
//!
//! | specification | here |
//! |---|---|
//! | Header | [`header`] |
//! | Feature bits | [`feature`] |
//! | Header extensions, feature name table | [`extension`] |
//! | L1 table, L2 table, cluster descriptors | [`l1`], [`l2`] |
//! | Reference counts | [`refcount`] |
//! | Snapshot table | [`snapshot`] |
//! | Sizes and indices that follow from them, limits | [`geometry`] |

#![forbid(unsafe_code)]
#![deny(clippy::little_endian_bytes, clippy::host_endian_bytes)]
// A test that indexes past the end or overflows fails, which is what a test is for.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

pub mod error;
pub mod extension;
pub mod feature;
pub mod geometry;
pub mod header;
pub mod l1;
pub mod l2;
pub mod refcount;
pub mod snapshot;

pub use error::FormatError;
pub use extension::{Extension, FeatureName};
pub use geometry::Geometry;
pub use header::{CompressionType, Header};
pub use l1::L1Entry;
pub use l2::{Cluster, L2Entry};
pub use refcount::RefcountTableEntry;
pub use snapshot::SnapshotEntry;

use crate::units::to_u64;

/// The `N` bytes at `offset`, or an error that says how long `what` would have to be.
fn bytes_at<const N: usize>(
    bytes: &[u8],
    offset: usize,
    what: &'static str,
) -> Result<[u8; N], FormatError> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or_else(|| FormatError::Truncated {
            what,
            needed: to_u64(offset.saturating_add(N)),
            found: to_u64(bytes.len()),
        })
}

/// The big-endian 16-bit number at `offset`.
fn be_u16(bytes: &[u8], offset: usize, what: &'static str) -> Result<u16, FormatError> {
    bytes_at(bytes, offset, what).map(u16::from_be_bytes)
}

/// The big-endian 32-bit number at `offset`.
fn be_u32(bytes: &[u8], offset: usize, what: &'static str) -> Result<u32, FormatError> {
    bytes_at(bytes, offset, what).map(u32::from_be_bytes)
}

/// The big-endian 64-bit number at `offset`.
fn be_u64(bytes: &[u8], offset: usize, what: &'static str) -> Result<u64, FormatError> {
    bytes_at(bytes, offset, what).map(u64::from_be_bytes)
}

/// Replaces the `N` bytes at `offset`, which the caller has made room for.
fn put<const N: usize>(bytes: &mut [u8], offset: usize, value: [u8; N]) {
    let length = bytes.len();
    let place = bytes
        .get_mut(offset..)
        .and_then(|rest| rest.first_chunk_mut::<N>());
    assert!(
        place.is_some(),
        "no room for {N} bytes at {offset} of {length}"
    );
    if let Some(place) = place {
        *place = value;
    }
}
