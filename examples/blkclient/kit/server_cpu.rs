//! CPU time that the server process has used, from `/proc`.
//!
//! Two sources, because neither is enough: the threads' `schedstat` counts nanoseconds but forgets
//! threads that have ended, `stat` of the process remembers them but counts in clock ticks.

use super::Error;
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Nanoseconds in a tick of `/proc/PID/stat` (USER_HZ is 100 on every Linux).
const TICK_NS: u64 = 10_000_000;

/// The counters at one moment.
pub(crate) struct CpuSample {
    thread_ns: BTreeMap<u32, u64>,
    process_ns: u64,
}

impl CpuSample {
    /// Reads the counters of process `pid`.
    pub(crate) fn read(pid: u32) -> Result<Self, Error> {
        let stat_path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&stat_path).map_err(Error::io(stat_path))?;
        // The command name, in parentheses, may hold anything; field 3 follows it.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<u64> = after_name
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let ticks: u64 = fields.get(11..13).map_or(0, |times| times.iter().sum());

        let tasks_path = format!("/proc/{pid}/task");
        let mut thread_ns = BTreeMap::new();
        for entry in fs::read_dir(&tasks_path)
            .map_err(Error::io(tasks_path))?
            .flatten()
        {
            let Some(thread) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            // A thread may end between the listing and the read.
            let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            if let Some(ns) = text
                .split_whitespace()
                .next()
                .and_then(|ns| ns.parse().ok())
            {
                thread_ns.insert(thread, ns);
            }
        }
        Ok(Self {
            thread_ns,
            process_ns: ticks * TICK_NS,
        })
    }

    /// CPU time used between `earlier` and this sample.
    pub(crate) fn since(&self, earlier: &Self) -> Duration {
        let threads_stayed = earlier
            .thread_ns
            .keys()
            .all(|id| self.thread_ns.contains_key(id));
        let ns = if threads_stayed && !self.thread_ns.is_empty() {
            self.thread_ns
                .iter()
                .map(|(id, ns)| ns.saturating_sub(*earlier.thread_ns.get(id).unwrap_or(&0)))
                .sum()
        } else {
            self.process_ns.saturating_sub(earlier.process_ns)
        };
        Duration::from_nanos(ns)
    }
}
