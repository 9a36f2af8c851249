//! qcow2 semantics over [`Storage`](crate::storage::Storage).

#![forbid(unsafe_code)]

pub mod check;
pub mod error;
mod source;
