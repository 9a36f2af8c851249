//! When requests completed, in short intervals: what shows a server that stops for a moment.
//!
//! Owns the counting and the file it is written to. Times are of CLOCK_MONOTONIC, so that whoever
//! gives commands to the server in the meantime can tell what happened when. Does not know what the
//! requests were.
//!
//! Invariant: all timelines of one run have the same start, so that their intervals line up.

use super::Error;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

/// Length of an interval.
const INTERVAL: Duration = Duration::from_millis(1);

/// What ended in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Interval {
    completions: u32,
    latency_max_us: u32,
    /// The longest time that one queue was without a completion before one in this interval.
    gap_max_us: u32,
}

/// The completions of some queues.
#[derive(Clone, Debug)]
pub(crate) struct Timeline {
    start: Instant,
    /// `start` on the clock that other processes can read.
    start_ns: u64,
    intervals: Vec<Interval>,
    first: Option<Instant>,
    /// The last completion of each queue; the start until there is one.
    last: Vec<Instant>,
}

impl Timeline {
    /// A timeline that starts now.
    pub(crate) fn new(queues: usize) -> Self {
        // Both are the same clock, but an `Instant` does not tell its value.
        let start = Instant::now();
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self {
            start,
            start_ns: seconds * 1_000_000_000 + nanoseconds,
            intervals: Vec::new(),
            first: None,
            last: vec![start; queues],
        }
    }

    /// A request of a queue, submitted at `submitted`, was found complete at `now`.
    pub(crate) fn note(&mut self, queue_index: usize, submitted: Instant, now: Instant) {
        let since_start = now.saturating_duration_since(self.start);
        let index = usize::try_from(since_start.as_nanos() / INTERVAL.as_nanos()).unwrap_or(0);
        if self.intervals.len() <= index {
            self.intervals.resize(index + 1, Interval::default());
        }
        let gap = now.saturating_duration_since(self.last[queue_index]);
        self.last[queue_index] = now;
        self.first.get_or_insert(now);
        let interval = &mut self.intervals[index];
        interval.completions += 1;
        let latency = micros(now.saturating_duration_since(submitted));
        interval.latency_max_us = interval.latency_max_us.max(latency);
        interval.gap_max_us = interval.gap_max_us.max(micros(gap));
    }

    /// Adds what another thread has noted, of other queues.
    pub(crate) fn merge(&mut self, other: &Self) {
        let length = self.intervals.len().max(other.intervals.len());
        self.intervals.resize(length, Interval::default());
        for (mine, theirs) in self.intervals.iter_mut().zip(&other.intervals) {
            mine.completions += theirs.completions;
            mine.latency_max_us = mine.latency_max_us.max(theirs.latency_max_us);
            mine.gap_max_us = mine.gap_max_us.max(theirs.gap_max_us);
        }
        self.first = [self.first, other.first].into_iter().flatten().min();
    }

    /// Writes all of it as one JSON object.
    pub(crate) fn save(&self, file: &Path) -> Result<(), Error> {
        let column = |value: fn(&Interval) -> u32| -> Vec<u32> {
            self.intervals.iter().map(value).collect()
        };
        let first_ns = self.first.map(|first| {
            let since_start = first.saturating_duration_since(self.start).as_nanos();
            self.start_ns + u64::try_from(since_start).unwrap_or(u64::MAX)
        });
        let value = json!({
            "clock": "CLOCK_MONOTONIC",
            "start_ns": self.start_ns,
            "interval_us": micros(INTERVAL),
            "first_completion_ns": first_ns,
            "completions": column(|interval| interval.completions),
            "latency_max_us": column(|interval| interval.latency_max_us),
            "gap_max_us": column(|interval| interval.gap_max_us),
        });
        std::fs::write(file, value.to_string())
            .map_err(Error::io(format!("writing {}", file.display())))
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn completions_are_counted_where_they_end_and_gaps_are_of_one_queue() {
        let mut timeline = Timeline::new(2);
        let start = timeline.start;
        let tick = MS / 2;
        timeline.note(0, start, start + tick);
        timeline.note(1, start, start + 3 * MS + tick);
        timeline.note(0, start + 2 * MS, start + 3 * MS + tick);
        let interval = |completions, latency_max_us, gap_max_us| Interval {
            completions,
            latency_max_us,
            gap_max_us,
        };
        assert_eq!(
            timeline.intervals,
            [
                interval(1, 500, 500),
                Interval::default(),
                Interval::default(),
                interval(2, 3500, 3500)
            ]
        );
        timeline.note(0, start + 4 * MS, start + 4 * MS);
        assert_eq!(timeline.intervals[4], interval(1, 0, 500));
        assert_eq!(timeline.first, Some(start + tick));
    }

    #[test]
    fn merging_adds_counts_and_keeps_the_worst() {
        let mut one = Timeline::new(1);
        let mut other = one.clone();
        let start = one.start;
        one.note(0, start, start + MS);
        other.note(0, start, start + MS + MS / 4);
        other.note(0, start, start + 2 * MS);
        one.merge(&other);
        assert_eq!(one.intervals.len(), 3);
        assert_eq!(one.intervals[1].completions, 2);
        assert_eq!(one.intervals[1].latency_max_us, 1250);
        assert_eq!(one.intervals[2].gap_max_us, 750);
        assert_eq!(one.first, Some(start + MS));
    }
}
