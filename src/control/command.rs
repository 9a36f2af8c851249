//! The command table: names, argument checks, and what each command asks of the daemon.
//!
//! A command here runs to its end at once; none may wait. What takes time is an [`Order`]: the daemon
//! has it carried out elsewhere and gives the result to [`ControlServer::answer`] with the
//! [`Ticket`] that the order came with.
//!
//! [`ControlServer::answer`]: super::ControlServer::answer

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::error::CommandError;
use super::info::{self, DeviceInfo, DeviceStats, InternalSnapshotInfo, NodeInfo};
use super::job::{JobInfo, JobStatus};
use super::wire::Request;
use crate::engine::{SNAPSHOT_NAME_BYTES_MAX, Selector};

/// What the control socket needs from the daemon. Called on the main thread; must not block.
pub trait Handler {
    /// Describes the device and its backing chain.
    fn device_info(&mut self) -> DeviceInfo;

    /// Sums up the counters of all workers.
    fn device_stats(&mut self) -> DeviceStats;

    /// The background work, in the order in which it is done.
    fn jobs(&mut self) -> Vec<JobInfo>;

    /// Limits a job that is there to so many bytes a second; 0 lifts the limit.
    fn set_job_speed(&mut self, id: &str, speed: u64);

    /// Forgets a job that is concluded.
    fn dismiss_job(&mut self, id: &str);

    /// Has an order carried out; its result is for the server's `answer`, with this ticket.
    ///
    /// # Errors
    /// It is refused at once.
    fn order(&mut self, ticket: Ticket, order: Order) -> Result<(), CommandError>;

    /// Asks for an orderly shutdown. The reply is already on its way to the client.
    fn quit(&mut self);
}

/// Which request an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Token of the client's session, never used again.
    pub(super) client: u64,
    /// Number of the request in its session.
    pub(super) number: u64,
}

/// What a client asks for that is not done at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Snapshots of one instant: all of them, or none. Answered with an empty object.
    Snapshot(Vec<SnapshotAction>),
    /// Removes an internal snapshot. Answered with QEMU's `SnapshotInfo` of it.
    DeleteSnapshot(Selector),
    /// Makes the disk what it was in an internal snapshot. Answered with QEMU's `SnapshotInfo` of
    /// it.
    RevertSnapshot(Selector),
}

/// One snapshot of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotAction {
    /// In the image itself.
    Internal {
        /// What it is to be called.
        name: String,
    },
    /// In a file of its own, which takes the place of the image. Alone in its transaction.
    External(Overlay),
}

/// The file of an external snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Where it is; relative to the working directory of this process.
    pub file: PathBuf,
    /// Name of its node; `None`: one is made up.
    pub node_name: Option<String>,
    /// It is there already, and names the image as its backing file.
    pub existing: bool,
}

/// What becomes of a command that was carried out.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// Reply with this.
    Return(Value),
    /// The reply comes through the server's `answer`.
    Later,
    /// Reply with an empty object, then shut down.
    Quit,
}

/// A command at work: what it was given, and whom it may ask.
struct Call<'a> {
    arguments: Arguments,
    ticket: Ticket,
    handler: &'a mut dyn Handler,
}

type Run = fn(Call<'_>) -> Result<Outcome, CommandError>;

/// Every command that a negotiated session has. Negotiation itself is not here but in
/// [`negotiate`], and listed by hand.
const COMMANDS: &[(&str, Run)] = &[
    ("query-version", query_version),
    ("query-commands", query_commands),
    ("query-block", query_block),
    ("query-named-block-nodes", query_named_block_nodes),
    ("query-blockstats", query_blockstats),
    ("blockdev-snapshot-internal-sync", snapshot_internal),
    ("blockdev-snapshot-delete-internal-sync", snapshot_delete),
    ("blockdev-snapshot-sync", snapshot_external),
    ("x-qblkd-snapshot-revert", snapshot_revert),
    ("transaction", transaction),
    ("query-jobs", query_jobs),
    ("query-block-jobs", query_block_jobs),
    ("block-job-set-speed", block_job_set_speed),
    ("block-job-cancel", block_job_cancel),
    ("block-job-dismiss", block_job_dismiss),
    ("job-cancel", job_cancel),
    ("job-dismiss", job_dismiss),
    ("quit", quit),
];

const NEGOTIATE: &str = "qmp_capabilities";

/// Runs `request` in a session whose negotiation is not done yet.
pub(super) fn negotiate(request: Request) -> Result<(), CommandError> {
    if request.command != NEGOTIATE {
        return Err(CommandError::not_found(
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        ));
    }
    let mut arguments = Arguments::new(request.arguments);
    let enable = arguments.take("enable", "array", |value| value.as_array().cloned())?;
    arguments.finish()?;
    match enable.unwrap_or_default().first() {
        None => Ok(()),
        // The only capability that QMP defines. The greeting did not offer it.
        Some(Value::String(name)) if name == "oob" => {
            Err(CommandError::generic("Capability 'oob' is not available"))
        }
        Some(Value::String(name)) => Err(CommandError::generic(format!(
            "Parameter 'enable' does not accept value '{name}'"
        ))),
        Some(_) => Err(CommandError::generic(
            "Invalid parameter type for 'enable[0]', expected: string",
        )),
    }
}

/// Runs `request` in a session whose negotiation is done.
pub(super) fn execute(
    request: Request,
    ticket: Ticket,
    handler: &mut dyn Handler,
) -> Result<Outcome, CommandError> {
    if request.command == NEGOTIATE {
        return Err(CommandError::not_found(
            "Capabilities negotiation is already complete, command ignored",
        ));
    }
    let Some((_, run)) = COMMANDS.iter().find(|(name, _)| *name == request.command) else {
        return Err(CommandError::not_found(format!(
            "The command {} has not been found",
            request.command
        )));
    };
    run(Call {
        arguments: Arguments::new(request.arguments),
        ticket,
        handler,
    })
}

/// Members that are taken out one by one, so that what is left over can be refused.
struct Arguments {
    members: Map<String, Value>,
    /// Where they are in the arguments of the command: empty, or with a dot at its end.
    path: String,
}

impl Arguments {
    fn new(members: Map<String, Value>) -> Self {
        Self {
            members,
            path: String::new(),
        }
    }

    fn take<T>(
        &mut self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, CommandError> {
        let Some(value) = self.members.shift_remove(name) else {
            return Ok(None);
        };
        convert(&value).map(Some).ok_or_else(|| {
            CommandError::generic(format!(
                "Invalid parameter type for '{}{name}', expected: {expected}",
                self.path
            ))
        })
    }

    fn take_flag(&mut self, name: &str) -> Result<bool, CommandError> {
        Ok(self.take(name, "boolean", Value::as_bool)?.unwrap_or(false))
    }

    fn take_text(&mut self, name: &str) -> Result<Option<String>, CommandError> {
        self.take(name, "string", |value| value.as_str().map(str::to_owned))
    }

    fn take_object(&mut self, name: &str) -> Result<Option<Self>, CommandError> {
        let members = self.take(name, "object", |value| value.as_object().cloned())?;
        let path = format!("{}{name}.", self.path);
        Ok(members.map(|members| Self { members, path }))
    }

    /// What must be there.
    fn need<T>(&self, name: &str, taken: Option<T>) -> Result<T, CommandError> {
        taken.ok_or_else(|| {
            CommandError::generic(format!("Parameter '{}{name}' is missing", self.path))
        })
    }

    fn need_text(&mut self, name: &str) -> Result<String, CommandError> {
        let taken = self.take_text(name)?;
        self.need(name, taken)
    }

    fn finish(self) -> Result<(), CommandError> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!(
                "Parameter '{}{name}' is unexpected",
                self.path
            ))),
        }
    }
}

/// QEMU's `VersionInfo`, filled with our own version.
pub(super) fn version() -> Value {
    const MAJOR: u32 = decimal(env!("CARGO_PKG_VERSION_MAJOR"));
    const MINOR: u32 = decimal(env!("CARGO_PKG_VERSION_MINOR"));
    const MICRO: u32 = decimal(env!("CARGO_PKG_VERSION_PATCH"));
    json!({
        "qemu": { "major": MAJOR, "minor": MINOR, "micro": MICRO },
        "package": concat!("qblkd ", env!("CARGO_PKG_VERSION")),
    })
}

/// Reads a decimal number at compile time.
const fn decimal(text: &str) -> u32 {
    match u32::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => panic!("cargo gives decimal version numbers"),
    }
}

fn query_version(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    Ok(Outcome::Return(version()))
}

fn query_commands(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    let names = COMMANDS.iter().map(|(name, _)| *name);
    let list = names
        .chain([NEGOTIATE])
        .map(|name| json!({ "name": name }))
        .collect();
    Ok(Outcome::Return(list))
}

fn query_block(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    let device = call.handler.device_info();
    Ok(Outcome::Return(info::block_list(&device)))
}

fn query_named_block_nodes(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let flat = call.arguments.take_flag("flat")?;
    call.arguments.finish()?;
    let device = call.handler.device_info();
    Ok(Outcome::Return(info::node_list(&device, flat)))
}

fn query_blockstats(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let query_nodes = call.arguments.take_flag("query-nodes")?;
    call.arguments.finish()?;
    let device = call.handler.device_info();
    let stats = call.handler.device_stats();
    Ok(Outcome::Return(if query_nodes {
        info::node_stats_list(&device, &stats)
    } else {
        info::device_stats_list(&device, &stats)
    }))
}

fn snapshot_internal(call: Call<'_>) -> Result<Outcome, CommandError> {
    let mut arguments = call.arguments;
    let action = InternalSnapshot::parse(&mut arguments)?;
    arguments.finish()?;
    let action = action.check(&call.handler.device_info())?;
    let order = Order::Snapshot(vec![action]);
    call.handler.order(call.ticket, order)?;
    Ok(Outcome::Later)
}

fn snapshot_external(call: Call<'_>) -> Result<Outcome, CommandError> {
    let mut arguments = call.arguments;
    let action = ExternalSnapshot::parse(&mut arguments)?;
    arguments.finish()?;
    let action = action.check(&call.handler.device_info())?;
    let order = Order::Snapshot(vec![action]);
    call.handler.order(call.ticket, order)?;
    Ok(Outcome::Later)
}

fn snapshot_delete(call: Call<'_>) -> Result<Outcome, CommandError> {
    order_about_snapshot(call, Order::DeleteSnapshot)
}

fn snapshot_revert(call: Call<'_>) -> Result<Outcome, CommandError> {
    order_about_snapshot(call, Order::RevertSnapshot)
}

/// Hands over what is to happen to an internal snapshot that is there.
fn order_about_snapshot(
    call: Call<'_>,
    order: fn(Selector) -> Order,
) -> Result<Outcome, CommandError> {
    let mut arguments = call.arguments;
    let device = arguments.need_text("device")?;
    let id = arguments.take_text("id")?;
    let name = arguments.take_text("name")?;
    arguments.finish()?;
    let info = call.handler.device_info();
    let node = root(&info, &device)?;
    let selector = Selector { id, name };
    if selector == Selector::default() {
        return Err(CommandError::generic("Name or id must be provided"));
    }
    let Some(qcow2) = &node.qcow2 else {
        return Err(CommandError::generic(
            "Failed to get a snapshot list: Operation not supported",
        ));
    };
    let listed = |snapshot: &InternalSnapshotInfo| {
        selector.id.as_ref().is_none_or(|id| *id == snapshot.id)
            && selector
                .name
                .as_ref()
                .is_none_or(|name| *name == snapshot.name)
    };
    if !qcow2.internal_snapshots.iter().any(listed) {
        return Err(no_snapshot(&info.name, &selector));
    }
    if node.read_only {
        return Err(read_only(&device));
    }
    call.handler.order(call.ticket, order(selector))?;
    Ok(Outcome::Later)
}

/// The refusal of a snapshot that is not there, in QEMU's words.
pub(crate) fn no_snapshot(device: &str, selector: &Selector) -> CommandError {
    let shown = |given: &Option<String>| given.clone().unwrap_or_else(|| "null".to_owned());
    CommandError::generic(format!(
        "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
        shown(&selector.id),
        shown(&selector.name),
    ))
}

/// The refusal of a name that is taken, in QEMU's words.
pub(crate) fn snapshot_exists(device: &str, name: &str) -> CommandError {
    CommandError::generic(format!(
        "Snapshot with name '{name}' already exists on device '{device}'"
    ))
}

fn read_only(device: &str) -> CommandError {
    CommandError::generic(format!("Device '{device}' is read only"))
}

/// The active image, if `name` is that of the device.
fn root<'a>(info: &'a DeviceInfo, name: &str) -> Result<&'a NodeInfo, CommandError> {
    let by_name = |node: &NodeInfo| node.node_name == name;
    match &info.chain[..] {
        [active, ..] if info.name == name || by_name(active) => Ok(active),
        [_, backing @ ..] if backing.iter().any(by_name) => {
            Err(CommandError::generic("Need a root block node"))
        }
        _ => Err(CommandError::generic(format!(
            "Cannot find device='{name}' nor node-name='{name}'"
        ))),
    }
}

/// QEMU's `BlockdevSnapshotInternal`.
struct InternalSnapshot {
    device: String,
    name: String,
}

impl InternalSnapshot {
    fn parse(arguments: &mut Arguments) -> Result<Self, CommandError> {
        Ok(Self {
            device: arguments.need_text("device")?,
            name: arguments.need_text("name")?,
        })
    }

    fn check(self, info: &DeviceInfo) -> Result<SnapshotAction, CommandError> {
        let Self { device, name } = self;
        let node = root(info, &device)?;
        if node.read_only {
            return Err(read_only(&device));
        }
        let Some(qcow2) = &node.qcow2 else {
            return Err(CommandError::generic(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                node.format
            )));
        };
        if name.is_empty() {
            return Err(CommandError::generic("Name is empty"));
        }
        if name.len() > SNAPSHOT_NAME_BYTES_MAX {
            return Err(CommandError::generic(format!(
                "Name is longer than {SNAPSHOT_NAME_BYTES_MAX} bytes"
            )));
        }
        let mut taken = qcow2.internal_snapshots.iter();
        if taken.any(|snapshot| snapshot.name == name) {
            return Err(snapshot_exists(&device, &name));
        }
        Ok(SnapshotAction::Internal { name })
    }
}

/// QEMU's `BlockdevSnapshotSync`.
struct ExternalSnapshot {
    device: Option<String>,
    node: Option<String>,
    overlay: Overlay,
}

impl ExternalSnapshot {
    fn parse(arguments: &mut Arguments) -> Result<Self, CommandError> {
        let device = arguments.take_text("device")?;
        let node = arguments.take_text("node-name")?;
        let file = arguments.need_text("snapshot-file")?;
        let node_name = arguments.take_text("snapshot-node-name")?;
        if let Some(format) = arguments.take_text("format")?
            && format != "qcow2"
        {
            return Err(CommandError::generic(format!(
                "Parameter 'format' does not accept value '{format}': an overlay is of format qcow2"
            )));
        }
        let existing = match arguments.take_text("mode")?.as_deref() {
            None | Some("absolute-paths") => false,
            Some("existing") => true,
            Some(other) => {
                return Err(CommandError::generic(format!(
                    "Parameter 'mode' does not accept value '{other}'"
                )));
            }
        };
        let overlay = Overlay {
            file: file.into(),
            node_name,
            existing,
        };
        Ok(Self {
            device,
            node,
            overlay,
        })
    }

    fn check(self, info: &DeviceInfo) -> Result<SnapshotAction, CommandError> {
        let device = self.device.as_deref();
        let node = self.node.as_deref();
        let mut names = device.into_iter().chain(node).peekable();
        if names.peek().is_none() || names.clone().any(|name| !info.has(name)) {
            return Err(CommandError::generic(format!(
                "Cannot find device='{}' nor node-name='{}'",
                device.unwrap_or_default(),
                node.unwrap_or_default(),
            )));
        }
        for name in names {
            if root(info, name)?.read_only {
                return Err(read_only(name));
            }
        }
        match self.overlay.node_name.as_deref() {
            // Who names nodes must be able to name the new one.
            None if node.is_some() => {
                return Err(CommandError::generic("New overlay node-name missing"));
            }
            Some(name) if info.has(name) => {
                return Err(CommandError::generic(
                    "New overlay node-name already in use",
                ));
            }
            _ => {}
        }
        Ok(SnapshotAction::External(self.overlay))
    }
}

/// One member of `actions`, its form checked.
enum Action {
    Internal(InternalSnapshot),
    External(ExternalSnapshot),
    Abort,
}

fn transaction(call: Call<'_>) -> Result<Outcome, CommandError> {
    let mut arguments = call.arguments;
    let list = arguments.take("actions", "array", |value| value.as_array().cloned())?;
    let list = arguments.need("actions", list)?;
    let parsed: Vec<Action> = list
        .into_iter()
        .enumerate()
        .map(|(index, action)| parse_action(index, action))
        .collect::<Result<_, _>>()?;
    if let Some(mut properties) = arguments.take_object("properties")? {
        let mode = properties.take_text("completion-mode")?;
        properties.finish()?;
        check_completion_mode(mode.as_deref(), &parsed)?;
    }
    arguments.finish()?;
    let info = call.handler.device_info();
    let mut actions = Vec::new();
    for action in parsed {
        match action {
            Action::Internal(snapshot) => {
                let action = snapshot.check(&info)?;
                if let SnapshotAction::Internal { name } = &action
                    && actions.contains(&action)
                {
                    return Err(snapshot_exists(&info.name, name));
                }
                actions.push(action);
            }
            Action::External(snapshot) => actions.push(snapshot.check(&info)?),
            Action::Abort => {
                return Err(CommandError::generic(
                    "Transaction aborted using Abort action",
                ));
            }
        }
    }
    if actions.is_empty() {
        return Ok(Outcome::Return(json!({})));
    }
    let is_external = |action: &SnapshotAction| matches!(action, SnapshotAction::External(_));
    if actions.len() > 1 && actions.iter().any(is_external) {
        return Err(CommandError::generic(
            "An external snapshot must be the only one of its transaction: nothing else can be \
             done to an image that becomes a backing file",
        ));
    }
    call.handler.order(call.ticket, Order::Snapshot(actions))?;
    Ok(Outcome::Later)
}

fn parse_action(index: usize, action: Value) -> Result<Action, CommandError> {
    let path = format!("actions[{index}]");
    let Value::Object(members) = action else {
        return Err(CommandError::generic(format!(
            "Invalid parameter type for '{path}', expected: object"
        )));
    };
    let mut action = Arguments {
        members,
        path: format!("{path}."),
    };
    let kind = action.need_text("type")?;
    const KINDS: [&str; 3] = [
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "abort",
    ];
    if !KINDS.contains(&kind.as_str()) {
        return Err(CommandError::generic(format!(
            "Parameter 'type' does not accept value '{kind}'"
        )));
    }
    let data = action.take_object("data")?;
    let mut data = action.need("data", data)?;
    action.finish()?;
    let parsed = match kind.as_str() {
        "abort" => Action::Abort,
        "blockdev-snapshot-sync" => Action::External(ExternalSnapshot::parse(&mut data)?),
        _ => Action::Internal(InternalSnapshot::parse(&mut data)?),
    };
    data.finish()?;
    Ok(parsed)
}

fn check_completion_mode(mode: Option<&str>, actions: &[Action]) -> Result<(), CommandError> {
    match mode {
        None | Some("individual") => Ok(()),
        Some("grouped") => match actions.first() {
            None => Ok(()),
            Some(action) => {
                let kind = match action {
                    Action::Internal(_) => "blockdev-snapshot-internal-sync",
                    Action::External(_) => "blockdev-snapshot-sync",
                    Action::Abort => "abort",
                };
                Err(CommandError::generic(format!(
                    "Action '{kind}' does not support transaction property completion-mode = \
                     grouped"
                )))
            }
        },
        Some(other) => Err(CommandError::generic(format!(
            "Parameter 'completion-mode' does not accept value '{other}'"
        ))),
    }
}

fn query_jobs(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    let jobs = call.handler.jobs();
    let list = jobs.iter().map(JobInfo::to_job).collect();
    Ok(Outcome::Return(list))
}

fn query_block_jobs(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    let jobs = call.handler.jobs();
    let list = jobs.iter().map(JobInfo::to_block_job).collect();
    Ok(Outcome::Return(list))
}

fn block_job_set_speed(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let id = call.arguments.need_text("device")?;
    let speed = call.arguments.take("speed", "integer", Value::as_i64)?;
    let speed = call.arguments.need("speed", speed)?;
    call.arguments.finish()?;
    let job = block_job(call.handler, &id)?;
    if job.status == JobStatus::Concluded {
        return Err(job.refuse("set-speed", ""));
    }
    let Some(speed) = u64::try_from(speed).ok() else {
        return Err(CommandError::generic(
            "Parameter 'speed' expects a non-negative value",
        ));
    };
    call.handler.set_job_speed(&id, speed);
    Ok(Outcome::Return(json!({})))
}

fn block_job_cancel(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let id = call.arguments.need_text("device")?;
    call.arguments.take_flag("force")?;
    call.arguments.finish()?;
    Err(cannot_cancel(&block_job(call.handler, &id)?))
}

fn block_job_dismiss(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let id = call.arguments.need_text("id")?;
    call.arguments.finish()?;
    let job = block_job(call.handler, &id)?;
    dismiss(call.handler, &job)
}

fn job_cancel(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let id = call.arguments.need_text("id")?;
    call.arguments.finish()?;
    Err(cannot_cancel(&job(call.handler, &id)?))
}

fn job_dismiss(mut call: Call<'_>) -> Result<Outcome, CommandError> {
    let id = call.arguments.need_text("id")?;
    call.arguments.finish()?;
    let job = job(call.handler, &id)?;
    dismiss(call.handler, &job)
}

fn find_job(handler: &mut dyn Handler, id: &str) -> Option<JobInfo> {
    handler.jobs().into_iter().find(|job| job.id == id)
}

/// A job, with the refusal of the commands for any job.
fn job(handler: &mut dyn Handler, id: &str) -> Result<JobInfo, CommandError> {
    find_job(handler, id).ok_or_else(|| CommandError::generic("Job not found"))
}

/// A job, with the refusal of the commands for block jobs.
fn block_job(handler: &mut dyn Handler, id: &str) -> Result<JobInfo, CommandError> {
    find_job(handler, id)
        .ok_or_else(|| CommandError::not_active(format!("Block job '{id}' not found")))
}

/// A snapshot is taken or deleted when its command returns: what is left cannot be taken back.
fn cannot_cancel(job: &JobInfo) -> CommandError {
    job.refuse(
        "cancel",
        ": this work is needed to bring the image's reference counts up to date",
    )
}

fn dismiss(handler: &mut dyn Handler, job: &JobInfo) -> Result<Outcome, CommandError> {
    if job.status != JobStatus::Concluded {
        return Err(job.refuse("dismiss", ""));
    }
    handler.dismiss_job(&job.id);
    Ok(Outcome::Return(json!({})))
}

fn quit(call: Call<'_>) -> Result<Outcome, CommandError> {
    call.arguments.finish()?;
    Ok(Outcome::Quit)
}
