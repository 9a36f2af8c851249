//! Snapshots under load: each is one instant of the disk, and stays what it was.
//!
//! Several queues do random work while another task takes and deletes snapshots and does the
//! background work. The model knows when each write was submitted and when it completed; a snapshot
//! that holds a write must hold whatever completed before that write was submitted.

use std::cell::RefCell;
use std::rc::Rc;

use super::broken::{Broken, notices};
use super::build::{Fill, Recipe, read_snapshot, snapshot_entries};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, seeds, small_caches, violation};
use crate::engine::order::Rule;
use crate::engine::{NewSnapshot, OpenOptions, Selector, Step};
use crate::storage::sim::{SimDisk, yield_now};

/// What is known of the snapshots of an image.
#[derive(Default)]
pub(super) struct Shelf {
    /// Snapshots that are there, with what they hold.
    pub(super) kept: Vec<(String, Vec<u8>)>,
    /// When a create that has not returned yet was called; on version 2 until it is committed.
    pub(super) creating: Vec<u64>,
    /// Ids of snapshots whose delete was called.
    pub(super) deleted: Vec<String>,
}

/// A run of the oracle.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) recipe: Recipe,
    pub(super) workers: u64,
    pub(super) requests: u32,
    pub(super) mix: Mix,
    pub(super) options: fn() -> OpenOptions,
    /// Snapshots taken.
    pub(super) snapshots: u32,
    /// Most that are kept.
    pub(super) kept: usize,
}

/// Every kind of image that makes a difference to snapshots.
pub(super) fn plans() -> Vec<Plan> {
    let plain = Recipe::plain;
    let data = |_| Fill::Data;
    let base = Plan {
        name: "data",
        recipe: Recipe {
            fill: data,
            ..plain(11, 96 << 10)
        },
        workers: 4,
        requests: 40,
        mix: Mix {
            longest: 8,
            zero: 1,
            discard: 1,
            ..Mix::ALL
        },
        options: OpenOptions::default,
        snapshots: 6,
        kept: 3,
    };
    vec![
        base,
        Plan {
            name: "an empty image",
            recipe: plain(10, 160 << 10),
            ..base
        },
        Plan {
            name: "512-byte clusters",
            recipe: Recipe {
                fill: |cluster| {
                    if cluster % 3 == 0 {
                        Fill::None
                    } else {
                        Fill::Data
                    }
                },
                ..plain(9, 96 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "a snapshot that is settled",
            recipe: Recipe {
                fill: data,
                snapshot: true,
                ..plain(10, 96 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "discards",
            recipe: Recipe {
                fill: data,
                ..plain(10, 64 << 10)
            },
            mix: Mix {
                zero: 4,
                discard: 6,
                ..Mix::ALL
            },
            ..base
        },
        Plan {
            name: "compressed and zero clusters",
            recipe: Recipe {
                fill: |cluster| match cluster % 5 {
                    0 | 1 => Fill::Compressed,
                    2 => Fill::Zero,
                    3 => Fill::ZeroKept,
                    _ => Fill::Data,
                },
                ..plain(11, 96 << 10)
            },
            ..base
        },
        Plan {
            name: "narrow refcounts",
            recipe: Recipe {
                fill: data,
                refcount_order: 3,
                ..plain(10, 96 << 10)
            },
            ..base
        },
        Plan {
            name: "wide refcounts",
            recipe: Recipe {
                fill: data,
                refcount_order: 6,
                ..plain(9, 96 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "refcounts of 2 bits",
            recipe: Recipe {
                fill: data,
                refcount_order: 1,
                ..plain(10, 96 << 10)
            },
            // With another one there would be no count to spare.
            snapshots: 1,
            kept: 1,
            ..base
        },
        Plan {
            name: "refcounts of 4 bits",
            recipe: Recipe {
                fill: data,
                refcount_order: 2,
                ..plain(9, 64 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "refcounts of 32 bits",
            recipe: Recipe {
                fill: data,
                refcount_order: 5,
                ..plain(10, 96 << 10)
            },
            ..base
        },
        Plan {
            name: "version 2",
            recipe: Recipe {
                fill: data,
                version: 2,
                ..plain(11, 96 << 10)
            },
            ..base
        },
        Plan {
            name: "a device",
            recipe: Recipe {
                fill: data,
                device: Some(600),
                can_punch: false,
                ..plain(10, 96 << 10)
            },
            ..base
        },
    ]
}

/// Reads a snapshot and holds it against the model.
fn judge(
    client: &Client,
    disk: &SimDisk,
    id: &str,
    (called, returned): (u64, u64),
) -> Result<Vec<u8>, Violation> {
    let bytes = read_snapshot(&disk.contents(IMAGE), None, id).map_err(Violation)?;
    let model = client.model.borrow();
    model
        .judge_snapshot(&bytes, called, returned)
        .map_err(|error| Violation(format!("snapshot {id} {error}")))?;
    Ok(bytes)
}

/// Takes and deletes snapshots, and does the background work, until there is nothing to do.
pub(super) async fn snapshots(
    client: Client,
    disk: SimDisk,
    mut random: fastrand::Rng,
    plan: Plan,
    shelf: Rc<RefCell<Shelf>>,
) {
    let worker = Rc::clone(&client.worker);
    let mut left = plan.snapshots;
    let mut pending: Vec<(String, u64, u64)> = Vec::new();
    loop {
        for _ in 0..random.u8(..30) {
            yield_now().await;
        }
        if client.is_bad() {
            return;
        }
        let full = shelf.borrow().kept.len() + pending.len() >= plan.kept;
        if left > 0 && !full && random.u8(..3) == 0 {
            left -= 1;
            let called = client.model.borrow_mut().watch();
            shelf.borrow_mut().creating.push(called);
            let new = NewSnapshot {
                name: format!("s{left}"),
                date_sec: 1,
                date_nsec: 2,
                vm_clock_nsec: 3,
            };
            let created = match worker.create_snapshots(&[new]).await {
                Ok(created) => created,
                Err(error) => return client.complain(format!("create: {}", error.chain())),
            };
            let returned = client.model.borrow_mut().watch();
            client.model.borrow_mut().unwatch(returned);
            let id = created[0].snapshot.id.clone();
            pending.push((id, called, returned));
        } else if random.u8(..6) == 0 && (full || left == 0) && !shelf.borrow().kept.is_empty() {
            let index = random.usize(..shelf.borrow().kept.len());
            let (id, _) = shelf.borrow_mut().kept.remove(index);
            shelf.borrow_mut().deleted.push(id.clone());
            let selector = Selector {
                id: Some(id.clone()),
                name: None,
            };
            if let Err(error) = worker.delete_snapshot(&selector).await {
                return client.complain(format!("delete {id}: {}", error.chain()));
            }
        } else {
            match worker.background_step().await {
                Ok(Step::Idle) if left == 0 && pending.is_empty() => return,
                Ok(_) => {}
                Err(error) => return client.complain(format!("step: {}", error.chain())),
            }
        }
        // On version 2 a snapshot is in the file once it is settled.
        let committed = snapshot_entries(&disk.contents(IMAGE)).unwrap_or_default();
        let there = |id: &str| committed.iter().any(|entry| entry.id == id.as_bytes());
        for (id, called, returned) in pending.extract_if(.., |(id, ..)| there(id)) {
            match judge(&client, &disk, &id, (called, returned)) {
                Ok(bytes) => {
                    let mut shelf = shelf.borrow_mut();
                    shelf.kept.push((id, bytes));
                    shelf.creating.retain(|other| *other != called);
                }
                Err(violation) => return client.complain(violation),
            }
            client.model.borrow_mut().unwatch(called);
        }
    }
}

/// Every snapshot is as it was.
pub(super) fn judge_shelf(bytes: &[u8], shelf: &Shelf) -> Result<(), Violation> {
    for (id, content) in &shelf.kept {
        let now = read_snapshot(bytes, None, id).map_err(Violation)?;
        if now != *content {
            return violation(format!("snapshot {id} has changed"));
        }
    }
    Ok(())
}

/// Rules whose breach needs no power cut; those of the others are in `snapshot_crash`.
pub(super) const CONCURRENT: [Rule; 6] = [
    Rule::PinAfterAvail,
    Rule::RaiseUnderL1Lock,
    Rule::GraceBeforeCopy,
    Rule::GraceBeforeCommit,
    Rule::CheckAtLink,
    Rule::DeferDecrement,
];

/// Runs a plan once.
fn run(plan: &Plan, seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::new(plan.recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0x0ac1_e000);
    rig.open(&(plan.options)())?;
    let shelf = Rc::new(RefCell::new(Shelf::default()));
    for _ in 0..plan.workers {
        let mut worker = rig.worker();
        worker.latent = true;
        let requests = plan.requests;
        rig.driver
            .spawn(chaos(worker, random.fork(), requests, plan.mix));
    }
    let worker = rig.worker();
    let disk = rig.disk.clone();
    let shelf_of_task = Rc::clone(&shelf);
    rig.driver
        .spawn(snapshots(worker, disk, random.fork(), *plan, shelf_of_task));
    rig.run()?;
    judge_shelf(&rig.disk.contents(IMAGE), &shelf.borrow())?;
    rig.close()?;
    rig.judge_closed()?;
    judge_shelf(&rig.disk.contents(IMAGE), &shelf.borrow())
}

/// Seeds for each plan: thousands of snapshots in all.
const SEEDS: u64 = 40;

#[test]
fn every_snapshot_under_load_is_one_instant_and_stays_so() {
    for plan in plans() {
        for seed in seeds(SEEDS) {
            if let Err(violation) = run(&plan, seed) {
                panic!("{}, SEED={seed}: {violation}", plan.name);
            }
        }
    }
}

#[test]
fn every_rule_of_snapshots_is_missed_when_it_is_broken() {
    for rule in CONCURRENT {
        let broken = Broken::new(rule);
        let noticed = plans().iter().find_map(|plan| {
            (1..=400).find_map(|seed| {
                let found = notices(|| run(plan, seed))?;
                Some(format!("{} (seed {seed}): {found}", plan.name))
            })
        });
        drop(broken);
        let told = noticed.unwrap_or_else(|| panic!("nobody notices that {rule:?} is broken"));
        log::info!("{rule:?}: {told}");
    }
}
