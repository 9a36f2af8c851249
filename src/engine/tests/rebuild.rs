//! Images that were not closed in order: served at once, counted anew in the background.
//!
//! The damage is what such an image may show: the dirty bit, and any counts and copied flags.

use std::cell::Cell;
use std::process::Command;
use std::rc::Rc;

use super::build::{Fill, Recipe};
use super::model::{Model, kinds};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, seeds, violation};
use crate::engine::{
    BackgroundKind, Error, ErrorKind, NewSnapshot, OpenOptions, Selector, State, Step,
};
use crate::format::l1::L1Entry;
use crate::format::l2::L2Entry;
use crate::format::{Header, refcount};
use crate::storage::sim::{CutMode, OpKind, Outcome, yield_now};
use crate::storage::{AlignedBuf, SgList};
use crate::units::{GuestOffset, to_u64, to_usize};

const INCOMPATIBLE: usize = 72;

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = to_usize(at);
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn put(bytes: &mut [u8], at: u64, word: u64) {
    bytes[to_usize(at)..to_usize(at) + 8].copy_from_slice(&word.to_be_bytes());
}

fn is_dirty(bytes: &[u8]) -> bool {
    Header::decode(bytes).expect("a header").is_dirty()
}

/// The host offsets of the active tree's L2 tables.
fn tables(bytes: &[u8]) -> Vec<u64> {
    let header = Header::decode(bytes).expect("a header");
    (0..u64::from(header.l1_size))
        .filter_map(|index| {
            L1Entry(word(bytes, header.l1_table_offset.get() + index * 8)).table_offset()
        })
        .map(crate::units::HostOffset::get)
        .collect()
}

/// Any counts and any copied flags, and the dirty bit. `zeroes`: counts may also be zero.
fn damage(bytes: &mut [u8], random: &mut fastrand::Rng, zeroes: bool) {
    let header = Header::decode(bytes).expect("a header");
    let geometry = header.geometry();
    bytes[INCOMPATIBLE + 7] |= 1;
    for index in 0..u64::from(header.l1_size) {
        let at = header.l1_table_offset.get() + index * 8;
        let entry = L1Entry(word(bytes, at));
        if entry.table_offset().is_some() {
            put(bytes, at, entry.with_copied(random.bool()).0);
        }
    }
    for table in tables(bytes) {
        for index in 0..geometry.l2_entries() {
            let entry = L2Entry(word(bytes, table + index * 8));
            let names = L1Entry(entry.0).table_offset().is_some();
            if !entry.is_compressed() && names {
                put(bytes, table + index * 8, entry.with_copied(random.bool()).0);
            }
        }
    }
    let most = geometry.refcount_max().min(3);
    let clusters = to_u64(bytes.len()) / geometry.cluster_size();
    for cluster in 0..clusters {
        let block = cluster / geometry.refcount_block_entries();
        let at = word(bytes, header.refcount_table_offset.get() + block * 8);
        let index = to_usize(cluster % geometry.refcount_block_entries());
        let block = &mut bytes[to_usize(at)..to_usize(at + geometry.cluster_size())];
        if random.u8(..4) == 0 {
            let least = u64::from(!zeroes);
            refcount::set(
                block,
                geometry.refcount_order(),
                index,
                random.u64(least..=most),
            );
        }
    }
}

impl Rig {
    /// A damaged image of this recipe, not open yet.
    pub(super) fn damaged(recipe: Recipe, seed: u64) -> Self {
        let rig = Self::new(recipe, seed);
        let mut bytes = rig.disk.contents(IMAGE);
        let mut random = fastrand::Rng::with_seed(seed);
        damage(&mut bytes, &mut random, seed.is_multiple_of(2));
        rig.disk.poke(IMAGE, 0, &bytes);
        rig
    }

    /// Does all background work there is.
    fn settle_down(&mut self) -> Result<(), Violation> {
        let client = self.worker();
        let done = self.block_on(background(client, Rc::new(Cell::new(true))));
        done.map_err(|error| Violation(format!("background work: {}", error.chain())))
    }

    /// Everything about an image that was open for long enough.
    pub(super) fn judge_settled(&mut self) -> Result<(), Violation> {
        self.settle_down()?;
        self.close()?;
        if is_dirty(&self.disk.contents(IMAGE)) {
            return violation("the dirty bit is still set");
        }
        self.judge_closed()
    }

    /// As [`Self::judge_settled`]; a cut after the dirty bit had gone may have left leaks.
    fn judge_mended(&mut self, was_dirty: bool) -> Result<(), Violation> {
        if was_dirty {
            return self.judge_settled();
        }
        self.settle_down()?;
        self.close()?;
        let report = self.check()?;
        if !report.is_consistent() || report.overlaps > 0 {
            return violation(format!("not consistent: {:?}", report.problems));
        }
        self.judge_trees()
    }

    /// What every read sees now is what the model says, since the last flush.
    fn judge_reads(&mut self, client: &Client) -> Result<(), Violation> {
        let len = self.model.borrow().sectors() * 512;
        let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
        let (worker, lent) = (Rc::clone(&client.worker), sg.slice(0, len));
        let read = self
            .block_on(async move { worker.read(worker.pin(), GuestOffset::new(0), lent).await });
        read.map_err(|error| Violation(format!("read after the cut: {}", error.chain())))?;
        let bytes = sg.to_vec();
        let since = self.model.borrow().flush_floor();
        self.model.borrow().judge(0, &bytes, since)?;
        *self.model.borrow_mut() = Model::restart(&bytes);
        Ok(())
    }
}

/// Steps until there is nothing to do and `stop` says that nothing more will come.
async fn background(client: Client, stop: Rc<Cell<bool>>) -> Result<(), Error> {
    loop {
        let stopping = stop.get();
        if client.worker.background_step().await? == Step::Idle && stopping {
            return Ok(());
        }
        yield_now().await;
    }
}

/// Kinds of images that can be marked dirty.
fn dirty_kinds() -> Vec<(&'static str, Recipe)> {
    let mut all = kinds();
    all.retain(|(_, recipe)| recipe.version >= 3 && recipe.device.is_none());
    let many_blocks = Recipe {
        refcount_order: 6,
        fill: |cluster| {
            if cluster % 3 == 1 {
                Fill::None
            } else {
                Fill::Data
            }
        },
        snapshot: true,
        ..Recipe::plain(9, 512 << 10)
    };
    all.push(("many refcount blocks", many_blocks));
    for order in 1..=6 {
        let recipe = Recipe {
            refcount_order: order,
            fill: |cluster| match cluster % 4 {
                0 | 1 => Fill::Data,
                2 => Fill::ZeroKept,
                _ => Fill::None,
            },
            snapshot: true,
            ..Recipe::plain(9, 96 << 10)
        };
        all.push(("every refcount width with a snapshot", recipe));
    }
    all
}

/// Now and then there is memory for the counts of a part of the file only.
fn limit_counts(rig: &Rig, random: &mut fastrand::Rng) {
    if random.bool() {
        rig.image().limit_counts([0, 200][random.usize(..2)]);
    }
}

fn rebuild_under_load(recipe: Recipe, seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::damaged(recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let options = OpenOptions {
        l2_cache_size: Some([1 << 10, 1 << 20][random.usize(..2)]),
        l2_cache_entry_size: [Some(512), None][random.usize(..2)],
        refcount_cache_size: Some([0, 1 << 20][random.usize(..2)]),
        ..OpenOptions::default()
    };
    rig.open(&options)?;
    if rig.image().background().first().map(|work| work.kind) != Some(BackgroundKind::Rebuild) {
        return violation("nothing is rebuilt");
    }
    limit_counts(&rig, &mut random);
    for _ in 0..random.u64(1..4) {
        let worker = rig.worker();
        rig.driver
            .spawn(chaos(worker, random.fork(), random.u32(5..60), Mix::ALL));
    }
    let client = rig.worker();
    let work = rig
        .driver
        .spawn(background(client, Rc::new(Cell::new(true))));
    rig.run()?;
    match work.take() {
        Some(Ok(())) => {}
        other => return violation(format!("background work: {other:?}")),
    }
    rig.judge_settled()?;
    // And as an image like any other.
    rig.open(&options)?;
    let worker = rig.worker();
    rig.driver.spawn(chaos(worker, random.fork(), 30, Mix::ALL));
    rig.run()?;
    rig.close()?;
    rig.judge_closed()
}

#[test]
fn a_rebuild_under_load_agrees_with_the_model_and_leaves_a_clean_image() {
    for (name, recipe) in dirty_kinds() {
        for seed in seeds(6) {
            if let Err(violation) = rebuild_under_load(recipe, seed) {
                panic!("{name}, SEED={seed}: {violation}");
            }
        }
    }
}

/// Until the rebuild no snapshot of a dirty image was told to be unsettled.
#[test]
fn snapshots_of_a_dirty_image_are_unsettled_until_it_is_rebuilt() {
    let unsettled = |rig: &Rig| -> Vec<(String, bool)> {
        let snapshots = rig.image().snapshots().into_iter();
        snapshots
            .map(|snapshot| (snapshot.name, snapshot.unsettled))
            .collect()
    };
    let told = |list: &[(&str, bool)]| -> Vec<(String, bool)> {
        let list = list.iter();
        list.map(|(name, unsettled)| ((*name).to_owned(), *unsettled))
            .collect()
    };
    let recipe = Recipe {
        fill: |_| Fill::Data,
        snapshot: true,
        ..Recipe::plain(10, 96 << 10)
    };
    let mut rig = Rig::damaged(recipe, 1);
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    rig.open(&read_only).expect("opens");
    assert_eq!(unsettled(&rig), told(&[("one", true)]));
    rig.open(&OpenOptions::default()).expect("opens");
    assert_eq!(unsettled(&rig), told(&[("one", true)]));
    // One that is taken meanwhile is settled after it.
    let client = rig.worker();
    rig.block_on(async move { client.snapshot("two").await })
        .expect("taken");
    assert_eq!(unsettled(&rig), told(&[("one", true), ("two", true)]));
    let client = rig.worker();
    let mut seen = vec![unsettled(&rig)];
    loop {
        let worker = Rc::clone(&client.worker);
        let step = rig.block_on(async move { worker.background_step().await });
        if step.expect("a step") == Step::Idle {
            break;
        }
        let now = unsettled(&rig);
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    let one_after_the_other = [
        told(&[("one", true), ("two", true)]),
        told(&[("one", false), ("two", true)]),
        told(&[("one", false), ("two", false)]),
    ];
    assert_eq!(seen, one_after_the_other);
    rig.close().expect("closes");
    rig.open(&read_only).expect("opens");
    assert_eq!(unsettled(&rig), told(&[("one", false), ("two", false)]));
}

/// Where there is no memory for all counts, the tables are read once for each part of the file.
#[test]
fn a_rebuild_with_little_memory_reads_tables_again_and_leaves_a_clean_image() {
    let recipe = Recipe {
        fill: |_| Fill::Data,
        snapshot: true,
        ..Recipe::plain(9, 256 << 10)
    };
    let reads = |counts_bytes: Option<usize>| {
        let mut rig = Rig::damaged(recipe, 1);
        rig.open(&OpenOptions::default()).expect("opens");
        if let Some(bytes) = counts_bytes {
            rig.image().limit_counts(bytes);
        }
        let before = rig.disk.count(OpKind::Read);
        rig.judge_settled().expect("clean");
        rig.disk.count(OpKind::Read) - before
    };
    let (all, parts) = (reads(None), reads(Some(0)));
    // The active L1 table and the snapshot's, the snapshot table and the refcount table: once for each
    // of four parts at least.
    assert!(parts >= all + 3 * 4, "{all} and {parts} reads");
}

/// Nothing below the old end changes hands before the counts are known.
#[test]
fn until_the_rebuild_is_done_clusters_come_from_past_the_end() {
    let recipe = Recipe {
        fill: |cluster| {
            if cluster < 60 { Fill::Data } else { Fill::None }
        },
        snapshot: true,
        ..Recipe::plain(10, 96 << 10)
    };
    let mut rig = Rig::damaged(recipe, 2);
    let before = rig.disk.contents(IMAGE);
    rig.open(&OpenOptions::default()).expect("opens");
    assert_eq!(rig.image().state(), State::Opened);
    let client = rig.worker();
    rig.driver.spawn(chaos(
        client.clone(),
        fastrand::Rng::with_seed(3),
        80,
        Mix::ALL,
    ));
    rig.run().expect("no violation");
    rig.block_on(async move { client.flush().await })
        .expect("a flush");
    let after = rig.disk.contents(IMAGE);
    let old = Header::decode(&before).expect("a header");
    let new = Header::decode(&after).expect("a header");
    assert!(is_dirty(&after));
    // The data, the snapshot and its tables; not the L1 table and the refcounts.
    let geometry = old.geometry();
    for table in tables(&before) {
        let range = to_usize(table)..to_usize(table + geometry.cluster_size());
        assert_eq!(before[range.clone()], after[range], "table {table:#x}");
    }
    let moved: Vec<u64> = tables(&after)
        .into_iter()
        .filter(|table| !tables(&before).contains(table))
        .collect();
    assert!(!moved.is_empty());
    assert!(moved.iter().all(|table| *table > to_u64(before.len())));
    assert_eq!(old.refcount_table_offset, new.refcount_table_offset);
    rig.judge_settled().expect("clean");
}

fn new(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.to_owned(),
        date_sec: 1,
        date_nsec: 2,
        vm_clock_nsec: 0,
    }
}

/// Snapshots are created and deleted while the rebuild goes on and after it.
fn snapshots_meanwhile(recipe: Recipe, seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::damaged(recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    rig.open(&OpenOptions::default())?;
    limit_counts(&rig, &mut random);
    let stop = Rc::new(Cell::new(false));
    for _ in 0..2 {
        let worker = rig.worker();
        rig.driver.spawn(chaos(worker, random.fork(), 40, Mix::ALL));
    }
    let client = rig.worker();
    let work = rig.driver.spawn(background(client, Rc::clone(&stop)));
    let client = rig.worker();
    let mut pauses = random.fork();
    let commands = rig.driver.spawn(async move {
        let named = |name: &str| Selector {
            id: None,
            name: Some(name.to_owned()),
        };
        for name in ["a", "b", "c"] {
            for _ in 0..pauses.u32(..40) {
                yield_now().await;
            }
            client.worker.create_snapshots(&[new(name)]).await?;
            if name == "b" {
                client.worker.delete_snapshot(&named("a")).await?;
            }
        }
        for name in ["c", "one", "b"] {
            for _ in 0..pauses.u32(..40) {
                yield_now().await;
            }
            client.worker.delete_snapshot(&named(name)).await?;
        }
        stop.set(true);
        Ok::<(), Error>(())
    });
    rig.run()?;
    for result in [commands.take(), work.take()] {
        match result {
            Some(Ok(())) => {}
            other => return violation(format!("{other:?}")),
        }
    }
    rig.snapshot = None;
    rig.judge_settled()
}

#[test]
fn snapshots_come_and_go_during_a_rebuild() {
    let recipe = Recipe {
        fill: |cluster| match cluster % 5 {
            0 | 1 => Fill::Data,
            2 => Fill::Compressed,
            3 => Fill::ZeroKept,
            _ => Fill::None,
        },
        snapshot: true,
        ..Recipe::plain(10, 128 << 10)
    };
    for seed in seeds(40) {
        if let Err(violation) = snapshots_meanwhile(recipe, seed) {
            panic!("SEED={seed}: {violation}");
        }
    }
}

/// The snapshot table and the refcount table of before move while nobody knows the counts of their
/// clusters: those are given back later.
#[test]
fn metadata_that_moves_before_the_rebuild_is_given_back_after_it() {
    let recipe = Recipe {
        refcount_order: 6,
        fill: |cluster| {
            if cluster < 470 {
                Fill::None
            } else {
                Fill::Data
            }
        },
        snapshot: true,
        ..Recipe::plain(9, 2150 << 10)
    };
    for seed in 1..9 {
        let mut rig = Rig::damaged(recipe, seed);
        let before = Header::decode(&rig.disk.contents(IMAGE)).expect("a header");
        rig.open(&OpenOptions::default()).expect("opens");
        let client = rig.worker();
        let writer = client.clone();
        let moved = rig.block_on(async move {
            client.worker.create_snapshots(&[new("a")]).await?;
            for first in 0..400 {
                writer.write(first, 1).await?;
            }
            writer.flush().await?;
            writer.flush().await?;
            let one = Selector {
                id: None,
                name: Some("one".to_owned()),
            };
            client.worker.delete_snapshot(&one).await
        });
        assert!(moved.is_ok(), "{seed}: {moved:?}");
        let after = Header::decode(&rig.disk.contents(IMAGE)).expect("a header");
        assert_ne!(before.snapshot_table_offset, after.snapshot_table_offset);
        assert_ne!(before.refcount_table_offset, after.refcount_table_offset);
        rig.snapshot = None;
        rig.judge_settled()
            .unwrap_or_else(|violation| panic!("{seed}: {violation}"));
    }
}

/// The power goes during a rebuild under load, and again during the rebuild after that.
fn cuts(recipe: Recipe, seed: u64, cuts_max: u32) -> Result<u32, Violation> {
    let mut rig = Rig::damaged(recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0xbead);
    rig.open(&OpenOptions::default())?;
    limit_counts(&rig, &mut random);
    for _ in 0..2 {
        let worker = rig.worker();
        rig.driver.spawn(chaos(worker, random.fork(), 25, Mix::ALL));
    }
    let client = rig.worker();
    rig.driver
        .spawn(background(client, Rc::new(Cell::new(true))));
    let client = rig.worker();
    let has_room = recipe.refcount_order > 1;
    rig.driver.spawn(async move {
        for name in ["a", "b"] {
            if has_room && client.worker.create_snapshots(&[new(name)]).await.is_err() {
                return;
            }
        }
    });
    let mut done = 0;
    loop {
        let disk = rig.disk.clone();
        let moment = move || disk.changes();
        let target = moment() + random.u64(1..16);
        let outcome = rig.driver.run_until(|| moment() >= target);
        rig.verdict()?;
        if outcome == Outcome::Stuck || done >= cuts_max {
            break;
        }
        let mode = [
            CutMode::Random,
            CutMode::Random,
            CutMode::NothingUnflushed,
            CutMode::AllButOneWrite,
        ][random.usize(..4)];
        let cut = rig.disk.power_cut(&mut random, mode);
        let seed = random.u64(..);
        let mut after = rig.after_cut(cut, seed);
        done += 1;
        let judged = judge_cut(&mut after, seed);
        if let Err(violation) = judged {
            let trace = rig.disk.trace();
            return Err(Violation(format!(
                "{violation}\nbefore the cut ({mode:?}):\n{trace}"
            )));
        }
    }
    Ok(done)
}

/// Opens what a cut has left; now and then cuts the rebuild again.
fn judge_cut(rig: &mut Rig, seed: u64) -> Result<(), Violation> {
    let mut random = fastrand::Rng::with_seed(seed);
    let was_dirty = is_dirty(&rig.disk.contents(IMAGE));
    rig.open(&OpenOptions::default())?;
    limit_counts(rig, &mut random);
    let client = rig.worker();
    rig.judge_reads(&client)?;
    rig.driver.spawn(chaos(client, random.fork(), 20, Mix::ALL));
    if random.bool() {
        rig.disk.set_immediate(false);
        let client = rig.worker();
        rig.driver
            .spawn(background(client, Rc::new(Cell::new(true))));
        let disk = rig.disk.clone();
        let target = disk.changes() + random.u64(1..60);
        rig.driver.run_until(move || disk.changes() >= target);
        rig.verdict()?;
        let cut = rig.disk.power_cut(&mut random, CutMode::Random);
        let mut again = rig.after_cut(cut, seed);
        let was_dirty = is_dirty(&again.disk.contents(IMAGE));
        again.open(&OpenOptions::default())?;
        let client = again.worker();
        again.judge_reads(&client)?;
        return again.judge_mended(was_dirty);
    }
    rig.run()?;
    rig.judge_mended(was_dirty)
}

#[test]
fn a_cut_at_any_moment_of_a_rebuild_loses_nothing() {
    let mut done = 0;
    for (name, recipe) in dirty_kinds() {
        for seed in seeds(2) {
            match cuts(recipe, seed, 12) {
                Ok(count) => done += count,
                Err(violation) => panic!("{name}, SEED={seed}: {violation}"),
            }
        }
    }
    assert!(std::env::var_os("SEED").is_some() || done > 250, "{done}");
}

/// The file has lost its end: entries point past it.
fn cut_short(seed: u64) -> (Rig, Vec<u64>) {
    let recipe = Recipe {
        fill: |_| Fill::Data,
        ..Recipe::plain(12, 256 << 10)
    };
    let mut rig = Rig::damaged(recipe, seed);
    let bytes = rig.disk.contents(IMAGE);
    let mut copy = bytes.clone();
    // The last clusters are the refcount structure: the lost ones are put behind it.
    let lost: Vec<u64> = (0..4).map(|number| number * 16).collect();
    let table = tables(&bytes)[0];
    for (number, guest) in (0..).zip(&lost) {
        let host = to_u64(bytes.len()) + (number + 1) * 4096;
        put(&mut copy, table + guest * 8, host | 1 << 63);
    }
    rig.disk.poke(IMAGE, 0, &copy);
    rig.tolerant = true;
    (rig, lost)
}

#[test]
fn lost_data_is_told_of_not_served_and_not_allocated_over() {
    let (mut rig, lost) = cut_short(4);
    let end = to_u64(rig.disk.contents(IMAGE).len());
    rig.open(&OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let stays_dirty = |rig: &Rig| is_dirty(&rig.disk.contents(IMAGE));
    for round in 0..2 {
        for guest in &lost {
            let (client, first) = (client.clone(), guest * 8);
            let kind = rig.block_on(async move {
                let read = client.read(first, 1).await;
                let part = client.write(first + 1, 1).await;
                (read.map_err(|e| e.kind()), part.map_err(|e| e.kind()))
            });
            let refused = Err(ErrorKind::Io);
            assert_eq!(kind, (refused, refused), "round {round}, {guest}");
        }
        assert_eq!(rig.image().state(), State::Ready);
        // The table is copied, and everything else in it is written.
        let writer = client.clone();
        let written = rig.block_on(async move {
            for guest in (0..64_u64).filter(|guest| guest % 16 != 0) {
                writer.write(guest * 8, 8).await?;
            }
            writer.flush().await
        });
        assert!(written.is_ok(), "{written:?}");
        rig.settle_down().expect("the rest is rebuilt");
        assert!(stays_dirty(&rig));
    }
    rig.close().expect("closes");
    let bytes = rig.disk.contents(IMAGE);
    let header = Header::decode(&bytes).expect("a header");
    for table in tables(&bytes) {
        for index in 0..header.geometry().l2_entries() {
            let entry = word(&bytes, table + index * 8) & !(1 << 63);
            let in_gap = (end + 4096..end + 5 * 4096).contains(&entry);
            assert_eq!(in_gap, lost.contains(&index), "entry {index}: {entry:#x}");
        }
    }
}

/// An entry that points far past the end would land in what is allocated there.
#[test]
fn an_image_cut_far_too_short_takes_no_more_writes() {
    let (mut rig, _) = cut_short(6);
    let bytes = rig.disk.contents(IMAGE);
    let table = tables(&bytes)[0];
    let far = to_u64(bytes.len()) + (4 << 20);
    rig.disk
        .poke(IMAGE, table + 5 * 8, &(far | 1 << 63).to_be_bytes());
    rig.open(&OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let found = rig.block_on(async move {
        loop {
            match client.worker.background_step().await {
                Ok(Step::Idle) => return None,
                Ok(_) => {}
                Err(error) => return Some(error),
            }
        }
    });
    let error = found.expect("an error");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.chain().contains("cut short"), "{}", error.chain());
    assert_eq!(rig.image().state(), State::Failed);
}

/// QEMU's repair of the same damage finds the same content, and its image is clean for us.
#[test]
fn the_repair_of_qemu_agrees() {
    let directory = tempfile::tempdir().expect("directory");
    for (number, (name, recipe)) in (0..).zip(dirty_kinds()) {
        if recipe.backing.is_some() || recipe.autoclear != 0 {
            continue;
        }
        let mut rig = Rig::damaged(recipe, number * 2 + 1);
        let theirs = directory.path().join("theirs.qcow2");
        rig.disk.export(IMAGE, &theirs).expect("a file");
        let output = Command::new("qemu-img")
            .args(["check", "-q", "-r", "all", "-f", "qcow2"])
            .arg(&theirs)
            .output()
            .expect("qemu-img runs");
        assert!(output.status.success(), "{name}: {output:?}");
        rig.open(&OpenOptions::default()).expect(name);
        rig.judge_settled().expect(name);
        let ours = directory.path().join("ours.qcow2");
        rig.disk.export(IMAGE, &ours).expect("a file");
        for arguments in [
            vec!["check", "-f", "qcow2"],
            vec!["compare", "-f", "qcow2", "-F", "qcow2"],
        ] {
            let is_compare = arguments[0] == "compare";
            let mut command = Command::new("qemu-img");
            command.args(arguments).arg(&ours);
            if is_compare {
                command.arg(&theirs);
            }
            let output = command.output().expect("qemu-img runs");
            assert!(output.status.success(), "{name}: {output:?}");
        }
    }
}

/// A table that cannot be read stops the rebuild, which begins again when it can.
#[test]
fn a_rebuild_that_fails_begins_again() {
    use crate::storage::sim::Fault;
    let recipe = Recipe {
        fill: |_| Fill::Data,
        snapshot: true,
        ..Recipe::plain(9, 96 << 10)
    };
    for from in 1..12 {
        let mut rig = Rig::damaged(recipe, from);
        rig.open(&OpenOptions::default()).expect("opens");
        rig.disk.inject(Fault {
            kind: Some(OpKind::Read),
            from,
            count: 1,
            errno: 5,
        });
        let client = rig.worker();
        let failures = rig.block_on(async move {
            let mut failures = 0;
            loop {
                match client.worker.background_step().await {
                    Ok(Step::Idle) => return failures,
                    Ok(_) => {}
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Io, "{}", error.chain());
                        failures += 1;
                    }
                }
            }
        });
        assert_eq!(failures, 1, "read {from}");
        rig.judge_settled().expect("clean");
    }
}

/// What a cut in the middle of a snapshot leaves on v2: counts that are too high, flags that do not
/// say so, and flags that are gone while the count is one.
fn damage_v2(bytes: &mut [u8], random: &mut fastrand::Rng) {
    let header = Header::decode(bytes).expect("a header");
    let geometry = header.geometry();
    for table in tables(bytes) {
        for index in 0..geometry.l2_entries() {
            let entry = L2Entry(word(bytes, table + index * 8));
            if !entry.is_compressed() && entry.copied() && random.u8(..4) == 0 {
                put(bytes, table + index * 8, entry.with_copied(false).0);
            }
        }
    }
    let clusters = to_u64(bytes.len()) / geometry.cluster_size();
    for cluster in 0..clusters {
        let block = cluster / geometry.refcount_block_entries();
        let at = word(bytes, header.refcount_table_offset.get() + block * 8);
        let index = to_usize(cluster % geometry.refcount_block_entries());
        let block = &mut bytes[to_usize(at)..to_usize(at + geometry.cluster_size())];
        let count = refcount::get(block, geometry.refcount_order(), index);
        if count > 0 && random.u8(..4) == 0 {
            refcount::set(block, geometry.refcount_order(), index, count + 1);
        }
    }
}

#[test]
fn copied_flags_of_version_2_are_mended_after_a_cut() {
    for (number, snapshot) in [(1, false), (2, true), (3, false), (4, true)] {
        let recipe = Recipe {
            version: 2,
            fill: |cluster| {
                if cluster % 4 == 3 {
                    Fill::Compressed
                } else {
                    Fill::Data
                }
            },
            snapshot,
            ..Recipe::plain(9, 96 << 10)
        };
        let mut rig = Rig::new(recipe, number);
        let mut random = fastrand::Rng::with_seed(number);
        rig.open(&OpenOptions::default()).expect("opens");
        let client = rig.worker();
        rig.driver.spawn(chaos(client, random.fork(), 20, Mix::ALL));
        rig.run().expect("no violation");
        rig.close().expect("closes");
        let mut bytes = rig.disk.contents(IMAGE);
        damage_v2(&mut bytes, &mut random);
        rig.disk.poke(IMAGE, 0, &bytes);
        let flags_are_wrong = rig.check().expect("a report").corruptions > 0;
        assert!(flags_are_wrong, "{number}");
        rig.open(&OpenOptions::default()).expect("opens");
        for _ in 0..2 {
            let client = rig.worker();
            rig.driver.spawn(chaos(client, random.fork(), 30, Mix::ALL));
        }
        let client = rig.worker();
        rig.driver
            .spawn(background(client, Rc::new(Cell::new(true))));
        rig.run().expect("no violation");
        rig.judge_mended(false)
            .unwrap_or_else(|violation| panic!("{number}: {violation}"));
        // Once it is right, a look changes nothing.
        rig.disk.set_immediate(true);
        let mended = rig.disk.contents(IMAGE);
        rig.open(&OpenOptions::default()).expect("opens");
        assert!(rig.image().background().is_empty());
        rig.settle_down().expect("nothing to do");
        rig.close().expect("closes");
        assert_eq!(rig.disk.contents(IMAGE), mended, "{number}");
    }
}

/// Its counts may be lost, too: nobody trusts what a device has left, and it cannot grow.
#[test]
fn a_device_is_repaired_before_it_is_served() {
    let recipe = Recipe {
        fill: |cluster| {
            if cluster.is_multiple_of(2) {
                Fill::Data
            } else {
                Fill::None
            }
        },
        device: Some(300),
        ..Recipe::plain(11, 96 << 10)
    };
    let rig = Rig::new(recipe, 1);
    let mut bytes = rig.disk.contents(IMAGE);
    bytes[INCOMPATIBLE + 7] |= 1;
    rig.disk.poke(IMAGE, 0, &bytes);
    let mut rig = rig;
    rig.open(&OpenOptions::default()).expect("opens");
    assert!(rig.image().background().is_empty());
    assert!(!is_dirty(&rig.disk.contents(IMAGE)));
    rig.close().expect("closes");
    rig.judge_closed().expect("clean");
}
