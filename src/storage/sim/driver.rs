//! The scheduler of a simulation: runs tasks and completes operations, in an order drawn from a seed.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, PoisonError};
use std::task::Context;

use fastrand::Rng;

use super::disk::SimDisk;
use super::task::{JoinHandle, Task, WokenQueue};

/// So many steps without an end are a livelock.
const STEPS_MAX: u64 = 20_000_000;

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All tasks that count are done (or the condition asked for came true).
    Done,
    /// The power is off.
    PowerCut,
    /// Nothing can progress: everything waits for held operations, or for ever.
    Stuck,
}

/// A seeded single-threaded executor of tasks and of one disk's operations: at each step one random
/// runnable task is polled, or one random operation in flight progresses.
pub struct Driver {
    seed: u64,
    rng: Rng,
    disk: SimDisk,
    tasks: Vec<Option<Task>>,
    runnable: BTreeSet<usize>,
    woken: WokenQueue,
    steps: u64,
}

impl Driver {
    /// A driver of `disk`; the seed is named in every panic message.
    pub fn new(seed: u64, disk: &SimDisk) -> Driver {
        Driver {
            seed,
            rng: Rng::with_seed(seed ^ 0x5eed_d21e),
            disk: disk.clone(),
            tasks: Vec::new(),
            runnable: BTreeSet::new(),
            woken: Arc::default(),
            steps: 0,
        }
    }

    /// Adds a task that `run` waits for.
    pub fn spawn<F: Future + 'static>(&mut self, future: F) -> JoinHandle<F::Output> {
        self.add(future, false)
    }

    /// Adds a task that `run` does not wait for.
    pub fn spawn_background<F: Future + 'static>(&mut self, future: F) -> JoinHandle<F::Output> {
        self.add(future, true)
    }

    fn add<F: Future + 'static>(&mut self, future: F, background: bool) -> JoinHandle<F::Output> {
        let index = self.tasks.len();
        let (task, handle) = Task::new(index, &self.woken, future, background);
        self.tasks.push(Some(task));
        self.runnable.insert(index);
        handle
    }

    /// Runs until every task is done or the power is off.
    ///
    /// # Panics
    /// With the seed and the latest operations, if nothing can progress.
    pub fn run(&mut self) -> Outcome {
        let outcome = self.run_until_stuck();
        assert!(outcome != Outcome::Stuck, "deadlock: {}", self.story());
        outcome
    }

    /// As `run`, but gives `Stuck` back.
    pub fn run_until_stuck(&mut self) -> Outcome {
        self.run_while(|driver| driver.tasks.iter().flatten().any(|task| !task.background))
    }

    /// Runs until `condition`, or as `run_until_stuck`, whichever comes first.
    pub fn run_until(&mut self, condition: impl Fn() -> bool) -> Outcome {
        self.run_while(|_| !condition())
    }

    /// Runs one future to its end among the other tasks; `None` after a power cut.
    ///
    /// # Panics
    /// As `run`.
    pub fn block_on<F: Future + 'static>(&mut self, future: F) -> Option<F::Output> {
        let handle = self.add(future, true);
        let outcome = self.run_while(|_| !handle.is_done());
        assert!(outcome != Outcome::Stuck, "deadlock: {}", self.story());
        handle.take()
    }

    /// Completes all that is in flight, in random order, running tasks as they wake.
    pub fn drain(&mut self) -> Outcome {
        let disk = self.disk.clone();
        self.run_while(|driver| disk.can_step() || !driver.runnable.is_empty())
    }

    fn run_while(&mut self, go_on: impl Fn(&Driver) -> bool) -> Outcome {
        loop {
            self.runnable
                .append(&mut self.woken.lock().unwrap_or_else(PoisonError::into_inner));
            let tasks = &self.tasks;
            self.runnable.retain(|&index| tasks[index].is_some());
            if self.disk.is_off() {
                return Outcome::PowerCut;
            }
            if !go_on(self) {
                return Outcome::Done;
            }
            let can_step = self.disk.can_step();
            if self.runnable.is_empty() && !can_step {
                return Outcome::Stuck;
            }
            self.steps += 1;
            assert!(self.steps < STEPS_MAX, "livelock: {}", self.story());
            if can_step && (self.runnable.is_empty() || self.rng.bool()) {
                self.disk.step();
            } else {
                self.poll_one();
            }
        }
    }

    fn poll_one(&mut self) {
        let Some(index) = self.rng.choice(self.runnable.iter().copied()) else {
            return;
        };
        self.runnable.remove(&index);
        let Some(task) = self.tasks[index].as_mut() else {
            return;
        };
        let waker = task.waker.clone();
        if task
            .future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            self.tasks[index] = None;
        }
    }

    fn story(&self) -> String {
        let waiting: Vec<usize> = (0..self.tasks.len())
            .filter(|&index| self.tasks[index].is_some())
            .collect();
        format!(
            "seed {}, {} steps, tasks {waiting:?} wait, {} operations in flight\n{}",
            self.seed,
            self.steps,
            self.disk.in_flight().len(),
            self.disk.trace()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "deadlock: seed 5")]
    fn a_deadlock_panics_with_the_seed() {
        let disk = SimDisk::new(5);
        let mut driver = Driver::new(5, &disk);
        driver.spawn(std::future::pending::<()>());
        driver.run();
    }
}
