//! Compact counts, one for each host cluster of an image.
//!
//! [`RefCounts`] holds how often something refers to a cluster, [`ClusterSet`] one bit per cluster.
//! Both are cut into chunks that are allocated on first use, so that a sparse file costs what it
//! uses. They know nothing of the image.
//!
//! Memory: a chunk has as many bits for each of its clusters as its highest count has, up to 64. So
//! the counts of a full image without snapshots are a bitmap, 4 MiB for 2 TiB in clusters of 64 KiB;
//! with one snapshot of all of it they are two, with up to six snapshots three. There is a bound to it:
//! only the clusters of a *window* are counted, which ends where the memory does, and the others are
//! for another pass. The caller bounds cluster indices by [`CLUSTERS_MAX`]; a set stays under 256 MiB
//! with that.

use std::ops::Range;

use crate::units::{to_u64, to_usize};

/// Most host clusters that a check handles: QEMU's own limit for the same task.
pub(in crate::engine) const CLUSTERS_MAX: u64 = 1 << 31;

/// Clusters in a chunk, as a power of two. Few in tests, whose images have several windows so.
const CHUNK_BITS: u32 = if cfg!(test) { 7 } else { 12 };

/// Clusters in a chunk.
const CHUNK_CLUSTERS: usize = 1 << CHUNK_BITS;

/// Clusters in a group: those whose bits share words.
pub(super) const GROUP_CLUSTERS: usize = 64;

/// Groups in a chunk.
const GROUPS: usize = CHUNK_CLUSTERS / GROUP_CLUSTERS;

/// Bytes of a chunk besides its counts, about.
const CHUNK_BYTES: usize = 32;

/// Splits a number of clusters into chunks and a place in the next one.
#[inline]
fn split(clusters: u64) -> (usize, usize) {
    (
        to_usize(clusters >> CHUNK_BITS),
        to_usize(clusters) & (CHUNK_CLUSTERS - 1),
    )
}

/// The counts of a chunk: for each group the least significant bits of its clusters, then the next ones.
#[derive(Debug)]
struct Chunk(Box<[u64]>);

impl Chunk {
    /// All zeroes.
    fn new(bits: usize) -> Self {
        Self(vec![0; GROUPS * bits].into_boxed_slice())
    }

    /// Bits of a count.
    #[inline]
    fn bits(&self) -> usize {
        self.0.len() / GROUPS
    }

    /// Bytes of memory.
    fn bytes(&self) -> usize {
        self.0.len() * 8 + CHUNK_BYTES
    }

    #[inline]
    fn get(&self, place: usize) -> u64 {
        let bits = self.bits();
        let words = &self.0[place / GROUP_CLUSTERS * bits..][..bits];
        let at = place % GROUP_CLUSTERS;
        words
            .iter()
            .rev()
            .fold(0, |count, word| count << 1 | word >> at & 1)
    }

    /// Adds to a count. Returns what there are no bits for, in units of the next bit.
    #[inline]
    fn add(&mut self, place: usize, times: u32) -> u64 {
        let bits = self.bits();
        let words = &mut self.0[place / GROUP_CLUSTERS * bits..][..bits];
        let at = place % GROUP_CLUSTERS;
        let mut left = u64::from(times);
        for word in words {
            left += *word >> at & 1;
            *word = *word & !(1 << at) | (left & 1) << at;
            left >>= 1;
        }
        left
    }

    /// Replaces a count. False: it needs more bits.
    #[inline]
    fn set(&mut self, place: usize, count: u64) -> bool {
        let bits = self.bits();
        if bits < 64 && count >> bits != 0 {
            return false;
        }
        let words = &mut self.0[place / GROUP_CLUSTERS * bits..][..bits];
        let at = place % GROUP_CLUSTERS;
        for (bit, word) in words.iter_mut().enumerate() {
            *word = *word & !(1 << at) | (count >> bit & 1) << at;
        }
        true
    }

    /// The same counts with more bits for each.
    fn widened(&self, bits: usize) -> Self {
        let mut new = Self::new(bits);
        let groups = new.0.chunks_exact_mut(bits);
        for (new, old) in groups.zip(self.0.chunks_exact(self.bits())) {
            new[..old.len()].copy_from_slice(old);
        }
        new
    }

    /// The first place from `from` on with a count.
    fn next_used(&self, from: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % GROUP_CLUSTERS);
        let groups = self.0.chunks_exact(self.bits()).enumerate();
        for (group, words) in groups.skip(from / GROUP_CLUSTERS) {
            let used = words.iter().fold(0, |used, word| used | word) & mask;
            if used != 0 {
                return Some(group * GROUP_CLUSTERS + to_usize(u64::from(used.trailing_zeros())));
            }
            mask = u64::MAX;
        }
        None
    }
}

/// References to each host cluster of a window.
#[derive(Debug)]
pub(super) struct RefCounts {
    /// The clusters that are counted. It begins with a chunk.
    window: Range<u64>,
    /// Chunks by index in the window; an absent one is all zeroes.
    chunks: Vec<Option<Chunk>>,
    /// Bytes of the chunks, and how many there may be: no more than that and one chunk.
    bytes: usize,
    bytes_max: usize,
    /// One more than the highest cluster ever counted.
    end: u64,
}

impl Default for RefCounts {
    /// Counts all clusters, in as much memory as it takes.
    fn default() -> Self {
        Self::new(0, usize::MAX)
    }
}

impl RefCounts {
    /// Counts clusters in a window that begins at `start` or a little before that, and ends where
    /// `bytes_max` bytes of memory do, or one chunk.
    pub(super) fn new(start: u64, bytes_max: usize) -> Self {
        Self {
            window: start >> CHUNK_BITS << CHUNK_BITS..CLUSTERS_MAX,
            chunks: Vec::new(),
            bytes: 0,
            bytes_max,
            end: 0,
        }
    }

    /// The clusters that are counted. It may become shorter while references are added.
    pub(super) fn window(&self) -> &Range<u64> {
        &self.window
    }

    /// Adds `times` references to `cluster`, which must be below [`CLUSTERS_MAX`]; nothing where it is
    /// outside of the window.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, times: u64) {
        let Ok(few) = u32::try_from(times) else {
            return self.set(cluster, self.get(cluster).saturating_add(times));
        };
        let Some((chunk, place)) = self.place(cluster) else {
            // Nothing, but a look at the number.
            return self.set(cluster, 0);
        };
        let Some(Some(counts)) = self.chunks.get_mut(chunk) else {
            return self.set(cluster, times);
        };
        self.end = self.end.max(cluster + 1);
        let more = counts.add(place, few);
        if more != 0 {
            let count = match counts.bits() {
                // More than can be said.
                64 => u64::MAX,
                bits => counts.get(place) | more << bits,
            };
            self.set(cluster, count);
        }
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

    /// References to `cluster`; none outside of the window.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.get_inside(cluster).unwrap_or(0)
    }

    /// References to `cluster`, if it is in the window.
    #[inline]
    pub(super) fn get_inside(&self, cluster: u64) -> Option<u64> {
        let (chunk, place) = self.place(cluster)?;
        match self.chunks.get(chunk) {
            Some(Some(counts)) => Some(counts.get(place)),
            _ => Some(0),
        }
    }

    /// The first cluster with more than `most` references.
    pub(super) fn first_above(&self, most: u64) -> Option<u64> {
        for (chunk, counts) in self.chunks.iter().enumerate() {
            let Some(counts) = counts else { continue };
            if counts.bits() < 64 && most >> counts.bits() != 0 {
                continue;
            }
            let place = (0..CHUNK_CLUSTERS).find(|place| counts.get(*place) > most);
            if let Some(place) = place {
                return Some(self.cluster(chunk, place));
            }
        }
        None
    }

    /// One more than the highest cluster ever counted.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The counts of the group that starts at `cluster` (a multiple of [`GROUP_CLUSTERS`]), if its
    /// chunk has none with more than 16 bits.
    pub(super) fn small_group(&self, cluster: u64) -> Option<[u16; GROUP_CLUSTERS]> {
        let mut counts = [0; GROUP_CLUSTERS];
        let Some((chunk, place)) = self.place(cluster) else {
            return Some(counts);
        };
        let Some(Some(chunk)) = self.chunks.get(chunk) else {
            return Some(counts);
        };
        let bits = chunk.bits();
        if bits > 16 {
            return None;
        }
        let words = &chunk.0[place / GROUP_CLUSTERS * bits..][..bits];
        for (bit, word) in words.iter().enumerate() {
            match *word {
                0 => {}
                u64::MAX => counts.iter_mut().for_each(|count| *count |= 1 << bit),
                word => {
                    for (at, count) in counts.iter_mut().enumerate() {
                        *count |= u16::from(word >> at & 1 == 1) << bit;
                    }
                }
            }
        }
        Some(counts)
    }

    /// The first cluster from `from` on with a reference, skipping absent chunks quickly.
    pub(super) fn next_used(&self, from: u64) -> Option<u64> {
        let (first, mut place) = self.place(from.max(self.window.start))?;
        for (chunk, counts) in self.chunks.iter().enumerate().skip(first) {
            if let Some(found) = counts.as_ref().and_then(|counts| counts.next_used(place)) {
                return Some(self.cluster(chunk, found));
            }
            place = 0;
        }
        None
    }

    /// Where a cluster of the window is.
    #[inline]
    fn place(&self, cluster: u64) -> Option<(usize, usize)> {
        (self.window.contains(&cluster)).then(|| split(cluster - self.window.start))
    }

    /// Which cluster this is.
    fn cluster(&self, chunk: usize, place: usize) -> u64 {
        self.window.start + (to_u64(chunk) << CHUNK_BITS) + to_u64(place)
    }

    /// Replaces a count.
    fn set(&mut self, cluster: u64, count: u64) {
        assert!(
            cluster < CLUSTERS_MAX,
            "cluster {cluster} is past the largest that is counted"
        );
        let Some((chunk, place)) = self.place(cluster) else {
            return;
        };
        self.end = self.end.max(cluster + 1);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let slot = &mut self.chunks[chunk];
        if slot.as_mut().is_some_and(|counts| counts.set(place, count)) {
            return;
        }
        let bits = to_usize(u64::from(u64::BITS - count.leading_zeros())).max(1);
        let mut new = match slot {
            Some(old) => old.widened(bits),
            None => Chunk::new(bits),
        };
        new.set(place, count);
        self.bytes += new.bytes();
        if let Some(old) = slot.replace(new) {
            self.bytes -= old.bytes();
        }
        self.shrink();
    }

    /// Forgets the counts at the end of the window that there is no memory for.
    fn shrink(&mut self) {
        if self.bytes <= self.bytes_max {
            return;
        }
        // A good deal at once: what is left may well get more bits.
        let wanted = self.bytes_max - self.bytes_max / 8;
        while self.bytes > wanted && self.chunks.len() > 1 {
            if let Some(Some(last)) = self.chunks.pop() {
                self.bytes -= last.bytes();
            }
        }
        self.window.end = self.cluster(self.chunks.len(), 0);
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
    fn counts_get_the_bits_that_they_need_and_keep_their_neighbours() {
        let mut counts = RefCounts::default();
        let mut sums = [0_u64; 3];
        let clusters = [6, 7, CHUNK_CLUSTERS - 1].map(to_u64);
        let mut random = fastrand::Rng::with_seed(1);
        for bits in 0..64 {
            for (cluster, sum) in clusters.iter().zip(&mut sums) {
                let times = random.u64(..=1 << bits);
                counts.add(*cluster, times);
                *sum = sum.saturating_add(times);
            }
            assert_eq!(clusters.map(|cluster| counts.get(cluster)), sums, "{bits}");
        }
        assert_eq!([5, 8, 70].map(|cluster| counts.get(cluster)), [0; 3]);
        counts.add(6, u64::MAX);
        assert_eq!(counts.get(6), u64::MAX, "the most that it can say");
        counts.remove(7, sums[1] - 55);
        assert_eq!(counts.get(7), 55);
    }

    #[test]
    fn a_count_costs_as_many_bits_as_the_highest_of_its_chunk() {
        let mut counts = RefCounts::default();
        let chunks = 100;
        let bytes = |counts: &RefCounts| counts.bytes - chunks * CHUNK_BYTES;
        for cluster in 0..to_u64(chunks * CHUNK_CLUSTERS) {
            counts.add(cluster, 1);
        }
        assert_eq!(bytes(&counts), chunks * CHUNK_CLUSTERS / 8);
        for cluster in 0..to_u64(chunks * CHUNK_CLUSTERS) {
            counts.add(cluster, 6);
        }
        assert_eq!(bytes(&counts), chunks * CHUNK_CLUSTERS * 3 / 8);
        counts.add(to_u64(CHUNK_CLUSTERS), 1);
        assert_eq!(bytes(&counts), (chunks * 3 + 1) * CHUNK_CLUSTERS / 8);
    }

    #[test]
    fn a_window_ends_where_the_memory_does() {
        let chunk_clusters = to_u64(CHUNK_CLUSTERS);
        let one_bit = CHUNK_CLUSTERS / 8 + CHUNK_BYTES;
        let mut counts = RefCounts::new(3 * chunk_clusters + 5, 16 * one_bit);
        assert_eq!(*counts.window(), 3 * chunk_clusters..CLUSTERS_MAX);
        counts.add(3 * chunk_clusters - 1, 1);
        for chunk in 3..19 {
            counts.add(chunk * chunk_clusters, 1);
        }
        assert_eq!(counts.window().end, CLUSTERS_MAX);
        counts.add(19 * chunk_clusters, 1);
        assert_eq!(*counts.window(), 3 * chunk_clusters..17 * chunk_clusters);
        let found = [2, 3, 16, 17].map(|chunk| counts.get(chunk * chunk_clusters));
        assert_eq!(found, [0, 1, 1, 0]);
        counts.add(17 * chunk_clusters, 1);
        assert_eq!(counts.get(17 * chunk_clusters), 0, "it was cut off");
        assert_eq!(counts.next_used(0), Some(3 * chunk_clusters));
        assert_eq!(counts.next_used(17 * chunk_clusters), None);
        assert!(counts.bytes <= 16 * one_bit);
    }

    #[test]
    fn a_window_has_a_chunk_however_little_memory_there_is() {
        let mut counts = RefCounts::new(0, 0);
        let chunk_clusters = to_u64(CHUNK_CLUSTERS);
        counts.add(5 * chunk_clusters, 1);
        counts.add(chunk_clusters - 1, 1000);
        assert_eq!(*counts.window(), 0..chunk_clusters);
        assert_eq!(counts.get(chunk_clusters - 1), 1000);
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
        assert_eq!(counts.small_group(0), Some([0; GROUP_CLUSTERS]));
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
        counts.add(5000, 2);
        assert_eq!(counts.next_used(0), Some(3));
        assert_eq!(counts.next_used(3), Some(3));
        assert_eq!(counts.next_used(4), Some(5000));
        assert_eq!(counts.next_used(5000), Some(5000));
        assert_eq!(counts.next_used(5001), None);
    }

    #[test]
    fn a_group_shows_its_counts_up_to_16_bits() {
        let mut counts = RefCounts::default();
        let mut expected = [3; GROUP_CLUSTERS];
        for cluster in 64..128 {
            counts.add(cluster, 3);
        }
        assert_eq!(counts.small_group(64), Some(expected));
        counts.add(70, 65532);
        expected[6] = 65535;
        assert_eq!(counts.small_group(64), Some(expected));
        counts.add(0, 65536);
        assert_eq!(counts.small_group(64), None);
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
