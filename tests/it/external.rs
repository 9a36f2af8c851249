//! External snapshots of a server at work: a new overlay takes the place of the image, and nothing
//! is lost, mixed up, or written where it should not be.

use crate::kit::chaos::{self, Initial};
use crate::kit::disk::{ConnectOptions, Disk, Kind, Queue, STATUS_OK, Segment, Waiter};
use crate::kit::verify;
use crate::support::command::{LIMIT, run_command};
use crate::support::driver::{Driver, IN, OK, OUT, WRITE};
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
use std::time::Duration;
use tempfile::TempDir;

const TOOLS: &[&str] = &["qemu-img", "qemu-io"];
const DISK_BYTES: u64 = 32 << 20;
/// Ends a run that is never told to.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// A folder with an image, and how to serve it.
struct Scene {
    dir: TempDir,
    image: PathBuf,
    options: Vec<OsString>,
}

impl Scene {
    /// An empty image. Below the target folder: a tmpfs may not know O_DIRECT.
    fn new(create: &str, options: &[&str]) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
        let image = dir.path().join("base.qcow2");
        qemu::create(&image, DISK_BYTES, create)?;
        Ok(Self {
            dir,
            image,
            options: options.iter().map(OsString::from).collect(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves `file`, with a control socket.
    fn serve(&self, file: &Path) -> Result<Server, Failure> {
        let mut words: Vec<OsString> = vec!["--blk-file".into(), file.into()];
        words.extend(["--control".into(), self.path("control.sock").into()]);
        words.extend(self.options.iter().cloned());
        Server::start(&words)
    }

    fn client(&self) -> Result<Qmp, Failure> {
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
            let known = if is_image { (0, 0) } else { (metadata.len(), changed) };
            found.insert(entry.path(), known);
        }
        Ok(found)
    }
}

/// Sends `blockdev-snapshot-sync`; the text of the error if it is refused.
fn snapshot(client: &mut Qmp, arguments: &Value) -> Result<Result<(), String>, Failure> {
    command(client, "blockdev-snapshot-sync", arguments)
}

fn command(
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
fn take(client: &mut Qmp, file: &Path) -> Result<(), Failure> {
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
            let snapshots = || -> Result<(), Failure> {
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
    assert_eq!(names, ["third", "second", "#block001", "disk0"].map(Some), "{nodes}");
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
        let snapshots = || -> Result<(), Failure> {
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
    let mut last = vec![0; usize::try_from(STREAMS)?];
    let mut grown = 0;
    for file in &files {
        let raw = scene.path("content.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).arg(file).arg(&raw);
        run_command(&mut convert, LIMIT)?.success()?;
        let content = fs::File::open(&raw)?;
        let count = |sector: u64| -> Result<u64, Failure> {
            let mut bytes = vec![0; 512];
            content.read_exact_at(&mut bytes, sector * 512)?;
            let count = u64::from_le_bytes(bytes[..8].try_into()?);
            ensure(bytes == stamp(count), || format!("sector {sector} is torn"))?;
            Ok(count)
        };
        for (stream, last) in (0..STREAMS).zip(&mut last) {
            // A stream has a 64k cluster of its own on either side.
            let (first, second) = (count(stream * 128)?, count(SECOND + stream * 128)?);
            let ok = second <= first && first <= second + 1 && second >= *last;
            ensure(ok, || {
                format!("{}: {first}, {second} after {last}", file.display())
            })?;
            grown += u32::from(second > *last);
            *last = second;
        }
    }
    ensure(grown > 0, || "nothing was written between snapshots".into())?;
    ensure(written == last, || format!("{written:?} were written, {last:?} are there"))
}

/// Returns the last count of each stream when it is told to stop.
fn write_counters(
    socket: &Path,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<Vec<u64>, Failure> {
    let (_disk, mut queues) = Disk::connect(&ConnectOptions {
        queues: 2,
        ..ConnectOptions::new(socket)
    })?;
    let waiter = Waiter::new(&queues)?;
    let streams = usize::try_from(STREAMS)?;
    let mut counts = vec![1_u64; streams];
    // A stream uses the slot of its number on both queues.
    let submit = |queue: &mut Queue, stream: usize, base: u64, count: u64| -> Result<(), Failure> {
        queue.write_slot(stream, 0, &stamp(count));
        let segment = Segment {
            sector: base + stream as u64 * 128,
            sectors: 1,
            unmap: false,
        };
        queue.submit(stream, Kind::Write, segment.sector, &[(0, 512)])?;
        Ok(queue.kick()?)
    };
    for stream in 0..streams {
        submit(&mut queues[0], stream, 0, 1)?;
    }
    let mut busy = streams;
    let mut completed = Vec::new();
    while busy > 0 {
        waiter.wait(&mut queues, 20_000)?;
        for index in 0..2 {
            queues[index].reap(&mut completed)?;
            for done in completed.drain(..) {
                ensure(done.status == STATUS_OK, || format!("status {}", done.status))?;
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
