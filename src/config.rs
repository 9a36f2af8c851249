//! The command line as used: validated, in the units of the program, built only through
//! [`Config::try_from`].
//!
//! Refusals name the option, repeat what was given and say what is allowed. What only the image or
//! the host can tell (does the file exist, is the cache entry larger than a cluster) is not known
//! here.

use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::args::{
    CacheArg, CheckArgs, Cli, Command, CompatArg, CreateArgs, DiscardArg, FormatArg, InfoArgs,
    LockingArg, PreallocationArg, RepairArg, ServeArgs, SnapshotCommand, SnapshotNameArgs,
    SnapshotTargetArgs,
};

/// What the process is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Config {
    /// Serve an image.
    Serve(Box<ServeConfig>),
    /// Print [`CAPABILITIES`].
    PrintCapabilities,
    /// Create an image.
    Create(CreateConfig),
    /// Describe an image.
    Info(InfoConfig),
    /// Check an image.
    Check(CheckConfig),
    /// Work with internal snapshots.
    Snapshot(SnapshotConfig),
}

/// Answer to `--print-capabilities`, in the form of QEMU's vhost-user back-end conventions.
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}"#;

/// The most virtqueues: the framework keeps sets of them in 64-bit masks.
pub const QUEUE_COUNT_MAX: u32 = u64::BITS;

/// The largest virtqueue that virtio 1.x allows, in descriptors.
pub const QUEUE_SIZE_MAX: u32 = 1 << 15;

/// Length of the serial number in virtio-blk, in bytes.
pub const SERIAL_BYTES_MAX: usize = 20;

/// Length of a QEMU node name, in bytes.
pub const ID_BYTES_MAX: usize = 31;

/// Smallest and largest logical block, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 512..=64 << 10;

/// Smallest and largest qcow2 cluster, in bytes.
const CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 512..=2 << 20;

/// The longest polling before a worker sleeps, in microseconds.
const POLL_US_MAX: u32 = 10_000;

/// The largest virtual disk: host and guest offsets are signed on every interface below us.
const DISK_BYTES_MAX: u64 = i64::MAX as u64 & !511;

/// Everything that serving needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeConfig {
    /// Where the front-end comes from.
    pub endpoint: Endpoint,
    /// The image, and how to use it.
    pub image: ImageConfig,
    /// The disk that the guest sees.
    pub disk: DiskConfig,
    /// Worker threads; `None` for the CPUs available.
    pub thread_count: Option<u32>,
    /// The longest polling before a worker sleeps, in microseconds; 0 for none.
    pub poll_us: u32,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// Filter in the syntax of `env_logger`.
    pub log_filter: String,
}

/// Where the front-end comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket to be made.
    Path {
        /// Where.
        path: PathBuf,
        /// Its group, by name or number.
        group: Option<String>,
        /// Its permissions; `None` for what the umask leaves.
        mode: Option<u32>,
    },
    /// An open descriptor of a listening or connected socket.
    Fd(RawFd),
}

/// The image, and how to use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Never write to it.
    pub read_only: bool,
    /// Name or id of the internal snapshot to serve; only where `read_only`.
    pub snapshot: Option<String>,
    /// How the host's page cache is used.
    pub cache: CacheMode,
    /// Give discarded space back.
    pub discard_unmaps: bool,
    /// Image locks.
    pub locking: Locking,
    /// Directories besides the image's own that backing files may be in.
    pub backing_dirs: Vec<PathBuf>,
    /// Directories besides the image's own that external snapshots may be made in.
    pub snapshot_dirs: Vec<PathBuf>,
    /// Budget for L2 slices; `None` for enough for the whole disk, up to a cap. Any size, also one
    /// that holds less than a slice: as with QEMU, the cache takes the least that it can work with.
    pub l2_cache_bytes: Option<u64>,
    /// Size of an L2 slice; `None` for 4 KiB or less. May exceed the cluster size, which the image
    /// has to refuse.
    pub l2_cache_entry_bytes: Option<u64>,
    /// Budget for refcount blocks, likewise; `None` for what the image suggests.
    pub refcount_cache_bytes: Option<u64>,
}

/// The disk that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Logical block size.
    pub block_bytes: u32,
    /// Serial number, at most [`SERIAL_BYTES_MAX`] bytes; empty for none.
    pub serial: String,
    /// Name on the control socket.
    pub id: String,
    /// Virtqueues offered, at most [`QUEUE_COUNT_MAX`].
    pub queue_count: u16,
    /// Largest virtqueue accepted, at most [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
}

/// Image formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// No format.
    Raw,
}

/// QEMU's cache modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// `none`
    None,
    /// `writeback`
    Writeback,
    /// `writethrough`
    Writethrough,
    /// `directsync`
    Directsync,
    /// `unsafe`
    Unsafe,
}

impl CacheMode {
    /// Whether the image is opened with O_DIRECT.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a write may complete before it is durable.
    pub fn is_writeback(self) -> bool {
        !matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Whether flushes do nothing.
    pub fn ignores_flush(self) -> bool {
        matches!(self, Self::Unsafe)
    }
}

/// Whether to take image locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// If the host can.
    Auto,
    /// Or fail.
    On,
    /// No.
    Off,
}

/// What `create` makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateConfig {
    /// The file.
    pub path: PathBuf,
    /// Size of the virtual disk, a multiple of 512; `None` for that of the backing file.
    pub virtual_size_bytes: Option<u64>,
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Logarithm of the refcount width.
    pub refcount_order: u32,
    /// Whether refcounts may lag.
    pub lazy_refcounts: bool,
    /// What to allocate.
    pub preallocation: Preallocation,
    /// The backing file as it will stand in the image, and its format.
    pub backing: Option<(PathBuf, Format)>,
    /// 2 or 3.
    pub version: u32,
}

/// What `create` allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    Off,
    /// Tables.
    Metadata,
    /// Tables and space.
    Falloc,
    /// Tables and zeroes.
    Full,
}

/// What `info` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoConfig {
    /// The file.
    pub path: PathBuf,
    /// JSON instead of text.
    pub json: bool,
    /// With the backing files.
    pub backing_chain: bool,
    /// Directories besides the image's own that backing files may be in.
    pub backing_dirs: Vec<PathBuf>,
}

/// What `check` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckConfig {
    /// The file.
    pub path: PathBuf,
    /// What to repair.
    pub repair: Repair,
    /// JSON instead of text.
    pub json: bool,
    /// Errors only.
    pub quiet: bool,
}

/// What `check` repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing; the image is opened for reading.
    None,
    /// Leaked clusters.
    Leaks,
    /// Everything.
    All,
}

/// What `snapshot` does, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// Where the snapshots are.
    pub target: SnapshotTarget,
    /// What to do.
    pub action: SnapshotAction,
}

/// Where internal snapshots are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotTarget {
    /// Behind the control socket of a server.
    Control(PathBuf),
    /// In an image that nobody uses.
    File(PathBuf),
}

/// What to do with internal snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Take one.
    Create {
        /// What it is called.
        name: String,
        /// Stay until the background work is done.
        wait: bool,
    },
    /// Show them.
    List {
        /// As JSON.
        json: bool,
    },
    /// Delete one.
    Delete {
        /// Which one.
        which: SnapshotName,
        /// Stay until the background work is done.
        wait: bool,
    },
    /// Go back to one. Only while no guest uses the disk.
    Revert {
        /// Which one.
        which: SnapshotName,
        /// Stay until the background work is done.
        wait: bool,
    },
}

/// Which internal snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotName {
    /// The one of this id.
    Id(String),
    /// The one of this name; if there is none, the one of this id.
    NameOrId(String),
}

/// Why a command line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Options that do not go together, or one that is not there.
    #[error("{0}")]
    Usage(&'static str),
    /// A value that the option does not take.
    #[error("{option}: '{given}' is not allowed; give {allowed}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was typed.
        given: String,
        /// What can be typed.
        allowed: &'static str,
    },
}

impl TryFrom<Cli> for Config {
    type Error = ConfigError;

    fn try_from(cli: Cli) -> Result<Self, ConfigError> {
        match cli.command {
            None => serve(cli.serve),
            Some(Command::Serve(args)) => serve(*args),
            Some(Command::Create(args)) => Ok(Self::Create(create(args)?)),
            Some(Command::Info(args)) => Ok(Self::Info(info(args))),
            Some(Command::Check(args)) => Ok(Self::Check(check(args))),
            Some(Command::Snapshot(command)) => Ok(Self::Snapshot(snapshot(command)?)),
        }
    }
}

fn serve(args: ServeArgs) -> Result<Config, ConfigError> {
    // A management layer asks this with no other option, before it knows any.
    if args.print_capabilities {
        return Ok(Config::PrintCapabilities);
    }
    if args.socket_path.is_some() && args.socket_path == args.control {
        return Err(ConfigError::Usage(
            "--socket-path and --control name the same socket; the front-end and the clients of the \
             control socket need one each",
        ));
    }
    Ok(Config::Serve(Box::new(ServeConfig {
        endpoint: endpoint(&args)?,
        disk: disk(&args)?,
        thread_count: args
            .threads
            .map(|count| {
                number(
                    "--threads",
                    count,
                    1..=QUEUE_COUNT_MAX,
                    "a number from 1 to 64",
                )
            })
            .transpose()?,
        poll_us: number(
            "--poll-us",
            args.poll_us,
            0..=POLL_US_MAX,
            "a number from 0 to 10000",
        )?,
        control: args.control.clone(),
        log_filter: log_filter(&args.log)?,
        image: image(args)?,
    })))
}

fn endpoint(args: &ServeArgs) -> Result<Endpoint, ConfigError> {
    match (&args.socket_path, args.fd) {
        (None, None) => Err(ConfigError::Usage(
            "no socket given; use --socket-path PATH (or --fd N) to say where the front-end connects",
        )),
        (Some(_), Some(_)) => Err(ConfigError::Usage(
            "--socket-path and --fd exclude each other; give one of them",
        )),
        (Some(path), None) => Ok(Endpoint::Path {
            path: path.clone(),
            group: args.socket_group.clone(),
            mode: args.socket_mode.as_deref().map(mode).transpose()?,
        }),
        (None, Some(_)) if args.socket_group.is_some() || args.socket_mode.is_some() => {
            Err(ConfigError::Usage(
                "--socket-group and --socket-mode need --socket-path: the socket of --fd is made \
                 by whoever passes it",
            ))
        }
        // Standard output and error have other uses.
        (None, Some(fd @ (1 | 2 | ..=-1))) => Err(refuse(
            "--fd",
            &fd.to_string(),
            "the number of an open socket, not of stdout or stderr",
        )),
        (None, Some(fd)) => Ok(Endpoint::Fd(fd)),
    }
}

fn mode(given: &str) -> Result<u32, ConfigError> {
    let digits = given.strip_prefix("0o").unwrap_or(given);
    u32::from_str_radix(digits, 8)
        .ok()
        // `from_str_radix` takes a sign.
        .filter(|mode| *mode <= 0o777 && !digits.starts_with('+'))
        .ok_or_else(|| {
            refuse(
                "--socket-mode",
                given,
                "permissions in octal from 0 to 777, such as 660",
            )
        })
}

fn image(args: ServeArgs) -> Result<ImageConfig, ConfigError> {
    let path = args.blk_file.ok_or(ConfigError::Usage(
        "no image given; use --blk-file FILE to say what to serve",
    ))?;
    if args.snapshot.is_some() && !args.read_only {
        return Err(ConfigError::Usage(
            "--snapshot needs --read-only: a snapshot is never written (to go on from it, use \
             `qblkd snapshot revert`)",
        ));
    }
    if args.snapshot.is_some() && args.format != FormatArg::Qcow2 {
        return Err(ConfigError::Usage(
            "--snapshot needs --format qcow2: a raw image has no snapshots",
        ));
    }
    let cache_size = |option, given: Option<String>| {
        let allowed = "a size, such as 32M";
        given
            .map(|given| size(option, &given, 0..=DISK_BYTES_MAX, allowed))
            .transpose()
    };
    let entry_size = |given: String| {
        let allowed = "a power of two from 512 to the image's cluster size, such as 4k";
        power_of_two("--l2-cache-entry-size", &given, CLUSTER_BYTES, allowed)
    };
    Ok(ImageConfig {
        path,
        format: args.format.into(),
        read_only: args.read_only,
        snapshot: args.snapshot,
        cache: args.cache.into(),
        discard_unmaps: args.discard == DiscardArg::Unmap,
        locking: args.locking.into(),
        backing_dirs: args.backing_dir,
        snapshot_dirs: args.snapshot_dir,
        l2_cache_bytes: cache_size("--l2-cache-size", args.l2_cache_size)?,
        l2_cache_entry_bytes: args.l2_cache_entry_size.map(entry_size).transpose()?,
        refcount_cache_bytes: cache_size("--refcount-cache-size", args.refcount_cache_size)?,
    })
}

fn disk(args: &ServeArgs) -> Result<DiskConfig, ConfigError> {
    const BLOCK_ALLOWED: &str = "a power of two from 512 to 64k";
    const QUEUE_SIZE_ALLOWED: &str = "a power of two from 2 to 32768";
    let block_bytes = power_of_two("--block-size", &args.block_size, BLOCK_BYTES, BLOCK_ALLOWED)?;
    let queue_count = number(
        "--num-queues",
        args.num_queues,
        1..=QUEUE_COUNT_MAX,
        "a number from 1 to 64",
    )?;
    let queue_size = number(
        "--queue-size",
        args.queue_size,
        2..=QUEUE_SIZE_MAX,
        QUEUE_SIZE_ALLOWED,
    )?;
    if !queue_size.is_power_of_two() {
        return Err(refuse(
            "--queue-size",
            &queue_size.to_string(),
            QUEUE_SIZE_ALLOWED,
        ));
    }
    Ok(DiskConfig {
        block_bytes: narrow("--block-size", block_bytes, BLOCK_ALLOWED)?,
        serial: serial(args.serial.as_deref().unwrap_or_default())?,
        id: id(&args.id)?,
        queue_count: narrow("--num-queues", queue_count, "a number from 1 to 64")?,
        queue_size_max: narrow("--queue-size", queue_size, QUEUE_SIZE_ALLOWED)?,
    })
}

fn serial(given: &str) -> Result<String, ConfigError> {
    let is_printable = given
        .bytes()
        .all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if given.len() > SERIAL_BYTES_MAX || !is_printable {
        return Err(refuse(
            "--serial",
            given,
            "up to 20 printable ASCII characters",
        ));
    }
    Ok(given.to_owned())
}

fn id(given: &str) -> Result<String, ConfigError> {
    let starts_well = given.starts_with(|first: char| first.is_ascii_alphabetic());
    let goes_on_well = given
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if given.len() > ID_BYTES_MAX || !starts_well || !goes_on_well {
        let allowed = "up to 31 letters, digits, '-', '.' or '_', the first one a letter";
        return Err(refuse("--id", given, allowed));
    }
    Ok(given.to_owned())
}

/// Checks what `env_logger` would only warn about.
fn log_filter(given: &str) -> Result<String, ConfigError> {
    let is_level = |word: &str| word.parse::<log::LevelFilter>().is_ok();
    let is_directive = |part: &str| match part.split_once('=') {
        Some((module, level)) => !module.is_empty() && is_level(level),
        None => is_level(part),
    };
    if given.split(',').all(|part| is_directive(part.trim())) {
        return Ok(given.to_owned());
    }
    let allowed = "off, error, warn, info, debug or trace, or a list such as \
                   info,qblkd::control=debug";
    Err(refuse("--log", given, allowed))
}

fn create(args: CreateArgs) -> Result<CreateConfig, ConfigError> {
    const REFCOUNT_ALLOWED: &str = "1, 2, 4, 8, 16, 32 or 64";
    let cluster_allowed = "a power of two from 512 to 2M, such as 64k";
    let cluster_bytes = power_of_two(
        "--cluster-size",
        &args.cluster_size,
        CLUSTER_BYTES,
        cluster_allowed,
    )?;
    let refcount_bits = number(
        "--refcount-bits",
        args.refcount_bits,
        1..=64,
        REFCOUNT_ALLOWED,
    )?;
    if !refcount_bits.is_power_of_two() {
        return Err(refuse(
            "--refcount-bits",
            &refcount_bits.to_string(),
            REFCOUNT_ALLOWED,
        ));
    }
    let backing = match (args.backing_file, args.backing_format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some((file, format.into())),
        (Some(_), None) => {
            return Err(ConfigError::Usage(
                "--backing-file needs --backing-format qcow2 or raw: a format is never guessed",
            ));
        }
        (None, Some(_)) => {
            return Err(ConfigError::Usage(
                "--backing-format needs --backing-file; give both or neither",
            ));
        }
    };
    let preallocation = Preallocation::from(args.preallocation);
    if backing.is_some() && preallocation != Preallocation::Off {
        return Err(ConfigError::Usage(
            "--preallocation would hide the backing file; give one or the other",
        ));
    }
    let version = match args.compat {
        CompatArg::V2 => 2,
        CompatArg::V3 => 3,
    };
    if version < 3 && refcount_bits != 16 {
        return Err(ConfigError::Usage(
            "--compat 0.10 has no refcount width but 16; leave --refcount-bits out or use \
             --compat 1.1",
        ));
    }
    if version < 3 && args.lazy_refcounts {
        return Err(ConfigError::Usage("--lazy-refcounts needs --compat 1.1"));
    }
    if args.size.is_none() && backing.is_none() {
        return Err(ConfigError::Usage(
            "no size given; say how large the disk is, for example 20G",
        ));
    }
    Ok(CreateConfig {
        path: args.file,
        virtual_size_bytes: args.size.as_deref().map(disk_size).transpose()?,
        cluster_bits: cluster_bytes.trailing_zeros(),
        refcount_order: refcount_bits.trailing_zeros(),
        lazy_refcounts: args.lazy_refcounts,
        preallocation,
        backing,
        version,
    })
}

fn disk_size(given: &str) -> Result<u64, ConfigError> {
    let allowed = "a size of less than 8E, such as 20G";
    // Within range, rounding up cannot leave it: the largest size is a multiple itself.
    Ok(size("SIZE", given, 0..=DISK_BYTES_MAX, allowed)?.next_multiple_of(512))
}

fn info(args: InfoArgs) -> InfoConfig {
    InfoConfig {
        path: args.file,
        json: args.json,
        backing_chain: args.backing_chain,
        backing_dirs: args.backing_dir,
    }
}

fn check(args: CheckArgs) -> CheckConfig {
    CheckConfig {
        path: args.file,
        repair: match args.repair {
            None => Repair::None,
            Some(RepairArg::Leaks) => Repair::Leaks,
            Some(RepairArg::All) => Repair::All,
        },
        json: args.json,
        quiet: args.quiet,
    }
}

fn snapshot(command: SnapshotCommand) -> Result<SnapshotConfig, ConfigError> {
    let (target, action) = match command {
        SnapshotCommand::Create(args) => {
            let (name, wait) = (args.name, args.wait);
            (args.target, SnapshotAction::Create { name, wait })
        }
        SnapshotCommand::List(args) => (args.target, SnapshotAction::List { json: args.json }),
        SnapshotCommand::Revert(args) => {
            let (which, wait) = (snapshot_name(args.which)?, args.wait);
            (args.target, SnapshotAction::Revert { which, wait })
        }
        SnapshotCommand::Delete(args) => {
            let (which, wait) = (snapshot_name(args.which)?, args.wait);
            (args.target, SnapshotAction::Delete { which, wait })
        }
    };
    let target = snapshot_target(target)?;
    Ok(SnapshotConfig { target, action })
}

fn snapshot_target(args: SnapshotTargetArgs) -> Result<SnapshotTarget, ConfigError> {
    match (args.control, args.blk_file) {
        (Some(path), None) => Ok(SnapshotTarget::Control(path)),
        (None, Some(path)) => Ok(SnapshotTarget::File(path)),
        _ => Err(ConfigError::Usage(
            "give --control PATH (the server's socket) or --blk-file FILE (an image that nobody \
             uses)",
        )),
    }
}

fn snapshot_name(args: SnapshotNameArgs) -> Result<SnapshotName, ConfigError> {
    match (args.name, args.id) {
        (Some(name), None) => Ok(SnapshotName::NameOrId(name)),
        (None, Some(id)) => Ok(SnapshotName::Id(id)),
        _ => Err(ConfigError::Usage(
            "say which snapshot is meant: its name, or --id ID",
        )),
    }
}

fn refuse(option: &'static str, given: &str, allowed: &'static str) -> ConfigError {
    ConfigError::Value {
        option,
        given: given.to_owned(),
        allowed,
    }
}

fn number(
    option: &'static str,
    given: u32,
    range: std::ops::RangeInclusive<u32>,
    allowed: &'static str,
) -> Result<u32, ConfigError> {
    if range.contains(&given) {
        return Ok(given);
    }
    Err(refuse(option, &given.to_string(), allowed))
}

/// Fits a number that was found in range into the type its user has.
fn narrow<T, U>(option: &'static str, given: T, allowed: &'static str) -> Result<U, ConfigError>
where
    T: Copy + ToString,
    U: TryFrom<T>,
{
    match U::try_from(given) {
        Ok(narrow) => Ok(narrow),
        Err(_) => Err(refuse(option, &given.to_string(), allowed)),
    }
}

fn size(
    option: &'static str,
    given: &str,
    range: std::ops::RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<u64, ConfigError> {
    parse_size(given)
        .filter(|bytes| range.contains(bytes))
        .ok_or_else(|| refuse(option, given, allowed))
}

fn power_of_two(
    option: &'static str,
    given: &str,
    range: std::ops::RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<u64, ConfigError> {
    let bytes = size(option, given, range, allowed)?;
    if bytes.is_power_of_two() {
        Ok(bytes)
    } else {
        Err(refuse(option, given, allowed))
    }
}

/// Reads a size as QEMU's tools do: decimal with an optional suffix, with a fraction if the suffix
/// makes a unit larger than a byte; or hexadecimal with `0x`. Part of a byte is cut off.
fn parse_size(text: &str) -> Option<u64> {
    let only_digits = |digits: &str, radix| digits.chars().all(|digit| digit.is_digit(radix));
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return only_digits(digits, 16)
            .then(|| u64::from_str_radix(digits, 16).ok())
            .flatten();
    }
    let (digits, shift) = match text.bytes().last()?.to_ascii_lowercase() {
        b'b' => (&text[..text.len() - 1], 0),
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        b't' => (&text[..text.len() - 1], 40),
        b'p' => (&text[..text.len() - 1], 50),
        b'e' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((whole, fraction)) if shift > 0 && !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (digits, ""),
    };
    // Below 10^18 the products here stay far below 2^128.
    if whole.is_empty() || fraction.len() > 18 {
        return None;
    }
    if !only_digits(whole, 10) || !only_digits(fraction, 10) {
        return None;
    }
    let unit = 1u128 << shift;
    let whole = u128::from(whole.parse::<u64>().ok()?) * unit;
    let parts: u64 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    u64::try_from(whole + u128::from(parts) * unit / scale).ok()
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Raw => Self::Raw,
        }
    }
}

impl From<CacheArg> for CacheMode {
    fn from(arg: CacheArg) -> Self {
        match arg {
            CacheArg::None => Self::None,
            CacheArg::Writeback => Self::Writeback,
            CacheArg::Writethrough => Self::Writethrough,
            CacheArg::Directsync => Self::Directsync,
            CacheArg::Unsafe => Self::Unsafe,
        }
    }
}

impl From<LockingArg> for Locking {
    fn from(arg: LockingArg) -> Self {
        match arg {
            LockingArg::Auto => Self::Auto,
            LockingArg::On => Self::On,
            LockingArg::Off => Self::Off,
        }
    }
}

impl From<PreallocationArg> for Preallocation {
    fn from(arg: PreallocationArg) -> Self {
        match arg {
            PreallocationArg::Off => Self::Off,
            PreallocationArg::Metadata => Self::Metadata,
            PreallocationArg::Falloc => Self::Falloc,
            PreallocationArg::Full => Self::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    fn config(line: &str) -> Result<Config, String> {
        let words = std::iter::once("qblkd").chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        Config::try_from(cli).map_err(|error| error.to_string())
    }

    /// The configuration for `qblkd --socket-path s --blk-file f` and these options.
    fn served(options: &str) -> Result<ServeConfig, String> {
        match config(&format!("--socket-path s --blk-file f {options}"))? {
            Config::Serve(serve) => Ok(*serve),
            other => Err(format!("{other:?}")),
        }
    }

    fn created(options: &str) -> Result<CreateConfig, String> {
        match config(&format!("create f {options}"))? {
            Config::Create(create) => Ok(create),
            other => Err(format!("{other:?}")),
        }
    }

    fn accepted(option: &str, values: &[&str]) -> Vec<bool> {
        values
            .iter()
            .map(|value| served(&format!("{option} {value}")).is_ok())
            .collect()
    }

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn two_sockets_need_two_paths() {
        let refused = served("--control s").unwrap_err();
        assert!(refused.contains("the same socket"), "{refused}");
        assert!(served("--control t").is_ok());
    }

    #[test]
    fn the_word_serve_may_be_left_out() {
        let with = config("serve --socket-path s --blk-file f --read-only").unwrap();
        let without = config("--socket-path s --blk-file f --read-only").unwrap();
        assert_eq!(with, without);
    }

    #[test]
    fn values_may_follow_an_equals_sign() {
        assert_eq!(
            config("--socket-path=s --blk-file=f"),
            config("--socket-path s --blk-file f")
        );
    }

    #[test]
    fn defaults_are_as_documented() {
        assert_eq!(
            served("").unwrap(),
            ServeConfig {
                endpoint: Endpoint::Path {
                    path: "s".into(),
                    group: None,
                    mode: None
                },
                image: ImageConfig {
                    path: "f".into(),
                    format: Format::Qcow2,
                    read_only: false,
                    snapshot: None,
                    cache: CacheMode::Writeback,
                    discard_unmaps: true,
                    locking: Locking::Auto,
                    backing_dirs: vec![],
                    snapshot_dirs: vec![],
                    l2_cache_bytes: None,
                    l2_cache_entry_bytes: None,
                    refcount_cache_bytes: None,
                },
                disk: DiskConfig {
                    block_bytes: 512,
                    serial: String::new(),
                    id: "disk0".into(),
                    queue_count: 16,
                    queue_size_max: 1024,
                },
                thread_count: None,
                poll_us: 50,
                control: None,
                log_filter: "info".into(),
            }
        );
    }

    #[test]
    fn every_option_arrives() {
        let options = "--read-only --snapshot s1 --format qcow2 --cache none --discard ignore \
                       --locking off --backing-dir a --backing-dir b --snapshot-dir c \
                       --snapshot-dir d --l2-cache-size 32M --l2-cache-entry-size 8k \
                       --refcount-cache-size 1M --block-size 4k \
                       --serial S1 --id vda --num-queues 4 --queue-size 256 --threads 2 \
                       --poll-us 0 --control c --log warn,qblkd=trace --socket-group kvm \
                       --socket-mode 0660";
        assert_eq!(
            served(options).unwrap(),
            ServeConfig {
                endpoint: Endpoint::Path {
                    path: "s".into(),
                    group: Some("kvm".into()),
                    mode: Some(0o660),
                },
                image: ImageConfig {
                    path: "f".into(),
                    format: Format::Qcow2,
                    read_only: true,
                    snapshot: Some("s1".into()),
                    cache: CacheMode::None,
                    discard_unmaps: false,
                    locking: Locking::Off,
                    backing_dirs: vec!["a".into(), "b".into()],
                    snapshot_dirs: vec!["c".into(), "d".into()],
                    l2_cache_bytes: Some(32 << 20),
                    l2_cache_entry_bytes: Some(8192),
                    refcount_cache_bytes: Some(1 << 20),
                },
                disk: DiskConfig {
                    block_bytes: 4096,
                    serial: "S1".into(),
                    id: "vda".into(),
                    queue_count: 4,
                    queue_size_max: 256,
                },
                thread_count: Some(2),
                poll_us: 0,
                control: Some("c".into()),
                log_filter: "warn,qblkd=trace".into(),
            }
        );
    }

    #[test]
    fn capabilities_need_no_other_option() {
        assert_eq!(
            config("--print-capabilities"),
            Ok(Config::PrintCapabilities)
        );
        let parsed: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        let expected =
            serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] });
        assert_eq!(parsed, expected);
    }

    #[test]
    fn a_missing_image_or_socket_is_named() {
        assert!(
            config("--socket-path s")
                .unwrap_err()
                .contains("--blk-file")
        );
        assert!(
            config("--blk-file f")
                .unwrap_err()
                .contains("--socket-path")
        );
        assert!(config("").unwrap_err().contains("--socket-path"));
    }

    #[test]
    fn there_is_one_socket() {
        assert!(config("--socket-path s --fd 3 --blk-file f").is_err());
        assert!(config("--fd 3 --blk-file f --socket-mode 600").is_err());
        assert!(config("--fd 3 --blk-file f --socket-group kvm").is_err());
        let Ok(Config::Serve(serve)) = config("--fd 3 --blk-file f") else {
            panic!("refused")
        };
        assert_eq!(serve.endpoint, Endpoint::Fd(3));
    }

    #[test]
    fn descriptors_of_messages_are_no_sockets() {
        let accepted =
            ["-1", "0", "1", "2", "3"].map(|fd| config(&format!("--blk-file f --fd {fd}")).is_ok());
        assert_eq!(accepted, [false, true, false, false, true]);
    }

    #[test]
    fn refusals_say_what_is_allowed() {
        assert_eq!(
            served("--num-queues 65").unwrap_err(),
            "--num-queues: '65' is not allowed; give a number from 1 to 64"
        );
    }

    #[test]
    fn numbers_have_both_bounds() {
        let bounds = [false, true, true, false];
        assert_eq!(accepted("--num-queues", &["0", "1", "64", "65"]), bounds);
        assert_eq!(accepted("--threads", &["0", "1", "64", "65"]), bounds);
        assert_eq!(
            accepted("--poll-us", &["-1", "0", "10000", "10001"]),
            bounds
        );
        assert_eq!(
            accepted("--queue-size", &["1", "2", "32768", "65536"]),
            bounds
        );
        assert_eq!(
            accepted("--block-size", &["256", "512", "64k", "128k"]),
            bounds
        );
        assert_eq!(
            accepted("--l2-cache-entry-size", &["256", "512", "2M", "4M"]),
            bounds
        );
        assert_eq!(
            accepted("--l2-cache-size", &["-1", "0", "7E", "8E"]),
            bounds
        );
        assert_eq!(
            accepted("--refcount-cache-size", &["-1", "0", "7E", "8E"]),
            bounds
        );
        assert_eq!(
            accepted("--socket-mode", &["-1", "0", "777", "1000"]),
            bounds
        );
    }

    #[test]
    fn powers_of_two_are_checked() {
        assert_eq!(
            accepted("--queue-size", &["1023", "1024", "1025"]),
            [false, true, false]
        );
        assert_eq!(
            accepted("--block-size", &["4095", "4096", "4097"]),
            [false, true, false]
        );
        assert_eq!(
            accepted("--l2-cache-entry-size", &["3k", "4k", "6k"]),
            [false, true, false]
        );
    }

    #[test]
    fn modes_are_octal() {
        let modes =
            ["660", "0660", "0o660"].map(|mode| match served(&format!("--socket-mode {mode}")) {
                Ok(ServeConfig {
                    endpoint: Endpoint::Path { mode, .. },
                    ..
                }) => mode,
                _ => None,
            });
        assert_eq!(modes, [Some(0o660); 3]);
        assert_eq!(
            accepted("--socket-mode", &["8", "rw", "0x1", "+7"]),
            [false; 4]
        );
    }

    #[test]
    fn a_serial_has_at_most_20_printable_characters() {
        let values = [
            "12345678901234567890",
            "123456789012345678901",
            "caf\u{e9}",
            "\u{7f}",
        ];
        assert_eq!(accepted("--serial", &values), [true, false, false, false]);
    }

    #[test]
    fn an_id_is_one_that_qemu_takes() {
        let longest = "a".repeat(31);
        let too_long = "a".repeat(32);
        let values = [
            longest.as_str(),
            "a-b_c.1",
            too_long.as_str(),
            "1a",
            "a/b",
            "#block0",
        ];
        assert_eq!(
            accepted("--id", &values),
            [true, true, false, false, false, false]
        );
    }

    #[test]
    fn log_filters_have_known_levels() {
        let values = [
            "off",
            "DEBUG",
            "warn,a::b=trace",
            "loud",
            "a=loud",
            "info,",
            "=info",
        ];
        assert_eq!(
            accepted("--log", &values),
            [true, true, true, false, false, false, false]
        );
    }

    #[test]
    fn words_that_are_not_in_a_list_are_refused() {
        assert_eq!(
            accepted("--cache", &["writethrough", "directsync", "unsafe"]),
            [true; 3]
        );
        assert_eq!(accepted("--cache", &["writearound"]), [false]);
        assert_eq!(accepted("--format", &["raw", "vmdk"]), [true, false]);
        assert_eq!(accepted("--discard", &["ignore", "on"]), [true, false]);
        assert_eq!(accepted("--locking", &["on", "maybe"]), [true, false]);
    }

    #[test]
    fn cache_modes_mean_what_they_mean_in_qemu() {
        let modes = [
            CacheMode::None,
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::Directsync,
            CacheMode::Unsafe,
        ];
        let meanings =
            modes.map(|mode| (mode.is_direct(), mode.is_writeback(), mode.ignores_flush()));
        assert_eq!(
            meanings,
            [
                (true, true, false),
                (false, true, false),
                (false, false, false),
                (true, false, false),
                (false, true, true),
            ]
        );
    }

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let cases = [
            ("0", 0),
            ("513", 513),
            ("1b", 1),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("1.5k", 1536),
            ("1.3k", 1331),
            ("1M", 1 << 20),
            ("1G", 1 << 30),
            ("1T", 1 << 40),
            ("1P", 1 << 50),
            ("1E", 1 << 60),
            ("0x10", 16),
            ("18446744073709551615", u64::MAX),
        ];
        assert_eq!(
            cases.map(|(text, _)| parse_size(text)),
            cases.map(|(_, bytes)| Some(bytes))
        );
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let cases = [
            "",
            "k",
            "-1",
            "+1",
            "1.3",
            "1.k",
            ".5k",
            "1kB",
            "1Q",
            "1e3",
            "1 k",
            "0x",
            "0x+1",
            "0xg",
            "16E",
            "18446744073709551616",
            "1.1.1k",
            "\u{664}",
            "1\u{e9}",
        ];
        assert_eq!(cases.map(parse_size), [None; 19]);
    }

    #[test]
    fn create_has_qemus_defaults() {
        assert_eq!(
            created("20G").unwrap(),
            CreateConfig {
                path: "f".into(),
                virtual_size_bytes: Some(20 << 30),
                cluster_bits: 16,
                refcount_order: 4,
                lazy_refcounts: false,
                preallocation: Preallocation::Off,
                backing: None,
                version: 3,
            }
        );
    }

    #[test]
    fn every_create_option_arrives() {
        let options = "1k --cluster-size 512 --refcount-bits 64 --lazy-refcounts --compat v3 \
                       --backing-file base --backing-format raw";
        assert_eq!(
            created(options).unwrap(),
            CreateConfig {
                path: "f".into(),
                virtual_size_bytes: Some(1024),
                cluster_bits: 9,
                refcount_order: 6,
                lazy_refcounts: true,
                preallocation: Preallocation::Off,
                backing: Some(("base".into(), Format::Raw)),
                version: 3,
            }
        );
        assert_eq!(
            created("1k --preallocation full").unwrap().preallocation,
            Preallocation::Full
        );
        assert_eq!(created("1k --compat 0.10").unwrap().version, 2);
    }

    #[test]
    fn disk_sizes_are_rounded_up_to_sectors() {
        let sizes =
            ["0", "1", "512", "513"].map(|size| created(size).unwrap().virtual_size_bytes.unwrap());
        assert_eq!(sizes, [0, 512, 512, 1024]);
    }

    #[test]
    fn disk_sizes_end_below_8_eib() {
        let accepted =
            ["9223372036854775296", "9223372036854775297", "8E"].map(|size| created(size).is_ok());
        assert_eq!(accepted, [true, false, false]);
    }

    #[test]
    fn the_size_may_come_from_the_backing_file_only() {
        let overlay = created("--backing-file b --backing-format qcow2").unwrap();
        assert_eq!(overlay.virtual_size_bytes, None);
        assert!(created("").unwrap_err().contains("no size given"));
    }

    #[test]
    fn create_bounds_are_those_of_the_format() {
        let clusters = ["256", "512", "2M", "4M", "3k"]
            .map(|size| created(&format!("1M --cluster-size {size}")).is_ok());
        assert_eq!(clusters, [false, true, true, false, false]);
        let widths = ["0", "1", "3", "64", "128"]
            .map(|bits| created(&format!("1M --refcount-bits {bits}")).is_ok());
        assert_eq!(widths, [false, true, false, true, false]);
    }

    #[test]
    fn create_options_that_exclude_each_other_are_refused() {
        assert!(
            created("1M --backing-file b")
                .unwrap_err()
                .contains("--backing-format")
        );
        assert!(
            created("1M --backing-format raw")
                .unwrap_err()
                .contains("--backing-file")
        );
        assert!(
            created("1M --compat v2 --lazy-refcounts")
                .unwrap_err()
                .contains("--compat 1.1")
        );
        assert!(
            created("1M --compat v2 --refcount-bits 8")
                .unwrap_err()
                .contains("--compat 1.1")
        );
        let both = "1M --backing-file b --backing-format raw --preallocation metadata";
        assert!(created(both).unwrap_err().contains("--preallocation"));
    }

    #[test]
    fn info_and_check_take_their_options() {
        assert_eq!(
            config("info f --json --backing-chain --backing-dir d"),
            Ok(Config::Info(InfoConfig {
                path: "f".into(),
                json: true,
                backing_chain: true,
                backing_dirs: vec!["d".into()],
            }))
        );
        assert_eq!(
            config("check --repair leaks --quiet f"),
            Ok(Config::Check(CheckConfig {
                path: "f".into(),
                repair: Repair::Leaks,
                json: false,
                quiet: true,
            }))
        );
        let Ok(Config::Check(check)) = config("check f") else {
            panic!("refused")
        };
        assert_eq!(check.repair, Repair::None);
    }

    #[test]
    fn tools_do_not_take_options_of_the_server() {
        assert!(config("info f --blk-file g").is_err());
        assert!(config("--blk-file g info f").is_err());
    }
}
