//! The command line as used: validated, in the units of the program, built only through
//! [`Config::try_from`].
//!
//! Refusals name the option, repeat what was given and say what is allowed. What only the image or
//! the host can tell (does the file exist, is the cache entry larger than a cluster) is not known
//! here.
mod check;
mod create;
mod disk;
mod image;
mod info;
mod serve;
mod snapshot;
mod value;

use crate::args::{Cli, Command, FormatArg};

pub use self::check::{CheckConfig, Repair};
pub use self::create::{CreateConfig, Preallocation};
pub use self::disk::{DiskConfig, ID_BYTES_MAX, QUEUE_COUNT_MAX, QUEUE_SIZE_MAX, SERIAL_BYTES_MAX};
pub use self::image::{CacheMode, ImageConfig, Locking};
pub use self::info::InfoConfig;
pub use self::serve::{Endpoint, ServeConfig};
pub use self::snapshot::{SnapshotAction, SnapshotConfig, SnapshotName, SnapshotTarget};

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

/// Image formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// No format.
    Raw,
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Raw => Self::Raw,
        }
    }
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
            None => serve::serve(cli.serve),
            Some(Command::Serve(args)) => serve::serve(*args),
            Some(Command::Create(args)) => Ok(Self::Create(create::create(args)?)),
            Some(Command::Info(args)) => Ok(Self::Info(info::info(args))),
            Some(Command::Check(args)) => Ok(Self::Check(check::check(args))),
            Some(Command::Snapshot(command)) => Ok(Self::Snapshot(snapshot::snapshot(command)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    pub(super) fn config(line: &str) -> Result<Config, String> {
        let words = std::iter::once("qblkd").chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        Config::try_from(cli).map_err(|error| error.to_string())
    }

    /// The configuration for `qblkd --socket-path s --blk-file f` and these options.
    pub(super) fn served(options: &str) -> Result<ServeConfig, String> {
        match config(&format!("--socket-path s --blk-file f {options}"))? {
            Config::Serve(serve) => Ok(*serve),
            other => Err(format!("{other:?}")),
        }
    }

    pub(super) fn created(options: &str) -> Result<CreateConfig, String> {
        match config(&format!("create f {options}"))? {
            Config::Create(create) => Ok(create),
            other => Err(format!("{other:?}")),
        }
    }

    pub(super) fn accepted(option: &str, values: &[&str]) -> Vec<bool> {
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
