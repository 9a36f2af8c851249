//! qblkd: a vhost-user-blk server for qcow2 images.

pub mod args;
pub mod config;
pub mod control;
