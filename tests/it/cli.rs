//! The command line from outside: help, exit codes, locks, and every mode that can be asked for.
//!
//! The rules of single options are tested beside `config`; the tools' work on images in `referee`.

use crate::support::command::{Finished, LIMIT, run, run_command};
use crate::support::driver::{Driver, IN, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN};
use crate::support::server::Server;
use crate::support::{QBLKD, have_tools, skip};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const DISK_BYTES: u64 = 16 << 20;

fn qblkd(words: &[&str]) -> Finished {
    run(QBLKD, words).unwrap()
}

/// An image below the target folder: unlike a tmpfs, it surely knows O_DIRECT and locks.
fn image() -> (TempDir, PathBuf) {
    let dir = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("disk.qcow2");
    let size = DISK_BYTES.to_string();
    let words = [OsStr::new("create"), file.as_os_str(), OsStr::new(&size)];
    run(QBLKD, words).unwrap().success().unwrap();
    (dir, file)
}

fn arguments(file: &Path, more: &[&str]) -> Vec<OsString> {
    let mut arguments = vec!["--blk-file".into(), file.into()];
    arguments.extend(more.iter().map(OsString::from));
    arguments
}

/// What a server says that does not start.
fn refusal(arguments: Vec<OsString>) -> String {
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    let socket = dir.path().join("refused.sock");
    let mut command = Command::new(QBLKD);
    command.arg("--socket-path").arg(&socket).args(arguments);
    let refused = run_command(&mut command, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    assert!(!socket.exists(), "left a socket behind");
    // One line: the reason, not a story.
    assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
    refused.stderr
}

// --- Help ---

#[test]
fn help_names_every_tool_and_leaves_with_success() {
    let help = qblkd(&["--help"]);
    assert_eq!(help.code().unwrap(), 0);
    assert!(help.stderr.is_empty(), "{}", help.stderr);
    let missing: Vec<_> = [
        "serve",
        "create",
        "info",
        "check",
        "snapshot",
        "--socket-path",
        "Exit status",
    ]
    .into_iter()
    .filter(|word| !help.stdout.contains(word))
    .collect();
    assert!(missing.is_empty(), "{missing:?} not in {}", help.stdout);
}

#[test]
fn help_of_the_server_names_every_option() {
    let help = qblkd(&["serve", "--help"]).success().unwrap().stdout;
    let options = [
        "socket-path",
        "fd",
        "socket-group",
        "socket-mode",
        "print-capabilities",
        "blk-file",
        "read-only",
        "snapshot",
        "format",
        "cache",
        "discard",
        "locking",
        "backing-dir",
        "snapshot-dir",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "block-size",
        "serial",
        "id",
        "num-queues",
        "queue-size",
        "threads",
        "poll-us",
        "control",
        "log",
    ];
    let missing: Vec<_> = options
        .into_iter()
        .filter(|option| !help.contains(&format!("--{option}")))
        .collect();
    assert!(missing.is_empty(), "{missing:?} not in {help}");
}

#[test]
fn help_of_each_tool_leaves_with_success() {
    for tool in ["create", "info", "check", "snapshot"] {
        let help = qblkd(&[tool, "--help"]).success().unwrap().stdout;
        assert!(help.contains("Usage"), "{tool}: {help}");
    }
}

#[test]
fn the_version_is_that_of_the_crate() {
    let version = qblkd(&["--version"]).success().unwrap().stdout;
    assert_eq!(version.trim(), concat!("qblkd ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn capabilities_are_those_of_the_manifest() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/50-qemu-qblkd.json");
    let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    let printed = qblkd(&["--print-capabilities"]).success().unwrap().stdout;
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(printed["type"], "block");
    let shared = json!({"type": manifest["type"], "features": manifest["features"]});
    assert_eq!(printed, shared);
}

/// What prints, and where to: the words, and whether the image is their last.
const PRINTERS: &[(&[&str], bool)] = &[
    (&["info"], true),
    (&["info", "--json"], true),
    (&["check"], true),
    (&["check", "--json"], true),
    (&["snapshot", "list", "--blk-file"], true),
    (&["snapshot", "list", "--json", "--blk-file"], true),
    (&["--print-capabilities"], false),
    (&["--help"], false),
    (&["--version"], false),
];

fn print_to(stdout: Stdio, words: &[&str], file: Option<&Path>) -> (Option<i32>, String) {
    let mut command = Command::new(QBLKD);
    command.args(words).args(file).stdout(stdout);
    let output = command.stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), stderr)
}

/// They ended with success.
#[test]
fn what_cannot_be_printed_is_a_failure() {
    let (_dir, file) = image();
    for (words, on_image) in PRINTERS {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let file = on_image.then_some(&*file);
        let (code, stderr) = print_to(full.into(), words, file);
        assert_eq!(code, Some(1), "{words:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{words:?}: {stderr}");
        assert!(stderr.contains("No space left"), "{words:?}: {stderr}");
    }
}

#[test]
fn what_nobody_reads_is_no_failure() {
    let (_dir, file) = image();
    for (words, on_image) in PRINTERS {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let file = on_image.then_some(&*file);
        let (code, stderr) = print_to(writer.into(), words, file);
        assert_eq!((code, &*stderr), (Some(0), ""), "{words:?}");
    }
}

/// What was found goes before what could not be printed.
#[test]
fn a_check_that_cannot_print_still_tells_of_damage() {
    let (_dir, file) = image();
    let image = fs::OpenOptions::new().write(true).open(&file).unwrap();
    // A table far past the end of the file.
    let mut header = [0; 48];
    fs::File::open(&file)
        .unwrap()
        .read_exact(&mut header)
        .unwrap();
    let l1 = u64::from_be_bytes(header[40..48].try_into().unwrap());
    image
        .write_all_at(&((1_u64 << 63) | (1 << 40)).to_be_bytes(), l1)
        .unwrap();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let (code, stderr) = print_to(full.into(), &["check"], Some(&file));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("No space left"), "{stderr}");
}

// --- Refusals ---

#[test]
fn usage_errors_leave_with_1_and_say_what_is_wrong() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "no socket given"),
        (&["--socket-path", "s"], "--blk-file"),
        (&["--no-such-option"], "--no-such-option"),
        (
            &[
                "--socket-path",
                "s",
                "--blk-file",
                "f",
                "--num-queues",
                "65",
            ],
            "--num-queues",
        ),
        (
            &[
                "--socket-path",
                "s",
                "--blk-file",
                "f",
                "--cache",
                "sometimes",
            ],
            "sometimes",
        ),
        (
            &["--socket-path", "s", "--fd", "3", "--blk-file", "f"],
            "--fd",
        ),
        (&["create"], "FILE"),
        (&["check", "--repair", "some", "f"], "some"),
    ];
    for (words, expected) in cases {
        let refused = qblkd(words);
        assert_eq!(refused.code().unwrap(), 1, "{words:?}: {refused:?}");
        assert!(refused.stderr.contains(expected), "{words:?}: {refused:?}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let missing = Path::new("/nonexistent/disk.qcow2");
    let said = refusal(arguments(missing, &[]));
    assert!(said.contains("/nonexistent/disk.qcow2"), "{said}");
    assert!(said.contains("No such file"), "{said}");
}

#[test]
fn files_that_cannot_be_images_are_refused() {
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    let folder = refusal(arguments(dir.path(), &[]));
    assert!(folder.contains("directory"), "{folder}");
    let device = refusal(arguments(Path::new("/dev/null"), &["--format", "raw"]));
    assert!(device.contains("/dev/null"), "{device}");
}

/// What a server says that cannot make its socket at `socket`.
fn socket_refusal(socket: &Path, file: &Path) -> String {
    let mut command = Command::new(QBLKD);
    command.arg("--socket-path").arg(socket);
    let refused = run_command(command.args(arguments(file, &[])), LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    refused.stderr
}

#[test]
fn a_socket_in_no_directory_is_refused_by_its_name() {
    let (dir, file) = image();
    let said = socket_refusal(&dir.path().join("missing/s"), &file);
    assert!(said.contains("there is no directory '"), "{said}");
    assert!(said.contains("missing'"), "{said}");
}

#[test]
fn a_directory_in_place_of_a_socket_is_refused() {
    let (dir, file) = image();
    let said = socket_refusal(dir.path(), &file);
    assert!(said.contains("is a directory"), "{said}");
}

/// A path of `bytes` bytes in a new folder.
fn long_path(bytes: usize) -> (TempDir, PathBuf) {
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    let name = "s".repeat(bytes - dir.path().as_os_str().len() - 1);
    let path = dir.path().join(name);
    (dir, path)
}

#[test]
fn a_socket_may_have_the_longest_path_that_there_is() {
    let (_image_dir, file) = image();
    let (dir, socket) = long_path(107);
    let server = Server::start_at(socket.clone(), arguments(&file, &[])).unwrap();
    let mut driver = Driver::connect(&socket).unwrap();
    assert_eq!(driver.request(IN, 0, 512, WRITE).unwrap(), OK);
    drop(driver);
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_socket_with_a_longer_path_is_refused() {
    let (_image_dir, file) = image();
    let (_dir, socket) = long_path(108);
    let said = socket_refusal(&socket, &file);
    assert!(said.contains("its path has 108 bytes"), "{said}");
}

/// What a user may run who is not allowed everything; `None`: there is no way, and the test has said
/// so.
fn as_nobody(test: &str, probe: &Path) -> Option<Command> {
    if fs::OpenOptions::new().write(true).open(probe).is_err() {
        return Some(Command::new(QBLKD));
    }
    // Permissions stop everybody but root.
    if !have_tools(test, &["setpriv"]) {
        return None;
    }
    let nobody = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", QBLKD]);
        command
    };
    let answers = run_command(nobody().arg("--version"), LIMIT);
    if answers.is_ok_and(|finished| finished.status.success()) {
        return Some(nobody());
    }
    skip(test, "the folder of the program is closed to other users");
    None
}

#[test]
fn a_file_that_may_only_be_read_can_be_served_read_only() {
    let test = "a_file_that_may_only_be_read_can_be_served_read_only";
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    let file = dir.path().join("disk.qcow2");
    let words = [OsStr::new("create"), file.as_os_str(), OsStr::new("1M")];
    run(QBLKD, words).unwrap().success().unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o444)).unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let Some(mut command) = as_nobody(test, &file) else {
        return;
    };
    command.arg("--socket-path").arg(dir.path().join("s"));
    let refused = run_command(command.args(arguments(&file, &[])), LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    let said = ["Permission denied", "--read-only"].map(|words| refused.stderr.contains(words));
    assert_eq!(said, [true; 2], "{refused:?}");
}

#[test]
fn an_empty_file_is_called_empty() {
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    let file = dir.path().join("empty");
    fs::write(&file, []).unwrap();
    let said = refusal(arguments(&file, &[]));
    assert!(said.contains("the file is empty"), "{said}");
}

/// The snapshot table lay past the end of the file, and the advice was to create an image over it.
#[test]
fn a_damaged_image_is_not_called_empty() {
    let (_dir, file) = image();
    let words = [OsStr::new("snapshot"), OsStr::new("create"), "s".as_ref()];
    let target = [OsStr::new("--blk-file"), file.as_os_str()];
    run(QBLKD, [words.as_slice(), &target].concat())
        .unwrap()
        .success()
        .unwrap();
    let image = fs::OpenOptions::new().write(true).open(&file).unwrap();
    image
        .write_all_at(&(1_u64 << 40).to_be_bytes(), 64)
        .unwrap();
    let said = refusal(arguments(&file, &[]));
    assert!(said.contains("snapshot table is damaged"), "{said}");
    assert!(!said.contains("empty"), "{said}");
}

#[test]
fn too_few_descriptors_are_named_with_the_limit_to_raise() {
    let (dir, file) = image();
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "ulimit -n 10; exec \"$@\"",
        "sh",
        QBLKD,
        "--socket-path",
    ]);
    shell.arg(dir.path().join("s")).args(arguments(&file, &[]));
    let refused = run_command(&mut shell, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    assert!(refused.stderr.contains("LimitNOFILE"), "{refused:?}");
}

// --- Tools ---

#[test]
fn create_says_that_a_file_may_not_be_as_large() {
    let (dir, _) = image();
    let mut limited = Command::new("prlimit");
    limited.args(["--fsize=4194304", QBLKD, "create", "--preallocation=full"]);
    limited.arg(dir.path().join("full.qcow2")).arg("64M");
    let refused = run_command(&mut limited, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    assert!(refused.stderr.contains("File too large"), "{refused:?}");
}

#[test]
fn create_warns_of_a_backing_file_that_the_server_will_refuse() {
    let (base_dir, base) = image();
    let (dir, _) = image();
    let overlay = dir.path().join("overlay.qcow2");
    let create = |backing: &Path| {
        let mut command = Command::new(QBLKD);
        command.args(["create", "--backing-format", "qcow2", "--backing-file"]);
        command.arg(backing).arg(&overlay);
        run_command(&mut command, LIMIT)
            .unwrap()
            .success()
            .unwrap()
            .stderr
    };
    assert_eq!(create(Path::new("disk.qcow2")), "");
    let warning = create(&base);
    let folder = fs::canonicalize(base_dir.path()).unwrap();
    let option = format!("--backing-dir {}", folder.display());
    assert!(warning.contains(&option), "{warning}");
    let said = refusal(arguments(&overlay, &[]));
    assert!(said.contains(&option), "{said}");
    let granted = ["--backing-dir", folder.to_str().unwrap()];
    let server = Server::start(arguments(&overlay, &granted)).unwrap();
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let (_dir, file) = image();
    let mut command = Command::new(QBLKD);
    command.args(["--fd", "0"]).args(arguments(&file, &[]));
    // Standard input is /dev/null.
    let refused = run_command(&mut command, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    assert!(refused.stderr.contains("--fd 0"), "{refused:?}");
}

/// The number was looked at after the program had opened descriptors of its own: one of those, half
/// of a socket pair, was then taken for the front-end.
#[test]
fn a_descriptor_that_nobody_has_given_is_refused() {
    let (_dir, file) = image();
    // The lowest numbers are those that the program gets first.
    for number in 3..16 {
        let mut command = Command::new(QBLKD);
        command.args(["--fd", &number.to_string()]);
        command.args(arguments(&file, &[]));
        let refused = run_command(&mut command, LIMIT / 10).unwrap();
        assert_eq!(refused.code().unwrap(), 1, "{number}: {refused:?}");
        assert!(refused.stderr.contains("--fd"), "{number}: {refused:?}");
    }
}

/// The host takes this number for "no change"; the library that calls it panics.
#[test]
fn the_number_that_is_no_group_is_refused() {
    let (_dir, file) = image();
    let said = refusal(arguments(&file, &["--socket-group", "4294967295"]));
    assert!(said.contains("no group '4294967295'"), "{said}");
}

#[test]
fn a_control_socket_that_cannot_be_is_refused_with_what_to_change() {
    let (dir, file) = image();
    let control = |path: PathBuf| {
        refusal(arguments(
            &file,
            &["--control", &path.display().to_string()],
        ))
    };
    let no_folder = control(dir.path().join("missing/s"));
    assert!(no_folder.contains("there is no directory '"), "{no_folder}");
    let too_long = control(PathBuf::from(format!("/tmp/{}", "x".repeat(103))));
    assert!(too_long.contains("108 bytes"), "{too_long}");
}

// --- Locks ---

/// Plain words, for who does not know of byte ranges.
fn says_in_use(text: &str) {
    let text_lower = text.to_lowercase();
    let words = ["in use", "used by", "another process", "lock"];
    assert!(words.iter().any(|word| text_lower.contains(word)), "{text}");
}

#[test]
fn a_second_server_is_refused_while_the_first_writes() {
    let (_dir, file) = image();
    let server = Server::start(arguments(&file, &[])).unwrap();
    says_in_use(&refusal(arguments(&file, &[])));
    says_in_use(&refusal(arguments(&file, &["--read-only"])));
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
}

#[test]
fn our_tools_leave_a_served_image_alone() {
    let (_dir, file) = image();
    let server = Server::start(arguments(&file, &[])).unwrap();
    let before = fs::read(&file).unwrap();
    for words in [&["check"][..], &["check", "--repair", "all"], &["create"]] {
        let mut command = Command::new(QBLKD);
        command.args(words).arg(&file);
        if words == ["create"] {
            command.arg("1G");
        }
        let refused = run_command(&mut command, LIMIT).unwrap();
        assert_eq!(refused.code().unwrap(), 1, "{words:?}: {refused:?}");
        says_in_use(&refused.stderr);
    }
    assert!(fs::read(&file).unwrap() == before, "the image has changed");
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
}

#[test]
fn readers_share_an_image() {
    let (_dir, file) = image();
    let first = Server::start(arguments(&file, &["--read-only"])).unwrap();
    let second = Server::start(arguments(&file, &["--read-only"])).unwrap();
    says_in_use(&refusal(arguments(&file, &[])));
    for server in [first, second] {
        let mut driver = Driver::connect(&server.socket).unwrap();
        assert_eq!(driver.request(IN, 0, 4096, WRITE).unwrap(), OK);
    }
}

#[test]
fn qemu_is_kept_from_a_served_image_and_gets_it_back() {
    if !have_tools(
        "qemu_is_kept_from_a_served_image_and_gets_it_back",
        &["qemu-img", "qemu-io"],
    ) {
        return;
    }
    let (_dir, file) = image();
    let server = Server::start(arguments(&file, &[])).unwrap();
    let write = ["-f", "qcow2", "-c", "write 0 64k"].map(OsStr::new);
    let write: Vec<&OsStr> = write.into_iter().chain([file.as_os_str()]).collect();
    let check = [OsStr::new("check"), file.as_os_str()];
    let refused = [
        run("qemu-io", &write).unwrap(),
        run("qemu-img", check).unwrap(),
    ];
    let locked = refused.map(|tool| tool.stderr.contains("lock"));
    assert_eq!(locked, [true, true]);
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
    run("qemu-io", &write).unwrap().success().unwrap();
    qemu::expect_check(&file, &[CHECK_CLEAN]).unwrap();
}

#[test]
fn an_image_that_qemu_writes_is_refused() {
    if !have_tools("an_image_that_qemu_writes_is_refused", &["qemu-io"]) {
        return;
    }
    let (_dir, file) = image();
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "qcow2"]).arg(&file).stdin(Stdio::piped());
    let mut qemu = qemu.stdout(Stdio::piped()).spawn().unwrap();
    // It prompts when it has the image open, and then waits on its standard input. Whoever asks for
    // the lock instead may be what keeps it from opening the image.
    let mut prompt = [0; 8];
    let prompted = qemu.stdout.as_mut().unwrap().read_exact(&mut prompt);
    let said = prompted.map(|()| refusal(arguments(&file, &[])));
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    assert_eq!(&prompt, b"qemu-io>");
    says_in_use(&said.unwrap());
}

#[test]
fn locking_off_asks_nobody() {
    let (_dir, file) = image();
    let server = Server::start(arguments(&file, &["--read-only"])).unwrap();
    let other = Server::start(arguments(&file, &["--read-only", "--locking", "off"])).unwrap();
    let on = Server::start(arguments(&file, &["--read-only", "--locking", "on"])).unwrap();
    for server in [other, on, server] {
        assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
    }
}

#[test]
fn a_backing_file_is_locked_against_writers_only() {
    let (dir, base) = image();
    let overlay = dir.path().join("overlay.qcow2");
    let mut create = Command::new(QBLKD);
    create.args([
        "create",
        "--backing-file",
        "disk.qcow2",
        "--backing-format",
        "qcow2",
    ]);
    run_command(create.arg(&overlay), LIMIT)
        .unwrap()
        .success()
        .unwrap();
    let server = Server::start(arguments(&overlay, &[])).unwrap();
    says_in_use(&refusal(arguments(&base, &[])));
    let reader = Server::start(arguments(&base, &["--read-only"])).unwrap();
    for server in [reader, server] {
        assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
    }
}

// --- Modes ---

#[test]
fn every_cache_mode_serves_a_file_on_a_disk() {
    for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
        let (_dir, file) = image();
        let server = Server::start(arguments(&file, &["--cache", mode])).unwrap();
        let mut driver = Driver::connect(&server.socket).unwrap();
        // Neither aligned nor a whole block of the host: bounce buffers, where O_DIRECT needs them.
        assert_eq!(driver.request(OUT, 3, 1536, 0).unwrap(), OK, "{mode}");
        assert_eq!(driver.request(IN, 2, 2560, WRITE).unwrap(), OK, "{mode}");
        drop(driver);
        assert_eq!(server.terminate().unwrap().code().unwrap(), 0, "{mode}");
        let checked = run(QBLKD, [OsStr::new("check"), file.as_os_str()]).unwrap();
        assert_eq!(checked.code().unwrap(), 0, "{mode}: {checked:?}");
    }
}

#[test]
fn the_word_serve_may_be_said() {
    let (dir, file) = image();
    let socket = dir.path().join("s");
    let mut command = vec![
        OsString::from("serve"),
        "--socket-path".into(),
        socket.into(),
    ];
    command.extend(arguments(&file, &["--num-queues", "65"]));
    let refused = run(QBLKD, command).unwrap();
    // Understood as the server's option, out of its range.
    assert_eq!(refused.code().unwrap(), 1);
    assert!(refused.stderr.contains("1 to 64"), "{refused:?}");
}
