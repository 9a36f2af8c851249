//! The instant of a snapshot, and the grace after it.
//!
//! Under the L1 lock the resident L1 table is copied, the tree is marked unsettled, and the
//! generation is raised. From then on nothing of the active tree is ours alone; nobody waits. The
//! requests that were submitted before may write in place until the grace is over.

use std::time::Duration;

use crate::engine::error::lock;
use crate::engine::order::keeps;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::storage::Storage;

use std::sync::atomic::Ordering;

/// How often the end of the grace is looked for.
const GRACE_POLL: Duration = Duration::from_micros(50);

/// A frozen tree.
#[derive(Debug)]
pub(super) struct Frozen {
    /// Raw L1 entries.
    pub(super) l1: Box<[u64]>,
    /// The generation that began with the freeze.
    pub(super) generation: u64,
}

impl<S: Storage> Worker<S> {
    /// Freezes the active tree for these snapshots, one instant for all of them.
    pub(super) async fn freeze(&self, target: Target<'_>, keys: &[u64]) -> Frozen {
        let copy = || -> Box<[u64]> {
            target
                .mapping
                .l1
                .iter()
                .map(|entry| entry.load(Ordering::Acquire))
                .collect()
        };
        if !keeps!(RaiseUnderL1Lock) {
            let l1 = copy();
            for _ in 0..100 {
                self.storage.pause(GRACE_POLL).await;
            }
            for key in keys {
                lock(&target.active.drops).freeze(*key);
            }
            let generation = self.image.board.raise_generation();
            return Frozen { l1, generation };
        }
        let _l1_lock = lock(&target.active.l1);
        let l1 = copy();
        {
            let mut drops = lock(&target.active.drops);
            for key in keys {
                drops.freeze(*key);
            }
        }
        let generation = self.image.board.raise_generation();
        Frozen { l1, generation }
    }

    /// Waits until no request from before the freeze is left, for everybody who waits for that.
    pub(super) async fn end_grace(&self, generation: u64) {
        while !self.image.board.end_grace(generation) {
            self.storage.pause(GRACE_POLL).await;
        }
    }
}
