//! An overlay takes the place of the image under load, and the power goes at every step.
//!
//! Whatever the moment, for whoever starts then (see `stage`): every flushed sector is there, each
//! backing file and each internal snapshot is what it was at its instant, and no overlay that was in
//! use is gone. Judged by this engine, also after a second cut, and by QEMU's repair.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use super::broken::{Broken, notices};
use super::build::{Fill, Recipe, read_tree};
use super::cuts::{self, Cuts, cut_tests};
use super::stage::{Bytes, Ledger, Plan, Stage, flat, internal, open};
use super::support::{IMAGE, Mix, Rig, Violation, chaos, small_caches, violation};
use crate::engine::order::Rule;
use crate::engine::{LayerFormat, LayerSpec, OpenOptions};
use crate::format::Header;
use crate::storage::FileId;
use crate::storage::sim::CutMode;

/// Every so many states QEMU repairs a copy.
const QEMU_EVERY: usize = 50;
/// In one of so many the power goes once more.
const CUT_AGAIN_EVERY: u64 = 6;

/// Every kind of image that makes a difference to an overlay, or to what is below it.
pub(super) fn plans() -> Vec<Plan> {
    let plain = Recipe::plain;
    let data = |_| Fill::Data;
    let base = Plan {
        name: "data",
        recipe: Recipe {
            fill: data,
            ..plain(11, 64 << 10)
        },
        raw: false,
        overlays: 2,
        internal: false,
        name_bytes: 5,
        workers: 3,
        requests: 30,
        mix: Mix {
            longest: 8,
            flush: 3,
            zero: 1,
            discard: 1,
            ..Mix::ALL
        },
        options: OpenOptions::default,
    };
    vec![
        base,
        Plan {
            name: "an empty image",
            recipe: plain(10, 96 << 10),
            overlays: 4,
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
                ..plain(9, 64 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "internal snapshots between",
            recipe: Recipe {
                fill: data,
                snapshot: true,
                ..plain(10, 64 << 10)
            },
            internal: true,
            requests: 60,
            ..base
        },
        Plan {
            name: "narrow refcounts, internal snapshots between",
            recipe: Recipe {
                fill: data,
                refcount_order: 3,
                ..plain(10, 64 << 10)
            },
            internal: true,
            requests: 60,
            options: small_caches,
            ..base
        },
        Plan {
            name: "one-bit refcounts",
            recipe: Recipe {
                fill: data,
                refcount_order: 0,
                ..plain(9, 48 << 10)
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
                ..plain(11, 64 << 10)
            },
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
            name: "many refcount blocks",
            recipe: Recipe {
                fill: data,
                refcount_order: 6,
                ..plain(9, 128 << 10)
            },
            options: small_caches,
            ..base
        },
        Plan {
            name: "version 2",
            recipe: Recipe {
                fill: data,
                version: 2,
                snapshot: true,
                ..plain(11, 64 << 10)
            },
            ..base
        },
        Plan {
            name: "a raw image",
            recipe: Recipe {
                backing: Some(128 << 10),
                ..plain(9, 128 << 10)
            },
            raw: true,
            ..base
        },
        Plan {
            name: "a device",
            recipe: Recipe {
                fill: data,
                device: Some(200),
                can_punch: false,
                ..plain(10, 64 << 10)
            },
            ..base
        },
        Plan {
            name: "a long name",
            recipe: plain(12, 64 << 10),
            name_bytes: 1000,
            overlays: 4,
            ..base
        },
        Plan {
            name: "write-through",
            recipe: plain(11, 64 << 10),
            mix: Mix {
                write_through: true,
                ..base.mix
            },
            ..base
        },
    ]
}

/// Everything that is kept is as it was.
fn judge_kept(rig: &Rig, ledger: &Ledger, bytes: Bytes<'_>) -> Result<(), Violation> {
    for (chain, content) in &ledger.kept {
        if flat(chain, bytes)?.as_ref() != Some(content) {
            return violation(format!("the backing file {:?} has changed", chain[0]));
        }
    }
    for (chain, id, content) in &ledger.internal {
        if internal(chain, id, bytes)? != *content {
            return violation(format!("snapshot {id} of {:?} has changed", chain[0]));
        }
    }
    if let Some(content) = &rig.snapshot
        && read_tree(&bytes(IMAGE), None, true).map_err(Violation)? != **content
    {
        return violation("the first snapshot has changed");
    }
    Ok(())
}

/// What is in the files after a cut, whichever way they were opened since.
fn judge_contents(
    rig: &Rig,
    chain: &[LayerSpec],
    ledger: &Ledger,
    bytes: Bytes<'_>,
) -> Result<(), Violation> {
    let content = flat(chain, bytes)?.unwrap_or_default();
    let model = rig.model.borrow();
    model.judge(0, &content, model.flush_floor())?;
    judge_kept(rig, ledger, bytes)
}

/// No qcow2 file of a chain is damaged; `dirty`: but one that says so itself.
fn judge_files(rig: &Rig, chain: &[LayerSpec], dirty: bool) -> Result<(), Violation> {
    for spec in chain {
        if spec.format == LayerFormat::Raw {
            continue;
        }
        let bytes = rig.disk.contents(spec.file);
        let header = Header::decode(&bytes).map_err(|error| Violation(error.to_string()))?;
        if dirty && header.is_dirty() {
            continue;
        }
        let report = rig.check_file(spec.file)?;
        if !report.is_consistent() || report.overlaps > 0 {
            return violation(format!("{spec:?}: {:?}", report.problems));
        }
    }
    Ok(())
}

/// QEMU repairs copies of all files and shows the disk.
fn judge_by_qemu(rig: &Rig, chain: &[LayerSpec], ledger: &Ledger) -> Result<(), Violation> {
    let told = |error: std::io::Error| Violation(error.to_string());
    let dir = tempfile::tempdir().map_err(told)?;
    let path = |file: FileId| dir.path().join(format!("{}.img", file.0));
    for spec in chain {
        rig.disk.export(spec.file, &path(spec.file)).map_err(told)?;
    }
    let qemu = |arguments: &[&str], files: &[&Path]| -> Result<(), Violation> {
        let mut command = Command::new("qemu-img");
        let output = command.args(arguments).args(files).output().map_err(told)?;
        if output.status.success() {
            return Ok(());
        }
        violation(format!(
            "qemu-img {arguments:?} {files:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    };
    let images = chain
        .iter()
        .filter(|spec| spec.format == LayerFormat::Qcow2);
    for spec in images {
        // Its status is that of what it has found.
        let _ = qemu(
            &["check", "-q", "-f", "qcow2", "-r", "all"],
            &[&path(spec.file)],
        );
        qemu(&["check", "-f", "qcow2"], &[&path(spec.file)])?;
    }
    let bytes = |file| std::fs::read(path(file)).unwrap_or_default();
    judge_contents(rig, chain, ledger, &bytes)?;
    if chain[0].format == LayerFormat::Qcow2 {
        let raw = dir.path().join("raw");
        qemu(
            &["convert", "-f", "qcow2", "-O", "raw"],
            &[&path(chain[0].file), &raw],
        )?;
        let content = std::fs::read(&raw).map_err(told)?;
        let model = rig.model.borrow();
        model.judge(0, &content, model.flush_floor())?;
    }
    Ok(())
}

/// Judges what a cut has left.
pub(super) fn judge(
    rig: Rig,
    plan: &Plan,
    ledger: &Ledger,
    seed: u64,
    by_qemu: bool,
) -> Result<(), Violation> {
    let chain = ledger.chain_after_cut(plan, &rig)?;
    let disk = rig.disk.clone();
    let bytes = |file| disk.contents(file);
    judge_contents(&rig, &chain, ledger, &bytes)?;
    judge_files(&rig, &chain, true)?;
    if by_qemu {
        judge_by_qemu(&rig, &chain, ledger)
            .map_err(|error| Violation(format!("QEMU's repair: {error}")))?;
    }
    let below = flat(&chain[1..], &bytes)?;
    if seed.is_multiple_of(CUT_AGAIN_EVERY) {
        let again = cut_again(&rig, &chain, seed)?;
        let disk = again.disk.clone();
        let bytes = |file| disk.contents(file);
        judge_contents(&again, &chain, ledger, &bytes)?;
        judge_files(&again, &chain, true)?;
        judge_opened(again, &chain, ledger, below.as_deref(), seed)
            .map_err(|error| Violation(format!("after a second cut: {error}")))?;
    }
    judge_opened(rig, &chain, ledger, below.as_deref(), seed)
}

/// The power goes again while the next start works, and repairs what is left to repair.
fn cut_again(rig: &Rig, chain: &[LayerSpec], seed: u64) -> Result<Rig, Violation> {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = rig.disk.power_cut(&mut random, CutMode::AllUnflushed);
    let mut rig = rig.after_cut(disk, seed);
    rig.disk.set_immediate(false);
    open(&mut rig, chain, OpenOptions::default())?;
    // What the first cut has taken is gone.
    let content = rig.read_whole()?;
    rig.restart(&content);
    let client = rig.worker();
    let work = chaos(client.clone(), random.fork(), 20, Mix::ALL);
    rig.driver.spawn(work);
    rig.driver.spawn(async move { client.settle().await });
    let disk = rig.disk.clone();
    let target = disk.changes() + random.u64(1..60);
    rig.driver.run_until(move || disk.changes() >= target);
    rig.verdict()?;
    let disk = rig.disk.power_cut(&mut random, CutMode::Random);
    Ok(rig.after_cut(disk, seed))
}

/// Opens what a cut has left and works on.
fn judge_opened(
    mut rig: Rig,
    chain: &[LayerSpec],
    ledger: &Ledger,
    below: Option<&[u8]>,
    seed: u64,
) -> Result<(), Violation> {
    let disk = rig.disk.clone();
    let bytes = |file| disk.contents(file);
    rig.disk.set_immediate(true);
    open(&mut rig, chain, OpenOptions::default())?;
    let since = rig.model.borrow().flush_floor();
    let content = rig.read_whole()?;
    rig.model.borrow().judge(0, &content, since)?;
    rig.restart(&content);
    let work = chaos(rig.worker(), fastrand::Rng::with_seed(seed), 20, Mix::ALL);
    rig.driver.spawn(work);
    rig.settle()?;
    rig.run()?;
    rig.settle()?;
    rig.close()?;
    judge_files(&rig, chain, false)
        .map_err(|error| Violation(format!("after more work: {error}")))?;
    if flat(&chain[1..], &bytes)?.as_deref() != below {
        return violation("more work has changed the backing file");
    }
    judge_contents(&rig, chain, ledger, &bytes)
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
    let mut rig = plan.rig(seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0x0e47_e44a);
    let stage = Stage::new(*plan, &mut rig)?;
    let mut tasks = Vec::new();
    for seat in 0..plan.workers {
        let work = Rc::clone(&stage).work(seat, random.fork());
        tasks.push(rig.driver.spawn(work));
    }
    let commands = Rc::clone(&stage).commands(random.fork());
    tasks.push(rig.driver.spawn(commands));
    let mut power = Cuts {
        cuts,
        moments: 4,
        states_max,
        seen,
    };
    power.run(&mut rig, &tasks, &mut random, |after, seed, number| {
        let by_qemu = number.is_multiple_of(qemu_every);
        judge(after, plan, &stage.ledger.borrow(), seed, by_qemu)
    })?;
    rig.image = Some(Arc::clone(stage.seat(0).worker.image()));
    stage.seats.borrow_mut().clear();
    rig.close()?;
    let ledger = stage.ledger.borrow();
    if ledger.used.len() != usize::from(plan.overlays) {
        return violation("not every snapshot was taken");
    }
    let disk = rig.disk.clone();
    let bytes = |file| disk.contents(file);
    judge_contents(&rig, &ledger.chain, &ledger, &bytes)?;
    for spec in &ledger.chain {
        if spec.format == LayerFormat::Qcow2 && !rig.check_file(spec.file)?.is_clean() {
            return violation(format!("{spec:?} is not clean"));
        }
    }
    Ok(())
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
    a_cut_with_internal_snapshots: "internal snapshots between",
    a_cut_with_narrow_refcounts: "narrow refcounts, internal snapshots between",
    a_cut_with_one_bit_refcounts: "one-bit refcounts",
    a_cut_with_compressed_clusters: "compressed and zero clusters",
    a_cut_with_discards: "discards",
    a_cut_with_many_refcount_blocks: "many refcount blocks",
    a_cut_of_version_2: "version 2",
    a_cut_of_a_raw_image: "a raw image",
    a_cut_of_a_device: "a device",
    a_cut_with_a_long_name: "a long name",
    a_cut_with_write_through: "write-through",
}

#[test]
fn every_order_of_overlays_is_missed_when_it_is_broken() {
    for rule in Rule::OVERLAY {
        let broken = Broken::new(rule);
        let noticed = plans().iter().find_map(|plan| {
            (1..=6).find_map(|seed| {
                let found = notices(|| run(plan, seed, 4, 2000, usize::MAX, &mut HashSet::new()))?;
                Some(format!("{} ({seed}): {found}", plan.name))
            })
        });
        drop(broken);
        let told = noticed.unwrap_or_else(|| panic!("nobody notices that {rule:?} is broken"));
        log::info!("{rule:?}: {told}");
    }
}
