//! `qblkd` serves one virtual disk from a qcow2 image over vhost-user.
//!
//! The folders are layers and depend on each other one way only; `docs/architecture.md` is the map.
//!
//! * [`units`]: offsets, clusters and counts as distinct types.
//! * [`mod@format`]: bytes to values and back, as the qcow2 specification lays them out. Pure.
//! * [`storage`]: host file I/O in bytes: the contract, io_uring, aligned buffers, image locks.
//! * [`engine`]: qcow2 semantics over storage: resolve, allocate, write order, caches, check.
//! * [`device`]: virtio-blk over vhost-user, on an image of the engine.
//! * [`control`]: the control socket, which speaks QMP.
//! * [`args`], [`config`]: the command line as typed and as used.
//! * [`daemon`]: the life cycle of the process that serves.
//! * [`tools`]: the commands that work on images without serving them.

pub mod args;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod format;
pub mod storage;
pub mod tools;
pub mod units;
