//! The simulated disk (tests only): everything a host may do to us, from one seed.
//!
//! [`SimDisk`] holds files with a *current* content (what reads see) and a *durable* one (what a power
//! cut leaves), [`SimStorage`] is [`Storage`] on it, [`Driver`] runs tasks and completes operations in
//! an order drawn from a seed. Same seed, same program: same run.
//!
//! What may happen, and does:
//! - Operations are held until the scheduler completes them, in any order. Until then a write is
//!   visible in part (by sectors); its memory is read when a sector lands, not when it is submitted.
//!   A read takes its bytes at any moment before its completion.
//! - A completed write is volatile. `sync_data` makes durable what had completed when the sync was
//!   submitted; of anything else a power cut keeps what it likes.
//! - After a power cut each sector holds its durable content or that of any write since, whichever
//!   way the mode and the seed choose, and the length of a file is chosen likewise.
//! - Operations fail on demand. A failed write leaves part of itself. A failed sync leaves part of
//!   what it should have made durable, and *the rest never becomes durable by a later sync*, although
//!   reads show it (Linux marks such pages clean).
//!
//! Invariants: `unflushed` lists, in the order of landing, every version of a sector since its durable
//! one; the last is the current one, unless a failed sync forgot them. All maps are ordered, so
//! that iterating them depends on the seed alone.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use fastrand::Rng;

use super::buffer::{AlignedBuf, BufOwner, SgList};
use super::{FileId, Storage};

const SECTOR: u64 = 512;
/// Operations that a panic message tells of.
const TRACE_LEN: usize = 60;
/// So many steps without an end are a livelock.
const STEPS_MAX: u64 = 20_000_000;

/// A sector's bytes; `None` reads as zeroes and takes no space.
type Content = Option<Arc<[u8; 512]>>;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// `read`, `read_buf`
    Read,
    /// `write`
    Write,
    /// `write_zeroes`
    Zeroes,
    /// `punch_hole`
    Punch,
    /// `sync_data`
    Sync,
    /// `set_len`
    SetLen,
}

/// One operation, for traces and for hooks of tests.
#[derive(Clone, Copy, Debug)]
pub struct OpInfo {
    /// Number of the operation, counted from 1 over all kinds.
    pub id: u64,
    /// What it does.
    pub kind: OpKind,
    /// On which file.
    pub file: FileId,
    /// Where; 0 for a sync.
    pub offset: u64,
    /// Bytes; for `SetLen` the new length.
    pub len: u64,
}

/// When the power goes. Counted from 1 over changing operations (everything but reads).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutPoint {
    /// Instead of submitting the n-th: it never happens.
    Before(u64),
    /// With the n-th submitted but not completed.
    During(u64),
    /// When the n-th has completed, before anybody hears of it.
    After(u64),
}

/// What a power cut leaves of what is not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutMode {
    /// Each sector (or each operation, as the seed has it) by itself.
    Random,
    /// Nothing.
    NothingUnflushed,
    /// Everything, also of operations in flight.
    AllUnflushed,
    /// Everything but one operation.
    AllButOneWrite,
}

/// Makes operations fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Only operations of this kind, which alone are counted then; `None`: all.
    pub kind: Option<OpKind>,
    /// The first to fail, counted from 1 from when the fault was set.
    pub from: u64,
    /// How many fail in a row; `u64::MAX` for all from there on.
    pub count: u64,
    /// The error.
    pub errno: i32,
}

/// How a file of the disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimFileOptions {
    /// A regular file; `false`: a block device, whose length is fixed.
    pub can_grow: bool,
    /// Growing beyond this length is ENOSPC.
    pub len_max: u64,
    /// `punch_hole` works.
    pub can_punch: bool,
}

impl Default for SimFileOptions {
    fn default() -> Self {
        SimFileOptions {
            can_grow: true,
            len_max: u64::MAX,
            can_punch: true,
        }
    }
}

#[derive(Clone)]
struct SimFile {
    options: SimFileOptions,
    current: BTreeMap<u64, Arc<[u8; 512]>>,
    durable: BTreeMap<u64, Arc<[u8; 512]>>,
    unflushed: BTreeMap<u64, Vec<(u64, Content)>>,
    len: u64,
    durable_len: u64,
    unflushed_lens: Vec<(u64, u64)>,
}

impl SimFile {
    fn set_sector(&mut self, op: u64, sector: u64, content: Content) {
        match &content {
            Some(bytes) => self.current.insert(sector, Arc::clone(bytes)),
            None => self.current.remove(&sector),
        };
        self.unflushed
            .entry(sector)
            .or_default()
            .push((op, content));
    }

    fn set_len(&mut self, op: u64, len: u64) {
        if len < self.len {
            let first = len / SECTOR;
            let keep = usize::try_from(len % SECTOR).unwrap();
            let beyond: Vec<u64> = self
                .current
                .range(first..)
                .map(|(&sector, _)| sector)
                .collect();
            for sector in beyond {
                let mut bytes = None;
                if sector == first && keep != 0 {
                    let mut old = *self.current[&sector];
                    old[keep..].fill(0);
                    bytes = Some(Arc::new(old));
                }
                self.set_sector(op, sector, bytes);
            }
        }
        if len != self.len {
            self.len = len;
            self.unflushed_lens.push((op, len));
        }
    }

    fn read(&self, offset: u64, sg: &SgList) {
        sg.fill_zero(0, sg.len());
        let end = (offset + sg.len()).min(self.len);
        let first = offset / SECTOR;
        for (&sector, bytes) in self.current.range(first..end.div_ceil(SECTOR).max(first)) {
            let (from, to) = overlap(sector, offset, end);
            if from < to {
                sg.copy_from(from - offset, &bytes[in_sector(sector, from, to)]);
            }
        }
    }

    /// Everything up to the last version that `covered` takes becomes durable.
    fn flush(&mut self, covered: impl Fn(u64) -> bool) {
        let durable = &mut self.durable;
        self.unflushed.retain(|&sector, versions| {
            if let Some(at) = versions.iter().rposition(|&(op, _)| covered(op)) {
                store(durable, sector, &versions[at].1);
                versions.drain(..=at);
            }
            !versions.is_empty()
        });
        if let Some(at) = self.unflushed_lens.iter().rposition(|&(op, _)| covered(op)) {
            self.durable_len = self.unflushed_lens[at].1;
            self.unflushed_lens.drain(..=at);
        }
    }

    /// A failed sync: some of it becomes durable, the rest is never written by a later one.
    fn lose(&mut self, rng: &mut Rng) {
        for (sector, versions) in std::mem::take(&mut self.unflushed) {
            if rng.bool() {
                store(
                    &mut self.durable,
                    sector,
                    &versions[rng.usize(..versions.len())].1,
                );
            }
        }
        if rng.bool()
            && let Some(&(_, len)) = self.unflushed_lens.last()
        {
            self.durable_len = len;
        }
        self.unflushed_lens.clear();
    }

    /// What is left after a cut: for each sector the version that `choose` picks, if any.
    fn after_cut(&self, mut choose: impl FnMut(&[u64]) -> Option<usize>) -> SimFile {
        let mut durable = self.durable.clone();
        for (&sector, versions) in &self.unflushed {
            let ops: Vec<u64> = versions.iter().map(|&(op, _)| op).collect();
            if let Some(at) = choose(&ops) {
                store(&mut durable, sector, &versions[at].1);
            }
        }
        let ops: Vec<u64> = self.unflushed_lens.iter().map(|&(op, _)| op).collect();
        let len = choose(&ops).map_or(self.durable_len, |at| self.unflushed_lens[at].1);
        durable.retain(|&sector, _| sector * SECTOR < len);
        if let Some(last) = durable.get_mut(&(len / SECTOR)) {
            let mut bytes = **last;
            bytes[usize::try_from(len % SECTOR).unwrap()..].fill(0);
            *last = Arc::new(bytes);
        }
        SimFile {
            options: self.options,
            current: durable.clone(),
            durable,
            unflushed: BTreeMap::new(),
            len,
            durable_len: len,
            unflushed_lens: Vec::new(),
        }
    }
}

fn store(map: &mut BTreeMap<u64, Arc<[u8; 512]>>, sector: u64, content: &Content) {
    match content {
        Some(bytes) => map.insert(sector, Arc::clone(bytes)),
        None => map.remove(&sector),
    };
}

/// The part of `offset..end` inside of a sector.
fn overlap(sector: u64, offset: u64, end: u64) -> (u64, u64) {
    (offset.max(sector * SECTOR), end.min((sector + 1) * SECTOR))
}

fn in_sector(sector: u64, from: u64, to: u64) -> std::ops::Range<usize> {
    let at = |offset: u64| usize::try_from(offset - sector * SECTOR).unwrap();
    at(from)..at(to)
}

/// An operation that has been submitted.
struct Op {
    info: OpInfo,
    /// Number among the changing operations; 0 for reads.
    change: u64,
    /// Memory of reads and writes; held until completion, whatever becomes of the future.
    sg: SgList,
    /// Sectors of a write that are visible already.
    landed: BTreeSet<u64>,
    /// A read has taken its bytes.
    taken: bool,
    /// A sync does not cover these: in flight when it was submitted.
    not_covered: BTreeSet<u64>,
    errno: Option<i32>,
    /// Set at completion.
    result: Option<io::Result<bool>>,
    waker: Option<Waker>,
    /// The future is gone: forget the operation when it is complete.
    abandoned: bool,
}

/// Which operations a test holds back.
type HoldFilter = Box<dyn Fn(&OpInfo) -> bool>;

struct State {
    rng: Rng,
    files: Vec<SimFile>,
    ops: BTreeMap<u64, Op>,
    submitted: u64,
    changes: u64,
    by_kind: [u64; 6],
    bytes_written: u64,
    faults: Vec<(Fault, u64)>,
    cut: Option<CutPoint>,
    off: bool,
    /// Complete at submission, without a driver.
    immediate: bool,
    /// Bytes of all files together that may be allocated.
    capacity: u64,
    hold: Option<HoldFilter>,
    trace: VecDeque<(OpInfo, &'static str)>,
}

/// A simulated disk with several files. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Rc<RefCell<State>>,
}

impl SimDisk {
    /// An empty disk. Operations are held for a [`Driver`].
    pub fn new(seed: u64) -> SimDisk {
        SimDisk::with_files(seed, Vec::new())
    }

    fn with_files(seed: u64, files: Vec<SimFile>) -> SimDisk {
        let state = State {
            rng: Rng::with_seed(seed),
            files,
            ops: BTreeMap::new(),
            submitted: 0,
            changes: 0,
            by_kind: [0; 6],
            bytes_written: 0,
            faults: Vec::new(),
            cut: None,
            off: false,
            immediate: false,
            capacity: u64::MAX,
            hold: None,
            trace: VecDeque::new(),
        };
        SimDisk {
            state: Rc::new(RefCell::new(state)),
        }
    }

    /// With `true`, operations complete at submission, so that `block_on` does; after a power cut
    /// they fail with ENODEV then.
    pub fn set_immediate(&self, immediate: bool) {
        self.state.borrow_mut().immediate = immediate;
    }

    /// Adds a file with this durable content.
    pub fn add_file(&self, bytes: &[u8], options: SimFileOptions) -> FileId {
        let mut state = self.state.borrow_mut();
        let mut durable = BTreeMap::new();
        for (sector, piece) in (0..).zip(bytes.chunks(512)) {
            if piece.iter().any(|&byte| byte != 0) {
                let mut content = [0; 512];
                content[..piece.len()].copy_from_slice(piece);
                durable.insert(sector, Arc::new(content));
            }
        }
        let len = bytes.len() as u64;
        state.files.push(SimFile {
            options,
            current: durable.clone(),
            durable,
            unflushed: BTreeMap::new(),
            len,
            durable_len: len,
            unflushed_lens: Vec::new(),
        });
        FileId(u16::try_from(state.files.len() - 1).unwrap())
    }

    /// A handle that implements [`Storage`].
    pub fn storage(&self) -> SimStorage {
        SimStorage { disk: self.clone() }
    }

    /// How many files there are.
    pub fn file_count(&self) -> u16 {
        u16::try_from(self.state.borrow().files.len()).unwrap()
    }

    /// What reads see of a file now.
    pub fn contents(&self, file: FileId) -> Vec<u8> {
        let state = self.state.borrow();
        let file = &state.files[usize::from(file.0)];
        let sg = SgList::from_buf(AlignedBuf::zeroed(usize::try_from(file.len).unwrap()));
        file.read(0, &sg);
        sg.to_vec()
    }

    /// Writes what reads see of a file to a real one, with holes, for other programs to look at.
    pub fn export(&self, file: FileId, path: &Path) -> io::Result<()> {
        let state = self.state.borrow();
        let file = &state.files[usize::from(file.0)];
        let out = std::fs::File::create(path)?;
        out.set_len(file.len)?;
        for (&sector, bytes) in &file.current {
            let (from, to) = overlap(sector, 0, file.len);
            if from < to {
                out.write_all_at(&bytes[in_sector(sector, from, to)], from)?;
            }
        }
        Ok(())
    }

    /// Changes a file behind everybody's back, durably: damage for a test.
    pub fn poke(&self, file: FileId, offset: u64, bytes: &[u8]) {
        let mut state = self.state.borrow_mut();
        let file = &mut state.files[usize::from(file.0)];
        let end = offset + bytes.len() as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let (from, to) = overlap(sector, offset, end);
            let (at, len) = (
                usize::try_from(from - offset).unwrap(),
                in_sector(sector, from, to),
            );
            for map in [&mut file.current, &mut file.durable] {
                let mut content = map.get(&sector).map_or([0; 512], |old| **old);
                content[len.clone()].copy_from_slice(&bytes[at..at + len.len()]);
                map.insert(sector, Arc::new(content));
            }
            file.unflushed.remove(&sector);
        }
        file.len = file.len.max(end);
        file.durable_len = file.durable_len.max(end);
    }

    /// Bytes of all files that may be allocated; more is ENOSPC.
    pub fn set_capacity(&self, bytes: u64) {
        self.state.borrow_mut().capacity = bytes;
    }

    /// Bytes of all files that are allocated now.
    pub fn allocated(&self) -> u64 {
        self.state.borrow().allocated()
    }

    /// Sets how a file behaves from now on.
    pub fn set_options(&self, file: FileId, options: SimFileOptions) {
        self.state.borrow_mut().files[usize::from(file.0)].options = options;
    }

    /// Adds a fault, counting from now on.
    pub fn inject(&self, fault: Fault) {
        self.state.borrow_mut().faults.push((fault, 0));
    }

    /// The n-th operation from now on (from 1) fails.
    pub fn fail_nth(&self, n: u64, errno: i32) {
        self.inject(Fault {
            kind: None,
            from: n,
            count: 1,
            errno,
        });
    }

    /// The n-th operation of a kind from now on (from 1) fails.
    pub fn fail_nth_of(&self, kind: OpKind, n: u64, errno: i32) {
        self.inject(Fault {
            kind: Some(kind),
            from: n,
            count: 1,
            errno,
        });
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.state.borrow_mut().faults.clear();
    }

    /// Sets when the power goes.
    pub fn cut_at(&self, point: CutPoint) {
        self.state.borrow_mut().cut = Some(point);
    }

    /// Switches the power off now.
    pub fn switch_off(&self) {
        self.state.borrow_mut().off = true;
    }

    /// True after a cut: nothing completes any more.
    pub fn is_off(&self) -> bool {
        self.state.borrow().off
    }

    /// Operations that `hold` names stay held until [`SimDisk::release`].
    pub fn hold(&self, hold: impl Fn(&OpInfo) -> bool + 'static) {
        self.state.borrow_mut().hold = Some(Box::new(hold));
    }

    /// Ends [`SimDisk::hold`].
    pub fn release(&self) {
        self.state.borrow_mut().hold = None;
    }

    /// Operations in flight, oldest first.
    pub fn in_flight(&self) -> Vec<OpInfo> {
        let state = self.state.borrow();
        state
            .ops
            .values()
            .filter(|op| op.result.is_none())
            .map(|op| op.info)
            .collect()
    }

    /// Completes one operation by hand, also one that is being held.
    pub fn complete(&self, id: u64) {
        let waker = self.state.borrow_mut().complete(id);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Operations submitted so far.
    pub fn ops(&self) -> u64 {
        self.state.borrow().submitted
    }

    /// Changing operations submitted so far: the range of [`CutPoint`].
    pub fn changes(&self) -> u64 {
        self.state.borrow().changes
    }

    /// Operations of a kind submitted so far.
    pub fn count(&self, kind: OpKind) -> u64 {
        self.state.borrow().by_kind[kind as usize]
    }

    /// `fdatasync`s submitted so far.
    pub fn syncs(&self) -> u64 {
        self.count(OpKind::Sync)
    }

    /// Writes submitted so far, zeroes not included.
    pub fn writes(&self) -> u64 {
        self.count(OpKind::Write)
    }

    /// Reads submitted so far.
    pub fn reads(&self) -> u64 {
        self.count(OpKind::Read)
    }

    /// Bytes in the writes submitted so far.
    pub fn bytes_written(&self) -> u64 {
        self.state.borrow().bytes_written
    }

    /// The latest operations, one per line.
    pub fn trace(&self) -> String {
        let mut text = String::new();
        for (info, event) in &self.state.borrow().trace {
            let OpInfo {
                id,
                kind,
                file,
                offset,
                len,
            } = info;
            let _ = writeln!(
                text,
                "{event:>9} #{id} {kind:?} file {} {offset:#x}+{len:#x}",
                file.0
            );
        }
        text
    }

    /// The disk as the next boot finds it, everything there durable. This one stays as it is, so
    /// that one run can be cut in many ways.
    pub fn power_cut(&self, rng: &mut Rng, mode: CutMode) -> SimDisk {
        let state = self.state.borrow();
        let mut files = state.files.clone();
        // Parts of what is in flight may have reached the disk, in any order.
        let mut flying: Vec<&Op> = state
            .ops
            .values()
            .filter(|op| op.result.is_none())
            .collect();
        rng.shuffle(&mut flying);
        for op in flying {
            let file = &mut files[usize::from(op.info.file.0)];
            for sector in op.missing(file) {
                op.land_sector(file, sector);
            }
            if op.info.kind == OpKind::SetLen {
                file.set_len(op.info.id, op.info.len);
            }
        }
        let mut unflushed = BTreeSet::new();
        for file in &files {
            unflushed.extend(file.unflushed.values().flatten().map(|&(op, _)| op));
            unflushed.extend(file.unflushed_lens.iter().map(|&(op, _)| op));
        }
        let chance = [0.05, 0.5, 0.95][rng.usize(..3)];
        // `None`: each sector chooses for itself.
        let kept: Option<BTreeSet<u64>> = match mode {
            CutMode::NothingUnflushed => Some(BTreeSet::new()),
            CutMode::AllUnflushed => Some(unflushed),
            CutMode::AllButOneWrite => {
                let lost = rng.choice(unflushed.iter().copied());
                Some(
                    unflushed
                        .into_iter()
                        .filter(|&op| Some(op) != lost)
                        .collect(),
                )
            }
            CutMode::Random if rng.bool() => Some(
                unflushed
                    .into_iter()
                    .filter(|_| rng.f64() < chance)
                    .collect(),
            ),
            CutMode::Random => None,
        };
        let mut choose = |ops: &[u64]| match &kept {
            Some(kept) => ops.iter().rposition(|op| kept.contains(op)),
            None if ops.is_empty() || rng.f64() >= chance => None,
            None if rng.bool() => Some(ops.len() - 1),
            None => Some(rng.usize(..ops.len())),
        };
        let files = files
            .iter()
            .map(|file| file.after_cut(&mut choose))
            .collect();
        let disk = SimDisk::with_files(rng.u64(..), files);
        disk.state.borrow_mut().capacity = state.capacity;
        disk.state.borrow_mut().immediate = state.immediate;
        disk
    }

    /// True if the driver could do something with an operation in flight.
    fn can_step(&self) -> bool {
        !self.state.borrow().free_ops().is_empty()
    }

    /// Lets one operation in flight progress or complete.
    fn step(&self) {
        let mut state = self.state.borrow_mut();
        let free = state.free_ops();
        let Some(id) = state.rng.choice(free) else {
            return;
        };
        if state.rng.u8(..4) == 0 {
            state.progress(id);
            return;
        }
        let waker = state.complete(id);
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn submit(&self, kind: OpKind, file: FileId, range: (u64, u64), sg: SgList) -> SimOp {
        let (offset, len) = range;
        assert!(
            offset.checked_add(len).is_some(),
            "{kind:?} at {offset:#x} of {len:#x} bytes"
        );
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        assert!(
            usize::from(file.0) < state.files.len(),
            "no file {} on the disk",
            file.0
        );
        let id = state.submitted + 1;
        let change = if kind == OpKind::Read {
            0
        } else {
            state.changes + 1
        };
        if state.off || (change != 0 && state.cut == Some(CutPoint::Before(change))) {
            state.off = true;
            return SimOp {
                disk: self.clone(),
                id: 0,
            };
        }
        state.submitted = id;
        state.changes = state.changes.max(change);
        state.by_kind[kind as usize] += 1;
        state.bytes_written += if kind == OpKind::Write { len } else { 0 };
        let mut errno = None;
        for (fault, seen) in &mut state.faults {
            if fault.kind.is_none_or(|only| only == kind) {
                *seen += 1;
                if *seen >= fault.from && *seen - fault.from < fault.count {
                    errno = Some(fault.errno);
                }
            }
        }
        let not_covered = match kind {
            OpKind::Sync => {
                let flying = state.ops.values().filter(|op| op.result.is_none());
                flying.map(|op| op.info.id).collect()
            }
            _ => BTreeSet::new(),
        };
        let info = OpInfo {
            id,
            kind,
            file,
            offset,
            len,
        };
        let op = Op {
            info,
            change,
            sg,
            landed: BTreeSet::new(),
            taken: false,
            not_covered,
            errno,
            result: None,
            waker: None,
            abandoned: false,
        };
        state.ops.insert(id, op);
        state.note(info, "submit");
        if change != 0 && state.cut == Some(CutPoint::During(change)) {
            state.off = true;
        } else if state.immediate {
            state.complete(id);
        }
        SimOp {
            disk: self.clone(),
            id,
        }
    }
}

impl Op {
    /// Sectors of a write, zeroes or punch that are still to land.
    fn missing(&self, file: &SimFile) -> Vec<u64> {
        let OpInfo {
            kind, offset, len, ..
        } = self.info;
        let end = offset + len;
        let sectors = offset / SECTOR..end.div_ceil(SECTOR).max(offset / SECTOR);
        let all: Vec<u64> = match kind {
            OpKind::Write => sectors.collect(),
            // Absent sectors are zero already.
            OpKind::Zeroes | OpKind::Punch => file
                .current
                .range(sectors)
                .map(|(&sector, _)| sector)
                .collect(),
            OpKind::Read | OpKind::Sync | OpKind::SetLen => Vec::new(),
        };
        all.into_iter()
            .filter(|sector| !self.landed.contains(sector))
            .collect()
    }

    fn land_sector(&self, file: &mut SimFile, sector: u64) {
        let OpInfo {
            id,
            kind,
            offset,
            len,
            ..
        } = self.info;
        let (from, to) = overlap(sector, offset, offset + len);
        let within = in_sector(sector, from, to);
        let mut bytes = file.current.get(&sector).map_or([0; 512], |old| **old);
        if kind == OpKind::Write {
            self.sg.copy_to(from - offset, &mut bytes[within]);
            if to > file.len {
                file.set_len(id, to);
            }
            file.set_sector(id, sector, Some(Arc::new(bytes)));
        } else if within.len() == 512 {
            file.set_sector(id, sector, None);
        } else {
            bytes[within].fill(0);
            file.set_sector(id, sector, Some(Arc::new(bytes)));
        }
    }
}

impl State {
    fn allocated(&self) -> u64 {
        self.files
            .iter()
            .map(|file| file.current.len() as u64 * SECTOR)
            .sum()
    }

    fn note(&mut self, info: OpInfo, event: &'static str) {
        if self.trace.len() == TRACE_LEN {
            self.trace.pop_front();
        }
        self.trace.push_back((info, event));
    }

    fn free_ops(&self) -> Vec<u64> {
        if self.off {
            return Vec::new();
        }
        let held = |op: &Op| self.hold.as_ref().is_some_and(|hold| hold(&op.info));
        let free = self
            .ops
            .values()
            .filter(|op| op.result.is_none() && !held(op));
        free.map(|op| op.info.id).collect()
    }

    /// Something of an operation happens, but not its completion.
    fn progress(&mut self, id: u64) {
        let Some(op) = self.ops.get_mut(&id) else {
            return;
        };
        let file = &mut self.files[usize::from(op.info.file.0)];
        match op.info.kind {
            OpKind::Read if !op.taken => {
                file.read(op.info.offset, &op.sg);
                op.taken = true;
            }
            OpKind::Write | OpKind::Zeroes | OpKind::Punch if no_room(op, file).is_none() => {
                for sector in op.missing(file) {
                    if self.rng.bool() {
                        op.land_sector(file, sector);
                        op.landed.insert(sector);
                    }
                }
            }
            _ => {}
        }
    }

    fn complete(&mut self, id: u64) -> Option<Waker> {
        let allocated = self.allocated();
        let op = self.ops.get_mut(&id).filter(|op| op.result.is_none());
        let Some(op) = op else {
            panic!("operation #{id} is not in flight")
        };
        let info = op.info;
        let file = &mut self.files[usize::from(info.file.0)];
        let missing = op.missing(file);
        let mut errno = op.errno.or_else(|| no_room(op, file));
        if info.kind == OpKind::Write && errno.is_none() {
            let fresh = missing
                .iter()
                .filter(|sector| !file.current.contains_key(sector))
                .count();
            if fresh != 0 && allocated + fresh as u64 * SECTOR > self.capacity {
                errno = Some(libc::ENOSPC);
            }
        }
        let mut done = true;
        match info.kind {
            OpKind::Read if errno.is_some() => {
                // What a failed read leaves in memory is anything.
                let garbage = vec![0xdb; usize::try_from(info.len / 2).unwrap()];
                op.sg.copy_from(0, &garbage);
            }
            OpKind::Read if !op.taken => file.read(info.offset, &op.sg),
            OpKind::Read => {}
            OpKind::Punch if !file.options.can_punch => done = false,
            // Nothing may land where there is no room; of another failed one something does.
            OpKind::Write | OpKind::Zeroes | OpKind::Punch if errno == Some(libc::ENOSPC) => {}
            OpKind::Write | OpKind::Zeroes | OpKind::Punch => {
                for sector in missing {
                    if errno.is_none() || self.rng.bool() {
                        op.land_sector(file, sector);
                    }
                }
            }
            OpKind::Sync if errno.is_some() => file.lose(&mut self.rng),
            OpKind::Sync => file.flush(|op_id| op_id < id && !op.not_covered.contains(&op_id)),
            OpKind::SetLen if errno.is_some() => {}
            OpKind::SetLen => file.set_len(id, info.len),
        }
        op.result = Some(match errno {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(done),
        });
        op.sg = SgList::empty();
        let waker = op.waker.take();
        let (change, abandoned) = (op.change, op.abandoned);
        if abandoned {
            self.ops.remove(&id);
        }
        self.note(info, if errno.is_some() { "fail" } else { "complete" });
        if change != 0 && self.cut == Some(CutPoint::After(change)) {
            self.off = true;
        }
        if self.off { None } else { waker }
    }
}

/// ENOSPC for a change that reaches beyond what the file may be.
fn no_room(op: &Op, file: &SimFile) -> Option<i32> {
    let OpInfo {
        kind, offset, len, ..
    } = op.info;
    let end = match kind {
        OpKind::Write => offset + len,
        OpKind::SetLen => len,
        _ => return None,
    };
    let limit = if file.options.can_grow {
        file.options.len_max
    } else {
        file.len
    };
    (end > limit && end > file.len).then_some(libc::ENOSPC)
}

/// A submitted operation; completes when the driver completes it, never after a power cut.
struct SimOp {
    disk: SimDisk,
    /// 0: the power was off at submission.
    id: u64,
}

impl Future for SimOp {
    type Output = io::Result<bool>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.disk.state.borrow_mut();
        if state.off {
            if state.immediate {
                return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ENODEV)));
            }
            return Poll::Pending;
        }
        let Some(op) = state.ops.get_mut(&self.id) else {
            panic!("polled after completion")
        };
        if op.result.is_none() {
            op.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let op = state.ops.remove(&self.id);
        Poll::Ready(op.and_then(|op| op.result).unwrap_or(Ok(true)))
    }
}

impl Drop for SimOp {
    fn drop(&mut self) {
        let mut state = self.disk.state.borrow_mut();
        if let Some(op) = state.ops.get_mut(&self.id) {
            op.abandoned = true;
            op.waker = None;
            if op.result.is_some() {
                state.ops.remove(&self.id);
            }
        }
    }
}

/// [`Storage`] on a [`SimDisk`]. Clones are handles of the same disk, as each worker has one.
#[derive(Clone)]
pub struct SimStorage {
    disk: SimDisk,
}

impl SimStorage {
    /// The disk behind it.
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }
}

impl Storage for SimStorage {
    async fn pause(&self, _: std::time::Duration) {
        yield_now().await;
    }

    async fn read(&self, file: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        assert!(sg.is_writable(), "read into the shared zero bytes");
        let range = (offset, sg.len());
        self.disk
            .submit(OpKind::Read, file, range, sg)
            .await
            .map(drop)
    }

    async fn read_buf(
        &self,
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
    ) -> (io::Result<()>, AlignedBuf) {
        let len = buf.len();
        let owner = BufOwner::new(buf);
        let result = self.read(file, offset, owner.sg(len)).await;
        // Only after a power cut in immediate mode does the operation still hold the memory.
        let buf = owner.into_buf().unwrap_or_else(|| AlignedBuf::zeroed(len));
        (result, buf)
    }

    async fn write(&self, file: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        let range = (offset, sg.len());
        self.disk
            .submit(OpKind::Write, file, range, sg)
            .await
            .map(drop)
    }

    async fn write_zeroes(
        &self,
        file: FileId,
        offset: u64,
        len: u64,
        _unmap: bool,
    ) -> io::Result<()> {
        self.disk
            .submit(OpKind::Zeroes, file, (offset, len), SgList::empty())
            .await
            .map(drop)
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<bool> {
        self.disk
            .submit(OpKind::Punch, file, (offset, len), SgList::empty())
            .await
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        self.disk
            .submit(OpKind::Sync, file, (0, 0), SgList::empty())
            .await
            .map(drop)
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        if !self.can_grow(file) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.disk
            .submit(OpKind::SetLen, file, (0, len), SgList::empty())
            .await
            .map(drop)
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.disk.state.borrow().files[usize::from(file.0)].len)
    }

    fn can_grow(&self, file: FileId) -> bool {
        self.disk.state.borrow().files[usize::from(file.0)]
            .options
            .can_grow
    }
}

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All tasks that count are done (or the condition asked for came true).
    Done,
    /// The power is off.
    PowerCut,
    /// Nothing can progress: everything waits for held operations, or for ever.
    Stuck,
}

/// Tasks woken since the scheduler last looked; shared with wakers, which any thread may call.
type WokenQueue = Arc<Mutex<BTreeSet<usize>>>;

struct TaskWaker {
    index: usize,
    woken: WokenQueue,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.index);
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Waker,
    background: bool,
}

/// Result of a spawned task.
pub struct JoinHandle<T> {
    slot: Rc<RefCell<Option<T>>>,
    done: Rc<Cell<bool>>,
}

impl<T> JoinHandle<T> {
    /// True once the task is done.
    pub fn is_done(&self) -> bool {
        self.done.get()
    }

    /// The task's result, once.
    pub fn take(&self) -> Option<T> {
        self.slot.borrow_mut().take()
    }
}

/// A seeded single-threaded executor of tasks and of one disk's operations: at each step one random
/// runnable task is polled, or one random operation in flight progresses.
pub struct Driver {
    seed: u64,
    rng: Rng,
    disk: SimDisk,
    tasks: Vec<Option<Task>>,
    runnable: BTreeSet<usize>,
    woken: WokenQueue,
    steps: u64,
}

impl Driver {
    /// A driver of `disk`; the seed is named in every panic message.
    pub fn new(seed: u64, disk: &SimDisk) -> Driver {
        Driver {
            seed,
            rng: Rng::with_seed(seed ^ 0x5eed_d21e),
            disk: disk.clone(),
            tasks: Vec::new(),
            runnable: BTreeSet::new(),
            woken: Arc::default(),
            steps: 0,
        }
    }

    /// Adds a task that `run` waits for.
    pub fn spawn<F: Future + 'static>(&mut self, future: F) -> JoinHandle<F::Output> {
        self.add(future, false)
    }

    /// Adds a task that `run` does not wait for.
    pub fn spawn_background<F: Future + 'static>(&mut self, future: F) -> JoinHandle<F::Output> {
        self.add(future, true)
    }

    fn add<F: Future + 'static>(&mut self, future: F, background: bool) -> JoinHandle<F::Output> {
        let slot = Rc::new(RefCell::new(None));
        let done = Rc::new(Cell::new(false));
        let (result, flag) = (Rc::clone(&slot), Rc::clone(&done));
        let future = Box::pin(async move {
            let output = future.await;
            *result.borrow_mut() = Some(output);
            flag.set(true);
        });
        let index = self.tasks.len();
        let waker = Waker::from(Arc::new(TaskWaker {
            index,
            woken: Arc::clone(&self.woken),
        }));
        self.tasks.push(Some(Task {
            future,
            waker,
            background,
        }));
        self.runnable.insert(index);
        JoinHandle { slot, done }
    }

    /// Runs until every task is done or the power is off.
    ///
    /// # Panics
    /// With the seed and the latest operations, if nothing can progress.
    pub fn run(&mut self) -> Outcome {
        let outcome = self.run_until_stuck();
        assert!(outcome != Outcome::Stuck, "deadlock: {}", self.story());
        outcome
    }

    /// As `run`, but gives `Stuck` back.
    pub fn run_until_stuck(&mut self) -> Outcome {
        self.run_while(|driver| driver.tasks.iter().flatten().any(|task| !task.background))
    }

    /// Runs until `condition`, or as `run_until_stuck`, whichever comes first.
    pub fn run_until(&mut self, condition: impl Fn() -> bool) -> Outcome {
        self.run_while(|_| !condition())
    }

    /// Runs one future to its end among the other tasks; `None` after a power cut.
    ///
    /// # Panics
    /// As `run`.
    pub fn block_on<F: Future + 'static>(&mut self, future: F) -> Option<F::Output> {
        let handle = self.add(future, true);
        let outcome = self.run_while(|_| !handle.is_done());
        assert!(outcome != Outcome::Stuck, "deadlock: {}", self.story());
        handle.take()
    }

    /// Completes all that is in flight, in random order, running tasks as they wake.
    pub fn drain(&mut self) -> Outcome {
        let disk = self.disk.clone();
        self.run_while(|driver| disk.can_step() || !driver.runnable.is_empty())
    }

    fn run_while(&mut self, go_on: impl Fn(&Driver) -> bool) -> Outcome {
        loop {
            self.runnable
                .append(&mut self.woken.lock().unwrap_or_else(PoisonError::into_inner));
            let tasks = &self.tasks;
            self.runnable.retain(|&index| tasks[index].is_some());
            if self.disk.is_off() {
                return Outcome::PowerCut;
            }
            if !go_on(self) {
                return Outcome::Done;
            }
            let can_step = self.disk.can_step();
            if self.runnable.is_empty() && !can_step {
                return Outcome::Stuck;
            }
            self.steps += 1;
            assert!(self.steps < STEPS_MAX, "livelock: {}", self.story());
            if can_step && (self.runnable.is_empty() || self.rng.bool()) {
                self.disk.step();
            } else {
                self.poll_one();
            }
        }
    }

    fn poll_one(&mut self) {
        let Some(index) = self.rng.choice(self.runnable.iter().copied()) else {
            return;
        };
        self.runnable.remove(&index);
        let Some(task) = self.tasks[index].as_mut() else {
            return;
        };
        let waker = task.waker.clone();
        if task
            .future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            self.tasks[index] = None;
        }
    }

    fn story(&self) -> String {
        let waiting: Vec<usize> = (0..self.tasks.len())
            .filter(|&index| self.tasks[index].is_some())
            .collect();
        format!(
            "seed {}, {} steps, tasks {waiting:?} wait, {} operations in flight\n{}",
            self.seed,
            self.steps,
            self.disk.in_flight().len(),
            self.disk.trace()
        )
    }
}

/// Gives other tasks a turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::block_on;

    const FILE: FileId = FileId(0);

    fn disk(seed: u64, len: usize) -> SimDisk {
        let disk = SimDisk::new(seed);
        disk.add_file(&vec![b'o'; len], SimFileOptions::default());
        disk
    }

    fn immediate(len: usize) -> SimDisk {
        let disk = disk(1, len);
        disk.set_immediate(true);
        disk
    }

    fn bytes(byte: u8, len: usize) -> SgList {
        SgList::from_buf(AlignedBuf::from_slice(&vec![byte; len]))
    }

    fn write(disk: &SimDisk, offset: u64, byte: u8, len: usize) {
        block_on(disk.storage().write(FILE, offset, bytes(byte, len))).unwrap();
    }

    fn sync(disk: &SimDisk) -> io::Result<()> {
        block_on(disk.storage().sync_data(FILE))
    }

    /// One letter per sector, of the file as it is after a cut.
    fn left(disk: &SimDisk, seed: u64, mode: CutMode) -> String {
        let after = disk.power_cut(&mut Rng::with_seed(seed), mode);
        let contents = after.contents(FILE);
        contents
            .chunks(512)
            .map(|sector| char::from(sector[0]))
            .collect()
    }

    #[test]
    fn any_alignment_agrees_with_a_vec() {
        for seed in 0..10 {
            let model = super::super::host::tests::pattern(70_144, seed);
            let disk = SimDisk::new(seed);
            disk.add_file(&model, SimFileOptions::default());
            let mut driver = Driver::new(seed, &disk);
            let storage = disk.storage();
            driver.spawn(async move {
                super::super::host::tests::agrees_with_a_vec(&storage, model, seed).await;
            });
            assert_eq!(driver.run(), Outcome::Done);
        }
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let disk = immediate(1536);
        write(&disk, 0, b'f', 512);
        sync(&disk).unwrap();
        write(&disk, 512, b'x', 1024);
        write(&disk, 512, b'y', 512);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "foo");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "fyx");
        let random: BTreeSet<String> = (0..200)
            .map(|seed| left(&disk, seed, CutMode::Random))
            .collect();
        let all = ["foo", "fox", "fxo", "fxx", "fyo", "fyx"].map(String::from);
        assert_eq!(random, BTreeSet::from(all));
        let one_lost: BTreeSet<String> = (0..50)
            .map(|seed| left(&disk, seed, CutMode::AllButOneWrite))
            .collect();
        assert_eq!(one_lost, BTreeSet::from(["fyo", "fxx"].map(String::from)));
    }

    #[test]
    fn a_sync_covers_only_what_was_complete_when_it_was_submitted() {
        let disk = disk(1, 512);
        let mut driver = Driver::new(1, &disk);
        let (one, two) = (disk.storage(), disk.storage());
        disk.hold(|_| true);
        driver.spawn(async move { one.write(FILE, 0, bytes(b'x', 512)).await.unwrap() });
        assert_eq!(driver.run_until_stuck(), Outcome::Stuck);
        driver.spawn(async move { two.sync_data(FILE).await.unwrap() });
        assert_eq!(driver.run_until_stuck(), Outcome::Stuck);
        disk.complete(1);
        disk.complete(2);
        assert_eq!(driver.run(), Outcome::Done);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "x");
        driver.block_on({
            let storage = disk.storage();
            disk.release();
            async move { storage.sync_data(FILE).await }
        });
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "x");
    }

    #[test]
    fn a_write_in_flight_may_survive_a_cut_in_part() {
        let disk = disk(3, 1024);
        let mut driver = Driver::new(3, &disk);
        let storage = disk.storage();
        disk.cut_at(CutPoint::During(1));
        driver.spawn(async move { storage.write(FILE, 0, bytes(b'x', 1024)).await });
        assert_eq!(driver.run(), Outcome::PowerCut);
        let found: BTreeSet<String> = (0..100)
            .map(|seed| left(&disk, seed, CutMode::Random))
            .collect();
        assert_eq!(
            found,
            BTreeSet::from(["oo", "ox", "xo", "xx"].map(String::from))
        );
    }

    #[test]
    fn reads_race_with_writes_sector_by_sector() {
        let mut found = BTreeSet::new();
        for seed in 0..200 {
            let disk = disk(seed, 1024);
            let mut driver = Driver::new(seed, &disk);
            let (writer, reader) = (disk.storage(), disk.storage());
            driver.spawn(async move { writer.write(FILE, 0, bytes(b'x', 1024)).await.unwrap() });
            let read = driver.spawn(async move {
                let buf = AlignedBuf::zeroed(1024);
                reader.read_buf(FILE, 0, buf).await.1
            });
            assert_eq!(driver.run(), Outcome::Done);
            let buf = read.take().unwrap();
            found.insert([buf[0], buf[512]]);
            assert_eq!(disk.contents(FILE), vec![b'x'; 1024]);
        }
        assert_eq!(found, BTreeSet::from([*b"oo", *b"ox", *b"xo", *b"xx"]));
    }

    #[test]
    fn the_length_is_volatile_too() {
        let disk = immediate(512);
        let storage = disk.storage();
        block_on(storage.set_len(FILE, 1536)).unwrap();
        write(&disk, 1536, b'x', 512);
        assert_eq!(storage.len(FILE).unwrap(), 2048);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "o\0\0x");
        sync(&disk).unwrap();
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o\0\0x");
        block_on(storage.set_len(FILE, 100)).unwrap();
        block_on(storage.set_len(FILE, 600)).unwrap();
        let contents = disk.contents(FILE);
        assert!(contents[..100].iter().all(|&byte| byte == b'o'));
        assert!(contents[100..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_cut_comes_where_it_was_set() {
        for (point, expected) in [
            (CutPoint::Before(2), "xo"),
            (CutPoint::After(1), "xo"),
            (CutPoint::During(2), "xy"),
            (CutPoint::After(2), "xy"),
        ] {
            let disk = disk(1, 1024);
            let mut driver = Driver::new(1, &disk);
            let storage = disk.storage();
            disk.cut_at(point);
            driver.spawn(async move {
                storage.write(FILE, 0, bytes(b'x', 512)).await.unwrap();
                storage.read(FILE, 0, bytes(0, 512)).await.unwrap();
                storage.write(FILE, 512, bytes(b'y', 512)).await.unwrap();
            });
            assert_eq!(driver.run(), Outcome::PowerCut, "{point:?}");
            assert_eq!(left(&disk, 1, CutMode::AllUnflushed), expected, "{point:?}");
        }
    }

    #[test]
    fn the_nth_operation_fails() {
        let disk = immediate(4096);
        disk.fail_nth_of(OpKind::Write, 2, libc::EIO);
        write(&disk, 0, b'x', 512);
        let storage = disk.storage();
        let error = block_on(storage.write(FILE, 512, bytes(b'x', 3584))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        write(&disk, 512, b'x', 512);
        disk.inject(Fault {
            kind: None,
            from: 2,
            count: u64::MAX,
            errno: libc::ENOSPC,
        });
        sync(&disk).unwrap();
        assert_eq!(sync(&disk).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert!(block_on(storage.read(FILE, 0, bytes(0, 512))).is_err());
        disk.clear_faults();
        sync(&disk).unwrap();
        assert_eq!(
            (disk.writes(), disk.syncs(), disk.reads(), disk.ops()),
            (3, 3, 1, 7)
        );
        assert_eq!(disk.changes(), 6);
    }

    #[test]
    fn what_a_failed_sync_lost_no_later_sync_brings_back() {
        let mut found = BTreeSet::new();
        for seed in 0..50 {
            let disk = disk(seed, 1024);
            disk.set_immediate(true);
            write(&disk, 0, b'x', 1024);
            disk.fail_nth_of(OpKind::Sync, 1, libc::EIO);
            sync(&disk).unwrap_err();
            sync(&disk).unwrap();
            assert_eq!(disk.contents(FILE), vec![b'x'; 1024]);
            found.insert(left(&disk, seed, CutMode::AllUnflushed));
        }
        assert_eq!(
            found,
            BTreeSet::from(["oo", "ox", "xo", "xx"].map(String::from))
        );
    }

    #[test]
    fn no_room_is_enospc() {
        let disk = immediate(1024);
        let storage = disk.storage();
        let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        disk.set_capacity(1536);
        block_on(storage.set_len(FILE, 4096)).unwrap();
        write(&disk, 2048, b'x', 512);
        let more = block_on(storage.write(FILE, 3072, bytes(b'x', 512)));
        assert_eq!(errno(more), Some(libc::ENOSPC));
        write(&disk, 2048, b'y', 512);
        assert!(block_on(storage.punch_hole(FILE, 0, 512)).unwrap());
        write(&disk, 3072, b'x', 512);
        assert_eq!(disk.allocated(), 1536);
        let options = SimFileOptions {
            can_grow: false,
            can_punch: false,
            ..Default::default()
        };
        disk.set_options(FILE, options);
        let past = block_on(storage.write(FILE, 4096, bytes(b'x', 512)));
        assert_eq!(errno(past), Some(libc::ENOSPC));
        assert!(block_on(storage.set_len(FILE, 8192)).is_err());
        assert!(!block_on(storage.punch_hole(FILE, 2048, 512)).unwrap());
        assert_eq!(disk.contents(FILE)[2048], b'y');
    }

    #[test]
    fn one_seed_gives_one_run() {
        let run = |seed: u64| {
            let disk = disk(seed, 8192);
            let mut driver = Driver::new(seed, &disk);
            for task in 0..4_u8 {
                let storage = disk.storage();
                driver.spawn(async move {
                    for round in 0..5 {
                        let byte = b'a' + task * 5 + round;
                        storage.write(FILE, 100, bytes(byte, 3000)).await.unwrap();
                        yield_now().await;
                        storage.sync_data(FILE).await.unwrap();
                    }
                });
            }
            assert_eq!(driver.run(), Outcome::Done);
            let after = disk.power_cut(&mut Rng::with_seed(seed), CutMode::Random);
            (disk.contents(FILE), after.contents(FILE), disk.trace())
        };
        assert!(run(7) == run(7));
        assert!(run(7) != run(8));
    }

    #[test]
    fn a_dropped_future_keeps_its_memory_until_the_operation_is_over() {
        let disk = disk(1, 512);
        let owner = Rc::new(());
        let mut sg = bytes(b'x', 512);
        sg.keep(Rc::<()>::clone(&owner));
        {
            let storage = disk.storage();
            let mut future = std::pin::pin!(storage.write(FILE, 0, sg));
            let mut context = Context::from_waker(Waker::noop());
            assert!(future.as_mut().poll(&mut context).is_pending());
        }
        assert_eq!(Rc::strong_count(&owner), 2);
        assert_eq!(Driver::new(1, &disk).drain(), Outcome::Done);
        assert_eq!(Rc::strong_count(&owner), 1);
        assert_eq!(disk.contents(FILE), vec![b'x'; 512]);
    }

    #[test]
    #[should_panic(expected = "deadlock: seed 5")]
    fn a_deadlock_panics_with_the_seed() {
        let disk = disk(5, 512);
        let mut driver = Driver::new(5, &disk);
        driver.spawn(std::future::pending::<()>());
        driver.run();
    }
}
