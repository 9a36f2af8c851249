//! The command table: names, argument checks, and what each command asks of the daemon.
//!
//! A command here runs to its end at once; none may wait. The reply is not made here: the server
//! sends it to the session and `id` that the request came with, so that a command whose answer
//! comes later can use the same way.

use serde_json::{Map, Value, json};

use super::error::CommandError;
use super::info::{self, DeviceInfo, DeviceStats};
use super::wire::Request;

/// What the control socket needs from the daemon. Called on the main thread; must not block.
pub trait Handler {
    /// Describes the device and its backing chain.
    fn device_info(&mut self) -> DeviceInfo;

    /// Sums up the counters of all workers.
    fn device_stats(&mut self) -> DeviceStats;

    /// Takes an external snapshot.
    ///
    /// # Errors
    /// Why not, in a sentence.
    fn external_snapshot(&mut self, request: &ExternalSnapshot) -> Result<(), String>;

    /// Asks for an orderly shutdown. The reply is already on its way to the client.
    fn quit(&mut self);
}

/// What `blockdev-snapshot-sync` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalSnapshot {
    /// The overlay.
    pub file: String,
    /// Name of its node.
    pub node_name: Option<String>,
    /// The overlay is there already.
    pub existing: bool,
}

/// What becomes of a command that was carried out.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// Reply with this.
    Return(Value),
    /// Reply with an empty object, then shut down.
    Quit,
}

type Run = fn(Arguments, &mut dyn Handler) -> Result<Outcome, CommandError>;

/// Every command that a negotiated session has. Negotiation itself is not here but in
/// [`negotiate`], and listed by hand.
const COMMANDS: &[(&str, Run)] = &[
    ("query-version", query_version),
    ("query-commands", query_commands),
    ("query-block", query_block),
    ("query-named-block-nodes", query_named_block_nodes),
    ("query-blockstats", query_blockstats),
    ("blockdev-snapshot-sync", snapshot_sync),
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
    let mut arguments = Arguments(request.arguments);
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
    run(Arguments(request.arguments), handler)
}

/// Arguments that are taken out one by one, so that what is left over can be refused.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn take<T>(
        &mut self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, CommandError> {
        let Some(value) = self.0.shift_remove(name) else {
            return Ok(None);
        };
        convert(&value).map(Some).ok_or_else(|| {
            CommandError::generic(format!(
                "Invalid parameter type for '{name}', expected: {expected}"
            ))
        })
    }

    fn take_flag(&mut self, name: &str) -> Result<bool, CommandError> {
        Ok(self.take(name, "boolean", Value::as_bool)?.unwrap_or(false))
    }

    fn finish(self) -> Result<(), CommandError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!(
                "Parameter '{name}' is unexpected"
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

fn query_version(arguments: Arguments, _: &mut dyn Handler) -> Result<Outcome, CommandError> {
    arguments.finish()?;
    Ok(Outcome::Return(version()))
}

fn query_commands(arguments: Arguments, _: &mut dyn Handler) -> Result<Outcome, CommandError> {
    arguments.finish()?;
    let names = COMMANDS.iter().map(|(name, _)| *name);
    let list = names
        .chain([NEGOTIATE])
        .map(|name| json!({ "name": name }))
        .collect();
    Ok(Outcome::Return(list))
}

fn query_block(arguments: Arguments, handler: &mut dyn Handler) -> Result<Outcome, CommandError> {
    arguments.finish()?;
    Ok(Outcome::Return(info::block_list(&handler.device_info())))
}

fn query_named_block_nodes(
    mut arguments: Arguments,
    handler: &mut dyn Handler,
) -> Result<Outcome, CommandError> {
    let flat = arguments.take_flag("flat")?;
    arguments.finish()?;
    Ok(Outcome::Return(info::node_list(
        &handler.device_info(),
        flat,
    )))
}

fn query_blockstats(
    mut arguments: Arguments,
    handler: &mut dyn Handler,
) -> Result<Outcome, CommandError> {
    let query_nodes = arguments.take_flag("query-nodes")?;
    arguments.finish()?;
    let device = handler.device_info();
    let stats = handler.device_stats();
    Ok(Outcome::Return(if query_nodes {
        info::node_stats_list(&device, &stats)
    } else {
        info::device_stats_list(&device, &stats)
    }))
}

fn snapshot_sync(
    mut arguments: Arguments,
    handler: &mut dyn Handler,
) -> Result<Outcome, CommandError> {
    let mut text = |name| arguments.take(name, "string", |value| value.as_str().map(str::to_owned));
    let (device, node) = (text("device")?, text("node-name")?);
    let file = text("snapshot-file")?;
    let node_name = text("snapshot-node-name")?;
    let (format, mode) = (text("format")?, text("mode")?);
    arguments.finish()?;
    let info = handler.device_info();
    let active = info.chain.first().map(|node| node.node_name.as_str());
    let named = match (&device, &node) {
        (Some(device), None) => *device == info.name || active == Some(device),
        (None, Some(node)) => active == Some(node),
        _ => return Err(CommandError::generic("give either 'device' or 'node-name'")),
    };
    if !named {
        return Err(CommandError::generic("there is no such device"));
    }
    let Some(file) = file else {
        return Err(CommandError::generic(
            "Parameter 'snapshot-file' is missing",
        ));
    };
    if format.is_some_and(|format| format != "qcow2") {
        return Err(CommandError::generic(
            "only the format 'qcow2' can have a backing file",
        ));
    }
    let existing = match mode.as_deref() {
        None | Some("absolute-paths") => false,
        Some("existing") => true,
        Some(_) => return Err(CommandError::generic("Parameter 'mode' is unknown")),
    };
    let request = ExternalSnapshot {
        file,
        node_name,
        existing,
    };
    handler
        .external_snapshot(&request)
        .map_err(CommandError::generic)?;
    Ok(Outcome::Return(json!({})))
}

fn quit(arguments: Arguments, _: &mut dyn Handler) -> Result<Outcome, CommandError> {
    arguments.finish()?;
    Ok(Outcome::Quit)
}
