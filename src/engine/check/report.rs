//! What a check found, in QEMU's numbers.
//!
//! Owns the counts, a bounded list of sentences about single problems, and nothing else: the tools
//! decide how it is printed and which exit code it becomes.

use std::fmt;

/// Most problems that a report describes in words; the rest is only counted.
const PROBLEMS_MAX: usize = 1000;

/// How bad a problem is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Severity {
    /// Data is wrong, or a later write may make it wrong.
    Corruption,
    /// Space is lost, data is not.
    Leak,
    /// Something could not be checked.
    CheckError,
    /// Not counted by QEMU, but worth a word.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corruption => "corruption",
            Self::Leak => "leak",
            Self::CheckError => "check error",
            Self::Warning => "warning",
        })
    }
}

/// One problem in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What and where.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.text)
    }
}

/// What a check found and a repair changed.
///
/// The counts mean what the fields of the same name in `qemu-img check --output=json` mean.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Corruptions that are there (after the repair, if there was one).
    pub corruptions: u64,
    /// Clusters that count more references than there are.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Corruptions that the repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that the repair removed.
    pub leaks_fixed: u64,
    /// Guest clusters of the active tree that have data, or space reserved for it.
    pub allocated_clusters: u64,
    /// Guest clusters of the virtual disk.
    pub total_clusters: u64,
    /// Guest clusters of the active tree that are compressed.
    pub compressed_clusters: u64,
    /// Guest clusters that do not follow their neighbour in the image file.
    pub fragmented_clusters: u64,
    /// End of the last host cluster in use.
    pub image_end_offset: u64,
    /// Host clusters that hold metadata and something else as well. QEMU does not count these; a
    /// refcount that fits hides them.
    pub overlaps: u64,
    /// Corruptions among those above that are entries which name clusters past the end of the file.
    /// They are never repaired: the file may have been cut short by mistake.
    pub dangling: u64,
    /// End of the furthest range past the end of the file that an entry names, 0 if none does.
    /// Nothing may be allocated in front of it: it would become that entry's data.
    pub dangling_end: u64,
    /// Problems in words, at most a thousand.
    pub problems: Vec<Problem>,
    /// Problems that are counted above but not described.
    pub problems_omitted: u64,
}

impl Report {
    /// Nothing is wrong, no space is lost, and everything could be checked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// No data is in danger: leaks at most.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    /// Counts `times` problems of one kind and keeps the words, if there is room. The sentence is
    /// made only then.
    pub(super) fn add(&mut self, severity: Severity, times: u64, text: impl FnOnce() -> String) {
        if times == 0 {
            return;
        }
        match severity {
            Severity::Corruption => self.corruptions += times,
            Severity::Leak => self.leaks += times,
            Severity::CheckError => self.check_errors += times,
            Severity::Warning => {}
        }
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem {
                severity,
                text: text(),
            });
        } else {
            self.problems_omitted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_beyond_the_limit_are_counted_without_words() {
        let mut report = Report::default();
        for _ in 0..=PROBLEMS_MAX {
            report.add(Severity::Leak, 2, || "lost".to_owned());
        }
        assert_eq!(report.leaks, 2 * (1 + PROBLEMS_MAX as u64));
        assert_eq!(report.problems.len(), PROBLEMS_MAX);
        assert_eq!(report.problems_omitted, 1);
        assert!(report.is_consistent() && !report.is_clean());
    }

    #[test]
    fn a_warning_leaves_the_image_clean() {
        let mut report = Report::default();
        report.add(Severity::Warning, 1, || "odd".to_owned());
        assert!(report.is_clean());
        assert_eq!(report.problems[0].to_string(), "warning: odd");
    }
}
