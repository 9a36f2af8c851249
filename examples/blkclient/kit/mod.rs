//! A vhost-user-blk client in user space: what benchmarks and tests talk to a server with.
//!
//! `disk` speaks to the server (connection, queues, requests), `model` knows what each sector must
//! hold, and `bench`, `chaos` and `verify` are the things one does with the two. Nothing here knows
//! which server is at the other end, and nothing links against the qblkd library: the client sees
//! only what a guest sees.
//!
//! Integration tests include this folder instead of copying it:
//! `#[path = "../../examples/blkclient/kit/mod.rs"] mod kit;`

pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod disk;
mod error;
pub(crate) mod journal;
pub(crate) mod model;
pub(crate) mod remote;
pub(crate) mod scan;
mod server_cpu;
pub(crate) mod timeline;
pub(crate) mod verify;

pub(crate) use error::Error;

/// Unit of virtio-blk offsets and lengths.
pub(crate) const SECTOR_BYTES: usize = 512;

/// Bytes in `sectors` sectors, as an index into memory.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the client is for 64-bit hosts only"
)]
pub(crate) const fn index(value: u64) -> usize {
    value as usize
}

/// Bytes of `sectors` sectors.
pub(crate) const fn sectors_to_bytes(sectors: u64) -> usize {
    index(sectors) * SECTOR_BYTES
}
