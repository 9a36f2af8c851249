//! Cheap overlap protection: host clusters that no data and no new metadata may ever land on.
//!
//! The header, the L1 tables, the refcount table and its blocks, and the snapshot table. Ranges
//! are known at open and grow only when the allocator makes new metadata, so that a sorted list
//! with a binary search is enough; slices are judged once, when they are loaded.

use std::ops::Range;

/// Sorted, disjoint ranges of host clusters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Protected {
    ranges: Vec<Range<u64>>,
}

impl Protected {
    /// Builds the list from ranges in any order.
    pub(crate) fn new(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self { ranges: merged }
    }

    /// Does `clusters` touch a protected range?
    pub(crate) fn overlaps(&self, clusters: &Range<u64>) -> bool {
        let after = self
            .ranges
            .partition_point(|range| range.end <= clusters.start);
        self.ranges
            .get(after)
            .is_some_and(|range| range.start < clusters.end)
    }

    /// The gap between protected ranges around `cluster`: `None` if it is protected itself.
    pub(crate) fn gap(&self, cluster: u64) -> Option<Range<u64>> {
        let after = self.ranges.partition_point(|range| range.end <= cluster);
        let end = match self.ranges.get(after) {
            Some(range) if range.start <= cluster => return None,
            Some(range) => range.start,
            None => u64::MAX,
        };
        let start = after
            .checked_sub(1)
            .and_then(|i| self.ranges.get(i))
            .map_or(0, |r| r.end);
        Some(start..end)
    }

    /// Protects one more range.
    pub(crate) fn add(&mut self, clusters: Range<u64>) {
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.push(clusters);
        *self = Self::new(ranges);
    }

    /// Protects a range no longer.
    pub(crate) fn remove(&mut self, clusters: &Range<u64>) {
        let ranges = std::mem::take(&mut self.ranges);
        let pieces = ranges.into_iter().flat_map(|range| {
            let before = range.start..range.end.min(clusters.start);
            let after = range.start.max(clusters.end)..range.end;
            [before, after]
        });
        *self = Self::new(pieces.filter(|piece| piece.start < piece.end).collect());
    }

    /// The protected ranges that touch `clusters`.
    pub(crate) fn within(&self, clusters: &Range<u64>) -> impl Iterator<Item = &Range<u64>> {
        let end = clusters.end;
        let after = self
            .ranges
            .partition_point(|range| range.end <= clusters.start);
        self.ranges[after..]
            .iter()
            .take_while(move |range| range.start < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_of_every_boundary() {
        let protected = Protected::new(vec![10..12, 0..1, 12..14, 20..20]);
        assert_eq!(protected.ranges, vec![0..1, 10..14]);
        assert!(protected.overlaps(&(0..1)));
        assert!(!protected.overlaps(&(1..10)));
        assert!(protected.overlaps(&(9..11)));
        assert!(protected.overlaps(&(13..14)));
        assert!(!protected.overlaps(&(14..u64::MAX)));
        assert_eq!(protected.gap(0), None);
        assert_eq!(protected.gap(1), Some(1..10));
        assert_eq!(protected.gap(9), Some(1..10));
        assert_eq!(protected.gap(13), None);
        assert_eq!(protected.gap(14), Some(14..u64::MAX));
        let mut protected = protected;
        protected.remove(&(11..12));
        assert_eq!(protected.ranges, vec![0..1, 10..11, 12..14]);
        protected.add(11..12);
        assert_eq!(protected.ranges, vec![0..1, 10..14]);
    }
}
