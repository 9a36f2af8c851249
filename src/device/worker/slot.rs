//! One request in flight: what is remembered of it until it is given back.

use std::time::Instant;

use crate::device::request::Buffers;
use crate::device::stats::OperationKind;
use crate::engine::PinGuard;

/// Pieces of guest memory that a slot's buffers hold before they allocate.
const PIECES_RESERVED: usize = 4;

/// One request in flight.
pub(super) struct Slot {
    pub(super) buffers: Buffers,
    /// Which of the worker's vrings it came from.
    pub(super) position: usize,
    pub(super) head: u16,
    pub(super) kind: OperationKind,
    /// Offset on the virtual disk, for reads and writes.
    pub(super) offset: u64,
    /// Bytes that a device-to-driver buffer receives, without the status byte.
    pub(super) written: u64,
    /// What is counted as moved.
    pub(super) bytes: u64,
    pub(super) started: Instant,
    /// Host operations not yet reaped.
    pub(super) outstanding: u32,
    /// A host operation failed, was short, or could not be started.
    pub(super) direct_failed: bool,
    /// Held while direct I/O uses host clusters.
    pub(super) pin: Option<PinGuard>,
}

impl Slot {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            buffers: Buffers::with_capacity(PIECES_RESERVED),
            position: 0,
            head: 0,
            kind: OperationKind::Other,
            offset: 0,
            written: 0,
            bytes: 0,
            started: now,
            outstanding: 0,
            direct_failed: false,
            pin: None,
        }
    }
}
