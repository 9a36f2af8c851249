//! What the disk is at one moment: its files, the operations in flight, and what is to go wrong.
//!
//! Nobody is woken here: a waker goes to the caller, who has let go of the state by then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::task::Waker;

use fastrand::Rng;

use super::cut::CutPoint;
use super::fault::Faults;
use super::file::{SECTOR, SimFile};
use super::operation::{Op, OpInfo, OpKind, no_room};
use crate::storage::{FileId, SgList};

/// Operations that a panic message tells of.
const TRACE_LEN: usize = 60;

/// Which operations a test holds back.
pub(super) type HoldFilter = Box<dyn Fn(&OpInfo) -> bool>;

pub(super) struct State {
    rng: Rng,
    pub(super) files: Vec<SimFile>,
    pub(super) ops: BTreeMap<u64, Op>,
    pub(super) submitted: u64,
    pub(super) changes: u64,
    pub(super) by_kind: [u64; 6],
    pub(super) bytes_written: u64,
    pub(super) faults: Faults,
    pub(super) cut: Option<CutPoint>,
    pub(super) off: bool,
    /// Complete at submission, without a driver.
    pub(super) immediate: bool,
    /// Bytes of all files together that may be allocated.
    pub(super) capacity: u64,
    pub(super) hold: Option<HoldFilter>,
    pub(super) trace: VecDeque<(OpInfo, &'static str)>,
}

impl State {
    /// A disk that has done nothing yet.
    pub(super) fn new(seed: u64, files: Vec<SimFile>) -> State {
        State {
            rng: Rng::with_seed(seed),
            files,
            ops: BTreeMap::new(),
            submitted: 0,
            changes: 0,
            by_kind: [0; 6],
            bytes_written: 0,
            faults: Faults::default(),
            cut: None,
            off: false,
            immediate: false,
            capacity: u64::MAX,
            hold: None,
            trace: VecDeque::new(),
        }
    }

    pub(super) fn allocated(&self) -> u64 {
        self.files.iter().map(SimFile::allocated).sum()
    }

    /// The operations in flight, oldest first.
    pub(super) fn in_flight(&self) -> impl Iterator<Item = &Op> {
        self.ops.values().filter(|op| op.is_in_flight())
    }

    /// Takes an operation in; its number, or 0 if the power is off instead.
    pub(super) fn submit(
        &mut self,
        kind: OpKind,
        file: FileId,
        range: (u64, u64),
        sg: SgList,
    ) -> u64 {
        let (offset, len) = range;
        assert!(
            offset.checked_add(len).is_some(),
            "{kind:?} at {offset:#x} of {len:#x} bytes"
        );
        assert!(
            usize::from(file.0) < self.files.len(),
            "no file {} on the disk",
            file.0
        );
        let id = self.submitted + 1;
        let change = if kind == OpKind::Read {
            0
        } else {
            self.changes + 1
        };
        if self.off || (change != 0 && self.cut == Some(CutPoint::Before(change))) {
            self.off = true;
            return 0;
        }
        self.submitted = id;
        self.changes = self.changes.max(change);
        self.by_kind[kind as usize] += 1;
        self.bytes_written += if kind == OpKind::Write { len } else { 0 };
        let errno = self.faults.count(kind);
        let not_covered = match kind {
            OpKind::Sync => self.in_flight().map(|op| op.info.id).collect(),
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
        self.ops.insert(id, op);
        self.note(info, "submit");
        if change != 0 && self.cut == Some(CutPoint::During(change)) {
            self.off = true;
        } else if self.immediate {
            self.complete(id);
        }
        id
    }

    /// Lets one operation in flight progress or complete.
    pub(super) fn step(&mut self) -> Option<Waker> {
        let free = self.free_ops();
        let id = self.rng.choice(free)?;
        if self.rng.u8(..4) == 0 {
            self.progress(id);
            return None;
        }
        self.complete(id)
    }

    fn note(&mut self, info: OpInfo, event: &'static str) {
        if self.trace.len() == TRACE_LEN {
            self.trace.pop_front();
        }
        self.trace.push_back((info, event));
    }

    /// The operations that may progress now.
    pub(super) fn free_ops(&self) -> Vec<u64> {
        if self.off {
            return Vec::new();
        }
        let held = |op: &Op| self.hold.as_ref().is_some_and(|hold| hold(&op.info));
        let free = self.in_flight().filter(|op| !held(op));
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

    /// Ends an operation in flight; who waits for it is to be woken.
    pub(super) fn complete(&mut self, id: u64) -> Option<Waker> {
        let allocated = self.allocated();
        let op = self.ops.get_mut(&id).filter(|op| op.is_in_flight());
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
                .filter(|&&sector| file.sector(sector).is_none())
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
