//! The load generator: a fixed number of requests in flight on each queue, latencies, rates.
//!
//! Data is neither generated nor looked at while the clock runs: the client must cost far less than
//! the server it measures. Latency is from just before the kick to the reaping of the completion,
//! with one reading of the clock per batch.

use super::disk::{Completion, ConnectOptions, Disk, Kind, Queue, STATUS_OK, Waiter, Watchdog};
use super::remote::Remote;
use super::server_cpu::CpuSample;
use super::timeline::Timeline;
use super::{Error, SECTOR_BYTES};
use fastrand::Rng;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Longest latency that is told apart from longer ones.
const LATENCY_MAX_NS: u64 = 600_000_000_000;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    Randread,
    /// Random writes, any block any number of times.
    Randwrite,
    /// Random reads and writes mixed.
    Randrw,
    /// Every block once, in random order: on a fresh image each write allocates.
    AllocWrite,
    /// Every block once, ascending.
    AllocWriteSeq,
    /// A random write, then a flush, then the next write.
    WriteFlush,
}

/// How to run.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) connect: ConnectOptions,
    pub(crate) pattern: Pattern,
    /// Reads among 100 requests of `randrw`.
    pub(crate) read_percent: u32,
    pub(crate) block_bytes: usize,
    /// Distance of the places where blocks are; more than a block leaves gaps.
    pub(crate) stride_bytes: u64,
    /// Bytes of the disk that are used.
    pub(crate) region: Range<u64>,
    pub(crate) threads: usize,
    /// Spin for completions instead of sleeping.
    pub(crate) poll: bool,
    /// Not measured time before the run.
    pub(crate) ramp: Duration,
    pub(crate) runtime: Duration,
    /// Ends the run after that many requests in all.
    pub(crate) requests_max: u64,
    /// Requests per second, in all; 0: as fast as possible.
    pub(crate) rate: u64,
    pub(crate) seed: u64,
    pub(crate) server_pid: Option<u32>,
    /// Writes down when requests completed, in this file; the ramp too.
    pub(crate) timeline: Option<PathBuf>,
    /// What another process may change while the load runs.
    pub(crate) remote: Option<Arc<Remote>>,
}

/// Where the next request goes.
enum Order {
    Random,
    /// Ascending from the current block, wrapping if `bool`.
    Ascending(bool),
    /// Each block once: the states of a full-period generator modulo a power of two.
    Permutation {
        state: u64,
        first: u64,
        mask: u64,
        started: bool,
    },
}

/// Picks the offsets of one queue.
struct Cursor {
    /// All blocks that it may ever pick, in units of strides.
    all: Range<u64>,
    /// Those of them that it picks now.
    blocks: Range<u64>,
    next: u64,
    order: Order,
    rng: Rng,
}

impl Cursor {
    fn new(pattern: Pattern, blocks: Range<u64>, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let order = match pattern {
            Pattern::Read | Pattern::Write => Order::Ascending(true),
            Pattern::AllocWriteSeq => Order::Ascending(false),
            Pattern::AllocWrite => {
                let mask = (blocks.end - blocks.start).next_power_of_two() - 1;
                let first = rng.u64(..) & mask;
                Order::Permutation {
                    state: first,
                    first,
                    mask,
                    started: false,
                }
            }
            _ => Order::Random,
        };
        Self {
            next: blocks.start,
            all: blocks.clone(),
            blocks,
            order,
            rng,
        }
    }

    /// From now on only blocks of this part of the disk, in bytes; all, if it holds none. Random
    /// patterns only: the others go on where they are.
    fn confine(&mut self, region: &Range<u64>, stride_bytes: u64) {
        let start = region.start.div_ceil(stride_bytes).max(self.all.start);
        let end = (region.end / stride_bytes).min(self.all.end);
        if matches!(self.order, Order::Random) {
            self.blocks = if start < end {
                start..end
            } else {
                self.all.clone()
            };
        }
    }

    /// The next block; `None` when each had its turn.
    fn next(&mut self) -> Option<u64> {
        match &mut self.order {
            Order::Random => Some(self.rng.u64(self.blocks.clone())),
            Order::Ascending(wrap) => {
                if self.next == self.blocks.end {
                    if !*wrap {
                        return None;
                    }
                    self.next = self.blocks.start;
                }
                self.next += 1;
                Some(self.next - 1)
            }
            Order::Permutation {
                state,
                first,
                mask,
                started,
            } => loop {
                if *started && *state == *first {
                    return None;
                }
                *started = true;
                let block = self.blocks.start + *state;
                // Full period: odd increment, multiplier 1 modulo 4 (Hull and Dobell).
                *state = state
                    .wrapping_mul(0x5851_f42d_4c95_7f2d)
                    .wrapping_add(0x1405_7b7e_f767_814f)
                    & *mask;
                if block < self.blocks.end {
                    return Some(block);
                }
            },
        }
    }
}

/// What one thread measured.
struct Measured {
    read: Histogram<u64>,
    write: Histogram<u64>,
    flush: Histogram<u64>,
    errors: u64,
    first_bad_status: u8,
    longest_gap: Duration,
    last_completion: Instant,
    timeline: Option<Timeline>,
}

impl Measured {
    fn new(start: Instant, timeline: Option<Timeline>) -> Result<Self, Error> {
        let histogram = || {
            Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3)
                .map_err(|error| Error::Usage(error.to_string()))
        };
        Ok(Self {
            read: histogram()?,
            write: histogram()?,
            flush: histogram()?,
            errors: 0,
            first_bad_status: STATUS_OK,
            longest_gap: Duration::ZERO,
            last_completion: start,
            timeline,
        })
    }

    fn merge(&mut self, other: &Self) {
        // All histograms have the same bounds, so that adding cannot fail.
        let _ = self.read.add(&other.read);
        let _ = self.write.add(&other.write);
        let _ = self.flush.add(&other.flush);
        self.errors += other.errors;
        self.first_bad_status = self.first_bad_status.max(other.first_bad_status);
        self.longest_gap = self.longest_gap.max(other.longest_gap);
        self.last_completion = self.last_completion.max(other.last_completion);
        if let (Some(mine), Some(theirs)) = (&mut self.timeline, &other.timeline) {
            mine.merge(theirs);
        }
    }
}

/// When measuring starts and submitting ends.
#[derive(Clone, Copy)]
struct Schedule {
    measure_from: Instant,
    submit_until: Instant,
}

/// Runs the load; returns the figures as JSON.
pub(crate) fn run(options: &Options) -> Result<Value, Error> {
    let (disk, mut queues) = Disk::connect(&options.connect)?;
    let blocks = block_range(options, &disk)?;
    let queue_count = queues.len();
    let mut cursors = cursors(options, &blocks, queue_count);
    for queue in &queues {
        let mut noise = vec![0; queue.slot_bytes()];
        let mut rng = Rng::with_seed(options.seed);
        for slot in 0..queue.slots() {
            rng.fill(&mut noise);
            queue.write_slot(slot, 0, &noise);
        }
    }

    // All threads' timelines are copies of this one: they start at the same time.
    let timeline = options
        .timeline
        .is_some()
        .then(|| Timeline::new(queue_count));
    let start = Instant::now();
    let measure_from = start + options.ramp;
    let schedule = Schedule {
        measure_from,
        submit_until: measure_from + options.runtime,
    };
    let threads = options.threads.clamp(1, queue_count);
    let (done, finished) = mpsc::channel::<()>();
    let (mut measured, cpu, end) = std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for thread in 0..threads {
            let share = (queues.len()).div_ceil(threads - thread);
            let mine: Vec<Queue> = queues.drain(..share).collect();
            let cursors: Vec<Cursor> = cursors.drain(..share).collect();
            let (disk, done, timeline) = (&disk, done.clone(), timeline.clone());
            handles.push(scope.spawn(move || {
                let result = Worker::new(options, mine, cursors, threads, schedule, timeline)
                    .and_then(|worker| worker.run(disk));
                drop(done);
                result
            }));
        }
        drop(done);
        // The server's CPU time is taken while it is under load, without ramp and drain.
        let wait = |until: Instant| {
            let timeout = until.saturating_duration_since(Instant::now());
            matches!(
                finished.recv_timeout(timeout),
                Err(mpsc::RecvTimeoutError::Timeout)
            )
        };
        let sample = || options.server_pid.map(CpuSample::read).transpose();
        let mut cpu_before = Ok(None);
        let mut running = wait(schedule.measure_from);
        if running {
            cpu_before = sample();
            running = wait(schedule.submit_until);
        }
        let cpu_after = sample();
        let end = if running { Some(Instant::now()) } else { None };
        let mut measured = Measured::new(schedule.measure_from, timeline)?;
        for handle in handles {
            let Ok(part) = handle.join() else {
                return Err(Error::Protocol("a client thread panicked".to_owned()));
            };
            let part = part?;
            measured.merge(&part);
        }
        let cpu = match (cpu_before?, cpu_after?) {
            (Some(before), Some(after)) => Some(after.since(&before)),
            _ => None,
        };
        Ok::<_, Error>((measured, cpu, end))
    })?;
    // A run that ended by itself lasted until its last completion.
    let end = end.unwrap_or(measured.last_completion);
    let elapsed = end.saturating_duration_since(schedule.measure_from);
    if let (Some(timeline), Some(file)) = (&measured.timeline, &options.timeline) {
        timeline.save(file)?;
    }
    Ok(report(options, &mut measured, elapsed, cpu))
}

/// The blocks of the region that the disk has.
fn block_range(options: &Options, disk: &Disk) -> Result<Range<u64>, Error> {
    let capacity_bytes = disk.geometry.capacity_sectors * SECTOR_BYTES as u64;
    let stride_bytes = options.stride_bytes;
    let is_whole = |bytes: u64| bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES as u64);
    if !is_whole(options.block_bytes as u64) || !is_whole(stride_bytes) {
        return Err(Error::Usage(
            "block and stride are multiples of 512 bytes".to_owned(),
        ));
    }
    if stride_bytes < options.block_bytes as u64 {
        return Err(Error::Usage("the stride is less than a block".to_owned()));
    }
    let blocks = options.region.start.div_ceil(stride_bytes)
        ..options.region.end.min(capacity_bytes) / stride_bytes;
    if blocks.is_empty() {
        return Err(Error::Usage(format!(
            "no block of {stride_bytes} bytes in the region"
        )));
    }
    Ok(blocks)
}

/// One cursor per queue. Ordered patterns give each queue its own part of the region.
fn cursors(options: &Options, blocks: &Range<u64>, queues: usize) -> Vec<Cursor> {
    let count = blocks.end - blocks.start;
    let queues = queues as u64;
    (0..queues)
        .map(|queue| {
            let part = match options.pattern {
                Pattern::Randread | Pattern::Randwrite | Pattern::Randrw | Pattern::WriteFlush => {
                    blocks.clone()
                }
                _ => {
                    blocks.start + count * queue / queues
                        ..blocks.start + count * (queue + 1) / queues
                }
            };
            let seed = options.seed.wrapping_mul(1_000_003).wrapping_add(queue);
            Cursor::new(options.pattern, part, seed)
        })
        .collect()
}

/// What a slot is doing.
#[derive(Clone, Copy)]
struct SlotState {
    kind: Kind,
    submitted: Instant,
}

/// One client thread.
struct Worker<'a> {
    options: &'a Options,
    queues: Vec<Queue>,
    cursors: Vec<Cursor>,
    slots: Vec<Vec<SlotState>>,
    /// Slots without a request, while a rate limits us.
    idle: Vec<(usize, usize)>,
    schedule: Schedule,
    measured: Measured,
    requests_left: u64,
    /// Time between two requests of this thread, if the rate is limited.
    interval: Option<Duration>,
    next_due: Instant,
    /// The state of the remote control that the cursors follow.
    remote_version: u64,
}

impl<'a> Worker<'a> {
    fn new(
        options: &'a Options,
        queues: Vec<Queue>,
        cursors: Vec<Cursor>,
        threads: usize,
        schedule: Schedule,
        timeline: Option<Timeline>,
    ) -> Result<Self, Error> {
        let now = Instant::now();
        let idle = SlotState {
            kind: Kind::Flush,
            submitted: now,
        };
        let threads = threads as u64;
        let rate = options.rate / threads;
        Ok(Self {
            slots: queues
                .iter()
                .map(|queue| vec![idle; queue.slots()])
                .collect(),
            idle: Vec::new(),
            queues,
            cursors,
            schedule,
            measured: Measured::new(schedule.measure_from, timeline)?,
            remote_version: 0,
            requests_left: options.requests_max.div_ceil(threads),
            interval: (rate > 0).then(|| Duration::from_nanos(1_000_000_000 / rate)),
            next_due: now,
            options,
        })
    }

    fn run(mut self, disk: &Disk) -> Result<Measured, Error> {
        let waiter = Waiter::new(&self.queues)?;
        let mut watchdog = Watchdog::new();
        let mut completed: Vec<Completion> = Vec::with_capacity(1024);
        let mut spins = 0_u32;
        for queue_index in 0..self.queues.len() {
            for slot in 0..self.queues[queue_index].slots() {
                self.start(queue_index, slot, Instant::now())?;
            }
            self.queues[queue_index].kick()?;
        }
        loop {
            let mut in_flight = 0;
            let mut progress = false;
            for queue_index in 0..self.queues.len() {
                self.queues[queue_index].reap(&mut completed)?;
                if !completed.is_empty() {
                    progress = true;
                    let now = Instant::now();
                    watchdog.progress(now);
                    self.note_gap(now);
                    for completion in completed.drain(..) {
                        self.finish(queue_index, completion, now)?;
                    }
                    self.queues[queue_index].kick()?;
                }
                in_flight += self.queues[queue_index].in_flight();
            }
            if progress {
                continue;
            }
            let timeout_ms = self.start_due(in_flight == 0)?;
            if in_flight == 0 && timeout_ms == Some(0) {
                return Ok(self.measured);
            }
            if self.options.poll && in_flight > 0 {
                std::hint::spin_loop();
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(1 << 16) {
                    watchdog.check(disk, in_flight)?;
                }
            } else {
                waiter.wait(&mut self.queues, timeout_ms.unwrap_or(100))?;
                watchdog.check(disk, in_flight)?;
            }
        }
    }

    /// Starts what a limited rate allows by now. Returns how long to wait at most: `Some(0)` if
    /// nothing will ever be due again.
    fn start_due(&mut self, none_in_flight: bool) -> Result<Option<i32>, Error> {
        let Some(interval) = self.interval else {
            return Ok(none_in_flight.then_some(0));
        };
        let now = Instant::now();
        if self.is_over(now) {
            self.idle.clear();
            return Ok(none_in_flight.then_some(0));
        }
        while now >= self.next_due
            && let Some((queue_index, slot)) = self.idle.pop()
        {
            self.next_due += interval;
            self.submit(queue_index, slot, now)?;
            self.queues[queue_index].kick()?;
        }
        let wait = self
            .next_due
            .saturating_duration_since(now)
            .as_millis()
            .clamp(1, 100);
        Ok(Some(i32::try_from(wait).unwrap_or(1)))
    }

    /// Whether no request is to be started any more.
    fn is_over(&self, now: Instant) -> bool {
        let remote = self.options.remote.as_ref();
        now >= self.schedule.submit_until
            || self.requests_left == 0
            || remote.is_some_and(|remote| remote.is_over())
    }

    /// Moves the cursors to where the remote control wants them.
    fn follow_remote(&mut self) {
        let Some(remote) = &self.options.remote else {
            return;
        };
        let version = remote.version();
        if version == self.remote_version {
            return;
        }
        self.remote_version = version;
        let region = remote.region();
        for cursor in &mut self.cursors {
            cursor.confine(&region, self.options.stride_bytes);
        }
    }

    fn note_gap(&mut self, now: Instant) {
        if now > self.schedule.measure_from {
            let gap = now.saturating_duration_since(self.measured.last_completion);
            self.measured.longest_gap = self.measured.longest_gap.max(gap);
            self.measured.last_completion = now;
        }
    }

    /// Records a completion and gives its slot the next request.
    fn finish(
        &mut self,
        queue_index: usize,
        completion: Completion,
        now: Instant,
    ) -> Result<(), Error> {
        let state = self.slots[queue_index][completion.slot];
        if completion.status != STATUS_OK {
            self.measured.errors += 1;
            self.measured.first_bad_status = completion.status;
        }
        if let Some(timeline) = &mut self.measured.timeline {
            timeline.note(queue_index, state.submitted, now);
        }
        let measured = now > self.schedule.measure_from && now <= self.schedule.submit_until;
        if measured {
            let elapsed = now.saturating_duration_since(state.submitted).as_nanos();
            let ns = u64::try_from(elapsed).unwrap_or(u64::MAX).max(1);
            match state.kind {
                Kind::Read => self.measured.read.saturating_record(ns),
                Kind::Flush => self.measured.flush.saturating_record(ns),
                _ => self.measured.write.saturating_record(ns),
            }
        }
        if self.options.pattern == Pattern::WriteFlush && state.kind == Kind::Write {
            self.queues[queue_index].submit(completion.slot, Kind::Flush, 0, &[])?;
            self.slots[queue_index][completion.slot] = SlotState {
                kind: Kind::Flush,
                submitted: now,
            };
            return Ok(());
        }
        self.start(queue_index, completion.slot, now)
    }

    /// Starts a slot's next request, or leaves it idle until the rate allows it.
    fn start(&mut self, queue_index: usize, slot: usize, now: Instant) -> Result<(), Error> {
        if self.interval.is_some() {
            self.idle.push((queue_index, slot));
            return Ok(());
        }
        self.submit(queue_index, slot, now)
    }

    fn submit(&mut self, queue_index: usize, slot: usize, now: Instant) -> Result<(), Error> {
        if self.is_over(now) {
            return Ok(());
        }
        self.follow_remote();
        let cursor = &mut self.cursors[queue_index];
        let kind = match self.options.pattern {
            Pattern::Read | Pattern::Randread => Kind::Read,
            Pattern::Randrw if cursor.rng.u32(0..100) < self.options.read_percent => Kind::Read,
            _ => Kind::Write,
        };
        let Some(block) = cursor.next() else {
            return Ok(());
        };
        self.requests_left -= 1;
        let block_bytes = self.options.block_bytes;
        let sector = block * (self.options.stride_bytes / SECTOR_BYTES as u64);
        self.queues[queue_index].submit(slot, kind, sector, &[block_bytes])?;
        self.slots[queue_index][slot] = SlotState {
            kind,
            submitted: now,
        };
        Ok(())
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "figures for people, not for arithmetic"
)]
fn report(
    options: &Options,
    measured: &mut Measured,
    elapsed: Duration,
    cpu: Option<Duration>,
) -> Value {
    let data = measured.read.len() + measured.write.len();
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let latencies = |histogram: &Histogram<u64>| {
        let at = |percent: f64| histogram.value_at_percentile(percent) as f64 / 1e3;
        json!({
            "mean": histogram.mean() / 1e3,
            "p50": at(50.0),
            "p99": at(99.0),
            "p99.9": at(99.9),
            "max": histogram.max() as f64 / 1e3,
        })
    };
    let mut both = measured.read.clone();
    let _ = both.add(&measured.write);
    let mut value = json!({
        "pattern": format!("{:?}", options.pattern).to_lowercase(),
        "bs": options.block_bytes,
        "stride": options.stride_bytes,
        "iodepth": options.connect.slots,
        "queues": options.connect.queues,
        "poll": options.poll,
        "seconds": seconds,
        "ops": data,
        "iops": data as f64 / seconds,
        "mb_s": data as f64 * options.block_bytes as f64 / seconds / 1e6,
        "latency_us": latencies(&both),
        "longest_gap_ms": measured.longest_gap.as_secs_f64() * 1e3,
        "errors": measured.errors,
        "bad_status": measured.first_bad_status,
    });
    if !measured.flush.is_empty() {
        value["flushes"] = json!(measured.flush.len());
        value["flush_latency_us"] = latencies(&measured.flush);
    }
    if let Some(cpu) = cpu {
        let operations = data + measured.flush.len();
        value["server_cpu_us_per_io"] = json!(cpu.as_secs_f64() * 1e6 / operations.max(1) as f64);
        value["server_cpu_cores"] = json!(cpu.as_secs_f64() / seconds);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of(mut cursor: Cursor) -> Vec<u64> {
        std::iter::from_fn(|| cursor.next()).collect()
    }

    #[test]
    fn alloc_write_visits_each_block_once_in_another_order() {
        let blocks = all_of(Cursor::new(Pattern::AllocWrite, 10..1010, 7));
        let mut sorted = blocks.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (10..1010).collect::<Vec<_>>());
        assert_ne!(blocks, sorted);
    }

    #[test]
    fn alloc_write_of_one_block_ends() {
        assert_eq!(all_of(Cursor::new(Pattern::AllocWrite, 5..6, 1)), [5]);
    }

    #[test]
    fn a_confined_cursor_stays_in_its_region_and_comes_out_again() {
        let mut cursor = Cursor::new(Pattern::Randread, 10..1000, 3);
        cursor.confine(&(4096 * 20 - 1..4096 * 30 + 1), 4096);
        let picked: Vec<u64> = (0..1000).filter_map(|_| cursor.next()).collect();
        assert!(picked.iter().all(|block| (20..30).contains(block)));
        assert_eq!(picked.len(), 1000);
        cursor.confine(&(0..u64::MAX), 4096);
        assert!((0..1000).any(|_| cursor.next().is_some_and(|block| block >= 500)));
    }

    #[test]
    fn sequential_reads_start_again_at_the_end() {
        let mut cursor = Cursor::new(Pattern::Read, 3..5, 1);
        assert_eq!(
            [(); 4].map(|()| cursor.next()),
            [Some(3), Some(4), Some(3), Some(4)]
        );
    }
}
