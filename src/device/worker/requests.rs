//! A request's way from its chain to the host and the engine: parsed, resolved, started.
//!
//! The fast path, and where it leaves to the engine's asynchronous one. Who ends a request, and when
//! its slot is free again, is the worker's business.

use std::rc::Rc;
use std::sync::Arc;

use log::debug;

use super::Worker;
use super::token;
use crate::device::error::status_of;
use crate::device::lost_memory::losses;
use crate::device::request::{Command, Refusal, Segment, Status, parse};
use crate::device::stats::OperationKind;
use crate::engine::{self, Extent, Fast, PinGuard};
use crate::storage::Direction;
use crate::units::GuestOffset;

/// Direct I/O is at most this long (one SQE moves less than 2 GiB) and has at most this many pieces
/// (UIO_MAXIOV); the engine's path cuts what is larger.
const REQUEST_LEN_MAX: u64 = 1 << 30;
const DIRECT_PIECES_MAX: usize = 1024;

impl Worker {
    /// Takes one request and starts it. False if the ring gave none.
    pub(super) fn begin(&mut self, position: usize, pin: &PinGuard) -> bool {
        let Some(Some(place)) = self.places.get_mut(position) else {
            return false;
        };
        let Some(slot_index) = self.free.pop() else {
            return false;
        };
        let (Some(memory), Some(head)) = (&self.memory, place.ring.take()) else {
            self.free.push(slot_index);
            return false;
        };
        let slot = &mut self.slots[slot_index as usize];
        slot.position = position;
        slot.head = head;
        slot.kind = OperationKind::Other;
        slot.offset = 0;
        slot.written = 0;
        slot.bytes = 0;
        slot.started = self.now;
        slot.direct_failed = false;
        let parsed = match place.ring.memory() {
            Some(ring_memory) => parse(ring_memory, memory, head, &self.limits, &mut slot.buffers),
            None => Err(Refusal::NoStatus),
        };
        if losses() != self.losses {
            place.ring.abandon("guest memory has been taken away");
            slot.buffers.clear();
            self.free.push(slot_index);
            return false;
        }
        match parsed {
            Ok(command) => self.perform(slot_index, command, pin),
            Err(Refusal::Status(status)) => {
                debug!("bad request from the guest: answered {status:?}");
                slot.written = slot.buffers.writable.len();
                self.finish(slot_index, status);
            }
            Err(Refusal::NoStatus) => {
                debug!("request from the guest without a place for its status");
                self.finish(slot_index, Status::IoError);
            }
            Err(Refusal::RingBroken { descriptor }) => {
                place
                    .ring
                    .abandon(&format!("there is no descriptor {descriptor}"));
                slot.buffers.clear();
                self.free.push(slot_index);
                return false;
            }
        }
        true
    }

    fn perform(&mut self, slot_index: u32, command: Command, pin: &PinGuard) {
        let slot = &mut self.slots[slot_index as usize];
        match command {
            Command::Read { offset } => {
                slot.kind = OperationKind::Read;
                slot.offset = offset;
                slot.bytes = slot.buffers.writable.len();
                slot.written = slot.bytes;
                self.transfer(slot_index, Direction::Read, pin);
            }
            Command::Write { offset } => {
                slot.kind = OperationKind::Write;
                slot.offset = offset;
                slot.bytes = slot.buffers.readable.len();
                self.transfer(slot_index, Direction::Write, pin);
            }
            Command::GetId => {
                let serial = &self.parts.serial;
                slot.written = slot.buffers.writable.write_front(serial) as u64;
                self.finish(slot_index, Status::Ok);
            }
            Command::Flush => {
                slot.kind = OperationKind::Flush;
                let engine = Rc::clone(&self.engine);
                self.spawn(slot_index, "flush", async move { engine.flush().await });
            }
            Command::Discard(segments) => {
                slot.kind = OperationKind::Unmap;
                slot.bytes = segments.iter().map(|segment| segment.len).sum();
                self.unmap(slot_index, segments, false, pin);
            }
            Command::WriteZeroes(segments) => {
                slot.kind = OperationKind::Unmap;
                slot.bytes = segments.iter().map(|segment| segment.len).sum();
                self.unmap(slot_index, segments, true, pin);
            }
        }
    }

    /// Starts a read or write: directly where the engine resolves it at once.
    fn transfer(&mut self, slot_index: u32, direction: Direction, pin: &PinGuard) {
        let Self {
            ring,
            engine,
            parts,
            slots,
            extents,
            pieces,
            ..
        } = self;
        let slot = &mut slots[slot_index as usize];
        let (buffer, len) = match direction {
            Direction::Read => (&slot.buffers.writable, slot.bytes),
            Direction::Write => (&slot.buffers.readable, slot.bytes),
        };
        if len == 0 {
            self.finish(slot_index, Status::Ok);
            return;
        }
        if len > REQUEST_LEN_MAX {
            // Far beyond what the configuration space allows; serving it would hold up the others.
            debug!("a request of {len:#x} bytes: refused");
            self.finish(slot_index, Status::IoError);
            return;
        }
        let offset = GuestOffset::new(slot.offset);
        let direct = buffer.pieces() <= DIRECT_PIECES_MAX
            && match direction {
                Direction::Read => engine.resolve_read(pin, offset, len, extents) == Fast::Ready,
                Direction::Write => {
                    !parts.config.is_write_through()
                        && engine.resolve_write(pin, offset, len, extents) == Fast::Ready
                }
            };
        if !direct {
            self.transfer_slowly(slot_index, pin.share());
            return;
        }
        let mut position = 0;
        for extent in extents.as_slice() {
            match *extent {
                Extent::Zero { len } => {
                    buffer.fill_zero(position, len);
                    position += len;
                }
                Extent::Data {
                    file,
                    host_offset,
                    len,
                } => {
                    let window = buffer.window(position, len, pieces);
                    position += len;
                    // `len` is at most REQUEST_LEN_MAX.
                    let expected = u32::try_from(len).unwrap_or(u32::MAX);
                    let token = token::request(slot_index, expected);
                    let suits = parts
                        .files
                        .get(usize::from(file.0))
                        .is_some_and(|host| window.suits(host, direction, host_offset));
                    if !suits
                        || window
                            .start(ring, direction, file, host_offset, token)
                            .is_err()
                    {
                        slot.direct_failed = true;
                        break;
                    }
                    slot.outstanding += 1;
                }
            }
        }
        slot.pin = Some(pin.share());
        if slot.outstanding == 0 {
            self.end_direct(slot_index);
        }
    }

    /// All host operations of a request are done: ends it, or lets the engine do it all once more.
    pub(super) fn end_direct(&mut self, slot_index: u32) {
        let slot = &mut self.slots[slot_index as usize];
        let pin = slot.pin.take();
        if !slot.direct_failed {
            self.finish(slot_index, Status::Ok);
            return;
        }
        self.shared.stats.count_retry();
        // The request keeps its pin from when it was taken.
        let pin = pin.unwrap_or_else(|| self.engine.pin());
        self.transfer_slowly(slot_index, pin);
    }

    /// Reads or writes through the engine's asynchronous path.
    fn transfer_slowly(&mut self, slot_index: u32, pin: PinGuard) {
        let slot = &self.slots[slot_index as usize];
        let offset = GuestOffset::new(slot.offset);
        let engine = Rc::clone(&self.engine);
        if slot.kind == OperationKind::Read {
            let memory = slot.buffers.writable.sg_list();
            self.spawn(slot_index, "read", async move {
                engine.read(pin, offset, memory).await
            });
        } else {
            let memory = slot.buffers.readable.sg_list();
            let write_through = self.parts.config.is_write_through();
            self.spawn(slot_index, "write", async move {
                engine.write(pin, offset, memory).await?;
                if write_through {
                    engine.flush().await?;
                }
                Ok(())
            });
        }
    }

    /// Discards or zeroes the segments one after the other.
    fn unmap(&mut self, slot_index: u32, segments: Vec<Segment>, zeroes: bool, pin: &PinGuard) {
        let engine = Rc::clone(&self.engine);
        let config = Arc::clone(&self.parts.config);
        let what = if zeroes { "write zeroes" } else { "discard" };
        let mut pin = Some(pin.share());
        self.spawn(slot_index, what, async move {
            for segment in segments.into_iter().filter(|segment| segment.len != 0) {
                let offset = GuestOffset::new(segment.offset);
                // A segment may wait for a grace, which waits for every older pin: the request keeps
                // none of its own meanwhile, and its later segments are of the present.
                let pin = pin.take().unwrap_or_else(|| engine.pin());
                if zeroes {
                    engine
                        .write_zeroes(pin, offset, segment.len, segment.unmap)
                        .await?;
                } else {
                    engine.discard(pin, offset, segment.len).await?;
                }
            }
            drop(pin.take());
            if config.is_write_through() {
                engine.flush().await?;
            }
            Ok(())
        });
    }

    fn spawn(
        &self,
        slot_index: u32,
        what: &'static str,
        work: impl Future<Output = Result<(), engine::Error>> + 'static,
    ) {
        self.shared.stats.count_slow();
        let ends = Rc::clone(&self.task_ends);
        let error_log = Rc::clone(&self.error_log);
        let image = Arc::clone(self.engine.image());
        self.executor.spawn(async move {
            let status = match work.await {
                Ok(()) => Status::Ok,
                Err(error) => {
                    if error_log.report(what, &error) {
                        image.tell_request_failed(what != "read", &error);
                    }
                    status_of(&error)
                }
            };
            ends.borrow_mut().push((slot_index, status));
        });
    }
}
