//! The serving process: where it listens and what it is, beside its image and its disk.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::disk::{DiskConfig, QUEUE_COUNT_MAX, disk};
use super::image::{ImageConfig, image};
use super::value::{number, refuse};
use super::{Config, ConfigError};
use crate::args::ServeArgs;

/// The longest polling before a worker sleeps, in microseconds.
const POLL_US_MAX: u32 = 10_000;

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

pub(super) fn serve(args: ServeArgs) -> Result<Config, ConfigError> {
    // A management layer asks this with no other option, before it knows any.
    if args.print_capabilities {
        return Ok(Config::PrintCapabilities);
    }
    let same = |one: &PathBuf, other: &PathBuf| {
        let absolute = |path| std::path::absolute(path).ok();
        one == other || absolute(one).is_some_and(|one| Some(one) == absolute(other))
    };
    let both = args.socket_path.as_ref().zip(args.control.as_ref());
    if both.is_some_and(|(socket, control)| same(socket, control)) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{accepted, config, served};

    #[test]
    fn two_sockets_need_two_paths() {
        let refused = served("--control s").unwrap_err();
        assert!(refused.contains("the same socket"), "{refused}");
        let refused = served("--control ./s").unwrap_err();
        assert!(refused.contains("the same socket"), "{refused}");
        assert!(served("--control t").is_ok());
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
}
