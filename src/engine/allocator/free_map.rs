//! Free bitmaps: one per refcount block, one bit per cluster, set where the cluster may be taken.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

#[derive(Debug)]
struct FreeMap {
    /// First cluster of the block.
    base: u64,
    words: Vec<u64>,
    free: u64,
    /// No word below this one has a set bit.
    first_word: usize,
}

impl FreeMap {
    fn position(&self, cluster: u64) -> (usize, u64) {
        let bit = cluster - self.base;
        (
            usize::try_from(bit / 64).unwrap_or(usize::MAX),
            1 << (bit % 64),
        )
    }

    fn set(&mut self, cluster: u64) {
        let (word, bit) = self.position(cluster);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if self.words[word] & bit != 0 {
            debug_assert!(false, "host cluster {cluster:#x} is freed twice");
            return;
        }
        self.words[word] |= bit;
        self.free += 1;
        self.first_word = self.first_word.min(word);
    }

    fn is_set(&self, cluster: u64) -> bool {
        let (word, bit) = self.position(cluster);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn clear(&mut self, cluster: u64) {
        let (word, bit) = self.position(cluster);
        if self.is_set(cluster) {
            self.words[word] &= !bit;
            self.free -= 1;
        }
    }

    /// The first free cluster and how many follow it, at most `count` in all.
    fn first_run(&mut self, count: u64) -> Option<(u64, u64)> {
        while *self.words.get(self.first_word)? == 0 {
            self.first_word += 1;
        }
        let bit = u64::from(self.words[self.first_word].trailing_zeros());
        let start = self.base + u64::try_from(self.first_word).unwrap_or(0) * 64 + bit;
        let mut run = 1;
        while run < count && self.is_set(start + run) {
            run += 1;
        }
        Some((start, run))
    }
}

/// The bitmaps of all blocks that were looked at.
#[derive(Debug, Default)]
pub(super) struct FreeMaps {
    maps: BTreeMap<u64, FreeMap>,
    /// Blocks with at least one set bit.
    with_free: BTreeSet<u64>,
    /// All blocks below this are known.
    known_below: u64,
    /// Set bits of all maps.
    free: u64,
}

impl FreeMaps {
    pub(super) fn knows(&self, block: u64) -> bool {
        self.maps.contains_key(&block)
    }

    /// The lowest block under `blocks` that nobody has looked at.
    pub(super) fn first_unknown(&self, blocks: u64) -> Option<u64> {
        (self.known_below < blocks).then_some(self.known_below)
    }

    /// Records what is free in a block.
    pub(super) fn learn(
        &mut self,
        block: u64,
        clusters: Range<u64>,
        is_free: impl Fn(u64) -> bool,
    ) {
        let mut map = FreeMap {
            base: clusters.start,
            words: Vec::new(),
            free: 0,
            first_word: usize::MAX,
        };
        for cluster in clusters.filter(|cluster| is_free(*cluster)) {
            map.set(cluster);
        }
        map.first_word = map.first_word.min(map.words.len());
        if map.free > 0 {
            self.with_free.insert(block);
        }
        self.free += map.free;
        self.maps.insert(block, map);
        while self.maps.contains_key(&self.known_below) {
            self.known_below += 1;
        }
    }

    /// Makes clusters free. Blocks that nobody has looked at learn it from their counts.
    pub(super) fn set_free(&mut self, start: u64, count: u64, entries: u64) {
        let mut cluster = start;
        while cluster < start + count {
            let block = cluster / entries;
            let end = (start + count).min((block + 1) * entries);
            if let Some(map) = self.maps.get_mut(&block) {
                for cluster in cluster..end {
                    map.set(cluster);
                }
                self.free += end - cluster;
                self.with_free.insert(block);
            }
            cluster = end;
        }
    }

    /// Takes the lowest free run of at most `count` clusters.
    pub(super) fn take(&mut self, count: u64) -> Option<(u64, u64)> {
        loop {
            let block = *self.with_free.first()?;
            let run = self.maps.get_mut(&block).and_then(|map| {
                let (start, run) = map.first_run(count)?;
                for cluster in start..start + run {
                    map.clear(cluster);
                }
                Some((start, run, map.free))
            });
            match run {
                Some((start, run, left)) => {
                    self.free -= run;
                    if left == 0 {
                        self.with_free.remove(&block);
                    }
                    return Some((start, run));
                }
                None => {
                    self.with_free.remove(&block);
                }
            }
        }
    }

    /// Takes the lowest run of exactly `count` clusters, which may span blocks.
    pub(super) fn take_contiguous(&mut self, count: u64, entries: u64) -> Option<u64> {
        let mut start = 0;
        let mut len = 0;
        'search: for block in &self.with_free {
            let Some(map) = self.maps.get(block) else {
                continue;
            };
            let words = map.words.iter().enumerate().skip(map.first_word);
            for (index, word) in words.filter(|(_, word)| **word != 0) {
                let base = map.base + u64::try_from(index).unwrap_or(0) * 64;
                for cluster in (base..base + 64).filter(|cluster| word >> (cluster - base) & 1 != 0)
                {
                    if len == 0 || start + len != cluster {
                        (start, len) = (cluster, 0);
                    }
                    len += 1;
                    if len == count {
                        break 'search;
                    }
                }
            }
        }
        if len < count {
            return None;
        }
        for cluster in start..start + count {
            let block = cluster / entries;
            if let Some(map) = self.maps.get_mut(&block) {
                map.clear(cluster);
                self.free -= 1;
                if map.free == 0 {
                    self.with_free.remove(&block);
                }
            }
        }
        Some(start)
    }

    pub(super) fn is_free(&self, cluster: u64, entries: u64) -> bool {
        self.maps
            .get(&(cluster / entries))
            .is_some_and(|map| map.is_set(cluster))
    }

    /// Forgets free clusters from `start` on: the file no longer holds them.
    pub(super) fn forget_from(&mut self, start: u64, entries: u64) {
        for (block, map) in self.maps.range_mut(start / entries..) {
            let from = start.max(map.base);
            let end = map.base + u64::try_from(map.words.len()).unwrap_or(0) * 64;
            self.free -= map.free;
            for cluster in from..end {
                map.clear(cluster);
            }
            self.free += map.free;
            if map.free == 0 {
                self.with_free.remove(block);
            }
        }
    }

    /// How many clusters are known to be free.
    pub(super) fn count(&self) -> u64 {
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_lowest_run_and_takes_it_back() {
        let mut maps = FreeMaps::default();
        assert_eq!(maps.first_unknown(2), Some(0));
        maps.learn(0, 0..256, |cluster| cluster >= 250);
        maps.learn(1, 256..512, |cluster| cluster < 260);
        assert_eq!(maps.first_unknown(2), None);
        assert_eq!(maps.take(4), Some((250, 4)));
        assert_eq!(maps.take(4), Some((254, 2)));
        assert_eq!(maps.take(9), Some((256, 4)));
        assert_eq!(maps.take(1), None);
        maps.set_free(251, 2, 256);
        assert!(maps.is_free(252, 256));
        maps.forget_from(252, 256);
        assert_eq!(maps.count(), 1);
        assert_eq!(maps.take(8), Some((251, 1)));
        assert_eq!(maps.take(8), None);
        assert_eq!(maps.count(), 0);
    }

    #[test]
    fn takes_a_run_across_blocks_or_none() {
        let mut maps = FreeMaps::default();
        maps.learn(0, 0..256, |cluster| cluster >= 253 || cluster == 100);
        maps.learn(1, 256..512, |cluster| cluster < 258);
        assert_eq!(maps.take_contiguous(6, 256), None);
        assert_eq!(maps.take_contiguous(4, 256), Some(253));
        assert_eq!(maps.take_contiguous(2, 256), None);
        assert_eq!(maps.count(), 2);
        assert_eq!(maps.take(2), Some((100, 1)));
        assert_eq!(maps.take(2), Some((257, 1)));
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn freeing_twice_is_a_broken_invariant() {
        let mut maps = FreeMaps::default();
        maps.learn(0, 0..64, |_| false);
        maps.set_free(3, 1, 64);
        maps.set_free(3, 1, 64);
    }
}
