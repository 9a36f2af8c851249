//! The disk as a test holds it: adds files, asks for faults and cuts, looks at what there is.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::rc::Rc;

use fastrand::Rng;

use super::cut::{CutMode, CutPoint};
use super::fault::Fault;
use super::file::{SimFile, SimFileOptions};
use super::operation::{Op, OpInfo, OpKind};
use super::state::State;
use crate::storage::{AlignedBuf, FileId, SgList};

/// A simulated disk with several files. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    pub(super) state: Rc<RefCell<State>>,
}

impl SimDisk {
    /// An empty disk. Operations are held for a [`Driver`].
    pub fn new(seed: u64) -> SimDisk {
        SimDisk::with_files(seed, Vec::new())
    }

    fn with_files(seed: u64, files: Vec<SimFile>) -> SimDisk {
        SimDisk {
            state: Rc::new(RefCell::new(State::new(seed, files))),
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
        state.files.push(SimFile::new(bytes, options));
        FileId(u16::try_from(state.files.len() - 1).unwrap())
    }

    /// How many files there are.
    pub fn file_count(&self) -> u16 {
        u16::try_from(self.state.borrow().files.len()).unwrap()
    }

    /// What reads see of a file now.
    pub fn contents(&self, file: FileId) -> Vec<u8> {
        let state = self.state.borrow();
        let file = &state.files[usize::from(file.0)];
        let sg = SgList::from_buf(AlignedBuf::zeroed(usize::try_from(file.len()).unwrap()));
        file.read(0, &sg);
        sg.to_vec()
    }

    /// Writes what reads see of a file to a real one, with holes, for other programs to look at.
    pub fn export(&self, file: FileId, path: &Path) -> io::Result<()> {
        let state = self.state.borrow();
        let file = &state.files[usize::from(file.0)];
        file.export(path)
    }

    /// Changes a file behind everybody's back, durably: damage for a test.
    pub fn poke(&self, file: FileId, offset: u64, bytes: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.files[usize::from(file.0)].poke(offset, bytes);
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
        self.state.borrow_mut().faults.add(fault);
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
        state.in_flight().map(|op| op.info).collect()
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
        let mut flying: Vec<&Op> = state.in_flight().collect();
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
        let unflushed = files.iter().flat_map(SimFile::unflushed_ops).collect();
        let mut choice = mode.choice(unflushed, rng);
        let files = files
            .iter()
            .map(|file| file.after_cut(|ops| choice.version(ops)))
            .collect();
        let disk = SimDisk::with_files(rng.u64(..), files);
        disk.state.borrow_mut().capacity = state.capacity;
        disk.state.borrow_mut().immediate = state.immediate;
        disk
    }

    /// True if the driver could do something with an operation in flight.
    pub(super) fn can_step(&self) -> bool {
        !self.state.borrow().free_ops().is_empty()
    }

    /// Lets one operation in flight progress or complete.
    pub(super) fn step(&self) {
        let waker = self.state.borrow_mut().step();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
