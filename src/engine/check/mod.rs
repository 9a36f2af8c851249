//! Checks an image against itself, and repairs it.
//!
//! `survey` reads and counts, `repair` writes, `report` says what was found. The numbers are those of
//! `qemu-img check`. Used by the tools on images that nobody serves, and at open on an image whose
//! dirty bit is set. Nothing else may write the image meanwhile: the caller holds its lock.
//!
//! Works on a header that decodes: what cannot be opened cannot be checked, as with QEMU.
//!
//! Hostile images: every number is checked before something is allocated or read by it, the work is
//! bounded by the size of the metadata, the memory by 2 GiB of counts, which is a byte for each cluster
//! of the largest file that is accepted (2^31 clusters, QEMU's limit too); a full image of 2 TiB in
//! 64 KiB clusters needs 4 MiB.

#![forbid(unsafe_code)]

mod count;
mod repair;
mod report;
mod survey;
#[cfg(test)]
mod tests;

pub(super) use count::CLUSTERS_MAX;
pub use report::{Problem, Report, Severity};
pub(super) use survey::{COUNTS_BYTES, Counted, Piecemeal};

use super::source::{Layout, Source};
use crate::engine::error::{Error, ErrorKind};
use crate::format::Header;
use crate::storage::{FileId, Storage};

/// What a check may change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Everything that can be repaired without losing data.
    All,
}

/// Which part of the work a progress report is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Phase {
    /// Reading refcount blocks.
    Refcounts,
    /// Reading L2 tables.
    Tables,
    /// Comparing refcounts with references.
    Compare,
    /// Writing repaired metadata.
    Repair,
}

/// How far a check is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The current part.
    pub phase: Phase,
    /// Done of it, in units that only compare with `total`.
    pub done: u64,
    /// The whole part.
    pub total: u64,
}

/// Checks the qcow2 image in `file` and repairs what `repair` allows.
///
/// After a repair the image has been checked once more, and the counts are those of the second
/// check; the dirty and the corrupt bit are gone if it found no corruption.
///
/// # Errors
///
/// The image cannot be opened, a table that everything hangs on cannot be read, a repair cannot be
/// written or has no space. Problems of the image are in the report, not here.
pub async fn check<S: Storage>(
    storage: &S,
    file: FileId,
    repair: Repair,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Error> {
    let mut source = Source::new(storage, file)?;
    let header = source.header().await?;
    let survey = survey::survey(&source, &Layout::new(&header), progress).await?;
    match repair {
        Repair::None => Ok(survey.report),
        _ => repair::repair(&mut source, header, survey, repair, progress).await,
    }
}

/// Finds out whether refcounts have room for another header, which names another active L1 table;
/// with `raise` also makes the image ready for it, so that at worst counts are too high.
///
/// # Errors
///
/// `Unsupported` where there is no room, `Corrupt` for a damaged image; as [`check`].
pub(super) async fn prepare_header<S: Storage>(
    storage: &S,
    file: FileId,
    header: Header,
    raise: bool,
) -> Result<(), Error> {
    let mut source = Source::new(storage, file)?;
    repair::prepare_header(&mut source, header, raise).await
}

/// Repairs an image whose dirty bit is set, before it is served for writing.
///
/// # Errors
///
/// As [`check`]; also an image that is still damaged afterwards, or whose state is not known. Entries
/// that name clusters past the end of the file do not count: the rest can be served, if nothing is
/// ever allocated in front of [`Report::dangling_end`]. The dirty bit stays then.
pub async fn repair_dirty<S: Storage>(storage: &S, file: FileId) -> Result<Report, Error> {
    let report = check(storage, file, Repair::All, &mut |_| ()).await?;
    if report.check_errors == 0 && report.corruptions == report.dangling {
        return Ok(report);
    }
    let first = report.problems.iter().find(|problem| {
        matches!(
            problem.severity,
            Severity::Corruption | Severity::CheckError
        )
    });
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the image was not closed cleanly and cannot be repaired: {} corruptions and {} check \
             errors are left, the first: {}",
            report.corruptions,
            report.check_errors,
            first.map_or("not recorded", |problem| &problem.text),
        ),
    ))
}
