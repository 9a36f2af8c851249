//! The refcounts of the image beside the references that were found.

use super::Surveyor;
use crate::engine::check::count::GROUP_CLUSTERS;
use crate::engine::check::report::Severity;
use crate::engine::check::{Phase, Progress};
use crate::format::refcount;
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

impl<S: Storage> Surveyor<'_, S> {
    /// Compares the refcounts of the image with the references that were found.
    pub(super) async fn compare(&mut self, progress: &mut dyn FnMut(Progress)) {
        let per_block = self.geometry.refcount_block_entries();
        let cluster_size = self.geometry.cluster_size();
        let end = self.out.cluster_count;
        let mut block = AlignedBuf::zeroed(to_usize(cluster_size));
        let mut highest = 0;
        let mut compared = 0;
        for index in 0..self.out.reftable.len() {
            let first = to_u64(index) * per_block;
            if first >= end {
                break;
            }
            let entry = self.out.reftable[index];
            let Some(offset) = entry.block_offset().map(HostOffset::get) else {
                continue;
            };
            self.compare_missing(compared..first, &mut highest);
            let last = (first + per_block).min(end);
            compared = last;
            if !self.geometry.is_cluster_aligned(offset) {
                self.unreadable_refcounts(index, last - first);
                continue;
            }
            if offset >= self.source.len {
                self.compare_missing(first..last, &mut highest);
                continue;
            }
            let (result, back) = self.source.read(offset, block).await;
            block = back;
            if let Err(error) = result {
                log::warn!("cannot read refcount block {index} at {offset:#x}: {error}");
                self.unreadable_refcounts(index, last - first);
                continue;
            }
            self.compare_block(first..last, &block, &mut highest);
            progress(Progress {
                phase: Phase::Compare,
                done: last,
                total: end,
            });
        }
        self.compare_missing(compared..end, &mut highest);
        highest = highest.max(self.out.refs.end());
        self.out.report.image_end_offset = highest * cluster_size;
    }

    /// Reports refcounts that cannot be known, one error for each cluster as QEMU does.
    fn unreadable_refcounts(&mut self, index: usize, clusters: u64) {
        self.out.rebuild_needed = true;
        self.out.report.add(Severity::CheckError, clusters, || {
            format!("refcount block {index} cannot be read: {clusters} refcounts are unknown")
        });
    }

    /// Clusters without a refcount block have a refcount of zero.
    fn compare_missing(&mut self, clusters: std::ops::Range<u64>, highest: &mut u64) {
        let mut next = clusters.start;
        while let Some(cluster) = self.out.refs.next_used(next) {
            if cluster >= clusters.end {
                return;
            }
            self.out.rebuild_needed = true;
            self.compare_cluster(cluster, 0, highest);
            next = cluster + 1;
        }
    }

    /// Compares the refcounts of one block, group by group of the counts where that is possible.
    fn compare_block(&mut self, clusters: std::ops::Range<u64>, block: &[u8], highest: &mut u64) {
        let order = self.geometry.refcount_order();
        let mut from = clusters.start;
        // A block has whole groups.
        while from < clusters.end {
            let to = clusters.end.min(from + to_u64(GROUP_CLUSTERS));
            let places = to_usize(from - clusters.start)..to_usize(to - clusters.start);
            let equal = order == 4
                && self.out.refs.small_group(from).is_some_and(|counts| {
                    equal_counts(&block.as_chunks::<2>().0[places.clone()], &counts)
                });
            if !equal {
                for (cluster, place) in (from..to).zip(places) {
                    self.compare_cluster(cluster, refcount::get(block, order, place), highest);
                }
            }
            from = to;
        }
    }

    /// Compares one refcount with the references that were found.
    #[inline]
    fn compare_cluster(&mut self, cluster: u64, found: u64, highest: &mut u64) {
        let references = self.out.refs.get(cluster);
        if found != 0 || references != 0 {
            *highest = (*highest).max(cluster + 1);
        }
        if found != references {
            self.wrong_refcount(cluster, found, references);
        }
    }

    /// Reports a refcount that differs from the references.
    #[cold]
    fn wrong_refcount(&mut self, cluster: u64, found: u64, references: u64) {
        let wanted = references.min(self.geometry.refcount_max());
        self.corruption(references - wanted, || {
            format!("cluster {cluster} has {references} references, more than a refcount can say")
        });
        let severity = match found.cmp(&wanted) {
            std::cmp::Ordering::Equal => return,
            std::cmp::Ordering::Less => Severity::Corruption,
            std::cmp::Ordering::Greater => Severity::Leak,
        };
        self.out.report.add(severity, 1, || {
            format!("cluster {cluster} has refcount {found}, but {references} references")
        });
    }
}

/// Whether 16-bit refcounts equal these counts. No early end, so that the compiler can use vector
/// instructions.
fn equal_counts(refcounts: &[[u8; 2]], counts: &[u16]) -> bool {
    let pairs = refcounts.iter().zip(counts);
    pairs.fold(0, |bits, (raw, count)| {
        bits | (u16::from_be_bytes(*raw) ^ *count)
    }) == 0
}
