//! Taken clusters: guest clusters that one request is allocating, copying or discarding.
//!
//! Who wants a taken cluster waits for its event; in-place requests do not look here at all.
//! Taking happens under the lock of the L2 slice that maps the cluster, so that the entry cannot
//! change between looking and taking. Several clusters are taken in ascending order and all or
//! none, so that two requests cannot wait for each other.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use event_listener::{Event, EventListener};

use super::error::lock;
use super::order::keeps;
use crate::engine::sync::Mutex;

/// Taken guest clusters of one image. A request's clusters all lie in one slice.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    shards: [Mutex<HashMap<u64, Arc<Event>>>; 16],
}

impl Taken {
    /// All clusters of one L2 slice share a shard: a slice is at least 64 clusters.
    fn shard(&self, guest_cluster: u64) -> &Mutex<HashMap<u64, Arc<Event>>> {
        let index = usize::try_from((guest_cluster >> 6) % 16).unwrap_or(0);
        &self.shards[index]
    }

    /// Takes a whole range, or says whom to wait for.
    pub(crate) fn try_take(
        self: &Arc<Self>,
        clusters: Range<u64>,
    ) -> Result<TakenGuard, EventListener> {
        let event = Arc::new(Event::new());
        if !keeps!(TakeBeforeChange) {
            let clusters = clusters.start..clusters.start;
            return Ok(TakenGuard {
                taken: Arc::clone(self),
                clusters,
                event,
            });
        }
        for cluster in clusters.clone() {
            let mut shard = lock(self.shard(cluster));
            if let Some(other) = shard.get(&cluster) {
                let listener = other.listen();
                drop(shard);
                self.give_back(clusters.start..cluster, &event);
                return Err(listener);
            }
            shard.insert(cluster, Arc::clone(&event));
        }
        Ok(TakenGuard {
            taken: Arc::clone(self),
            clusters,
            event,
        })
    }

    /// What is taken of a range, in no order.
    pub(crate) fn within(&self, clusters: &Range<u64>) -> Vec<u64> {
        let shards = self.shards.iter();
        shards
            .flat_map(|shard| {
                let shard = lock(shard);
                let taken = shard.keys().filter(|cluster| clusters.contains(cluster));
                taken.copied().collect::<Vec<_>>()
            })
            .collect()
    }

    /// Tells when a cluster is given back; `None` if nobody has it.
    pub(crate) fn listen(&self, cluster: u64) -> Option<EventListener> {
        lock(self.shard(cluster))
            .get(&cluster)
            .map(|event| event.listen())
    }

    fn give_back(&self, clusters: Range<u64>, event: &Event) {
        for cluster in clusters {
            lock(self.shard(cluster)).remove(&cluster);
        }
        event.notify(usize::MAX);
    }
}

/// Gives the clusters back when dropped.
#[derive(Debug)]
pub(crate) struct TakenGuard {
    taken: Arc<Taken>,
    clusters: Range<u64>,
    event: Arc<Event>,
}

impl TakenGuard {
    /// Keeps only the first `count` clusters.
    pub(crate) fn truncate(&mut self, count: u64) {
        let end = self.clusters.end.min(self.clusters.start + count);
        let rest = end..self.clusters.end;
        self.clusters.end = end;
        self.taken.give_back(rest, &self.event);
    }
}

impl Drop for TakenGuard {
    fn drop(&mut self) {
        self.taken.give_back(self.clusters.clone(), &self.event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_cluster_is_refused_until_it_is_given_back() {
        let taken = Arc::new(Taken::default());
        let mut first = taken.try_take(60..70).expect("free");
        assert!(taken.try_take(69..71).is_err());
        first.truncate(5);
        assert_eq!(taken.within(&(64..100)), [64]);
        assert!(taken.listen(64).is_some() && taken.listen(65).is_none());
        let second = taken.try_take(65..71).expect("given back by truncate");
        assert!(taken.try_take(64..65).is_err());
        drop(first);
        assert!(taken.try_take(60..65).is_ok());
        drop(second);
        assert!(taken.shards.iter().all(|shard| lock(shard).is_empty()));
    }
}
