//! Every operation of an external snapshot fails once, with EIO and with ENOSPC.
//!
//! The judges are those of `external`. Whatever fails: either the old image
//! is served on, and no overlay is left, or the overlay is served; every read is right; a cut at the
//! end loses nothing that was flushed; and where the image takes writes, the next snapshot succeeds.

use std::rc::Rc;
use std::sync::Arc;

use super::build::{Fill, Recipe};
use super::external::{judge, plans};
use super::stage::{Plan, Stage, folder_of};
use super::support::{Mix, Rig, Violation, chaos, each_operation_fails_once, seeds, violation};
use crate::engine::{ErrorKind, Image, State};
use crate::storage::sim::{CutMode, OpKind};

/// Most operations of one kind that a run makes.
const OPERATIONS_MAX: u64 = 400;

fn fault_plans() -> Vec<Plan> {
    let mut all = plans();
    all.retain(|plan| ["512-byte clusters", "version 2", "a raw image"].contains(&plan.name));
    for plan in &mut all {
        plan.requests = 12;
        plan.mix = Mix {
            longest: 8,
            flush: 2,
            ..Mix::ALL
        };
    }
    // Unmapped by discards that are not durable yet: the flush and the close have much to do.
    let mut modified = all[0];
    modified.name = "everything modified";
    modified.recipe = Recipe {
        fill: |_| Fill::Data,
        refcount_order: 6,
        snapshot: true,
        ..Recipe::plain(9, 96 << 10)
    };
    all.push(modified);
    all
}

/// Takes a snapshot whose `nth` operation of a kind fails; with `load`, or one of the guest's does.
/// `false` when there are not so many.
fn run(
    plan: &Plan,
    seed: u64,
    load: bool,
    (kind, nth, errno): (OpKind, u64, i32),
) -> Result<bool, Violation> {
    let mut rig = plan.rig(seed);
    rig.tolerant = true;
    let stage = Stage::new(*plan, &mut rig)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let unflushed = chaos(
        stage.seat(0),
        random.fork(),
        20,
        Mix {
            flush: 0,
            ..plan.mix
        },
    );
    rig.driver.spawn(unflushed);
    rig.run()?;

    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, errno);
    let command = {
        let stage = Rc::clone(&stage);
        rig.driver.spawn(async move { stage.take().await })
    };
    for seat in 0..if load { plan.workers } else { 0 } {
        let work = Rc::clone(&stage).work(seat, random.fork());
        rig.driver.spawn(work);
    }
    rig.run()?;
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    let result = command.take().ok_or(Violation("no answer".to_owned()))?;

    let served: Arc<Image> = Arc::clone(stage.seat(0).worker.image());
    let over = stage.ledger.borrow().used.len();
    match &result {
        Ok(()) if over != 1 => return violation("no overlay is served"),
        Err(_) if over != 0 => return violation("an overlay is served that was said to fail"),
        Err(error) if !hit => return violation(format!("without a fault: {}", error.chain())),
        Err(error) => {
            let expected = [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Failed];
            if !expected.contains(&error.kind()) {
                return violation(error.chain());
            }
            // The name's removal can be what has failed.
            let folder = rig.disk.contents(folder_of(plan));
            let is_left = folder.first().is_some_and(|byte| *byte != 0);
            if is_left && kind != OpKind::Write {
                return violation("the overlay is left behind");
            }
        }
        Ok(()) => {}
    }
    if result.is_err()
        && !load
        && served.has_failed()
        && !matches!(kind, OpKind::Write | OpKind::Sync | OpKind::Read)
    {
        return violation("nothing that counts has failed, but the image has");
    }
    finish(&mut rig, &stage, &served, seed)?;
    let mut random = fastrand::Rng::with_seed(seed + nth);
    for mode in [CutMode::AllUnflushed, CutMode::Random, CutMode::Random] {
        let cut = rig.disk.power_cut(&mut random, mode);
        let after = rig.after_cut(cut, seed + nth);
        judge(after, plan, &stage.ledger.borrow(), seed + nth, false)
            .map_err(|error| Violation(format!("after a cut: {error}")))?;
    }
    Ok(hit)
}

/// Reads are right; an image that takes writes takes another snapshot and is closed in order.
fn finish(
    rig: &mut Rig,
    stage: &Rc<Stage>,
    served: &Arc<Image>,
    seed: u64,
) -> Result<(), Violation> {
    let reader = stage.seat(0);
    let sectors = reader.model.borrow().sectors();
    rig.block_on(async move {
        for first in (0..sectors).step_by(16) {
            let _judged = reader.read(first, 16.min(sectors - first)).await;
        }
    });
    rig.verdict()?;
    let writer = stage.seat(0);
    if served.state() == State::Failed {
        let refused = rig.block_on(async move { writer.write(0, 1).await });
        if refused.map_err(|error| error.kind()) != Err(ErrorKind::Failed) {
            return violation("a failed image takes a write");
        }
        let again = Rc::clone(stage);
        let refused = rig.block_on(async move { again.take().await });
        if refused.map_err(|error| error.kind()) != Err(ErrorKind::Failed) {
            return violation("a failed image gets an overlay");
        }
        stage.seats.borrow_mut().clear();
        rig.driver.drain();
        return Ok(());
    }
    let again = Rc::clone(stage);
    let taken = rig.block_on(async move {
        writer.write(1, 4).await?;
        again.take().await?;
        let writer = again.seat(0);
        writer.write(3, 4).await?;
        writer.flush().await
    });
    taken.map_err(|error| Violation(format!("afterwards: {}", error.chain())))?;
    let work = chaos(stage.seat(0), fastrand::Rng::with_seed(seed), 10, Mix::ALL);
    rig.driver.spawn(work);
    rig.run()?;
    rig.image = Some(Arc::clone(stage.seat(0).worker.image()));
    stage.seats.borrow_mut().clear();
    rig.close()
}

fn every_operation_fails_once(kind: OpKind) {
    for plan in fault_plans() {
        for (errno, load) in [
            (libc::EIO, false),
            (libc::ENOSPC, false),
            (libc::EIO, true),
            (libc::ENOSPC, true),
        ] {
            for seed in seeds(2) {
                let what = format!("{}, load {load}, SEED={seed}", plan.name);
                each_operation_fails_once(&what, (kind, errno), OPERATIONS_MAX, |nth| {
                    run(&plan, seed, load, (kind, nth, errno))
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
fn every_sync_fails_once() {
    every_operation_fails_once(OpKind::Sync);
}

#[test]
fn every_other_operation_fails_once() {
    for kind in [OpKind::SetLen, OpKind::Zeroes, OpKind::Punch] {
        every_operation_fails_once(kind);
    }
}
