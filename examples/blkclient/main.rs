//! `blkclient`: a load generator and verifier for vhost-user-blk servers.
//!
//! Only the command line lives here; the work is in `kit`, which the integration tests use too.
//! Prints one JSON object to standard output. Exit status: 0 if all is well, 1 for a miscompare, an
//! error status, a hang or a server that died, 2 for a wrong command line.

mod kit;

use clap::{Args, Parser, Subcommand};
use kit::bench::{self, Pattern};
use kit::chaos::{self, Initial};
use kit::disk::{ConnectOptions, Disk};
use kit::remote::Remote;
use kit::{Error, verify};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A vhost-user-blk client that measures and verifies
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Print what the server says about the disk
    Info(Connect),
    /// Generate load and measure it
    Bench(Bench),
    /// Do random verified work
    Chaos(Chaos),
    /// Check a disk against the state that a chaos run left behind
    Verify(Verify),
}

#[derive(Args)]
struct Connect {
    /// The server's socket
    #[arg(long)]
    socket: PathBuf,
    /// How many queues to use
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32)]
    iodepth: usize,
    /// Seconds to wait for the socket to appear
    #[arg(long, default_value_t = 10.0)]
    connect_timeout: f64,
}

impl Connect {
    fn options(&self) -> ConnectOptions {
        ConnectOptions {
            queues: self.queues,
            slots: self.iodepth,
            timeout: Duration::from_secs_f64(self.connect_timeout),
            ..ConnectOptions::new(&self.socket)
        }
    }
}

#[derive(Args)]
struct Bench {
    #[command(flatten)]
    connect: Connect,
    /// What to do
    #[arg(long, value_enum)]
    rw: Pattern,
    /// Bytes of one request; suffixes k, M, G
    #[arg(long, default_value = "4k", value_parser = parse_size)]
    bs: u64,
    /// Distance of two blocks [default: a block]
    #[arg(long, value_parser = parse_size)]
    stride: Option<u64>,
    /// Reads among 100 requests of randrw
    #[arg(long, default_value_t = 70)]
    read_percent: u32,
    /// First byte of the region
    #[arg(long, default_value = "0", value_parser = parse_size)]
    offset: u64,
    /// Bytes of the region [default: the whole disk]
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Seconds to measure
    #[arg(long, default_value_t = 5.0)]
    runtime: f64,
    /// Seconds before measuring
    #[arg(long, default_value_t = 0.0)]
    ramp: f64,
    /// End after that many requests
    #[arg(long)]
    ios: Option<u64>,
    /// Requests per second, 0 for no limit
    #[arg(long, default_value_t = 0)]
    rate: u64,
    /// Client threads; the queues are shared out among them
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Spin for completions instead of sleeping
    #[arg(long)]
    poll: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Process to measure the CPU time of
    #[arg(long)]
    server_pid: Option<u32>,
    /// Write down in this file, as JSON, what completed in each millisecond
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// Take commands from standard input; its end ends the load
    ///
    /// `region OFFSET BYTES` moves a random load there, `region all` back to the region it began
    /// with.
    #[arg(long)]
    remote: bool,
}

#[derive(Args)]
struct Chaos {
    #[command(flatten)]
    connect: Connect,
    /// How long to run, without the verification of the whole region after it
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// End after that many requests
    #[arg(long)]
    ios: Option<u64>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Bytes from the start of the disk to work on
    #[arg(long, default_value = "4G", value_parser = parse_size)]
    size: u64,
    /// The disk must be empty (default: any content is read and kept in mind)
    #[arg(long, conflicts_with_all = ["initial_raw", "initial_state"])]
    initial_zero: bool,
    /// The disk must hold what this raw file holds
    #[arg(long, value_name = "RAW")]
    initial_raw: Option<PathBuf>,
    /// Continue from the state that an earlier run or `verify --pin` saved
    #[arg(long, value_name = "STATE", conflicts_with = "initial_raw")]
    initial_state: Option<PathBuf>,
    /// Discarded whole clusters of this size must read as zeroes, 0: discards may do nothing
    #[arg(long, default_value = "0", value_parser = parse_size)]
    discard_cluster: u64,
    /// Never have two changes in flight in one aligned block of this size
    #[arg(long, default_value = "0", value_parser = parse_size)]
    exclusive: u64,
    /// Neither discard nor write zeroes
    #[arg(long)]
    only_data: bool,
    /// File for the content from before the run (needed with --state-out unless the disk is empty)
    #[arg(long)]
    base: Option<PathBuf>,
    /// Write the final content to this raw file
    #[arg(long)]
    model_out: Option<PathBuf>,
    /// Survive the death of the server; save here what each sector may hold
    #[arg(long)]
    state_out: Option<PathBuf>,
}

#[derive(Args)]
struct Verify {
    #[command(flatten)]
    connect: Connect,
    /// The file from `chaos --state-out`
    #[arg(long)]
    state: PathBuf,
    /// Save the state that was found, for `chaos --initial-state`
    #[arg(long)]
    pin: Option<PathBuf>,
    /// Write the content that was found to this raw file
    #[arg(long)]
    model_out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().mode {
        Mode::Info(connect) => info(&connect),
        Mode::Bench(options) => run_bench(&options),
        Mode::Chaos(options) => run_chaos(options),
        Mode::Verify(options) => run_verify(options),
    };
    let (text, code) = match outcome {
        Ok(value) => {
            let clean = value["errors"].as_u64().unwrap_or(0) == 0;
            (
                value.to_string(),
                if clean {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::FAILURE
                },
            )
        }
        Err(error) => {
            // Standard output says it too, for scripts that parse it.
            let _ = writeln!(io::stderr().lock(), "blkclient: {error}");
            (
                json!({ "failed": error.to_string() }).to_string(),
                ExitCode::FAILURE,
            )
        }
    };
    match writeln!(io::stdout().lock(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn info(connect: &Connect) -> Result<Value, Error> {
    let (disk, mut queues) = Disk::connect(&connect.options())?;
    let geometry = disk.geometry;
    let serial = disk.serial(&mut queues[0])?;
    Ok(json!({
        "capacity_bytes": geometry.capacity_sectors * kit::SECTOR_BYTES as u64,
        "serial": serial,
        "queues": geometry.queues,
        "block_bytes": geometry.block_bytes,
        "seg_max": geometry.seg_max,
        "size_max": geometry.size_max,
        "max_discard_sectors": geometry.max_discard_sectors,
        "max_discard_segments": geometry.max_discard_segments,
        "max_write_zeroes_sectors": geometry.max_write_zeroes_sectors,
        "max_write_zeroes_segments": geometry.max_write_zeroes_segments,
        "writeback": geometry.writeback,
        "features": format!("{:#x}", geometry.features),
        "block_features": format!("{:?}", virtio_driver::VirtioBlkFeatureFlags::from_bits_truncate(
            geometry.features
        )),
        "ring_features": format!("{:?}", virtio_driver::VirtioFeatureFlags::from_bits_truncate(
            geometry.features
        )),
    }))
}

fn run_bench(args: &Bench) -> Result<Value, Error> {
    let block_bytes = kit::index(args.bs);
    let end = args
        .size
        .map_or(u64::MAX, |size| args.offset.saturating_add(size));
    bench::run(&bench::Options {
        connect: ConnectOptions {
            slot_bytes: block_bytes.max(4096),
            ..args.connect.options()
        },
        pattern: args.rw,
        read_percent: args.read_percent,
        block_bytes,
        stride_bytes: args.stride.unwrap_or(args.bs),
        region: args.offset..end,
        threads: args.threads,
        poll: args.poll,
        ramp: Duration::from_secs_f64(args.ramp),
        runtime: Duration::from_secs_f64(args.runtime),
        requests_max: args.ios.unwrap_or(u64::MAX),
        rate: args.rate,
        seed: args.seed,
        server_pid: args.server_pid,
        timeline: args.timeline.clone(),
        remote: args.remote.then(Remote::on_stdin),
    })
}

fn run_chaos(args: Chaos) -> Result<Value, Error> {
    let initial = match (args.initial_zero, args.initial_raw, args.initial_state) {
        (true, _, _) => Initial::Zero,
        (_, Some(path), _) => Initial::Raw(path),
        (_, _, Some(path)) => Initial::State(path),
        _ => Initial::Read,
    };
    let duration = Duration::from_secs_f64(args.seconds);
    let defaults = chaos::Options::new(&args.connect.socket, args.connect.queues, duration);
    let base = match &initial {
        // A state file has to name the file with the content that it refers to.
        Initial::Raw(path) => Some(path.clone()),
        _ => args.base,
    };
    let report = chaos::run(&chaos::Options {
        connect: ConnectOptions {
            data_descriptors: defaults.connect.data_descriptors,
            ..args.connect.options()
        },
        requests_max: args.ios.unwrap_or(u64::MAX),
        seed: args.seed,
        region_bytes: args.size,
        initial,
        discard_cluster_bytes: args.discard_cluster,
        exclusive_bytes: args.exclusive,
        only_data: args.only_data,
        base,
        model_out: args.model_out,
        state_out: args.state_out,
        ..defaults
    })?;
    Ok(json!(report))
}

fn run_verify(args: Verify) -> Result<Value, Error> {
    let report = verify::run(&verify::Options {
        connect: args.connect.options(),
        state: args.state,
        pin: args.pin,
        model_out: args.model_out,
    })?;
    Ok(json!(report))
}

/// A number of bytes with an optional suffix.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('k' | 'K') => (&text[..text.len() - 1], 10),
        Some('m' | 'M') => (&text[..text.len() - 1], 20),
        Some('g' | 'G') => (&text[..text.len() - 1], 30),
        Some('t' | 'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let Ok(number) = digits.parse::<u64>() else {
        return Err(format!("{text:?} is not a size"));
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}
