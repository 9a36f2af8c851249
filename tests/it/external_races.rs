//! External snapshots against everything that may come at the same moment: the end of the server,
//! other clients, links that are swapped, a host that refuses.

use crate::external::{
    DISK_BYTES, RUN_LIMIT, Scene, TOOLS, command, snapshot, take, wait_for_writes,
};
use crate::kit::chaos::{self, Initial};
use crate::kit::disk::ConnectOptions;
use crate::kit::verify;
use crate::support::command::{LIMIT, run, run_command};
use crate::support::driver::{DATA, Driver, IN, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, ensure, for_each_case, have_tools, skip};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// The end comes at a random moment before this.
const MOMENT_MAX: Duration = Duration::from_millis(250);
/// Overlays of a round at most: a chain has a limit.
const OVERLAYS_MAX: usize = 12;

/// Ways for a server to end.
struct End {
    name: &'static str,
    signal: &'static str,
    rounds: u64,
    create: &'static str,
    serve: &'static [&'static str],
}

const ENDS: &[End] = &[
    End {
        name: "SIGKILL",
        signal: "KILL",
        rounds: 10,
        create: "cluster_size=64k",
        serve: &[],
    },
    End {
        name: "SIGKILL, small clusters, no cache",
        signal: "KILL",
        rounds: 6,
        create: "cluster_size=4k",
        serve: &["--cache", "none"],
    },
    End {
        name: "SIGTERM",
        signal: "TERM",
        rounds: 10,
        create: "cluster_size=64k",
        serve: &[],
    },
];

#[test]
fn an_end_at_any_moment_leaves_the_newest_overlay_with_everything() {
    if have_tools(
        "an_end_at_any_moment_leaves_the_newest_overlay_with_everything",
        TOOLS,
    ) {
        for_each_case(ENDS, |end| end.name, end_at_random);
    }
}

/// One overlay after the other under random work, and a signal at a random moment. Whatever is found
/// then, the newest overlay that is an image has everything that was flushed.
fn end_at_random(end: &End) -> Result<(), Failure> {
    let scene = Scene::new(end.create, end.serve)?;
    let mut chain = vec![scene.image.clone()];
    let mut initial = Initial::Zero;
    for round in 0..end.rounds {
        let active = chain.last().ok_or("no image")?.clone();
        let state = scene.path(&format!("state-{round}"));
        let server = Server::start_after_kill(&scene.words(&active))?;
        let options = chaos::Options {
            seed: round,
            initial: initial.clone(),
            state_out: Some(state.clone()),
            ..chaos::Options::new(&server.socket, 2, RUN_LIMIT)
        };
        let name = |number| scene.path(&format!("{round}-{number}.qcow2"));
        let answered = AtomicUsize::new(0);
        let mut client = scene.client()?;
        let report = thread::scope(|scope| {
            let work = scope.spawn(|| chaos::run(&options));
            wait_for_writes(&mut client, 50)?;
            let (begun, begins) = mpsc::channel::<()>();
            let (name, answered) = (&name, &answered);
            let snapshots = scope.spawn(move || {
                begun.send(()).ok();
                while let number @ 0..OVERLAYS_MAX = answered.load(Ordering::SeqCst) {
                    // An error is the end of the server.
                    if take(&mut client, &name(number)).is_err() {
                        return;
                    }
                    answered.store(number + 1, Ordering::SeqCst);
                }
            });
            begins.recv()?;
            // Nothing more comes: this is the random moment.
            let (_never, never) = mpsc::channel::<()>();
            let _ = never.recv_timeout(MOMENT_MAX.mul_f64(fastrand::f64()));
            server.signal(end.signal)?;
            snapshots.join().map_err(|panic| format!("{panic:?}"))?;
            let report = work.join().map_err(|panic| format!("client: {panic:?}"))?;
            Ok::<_, Failure>(report?)
        })?;
        ensure(report.server_gone, || format!("not ended: {report:?}"))?;
        let ended = server.finish()?;
        let is_orderly = end.signal == "TERM";
        ensure(!is_orderly || ended.code()? == 0, || format!("{ended:?}"))?;
        let answered = answered.into_inner();
        for number in 0..OVERLAYS_MAX {
            let file = name(number);
            let is_image = file.exists() && {
                let mut info = Command::new(QBLKD);
                run_command(info.arg("info").arg(&file), LIMIT)?
                    .status
                    .success()
            };
            ensure(is_image || number >= answered, || {
                format!("round {round}: overlay {number} of {answered} is no image")
            })?;
            ensure(number <= answered || !file.exists(), || {
                format!("round {round}: overlay {number}, but {answered} were answered")
            })?;
            if is_image {
                chain.push(file);
            }
        }
        let active = chain.last().ok_or("no image")?;
        qemu::wait_for_lock(active)?;
        let accepted: &[i32] = if is_orderly {
            &[CHECK_CLEAN]
        } else {
            &[CHECK_CLEAN, CHECK_LEAKS]
        };
        for file in &chain {
            qemu::expect_check(file, accepted)
                .map_err(|failure| format!("round {round}, {}: {failure}", file.display()))?;
        }
        let server = Server::start_after_kill(&scene.words(active))?;
        let pinned = scene.path("pinned");
        verify::run(&verify::Options {
            connect: ConnectOptions::new(&server.socket),
            state,
            pin: Some(pinned.clone()),
            model_out: None,
        })
        .map_err(|error| format!("round {round}, {answered} answered: {error}"))?;
        assert_eq!(server.terminate()?.code()?, 0);
        initial = Initial::State(pinned);
        if !is_orderly {
            // What the next round finds is its own.
            for file in &chain {
                let mut repair = Command::new(QBLKD);
                repair.args(["check", "--repair", "leaks"]).arg(file);
                run_command(&mut repair, LIMIT)?.success()?;
            }
        }
    }
    Ok(())
}

#[test]
fn one_of_many_that_ask_for_the_same_file_gets_it() -> Result<(), Failure> {
    const CLIENTS: usize = 6;
    if !have_tools("one_of_many_that_ask_for_the_same_file_gets_it", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let ask = |name: &str| -> Result<Result<(), String>, String> {
        let told = |error: Failure| error.to_string();
        let arguments = json!({ "device": "disk0", "snapshot-file": scene.path(name) });
        snapshot(&mut scene.client().map_err(told)?, &arguments).map_err(told)
    };
    for round in 0..4 {
        let same = format!("same-{round}.qcow2");
        let (taken, others) = thread::scope(|scope| {
            let same: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask(&same))).collect();
            let others: Vec<_> = (0..2)
                .map(|other| scope.spawn(move || ask(&format!("{round}-{other}.qcow2"))))
                .collect();
            let all = |threads: Vec<thread::ScopedJoinHandle<'_, _>>| -> Result<Vec<_>, Failure> {
                let joined = threads.into_iter().map(|thread| {
                    let answer: Result<Result<(), String>, String> =
                        thread.join().map_err(|panic| format!("{panic:?}"))?;
                    Ok(answer?)
                });
                joined.collect()
            };
            Ok::<_, Failure>((all(same)?, all(others)?))
        })?;
        let refused: Vec<_> = taken
            .iter()
            .filter_map(|answer| answer.as_ref().err())
            .collect();
        ensure(refused.len() == CLIENTS - 1, || format!("{taken:?}"))?;
        ensure(
            refused.iter().all(|said| said.contains("is there already")),
            || format!("{refused:?}"),
        )?;
        ensure(others.iter().all(Result::is_ok), || format!("{others:?}"))?;
    }
    let nodes = scene.client()?.execute("query-named-block-nodes")?;
    assert_eq!(nodes.as_array().map(Vec::len), Some(13), "{nodes}");
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

/// The folder of the new file is a link that somebody swaps all the time: to a folder that may be
/// used, and to one that may not.
#[test]
fn a_link_that_is_swapped_meanwhile_leads_nowhere_else() -> Result<(), Failure> {
    const SNAPSHOTS: usize = 60;
    if !have_tools("a_link_that_is_swapped_meanwhile_leads_nowhere_else", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let elsewhere = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    let inside = scene.path("inside");
    fs::create_dir(&inside)?;
    let door = scene.path("door");
    symlink(&inside, &door)?;
    let server = scene.serve(&scene.image)?;
    let stop = AtomicBool::new(false);
    let (mut taken, mut refused) = (0, 0);
    thread::scope(|scope| {
        let swapper = scope.spawn(|| -> std::io::Result<()> {
            let next = scene.path("next");
            for target in [elsewhere.path(), &inside].into_iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                symlink(target, &next)?;
                fs::rename(&next, &door)?;
            }
            Ok(())
        });
        let mut snapshots = || -> Result<(), Failure> {
            let mut client = scene.client()?;
            for number in 0..SNAPSHOTS {
                let file = door.join(format!("{number}.qcow2"));
                let arguments = json!({ "device": "disk0", "snapshot-file": file });
                match snapshot(&mut client, &arguments)? {
                    Ok(()) => taken += 1,
                    Err(_) => refused += 1,
                }
            }
            Ok(())
        };
        let asked = snapshots();
        stop.store(true, Ordering::Relaxed);
        swapper.join().map_err(|panic| format!("{panic:?}"))??;
        asked
    })?;
    assert_eq!(fs::read_dir(elsewhere.path())?.count(), 0);
    ensure(refused > 0, || "the link was never found swapped".into())?;
    // What was refused has left nothing.
    assert_eq!(fs::read_dir(&inside)?.count(), taken);
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&scene.image, &[CHECK_CLEAN])
}

/// A folder in which not even the superuser makes files.
const UNWRITABLE: &str = "/sys/kernel";

#[test]
fn a_host_that_refuses_the_file_is_told_of() -> Result<(), Failure> {
    if !have_tools("a_host_that_refuses_the_file_is_told_of", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &["--snapshot-dir", UNWRITABLE])?;
    let server = scene.serve(&scene.image)?;
    let mut client = scene.client()?;
    for (file, says) in [
        (Path::new(UNWRITABLE).join("x.qcow2"), "Permission denied"),
        (scene.path(&"x".repeat(300)), "File name too long"),
        (scene.path("base.qcow2/x.qcow2"), "Not a directory"),
    ] {
        let arguments = json!({ "device": "disk0", "snapshot-file": file });
        let said = snapshot(&mut client, &arguments)?
            .err()
            .ok_or("not refused")?;
        ensure(said.contains(says), || said)?;
    }
    take(&mut client, &scene.path("new.qcow2"))?;
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

/// A chain is as long as can be opened again, and each image of it costs few descriptors.
#[test]
fn a_chain_that_is_too_long_is_refused_before_anything_is_made() -> Result<(), Failure> {
    const LAYERS_MAX: usize = 200;
    if !have_tools(
        "a_chain_that_is_too_long_is_refused_before_anything_is_made",
        TOOLS,
    ) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let mut driver = Driver::connect(&server.socket)?;
    let mut client = scene.client()?;
    let descriptors = || -> Result<usize, Failure> {
        Ok(fs::read_dir(format!("/proc/{}/fd", server.id()))?.count())
    };
    let before = descriptors()?;
    for number in 1..LAYERS_MAX {
        take(&mut client, &scene.path(&format!("{number}.qcow2")))?;
        assert_eq!(driver.request(OUT, number as u64 * 128, 4096, 0)?, OK);
    }
    let after = descriptors()?;
    // One for the file, one for its lock.
    ensure(after <= before + 2 * LAYERS_MAX, || {
        format!("{before} descriptors, then {after}")
    })?;
    let listing = |folder: &Path| Ok::<_, Failure>(fs::read_dir(folder)?.count());
    let files = listing(scene.dir.path())?;
    let arguments = json!({ "device": "disk0", "snapshot-file": scene.path("more.qcow2") });
    let said = snapshot(&mut client, &arguments)?
        .err()
        .ok_or("not refused")?;
    ensure(said.contains("200 files"), || said)?;
    assert_eq!(listing(scene.dir.path())?, files);
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    let last = scene.path(&format!("{}.qcow2", LAYERS_MAX - 1));
    assert_eq!(scene.serve(&last)?.terminate()?.code()?, 0);
    qemu::expect_check(&last, &[CHECK_CLEAN])
}

/// A system call to fail, and how.
struct Injection {
    call: &'static str,
    error: &'static str,
}

const INJECTIONS: &[Injection] = &[
    Injection {
        call: "fsync",
        error: "EIO",
    },
    Injection {
        call: "fdatasync",
        error: "EIO",
    },
    Injection {
        call: "ftruncate",
        error: "ENOSPC",
    },
    Injection {
        call: "pwritev,pwrite64,pwritev2",
        error: "ENOSPC",
    },
    Injection {
        call: "preadv,pread64,preadv2",
        error: "EIO",
    },
    Injection {
        call: "openat",
        error: "EMFILE",
    },
    Injection {
        call: "readlink,readlinkat",
        error: "EACCES",
    },
    Injection {
        call: "fcntl",
        error: "ENOLCK",
    },
];

/// What strace says of a call that it made to fail.
const INJECTED: &str = "(INJECTED)";
/// Most calls of one kind that a snapshot makes.
const CALLS_MAX: usize = 100;

/// Whether threads can be traced here; says so if not.
fn may_trace(test: &str) -> bool {
    let mut strace = Command::new("strace");
    let traced = run_command(strace.args(["-f", "-e", "trace=none", "true"]), LIMIT);
    let may = traced.is_ok_and(|finished| finished.status.success());
    if !may {
        skip(test, "there is no strace, or nothing may be traced");
    }
    may
}

/// Fails one system call after the other, until `fail_one` says that there are no more.
fn fail_all(test: &str, fail_one: fn(&Injection, usize) -> Result<bool, Failure>) {
    if !have_tools(test, TOOLS) || !may_trace(test) {
        return;
    }
    for_each_case(
        INJECTIONS,
        |injection| injection.call,
        |injection| {
            for nth in 1..CALLS_MAX {
                let outcome = fail_one(injection, nth);
                if !outcome.map_err(|failure| format!("call {nth}: {failure}"))? {
                    return Ok(());
                }
            }
            Err(format!("more than {CALLS_MAX} calls").into())
        },
    );
}

/// The system calls of the thread that takes the snapshot fail one by one.
#[test]
fn every_system_call_of_a_snapshot_fails_once() {
    fail_all(
        "every_system_call_of_a_snapshot_fails_once",
        fail_in_snapshot,
    );
}

/// Fails the `nth` call while a snapshot is taken; `false` when there were not so many.
fn fail_in_snapshot(injection: &Injection, nth: usize) -> Result<bool, Failure> {
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    let mut client = scene.client()?;
    let strace = Strace::inject(&scene, server.id(), injection, nth)?;
    let overlay = scene.path("overlay.qcow2");
    let arguments = json!({ "device": "disk0", "snapshot-file": overlay });
    let answer = snapshot(&mut client, &arguments)?;
    let hit = strace.detach()?.contains(INJECTED);
    let explain = |text: &str| format!("{text} after {answer:?}");
    ensure(hit || answer.is_ok(), || explain("no fault, but an error"))?;
    ensure(answer.is_ok() == overlay.exists(), || {
        explain("the overlay is there or not")
    })?;
    let status = driver.request(OUT, 128, 4096, 0)?;
    // The old image's own flush may have been what failed.
    ensure(status == OK || has_failed(&mut client)?, || {
        explain("a write fails")
    })?;
    drop(driver);
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))?;
    let accepted = [CHECK_CLEAN, CHECK_LEAKS];
    qemu::expect_check(&scene.image, &accepted)?;
    if answer.is_ok() {
        qemu::expect_check(&overlay, &accepted)?;
    }
    Ok(hit)
}

/// The image that is served takes no more writes.
fn has_failed(client: &mut Qmp) -> Result<bool, Failure> {
    let block = client.execute("query-block")?;
    Ok(block[0]["inserted"]["image"]["format-specific"]["data"]["corrupt"] == true)
}

/// Whoever made it need not have done that: without it a power cut could take the name away, and with
/// it all that the guest has flushed since.
#[test]
fn an_overlay_that_is_there_is_made_durable_before_it_is_used() -> Result<(), Failure> {
    let test = "an_overlay_that_is_there_is_made_durable_before_it_is_used";
    if !have_tools(test, TOOLS) || !may_trace(test) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let (real, link) = (scene.path("real"), scene.path("link"));
    for folder in [&real, &link] {
        fs::create_dir(folder)?;
    }
    let overlay = real.join("overlay.qcow2");
    let options = format!("backing_file={},backing_fmt=qcow2", scene.image.display());
    qemu::create(&overlay, DISK_BYTES, &options)?;
    let named = link.join("overlay.qcow2");
    symlink(&overlay, &named)?;
    let server = scene.serve(&scene.image)?;
    let words = ["-y", "-e", "trace=fsync"];
    let strace = Strace::attach(&scene, server.id(), &words)?;
    let arguments = json!({ "device": "disk0", "snapshot-file": named, "mode": "existing" });
    snapshot(&mut scene.client()?, &arguments)??;
    let calls = strace.detach()?;
    for path in [&overlay, &real, &link] {
        let synced = format!("<{}>", fs::canonicalize(path)?.display());
        ensure(calls.contains(&synced), || format!("{synced}: {calls}"))?;
    }
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

/// The system calls of the thread that goes back to a snapshot fail one by one.
#[test]
fn every_system_call_of_a_revert_fails_once() {
    fail_all("every_system_call_of_a_revert_fails_once", fail_in_revert);
}

/// Writes a sector that is full of one byte, or gives the status.
fn write_sector(server: &Server, byte: u8) -> Result<u8, Failure> {
    let mut driver = Driver::connect(&server.socket)?;
    driver
        .memory
        .write_slice(&[byte; 512], GuestAddress(DATA))?;
    driver.request(OUT, 0, 512, 0)
}

/// The byte that the sector is full of.
fn read_sector(server: &Server) -> Result<u8, Failure> {
    let mut driver = Driver::connect(&server.socket)?;
    ensure(driver.request(IN, 0, 512, WRITE)? == OK, || "read".into())?;
    let mut bytes = [0; 512];
    driver.memory.read_slice(&mut bytes, GuestAddress(DATA))?;
    ensure(bytes == [bytes[0]; 512], || "a mixture".into())?;
    Ok(bytes[0])
}

/// Goes back, once the front-end that has left is gone for the server too.
fn revert(client: &mut Qmp, named: &Value) -> Result<Result<(), String>, Failure> {
    let started = Instant::now();
    loop {
        let answer = command(client, "x-qblkd-snapshot-revert", named)?;
        let waits = matches!(&answer, Err(said) if said.contains("queues run"));
        if !waits || started.elapsed() > RUN_LIMIT {
            return Ok(answer);
        }
    }
}

/// Fails the `nth` call while the disk goes back; `false` when there were not so many.
fn fail_in_revert(injection: &Injection, nth: usize) -> Result<bool, Failure> {
    const OLD: u8 = 0x11;
    const NEW: u8 = 0x22;
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let mut client = scene.client()?;
    assert_eq!(write_sector(&server, OLD)?, OK);
    let named = json!({ "device": "disk0", "name": "s" });
    command(&mut client, "blockdev-snapshot-internal-sync", &named)??;
    client.event("JOB_STATUS_CHANGE")?;
    while client
        .execute("query-jobs")?
        .as_array()
        .is_none_or(|jobs| !jobs.is_empty())
    {}
    assert_eq!(write_sector(&server, NEW)?, OK);
    let strace = Strace::inject(&scene, server.id(), injection, nth)?;
    let answer = revert(&mut client, &named)?;
    let hit = strace.detach()?.contains(INJECTED);
    let explain = |text: &str| format!("{text} after {answer:?}");
    ensure(hit || answer.is_ok(), || explain("no fault, but an error"))?;
    let shown = read_sector(&server)?;
    let expected = if answer.is_ok() { OLD } else { NEW };
    ensure(shown == expected, || {
        explain(&format!("{shown:#x} is shown"))
    })?;
    let failed = has_failed(&mut client)?;
    let status = write_sector(&server, NEW + 1)?;
    ensure((status == OK) != failed, || {
        explain(&format!("status {status}, failed: {failed}"))
    })?;
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))?;
    let server = scene.serve(&scene.image)?;
    let found = read_sector(&server)?;
    let may_be: &[u8] = if failed { &[OLD, NEW] } else { &[NEW + 1] };
    ensure(may_be.contains(&found), || {
        explain(&format!("{found:#x} is found"))
    })?;
    revert(&mut scene.client()?, &named)??;
    ensure(read_sector(&server)? == OLD, || explain("again"))?;
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&scene.image, &[CHECK_CLEAN, CHECK_LEAKS])?;
    Ok(hit)
}

/// A tracer of one thread.
struct Strace {
    child: Child,
    lines: BufReader<ChildStderr>,
    log: PathBuf,
}

impl Strace {
    /// Makes the `nth` call fail of those that carry out commands. Returns when that is in force.
    fn inject(
        scene: &Scene,
        server: u32,
        injection: &Injection,
        nth: usize,
    ) -> Result<Self, Failure> {
        let Injection { call, error } = injection;
        let trace = format!("trace={call}");
        let inject = format!("inject={call}:error={error}:when={nth}");
        Self::attach(scene, server, &["-e", &trace, "-e", &inject])
    }

    /// Returns when the thread that carries out commands is traced.
    fn attach(scene: &Scene, server: u32, words: &[&str]) -> Result<Self, Failure> {
        let (thread, log) = (settler(server)?, scene.path("strace.log"));
        let mut command = Command::new("strace");
        command.args(["-p", &thread.to_string(), "-o"]).arg(&log);
        command.args(words);
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let stderr = child.stderr.take().ok_or("no stderr")?;
        let mut strace = Self {
            child,
            lines: BufReader::new(stderr),
            log,
        };
        let mut line = String::new();
        strace.lines.read_line(&mut line)?;
        ensure(line.contains("attached"), || line)?;
        Ok(strace)
    }

    /// Lets the thread go; returns what it has called.
    fn detach(mut self) -> Result<String, Failure> {
        let script = format!("kill -INT {}", self.child.id());
        run("sh", ["-c", script.as_str()])?.success()?;
        self.child.wait()?;
        Ok(fs::read_to_string(&self.log)?)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Both fail, harmlessly, when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The thread that carries out commands.
fn settler(process: u32) -> Result<u32, Failure> {
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let task: PathBuf = entry?.path();
        if fs::read_to_string(task.join("comm"))?.trim() == "settler" {
            let name = task.file_name().and_then(|name| name.to_str());
            return Ok(name.ok_or("no thread")?.parse()?);
        }
    }
    Err("there is no settler".into())
}
