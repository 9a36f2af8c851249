//! Which clusters have exactly one reference: a bitmap of what refcount blocks have said.
//!
//! Where an image lies in no order each table names clusters of all refcount blocks. So a block is
//! read once for all tables, and what it says is kept, as long as there is memory; beyond that each
//! question is a read.
//!
//! A yes stays true while nothing but requests and their flushes changes counts, until the cluster is
//! freed: they give new clusters one reference, and take references away. A no may be old news: of a
//! cluster that was allocated since. Who keeps this empties it before counts are raised.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::engine::error::Error;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::geometry::Geometry;
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Memory of the bitmap: 48 Mi clusters.
const BYTES_MAX: usize = 6 << 20;
/// Fewest clusters that are looked at together, so that small refcount blocks are read in one go.
const GROUP_MIN: u64 = 1 << 15;
/// Bytes of refcount blocks that one step reads (at least one group).
const LEARNT_BYTES: u64 = 4 << 20;
/// Reads in flight at a time.
const READS_IN_FLIGHT: usize = 8;

/// See the module text.
#[derive(Debug)]
pub(super) struct Alone {
    /// By group of clusters, one bit each; `None` is not known.
    groups: Vec<Option<Box<[u64]>>>,
    bytes: usize,
    limits: AloneLimits,
}

/// How much of everything: smaller in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct AloneLimits {
    /// Memory of the bitmap.
    pub(super) bytes_max: usize,
    /// Fewest clusters of a group.
    pub(super) group_min: u64,
    /// Bytes of refcount blocks that are read at once.
    pub(super) learnt_bytes: u64,
}

impl Default for Alone {
    fn default() -> Self {
        Self {
            groups: Vec::new(),
            bytes: 0,
            limits: AloneLimits {
                bytes_max: BYTES_MAX,
                group_min: GROUP_MIN,
                learnt_bytes: LEARNT_BYTES,
            },
        }
    }
}

/// What a look at refcount blocks has come to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Learnt {
    /// Bytes that were read.
    pub(super) bytes: u64,
    /// All that there is memory for is known.
    pub(super) complete: bool,
}

impl Alone {
    #[cfg(test)]
    pub(super) fn limit(&mut self, limits: AloneLimits) {
        self.forget();
        self.limits = limits;
    }

    /// Clusters of a group, as a power of two: whole refcount blocks.
    fn group_bits(&self, geometry: Geometry) -> u32 {
        let clusters = geometry.refcount_block_entries().max(self.limits.group_min);
        clusters.trailing_zeros()
    }

    /// Nothing is known any more.
    pub(super) fn forget(&mut self) {
        self.groups = Vec::new();
        self.bytes = 0;
    }

    fn is_known(&self, group: usize) -> bool {
        self.groups.get(group).is_some_and(Option::is_some)
    }

    /// What is known of a cluster, by [`Self::group_bits`].
    #[inline]
    fn get(&self, group_bits: u32, cluster: u64) -> Option<bool> {
        let group = to_usize(cluster >> group_bits);
        let bits = self.groups.get(group)?.as_ref()?;
        let at = to_usize(cluster & ((1 << group_bits) - 1));
        Some(bits.get(at / 64)? >> (at % 64) & 1 == 1)
    }
}

impl<S: Storage> Worker<S> {
    /// Finds out about these clusters and their neighbours, some megabytes of refcount blocks at a
    /// time. Call it again where that was not all.
    pub(super) async fn learn_alone(
        &self,
        target: Target<'_>,
        alone: &mut Alone,
        clusters: impl Iterator<Item = u64>,
    ) -> Result<Learnt, Error> {
        let geometry = target.mapping.geometry;
        let allocator = &target.active.allocator;
        let group_bits = alone.group_bits(geometry);
        let per_group = 1_u64 << group_bits;
        let group_bytes = to_usize(per_group.div_ceil(64) * 8);
        let read_bytes = per_group / geometry.refcount_block_entries() * geometry.cluster_size();
        let most = to_usize((alone.limits.learnt_bytes / read_bytes).max(1));
        let room = alone.limits.bytes_max.saturating_sub(alone.bytes) / group_bytes;
        let mut wanted = BTreeSet::new();
        let mut complete = true;
        let mut last = u64::MAX;
        for cluster in clusters {
            let group = cluster >> group_bits;
            if group == last {
                continue;
            }
            last = group;
            if alone.is_known(to_usize(group)) || wanted.contains(&group) || wanted.len() >= room {
                continue;
            }
            if wanted.len() >= most {
                complete = false;
                break;
            }
            wanted.insert(group);
        }
        let learnt: Vec<(u64, Box<[u64]>)> = stream::iter(&wanted)
            .map(|group| async move {
                let first = group * per_group;
                let bits = allocator
                    .one_reference_bits(&self.storage, first..first + per_group)
                    .await?;
                Ok::<_, Error>((*group, bits))
            })
            .buffered(READS_IN_FLIGHT)
            .try_collect()
            .await?;
        for (group, bits) in learnt {
            let group = to_usize(group);
            if alone.groups.len() <= group {
                alone.groups.resize_with(group + 1, || None);
            }
            if let Some(slot) = alone.groups.get_mut(group) {
                *slot = Some(bits);
                alone.bytes += group_bytes;
            }
        }
        Ok(Learnt {
            bytes: to_u64(wanted.len()) * read_bytes,
            complete,
        })
    }

    /// For each cluster, in any order, whether it has one reference: from what is known of it, else
    /// from its refcount block. A no may be old.
    pub(super) async fn are_alone(
        &self,
        target: Target<'_>,
        alone: &Alone,
        clusters: &[u64],
    ) -> Result<Vec<bool>, Error> {
        let group_bits = alone.group_bits(target.mapping.geometry);
        let mut said = vec![false; clusters.len()];
        let mut unknown: Vec<(u64, usize)> = Vec::new();
        for (index, (cluster, said)) in clusters.iter().zip(&mut said).enumerate() {
            match alone.get(group_bits, *cluster) {
                Some(known) => *said = known,
                None => unknown.push((*cluster, index)),
            }
        }
        self.ask_blocks(target, unknown, &mut said).await?;
        Ok(said)
    }

    /// As [`Self::are_alone`], but every no is of now.
    pub(super) async fn are_alone_now(
        &self,
        target: Target<'_>,
        alone: &Alone,
        clusters: &[u64],
    ) -> Result<Vec<bool>, Error> {
        let group_bits = alone.group_bits(target.mapping.geometry);
        let mut said = vec![true; clusters.len()];
        let doubtful = |cluster| alone.get(group_bits, cluster) != Some(true);
        let unknown = (clusters.iter().copied().zip(0..))
            .filter(|(cluster, _)| doubtful(*cluster))
            .collect();
        self.ask_blocks(target, unknown, &mut said).await?;
        Ok(said)
    }

    /// Asks refcount blocks about these clusters, and puts the answers at their indices.
    async fn ask_blocks(
        &self,
        target: Target<'_>,
        mut unknown: Vec<(u64, usize)>,
        said: &mut [bool],
    ) -> Result<(), Error> {
        unknown.sort_unstable();
        let clusters: Vec<u64> = unknown.iter().map(|(cluster, _)| *cluster).collect();
        let allocator = &target.active.allocator;
        let found = allocator
            .have_one_reference(&self.storage, &clusters)
            .await?;
        for ((_, index), found) in unknown.into_iter().zip(found) {
            if let Some(slot) = said.get_mut(index) {
                *slot = found;
            }
        }
        Ok(())
    }
}
