//! `qblkd` serves one virtual disk from a qcow2 image over vhost-user.
//!
//! The folders are layers and depend on each other one way only; `docs/architecture.md` is the map.
//!
//! * [`units`]: offsets, clusters and counts as distinct types.
//! * [`format`]: bytes to values and back, as the qcow2 specification lays them out. Pure.
//! * [`storage`]: host file I/O in bytes and offsets; knows nothing of qcow2.

pub mod format;
pub mod storage;
pub mod units;
