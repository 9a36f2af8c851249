//! How fast background work goes on: politely while the guest is busy, at full speed while it is not.
//!
//! Pure: times and counters are handed in. After each piece of work the settler pauses for a
//! *factor* times what the work took. Two things raise it, and the higher one counts:
//!
//! - The guest's mean latency, over work and pauses, must stay within twice the *reference*, which is what
//!   it was before there was any work, or what it is in the pauses now if that is more. (After a snapshot
//!   the guest's writes copy clusters, whatever the settler does: going slower would not help them.)
//! - The guest must not lose more than [`LOSS_MAX`] of the requests that it gets done a second: the
//!   rates during work and in pauses say how much it loses while there is work.
//!
//! Without requests there is nobody to be polite to.

use std::time::Duration;

/// Counters of the device since its start: requests and their time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Load {
    pub(super) requests: u64,
    pub(super) total_ns: u64,
}

impl Load {
    /// What came after `earlier`.
    fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests.wrapping_sub(earlier.requests),
            total_ns: self.total_ns.wrapping_sub(earlier.total_ns),
        }
    }

    fn add(&mut self, more: Self) {
        self.requests += more.requests;
        self.total_ns = self.total_ns.saturating_add(more.total_ns);
    }

    /// Mean latency in nanoseconds, if there are enough requests to speak of one.
    fn mean_ns(self) -> Option<u64> {
        (self.requests >= SAMPLE_MIN).then(|| self.total_ns / self.requests)
    }

    /// Requests a second, if they came in such a time.
    fn rate(self, time: Duration) -> f64 {
        let requests = u32::try_from(self.requests).unwrap_or(u32::MAX);
        f64::from(requests) / time.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// Requests that make a mean.
const SAMPLE_MIN: u64 = 8;
/// How long latencies are collected before the factor follows them.
const WINDOW: Duration = Duration::from_millis(100);
/// How many times the latency before the work a guest may see, on average. Less than twice, since what is
/// measured is noisy.
const LATENCY_MAX: f64 = 1.75;
/// The highest factor.
const FACTOR_MAX: f64 = 50.0;
/// How much of the rate that it has in pauses a guest may lose. It loses more than that of what it had
/// before: next to a thread that comes and goes, pauses are no undisturbed time.
const LOSS_MAX: f64 = 0.05;
/// The factor that a busy guest gets before anything is known, and the least that it ever gets: rates in
/// pauses must be known.
const FACTOR_BUSY: f64 = 4.0;
const FACTOR_PROBE: f64 = 0.1;
/// The shortest pause: what is owed for less is added up. After each piece of work it takes a busy guest
/// some twenty milliseconds to get back to its rate, however short the piece was.
const PAUSE_MIN: Duration = Duration::from_millis(120);
/// The longest pause: the work goes on, and the guest's idleness is noticed.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The pace of one settler.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// What the guest's latency asks for.
    factor: f64,
    /// What the guest's rate asks for.
    rate_factor: f64,
    /// Pauses that are due.
    owed: Duration,
    /// Counters when the last work ended, or at start.
    idle_since: Load,
    /// Mean latency before the work.
    before_ns: Option<u64>,
    /// During work, in the present window.
    working: Load,
    /// In pauses, in the present window.
    resting: Load,
    /// Length of the present window so far.
    window: Duration,
    /// How long work took in it, and for how long pauses were looked at.
    worked: Duration,
    rested: Duration,
}

impl Pace {
    /// There is no work from now on.
    pub(super) fn idle(&mut self, now: Load) {
        self.idle_since = now;
    }

    /// There is work from now on.
    pub(super) fn begin(&mut self, now: Load) {
        self.before_ns = now.since(self.idle_since).mean_ns();
        self.factor = 0.0;
        self.rate_factor = match self.before_ns {
            Some(_) => FACTOR_BUSY,
            None => 0.0,
        };
        self.owed = Duration::ZERO;
        self.start_window();
    }

    /// A piece of work took so long, between these readings. Returns how long to pause.
    pub(super) fn worked(&mut self, took: Duration, from: Load, to: Load) -> Duration {
        self.working.add(to.since(from));
        self.window += took;
        self.worked += took;
        if self.window >= WINDOW {
            self.adapt();
        }
        self.owed += took.mul_f64(self.factor.max(self.rate_factor));
        if self.owed < PAUSE_MIN {
            return Duration::ZERO;
        }
        std::mem::take(&mut self.owed).min(PAUSE_MAX)
    }

    /// A pause took so long; its later half was between these readings. What the guest asked for
    /// during the work is still on its way in the first part.
    pub(super) fn rested(&mut self, took: Duration, from: Load, to: Load) {
        self.resting.add(to.since(from));
        self.window += took;
        self.rested += took / 2;
    }

    fn adapt(&mut self) {
        self.factor = (self.factor + self.factor_of_latencies()) / 2.0;
        self.rate_factor = self.factor_of_rates();
        self.start_window();
    }

    /// With this factor the mean latency over work and pauses is [`LATENCY_MAX`] times the reference.
    /// (Longer pauses make it no lower while there is work.)
    fn factor_of_latencies(&self) -> f64 {
        let reference = self.before_ns.max(self.resting.mean_ns());
        match (self.working.mean_ns(), reference) {
            // A guest that is idle, or nearly so.
            (None, _) if self.working.requests + self.resting.requests < SAMPLE_MIN => 0.0,
            // Too little is known: pauses will tell.
            (None, _) | (_, None) => self.factor.max(1.0),
            (Some(latency), Some(reference)) => {
                let times = ratio(latency, reference);
                ((times - 1.0) / (LATENCY_MAX - 1.0) - 1.0).clamp(0.0, FACTOR_MAX)
            }
        }
    }

    /// With this factor the guest loses [`LOSS_MAX`] of its rate in pauses.
    fn factor_of_rates(&self) -> f64 {
        if self.working.requests + self.resting.requests < SAMPLE_MIN {
            return 0.0;
        }
        if self.resting.requests < SAMPLE_MIN {
            return self.rate_factor.max(FACTOR_PROBE);
        }
        let lost = 1.0 - self.working.rate(self.worked) / self.resting.rate(self.rested);
        (lost / LOSS_MAX - 1.0).clamp(FACTOR_PROBE, FACTOR_MAX)
    }

    fn start_window(&mut self) {
        self.working = Load::default();
        self.resting = Load::default();
        self.window = Duration::ZERO;
        self.worked = Duration::ZERO;
        self.rested = Duration::ZERO;
    }
}

/// How long to pause after so many bytes that took so long, for a limit in bytes a second.
pub(super) fn pause_for_speed(bytes: u64, took: Duration, speed: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(speed.max(1));
    let whole = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
    whole.saturating_sub(took)
}

fn ratio(a: u64, b: u64) -> f64 {
    Duration::from_nanos(a).as_secs_f64()
        / Duration::from_nanos(b).as_secs_f64().max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    /// A guest whose rate and latency are known in work and in pauses.
    struct Guest {
        now: Load,
        working_per_ms: u64,
        resting_per_ms: u64,
        working_ns: u64,
        resting_ns: u64,
    }

    impl Guest {
        fn go_on(&mut self, time: Duration, working: bool) -> (Load, Load) {
            let (per_ms, latency_ns) = if working {
                (self.working_per_ms, self.working_ns)
            } else {
                (self.resting_per_ms, self.resting_ns)
            };
            let from = self.now;
            let requests = u64::try_from(time.as_micros()).unwrap() * per_ms / 1000;
            self.now.add(Load {
                requests,
                total_ns: requests * latency_ns,
            });
            (from, self.now)
        }

        /// The share of time that is spent working after the pace has settled.
        fn duty(&mut self, pace: &mut Pace) -> f64 {
            pace.begin(self.now);
            let (mut worked, mut rested) = (Duration::ZERO, Duration::ZERO);
            for step in 0..2000 {
                let (from, to) = self.go_on(STEP, true);
                let pause = pace.worked(STEP, from, to);
                self.go_on(pause / 2, false);
                let (from, to) = self.go_on(pause / 2, false);
                pace.rested(pause, from, to);
                if step >= 1000 {
                    worked += STEP;
                    rested += pause;
                }
            }
            worked.as_secs_f64() / (worked + rested).as_secs_f64()
        }
    }

    fn guest(per_ms: u64, working_ns: u64, resting_ns: u64) -> Guest {
        Guest {
            now: Load::default(),
            working_per_ms: per_ms,
            resting_per_ms: per_ms,
            working_ns,
            resting_ns,
        }
    }

    #[test]
    fn an_idle_guest_costs_no_pause() {
        let mut guest = guest(0, 0, 0);
        assert_eq!(guest.duty(&mut Pace::default()), 1.0);
    }

    #[test]
    fn a_guest_that_notices_nothing_costs_next_to_no_pause() {
        let mut pace = Pace::default();
        let mut guest = guest(20, 110_000, 100_000);
        guest.go_on(Duration::from_secs(1), false);
        let duty = guest.duty(&mut pace);
        assert!(duty > 0.9, "{duty}");
    }

    #[test]
    fn the_mean_latency_stays_within_twice_what_it_was() {
        for working_ns in [300_000, 500_000, 2_000_000] {
            let mut pace = Pace::default();
            let mut guest = guest(20, working_ns, 100_000);
            guest.go_on(Duration::from_secs(1), false);
            let duty = guest.duty(&mut pace);
            let working = f64::from(u32::try_from(working_ns).unwrap());
            let mean = duty * working + (1.0 - duty) * 100_000.0;
            assert!((160_000.0..190_000.0).contains(&mean), "{mean}");
        }
    }

    /// A fixed number of requests in flight: what costs latency costs rate. It keeps 0.95 of it.
    #[test]
    fn a_guest_keeps_most_of_its_rate() {
        for (working_per_ms, working_ns) in [(60, 167_000), (70, 143_000), (80, 125_000)] {
            let mut pace = Pace::default();
            let mut guest = Guest {
                working_per_ms,
                resting_per_ms: 100,
                ..guest(0, working_ns, 100_000)
            };
            guest.go_on(Duration::from_secs(1), false);
            let duty = guest.duty(&mut pace);
            let share = f64::from(u32::try_from(working_per_ms).unwrap()) / 100.0;
            let kept = duty * share + (1.0 - duty);
            assert!((0.94..0.96).contains(&kept), "{kept} at {share}");
        }
    }

    #[test]
    fn a_busy_guest_gets_pauses_from_the_first_piece_of_work_on() {
        let mut pace = Pace::default();
        let mut guest = guest(100, 100_000, 100_000);
        guest.go_on(Duration::from_secs(1), false);
        pace.begin(guest.now);
        let (from, to) = guest.go_on(PAUSE_MIN / 2, true);
        assert_eq!(pace.worked(PAUSE_MIN / 2, from, to), PAUSE_MIN * 2);
    }

    #[test]
    fn latency_that_pauses_do_not_cure_slows_nothing_down() {
        let mut pace = Pace::default();
        let mut guest = guest(20, 900_000, 800_000);
        guest.go_on(Duration::from_secs(1), false);
        let duty = guest.duty(&mut pace);
        assert!(duty > 0.6, "{duty}");
    }

    #[test]
    fn without_a_past_the_pauses_are_the_measure() {
        let mut pace = Pace::default();
        assert!(guest(20, 900_000, 100_000).duty(&mut pace) < 0.15);
    }

    #[test]
    fn a_limit_is_kept_whatever_the_work_takes() {
        let pause = pause_for_speed(1 << 20, Duration::from_millis(100), 1 << 20);
        assert_eq!(pause, Duration::from_millis(900));
        let late = pause_for_speed(1 << 20, Duration::from_secs(2), 1 << 20);
        assert_eq!(late, Duration::ZERO);
        let slowest = pause_for_speed(u64::MAX, Duration::ZERO, 1);
        assert_eq!(slowest, Duration::from_nanos(u64::MAX));
    }
}
