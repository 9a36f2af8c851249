//! A worker thread: takes requests from its vrings, performs them, completes them.
//!
//! Owns everything a request needs: the io_uring, the executor, the engine's worker, the request
//! slots, its view of guest memory. Other threads reach it by messages only ([`WorkerHandle`]).
//!
//! The fast path is a plain function: chain -> command -> extents -> SQEs -> used ring. It takes no
//! lock, allocates nothing and writes nothing that another worker writes. What the engine cannot
//! resolve at once, and direct I/O that failed or was short, goes through an `async fn` of the engine
//! on the executor, which then decides on the status.
//!
//! Invariants:
//! - *Ring law*: a slot is released only when its `outstanding` operations are all reaped and no
//!   task works for it; until then it keeps its guest memory mapped. Stopping a ring and changing the
//!   memory table wait for that.
//! - *Pin*: the avail index is read, then the engine is pinned, then requests up to that index are
//!   taken.
//! - A worker sleeps only after it has asked for kicks, fenced, and looked at all sources of work.

mod error_log;
mod handle;
mod poll_window;
mod requests;
mod slot;
mod token;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, SyncSender};
use std::time::{Duration, Instant};

use libc::iovec;
use log::{debug, error};

use super::bitmap::log_epoch;
use super::config_space::ConfigSpace;
use super::error::{DeviceError, RingError};
use super::executor::{Doorbell, Executor};
use super::guest_buf::{GuestMemory, SharedMemory};
use super::lost_memory::losses;
use super::queue::{ServedRing, ring_fence};
use super::request::{Limits, SECTOR_SIZE, SERIAL_SIZE, Status};
use super::stats::Outcome;
use super::vring::RingSetup;
use crate::engine::{self, ExtentList, Image};
use crate::storage::ring::Full;
use crate::storage::{HostFile, Ring, RingStorage};

use self::error_log::ErrorLog;
use self::handle::{Message, Shared};
use self::poll_window::PollWindow;
use self::slot::Slot;

pub(super) use self::handle::{WorkerHandle, pause, resume, set_image, set_memory};

/// Requests that a worker has in flight at most; more wait in their avail rings.
const SLOTS: u32 = 256;
/// Entries of a worker's io_uring: one for each slot, and room for requests of several extents and
/// for the event descriptors.
const RING_ENTRIES: u32 = 512;
/// Chains taken from one vring before the others have their turn.
const BATCH_MAX: u16 = 128;
/// How often a ring is looked at whose driver does not kick.
const KICKLESS_INTERVAL: Duration = Duration::from_micros(200);
/// Looks at the sources of work between two looks at the clock.
const POLLS_PER_CLOCK: u32 = 16;

/// What all workers of a device are made with.
#[derive(Clone)]
pub(super) struct WorkerParts {
    pub(super) image: Arc<Image>,
    pub(super) files: Vec<Arc<HostFile>>,
    pub(super) config: Arc<ConfigSpace>,
    pub(super) serial: [u8; SERIAL_SIZE],
    pub(super) block_size: u32,
    /// Longest polling window; zero: never poll.
    pub(super) poll_max: Duration,
    /// Number of workers: vring i belongs to worker i % worker_count.
    pub(super) worker_count: usize,
}

/// Starts worker `number`; returns when its ring exists. `on_end` runs when the thread ends.
pub(super) fn spawn(
    number: usize,
    parts: WorkerParts,
    on_end: impl FnOnce() + Send + 'static,
) -> Result<(WorkerHandle, std::thread::JoinHandle<()>), DeviceError> {
    let doorbell = Arc::new(Doorbell::new().map_err(DeviceError::system("make an eventfd"))?);
    let shared = Arc::new(Shared::new(doorbell));
    let (ready, started) = mpsc::sync_channel(1);
    let theirs = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            let _end = OnEnd {
                shared: Arc::clone(&theirs),
                then: Some(on_end),
            };
            // The ring belongs to the thread that makes it.
            let worker = Ring::new(RING_ENTRIES)
                .map_err(|source| DeviceError::Ring {
                    worker: number,
                    source,
                })
                .and_then(|ring| {
                    Worker::new(ring, parts, theirs)
                        .map_err(DeviceError::system("register the host files"))
                });
            match worker {
                Ok(worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(DeviceError::system("start a worker thread"))?;
    match started.recv() {
        Ok(Ok(())) => Ok((WorkerHandle { shared }, thread)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(DeviceError::WorkerGone { worker: number }),
    }
}

/// Tells the others that a worker has ended, however it did.
struct OnEnd<F: FnOnce()> {
    shared: Arc<Shared>,
    then: Option<F>,
}

impl<F: FnOnce()> Drop for OnEnd<F> {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Release);
        if let Some(then) = self.then.take() {
            then();
        }
    }
}

/// Ends of tasks, by slot. Tasks append, the worker's loop takes.
type TaskEnds = Rc<RefCell<Vec<(u32, Status)>>>;

/// One of the worker's vrings.
struct Place {
    ring: ServedRing,
    kick_armed: bool,
    /// Who waits for the ring to stop.
    stopping: Option<SyncSender<u16>>,
}

struct Worker {
    // First, so that it is dropped first: it drains, and the kernel is done with the slots' memory.
    ring: Ring,
    executor: Executor,
    engine: Rc<engine::Worker<RingStorage>>,
    parts: WorkerParts,
    limits: Limits,
    shared: Arc<Shared>,
    memory: Option<Rc<GuestMemory>>,
    /// By queue index / worker count.
    places: Vec<Option<Place>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    task_ends: TaskEnds,
    error_log: Rc<ErrorLog>,
    /// Scratch space of the fast path.
    extents: ExtentList,
    pieces: Vec<iovec>,
    completions: Vec<(u64, i32)>,
    memory_change: Option<(Option<Arc<SharedMemory>>, SyncSender<()>)>,
    /// No requests are taken.
    paused: bool,
    /// Who waits for requests in flight to end after a pause.
    pausing: Option<SyncSender<usize>>,
    doorbell_armed: bool,
    exiting: bool,
    /// Value of the log epoch that `log_on` was found at.
    log_epoch: u64,
    /// Losses of guest memory when `memory` was new.
    losses: u64,
    log_on: bool,
    /// For waits with requests in flight, which the host ends.
    poll_host: PollWindow,
    /// For waits that only the driver ends. Apart, because the two differ in length, and at a queue
    /// depth of one they alternate.
    poll_driver: PollWindow,
    now: Instant,
}

impl Worker {
    fn new(ring: Ring, parts: WorkerParts, shared: Arc<Shared>) -> io::Result<Self> {
        let storage = RingStorage::new(ring.clone(), parts.files.clone())?;
        let now = Instant::now();
        let worker = Self {
            engine: parts.image.worker(storage),
            executor: Executor::new(Arc::clone(&shared.doorbell)),
            limits: Limits {
                sector_count: parts.image.virtual_size() / SECTOR_SIZE,
                block_sectors: u64::from(parts.block_size) / SECTOR_SIZE,
                read_only: parts.image.is_read_only(),
            },
            memory: None,
            places: Vec::new(),
            slots: (0..SLOTS).map(|_| Slot::new(now)).collect(),
            free: (0..SLOTS).rev().collect(),
            task_ends: TaskEnds::default(),
            error_log: Rc::default(),
            extents: ExtentList::new(),
            pieces: Vec::new(),
            completions: Vec::new(),
            memory_change: None,
            paused: false,
            pausing: None,
            doorbell_armed: false,
            exiting: false,
            log_epoch: log_epoch(),
            losses: losses(),
            log_on: false,
            poll_host: PollWindow::new(parts.poll_max),
            poll_driver: PollWindow::new(parts.poll_max),
            now,
            parts,
            ring,
            shared,
        };
        worker.count_lookups();
        Ok(worker)
    }

    fn run(mut self) {
        loop {
            let mut busy = self.read_messages();
            busy |= self.executor.run();
            busy |= self.reap();
            busy |= self.end_tasks();
            self.publish();
            if self.settle().is_break() {
                break;
            }
            busy |= self.take_all();
            self.submit();
            if !busy {
                self.wait();
            }
        }
        if self.doorbell_armed {
            self.disarm(token::DOORBELL);
        }
    }

    // ---- messages ----

    fn read_messages(&mut self) -> bool {
        let mut any = false;
        while let Some(message) = self.shared.messages.pop() {
            any = true;
            match message {
                Message::Start(setup, reply) => {
                    let _ = reply.send(self.start_ring(setup));
                }
                Message::Stop(queue_index, reply) => match self.place(queue_index) {
                    Some(place) => place.stopping = Some(reply),
                    // Dropping `reply` is the answer.
                    None => debug!("vring {queue_index} is stopped and was not running"),
                },
                Message::SetKick(queue_index, kick) => self.set_kick(queue_index, kick),
                Message::SetCall(queue_index, call) => {
                    if let Some(place) = self.place(queue_index) {
                        place.ring.set_call(call);
                    }
                }
                Message::SetMemory(memory, reply) => {
                    // One control thread sends these and waits for each.
                    self.memory_change = Some((memory, reply));
                }
                Message::Pause(reply) => {
                    self.paused = true;
                    self.pausing = Some(reply);
                }
                Message::SetImage(image, files, reply) => {
                    self.set_image(image, files);
                    let _ = reply.send(());
                }
                Message::Resume => self.paused = false,
                Message::Exit => self.exiting = true,
            }
        }
        any
    }

    /// Goes over to another image. The worker is paused and nothing is in flight.
    fn set_image(&mut self, image: Arc<Image>, files: Vec<Arc<HostFile>>) {
        assert!(
            self.paused && self.is_idle(),
            "the image is changed under requests"
        );
        let storage = RingStorage::replace(self.ring.clone(), files.clone());
        self.engine = image.worker(storage);
        self.limits.sector_count = image.virtual_size() / SECTOR_SIZE;
        self.parts.image = image;
        self.parts.files = files;
        self.count_lookups();
    }

    /// Adds the lookups of the present image to those that are shown.
    fn count_lookups(&self) {
        let counters = self.engine.cache_counters();
        self.shared.lock_counters().push(counters);
    }

    /// No request has a slot.
    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn position(&self, queue_index: usize) -> usize {
        queue_index / self.parts.worker_count
    }

    fn place(&mut self, queue_index: usize) -> Option<&mut Place> {
        let position = self.position(queue_index);
        self.places.get_mut(position)?.as_mut()
    }

    fn start_ring(&mut self, setup: RingSetup) -> Result<(), RingError> {
        let memory = self.memory.as_ref().ok_or(RingError::NoMemory)?;
        let position = self.position(setup.queue_index);
        let mut ring = ServedRing::start(memory, setup)?;
        ring.call_anyway();
        if self.places.len() <= position {
            self.places.resize_with(position + 1, || None);
        }
        assert!(self.places[position].is_none(), "a vring was started twice");
        self.places[position] = Some(Place {
            ring,
            kick_armed: false,
            stopping: None,
        });
        self.arm_kick(position);
        Ok(())
    }

    fn set_kick(&mut self, queue_index: usize, kick: Option<Arc<File>>) {
        let position = self.position(queue_index);
        self.disarm_kick(position);
        if let Some(place) = self.place(queue_index) {
            place.ring.set_kick(kick);
            self.arm_kick(position);
        }
    }

    fn arm_kick(&mut self, position: usize) {
        if let Some(Some(place)) = self.places.get_mut(position)
            && let Some(kick) = place.ring.kick_fd()
        {
            match self.ring.arm_eventfd(kick, token::kick(position)) {
                Ok(()) => {
                    place.kick_armed = true;
                }
                Err(Full) => {
                    let queue_index = place.ring.queue_index();
                    error!("vring {queue_index} is polled: io_uring is full");
                    place.ring.set_kick(None);
                }
            }
        }
    }

    /// Stops waiting for an event descriptor. An event that is swallowed by that is no loss: who
    /// disarms looks at the rings again before the worker sleeps.
    fn disarm(&self, token: u64) {
        if let Err(error) = self.ring.cancel_eventfd(token) {
            error!("io_uring cancel: {error}");
        }
    }

    fn disarm_kick(&mut self, position: usize) {
        if let Some(Some(place)) = self.places.get_mut(position)
            && place.kick_armed
        {
            place.kick_armed = false;
            self.disarm(token::kick(position));
        }
    }

    /// Answers what had to wait for requests in flight. Breaks when the worker may end.
    fn settle(&mut self) -> ControlFlow<()> {
        for position in 0..self.places.len() {
            let drained = self.places[position].as_ref().is_some_and(|place| {
                (place.stopping.is_some() || self.exiting) && place.ring.in_flight() == 0
            });
            if drained {
                self.disarm_kick(position);
                if let Some(place) = self.places[position].take()
                    && let Some(reply) = place.stopping
                {
                    let _ = reply.send(place.ring.next_avail());
                }
            }
        }
        let idle = self.is_idle();
        // An operation may outlive its request, if that has failed.
        if self.pausing.is_some()
            && idle
            && self.ring.io_in_flight() == 0
            && let Some(reply) = self.pausing.take()
        {
            let _ = reply.send(self.places.iter().flatten().count());
        }
        if idle && let Some((memory, reply)) = self.memory_change.take() {
            self.memory = memory.map(|memory| Rc::new(GuestMemory::new(memory)));
            for place in self.places.iter_mut().flatten() {
                place.ring.remap(self.memory.as_ref());
            }
            self.log_epoch = log_epoch();
            self.losses = losses();
            self.log_on = self.memory.as_ref().is_some_and(|memory| memory.has_log());
            let _ = reply.send(());
        }
        if self.exiting && idle && self.places.iter().all(Option::is_none) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    // ---- taking requests ----

    fn may_take(&self) -> bool {
        !self.free.is_empty() && self.memory_change.is_none() && !self.paused && !self.exiting
    }

    fn take_all(&mut self) -> bool {
        if !self.may_take() {
            return false;
        }
        let mut any = false;
        let mut clock_read = false;
        for position in 0..self.places.len() {
            let Some(place) = &mut self.places[position] else {
                continue;
            };
            if place.stopping.is_some() {
                continue;
            }
            let available = place.ring.available().min(BATCH_MAX);
            if available == 0 {
                continue;
            }
            if !clock_read {
                clock_read = true;
                self.now = Instant::now();
            }
            // After the avail index was read: what it made visible is served in this generation.
            let pin = self.engine.pin();
            for _ in 0..available {
                if self.free.is_empty() || !self.begin(position, &pin) {
                    break;
                }
                any = true;
            }
        }
        any
    }

    // ---- completing requests ----

    fn submit(&mut self) {
        // What tasks have queued goes too; with nothing queued this is no system call.
        if let Err(error) = self.ring.submit() {
            // The entries stay in the submission queue; the next wait submits them again.
            error!("io_uring submit: {error}");
        }
    }

    fn reap(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.ring
            .reap(|token, result| completions.push((token, result)));
        let any = !completions.is_empty();
        if any {
            self.now = Instant::now();
        }
        for (token, result) in completions.drain(..) {
            match token::decode(token) {
                token::Token::Request { slot, len } => self.end_operation(slot, len, result),
                token::Token::Kick { position } => self.kicked(position, result),
                token::Token::Doorbell => {
                    self.doorbell_armed = false;
                    if result < 0 {
                        error!("a worker's doorbell: errno {}", -result);
                    }
                }
            }
        }
        self.completions = completions;
        any
    }

    fn end_operation(&mut self, slot_index: u32, len: u32, result: i32) {
        let slot = &mut self.slots[slot_index as usize];
        slot.outstanding -= 1;
        if u32::try_from(result) != Ok(len) {
            debug!("direct I/O of {len} bytes ended with {result}; the engine takes over");
            slot.direct_failed = true;
        }
        if slot.outstanding == 0 {
            self.end_direct(slot_index);
        }
    }

    fn kicked(&mut self, position: usize, result: i32) {
        self.shared.stats.count_kick();
        if let Some(Some(place)) = self.places.get_mut(position) {
            place.kick_armed = false;
            // An eventfd gives 8 bytes. Anything else would make the worker spin on it.
            if result != 8 {
                let queue_index = place.ring.queue_index();
                error!("vring {queue_index} is polled: reading its kick descriptor gave {result}");
                place.ring.set_kick(None);
            }
        }
        self.arm_kick(position);
    }

    fn end_tasks(&mut self) -> bool {
        let mut ends = std::mem::take(&mut *self.task_ends.borrow_mut());
        if ends.is_empty() {
            return false;
        }
        self.now = Instant::now();
        for (slot_index, status) in ends.drain(..) {
            self.finish(slot_index, status);
        }
        // The buffer goes back; nothing was added meanwhile, as tasks run elsewhere in the loop.
        *self.task_ends.borrow_mut() = ends;
        true
    }

    /// Writes the status, gives the chain back and frees the slot.
    fn finish(&mut self, slot_index: u32, status: Status) {
        let slot = &mut self.slots[slot_index as usize];
        let used_len = match &slot.buffers.status {
            Some(place) => {
                place.write(status.to_byte());
                if self.log_on {
                    place.mark_written();
                    slot.buffers.writable.mark_written();
                }
                u32::try_from(slot.written + 1).unwrap_or(u32::MAX)
            }
            None => 0,
        };
        let outcome = match status {
            Status::Ok => Outcome::Done,
            Status::IoError => Outcome::Failed,
            Status::Unsupported => Outcome::Unsupported,
        };
        let time = self.now.saturating_duration_since(slot.started);
        self.shared
            .stats
            .count(slot.kind, outcome, slot.bytes, time);
        slot.buffers.clear();
        slot.pin = None;
        if let Some(Some(place)) = self.places.get_mut(slot.position) {
            place.ring.give_back(slot.head, used_len);
        }
        self.free.push(slot_index);
    }

    /// Publishes what each ring has given back, marks the dirty log, calls drivers.
    fn publish(&mut self) {
        let mut any = false;
        for place in self.places.iter_mut().flatten() {
            any |= place.ring.publish();
        }
        if !any {
            return;
        }
        ring_fence();
        let epoch = log_epoch();
        if epoch != self.log_epoch {
            // A log appeared while this batch was being written; which of it is in the log, nobody
            // knows, so all of guest memory is.
            self.log_epoch = epoch;
            if let Some(memory) = &self.memory {
                self.log_on = memory.has_log();
                memory.mark_everything_written();
            }
        }
        for place in self.places.iter_mut().flatten() {
            if self.log_on
                && let Some(memory) = place.ring.memory()
            {
                memory.mark_used_written();
            }
            if place.ring.needs_call_decision() && place.ring.call_if_wanted() {
                self.shared.stats.count_call();
            }
        }
    }

    // ---- waiting ----

    fn has_work(&self) -> bool {
        self.ring.has_completions()
            || (self.may_take()
                && self
                    .places
                    .iter()
                    .flatten()
                    .any(|place| place.stopping.is_none() && place.ring.has_work()))
            || !self.shared.messages.is_empty()
            || !self.executor.is_idle()
    }

    /// Nothing to do: polls for a while if that has paid lately, then sleeps until something comes.
    fn wait(&mut self) {
        let since = Instant::now();
        if self.poll_for_work(since) {
            self.poll_window().hit();
            self.shared.stats.count_poll_hit();
            return;
        }
        self.shared.doorbell.lie_down();
        if !self.doorbell_armed {
            let doorbell = self.shared.doorbell.as_raw_fd();
            match self.ring.arm_eventfd(doorbell, token::DOORBELL) {
                Ok(()) => self.doorbell_armed = true,
                Err(Full) => error!("a worker's doorbell: io_uring is full"),
            }
        }
        let may_take = self.may_take();
        let mut timeout = (!self.doorbell_armed).then_some(KICKLESS_INTERVAL);
        for place in self.places.iter_mut().flatten() {
            if may_take {
                place.ring.want_kicks();
                if self.log_on
                    && let Some(memory) = place.ring.memory()
                {
                    memory.mark_used_written();
                }
            }
            if place.ring.kick_fd().is_none() {
                timeout = Some(KICKLESS_INTERVAL);
            }
        }
        ring_fence();
        if !self.has_work() {
            self.shared.stats.count_sleep();
            if let Err(error) = self.ring.submit_and_wait(1, timeout) {
                error!("io_uring wait: {error}");
            }
            self.poll_window().slept(since.elapsed());
        }
        self.shared.doorbell.get_up();
    }

    /// The window for the wait that is due; nothing is begun or ended before the wait is over.
    fn poll_window(&mut self) -> &mut PollWindow {
        if self.free.len() == self.slots.len() {
            &mut self.poll_driver
        } else {
            &mut self.poll_host
        }
    }

    fn poll_for_work(&mut self, since: Instant) -> bool {
        let window = self.poll_window().window();
        if window.is_zero() {
            return false;
        }
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                if self.has_work() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.elapsed() >= window {
                return false;
            }
        }
    }
}
