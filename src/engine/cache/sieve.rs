//! A keyed collection with constant-time eviction (CLOCK over a slab, as SIEVE does it: a hit
//! only sets a mark, nothing moves).

use std::collections::HashMap;

/// What the owner says about a value that the hand points at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Take it out.
    Evict,
    /// In use, or used since the hand last passed.
    Keep,
}

/// How many values one insertion may pass over. Beyond it the budget is exceeded for a while
/// rather than scanned for.
const STEPS_MAX: usize = 64;

/// Values by key, evicted in the order of a clock hand.
#[derive(Debug)]
pub(crate) struct Sieve<V> {
    slots: Vec<Option<(u64, V)>>,
    index: HashMap<u64, usize>,
    free: Vec<usize>,
    hand: usize,
}

impl<V> Default for Sieve<V> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            index: HashMap::new(),
            free: Vec::new(),
            hand: 0,
        }
    }
}

impl<V> Sieve<V> {
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn get(&self, key: u64) -> Option<&V> {
        self.slots
            .get(*self.index.get(&key)?)?
            .as_ref()
            .map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        self.slots
            .get_mut(*self.index.get(&key)?)?
            .as_mut()
            .map(|(_, value)| value)
    }

    /// Inserts a value whose key is not there yet.
    pub(crate) fn insert(&mut self, key: u64, value: V) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let old = self.index.insert(key, slot);
        assert!(old.is_none(), "cache key {key:#x} inserted twice");
        self.slots[slot] = Some((key, value));
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<V> {
        let slot = self.index.remove(&key)?;
        let (_, value) = self.slots[slot].take()?;
        self.free.push(slot);
        Some(value)
    }

    /// Moves the hand until `judge` lets a value go, at most [`STEPS_MAX`] values far.
    pub(crate) fn evict(&mut self, mut judge: impl FnMut(&mut V) -> Verdict) -> Option<V> {
        for _ in 0..STEPS_MAX.min(self.slots.len()) {
            self.hand = if self.hand + 1 < self.slots.len() {
                self.hand + 1
            } else {
                0
            };
            let Some((key, value)) = self.slots[self.hand].as_mut() else {
                continue;
            };
            if judge(value) == Verdict::Evict {
                let key = *key;
                return self.remove(key);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_what_was_not_used_and_gives_up_in_bounded_steps() {
        let mut sieve = Sieve::default();
        for key in 0..1000_u64 {
            sieve.insert(key, key == 7);
        }
        let mut judged = 0;
        let none = sieve.evict(|_| {
            judged += 1;
            Verdict::Keep
        });
        assert!(none.is_none());
        assert_eq!(judged, STEPS_MAX);
        for _ in 0..999 {
            let mut gone = None;
            while gone.is_none() {
                gone = sieve.evict(|keep| if *keep { Verdict::Keep } else { Verdict::Evict });
            }
        }
        assert_eq!(sieve.len(), 1);
        assert_eq!(sieve.get(7), Some(&true));
        assert_eq!(sieve.remove(7), Some(true));
        sieve.insert(7, false);
        assert_eq!(sieve.len(), 1);
    }
}
