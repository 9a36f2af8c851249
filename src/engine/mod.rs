//! qcow2 semantics over [`Storage`](crate::storage::Storage).

#![forbid(unsafe_code)]

pub mod chain;
pub mod check;
pub mod create;
mod error;
pub mod info;
mod source;

pub use error::{Error, ErrorKind};

/// What a layer's file holds. Never probed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayerFormat {
    /// A qcow2 image.
    Qcow2,
    /// Guest bytes as they are.
    Raw,
}
