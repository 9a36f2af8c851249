//! Every operation of what internal snapshots do fails once, with EIO and with ENOSPC: create,
//! settle, delete, re-own, revert, and the rebuild at open.
//!
//! Whatever fails: the command or the step says so, every read is right, the image is ready or has
//! failed. One that goes on comes to a clean end. One that has failed, or that the power goes of, is
//! right again after the next open: clean, every flushed sector there, and every snapshot that was
//! there and was not deleted, as it was.

use std::cell::RefCell;
use std::rc::Rc;

use super::build::{Fill, Recipe, read_snapshot, read_tree, snapshot_entries};
use super::support::{
    Client, IMAGE, Mix, Rig, Violation, chaos, each_operation_fails_once, seeds, violation,
};
use crate::engine::{
    BackgroundKind, Error, ErrorKind, NewSnapshot, OpenOptions, Selector, State, Step,
};
use crate::storage::sim::{CutMode, OpKind, yield_now};

/// Most operations of one kind that a run makes.
const OPERATIONS_MAX: u64 = 3000;
/// Steps that fail in a row for one failure at most.
const RETRIES_MAX: u32 = 1;

/// The failures that matter for a kind of operation.
fn errnos(kind: OpKind) -> &'static [i32] {
    match kind {
        OpKind::Read => &[libc::EIO],
        _ => &[libc::EIO, libc::ENOSPC],
    }
}

fn small() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(1 << 10),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    }
}

fn mixed(cluster: u64) -> Fill {
    match cluster % 5 {
        0 | 1 => Fill::Data,
        2 => Fill::Compressed,
        3 => Fill::ZeroKept,
        _ => Fill::None,
    }
}

fn recipes() -> Vec<(&'static str, Recipe)> {
    let plain = Recipe::plain;
    vec![
        (
            "mixed",
            Recipe {
                fill: mixed,
                refcount_order: 6,
                ..plain(9, 32 << 10)
            },
        ),
        (
            "with a snapshot, narrow refcounts",
            Recipe {
                fill: |_| Fill::Data,
                refcount_order: 3,
                snapshot: true,
                ..plain(10, 48 << 10)
            },
        ),
        (
            "version 2",
            Recipe {
                fill: |cluster| {
                    if cluster % 3 == 2 {
                        Fill::None
                    } else {
                        Fill::Data
                    }
                },
                version: 2,
                ..plain(9, 32 << 10)
            },
        ),
    ]
}

/// What is known of a snapshot.
#[derive(Clone, Debug)]
struct Shot {
    name: &'static str,
    /// When its create was called, and when it returned.
    called: u64,
    returned: u64,
    /// `None`: a command has failed, or has not ended. It may be in the file or not.
    there: Option<bool>,
}

type Shots = Rc<RefCell<Vec<Shot>>>;

fn is_expected(error: &Error) -> bool {
    [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Failed].contains(&error.kind())
}

/// Does the background work to its end, or until the image has failed.
async fn work_off(client: &Client) -> bool {
    let mut failures = 0;
    loop {
        match client.worker.background_step().await {
            Ok(Step::Idle) => return true,
            Ok(_) => yield_now().await,
            Err(error) if client.worker.image().has_failed() => {
                if !is_expected(&error) {
                    client.complain(error.chain());
                }
                return false;
            }
            Err(error) => {
                failures += 1;
                if !is_expected(&error) || failures > RETRIES_MAX {
                    client.complain(format!("background work: {}", error.chain()));
                    return false;
                }
            }
        }
    }
}

async fn create(client: &Client, shots: &Shots, name: &'static str, is_v2: bool) {
    let called = client.model.borrow_mut().watch();
    let number = shots.borrow().len();
    shots.borrow_mut().push(Shot {
        name,
        called,
        returned: u64::MAX,
        there: None,
    });
    let new = NewSnapshot {
        name: name.to_owned(),
        date_sec: 1,
        date_nsec: 2,
        vm_clock_nsec: 3,
    };
    match client.worker.create_snapshots(&[new]).await {
        Ok(_) => {
            let shot = &mut shots.borrow_mut()[number];
            shot.returned = client.model.borrow_mut().watch();
            shot.there = (!is_v2).then_some(true);
        }
        Err(error) if is_expected(&error) => {
            // What is not there is not shown either, unless the file cannot be known.
            let shown = client.worker.image().snapshots();
            if shown.iter().any(|snapshot| snapshot.name == name) {
                client.complain(format!("'{name}' is shown after: {}", error.chain()));
            }
            if !client.worker.image().has_failed() {
                shots.borrow_mut()[number].there = Some(false);
            }
        }
        Err(error) => client.complain(format!("create: {}", error.chain())),
    }
}

async fn delete(client: &Client, shots: &Shots, name: &'static str) {
    let selector = Selector {
        id: None,
        name: Some(name.to_owned()),
    };
    let find = |shots: &Shots| shots.borrow().iter().position(|shot| shot.name == name);
    let Some(number) = find(shots) else {
        return;
    };
    let before = shots.borrow()[number].there;
    shots.borrow_mut()[number].there = None;
    match client.worker.delete_snapshot(&selector).await {
        Ok(_) => shots.borrow_mut()[number].there = Some(false),
        // On version 2 it may come yet.
        Err(error) if error.kind() == ErrorKind::NotFound && before != Some(true) => {
            shots.borrow_mut()[number].there = before;
        }
        Err(error) if is_expected(&error) => {
            if !client.worker.image().has_failed() {
                shots.borrow_mut()[number].there = before;
            }
        }
        Err(error) => client.complain(format!("delete: {}", error.chain())),
    }
}

/// Takes two snapshots, settles, deletes one and the other.
async fn commands(client: Client, shots: Shots, is_v2: bool) {
    create(&client, &shots, "a", is_v2).await;
    let _ = client.write(20, 4).await;
    create(&client, &shots, "b", is_v2).await;
    let _ = client.discard(8, 8).await;
    let settled = work_off(&client).await;
    if is_v2 && settled {
        // Now it is told.
        let shown = client.worker.image().snapshots();
        for shot in &mut *shots.borrow_mut() {
            if shot.there.is_none() {
                let is_shown = shown.iter().any(|snapshot| snapshot.name == shot.name);
                shot.there = Some(is_shown);
            }
        }
    }
    delete(&client, &shots, "a").await;
    let _ = client.write(2, 9).await;
    let _ = work_off(&client).await;
    create(&client, &shots, "c", is_v2).await;
    delete(&client, &shots, "c").await;
    let _ = work_off(&client).await;
}

/// The snapshots in the file are those that are known, with what they held.
fn judge_shots(rig: &Rig, shots: &[Shot]) -> Result<(), Violation> {
    let bytes = rig.disk.contents(IMAGE);
    let entries = snapshot_entries(&bytes).map_err(Violation)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    for shot in shots {
        let entry = entries.iter().find(|entry| text(&entry.name) == shot.name);
        match (entry, shot.there) {
            (None, Some(true)) => return violation(format!("{shot:?} is gone")),
            (Some(_), Some(false)) => return violation(format!("{shot:?} is there")),
            (None, _) => {}
            (Some(entry), _) => {
                let content = read_snapshot(&bytes, None, &text(&entry.id)).map_err(Violation)?;
                rig.model
                    .borrow()
                    .judge_snapshot(&content, shot.called, shot.returned)
                    .map_err(|error| Violation(format!("{shot:?}: {error}")))?;
            }
        }
    }
    let ours = |name: &[u8]| shots.iter().any(|shot| shot.name.as_bytes() == name);
    match entries
        .iter()
        .find(|entry| entry.name != b"one" && !ours(&entry.name))
    {
        Some(entry) => violation(format!("{entry:?} comes from nowhere")),
        None => Ok(()),
    }
}

/// What the next start makes of the disk.
fn judge_next_start(mut rig: Rig, shots: &[Shot], seed: u64) -> Result<(), Violation> {
    rig.disk.set_immediate(true);
    rig.judge_trees()?;
    judge_shots(&rig, shots)?;
    rig.open(&OpenOptions::default())?;
    let since = rig.model.borrow().flush_floor();
    let content = rig.read_whole()?;
    rig.model.borrow().judge(0, &content, since)?;
    judge_shots(&rig, shots)?;
    let model = rig.model.borrow().clone();
    rig.restart(&content);
    let random = fastrand::Rng::with_seed(seed);
    let work = chaos(rig.worker(), random, 20, Mix::ALL);
    rig.driver.spawn(work);
    rig.run()?;
    rig.settle()?;
    rig.close()?;
    let report = rig.check()?;
    if !report.is_consistent() || report.overlaps > 0 {
        return violation(format!("after the next start: {:?}", report.problems));
    }
    rig.judge_trees()?;
    *rig.model.borrow_mut() = model;
    judge_shots(&rig, shots)
}

/// One run with the `nth` operation of a kind failing; `false` when there are not so many.
fn run(
    recipe: Recipe,
    seed: u64,
    load: bool,
    (kind, nth, errno): (OpKind, u64, i32),
) -> Result<bool, Violation> {
    let mut rig = Rig::new(recipe, seed);
    rig.open(&small())?;
    rig.tolerant = true;
    let is_v2 = recipe.version < 3;
    let shots = Shots::default();
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    for number in 0..if load { 2 } else { 0 } {
        let random = fastrand::Rng::with_seed(seed * 100 + number);
        let mix = Mix {
            longest: 12,
            ..Mix::ALL
        };
        let work = chaos(rig.worker(), random, 20, mix);
        rig.driver.spawn(work);
    }
    let commands = commands(rig.worker(), Rc::clone(&shots), is_v2);
    rig.driver.spawn(commands);
    rig.run()?;
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    let failed = rig.image().state() == State::Failed;
    if failed && matches!(kind, OpKind::SetLen | OpKind::Zeroes | OpKind::Punch) {
        return violation("nothing that counts has failed, but the image has");
    }
    if failed && !hit {
        return violation("the image has failed without a fault");
    }
    let reader = rig.worker();
    let sectors = rig.model.borrow().sectors();
    rig.block_on(async move {
        for first in (0..sectors).step_by(16) {
            let _judged = reader.read(first, 16.min(sectors - first)).await;
        }
    });
    rig.verdict()?;
    let shots = shots.borrow().clone();
    let mut random = fastrand::Rng::with_seed(seed + nth);
    let modes = [CutMode::AllUnflushed, CutMode::Random];
    for mode in modes {
        let cut = rig.disk.power_cut(&mut random, mode);
        judge_next_start(rig.after_cut(cut, nth), &shots, nth)
            .map_err(|error| Violation(format!("after a cut ({mode:?}): {error}")))?;
    }
    if failed {
        rig.image = None;
        rig.driver.drain();
        return Ok(hit);
    }
    rig.settle()?;
    rig.close()?;
    rig.judge_closed()?;
    judge_shots(&rig, &shots)?;
    Ok(hit)
}

fn each_fails_once(kind: OpKind, run: impl Fn(i32, u64) -> Result<bool, Violation>, what: &str) {
    for errno in errnos(kind).iter().copied() {
        each_operation_fails_once(what, (kind, errno), OPERATIONS_MAX, |nth| run(errno, nth));
    }
}

fn every_operation_fails_once(kind: OpKind) {
    for (name, recipe) in recipes() {
        for load in [false, true] {
            for seed in seeds(3) {
                each_fails_once(
                    kind,
                    |errno, nth| run(recipe, seed, load, (kind, nth, errno)),
                    &format!("{name}, load {load}, SEED={seed}"),
                );
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
fn every_sync_fails_once() {
    every_operation_fails_once(OpKind::Sync);
}

#[test]
fn every_other_operation_fails_once() {
    for kind in [OpKind::SetLen, OpKind::Zeroes, OpKind::Punch] {
        every_operation_fails_once(kind);
    }
}

/// Kinds of operations that make a difference to who works alone on an image.
const KINDS: [OpKind; 6] = [
    OpKind::Read,
    OpKind::Write,
    OpKind::Sync,
    OpKind::SetLen,
    OpKind::Zeroes,
    OpKind::Punch,
];

/// A revert that fails leaves the old disk, or the snapshot if the header was written; it can be
/// tried again.
fn failed_revert(recipe: Recipe, kind: OpKind, nth: u64, errno: i32) -> Result<bool, Violation> {
    let mut rig = super::revert::gone_on(recipe, nth)?;
    let old = read_tree(&rig.disk.contents(IMAGE), None, false).map_err(Violation)?;
    let new = rig.snapshot.clone().ok_or(Violation("none".to_owned()))?;
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    let result = super::revert::revert_in(&mut rig);
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    let result = result.ok_or(Violation("no answer".to_owned()))?;
    if let Err(error) = &result {
        // A table that cannot be read is damage to who looks through all of them.
        let unread = kind == OpKind::Read && error.kind() == ErrorKind::Corrupt;
        if !(hit && (unread || is_expected(error))) {
            return violation(error.chain());
        }
    }
    let mut random = fastrand::Rng::with_seed(nth);
    let modes = [
        CutMode::AllUnflushed,
        CutMode::Random,
        CutMode::NothingUnflushed,
    ];
    for mode in modes {
        let cut = rig.disk.power_cut(&mut random, mode);
        let mut after = rig.after_cut(cut, nth);
        let disk = read_tree(&after.disk.contents(IMAGE), None, false).map_err(Violation)?;
        let may_be_old = result.is_err();
        // On version 2 an error of what is checked afterwards.
        let late = |error: &Error| recipe.version < 3 && error.kind() == ErrorKind::Corrupt;
        let may_be_new = match &result {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::Failed || late(error),
        };
        if !(may_be_new && disk == *new || may_be_old && disk == old) {
            return violation(format!("{mode:?}: not the disk it should be: {result:?}"));
        }
        super::revert::judge(&mut after, &disk)
            .map_err(|error| Violation(format!("{mode:?}, after {result:?}: {error}")))?;
        match super::revert::revert_in(&mut after) {
            Some(Ok(_)) => {}
            other => return violation(format!("again: {other:?}")),
        }
        super::revert::judge(&mut after, &new)?;
    }
    Ok(hit)
}

#[test]
fn every_operation_of_a_revert_fails_once() {
    for (number, recipe) in super::revert::recipes().into_iter().enumerate() {
        for kind in KINDS {
            each_fails_once(
                kind,
                |errno, nth| failed_revert(recipe, kind, nth, errno),
                &format!("recipe {number}"),
            );
        }
    }
}

/// The open or the rebuild under load meets a failure.
fn failed_rebuild(recipe: Recipe, kind: OpKind, nth: u64, errno: i32) -> Result<bool, Violation> {
    let mut rig = Rig::damaged(recipe, nth);
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    if rig.open(&small()).is_err() {
        // Nothing was written: the next try finds what this one has.
        rig.open(&small())?;
    }
    if rig.image().background().first().map(|work| work.kind) != Some(BackgroundKind::Rebuild) {
        return violation("nothing is rebuilt");
    }
    rig.tolerant = true;
    let work = chaos(
        rig.worker(),
        fastrand::Rng::with_seed(nth),
        15,
        Mix {
            longest: 8,
            ..Mix::ALL
        },
    );
    rig.driver.spawn(work);
    let client = rig.worker();
    rig.driver.spawn(async move { work_off(&client).await });
    rig.run()?;
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    let failed = rig.image().state() == State::Failed;
    if failed && !hit {
        return violation("the image has failed without a fault");
    }
    let mut random = fastrand::Rng::with_seed(nth);
    for mode in [CutMode::AllUnflushed, CutMode::Random] {
        let cut = rig.disk.power_cut(&mut random, mode);
        judge_next_start(rig.after_cut(cut, nth), &[], nth)
            .map_err(|error| Violation(format!("after a cut ({mode:?}): {error}")))?;
    }
    if failed {
        rig.image = None;
        rig.driver.drain();
        return Ok(hit);
    }
    rig.judge_settled()?;
    Ok(hit)
}

#[test]
fn every_operation_of_a_rebuild_fails_once() {
    for (name, mut recipe) in recipes() {
        if recipe.version < 3 {
            recipe.version = 3;
            recipe.snapshot = true;
        }
        for kind in KINDS {
            each_fails_once(
                kind,
                |errno, nth| failed_rebuild(recipe, kind, nth, errno),
                name,
            );
        }
    }
}

/// An image that cannot grow is repaired before it is served, and the repair meets a failure.
fn failed_repair(recipe: Recipe, kind: OpKind, nth: u64, errno: i32) -> Result<bool, Violation> {
    let mut rig = Rig::damaged(recipe, nth);
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    let opened = rig.open(&OpenOptions::default());
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    if !hit {
        opened?;
    }
    rig.image = None;
    rig.driver.drain();
    let mut random = fastrand::Rng::with_seed(nth);
    for mode in [CutMode::AllUnflushed, CutMode::Random] {
        let cut = rig.disk.power_cut(&mut random, mode);
        judge_next_start(rig.after_cut(cut, nth), &[], nth)
            .map_err(|error| Violation(format!("after a cut ({mode:?}): {error}")))?;
    }
    Ok(hit)
}

#[test]
fn every_operation_of_a_repair_before_serving_fails_once() {
    let recipe = Recipe {
        fill: mixed,
        snapshot: true,
        device: Some(300),
        ..Recipe::plain(10, 64 << 10)
    };
    for kind in KINDS {
        each_fails_once(
            kind,
            |errno, nth| failed_repair(recipe, kind, nth, errno),
            "a device",
        );
    }
}
