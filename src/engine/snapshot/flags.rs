//! Copied flags in the file that a crash has left where they must not be.
//!
//! An image that was not closed in order may have them in tables that it shares with snapshots, and
//! in L1 entries that name such tables. In memory nobody heeds them: no table of that time is owned.
//! In the file they must be gone before the dirty bit is.
//!
//! Tables that are not shared become ours again. Most of them have every flag as it must be: those are
//! *adopted* as they are, without a look at a cached slice (nobody modifies a table that is not owned,
//! so that slices equal the file) and without a write. The others, and those that the guest has made
//! meanwhile, are decided entry by entry (see `reown`).
//!
//! A v2 image has no dirty bit, and its flags are heeded: a flag that is wrong there is set where a
//! count is too high, which is harmless, or is missing. So after every open for writing its tables are
//! read once, and only if one disagrees with the counts, or would when it is copied, everything is shared (by a new generation,
//! as for a snapshot) and owned again.

use std::sync::atomic::Ordering;

use super::alone::Alone;
use super::reown::Done;
use crate::engine::breath::breathe;
use crate::engine::error::{Error, lock};
use crate::engine::layer::Mapping;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l1::L1Entry;
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{GuestOffset, HostOffset, to_u64, to_usize};

/// L1 entries that are looked at together.
const ENTRIES_AT_ONCE: usize = 4096;
/// Bytes of tables that one step reads (at least one table).
const BYTES_AT_ONCE: u64 = 1 << 20;

/// How far the flags of a v2 image are looked at.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// The next L1 index.
    next: usize,
}

/// What a look has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Looked {
    /// So many bytes were read, and more are left.
    On(u64),
    /// Every flag is as it must be.
    Right,
    /// One is not.
    Wrong,
}

/// What the flags of a table are.
#[derive(Clone, Copy, Debug)]
enum Flagged {
    Right,
    Wrong,
    /// So many bytes of refcount blocks were read, and more are needed.
    Unknown(u64),
}

/// How far the tables of the active tree are looked at.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// The next L1 index.
    next: usize,
    /// Shared tables among those before, in descending order of their place: host offset, L1 index.
    shared: Vec<(u64, usize)>,
}

/// How far tables are adopted.
#[derive(Debug, Default)]
pub(super) struct Adopt {
    /// The next L1 index.
    next: usize,
    /// Those that must be looked at entry by entry.
    left: Vec<usize>,
}

impl Adopt {
    /// The L1 indices that were not adopted.
    pub(super) fn into_left(self) -> Vec<usize> {
        self.left
    }
}

impl<S: Storage> Worker<S> {
    /// Takes the copied flags off L1 entries that are as they were at open. Those of tables that are
    /// ours alone get theirs back.
    pub(super) fn forget_flags(&self, target: Target<'_>, l1_at_open: &[u64]) {
        let mapping = target.mapping;
        let mut l1 = lock(&target.active.l1);
        for (index, raw) in l1_at_open.iter().enumerate() {
            let entry = L1Entry(*raw);
            if entry.copied()
                && mapping.l1_entry(index) == entry
                && let Some(slot) = mapping.l1.get(index)
            {
                slot.store(entry.with_copied(false).0, Ordering::Release);
                l1.modified.push(index);
            }
        }
    }

    /// Compares some copied flags in the file with the counts.
    pub(super) async fn look_at_flags(
        &self,
        target: Target<'_>,
        look: &mut Look,
        alone: &mut Alone,
    ) -> Result<Looked, Error> {
        let mapping = target.mapping;
        let cluster_size = mapping.geometry.cluster_size();
        if look.next >= mapping.l1.len() {
            return Ok(Looked::Right);
        }
        let most = to_usize((BYTES_AT_ONCE / cluster_size).max(1));
        let mut found: Vec<(u64, usize, L1Entry)> = Vec::new();
        let mut next = look.next;
        while next < mapping.l1.len() && found.len() < most {
            let entry = mapping.l1_entry(next);
            if entry.table_offset().is_some() {
                found.push((mapping.table(next, entry)?.get(), next, entry));
            }
            next += 1;
        }
        found.sort_unstable_by_key(|(table, ..)| *table);
        let starts: Vec<u64> = found.iter().map(|(table, ..)| *table).collect();
        let tables = self.read_named_tables(target, &starts).await?;
        let mut read = to_u64(tables.len());
        let tables = tables.chunks_exact(to_usize(cluster_size));
        for ((start, l1_index, entry), table) in found.into_iter().zip(tables) {
            breathe(cluster_size);
            let start = HostOffset::new(start);
            let mut flagged = self.judge_flags(target, start, entry, table, alone).await?;
            if matches!(flagged, Flagged::Wrong) {
                // A guest may change a table and its counts between the reads: only what is wrong
                // twice is wrong.
                read += cluster_size;
                flagged = self.judge_again(target, l1_index, alone).await?;
            }
            match flagged {
                Flagged::Right => {}
                Flagged::Wrong => return Ok(Looked::Wrong),
                // The tables are looked at again when more is known.
                Flagged::Unknown(bytes) => return Ok(Looked::On(read + bytes)),
            }
        }
        look.next = next;
        Ok(Looked::On(read))
    }

    /// Reads tables that L1 names, also such as the file does not have yet.
    async fn read_named_tables(
        &self,
        target: Target<'_>,
        starts: &[u64],
    ) -> Result<AlignedBuf, Error> {
        let are_new = {
            let l1 = lock(&target.active.l1);
            starts.iter().any(|start| l1.unnamed_tables.contains(start))
        };
        if are_new {
            self.flush().await?;
        }
        self.read_tables(target, starts).await
    }

    /// Judges the flags of a table as they are now.
    async fn judge_again(
        &self,
        target: Target<'_>,
        l1_index: usize,
        alone: &mut Alone,
    ) -> Result<Flagged, Error> {
        let entry = target.mapping.l1_entry(l1_index);
        if entry.table_offset().is_none() {
            return Ok(Flagged::Right);
        }
        let start = target.mapping.table(l1_index, entry)?;
        let table = self.read_named_tables(target, &[start.get()]).await?;
        self.judge_flags(target, start, entry, &table, alone).await
    }

    /// Judges the flags of a table, and that of the L1 entry which names it.
    async fn judge_flags(
        &self,
        target: Target<'_>,
        start: HostOffset,
        entry: L1Entry,
        table: &[u8],
        alone: &mut Alone,
    ) -> Result<Flagged, Error> {
        let mapping = target.mapping;
        let geometry = mapping.geometry;
        let own = geometry.host_cluster(start).get();
        let mut flagged = named_clusters(mapping, start, table);
        flagged.push((own, entry.copied()));
        let clusters: Vec<u64> = flagged.iter().map(|(cluster, _)| *cluster).collect();
        let learnt = self
            .learn_alone(target, alone, clusters.iter().copied())
            .await?;
        if !learnt.complete {
            return Ok(Flagged::Unknown(learnt.bytes));
        }
        let mut said = self.are_alone(target, alone, &clusters).await?;
        // Where the flag says otherwise, or much hangs on it, it may be old news.
        let doubtful: Vec<usize> = (flagged.iter().zip(&said).enumerate())
            .filter(|(_, ((cluster, copied), alone))| !**alone && (*copied || *cluster == own))
            .map(|(index, _)| index)
            .collect();
        let again: Vec<u64> = doubtful.iter().map(|index| clusters[*index]).collect();
        let now = self.are_alone_now(target, alone, &again).await?;
        for (index, now) in doubtful.into_iter().zip(now) {
            said[index] = now;
        }
        let mut shared_table = false;
        let mut lone_cluster = false;
        let mut wrong = false;
        for ((cluster, copied), alone) in flagged.into_iter().zip(said) {
            wrong |= copied != alone;
            if cluster == own {
                shared_table = !alone;
            } else {
                lone_cluster |= alone;
            }
        }
        // A copy of such a table would have flags missing.
        Ok(if wrong || (shared_table && lone_cluster) {
            Flagged::Wrong
        } else {
            Flagged::Right
        })
    }

    /// Does the table name a cluster that has one reference?
    async fn has_lone_cluster(
        &self,
        target: Target<'_>,
        start: u64,
        table: &[u8],
        alone: &mut Alone,
    ) -> Result<bool, Error> {
        let named = named_clusters(target.mapping, HostOffset::new(start), table);
        let clusters: Vec<u64> = named.into_iter().map(|(cluster, _)| cluster).collect();
        let known = || clusters.iter().copied();
        while !self.learn_alone(target, alone, known()).await?.complete {}
        let said = self.are_alone(target, alone, &clusters).await?;
        Ok(said.contains(&true))
    }

    /// Shares everything, so that all flags can be decided anew.
    pub(super) async fn share_all(&self, target: Target<'_>) -> Result<(), Error> {
        log::info!("copied flags disagree with refcounts: they are set anew");
        let frozen = self.freeze(target, &[]).await;
        self.end_grace(frozen.generation).await;
        self.forget_flags(target, &frozen.l1);
        // What was modified until now is written with its flags before those are cleared.
        self.flush().await
    }

    /// Clears the copied flags of some shared tables, in the file. Returns the bytes that it moved,
    /// `None` when there are no more.
    pub(super) async fn clear_shared_flags(
        &self,
        target: Target<'_>,
        flags: &mut Flags,
        alone: &mut Alone,
    ) -> Result<Option<u64>, Error> {
        let mapping = target.mapping;
        let cluster_size = mapping.geometry.cluster_size();
        if flags.shared.is_empty() {
            if flags.next >= mapping.l1.len() {
                return Ok(None);
            }
            let end = (flags.next + ENTRIES_AT_ONCE).min(mapping.l1.len());
            flags.shared = self.shared_tables(target, flags.next..end).await?;
            flags.next = end;
        }
        let most = to_usize((BYTES_AT_ONCE / cluster_size).max(1));
        let left = flags.shared.len().saturating_sub(most);
        // In ascending order.
        let tables: Vec<(u64, usize)> = flags.shared[left..].iter().rev().copied().collect();
        let starts: Vec<u64> = tables.iter().map(|(start, _)| *start).collect();
        let bytes = self.read_tables(target, &starts).await?;
        if mapping.version < 3 {
            let bytes = bytes.chunks_exact(to_usize(cluster_size));
            for ((start, l1_index), table) in tables.iter().zip(bytes) {
                if self.has_lone_cluster(target, *start, table, alone).await? {
                    // Nobody else has this table: its count is too high, and stays so.
                    self.copy_table(target, *l1_index, HostOffset::new(*start))
                        .await?;
                }
            }
        }
        // Those that L1 names still: no copied ones.
        let written = self.clear_copied_flags(target, &tables, &bytes).await?;
        flags.shared.truncate(left);
        Ok(Some(to_u64(bytes.len()) + written))
    }

    /// Adopts some tables; `None` when there are no more.
    pub(super) async fn adopt_on(
        &self,
        target: Target<'_>,
        adopt: &mut Adopt,
        alone: &mut Alone,
    ) -> Result<Option<Done>, Error> {
        let Target {
            mapping, active, ..
        } = target;
        let cluster_size = mapping.geometry.cluster_size();
        let most = to_usize((BYTES_AT_ONCE / cluster_size).max(1));
        let mut found: Vec<(u64, usize, L1Entry)> = Vec::new();
        if adopt.next >= mapping.l1.len() {
            return Ok(None);
        }
        self.flush_many_l1_entries(target).await?;
        let mut next = adopt.next;
        let mut left = Vec::new();
        while next < mapping.l1.len() && found.len() < most {
            let entry = mapping.l1_entry(next);
            if entry.table_offset().is_some() {
                if active.is_owned(next, self.generation()) {
                    left.push(next);
                } else {
                    found.push((mapping.table(next, entry)?.get(), next, entry));
                }
            }
            next += 1;
        }
        found.sort_unstable_by_key(|(table, ..)| *table);
        let clusters: Vec<u64> = found
            .iter()
            .map(|(table, ..)| table >> mapping.geometry.cluster_bits())
            .collect();
        let lone = self.are_alone_now(target, alone, &clusters).await?;
        let lone = found.into_iter().zip(lone).filter(|(_, lone)| *lone);
        let tables: Vec<_> = lone.map(|(table, _)| table).collect();
        // What all the tables name, one after the other, and where each table's part ends.
        let entries = tables.len() * to_usize(mapping.geometry.l2_entries());
        let mut clusters: Vec<u64> = Vec::with_capacity(entries);
        let mut flags: Vec<bool> = Vec::with_capacity(entries);
        let mut ends: Vec<usize> = Vec::with_capacity(tables.len());
        let mut exact = vec![true; tables.len()];
        let starts: Vec<u64> = tables.iter().map(|(start, ..)| *start).collect();
        let buf = self.read_tables(target, &starts).await?;
        let bytes = buf.chunks_exact(to_usize(cluster_size));
        for ((start, bytes), exact) in starts.iter().zip(bytes).zip(&mut exact) {
            breathe(cluster_size);
            let table = HostOffset::new(*start);
            if mapping.is_suspicious(table, words(bytes)) {
                *exact = false;
            } else {
                for (cluster, copied) in named_clusters(mapping, table, bytes) {
                    clusters.push(cluster);
                    flags.push(copied);
                }
            }
            ends.push(clusters.len());
        }
        let count = to_u64(tables.len());
        let read = count * cluster_size;
        let known = clusters.iter().copied();
        let learnt = self.learn_alone(target, alone, known).await?;
        if !learnt.complete {
            // The tables are looked at again when more is known.
            return Ok(Some(Done {
                tables: 0,
                bytes: read + learnt.bytes,
            }));
        }
        let said = self.are_alone(target, alone, &clusters).await?;
        let mut first = 0;
        for (exact, end) in exact.iter_mut().zip(ends) {
            *exact &= flags[first..end] == said[first..end];
            first = end;
        }
        for ((_, l1_index, entry), exact) in tables.into_iter().zip(exact) {
            if !exact || !self.own(target, l1_index, entry) {
                left.push(l1_index);
            }
        }
        adopt.left.append(&mut left);
        adopt.next = next;
        Ok(Some(Done {
            tables: count,
            bytes: read + learnt.bytes,
        }))
    }

    /// A table whose flags are right is ours, unless something has happened to it.
    fn own(&self, target: Target<'_>, l1_index: usize, entry: L1Entry) -> bool {
        let Target {
            mapping, active, ..
        } = target;
        let mut l1 = lock(&active.l1);
        let generation = self.generation();
        if !lock(&active.drops).all_settled()
            || mapping.l1_entry(l1_index) != entry
            || active.is_owned(l1_index, generation)
        {
            return false;
        }
        if !entry.copied()
            && let Some(slot) = mapping.l1.get(l1_index)
        {
            slot.store(entry.with_copied(true).0, Ordering::Release);
            l1.modified.push(l1_index);
        }
        if let Some(since) = active.owned_since.get(l1_index) {
            since.store(generation, Ordering::Release);
        }
        true
    }

    /// The tables that more than the active tree refers to.
    async fn shared_tables(
        &self,
        target: Target<'_>,
        indices: std::ops::Range<usize>,
    ) -> Result<Vec<(u64, usize)>, Error> {
        let mapping = target.mapping;
        let mut tables: Vec<(u64, usize)> = Vec::new();
        for index in indices {
            let entry = mapping.l1_entry(index);
            if entry.table_offset().is_some() {
                tables.push((mapping.table(index, entry)?.get(), index));
            }
        }
        tables.sort_unstable();
        let clusters: Vec<u64> = tables
            .iter()
            .map(|(table, _)| table >> mapping.geometry.cluster_bits())
            .collect();
        let shared = target
            .active
            .allocator
            .counts_of(&self.storage, &clusters, |count| count > 1)
            .await?;
        let mut tables: Vec<_> = tables
            .into_iter()
            .zip(shared)
            .filter(|(_, shared)| *shared)
            .map(|(table, _)| table)
            .collect();
        tables.reverse();
        Ok(tables)
    }
}

/// The clusters that a table names and that may have the copied flag, each with its flag.
fn named_clusters(mapping: &Mapping, table: HostOffset, bytes: &[u8]) -> Vec<(u64, bool)> {
    let suspicious = mapping.is_suspicious(table, words(bytes));
    let mut named = Vec::with_capacity(bytes.len() / 8);
    for raw in words(bytes).filter(|raw| *raw != 0) {
        let entry = L2Entry(raw);
        let cluster = if suspicious {
            // What is damaged or lost has no flag to speak of.
            mapping.cluster(table, GuestOffset::new(0), entry).ok()
        } else {
            entry.decode(mapping.geometry, mapping.version).ok()
        };
        if let Some(Cluster::Standard { host, copied } | Cluster::ZeroAllocated { host, copied }) =
            cluster
        {
            named.push((mapping.geometry.host_cluster(host).get(), copied));
        }
    }
    named
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|chunk| chunk.try_into().map_or(0, u64::from_be_bytes))
}
