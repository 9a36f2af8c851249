//! The control socket of a server at work, through what other people have: the Python package
//! `qemu.qmp`, and lines that nobody should send.
//!
//! The wire and each command have their golden transcripts in the control layer; here it is the real
//! daemon that answers, while it serves.

use crate::kit::chaos::{self, Initial};
use crate::support::command::{Finished, LIMIT, run_command};
use crate::support::corpus::{self, Copy, Kind, TOOLS};
use crate::support::driver::{Driver, IN, IOERR, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, have_tools};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

const DISK_BYTES: u64 = 16 << 20;
/// How long the server is under load while it is asked.
const LOAD: Duration = Duration::from_secs(1);

/// A server with a control socket, on an empty image.
struct Scratch {
    server: Server,
    control: PathBuf,
    file: PathBuf,
    _dir: TempDir,
}

impl Scratch {
    /// `None`: a tool is missing, and the test has said so.
    fn new(test: &str) -> Option<Self> {
        if !have_tools(test, &["qemu-img"]) {
            return None;
        }
        let (dir, file) = qemu::new_image(DISK_BYTES).unwrap();
        let control = dir.path().join("control.sock");
        let server = Server::start([
            OsStr::new("--blk-file"),
            file.as_os_str(),
            OsStr::new("--control"),
            control.as_os_str(),
        ])
        .unwrap();
        Some(Self {
            server,
            control,
            file,
            _dir: dir,
        })
    }

    fn client(&self) -> Qmp {
        Qmp::connect(&self.control).unwrap()
    }
}

fn stats(client: &mut Qmp) -> Value {
    client.execute("query-blockstats").unwrap()[0]["stats"].take()
}

#[test]
fn the_python_package_qemu_qmp_talks_to_a_server_under_load() {
    let test = "the_python_package_qemu_qmp_talks_to_a_server_under_load";
    let python = std::env::var_os("QBLKD_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let mut import = Command::new(&python);
    let has_package = run_command(import.args(["-c", "import qemu.qmp"]), LIMIT)
        .is_ok_and(|finished| finished.status.success());
    let python = python.to_string_lossy().into_owned();
    let package = format!("{python} with the package qemu.qmp");
    let needed: &[&str] = if has_package { &[] } else { &[&package] };
    if !have_tools(test, needed) {
        return;
    }
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/qmp_client.py");
    let state = scratch.file.with_extension("state");
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            chaos::run(&chaos::Options {
                initial: Initial::Zero,
                state_out: Some(state),
                ..chaos::Options::new(&scratch.server.socket, 2, LIMIT)
            })
        });
        let mut client = Command::new(&python);
        // -B: leave no compiled files in the source tree.
        client.arg("-B").arg(&script).arg(&scratch.control);
        let talked = run_command(&mut client, LIMIT).and_then(Finished::success);
        if talked.is_err() {
            // Nobody else would end the load.
            scratch.server.signal("KILL").unwrap();
        }
        let worked = work.join().unwrap();
        talked.unwrap();
        // The script has ended the server with `quit`.
        assert!(worked.unwrap().server_gone);
    });
    let ended = scratch.server.finish().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN]).unwrap();
}

#[test]
fn every_query_is_answered_under_load() {
    let Some(scratch) = Scratch::new("every_query_is_answered_under_load") else {
        return;
    };
    thread::scope(|scope| {
        let work =
            scope.spawn(|| chaos::run(&chaos::Options::new(&scratch.server.socket, 2, LOAD)));
        let mut clients: Vec<_> = (0..3).map(|_| scratch.client()).collect();
        let commands: Vec<String> = clients[0]
            .execute("query-commands")
            .unwrap()
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|entry| entry["name"].as_str())
            .filter(|name| name.starts_with("query-"))
            .map(str::to_owned)
            .collect();
        assert!(commands.len() >= 4, "{commands:?}");
        let mut rounds = 0;
        // The load may be over early, on a machine that is slow to get here.
        while rounds < 2 || !work.is_finished() {
            for client in &mut clients {
                for command in &commands {
                    client.execute(command).unwrap();
                }
            }
            rounds += 1;
        }
        work.join().unwrap().unwrap();
    });
}

#[test]
fn blockstats_count_what_was_done() {
    let Some(scratch) = Scratch::new("blockstats_count_what_was_done") else {
        return;
    };
    let mut driver = Driver::connect(&scratch.server.socket).unwrap();
    for sector in [0, 8, 16] {
        assert_eq!(driver.request(OUT, sector, 4096, 0).unwrap(), OK);
    }
    assert_eq!(driver.request(IN, 0, 8192, WRITE).unwrap(), OK);
    // Beyond the end.
    assert_ne!(driver.request(IN, 1 << 40, 512, WRITE).unwrap(), OK);
    let mut client = scratch.client();
    let stats = stats(&mut client);
    let counted = [
        "wr_operations",
        "wr_bytes",
        "rd_operations",
        "rd_bytes",
        "failed_wr_operations",
    ]
    .map(|name| stats[name].as_u64());
    assert_eq!(counted, [3, 12288, 1, 8192, 0].map(Some), "{stats}");
}

#[test]
fn hostile_lines_cost_an_error_and_hurt_no_other_client() {
    let test = "hostile_lines_cost_an_error_and_hurt_no_other_client";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let mut other = scratch.client();
    let oversized = vec![b'['; 16 << 20];
    let deep = "[".repeat(100_000);
    let lines: &[&[u8]] = &[
        b"",
        b"}",
        b"\"text\"",
        b"[]",
        b"{}",
        b"{\"execute\": 1}",
        b"{\"execute\": \"quit\", \"arguments\": []}",
        b"{\"execute\": \"no-such-command\"}",
        b"{\"execute\": \"query-block\", \"arguments\": {\"surprise\": 1}}",
        b"\xff\xfe\0\x01",
        deep.as_bytes(),
        &oversized,
    ];
    for line in lines {
        let mut hostile = scratch.client();
        // The server may hang up before it has all of it.
        let sent = hostile.send(line).and_then(|()| hostile.send(b"\n"));
        if sent.is_ok() && !line.is_empty() {
            let answer = hostile.answer();
            let refused = answer
                .as_ref()
                .map_or(true, |answer| answer.get("error").is_some());
            assert!(
                refused,
                "{:?}: {answer:?}",
                line.escape_ascii().to_string().get(..80)
            );
        }
        other.execute("query-block").unwrap();
    }
    // Half a line, and gone.
    scratch.client().send(b"{\"execute\":").unwrap();
    other.execute("query-version").unwrap();
    let ended = scratch.server.terminate().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
}

#[test]
fn quit_ends_the_server_and_says_so() {
    let Some(scratch) = Scratch::new("quit_ends_the_server_and_says_so") else {
        return;
    };
    let mut listener = scratch.client();
    assert_eq!(scratch.client().execute("quit").unwrap(), json!({}));
    let event = listener.event("SHUTDOWN").unwrap();
    assert_eq!(event["data"]["reason"], "host-qmp-quit");
    let ended = scratch.server.finish().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
    assert!(!scratch.control.exists());
}

#[test]
fn sigterm_is_told_to_the_clients() {
    let Some(scratch) = Scratch::new("sigterm_is_told_to_the_clients") else {
        return;
    };
    let mut listener = scratch.client();
    scratch.server.signal("TERM").unwrap();
    let event = listener.event("SHUTDOWN").unwrap();
    assert_eq!(event["data"]["reason"], "host-signal");
    assert_eq!(scratch.server.finish().unwrap().code().unwrap(), 0);
}

#[test]
fn corruption_is_told_to_the_clients() -> Result<(), Failure> {
    if !have_tools("corruption_is_told_to_the_clients", TOOLS) {
        return Ok(());
    }
    let images = corpus::images(Kind::BadAtRuntime);
    let image = images.iter().find(|image| image.name == "l2-entry-on-l1");
    let copy = Copy::of(image.ok_or("not in the corpus")?)?;
    let control = copy.dir.path().join("control.sock");
    let mut arguments = copy.arguments.clone();
    arguments.extend(["--control".into(), control.clone().into()] as [OsString; 2]);
    let server = Server::start(&arguments)?;
    let mut listener = Qmp::connect(&control)?;
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, IOERR);
    let event = listener.event("BLOCK_IMAGE_CORRUPTED")?;
    assert_eq!(event["data"]["fatal"], true, "{event}");
    let block = listener.execute("query-block")?;
    let format = &block[0]["inserted"]["image"]["format-specific"]["data"];
    assert_eq!(format["corrupt"], true, "{block}");
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn the_control_socket_is_for_its_owner_and_a_live_one_is_refused() {
    let test = "the_control_socket_is_for_its_owner_and_a_live_one_is_refused";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let socket = fs::metadata(&scratch.control).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o077, 0);
    let raw = scratch.file.with_extension("raw");
    fs::write(&raw, [0; 4096]).unwrap();
    let mut second = Command::new(QBLKD);
    second.args(["--format", "raw", "--blk-file"]).arg(&raw);
    second.arg("--control").arg(&scratch.control);
    second.arg("--socket-path").arg(raw.with_extension("sock"));
    let refused = run_command(&mut second, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    assert!(refused.stderr.contains("control socket"), "{refused:?}");
    scratch.client().execute("query-version").unwrap();
}
