//! The settler: the thread that takes snapshots and does the background work that they leave.
//!
//! It has its own io_uring and its own worker of the engine, takes orders from the main thread over a
//! channel, and tells what became of them, and of the work, as [`News`]. Between orders it does the
//! work piece by piece, at the pace that [`Pace`] allows, or at the rate that a client has set. It is
//! never on a request's path.
//!
//! An error of the work is told; it is tried again after [`RETRY_INTERVAL`]. When the image has failed
//! nothing is tried any more. After [`Task::Finish`] the work goes on without a pause, and the thread
//! ends with it, or with its first error.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, debug, error, info, log, warn};

use super::chain::Chain;
use super::external;
use super::pace::{Load, Pace, pause_for_speed};
use super::revert;
use super::{DaemonError, system};
use crate::config::ImageConfig;
use crate::control::{Order, Overlay, SnapshotAction, Ticket};
use crate::device::Pauser;
use crate::engine::{
    BackgroundStatus, Created, Error, ErrorKind, Image, NewSnapshot, Selector, SnapshotInfo, Step,
    Worker,
};
use crate::storage::{Ring, RingError, RingStorage};

/// Operations in flight at a time.
const RING_ENTRIES: u32 = 64;
/// How often a wake-up from another thread is looked for while an order or a piece of work waits.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// After an error, when to try again.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// So many pieces of work may be waiting; a command that adds another waits until there are fewer.
/// Each holds a copy of the L1 table, and keeps what the guest gives up from being used again.
const WORK_MAX: usize = 32;
/// Longer than anybody waits, and safe to add to the present.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// What the main thread asks of the settler.
#[derive(Debug)]
pub(super) enum Task {
    /// Carry this out; the answer is for the ticket.
    Order(Ticket, Order),
    /// Write metadata back and free clusters: there is much of it.
    WriteBack,
    /// Limit the work of this number to so many bytes a second; 0 lifts the limit.
    Speed(u64, u64),
    /// Do what is left at full speed, and end.
    Finish,
}

/// What an order has led to.
#[derive(Debug)]
pub(super) enum Answer {
    /// The snapshots are there.
    Created,
    /// This one is not there any more.
    Deleted(SnapshotInfo),
    /// The disk is what it was in this one.
    Reverted(SnapshotInfo),
}

/// What the settler tells the main thread.
#[derive(Debug)]
pub(super) enum News {
    /// What became of an order. The order comes back with the error, for its words.
    Answered(Ticket, Result<Answer, (Order, Error)>),
    /// Another image is served now; it counts its work anew.
    Serving(Arc<Chain>),
    /// There is a new piece of work.
    Queued(BackgroundStatus),
    /// A piece of work has begun, or goes on after an error.
    Running(u64),
    /// A piece of work met an error, and will be tried again.
    Stopped(u64, Failure),
    /// A piece of work is done.
    Done(BackgroundStatus),
    /// No work will be done any more.
    GivenUp(Failure),
    /// The thread has ended.
    Ended,
}

/// An error of the work.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) no_space: bool,
    pub(super) message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            no_space: error.kind() == ErrorKind::NoSpace,
            message: error.chain(),
        }
    }
}

/// Where news go: a queue, and whatever wakes the main thread.
pub(super) type Tell = Box<dyn Fn(News) + Send>;
/// Reads the device's counters.
pub(super) type Meter = Box<dyn Fn() -> Load + Send>;

/// Puts the events of an image where they belong.
pub(super) type Watch = Box<dyn Fn(&Image) + Send>;

/// What is served, and what it takes to serve something else.
pub(super) struct Service {
    pub(super) chain: Arc<Chain>,
    pub(super) config: ImageConfig,
    pub(super) pauser: Pauser,
    pub(super) watch: Watch,
    /// Somebody may ask for snapshots: what that needs is found out when there is nothing else to do.
    pub(super) looks_ahead: bool,
}

/// A settler at work.
#[derive(Debug)]
pub(super) struct Settler {
    tasks: Arc<Sender<Task>>,
    thread: JoinHandle<Result<(), Error>>,
}

impl Settler {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread or no io_uring could be had.
    pub(super) fn start(service: Service, meter: Meter, tell: Tell) -> Result<Self, DaemonError> {
        let (tasks, receiver) = mpsc::channel();
        let tasks = Arc::new(tasks);
        let own_tasks = Arc::downgrade(&tasks);
        let (started, starting) = mpsc::channel();
        let work = move || {
            let files = service.chain.files();
            let storage = Ring::new(RING_ENTRIES)
                .and_then(|ring| RingStorage::new(ring, files).map_err(RingError::Io));
            let storage = match storage {
                Ok(storage) => storage,
                Err(error) => {
                    // The other side waits for it.
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let tell = Ending(tell);
            let _ = started.send(Ok(()));
            let mut settling = Settling {
                worker: service.chain.image.background_worker(storage),
                service,
                tasks: receiver,
                own_tasks,
                told: &tell.0,
                meter,
                pace: Pace::default(),
                speeds: HashMap::new(),
                queued_last: 0,
                running: None,
                owed: Vec::new(),
                waiting: VecDeque::new(),
                failed: false,
            };
            settling.run()
        };
        let thread = std::thread::Builder::new()
            .name("settler".to_owned())
            .spawn(work)
            .map_err(system("start the settler's thread"))?;
        match starting.recv() {
            Ok(Ok(())) => Ok(Self { tasks, thread }),
            Ok(Err(error)) => Err(DaemonError::IoUring(error)),
            Err(error) => Err(system("start the settler's thread")(io::Error::other(
                error,
            ))),
        }
    }

    /// Hands over a task. The thread ends only after [`Task::Finish`], and says so.
    pub(super) fn send(&self, task: Task) {
        if let Err(error) = self.tasks.send(task) {
            error!("the settler is gone, and did not do: {:?}", error.0);
        }
    }

    /// Waits for the end of a thread that was told to finish.
    ///
    /// # Errors
    /// The error that has left work undone.
    pub(super) fn join(self) -> Result<(), Error> {
        self.thread.join().unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Failed,
                "the settler's thread has panicked",
            ))
        })
    }
}

/// Tells of the end, however it comes.
struct Ending(Tell);

impl Drop for Ending {
    fn drop(&mut self) {
        (self.0)(News::Ended);
    }
}

/// An answer that waits for work: on version 2 a snapshot is there when it is settled.
struct Owed {
    ticket: Ticket,
    order: Order,
    /// The work that is not done yet.
    works: Vec<u64>,
}

/// The thread's own.
struct Settling<'a> {
    service: Service,
    worker: Rc<Worker<RingStorage>>,
    tasks: Receiver<Task>,
    /// For tasks that the image gives.
    own_tasks: Weak<Sender<Task>>,
    told: &'a Tell,
    meter: Meter,
    pace: Pace,
    speeds: HashMap<u64, u64>,
    /// The highest number of work that was told.
    queued_last: u64,
    /// The work at hand, as it was told.
    running: Option<u64>,
    owed: Vec<Owed>,
    /// Orders that wait for less work, oldest first.
    waiting: VecDeque<(Ticket, Order)>,
    /// The image takes no more writes, and this was told.
    failed: bool,
}

/// What to do after a piece of work.
enum Next {
    /// The next piece, after a pause. Bytes and time of the last one are known for a change of speed.
    Work {
        bytes: u64,
        took: Duration,
        polite: Duration,
    },
    /// Try again later.
    Retry,
    /// Nothing: wait for a task.
    Sleep,
}

impl Settling<'_> {
    fn tell(&self, news: News) {
        (self.told)(news);
    }

    fn run(&mut self) -> Result<(), Error> {
        self.watch_write_back();
        self.pace.idle((self.meter)());
        let mut next = self.new_work(Next::Sleep);
        if self.service.looks_ahead && matches!(next, Next::Sleep) {
            self.pace.begin((self.meter)());
            next = Next::Work {
                bytes: 0,
                took: Duration::ZERO,
                polite: Duration::ZERO,
            };
        }
        let mut since = Instant::now();
        loop {
            if let Some((ticket, order)) = self.next_order(&next) {
                self.carry_out(ticket, order);
                next = self.new_work(next);
                continue;
            }
            match self.wait(&next, since) {
                Ok(Task::Order(ticket, order)) => self.waiting.push_back((ticket, order)),
                Ok(Task::WriteBack) => self.write_back(),
                Ok(Task::Speed(number, speed)) => {
                    self.speeds.insert(number, speed);
                }
                // Whoever does not listen any more has no further tasks.
                Ok(Task::Finish) | Err(RecvTimeoutError::Disconnected) => return self.finish(),
                Err(RecvTimeoutError::Timeout) => {
                    next = self.work();
                    since = Instant::now();
                }
            }
        }
    }

    /// Has the image say when its metadata wants to be written.
    fn watch_write_back(&self) {
        let tasks = Weak::clone(&self.own_tasks);
        self.worker.image().set_write_back_sink(move || {
            // Whoever does not listen any more is on the way out, and writes everything.
            if let Some(tasks) = tasks.upgrade() {
                let _ = tasks.send(Task::WriteBack);
            }
        });
    }

    fn write_back(&self) {
        if let Err(error) = drive(&self.worker, self.worker.write_back_in_background()) {
            let failed = self.worker.image().has_failed();
            // Then it has told itself.
            let level = if failed { Level::Debug } else { Level::Warn };
            log!(level, "cannot write metadata back: {}", error.chain());
        }
    }

    /// The order to carry out now: the oldest, unless too much work waits and goes on. Meanwhile the
    /// work keeps its pace, and everything else that is asked for is done.
    fn next_order(&mut self, next: &Next) -> Option<(Ticket, Order)> {
        let goes_on = matches!(next, Next::Work { .. });
        if goes_on && !self.waiting.is_empty() && self.is_crowded() {
            return None;
        }
        self.waiting.pop_front()
    }

    fn is_crowded(&self) -> bool {
        self.worker.image().background().len() >= WORK_MAX
    }

    /// Waits for a task, or until it is time to work.
    fn wait(&mut self, next: &Next, since: Instant) -> Result<Task, RecvTimeoutError> {
        let pause = match next {
            Next::Work {
                bytes,
                took,
                polite,
            } => match self.running.and_then(|number| self.speeds.get(&number)) {
                Some(speed) if *speed > 0 => pause_for_speed(*bytes, *took, *speed),
                _ => *polite,
            },
            Next::Retry => RETRY_INTERVAL,
            Next::Sleep => FOREVER,
        };
        let left = pause.min(FOREVER).saturating_sub(since.elapsed());
        if left.is_zero() {
            return match self.tasks.try_recv() {
                Ok(task) => Ok(task),
                Err(mpsc::TryRecvError::Empty) => Err(RecvTimeoutError::Timeout),
                Err(mpsc::TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
            };
        }
        if !matches!(next, Next::Work { .. }) {
            return self.tasks.recv_timeout(left);
        }
        match self.tasks.recv_timeout(left / 2) {
            Err(RecvTimeoutError::Timeout) => {}
            other => return other,
        }
        let from = (self.meter)();
        let task = self.tasks.recv_timeout(left - left / 2);
        self.pace.rested(left, from, (self.meter)());
        task
    }

    /// Does one piece of work.
    fn work(&mut self) -> Next {
        self.announce();
        let (from, start) = ((self.meter)(), Instant::now());
        let mut step = drive(&self.worker, self.worker.background_step());
        if matches!(step, Ok(Step::Idle)) && self.service.looks_ahead {
            step = drive(&self.worker, self.worker.look_ahead()).or_else(|error| {
                // The command that needs it says so.
                debug!("cannot look ahead: {}", error.chain());
                Ok(Step::Idle)
            });
        }
        match step {
            Ok(Step::Progress { bytes }) => {
                let took = start.elapsed();
                let polite = self.pace.worked(took, from, (self.meter)());
                debug!("a step took {took:?}, then a pause of {polite:?}");
                Next::Work {
                    bytes,
                    took,
                    polite,
                }
            }
            Ok(Step::Done(status)) => {
                self.done(status);
                Next::Work {
                    bytes: 0,
                    took: Duration::ZERO,
                    polite: Duration::ZERO,
                }
            }
            Ok(Step::Clean) => {
                info!("the background work is done, the image is clean");
                Next::Work {
                    bytes: 0,
                    took: Duration::ZERO,
                    polite: Duration::ZERO,
                }
            }
            Ok(Step::Idle) => {
                self.pace.idle((self.meter)());
                Next::Sleep
            }
            Err(error) => self.met(&error),
        }
    }

    /// Tells what the next piece of work belongs to, if that is news.
    fn announce(&mut self) {
        let first = self.worker.image().background().into_iter().next();
        let first = first.map(|status| status.number);
        if first != self.running {
            self.running = first;
            if let Some(number) = first {
                self.tell(News::Running(number));
            }
        }
    }

    fn done(&mut self, status: BackgroundStatus) {
        let number = status.number;
        self.speeds.remove(&number);
        self.running = None;
        self.tell(News::Done(status));
        let mut settled = Vec::new();
        for owed in &mut self.owed {
            owed.works.retain(|work| *work != number);
            if owed.works.is_empty() {
                settled.push(owed.ticket);
            }
        }
        self.owed.retain(|owed| !owed.works.is_empty());
        for ticket in settled {
            self.tell(News::Answered(ticket, Ok(Answer::Created)));
        }
    }

    /// An error of the work. Whoever waits for it is told now; the work itself is not lost.
    fn met(&mut self, error: &Error) -> Next {
        let failure = Failure::from(error);
        let failed = self.worker.image().has_failed();
        for owed in std::mem::take(&mut self.owed) {
            let text = if failed {
                "it could not be settled"
            } else {
                "it is not settled yet, and will be tried again"
            };
            let error = Error::new(error.kind(), format!("{text}: {}", failure.message));
            self.tell(News::Answered(owed.ticket, Err((owed.order, error))));
        }
        if failed {
            self.give_up(failure);
            return Next::Sleep;
        }
        warn!("background work: {}; it is tried again", failure.message);
        if let Some(number) = self.running.take() {
            self.tell(News::Stopped(number, failure));
        }
        Next::Retry
    }

    fn give_up(&mut self, failure: Failure) {
        if !std::mem::replace(&mut self.failed, true) {
            error!("background work is given up: {}", failure.message);
            self.tell(News::GivenUp(failure));
        }
    }

    /// Does what is left, without a pause.
    fn finish(&mut self) -> Result<(), Error> {
        // Orders that came before the end was known are refused by the image, or carried out.
        while let Ok(task) = self.tasks.try_recv() {
            if let Task::Order(ticket, order) = task {
                self.waiting.push_back((ticket, order));
            }
        }
        while let Some((ticket, order)) = self.waiting.pop_front() {
            while self.is_crowded() && matches!(self.work(), Next::Work { .. }) {}
            self.carry_out(ticket, order);
            self.new_work(Next::Sleep);
        }
        self.work_off()
    }

    /// Does all work that there is, without a pause; of an image that has failed, none.
    fn work_off(&mut self) -> Result<(), Error> {
        self.new_work(Next::Sleep);
        loop {
            if self.worker.image().has_failed() {
                // That was told when it happened.
                return Ok(());
            }
            self.announce();
            match drive(&self.worker, self.worker.background_step()) {
                Ok(Step::Idle) => return Ok(()),
                Ok(Step::Progress { .. } | Step::Clean) => {}
                Ok(Step::Done(status)) => self.done(status),
                Err(error) => {
                    self.met(&error);
                    return Err(error);
                }
            }
        }
    }

    /// Tells of work that is new. Returns what to do next, which was `next`.
    fn new_work(&mut self, next: Next) -> Next {
        let mut any = false;
        for status in self.worker.image().background() {
            if status.number > self.queued_last {
                self.queued_last = status.number;
                any = true;
                self.tell(News::Queued(status));
            }
        }
        match next {
            Next::Sleep if any && !self.failed => {
                self.pace.begin((self.meter)());
                Next::Work {
                    bytes: 0,
                    took: Duration::ZERO,
                    polite: Duration::ZERO,
                }
            }
            next => next,
        }
    }

    fn carry_out(&mut self, ticket: Ticket, order: Order) {
        let result = match &order {
            Order::Snapshot(actions) => match &actions[..] {
                [SnapshotAction::External(overlay)] => {
                    self.overlay(overlay).map(|()| Answer::Created)
                }
                actions => match self.snapshot(actions) {
                    Ok(created) => {
                        let unsettled = created.iter().filter(|created| !created.durable);
                        let works: Vec<_> = unsettled.map(|created| created.work).collect();
                        if !works.is_empty() {
                            self.owed.push(Owed {
                                ticket,
                                order,
                                works,
                            });
                            return;
                        }
                        Ok(Answer::Created)
                    }
                    Err(error) => Err(error),
                },
            },
            Order::DeleteSnapshot(selector) => self.delete(selector).map(Answer::Deleted),
            Order::RevertSnapshot(selector) => self.revert(selector).map(Answer::Reverted),
        };
        self.tell(News::Answered(
            ticket,
            result.map_err(|error| (order, error)),
        ));
    }

    /// Takes an external snapshot, and goes over to the new image.
    fn overlay(&mut self, overlay: &Overlay) -> Result<(), Error> {
        // Nobody works on a backing file.
        self.work_off()?;
        self.drain()?;
        let Service {
            chain,
            config,
            pauser,
            watch,
            ..
        } = &self.service;
        let chain = external::take(chain, config, pauser, overlay, watch)?;
        self.go_over(chain);
        Ok(())
    }

    /// Goes back to an internal snapshot.
    fn revert(&mut self, selector: &Selector) -> Result<SnapshotInfo, Error> {
        // Before the part that may take long; what counts is asked again.
        let Service { chain, pauser, .. } = &self.service;
        drop(revert::Unused::stop(chain, pauser, selector)?);
        self.work_off()?;
        self.drain()?;
        let Service {
            chain,
            config,
            pauser,
            watch,
            ..
        } = &self.service;
        let reverted = revert::take(chain, config, pauser, selector, watch)?;
        self.go_over(reverted.chain);
        let snapshot = reverted.result?;
        info!(
            "the disk is what it was in snapshot '{}' (id {})",
            snapshot.name, snapshot.id
        );
        Ok(snapshot)
    }

    /// Waits for what a future that was dropped has left behind: it names files of the old chain.
    fn drain(&self) -> Result<(), Error> {
        let ring = self.worker.storage().ring();
        while ring.io_in_flight() > 0 {
            ring.submit_and_wait(1, Some(POLL_INTERVAL))
                .map_err(|source| Error::io("cannot wait for host I/O", source))?;
            ring.reap(|_, _| {});
        }
        Ok(())
    }

    /// Works on another image from now on. The ring is drained.
    fn go_over(&mut self, chain: Chain) {
        let chain = Arc::new(chain);
        let ring = self.worker.storage().ring().clone();
        let storage = RingStorage::replace(ring, chain.files());
        self.worker = chain.image.background_worker(storage);
        self.service.chain = Arc::clone(&chain);
        self.speeds.clear();
        self.queued_last = 0;
        self.running = None;
        self.watch_write_back();
        self.tell(News::Serving(chain));
    }

    fn snapshot(&self, actions: &[SnapshotAction]) -> Result<Vec<Created>, Error> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let new: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                SnapshotAction::Internal { name } => Some(name),
                SnapshotAction::External(_) => None,
            })
            .map(|name| NewSnapshot {
                name: name.clone(),
                // The format's own limit: seconds end in the year 2106.
                date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                date_nsec: now.subsec_nanos(),
                vm_clock_nsec: 0,
            })
            .collect();
        let created = drive(&self.worker, self.worker.create_snapshots(&new))?;
        for Created { snapshot, .. } in &created {
            info!("snapshot '{}' (id {}) taken", snapshot.name, snapshot.id);
        }
        Ok(created)
    }

    fn delete(&self, selector: &Selector) -> Result<SnapshotInfo, Error> {
        let (snapshot, _) = drive(&self.worker, self.worker.delete_snapshot(selector))?;
        info!("snapshot '{}' (id {}) deleted", snapshot.name, snapshot.id);
        Ok(snapshot)
    }
}

/// Runs a future of this thread to its end. Completions of the ring wake it at once; a wake-up from
/// another thread is seen within [`POLL_INTERVAL`].
fn drive<T>(
    worker: &Worker<RingStorage>,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let ring = worker.storage().ring();
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        ring.submit_and_wait(1, Some(POLL_INTERVAL))
            .map_err(|source| Error::io("cannot wait for host I/O", source))?;
        ring.reap(|_, _| {});
    }
}
