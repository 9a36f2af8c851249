//! Internal snapshots of a live image: freeze, commit, settle; delete; and what is left to do in
//! the background.
//!
//! To freeze is to declare every cluster of the active tree shared, by raising the generation that
//! the in-place rule compares with (`freeze`). The commit makes the snapshot durable with one write
//! of the header (`commit`), under the dirty bit: from then on the refcounts and copied flags in
//! the file lag behind, and the background work (`background`) brings them up to date: a *settle*
//! adds one reference to everything that a new snapshot reaches, a *delete* takes one away. Work is
//! done strictly in order. When nothing is left the dirty bit goes.
//!
//! While a snapshot is *unsettled*, a reference to a cluster that it may share is not taken away
//! but recorded (see [`Drops`](super::active::Drops)), and taken away once that snapshot and all
//! older ones are settled.

mod alone;
mod background;
mod commit;
mod delete;
mod flags;
mod freeze;
mod rebuild;
mod reown;
mod revert;
mod room;
mod settle;
mod table;
mod walk;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use event_listener::Event;

use super::error::lock;
use super::table::Target;
use super::{Image, LayerKind};
use crate::engine::sync::Mutex;
use crate::units::to_u64;

pub use self::background::Step;
pub use self::commit::Created;
pub(crate) use self::rebuild::Rebuild;
pub use self::revert::revert;
pub(crate) use self::table::{Table, info as snapshot_info};

/// The longest name that QEMU's tools can pick a snapshot by, in bytes. Images of others may hold
/// longer ones.
pub const SNAPSHOT_NAME_BYTES_MAX: usize = 255;

/// An internal snapshot, as people and clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    /// Unique id, a decimal number by custom.
    pub id: String,
    /// Name; not unique in images that others made.
    pub name: String,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of saved VM state; 0 for a snapshot of the disk alone.
    pub vm_state_size: u64,
    /// Virtual size of the disk then, in bytes.
    pub disk_size: u64,
    /// Instruction count of a recorded guest.
    pub icount: Option<u64>,
    /// The file may not count all of its references yet: background work for it is left, or the
    /// image was not closed in order, and no rebuild has come since.
    pub unsettled: bool,
}

/// What a new snapshot is called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewSnapshot {
    /// Its name: not empty, not taken, at most [`SNAPSHOT_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest has run, in nanoseconds; 0 where that is not known.
    pub vm_clock_nsec: u64,
}

/// Which snapshot is meant. Both given: both must match.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector {
    /// Its id.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.id, &self.name) {
            (Some(id), Some(name)) => write!(f, "'{name}' with id {id}"),
            (Some(id), None) => write!(f, "with id {id}"),
            (None, Some(name)) => write!(f, "'{name}'"),
            (None, None) => f.write_str("of no name"),
        }
    }
}

/// What a piece of background work does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackgroundKind {
    /// Adds the references of a new snapshot.
    Settle,
    /// Takes those of a deleted snapshot away.
    Delete,
    /// Finds out which clusters are ours alone, after a create that failed.
    Reown,
    /// Counts everything anew, after a crash.
    Rebuild,
}

/// A piece of background work that is not done yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackgroundStatus {
    /// What it does.
    pub kind: BackgroundKind,
    /// Unique among the work of this open image, ascending in the order of the work.
    pub number: u64,
    /// The snapshot's id; empty for a rebuild.
    pub id: String,
    /// The snapshot's name; empty for a rebuild.
    pub name: String,
    /// Bytes of metadata done.
    pub done: u64,
    /// Bytes of metadata in all, as far as known.
    pub total: u64,
}

/// The tree of a snapshot: its L1 table as it is in the file.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) id: String,
    pub(crate) name: String,
    /// Raw L1 entries.
    pub(crate) l1: Box<[u64]>,
    /// Host offset of the L1 table in the file.
    pub(crate) l1_offset: u64,
}

/// What to do.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// Add one reference to all that the root reaches, then mark it settled. The L1 table itself
    /// is counted already.
    Settle {
        /// The frozen tree.
        root: Arc<Root>,
        /// Its key in [`Drops`](super::active::Drops).
        key: u64,
        /// On v2: the snapshot is committed when this is done.
        commit: Option<Arc<commit::Pending>>,
    },
    /// Take one reference away from all that the root reaches and from its L1 table's clusters.
    Delete {
        /// The tree of the deleted snapshot.
        root: Arc<Root>,
    },
    /// Find out anew which tables and clusters are ours alone: a freeze was called off.
    Reown,
    /// Look whether copied flags agree with counts, and mend them if not: v2 has no dirty bit.
    Look,
    /// Count everything anew, and find out what is ours alone: the image was not closed in order.
    Rebuild,
}

/// One piece of background work.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) number: u64,
    pub(crate) task: Task,
    /// Bytes of L2 tables done.
    pub(crate) done: u64,
    pub(crate) total: u64,
    /// The part of `total` that comes after a rebuild.
    after: u64,
}

/// Background work, first come first served.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) items: VecDeque<Work>,
    next_number: u64,
}

/// The snapshots of an image that is open for writing.
#[derive(Debug)]
pub(crate) struct Snapshots {
    /// The committed table; held while a command changes it.
    pub(crate) table: async_lock::Mutex<Table>,
    /// What [`Image::snapshots`](super::Image::snapshots) shows.
    pub(crate) shown: Mutex<Vec<SnapshotInfo>>,
    pub(crate) queue: Mutex<Queue>,
    /// Notified when work is added.
    pub(crate) work: Event,
    /// The rebuild that [`Task::Rebuild`] is about; held while a piece of it is done.
    rebuild: async_lock::Mutex<Option<Rebuild>>,
    /// The dirty bit is not to be cleared: entries name lost data, which only a person can judge.
    pub(crate) stay_dirty: AtomicBool,
    /// How far the first item of the queue is; held while a step is done.
    background: async_lock::Mutex<background::Background>,
    /// What is known of counts; changes while the table is held.
    known: Mutex<room::Known>,
    /// How much a walk has in memory; tests make it less.
    limits: Mutex<walk::Limits>,
    last_key: AtomicU64,
}

impl Snapshots {
    /// `dirty`: the image was not closed in order, and is not rebuilt yet.
    pub(crate) fn new(table: Table, disk_size: u64, dirty: bool) -> Self {
        let shown = table.infos(disk_size, dirty);
        Self {
            table: async_lock::Mutex::new(table),
            shown: Mutex::new(shown),
            queue: Mutex::default(),
            work: Event::new(),
            rebuild: async_lock::Mutex::default(),
            stay_dirty: AtomicBool::new(false),
            background: async_lock::Mutex::default(),
            known: Mutex::default(),
            limits: Mutex::default(),
            last_key: AtomicU64::new(0),
        }
    }

    /// The image was not closed in order: its counts are made anew, then its copied flags.
    pub(crate) fn begin_rebuild(&mut self, rebuild: Rebuild) {
        let (total, after) = (rebuild.total(), rebuild.tables_bytes());
        *self.rebuild.get_mut() = Some(rebuild);
        self.push(Task::Rebuild, total + after);
        if let Some(work) = lock(&self.queue).items.back_mut() {
            work.after = after;
        }
    }

    /// A number for a frozen tree.
    pub(crate) fn next_key(&self) -> u64 {
        self.last_key.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Deleted snapshots whose references are not gone yet.
    pub(crate) fn deleted(&self) -> u64 {
        let queue = lock(&self.queue);
        let is_delete = |work: &&Work| matches!(work.task, Task::Delete { .. });
        to_u64(queue.items.iter().filter(is_delete).count())
    }

    /// Adds work to the end of the queue; returns its number.
    pub(crate) fn push(&self, task: Task, total: u64) -> u64 {
        let mut queue = lock(&self.queue);
        queue.next_number += 1;
        let number = queue.next_number;
        queue.items.push_back(Work {
            number,
            task,
            done: 0,
            total,
            after: 0,
        });
        drop(queue);
        self.work.notify(usize::MAX);
        number
    }
}

impl Work {
    pub(crate) fn status(&self) -> BackgroundStatus {
        let (kind, root) = match &self.task {
            Task::Settle { root, .. } => (BackgroundKind::Settle, Some(root)),
            Task::Delete { root } => (BackgroundKind::Delete, Some(root)),
            Task::Reown | Task::Look => (BackgroundKind::Reown, None),
            Task::Rebuild => (BackgroundKind::Rebuild, None),
        };
        BackgroundStatus {
            kind,
            number: self.number,
            id: root.map_or_else(String::new, |root| root.id.clone()),
            name: root.map_or_else(String::new, |root| root.name.clone()),
            done: self.done,
            total: self.total,
        }
    }
}

impl Image {
    /// The internal snapshots, in the order of the image's table.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        match &self.active {
            Some(active) => lock(&active.snapshots.shown).clone(),
            None => self.read_only_snapshots.clone(),
        }
    }

    /// Background work that is not done yet, in the order in which it is done.
    #[must_use]
    pub fn background(&self) -> Vec<BackgroundStatus> {
        self.active.as_ref().map_or_else(Vec::new, |active| {
            let queue = lock(&active.snapshots.queue);
            let told = |work: &&Work| !matches!(work.task, Task::Look);
            queue.items.iter().filter(told).map(Work::status).collect()
        })
    }

    /// The active layer in its parts; `None` unless it is a qcow2 image that may be written.
    pub(crate) fn qcow2_target(&self) -> Option<Target<'_>> {
        let layer = self.layers.first()?;
        let (LayerKind::Qcow2(mapping), Some(active)) = (&layer.kind, &self.active) else {
            return None;
        };
        Some(Target {
            layer,
            mapping,
            active,
        })
    }
}
