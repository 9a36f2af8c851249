//! `qblkd check`: the image to check, and what to repair.

use std::path::PathBuf;

use crate::args::{CheckArgs, RepairArg};

/// What `check` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckConfig {
    /// The file.
    pub path: PathBuf,
    /// What to repair.
    pub repair: Repair,
    /// JSON instead of text.
    pub json: bool,
    /// Errors only.
    pub quiet: bool,
}

/// What `check` repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing; the image is opened for reading.
    None,
    /// Leaked clusters.
    Leaks,
    /// Everything.
    All,
}

pub(super) fn check(args: CheckArgs) -> CheckConfig {
    CheckConfig {
        path: args.file,
        repair: match args.repair {
            None => Repair::None,
            Some(RepairArg::Leaks) => Repair::Leaks,
            Some(RepairArg::All) => Repair::All,
        },
        json: args.json,
        quiet: args.quiet,
    }
}
