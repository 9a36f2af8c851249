//! Events: what the server tells every client that has finished its negotiation, unasked.
//!
//! Names and members are QEMU's. A guest can cause I/O errors as fast as it likes, so those events
//! are limited ([`Throttle`]); the counters in `query-blockstats` miss nothing.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::job::{JobKind, JobStatus};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", content = "data")]
pub enum Event {
    /// The daemon stops: requests in flight finish, then the image is closed.
    #[serde(rename = "SHUTDOWN")]
    Shutdown {
        /// Whether the guest caused it. It never does, but clients of QEMU look here.
        guest: bool,
        /// Who asked.
        reason: ShutdownReason,
    },
    /// A request failed on the host.
    #[serde(rename = "BLOCK_IO_ERROR")]
    BlockIoError {
        /// Empty: there is no QEMU object model here. Clients require the member.
        #[serde(rename = "qom-path")]
        qom_path: String,
        /// The device's name.
        device: String,
        /// The node the error came from.
        #[serde(rename = "node-name")]
        node_name: String,
        /// What was tried.
        operation: IoOperation,
        /// What was done about it.
        action: IoErrorAction,
        /// Whether the host had no space left.
        nospace: bool,
        /// The error, for people.
        reason: String,
    },
    /// Metadata of the image contradict each other.
    #[serde(rename = "BLOCK_IMAGE_CORRUPTED")]
    BlockImageCorrupted {
        /// The device's name.
        device: String,
        /// The node whose image it is.
        #[serde(rename = "node-name")]
        node_name: String,
        /// What was found, for people.
        msg: String,
        /// The host offset of the access, if it was one.
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// The length of the access in bytes, if it was one.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// Whether the image is marked corrupt and takes no more writes.
        fatal: bool,
    },
    /// A job has come to another state.
    #[serde(rename = "JOB_STATUS_CHANGE")]
    JobStatusChange {
        /// The job.
        id: String,
        /// Its state now.
        status: JobStatus,
    },
    /// A job is over.
    #[serde(rename = "BLOCK_JOB_COMPLETED")]
    BlockJobCompleted {
        /// What it does, in QEMU's words.
        #[serde(rename = "type")]
        kind: JobKind,
        /// The job.
        device: String,
        /// All there was to do.
        len: u64,
        /// What was done.
        offset: u64,
        /// Its limit in bytes a second; 0 for none.
        speed: u64,
        /// Why it was given up, if it was.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A job met an error on the host.
    #[serde(rename = "BLOCK_JOB_ERROR")]
    BlockJobError {
        /// The job.
        device: String,
        /// What was tried.
        operation: IoOperation,
        /// What was done about it.
        action: IoErrorAction,
    },
}

/// Who asked for the shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownReason {
    /// The command `quit`.
    HostQmpQuit,
    /// SIGTERM or SIGINT.
    HostSignal,
}

/// QEMU's `IoOperationType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoOperation {
    /// Data read.
    Read,
    /// Everything that changes or flushes the image.
    Write,
}

/// QEMU's `BlockErrorAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoErrorAction {
    /// The guest was told.
    Report,
    /// Nobody was told.
    Ignore,
    /// The job pauses, and tries again.
    Stop,
}

impl Event {
    /// The event as it goes onto the wire, stamped with `now`.
    pub(super) fn to_value(&self, now: SystemTime) -> Value {
        // A clock before 1970 is no reason to lose the event.
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = json!(self);
        message["timestamp"] = json!({
            "seconds": since_epoch.as_secs(),
            "microseconds": since_epoch.subsec_micros(),
        });
        message
    }
}

/// The shortest time between two I/O error events of one operation.
const IO_ERROR_INTERVAL: Duration = Duration::from_secs(1);

/// Lets one `BLOCK_IO_ERROR` per operation and second through.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    read_last: Option<Instant>,
    write_last: Option<Instant>,
}

impl Throttle {
    /// Whether `event` may be sent at `now`.
    pub(super) fn admit(&mut self, event: &Event, now: Instant) -> bool {
        let Event::BlockIoError { operation, .. } = event else {
            return true;
        };
        let last = match operation {
            IoOperation::Read => &mut self.read_last,
            IoOperation::Write => &mut self.write_last,
        };
        if last.is_some_and(|last| now.saturating_duration_since(last) < IO_ERROR_INTERVAL) {
            return false;
        }
        *last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io_error(operation: IoOperation) -> Event {
        Event::BlockIoError {
            qom_path: String::new(),
            device: "disk0".into(),
            node_name: "disk0".into(),
            operation,
            action: IoErrorAction::Report,
            nospace: true,
            reason: "No space left on device".into(),
        }
    }

    fn stamp() -> SystemTime {
        UNIX_EPOCH + Duration::new(1_265_044_230, 450_486_999)
    }

    #[test]
    fn shutdown_has_qemus_shape() {
        let event = Event::Shutdown {
            guest: false,
            reason: ShutdownReason::HostQmpQuit,
        };
        assert_eq!(
            event.to_value(stamp()).to_string(),
            r#"{"event":"SHUTDOWN","data":{"guest":false,"reason":"host-qmp-quit"},"#.to_owned()
                + r#""timestamp":{"seconds":1265044230,"microseconds":450486}}"#
        );
    }

    #[test]
    fn io_error_has_qemus_shape() {
        assert_eq!(
            io_error(IoOperation::Write).to_value(stamp())["data"],
            json!({
                "qom-path": "", "device": "disk0", "node-name": "disk0", "operation": "write",
                "action": "report", "nospace": true, "reason": "No space left on device",
            })
        );
    }

    #[test]
    fn corruption_without_an_access_has_no_offset() {
        let event = Event::BlockImageCorrupted {
            device: "disk0".into(),
            node_name: "disk0".into(),
            msg: "L2 table unaligned".into(),
            offset: None,
            size: None,
            fatal: true,
        };
        assert_eq!(
            event.to_value(stamp())["data"],
            json!({
                "device": "disk0", "node-name": "disk0", "msg": "L2 table unaligned", "fatal": true,
            })
        );
    }

    #[test]
    fn corruption_of_an_access_says_where() {
        let event = Event::BlockImageCorrupted {
            device: "disk0".into(),
            node_name: "disk0".into(),
            msg: "overlaps with the refcount table".into(),
            offset: Some(65536),
            size: Some(512),
            fatal: false,
        };
        let data = &event.to_value(stamp())["data"];
        assert_eq!(
            (&data["offset"], &data["size"]),
            (&json!(65536), &json!(512))
        );
    }

    #[test]
    fn io_errors_of_one_operation_are_limited_to_one_per_second() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let write = io_error(IoOperation::Write);
        assert!(throttle.admit(&write, start));
        assert!(!throttle.admit(&write, start + Duration::from_millis(999)));
        assert!(throttle.admit(&io_error(IoOperation::Read), start));
        assert!(throttle.admit(&write, start + Duration::from_secs(1)));
    }

    #[test]
    fn other_events_are_never_held_back() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let event = Event::Shutdown {
            guest: false,
            reason: ShutdownReason::HostSignal,
        };
        assert!(throttle.admit(&event, start));
        assert!(throttle.admit(&event, start));
    }
}
