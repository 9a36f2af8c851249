//! The rig: an image on the simulated disk, workers on it, and what they saw against the model.
//!
//! Nothing here asserts what a test is about: a violation is a value, so that a test can also
//! expect one (see `rules`).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use super::build::{Recipe, counted_past_the_end, read_snapshot, read_tree, snapshot_entries};
use super::model::{Model, sector_bytes};
use crate::engine::check::{Repair, Report, check};
use crate::engine::order::keeps;
use crate::engine::{
    BackgroundStatus, Created, Error, ErrorKind, Extent, ExtentList, Fast, Image, LayerFormat,
    LayerSpec, NewSnapshot, OpenOptions, PinGuard, Selector, Step, Worker,
};
use crate::storage::sim::{
    Driver, OpKind, Outcome, SimDisk, SimFileOptions, SimStorage, yield_now,
};
use crate::storage::{AlignedBuf, FileId, SgList, Storage, block_on};
use crate::units::{GuestOffset, to_u64, to_usize};

pub(super) const IMAGE: FileId = FileId(0);
pub(super) const BASE: FileId = FileId(1);

/// Something that must never happen has happened.
#[derive(Clone, Debug)]
pub(super) struct Violation(pub(super) String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(super) fn violation<T>(text: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(text.into()))
}

/// The seed of this run: `SEED` replays one.
pub(super) fn seed() -> u64 {
    std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1)
}

/// `count` seeds, or only the one that `SEED` names.
pub(super) fn seeds(count: u64) -> std::ops::Range<u64> {
    if std::env::var_os("SEED").is_some() {
        seed()..seed() + 1
    } else {
        1..count + 1
    }
}

/// Caches so small that slices are evicted all the time.
pub(super) fn small_caches() -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some(4 << 10),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    }
}

/// Lets the first operation of a kind fail, then the second, until `run` says that there was none so
/// late; there are at most `operations_max`.
pub(super) fn each_operation_fails_once(
    what: &str,
    (kind, errno): (OpKind, i32),
    operations_max: u64,
    run: impl Fn(u64) -> Result<bool, Violation>,
) {
    for nth in 1..operations_max {
        match run(nth) {
            Ok(true) => {}
            Ok(false) => return,
            Err(violation) => panic!("{what}, {kind:?} {nth}, errno {errno}: {violation}"),
        }
    }
    panic!("{what}, {kind:?}, errno {errno}: {operations_max} operations or more");
}

/// See the module text.
pub(super) struct Rig {
    pub(super) recipe: Recipe,
    pub(super) disk: SimDisk,
    pub(super) driver: Driver,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) image: Option<Arc<Image>>,
    bad: Rc<RefCell<Option<Violation>>>,
    /// Errors of requests are part of the test.
    pub(super) tolerant: bool,
    /// What the snapshot holds, for ever.
    pub(super) snapshot: Option<Rc<Vec<u8>>>,
    /// Snapshots that clients have taken, by name.
    pub(super) snapshots: Rc<RefCell<BTreeMap<String, Frozen>>>,
    /// Names of snapshots that are gone.
    deleted: Rc<RefCell<BTreeSet<String>>>,
}

/// What a snapshot may hold: of each sector a version that was there some time between the start of
/// the command and its end.
#[derive(Clone)]
pub(super) struct Frozen {
    model: Model,
    since: u64,
}

impl Rig {
    /// A disk with a new image.
    pub(super) fn new(recipe: Recipe, seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let options = SimFileOptions {
            can_grow: recipe.device.is_none(),
            can_punch: recipe.can_punch,
            ..SimFileOptions::default()
        };
        let bytes = recipe.build();
        assert_eq!(disk.add_file(&bytes, options), IMAGE);
        if let Some(bytes) = recipe.backing_bytes() {
            assert_eq!(disk.add_file(&bytes, SimFileOptions::default()), BASE);
        }
        let model = Model::new((0..recipe.sectors()).map(|sector| recipe.value(sector)));
        let snapshot = recipe.snapshot.then(|| {
            let all = (0..recipe.size_then() / 512)
                .flat_map(|sector| sector_bytes(sector, recipe.value(sector)));
            Rc::new(all.collect())
        });
        Self {
            recipe,
            driver: Driver::new(seed, &disk),
            disk,
            model: Rc::new(RefCell::new(model)),
            image: None,
            bad: Rc::default(),
            tolerant: false,
            snapshot,
            snapshots: Rc::default(),
            deleted: Rc::default(),
        }
    }

    /// The same image on the disk that a power cut has left, with operations that complete at once.
    pub(super) fn after_cut(&self, disk: SimDisk, seed: u64) -> Self {
        disk.set_immediate(true);
        Self {
            recipe: self.recipe,
            driver: Driver::new(seed, &disk),
            disk,
            model: Rc::new(RefCell::new(self.model.borrow().clone())),
            image: None,
            bad: Rc::default(),
            tolerant: false,
            snapshot: self.snapshot.clone(),
            snapshots: Rc::new(RefCell::new(self.snapshots.borrow().clone())),
            deleted: Rc::new(RefCell::new(self.deleted.borrow().clone())),
        }
    }

    pub(super) fn open(&mut self, options: &OpenOptions) -> Result<(), Violation> {
        let mut specs = vec![LayerSpec {
            file: IMAGE,
            format: LayerFormat::Qcow2,
        }];
        if self.recipe.backing.is_some() {
            specs.push(LayerSpec {
                file: BASE,
                format: LayerFormat::Raw,
            });
        }
        let (storage, options) = (self.disk.storage(), options.clone());
        let opened = self
            .driver
            .block_on(async move { Image::open(&storage, &specs, &options).await });
        match opened {
            Some(Ok(image)) => {
                self.image = Some(image);
                Ok(())
            }
            Some(Err(error)) => violation(format!("cannot open: {}", error.chain())),
            None => violation("power cut while opening"),
        }
    }

    pub(super) fn image(&self) -> &Arc<Image> {
        self.image.as_ref().expect("the image is open")
    }

    /// A client with a worker of its own.
    pub(super) fn worker(&self) -> Client {
        Client {
            worker: self.image().worker(self.disk.storage()),
            model: Rc::clone(&self.model),
            bad: Rc::clone(&self.bad),
            tolerant: self.tolerant,
            snapshots: Rc::clone(&self.snapshots),
            deleted: Rc::clone(&self.deleted),
            latent: false,
        }
    }

    /// What went wrong so far.
    pub(super) fn verdict(&self) -> Result<(), Violation> {
        self.bad.borrow().clone().map_or(Ok(()), Err)
    }

    /// Runs all tasks to their end.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        let outcome = self.driver.run_until_stuck();
        self.verdict()?;
        if outcome == Outcome::Done {
            Ok(())
        } else {
            violation(format!("{outcome:?}"))
        }
    }

    /// Runs one future among the tasks.
    pub(super) fn block_on<F: Future + 'static>(&mut self, future: F) -> F::Output {
        self.driver.block_on(future).expect("no power cut here")
    }

    pub(super) fn close(&mut self) -> Result<(), Violation> {
        let client = self.worker();
        let closed = self.block_on(async move { client.worker.close().await });
        self.image = None;
        closed.map_err(|error| Violation(format!("cannot close: {}", error.chain())))
    }

    pub(super) fn check(&self) -> Result<Report, Violation> {
        self.check_file(IMAGE)
    }

    pub(super) fn check_file(&self, file: FileId) -> Result<Report, Violation> {
        self.disk.set_immediate(true);
        let report = block_on(check(&self.disk.storage(), file, Repair::None, &mut |_| ()));
        self.disk.set_immediate(false);
        report.map_err(|error| Violation(format!("check fails: {}", error.chain())))
    }

    /// The image is closed: clean, and it holds what the model says.
    pub(super) fn judge_closed(&self) -> Result<(), Violation> {
        let report = self.check()?;
        if !report.is_clean() || report.overlaps > 0 {
            return violation(format!("not clean: {:?}", report.problems));
        }
        self.judge_trees()
    }

    /// At worst leaks; every sector and the snapshot as they must be. Without the engine.
    pub(super) fn judge_trees(&self) -> Result<(), Violation> {
        let bytes = self.disk.contents(IMAGE);
        let base = self.recipe.backing.map(|_| self.disk.contents(BASE));
        let disk = read_tree(&bytes, base.as_deref(), false).map_err(Violation)?;
        let model = self.model.borrow();
        model.judge(0, &disk, model.flush_floor())?;
        if let Some(content) = self.snapshot.as_ref().filter(|_| self.keeps_first()) {
            let disk = read_tree(&bytes, base.as_deref(), true).map_err(Violation)?;
            if disk != **content {
                return violation("the snapshot has changed");
            }
        }
        Ok(())
    }

    /// The active disk of these image bytes, since the last flush. Without the engine.
    pub(super) fn judge_active(&self, bytes: &[u8]) -> Result<(), Violation> {
        let base = self.recipe.backing.map(|_| self.disk.contents(BASE));
        let disk = read_tree(bytes, base.as_deref(), false).map_err(Violation)?;
        let model = self.model.borrow();
        model.judge(0, &disk, model.flush_floor())
    }

    /// The whole disk, through the engine.
    pub(super) fn read_whole(&mut self) -> Result<Vec<u8>, Violation> {
        let worker = self.worker().worker;
        let len = self.model.borrow().sectors() * 512;
        let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
        let target = sg.slice(0, len);
        let read = self
            .block_on(async move { worker.read(worker.pin(), GuestOffset::new(0), target).await });
        read.map_err(|error| Violation(format!("read: {}", error.chain())))?;
        Ok(sg.to_vec())
    }

    /// The model begins again with a disk that was judged.
    pub(super) fn restart(&mut self, disk: &[u8]) {
        *self.model.borrow_mut() = Model::restart(disk);
    }

    /// The snapshot that the image came with was not deleted.
    fn keeps_first(&self) -> bool {
        let deleted = self.deleted.borrow();
        !deleted.contains("one")
    }

    /// Every snapshot that was taken, and no other, is in the file, with its content.
    pub(super) fn judge_snapshots(&self) -> Result<(), Violation> {
        let bytes = self.disk.contents(IMAGE);
        let base = self.recipe.backing.map(|_| self.disk.contents(BASE));
        let entries = snapshot_entries(&bytes).map_err(Violation)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut names: Vec<String> = entries.iter().map(|entry| text(&entry.name)).collect();
        names.sort_unstable();
        let mut wanted: Vec<String> = self.snapshots.borrow().keys().cloned().collect();
        wanted.extend((self.recipe.snapshot && self.keeps_first()).then(|| "one".to_owned()));
        wanted.sort_unstable();
        if names != wanted {
            return violation(format!("the file has snapshots {names:?}, not {wanted:?}"));
        }
        for (name, frozen) in self.snapshots.borrow().iter() {
            let entry = entries.iter().find(|entry| text(&entry.name) == *name);
            let id = entry.map_or_else(String::new, |entry| text(&entry.id));
            let disk = read_snapshot(&bytes, base.as_deref(), &id).map_err(Violation)?;
            frozen
                .model
                .judge(0, &disk, frozen.since)
                .map_err(|violation| Violation(format!("snapshot '{name}': {violation}")))?;
        }
        Ok(())
    }

    /// Does all background work; the image is clean then.
    pub(super) fn settle(&mut self) -> Result<(), Violation> {
        let client = self.worker();
        self.block_on(async move { client.settle().await });
        self.verdict()
    }

    /// What a power cut has left: consistent, flushed data there, fit for more work.
    pub(super) fn judge_cut(&mut self, seed: u64, more_work: bool) -> Result<(), Violation> {
        let before = self.check()?;
        self.disk.set_immediate(true);
        if !before.is_consistent() || before.overlaps > 0 {
            return violation(format!("after the cut: {:?}", before.problems));
        }
        self.judge_trees()?;
        if !more_work {
            return Ok(());
        }
        let past_end = counted_past_the_end(&self.disk.contents(IMAGE)).map_err(Violation)?;
        self.open(&OpenOptions::default())?;
        let client = self.worker();
        let len = self.model.borrow().sectors() * 512;
        let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
        let read = block_on(client.worker.read(
            client.worker.pin(),
            GuestOffset::new(0),
            sg.slice(0, len),
        ));
        read.map_err(|error| Violation(format!("read after the cut: {}", error.chain())))?;
        let bytes = sg.to_vec();
        let since = self.model.borrow().flush_floor();
        self.model.borrow().judge(0, &bytes, since)?;
        *self.model.borrow_mut() = Model::restart(&bytes);
        block_on(chaos(client, fastrand::Rng::with_seed(seed), 40, Mix::ALL));
        self.verdict()?;
        self.close()?;
        let after = self.check()?;
        if !after.is_consistent() || after.leaks > before.leaks + past_end {
            let leaks = before.leaks + past_end;
            return violation(format!(
                "after more work ({leaks} leaks): {:?}",
                after.problems
            ));
        }
        self.judge_trees()
    }
}

/// One queue: a worker, and everything it sees is judged.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) worker: Rc<Worker<SimStorage>>,
    pub(super) model: Rc<RefCell<Model>>,
    bad: Rc<RefCell<Option<Violation>>>,
    tolerant: bool,
    pub(super) snapshots: Rc<RefCell<BTreeMap<String, Frozen>>>,
    deleted: Rc<RefCell<BTreeSet<String>>>,
    /// Some time passes between the submission of a request and its pin.
    pub(super) latent: bool,
}

impl Client {
    pub(super) fn complain(&self, text: impl fmt::Display) {
        self.bad
            .borrow_mut()
            .get_or_insert(Violation(text.to_string()));
    }

    pub(super) fn is_bad(&self) -> bool {
        self.bad.borrow().is_some()
    }

    fn told(&self, what: &str, result: &Result<(), Error>) {
        if let Err(error) = result {
            let expected = [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Failed];
            if !self.tolerant || !expected.contains(&error.kind()) {
                self.complain(format!("{what}: {}", error.chain()));
            }
        }
    }

    /// A write, as the device does it: on the fast path where that is ready.
    pub(super) async fn write(&self, first: u64, count: u64) -> Result<(), Error> {
        let value = self.model.borrow_mut().new_value();
        let bytes: Vec<u8> = (first..first + count)
            .flat_map(|sector| sector_bytes(sector, value))
            .collect();
        let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
        let early = self.early_pin().await;
        let change = self
            .model
            .borrow_mut()
            .begin(first..first + count, value, true);
        let (offset, len) = (GuestOffset::new(first * 512), count * 512);
        let mut extents = ExtentList::new();
        let pin = self.pin(early).await;
        let result = match self.worker.resolve_write(&pin, offset, len, &mut extents) {
            Fast::Ready => self.perform(&extents, &sg, true).await,
            Fast::Slow => self.worker.write(pin, offset, sg).await,
        };
        self.model.borrow_mut().end(&change, result.is_ok());
        self.told("write", &result);
        result
    }

    /// The pin of a worker that loads the generation before it reads the avail index: of something
    /// that is not submitted yet.
    async fn early_pin(&self) -> Option<PinGuard> {
        if keeps!(PinAfterAvail) {
            return None;
        }
        let pin = self.worker.pin();
        for _ in 0..100 {
            yield_now().await;
        }
        Some(pin)
    }

    /// The pin of a request that was submitted: a worker gets to it some time later.
    async fn pin(&self, early: Option<PinGuard>) -> PinGuard {
        if let Some(early) = early {
            return early;
        }
        if self.latent {
            yield_now().await;
        }
        self.worker.pin()
    }

    async fn perform(&self, extents: &ExtentList, sg: &SgList, write: bool) -> Result<(), Error> {
        let storage = self.worker.storage();
        let mut done = 0;
        for extent in extents.as_slice() {
            done += match *extent {
                Extent::Zero { len } => {
                    sg.fill_zero(done, len);
                    len
                }
                Extent::Data {
                    file,
                    host_offset,
                    len,
                } => {
                    let part = sg.slice(done, len);
                    let result = if write {
                        storage.write(file, host_offset, part).await
                    } else {
                        storage.read(file, host_offset, part).await
                    };
                    result.map_err(|error| Error::io("fast path", error))?;
                    len
                }
            };
        }
        Ok(())
    }

    pub(super) async fn read(&self, first: u64, count: u64) -> Result<(), Error> {
        let (offset, len) = (GuestOffset::new(first * 512), count * 512);
        let sg = SgList::from_buf(AlignedBuf::from_slice(&vec![0xab; to_usize(len)]));
        let since = self.model.borrow_mut().watch();
        let mut extents = ExtentList::new();
        let pin = self.worker.pin();
        let result = match self.worker.resolve_read(&pin, offset, len, &mut extents) {
            Fast::Ready => {
                let result = self.perform(&extents, &sg, false).await;
                drop(pin);
                result
            }
            Fast::Slow => self.worker.read(pin, offset, sg.slice(0, len)).await,
        };
        let judged = match &result {
            Ok(()) => self.model.borrow().judge(first, &sg.to_vec(), since),
            Err(_) => Ok(()),
        };
        self.model.borrow_mut().unwatch(since);
        if let Err(violation) = judged {
            self.complain(format!("read of sectors {first}+{count}: {violation}"));
        }
        self.told("read", &result);
        result
    }

    pub(super) async fn zero(&self, first: u64, count: u64, unmap: bool) -> Result<(), Error> {
        let early = self.early_pin().await;
        let change = self.model.borrow_mut().begin(first..first + count, 0, true);
        let offset = GuestOffset::new(first * 512);
        let pin = self.pin(early).await;
        let result = self
            .worker
            .write_zeroes(pin, offset, count * 512, unmap)
            .await;
        self.model.borrow_mut().end(&change, result.is_ok());
        self.told("write-zeroes", &result);
        result
    }

    /// A discard may have any effect or none, even of its parts.
    pub(super) async fn discard(&self, first: u64, count: u64) -> Result<(), Error> {
        let change = self
            .model
            .borrow_mut()
            .begin(first..first + count, 0, false);
        let offset = GuestOffset::new(first * 512);
        let result = self
            .worker
            .discard(self.worker.pin(), offset, count * 512)
            .await;
        self.model.borrow_mut().end(&change, result.is_ok());
        self.told("discard", &result);
        result
    }

    /// Would a write go in place, on the fast path? Loads what that needs.
    pub(super) fn is_in_place(&self, first: u64, count: u64) -> bool {
        let (offset, len) = (GuestOffset::new(first * 512), count * 512);
        let mut extents = ExtentList::new();
        let disk = self.worker.storage().disk();
        disk.set_immediate(true);
        let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
        let read = block_on(self.worker.read(self.worker.pin(), offset, sg));
        disk.set_immediate(false);
        let pin = self.worker.pin();
        read.is_ok() && self.worker.resolve_write(&pin, offset, len, &mut extents) == Fast::Ready
    }

    /// Takes a snapshot of the disk.
    pub(super) async fn snapshot(&self, name: &str) -> Result<Created, Error> {
        let new = NewSnapshot {
            name: name.to_owned(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
        };
        let since = self.model.borrow_mut().watch();
        let result = self.worker.create_snapshots(&[new]).await;
        if result.is_ok() {
            let model = self.model.borrow().clone();
            let frozen = Frozen { model, since };
            self.snapshots.borrow_mut().insert(name.to_owned(), frozen);
        }
        self.model.borrow_mut().unwatch(since);
        result.map(|mut created| created.remove(0))
    }

    /// Deletes a snapshot.
    pub(super) async fn delete(&self, name: &str) -> Result<(), Error> {
        let selector = Selector {
            id: None,
            name: Some(name.to_owned()),
        };
        self.worker.delete_snapshot(&selector).await?;
        self.snapshots.borrow_mut().remove(name);
        self.deleted.borrow_mut().insert(name.to_owned());
        Ok(())
    }

    /// Does the background work until there is none left; says which work was done.
    pub(super) async fn settle(&self) -> Vec<BackgroundStatus> {
        let mut all = Vec::new();
        while !self.is_bad() {
            match self.worker.background_step().await {
                Ok(Step::Idle) => break,
                Ok(Step::Done(status)) => all.push(status),
                Ok(Step::Progress { .. } | Step::Clean) => yield_now().await,
                Err(error) => {
                    self.complain(format!("background work: {}", error.chain()));
                }
            }
        }
        all
    }

    pub(super) async fn flush(&self) -> Result<(), Error> {
        let since = self.model.borrow_mut().watch();
        let result = self.worker.flush().await;
        if result.is_ok() {
            self.model.borrow_mut().flushed(since);
        }
        self.model.borrow_mut().unwatch(since);
        self.told("flush", &result);
        result
    }
}

/// How often each kind of request comes, and where.
#[derive(Clone, Copy)]
pub(super) struct Mix {
    pub(super) write: u32,
    pub(super) read: u32,
    pub(super) zero: u32,
    pub(super) discard: u32,
    pub(super) flush: u32,
    /// Sectors from the start of the disk; 0: all.
    pub(super) area: u64,
    /// Longest request, in sectors.
    pub(super) longest: u64,
    /// Every write is followed by a flush, as with a write-through cache.
    pub(super) write_through: bool,
}

impl Mix {
    pub(super) const ALL: Self = Self {
        write: 8,
        read: 6,
        zero: 3,
        discard: 3,
        flush: 2,
        area: 0,
        longest: 64,
        write_through: false,
    };
}

/// Random requests of one queue, one after the other.
pub(super) async fn chaos(client: Client, mut random: fastrand::Rng, requests: u32, mix: Mix) {
    let all = client.model.borrow().sectors();
    let area = if mix.area == 0 {
        all
    } else {
        mix.area.min(all)
    };
    for _ in 0..requests {
        if client.is_bad() {
            return;
        }
        let first = random.u64(0..area);
        let longest = [1, 8, mix.longest][random.usize(..3)].min(mix.longest);
        let count = random.u64(1..=longest).min(area - first);
        let mut pick = random.u32(0..mix.write + mix.read + mix.zero + mix.discard + mix.flush);
        let mut is = |weight: u32| {
            let chosen = pick < weight;
            pick = if chosen {
                u32::MAX
            } else {
                pick - weight.min(pick)
            };
            chosen
        };
        // Errors were judged where they came up.
        let _result = if is(mix.write) {
            let result = client.write(first, count).await;
            if mix.write_through && result.is_ok() {
                client.flush().await
            } else {
                result
            }
        } else if is(mix.read) {
            client.read(first, count).await
        } else if is(mix.zero) {
            client.zero(first, count, random.bool()).await
        } else if is(mix.discard) {
            client.discard(first, count).await
        } else {
            client.flush().await
        };
        if random.u8(..4) == 0 {
            yield_now().await;
        }
    }
}

/// Counts operations of some kinds while a future runs.
pub(super) struct Counted {
    pub(super) syncs: u64,
    pub(super) writes: u64,
    pub(super) bytes: u64,
}

pub(super) fn counted<T>(disk: &SimDisk, run: impl FnOnce() -> T) -> (T, Counted) {
    let before = (
        disk.syncs(),
        disk.writes() + disk.count(OpKind::Zeroes),
        disk.bytes_written(),
    );
    let result = run();
    let counted = Counted {
        syncs: disk.syncs() - before.0,
        writes: disk.writes() + disk.count(OpKind::Zeroes) - before.1,
        bytes: disk.bytes_written() - before.2,
    };
    (result, counted)
}

/// A number for the content of an image file, to tell states apart.
pub(super) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(to_u64(bytes.len()), |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (hash.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}
