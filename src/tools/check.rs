//! `qblkd check`.

use std::path::Path;
use std::sync::Arc;

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::{Exit, complain, fail, lock, print, progress_bar};
use crate::config::{self, CheckConfig};
use crate::engine::Error;
use crate::engine::check::{Phase, Progress, Repair, Report, check as check_image};
use crate::format::FormatError;
use crate::storage::lock::LockKind;
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};

/// Checks an image, repairs it if asked to, and prints what was found.
#[must_use]
pub fn check(config: &CheckConfig) -> Exit {
    let bar = if config.quiet {
        ProgressBar::hidden()
    } else {
        progress_bar()
    };
    let result = run(config, &bar);
    bar.finish_and_clear();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            let foreign = Error::is_caused_by(&error, |cause: &FormatError| {
                matches!(cause, FormatError::Magic { .. })
            });
            fail(&config.path, &error);
            return if foreign {
                Exit::NoChecks
            } else {
                Exit::Failure
            };
        }
    };
    for problem in &report.problems {
        complain(problem);
    }
    if report.problems_omitted > 0 {
        complain(&format!("and {} more", report.problems_omitted));
    }
    let text = if config.json {
        format!("{:#}\n", to_json(&config.path, &report))
    } else if config.quiet {
        String::new()
    } else {
        to_text(&report)
    };
    print(&text, exit_of(&report))
}

/// Opens, locks and checks.
fn run(config: &CheckConfig, bar: &ProgressBar) -> Result<Report, Error> {
    let repair = match config.repair {
        config::Repair::None => Repair::None,
        config::Repair::Leaks => Repair::Leaks,
        config::Repair::All => Repair::All,
    };
    let write = repair != Repair::None;
    let file = HostFile::open(
        &config.path,
        OpenMode {
            write,
            direct: false,
        },
    )
    .map(Arc::new)
    .map_err(|error| Error::io("cannot open the image", error))?;
    let kind = if write {
        LockKind::Writer
    } else {
        LockKind::Reader
    };
    let _lock = lock(&file, kind)?;
    let storage = BlockingStorage::new(vec![file]);
    let mut show = |progress: Progress| {
        // The length first: a bar without one is full, and each of these may draw it.
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(match progress.phase {
            Phase::Refcounts => "reading refcounts",
            Phase::Tables => "reading L2 tables",
            Phase::Compare => "comparing refcounts",
            Phase::Repair => "repairing",
        });
    };
    block_on(check_image(&storage, FileId(0), repair, &mut show))
}

/// QEMU's order: what is unknown is worse than what is corrupt, and that than what is lost.
fn exit_of(report: &Report) -> Exit {
    if report.check_errors > 0 {
        Exit::Failure
    } else if report.corruptions > 0 {
        Exit::Corrupt
    } else if report.leaks > 0 {
        Exit::Leaks
    } else {
        Exit::Success
    }
}

/// The object that `qemu-img check --output=json` prints; counts of zero are left out as there.
fn to_json(path: &Path, report: &Report) -> Value {
    let mut object = Map::new();
    let mut add = |name: &str, value: u64, always: bool| {
        if always || value != 0 {
            object.insert(name.to_owned(), value.into());
        }
    };
    add("image-end-offset", report.image_end_offset, true);
    add("total-clusters", report.total_clusters, true);
    add("check-errors", report.check_errors, true);
    add("corruptions", report.corruptions, false);
    add("leaks", report.leaks, false);
    add("corruptions-fixed", report.corruptions_fixed, false);
    add("leaks-fixed", report.leaks_fixed, false);
    add("allocated-clusters", report.allocated_clusters, false);
    add("fragmented-clusters", report.fragmented_clusters, false);
    add("compressed-clusters", report.compressed_clusters, false);
    add("overlaps", report.overlaps, false);
    object.insert("filename".to_owned(), path.to_string_lossy().into());
    object.insert("format".to_owned(), json!("qcow2"));
    Value::Object(object)
}

/// The report for people.
fn to_text(report: &Report) -> String {
    let mut lines = Vec::new();
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        lines.push(format!(
            "repaired: {} corruptions, {} leaked clusters; checked once more",
            report.corruptions_fixed, report.leaks_fixed
        ));
    }
    if report.is_clean() {
        lines.push("no errors found in the image".to_owned());
    }
    if report.corruptions > 0 {
        lines.push(format!(
            "{} corruptions: data may be wrong, or writing to the image may make it wrong",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        lines.push(format!(
            "{} leaked clusters: space is lost, data is not",
            report.leaks
        ));
    }
    if report.check_errors > 0 {
        lines.push(format!(
            "{} things could not be checked",
            report.check_errors
        ));
    }
    if report.overlaps > 0 {
        lines.push(format!(
            "{} clusters hold metadata and something else: copy the data to a new image",
            report.overlaps
        ));
    }
    let total = report.total_clusters;
    lines.push(format!(
        "{}/{total} clusters allocated ({}), {} fragmented, {} compressed",
        report.allocated_clusters,
        percent(report.allocated_clusters, total),
        percent(report.fragmented_clusters, report.allocated_clusters),
        percent(report.compressed_clusters, report.allocated_clusters),
    ));
    lines.push(format!("image end offset: {}", report.image_end_offset));
    lines.join("\n") + "\n"
}

/// A part of a whole with two decimals.
fn percent(part: u64, whole: u64) -> String {
    let hundredths = u128::from(part) * 10_000 / u128::from(whole.max(1));
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        let report = |check_errors, corruptions, leaks| Report {
            check_errors,
            corruptions,
            leaks,
            ..Report::default()
        };
        assert_eq!(exit_of(&report(0, 0, 0)), Exit::Success);
        assert_eq!(exit_of(&report(0, 0, 1)), Exit::Leaks);
        assert_eq!(exit_of(&report(0, 1, 1)), Exit::Corrupt);
        assert_eq!(exit_of(&report(1, 1, 1)), Exit::Failure);
    }

    #[test]
    fn json_has_qemus_names_and_leaves_zeroes_out() {
        let report = Report {
            leaks: 3,
            total_clusters: 10,
            ..Report::default()
        };
        let object = to_json(Path::new("disk"), &report);
        assert_eq!(object["leaks"], 3);
        assert_eq!(object["total-clusters"], 10);
        assert_eq!(object["check-errors"], 0);
        assert_eq!(object.get("corruptions"), None);
        assert_eq!(object["filename"], "disk");
    }

    #[test]
    fn a_part_of_nothing_is_nothing() {
        assert_eq!(percent(0, 0), "0.00%");
        assert_eq!(percent(1, 3), "33.33%");
        assert_eq!(percent(3, 3), "100.00%");
    }

    #[test]
    fn a_file_of_another_format_has_no_checks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        std::fs::write(&path, [7; 4096]).unwrap();
        let config = CheckConfig {
            path,
            repair: config::Repair::None,
            json: false,
            quiet: true,
        };
        assert_eq!(check(&config), Exit::NoChecks);
        let missing = CheckConfig {
            path: dir.path().join("missing"),
            ..config
        };
        assert_eq!(check(&missing), Exit::Failure);
    }
}
