//! `qblkd snapshot`: whose internal snapshots, and what becomes of them.

use std::path::PathBuf;

use super::ConfigError;
use crate::args::{SnapshotCommand, SnapshotNameArgs, SnapshotTargetArgs};

/// What `snapshot` does, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// Where the snapshots are.
    pub target: SnapshotTarget,
    /// What to do.
    pub action: SnapshotAction,
}

/// Where internal snapshots are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotTarget {
    /// Behind the control socket of a server.
    Control(PathBuf),
    /// In an image that nobody uses.
    File(PathBuf),
}

/// What to do with internal snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Take one.
    Create {
        /// What it is called.
        name: String,
        /// Stay until the background work is done.
        wait: bool,
    },
    /// Show them.
    List {
        /// As JSON.
        json: bool,
    },
    /// Delete one.
    Delete {
        /// Which one.
        which: SnapshotName,
        /// Stay until the background work is done.
        wait: bool,
    },
    /// Go back to one. Only while no guest uses the disk.
    Revert {
        /// Which one.
        which: SnapshotName,
        /// Stay until the background work is done.
        wait: bool,
    },
}

/// Which internal snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotName {
    /// The one of this id.
    Id(String),
    /// The one of this name; if there is none, the one of this id.
    NameOrId(String),
}

pub(super) fn snapshot(command: SnapshotCommand) -> Result<SnapshotConfig, ConfigError> {
    let (target, action) = match command {
        SnapshotCommand::Create(args) => {
            let (name, wait) = (args.name, args.wait);
            (args.target, SnapshotAction::Create { name, wait })
        }
        SnapshotCommand::List(args) => (args.target, SnapshotAction::List { json: args.json }),
        SnapshotCommand::Revert(args) => {
            let (which, wait) = (snapshot_name(args.which)?, args.wait);
            (args.target, SnapshotAction::Revert { which, wait })
        }
        SnapshotCommand::Delete(args) => {
            let (which, wait) = (snapshot_name(args.which)?, args.wait);
            (args.target, SnapshotAction::Delete { which, wait })
        }
    };
    let target = snapshot_target(target)?;
    Ok(SnapshotConfig { target, action })
}

fn snapshot_target(args: SnapshotTargetArgs) -> Result<SnapshotTarget, ConfigError> {
    match (args.control, args.blk_file) {
        (Some(path), None) => Ok(SnapshotTarget::Control(path)),
        (None, Some(path)) => Ok(SnapshotTarget::File(path)),
        _ => Err(ConfigError::Usage(
            "give --control PATH (the server's socket) or --blk-file FILE (an image that nobody \
             uses)",
        )),
    }
}

fn snapshot_name(args: SnapshotNameArgs) -> Result<SnapshotName, ConfigError> {
    match (args.name, args.id) {
        (Some(name), None) => Ok(SnapshotName::NameOrId(name)),
        (None, Some(id)) => Ok(SnapshotName::Id(id)),
        _ => Err(ConfigError::Usage(
            "say which snapshot is meant: its name, or --id ID",
        )),
    }
}
