//! Compact counts, one for each host cluster of an image.
//!
//! [`RefCounts`] holds how often something refers to a cluster, [`ClusterSet`] one bit per cluster.
//! Both are cut into chunks that are allocated on first use, so that a sparse file costs what it
//! uses. They know nothing of the image.
//!
//! Memory: a count is one byte, and counts above [`SMALL_MAX`] are kept in a map, which therefore
//! holds at most one entry for each 254 references. The caller bounds cluster indices by
//! [`CLUSTERS_MAX`]; with that the counts stay under 2 GiB, a set under 256 MiB. A full 2 TiB image
//! with 64 KiB clusters needs 32 MiB and 4 MiB.

use std::collections::HashMap;

use crate::units::{to_u64, to_usize};

/// Most host clusters that a check handles: QEMU's own limit for the same task.
pub(in crate::engine) const CLUSTERS_MAX: u64 = 1 << 31;

/// Clusters in a chunk, as a power of two.
const CHUNK_BITS: u32 = 12;

/// Clusters in a chunk.
pub(super) const CHUNK_CLUSTERS: usize = 1 << CHUNK_BITS;

/// Largest count that is kept in its byte. The byte value above it says "look in the map".
const SMALL_MAX: u8 = u8::MAX - 1;

/// Splits a cluster index into chunk and place in the chunk.
#[inline]
fn split(cluster: u64) -> (usize, usize) {
    (
        to_usize(cluster >> CHUNK_BITS),
        to_usize(cluster) & (CHUNK_CLUSTERS - 1),
    )
}

/// References to each host cluster.
#[derive(Debug, Default)]
pub(super) struct RefCounts {
    /// Chunks by index; an absent one is all zeroes.
    chunks: Vec<Option<Box<[u8; CHUNK_CLUSTERS]>>>,
    /// Counts above [`SMALL_MAX`], by cluster.
    large: HashMap<u64, u64>,
    /// One more than the highest cluster ever counted.
    end: u64,
}

impl RefCounts {
    /// Adds `times` references to `cluster`, which must be below [`CLUSTERS_MAX`].
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, times: u64) {
        let (chunk, place) = split(cluster);
        self.end = self.end.max(cluster + 1);
        if let Some(Some(counts)) = self.chunks.get_mut(chunk) {
            let count = &mut counts[place];
            let sum = u64::from(*count) + times;
            if sum <= u64::from(SMALL_MAX) {
                #[expect(clippy::cast_possible_truncation, reason = "not above SMALL_MAX")]
                {
                    *count = sum as u8;
                }
                return;
            }
        }
        self.set(cluster, self.get(cluster).saturating_add(times));
    }

    /// Takes back `times` references that were added before.
    pub(super) fn remove(&mut self, cluster: u64, times: u64) {
        let count = self.get(cluster);
        assert!(
            count >= times,
            "cluster {cluster} has {count} references, cannot lose {times}"
        );
        self.set(cluster, count - times);
    }

    /// References to `cluster`.
    #[inline]
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (chunk, place) = split(cluster);
        match self.chunks.get(chunk) {
            Some(Some(counts)) if counts[place] <= SMALL_MAX => u64::from(counts[place]),
            Some(Some(_)) => self.large.get(&cluster).copied().unwrap_or(0),
            _ => 0,
        }
    }

    /// The first cluster with more than `most` references.
    pub(super) fn first_above(&self, most: u64) -> Option<u64> {
        let small = u8::try_from(most).unwrap_or(SMALL_MAX).min(SMALL_MAX);
        for (chunk, counts) in self.chunks.iter().enumerate() {
            let Some(counts) = counts else { continue };
            if counts.iter().all(|count| *count <= small) {
                continue;
            }
            let first = to_u64(chunk) << CHUNK_BITS;
            let mut clusters = first..first + to_u64(CHUNK_CLUSTERS);
            if let Some(cluster) = clusters.find(|cluster| self.get(*cluster) > most) {
                return Some(cluster);
            }
        }
        None
    }

    /// One more than the highest cluster ever counted.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The bytes of the chunk that starts at `cluster` (a multiple of [`CHUNK_CLUSTERS`]), if every
    /// count in it is its own byte; `None` in the inner option where all are zero.
    pub(super) fn small_chunk(&self, cluster: u64) -> Option<Option<&[u8; CHUNK_CLUSTERS]>> {
        let (chunk, _) = split(cluster);
        match self.chunks.get(chunk) {
            Some(Some(counts)) if self.large.is_empty() => Some(Some(counts)),
            Some(Some(counts)) if counts.iter().all(|count| *count <= SMALL_MAX) => {
                Some(Some(counts))
            }
            Some(Some(_)) => None,
            _ => Some(None),
        }
    }

    /// The first cluster from `from` on with a reference, skipping absent chunks quickly.
    pub(super) fn next_used(&self, from: u64) -> Option<u64> {
        let (first, mut place) = split(from);
        for (chunk, counts) in self.chunks.iter().enumerate().skip(first) {
            if let Some(counts) = counts
                && let Some(found) = counts[place..].iter().position(|count| *count != 0)
            {
                return Some((to_u64(chunk) << CHUNK_BITS) + to_u64(place + found));
            }
            place = 0;
        }
        None
    }

    /// Replaces a count.
    fn set(&mut self, cluster: u64, count: u64) {
        assert!(
            cluster < CLUSTERS_MAX,
            "cluster {cluster} is past the largest that is counted"
        );
        let (chunk, place) = split(cluster);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let counts = self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK_CLUSTERS]));
        match u8::try_from(count) {
            Ok(small) if small <= SMALL_MAX => {
                counts[place] = small;
                self.large.remove(&cluster);
            }
            _ => {
                counts[place] = u8::MAX;
                self.large.insert(cluster, count);
            }
        }
    }
}

/// A set of host clusters.
#[derive(Debug, Default)]
pub(super) struct ClusterSet {
    /// Chunks by index, one bit for each cluster; an absent one is empty.
    chunks: Vec<Option<Box<[u64; CHUNK_CLUSTERS / 64]>>>,
}

impl ClusterSet {
    /// Puts `cluster`, which must be below [`CLUSTERS_MAX`], into the set.
    #[inline]
    pub(super) fn insert(&mut self, cluster: u64) {
        assert!(
            cluster < CLUSTERS_MAX,
            "cluster {cluster} is past the largest that is counted"
        );
        let (chunk, place) = split(cluster);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let bits = self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK_CLUSTERS / 64]));
        bits[place / 64] |= 1 << (place % 64);
    }

    /// Whether `cluster` is in the set; any number may be asked for.
    #[inline]
    pub(super) fn contains(&self, cluster: u64) -> bool {
        let (chunk, place) = split(cluster);
        match self.chunks.get(chunk) {
            Some(Some(bits)) => bits[place / 64] >> (place % 64) & 1 == 1,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_pass_the_byte_limit_and_come_back() {
        let mut counts = RefCounts::default();
        counts.add(7, 254);
        assert_eq!(counts.get(7), 254);
        counts.add(7, 1);
        assert_eq!(counts.get(7), 255);
        counts.add(7, 100_000);
        assert_eq!(counts.get(7), 100_255);
        assert!(counts.small_chunk(0).is_none());
        counts.remove(7, 100_200);
        assert_eq!(counts.get(7), 55);
        assert_eq!(counts.small_chunk(0).unwrap().unwrap()[7], 55);
    }

    #[test]
    fn the_first_count_above_a_limit_is_found() {
        let mut counts = RefCounts::default();
        counts.add(5000, 1);
        counts.add(9000, 3);
        counts.add(9001, 300);
        let found = [0, 1, 2, 3, 255, 299, 300].map(|most| counts.first_above(most));
        let expected = [
            Some(5000),
            Some(9000),
            Some(9000),
            Some(9001),
            Some(9001),
            Some(9001),
            None,
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_never_counted_is_zero() {
        let mut counts = RefCounts::default();
        assert_eq!(counts.get(u64::MAX), 0);
        assert_eq!(counts.next_used(0), None);
        counts.add(CLUSTERS_MAX - 1, 1);
        assert_eq!(counts.get(CLUSTERS_MAX - 2), 0);
        assert_eq!(counts.end(), CLUSTERS_MAX);
        assert_eq!(counts.next_used(5), Some(CLUSTERS_MAX - 1));
        assert_eq!(counts.small_chunk(0), Some(None));
    }

    #[test]
    #[should_panic(expected = "past the largest")]
    fn a_cluster_past_the_limit_is_the_callers_bug() {
        RefCounts::default().add(CLUSTERS_MAX, 1);
    }

    #[test]
    fn next_used_starts_at_the_given_cluster() {
        let mut counts = RefCounts::default();
        counts.add(3, 1);
        counts.add(5000, 1);
        assert_eq!(counts.next_used(0), Some(3));
        assert_eq!(counts.next_used(3), Some(3));
        assert_eq!(counts.next_used(4), Some(5000));
        assert_eq!(counts.next_used(5001), None);
    }

    #[test]
    fn a_set_tells_its_members_from_their_neighbours() {
        let mut set = ClusterSet::default();
        set.insert(63);
        set.insert(4096);
        let members: Vec<u64> = (0..5000).filter(|cluster| set.contains(*cluster)).collect();
        assert_eq!(members, [63, 4096]);
        assert!(!set.contains(u64::MAX));
    }
}
