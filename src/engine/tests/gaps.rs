//! Another thread comes between two statements of this one: what `order::meanwhile` arranges, on the
//! thread itself.

use std::sync::Arc;

use super::build::Recipe;
use super::hazards::{data, tiny};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, seeds};
use crate::engine::error::lock;
use crate::engine::order::{Gap, is_meanwhile_due, meanwhile};
use crate::engine::{Image, OpenOptions, Step};
use crate::format::Header;
use crate::storage::block_on;
use crate::storage::sim::{CutMode, OpKind, Outcome, SimDisk, yield_now};

/// The instant of a freeze, without a snapshot. Returns the new generation.
fn freeze(image: &Image) -> u64 {
    let active = image.active.as_ref().expect("writable");
    let _l1_lock = lock(&active.l1);
    image.board.raise_generation()
}

/// Has `work` done in a gap, with operations that complete at once.
fn then(disk: &SimDisk, gap: Gap, work: impl FnOnce() + 'static) {
    let disk = disk.clone();
    meanwhile(gap, move || {
        disk.set_immediate(true);
        work();
        disk.set_immediate(false);
    });
}

/// Uses so many slices that those that are not in use leave the smallest cache.
fn evict(client: &Client) {
    let sectors = client.model.borrow().sectors();
    for _ in 0..3 {
        for first in (0..sectors).step_by(64) {
            let read = block_on(client.read(first, 1));
            assert!(read.is_ok(), "{read:?}");
        }
    }
}

/// What another thread does after a request has looked at a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Other {
    /// It writes the whole cluster.
    Writes,
    /// It freezes the tree and writes the whole cluster: the table is another one then.
    Freezes,
    /// It evicts the slice that was found, loads it again, and writes the whole cluster.
    Evicts,
}

/// A request has looked at a cluster that is shared, and will copy what it does not write itself. Before
/// it takes the cluster another thread has written all of it, so that it is ours alone: what is copied
/// now overtakes a write in place.
fn a_cluster_that_is_copied_after_all(other: Other, seed: u64) -> Result<(), Violation> {
    // Two sectors to a cluster, and more slices than the cache holds.
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        ..Recipe::plain(10, 2 << 20)
    };
    let mut rig = Rig::opened(recipe, seed, &tiny())?;
    let client = rig.worker();
    // The table is ours, and its slice is in the file; the cluster of the first two sectors is shared.
    let prepared = rig.act(async move {
        client.write(8, 2).await?;
        client.flush().await
    })?;
    prepared.map_err(|error| Violation(error.chain()))?;
    let (slow, quick, owner) = (rig.worker(), rig.worker(), rig.worker());
    let reader = rig.worker();
    let image = Arc::clone(rig.image());
    let gap = if other == Other::Evicts {
        Gap::Pin
    } else {
        Gap::Take
    };
    then(&rig.disk, gap, move || {
        match other {
            Other::Writes => {}
            Other::Freezes => {
                freeze(&image);
            }
            Other::Evicts => evict(&reader),
        }
        let written = block_on(owner.write(0, 2));
        assert!(written.is_ok(), "{written:?}");
    });
    rig.disk
        .hold(|op| op.kind == OpKind::Write && op.len == 1024);
    rig.driver
        .spawn(async move { slow.write(0, 1).await.is_ok() });
    rig.driver.run_until_stuck();
    assert!(!is_meanwhile_due());
    // In place, whatever the first is doing.
    let written = rig.act(async move { quick.write(1, 1).await })?;
    written.map_err(|error| Violation(error.chain()))?;
    rig.disk.release();
    rig.run()?;
    let reader = rig.worker();
    rig.read_all(&reader, 64)?;
    rig.close()?;
    // Copied flags are missing after the freeze of no snapshot.
    if other == Other::Freezes {
        return rig.judge_trees();
    }
    rig.judge_closed()
}

#[test]
fn what_was_looked_at_is_looked_at_again_when_it_is_taken() {
    for other in [Other::Writes, Other::Freezes, Other::Evicts] {
        for seed in seeds(4) {
            if let Err(violation) = a_cluster_that_is_copied_after_all(other, seed) {
                panic!("{other:?}, SEED={seed}: {violation}");
            }
        }
    }
}

/// Between the moment at which a request moves to the present generation and its wait for the grace of
/// that one there is a freeze. It holds up the grace of the new generation itself.
#[test]
fn a_request_never_waits_for_a_grace_that_it_holds_up() {
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        ..Recipe::plain(10, 64 << 10)
    };
    let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let image = Arc::clone(rig.image());
    let frozen = Arc::clone(&image);
    then(&rig.disk, Gap::Grace, move || {
        freeze(&frozen);
    });
    let written = rig.act(async move { client.write(1, 1).await });
    written.expect("no deadlock").expect("written");
    assert!(!is_meanwhile_due());
    assert!(image.board.end_grace(image.board.generation()));
    let reader = rig.worker();
    rig.read_all(&reader, 8).expect("as written");
    rig.close().expect("closes");
    rig.judge_trees().expect("as written");
}

/// Does the background work until somebody has come to the gap.
fn work_up_to_the_gap(rig: &mut Rig) {
    let client = rig.worker();
    let worked = rig.act(async move {
        while is_meanwhile_due() {
            match client.worker.background_step().await? {
                Step::Idle => break,
                _ => yield_now().await,
            }
        }
        Ok::<_, crate::engine::Error>(())
    });
    worked.expect("an answer").expect("worked");
    assert!(!is_meanwhile_due(), "nobody comes there");
}

/// A snapshot is taken while the background work decides that a table is ours, or that nothing is left
/// to do. Neither is true then.
#[test]
fn a_snapshot_that_comes_before_the_last_word_is_heeded() {
    for gap in [Gap::Own, Gap::Clean] {
        let recipe = Recipe {
            fill: data,
            ..Recipe::plain(12, 256 << 10)
        };
        let mut rig = Rig::opened(recipe, 1, &OpenOptions::default()).expect("opens");
        let (client, other) = (rig.worker(), rig.worker());
        let deleted = rig.act(async move {
            // The table is not copied: it is not ours until the work says so.
            client.snapshot("a").await?;
            client.settle().await;
            client.delete("a").await
        });
        deleted.expect("an answer").expect("deleted");
        then(&rig.disk, gap, move || {
            let taken = block_on(other.snapshot("b"));
            assert!(taken.is_ok(), "{taken:?}");
        });
        work_up_to_the_gap(&mut rig);
        let header = Header::decode(&rig.disk.contents(IMAGE)).expect("a header");
        assert!(header.is_dirty(), "{gap:?}");
        let client = rig.worker();
        let written = rig.act(async move {
            for first in (1..512).step_by(8) {
                client.write(first, 1).await?;
            }
            Ok::<_, crate::engine::Error>(())
        });
        written.expect("an answer").expect("written");
        rig.settle().expect("settles");
        let judged = rig.finish().and_then(|()| rig.judge_snapshots());
        judged.unwrap_or_else(|violation| panic!("{gap:?}: {violation}"));
    }
}

/// What a flush has collected, or is about to, is only in memory until it is written.
#[test]
fn what_a_flush_collects_is_not_evicted() {
    for gap in 1..6 {
        let recipe = Recipe {
            fill: data,
            snapshot: true,
            ..Recipe::plain(10, 2 << 20)
        };
        let mut rig = Rig::opened(recipe, 1, &tiny()).expect("opens");
        let (client, reader) = (rig.worker(), rig.worker());
        then(&rig.disk, Gap::Collect(gap), move || evict(&reader));
        let flushed = rig.act(async move {
            for first in [0, 300, 600, 900] {
                client.write(first, 1).await?;
            }
            client.flush().await
        });
        flushed.expect("an answer").expect("flushed");
        assert!(!is_meanwhile_due());
        let reader = rig.worker();
        rig.read_all(&reader, 64).expect("as written");
        rig.close().expect("closes");
        rig.judge_closed().expect("as written");
    }
}

/// Another thread links, copies tables and drops clusters in one gap between the steps in which a
/// flush collects what it will write. Here it does so on the flush's own thread.
fn others_link_while_a_flush_collects(gap: u32, seed: u64) -> Result<(), Violation> {
    let recipe = Recipe {
        fill: data,
        snapshot: true,
        // Few counts to a block, where the gap is between blocks.
        refcount_order: if gap > 5 { 6 } else { 4 },
        ..Recipe::plain(9, 96 << 10)
    };
    let roomy = OpenOptions {
        l2_cache_size: Some(1 << 20),
        refcount_cache_size: Some(0),
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
    meanwhile(Gap::Collect(gap), move || {
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
    for gap in Gap::COLLECT {
        for seed in seeds(40) {
            if let Err(violation) = others_link_while_a_flush_collects(gap, seed) {
                panic!("gap {gap}, SEED={seed}: {violation}");
            }
        }
    }
}
