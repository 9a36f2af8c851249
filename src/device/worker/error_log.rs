//! The log lines about failed requests: few enough to be read.

use std::time::{Duration, Instant};

use log::log;

use crate::device::error::level_of;
use crate::engine;

/// At most one line about failed requests in this time; the rest is for `--log debug`.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps a failing host from filling the log.
#[derive(Default)]
pub(super) struct ErrorLog {
    last: std::cell::Cell<Option<Instant>>,
}

impl ErrorLog {
    /// Logs a failed request. True when it is one for the administrator, and not too soon after
    /// the last.
    pub(super) fn report(&self, what: &str, error: &engine::Error) -> bool {
        let now = Instant::now();
        let quiet = self
            .last
            .get()
            .is_some_and(|last| now.saturating_duration_since(last) < ERROR_LOG_INTERVAL);
        let level = if quiet {
            log::Level::Debug
        } else {
            level_of(error)
        };
        if level < log::Level::Debug {
            self.last.set(Some(now));
        }
        log!(level, "{what} failed: {}", error.chain());
        level < log::Level::Debug
    }
}
