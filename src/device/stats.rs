//! Counters of each worker: operations, bytes, errors, latency.
//!
//! Written by the owning worker only, as relaxed stores (no atomic read-modify-write), in memory of
//! its own; read by the control side at any time. A snapshot is therefore not of one instant.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a latency histogram: bucket n counts latencies of [2^n, 2^(n+1)) nanoseconds.
pub const LATENCY_BUCKETS: usize = 40;

/// What a request is counted as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationKind {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Discard and write zeroes.
    Unmap,
    /// Device id, unknown and unreadable requests.
    Other,
}

impl OperationKind {
    /// All kinds, in the order of [`WorkerSnapshot::operations`].
    pub const ALL: [OperationKind; 5] = [
        OperationKind::Read,
        OperationKind::Write,
        OperationKind::Flush,
        OperationKind::Unmap,
        OperationKind::Other,
    ];
}

/// A counter with one writer.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    #[inline]
    fn add(&self, count: u64) {
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(count), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Operations {
    completed: Counter,
    failed: Counter,
    unsupported: Counter,
    bytes: Counter,
    total_ns: Counter,
    latency: [Counter; LATENCY_BUCKETS],
}

impl Default for Operations {
    fn default() -> Self {
        Self {
            completed: Counter::default(),
            failed: Counter::default(),
            unsupported: Counter::default(),
            bytes: Counter::default(),
            total_ns: Counter::default(),
            latency: std::array::from_fn(|_| Counter::default()),
        }
    }
}

/// One worker's counters.
#[derive(Debug, Default)]
pub(super) struct WorkerStats {
    operations: [Operations; OperationKind::ALL.len()],
    kicks: Counter,
    calls: Counter,
    slow: Counter,
    retried: Counter,
    sleeps: Counter,
    poll_hits: Counter,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    Done,
    Failed,
    Unsupported,
}

impl WorkerStats {
    pub(super) fn count(&self, kind: OperationKind, outcome: Outcome, bytes: u64, time: Duration) {
        let operations = &self.operations[kind as usize];
        match outcome {
            Outcome::Done => {
                operations.completed.add(1);
                operations.bytes.add(bytes);
            }
            Outcome::Failed => operations.failed.add(1),
            Outcome::Unsupported => operations.unsupported.add(1),
        }
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        operations.total_ns.add(nanoseconds);
        operations.latency[bucket(nanoseconds)].add(1);
    }

    pub(super) fn count_kick(&self) {
        self.kicks.add(1);
    }

    pub(super) fn count_call(&self) {
        self.calls.add(1);
    }

    pub(super) fn count_slow(&self) {
        self.slow.add(1);
    }

    pub(super) fn count_retry(&self) {
        self.retried.add(1);
    }

    pub(super) fn count_sleep(&self) {
        self.sleeps.add(1);
    }

    pub(super) fn count_poll_hit(&self) {
        self.poll_hits.add(1);
    }

    /// The counters now.
    #[must_use]
    pub(super) fn snapshot(&self) -> WorkerSnapshot {
        WorkerSnapshot {
            operations: std::array::from_fn(|index| {
                let operations = &self.operations[index];
                OperationSnapshot {
                    completed: operations.completed.get(),
                    failed: operations.failed.get(),
                    unsupported: operations.unsupported.get(),
                    bytes: operations.bytes.get(),
                    total_ns: operations.total_ns.get(),
                    latency: std::array::from_fn(|bucket| operations.latency[bucket].get()),
                }
            }),
            kicks: self.kicks.get(),
            calls: self.calls.get(),
            slow: self.slow.get(),
            retried: self.retried.get(),
            sleeps: self.sleeps.get(),
            poll_hits: self.poll_hits.get(),
        }
    }
}

/// floor(log2), with everything too long in the last bucket.
fn bucket(nanoseconds: u64) -> usize {
    let log2 = nanoseconds.max(1).ilog2();
    usize::try_from(log2).map_or(LATENCY_BUCKETS - 1, |log2| log2.min(LATENCY_BUCKETS - 1))
}

/// Counters of one kind of operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationSnapshot {
    /// Requests answered with success.
    pub completed: u64,
    /// Requests answered with an I/O error.
    pub failed: u64,
    /// Requests answered as unsupported.
    pub unsupported: u64,
    /// Bytes of the successful ones.
    pub bytes: u64,
    /// Sum of all latencies in nanoseconds.
    pub total_ns: u64,
    /// Latencies; bucket n counts [2^n, 2^(n+1)) nanoseconds.
    pub latency: [u64; LATENCY_BUCKETS],
}

/// One worker's counters at about one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSnapshot {
    /// In the order of [`OperationKind::ALL`].
    pub operations: [OperationSnapshot; OperationKind::ALL.len()],
    /// Notifications from drivers.
    pub kicks: u64,
    /// Notifications to drivers.
    pub calls: u64,
    /// Requests that took the asynchronous path.
    pub slow: u64,
    /// Requests whose direct I/O failed or was short, and that went through the engine again.
    pub retried: u64,
    /// Times the worker went to sleep.
    pub sleeps: u64,
    /// Times polling found work before the worker went to sleep.
    pub poll_hits: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_the_bucket_of_their_binary_order() {
        let buckets = [0, 1, 2, 3, 4, 1023, 1024, u64::MAX].map(bucket);
        assert_eq!(buckets, [0, 0, 1, 1, 2, 9, 10, LATENCY_BUCKETS - 1]);
    }

    #[test]
    fn a_snapshot_holds_what_was_counted() {
        let stats = WorkerStats::default();
        stats.count(
            OperationKind::Write,
            Outcome::Done,
            4096,
            Duration::from_nanos(1500),
        );
        stats.count(
            OperationKind::Write,
            Outcome::Failed,
            512,
            Duration::from_nanos(1),
        );
        let write = &stats.snapshot().operations[OperationKind::Write as usize];
        assert_eq!(
            (write.completed, write.failed, write.bytes, write.total_ns),
            (1, 1, 4096, 1501)
        );
        assert_eq!((write.latency[10], write.latency[0]), (1, 1));
    }
}
