//! SIGKILL in the middle of random work: what was flushed is there, and the image is usable at once.
//!
//! Each round starts the server, verifies what the round before left behind, works on two queues, and
//! kills the server at a random moment. The client knows for every sector what it may hold: its last
//! flushed content, or what any later write gave it.

use crate::kit::chaos::{self, Initial};
use crate::kit::disk::ConnectOptions;
use crate::kit::verify;
use crate::support::command::run;
use crate::support::corpus::{self, Copy, Image, Kind, TOOLS};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::server::Server;
use crate::support::{Failure, ensure, for_each_case, have_tools};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// A kill comes at a random moment between these.
const WORK_MIN: Duration = Duration::from_millis(100);
const WORK_MAX: Duration = Duration::from_millis(700);
/// Attempts to kill a server in the middle of the work; each gives it twice the time, so that a slow
/// machine gets minutes to begin.
const ATTEMPTS: u32 = 10;
/// A run that is not killed has failed; it ends itself. Longer than the last attempt.
const CHAOS_LIMIT: Duration = Duration::from_secs(600);
const DISK_BYTES: u64 = 32 << 20;
/// Rounds on the plain image, and on each image of the corpus.
const ROUNDS: u32 = 20;
const ROUNDS_EACH: u32 = 4;

#[test]
fn flushed_sectors_survive_twenty_kills() {
    if have_tools("flushed_sectors_survive_twenty_kills", TOOLS) {
        let (dir, file) = qemu::new_image(DISK_BYTES).unwrap();
        let subject = Subject {
            arguments: vec!["--blk-file".into(), file.clone().into()],
            file,
            dir: dir.path().to_owned(),
            dirty_bit: false,
            initial: Initial::Zero,
        };
        subject.kill_repeatedly(ROUNDS).unwrap();
    }
}

/// Kinds that take different paths: lagging refcounts, shared clusters, small tables, no zero flag,
/// compressed clusters, a backing chain, narrow and wide refcounts.
const KINDS: &[&str] = &[
    "lazy-refcounts",
    "snapshots-refcount-16",
    "v3-cluster-512",
    "v2-cluster-4k",
    "zstd-cluster-64k",
    "chain-three",
    "refcount-1",
    "refcount-64",
];

#[test]
fn flushed_sectors_and_snapshots_survive_kills_on_every_kind() {
    let name = "flushed_sectors_and_snapshots_survive_kills_on_every_kind";
    if have_tools(name, TOOLS) {
        let mut images = corpus::images(Kind::Good);
        images.retain(|image| KINDS.contains(&image.name.as_str()));
        assert_eq!(images.len(), KINDS.len());
        for_each_case(&images, |image| &image.name, kill_on);
    }
}

fn kill_on(image: &Image) -> Result<(), Failure> {
    let copy = Copy::of(image)?;
    let subject = Subject {
        file: copy.image.clone(),
        dir: copy.dir.path().to_owned(),
        arguments: copy.arguments.clone(),
        dirty_bit: image.dirty || image.name == "lazy-refcounts",
        initial: Initial::Raw(image.raw()?),
    };
    subject.kill_repeatedly(ROUNDS_EACH)?;
    qemu::compare_snapshots(image, &copy.image)
}

/// An image to kill servers on.
struct Subject {
    file: PathBuf,
    /// For the client's files.
    dir: PathBuf,
    arguments: Vec<OsString>,
    /// The image may carry the dirty bit after a kill, which excuses refcounts until it is repaired.
    dirty_bit: bool,
    initial: Initial,
}

impl Subject {
    fn kill_repeatedly(&self, rounds: u32) -> Result<(), Failure> {
        for round in 0..rounds {
            self.kill_once(round)
                .map_err(|error| format!("round {round}: {error}"))?;
            if !self.dirty_bit {
                qemu::wait_for_lock(&self.file)?;
                qemu::expect_check(&self.file, &[CHECK_CLEAN, CHECK_LEAKS])
                    .map_err(|failure| format!("after kill {round}: {failure}"))?;
            }
        }
        self.finish(rounds)
    }

    /// What the kill of a round left behind, for the next to start from.
    fn state(&self, round: u32) -> PathBuf {
        self.dir.join(format!("state-{round}"))
    }

    fn kill_once(&self, round: u32) -> Result<(), Failure> {
        let mut initial = self.initial.clone();
        let mut server = Server::start_after_kill(&self.arguments)?;
        if round > 0 {
            let pinned = self.dir.join("pinned");
            verify::run(&verify::Options {
                connect: ConnectOptions::new(&server.socket),
                state: self.state(round - 1),
                pin: Some(pinned.clone()),
                model_out: None,
            })
            .map_err(|error| format!("what the last kill left: {error}"))?;
            initial = Initial::State(pinned);
        }
        let base = match &self.initial {
            Initial::Raw(raw) => Some(raw.clone()),
            _ => None,
        };
        let state = self.state(round);
        let mut after = WORK_MIN + (WORK_MAX - WORK_MIN).mul_f64(fastrand::f64());
        for _ in 0..ATTEMPTS {
            let options = chaos::Options {
                seed: round.into(),
                initial: initial.clone(),
                base: base.clone(),
                state_out: Some(state.clone()),
                ..chaos::Options::new(&server.socket, 2, CHAOS_LIMIT)
            };
            let worked = work_until_killed(&server, after, &options);
            // No state: on a slow machine the client had not begun.
            if state.exists() {
                return worked;
            }
            after *= 2;
            drop(server);
            server = Server::start_after_kill(&self.arguments)?;
        }
        Err("the client never got to work".into())
    }

    /// The last start: everything is there, an orderly end, and QEMU sees the same disk.
    fn finish(&self, rounds: u32) -> Result<(), Failure> {
        let model = self.dir.join("model.raw");
        let server = Server::start_after_kill(&self.arguments)?;
        let verified = verify::run(&verify::Options {
            connect: ConnectOptions::new(&server.socket),
            state: self.state(rounds - 1),
            pin: None,
            model_out: Some(model.clone()),
        });
        let ended = server.terminate()?;
        verified.map_err(|error| format!("{error}; server: {ended:?}"))?;
        ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
        qemu::expect_check(&self.file, &[CHECK_CLEAN, CHECK_LEAKS])?;
        qemu::compare("qcow2", &self.file, &model)
    }
}

/// Random work on a server that is killed `after` it has been started.
fn work_until_killed(
    server: &Server,
    after: Duration,
    options: &chaos::Options,
) -> Result<(), Failure> {
    let (done, finished) = mpsc::channel();
    thread::scope(|scope| {
        let client = scope.spawn(move || {
            let report = chaos::run(options);
            // The main thread may have stopped to listen.
            done.send(()).ok();
            report
        });
        let early = finished.recv_timeout(after) != Err(RecvTimeoutError::Timeout);
        server.signal("KILL")?;
        let report = client
            .join()
            .map_err(|panic| format!("client: {panic:?}"))??;
        ensure(!early && report.server_gone, || {
            format!("ended before the kill: {report:?}")
        })
    })
}

/// The lock of a killed server may outlive it for some milliseconds; a tool that wants it waits.
#[test]
fn a_killed_server_leaves_an_image_that_the_next_one_opens_at_once() {
    let name = "a_killed_server_leaves_an_image_that_the_next_one_opens_at_once";
    if have_tools(name, TOOLS) {
        let (_dir, file) = qemu::new_image(DISK_BYTES).unwrap();
        let arguments = [OsStr::new("--blk-file"), file.as_os_str()];
        for _ in 0..5 {
            let server = Server::start(arguments).unwrap();
            server.signal("KILL").unwrap();
        }
        let server = Server::start(arguments).unwrap();
        assert_eq!(server.terminate().unwrap().code().unwrap(), 0);
        let info = run("qemu-img", [OsStr::new("info"), file.as_os_str()]).unwrap();
        assert!(info.status.success(), "{info:?}");
    }
}
