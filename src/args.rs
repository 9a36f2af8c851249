//! The command line as typed: clap definitions and help texts, nothing else.
//!
//! What is typed here is made sense of in [`crate::config`]: sizes, modes and everything that has a
//! rule stay text or plain numbers until then, so that every refusal is worded in one place.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Serves a qcow2 or raw image as a virtio-blk disk over vhost-user
#[derive(Debug, Parser)]
#[command(
    name = "qblkd",
    version,
    args_conflicts_with_subcommands = true,
    max_term_width = 100,
    after_help = "\
Sizes are in bytes, or take a suffix: b (bytes), k, M, G, T, P, E (powers of 1024), as in 1.5G.

Examples:
  Serve an image, with a control socket:
    qblkd --socket-path /run/disk.sock --blk-file disk.qcow2 --control /run/disk-control.sock
  Use it from QEMU:
    qemu-system-x86_64 \\
      -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\
      -chardev socket,id=disk,path=/run/disk.sock -device vhost-user-blk-pci,chardev=disk
  Make an image, look at it, check it:
    qblkd create disk.qcow2 20G
    qblkd info disk.qcow2
    qblkd check disk.qcow2
  Take a snapshot while it is served, and see it:
    qblkd snapshot create before-upgrade --control /run/disk-control.sock
    qblkd snapshot list --control /run/disk-control.sock

Exit status: 0 on success, 1 on errors. `qblkd check` has more, see its help."
)]
pub struct Cli {
    /// A tool instead of the server.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Without a subcommand, the options are those of `serve`.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an image (the default; the word may be left out)
    #[command(after_help = "Sizes and examples: see `qblkd --help`.")]
    Serve(Box<ServeArgs>),
    /// Create a qcow2 image, replacing the file if nobody uses it
    Create(CreateArgs),
    /// Describe an image
    Info(InfoArgs),
    /// Check a qcow2 image for errors, and repair it if asked to
    Check(CheckArgs),
    /// Take, list, delete and go back to internal snapshots, also while the image is served
    #[command(
        subcommand,
        after_help = "\
Examples:
  qblkd snapshot create before-upgrade --control /run/disk-control.sock --wait
  qblkd snapshot list --control /run/disk-control.sock
  qblkd snapshot delete before-upgrade --blk-file disk.qcow2

--control talks to the qblkd that serves the image; --blk-file opens an image that nobody uses."
    )]
    Snapshot(SnapshotCommand),
}

/// What to do with internal snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take an internal snapshot of the disk as it is now
    #[command(after_help = "\
The snapshot is there, and durable, when the command returns. What is left is background work, which
--wait waits for. On images of version 2 (compat 0.10) that work comes before the snapshot is there.

Examples:
  qblkd snapshot create before-upgrade --control /run/disk-control.sock
  qblkd snapshot create before-upgrade --blk-file disk.qcow2")]
    Create(SnapshotCreateArgs),
    /// List the internal snapshots
    #[command(after_help = "\
Examples:
  qblkd snapshot list --control /run/disk-control.sock
  qblkd snapshot list --blk-file disk.qcow2 --json")]
    List(SnapshotListArgs),
    /// Delete an internal snapshot
    #[command(after_help = "\
Examples:
  qblkd snapshot delete before-upgrade --control /run/disk-control.sock --wait
  qblkd snapshot delete --id 3 --blk-file disk.qcow2")]
    Delete(SnapshotDeleteArgs),
    /// Make the disk what it was in an internal snapshot; what was written since is lost
    #[command(after_help = "\
The snapshot stays. No guest may use the disk meanwhile: with --control this is refused while a
virtqueue runs.

Examples:
  qblkd snapshot revert before-upgrade --control /run/disk-control.sock
  qblkd snapshot revert before-upgrade --blk-file disk.qcow2")]
    Revert(SnapshotRevertArgs),
}

/// Where the snapshots are.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SnapshotTargetArgs {
    /// Control socket of the qblkd that serves the image
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// An image that nobody uses
    #[arg(long, value_name = "FILE")]
    pub blk_file: Option<PathBuf>,
}

/// Options of `qblkd snapshot create`.
#[derive(Debug, Args)]
pub struct SnapshotCreateArgs {
    /// What the snapshot is to be called
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Where the snapshots are.
    #[command(flatten)]
    pub target: SnapshotTargetArgs,

    /// Wait until the background work is done (with --blk-file it always is)
    #[arg(long)]
    pub wait: bool,
}

/// Options of `qblkd snapshot list`.
#[derive(Debug, Args)]
pub struct SnapshotListArgs {
    /// Where the snapshots are.
    #[command(flatten)]
    pub target: SnapshotTargetArgs,

    /// Print JSON: a list in the form of `snapshots` of `qemu-img info --output=json`
    #[arg(long)]
    pub json: bool,
}

/// Which snapshot is meant.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SnapshotNameArgs {
    /// Name of the snapshot; if none has this name, its id
    #[arg(value_name = "SNAPSHOT")]
    pub name: Option<String>,

    /// Id of the snapshot
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
}

/// Options of `qblkd snapshot delete`.
#[derive(Debug, Args)]
pub struct SnapshotDeleteArgs {
    /// Which snapshot is meant.
    #[command(flatten)]
    pub which: SnapshotNameArgs,

    /// Where the snapshots are.
    #[command(flatten)]
    pub target: SnapshotTargetArgs,

    /// Wait until the space is given back (with --blk-file it always is)
    #[arg(long)]
    pub wait: bool,
}

/// Options of `qblkd serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Listen for the front-end (the VMM) on a Unix socket at this path
    ///
    /// The socket appears once the image is open. A stale one is replaced, a live one refused.
    #[arg(long, value_name = "PATH", help_heading = "Front-end")]
    pub socket_path: Option<PathBuf>,

    /// Use this open socket instead of --socket-path; it may be listening or already connected
    #[arg(
        long,
        value_name = "N",
        help_heading = "Front-end",
        allow_negative_numbers = true
    )]
    pub fd: Option<i32>,

    /// Group of the socket file, by name or number [default: the process's]
    #[arg(long, value_name = "GROUP", help_heading = "Front-end")]
    pub socket_group: Option<String>,

    /// Permissions of the socket file in octal, 0 to 777 [default: what the umask leaves]
    #[arg(long, value_name = "MODE", help_heading = "Front-end")]
    pub socket_mode: Option<String>,

    /// Print what this back-end can do as JSON, and exit
    #[arg(long, help_heading = "Front-end")]
    pub print_capabilities: bool,

    /// The image to serve: a regular file or a block device
    #[arg(long, value_name = "FILE", help_heading = "Image")]
    pub blk_file: Option<PathBuf>,

    /// Serve a read-only disk; nothing is ever written to the image
    #[arg(long, help_heading = "Image")]
    pub read_only: bool,

    /// Serve the disk as it is in this internal snapshot, by its name or else its id; needs
    /// --read-only
    #[arg(long, value_name = "SNAPSHOT", help_heading = "Image")]
    pub snapshot: Option<String>,

    /// Format of the image; it is never guessed
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "qcow2",
        help_heading = "Image"
    )]
    pub format: FormatArg,

    /// How the host's page cache is used
    #[arg(
        long,
        value_name = "MODE",
        default_value = "writeback",
        help_heading = "Image"
    )]
    pub cache: CacheArg,

    /// Whether a discard by the guest gives space back to the host
    ///
    /// The guest is offered DISCARD and WRITE_ZEROES either way, unless the disk is read-only.
    #[arg(
        long,
        value_name = "MODE",
        default_value = "unmap",
        help_heading = "Image"
    )]
    pub discard: DiscardArg,

    /// Whether to take the image locks that QEMU's tools respect
    #[arg(
        long,
        value_name = "MODE",
        default_value = "auto",
        help_heading = "Image"
    )]
    pub locking: LockingArg,

    /// Another directory that backing files may be in, besides the image's own (repeatable)
    #[arg(long, value_name = "DIR", help_heading = "Image")]
    pub backing_dir: Vec<PathBuf>,

    /// Another directory that external snapshots may be made in, besides the image's own (repeatable)
    #[arg(long, value_name = "DIR", help_heading = "Image")]
    pub snapshot_dir: Vec<PathBuf>,

    /// Memory for cached L2 tables; too little is rounded up
    /// [default: twice what the whole disk has, at most 256M]
    #[arg(long, value_name = "SIZE", help_heading = "Image")]
    pub l2_cache_size: Option<String>,

    /// Bytes of an L2 table per cache entry: a power of two from 512 to the cluster size
    /// [default: 4k, or the cluster size if that is smaller]
    #[arg(long, value_name = "SIZE", help_heading = "Image")]
    pub l2_cache_entry_size: Option<String>,

    /// Memory for cached refcount blocks; too little is rounded up [default: 4M]
    #[arg(long, value_name = "SIZE", help_heading = "Image")]
    pub refcount_cache_size: Option<String>,

    /// Logical block size that the guest sees: a power of two from 512 to 64k
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "512",
        help_heading = "Disk"
    )]
    pub block_size: String,

    /// Serial number that the guest sees: up to 20 printable ASCII characters [default: none]
    #[arg(long, value_name = "TEXT", help_heading = "Disk")]
    pub serial: Option<String>,

    /// Name of the device and its node on the control socket: a letter, then letters, digits,
    /// '-', '.' or '_', up to 31 in all
    #[arg(
        long,
        value_name = "NAME",
        default_value = "disk0",
        help_heading = "Disk"
    )]
    pub id: String,

    /// Virtqueues offered, 1 to 64; QEMU asks for one per vCPU and fails if there are fewer
    #[arg(long, value_name = "N", default_value = "16", help_heading = "Disk")]
    pub num_queues: u32,

    /// The largest virtqueue accepted, in descriptors: a power of two from 2 to 32768
    #[arg(long, value_name = "N", default_value = "1024", help_heading = "Disk")]
    pub queue_size: u32,

    /// Worker threads, 1 to 64; there are never more than virtqueues [default: CPUs available]
    #[arg(long, value_name = "N", help_heading = "Server")]
    pub threads: Option<u32>,

    /// Longest time in microseconds, 0 to 10000, that a worker polls before it sleeps; it adapts
    /// below that, and 0 never polls
    #[arg(long, value_name = "US", default_value = "50", help_heading = "Server")]
    pub poll_us: u32,

    /// Listen for control clients (QMP) on a Unix socket at this path [default: none]
    #[arg(long, value_name = "PATH", help_heading = "Server")]
    pub control: Option<PathBuf>,

    /// What to log to stderr: off, error, warn, info, debug or trace, also by module
    ///
    /// A comma-separated list of LEVEL and MODULE=LEVEL, for example
    /// "info,qblkd::control=debug".
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "info",
        help_heading = "Server"
    )]
    pub log: String,
}

/// Options of `qblkd create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  qblkd create disk.qcow2 20G
  qblkd create disk.qcow2 2T --cluster-size 128k --preallocation metadata
  qblkd create overlay.qcow2 --backing-file disk.qcow2 --backing-format qcow2")]
pub struct CreateArgs {
    /// The image to create; an existing file is overwritten, unless it is in use
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Size of the virtual disk, rounded up to 512 bytes [default: that of the backing file]
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,

    /// Allocation unit: a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE", default_value = "64k")]
    pub cluster_size: String,

    /// Width of a reference count: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS", default_value = "16")]
    pub refcount_bits: u32,

    /// Allow writers to let reference counts lag behind and rebuild them after a crash; qblkd itself
    /// keeps them exact
    #[arg(long)]
    pub lazy_refcounts: bool,

    /// What to allocate now
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub preallocation: PreallocationArg,

    /// Backing file, relative to the new image; it is where unwritten data are read from
    #[arg(long, value_name = "FILE")]
    pub backing_file: Option<PathBuf>,

    /// Format of the backing file; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    pub backing_format: Option<FormatArg>,

    /// Version of the format: 0.10 (or v2) for very old readers, 1.1 (or v3) for all others
    #[arg(long, value_name = "VERSION", default_value = "1.1")]
    pub compat: CompatArg,
}

/// Options of `qblkd info`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  qblkd info disk.qcow2
  qblkd info overlay.qcow2 --backing-chain --json")]
pub struct InfoArgs {
    /// The image to describe
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Print JSON in the form of `qemu-img info --output=json`
    #[arg(long)]
    pub json: bool,

    /// Describe the backing files as well
    #[arg(long)]
    pub backing_chain: bool,

    /// Another directory that backing files may be in, besides the image's own (repeatable)
    #[arg(long, value_name = "DIR")]
    pub backing_dir: Vec<PathBuf>,
}

/// Options of `qblkd check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
   0  the image is consistent (after the repair, if one was asked for)
   1  the check could not be done
   2  the image is corrupt
   3  the image has leaked clusters, and is not corrupt
  63  the format has no checks

Examples:
  qblkd check disk.qcow2
  qblkd check --repair leaks disk.qcow2")]
pub struct CheckArgs {
    /// The image to check
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Repair what is found: leaks loses no data; all may have to guess
    #[arg(long, value_name = "WHAT")]
    pub repair: Option<RepairArg>,

    /// Print the result as JSON in the form of `qemu-img check --output=json`
    #[arg(long)]
    pub json: bool,

    /// Print errors only
    #[arg(long, short)]
    pub quiet: bool,
}

/// Options of `qblkd snapshot revert`.
#[derive(Debug, Args)]
pub struct SnapshotRevertArgs {
    /// Which snapshot is meant.
    #[command(flatten)]
    pub which: SnapshotNameArgs,

    /// Where the snapshots are.
    #[command(flatten)]
    pub target: SnapshotTargetArgs,

    /// Wait until the references are counted anew (with --blk-file they always are)
    #[arg(long)]
    pub wait: bool,
}

/// `--format`, `--backing-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// QEMU's copy-on-write format
    Qcow2,
    /// The bytes of the disk, nothing else
    Raw,
}

/// `--cache`: QEMU's words and meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheArg {
    /// O_DIRECT; the guest flushes
    None,
    /// The host caches; the guest flushes
    Writeback,
    /// The host caches; every write is durable before it completes
    Writethrough,
    /// O_DIRECT; every write is durable before it completes
    Directsync,
    /// The host caches and flushes are ignored; a crash of the host loses the image
    Unsafe,
}

/// `--discard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiscardArg {
    /// Space is given back
    Unmap,
    /// Discards do nothing
    Ignore,
}

/// `--locking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LockingArg {
    /// Lock if the host can
    Auto,
    /// Lock, and fail if the host cannot
    On,
    /// Do not lock
    Off,
}

/// `--preallocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PreallocationArg {
    /// Nothing
    Off,
    /// All tables; the data stay a hole
    Metadata,
    /// All tables, and space for the data
    Falloc,
    /// All tables, and the data are written as zeroes
    Full,
}

/// `--compat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompatArg {
    /// Version 2
    #[value(name = "0.10", alias = "v2")]
    V2,
    /// Version 3
    #[value(name = "1.1", alias = "v3")]
    V3,
}

/// `--repair`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Leaked clusters only
    Leaks,
    /// Everything that can be repaired
    All,
}
