//! A load that another process steers: lines on standard input say where it goes, and its end ends
//! it.
//!
//! Owns the reading of the lines. The end of the input is what a client gets whose parent died, so
//! that none is left behind. A line that is not understood ends the load too: a script that is
//! wrong must not measure the wrong thing.

use std::io::{self, BufRead};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What the other process wants. Read by the client's threads before each request.
#[derive(Debug)]
pub(crate) struct Remote {
    over: AtomicBool,
    /// Counts the changes of `region`, so that looking for one takes no lock.
    version: AtomicU64,
    /// Bytes of the disk that the load may use.
    region: Mutex<Range<u64>>,
}

impl Remote {
    /// Follows standard input, on a thread that ends with it.
    pub(crate) fn on_stdin() -> Arc<Self> {
        let remote = Arc::new(Self::new());
        let reader = Arc::clone(&remote);
        // Nobody waits for it: it sits in a read when the load ends by itself.
        std::thread::spawn(move || reader.follow(io::stdin().lock()));
        remote
    }

    fn new() -> Self {
        Self {
            over: AtomicBool::new(false),
            version: AtomicU64::new(0),
            region: Mutex::new(0..u64::MAX),
        }
    }

    fn follow(&self, input: impl BufRead) {
        for line in input.lines().map_while(Result::ok) {
            let Some(region) = parse(&line) else {
                break;
            };
            *self.region.lock().unwrap_or_else(PoisonError::into_inner) = region;
            self.version.fetch_add(1, Ordering::Release);
        }
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether the load is to end.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Changes with each change of the region.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Where the load is to go, in bytes.
    pub(crate) fn region(&self) -> Range<u64> {
        self.region
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The region that a line names.
fn parse(line: &str) -> Option<Range<u64>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["region", "all"] => Some(0..u64::MAX),
        ["region", offset, bytes] => {
            let start: u64 = offset.parse().ok()?;
            Some(start..start.checked_add(bytes.parse().ok()?)?)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_move_the_region_and_the_end_is_the_end() {
        let remote = Remote::new();
        assert!(!remote.is_over());
        remote.follow(&b"region all\nregion 4096 8192\n"[..]);
        assert_eq!((remote.version(), remote.region()), (2, 4096..12288));
        assert!(remote.is_over());
    }

    #[test]
    fn a_line_that_is_not_understood_ends_the_load() {
        for line in ["region", "region 1", "region x 1", "stop", "region 1 2 3"] {
            let remote = Remote::new();
            remote.follow(format!("{line}\nregion 0 1\n").as_bytes());
            assert!(remote.is_over() && remote.version() == 0, "{line}");
        }
    }
}
