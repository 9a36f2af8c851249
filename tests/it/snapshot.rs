//! Internal snapshots of a disk that is served, from outside: over the control socket and with
//! `qblkd snapshot`, under verified load, with QEMU's tools as judges; and what becomes of the
//! background work when the server is stopped in the middle of it.

use crate::kit::chaos::{self, Initial};
use crate::support::command::{Finished, LIMIT, run, run_command};
use crate::support::driver::{DATA, Driver, FLUSH_REQUEST, IN, IOERR, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::terminal::{self, Shown};
use crate::support::{Failure, QBLKD, ensure, for_each_case, have_tools};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const TAKE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";
const DISK_BYTES: u64 = 32 << 20;
/// How long the disk is under load while snapshots come and go.
const LOAD: Duration = Duration::from_secs(3);
/// So much metadata that its counting can be watched.
const LARGE_BYTES: u64 = 8 << 30;
const LARGE_CLUSTER: &str = "4k";

/// An image with a place for its sockets.
struct Scratch {
    dir: TempDir,
    file: PathBuf,
    control: PathBuf,
}

impl Scratch {
    /// An image as `qblkd create` makes it.
    fn new(size: u64, options: &[&str]) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix("qblkd-")?;
        let file = dir.path().join("disk.qcow2");
        let size = size.to_string();
        let mut words = vec![OsStr::new("create"), file.as_os_str(), OsStr::new(&size)];
        words.extend(options.iter().map(OsStr::new));
        run(QBLKD, words)?.success()?;
        let control = dir.path().join("control.sock");
        Ok(Self { dir, file, control })
    }

    /// An image whose tables are all there.
    fn large() -> Result<Self, Failure> {
        let options = [
            "--cluster-size",
            LARGE_CLUSTER,
            "--preallocation",
            "metadata",
        ];
        Self::new(LARGE_BYTES, &options)
    }

    fn serve(&self, more: &[&str]) -> Result<Server, Failure> {
        let mut words = vec![
            OsStr::new("--blk-file"),
            self.file.as_os_str(),
            OsStr::new("--control"),
            self.control.as_os_str(),
        ];
        words.extend(more.iter().map(OsStr::new));
        Server::start(words)
    }

    fn client(&self) -> Result<Qmp, Failure> {
        Qmp::connect(&self.control)
    }

    /// Runs `qblkd snapshot`; `online` through the server.
    fn tool(&self, online: bool, words: &[&str]) -> Result<Finished, Failure> {
        run(QBLKD, self.tool_words(online, words))
    }

    fn tool_words(&self, online: bool, words: &[&str]) -> Vec<OsString> {
        let target = if online {
            ["--control".into(), self.control.clone().into_os_string()]
        } else {
            ["--blk-file".into(), self.file.clone().into_os_string()]
        };
        let mut all: Vec<OsString> = vec!["snapshot".into()];
        all.extend(words.iter().map(OsString::from));
        all.extend(target);
        all
    }

    /// The content of a snapshot, as QEMU reads it.
    fn content(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let raw = self.dir.path().join("snapshot.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw", "-l"]);
        convert.arg(format!("snapshot.name={name}"));
        convert.arg(&self.file).arg(&raw);
        run_command(&mut convert, LIMIT)?.success()?;
        Ok(std::fs::read(raw)?)
    }

    /// The names of the snapshots, as QEMU lists them.
    fn names(&self) -> Result<Vec<String>, Failure> {
        let mut info = Command::new("qemu-img");
        info.args(["info", "--output=json", "-f", "qcow2"]);
        let info = qemu::json_of(info.arg(&self.file))?;
        Ok(names_in(&info["snapshots"]))
    }

    fn is_dirty(&self) -> Result<bool, Failure> {
        let mut info = Command::new("qemu-img");
        info.args(["info", "-U", "--output=json", "-f", "qcow2"]);
        let info = qemu::json_of(info.arg(&self.file))?;
        info["dirty-flag"]
            .as_bool()
            .ok_or_else(|| info.to_string().into())
    }
}

fn names_in(snapshots: &Value) -> Vec<String> {
    let list = snapshots.as_array().map_or(&[][..], Vec::as_slice);
    let names = list.iter().filter_map(|entry| entry["name"].as_str());
    names.map(str::to_owned).collect()
}

/// The answer to a command, `return` or `error`.
fn ask(client: &mut Qmp, command: &str, arguments: &Value) -> Result<Value, Failure> {
    let request = json!({ "execute": command, "arguments": arguments });
    client.send(format!("{request}\n").as_bytes())?;
    client.answer()
}

/// What a command returns.
fn execute(client: &mut Qmp, command: &str, arguments: &Value) -> Result<Value, Failure> {
    let mut answer = ask(client, command, arguments)?;
    match answer.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(format!("{command} {arguments}: {answer}").into()),
    }
}

fn take(client: &mut Qmp, name: &str) -> Result<(), Failure> {
    execute(client, TAKE, &json!({ "device": "disk0", "name": name })).map(drop)
}

fn delete(client: &mut Qmp, name: &str) -> Result<Value, Failure> {
    execute(client, DELETE, &json!({ "device": "disk0", "name": name }))
}

/// The description of a refusal.
fn refusal(client: &mut Qmp, command: &str, arguments: &Value) -> Result<String, Failure> {
    let answer = ask(client, command, arguments)?;
    let desc = answer["error"]["desc"].as_str();
    Ok(desc
        .ok_or_else(|| format!("not refused: {answer}"))?
        .to_owned())
}

/// Takes a snapshot, and holds its job in the middle by a limit of one byte a second. Returns the
/// names of the snapshots that this has taken, and the job.
fn take_and_hold(client: &mut Qmp) -> Result<(Vec<String>, String), Failure> {
    let mut names = Vec::new();
    // A job that was over before it could be held is followed by another.
    while names.len() < 20 {
        names.push(format!("s{}", names.len()));
        take(client, &names[names.len() - 1])?;
        let jobs = execute(client, "query-jobs", &json!({}))?;
        let Some(job) = jobs[0]["id"].as_str() else {
            continue;
        };
        let limit = json!({ "device": job, "speed": 1 });
        if ask(client, "block-job-set-speed", &limit)?["return"] == json!({}) {
            return Ok((names, job.to_owned()));
        }
    }
    Err("no job could be held".into())
}

/// Waits until the background work is done.
fn settle(client: &mut Qmp) -> Result<(), Failure> {
    let started = Instant::now();
    while execute(client, "query-jobs", &json!({}))? != json!([]) {
        ensure(started.elapsed() < LIMIT, || "is not settled".to_owned())?;
    }
    Ok(())
}

/// Kinds of images to take snapshots of.
const KINDS: &[(&str, &[&str])] = &[
    ("usual", &[]),
    ("version 2", &["--compat", "0.10"]),
    ("small clusters", &["--cluster-size", "512"]),
    (
        "narrow refcounts",
        &["--refcount-bits", "4", "--cluster-size", "4k"],
    ),
];

#[test]
fn snapshots_come_and_go_under_verified_load() {
    let test = "snapshots_come_and_go_under_verified_load";
    if have_tools(test, &["qemu-img"]) {
        for_each_case(KINDS, |(name, _)| name, |(_, options)| under_load(options));
    }
}

fn under_load(options: &[&str]) -> Result<(), Failure> {
    let scratch = Scratch::new(DISK_BYTES, options)?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let model = scratch.dir.path().join("model.raw");
    let seed = fastrand::u64(..);
    let worked = thread::scope(|scope| {
        let work = scope.spawn(|| {
            chaos::run(&chaos::Options {
                seed,
                initial: Initial::Zero,
                model_out: Some(model.clone()),
                ..chaos::Options::new(&server.socket, 2, LOAD)
            })
        });
        let mut come_and_go = || -> Result<(), Failure> {
            let mut round = 0;
            while !work.is_finished() {
                take(&mut client, &format!("a{round}"))?;
                let actions: Vec<_> = ["x", "y"]
                    .iter()
                    .map(|letter| {
                        let data = json!({ "device": "disk0", "name": format!("{letter}{round}") });
                        json!({ "type": TAKE, "data": data })
                    })
                    .collect();
                execute(&mut client, "transaction", &json!({ "actions": actions }))?;
                // One that is settled, perhaps, and one that is not.
                delete(&mut client, &format!("a{round}"))?;
                if round > 0 {
                    delete(&mut client, &format!("x{}", round - 1))?;
                    delete(&mut client, &format!("y{}", round - 1))?;
                }
                round += 1;
                // What is deleted counts until its references are gone, and 4 bits count to 15.
                if round % 3 == 0 {
                    settle(&mut client)?;
                }
            }
            ensure(round > 1, || "there was one round only".to_owned())?;
            take(&mut client, "last")
        };
        let taken = come_and_go();
        let worked = work.join().unwrap();
        taken?;
        Ok::<_, Failure>(worked)
    })?;
    let ended = server.terminate()?;
    let judge = || {
        let report = worked.map_err(|error| format!("{error}; server: {ended:?}"))?;
        ensure(report.writes > 0, || format!("no load: {report:?}"))?;
        ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
        qemu::expect_check(&scratch.file, &[CHECK_CLEAN])?;
        qemu::compare("qcow2", &scratch.file, &model)?;
        let names = scratch.names()?;
        let [one, other, last] = &names[..] else {
            return Err(format!("not what was taken: {names:?}").into());
        };
        ensure(last == "last", || format!("{names:?}"))?;
        ensure(scratch.content(one)? == scratch.content(other)?, || {
            "a transaction has snapshots of two instants".to_owned()
        })?;
        ensure(scratch.content("last")? == std::fs::read(&model)?, || {
            "the last snapshot is not the disk".to_owned()
        })
    };
    judge().map_err(|failure: Failure| format!("seed {seed}: {failure}").into())
}

/// More work than may wait, held by limits; and a command that waits for it.
struct Crowd {
    scratch: Scratch,
    server: Server,
    client: Qmp,
    /// Its command has been handed over.
    waiting: Qmp,
    names: Vec<String>,
}

/// So many pieces of work may wait.
const WORK_MAX: usize = 32;

fn job_ids(client: &mut Qmp) -> Result<Vec<String>, Failure> {
    let jobs = execute(client, "query-jobs", &json!({}))?;
    let jobs = jobs.as_array().ok_or("no list")?.iter();
    Ok(jobs
        .filter_map(|job| job["id"].as_str().map(str::to_owned))
        .collect())
}

impl Crowd {
    fn gather() -> Result<Self, Failure> {
        let options = ["--cluster-size", "4k", "--preallocation", "metadata"];
        let scratch = Scratch::new(1 << 30, &options)?;
        let server = scratch.serve(&[])?;
        let mut client = scratch.client()?;
        let mut names = Vec::new();
        loop {
            let jobs = job_ids(&mut client)?;
            if let Some(last) = jobs.last() {
                // One that is over already holds nobody up.
                let limit = json!({ "device": last, "speed": 1 });
                ask(&mut client, "block-job-set-speed", &limit)?;
            }
            if jobs.len() == WORK_MAX {
                break;
            }
            ensure(names.len() < 2 * WORK_MAX, || format!("{jobs:?}"))?;
            let name = format!("s{}", names.len());
            take(&mut client, &name)?;
            names.push(name);
        }
        client.events.clear();
        let mut waiting = scratch.client()?;
        let arguments = json!({ "device": "disk0", "name": "late" });
        let late = json!({ "execute": TAKE, "arguments": arguments });
        // In one piece: when the first is answered, the second is on its way to the settler.
        waiting.send(format!("{{\"execute\": \"query-version\"}}\n{late}\n").as_bytes())?;
        waiting.answer()?;
        Ok(Self {
            scratch,
            server,
            client,
            waiting,
            names,
        })
    }

    /// Lets the work go on.
    fn release(&mut self) -> Result<(), Failure> {
        for id in job_ids(&mut self.client)? {
            let free = json!({ "device": id, "speed": 0 });
            // It may be over already.
            ask(&mut self.client, "block-job-set-speed", &free)?;
        }
        Ok(())
    }

    /// SIGTERM, then a look at what there is.
    fn stop(self, late: &[&str]) -> Result<(), Failure> {
        let ended = self.server.terminate()?;
        ensure(ended.code()? == 0, || format!("{ended:?}"))?;
        ensure(!self.scratch.is_dirty()?, || "dirty".to_owned())?;
        qemu::expect_check(&self.scratch.file, &[CHECK_CLEAN])?;
        let mut names = self.names;
        names.extend(late.iter().map(|name| (*name).to_owned()));
        let found = self.scratch.names()?;
        ensure(found == names, || format!("{found:?} instead of {names:?}"))
    }
}

/// Without the limit the command would be carried out at once, and its job be told before any other
/// is over.
#[test]
fn a_command_waits_when_too_much_work_is_left_and_no_other_client_does() -> Result<(), Failure> {
    let test = "a_command_waits_when_too_much_work_is_left_and_no_other_client_does";
    if !have_tools(test, &["qemu-img"]) {
        return Ok(());
    }
    let mut crowd = Crowd::gather()?;
    let known = crowd.names.len();
    ensure(job_ids(&mut crowd.client)?.len() == WORK_MAX, || {
        "another client waits, or the command did not".to_owned()
    })?;
    crowd.release()?;
    let answer = crowd.waiting.answer()?;
    ensure(answer["return"] == json!({}), || answer.to_string())?;
    settle(&mut crowd.client)?;
    let states = crowd.client.events.iter().filter_map(|event| {
        let data = &event["data"];
        Some((data["id"].as_str()?, data["status"].as_str()?))
    });
    let states: Vec<_> = states.collect();
    let late = format!("settle-{}", known + 1);
    let told = states.iter().position(|state| *state == (&late, "created"));
    let over = states.iter().position(|state| state.1 == "null");
    ensure(told.is_some() && over < told, || format!("{states:?}"))?;
    crowd.stop(&["late"])
}

#[test]
fn a_client_that_leaves_while_its_command_waits_harms_nobody() -> Result<(), Failure> {
    let test = "a_client_that_leaves_while_its_command_waits_harms_nobody";
    if !have_tools(test, &["qemu-img"]) {
        return Ok(());
    }
    let mut crowd = Crowd::gather()?;
    crowd.waiting = crowd.scratch.client()?;
    crowd.release()?;
    take(&mut crowd.waiting, "later")?;
    settle(&mut crowd.client)?;
    // Nobody was there for the answer of the first.
    crowd.stop(&["late", "later"])
}

#[test]
fn sigterm_ends_the_wait_of_a_command() -> Result<(), Failure> {
    let test = "sigterm_ends_the_wait_of_a_command";
    if !have_tools(test, &["qemu-img"]) {
        return Ok(());
    }
    // What was handed over before is carried out; the work is done, whatever limits it.
    Crowd::gather()?.stop(&["late"])
}

#[test]
fn the_python_package_qemu_qmp_takes_and_deletes_snapshots() -> Result<(), Failure> {
    let test = "the_python_package_qemu_qmp_takes_and_deletes_snapshots";
    let python = std::env::var_os("QBLKD_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let mut import = Command::new(&python);
    let has_package = run_command(import.args(["-c", "import qemu.qmp"]), LIMIT)
        .is_ok_and(|finished| finished.status.success());
    let package = format!("{} with the package qemu.qmp", python.display());
    let needed: &[&str] = if has_package { &[] } else { &[&package] };
    if !have_tools(test, needed) {
        return Ok(());
    }
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    let server = scratch.serve(&[])?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/qmp_snapshots.py");
    // -B: leave no compiled files in the source tree.
    let mut client = Command::new(&python);
    client.arg("-B").arg(&script).arg(&scratch.control);
    run_command(&mut client, LIMIT)?.success()?;
    ensure(server.terminate()?.code()? == 0, || "SIGTERM".to_owned())
}

#[test]
fn two_clients_cannot_take_one_name() -> Result<(), Failure> {
    for options in [&[][..], &["--compat", "0.10"]] {
        let scratch = Scratch::new(DISK_BYTES, options)?;
        let _server = scratch.serve(&[])?;
        let mut clients = [scratch.client()?, scratch.client()?];
        let request = json!({ "execute": TAKE, "arguments": { "device": "disk0", "name": "s" } });
        for client in &mut clients {
            client.send(request.to_string().as_bytes())?;
        }
        let answers: Vec<Value> = clients
            .iter_mut()
            .map(Qmp::answer)
            .collect::<Result<_, _>>()?;
        let taken = "Snapshot with name 's' already exists on device 'disk0'";
        let won = answers
            .iter()
            .filter(|answer| answer["return"] == json!({}));
        assert_eq!(won.count(), 1, "{answers:?}");
        let lost = answers
            .iter()
            .filter(|answer| answer["error"]["desc"] == taken);
        assert_eq!(lost.count(), 1, "{answers:?}");
    }
    Ok(())
}

#[test]
fn disks_without_snapshots_refuse_them_in_qemus_words() -> Result<(), Failure> {
    let dir = TempDir::with_prefix("qblkd-")?;
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, vec![0; 1 << 20])?;
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    scratch.tool(false, &["create", "old"])?.success()?;
    let take = json!({ "device": "disk0", "name": "s" });
    {
        let file = raw.as_os_str();
        let control = scratch.control.as_os_str();
        let words = ["--format", "raw", "--blk-file"].map(OsStr::new);
        let more = [file, OsStr::new("--control"), control];
        let _server = Server::start(words.into_iter().chain(more))?;
        let mut client = scratch.client()?;
        assert_eq!(
            refusal(&mut client, TAKE, &take)?,
            "Block format 'raw' used by device 'disk0' does not support internal snapshots"
        );
        assert_eq!(
            refusal(&mut client, DELETE, &take)?,
            "Failed to get a snapshot list: Operation not supported"
        );
    }
    std::fs::remove_file(&scratch.control)?;
    let _server = scratch.serve(&["--read-only"])?;
    let mut client = scratch.client()?;
    assert_eq!(
        refusal(&mut client, TAKE, &take)?,
        "Device 'disk0' is read only"
    );
    let old = json!({ "device": "disk0", "name": "old" });
    assert_eq!(
        refusal(&mut client, DELETE, &old)?,
        "Device 'disk0' is read only"
    );
    Ok(())
}

#[test]
fn a_client_that_leaves_gets_its_snapshot_all_the_same() -> Result<(), Failure> {
    let scratch = Scratch::new(DISK_BYTES, &["--compat", "0.10"])?;
    let server = scratch.serve(&[])?;
    let request = json!({ "execute": TAKE, "arguments": { "device": "disk0", "name": "s" } });
    scratch.client()?.send(request.to_string().as_bytes())?;
    let mut other = scratch.client()?;
    let started = Instant::now();
    loop {
        let block = other.execute("query-block")?;
        if names_in(&block[0]["inserted"]["image"]["snapshots"]) == ["s"] {
            break;
        }
        assert!(started.elapsed() < LIMIT, "{block}");
    }
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn a_job_shows_its_progress_and_keeps_its_limit() -> Result<(), Failure> {
    let scratch = Scratch::large()?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let (names, held) = take_and_hold(&mut client)?;
    let jobs = execute(&mut client, "query-jobs", &json!({}))?;
    let job = &jobs[0];
    assert_eq!(job["type"], "snapshot-save", "{jobs}");
    assert_eq!(job["id"], *held, "{jobs}");
    let last = names.last().ok_or("no snapshot")?;
    assert_eq!(job["x-qblkd"]["snapshot-name"], **last, "{jobs}");
    let total = job["total-progress"].as_u64().ok_or("no total")?;
    assert!(total >= LARGE_BYTES / 4096 * 8, "{jobs}");
    let cancel = refusal(&mut client, "job-cancel", &json!({ "id": held }))?;
    assert!(
        cancel.contains("cannot accept command verb 'cancel'"),
        "{cancel}"
    );
    let block = client.execute("query-block")?;
    let listed = &block[0]["inserted"]["image"]["snapshots"][names.len() - 1];
    assert_eq!(listed["x-qblkd"]["unsettled"], true, "{listed}");
    // A second one waits for the first.
    take(&mut client, "t")?;
    let started = Instant::now();
    let jobs = loop {
        let jobs = execute(&mut client, "query-block-jobs", &json!({}))?;
        // The first may not have begun yet.
        if jobs[0]["status"] != "created" {
            break jobs;
        }
        ensure(started.elapsed() < LIMIT, || jobs.to_string())?;
    };
    let states: Vec<_> = [0, 1].map(|at| jobs[at]["status"].clone()).into();
    assert_eq!(states, ["running", "created"], "{jobs}");
    assert_eq!(jobs[0]["speed"], 1, "{jobs}");
    assert!(
        jobs[0]["offset"].as_u64() < jobs[0]["len"].as_u64(),
        "{jobs}"
    );
    client.events.clear();
    let second = jobs[1]["device"].clone();
    let lifted = json!({ "device": held, "speed": 0 });
    execute(&mut client, "block-job-set-speed", &lifted)?;
    for id in [json!(held), second] {
        let event = client.event("BLOCK_JOB_COMPLETED")?;
        let data = &event["data"];
        assert_eq!(data["device"], id, "{event}");
        assert_eq!(data["offset"], data["len"], "{event}");
        assert_eq!(data.get("error"), None, "{event}");
    }
    settle(&mut client)?;
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn sigterm_finishes_the_background_work() -> Result<(), Failure> {
    if !have_tools("sigterm_finishes_the_background_work", &["qemu-img"]) {
        return Ok(());
    }
    let scratch = Scratch::large()?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    // Not even a limit holds it up.
    let (names, _) = take_and_hold(&mut client)?;
    server.signal("TERM")?;
    client.event("SHUTDOWN")?;
    let late = refusal(
        &mut client,
        TAKE,
        &json!({ "device": "disk0", "name": "t" }),
    );
    // The server may be gone already.
    if let Ok(late) = late {
        assert_eq!(late, "qblkd is stopping");
    }
    let ended = server.finish()?;
    assert_eq!(ended.code()?, 0, "{ended:?}");
    assert!(!scratch.is_dirty()?);
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN])?;
    assert_eq!(scratch.names()?, names);
    Ok(())
}

/// How the server ends in the middle of its background work.
const ENDS: &[&[&str]] = &[&["KILL"], &["TERM", "INT"]];

#[test]
fn a_server_stopped_at_once_leaves_an_image_that_opens_at_once() {
    let test = "a_server_stopped_at_once_leaves_an_image_that_opens_at_once";
    if have_tools(test, &["qemu-img"]) {
        for_each_case(ENDS, |signals| signals[0], |signals| stopped_by(signals));
    }
}

fn stopped_by(signals: &[&str]) -> Result<(), Failure> {
    let scratch = Scratch::large()?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let (taken, _) = take_and_hold(&mut client)?;
    let mut driver = Driver::connect(&server.socket)?;
    driver.memory_fill(0x5a)?;
    ensure(driver.request(OUT, 0, 4096, 0)? == OK, || {
        "a write failed".to_owned()
    })?;
    ensure(driver.request(FLUSH_REQUEST, 0, 512, 0)? == OK, || {
        "a flush failed".to_owned()
    })?;
    let kills: Vec<_> = signals
        .iter()
        .map(|signal| format!("kill -{signal} {}", server.id()))
        .collect();
    run("sh", ["-c", &kills.join("; ")])?.success()?;
    let ended = server.finish()?;
    let expected = if signals.len() > 1 { Some(1) } else { None };
    ensure(ended.status.code() == expected, || format!("{ended:?}"))?;
    qemu::wait_for_lock(&scratch.file)?;
    ensure(scratch.is_dirty()?, || {
        "the dirty bit is not there".to_owned()
    })?;
    // Which of them were settled is not to be known from the file.
    let listed = scratch.tool(false, &["list"])?.success()?.stdout;
    let mut rows = listed.lines().skip(1);
    ensure(rows.all(|row| row.ends_with("  unsettled")), || {
        listed.clone()
    })?;

    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let mut driver = Driver::connect(&server.socket)?;
    ensure(driver.request(IN, 0, 4096, WRITE)? == OK, || {
        "a read failed".to_owned()
    })?;
    ensure(driver.get::<u8>(DATA)? == 0x5a, || {
        "flushed data are gone".to_owned()
    })?;
    settle(&mut client)?;
    drop(driver);
    let ended = server.terminate()?;
    ensure(ended.code()? == 0, || format!("{ended:?}"))?;
    ensure(!scratch.is_dirty()?, || {
        "the dirty bit is still there".to_owned()
    })?;
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN, CHECK_LEAKS])?;
    let listed = scratch.tool(false, &["list"])?.success()?.stdout;
    ensure(!listed.contains("unsettled"), || listed.clone())?;
    let names = scratch.names()?;
    ensure(names == taken, || format!("{names:?}"))?;
    let content = run(
        "qemu-io",
        [
            OsStr::new("-r"),
            OsStr::new("-f"),
            OsStr::new("qcow2"),
            OsStr::new("-c"),
            OsStr::new("read -P 0x5a 0 4k"),
            scratch.file.as_os_str(),
        ],
    )?
    .success()?
    .stdout;
    ensure(!content.contains("failed"), || content.clone())
}

#[test]
fn people_take_list_and_delete_snapshots_of_a_served_disk() -> Result<(), Failure> {
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    let server = scratch.serve(&[])?;
    people(&scratch, true)?;
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn people_take_list_and_delete_snapshots_of_an_unused_image() -> Result<(), Failure> {
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    people(&scratch, false)
}

fn people(scratch: &Scratch, online: bool) -> Result<(), Failure> {
    let tool = |words: &[&str]| scratch.tool(online, words);
    let empty = tool(&["list"])?.success()?;
    assert_eq!(empty.stdout, "no internal snapshots\n");
    for name in ["one", "two words", "3"] {
        let taken = tool(&["create", name, "--wait"])?.success()?;
        assert_eq!((&*taken.stdout, &*taken.stderr), ("", ""));
    }
    let twice = tool(&["create", "one"])?;
    assert_eq!(twice.code()?, 1, "{twice:?}");
    assert!(twice.stderr.contains("'one'"), "{twice:?}");
    let nameless = tool(&["create", ""])?;
    assert_eq!(nameless.code()?, 1, "{nameless:?}");
    let text = tool(&["list"])?.success()?.stdout;
    let rows: Vec<_> = text.lines().skip(1).collect();
    assert_eq!(rows.len(), 3, "{text}");
    assert!(rows[1].starts_with("2        two words "), "{text}");
    assert!(rows.iter().all(|row| row.ends_with("32 MiB")), "{text}");
    // "3" is the name of one and the id of none other; an id is taken as such with --id only.
    tool(&["delete", "--id", "1", "--wait"])?.success()?;
    let missing = tool(&["delete", "one"])?;
    assert_eq!(missing.code()?, 1, "{missing:?}");
    assert!(missing.stderr.contains("no snapshot"), "{missing:?}");
    tool(&["delete", "2", "--wait"])?.success()?;
    let json: Value = serde_json::from_str(&tool(&["list", "--json"])?.success()?.stdout)?;
    assert_eq!(names_in(&json), ["3"]);
    assert_eq!(json[0]["x-qblkd"]["unsettled"], false, "{json}");
    assert_eq!(json[0]["x-qblkd"]["disk-size"], DISK_BYTES, "{json}");
    for bad in [&["list"][..], &["create", "x"], &["delete", "--id", "3"]] {
        let nowhere = run(QBLKD, ["snapshot"].iter().chain(bad))?;
        assert_eq!(nowhere.code()?, 1, "{nowhere:?}");
    }
    Ok(())
}

#[test]
fn the_tool_shows_how_far_the_work_is_on_a_terminal_only() -> Result<(), Failure> {
    let test = "the_tool_shows_how_far_the_work_is_on_a_terminal_only";
    if !have_tools(test, terminal::TOOLS) {
        return Ok(());
    }
    let scratch = Scratch::large()?;
    for (command, message) in [
        ("create", "counting references"),
        ("delete", "giving space back"),
        ("create", "counting references"),
        ("revert", "counting all references anew"),
    ] {
        let words = scratch.tool_words(false, &[command, "seen", "--wait"]);
        let mut shown = Shown::start(terminal::command(QBLKD, words))?;
        shown.wait_for(message)?;
        shown.wait_for("%")?;
        assert_eq!(shown.finish()?, Some(0), "{command}");
        let name = if command == "revert" { "seen" } else { "piped" };
        let piped = scratch.tool(false, &[command, name, "--wait"])?.success()?;
        assert_eq!((&*piped.stdout, &*piped.stderr), ("", ""), "{command}");
    }
    Ok(())
}

/// The same through the server, with the work held until it has been seen.
#[test]
fn the_tool_shows_how_far_a_job_is_on_a_terminal() -> Result<(), Failure> {
    let test = "the_tool_shows_how_far_a_job_is_on_a_terminal";
    if !have_tools(test, terminal::TOOLS) {
        return Ok(());
    }
    let scratch = Scratch::large()?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let (names, held) = take_and_hold(&mut client)?;
    let seen = names.last().ok_or("no snapshot")?;
    let mut hold = |job: &str, speed: u64| {
        let limit = json!({ "device": job, "speed": speed });
        execute(&mut client, "block-job-set-speed", &limit).map(drop)
    };
    let watch = |words: &[&str]| {
        let words = scratch.tool_words(true, words);
        Shown::start(terminal::command(QBLKD, words))
    };
    let mut create = watch(&["create", "seen", "--wait"])?;
    create.wait_for("waiting for earlier work")?;
    let mut observer = scratch.client()?;
    let settle = job_ids(&mut observer)?.pop().ok_or("no job")?;
    assert!(settle.starts_with("settle-"), "{settle}");
    hold(&settle, 1)?;
    let mut delete = watch(&["delete", seen, "--wait"])?;
    delete.wait_for("waiting for earlier work")?;
    let giving_back = job_ids(&mut observer)?.pop().ok_or("no job")?;
    assert!(giving_back.starts_with("delete-"), "{giving_back}");
    hold(&giving_back, 1)?;
    hold(&held, 0)?;
    create.wait_for("counting references")?;
    hold(&settle, 0)?;
    assert_eq!(create.finish()?, Some(0));
    delete.wait_for("giving space back")?;
    hold(&giving_back, 0)?;
    assert_eq!(delete.finish()?, Some(0));
    assert_eq!(server.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn an_image_in_use_is_left_alone() -> Result<(), Failure> {
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    let _server = scratch.serve(&[])?;
    let refused = scratch.tool(false, &["create", "s"])?;
    assert_eq!(refused.code()?, 1, "{refused:?}");
    assert!(refused.stderr.contains("in use"), "{refused:?}");
    assert!(refused.stderr.contains("--control"), "{refused:?}");
    Ok(())
}

/// Images of others hold names that are no text. Such a snapshot was listed and could not be deleted.
#[test]
fn a_snapshot_whose_name_is_no_text_goes_by_its_id() -> Result<(), Failure> {
    for online in [false, true] {
        let scratch = Scratch::new(DISK_BYTES, &[])?;
        scratch.tool(false, &["create", "name-x"])?.success()?;
        let mut bytes = std::fs::read(&scratch.file)?;
        let name = b"name-x";
        let at = bytes
            .windows(name.len())
            .position(|window| window == name)
            .ok_or("the name is not in the file")?;
        bytes[at + 5] = 0xe9;
        std::fs::write(&scratch.file, &bytes)?;
        let server = if online {
            Some(scratch.serve(&[])?)
        } else {
            None
        };
        scratch.tool(online, &["revert", "--id", "1"])?.success()?;
        scratch.tool(online, &["delete", "--id", "1"])?.success()?;
        let listed = scratch.tool(online, &["list"])?.success()?;
        assert_eq!(listed.stdout, "no internal snapshots\n");
        if let Some(server) = server {
            assert_eq!(server.terminate()?.code()?, 0);
        }
    }
    Ok(())
}

#[test]
fn a_snapshot_is_served_and_gone_back_to() -> Result<(), Failure> {
    if !have_tools("a_snapshot_is_served_and_gone_back_to", &["qemu-img"]) {
        return Ok(());
    }
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    let first_byte = |server: &Server| -> Result<u8, Failure> {
        let mut driver = Driver::connect(&server.socket)?;
        assert_eq!(driver.request(IN, 0, 4096, WRITE)?, OK);
        driver.get(DATA)
    };
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let mut driver = Driver::connect(&server.socket)?;
    for (fill, name) in [(0x11, "one"), (0x22, "two"), (0x33, "1")] {
        driver.memory_fill(fill)?;
        assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
        take(&mut client, name)?;
    }
    drop((driver, client));
    assert_eq!(server.terminate()?.code()?, 0);

    // A name goes before an id.
    for (snapshot, byte) in [("one", 0x11), ("2", 0x22), ("1", 0x33)] {
        let server = scratch.serve(&["--read-only", "--snapshot", snapshot])?;
        assert_eq!(first_byte(&server)?, byte, "{snapshot}");
        let mut driver = Driver::connect(&server.socket)?;
        assert_eq!(driver.request(OUT, 0, 4096, 0)?, IOERR);
    }
    let unknown = scratch.serve(&["--read-only", "--snapshot", "nope"]);
    let unknown = unknown.err().ok_or("an unknown snapshot is served")?;
    assert!(unknown.to_string().contains("no snapshot"), "{unknown}");
    assert!(scratch.serve(&["--snapshot", "one"]).is_err());

    scratch.tool(false, &["revert", "two"])?.success()?;
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN])?;
    assert!(!scratch.is_dirty()?);
    assert_eq!(scratch.names()?, ["one", "two", "1"]);
    let server = scratch.serve(&[])?;
    assert_eq!(first_byte(&server)?, 0x22);
    let refused = scratch.tool(false, &["revert", "one"])?;
    assert_eq!(refused.code()?, 1, "{refused:?}");
    assert_eq!(server.terminate()?.code()?, 0);
    let missing = scratch.tool(false, &["revert", "nope"])?;
    assert_eq!(missing.code()?, 1, "{missing:?}");
    assert!(missing.stderr.contains("name or id 'nope'"), "{missing:?}");
    Ok(())
}

#[test]
fn a_served_disk_goes_back_while_no_queue_runs() -> Result<(), Failure> {
    if !have_tools("a_served_disk_goes_back_while_no_queue_runs", &["qemu-img"]) {
        return Ok(());
    }
    let scratch = Scratch::new(DISK_BYTES, &[])?;
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    let mut driver = Driver::connect(&server.socket)?;
    for (fill, name) in [(0x11, "one"), (0x22, "two"), (0x33, "three")] {
        driver.memory_fill(fill)?;
        assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
        take(&mut client, name)?;
    }
    let refused = scratch.tool(true, &["revert", "one"])?;
    assert_eq!(refused.code()?, 1, "{refused:?}");
    assert!(refused.stderr.contains("in use"), "{refused:?}");
    assert_eq!(driver.request(IN, 0, 4096, WRITE)?, OK);
    assert_eq!(driver.get::<u8>(DATA)?, 0x33);

    driver.stop_ring()?;
    drop(driver);
    // There and back, with a snapshot of what was there.
    for (name, byte) in [("one", 0x11), ("three", 0x33), ("two", 0x22)] {
        scratch.tool(true, &["revert", name, "--wait"])?.success()?;
        let jobs = execute(&mut client, "query-jobs", &json!({}))?;
        assert_eq!(jobs, json!([]), "{name}");
        let mut driver = Driver::connect(&server.socket)?;
        assert_eq!(driver.request(IN, 0, 4096, WRITE)?, OK);
        assert_eq!(driver.get::<u8>(DATA)?, byte, "{name}");
        driver.memory_fill(byte | 0x80)?;
        assert_eq!(driver.request(OUT, 8, 4096, 0)?, OK);
        driver.stop_ring()?;
    }
    let missing = json!({ "device": "disk0", "id": "9" });
    assert_eq!(
        refusal(&mut client, "x-qblkd-snapshot-revert", &missing)?,
        "Snapshot with id '9' and name 'null' does not exist on device 'disk0'"
    );
    take(&mut client, "four")?;
    settle(&mut client)?;
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&scratch.file, &[CHECK_CLEAN])?;
    assert_eq!(scratch.names()?, ["one", "two", "three", "four"]);
    for (name, bytes) in [
        ("one", [0x11, 0]),
        ("two", [0x22, 0]),
        ("three", [0x33, 0]),
        ("four", [0x22, 0xa2]),
    ] {
        let content = scratch.content(name)?;
        assert_eq!([content[0], content[4096]], bytes, "{name}");
    }
    Ok(())
}

/// What the disk held in snapshots, by name.
type Contents = Vec<(&'static str, Vec<u8>)>;

/// Snapshots `small` (4 MiB) and `large` (6 MiB) by QEMU, and another one of 4 MiB, `small2`, of an
/// image that has 5 MiB now. Returns it with the snapshots' contents.
fn of_other_sizes() -> Result<(Scratch, Contents), Failure> {
    let scratch = Scratch::new(4 << 20, &[])?;
    let image = scratch.file.as_os_str();
    let qemu_img = |words: &[&str], size: Option<&str>| -> Result<(), Failure> {
        let words = words.iter().map(OsStr::new).chain([image]);
        run("qemu-img", words.chain(size.map(OsStr::new)))?.success()?;
        Ok(())
    };
    let write = |command: &str| -> Result<(), Failure> {
        let words = ["-f", "qcow2", "-c", command].map(OsStr::new);
        run("qemu-io", words.into_iter().chain([image]))?.success()?;
        Ok(())
    };
    write("write -P 1 0 3M")?;
    qemu_img(&["snapshot", "-c", "small"], None)?;
    write("write -P 2 1M 1M")?;
    qemu_img(&["snapshot", "-c", "small2"], None)?;
    qemu_img(&["resize", "-q", "-f", "qcow2"], Some("6M"))?;
    write("write -P 3 2M 4M")?;
    qemu_img(&["snapshot", "-c", "large"], None)?;
    qemu_img(&["resize", "-q", "-f", "qcow2", "--shrink"], Some("5M"))?;
    write("write -P 4 100k 2M")?;
    let mut disk = vec![0; 6 << 20];
    disk[..3 << 20].fill(1);
    let small = disk[..4 << 20].to_vec();
    disk[1 << 20..2 << 20].fill(2);
    let small2 = disk[..4 << 20].to_vec();
    disk[2 << 20..].fill(3);
    let contents = vec![("small", small), ("small2", small2), ("large", disk)];
    Ok((scratch, contents))
}

/// Going back to a snapshot of a disk of another size took `--blk-file`.
#[test]
fn a_served_disk_gets_another_size_while_no_front_end_is_connected() -> Result<(), Failure> {
    let test = "a_served_disk_gets_another_size_while_no_front_end_is_connected";
    if !have_tools(test, &["qemu-img", "qemu-io"]) {
        return Ok(());
    }
    let (scratch, contents) = of_other_sizes()?;
    let content = |wanted: &str| {
        let found = contents.iter().find(|(name, _)| *name == wanted);
        found.map_or(&[][..], |(_, content)| content)
    };
    let server = scratch.serve(&[])?;
    let mut client = scratch.client()?;
    for name in ["small", "large", "small2", "large"] {
        revert_when_alone(&scratch, name)?;
        let content = content(name);
        let sectors = content.len() as u64 / 512;
        let mut driver = Driver::connect(&server.socket)?;
        assert_eq!(driver.capacity()?, sectors, "{name}");
        assert!(driver.read_disk(sectors * 512)? == content, "{name}");
        assert_eq!(driver.request(IN, sectors - 7, 4096, WRITE)?, IOERR);
        let block = execute(&mut client, "query-block", &json!({}))?;
        let told = &block[0]["inserted"]["image"]["virtual-size"];
        assert_eq!(told, content.len(), "{name}");
        let nodes = execute(&mut client, "query-named-block-nodes", &json!({}))?;
        assert_eq!(nodes[0]["image"]["virtual-size"], content.len(), "{name}");
        // What is written now is not written to the snapshot.
        driver.memory_fill(0x77)?;
        assert_eq!(driver.request(OUT, sectors - 8, 4096, 0)?, OK);
        assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
        // The size is known here, whether the ring runs or not. To one of this size it may go.
        driver.stop_ring()?;
        let (other, same) = match name {
            "large" => ("small", "large"),
            _ => ("large", "small"),
        };
        let refused = scratch.tool(true, &["revert", other])?;
        assert_eq!(refused.code()?, 1, "{refused:?}");
        for words in ["a front-end is connected", "detach the disk", "--blk-file"] {
            assert!(refused.stderr.contains(words), "{refused:?}");
        }
        assert_eq!(driver.capacity()?, sectors, "{name}");
        if name == "small2" {
            scratch.tool(true, &["revert", same, "--wait"])?.success()?;
            assert_eq!(driver.capacity()?, sectors, "{name}");
        }
    }
    // The disk is "large" but for what was written, and what is made of it has its size.
    take(&mut client, "later")?;
    let listed = scratch.tool(true, &["list", "--json"])?.success()?.stdout;
    let listed: Value = serde_json::from_str(&listed)?;
    assert_eq!(listed[3]["name"], "later");
    assert_eq!(listed[3]["x-qblkd"]["disk-size"], 6 << 20, "{listed}");
    let overlay = scratch.dir.path().join("overlay.qcow2");
    let arguments = json!({ "device": "disk0", "snapshot-file": overlay });
    execute(&mut client, "blockdev-snapshot-sync", &arguments)?;
    let mut disk = content("large").to_vec();
    disk[..4096].fill(0x77);
    let end = disk.len() - 4096;
    disk[end..].fill(0x77);
    let mut driver = Driver::connect(&server.socket)?;
    assert!(driver.read_disk(disk.len() as u64)? == disk);
    drop((driver, client));
    assert_eq!(server.terminate()?.code()?, 0);
    let raw = scratch.dir.path().join("disk.raw");
    std::fs::write(&raw, &disk)?;
    for file in [&scratch.file, &overlay] {
        qemu::expect_check(file, &[CHECK_CLEAN])?;
        qemu::compare("qcow2", file, &raw)?;
    }
    for (name, content) in &contents {
        // QEMU takes the size from the image, which has that of the largest.
        assert!(
            scratch.content(name)?[..content.len()] == **content,
            "{name}"
        );
    }
    Ok(())
}

/// Reverts through the server, where the last front-end may just be leaving.
fn revert_when_alone(scratch: &Scratch, name: &str) -> Result<(), Failure> {
    let started = Instant::now();
    loop {
        let done = scratch.tool(true, &["revert", name, "--wait"])?;
        let leaving = done.stderr.contains("front-end") || done.stderr.contains("in use");
        if !leaving || started.elapsed() > LIMIT {
            done.success()?;
            return Ok(());
        }
    }
}
