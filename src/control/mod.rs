//! The out-of-band side: a Unix stream socket that speaks QMP, with QEMU's command names and shapes.
//!
//! Owns the wire (framing, requests, replies, events), the sessions and the command table. Knows
//! nothing of the image: what a query reports comes from the [`Handler`] as plain structs of
//! [`info`], and what a client asks for goes back through it.
//!
//! Invariants: the main thread never blocks here; what one client sends, or does not read, costs
//! the others nothing; memory per client is bounded by the limits in [`wire`] and `session`; no
//! input reaches a panic.
#![forbid(unsafe_code)]

mod command;
mod error;
mod event;
pub mod info;
pub mod job;
mod server;
mod session;
#[cfg(test)]
mod tests;
pub mod wire;

pub use command::{Handler, Order, Overlay, SnapshotAction, Ticket};
pub(crate) use command::{no_snapshot, snapshot_exists};
pub use error::{BindError, CommandError, ErrorClass};
pub use event::{Event, IoErrorAction, IoOperation, ShutdownReason};
pub use server::{CLIENT_COUNT_MAX, ControlServer};
