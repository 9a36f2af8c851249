//! Whether a worker polls before it sleeps, learnt from how its waits have ended. Looks at no clock.

use std::time::Duration;

/// A sleep may last this much longer than the wait that it is for: a virtual machine's processor that
/// has halted takes tens of microseconds to wake up (an estimate, on the generous side).
const WAKE_UP: Duration = Duration::from_micros(50);

/// Hits that are remembered at most, so that polling ends soon after it stops to pay.
const POLL_CREDIT_MAX: i32 = 16;

/// A poll in vain counts as much as so many that were not.
const POLL_MISS_COST: i32 = 2;

/// Waits that look short before polling is tried again after it did not pay.
const POLL_PAUSE: i32 = 8;

/// Whether to poll before sleeping: for the whole window while most waits end within it, otherwise
/// not at all, since a poll that ends too early is for nothing.
pub(super) struct PollWindow {
    max: Duration,
    /// Polls while positive. Negative: so many more waits have to look short.
    credit: i32,
}

impl PollWindow {
    pub(super) fn new(max: Duration) -> Self {
        Self { max, credit: 0 }
    }

    fn is_open(&self) -> bool {
        self.credit > 0
    }

    pub(super) fn window(&self) -> Duration {
        if self.is_open() {
            self.max
        } else {
            Duration::ZERO
        }
    }

    /// A wait has ended while polling.
    pub(super) fn hit(&mut self) {
        self.credit = (self.credit + 1).min(POLL_CREDIT_MAX);
    }

    /// A wait of this length, polling and sleep together, has ended in sleep.
    pub(super) fn slept(&mut self, waited: Duration) {
        if self.is_open() {
            self.credit -= POLL_MISS_COST;
            if !self.is_open() {
                self.credit = -POLL_PAUSE;
            }
        } else if waited <= self.max + WAKE_UP {
            self.credit += 1;
        } else {
            self.credit = -POLL_PAUSE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    const SHORT: Duration = Duration::from_micros(20);

    const LONG: Duration = Duration::from_millis(10);

    fn open_window() -> PollWindow {
        let mut poll = PollWindow::new(MAX);
        poll.slept(SHORT);
        assert_eq!(poll.window(), MAX);
        poll
    }

    #[test]
    fn a_wait_that_only_the_wake_up_made_long_opens_the_poll_window() {
        let mut poll = PollWindow::new(MAX);
        poll.slept(MAX + WAKE_UP);
        assert_eq!(poll.window(), MAX);
    }

    #[test]
    fn long_waits_never_open_the_poll_window() {
        let mut poll = PollWindow::new(MAX);
        for _ in 0..100 {
            poll.slept(LONG);
            assert!(poll.window().is_zero());
        }
    }

    #[test]
    fn polls_in_vain_close_the_poll_window_for_a_while() {
        let mut poll = open_window();
        poll.slept(MAX + SHORT);
        for _ in 0..POLL_PAUSE {
            assert!(poll.window().is_zero());
            poll.slept(SHORT);
        }
        assert!(poll.window().is_zero());
        poll.slept(SHORT);
        assert_eq!(poll.window(), MAX);
    }

    #[test]
    fn the_poll_window_stays_open_through_a_rare_long_wait() {
        let mut poll = open_window();
        for _ in 0..20 {
            for _ in 0..5 {
                poll.hit();
            }
            poll.slept(LONG);
            assert_eq!(poll.window(), MAX);
        }
    }

    #[test]
    fn a_driver_that_goes_quiet_costs_a_few_polls() {
        let mut poll = open_window();
        for _ in 0..1000 {
            poll.hit();
        }
        let polls = (0..1000)
            .filter(|_| {
                let open = !poll.window().is_zero();
                poll.slept(LONG);
                open
            })
            .count();
        assert!(polls <= 8, "{polls} polls in vain");
    }

    #[test]
    fn a_limit_of_zero_switches_polling_off() {
        let mut poll = PollWindow::new(Duration::ZERO);
        poll.slept(Duration::ZERO);
        assert!(poll.window().is_zero());
    }
}
