//! Background work as QEMU's clients know it: jobs with a state and a progress, and block jobs.
//!
//! The daemon tells which jobs there are ([`JobInfo`]); this module makes QEMU's `JobInfo` and
//! `BlockJobInfo` of them. The kinds use QEMU's own words, since typed clients accept no others;
//! the job's id and the member `x-qblkd` say more.

use serde::Serialize;
use serde_json::{Value, json};

use super::error::CommandError;
use crate::engine::BackgroundKind;

/// QEMU's `JobType`, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// The references of a new internal snapshot are counted.
    SnapshotSave,
    /// The references of a deleted internal snapshot are given back.
    SnapshotDelete,
    /// Counts and flags of the image are put right.
    Amend,
}

impl From<BackgroundKind> for JobKind {
    fn from(kind: BackgroundKind) -> Self {
        match kind {
            BackgroundKind::Settle => Self::SnapshotSave,
            BackgroundKind::Delete => Self::SnapshotDelete,
            BackgroundKind::Reown | BackgroundKind::Rebuild => Self::Amend,
        }
    }
}

/// QEMU's `JobStatus`, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// Waits for the jobs before it.
    Created,
    /// At work.
    Running,
    /// Met an error; tries again by itself.
    Paused,
    /// The work is done.
    Waiting,
    /// The work is done, and durable.
    Pending,
    /// Given up.
    Aborting,
    /// Over.
    Concluded,
    /// Forgotten.
    Null,
}

impl JobStatus {
    /// The word on the wire.
    fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// QEMU's `BlockDeviceIoStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// No error, or none since it was tried again.
    Ok,
    /// The host failed.
    Failed,
    /// The host had no space.
    Nospace,
}

/// A piece of background work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// Unique in the life of the process.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Where it is.
    pub status: JobStatus,
    /// How the host took its last operation.
    pub io_status: IoStatus,
    /// Bytes of metadata done.
    pub done: u64,
    /// Bytes of metadata in all, as far as known.
    pub total: u64,
    /// Limit in bytes a second; 0 for none.
    pub speed: u64,
    /// What went wrong last.
    pub error: Option<String>,
    /// Id and name of the internal snapshot, if it is about one.
    pub snapshot: Option<(String, String)>,
}

impl JobInfo {
    /// QEMU's `JobInfo`.
    pub(super) fn to_job(&self) -> Value {
        let mut value = json!({
            "id": self.id,
            "type": self.kind,
            "status": self.status,
            "current-progress": self.done,
            "total-progress": self.total,
        });
        if let Some(error) = &self.error {
            value["error"] = json!(error);
        }
        if let Some((id, name)) = &self.snapshot {
            value["x-qblkd"] = json!({ "snapshot-id": id, "snapshot-name": name });
        }
        value
    }

    /// QEMU's `BlockJobInfo`.
    pub(super) fn to_block_job(&self) -> Value {
        let mut value = json!({
            "type": self.kind,
            "device": self.id,
            "len": self.total,
            "busy": self.status == JobStatus::Running,
            "paused": self.status == JobStatus::Paused,
            "offset": self.done,
            "speed": self.speed,
            "io-status": self.io_status,
            "ready": false,
            "status": self.status,
            "auto-finalize": true,
            "auto-dismiss": true,
        });
        if let Some(error) = &self.error {
            value["error"] = json!(error);
        }
        value
    }

    /// The refusal of a command that the job cannot obey now, in QEMU's words.
    pub(super) fn refuse(&self, verb: &str, reason: &str) -> CommandError {
        CommandError::generic(format!(
            "Job '{}' in state '{}' cannot accept command verb '{verb}'{reason}",
            self.id,
            self.status.word()
        ))
    }
}
