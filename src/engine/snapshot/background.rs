//! The background work of snapshots, one bounded step at a time.
//!
//! Owns the order: the first item of the queue, phase by phase; when the queue is empty, the dirty
//! bit. Does no pacing: who calls [`Worker::background_step`] waits between the steps as it likes. A
//! step that fails leaves the item where it is, and every count either changed or not, so that the
//! next step goes on there.
//!
//! Allowed outcomes of a power cut: the counts and copied flags in the file lag behind under the
//! dirty bit, which goes only when they have caught up durably. On v2 no header names a snapshot
//! whose references are not durable; a deleted one leaves leaks.

use std::sync::atomic::Ordering;

use event_listener::EventListener;

use super::alone::Alone;
#[cfg(test)]
use super::alone::AloneLimits;
use super::delete::Given;
use super::flags::{Adopt, Flags, Look, Looked};
use super::reown::Reown;
use super::walk::Walk;
use super::{BackgroundStatus, Snapshots, Task, Work};
use crate::engine::Image;
use crate::engine::allocator::Change;
use crate::engine::error::{Error, lock};
use crate::engine::order::keeps;
#[cfg(test)]
use crate::engine::order::{Gap, gap};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::header::INCOMPAT_DIRTY;
use crate::storage::Storage;

/// Runs of freed clusters that one step punches holes for.
const RECLAIMED_RUNS: usize = 64;
/// So many may wait for that before more are freed, as long as no request keeps them waiting: 512 KiB
/// of memory.
const FREED_MAX: usize = 1 << 14;

/// What a step of the background work has come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// There is nothing to do.
    Idle,
    /// Something was done.
    Progress {
        /// Bytes of metadata that were read or written for it, about.
        bytes: u64,
    },
    /// A piece of work is done and has left the queue.
    Done(BackgroundStatus),
    /// Nothing is left to do, and the file says so: the dirty bit is gone.
    Clean,
}

/// How far the work is.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// The item that `phase` is about.
    number: u64,
    phase: Phase,
    /// What the present item has found out about counts. Emptied before a phase that changes many.
    alone: Alone,
    /// Deletes whose snapshot was never settled: there is nothing to take away.
    called_off: Vec<u64>,
    /// Work was begun since the image was last clean.
    unclean: bool,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Begin,
    /// Counting everything anew.
    Rebuild,
    /// Finding out whether copied flags are right.
    Look(Look),
    /// Clearing copied flags of what is shared.
    Flags(Flags),
    /// Counting what a tree reaches.
    Walk(Walk),
    /// Taking away what unsettled snapshots had kept.
    GiveBack(Given),
    /// Owning what is in order.
    Adopt(Adopt),
    /// Finding out what is ours alone.
    Reown(Reown),
    End,
}

impl Snapshots {
    fn front(&self) -> Option<Work> {
        lock(&self.queue).items.front().cloned()
    }

    /// A later item that deletes the snapshot with this L1 table.
    fn delete_of(&self, l1_offset: u64) -> Option<u64> {
        let queue = lock(&self.queue);
        let deletes = |work: &&Work| matches!(&work.task, Task::Delete { root } if root.l1_offset == l1_offset);
        queue.items.iter().find(deletes).map(|work| work.number)
    }

    fn advance(&self, number: u64, bytes: u64) {
        if let Some(work) = lock(&self.queue).items.front_mut()
            && work.number == number
        {
            work.done = (work.done + bytes).min(work.total);
        }
    }

    /// Says how far an item is; returns the bytes since the last time.
    fn set_progress(&self, number: u64, done: u64, total: u64) -> u64 {
        let mut queue = lock(&self.queue);
        let Some(work) = queue.items.front_mut().filter(|work| work.number == number) else {
            return 0;
        };
        let before = std::mem::replace(&mut work.done, done);
        // The flags of all tables are looked at afterwards.
        work.total = total.saturating_add(work.after);
        done.saturating_sub(before)
    }

    fn finish(&self, number: u64) -> Option<BackgroundStatus> {
        let mut queue = lock(&self.queue);
        queue.items.front().filter(|work| work.number == number)?;
        let mut work = queue.items.pop_front()?;
        work.done = work.total;
        Some(work.status())
    }
}

#[cfg(test)]
impl Image {
    /// Gives the background work less memory: runs in a list, clusters in a bitmap of a walk, bytes of
    /// what is known about counts.
    pub(in crate::engine) fn limit_memory(&self, runs: usize, window: u64, alone_bytes: usize) {
        let Some(active) = &self.active else { return };
        {
            let mut limits = lock(&active.snapshots.limits);
            limits.runs = runs;
            limits.window = window;
        }
        if let Some(mut background) = active.snapshots.background.try_lock() {
            background.alone.limit(AloneLimits {
                bytes_max: alone_bytes,
                group_min: 1,
                learnt_bytes: 1,
            });
        }
    }

    /// Gives the counts of a rebuild so many bytes.
    pub(in crate::engine) fn limit_counts(&self, bytes: usize) {
        if let Some(active) = &self.active {
            lock(&active.snapshots.limits).counts_bytes = bytes;
        }
    }
}

impl<S: Storage> Worker<S> {
    /// Does a piece of the background work: some megabytes at most.
    ///
    /// Runs on a thread of its own: it waits for requests in flight by sleeping.
    ///
    /// # Errors
    /// `Io` and `NoSpace` of the host: the work is where it was, and may be tried again. `Corrupt`:
    /// the image takes no more writes. `Unsupported`: a refcount has no room for one reference more.
    pub async fn background_step(&self) -> Result<Step, Error> {
        let Some(target) = self.image.qcow2_target() else {
            return Ok(Step::Idle);
        };
        if self.image.has_failed() {
            return Err(Image::failed_error());
        }
        let mut background = target.active.snapshots.background.lock().await;
        let result = match target.active.snapshots.front() {
            Some(work) => self.work_on(target, &mut background, &work).await,
            None => self.clean_up(target, &mut background).await,
        };
        self.seen(result).await
    }

    /// Tells when work is added. Listen before the step that finds nothing to do.
    #[must_use]
    pub fn background_listen(&self) -> Option<EventListener> {
        let target = self.image.qcow2_target()?;
        Some(target.active.snapshots.work.listen())
    }

    async fn work_on(
        &self,
        target: Target<'_>,
        background: &mut Background,
        work: &Work,
    ) -> Result<Step, Error> {
        let snapshots = &target.active.snapshots;
        if background.number != work.number {
            background.number = work.number;
            background.phase = Phase::Begin;
            background.unclean |= !matches!(work.task, Task::Look);
        }
        let allocator = &target.active.allocator;
        if allocator.freed_behind() > FREED_MAX
            && allocator
                .reclaim_behind(&self.storage, RECLAIMED_RUNS)
                .await
        {
            return Ok(Step::Progress { bytes: 0 });
        }
        let mut bytes = 0;
        let Background { phase, alone, .. } = &mut *background;
        match phase {
            Phase::Begin => {
                alone.forget();
                background.phase = self.begin(target, background, work);
            }
            Phase::Rebuild => {
                let progress = self.rebuild_step(target).await?;
                bytes = snapshots.set_progress(work.number, progress.done, progress.total);
                if progress.finished {
                    background.phase = Phase::GiveBack(Given::default());
                }
            }
            Phase::Look(look) => match self.look_at_flags(target, look, alone).await? {
                Looked::On(done) => bytes = done,
                Looked::Right => background.phase = Phase::End,
                Looked::Wrong => {
                    alone.forget();
                    background.unclean = true;
                    self.share_all(target).await?;
                    background.phase = Phase::Flags(Flags::default());
                }
            },
            Phase::Flags(flags) => match self.clear_shared_flags(target, flags, alone).await? {
                Some(done) => bytes = done,
                None => {
                    alone.forget();
                    background.phase = Phase::Adopt(Adopt::default());
                }
            },
            Phase::Adopt(adopt) => match self.adopt_on(target, adopt, alone).await? {
                Some(done) => {
                    bytes = done.bytes;
                    let cluster_size = target.mapping.geometry.cluster_size();
                    snapshots.advance(work.number, done.tables * cluster_size);
                }
                None => {
                    let left = std::mem::take(adopt).into_left();
                    background.phase = Phase::Reown(Reown::of(target.mapping.l1.len(), left));
                }
            },
            Phase::Walk(walk) => {
                let change = match work.task {
                    Task::Settle { .. } => Change::Raise,
                    _ => Change::Lower { tables: false },
                };
                bytes = self.walk_on(target, walk, change).await?;
                snapshots.advance(work.number, walk.take_done());
                if walk.is_done() {
                    self.end_walk(target, &work.task).await?;
                    background.phase = Phase::GiveBack(Given::default());
                }
            }
            Phase::GiveBack(given) => match self.give_back_settled(target, given).await? {
                Some(done) => bytes = done,
                None => {
                    background.phase = match work.task {
                        Task::Settle { .. } => Phase::End,
                        Task::Rebuild => Phase::Flags(Flags::default()),
                        _ => Phase::Reown(Reown::default()),
                    };
                }
            },
            Phase::Reown(reown) => match self.reown_on(target, reown, alone).await? {
                Some(done) => {
                    bytes = done.bytes;
                    snapshots.advance(
                        work.number,
                        done.tables * target.mapping.geometry.cluster_size(),
                    );
                }
                None => background.phase = Phase::End,
            },
            Phase::End => {
                alone.forget();
                if let Some(status) = snapshots.finish(work.number)
                    && !matches!(work.task, Task::Look)
                {
                    return Ok(Step::Done(status));
                }
            }
        }
        allocator
            .reclaim_behind(&self.storage, RECLAIMED_RUNS)
            .await;
        Ok(Step::Progress { bytes })
    }

    fn begin(&self, target: Target<'_>, background: &mut Background, work: &Work) -> Phase {
        let snapshots = &target.active.snapshots;
        match &work.task {
            Task::Settle { root, key, commit } => {
                if commit.is_none()
                    && let Some(delete) = snapshots.delete_of(root.l1_offset)
                {
                    // What would be added now would be taken away again.
                    background.called_off.push(delete);
                    self.mark_settled(target, root, *key);
                    return Phase::GiveBack(Given::default());
                }
                Phase::Walk(Walk::new(root, *lock(&snapshots.limits)))
            }
            Task::Delete { root } => {
                if let Some(index) = background
                    .called_off
                    .iter()
                    .position(|number| *number == work.number)
                {
                    background.called_off.swap_remove(index);
                    self.drop_root(target, root);
                    return Phase::GiveBack(Given::default());
                }
                Phase::Walk(Walk::new(root, *lock(&snapshots.limits)))
            }
            Task::Reown => Phase::GiveBack(Given::default()),
            Task::Rebuild => Phase::Rebuild,
            Task::Look => Phase::Look(Look::default()),
        }
    }

    async fn end_walk(&self, target: Target<'_>, task: &Task) -> Result<(), Error> {
        match task {
            Task::Settle { root, key, commit } => {
                if let Some(pending) = commit {
                    // The references are durable before the header names the snapshot.
                    let allocator = &target.active.allocator;
                    allocator.write_all_lagging(&self.storage).await?;
                    self.commit_pending(target, pending).await?;
                }
                self.mark_settled(target, root, *key);
            }
            Task::Delete { root } => self.drop_root(target, root),
            Task::Reown | Task::Rebuild | Task::Look => {}
        }
        Ok(())
    }

    /// The queue is empty: what is left is made durable, and the dirty bit goes.
    async fn clean_up(
        &self,
        target: Target<'_>,
        background: &mut Background,
    ) -> Result<Step, Error> {
        let active = target.active;
        let allocator = &active.allocator;
        if allocator
            .reclaim_behind(&self.storage, RECLAIMED_RUNS)
            .await
        {
            return Ok(Step::Progress { bytes: 0 });
        }
        let mut is_dirty = false;
        active
            .header
            .update_if(&self.storage, |header| {
                is_dirty = header.incompatible & INCOMPAT_DIRTY != 0;
                false
            })
            .await?;
        let stays_dirty = active.snapshots.stay_dirty.load(Ordering::Acquire);
        if (!is_dirty || stays_dirty) && !background.unclean {
            return Ok(Step::Idle);
        }
        if keeps!(SettledBeforeClean) {
            let bytes = allocator.write_lagging(&self.storage).await?;
            if bytes > 0 {
                return Ok(Step::Progress { bytes });
            }
            // The second flush writes the counts that the first one allowed to go down.
            self.flush().await?;
            self.flush().await?;
        }
        #[cfg(test)]
        gap(Gap::Clean);
        // No command has begun, and none begins before the bit is gone: it would set it again.
        let _table = active.snapshots.table.lock().await;
        if active.snapshots.front().is_some() {
            return Ok(Step::Progress { bytes: 0 });
        }
        active
            .header
            .update_if(&self.storage, |header| {
                header.incompatible &= !INCOMPAT_DIRTY;
                is_dirty && !stays_dirty
            })
            .await?;
        background.unclean = false;
        if stays_dirty {
            return Ok(Step::Idle);
        }
        Ok(Step::Clean)
    }
}
