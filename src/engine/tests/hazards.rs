//! One dangerous interleaving per test, arranged by holding operations back.
//!
//! Each is a function that gives a violation back, so that `rules` can run them with a rule broken.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};

use super::build::{Fill, Recipe};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, counted, seeds, violation};
use crate::engine::error::lock;
use crate::engine::{ErrorKind, NewSnapshot, OpenOptions, State};
use crate::format::Header;
use crate::storage::sim::{CutMode, Fault, OpKind, Outcome, SimDisk};
use crate::units::to_usize;

pub(super) fn data(_: u64) -> Fill {
    Fill::Data
}

/// The smallest caches there are.
pub(super) fn tiny() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(0),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    }
}

impl Rig {
    pub(super) fn opened(
        recipe: Recipe,
        seed: u64,
        options: &OpenOptions,
    ) -> Result<Self, Violation> {
        let mut rig = Self::new(recipe, seed);
        rig.open(options)?;
        Ok(rig)
    }

    /// Runs one future among the tasks; a deadlock is a violation.
    pub(super) fn act<F: Future + 'static>(&mut self, future: F) -> Result<F::Output, Violation> {
        let handle = self.driver.spawn_background(future);
        let done = Rc::new(handle);
        let seen = Rc::clone(&done);
        let outcome = self.driver.run_until(move || seen.is_done());
        self.verdict()?;
        match done.take() {
            Some(output) => Ok(output),
            None => violation(format!("{outcome:?} instead of an answer")),
        }
    }

    pub(super) fn finish(&mut self) -> Result<(), Violation> {
        self.disk.release();
        self.run()?;
        self.close()?;
        self.judge_closed()
    }

    /// How often somebody is asked to write back, from now on.
    fn counts_calls_for_write_back(&self) -> Arc<AtomicUsize> {
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&asked);
        self.image().set_write_back_sink(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        asked
    }

    /// Reads the whole disk, in pieces of `piece` sectors.
    pub(super) fn read_all(&mut self, client: &Client, piece: u64) -> Result<(), Violation> {
        let sectors = self.model.borrow().sectors();
        let client = client.clone();
        self.act(async move {
            for first in (0..sectors).step_by(usize::try_from(piece).unwrap_or(1)) {
                let _judged = client.read(first, piece.min(sectors - first)).await;
            }
        })
    }
}

/// Requests that wait for operations of this length are told apart by it.
const MARKED: u64 = 3;

fn hold_marked(disk: &SimDisk, kind: OpKind) {
    disk.hold(move |op| op.kind == kind && op.len == MARKED * 512);
}

fn marked_is_held(disk: &SimDisk) -> bool {
    disk.in_flight().iter().any(|op| op.len == MARKED * 512)
}

/// Gives the clusters of sectors 0..4 back and makes others want them.
fn free_and_reuse(rig: &mut Rig) -> Result<(), Violation> {
    let (other, third) = (rig.worker(), rig.worker());
    rig.act(async move {
        other.discard(0, 4).await?;
        other.flush().await?;
        other.flush().await?;
        for first in (64..100).step_by(4) {
            third.write(first, 4).await?;
        }
        third.flush().await
    })?
    .map_err(|error| Violation(error.chain()))
}

/// A reader has resolved a cluster and its host read takes long. Meanwhile the cluster is discarded,
/// that is flushed, and other writes look for free clusters. The reader must not see their bytes.
fn a_slow_reader_and_reuse(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| if cluster < 8 { Fill::Data } else { Fill::None };
    let mut rig = Rig::opened(
        Recipe {
            fill,
            ..Recipe::plain(11, 64 << 10)
        },
        seed,
        &OpenOptions::default(),
    )?;
    let reader = rig.worker();
    let first = reader.clone();
    let _ = rig.act(async move { first.read(0, 1).await })?;
    hold_marked(&rig.disk, OpKind::Read);
    rig.driver
        .spawn(async move { reader.read(0, MARKED).await.is_ok() });
    let disk = rig.disk.clone();
    rig.driver.run_until(move || marked_is_held(&disk));
    free_and_reuse(&mut rig)?;
    rig.finish()
}

/// The same with a slow write in place: it must not land in what has become another cluster's data.
fn a_slow_write_in_place_and_reuse(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| if cluster < 8 { Fill::Data } else { Fill::None };
    let recipe = Recipe {
        fill,
        ..Recipe::plain(11, 64 << 10)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let writer = rig.worker();
    let first = writer.clone();
    let _ = rig.act(async move { first.write(0, 1).await })?;
    hold_marked(&rig.disk, OpKind::Write);
    rig.driver
        .spawn(async move { writer.write(0, MARKED).await.is_ok() });
    let disk = rig.disk.clone();
    rig.driver.run_until(move || marked_is_held(&disk));
    free_and_reuse(&mut rig)?;
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 8)?;
    rig.finish()
}

/// A cluster is freed, and punching its hole takes long. Meanwhile others look for free clusters: what
/// they write must not be punched away.
fn a_slow_punch_and_reuse(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| if cluster < 8 { Fill::Data } else { Fill::None };
    let recipe = Recipe {
        fill,
        ..Recipe::plain(11, 64 << 10)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let (guest, other) = (rig.worker(), rig.worker());
    rig.disk.hold(|op| op.kind == OpKind::Punch);
    rig.driver
        .spawn(async move { guest.discard(0, 4).await.is_ok() && guest.flush().await.is_ok() });
    rig.driver.run_until_stuck();
    if rig.disk.in_flight().is_empty() {
        return violation("no hole is punched");
    }
    rig.act(async move {
        for first in (64..100).step_by(4) {
            other.write(first, 4).await?;
        }
        Ok(())
    })?
    .map_err(|error: crate::engine::Error| Violation(error.chain()))?;
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 8)?;
    rig.finish()
}

/// Two queues write different sectors of one unallocated guest cluster. The second finds the cluster
/// taken while the first one's data is on its way; both must be there in the end.
fn two_queues_allocate_one_cluster(seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::opened(Recipe::plain(12, 64 << 10), seed, &OpenOptions::default())?;
    let (first, second) = (rig.worker(), rig.worker());
    hold_marked(&rig.disk, OpKind::Write);
    rig.driver
        .spawn(async move { first.write(0, MARKED).await.is_ok() });
    rig.driver
        .spawn(async move { second.write(4, 2).await.is_ok() });
    rig.driver.run_until_stuck();
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 8)?;
    rig.finish()
}

/// While one flush waits for its `fdatasync`, two queues write and flush. Their flushes become one,
/// which begins later, and what they wrote survives a cut right after.
fn joined_flushes_cover_what_came_before_them(seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::opened(Recipe::plain(12, 64 << 10), seed, &OpenOptions::default())?;
    let queues: Vec<Client> = (0..3).map(|_| rig.worker()).collect();
    let leader = queues[0].clone();
    let _ = rig.act({
        let leader = leader.clone();
        async move { leader.write(0, 8).await }
    })?;
    rig.disk.hold(|op| op.kind == OpKind::Sync);
    rig.driver
        .spawn(async move { leader.flush().await.is_ok() });
    rig.driver.run_until_stuck();
    for (first, queue) in [16, 32].into_iter().zip(&queues[1..]) {
        let queue = queue.clone();
        rig.driver.spawn(async move {
            let _ = queue.write(first, 8).await;
            queue.flush().await.is_ok()
        });
    }
    rig.driver.run_until_stuck();
    rig.disk.release();
    let disk = rig.disk.clone();
    let (ran, count) = counted(&disk, || rig.run());
    ran?;
    // The rest of the leader's, and one for both others.
    if count.syncs > 3 {
        return violation(format!("{} syncs", count.syncs));
    }
    let cut = rig.disk.power_cut(
        &mut fastrand::Rng::with_seed(seed),
        CutMode::NothingUnflushed,
    );
    rig.after_cut(cut, seed).judge_cut(seed, true)?;
    rig.finish()
}

/// A flush writes slices; until they are in the file, eviction must not make anybody load them from
/// there.
fn eviction_during_write_back(seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        ..Recipe::plain(9, 1 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &tiny())?;
    let client = rig.worker();
    let writer = client.clone();
    let _ = rig.act(async move {
        for table in 0..4 {
            writer.write(table * 64, 5).await?;
        }
        Ok::<_, crate::engine::Error>(())
    })?;
    rig.disk.hold(|op| op.kind == OpKind::Write);
    let flusher = client.clone();
    rig.driver
        .spawn(async move { flusher.flush().await.is_ok() });
    let disk = rig.disk.clone();
    rig.driver
        .run_until(move || disk.in_flight().iter().any(|op| op.kind == OpKind::Write));
    for _ in 0..2 {
        let reader = rig.worker();
        rig.read_all(&reader, 4)?;
    }
    rig.finish()
}

/// More slices are in use at once than a worker's directory and put table hold together.
fn more_slices_in_use_than_the_tables_hold(seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        fill: data,
        ..Recipe::plain(9, 4 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &tiny())?;
    let client = rig.worker();
    rig.disk
        .hold(|op| op.kind == OpKind::Read && op.len == MARKED * 512);
    for table in 0..128 {
        let client = client.clone();
        rig.driver.spawn(async move {
            let _ = client.read(table * 64, MARKED).await;
            let _ = client.zero(table * 64 + 1, 7, true).await;
            let _ = client.write(table * 64, MARKED + 1).await;
            client.read(table * 64, 64).await.is_ok()
        });
    }
    rig.driver.run_until_stuck();
    rig.finish()
}

/// A shared table is being copied; requests to the same and to other tables go on, and two workers
/// want the same copy.
fn a_table_copy_and_everybody_else(seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        ..Recipe::plain(9, 128 << 10)
    };
    let mut rig = Rig::opened(recipe, seed, &tiny())?;
    rig.disk.hold(|op| op.kind == OpKind::Zeroes);
    let mix = Mix {
        area: 96,
        longest: 4,
        ..Mix::ALL
    };
    let random = fastrand::Rng::with_seed(seed);
    for number in 0..4 {
        let (client, mut random) = (rig.worker(), random.clone());
        random.seed(seed * 10 + number);
        rig.driver.spawn(chaos(client, random, 25, mix));
    }
    let reader = rig.worker();
    rig.driver.spawn(async move {
        for first in (0..128).step_by(8) {
            let _judged = reader.read(first, 8).await;
        }
    });
    rig.driver.run_until_stuck();
    rig.finish()
}

/// A flush fails while others wait for the next one. All of them are told, the image takes no more
/// writes, and reads go on to give what was written, also when everything else was evicted.
fn a_flush_fails_while_others_wait(seed: u64) -> Result<(), Violation> {
    for kind in [OpKind::Sync, OpKind::Write] {
        // The tables are there: their slices wait for the second round.
        let fill = |cluster| {
            if cluster % 2 == 0 {
                Fill::Data
            } else {
                Fill::None
            }
        };
        let recipe = Recipe {
            fill,
            ..Recipe::plain(9, 1 << 20)
        };
        let mut rig = Rig::opened(recipe, seed, &tiny())?;
        rig.tolerant = true;
        let queues: Vec<Client> = (0..3).map(|_| rig.worker()).collect();
        let writer = queues[0].clone();
        let _ = rig.act(async move {
            for table in 0..4 {
                writer.write(table * 64, 5).await?;
            }
            Ok::<_, crate::engine::Error>(())
        })?;
        rig.disk.inject(Fault {
            kind: Some(kind),
            from: 1,
            count: 1,
            errno: libc::EIO,
        });
        rig.disk.hold(move |op| op.kind == kind);
        let answers: Vec<_> = queues
            .iter()
            .map(|queue| {
                let queue = queue.clone();
                rig.driver.spawn(async move { queue.flush().await.is_ok() })
            })
            .collect();
        rig.driver.run_until_stuck();
        rig.disk.release();
        rig.run()?;
        if answers.iter().any(|answer| answer.take() != Some(false)) {
            return violation("a flush succeeded after a failure");
        }
        if rig.image().state() != State::Failed {
            return violation("the image goes on after a failed flush");
        }
        let writer = queues[1].clone();
        let refused = rig.act(async move { writer.write(7, 1).await })?;
        if refused.map_err(|error| error.kind()) != Err(ErrorKind::Failed) {
            return violation("a write after the failure");
        }
        for _ in 0..2 {
            let reader = rig.worker();
            rig.read_all(&reader, 4)?;
        }
    }
    Ok(())
}

/// The image grows by more refcount blocks at once than the cache holds.
fn growth_by_more_blocks_than_the_cache_holds(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| {
        if cluster < 3830 {
            Fill::Data
        } else {
            Fill::None
        }
    };
    let recipe = Recipe {
        refcount_order: 6,
        fill,
        ..Recipe::plain(9, 3 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &tiny())?;
    let writer = rig.worker();
    let _ = rig.act(async move {
        for first in (3840..6144).step_by(64) {
            writer.write(first, 64).await?;
        }
        writer.flush().await
    })?;
    rig.finish()
}

/// A flush is about to name refcount blocks in the refcount table. A longer table takes over
/// meanwhile, and the old one's cluster is wanted for data.
fn the_old_refcount_table_and_a_slow_flush(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| {
        if cluster < 3650 {
            Fill::Data
        } else {
            Fill::None
        }
    };
    let recipe = Recipe {
        refcount_order: 6,
        fill,
        ..Recipe::plain(9, 3 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let (slow, other) = (rig.worker(), rig.worker());
    let first = slow.clone();
    let _ = rig.act(async move {
        for sector in 3650..3800 {
            first.write(sector, 1).await?;
        }
        Ok::<_, crate::engine::Error>(())
    })?;
    // Names are the only writes of a single word.
    rig.disk.hold(|op| op.kind == OpKind::Write && op.len == 8);
    rig.driver.spawn(async move { slow.flush().await.is_ok() });
    rig.driver.run_until_stuck();
    if rig.disk.in_flight().is_empty() {
        return violation("the flush names no block");
    }
    let _ = rig.act(async move {
        for sector in 3800..5800 {
            other.write(sector, 1).await?;
        }
        Ok::<_, crate::engine::Error>(())
    })?;
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 64)?;
    rig.finish()
}

/// A snapshot table and an L1 table lay in clusters that nobody had used before, and are given back
/// on a host that punches no holes. Writes of single sectors get those clusters next.
fn tables_that_are_given_back_leave_no_bytes(seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        can_punch: false,
        ..Recipe::plain(12, 256 << 10)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let client = rig.worker();
    let done = rig.act(async move {
        client.snapshot("a").await?;
        client.snapshot("b").await?;
        client.delete("a").await?;
        client.settle().await;
        for first in (7..512).step_by(8) {
            client.write(first, 1).await?;
        }
        client.flush().await
    })?;
    done.map_err(|error| Violation(error.chain()))?;
    let reader = rig.worker();
    rig.read_all(&reader, 8)?;
    rig.finish()
}

/// The same where the file has clusters to spare that nobody had used, and the tables got those.
fn tables_in_spare_clusters_leave_no_bytes(seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        can_punch: false,
        ..Recipe::plain(16, 4 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let client = rig.worker();
    let done = rig.act(async move {
        // The file grows by 64 clusters, of which this worker takes 16.
        client.write(0, 1).await?;
        client.flush().await?;
        for name in ["a", "b", "c"] {
            client.snapshot(name).await?;
        }
        client.settle().await;
        client.delete("a").await?;
        client.delete("b").await?;
        client.settle().await;
        for first in (131..8192).step_by(128) {
            client.write(first, 1).await?;
        }
        client.flush().await
    })?;
    done.map_err(|error| Violation(error.chain()))?;
    let reader = rig.worker();
    rig.read_all(&reader, 128)?;
    rig.finish()
}

/// The file grows for a run of clusters, and part of the refcount block behind it is in the file when
/// the attempt fails. The next growth puts its blocks elsewhere: a guest must not find the old one.
fn growth_that_failed_leaves_no_bytes(nth: u64, seed: u64) -> Result<bool, Violation> {
    // 128 clusters to a block, and two sectors to a cluster.
    let recipe = Recipe {
        refcount_order: 6,
        can_punch: false,
        ..Recipe::plain(10, 512 << 10)
    };
    let mut rig = Rig::new(recipe, seed);
    rig.open(&OpenOptions::default())?;
    rig.tolerant = true;
    rig.disk.fail_nth_of(OpKind::Write, nth, libc::EIO);
    let client = rig.worker();
    let new: Vec<_> = (0..300)
        .map(|number| NewSnapshot {
            name: format!("{number:0255}"),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
        })
        .collect();
    let taker = client.clone();
    let taken = rig.act(async move { taker.worker.create_snapshots(&new).await.is_ok() })?;
    rig.disk.clear_faults();
    if taken || rig.image().has_failed() {
        return Ok(false);
    }
    let done = rig.act(async move {
        for cluster in 0..512 {
            client.write(cluster * 2 + cluster % 2, 1).await?;
        }
        client.flush().await
    })?;
    done.map_err(|error| Violation(error.chain()))?;
    let reader = rig.worker();
    rig.read_all(&reader, 64)?;
    Ok(true)
}

/// A snapshot is gone, and what only it kept from being ours becomes ours again, while a request copies
/// the table for which it found the opposite. A copy has no copied flags: who looks at it copies clusters
/// that others write in place.
fn a_table_that_is_ours_again_before_it_is_copied(seed: u64) -> Result<(), Violation> {
    // Of a snapshot that was not settled the L1 entry has its copied flag all the time.
    for settled in [true, false] {
        let recipe = Recipe {
            fill: data,
            ..Recipe::plain(12, 1 << 20)
        };
        let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
        let (client, copier) = (rig.worker(), rig.worker());
        let taker = client.clone();
        let taken = rig.act(async move {
            taker.snapshot("a").await?;
            if settled {
                taker.settle().await;
            }
            Ok::<_, crate::engine::Error>(())
        })?;
        taken.map_err(|error| Violation(error.chain()))?;
        rig.disk.hold(|op| op.kind == OpKind::Zeroes);
        rig.driver
            .spawn(async move { copier.write(0, 1).await.is_ok() });
        rig.driver.run_until_stuck();
        if rig.disk.in_flight().is_empty() {
            return violation("no table is made");
        }
        let deleter = client.clone();
        let deleted = rig.act(async move {
            deleter.delete("a").await?;
            deleter.settle().await;
            Ok::<_, crate::engine::Error>(())
        })?;
        deleted.map_err(|error| Violation(error.chain()))?;
        let (slow, quick) = (rig.worker(), rig.worker());
        if !slow.is_in_place(8, MARKED) {
            return violation("nothing is ours again");
        }
        rig.disk.hold(|op| {
            op.kind == OpKind::Zeroes || (op.kind == OpKind::Write && op.len == MARKED * 512)
        });
        rig.driver
            .spawn(async move { slow.write(8, MARKED).await.is_ok() });
        rig.driver.run_until_stuck();
        hold_marked(&rig.disk, OpKind::Write);
        rig.driver.run_until_stuck();
        let written = rig.act(async move { quick.write(12, 2).await })?;
        written.map_err(|error| Violation(error.chain()))?;
        rig.disk.release();
        rig.run()?;
        let reader = rig.worker();
        rig.read_all(&reader, 8)?;
        rig.finish()?;
    }
    Ok(())
}

/// A write goes into the cluster that a zero entry keeps, and the tree is frozen and its table copied
/// before the entry changes: the cluster is not ours alone any more.
fn a_kept_cluster_that_comes_to_be_shared(seed: u64) -> Result<(), Violation> {
    let fill = |cluster| {
        if cluster == 0 {
            Fill::ZeroKept
        } else {
            Fill::Data
        }
    };
    let recipe = Recipe {
        fill,
        ..Recipe::plain(12, 64 << 10)
    };
    let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
    let (slow, quick, client) = (rig.worker(), rig.worker(), rig.worker());
    rig.disk.hold(|op| op.kind == OpKind::Write);
    rig.driver
        .spawn(async move { slow.write(0, 3).await.is_ok() });
    rig.driver.run_until_stuck();
    let held: Vec<u64> = rig.disk.in_flight().iter().map(|op| op.id).collect();
    if held.len() != 1 {
        return violation("nothing is written into the cluster");
    }
    rig.disk.hold(move |op| held.contains(&op.id));
    let generation = rig.image().board.generation();
    rig.driver
        .spawn(async move { client.snapshot("a").await.is_ok() });
    let image = Arc::clone(rig.image());
    rig.driver
        .run_until(|| image.board.generation() > generation);
    let written = rig.act(async move { quick.write(8, 8).await })?;
    written.map_err(|error| Violation(error.chain()))?;
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 8)?;
    rig.settle()?;
    rig.finish()?;
    rig.judge_snapshots()
}

/// A write in place is on its way when the tree is frozen. A later one to the other half of the same
/// cluster needs its bytes, in front of its own or behind them.
fn a_slow_write_in_place_and_its_copy(seed: u64) -> Result<(), Violation> {
    for (slow_first, quick_first) in [(0, 4), (4, 0)] {
        let recipe = Recipe {
            fill: data,
            ..Recipe::plain(12, 64 << 10)
        };
        let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
        let (slow, quick, client) = (rig.worker(), rig.worker(), rig.worker());
        hold_marked(&rig.disk, OpKind::Write);
        rig.driver
            .spawn(async move { slow.write(slow_first, MARKED).await.is_ok() });
        let disk = rig.disk.clone();
        rig.driver.run_until(move || marked_is_held(&disk));
        let generation = rig.image().board.generation();
        rig.driver
            .spawn(async move { client.snapshot("a").await.is_ok() });
        let image = Arc::clone(rig.image());
        rig.driver
            .run_until(|| image.board.generation() > generation);
        let done = rig
            .driver
            .spawn(async move { quick.write(quick_first, 4).await.is_ok() });
        let steps = Cell::new(0);
        rig.driver.run_until(|| {
            steps.set(steps.get() + 1);
            done.is_done() || steps.get() == 1000
        });
        rig.disk.release();
        rig.run()?;
        let reader = rig.worker();
        rig.read_all(&reader, 8)?;
        rig.settle()?;
        rig.finish()?;
        rig.judge_snapshots()?;
    }
    Ok(())
}

/// How a table whose slices are cached comes to be freed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Freed {
    /// With a snapshot that has it.
    WithSnapshot,
    /// When a snapshot goes that was never counted.
    Unsettled,
    /// When it is copied, and nobody else has it.
    ByCopy,
}

/// L2 tables whose slices are cached are freed, and their clusters become tables again: those have no
/// entries of the old ones.
fn tables_in_the_place_of_tables(seed: u64) -> Result<(), Violation> {
    const OLD: u64 = 8;
    for freed in [Freed::WithSnapshot, Freed::Unsettled, Freed::ByCopy] {
        // 64 clusters to a table.
        let fill = |cluster| {
            if cluster < OLD * 64 {
                Fill::Data
            } else {
                Fill::None
            }
        };
        let recipe = Recipe {
            fill,
            ..Recipe::plain(9, 2 << 20)
        };
        let mut rig = Rig::new(recipe, seed);
        if freed == Freed::ByCopy {
            // L1 entries that do not say that their tables are ours.
            let bytes = rig.disk.contents(IMAGE);
            let header = Header::decode(&bytes).map_err(|error| Violation(error.to_string()))?;
            for index in 0..OLD {
                let at = header.l1_table_offset.get() + index * 8;
                let first = bytes[to_usize(at)] & 0x7f;
                rig.disk.poke(IMAGE, at, &[first]);
            }
        }
        let roomy = OpenOptions {
            l2_cache_size: Some(1 << 20),
            ..OpenOptions::default()
        };
        rig.open(&roomy)?;
        let client = rig.worker();
        rig.read_all(&client, 64)?;
        let (first, second) = (rig.worker(), rig.worker());
        let done = rig.act(async move {
            if freed != Freed::ByCopy {
                first.snapshot("a").await?;
            }
            if freed == Freed::WithSnapshot {
                first.settle().await;
            }
            for table in 0..OLD {
                first.write(table * 64, 1).await?;
            }
            if freed != Freed::ByCopy {
                first.delete("a").await?;
            }
            first.settle().await;
            first.flush().await?;
            first.flush().await?;
            for table in OLD..64 {
                second.write(table * 64, 1).await?;
            }
            Ok::<_, crate::engine::Error>(())
        })?;
        done.map_err(|error| Violation(error.chain()))?;
        for _ in 0..2 {
            let reader = rig.worker();
            rig.read_all(&reader, 64)?;
        }
        rig.disk.release();
        rig.close()?;
        if freed == Freed::ByCopy {
            // Copied flags are missing.
            rig.judge_trees()?;
        } else {
            rig.judge_closed()?;
        }
    }
    Ok(())
}

/// The background work and a flush want to write one refcount block. Two writes of it have no order: the
/// older could be the last.
fn two_writers_of_a_refcount_block(seed: u64) -> Result<(), Violation> {
    for flush_first in [false, true] {
        let recipe = Recipe {
            fill: data,
            ..Recipe::plain(12, 1 << 20)
        };
        let mut rig = Rig::opened(recipe, seed, &OpenOptions::default())?;
        let client = rig.worker();
        let taken = rig.act({
            let client = client.clone();
            async move {
                client.snapshot("a").await?;
                // The table is copied.
                client.write(8, 1).await?;
                // Counts that one flush lowers are written by the next.
                for _ in 0..3 {
                    client.flush().await?;
                }
                Ok::<_, crate::engine::Error>(())
            }
        })?;
        taken.map_err(|error| Violation(error.chain()))?;
        let block = {
            let active = rig.image().active.as_ref().expect("writable");
            active.allocator.block_offset(0).expect("a block").get()
        };
        rig.disk
            .hold(move |op| op.kind == OpKind::Write && op.offset == block);
        let disk = rig.disk.clone();
        let held = move || {
            disk.in_flight()
                .iter()
                .filter(|op| op.offset == block)
                .count()
        };
        let (guest, settler) = (client.clone(), client.clone());
        let guest = async move {
            guest.write(16, 8).await?;
            guest.flush().await
        };
        if flush_first {
            rig.driver.spawn(guest);
            rig.driver.run_until(|| held() > 0);
            rig.driver.spawn(async move { settler.settle().await });
        } else {
            rig.driver.spawn(async move { settler.settle().await });
            rig.driver.run_until(|| held() > 0);
            rig.driver.spawn(guest);
        }
        rig.driver.run_until_stuck();
        if held() != 1 {
            return violation(format!("{} writes of one refcount block", held()));
        }
        rig.finish()?;
    }
    Ok(())
}

/// All hazards, for one seed.
pub(super) fn all(seed: u64) -> Result<(), Violation> {
    for (name, hazard) in ALL {
        hazard(seed).map_err(|violation| Violation(format!("{name}: {violation}")))?;
    }
    Ok(())
}

type Hazard = fn(u64) -> Result<(), Violation>;

macro_rules! hazards {
    ($($hazard:ident => $test:ident,)*) => {
        const ALL: &[(&str, Hazard)] = &[$((stringify!($hazard), $hazard),)*];

        $(
            #[test]
            fn $test() {
                for seed in seeds(8) {
                    if let Err(violation) = $hazard(seed) {
                        panic!("SEED={seed}: {violation}");
                    }
                }
            }
        )*
    };
}

hazards! {
    a_slow_reader_and_reuse => a_slow_reader_never_sees_a_reused_cluster,
    a_slow_write_in_place_and_reuse => a_slow_write_in_place_never_lands_in_a_reused_cluster,
    a_slow_punch_and_reuse => a_slow_punch_never_hits_a_reused_cluster,
    two_queues_allocate_one_cluster => two_queues_allocate_one_cluster_and_lose_nothing,
    joined_flushes_cover_what_came_before_them => a_joined_flush_covers_what_came_before_it,
    eviction_during_write_back => a_slice_being_written_back_is_not_loaded_from_the_file,
    more_slices_in_use_than_the_tables_hold => displaced_slices_keep_what_was_linked,
    a_table_copy_and_everybody_else => a_table_copy_disturbs_nobody,
    a_flush_fails_while_others_wait => a_failed_flush_is_told_to_all_and_reads_go_on,
    growth_by_more_blocks_than_the_cache_holds => growth_needs_no_room_in_the_refcount_cache,
    the_old_refcount_table_and_a_slow_flush => a_slow_flush_never_writes_into_a_reused_table,
    tables_that_are_given_back_leave_no_bytes => tables_that_are_given_back_leave_no_bytes_to_others,
    tables_in_spare_clusters_leave_no_bytes => tables_in_spare_clusters_leave_no_bytes_to_others,
    a_table_that_is_ours_again_before_it_is_copied => a_table_that_is_ours_again_is_not_copied,
    a_kept_cluster_that_comes_to_be_shared => a_kept_cluster_is_not_ours_once_it_is_shared,
    a_slow_write_in_place_and_its_copy => a_copy_has_the_writes_in_place_of_before_the_freeze,
    tables_in_the_place_of_tables => a_new_table_has_no_entries_of_an_old_one,
    two_writers_of_a_refcount_block => a_refcount_block_has_one_writer_at_a_time,
}

/// The refcount table has moved, and its old place has become a guest's.
#[test]
fn where_metadata_is_is_protected_and_where_it_was_is_not() {
    let fill = |cluster| {
        if cluster < 3650 {
            Fill::Data
        } else {
            Fill::None
        }
    };
    let recipe = Recipe {
        refcount_order: 6,
        fill,
        ..Recipe::plain(9, 3 << 20)
    };
    let mut rig = Rig::opened(recipe, 1, &tiny()).expect("opens");
    let header = |rig: &Rig| Header::decode(&rig.disk.contents(IMAGE)).expect("a header");
    let before = header(&rig);
    let client = rig.worker();
    let worked = rig.act(async move {
        for sector in 3650..5800 {
            client.write(sector, 1).await?;
            if sector % 500 == 0 {
                client.flush().await?;
            }
        }
        client.snapshot("a").await?;
        client.settle().await;
        client.flush().await
    });
    worked.expect("an answer").expect("done");
    let after = header(&rig);
    assert_ne!(before.refcount_table_offset, after.refcount_table_offset);
    {
        let target = rig.image().qcow2_target().expect("writable");
        let protected = lock(&target.mapping.protected);
        let is_protected = |offset: u64| protected.overlaps(&(offset >> 9..(offset >> 9) + 1));
        for cluster in 0..u64::from(after.refcount_table_clusters) {
            assert!(is_protected(
                after.refcount_table_offset.get() + cluster * 512
            ));
        }
        let allocator = &target.active.allocator;
        for block in 0..allocator.blocks_max() {
            let offset = allocator.block_offset(block);
            assert!(offset.is_none_or(|offset| is_protected(offset.get())));
        }
        assert!(is_protected(after.snapshot_table_offset.get()));
        assert!(!is_protected(before.refcount_table_offset.get()));
    }
    // From the file, with such a small cache.
    let reader = rig.worker();
    rig.read_all(&reader, 64).expect("as written");
    rig.finish().expect("clean");
}

#[test]
fn a_block_of_a_growth_that_failed_is_not_found_by_a_guest() {
    for seed in seeds(8) {
        let mut failures = 0;
        loop {
            match growth_that_failed_leaves_no_bytes(failures + 1, seed) {
                Ok(true) => failures += 1,
                Ok(false) => break,
                Err(violation) => panic!("write {}, SEED={seed}: {violation}", failures + 1),
            }
        }
        assert!(failures > 2, "{failures} blocks are written");
    }
}

#[test]
fn a_flush_of_overwrites_is_one_sync_and_nothing_else() {
    let recipe = Recipe {
        fill: data,
        ..Recipe::plain(16, 1 << 20)
    };
    let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let disk = rig.disk.clone();
    let writer = client.clone();
    let _ = rig.act(async move { writer.write(100, 300).await });
    let (_, count) = counted(&disk, || rig.act(async move { client.flush().await }));
    assert_eq!((count.syncs, count.writes), (1, 0));
    rig.finish().expect("clean");
}

#[test]
fn a_flush_of_new_mappings_is_at_most_two_syncs() {
    let recipes = [
        Recipe::plain(16, 8 << 20),
        Recipe {
            fill: data,
            snapshot: true,
            ..Recipe::plain(16, 1 << 20)
        },
        Recipe {
            backing: Some(1 << 20),
            ..Recipe::plain(12, 2 << 20)
        },
    ];
    for recipe in recipes {
        let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
        for round in 0..6 {
            let client = rig.worker();
            let disk = rig.disk.clone();
            let writer = client.clone();
            let _ = rig.act(async move { writer.write(round * 200, 100).await });
            let (_, count) = counted(&disk, || rig.act(async move { client.flush().await }));
            assert!(count.syncs <= 2, "{} syncs", count.syncs);
            assert!(
                count.writes <= 6 && count.bytes < 1 << 20,
                "{} writes",
                count.writes
            );
        }
        rig.finish().expect("clean");
    }
}

#[test]
fn writes_without_a_flush_do_not_crowd_the_cache() {
    let recipe = Recipe::plain(9, 4 << 20);
    let mut rig = Rig::opened(recipe, 1, &tiny()).expect("opens");
    let client = rig.worker();
    let _ = rig.act(async move {
        for table in 0..128 {
            client.write(table * 64, 2).await?;
        }
        Ok::<_, crate::engine::Error>(())
    });
    assert!(!rig.image().store.must_write_back());
    rig.finish().expect("clean");
}

#[test]
fn much_modified_metadata_is_asked_to_be_written_back_once_and_stops_no_request() {
    let options = OpenOptions {
        // 4096 slices of 512 bytes: from 1024 modified ones on somebody is asked.
        l2_cache_size: Some(2 << 20),
        ..OpenOptions::default()
    };
    let recipe = Recipe::plain(9, 64 << 20);
    let mut rig = Rig::opened(recipe, 1, &options).expect("opens");
    let asked = rig.counts_calls_for_write_back();
    let client = rig.worker();
    for round in 1..3 {
        let writer = client.clone();
        let disk = rig.disk.clone();
        let write = async move {
            for table in 0..1200 {
                // Cluster by cluster of the same tables.
                writer.write(table * 64 + round, 1).await?;
            }
            Ok::<_, crate::engine::Error>(())
        };
        let (result, count) = counted(&disk, || rig.act(write));
        result.expect("an answer").expect("written");
        assert_eq!(count.syncs, 0, "a request has flushed");
        assert_eq!(asked.load(Ordering::Relaxed), to_usize(round));
        let settler = client.clone();
        let written = rig.act(async move { settler.worker.write_back_in_background().await });
        written.expect("an answer").expect("written back");
        assert!(!rig.image().store.wants_write_back());
    }
    rig.finish().expect("clean");
}

#[test]
fn a_flush_leaves_most_of_what_was_discarded_to_the_background() {
    let fill = |cluster| {
        if cluster % 2 == 0 {
            Fill::Data
        } else {
            Fill::None
        }
    };
    let recipe = Recipe {
        fill,
        ..Recipe::plain(9, 1 << 20)
    };
    let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
    let asked = rig.counts_calls_for_write_back();
    let client = rig.worker();
    let guest = client.clone();
    let discard = async move {
        // Every other host cluster: as many runs.
        for cluster in (0..2048).step_by(4) {
            guest.zero(cluster, 1, true).await?;
        }
        guest.flush().await
    };
    rig.act(discard).expect("an answer").expect("discarded");
    let has_due = |rig: &Rig| {
        let active = rig.image().active.as_ref().expect("writable");
        active.allocator.has_due()
    };
    assert!(has_due(&rig));
    let mut turns = 0;
    while has_due(&rig) {
        turns += 1;
        assert_eq!(asked.load(Ordering::Relaxed), turns);
        let settler = client.clone();
        let freed = rig.act(async move { settler.worker.write_back_in_background().await });
        freed.expect("an answer").expect("freed");
    }
    assert!((2..20).contains(&turns), "{turns} turns");
    let length = rig.disk.contents(IMAGE).len();
    let guest = client.clone();
    let write = async move {
        for cluster in 0..500 {
            guest.write(cluster * 4, 1).await?;
        }
        Ok::<_, crate::engine::Error>(())
    };
    rig.act(write).expect("an answer").expect("written");
    assert_eq!(rig.disk.contents(IMAGE).len(), length, "the file has grown");
    rig.finish().expect("clean");
}

#[test]
fn no_hole_is_long() {
    let recipe = Recipe {
        fill: data,
        ..Recipe::plain(16, 16 << 20)
    };
    let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
    let client = rig.worker();
    rig.disk
        .hold(|op| op.kind == OpKind::Punch && op.len > 4 << 20);
    let discard = async move {
        client.discard(0, 32 << 10).await?;
        client.flush().await
    };
    rig.act(discard).expect("short holes").expect("discarded");
    let active = rig.image().active.as_ref().expect("writable");
    assert!(!active.allocator.has_due());
    rig.finish().expect("clean");
}

#[test]
fn a_guest_that_never_flushes_gets_its_clusters_back() {
    let fill = |_| Fill::Data;
    let recipe = Recipe {
        fill,
        ..Recipe::plain(10, 40 << 20)
    };
    let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
    let asked = rig.counts_calls_for_write_back();
    let client = rig.worker();
    let guest = client.clone();
    let zero = async move {
        // Every other host cluster: as many runs.
        for cluster in (0..40_000).step_by(2) {
            guest.zero(cluster * 2, 2, true).await?;
        }
        Ok::<_, crate::engine::Error>(())
    };
    rig.act(zero).expect("an answer").expect("zeroed");
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let settler = client.clone();
    let freed = rig.act(async move { settler.worker.write_back_in_background().await });
    freed.expect("an answer").expect("freed");
    let active = rig.image().active.as_ref().expect("writable");
    assert!(active.allocator.has_due() && !active.has_dropped());
    rig.finish().expect("clean");
}

#[test]
fn a_flush_writes_the_parts_of_refcount_blocks_that_changed() {
    let mut rig =
        Rig::opened(Recipe::plain(16, 8 << 20), 1, &OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let disk = rig.disk.clone();
    let writer = client.clone();
    let _ = rig.act(async move { writer.write(0, 1).await });
    let flush = client.clone();
    let _ = rig.act(async move { flush.flush().await });
    let writer = client.clone();
    let _ = rig.act(async move { writer.write(300, 1).await });
    let (_, count) = counted(&disk, || rig.act(async move { client.flush().await }));
    // A part of the block, and a slice.
    assert_eq!((count.writes, count.bytes), (2, 2 * 4096));
    rig.finish().expect("clean");
}

#[test]
fn a_flush_that_is_dropped_half_way_fails_the_image() {
    let mut rig = Rig::opened(Recipe::plain(12, 64 << 10), 1, &tiny()).expect("opens");
    let client = rig.worker();
    let writer = client.clone();
    let _ = rig.act(async move { writer.write(0, 9).await });
    let mut flush = Box::pin(client.worker.flush());
    let mut context = Context::from_waker(Waker::noop());
    assert!(flush.as_mut().poll(&mut context).is_pending());
    assert_eq!(rig.image().state(), State::Ready);
    drop(flush);
    assert_eq!(rig.image().state(), State::Failed);
    let outcome = rig.driver.drain();
    assert_eq!(outcome, Outcome::Done);
    assert!(rig.check().expect("check").is_consistent());
}

#[test]
fn a_failed_sync_of_a_longer_refcount_table_fails_the_image() {
    let fill = |cluster| {
        if cluster < 3830 {
            Fill::Data
        } else {
            Fill::None
        }
    };
    let recipe = Recipe {
        refcount_order: 6,
        fill,
        ..Recipe::plain(9, 3 << 20)
    };
    for (kind, nth) in [(OpKind::Sync, 1), (OpKind::Sync, 2)] {
        let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
        rig.tolerant = true;
        let client = rig.worker();
        rig.disk.fail_nth_of(kind, nth, libc::EIO);
        let result = rig.act(async move {
            for first in (3840..6000).step_by(8) {
                client.write(first, 8).await?;
            }
            Ok::<_, crate::engine::Error>(())
        });
        assert_eq!(
            result.expect("an answer").map_err(|error| error.kind()),
            Err(ErrorKind::Failed),
            "sync {nth}"
        );
        assert_eq!(rig.image().state(), State::Failed, "sync {nth}");
        let reader = rig.worker();
        rig.read_all(&reader, 64).expect("reads go on");
        rig.image = None;
        rig.judge_trees().expect("old or new");
        assert!(!rig.disk.contents(IMAGE).is_empty());
    }
}
