//! The power goes at every step of work on an image.
//!
//! Several workers run a scenario once. Each state that a cut may leave (see `cuts`) is judged:
//! consistent without a repair, every sector what it was at the last completed flush or a later
//! version, the snapshot as ever, fit for more work.

use std::collections::HashSet;

use super::build::{Fill, Recipe};
use super::cuts::{self, Cuts, cut_tests};
use super::support::{IMAGE, Mix, Rig, Violation, chaos};
use crate::engine::OpenOptions;
use crate::format::Header;
use crate::storage::sim::SimDisk;

/// Every so many states work goes on after the cut.
const WORK_EVERY: usize = 6;

/// See the module text.
#[derive(Clone, Copy)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) recipe: Recipe,
    pub(super) workers: u64,
    pub(super) requests: u32,
    pub(super) mix: Mix,
    pub(super) options: fn() -> OpenOptions,
}

fn small_caches() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(1 << 10),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    }
}

fn small_slices() -> OpenOptions {
    OpenOptions {
        l2_cache_entry_size: Some(512),
        ..OpenOptions::default()
    }
}

/// All scenarios.
pub(super) fn scenarios() -> Vec<Scenario> {
    let writes = Mix {
        zero: 0,
        discard: 0,
        ..Mix::ALL
    };
    let plain = Recipe::plain;
    let base = Scenario {
        name: "allocating writes",
        recipe: plain(9, 96 << 10),
        workers: 3,
        requests: 14,
        mix: writes,
        options: small_caches,
    };
    let data = |_| Fill::Data;
    vec![
        base,
        Scenario {
            name: "overwrites",
            recipe: Recipe {
                fill: data,
                ..plain(12, 96 << 10)
            },
            requests: 25,
            ..base
        },
        Scenario {
            name: "copy on write of an image with a snapshot",
            recipe: Recipe {
                fill: data,
                snapshot: true,
                ..plain(10, 64 << 10)
            },
            ..base
        },
        Scenario {
            name: "discard and reuse",
            recipe: Recipe {
                fill: data,
                ..plain(11, 64 << 10)
            },
            mix: Mix {
                discard: 6,
                zero: 2,
                flush: 4,
                ..Mix::ALL
            },
            requests: 30,
            ..base
        },
        Scenario {
            name: "discard and reuse of old bytes",
            recipe: Recipe {
                fill: data,
                can_punch: false,
                ..plain(12, 64 << 10)
            },
            mix: Mix {
                discard: 6,
                flush: 4,
                longest: 16,
                ..Mix::ALL
            },
            requests: 30,
            ..base
        },
        Scenario {
            name: "write-zeroes",
            recipe: Recipe {
                fill: data,
                ..plain(10, 64 << 10)
            },
            mix: Mix {
                zero: 10,
                discard: 0,
                ..Mix::ALL
            },
            requests: 20,
            ..base
        },
        Scenario {
            name: "table copies",
            recipe: Recipe {
                fill: data,
                snapshot: true,
                ..plain(9, 192 << 10)
            },
            mix: Mix {
                longest: 4,
                flush: 4,
                ..writes
            },
            requests: 20,
            ..base
        },
        Scenario {
            name: "growth with refcount blocks",
            recipe: Recipe {
                refcount_order: 6,
                ..plain(9, 192 << 10)
            },
            mix: Mix { flush: 3, ..writes },
            requests: 14,
            ..base
        },
        Scenario {
            name: "growth of the refcount table",
            recipe: Recipe {
                refcount_order: 6,
                // All that one cluster of the refcount table can name but some 100 clusters.
                fill: |cluster| {
                    if cluster < 470 {
                        Fill::None
                    } else {
                        Fill::Data
                    }
                },
                ..plain(9, 2150 << 10)
            },
            workers: 3,
            requests: 9,
            mix: Mix {
                read: 0,
                flush: 4,
                zero: 1,
                area: 470,
                ..writes
            },
            options: small_slices,
        },
        Scenario {
            name: "compressed clusters rewritten",
            recipe: Recipe {
                fill: |cluster| {
                    if cluster % 4 == 3 {
                        Fill::Data
                    } else {
                        Fill::Compressed
                    }
                },
                ..plain(11, 96 << 10)
            },
            mix: Mix {
                discard: 1,
                ..writes
            },
            requests: 20,
            ..base
        },
        Scenario {
            name: "copy on write from a backing file",
            recipe: Recipe {
                backing: Some(70 << 10),
                ..plain(11, 96 << 10)
            },
            mix: Mix {
                longest: 6,
                discard: 1,
                ..writes
            },
            requests: 18,
            ..base
        },
        Scenario {
            name: "many queues with joined flushes",
            recipe: plain(10, 96 << 10),
            workers: 6,
            requests: 10,
            mix: Mix {
                flush: 8,
                longest: 4,
                ..Mix::ALL
            },
            ..base
        },
        Scenario {
            name: "write-through",
            recipe: Recipe {
                version: 2,
                ..plain(10, 96 << 10)
            },
            requests: 12,
            mix: Mix {
                write_through: true,
                longest: 8,
                ..writes
            },
            ..base
        },
        Scenario {
            name: "a device with old bytes",
            recipe: Recipe {
                device: Some(300),
                can_punch: false,
                ..plain(11, 96 << 10)
            },
            mix: Mix {
                longest: 6,
                discard: 2,
                ..Mix::ALL
            },
            requests: 20,
            ..base
        },
    ]
}

/// Runs a scenario once and judges `cuts` cuts at each step; stops at `states_max` states. Adds the
/// states to `seen`. Returns the disk with the closed image.
pub(super) fn run(
    scenario: &Scenario,
    seed: u64,
    cuts: usize,
    states_max: usize,
    seen: &mut HashSet<u64>,
) -> Result<SimDisk, Violation> {
    let mut rig = Rig::new(scenario.recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0xc0ff_ee00);
    rig.open(&(scenario.options)())?;
    let tasks: Vec<_> = (0..scenario.workers)
        .map(|_| {
            let worker = rig.worker();
            rig.driver.spawn(chaos(
                worker,
                random.fork(),
                scenario.requests,
                scenario.mix,
            ))
        })
        .collect();
    let mut power = Cuts {
        cuts,
        moments: 1,
        states_max,
        seen,
    };
    power.run(&mut rig, &tasks, &mut random, |mut after, seed, number| {
        after.judge_cut(seed, number.is_multiple_of(WORK_EVERY))
    })?;
    rig.close()?;
    rig.judge_closed()?;
    Ok(rig.disk)
}

fn scenario(name: &str) -> Scenario {
    scenarios()
        .into_iter()
        .find(|scenario| scenario.name == name)
        .expect("a scenario")
}

#[test]
fn growth_of_the_refcount_table_takes_place() {
    let scenario = scenario("growth of the refcount table");
    for seed in 1..4 {
        let disk = run(&scenario, seed, 0, 0, &mut HashSet::new()).expect("no cut, no violation");
        let header = Header::decode(&disk.contents(IMAGE)).expect("a header");
        assert!(header.refcount_table_clusters > 1, "seed {seed}");
    }
}

fn survives(name: &str) {
    let scenario = scenario(name);
    cuts::survives(name, 20, |seed, states_max, seen| {
        run(&scenario, seed, 3, states_max, seen).map(drop)
    });
}

cut_tests! {
    scenarios, survives:
    a_cut_during_allocating_writes: "allocating writes",
    a_cut_during_overwrites: "overwrites",
    a_cut_during_copy_on_write: "copy on write of an image with a snapshot",
    a_cut_during_discard_and_reuse: "discard and reuse",
    a_cut_during_reuse_of_old_bytes: "discard and reuse of old bytes",
    a_cut_during_write_zeroes: "write-zeroes",
    a_cut_during_table_copies: "table copies",
    a_cut_during_growth: "growth with refcount blocks",
    a_cut_during_growth_of_the_refcount_table: "growth of the refcount table",
    a_cut_while_compressed_clusters_are_rewritten: "compressed clusters rewritten",
    a_cut_during_copies_from_a_backing_file: "copy on write from a backing file",
    a_cut_during_joined_flushes: "many queues with joined flushes",
    a_cut_during_write_through: "write-through",
    a_cut_of_a_device: "a device with old bytes",
}
