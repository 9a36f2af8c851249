//! Every operation of the host fails once, with EIO and with ENOSPC.
//!
//! Whatever fails: the request gets an error of a kind that says so, every read is right, the image
//! is Ready or Failed as the rules say, and what is in the file afterwards is at worst leaky.

use super::build::{Fill, Recipe};
use super::support::{Mix, Rig, Violation, chaos, each_operation_fails_once, seeds, violation};
use crate::engine::{ErrorKind, OpenOptions, State};
use crate::storage::sim::{CutMode, OpKind, SimFileOptions};

/// Most operations of one kind that a scenario makes.
const OPERATIONS_MAX: u64 = 2000;

fn recipes() -> Vec<(&'static str, Recipe)> {
    let plain = Recipe::plain;
    let mixed = |cluster: u64| match cluster % 3 {
        0 => Fill::Data,
        1 => Fill::Compressed,
        _ => Fill::None,
    };
    vec![
        (
            "plain",
            Recipe {
                refcount_order: 6,
                ..plain(9, 64 << 10)
            },
        ),
        (
            "snapshot",
            Recipe {
                fill: mixed,
                snapshot: true,
                ..plain(10, 64 << 10)
            },
        ),
        (
            "backing",
            Recipe {
                fill: mixed,
                backing: Some(40 << 10),
                ..plain(11, 64 << 10)
            },
        ),
        (
            "autoclear",
            Recipe {
                fill: mixed,
                autoclear: 1 << 9,
                ..plain(11, 64 << 10)
            },
        ),
    ]
}

/// One run with the `nth` operation of a kind failing; `false` when there are not so many.
fn run(recipe: Recipe, seed: u64, kind: OpKind, nth: u64, errno: i32) -> Result<bool, Violation> {
    let mut rig = Rig::new(recipe, seed);
    let options = OpenOptions {
        l2_cache_size: Some(0),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    };
    rig.open(&options)?;
    rig.tolerant = true;
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    let mix = Mix {
        discard: 4,
        flush: 3,
        longest: 12,
        ..Mix::ALL
    };
    for number in 0..2 {
        let random = fastrand::Rng::with_seed(seed * 100 + number);
        let client = rig.worker();
        rig.driver.spawn(chaos(client, random, 20, mix));
    }
    rig.run()?;
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    let state = rig.image().state();
    match (kind, state) {
        // Data lost by a failed sync must not be followed by a sync that succeeds.
        (OpKind::Sync, State::Ready | State::Opened) if hit => {
            return violation("the image goes on after a failed sync");
        }
        (OpKind::SetLen | OpKind::Zeroes | OpKind::Punch, State::Failed) => {
            return violation("nothing that counts has failed, but the image has");
        }
        _ => {}
    }
    let reader = rig.worker();
    let sectors = rig.model.borrow().sectors();
    rig.block_on(async move {
        for first in (0..sectors).step_by(16) {
            let _judged = reader.read(first, 16.min(sectors - first)).await;
        }
    });
    rig.verdict()?;
    if state == State::Failed {
        let writer = rig.worker();
        let refused = rig.block_on(async move { writer.write(0, 1).await });
        if refused.map_err(|error| error.kind()) != Err(ErrorKind::Failed) {
            return violation("a failed image takes a write");
        }
        rig.image = None;
        rig.driver.drain();
    } else {
        rig.close()?;
    }
    let mut random = fastrand::Rng::with_seed(seed + nth);
    for mode in [CutMode::AllUnflushed, CutMode::Random] {
        let cut = rig.disk.power_cut(&mut random, mode);
        rig.after_cut(cut, seed + nth)
            .judge_cut(seed + nth, mode == CutMode::AllUnflushed)?;
    }
    Ok(hit)
}

fn every_operation_fails_once(kind: OpKind) {
    for (name, recipe) in recipes() {
        for errno in [libc::EIO, libc::ENOSPC] {
            for seed in seeds(1) {
                let what = format!("{name}, SEED={seed}");
                each_operation_fails_once(&what, (kind, errno), OPERATIONS_MAX, |nth| {
                    run(recipe, seed, kind, nth, errno)
                });
            }
        }
    }
}

#[test]
fn every_read_fails_once() {
    every_operation_fails_once(OpKind::Read);
}

#[test]
fn every_write_fails_once() {
    every_operation_fails_once(OpKind::Write);
}

#[test]
fn every_write_of_zeroes_and_every_punched_hole_fails_once() {
    every_operation_fails_once(OpKind::Zeroes);
    every_operation_fails_once(OpKind::Punch);
}

#[test]
fn every_sync_fails_once() {
    every_operation_fails_once(OpKind::Sync);
}

/// Whoever closes an image may go on with it when that has failed: nothing is accepted then that no
/// flush could make durable any more.
#[test]
fn every_sync_of_a_close_fails_the_image() {
    let mut hits = 0;
    for nth in 1.. {
        let mut rig = Rig::new(recipes()[1].1, nth);
        rig.open(&OpenOptions::default()).expect("opens");
        rig.tolerant = true;
        let client = rig.worker();
        rig.disk.fail_nth_of(OpKind::Sync, nth, libc::EIO);
        let closed = rig.block_on(async move {
            client.write(0, 40).await?;
            client.discard(64, 8).await?;
            client.worker.close().await
        });
        if closed.is_ok() {
            break;
        }
        hits += 1;
        assert_eq!(rig.image().state(), State::Failed, "sync {nth}");
    }
    assert!(hits > 3, "{hits}");
}

/// The header's `fdatasync` fails while a flush waits for its own: the flush must not succeed.
#[test]
fn a_sync_that_succeeds_beside_a_failed_one_makes_nothing_durable() {
    let recipe = recipes().pop().expect("autoclear").1;
    for seed in 100..160 {
        for nth in 1..4 {
            if let Err(violation) = run(recipe, seed, OpKind::Sync, nth, libc::EIO) {
                panic!("Sync {nth}, SEED={seed}: {violation}");
            }
        }
    }
}

#[test]
fn every_change_of_length_fails_once() {
    every_operation_fails_once(OpKind::SetLen);
}

/// No space for new clusters: the guest's error, and the image goes on, before and after there is
/// space again.
#[test]
fn a_full_host_is_the_guests_error_and_nothing_is_lost() {
    for (device, seed) in [(false, 1), (true, 2)] {
        let fill = |cluster| if cluster < 8 { Fill::Data } else { Fill::None };
        let slots = if device { Some(12) } else { None };
        let recipe = Recipe {
            fill,
            device: slots,
            ..Recipe::plain(12, 256 << 10)
        };
        let mut rig = Rig::new(recipe, seed);
        if !device {
            let len_max = rig.disk.contents(super::support::IMAGE).len() as u64 + 20 * 4096;
            rig.disk.set_options(
                super::support::IMAGE,
                SimFileOptions {
                    len_max,
                    ..SimFileOptions::default()
                },
            );
        }
        rig.open(&OpenOptions::default()).expect("opens");
        rig.tolerant = true;
        let client = rig.worker();
        let errors = rig.block_on(async move {
            let mut errors = Vec::new();
            for cluster in 8..64 {
                if let Err(error) = client.write(cluster * 8, 5).await {
                    errors.push(error.kind());
                }
                // What is there can still be written.
                client.write(cluster % 8 * 8, 3).await.expect("in place");
            }
            client.discard(0, 32).await.expect("discard");
            client.flush().await.expect("flush");
            client.flush().await.expect("flush");
            client
                .write(0, 8)
                .await
                .expect("the discarded space is free again");
            errors
        });
        rig.verdict().expect("reads are right");
        assert!(errors.len() > 20, "it was full: {}", errors.len());
        assert!(
            errors.iter().all(|kind| *kind == ErrorKind::NoSpace),
            "{errors:?}"
        );
        assert_eq!(rig.image().state(), State::Ready);
        rig.close().expect("closes");
        rig.judge_closed().expect("clean");
    }
}

/// A device is full of clusters that were given back but for a flush: no write fails for that.
#[test]
fn what_was_given_back_is_used_before_a_write_fails_for_want_of_space() {
    for seed in seeds(4) {
        let recipe = Recipe {
            device: Some(24),
            ..Recipe::plain(12, 64 << 10)
        };
        let mut rig = Rig::new(recipe, seed);
        rig.open(&OpenOptions::default()).expect("opens");
        let client = rig.worker();
        rig.block_on(async move {
            for round in 0..100 {
                let first = round % 16 * 8;
                client.write(first, 3).await.expect("there is space");
                client.discard(first, 8).await.expect("discard");
            }
        });
        rig.verdict().expect("reads are right");
        rig.close().expect("closes");
        rig.judge_closed().expect("clean");
    }
}

/// Two callers wait for an `fdatasync` of their own. The host tells the first that data was lost, and
/// nobody else.
#[test]
fn no_sync_succeeds_after_one_that_failed() {
    let mut rig = Rig::new(Recipe::plain(12, 64 << 10), 1);
    rig.open(&OpenOptions::default()).expect("opens");
    let active = rig.image().active.as_ref().expect("writable");
    let (header, storage) = (std::sync::Arc::clone(&active.header), rig.disk.storage());
    let before = rig.disk.syncs();
    rig.disk.fail_nth_of(OpKind::Sync, 1, libc::EIO);
    let (first, second) = rig.block_on(async move {
        futures_util::future::join(header.sync_data(&storage), header.sync_data(&storage)).await
    });
    for answer in [first, second] {
        assert_eq!(answer.map_err(|error| error.kind()), Err(ErrorKind::Failed));
    }
    assert_eq!(rig.disk.syncs() - before, 1);
}
