//! Random verified work on several queues.
//!
//! One thread drives all queues, so that it always knows what is in flight: two requests that touch
//! the same sector are never in flight together unless both read. Neighbouring sectors of one
//! cluster are, on purpose and often. Every read is compared with the model, and at the end the
//! whole region is. With a journal the run survives the death of its server and leaves a file that
//! says what each sector may hold.

use super::disk::{
    Completion, ConnectOptions, Disk, Kind, Queue, STATUS_OK, Segment, Waiter, Watchdog,
};
use super::journal::{Effect, Journal, Permitted};
use super::model::{self, Model};
use super::{Error, SECTOR_BYTES, index, scan, sectors_to_bytes};
use fastrand::Rng;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use virtio_driver::VirtioBlkFeatureFlags;

/// Largest discard or write-zeroes: a few clusters of the largest size.
const CLEAR_SECTORS_MAX: u64 = (8 << 20) / SECTOR_BYTES as u64;
/// The cluster size that boundaries are sought around; other sizes are met by chance.
const CLUSTER_SECTORS: u64 = (64 << 10) / SECTOR_BYTES as u64;
/// Size of a window that attracts half of the requests for a while.
const WINDOW_SECTORS: u64 = (1 << 20) / SECTOR_BYTES as u64;
/// Attempts to find a range that is free of requests in flight.
const ATTEMPTS: usize = 8;
/// Requests remembered for the report of a miscompare.
const HISTORY: usize = 100_000;
/// Data descriptors of one request.
const DATA_DESCRIPTORS: usize = 4;

/// Where the content before the run is taken from.
#[derive(Clone, Debug)]
pub(crate) enum Initial {
    /// Whatever the disk holds.
    Read,
    /// The disk must read as zeroes (checked).
    Zero,
    /// The disk must read as this raw file (checked).
    Raw(PathBuf),
    /// The disk is in the settled state of an earlier run (not read again).
    State(PathBuf),
}

/// How to run.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) connect: ConnectOptions,
    pub(crate) duration: Duration,
    /// Ends the run early after that many requests.
    pub(crate) requests_max: u64,
    pub(crate) seed: u64,
    /// The region under test: that many bytes from the start of the disk.
    pub(crate) region_bytes: u64,
    pub(crate) initial: Initial,
    /// Discarded whole clusters of this size must read as zeroes; 0: a discard may do nothing.
    pub(crate) discard_cluster_bytes: u64,
    /// No two changes in flight in the same aligned block of this size (0: sectors suffice). For
    /// servers that cannot stand more.
    pub(crate) exclusive_bytes: u64,
    /// Neither discards nor write-zeroes.
    pub(crate) only_data: bool,
    /// Keeps the content from before the run; without it an unnamed file does.
    pub(crate) base: Option<PathBuf>,
    /// Gets the final content, as a raw file.
    pub(crate) model_out: Option<PathBuf>,
    /// Gets what each sector may hold when the server dies, or the final state.
    pub(crate) state_out: Option<PathBuf>,
}

impl Options {
    /// A run of `duration` on `queues` queues over a disk that is read first.
    pub(crate) fn new(socket: impl Into<PathBuf>, queues: usize, duration: Duration) -> Self {
        let connect = ConnectOptions {
            queues,
            data_descriptors: DATA_DESCRIPTORS,
            ..ConnectOptions::new(socket)
        };
        Self {
            connect,
            duration,
            requests_max: u64::MAX,
            seed: 1,
            region_bytes: 4 << 30,
            initial: Initial::Read,
            discard_cluster_bytes: 0,
            exclusive_bytes: 0,
            only_data: false,
            base: None,
            model_out: None,
            state_out: None,
        }
    }
}

/// What a run did.
#[derive(Debug, Default, serde::Serialize)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) discards: u64,
    pub(crate) write_zeroes: u64,
    pub(crate) flushes: u64,
    pub(crate) sectors_verified: u64,
    /// The server died (only without error if a state file was asked for).
    pub(crate) server_gone: bool,
}

/// A request in flight.
struct Request {
    kind: Kind,
    sectors: Vec<Range<u64>>,
    /// The version of a write.
    version: u32,
    /// The journal's names of the changes.
    changes: Vec<u64>,
    effects: Vec<Effect>,
    /// What a flush covers.
    flush_mark: u64,
}

impl Request {
    fn new(kind: Kind, sectors: Vec<Range<u64>>) -> Self {
        Self {
            kind,
            sectors,
            version: 0,
            changes: vec![],
            effects: vec![],
            flush_mark: 0,
        }
    }
}

/// One line of the history: a request was submitted or completed.
struct Event {
    queue_index: usize,
    kind: Kind,
    version: u32,
    sectors: Range<u64>,
    done: bool,
}

/// Runs chaos and verifies. Fails on the first miscompare, error status, hang or broken rule.
pub(crate) fn run(options: &Options) -> Result<Report, Error> {
    let (disk, mut queues) = Disk::connect(&options.connect)?;
    let capacity_bytes = disk.geometry.capacity_sectors * SECTOR_BYTES as u64;
    let granule = disk.geometry.granule_sectors();
    let region_sectors =
        options.region_bytes.min(capacity_bytes) / SECTOR_BYTES as u64 / granule * granule;
    if region_sectors == 0 {
        return Err(Error::Usage("the region is empty".to_owned()));
    }
    let model = initial_model(options, &disk, &mut queues[0], region_sectors)?;
    if options.state_out.is_some()
        && options.base.is_none()
        && model.states().contains(&model::State::FOREIGN)
    {
        let what = "a state file of a disk that is not empty needs a base file";
        return Err(Error::Usage(what.to_owned()));
    }
    let journal = options.state_out.as_ref().map(|_| Journal::new(&model));
    let mut chaos = Chaos {
        options,
        in_flight: queues
            .iter()
            .map(|queue| (0..queue.slots()).map(|_| None).collect())
            .collect(),
        free: queues
            .iter()
            .map(|queue| (0..queue.slots()).collect())
            .collect(),
        scratch: vec![0; options.connect.slot_bytes],
        poison: vec![0xa5; options.connect.slot_bytes],
        busy: Vec::new(),
        windows: [0; 4],
        history: VecDeque::new(),
        rng: Rng::with_seed(options.seed),
        report: Report {
            seed: options.seed,
            ..Report::default()
        },
        disk,
        queues,
        model,
        journal,
        granule,
    };
    match chaos.drive() {
        Ok(()) => {}
        Err(Error::ServerGone(why)) => match (&options.state_out, &chaos.journal) {
            (Some(path), Some(journal)) => {
                journal.save(path, &chaos.model, options.base.as_deref())?;
                chaos.report.server_gone = true;
                return Ok(chaos.report);
            }
            _ => return Err(Error::ServerGone(why)),
        },
        Err(error) => return Err(chaos.with_history(error)),
    }
    if let Some(path) = &options.state_out {
        Journal::new(&chaos.model).save(path, &chaos.model, options.base.as_deref())?;
    }
    if let Some(path) = &options.model_out {
        chaos.model.write_raw(path, capacity_bytes)?;
    }
    Ok(chaos.report)
}

/// Builds the model of the disk as it is before the run.
fn initial_model(
    options: &Options,
    disk: &Disk,
    queue: &mut Queue,
    region_sectors: u64,
) -> Result<Model, Error> {
    // The key differs from run to run, so that content of an earlier run is never taken for ours.
    let key = options.seed ^ fastrand::u64(..) << 16;
    let mut model = Model::zeroed(key, region_sectors);
    match &options.initial {
        Initial::State(path) => {
            let permitted = Permitted::load(path)?;
            if !permitted.is_settled() || permitted.model.sectors() != region_sectors {
                let what = format!("{} is not settled or of another size", path.display());
                return Err(Error::Usage(what));
            }
            if permitted.base != options.base {
                let what = format!("the state needs the base file {:?}", permitted.base);
                return Err(Error::Usage(what));
            }
            return Ok(permitted.model);
        }
        Initial::Zero => {
            scan::scan(disk, queue, 0..region_sectors, |first, found| {
                model.check(first, found, "before the run")
            })?;
        }
        Initial::Read => {
            let bytes = region_sectors * SECTOR_BYTES as u64;
            model.set_base(model::create_base(options.base.as_deref(), bytes)?);
            scan::scan(disk, queue, 0..region_sectors, |first, found| {
                model.learn(first, found)
            })?;
        }
        Initial::Raw(path) => {
            let file =
                File::open(path).map_err(Error::io(format!("opening {}", path.display())))?;
            model.set_base(file);
            model.update(0..region_sectors, |_, _| model::State::FOREIGN);
            scan::scan(disk, queue, 0..region_sectors, |first, found| {
                model.check(first, found, "before the run")
            })?;
        }
    }
    Ok(model)
}

struct Chaos<'a> {
    options: &'a Options,
    disk: Disk,
    queues: Vec<Queue>,
    model: Model,
    /// Only where a state file is wanted.
    journal: Option<Journal>,
    /// Sectors that every request is aligned to.
    granule: u64,
    /// Per queue and slot.
    in_flight: Vec<Vec<Option<Request>>>,
    free: Vec<Vec<usize>>,
    /// Ranges in flight, and whether they are only read.
    busy: Vec<(Range<u64>, bool)>,
    /// First sectors of the ranges that attract requests at present.
    windows: [u64; 4],
    history: VecDeque<Event>,
    rng: Rng,
    scratch: Vec<u8>,
    poison: Vec<u8>,
    report: Report,
}

impl Chaos<'_> {
    /// Random work, then a flush, then the whole region compared.
    fn drive(&mut self) -> Result<(), Error> {
        self.work()?;
        let region = 0..self.model.sectors();
        let (model, report) = (&mut self.model, &mut self.report);
        scan::scan(&self.disk, &mut self.queues[0], region, |first, found| {
            report.sectors_verified += (found.len() / SECTOR_BYTES) as u64;
            model.check(first, found, "after the run")
        })
    }

    fn work(&mut self) -> Result<(), Error> {
        let waiter = Waiter::new(&self.queues)?;
        let mut watchdog = Watchdog::new();
        let started = Instant::now();
        let mut submitted = 0_u64;
        let mut depth = self.options.connect.slots;
        let mut completed = Vec::new();
        let mut final_flush = false;
        loop {
            let over = started.elapsed() >= self.options.duration
                || submitted >= self.options.requests_max;
            for queue_index in 0..self.queues.len() {
                while !over
                    && self.queues[queue_index].in_flight() < depth
                    && self.submit_random(queue_index)?
                {
                    submitted += 1;
                }
                self.queues[queue_index].kick()?;
            }
            let in_flight: usize = self.queues.iter().map(Queue::in_flight).sum();
            if over && in_flight == 0 {
                if final_flush || !self.disk.geometry.has(VirtioBlkFeatureFlags::FLUSH) {
                    return Ok(());
                }
                final_flush = true;
                self.submit(0, Request::new(Kind::Flush, vec![]))?;
                self.queues[0].kick()?;
            }
            if self.reap(&mut completed)? > 0 {
                watchdog.progress(Instant::now());
                // Now and then the load changes: full rings, trickles, and all between.
                if self.rng.u32(0..500) == 0 {
                    depth = self.rng.usize(1..=self.options.connect.slots);
                    let region = self.model.sectors();
                    self.windows = std::array::from_fn(|_| self.rng.u64(0..region));
                }
                continue;
            }
            waiter.wait(&mut self.queues, 100)?;
            if let Err(error) = watchdog.check(&self.disk, in_flight) {
                // What the server completed before it died counts.
                self.reap(&mut completed)?;
                return Err(error);
            }
        }
    }

    /// Handles all completions that are there; returns their number.
    fn reap(&mut self, completed: &mut Vec<Completion>) -> Result<usize, Error> {
        let mut count = 0;
        for queue_index in 0..self.queues.len() {
            self.queues[queue_index].reap(completed)?;
            count += completed.len();
            for completion in completed.drain(..) {
                self.complete(queue_index, completion)?;
            }
        }
        Ok(count)
    }

    fn complete(&mut self, queue_index: usize, completion: Completion) -> Result<(), Error> {
        let Some(request) = self.in_flight[queue_index][completion.slot].take() else {
            return Err(Error::Protocol(format!(
                "slot {} was idle",
                completion.slot
            )));
        };
        self.free[queue_index].push(completion.slot);
        self.remember(queue_index, &request, true);
        let only_read = request.kind == Kind::Read;
        for sectors in &request.sectors {
            let entry = (self.claim(sectors), only_read);
            if let Some(at) = self.busy.iter().position(|busy| *busy == entry) {
                self.busy.swap_remove(at);
            }
        }
        if completion.status != STATUS_OK {
            let request = format!("{:?} of sectors {:?}", request.kind, request.sectors);
            return Err(Error::Status {
                request,
                status: completion.status,
            });
        }
        for (sectors, effect) in request.sectors.iter().zip(&request.effects) {
            self.model
                .update(sectors.clone(), |number, state| effect.apply(number, state));
        }
        if let Some(journal) = &mut self.journal {
            for change in &request.changes {
                journal.complete(*change);
            }
            if request.kind == Kind::Flush {
                journal.flushed(request.flush_mark);
            }
        }
        match request.kind {
            Kind::Read => {
                let sectors = &request.sectors[0];
                let bytes = &mut self.scratch[..sectors_to_bytes(sectors.end - sectors.start)];
                self.queues[queue_index].read_slot(completion.slot, 0, bytes);
                self.model
                    .check(sectors.start, bytes, "read during the run")?;
                self.report.reads += 1;
                self.report.sectors_verified += sectors.end - sectors.start;
            }
            Kind::Write => self.report.writes += 1,
            Kind::Flush => self.report.flushes += 1,
            Kind::Discard => self.report.discards += 1,
            Kind::WriteZeroes => self.report.write_zeroes += 1,
            Kind::GetId => {}
        }
        Ok(())
    }

    /// Submits one random request; `false` if none was found that does not collide.
    fn submit_random(&mut self, queue_index: usize) -> Result<bool, Error> {
        let geometry = &self.disk.geometry;
        let may_write = !geometry.has(VirtioBlkFeatureFlags::RO);
        let may_clear = may_write && !self.options.only_data;
        let kind = match self.rng.u32(0..100) {
            0..5 if geometry.has(VirtioBlkFeatureFlags::FLUSH) => Kind::Flush,
            5..12 if may_clear && geometry.has(VirtioBlkFeatureFlags::DISCARD) => Kind::Discard,
            12..24 if may_clear && geometry.has(VirtioBlkFeatureFlags::WRITE_ZEROES) => {
                Kind::WriteZeroes
            }
            24..65 if may_write => Kind::Write,
            _ => Kind::Read,
        };
        let segments_max = match kind {
            Kind::Discard => u64::from(geometry.max_discard_segments.clamp(1, 4)),
            Kind::WriteZeroes => u64::from(geometry.max_write_zeroes_segments.clamp(1, 4)),
            Kind::Flush => 0,
            Kind::Read | Kind::Write | Kind::GetId => 1,
        };
        let mut wanted = segments_max;
        if segments_max > 1 {
            wanted = if self.rng.bool() {
                1
            } else {
                self.rng.u64(1..=segments_max)
            };
        }
        let mut sectors: Vec<Range<u64>> = Vec::new();
        for _ in 0..wanted {
            let found = (0..ATTEMPTS).find_map(|_| {
                let range = self.random_range(kind);
                let free = !self.collides(&range, kind == Kind::Read)
                    && !sectors.iter().any(|other| overlap(other, &range));
                free.then_some(range)
            });
            sectors.extend(found);
        }
        if wanted > 0 && sectors.is_empty() {
            return Ok(false);
        }
        self.submit(queue_index, Request::new(kind, sectors))?;
        Ok(true)
    }

    fn submit(&mut self, queue_index: usize, mut request: Request) -> Result<(), Error> {
        let Some(slot) = self.free[queue_index].pop() else {
            return Err(Error::Protocol("no free slot".to_owned()));
        };
        let queue = &mut self.queues[queue_index];
        match request.kind {
            Kind::Read | Kind::Write => {
                let sectors = request.sectors[0].clone();
                let length = sectors_to_bytes(sectors.end - sectors.start);
                if request.kind == Kind::Read {
                    // What the server does not fill in must not look right by chance.
                    queue.write_slot(slot, 0, &self.poison[..length]);
                } else {
                    request.version = self.model.take_version()?;
                    request.effects.push(Effect::Write(request.version));
                    let bytes = &mut self.scratch[..length];
                    model::fill_range(self.model.key, sectors.start, request.version, bytes);
                    queue.write_slot(slot, 0, bytes);
                }
                let parts = random_parts(&mut self.rng, length, self.disk.geometry.seg_max);
                queue.submit(slot, request.kind, sectors.start, &parts)?;
            }
            Kind::Flush => {
                request.flush_mark = self.journal.as_ref().map_or(0, Journal::flush_mark);
                queue.submit(slot, Kind::Flush, 0, &[])?;
            }
            Kind::Discard | Kind::WriteZeroes => {
                let unmap = request.kind == Kind::WriteZeroes && self.rng.bool();
                let cluster_sectors = self.options.discard_cluster_bytes / SECTOR_BYTES as u64;
                let mut segments = Vec::new();
                for range in &request.sectors {
                    let sectors = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
                    let segment = Segment {
                        sector: range.start,
                        sectors,
                        unmap,
                    };
                    request.effects.push(match request.kind {
                        Kind::Discard => Effect::discard(&segment, cluster_sectors),
                        _ => Effect::Zero,
                    });
                    segments.push(segment);
                }
                queue.submit_segments(slot, request.kind, &segments)?;
            }
            Kind::GetId => return Err(Error::Protocol("not a request of chaos".to_owned())),
        }
        if let Some(journal) = &mut self.journal {
            for (sectors, effect) in request.sectors.iter().zip(&request.effects) {
                request
                    .changes
                    .push(journal.submit(sectors.clone(), *effect));
            }
        }
        for sectors in &request.sectors {
            let claim = self.claim(sectors);
            self.busy.push((claim, request.kind == Kind::Read));
        }
        self.remember(queue_index, &request, false);
        self.in_flight[queue_index][slot] = Some(request);
        Ok(())
    }

    /// What a request keeps others out of.
    fn claim(&self, range: &Range<u64>) -> Range<u64> {
        let block = (self.options.exclusive_bytes / SECTOR_BYTES as u64).max(1);
        range.start / block * block..range.end.next_multiple_of(block)
    }

    fn collides(&self, range: &Range<u64>, only_read: bool) -> bool {
        let claim = self.claim(range);
        self.busy
            .iter()
            .any(|(busy, reads)| !(only_read && *reads) && overlap(busy, &claim))
    }

    /// A range of the region: small or large, aligned or not, in a busy window or anywhere.
    fn random_range(&mut self, kind: Kind) -> Range<u64> {
        let geometry = &self.disk.geometry;
        let region = self.model.sectors();
        let mut most = (self.options.connect.slot_bytes / SECTOR_BYTES) as u64;
        match kind {
            Kind::Discard => most = limit(geometry.max_discard_sectors).min(CLEAR_SECTORS_MAX),
            Kind::WriteZeroes => {
                most = limit(geometry.max_write_zeroes_sectors).min(CLEAR_SECTORS_MAX);
            }
            _ if geometry.has(VirtioBlkFeatureFlags::SIZE_MAX) => {
                most = most.min(limit(geometry.size_max) / SECTOR_BYTES as u64);
            }
            _ => {}
        }
        let start = if self.rng.bool() {
            self.rng.choice(self.windows).unwrap_or(0) + self.rng.u64(0..WINDOW_SECTORS)
        } else {
            self.rng.u64(0..region)
        };
        let (start, length) = match self.rng.u32(0..10) {
            0..3 => (start, self.rng.u64(1..=8)),
            3..6 => (start / 8 * 8, 8),
            6 => (start / CLUSTER_SECTORS * CLUSTER_SECTORS, CLUSTER_SECTORS),
            7 => {
                let boundary = start.next_multiple_of(CLUSTER_SECTORS);
                let before = self.rng.u64(1..=CLUSTER_SECTORS);
                (
                    boundary.saturating_sub(before),
                    before + self.rng.u64(1..=CLUSTER_SECTORS),
                )
            }
            8 => (start, self.rng.u64(1..=most.min(4 * CLUSTER_SECTORS))),
            // Rare and large, else little but zeroes would be left.
            _ if self.rng.u32(0..8) == 0 => (
                start / CLUSTER_SECTORS * CLUSTER_SECTORS,
                self.rng.u64(1..=most),
            ),
            _ => (start, self.rng.u64(1..=64)),
        };
        let start = start.min(region - 1) / self.granule * self.granule;
        let length = length
            .min(most)
            .next_multiple_of(self.granule)
            .min(region - start);
        start..start + length
    }

    fn remember(&mut self, queue_index: usize, request: &Request, done: bool) {
        for sectors in &request.sectors {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(Event {
                queue_index,
                kind: request.kind,
                version: request.version,
                sectors: sectors.clone(),
                done,
            });
        }
    }

    /// Adds to a miscompare what was done to its sector and near it.
    fn with_history(&self, error: Error) -> Error {
        let Error::Miscompare { sector, mut what } = error else {
            return error;
        };
        let first = sector / CLUSTER_SECTORS * CLUSTER_SECTORS;
        let cluster = first..first + CLUSTER_SECTORS;
        let near: Vec<&Event> = self
            .history
            .iter()
            .filter(|event| overlap(&event.sectors, &cluster))
            .collect();
        let _ = write!(
            what,
            "; seed {}; latest requests in its 64 KiB:",
            self.options.seed
        );
        for event in &near[near.len().saturating_sub(40)..] {
            let _ = write!(
                what,
                "\n  {} {:?} {:?}{} queue {}{}",
                if event.done { "done  " } else { "submit" },
                event.kind,
                event.sectors,
                if event.version == 0 {
                    String::new()
                } else {
                    format!(" v{}", event.version)
                },
                event.queue_index,
                if event.sectors.contains(&sector) {
                    "  <- the sector"
                } else {
                    ""
                },
            );
        }
        Error::Miscompare { sector, what }
    }
}

/// A limit of the config space, where 0 stands for "not said" (some servers offer SIZE_MAX so).
fn limit(value: u32) -> u64 {
    if value == 0 {
        u64::MAX
    } else {
        u64::from(value)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Cuts `length` bytes into descriptors at any byte.
fn random_parts(rng: &mut Rng, length: usize, seg_max: u32) -> Vec<usize> {
    let parts_max = if seg_max == 0 {
        1
    } else {
        DATA_DESCRIPTORS.min(index(seg_max.into()))
    };
    let parts = if rng.bool() {
        1
    } else {
        rng.usize(1..=parts_max)
    };
    let mut cuts: Vec<usize> = (1..parts)
        .map(|_| {
            if rng.bool() {
                rng.usize(1..length)
            } else {
                rng.usize(1..length) & !511
            }
        })
        .filter(|cut| *cut > 0)
        .collect();
    cuts.extend([0, length]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
}
