//! External snapshots of a server at work: a new overlay takes the place of the image, and nothing
//! is lost, mixed up, or written where it should not be.

use crate::kit::chaos::{self, Initial};
use crate::kit::disk::{ConnectOptions, Disk, Kind, Queue, STATUS_OK, Waiter, Watchdog};
use crate::kit::verify;
use crate::support::command::{LIMIT, run_command};
use crate::support::driver::{DATA, Driver, IN, OK, OUT, WRITE};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::qmp::Qmp;
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, ensure, for_each_case, have_tools};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(super) const TOOLS: &[&str] = &["qemu-img", "qemu-io"];
pub(super) const DISK_BYTES: u64 = 32 << 20;
/// Ends a run that is never told to.
pub(super) const RUN_LIMIT: Duration = Duration::from_secs(120);

/// A folder with an image, and how to serve it.
pub(super) struct Scene {
    pub(super) dir: TempDir,
    pub(super) image: PathBuf,
    pub(super) options: Vec<OsString>,
}

impl Scene {
    /// An empty image. Below the target folder: a tmpfs may not know O_DIRECT.
    pub(super) fn new(create: &str, options: &[&str]) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
        let image = dir.path().join("base.qcow2");
        qemu::create(&image, DISK_BYTES, create)?;
        Ok(Self {
            dir,
            image,
            options: options.iter().map(OsString::from).collect(),
        })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves `file`, with a control socket.
    pub(super) fn serve(&self, file: &Path) -> Result<Server, Failure> {
        Server::start(self.words(file))
    }

    /// What is said to a server of `file`.
    pub(super) fn words(&self, file: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["--blk-file".into(), file.into()];
        words.extend(["--control".into(), self.path("control.sock").into()]);
        words.extend(self.options.iter().cloned());
        words
    }

    pub(super) fn client(&self) -> Result<Qmp, Failure> {
        Qmp::connect(&self.path("control.sock"))
    }

    /// Every file and its content's length and time: what a refusal must leave alone.
    fn listing(&self) -> Result<BTreeMap<PathBuf, (u64, i64)>, Failure> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(self.dir.path())? {
            let entry = entry?;
            let metadata = fs::symlink_metadata(entry.path())?;
            let changed = std::os::unix::fs::MetadataExt::mtime_nsec(&metadata);
            // The image itself is flushed before it is known whether the snapshot can be had.
            let is_image = entry.path() == self.image;
            let known = if is_image {
                (0, 0)
            } else {
                (metadata.len(), changed)
            };
            found.insert(entry.path(), known);
        }
        Ok(found)
    }
}

/// Sends `blockdev-snapshot-sync`; the text of the error if it is refused.
pub(super) fn snapshot(client: &mut Qmp, arguments: &Value) -> Result<Result<(), String>, Failure> {
    command(client, "blockdev-snapshot-sync", arguments)
}

pub(super) fn command(
    client: &mut Qmp,
    name: &str,
    arguments: &Value,
) -> Result<Result<(), String>, Failure> {
    let line = json!({ "execute": name, "arguments": arguments });
    client.send(format!("{line}\n").as_bytes())?;
    let answer = client.answer()?;
    Ok(match answer["error"]["desc"].as_str() {
        Some(text) => Err(text.to_owned()),
        None => Ok(()),
    })
}

/// Takes a snapshot that must succeed.
pub(super) fn take(client: &mut Qmp, file: &Path) -> Result<(), Failure> {
    let arguments = json!({ "device": "disk0", "snapshot-file": file });
    snapshot(client, &arguments)?.map_err(Failure::from)
}

/// One way to serve and to snapshot.
struct Way {
    name: &'static str,
    create: &'static str,
    serve: &'static [&'static str],
}

const WAYS: &[Way] = &[
    Way {
        name: "plain",
        create: "cluster_size=64k",
        serve: &[],
    },
    Way {
        name: "no cache",
        create: "cluster_size=64k",
        serve: &["--cache", "none"],
    },
    Way {
        name: "write-through, small clusters",
        create: "cluster_size=4k",
        serve: &["--cache", "writethrough"],
    },
    Way {
        name: "v2, one thread",
        create: "compat=0.10,cluster_size=64k",
        serve: &["--threads", "1", "--poll-us", "0"],
    },
    Way {
        name: "the smallest clusters and caches",
        create: "cluster_size=512",
        serve: &["--l2-cache-size", "0", "--refcount-cache-size", "0"],
    },
    Way {
        name: "unsafe, large clusters",
        create: "cluster_size=2M",
        serve: &["--cache", "unsafe"],
    },
];

#[test]
fn snapshots_under_random_work_lose_nothing() {
    if have_tools("snapshots_under_random_work_lose_nothing", TOOLS) {
        for_each_case(WAYS, |way| way.name, work_and_snapshot);
    }
}

/// Two queues at verified random work, five overlays one after the other, an internal snapshot in
/// between; then a restart with the last overlay, and the same again.
fn work_and_snapshot(way: &Way) -> Result<(), Failure> {
    let scene = Scene::new(way.create, way.serve)?;
    let mut active = scene.image.clone();
    let mut files = vec![active.clone()];
    let mut initial = Initial::Zero;
    for round in 0..2 {
        let model = scene.path(&format!("model-{round}.raw"));
        let server = scene.serve(&active)?;
        let options = chaos::Options {
            seed: round,
            requests_max: 4000,
            initial,
            model_out: Some(model.clone()),
            ..chaos::Options::new(&server.socket, 2, RUN_LIMIT)
        };
        let mut under_load = 0;
        let worked = thread::scope(|scope| {
            let work = scope.spawn(|| chaos::run(&options));
            let mut snapshots = || -> Result<(), Failure> {
                let mut client = scene.client()?;
                for number in 0..5 {
                    if number == 2 {
                        let internal = json!({ "device": "disk0", "name": format!("i{round}") });
                        command(&mut client, "blockdev-snapshot-internal-sync", &internal)??;
                    }
                    active = scene.path(&format!("overlay-{round}-{number}.qcow2"));
                    take(&mut client, &active)?;
                    files.push(active.clone());
                    under_load += u32::from(!work.is_finished());
                }
                Ok(())
            };
            let taken = snapshots();
            let worked = work.join().map_err(|panic| format!("client: {panic:?}"))?;
            taken?;
            Ok::<_, Failure>(worked)
        })?;
        let ended = server.terminate()?;
        worked.map_err(|error| format!("{error}; server: {ended:?}"))?;
        ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
        ensure(under_load > 0, || "no snapshot was taken under load".into())?;
        for file in &files {
            qemu::expect_check(file, &[CHECK_CLEAN])
                .map_err(|failure| format!("{}: {failure}", file.display()))?;
        }
        qemu::compare("qcow2", &active, &model)?;
        initial = Initial::Raw(model);
    }
    Ok(())
}

#[test]
fn the_chain_is_shown_with_names_that_stay() -> Result<(), Failure> {
    if !have_tools("the_chain_is_shown_with_names_that_stay", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let mut client = scene.client()?;
    take(&mut client, &scene.path("one.qcow2"))?;
    let two = scene.path("two.qcow2");
    let named = json!({
        "device": "disk0", "snapshot-file": two, "snapshot-node-name": "second",
        "format": "qcow2", "mode": "absolute-paths",
    });
    snapshot(&mut client, &named)??;
    let three = scene.path("three.qcow2");
    let by_node = json!({
        "node-name": "second", "snapshot-file": three, "snapshot-node-name": "third",
    });
    let action = json!({ "type": "blockdev-snapshot-sync", "data": by_node });
    command(&mut client, "transaction", &json!({ "actions": [action] }))??;
    let nodes = client.execute("query-named-block-nodes")?;
    let shown: Vec<_> = nodes
        .as_array()
        .ok_or("no list")?
        .iter()
        .map(|node| (node["node-name"].as_str(), node["file"].as_str()))
        .collect();
    let names: Vec<_> = shown.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["third", "second", "#block001", "disk0"].map(Some),
        "{nodes}"
    );
    assert_eq!(shown[0].1, three.to_str());
    assert_eq!(shown[3].1, scene.image.to_str());
    let block = client.execute("query-block")?;
    let image = &block[0]["inserted"]["image"];
    assert_eq!(image["filename"], json!(three), "{block}");
    // In one folder the names are relative, so that the folder can be moved.
    assert_eq!(image["backing-filename"], "two.qcow2", "{block}");
    assert_eq!(server.terminate()?.code()?, 0);
    let moved = scene.path("moved");
    fs::create_dir(&moved)?;
    for name in ["base", "one", "two", "three"] {
        let name = format!("{name}.qcow2");
        fs::rename(scene.path(&name), moved.join(&name))?;
    }
    let mut info = Command::new("qemu-img");
    info.args(["info", "--backing-chain", "--output=json"]);
    let chain = qemu::json_of(info.arg(moved.join("three.qcow2")))?;
    assert_eq!(chain.as_array().map(Vec::len), Some(4), "{chain}");
    assert_eq!(chain[0]["backing-filename-format"], "qcow2", "{chain}");
    Ok(())
}

#[test]
fn a_raw_image_gets_an_overlay() -> Result<(), Failure> {
    if !have_tools("a_raw_image_gets_an_overlay", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &["--format", "raw"])?;
    let raw = scene.path("disk.raw");
    fs::write(&raw, vec![0x11; 1 << 20])?;
    fs::set_permissions(&raw, fs::Permissions::from_mode(0o600))?;
    let server = scene.serve(&raw)?;
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    let overlay = scene.path("overlay.qcow2");
    take(&mut scene.client()?, &overlay)?;
    let before = fs::read(&raw)?;
    assert_eq!(driver.request(OUT, 64, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    assert_eq!(fs::read(&raw)?, before);
    // As private as the image.
    assert_eq!(fs::metadata(&overlay)?.permissions().mode() & 0o777, 0o600);
    qemu::expect_check(&overlay, &[CHECK_CLEAN])?;
    let mut info = Command::new("qemu-img");
    let info = qemu::json_of(info.args(["info", "--output=json"]).arg(&overlay))?;
    assert_eq!(info["backing-filename-format"], "raw", "{info}");
    assert_eq!(info["virtual-size"], 1 << 20, "{info}");
    Ok(())
}

/// Streams of the prefix test, each with one counter on either queue.
const STREAMS: u64 = 8;
/// Where the counters of the second queue begin, in sectors.
const SECOND: u64 = 4096;
const PREFIX_SNAPSHOTS: usize = 12;
const INTERNAL_SNAPSHOTS: usize = 200;

/// A sector's worth of a counter.
fn stamp(count: u64) -> Vec<u8> {
    count.to_le_bytes().repeat(64)
}

/// Writes counters, each on the first queue and, when that is complete, on the second. No image may
/// have a count of the second queue that is not on the first, nor lack one before the last.
#[test]
fn every_backing_file_is_a_prefix_of_what_was_written() -> Result<(), Failure> {
    if !have_tools("every_backing_file_is_a_prefix_of_what_was_written", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut files = vec![scene.image.clone()];
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| write_counters(&server.socket, &stop));
        let mut snapshots = || -> Result<(), Failure> {
            let mut client = scene.client()?;
            for number in 0..PREFIX_SNAPSHOTS {
                let file = scene.path(&format!("{number}.qcow2"));
                take(&mut client, &file)?;
                files.push(file);
            }
            Ok(())
        };
        let taken = snapshots();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let written = writer.join().map_err(|panic| format!("{panic:?}"))?;
        taken?;
        written
    })?;
    assert_eq!(server.terminate()?.code()?, 0);
    let mut counters = Counters::new();
    for file in &files {
        let raw = scene.path("content.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).arg(file).arg(&raw);
        run_command(&mut convert, LIMIT)?.success()?;
        counters.judge(&raw)?;
    }
    counters.end(&written)
}

/// The same of internal snapshots, all of one file.
#[test]
fn every_internal_snapshot_is_a_prefix_of_what_was_written() -> Result<(), Failure> {
    if !have_tools(
        "every_internal_snapshot_is_a_prefix_of_what_was_written",
        TOOLS,
    ) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| write_counters(&server.socket, &stop));
        let snapshots = || -> Result<(), Failure> {
            let mut client = scene.client()?;
            wait_for_writes(&mut client, 2 * STREAMS)?;
            for number in 0..INTERNAL_SNAPSHOTS {
                let arguments = json!({"device": "disk0", "name": format!("s{number}")});
                command(&mut client, "blockdev-snapshot-internal-sync", &arguments)??;
            }
            Ok(())
        };
        let taken = snapshots();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let written = writer.join().map_err(|panic| format!("{panic:?}"))?;
        taken?;
        written
    })?;
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&scene.image, &[CHECK_CLEAN])?;
    let raw = scene.path("content.raw");
    let mut counters = Counters::new();
    let names = (0..INTERNAL_SNAPSHOTS).map(|number| Some(format!("s{number}")));
    for name in names.chain([None]) {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]);
        if let Some(name) = name {
            convert.args(["-l", &format!("snapshot.name={name}")]);
        }
        convert.arg(&scene.image).arg(&raw);
        run_command(&mut convert, LIMIT)?.success()?;
        counters.judge(&raw)?;
    }
    counters.end(&written)
}

/// What has been read of the counters so far, image by image.
struct Counters {
    /// Of each stream, on the second queue.
    last: Vec<u64>,
    /// How often one had grown.
    grown: u32,
}

impl Counters {
    fn new() -> Self {
        Self {
            last: (0..STREAMS).map(|_| 0).collect(),
            grown: 0,
        }
    }

    /// No count of the second queue is missing on the first, and nothing that was there is gone.
    fn judge(&mut self, raw: &Path) -> Result<(), Failure> {
        let content = fs::File::open(raw)?;
        let count = |sector: u64| -> Result<u64, Failure> {
            let mut bytes = vec![0; 512];
            content.read_exact_at(&mut bytes, sector * 512)?;
            let count = u64::from_le_bytes(bytes[..8].try_into()?);
            ensure(bytes == stamp(count), || format!("sector {sector} is torn"))?;
            Ok(count)
        };
        for (stream, last) in (0..STREAMS).zip(&mut self.last) {
            // A stream has a 64k cluster of its own on either side.
            let (first, second) = (count(stream * 128)?, count(SECOND + stream * 128)?);
            let ok = second <= first && first <= second + 1 && second >= *last;
            ensure(ok, || format!("{first}, {second} after {last}"))?;
            self.grown += u32::from(second > *last);
            *last = second;
        }
        Ok(())
    }

    /// The last image has everything.
    fn end(self, written: &[u64]) -> Result<(), Failure> {
        let Self { last, grown } = self;
        ensure(grown > 0, || "nothing was written between snapshots".into())?;
        ensure(written == last, || {
            format!("{written:?} were written, {last:?} are there")
        })
    }
}

/// Returns the last count of each stream when it is told to stop.
fn write_counters(
    socket: &Path,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<Vec<u64>, Failure> {
    let (disk, mut queues) = Disk::connect(&ConnectOptions {
        queues: 2,
        ..ConnectOptions::new(socket)
    })?;
    let waiter = Waiter::new(&queues)?;
    let streams = usize::try_from(STREAMS)?;
    let mut counts = vec![1_u64; streams];
    // A stream uses the slot of its number on both queues.
    let submit = |queue: &mut Queue, stream: usize, base: u64, count: u64| -> Result<(), Failure> {
        queue.write_slot(stream, 0, &stamp(count));
        let sector = base + stream as u64 * 128;
        queue.submit(stream, Kind::Write, sector, &[512])?;
        Ok(queue.kick()?)
    };
    for stream in 0..streams {
        submit(&mut queues[0], stream, 0, 1)?;
    }
    let mut busy = streams;
    let mut watchdog = Watchdog::new();
    let mut completed = Vec::new();
    while busy > 0 {
        waiter.wait(&mut queues, 100)?;
        watchdog.check(&disk, busy)?;
        for index in 0..2 {
            queues[index].reap(&mut completed)?;
            for done in completed.drain(..) {
                watchdog.progress(Instant::now());
                ensure(done.status == STATUS_OK, || {
                    format!("status {}", done.status)
                })?;
                let count = &mut counts[done.slot];
                if index == 0 {
                    submit(&mut queues[1], done.slot, SECOND, *count)?;
                } else if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    busy -= 1;
                } else {
                    *count += 1;
                    submit(&mut queues[0], done.slot, 0, *count)?;
                }
            }
        }
    }
    Ok(counts)
}

/// What is refused, and a part of what is said.
struct Refusal {
    name: &'static str,
    file: &'static str,
    /// More arguments.
    more: Value,
    says: &'static str,
}

#[test]
fn what_cannot_be_had_is_refused_and_changes_nothing() -> Result<(), Failure> {
    if !have_tools("what_cannot_be_had_is_refused_and_changes_nothing", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let elsewhere = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    let outside = elsewhere.path().join("x.qcow2");
    fs::write(&outside, "not to be touched")?;
    fs::write(scene.path("there.qcow2"), "not to be touched")?;
    symlink(&outside, scene.path("leads-out.qcow2"))?;
    symlink(
        elsewhere.path().join("nothing"),
        scene.path("dangling.qcow2"),
    )?;
    symlink(elsewhere.path(), scene.path("folder-out"))?;
    fs::create_dir(scene.path("folder"))?;
    fs::write(scene.path("other.qcow2"), "")?;
    qemu::create(&scene.path("other.qcow2"), DISK_BYTES, "cluster_size=64k")?;
    let overlay = |name: &str, backing: &str, format: &str, size: u64| {
        let options = format!("backing_file={backing},backing_fmt={format}");
        qemu::create(&scene.path(name), size, &options)
    };
    overlay("small.qcow2", "base.qcow2", "qcow2", DISK_BYTES / 2)?;
    overlay("of-other.qcow2", "other.qcow2", "qcow2", DISK_BYTES)?;
    overlay("as-raw.qcow2", "base.qcow2", "raw", DISK_BYTES)?;
    let existing = json!({ "mode": "existing" });
    let none = json!({});
    let plain = |name, file, says| Refusal {
        name,
        file,
        more: none.clone(),
        says,
    };
    let there = |name, file, says| Refusal {
        name,
        file,
        more: existing.clone(),
        says,
    };
    let with = |name, more, says| Refusal {
        name,
        file: "new.qcow2",
        more,
        says,
    };
    let refusals = [
        plain("outside", "../x.qcow2", "--snapshot-dir"),
        plain("through a link", "folder-out/new.qcow2", "--snapshot-dir"),
        plain("taken", "there.qcow2", "is there already"),
        plain("a link is taken", "leads-out.qcow2", "is there already"),
        plain("a dangling link", "dangling.qcow2", "is there already"),
        plain("the image", "base.qcow2", "is there already"),
        plain("a folder", "folder", "is there already"),
        plain("no file", "folder/", "does not name a file"),
        plain("no folder", "nowhere/new.qcow2", "No such file"),
        there("not there", "new.qcow2", "No such file"),
        there("not qcow2", "there.qcow2", "cannot use the image"),
        there("existing outside", "leads-out.qcow2", "--snapshot-dir"),
        there("existing folder", "folder", "it is a directory"),
        there("the image itself", "base.qcow2", "part of the chain"),
        there("no backing file", "other.qcow2", "names no backing file"),
        there("another size", "small.qcow2", "virtual size"),
        there(
            "another image",
            "of-other.qcow2",
            "not the image that is served",
        ),
        there("another format", "as-raw.qcow2", "not of its format"),
        with("raw", json!({ "format": "raw" }), "format qcow2"),
        with("mode", json!({ "mode": "copy" }), "'mode'"),
        with(
            "name",
            json!({ "snapshot-node-name": "1x" }),
            "no node name",
        ),
        with(
            "name taken",
            json!({ "snapshot-node-name": "disk0" }),
            "already",
        ),
        with("device", json!({ "device": "disk1" }), "disk1"),
        with("surprise", json!({ "surprise": 1 }), "surprise"),
    ];
    let server = scene.serve(&scene.image)?;
    let mut driver = Driver::connect(&server.socket)?;
    let before = scene.listing()?;
    let mut client = scene.client()?;
    for refusal in &refusals {
        let mut arguments = json!({ "device": "disk0" });
        arguments["snapshot-file"] =
            json!(format!("{}/{}", scene.dir.path().display(), refusal.file));
        for (name, value) in refusal.more.as_object().ok_or("no object")? {
            arguments[name] = value.clone();
        }
        let refused = snapshot(&mut client, &arguments)?;
        let name = refusal.name;
        let said = refused
            .err()
            .ok_or_else(|| format!("{name}: not refused"))?;
        ensure(said.contains(refusal.says), || format!("{name}: {said}"))?;
        ensure(scene.listing()? == before, || {
            format!("{name}: {:?}", scene.listing())
        })?;
        assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK, "{name}");
    }
    for file in ["nbd:localhost:1", "json:{}"] {
        let arguments = json!({ "device": "disk0", "snapshot-file": file });
        let said = snapshot(&mut client, &arguments)?
            .err()
            .ok_or("not refused")?;
        ensure(said.contains("protocol"), || said)?;
    }
    assert_eq!(fs::read_to_string(&outside)?, "not to be touched");
    // After all that the real thing still works.
    take(&mut client, &scene.path("new.qcow2"))?;
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&scene.image, &[CHECK_CLEAN])
}

#[test]
fn a_folder_that_was_given_may_hold_the_overlay() -> Result<(), Failure> {
    if !have_tools("a_folder_that_was_given_may_hold_the_overlay", TOOLS) {
        return Ok(());
    }
    let mut scene = Scene::new("cluster_size=64k", &[])?;
    let elsewhere = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    scene.options = vec!["--snapshot-dir".into(), elsewhere.path().into()];
    let server = scene.serve(&scene.image)?;
    let overlay = elsewhere.path().join("overlay.qcow2");
    take(&mut scene.client()?, &overlay)?;
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    // The backing file is in another folder: its whole path is stored, and a restart asks for leave.
    let mut info = Command::new("qemu-img");
    let info = qemu::json_of(info.args(["info", "--output=json"]).arg(&overlay))?;
    assert_eq!(info["backing-filename"], json!(scene.image), "{info}");
    let refused = scene
        .serve(&overlay)
        .err()
        .ok_or("not refused")?
        .to_string();
    ensure(refused.contains("--backing-dir"), || refused)?;
    scene.options = vec!["--backing-dir".into(), scene.dir.path().into()];
    assert_eq!(scene.serve(&overlay)?.terminate()?.code()?, 0);
    Ok(())
}

#[test]
fn an_overlay_that_is_there_is_used_as_it_is() -> Result<(), Failure> {
    if !have_tools("an_overlay_that_is_there_is_used_as_it_is", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let overlay = scene.path("overlay.qcow2");
    let options = "backing_file=base.qcow2,backing_fmt=qcow2,cluster_size=4k";
    qemu::create(&overlay, DISK_BYTES, options)?;
    let mut io = Command::new("qemu-io");
    run_command(io.args(["-c", "write -P 0x5a 8k 4k"]).arg(&overlay), LIMIT)?.success()?;
    let server = scene.serve(&scene.image)?;
    let mut driver = Driver::connect(&server.socket)?;
    let existing = json!({ "device": "disk0", "snapshot-file": overlay, "mode": "existing" });
    snapshot(&mut scene.client()?, &existing)??;
    // What it holds shows through, as with QEMU.
    assert_eq!(driver.request(IN, 16, 512, WRITE)?, OK);
    let data = usize::try_from(DATA)?;
    assert_eq!(driver.snapshot()?[data..data + 512], [0x5a; 512]);
    assert_eq!(driver.request(OUT, 8, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&overlay, &[CHECK_CLEAN])?;
    qemu::expect_check(&scene.image, &[CHECK_CLEAN])
}

/// Whether a tool may do something to a file that is served.
fn may(program: &str, words: &[&str], file: &Path) -> Result<bool, Failure> {
    let mut command = Command::new(program);
    Ok(run_command(command.args(words).arg(file), LIMIT)?
        .status
        .success())
}

#[test]
fn the_overlay_is_locked_and_the_old_image_may_be_read() -> Result<(), Failure> {
    if !have_tools("the_overlay_is_locked_and_the_old_image_may_be_read", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let overlay = scene.path("overlay.qcow2");
    let server = scene.serve(&scene.image)?;
    let write = ["-c", "write 0 4k"];
    assert!(!may("qemu-img", &["info"], &scene.image)?);
    take(&mut scene.client()?, &overlay)?;
    assert!(may("qemu-img", &["info"], &scene.image)?);
    assert!(may("qemu-img", &["check"], &scene.image)?);
    assert!(!may("qemu-io", &write, &scene.image)?);
    assert!(!may("qemu-img", &["info"], &overlay)?);
    assert!(may("qemu-img", &["info", "-U"], &overlay)?);
    assert!(!may("qemu-io", &write, &overlay)?);
    let socket = scene.path("second.sock");
    let second = |read_only: &[&str], file: &Path| -> Result<String, Failure> {
        let mut second = Command::new(QBLKD);
        second.args(read_only).arg("--socket-path").arg(&socket);
        let refused = run_command(second.arg("--blk-file").arg(file), LIMIT)?;
        assert_ne!(refused.code()?, 0);
        Ok(refused.stderr)
    };
    for (options, file) in [
        (&[][..], &scene.image),
        (&[], &overlay),
        (&["--read-only"], &overlay),
    ] {
        let said = second(options, file)?;
        ensure(said.contains("in use"), || said)?;
    }
    assert_eq!(server.terminate()?.code()?, 0);
    assert!(may("qemu-io", &write, &overlay)?);
    Ok(())
}

#[test]
fn a_kill_right_after_the_answer_loses_nothing() -> Result<(), Failure> {
    if !have_tools("a_kill_right_after_the_answer_loses_nothing", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let mut active = scene.image.clone();
    let mut initial = Initial::Zero;
    for round in 0..6 {
        let state = scene.path(&format!("state-{round}"));
        let server = scene.serve(&active)?;
        let options = chaos::Options {
            seed: round,
            initial: initial.clone(),
            state_out: Some(state.clone()),
            ..chaos::Options::new(&server.socket, 2, RUN_LIMIT)
        };
        let report = thread::scope(|scope| {
            let work = scope.spawn(|| chaos::run(&options));
            let mut killed = || -> Result<(), Failure> {
                let mut client = scene.client()?;
                for number in 0..2 {
                    wait_for_writes(&mut client, 200)?;
                    active = scene.path(&format!("{round}-{number}.qcow2"));
                    take(&mut client, &active)?;
                }
                server.signal("KILL")
            };
            let killed = killed();
            let report = work.join().map_err(|panic| format!("client: {panic:?}"))?;
            killed?;
            Ok::<_, Failure>(report?)
        })?;
        ensure(report.server_gone, || format!("not killed: {report:?}"))?;
        drop(server);
        qemu::wait_for_lock(&active)?;
        for entry in fs::read_dir(scene.dir.path())? {
            let file = entry?.path();
            if file.extension() == Some(OsStr::new("qcow2")) {
                qemu::expect_check(&file, &[CHECK_CLEAN, CHECK_LEAKS])?;
            }
        }
        let server = scene.serve(&active)?;
        let pinned = scene.path("pinned");
        verify::run(&verify::Options {
            connect: ConnectOptions::new(&server.socket),
            state,
            pin: Some(pinned.clone()),
            model_out: None,
        })?;
        assert_eq!(server.terminate()?.code()?, 0);
        initial = Initial::State(pinned);
    }
    Ok(())
}

/// Waits until the server has completed so many writes since it was asked first.
pub(super) fn wait_for_writes(client: &mut Qmp, count: u64) -> Result<(), Failure> {
    let mut written = || -> Result<u64, Failure> {
        let stats = client.execute("query-blockstats")?;
        let writes = &stats[0]["stats"]["wr_operations"];
        Ok(writes
            .as_u64()
            .ok_or_else(|| format!("no count: {stats}"))?)
    };
    let from = written()?;
    let started = Instant::now();
    while written()? < from + count {
        ensure(started.elapsed() < RUN_LIMIT, || "no writes".into())?;
    }
    Ok(())
}

#[test]
fn front_ends_come_and_go_while_snapshots_are_taken() -> Result<(), Failure> {
    if !have_tools("front_ends_come_and_go_while_snapshots_are_taken", TOOLS) {
        return Ok(());
    }
    let scene = Scene::new("cluster_size=64k", &[])?;
    let server = scene.serve(&scene.image)?;
    // Nobody is connected: nothing to wait for.
    take(&mut scene.client()?, &scene.path("first.qcow2"))?;
    let mut active = PathBuf::new();
    let rounds = thread::scope(|scope| {
        let (stop, told) = std::sync::mpsc::channel::<()>();
        let socket = &server.socket;
        let guests = scope.spawn(move || -> Result<u32, String> {
            let mut rounds = 0;
            while matches!(told.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)) {
                let mut driver = Driver::connect(socket).map_err(|error| error.to_string())?;
                let mut request = |kind, sector, flags| {
                    let status = driver.request(kind, sector, 4096, flags);
                    status.map_err(|error| error.to_string())
                };
                for sector in 0..8 {
                    if request(OUT, sector * 8, 0)? != OK || request(IN, sector * 8, WRITE)? != OK {
                        return Err(format!("round {rounds}: bad status"));
                    }
                }
                rounds += 1;
            }
            Ok(rounds)
        });
        let mut snapshots = || -> Result<(), Failure> {
            let mut client = scene.client()?;
            for number in 0..20 {
                active = scene.path(&format!("{number}.qcow2"));
                take(&mut client, &active)?;
            }
            Ok(())
        };
        let taken = snapshots();
        drop(stop);
        let rounds = guests.join().map_err(|panic| format!("{panic:?}"))?;
        taken?;
        Ok::<_, Failure>(rounds?)
    })?;
    ensure(rounds > 1, || format!("{rounds} front-ends came"))?;
    // The server still has them all open; one more, and the end while nobody is there.
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&active, &[CHECK_CLEAN])?;
    qemu::expect_check(&scene.image, &[CHECK_CLEAN])
}

#[test]
fn an_overlay_that_cannot_be_finished_is_removed() -> Result<(), Failure> {
    if !have_tools("an_overlay_that_cannot_be_finished_is_removed", TOOLS) {
        return Ok(());
    }
    let mut scene = Scene::new("cluster_size=64k", &[])?;
    // Its whole path is longer than a header can hold.
    let mut deep = scene.dir.path().to_owned();
    deep.extend((0..5).map(|_| "x".repeat(250)));
    fs::create_dir_all(&deep)?;
    let image = deep.join("base.qcow2");
    fs::rename(&scene.image, &image)?;
    let elsewhere = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    scene.options = vec!["--snapshot-dir".into(), elsewhere.path().into()];
    let server = scene.serve(&image)?;
    let mut client = scene.client()?;
    let arguments = json!({
        "device": "disk0", "snapshot-file": elsewhere.path().join("overlay.qcow2"),
    });
    let said = snapshot(&mut client, &arguments)?
        .err()
        .ok_or("not refused")?;
    ensure(said.contains("header"), || said)?;
    assert_eq!(fs::read_dir(elsewhere.path())?.count(), 0);
    // An image that has another name now could not be found again.
    fs::rename(&image, deep.join("renamed.qcow2"))?;
    fs::copy(deep.join("renamed.qcow2"), &image)?;
    let arguments = json!({ "device": "disk0", "snapshot-file": deep.join("overlay.qcow2") });
    let said = snapshot(&mut client, &arguments)?
        .err()
        .ok_or("not refused")?;
    ensure(said.contains("not found"), || said)?;
    assert_eq!(fs::read_dir(&deep)?.count(), 2);
    let mut driver = Driver::connect(&server.socket)?;
    assert_eq!(driver.request(OUT, 0, 4096, 0)?, OK);
    drop(driver);
    assert_eq!(server.terminate()?.code()?, 0);
    qemu::expect_check(&deep.join("renamed.qcow2"), &[CHECK_CLEAN])
}
