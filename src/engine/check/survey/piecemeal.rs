//! A survey in small pieces, of an image that is served meanwhile.
//!
//! Counts what refers to the clusters that the file had when it was opened, as it was opened: the
//! active L1 table is given from outside, since the one in the file changes, and nothing else that
//! is read here changes. L2 tables of that time are never written to, and their clusters are not
//! reused, until the counts are there.
//!
//! Judges no refcount and no copied flag: nobody trusts them.
//!
//! Counts the clusters of a window, which ends where [`COUNTS_BYTES`] of counts do; one survey after
//! the other counts them all. Besides, there are 16 bytes of memory for each L2 table.

use std::ops::Range;
use std::sync::Arc;

use super::{CLUSTERS_MAX, RefCounts, Survey, Surveyor, TableUse};
use crate::engine::check::report::{Report, Severity};
use crate::engine::error::{Error, ErrorKind};
use crate::engine::source::{Layout, Source};
use crate::format::RefcountTableEntry;
use crate::storage::{FileId, Storage};
use crate::units::to_u64;

/// Memory of the counts: enough for 2 TiB in clusters of 64 KiB and two snapshots of all of it.
pub(in crate::engine) const COUNTS_BYTES: usize = 9 << 20;

/// See the module text.
pub(in crate::engine) struct Piecemeal {
    layout: Layout,
    /// Bytes of the file at open.
    file_len: u64,
    /// The first entries of the active L1 table at open.
    l1: Arc<[u64]>,
    /// What the survey knows, between two pieces.
    known: Option<Survey>,
    /// All L2 tables, in file order, and how many of them are read.
    tables: Vec<TableUse>,
    tables_read: usize,
}

/// The references that a finished survey has found.
pub(in crate::engine) struct Counted {
    refs: RefCounts,
    /// Nothing names clusters that could not be looked at.
    trusted: bool,
    refcount_max: u64,
    /// Entries that name clusters past the end that the file had.
    pub(in crate::engine) lost: u64,
    /// Where the furthest of them ends, in bytes; 0 if there are none.
    pub(in crate::engine) lost_end: u64,
}

impl std::fmt::Debug for Piecemeal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Piecemeal")
            .field("tables", &self.tables.len())
            .field("tables_read", &self.tables_read)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counted")
            .field("trusted", &self.trusted)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

impl Piecemeal {
    /// Reads the roots: the L1 tables of the active tree and of all snapshots. Clusters are counted from
    /// `window_start` on, with some before it.
    ///
    /// # Errors
    /// `Io` when something cannot be read; `Unsupported` for a file that is too long.
    pub(in crate::engine) async fn new<S: Storage>(
        storage: &S,
        file: FileId,
        layout: Layout,
        file_len: u64,
        l1: Arc<[u64]>,
        window_start: u64,
        counts_bytes: usize,
    ) -> Result<Self, Error> {
        let mut new = Self {
            layout,
            file_len,
            l1,
            known: None,
            tables: Vec::new(),
            tables_read: 0,
        };
        let source = new.source(storage, file)?;
        let mut surveyor = Surveyor::new(&source, &new.layout)?;
        surveyor.l1_at_open = &new.l1;
        surveyor.judges = false;
        surveyor.out.refs = RefCounts::new(window_start, counts_bytes);
        surveyor.load_reftable().await?;
        for entry in &mut surveyor.out.reftable {
            // A block that was made since.
            if entry.0 >= file_len {
                *entry = RefcountTableEntry(0);
            }
        }
        surveyor.roots().await?;
        let tables = surveyor.take_tables();
        let known = surveyor.rest()?;
        new.known = Some(known);
        new.tables = tables;
        Ok(new)
    }

    /// Bytes of L2 tables: all of them, and those that are read.
    pub(in crate::engine) fn progress(&self) -> (u64, u64) {
        let bytes = |tables: usize| to_u64(tables) * self.layout.geometry.cluster_size();
        (bytes(self.tables.len()), bytes(self.tables_read))
    }

    /// Where the window ends, as far as that is known.
    pub(in crate::engine) fn window_end(&self) -> u64 {
        let known = self.known.as_ref();
        known.map_or(CLUSTERS_MAX, |out| out.refs.window().end)
    }

    /// Reads at most `bytes` of L2 tables (at least one). False: all are read.
    ///
    /// # Errors
    /// `Io` when a table cannot be read: the survey cannot go on.
    pub(in crate::engine) async fn step<S: Storage>(
        &mut self,
        storage: &S,
        file: FileId,
        bytes: u64,
    ) -> Result<bool, Error> {
        let cluster_size = self.layout.geometry.cluster_size();
        let most = usize::try_from((bytes / cluster_size).max(1)).unwrap_or(usize::MAX);
        let end = self.tables_read.saturating_add(most).min(self.tables.len());
        let piece: Range<usize> = self.tables_read..end;
        if piece.is_empty() {
            return Ok(false);
        }
        let known = self.known.take();
        let source = self.source(storage, file)?;
        let mut surveyor = self.wake(&source, known)?;
        surveyor.read_tables(&self.tables[piece]).await;
        let known = surveyor.rest()?;
        self.known = Some(known);
        self.tables_read = end;
        Ok(true)
    }

    /// The counts, when every table is read.
    ///
    /// # Errors
    /// `Corrupt` names what is wrong with the image besides lost data; `Io`.
    pub(in crate::engine) async fn finish<S: Storage>(
        mut self,
        storage: &S,
        file: FileId,
    ) -> Result<Counted, Error> {
        let known = self.known.take();
        let source = self.source(storage, file)?;
        let mut surveyor = self.wake(&source, known)?;
        surveyor.bitmaps().await;
        surveyor.refcount_structure();
        let out = surveyor.rest()?;
        let Survey { report, refs, .. } = out;
        let harmless = report.dangling + out.incomplete_snapshots + out.flag_errors;
        if report.corruptions > harmless {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the image was not closed in order and is damaged beyond that: {}; repair it \
                     (qblkd check --repair all)",
                    first_problem(&report)
                ),
            ));
        }
        Ok(Counted {
            refs,
            trusted: out.references_trusted,
            refcount_max: self.layout.geometry.refcount_max(),
            lost: report.dangling,
            lost_end: report.dangling_end,
        })
    }

    /// The file, as long as it was.
    fn source<'s, S: Storage>(&self, storage: &'s S, file: FileId) -> Result<Source<'s, S>, Error> {
        let mut source = Source::new(storage, file)?;
        source.len = self.file_len;
        Ok(source)
    }

    fn wake<'a, S: Storage>(
        &'a self,
        source: &'a Source<'a, S>,
        known: Option<Survey>,
    ) -> Result<Surveyor<'a, S>, Error> {
        let Some(out) = known else {
            return Err(Error::new(
                ErrorKind::Io,
                "a survey was given up half-way and must begin again",
            ));
        };
        let mut surveyor = Surveyor::new(source, &self.layout)?;
        surveyor.l1_at_open = &self.l1;
        surveyor.judges = false;
        surveyor.out = out;
        Ok(surveyor)
    }
}

impl<S: Storage> Surveyor<'_, S> {
    /// What is to be kept until the next piece. A table that could not be read makes all counts
    /// useless.
    fn rest(self) -> Result<Survey, Error> {
        debug_assert!(self.found_tables.is_empty(), "tables that nobody will read");
        if self.out.report.check_errors > 0 {
            let problem = first_problem(&self.out.report).to_owned();
            return Err(Error::new(ErrorKind::Io, problem));
        }
        Ok(self.out)
    }
}

/// The first problem that is not harmless, in words.
fn first_problem(report: &Report) -> &str {
    let serious = |severity| matches!(severity, Severity::Corruption | Severity::CheckError);
    let harmless = |text: &str| {
        text.contains("past the end of the file") || text.contains("table entry is incomplete")
    };
    let mut problems = report.problems.iter().filter(|p| serious(p.severity));
    problems
        .clone()
        .find(|problem| !harmless(&problem.text))
        .or_else(|| problems.next())
        .map_or("not recorded", |problem| &problem.text)
}

impl Counted {
    /// Where the clusters begin that are for another survey, if there are any.
    pub(in crate::engine) fn window_end(&self) -> Option<u64> {
        let end = self.refs.window().end;
        (end < CLUSTERS_MAX).then_some(end)
    }

    /// The count that a cluster must get whose count is `found`: the same outside of the window. `None`
    /// where the width of refcounts has no room for it.
    pub(in crate::engine) fn wanted(&self, cluster: u64, found: u64) -> Option<u64> {
        let Some(references) = self.refs.get_inside(cluster) else {
            return Some(found);
        };
        // What looks free may belong to something that could not be looked at.
        let wanted = if self.trusted {
            references
        } else {
            references.max(found)
        };
        (references <= self.refcount_max).then_some(wanted)
    }

    /// The first cluster from `from` on that something refers to.
    pub(in crate::engine) fn next_used(&self, from: u64) -> Option<u64> {
        self.refs.next_used(from)
    }
}
