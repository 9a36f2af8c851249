//! `qblkd` serves one virtual disk from a qcow2 image over vhost-user.
//!
//! The folders are layers and depend on each other one way only; `docs/architecture.md` is the map.
//!
//! * [`units`]: offsets, clusters and counts as distinct types.
//! * [`mod@format`]: bytes to values and back, as the qcow2 specification lays them out. Pure.

pub mod args;
pub mod config;
pub mod control;
pub mod engine;
pub mod format;
pub mod storage;
pub mod tools;
pub mod units;
