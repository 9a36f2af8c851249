//! A task of the driver: its future, who wakes it, and the handle that has its result.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Wake, Waker};

/// Tasks woken since the scheduler last looked; shared with wakers, which any thread may call.
pub(super) type WokenQueue = Arc<Mutex<BTreeSet<usize>>>;

struct TaskWaker {
    index: usize,
    woken: WokenQueue,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.index);
    }
}

pub(super) struct Task {
    pub(super) future: Pin<Box<dyn Future<Output = ()>>>,
    pub(super) waker: Waker,
    /// A run does not wait for it.
    pub(super) background: bool,
}

impl Task {
    /// Task number `index`, and where its result will be.
    pub(super) fn new<F: Future + 'static>(
        index: usize,
        woken: &WokenQueue,
        future: F,
        background: bool,
    ) -> (Task, JoinHandle<F::Output>) {
        let slot = Rc::new(RefCell::new(None));
        let done = Rc::new(Cell::new(false));
        let (result, flag) = (Rc::clone(&slot), Rc::clone(&done));
        let future = Box::pin(async move {
            let output = future.await;
            *result.borrow_mut() = Some(output);
            flag.set(true);
        });
        let waker = Waker::from(Arc::new(TaskWaker {
            index,
            woken: Arc::clone(woken),
        }));
        let task = Task {
            future,
            waker,
            background,
        };
        (task, JoinHandle { slot, done })
    }
}

/// Result of a spawned task.
pub struct JoinHandle<T> {
    slot: Rc<RefCell<Option<T>>>,
    done: Rc<Cell<bool>>,
}

impl<T> JoinHandle<T> {
    /// True once the task is done.
    pub fn is_done(&self) -> bool {
        self.done.get()
    }

    /// The task's result, once.
    pub fn take(&self) -> Option<T> {
        self.slot.borrow_mut().take()
    }
}

/// Gives other tasks a turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
