//! The vhost-user socket with well-behaved clients: queues, reconnects, sockets, signals.
//!
//! What hostile ones do to it is in `hostile`; what the disk holds on every kind of image in `chaos`.

use crate::kit::SECTOR_BYTES;
use crate::kit::chaos::{self, Initial};
use crate::kit::disk::{ConnectOptions, Disk, Kind, STATUS_OK, Segment, Waiter, wait_for_one};
use crate::kit::verify;
use crate::support::command::{LIMIT, run, run_command};
use crate::support::driver::{self, Driver, IN, IOERR, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::{QBLKD, have_tools};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_driver::VirtioBlkFeatureFlags;
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 32 << 20;
/// Requests of a run: some for each cluster.
const REQUESTS: u64 = 1500;
/// Writes that a server has done before something happens to it.
const WRITES: u64 = 100;
/// Offset of `writeback` in `virtio_blk_config`.
const CONFIG_WRITEBACK: u32 = 32;

/// An empty qcow2 image in a folder of its own.
struct Scratch {
    dir: TempDir,
    file: PathBuf,
}

impl Scratch {
    /// `None`: a tool is missing, and the test has said so.
    fn new(test: &str) -> Option<Self> {
        if !have_tools(test, &["qemu-img"]) {
            return None;
        }
        let (dir, file) = qemu::new_image(DISK_BYTES).unwrap();
        Some(Self { dir, file })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn arguments(&self, more: &[&str]) -> Vec<OsString> {
        let mut arguments = vec!["--blk-file".into(), self.file.clone().into()];
        arguments.extend(more.iter().map(OsString::from));
        arguments
    }

    fn serve(&self, more: &[&str]) -> Server {
        Server::start(self.arguments(more)).unwrap()
    }
}

fn options(socket: &Path, queues: usize) -> chaos::Options {
    chaos::Options {
        requests_max: REQUESTS,
        ..chaos::Options::new(socket, queues, LIMIT)
    }
}

/// Ends the server, which must be content, and lets QEMU judge the image.
fn terminate_clean(server: Server, file: &Path) {
    let ended = server.terminate().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
    qemu::expect_check(file, &[CHECK_CLEAN]).unwrap();
}

// --- Queues ---

/// Verified random work on that many queues; `slots` requests on each.
fn work_on_queues(test: &str, queues: usize, slots: usize, more: &[&str]) {
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let server = scratch.serve(more);
    let model = scratch.path("model.raw");
    let mut options = options(&server.socket, queues);
    options.connect.slots = slots;
    options.initial = Initial::Zero;
    options.model_out = Some(model.clone());
    let report = chaos::run(&options).unwrap();
    assert!(report.writes > 0, "{report:?}");
    terminate_clean(server, &scratch.file);
    qemu::compare("qcow2", &scratch.file, &model).unwrap();
}

#[test]
fn one_queue_holds_what_it_was_given() {
    work_on_queues("one_queue_holds_what_it_was_given", 1, 32, &[]);
}

#[test]
fn two_queues_hold_what_they_were_given() {
    work_on_queues("two_queues_hold_what_they_were_given", 2, 32, &[]);
}

#[test]
fn four_queues_hold_what_they_were_given() {
    work_on_queues("four_queues_hold_what_they_were_given", 4, 32, &[]);
}

#[test]
fn sixty_four_queues_on_one_thread_hold_what_they_were_given() {
    let test = "sixty_four_queues_on_one_thread_hold_what_they_were_given";
    work_on_queues(test, 64, 2, &["--num-queues", "64", "--threads", "1"]);
}

#[test]
fn a_ring_larger_than_allowed_is_refused() {
    let Some(scratch) = Scratch::new("a_ring_larger_than_allowed_is_refused") else {
        return;
    };
    let server = scratch.serve(&["--queue-size", "8"]);
    assert!(Driver::connect(&server.socket).is_err());
    terminate_clean(server, &scratch.file);
}

// --- What the device says ---

#[test]
fn the_serial_is_the_one_that_was_given() {
    let Some(scratch) = Scratch::new("the_serial_is_the_one_that_was_given") else {
        return;
    };
    let server = scratch.serve(&["--serial", "SN-0123456789abcdef"]);
    let (disk, mut queues) = Disk::connect(&ConnectOptions::new(&server.socket)).unwrap();
    assert_eq!(disk.serial(&mut queues[0]).unwrap(), "SN-0123456789abcdef");
}

#[test]
fn the_configuration_follows_the_options() {
    let Some(scratch) = Scratch::new("the_configuration_follows_the_options") else {
        return;
    };
    let words = [
        "--num-queues",
        "3",
        "--block-size",
        "4k",
        "--cache",
        "writethrough",
    ];
    let server = scratch.serve(&words);
    let (disk, _queues) = Disk::connect(&ConnectOptions::new(&server.socket)).unwrap();
    let geometry = disk.geometry;
    assert_eq!(geometry.capacity_sectors * SECTOR_BYTES as u64, DISK_BYTES);
    assert_eq!((geometry.queues, geometry.block_bytes), (3, 4096));
    assert!(!geometry.writeback);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let Some(scratch) = Scratch::new("a_read_only_disk_refuses_every_change") else {
        return;
    };
    let before = fs::read(&scratch.file).unwrap();
    let server = scratch.serve(&["--read-only"]);
    let (disk, mut queues) = Disk::connect(&ConnectOptions::new(&server.socket)).unwrap();
    assert!(disk.geometry.has(VirtioBlkFeatureFlags::RO));
    assert!(!disk.geometry.has(VirtioBlkFeatureFlags::DISCARD));
    let waiter = Waiter::new(&queues).unwrap();
    let queue = &mut queues[0];
    let segment = Segment {
        sector: 0,
        sectors: 128,
        unmap: false,
    };
    queue.submit(0, Kind::Write, 0, &[SECTOR_BYTES]).unwrap();
    let write = wait_for_one(&disk, queue, &waiter).unwrap().status;
    queue.submit_segments(0, Kind::Discard, &[segment]).unwrap();
    let discard = wait_for_one(&disk, queue, &waiter).unwrap().status;
    queue
        .submit_segments(0, Kind::WriteZeroes, &[segment])
        .unwrap();
    let zero = wait_for_one(&disk, queue, &waiter).unwrap().status;
    queue.submit(0, Kind::Flush, 0, &[]).unwrap();
    let flush = wait_for_one(&disk, queue, &waiter).unwrap().status;
    queue.submit(0, Kind::Read, 0, &[SECTOR_BYTES]).unwrap();
    let read = wait_for_one(&disk, queue, &waiter).unwrap().status;
    assert_eq!([write, discard, zero], [IOERR; 3]);
    assert_eq!([flush, read], [STATUS_OK; 2]);
    drop((disk, queues));
    terminate_clean(server, &scratch.file);
    assert_eq!(fs::read(&scratch.file).unwrap(), before);
}

// --- Write-through ---

/// Writes to an unallocated cluster, and kills the server as soon as the write has completed. Then
/// the cluster's mapping must be in the image: only a write-through disk has to write it by then.
fn survives_a_kill_without_a_flush(scratch: &Scratch, server: Server, mut driver: Driver) {
    const SECTOR: u64 = 2048;
    const BYTES: u32 = 4096;
    driver.start().unwrap();
    let data: Vec<u8> = (0..BYTES)
        .map(|at| (at / 16).to_le_bytes()[0] | 1)
        .collect();
    let at = GuestAddress(driver::DATA);
    driver.memory.write_slice(&data, at).unwrap();
    let status = driver.request(OUT, SECTOR, BYTES, 0).unwrap();
    assert_eq!(status, OK);
    server.signal("KILL").unwrap();
    drop(server);
    let server = Server::start_after_kill(&scratch.arguments(&["--read-only"])).unwrap();
    let mut driver = Driver::connect(&server.socket).unwrap();
    assert_eq!(driver.request(IN, SECTOR, BYTES, WRITE).unwrap(), OK);
    let mut found = vec![0; data.len()];
    driver.memory.read_slice(&mut found, at).unwrap();
    assert!(found == data, "the completed write is lost");
}

fn negotiate(server: &Server, declined: u64) -> Driver {
    Driver::negotiate(UnixStream::connect(&server.socket).unwrap(), declined).unwrap()
}

#[test]
fn cache_writethrough_needs_no_flush() {
    if let Some(scratch) = Scratch::new("cache_writethrough_needs_no_flush") {
        let server = scratch.serve(&["--cache", "writethrough"]);
        let driver = negotiate(&server, 0);
        survives_a_kill_without_a_flush(&scratch, server, driver);
    }
}

#[test]
fn a_driver_without_flush_gets_write_through() {
    if let Some(scratch) = Scratch::new("a_driver_without_flush_gets_write_through") {
        let server = scratch.serve(&[]);
        let driver = negotiate(&server, driver::FLUSH);
        survives_a_kill_without_a_flush(&scratch, server, driver);
    }
}

#[test]
fn a_driver_that_turns_the_write_cache_off_gets_write_through() {
    let test = "a_driver_that_turns_the_write_cache_off_gets_write_through";
    if let Some(scratch) = Scratch::new(test) {
        let server = scratch.serve(&[]);
        let mut driver = negotiate(&server, 0);
        let flags = VhostUserConfigFlags::WRITABLE;
        driver
            .frontend
            .set_config(CONFIG_WRITEBACK, flags, &[0])
            .unwrap();
        survives_a_kill_without_a_flush(&scratch, server, driver);
    }
}

// --- Clients that come and go ---

#[test]
fn a_client_that_comes_back_finds_what_it_wrote() {
    let Some(scratch) = Scratch::new("a_client_that_comes_back_finds_what_it_wrote") else {
        return;
    };
    let server = scratch.serve(&[]);
    let mut initial = Initial::Zero;
    for round in 0..4 {
        let model = scratch.path(&format!("model-{round}.raw"));
        chaos::run(&chaos::Options {
            requests_max: 300,
            seed: round,
            initial,
            model_out: Some(model.clone()),
            ..options(&server.socket, 2)
        })
        .unwrap();
        initial = Initial::Raw(model);
    }
    terminate_clean(server, &scratch.file);
}

#[test]
fn a_client_that_vanishes_under_load_is_succeeded_by_the_next() {
    let test = "a_client_that_vanishes_under_load_is_succeeded_by_the_next";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let server = scratch.serve(&[]);
    for round in 0..10 {
        let connect = ConnectOptions {
            queues: 2,
            ..ConnectOptions::new(&server.socket)
        };
        let (_disk, mut queues) = Disk::connect(&connect).unwrap();
        for queue in &mut queues {
            for slot in 0..queue.slots() {
                let bytes = vec![round + 1; 64 << 10];
                queue.write_slot(slot, 0, &bytes);
                let sector = slot as u64 * 300;
                queue
                    .submit(slot, Kind::Write, sector, &[bytes.len()])
                    .unwrap();
            }
            queue.kick().unwrap();
        }
        // Gone with everything in flight, as if it had been killed.
    }
    chaos::run(&options(&server.socket, 2)).unwrap();
    terminate_clean(server, &scratch.file);
}

#[test]
fn a_second_client_waits_for_the_first_and_does_not_disturb_it() {
    let test = "a_second_client_waits_for_the_first_and_does_not_disturb_it";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let server = scratch.serve(&[]);
    let mut first = Driver::connect(&server.socket).unwrap();
    thread::scope(|scope| {
        // It gets its connection at once, and answers when the first client is gone.
        let second = scope.spawn(|| chaos::run(&options(&server.socket, 1)));
        for sector in 0..500 {
            assert_eq!(first.request(OUT, sector, 512, 0).unwrap(), OK);
        }
        assert!(!second.is_finished());
        drop(first);
        second.join().unwrap().unwrap();
    });
    terminate_clean(server, &scratch.file);
}

// --- Sockets ---

#[test]
fn a_listening_socket_is_inherited() {
    let Some(scratch) = Scratch::new("a_listening_socket_is_inherited") else {
        return;
    };
    let socket = scratch.path("inherited.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = Server::start_on(listener.into(), socket, scratch.arguments(&[])).unwrap();
    for _ in 0..2 {
        chaos::run(&options(&server.socket, 2)).unwrap();
    }
    // It belongs to whoever made it.
    assert!(server.socket.exists());
    terminate_clean(server, &scratch.file);
}

#[test]
fn a_connected_socket_is_served_until_its_end() {
    let Some(scratch) = Scratch::new("a_connected_socket_is_served_until_its_end") else {
        return;
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let nowhere = PathBuf::new();
    let server = Server::start_on(theirs.into(), nowhere, scratch.arguments(&[])).unwrap();
    let mut driver = Driver::negotiate(ours, 0).unwrap();
    driver.start().unwrap();
    assert_eq!(driver.request(OUT, 0, 512, 0).unwrap(), OK);
    drop(driver);
    let ended = server.finish().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN]).unwrap();
}

/// Serving at `socket` fails; what the server says.
fn refused_at(socket: &Path, arguments: &[OsString]) -> String {
    let mut command = Command::new(QBLKD);
    command.arg("--socket-path").arg(socket).args(arguments);
    let refused = run_command(&mut command, LIMIT).unwrap();
    assert_eq!(refused.code().unwrap(), 1, "{refused:?}");
    refused.stderr
}

#[test]
fn a_stale_socket_is_replaced_and_removed_at_the_end() {
    let Some(scratch) = Scratch::new("a_stale_socket_is_replaced_and_removed_at_the_end") else {
        return;
    };
    let socket = scratch.path("stale.sock");
    drop(UnixListener::bind(&socket).unwrap());
    // A process that another test starts just now has it until it runs its own program.
    while UnixStream::connect(&socket).is_ok() {}
    let server = Server::start_at(socket.clone(), scratch.arguments(&[])).unwrap();
    Driver::connect(&socket).unwrap();
    terminate_clean(server, &scratch.file);
    assert!(!socket.exists());
}

#[test]
fn a_live_socket_is_refused_and_stays_alive() {
    let Some(scratch) = Scratch::new("a_live_socket_is_refused_and_stays_alive") else {
        return;
    };
    let server = scratch.serve(&[]);
    let raw = scratch.path("other.raw");
    fs::write(&raw, [0; 4096]).unwrap();
    let other = [
        "--blk-file".into(),
        raw.into(),
        "--format".into(),
        "raw".into(),
    ];
    let stderr = refused_at(&server.socket, &other);
    assert!(stderr.contains("listens"), "{stderr}");
    Driver::connect(&server.socket).unwrap();
    terminate_clean(server, &scratch.file);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let Some(scratch) = Scratch::new("a_file_that_is_no_socket_is_left_alone") else {
        return;
    };
    let file = scratch.path("precious");
    fs::write(&file, "precious").unwrap();
    let stderr = refused_at(&file, &scratch.arguments(&[]));
    assert!(stderr.contains("not a socket"), "{stderr}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn the_socket_has_the_mode_and_group_that_were_asked_for() {
    let Some(scratch) = Scratch::new("the_socket_has_the_mode_and_group_that_were_asked_for")
    else {
        return;
    };
    let group = fs::metadata(scratch.dir.path()).unwrap().gid().to_string();
    let server = scratch.serve(&["--socket-mode", "0640", "--socket-group", &group]);
    let socket = fs::metadata(&server.socket).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o640);
    assert_eq!(socket.gid().to_string(), group);
}

// --- Signals ---

/// A server with a control socket at `control`, which tells how far the client is.
fn serve_observed(scratch: &Scratch) -> (Server, PathBuf) {
    let control = scratch.path("control.sock");
    let mut arguments = scratch.arguments(&["--control"]);
    arguments.push(control.clone().into());
    (Server::start(arguments).unwrap(), control)
}

/// Random work on two queues while `disturb` happens after [`WRITES`]; the client must notice that
/// the server has gone. What each sector may hold is then in the file `state`.
fn under_load(server: &Server, control: &Path, state: &Path, disturb: impl FnOnce()) {
    let options = chaos::Options {
        requests_max: u64::MAX,
        initial: Initial::Zero,
        state_out: Some(state.to_owned()),
        ..options(&server.socket, 2)
    };
    thread::scope(|scope| {
        let client = scope.spawn(move || chaos::run(&options));
        let mut observer = Qmp::connect(control).unwrap();
        let mut written = 0;
        while written < WRITES && !client.is_finished() {
            let stats = observer.execute("query-blockstats").unwrap();
            written = stats[0]["stats"]["wr_operations"].as_u64().unwrap();
        }
        assert!(!client.is_finished(), "ended before time");
        disturb();
        let report = client.join().unwrap().unwrap();
        assert!(report.server_gone && report.writes > 0, "{report:?}");
    });
}

/// A new server has every flushed sector, and QEMU finds the same disk.
fn verify_after(scratch: &Scratch, state: PathBuf) {
    let model = scratch.path("found.raw");
    let server = scratch.serve(&[]);
    verify::run(&verify::Options {
        connect: ConnectOptions::new(&server.socket),
        state,
        pin: None,
        model_out: Some(model.clone()),
    })
    .unwrap();
    assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
    qemu::compare("qcow2", &scratch.file, &model).unwrap();
}

#[test]
fn sigterm_under_load_leaves_a_clean_image() {
    let Some(scratch) = Scratch::new("sigterm_under_load_leaves_a_clean_image") else {
        return;
    };
    for signal in ["TERM", "INT"] {
        qemu::create(&scratch.file, DISK_BYTES, "cluster_size=64k").unwrap();
        let state = scratch.path(signal);
        let (server, control) = serve_observed(&scratch);
        under_load(&server, &control, &state, || server.signal(signal).unwrap());
        let ended = server.finish().unwrap();
        assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
        qemu::expect_check(&scratch.file, &[CHECK_CLEAN]).unwrap();
        verify_after(&scratch, state);
    }
}

/// Whatever a thread of it waits in is interrupted, as when a machine is put to sleep and woken up.
#[test]
fn a_server_that_is_stopped_and_continued_serves_on() {
    let Some(scratch) = Scratch::new("a_server_that_is_stopped_and_continued_serves_on") else {
        return;
    };
    let (server, control) = serve_observed(&scratch);
    let interrupt = format!(
        "for round in $(seq 100); do kill -STOP {0}; kill -CONT {0}; sleep 0.005; done",
        server.id()
    );
    let interrupt = || run("sh", ["-c", interrupt.as_str()]).unwrap().success();
    let mut driver = Driver::connect(&server.socket).unwrap();
    interrupt().unwrap();
    assert_eq!(driver.request(OUT, 0, 512, 0).unwrap(), OK);
    drop(driver);
    let state = scratch.path("state");
    under_load(&server, &control, &state, || {
        interrupt().unwrap();
        server.signal("TERM").unwrap();
    });
    let ended = server.finish().unwrap();
    assert_eq!(ended.code().unwrap(), 0, "{ended:?}");
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN]).unwrap();
    verify_after(&scratch, state);
}

#[test]
fn a_second_signal_stops_at_once_and_loses_nothing_flushed() {
    let test = "a_second_signal_stops_at_once_and_loses_nothing_flushed";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let state = scratch.path("state");
    let (server, control) = serve_observed(&scratch);
    under_load(&server, &control, &state, || {
        // Both are there when it looks.
        for signal in ["STOP", "TERM", "INT", "CONT"] {
            server.signal(signal).unwrap();
        }
    });
    let ended = server.finish().unwrap();
    assert_eq!(ended.code().unwrap(), 1, "{ended:?}");
    assert!(ended.stderr.contains("second signal"), "{ended:?}");
    qemu::wait_for_lock(&scratch.file).unwrap();
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN, CHECK_LEAKS]).unwrap();
    verify_after(&scratch, state);
}

#[test]
fn sigterm_without_a_client_ends_with_success() {
    let Some(scratch) = Scratch::new("sigterm_without_a_client_ends_with_success") else {
        return;
    };
    let server = scratch.serve(&[]);
    let socket = server.socket.clone();
    terminate_clean(server, &scratch.file);
    assert!(!socket.exists());
    let info = run("qemu-img", [OsStr::new("info"), scratch.file.as_os_str()]).unwrap();
    assert!(info.status.success(), "{info:?}");
}
