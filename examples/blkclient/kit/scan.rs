//! Reads a range of the disk from begin to end with several requests in flight.

use super::disk::{Disk, Kind, Queue, STATUS_OK, Waiter, Watchdog};
use super::{Error, SECTOR_BYTES, sectors_to_bytes};
use std::ops::Range;
use std::time::Instant;

/// Reads `sectors`, calling `visit` with the first sector and the bytes of each piece, in any
/// order. The queue must be idle.
pub(crate) fn scan(
    disk: &Disk,
    queue: &mut Queue,
    sectors: Range<u64>,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let piece_sectors = (queue.slot_bytes() / SECTOR_BYTES) as u64;
    let waiter = Waiter::new(std::slice::from_ref(queue))?;
    let mut watchdog = Watchdog::new();
    let mut free: Vec<usize> = (0..queue.slots()).collect();
    let mut pieces = vec![0..0; queue.slots()];
    let mut next = sectors.start;
    let mut completed = Vec::new();
    let mut bytes = vec![0; queue.slot_bytes()];
    while next < sectors.end || queue.in_flight() > 0 {
        while next < sectors.end
            && let Some(slot) = free.pop()
        {
            let end = (next + piece_sectors).min(sectors.end);
            queue.submit(slot, Kind::Read, next, &[sectors_to_bytes(end - next)])?;
            pieces[slot] = next..end;
            next = end;
        }
        queue.kick()?;
        queue.reap(&mut completed)?;
        if completed.is_empty() {
            waiter.wait(std::slice::from_mut(queue), 100)?;
            watchdog.check(disk, queue.in_flight())?;
            continue;
        }
        watchdog.progress(Instant::now());
        for completion in completed.drain(..) {
            let piece = &pieces[completion.slot];
            if completion.status != STATUS_OK {
                let request = format!("read of sectors {piece:?}");
                return Err(Error::Status {
                    request,
                    status: completion.status,
                });
            }
            let bytes = &mut bytes[..sectors_to_bytes(piece.end - piece.start)];
            queue.read_slot(completion.slot, 0, bytes);
            visit(piece.start, bytes)?;
            free.push(completion.slot);
        }
    }
    Ok(())
}
