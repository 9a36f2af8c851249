//! Faults on demand: which operations fail, and how.

use super::operation::OpKind;

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

/// The faults that are set, each with how many operations it has counted.
#[derive(Default)]
pub(super) struct Faults(Vec<(Fault, u64)>);

impl Faults {
    /// Adds one, which counts from now on.
    pub(super) fn add(&mut self, fault: Fault) {
        self.0.push((fault, 0));
    }

    /// Takes all away.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Counts an operation; the error that it is to fail with.
    pub(super) fn count(&mut self, kind: OpKind) -> Option<i32> {
        let mut errno = None;
        for (fault, seen) in &mut self.0 {
            if fault.kind.is_none_or(|only| only == kind) {
                *seen += 1;
                if *seen >= fault.from && *seen - fault.from < fault.count {
                    errno = Some(fault.errno);
                }
            }
        }
        errno
    }
}
