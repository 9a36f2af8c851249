//! A worker as other threads know it: messages that it answers when it can, and counters.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_queue::SegQueue;
use crossbeam_utils::CachePadded;

use crate::device::error::RingError;
use crate::device::executor::Doorbell;
use crate::device::guest_buf::SharedMemory;
use crate::device::stats::WorkerStats;
use crate::device::vring::RingSetup;
use crate::engine::{CacheCounters, CacheStats, Image};
use crate::storage::HostFile;

/// A waiting control thread looks this often whether the worker still lives.
const ALIVE_INTERVAL: Duration = Duration::from_millis(100);

/// What others ask of a worker.
pub(super) enum Message {
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

pub(super) struct Shared {
    pub(super) messages: SegQueue<Message>,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) stats: CachePadded<WorkerStats>,
    /// Cache counters of the engine's workers that this one has had, the present one last.
    cache_counters: Mutex<Vec<Arc<CacheCounters>>>,
    /// The thread has ended; nobody will answer.
    pub(super) gone: AtomicBool,
}

/// Sends messages to a worker.
#[derive(Clone)]
pub(in crate::device) struct WorkerHandle {
    pub(super) shared: Arc<Shared>,
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

    pub(in crate::device) fn start_ring(&self, setup: RingSetup) -> Result<(), RingError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Start(setup, reply));
        self.wait(&answer).unwrap_or(Err(RingError::WorkerGone))
    }

    /// Position reached, once nothing of the ring is in flight.
    pub(in crate::device) fn stop_ring(&self, queue_index: usize) -> Option<u16> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Stop(queue_index, reply));
        self.wait(&answer)
    }

    pub(in crate::device) fn set_kick(&self, queue_index: usize, kick: Option<Arc<File>>) {
        self.send(Message::SetKick(queue_index, kick));
    }

    pub(in crate::device) fn set_call(&self, queue_index: usize, call: Option<Arc<File>>) {
        self.send(Message::SetCall(queue_index, call));
    }

    pub(in crate::device) fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
    }

    pub(in crate::device) fn exit(&self) {
        self.send(Message::Exit);
    }

    pub(in crate::device) fn stats(&self) -> &WorkerStats {
        &self.shared.stats
    }

    /// Cache counters, over all images that were served.
    pub(in crate::device) fn cache_stats(&self) -> CacheStats {
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
    /// What a worker that is about to start shares with the others.
    pub(super) fn new(doorbell: Arc<Doorbell>) -> Shared {
        Shared {
            messages: SegQueue::new(),
            doorbell,
            stats: CachePadded::default(),
            cache_counters: Mutex::default(),
            gone: AtomicBool::new(false),
        }
    }

    pub(super) fn lock_counters(&self) -> MutexGuard<'_, Vec<Arc<CacheCounters>>> {
        // Only whole values are stored under this lock.
        self.cache_counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives all workers another generation of guest memory; returns when none uses the old one.
pub(in crate::device) fn set_memory(workers: &[WorkerHandle], memory: Option<&Arc<SharedMemory>>) {
    ask_all(workers, |reply| Message::SetMemory(memory.cloned(), reply));
}

/// Stops all workers between two requests; returns how many rings run, when nothing is in flight
/// on any of them. They still start and stop rings, and go over to other guest memory.
pub(in crate::device) fn pause(workers: &[WorkerHandle]) -> usize {
    ask_all(workers, Message::Pause).into_iter().flatten().sum()
}

/// Lets workers go on that are paused.
pub(in crate::device) fn resume(workers: &[WorkerHandle]) {
    for worker in workers {
        worker.send(Message::Resume);
    }
}

/// Gives all workers, which are paused, another image; returns when none uses the old one.
pub(in crate::device) fn set_image(
    workers: &[WorkerHandle],
    image: &Arc<Image>,
    files: &[Arc<HostFile>],
) {
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
