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

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;
use crossbeam_utils::CachePadded;
use libc::iovec;
use log::{debug, error, log};

use super::bitmap::log_epoch;
use super::config_space::ConfigSpace;
use super::error::{DeviceError, RingError, level_of, status_of};
use super::executor::{Doorbell, Executor};
use super::guest_buf::{GuestMemory, SharedMemory};
use super::lost_memory::losses;
use super::queue::{ServedRing, ring_fence};
use super::request::{
    Buffers, Command, Limits, Refusal, SECTOR_SIZE, SERIAL_SIZE, Segment, Status, parse,
};
use super::stats::{OperationKind, Outcome, WorkerStats};
use super::vring::RingSetup;
use crate::engine::{self, CacheCounters, CacheStats, Extent, ExtentList, Fast, Image, PinGuard};
use crate::storage::ring::Full;
use crate::storage::{Direction, HostFile, Ring, RingStorage};
use crate::units::GuestOffset;

/// Requests that a worker has in flight at most; more wait in their avail rings.
const SLOTS: u32 = 256;
/// Entries of a worker's io_uring: one for each slot, and room for requests of several extents and
/// for the event descriptors.
const RING_ENTRIES: u32 = 512;
/// Chains taken from one vring before the others have their turn.
const BATCH_MAX: u16 = 128;
/// Pieces of guest memory that a slot's buffers hold before they allocate.
const PIECES_RESERVED: usize = 4;
/// Direct I/O is at most this long (one SQE moves less than 2 GiB) and has at most this many pieces
/// (UIO_MAXIOV); the engine's path cuts what is larger.
const REQUEST_LEN_MAX: u64 = 1 << 30;
const DIRECT_PIECES_MAX: usize = 1024;
/// How often a ring is looked at whose driver does not kick.
const KICKLESS_INTERVAL: Duration = Duration::from_micros(200);
/// A sleep may last this much longer than the wait that it is for: a virtual machine's processor that
/// has halted takes tens of microseconds to wake up (an estimate, on the generous side).
const WAKE_UP: Duration = Duration::from_micros(50);
/// Hits that are remembered at most, so that polling ends soon after it stops to pay.
const POLL_CREDIT_MAX: i32 = 16;
/// A poll in vain counts as much as so many that were not.
const POLL_MISS_COST: i32 = 2;
/// Waits that look short before polling is tried again after it did not pay.
const POLL_PAUSE: i32 = 8;
/// Looks at the sources of work between two looks at the clock.
const POLLS_PER_CLOCK: u32 = 16;
/// A waiting control thread looks this often whether the worker still lives.
const ALIVE_INTERVAL: Duration = Duration::from_millis(100);
/// At most one line about failed requests in this time; the rest is for `--log debug`.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Completion tokens: what kind in the top bits, then kind-specific.
mod token {
    const KIND_SHIFT: u32 = 56;
    const SLOT_SHIFT: u32 = 32;
    const KIND_REQUEST: u64 = 1;
    const KIND_KICK: u64 = 2;
    const KIND_DOORBELL: u64 = 3;

    /// What a completion is about.
    pub(super) enum Token {
        /// An operation of a request slot that should have moved `len` bytes.
        Request { slot: u32, len: u32 },
        /// A vring's kick descriptor was read.
        Kick { position: usize },
        /// The doorbell was read.
        Doorbell,
    }

    pub(super) fn request(slot: u32, len: u32) -> u64 {
        KIND_REQUEST << KIND_SHIFT | u64::from(slot) << SLOT_SHIFT | u64::from(len)
    }

    pub(super) fn kick(position: usize) -> u64 {
        KIND_KICK << KIND_SHIFT | position as u64
    }

    pub(super) const DOORBELL: u64 = KIND_DOORBELL << KIND_SHIFT;

    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes the fields apart again"
    )]
    pub(super) fn decode(token: u64) -> Token {
        match token >> KIND_SHIFT {
            KIND_REQUEST => Token::Request {
                slot: (token >> SLOT_SHIFT) as u32 & 0x00ff_ffff,
                len: token as u32,
            },
            KIND_KICK => Token::Kick {
                position: token as u32 as usize,
            },
            _ => Token::Doorbell,
        }
    }
}

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

/// What others ask of a worker.
enum Message {
    Start(RingSetup, SyncSender<Result<(), RingError>>),
    /// Answered with the position reached, when nothing of the ring is in flight.
    Stop(usize, SyncSender<u16>),
    SetKick(usize, Option<Arc<File>>),
    SetCall(usize, Option<Arc<File>>),
    /// Answered when nothing uses the old memory any more.
    SetMemory(Option<Arc<SharedMemory>>, SyncSender<()>),
    /// Take no more requests. Answered with the number of running rings, when nothing is in flight.
    Pause(SyncSender<usize>),
    /// Only while paused: go over to another image. Answered when the old one is not used any more.
    SetImage(Arc<Image>, Vec<Arc<HostFile>>, SyncSender<()>),
    Resume,
    Exit,
}

struct Shared {
    messages: SegQueue<Message>,
    doorbell: Arc<Doorbell>,
    stats: CachePadded<WorkerStats>,
    /// Cache counters of the engine's workers that this one has had, the present one last.
    cache_counters: Mutex<Vec<Arc<CacheCounters>>>,
    /// The thread has ended; nobody will answer.
    gone: AtomicBool,
}

/// Sends messages to a worker.
#[derive(Clone)]
pub(super) struct WorkerHandle {
    shared: Arc<Shared>,
}

impl WorkerHandle {
    fn send(&self, message: Message) {
        self.shared.messages.push(message);
        self.shared.doorbell.ring();
    }

    fn wait<T>(&self, answer: &Receiver<T>) -> Option<T> {
        loop {
            match answer.recv_timeout(ALIVE_INTERVAL) {
                Ok(value) => return Some(value),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    if self.shared.gone.load(Ordering::Acquire) {
                        // It may have answered just before.
                        return answer.try_recv().ok();
                    }
                }
            }
        }
    }

    pub(super) fn start_ring(&self, setup: RingSetup) -> Result<(), RingError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Start(setup, reply));
        self.wait(&answer).unwrap_or(Err(RingError::WorkerGone))
    }

    /// Position reached, once nothing of the ring is in flight.
    pub(super) fn stop_ring(&self, queue_index: usize) -> Option<u16> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Stop(queue_index, reply));
        self.wait(&answer)
    }

    pub(super) fn set_kick(&self, queue_index: usize, kick: Option<Arc<File>>) {
        self.send(Message::SetKick(queue_index, kick));
    }

    pub(super) fn set_call(&self, queue_index: usize, call: Option<Arc<File>>) {
        self.send(Message::SetCall(queue_index, call));
    }

    pub(super) fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
    }

    pub(super) fn exit(&self) {
        self.send(Message::Exit);
    }

    pub(super) fn stats(&self) -> &WorkerStats {
        &self.shared.stats
    }

    /// Cache counters, over all images that were served.
    pub(super) fn cache_stats(&self) -> CacheStats {
        let mut sum = CacheStats::default();
        for stats in self.shared.lock_counters().iter().map(|one| one.stats()) {
            sum.hits += stats.hits;
            sum.misses += stats.misses;
            sum.put_table_hits += stats.put_table_hits;
        }
        sum
    }
}

impl Shared {
    fn lock_counters(&self) -> MutexGuard<'_, Vec<Arc<CacheCounters>>> {
        // Only whole values are stored under this lock.
        self.cache_counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives all workers another generation of guest memory; returns when none uses the old one.
pub(super) fn set_memory(workers: &[WorkerHandle], memory: Option<&Arc<SharedMemory>>) {
    ask_all(workers, |reply| Message::SetMemory(memory.cloned(), reply));
}

/// Stops all workers between two requests; returns how many rings run, when nothing is in flight
/// on any of them. They still start and stop rings, and go over to other guest memory.
pub(super) fn pause(workers: &[WorkerHandle]) -> usize {
    ask_all(workers, Message::Pause).into_iter().flatten().sum()
}

/// Lets workers go on that are paused.
pub(super) fn resume(workers: &[WorkerHandle]) {
    for worker in workers {
        worker.send(Message::Resume);
    }
}

/// Gives all workers, which are paused, another image; returns when none uses the old one.
pub(super) fn set_image(workers: &[WorkerHandle], image: &Arc<Image>, files: &[Arc<HostFile>]) {
    let message = |reply| Message::SetImage(Arc::clone(image), files.to_vec(), reply);
    ask_all(workers, message);
}

/// Sends each worker a message, then waits for all answers. `None`: the worker has ended, and its
/// ring was drained with it.
fn ask_all<T>(
    workers: &[WorkerHandle],
    message: impl Fn(SyncSender<T>) -> Message,
) -> Vec<Option<T>> {
    let answers: Vec<_> = workers
        .iter()
        .map(|worker| {
            let (reply, answer) = mpsc::sync_channel(1);
            worker.send(message(reply));
            answer
        })
        .collect();
    workers
        .iter()
        .zip(answers)
        .map(|(worker, answer)| worker.wait(&answer))
        .collect()
}

/// Starts worker `number`; returns when its ring exists. `on_end` runs when the thread ends.
pub(super) fn spawn(
    number: usize,
    parts: WorkerParts,
    on_end: impl FnOnce() + Send + 'static,
) -> Result<(WorkerHandle, std::thread::JoinHandle<()>), DeviceError> {
    let doorbell = Arc::new(Doorbell::new().map_err(DeviceError::system("make an eventfd"))?);
    let shared = Arc::new(Shared {
        messages: SegQueue::new(),
        doorbell,
        stats: CachePadded::default(),
        cache_counters: Mutex::default(),
        gone: AtomicBool::new(false),
    });
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

/// One request in flight.
struct Slot {
    buffers: Buffers,
    /// Which of the worker's vrings it came from.
    position: usize,
    head: u16,
    kind: OperationKind,
    /// Offset on the virtual disk, for reads and writes.
    offset: u64,
    /// Bytes that a device-to-driver buffer receives, without the status byte.
    written: u64,
    /// What is counted as moved.
    bytes: u64,
    started: Instant,
    /// Host operations not yet reaped.
    outstanding: u32,
    /// A host operation failed, was short, or could not be started.
    direct_failed: bool,
    /// Held while direct I/O uses host clusters.
    pin: Option<PinGuard>,
}

impl Slot {
    fn new(now: Instant) -> Self {
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

    /// Takes one request and starts it. False if the ring gave none.
    fn begin(&mut self, position: usize, pin: &PinGuard) -> bool {
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
    fn end_direct(&mut self, slot_index: u32) {
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

/// Whether to poll before sleeping: for the whole window while most waits end within it, otherwise
/// not at all, since a poll that ends too early is for nothing.
struct PollWindow {
    max: Duration,
    /// Polls while positive. Negative: so many more waits have to look short.
    credit: i32,
}

impl PollWindow {
    fn new(max: Duration) -> Self {
        Self { max, credit: 0 }
    }

    fn is_open(&self) -> bool {
        self.credit > 0
    }

    fn window(&self) -> Duration {
        if self.is_open() {
            self.max
        } else {
            Duration::ZERO
        }
    }

    /// A wait has ended while polling.
    fn hit(&mut self) {
        self.credit = (self.credit + 1).min(POLL_CREDIT_MAX);
    }

    /// A wait of this length, polling and sleep together, has ended in sleep.
    fn slept(&mut self, waited: Duration) {
        if self.is_open() {
            self.credit -= POLL_MISS_COST;
            if !self.is_open() {
                self.credit = -POLL_PAUSE;
            }
        } else if waited <= self.max + WAKE_UP {
            self.credit += 1;
        } else {
            self.credit = -POLL_PAUSE;
        }
    }
}

/// Keeps a failing host from filling the log.
#[derive(Default)]
struct ErrorLog {
    last: std::cell::Cell<Option<Instant>>,
}

impl ErrorLog {
    /// Logs a failed request. True when it is one for the administrator, and not too soon after
    /// the last.
    fn report(&self, what: &str, error: &engine::Error) -> bool {
        let now = Instant::now();
        let quiet = self
            .last
            .get()
            .is_some_and(|last| now.saturating_duration_since(last) < ERROR_LOG_INTERVAL);
        let level = if quiet {
            log::Level::Debug
        } else {
            level_of(error)
        };
        if level < log::Level::Debug {
            self.last.set(Some(now));
        }
        log!(level, "{what} failed: {}", error.chain());
        level < log::Level::Debug
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were_made() {
        assert!(matches!(
            token::decode(token::request(255, 1 << 30)),
            token::Token::Request { slot: 255, len } if len == 1 << 30
        ));
        assert!(matches!(
            token::decode(token::kick(63)),
            token::Token::Kick { position: 63 }
        ));
        assert!(matches!(
            token::decode(token::DOORBELL),
            token::Token::Doorbell
        ));
    }

    const MAX: Duration = Duration::from_micros(50);
    const SHORT: Duration = Duration::from_micros(20);
    const LONG: Duration = Duration::from_millis(10);

    fn open_window() -> PollWindow {
        let mut poll = PollWindow::new(MAX);
        poll.slept(SHORT);
        assert_eq!(poll.window(), MAX);
        poll
    }

    #[test]
    fn a_wait_that_only_the_wake_up_made_long_opens_the_poll_window() {
        let mut poll = PollWindow::new(MAX);
        poll.slept(MAX + WAKE_UP);
        assert_eq!(poll.window(), MAX);
    }

    #[test]
    fn long_waits_never_open_the_poll_window() {
        let mut poll = PollWindow::new(MAX);
        for _ in 0..100 {
            poll.slept(LONG);
            assert!(poll.window().is_zero());
        }
    }

    #[test]
    fn polls_in_vain_close_the_poll_window_for_a_while() {
        let mut poll = open_window();
        poll.slept(MAX + SHORT);
        for _ in 0..POLL_PAUSE {
            assert!(poll.window().is_zero());
            poll.slept(SHORT);
        }
        assert!(poll.window().is_zero());
        poll.slept(SHORT);
        assert_eq!(poll.window(), MAX);
    }

    #[test]
    fn the_poll_window_stays_open_through_a_rare_long_wait() {
        let mut poll = open_window();
        for _ in 0..20 {
            for _ in 0..5 {
                poll.hit();
            }
            poll.slept(LONG);
            assert_eq!(poll.window(), MAX);
        }
    }

    #[test]
    fn a_driver_that_goes_quiet_costs_a_few_polls() {
        let mut poll = open_window();
        for _ in 0..1000 {
            poll.hit();
        }
        let polls = (0..1000)
            .filter(|_| {
                let open = !poll.window().is_zero();
                poll.slept(LONG);
                open
            })
            .count();
        assert!(polls <= 8, "{polls} polls in vain");
    }

    #[test]
    fn a_limit_of_zero_switches_polling_off() {
        let mut poll = PollWindow::new(Duration::ZERO);
        poll.slept(Duration::ZERO);
        assert!(poll.window().is_zero());
    }
}
