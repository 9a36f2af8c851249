//! Another implementation judges: `qemu-img` and `qemu-io` agree with qblkd, in both directions.
//!
//! Images of QEMU are opened, served, checked and written by us, and what we made or wrote is judged
//! by QEMU. The images come from the corpus; every test works on private copies. A clean check is no
//! proof, so every test that writes compares the content of the disk and of every snapshot.

use crate::kit::disk::{ConnectOptions, Disk, Kind as Request, STATUS_OK, Waiter, wait_for_one};
use crate::kit::{self, SECTOR_BYTES};
use crate::support::command::{LIMIT, run, run_command};
use crate::support::corpus::{self, Access, Copy, Image, Kind, TOOLS};
use crate::support::qemu::{self, CHECK_CLEAN, CHECK_LEAKS, json_of};
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, ensure, for_each_case, have_tools};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// How long a refusal may take, in the best of so many attempts: a busy machine is slow now and then,
/// a slow refusal is slow every time.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);
const REFUSAL_ATTEMPTS: u32 = 10;
/// A request that runs into damage gets this status (VIRTIO_BLK_S_IOERR).
const STATUS_IOERR: u8 = 1;
/// Offset of the incompatible features in a version 3 header, and the corrupt bit in its last byte.
const INCOMPATIBLE_LAST_BYTE: u64 = 79;
const CORRUPT_BIT: u8 = 2;

// --- Refusals ---

#[test]
fn bad_images_are_refused_by_name_and_left_alone() {
    if have_tools("bad_images_are_refused_by_name_and_left_alone", TOOLS) {
        let images = corpus::images(Kind::Bad);
        for_each_case(&images, name, |image| refuse(image, &[]));
    }
}

#[test]
fn bad_images_are_refused_read_only_too() {
    if have_tools("bad_images_are_refused_read_only_too", TOOLS) {
        let mut images = corpus::images(Kind::Bad);
        images.retain(|image| image.also_read_only);
        for_each_case(&images, name, |image| refuse(image, &["--read-only"]));
    }
}

#[test]
fn images_that_may_not_be_written_are_refused_unless_read_only() {
    if have_tools(
        "images_that_may_not_be_written_are_refused_unless_read_only",
        TOOLS,
    ) {
        let mut images = corpus::images(Kind::Good);
        images.retain(|image| image.read_only);
        for_each_case(&images, name, |image| refuse(image, &[]));
    }
}

fn name(image: &Image) -> &str {
    &image.name
}

/// Opening `image` ends at once with a sentence that names the reason, and writes nothing.
fn refuse(image: &Image, more: &[&str]) -> Result<(), Failure> {
    let copy = Copy::of(image)?;
    let before = copy.content()?;
    let socket = copy.dir.path().join("refused.sock");
    let mut command = Command::new(QBLKD);
    command
        .arg("--socket-path")
        .arg(&socket)
        .args(&copy.arguments)
        .args(more);
    let mut refused = run_command(&mut command, LIMIT)?;
    for _ in 1..REFUSAL_ATTEMPTS {
        if refused.elapsed >= REFUSAL_LIMIT {
            refused = run_command(&mut command, LIMIT)?;
        }
    }
    let (code, stderr) = (refused.code()?, &refused.stderr);
    ensure(code != 0, || "was opened".into())?;
    ensure(refused.elapsed < REFUSAL_LIMIT, || {
        format!("took {:?}", refused.elapsed)
    })?;
    ensure(!stderr.contains("panicked"), || {
        format!("panicked: {stderr}")
    })?;
    let expect = &image.expect;
    ensure(image.is_explained_by(stderr), || {
        format!("does not say {expect:?}: {stderr}")
    })?;
    ensure(!socket.exists(), || "left a socket behind".into())?;
    ensure(copy.content()? == before, || "changed a file".into())
}

// --- Serving ---

#[test]
fn good_images_read_as_qemu_reads_them() {
    if have_tools("good_images_read_as_qemu_reads_them", TOOLS) {
        for_each_case(&corpus::images(Kind::Good), name, read_all);
    }
}

/// Served with `--read-only`: the whole disk is as QEMU sees it, and no byte of a file changes.
fn read_all(image: &Image) -> Result<(), Failure> {
    let copy = Copy::of(image)?;
    let before = copy.content()?;
    let server = Server::start(
        copy.arguments
            .iter()
            .map(OsString::as_os_str)
            .chain([OsStr::new("--read-only")]),
    )?;
    let compared = compare_with_raw(&server, &image.raw()?);
    let ended = server.terminate()?;
    compared?;
    ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
    ensure(copy.content()? == before, || "changed a file".into())
}

fn compare_with_raw(server: &Server, raw: &Path) -> Result<(), Failure> {
    let raw = File::open(raw)?;
    let (disk, mut queues) = Disk::connect(&ConnectOptions::new(&server.socket))?;
    let sectors = disk.geometry.capacity_sectors;
    let capacity = sectors * SECTOR_BYTES as u64;
    let expected = raw.metadata()?.len();
    ensure(capacity == expected, || {
        format!("capacity is {capacity}, not {expected}")
    })?;
    let mut wanted = vec![0; queues[0].slot_bytes()];
    let mut different = None;
    kit::scan::scan(&disk, &mut queues[0], 0..sectors, |first, found| {
        let wanted = &mut wanted[..found.len()];
        let offset = first * SECTOR_BYTES as u64;
        raw.read_exact_at(wanted, offset)
            .map_err(kit::Error::io("reading the companion"))?;
        if let Some(index) = (0..found.len()).find(|index| found[*index] != wanted[*index]) {
            different.get_or_insert(offset + index as u64);
        }
        Ok(())
    })?;
    ensure(different.is_none(), || {
        format!("first difference at {:#x}", different.unwrap_or(0))
    })
}

#[test]
fn a_disk_of_zero_bytes_is_served() {
    if have_tools("a_disk_of_zero_bytes_is_served", TOOLS) {
        let mut images = corpus::images(Kind::Good);
        images.retain(|image| image.size == Some(0));
        for_each_case(&images, name, |image| {
            let copy = Copy::of(image)?;
            let server = Server::start(&copy.arguments)?;
            compare_with_raw(&server, &image.raw()?)?;
            ensure(server.terminate()?.code()? == 0, || "SIGTERM".into())?;
            ensure(qemu::check(&copy.image)? == CHECK_CLEAN, || {
                "qemu-img check".into()
            })
        });
    }
}

// --- Damage that is met at run time ---

#[test]
fn damage_met_at_run_time_is_an_io_error() {
    if have_tools("damage_met_at_run_time_is_an_io_error", TOOLS) {
        for_each_case(&corpus::images(Kind::BadAtRuntime), name, |image| {
            for access in &image.access {
                meet(image, access).map_err(|failure| format!("{}: {failure}", access.op))?;
            }
            Ok(())
        });
    }
}

#[test]
fn damage_met_read_only_is_an_io_error_and_nothing_is_written() {
    if have_tools(
        "damage_met_read_only_is_an_io_error_and_nothing_is_written",
        TOOLS,
    ) {
        for_each_case(&corpus::images(Kind::BadAtRuntime), name, |image| {
            let copy = Copy::of(image)?;
            let before = copy.content()?;
            let options = copy.arguments.iter().map(OsString::as_os_str);
            match Server::start(options.chain([OsStr::new("--read-only")])) {
                Err(_) if image.may_refuse => {}
                Err(failure) => return Err(failure),
                Ok(server) => {
                    for access in image.access.iter().filter(|access| access.op == "read") {
                        request(&server, access, &[])?;
                    }
                    ensure(server.terminate()?.code()? == 0, || "SIGTERM".into())?;
                }
            }
            ensure(copy.content()? == before, || "changed a file".into())
        });
    }
}

/// One access to damage: an error for it, the server lives, no old byte is overwritten, and the
/// corrupt bit says what was met.
fn meet(image: &Image, access: &Access) -> Result<(), Failure> {
    let copy = Copy::of(image)?;
    let length_before = fs::metadata(&copy.image)?.len();
    let server = match Server::start(&copy.arguments) {
        Err(_) if image.may_refuse => return Ok(()),
        started => started?,
    };
    // Bytes that occur nowhere else.
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let data: Vec<u8> = (0..access.length).map(|_| random.u8(..)).collect();
    let outcome = request(&server, access, &data)?;
    ensure(server.terminate()?.code()? == 0, || "SIGTERM".into())?;
    let mut found = fs::read(&copy.image)?;
    let corrupt = found[usize::try_from(INCOMPATIBLE_LAST_BYTE)?] & CORRUPT_BIT != 0;
    let zeroes = outcome == Outcome::Zeroes;
    ensure(corrupt == image.sets_corrupt || zeroes, || {
        format!("corrupt bit: {corrupt}")
    })?;
    found.truncate(usize::try_from(length_before)?);
    let landed = found
        .windows(64)
        .position(|window| data.starts_with(window));
    ensure(landed.is_none(), || {
        format!("the refused write landed at {landed:#x?}")
    })
}

#[derive(PartialEq, Eq, Debug)]
enum Outcome {
    Eio,
    Zeroes,
}

/// Sends one read or write and says how it ended, if that is permitted; the server must then still
/// answer.
fn request(server: &Server, access: &Access, data: &[u8]) -> Result<Outcome, Failure> {
    let (disk, mut queues) = Disk::connect(&ConnectOptions::new(&server.socket))?;
    let waiter = Waiter::new(&queues)?;
    let queue = &mut queues[0];
    let kind = if access.op == "write" {
        Request::Write
    } else {
        Request::Read
    };
    queue.write_slot(0, 0, data);
    queue.submit(
        0,
        kind,
        access.offset / SECTOR_BYTES as u64,
        &[access.length],
    )?;
    let status = wait_for_one(&disk, queue, &waiter)?.status;
    let mut found = vec![1; access.length];
    queue.read_slot(0, 0, &mut found);
    let zeroes = access.op == "read" && found.iter().all(|byte| *byte == 0);
    let outcome = match status {
        STATUS_IOERR => Outcome::Eio,
        STATUS_OK if zeroes && access.outcomes.iter().any(|word| word == "zeroes") => {
            Outcome::Zeroes
        }
        _ => return Err(format!("status {status}, read zeroes: {zeroes}").into()),
    };
    disk.serial(queue)?;
    Ok(outcome)
}

// --- info and check ---

#[test]
fn info_agrees_with_qemu() {
    if have_tools("info_agrees_with_qemu", TOOLS) {
        let mut images = corpus::images(Kind::Good);
        images.retain(|image| image.format == "qcow2");
        for_each_case(&images, name, compare_info);
    }
}

/// The facts that both tools know have the same names and values.
fn compare_info(image: &Image) -> Result<(), Failure> {
    const FACTS: &[&str] = &[
        "/format",
        "/virtual-size",
        "/cluster-size",
        "/dirty-flag",
        "/backing-filename",
        "/backing-filename-format",
        "/format-specific/data/compat",
        "/format-specific/data/refcount-bits",
        "/format-specific/data/lazy-refcounts",
        "/format-specific/data/compression-type",
        "/format-specific/data/corrupt",
    ];
    let copy = Copy::of(image)?;
    let ours = json_of(
        Command::new(QBLKD)
            .args(["info", "--json"])
            .arg(&copy.image),
    )?;
    let mut qemu_img = Command::new("qemu-img");
    let theirs = json_of(
        qemu_img
            .args(["info", "--output=json", "-f", "qcow2"])
            .arg(&copy.image),
    )?;
    for fact in FACTS {
        // QEMU leaves facts out that do not apply; then we need not have them either.
        if let Some(theirs) = theirs.pointer(fact) {
            let ours = ours.pointer(fact);
            ensure(ours == Some(theirs), || {
                format!("{fact}: {ours:?}, not {theirs}")
            })?;
        }
    }
    let names = |info: &Value| -> Vec<(String, String)> {
        let list = info.get("snapshots").and_then(Value::as_array);
        let text = |snapshot: &Value, key| snapshot[key].as_str().unwrap_or("?").to_owned();
        list.into_iter()
            .flatten()
            .map(|snapshot| (text(snapshot, "id"), text(snapshot, "name")))
            .collect()
    };
    let (ours, theirs) = (names(&ours), names(&theirs));
    ensure(ours == theirs, || {
        format!("snapshots: {ours:?}, not {theirs:?}")
    })
}

#[test]
fn check_agrees_with_qemu_and_writes_nothing() {
    if have_tools("check_agrees_with_qemu_and_writes_nothing", TOOLS) {
        let mut images = corpus::images(Kind::Good);
        images.retain(|image| image.format == "qcow2");
        images.extend(corpus::images(Kind::Inconsistent));
        for_each_case(&images, name, |image| {
            let copy = Copy::of(image)?;
            let before = copy.content()?;
            let ours = qblkd_check(&copy.image, &[])?;
            ensure(copy.content()? == before, || "changed a file".into())?;
            let theirs = qemu::check(&copy.image)?;
            ensure(ours == theirs, || format!("exit {ours}, qemu-img {theirs}"))
        });
    }
}

#[test]
fn check_of_what_cannot_be_checked_exits_with_1() {
    if have_tools("check_of_what_cannot_be_checked_exits_with_1", TOOLS) {
        let dir = TempDir::with_prefix("qblkd-").unwrap();
        let code = qblkd_check(&dir.path().join("missing.qcow2"), &[]).unwrap();
        assert_eq!(code, 1);
    }
}

#[test]
fn repair_leaves_an_image_that_qemu_finds_clean() {
    if have_tools("repair_leaves_an_image_that_qemu_finds_clean", TOOLS) {
        let mut images = corpus::images(Kind::Inconsistent);
        images.extend(
            corpus::images(Kind::Good)
                .into_iter()
                .filter(|image| image.format == "qcow2"),
        );
        for_each_case(&images, name, |image| {
            let copy = Copy::of(image)?;
            let code = qblkd_check(&copy.image, &["--repair", "all"])?;
            ensure(code == CHECK_CLEAN, || {
                format!("check --repair all: exit {code}")
            })?;
            let theirs = qemu::check(&copy.image)?;
            ensure(theirs == CHECK_CLEAN, || {
                format!("qemu-img check: exit {theirs}")
            })?;
            qemu::compare("qcow2", &copy.image, &image.raw()?)?;
            qemu::compare_snapshots(image, &copy.image)
        });
    }
}

#[test]
fn repair_of_leaks_mends_leaks() {
    if have_tools("repair_of_leaks_mends_leaks", TOOLS) {
        let mut images = corpus::images(Kind::Inconsistent);
        images.retain(|image| image.check == Some(CHECK_LEAKS));
        for_each_case(&images, name, |image| {
            let copy = Copy::of(image)?;
            let code = qblkd_check(&copy.image, &["--repair", "leaks"])?;
            ensure(code == CHECK_CLEAN, || {
                format!("check --repair leaks: exit {code}")
            })?;
            ensure(qemu::check(&copy.image)? == CHECK_CLEAN, || {
                "qemu-img check".into()
            })?;
            qemu::compare("qcow2", &copy.image, &image.raw()?)
        });
    }
}

fn qblkd_check(file: &Path, options: &[&str]) -> Result<i32, Failure> {
    let mut command = Command::new(QBLKD);
    run_command(command.arg("check").args(options).arg(file), LIMIT)?.code()
}

// --- create ---

/// One way to call `qblkd create`.
struct Creation {
    name: String,
    cluster_bytes: u64,
    refcount_bits: u64,
    lazy_refcounts: bool,
    preallocation: &'static str,
    size: u64,
}

/// Every value with every other, of the options that meet in the layout of the file.
fn creations() -> Vec<Creation> {
    let mut creations = Vec::new();
    for cluster_bytes in [512, 4096, 65536, 2 << 20] {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            for preallocation in ["off", "metadata", "falloc", "full"] {
                let number = creations.len();
                let size = [0, 512, 1 << 20, (3 << 20) + 512][number % 4];
                let lazy_refcounts = number % 3 == 0;
                creations.push(Creation {
                    name: format!(
                        "cluster {cluster_bytes}, refcount {refcount_bits}, lazy {lazy_refcounts}, \
                         preallocation {preallocation}, size {size}"
                    ),
                    cluster_bytes,
                    refcount_bits,
                    lazy_refcounts,
                    preallocation,
                    size,
                });
            }
        }
    }
    creations
}

#[test]
fn created_images_are_clean_and_usable_for_qemu() {
    if have_tools("created_images_are_clean_and_usable_for_qemu", TOOLS) {
        for_each_case(&creations(), |creation| &creation.name, create);
    }
}

fn create(creation: &Creation) -> Result<(), Failure> {
    let dir = TempDir::with_prefix("qblkd-")?;
    let file = dir.path().join("new.qcow2");
    let mut command = Command::new(QBLKD);
    command.args([
        "create",
        "--cluster-size",
        &creation.cluster_bytes.to_string(),
    ]);
    command.args(["--refcount-bits", &creation.refcount_bits.to_string()]);
    command.args(["--preallocation", creation.preallocation]);
    if creation.lazy_refcounts {
        command.arg("--lazy-refcounts");
    }
    run_command(command.arg(&file).arg(creation.size.to_string()), LIMIT)?.success()?;
    let check = qemu::check(&file)?;
    ensure(check == CHECK_CLEAN, || {
        format!("qemu-img check: exit {check}")
    })?;

    let mut qemu_img = Command::new("qemu-img");
    let info = json_of(
        qemu_img
            .args(["info", "--output=json", "-f", "qcow2"])
            .arg(&file),
    )?;
    let specific = &info["format-specific"]["data"];
    let size = &info["virtual-size"];
    ensure(*size == creation.size, || format!("virtual size {size}"))?;
    ensure(info["cluster-size"] == creation.cluster_bytes, || {
        format!("{info}")
    })?;
    ensure(specific["refcount-bits"] == creation.refcount_bits, || {
        format!("{info}")
    })?;
    ensure(
        specific["lazy-refcounts"] == creation.lazy_refcounts,
        || format!("{info}"),
    )?;

    let empty = dir.path().join("empty.raw");
    File::create(&empty)?.set_len(creation.size)?;
    qemu::compare("qcow2", &file, &empty)?;
    if creation.size > 0 {
        let write = format!("write -P 7 {} 512", creation.size - 512);
        let read = format!("read -P 7 {} 512", creation.size - 512);
        let words = ["-f", "qcow2", "-c", &write, "-c", &read].map(OsStr::new);
        run("qemu-io", words.into_iter().chain([file.as_os_str()]))?.success()?;
        let check = qemu::check(&file)?;
        ensure(check == CHECK_CLEAN, || {
            format!("after a write: exit {check}")
        })?;
    }
    Ok(())
}

#[test]
fn created_overlays_show_their_backing_file() {
    if have_tools("created_overlays_show_their_backing_file", TOOLS) {
        let mut bases = corpus::images(Kind::Good);
        let wanted = ["v3-cluster-4k", "raw-unaligned", "size-1000-sectors"];
        bases.retain(|image| wanted.contains(&image.name.as_str()));
        assert_eq!(bases.len(), wanted.len());
        for_each_case(&bases, name, |base| {
            let copy = Copy::of(base)?;
            let file = copy.dir.path().join("overlay.qcow2");
            let mut command = Command::new(QBLKD);
            // Relative to the overlay, and no size: the disk is as large as the backing file's.
            command.arg("create").arg("--backing-file").arg(&base.file);
            command.args(["--backing-format", &base.format]).arg(&file);
            run_command(&mut command, LIMIT)?.success()?;
            ensure(qemu::check(&file)? == CHECK_CLEAN, || {
                "qemu-img check".into()
            })?;
            qemu::compare("qcow2", &file, &base.raw()?)
        });
    }
}

#[test]
fn an_overlay_without_a_backing_format_is_not_created() {
    let dir = TempDir::with_prefix("qblkd-").unwrap();
    File::create(dir.path().join("base.raw"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let file = dir.path().join("overlay.qcow2");
    let mut command = Command::new(QBLKD);
    command
        .args(["create", "--backing-file", "base.raw"])
        .arg(&file)
        .arg("1M");
    let refused = run_command(&mut command, LIMIT).unwrap();
    assert_ne!(refused.code().unwrap(), 0);
    assert!(
        refused.stderr.contains("--backing-format"),
        "{}",
        refused.stderr
    );
    assert!(!file.exists());
}

#[test]
fn the_corpus_is_made_of_what_its_manifest_says() {
    if have_tools("the_corpus_is_made_of_what_its_manifest_says", TOOLS) {
        let images = corpus::images(Kind::Good);
        for_each_case(&images, name, |image| {
            if image.format != "qcow2" {
                return Ok(());
            }
            let mut qemu_img = Command::new("qemu-img");
            let file = corpus::folder().join(&image.file);
            let info = json_of(
                qemu_img
                    .args(["info", "-U", "--output=json", "-f", "qcow2"])
                    .arg(file),
            )?;
            let specific = &info["format-specific"]["data"];
            let compat = if image.version == Some(2) {
                "0.10"
            } else {
                "1.1"
            };
            ensure(specific["compat"] == compat, || format!("{info}"))?;
            ensure(info["virtual-size"].as_u64() == image.size, || {
                format!("{info}")
            })?;
            let cluster_bytes = image.cluster_bits.map(|bits| 1_u64 << bits);
            ensure(info["cluster-size"].as_u64() == cluster_bytes, || {
                format!("{info}")
            })?;
            let refcount_bits = image.refcount_bits.map(u64::from);
            ensure(specific["refcount-bits"].as_u64() == refcount_bits, || {
                format!("{info}")
            })
        });
    }
}
