//! Pins: how in-flight requests stay visible to those who free clusters or freeze the tree.
//!
//! One 64-bit clock counts both things that a pin protects against: its upper part is the
//! *generation* (raised by a freeze), its lower part the *epoch* (raised whenever clusters lose
//! their last reference). Each worker publishes the oldest clock value that one of its requests
//! still uses, in a cache line of its own; nobody else writes that line.
//!
//! Rules (DESIGN: "Pin"):
//! - A worker reads the avail index, *then* pins: publish, fence, load the clock; if it moved,
//!   publish again. A batch takes no entry that became visible after that load.
//! - A cluster freed in epoch `e` may be reused once no published pin is `<= e`.
//! - A worker without requests publishes [`NO_PIN`].
//!
//! *Grace* of a generation is over once no pin of an older one is published: requests that were
//! submitted before the freeze may write in place until then. One task polls for it; requests that
//! must copy old bytes wait for its word.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use crossbeam_utils::CachePadded;
use event_listener::Event;

use super::error::lock;
use super::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, fence};

/// Published by a worker that serves nothing.
const NO_PIN: u64 = u64::MAX;
/// Bits of the clock below the generation. 2^40 epochs are 35 years at a thousand a second.
const EPOCH_BITS: u32 = 40;

/// The clock and everybody's oldest pin.
#[derive(Debug)]
pub(crate) struct PinBoard {
    clock: CachePadded<AtomicU64>,
    slots: Mutex<Vec<Arc<Slot>>>,
    /// The newest generation whose grace is known to be over.
    graced: AtomicU64,
    /// Notified when `graced` rises.
    grace_over: Event,
}

#[derive(Debug)]
struct Slot {
    oldest: CachePadded<AtomicU64>,
    /// Cleared when the worker that owns the slot is gone.
    live: AtomicBool,
}

impl PinBoard {
    /// A board whose first generation is 1: `owned_since == 0` never equals a generation.
    pub(crate) fn new() -> Self {
        Self {
            clock: CachePadded::new(AtomicU64::new(1 << EPOCH_BITS)),
            slots: Mutex::new(Vec::new()),
            graced: AtomicU64::new(1),
            grace_over: Event::new(),
        }
    }

    /// The current generation.
    pub(crate) fn generation(&self) -> u64 {
        self.clock.load(Ordering::Acquire) >> EPOCH_BITS
    }

    /// The instant of a freeze: what was owned so far is owned no more. Returns the new generation.
    /// The caller holds the L1 lock, and sees to it that [`Self::end_grace`] is called until it
    /// says yes.
    pub(crate) fn raise_generation(&self) -> u64 {
        let before = self.clock.fetch_add(1 << EPOCH_BITS, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        (before >> EPOCH_BITS) + 1
    }

    /// Whether no pin older than `generation` is left; who waits for that is told.
    pub(crate) fn end_grace(&self, generation: u64) -> bool {
        if self.oldest() >> EPOCH_BITS < generation {
            return false;
        }
        self.graced.fetch_max(generation, Ordering::AcqRel);
        self.grace_over.notify(usize::MAX);
        true
    }

    /// Waits until the grace of `generation` is over. The caller may hold a pin of that generation,
    /// none of an older one, and nothing that a request of an older one may wait for.
    pub(crate) async fn grace(&self, generation: u64) {
        loop {
            if self.graced.load(Ordering::Acquire) >= generation {
                return;
            }
            let listener = self.grace_over.listen();
            if self.graced.load(Ordering::Acquire) >= generation {
                return;
            }
            listener.await;
        }
    }

    /// Starts a new epoch and returns the one that ended: what was unlinked before this call may
    /// still be used by pins up to and including the returned value.
    pub(crate) fn end_epoch(&self) -> u64 {
        let ended = self.clock.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        ended
    }

    /// The oldest published pin, `u64::MAX` if there is none.
    pub(crate) fn oldest(&self) -> u64 {
        fence(Ordering::SeqCst);
        let mut slots = lock(&self.slots);
        slots.retain(|slot| slot.live.load(Ordering::Acquire));
        slots
            .iter()
            .map(|slot| slot.oldest.load(Ordering::SeqCst))
            .min()
            .unwrap_or(NO_PIN)
    }
}

/// One worker's pins.
#[derive(Debug)]
pub(crate) struct PinTable {
    board: Arc<PinBoard>,
    slot: Arc<Slot>,
    /// Clock values with requests, ascending, and how many requests each has.
    batches: RefCell<VecDeque<(u64, u32)>>,
}

impl PinTable {
    pub(crate) fn new(board: &Arc<PinBoard>) -> Rc<Self> {
        let slot = Arc::new(Slot {
            oldest: CachePadded::new(AtomicU64::new(NO_PIN)),
            live: AtomicBool::new(true),
        });
        lock(&board.slots).push(Arc::clone(&slot));
        Rc::new(Self {
            board: Arc::clone(board),
            slot,
            batches: RefCell::new(VecDeque::with_capacity(64)),
        })
    }

    /// Pins the present. Call it after the avail index was read.
    #[inline]
    pub(crate) fn pin(self: &Rc<Self>) -> PinGuard {
        let mut batches = self.batches.borrow_mut();
        let mut now = self.board.clock.load(Ordering::Acquire);
        if batches.is_empty() {
            loop {
                self.slot.oldest.store(now, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                let again = self.board.clock.load(Ordering::Acquire);
                if again == now {
                    break;
                }
                now = again;
            }
        } else {
            // An older pin of ours is published and stays so until it is released; it covers this
            // one meanwhile.
            fence(Ordering::SeqCst);
            now = self.board.clock.load(Ordering::Acquire);
        }
        match batches.back_mut() {
            Some((clock, count)) if *clock == now => *count += 1,
            _ => batches.push_back((now, 1)),
        }
        PinGuard {
            table: Rc::clone(self),
            clock: now,
        }
    }

    fn share(&self, clock: u64) {
        let mut batches = self.batches.borrow_mut();
        let batch = batches
            .iter_mut()
            .rev()
            .find(|(batch_clock, _)| *batch_clock == clock);
        match batch {
            Some((_, count)) => *count += 1,
            None => unreachable!("a live pin of clock {clock:#x} has its batch"),
        }
    }

    fn release(&self, clock: u64) {
        let mut batches = self.batches.borrow_mut();
        if let Some((_, count)) = batches
            .iter_mut()
            .find(|(batch_clock, _)| *batch_clock == clock)
        {
            *count -= 1;
        }
        let mut moved = false;
        while batches.front().is_some_and(|(_, count)| *count == 0) {
            batches.pop_front();
            moved = true;
        }
        if moved {
            let oldest = batches
                .front()
                .map_or(NO_PIN, |(batch_clock, _)| *batch_clock);
            self.slot.oldest.store(oldest, Ordering::Release);
        }
    }
}

impl Drop for PinTable {
    fn drop(&mut self) {
        self.slot.oldest.store(NO_PIN, Ordering::Release);
        self.slot.live.store(false, Ordering::Release);
    }
}

/// One request's (or one batch's) claim: clusters that it may have resolved are not reused while
/// it lives.
#[derive(Debug)]
pub struct PinGuard {
    table: Rc<PinTable>,
    clock: u64,
}

impl PinGuard {
    /// Another claim of the same age, for a request of this batch. No atomics.
    #[must_use]
    #[inline]
    pub fn share(&self) -> Self {
        self.table.share(self.clock);
        Self {
            table: Rc::clone(&self.table),
            clock: self.clock,
        }
    }

    /// Pins the present instead, if the generation has changed. True: it had. Everything that the
    /// request has written in place so far has landed.
    pub(crate) fn renew(&mut self) -> bool {
        if self.generation() == self.table.board.generation() {
            return false;
        }
        *self = self.table.pin();
        true
    }

    /// The generation that this request works in.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.clock >> EPOCH_BITS
    }
}

impl Drop for PinGuard {
    #[inline]
    fn drop(&mut self) {
        self.table.release(self.clock);
    }
}

#[cfg(all(test, not(qblkd_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_pin_holds_its_epoch_and_later_ones() {
        let board = Arc::new(PinBoard::new());
        let table = PinTable::new(&board);
        assert_eq!(board.oldest(), NO_PIN);
        let first = table.pin();
        let ended = board.end_epoch();
        assert!(board.oldest() <= ended);
        let second = table.pin();
        drop(first);
        assert!(board.oldest() > ended);
        let ended = board.end_epoch();
        let shared = second.share();
        drop(second);
        assert!(board.oldest() <= ended);
        drop(shared);
        assert_eq!(board.oldest(), NO_PIN);
    }

    #[test]
    fn grace_ends_with_the_last_pin_of_an_older_generation() {
        let board = Arc::new(PinBoard::new());
        let table = PinTable::new(&board);
        let old = table.pin();
        let generation = board.raise_generation();
        let mut moved = old.share();
        assert_eq!((old.generation(), generation), (1, 2));
        assert!(!board.end_grace(generation));
        drop(old);
        assert!(!board.end_grace(generation));
        assert!(moved.renew() && !moved.renew());
        assert_eq!(moved.generation(), generation);
        assert!(board.end_grace(generation));
    }

    #[test]
    fn the_oldest_pin_advances_under_constant_load() {
        let board = Arc::new(PinBoard::new());
        let table = PinTable::new(&board);
        let mut held = VecDeque::new();
        let mut last = 0;
        for _ in 0..100 {
            held.push_back(table.pin());
            board.end_epoch();
            if held.len() > 4 {
                held.pop_front();
            }
            assert!(board.oldest() >= last);
            last = board.oldest();
        }
        assert!(last > 1 << EPOCH_BITS);
    }

    #[test]
    fn a_worker_that_is_gone_pins_nothing() {
        let board = Arc::new(PinBoard::new());
        let table = PinTable::new(&board);
        let guard = table.pin();
        drop(guard);
        drop(table);
        assert_eq!(board.oldest(), NO_PIN);
        assert!(lock(&board.slots).is_empty());
    }
}
