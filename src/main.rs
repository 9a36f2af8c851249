//! The `qblkd` command: parses the command line, runs what it asks for, and maps the outcome to an
//! exit code. Everything else is in the library.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use qblkd::args::Cli;
use qblkd::config::{CAPABILITIES, Config, ServeConfig};
use qblkd::tools::Exit;
use qblkd::{daemon, tools};
use signal_hook::consts::SIGXFSZ;

fn main() -> ExitCode {
    fail_at_size_limit();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, with success.
            let exit = match error.use_stderr() {
                true => Exit::Failure,
                false => Exit::Success,
            };
            return tools::printed(error.print(), exit).into();
        }
    };
    match Config::try_from(cli) {
        Ok(Config::Serve(config)) => serve(&config),
        Ok(Config::PrintCapabilities) => {
            tools::print(&format!("{CAPABILITIES}\n"), Exit::Success).into()
        }
        Ok(Config::Create(config)) => tools::create(&config).into(),
        Ok(Config::Info(config)) => tools::info(&config).into(),
        Ok(Config::Check(config)) => tools::check(&config).into(),
        Ok(Config::Snapshot(config)) => tools::snapshot(&config).into(),
        Err(error) => complain(&error, None),
    }
}

/// Has a write past the limit on file sizes (`RLIMIT_FSIZE`) fail; by default its signal ends the
/// process. Without a handler, which only a host without memory refuses, it is as it always was.
fn fail_at_size_limit() {
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
}

fn serve(config: &ServeConfig) -> ExitCode {
    env_logger::Builder::new()
        .parse_filters(&config.log_filter)
        .init();
    match daemon::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error, daemon::advice(&error, config)),
    }
}

/// Prints an error with all its causes, once, and what to do about it.
fn complain(error: &dyn std::error::Error, advice: Option<&str>) -> ExitCode {
    let mut line = format!("qblkd: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    if let Some(advice) = advice {
        line.push_str("; ");
        line.push_str(advice);
    }
    // There is nobody left to tell if stderr is gone.
    let _ = writeln!(std::io::stderr(), "{line}");
    ExitCode::FAILURE
}
