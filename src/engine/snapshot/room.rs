//! Room in refcounts for a snapshot: known before the instant, since what is committed must be settled.
//!
//! A snapshot adds as many references to a cluster as the active tree has to it. That is one for
//! nearly all, but a host cluster of compressed data has one for each compressed cluster that touches
//! it (some thousands, where the data says little), and an image may come with counts that nothing
//! explains. Three answers, from the cheapest on:
//!
//! - The highest count of the image, found once (ahead of time, if there was any) and carried on in
//!   memory, bounds every count that is
//!   to come: the active tree has no more references to a cluster than the cluster's count, and never
//!   gets another to one that it has already. It is enough for all images but those below.
//! - With the most references that one tree has to any cluster, where these are known, the bound is
//!   closer.
//! - Else the L2 tables of the active tree and of all unsettled snapshots are read, and each count is
//!   compared with what is to come for it.
//!
//! Nothing is locked for longer than one refcount block, and no request waits for any of it.

use std::sync::Arc;

use super::{Root, Step, Task};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::layer::Mapping;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l2::{Cluster, L2Entry, compressed_host_clusters};
use crate::format::refcount;
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Clusters whose references are tallied at a time: 8 MiB of memory.
const TALLIED_MAX: u64 = 4 << 20;
/// Bytes of refcount blocks that are looked at ahead of time in one step (at least one block).
const AHEAD_BYTES: u64 = 4 << 20;
/// Bytes of tables that are read together (at least one table).
const READ_BYTES: u64 = 1 << 20;
/// More than raw deflate can shrink anything.
const DEFLATE_RATIO_MAX: u64 = 1033;
/// The shortest zstd frame with any content: magic number, descriptor, window, and a block of one
/// repeated byte.
const ZSTD_FRAME_MIN: u64 = 10;

/// What is known of the counts of an image.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// No count is higher when all snapshots that there are now are settled.
    most_to_come: Option<u64>,
    /// Neither the active tree nor one that is not settled has more references to any cluster.
    most_per_tree: Option<u64>,
    /// Before the first snapshot: no count in the refcount blocks before this one is higher than
    /// `highest`.
    looked_at: u64,
    highest: u64,
}

/// References that are to come for some clusters.
struct Tally {
    start: u64,
    /// At its maximum it may be more.
    coming: Vec<u16>,
}

impl Tally {
    fn add(&mut self, cluster: u64, times: u64) {
        let index = cluster.checked_sub(self.start).map(to_usize);
        if let Some(coming) = index.and_then(|index| self.coming.get_mut(index)) {
            *coming = coming.saturating_add(u16::try_from(times).unwrap_or(u16::MAX));
        }
    }

    /// Adds what a table refers to, and the table itself. What does not decode is an error where it is
    /// used.
    fn add_table(&mut self, mapping: &Mapping, start: u64, table: &[u8], times: u64) {
        let geometry = mapping.geometry;
        self.add(start >> geometry.cluster_bits(), times);
        for raw in table.chunks_exact(8) {
            let entry = L2Entry(raw.try_into().map_or(0, u64::from_be_bytes));
            match entry.decode(geometry, mapping.version) {
                Ok(Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. }) => {
                    self.add(geometry.host_cluster(host).get(), times);
                }
                Ok(Cluster::Compressed { host, bytes }) => {
                    let touched = compressed_host_clusters(geometry, host, bytes);
                    for cluster in touched.start().get()..=touched.end().get() {
                        self.add(cluster, times);
                    }
                }
                Ok(Cluster::Unallocated | Cluster::ZeroPlain) | Err(_) => {}
            }
        }
    }

    /// The references that are to come for a cluster.
    fn get(&self, cluster: u64) -> u64 {
        let index = cluster.checked_sub(self.start).map(to_usize);
        let coming = index.and_then(|index| self.coming.get(index));
        coming.map_or(0, |coming| number(*coming))
    }

    /// The most that are to come for any cluster.
    fn most(&self) -> u64 {
        number(self.coming.iter().copied().max().unwrap_or(0))
    }
}

/// What is told of a number in a tally.
fn number(coming: u16) -> u64 {
    match coming {
        u16::MAX => u64::MAX,
        coming => u64::from(coming),
    }
}

impl<S: Storage> Worker<S> {
    /// Refuses `new` more snapshots where a cluster that they would share has no room for them in its
    /// count. `trees` is how many there would be then, with the active one.
    ///
    /// # Errors
    /// `Unsupported`; `Io`/`Corrupt` when a table or a refcount block cannot be read.
    pub(super) async fn check_room(
        &self,
        target: Target<'_>,
        new: u64,
        trees: u64,
    ) -> Result<(), Error> {
        let allocator = &target.active.allocator;
        if allocator.untrusted_end() > 0 {
            return self.check_room_untrusted(target, trees).await;
        }
        let most = refcount::most(target.mapping.geometry.refcount_order());
        let known = *lock(&target.active.snapshots.known);
        if let (Some(to_come), Some(per_tree)) = (known.most_to_come, known.most_per_tree)
            && let Some(to_come) = sum(to_come, new, per_tree).filter(|sum| *sum <= most)
        {
            lock(&target.active.snapshots.known).most_to_come = Some(to_come);
            return Ok(());
        }
        // Snapshots that are not counted yet have had what the active tree has now, and more. Asked
        // for before any count is read: what is counted meanwhile counts twice here.
        let unsettled = unsettled_roots(target);
        let mut looking = Known::default();
        if known.most_to_come.is_none() && known.most_per_tree.is_none() {
            // Nothing was counted since the look ahead began.
            looking = known;
        }
        self.look_for_highest(target, &mut looking, u64::MAX)
            .await
            .map_err(refusal)?;
        let highest = looking.highest.max(1);
        let per_tree = known.most_per_tree.unwrap_or(highest).min(highest);
        let to_come = sum(highest, to_u64(unsettled.len()) + new, per_tree);
        if let Some(to_come) = to_come.filter(|sum| *sum <= most) {
            *lock(&target.active.snapshots.known) = Known {
                most_to_come: Some(to_come),
                most_per_tree: Some(per_tree),
                ..Known::default()
            };
            return Ok(());
        }
        let per_tree = self.check_each_count(target, &unsettled, new, most).await?;
        *lock(&target.active.snapshots.known) = Known {
            most_to_come: None,
            most_per_tree: Some(per_tree),
            ..Known::default()
        };
        Ok(())
    }

    /// Finds out some of what the first snapshot will ask for, so that it need not wait for that. For
    /// when there is nothing else to do: `Idle` when there is nothing to find out.
    ///
    /// # Errors
    /// `Io`, `Corrupt`: a refcount block cannot be read. Nothing depends on it yet.
    pub async fn look_ahead(&self) -> Result<Step, Error> {
        let Some(target) = self.image.qcow2_target() else {
            return Ok(Step::Idle);
        };
        let Target {
            mapping, active, ..
        } = target;
        let snapshots = &active.snapshots;
        if self.image.has_failed() || active.allocator.untrusted_end() > 0 {
            return Ok(Step::Idle);
        }
        // No snapshot is taken meanwhile, and none waits for being counted.
        let _table = snapshots.table.lock().await;
        let mut known = *lock(&snapshots.known);
        if known.most_per_tree.is_some()
            || known.looked_at >= active.allocator.blocks_max()
            || !lock(&snapshots.queue).items.is_empty()
        {
            return Ok(Step::Idle);
        }
        let blocks = (AHEAD_BYTES >> mapping.geometry.cluster_bits()).max(1);
        self.look_for_highest(target, &mut known, blocks).await?;
        *lock(&snapshots.known) = known;
        Ok(Step::Progress { bytes: AHEAD_BYTES })
    }

    /// Looks at so many more refcount blocks.
    async fn look_for_highest(
        &self,
        target: Target<'_>,
        known: &mut Known,
        blocks: u64,
    ) -> Result<(), Error> {
        let allocator = &target.active.allocator;
        let end = known.looked_at.saturating_add(blocks);
        let end = end.min(allocator.blocks_max());
        let highest = allocator
            .highest_count(&self.storage, known.looked_at..end)
            .await?;
        known.highest = known.highest.max(highest);
        known.looked_at = end;
        Ok(())
    }

    /// Compares every count with what is to come for it. Returns the most references that the active
    /// tree or an unsettled one has to any cluster, or more.
    async fn check_each_count(
        &self,
        target: Target<'_>,
        unsettled: &[Arc<Root>],
        new: u64,
        most: u64,
    ) -> Result<u64, Error> {
        let Target {
            mapping, active, ..
        } = target;
        let allocator = &active.allocator;
        let end = allocator.end_offset() >> mapping.geometry.cluster_bits();
        let mut per_tree = 1;
        let mut start = 0;
        while start < end {
            let count = (end - start).min(TALLIED_MAX);
            let mut tally = Tally {
                start,
                coming: vec![0; to_usize(count)],
            };
            self.tally_active(target, &mut tally).await?;
            for coming in &mut tally.coming {
                *coming = coming.saturating_mul(u16::try_from(new).unwrap_or(u16::MAX));
            }
            for root in unsettled {
                self.tally_root(target, root, &mut tally).await?;
            }
            // Not less than any of these trees has.
            per_tree = per_tree.max(tally.most());
            let full = allocator
                .find_count(&self.storage, start..start + count, |cluster, count| {
                    let coming = tally.get(cluster);
                    let sum = count.checked_add(coming);
                    coming > 0 && sum.is_none_or(|sum| sum > most)
                })
                .await
                .map_err(refusal)?;
            if let Some((cluster, count)) = full {
                let bits = 1_u32 << mapping.geometry.refcount_order();
                let host_offset = allocator.offset(cluster);
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "refcounts of {bits} bits have no room for another snapshot of host cluster \
                         {host_offset}, which has {count} already (compressed data counts more than \
                         once); delete a snapshot, repair the image if its counts are too high, or \
                         use one with wider refcounts"
                    ),
                ));
            }
            start += count;
        }
        Ok(per_tree)
    }

    /// As [`Self::check_room`] while nobody knows the counts.
    async fn check_room_untrusted(&self, target: Target<'_>, trees: u64) -> Result<(), Error> {
        let mapping = target.mapping;
        let geometry = mapping.geometry;
        let cluster_size = geometry.cluster_size();
        // So many pieces of compressed data fit a cluster, and one may reach in from each side.
        let pieces = if mapping.zstd {
            cluster_size / ZSTD_FRAME_MIN
        } else {
            DEFLATE_RATIO_MAX.min(cluster_size)
        };
        let most = refcount::most(geometry.refcount_order());
        if sum(0, trees, pieces + 2).is_some_and(|sum| sum <= most) {
            return Ok(());
        }
        let mut compressed = false;
        self.read_active(target, |_, table| {
            let mut entries = table.chunks_exact(8);
            compressed |= entries
                .any(|raw| L2Entry(raw.try_into().map_or(0, u64::from_be_bytes)).is_compressed());
        })
        .await?;
        if !compressed {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            "whether refcounts have room for a snapshot of compressed data is not known before \
             they are rebuilt: try again when that is done",
        ))
    }

    async fn tally_active(&self, target: Target<'_>, tally: &mut Tally) -> Result<(), Error> {
        self.read_active(target, |start, table| {
            tally.add_table(target.mapping, start, table, 1);
        })
        .await
    }

    /// Shows all L2 tables of the active tree, as they are in the file, past the cache. What a request
    /// changes meanwhile only lowers the references to clusters that were there before.
    async fn read_active(
        &self,
        target: Target<'_>,
        mut see: impl FnMut(u64, &[u8]),
    ) -> Result<(), Error> {
        let Target {
            mapping, active, ..
        } = target;
        let most = to_usize((READ_BYTES / mapping.geometry.cluster_size()).max(1));
        let mut next = 0;
        while next < mapping.l1.len() {
            // What is read while this is held is a table, not what came after it in its cluster.
            let pin = self.pin();
            let mut tables: Vec<(u64, usize)> = Vec::new();
            let mut is_new = false;
            while next < mapping.l1.len() && tables.len() < most {
                let entry = mapping.l1_entry(next);
                if entry.table_offset().is_some() {
                    let table = mapping.table(next, entry)?.get();
                    is_new |= lock(&active.l1).unnamed_tables.contains(&table);
                    tables.push((table, next));
                }
                next += 1;
            }
            if is_new {
                // The file does not have it yet.
                self.flush().await?;
            }
            tables.sort_unstable();
            self.see_tables(target, &tables, &mut see).await?;
            drop(pin);
        }
        Ok(())
    }

    async fn tally_root(
        &self,
        target: Target<'_>,
        root: &Root,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        let most = to_usize((READ_BYTES / target.mapping.geometry.cluster_size()).max(1));
        let mut tables: Vec<(u64, usize)> = (0_u32..)
            .take(root.l1.len())
            .filter_map(|index| Some((root.table(index)?.get(), to_usize(u64::from(index)))))
            .collect();
        tables.sort_unstable();
        for tables in tables.chunks(most) {
            self.see_tables(target, tables, &mut |start, table| {
                tally.add_table(target.mapping, start, table, 1);
            })
            .await?;
        }
        Ok(())
    }

    /// Reads these tables: host offset, L1 index.
    async fn see_tables(
        &self,
        target: Target<'_>,
        tables: &[(u64, usize)],
        see: &mut impl FnMut(u64, &[u8]),
    ) -> Result<(), Error> {
        let cluster_size = target.mapping.geometry.cluster_size();
        let starts: Vec<u64> = tables.iter().map(|(start, _)| *start).collect();
        let bytes = self.read_tables(target, &starts).await?;
        for (start, table) in starts
            .iter()
            .zip(bytes.chunks_exact(to_usize(cluster_size)))
        {
            see(*start, table);
        }
        Ok(())
    }
}

/// A refcount block that cannot be read is a reason to take no snapshot, not one to take no more
/// writes: nobody relies on it yet.
fn refusal(error: Error) -> Error {
    if error.kind() == ErrorKind::Corrupt {
        let text = format!("the refcounts must be repaired first: {}", error.chain());
        return Error::new(ErrorKind::Unsupported, text);
    }
    error
}

/// `first` and `times` times `each`, if that is a number.
fn sum(first: u64, times: u64, each: u64) -> Option<u64> {
    times.checked_mul(each)?.checked_add(first)
}

/// The trees whose references are not counted yet.
fn unsettled_roots(target: Target<'_>) -> Vec<Arc<Root>> {
    let queue = lock(&target.active.snapshots.queue);
    let root = |task: &Task| match task {
        Task::Settle { root, .. } => Some(Arc::clone(root)),
        _ => None,
    };
    let tasks = queue.items.iter().map(|work| &work.task);
    tasks.filter_map(root).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_counts_in_its_window_and_says_when_it_does_not_know() {
        let mut tally = Tally {
            start: 100,
            coming: vec![0; 10],
        };
        for cluster in [99, 100, 109, 110] {
            tally.add(cluster, 2);
        }
        assert_eq!([99, 100, 109, 110].map(|at| tally.get(at)), [0, 2, 2, 0]);
        assert_eq!(tally.most(), 2);
        tally.add(101, 65534);
        assert_eq!(tally.get(101), 65534);
        tally.add(101, 1);
        assert_eq!(tally.get(101), u64::MAX);
    }
}
