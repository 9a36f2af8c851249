//! The power goes at every step of creating, settling and deleting snapshots under load.
//!
//! Each state that a cut may leave is judged twice in part: by this engine (open, finish what is
//! left, more work, close) and by `qemu-img check -r all` on a copy. Afterwards the image is clean,
//! every flushed sector is there, and every snapshot that was committed holds what it held.

use std::cell::RefCell;
use std::collections::HashSet;
use std::process::Command;
use std::rc::Rc;

use super::broken::{Broken, notices};
use super::build::{read_snapshot, snapshot_entries};
use super::cuts::{self, Cuts, cut_tests};
use super::oracle::{CONCURRENT, Plan, Shelf, judge_shelf, plans, snapshots};
use super::support::{IMAGE, Rig, Violation, chaos, violation};
use crate::engine::check::{Problem, Severity};
use crate::engine::order::Rule;
use crate::format::Header;

/// Every so many states QEMU repairs a copy.
const QEMU_EVERY: usize = 40;

/// What is in the image after a cut, whichever way it was opened since.
fn judge_contents(rig: &Rig, bytes: &[u8], shelf: &Shelf) -> Result<(), Violation> {
    rig.judge_active(bytes)?;
    judge_shelf(bytes, shelf)?;
    // A snapshot that was about to be: an instant since its create was called.
    let entries = snapshot_entries(bytes).map_err(Violation)?;
    let mut strange = 0;
    for entry in &entries {
        let id = String::from_utf8_lossy(&entry.id).into_owned();
        let known = shelf.kept.iter().any(|(kept, _)| *kept == id)
            || shelf.deleted.contains(&id)
            || (rig.recipe.snapshot && entry.name == b"one");
        if known {
            continue;
        }
        strange += 1;
        let Some(called) = shelf.creating.first() else {
            return violation(format!("snapshot {id} comes from nowhere"));
        };
        let content = read_snapshot(bytes, None, &id).map_err(Violation)?;
        rig.model
            .borrow()
            .judge_snapshot(&content, *called, u64::MAX)
            .map_err(|error| Violation(format!("snapshot {id} {error}")))?;
    }
    if strange > shelf.creating.len() {
        return violation("more snapshots than were asked for");
    }
    Ok(())
}

/// QEMU repairs a copy of what the cut has left.
fn judge_by_qemu(rig: &Rig, shelf: &Shelf) -> Result<(), Violation> {
    let dir = tempfile::tempdir().map_err(|error| Violation(error.to_string()))?;
    let path = dir.path().join("cut.qcow2");
    rig.disk
        .export(IMAGE, &path)
        .map_err(|error| Violation(error.to_string()))?;
    let qemu = |arguments: &[&str]| -> Result<std::process::Output, Violation> {
        Command::new("qemu-img")
            .args(arguments)
            .arg(&path)
            .output()
            .map_err(|error| Violation(format!("qemu-img: {error}")))
    };
    let repair = qemu(&["check", "-q", "-r", "all"])?;
    let check = qemu(&["check"])?;
    if !check.status.success() {
        return violation(format!(
            "after QEMU's repair ({}): {}{}",
            String::from_utf8_lossy(&repair.stderr),
            String::from_utf8_lossy(&check.stdout),
            String::from_utf8_lossy(&check.stderr),
        ));
    }
    let bytes = std::fs::read(&path).map_err(|error| Violation(error.to_string()))?;
    judge_contents(rig, &bytes, shelf).map_err(|error| Violation(format!("QEMU's repair: {error}")))
}

/// Judges what a cut has left.
fn judge(mut rig: Rig, shelf: &Shelf, seed: u64, by_qemu: bool) -> Result<(), Violation> {
    let bytes = rig.disk.contents(IMAGE);
    let header = Header::decode(&bytes).map_err(|error| Violation(error.to_string()))?;
    judge_contents(&rig, &bytes, shelf)?;
    let report = rig.check()?;
    let is_sound = report.is_consistent() && report.overlaps == 0;
    if !header.is_dirty() && header.version >= 3 && !is_sound {
        return violation(format!("not dirty, but: {:?}", report.problems));
    }
    // The dirty bit excuses counts that are too low, and copied flags, but no count of 0: QEMU's repair
    // would have to count everything anew. Version 2 has no such bit, and is excused for flags alone.
    let is_too_low = |problem: &&Problem| {
        let what = if header.version >= 3 {
            " has refcount 0, but "
        } else {
            " has refcount "
        };
        problem.severity == Severity::Corruption && problem.text.contains(what)
    };
    if let Some(problem) = report.problems.iter().find(is_too_low) {
        return violation(format!("a count that nothing excuses: {problem}"));
    }
    if by_qemu {
        judge_by_qemu(&rig, shelf)?;
    }
    rig.disk.set_immediate(true);
    rig.open(&crate::engine::OpenOptions::default())?;
    let since = rig.model.borrow().flush_floor();
    let content = rig.read_whole()?;
    rig.model.borrow().judge(0, &content, since)?;
    rig.restart(&content);
    let client = rig.worker();
    let mix = super::support::Mix::ALL;
    let work = chaos(client, fastrand::Rng::with_seed(seed), 20, mix);
    rig.driver.spawn(work);
    rig.settle()?;
    rig.run()?;
    rig.settle()?;
    rig.close()?;
    let report = rig.check()?;
    if !report.is_consistent() || report.overlaps > 0 {
        return violation(format!("after more work: {:?}", report.problems));
    }
    let bytes = rig.disk.contents(IMAGE);
    judge_shelf(&bytes, shelf)
}

/// Runs a plan once and judges `cuts` cuts at each step.
fn run(
    plan: &Plan,
    seed: u64,
    cuts: usize,
    states_max: usize,
    qemu_every: usize,
    seen: &mut HashSet<u64>,
) -> Result<(), Violation> {
    let mut rig = Rig::new(plan.recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0x0c07_ac1e);
    rig.open(&(plan.options)())?;
    let shelf = Rc::new(RefCell::new(Shelf::default()));
    let mut tasks = Vec::new();
    for _ in 0..plan.workers {
        let work = chaos(rig.worker(), random.fork(), plan.requests, plan.mix);
        tasks.push(rig.driver.spawn(work));
    }
    let (worker, disk) = (rig.worker(), rig.disk.clone());
    let work = snapshots(worker, disk, random.fork(), *plan, Rc::clone(&shelf));
    tasks.push(rig.driver.spawn(work));
    let mut power = Cuts {
        cuts,
        moments: 4,
        states_max,
        seen,
    };
    power.run(&mut rig, &tasks, &mut random, |after, seed, number| {
        judge(
            after,
            &shelf.borrow(),
            seed,
            number.is_multiple_of(qemu_every),
        )
    })?;
    rig.close()?;
    rig.judge_closed()?;
    judge_shelf(&rig.disk.contents(IMAGE), &shelf.borrow())
}

fn survives(name: &str) {
    let plan = plans()
        .into_iter()
        .find(|plan| plan.name == name)
        .expect("a plan");
    cuts::survives(name, 40, |seed, states_max, seen| {
        run(&plan, seed, 2, states_max, QEMU_EVERY, seen)
    });
}

cut_tests! {
    plans, survives:
    a_cut_with_data: "data",
    a_cut_of_an_empty_image: "an empty image",
    a_cut_with_small_clusters: "512-byte clusters",
    a_cut_with_a_settled_snapshot: "a snapshot that is settled",
    a_cut_with_discards: "discards",
    a_cut_with_compressed_clusters: "compressed and zero clusters",
    a_cut_with_narrow_refcounts: "narrow refcounts",
    a_cut_with_wide_refcounts: "wide refcounts",
    a_cut_with_refcounts_of_2_bits: "refcounts of 2 bits",
    a_cut_with_refcounts_of_4_bits: "refcounts of 4 bits",
    a_cut_with_refcounts_of_32_bits: "refcounts of 32 bits",
    a_cut_of_version_2: "version 2",
    a_cut_of_a_device: "a device",
}

#[test]
fn every_order_of_snapshots_is_missed_when_it_is_broken() {
    // The others are about what runs side by side (see `oracle`).
    let durable = Rule::SNAPSHOT
        .into_iter()
        .filter(|rule| !CONCURRENT.contains(rule));
    for rule in durable {
        let broken = Broken::new(rule);
        let noticed = plans().iter().find_map(|plan| {
            (1..=12).find_map(|seed| {
                notices(|| run(plan, seed, 3, 2000, usize::MAX, &mut HashSet::new()))
            })
        });
        drop(broken);
        assert!(noticed.is_some(), "nobody notices that {rule:?} is broken");
    }
}
