//! One operation of the simulated disk, from its submission to its completion.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::task::Waker;

use super::file::{SECTOR, SimFile, in_sector, overlap};
use crate::storage::{FileId, SgList};

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

/// An operation that has been submitted.
pub(super) struct Op {
    pub(super) info: OpInfo,
    /// Number among the changing operations; 0 for reads.
    pub(super) change: u64,
    /// Memory of reads and writes; held until completion, whatever becomes of the future.
    pub(super) sg: SgList,
    /// Sectors of a write that are visible already.
    pub(super) landed: BTreeSet<u64>,
    /// A read has taken its bytes.
    pub(super) taken: bool,
    /// A sync does not cover these: in flight when it was submitted.
    pub(super) not_covered: BTreeSet<u64>,
    pub(super) errno: Option<i32>,
    /// Set at completion.
    pub(super) result: Option<io::Result<bool>>,
    pub(super) waker: Option<Waker>,
    /// The future is gone: forget the operation when it is complete.
    pub(super) abandoned: bool,
}

impl Op {
    pub(super) fn is_in_flight(&self) -> bool {
        self.result.is_none()
    }

    /// Sectors of a write, zeroes or punch that are still to land.
    pub(super) fn missing(&self, file: &SimFile) -> Vec<u64> {
        let OpInfo {
            kind, offset, len, ..
        } = self.info;
        let end = offset + len;
        let sectors = offset / SECTOR..end.div_ceil(SECTOR).max(offset / SECTOR);
        let all: Vec<u64> = match kind {
            OpKind::Write => sectors.collect(),
            // Absent sectors are zero already.
            OpKind::Zeroes | OpKind::Punch => file.sectors_in(sectors).collect(),
            OpKind::Read | OpKind::Sync | OpKind::SetLen => Vec::new(),
        };
        all.into_iter()
            .filter(|sector| !self.landed.contains(sector))
            .collect()
    }

    pub(super) fn land_sector(&self, file: &mut SimFile, sector: u64) {
        let OpInfo {
            id,
            kind,
            offset,
            len,
            ..
        } = self.info;
        let (from, to) = overlap(sector, offset, offset + len);
        let within = in_sector(sector, from, to);
        let mut bytes = file.sector(sector).copied().unwrap_or([0; 512]);
        if kind == OpKind::Write {
            self.sg.copy_to(from - offset, &mut bytes[within]);
            if to > file.len() {
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

/// ENOSPC for a change that reaches beyond what the file may be.
pub(super) fn no_room(op: &Op, file: &SimFile) -> Option<i32> {
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
        file.len()
    };
    (end > limit && end > file.len()).then_some(libc::ENOSPC)
}
