//! The snapshot table in memory, and what people see of it.

use std::collections::BTreeSet;

use super::{Selector, SnapshotInfo};
use crate::engine::error::{Error, ErrorKind};
use crate::format::snapshot::{SnapshotEntry, encode_table};
use crate::units::to_u64;

/// The snapshots as the file has them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// In the order of the file; entries of others are kept byte for byte.
    pub(crate) entries: Vec<SnapshotEntry>,
    /// Snapshots that are frozen but not committed yet (v2 only).
    pub(crate) pending: Vec<SnapshotEntry>,
    /// First host cluster of the table in the file.
    pub(crate) start: u64,
    /// Its clusters; 0 where there is no table.
    pub(crate) count: u64,
}

impl Table {
    /// The table's bytes for the file.
    ///
    /// # Errors
    /// `Invalid` when there are too many entries, or too long ones.
    pub(crate) fn encode(entries: &[SnapshotEntry]) -> Result<Vec<u8>, Error> {
        encode_table(entries).map_err(|error| {
            Error::new(
                ErrorKind::Invalid,
                format!("the snapshot table has no room: {error}"),
            )
        })
    }

    /// The committed snapshot that is meant; the first of several.
    pub(crate) fn find(&self, selector: &Selector) -> Option<usize> {
        if selector.id.is_none() && selector.name.is_none() {
            return None;
        }
        let matches = |wanted: &Option<String>, found: &[u8]| {
            wanted
                .as_ref()
                .is_none_or(|wanted| wanted.as_bytes() == found)
        };
        self.entries.iter().position(|entry| {
            matches(&selector.id, &entry.id) && matches(&selector.name, &entry.name)
        })
    }

    /// Whether a snapshot has this name already, committed or not.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.entries
            .iter()
            .chain(&self.pending)
            .any(|entry| entry.name == name.as_bytes())
    }

    /// Ids for so many new snapshots: those that follow the highest decimal id, as QEMU has it. An
    /// image may have given the highest of all already; then the lowest that are free.
    pub(crate) fn new_ids(&self, count: usize) -> Vec<u64> {
        let decimal = |entry: &SnapshotEntry| {
            std::str::from_utf8(&entry.id)
                .ok()
                .and_then(|id| id.parse::<u64>().ok())
        };
        let entries = self.entries.iter().chain(&self.pending);
        let taken: BTreeSet<u64> = entries.filter_map(decimal).collect();
        let highest = taken.last().copied().unwrap_or(0);
        let room = u64::MAX - highest;
        if room > to_u64(count) {
            return (highest + 1..).take(count).collect();
        }
        let free = (1..).filter(|id| !taken.contains(id));
        free.take(count).collect()
    }

    /// Snapshots in all.
    pub(crate) fn len(&self) -> u64 {
        to_u64(self.entries.len() + self.pending.len())
    }

    /// What people see of it. `disk_size` stands in where an entry does not say its own. `dirty`:
    /// what the file counts need not be true of any of them.
    pub(crate) fn infos(&self, disk_size: u64, dirty: bool) -> Vec<SnapshotInfo> {
        self.entries
            .iter()
            .map(|entry| SnapshotInfo {
                unsettled: dirty,
                ..info(entry, disk_size)
            })
            .collect()
    }
}

/// What people see of a snapshot table entry.
pub(crate) fn info(entry: &SnapshotEntry, disk_size: u64) -> SnapshotInfo {
    SnapshotInfo {
        id: String::from_utf8_lossy(&entry.id).into_owned(),
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        date_sec: entry.date_sec,
        date_nsec: entry.date_nsec,
        vm_clock_nsec: entry.vm_clock_nsec,
        vm_state_size: entry.vm_state_size(),
        disk_size: entry.disk_size().unwrap_or(disk_size),
        icount: entry.icount(),
        unsettled: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_found_by_id_and_by_name() {
        let table = Table {
            entries: vec![
                SnapshotEntry::named("7", "a"),
                SnapshotEntry::named("x", "b"),
                SnapshotEntry::named("3", "a"),
            ],
            ..Table::default()
        };
        let by = |id: Option<&str>, name: Option<&str>| {
            table.find(&Selector {
                id: id.map(str::to_owned),
                name: name.map(str::to_owned),
            })
        };
        assert_eq!(by(None, Some("a")), Some(0));
        assert_eq!(by(Some("3"), None), Some(2));
        assert_eq!(by(Some("3"), Some("a")), Some(2));
        assert_eq!(by(Some("7"), Some("b")), None);
        assert_eq!(by(None, None), None);
        assert!(table.has_name("b") && !table.has_name("7"));
    }

    fn with_ids(ids: &[&str]) -> Table {
        Table {
            entries: ids.iter().map(|id| SnapshotEntry::named(id, "a")).collect(),
            ..Table::default()
        }
    }

    #[test]
    fn new_ids_follow_the_highest_number() {
        assert_eq!(with_ids(&[]).new_ids(2), [1, 2]);
        assert_eq!(with_ids(&["7", "x", "", "3"]).new_ids(2), [8, 9]);
        assert_eq!(with_ids(&["007", "-9"]).new_ids(1), [8]);
        assert_eq!(with_ids(&["99999999999999999999"]).new_ids(1), [1]);
    }

    /// The id after the highest of all was an overflow, at the word of an image.
    #[test]
    fn behind_the_highest_id_of_all_come_the_lowest_that_are_free() {
        let highest = u64::MAX.to_string();
        let last_but_one = (u64::MAX - 1).to_string();
        assert_eq!(with_ids(&[&highest]).new_ids(2), [1, 2]);
        assert_eq!(with_ids(&["2", &highest, "1"]).new_ids(2), [3, 4]);
        assert_eq!(with_ids(&[&last_but_one]).new_ids(1), [1]);
        let third = u64::MAX - 3;
        assert_eq!(
            with_ids(&[&third.to_string()]).new_ids(2),
            [third + 1, third + 2]
        );
        assert_eq!(with_ids(&[&third.to_string()]).new_ids(3), [1, 2, 3]);
    }
}
