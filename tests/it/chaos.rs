//! Random verified work on every kind of image, with QEMU as the judge afterwards.
//!
//! Two queues read, write, discard, write zeroes and flush; the client knows what every sector must
//! hold. `QBLKD_CHAOS_SECONDS` sets how long each image is worked on (default 1), and
//! `QBLKD_CHAOS_IMAGES`, names with commas between them, which images of the corpus.

use crate::kit::chaos::{self, Initial};
use crate::support::command::LIMIT;
use crate::support::corpus::{self, Copy, Image, Kind, TOOLS};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS};
use crate::support::server::Server;
use crate::support::{Failure, ensure, for_each_case, have_tools};
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// Requests of such a run: several for each cluster that matters, and still quick.
const REQUESTS: u64 = 1500;
const DISK_BYTES: u64 = 64 << 20;

/// How long each image is worked on.
fn duration() -> Duration {
    let seconds = std::env::var("QBLKD_CHAOS_SECONDS").ok();
    let seconds = seconds.map_or(1.0, |text| text.parse().expect("QBLKD_CHAOS_SECONDS"));
    Duration::from_secs_f64(seconds)
}

fn seed() -> u64 {
    let seed = std::env::var("QBLKD_CHAOS_SEED").ok();
    seed.map_or_else(
        || fastrand::u64(..),
        |text| text.parse().expect("QBLKD_CHAOS_SEED"),
    )
}

#[test]
fn good_images_survive_verified_random_work() {
    if have_tools("good_images_survive_verified_random_work", TOOLS) {
        let mut images = corpus::images(Kind::Good);
        // A disk without sectors has no room for work.
        images.retain(|image| !image.read_only && image.size != Some(0));
        if let Ok(names) = std::env::var("QBLKD_CHAOS_IMAGES") {
            images.retain(|image| names.split(',').any(|name| name == image.name));
        }
        for_each_case(&images, |image| &image.name, work_on);
    }
}

/// Random work of two queues, verified by the client; then QEMU finds the image clean, the disk
/// equal to the client's model, and every snapshot as it was.
fn work_on(image: &Image) -> Result<(), Failure> {
    let copy = Copy::of(image)?;
    let model = copy.dir.path().join("model.raw");
    let server = Server::start(&copy.arguments)?;
    let seed = seed();
    let worked = chaos::run(&chaos::Options {
        seed,
        initial: Initial::Raw(image.raw()?),
        model_out: Some(model.clone()),
        ..chaos::Options::new(&server.socket, 2, duration())
    });
    let ended = server.terminate()?;
    let judge = || {
        let report = worked.map_err(|error| format!("{error}; server: {ended:?}"))?;
        ensure(report.writes > 0, || {
            format!("nothing was written: {report:?}")
        })?;
        ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
        if image.format == "qcow2" {
            let leaks = if image.leaks_ok {
                CHECK_LEAKS
            } else {
                CHECK_CLEAN
            };
            qemu::expect_check(&copy.image, &[CHECK_CLEAN, leaks])?;
        }
        qemu::compare(&image.format, &copy.image, &model)?;
        qemu::compare_snapshots(image, &copy.image)
    };
    judge().map_err(|failure: Failure| format!("QBLKD_CHAOS_SEED={seed}: {failure}").into())
}

/// One way to serve, on a new image.
struct Way {
    name: &'static str,
    create: &'static str,
    serve: &'static [&'static str],
}

const WAYS: &[Way] = &[
    Way {
        name: "no cache",
        create: "cluster_size=64k",
        serve: &["--cache", "none"],
    },
    Way {
        name: "no cache, small clusters",
        create: "cluster_size=512,refcount_bits=1",
        serve: &["--cache", "none"],
    },
    Way {
        name: "direct sync",
        create: "cluster_size=64k",
        serve: &["--cache", "directsync"],
    },
    Way {
        name: "write-through",
        create: "cluster_size=64k,lazy_refcounts=on",
        serve: &["--cache", "writethrough"],
    },
    Way {
        name: "unsafe",
        create: "cluster_size=64k",
        serve: &["--cache", "unsafe"],
    },
    Way {
        name: "discards ignored",
        create: "cluster_size=4k",
        serve: &["--discard", "ignore"],
    },
    Way {
        name: "the smallest caches",
        create: "cluster_size=4k",
        serve: &[
            "--l2-cache-size",
            "0",
            "--l2-cache-entry-size",
            "512",
            "--refcount-cache-size",
            "0",
        ],
    },
    Way {
        name: "large blocks",
        create: "cluster_size=64k",
        serve: &["--block-size", "4096"],
    },
    Way {
        name: "one thread, no polling",
        create: "cluster_size=2M",
        serve: &["--threads", "1", "--poll-us", "0"],
    },
];

#[test]
fn every_way_to_serve_survives_verified_random_work() {
    if have_tools("every_way_to_serve_survives_verified_random_work", TOOLS) {
        for_each_case(WAYS, |way| way.name, serve_and_work);
    }
}

fn serve_and_work(way: &Way) -> Result<(), Failure> {
    // Below the target folder: a tmpfs may not know O_DIRECT.
    let dir = TempDir::with_prefix_in("qblkd-", env!("CARGO_TARGET_TMPDIR"))?;
    let file = dir.path().join("disk.qcow2");
    qemu::create(&file, DISK_BYTES, way.create)?;
    let model = dir.path().join("model.raw");
    let server = Server::start(words(&file, way.serve))?;
    let worked = chaos::run(&chaos::Options {
        requests_max: REQUESTS,
        initial: Initial::Zero,
        model_out: Some(model.clone()),
        ..chaos::Options::new(&server.socket, 2, LIMIT)
    });
    let ended = server.terminate()?;
    worked.map_err(|error| format!("{error}; server: {ended:?}"))?;
    ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
    qemu::expect_check(&file, &[CHECK_CLEAN])?;
    qemu::compare("qcow2", &file, &model)
}

fn words<'a>(file: &'a Path, more: &'a [&str]) -> Vec<&'a OsStr> {
    let mut words = vec![OsStr::new("--blk-file"), file.as_os_str()];
    words.extend(more.iter().map(OsStr::new));
    words
}
