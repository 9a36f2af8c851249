//! Checks a disk against the state file that a chaos run left when its server was killed.

use super::disk::{ConnectOptions, Disk};
use super::journal::Permitted;
use super::{Error, scan};
use std::path::PathBuf;

/// What to check, and what to leave behind.
pub(crate) struct Options {
    pub(crate) connect: ConnectOptions,
    pub(crate) state: PathBuf,
    /// Gets the state that was found, for another chaos run to start from.
    pub(crate) pin: Option<PathBuf>,
    /// Gets the content that was found, as a raw file.
    pub(crate) model_out: Option<PathBuf>,
}

/// What a run found.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Report {
    pub(crate) sectors: u64,
    pub(crate) unflushed_changes_existed: bool,
}

/// Reads the region that the state file describes and compares every sector.
pub(crate) fn run(options: &Options) -> Result<Report, Error> {
    let mut permitted = Permitted::load(&options.state)?;
    let (disk, mut queues) = Disk::connect(&options.connect)?;
    let sectors = permitted.model.sectors();
    let capacity_sectors = disk.geometry.capacity_sectors;
    if capacity_sectors < sectors {
        let what = format!("the disk has {capacity_sectors} sectors, the state file {sectors}");
        return Err(Error::Miscompare {
            sector: capacity_sectors,
            what,
        });
    }
    let unflushed_changes_existed = !permitted.is_settled();
    scan::scan(&disk, &mut queues[0], 0..sectors, |first, found| {
        permitted.check(first, found)
    })?;
    if let Some(path) = &options.pin {
        permitted.save_pinned(path)?;
    }
    if let Some(path) = &options.model_out {
        permitted
            .model
            .write_raw(path, capacity_sectors * super::SECTOR_BYTES as u64)?;
    }
    Ok(Report {
        sectors,
        unflushed_changes_existed,
    })
}
