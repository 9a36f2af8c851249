//! One dangerous interleaving per test, arranged by holding operations back.
//!
//! Each is a function that gives a violation back, so that `rules` can run them with a rule broken.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};

use super::build::{Fill, Recipe};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, counted, seeds, violation};
use crate::engine::order::{GAPS, meanwhile};
use crate::engine::{ErrorKind, OpenOptions, State};
use crate::storage::block_on;
use crate::storage::sim::{CutMode, Fault, OpKind, Outcome, SimDisk};
use crate::units::to_usize;

fn data(_: u64) -> Fill {
    Fill::Data
}

/// The smallest caches there are.
fn tiny() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(0),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    }
}

impl Rig {
    fn opened(recipe: Recipe, seed: u64, options: &OpenOptions) -> Result<Self, Violation> {
        let mut rig = Self::new(recipe, seed);
        rig.open(options)?;
        Ok(rig)
    }

    /// Runs one future among the tasks; a deadlock is a violation.
    fn act<F: Future + 'static>(&mut self, future: F) -> Result<F::Output, Violation> {
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

    fn finish(&mut self) -> Result<(), Violation> {
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
    fn read_all(&mut self, client: &Client, piece: u64) -> Result<(), Violation> {
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

/// Another thread links, copies tables and drops clusters in one gap between the steps in which a
/// flush collects what it will write. Here it does so on the flush's own thread.
fn others_link_while_a_flush_collects(gap: u32, seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        ..Recipe::plain(9, 96 << 10)
    };
    let roomy = OpenOptions {
        l2_cache_size: Some(1 << 20),
        ..OpenOptions::default()
    };
    let mix = Mix {
        discard: 6,
        flush: 0,
        longest: 4,
        ..Mix::ALL
    };
    let mut rig = Rig::opened(recipe, seed, &roomy)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let (first, other) = (rig.worker(), rig.worker());
    rig.act(chaos(first.clone(), random.fork(), 6, mix))?;
    let (disk, others) = (rig.disk.clone(), random.fork());
    meanwhile(gap, move || {
        disk.set_immediate(true);
        block_on(chaos(other, others, 8, mix));
        disk.set_immediate(false);
    });
    rig.driver.spawn(async move {
        // The second writes what the first has allowed.
        first.flush().await.is_ok() && first.flush().await.is_ok()
    });
    loop {
        let disk = rig.disk.clone();
        let moment = move || (disk.ops(), disk.in_flight().len());
        let before = moment();
        let outcome = rig.driver.run_until(|| moment() != before);
        rig.verdict()?;
        if outcome == Outcome::Stuck {
            break;
        }
        let mode = match random.u8(..4) {
            0 => CutMode::NothingUnflushed,
            1 => CutMode::AllButOneWrite,
            _ => CutMode::Random,
        };
        let cut = rig.disk.power_cut(&mut random, mode);
        rig.after_cut(cut, seed).judge_cut(seed, false)?;
    }
    rig.finish()
}

#[test]
fn what_others_link_while_a_flush_collects_is_written_in_order() {
    for gap in 1..=GAPS {
        for seed in seeds(40) {
            if let Err(violation) = others_link_while_a_flush_collects(gap, seed) {
                panic!("gap {gap}, SEED={seed}: {violation}");
            }
        }
    }
}
