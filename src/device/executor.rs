//! The worker-local executor, and how other threads reach a sleeping worker.
//!
//! Owns the run queue of a worker's tasks ([`Executor`]) and the doorbell protocol ([`Doorbell`]).
//! Futures stay on their worker; only wake-ups cross threads.
//!
//! No wake-up is lost: the sleeper stores `asleep`, fences, and looks at its queues once more; who
//! brings work queues it, fences, and looks at `asleep`. One of the two sees the other. A worker that
//! is awake costs its wakers no system call.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use async_task::Runnable;
use crossbeam_queue::SegQueue;
use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// Wakes one worker.
#[derive(Debug)]
pub(super) struct Doorbell {
    /// The worker sleeps, or is about to.
    asleep: AtomicBool,
    /// The worker's ring reads it. Blocking, so that the read waits in the ring.
    event: EventFd,
}

impl Doorbell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            asleep: AtomicBool::new(false),
            event: EventFd::new(EFD_CLOEXEC)?,
        })
    }

    /// Call after queueing work for the worker.
    pub(super) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed)
            && self.asleep.swap(false, Ordering::AcqRel)
            && let Err(error) = self.event.write(1)
        {
            error!("cannot wake a worker: {error}");
        }
    }

    /// The worker is about to sleep. It must look at all its queues after this, and sleep only if
    /// they are empty.
    pub(super) fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The worker is awake: nobody needs to ring.
    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

thread_local! {
    /// Address of the run queue of the executor that runs on this thread; 0 if there is none.
    static HERE: Cell<usize> = const { Cell::new(0) };
}

#[derive(Debug)]
struct RunQueue {
    ready: SegQueue<Runnable>,
    doorbell: Arc<Doorbell>,
}

impl RunQueue {
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn schedule(&self, task: Runnable) {
        self.ready.push(task);
        // On its own thread the worker is awake, and looks here before it sleeps.
        if HERE.get() != self.address() {
            self.doorbell.ring();
        }
    }
}

/// Runs futures on the thread that made it.
#[derive(Debug)]
pub(super) struct Executor {
    queue: Arc<RunQueue>,
}

impl Executor {
    /// An executor for the calling thread.
    pub(super) fn new(doorbell: Arc<Doorbell>) -> Self {
        let queue = Arc::new(RunQueue {
            ready: SegQueue::new(),
            doorbell,
        });
        HERE.set(queue.address());
        Self { queue }
    }

    /// Starts a future; it runs when `run` is called next. Nobody waits for it: it reports its end
    /// itself.
    pub(super) fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let queue = Arc::clone(&self.queue);
        let (runnable, task) = async_task::spawn_local(future, move |task| queue.schedule(task));
        task.detach();
        runnable.schedule();
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.ready.is_empty()
    }

    /// Runs the tasks that are ready now; what they make ready waits for the next call, so that
    /// tasks that wake each other cannot starve the rings. True if there was any.
    pub(super) fn run(&self) -> bool {
        let ready = self.queue.ready.len();
        for _ in 0..ready {
            let Some(task) = self.queue.ready.pop() else {
                break;
            };
            task.run();
        }
        ready != 0
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // Tasks that never ran hold futures of this thread: they end here, not with the last waker.
        while let Some(task) = self.queue.ready.pop() {
            drop(task);
        }
        HERE.set(0);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::sync::mpsc;
    use std::task::{Poll, Waker};
    use std::thread;

    use super::*;

    fn executor() -> Executor {
        Executor::new(Arc::new(Doorbell::new().unwrap()))
    }

    #[test]
    fn a_task_runs_on_the_next_run_and_not_before() {
        let executor = executor();
        let ran = Rc::new(Cell::new(false));
        let seen = Rc::clone(&ran);
        executor.spawn(async move { seen.set(true) });
        assert!(!ran.get());
        assert!(executor.run());
        assert!(ran.get());
        assert!(!executor.run());
    }

    #[test]
    fn a_wake_from_another_thread_rings_a_sleeping_worker() {
        let executor = executor();
        let (send, receive) = mpsc::channel::<Waker>();
        let polls = Rc::new(RefCell::new(0));
        let counted = Rc::clone(&polls);
        executor.spawn(std::future::poll_fn(move |context| {
            *counted.borrow_mut() += 1;
            if *counted.borrow() == 2 {
                return Poll::Ready(());
            }
            send.send(context.waker().clone()).unwrap();
            Poll::Pending
        }));
        executor.run();
        executor.queue.doorbell.lie_down();
        let waker = receive.recv().unwrap();
        thread::spawn(move || waker.wake()).join().unwrap();
        // Blocks for ever if the doorbell was not rung.
        assert_eq!(executor.queue.doorbell.event.read().unwrap(), 1);
        assert!(executor.run());
        assert_eq!(*polls.borrow(), 2);
    }

    #[test]
    fn waking_a_worker_that_is_awake_writes_no_event() {
        let doorbell = Doorbell::new().unwrap();
        doorbell.ring();
        doorbell.lie_down();
        doorbell.ring();
        doorbell.ring();
        assert_eq!(doorbell.event.read().unwrap(), 1);
    }
}
