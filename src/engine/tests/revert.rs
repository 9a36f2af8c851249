//! Internal snapshots of an image that nobody serves: shown read-only, reverted to.
//!
//! On the simulator with a power cut at every change; on real files with `qemu-img` as the other
//! side, which makes snapshots of other sizes and with VM state, and judges what we leave.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::build::{Fill, Recipe, read_tree};
use super::support::{IMAGE, Mix, Rig, Violation, chaos, violation};
use crate::engine::{
    Error, ErrorKind, Image, LayerFormat, LayerSpec, OpenOptions, Selector, SnapshotInfo, Step,
    revert,
};
use crate::format::Header;
use crate::storage::sim::{CutMode, CutPoint, SimStorage};
use crate::storage::{
    AlignedBuf, BlockingStorage, FileId, HostFile, OpenMode, SgList, Storage, block_on,
};
use crate::units::{GuestOffset, to_usize};

fn named(name: &str) -> Selector {
    Selector {
        id: None,
        name: Some(name.to_owned()),
    }
}

/// Opens an image for writing, does its background work, and closes it.
async fn settle<S: Storage>(storage: S, specs: &[LayerSpec]) -> Result<(), Error> {
    let image = Image::open(&storage, specs, &OpenOptions::default()).await?;
    let worker = image.worker(storage);
    while worker.background_step().await? != Step::Idle {}
    worker.close().await
}

// On the simulator.

pub(super) fn recipes() -> Vec<Recipe> {
    let mixed = |cluster: u64| match cluster % 5 {
        0 | 1 => Fill::Data,
        2 => Fill::Compressed,
        3 => Fill::ZeroKept,
        _ => Fill::None,
    };
    let version_2 = |cluster: u64| match cluster % 3 {
        0 => Fill::Data,
        1 => Fill::Compressed,
        _ => Fill::None,
    };
    let data = |cluster: u64| {
        if cluster.is_multiple_of(3) {
            Fill::None
        } else {
            Fill::Data
        }
    };
    let with_snapshot = |recipe: Recipe| Recipe {
        snapshot: true,
        ..recipe
    };
    let mut all = vec![
        with_snapshot(Recipe {
            fill: mixed,
            ..Recipe::plain(10, 64 << 10)
        }),
        with_snapshot(Recipe {
            fill: version_2,
            version: 2,
            ..Recipe::plain(11, 64 << 10)
        }),
        with_snapshot(Recipe {
            fill: data,
            version: 2,
            ..Recipe::plain(9, 64 << 10)
        }),
        with_snapshot(Recipe {
            fill: data,
            device: Some(300),
            can_punch: false,
            ..Recipe::plain(10, 64 << 10)
        }),
    ];
    for refcount_order in 1..=6 {
        all.push(with_snapshot(Recipe {
            fill: data,
            refcount_order,
            ..Recipe::plain(9, 48 << 10)
        }));
    }
    // From and to other sizes, with more and with fewer L2 tables, and across the end of one.
    for (cluster_bits, now, then, fill, version) in [
        (9, 64 << 10, 160 << 10, data as fn(u64) -> Fill, 3),
        (10, 320 << 10, 72 << 10, mixed, 3),
        (9, 40 << 10, 96 << 10, version_2, 2),
        (9, 96 << 10, 40 << 10, data, 2),
    ] {
        all.push(with_snapshot(Recipe {
            fill,
            version,
            snapshot_size: Some(then),
            ..Recipe::plain(cluster_bits, now)
        }));
    }
    all
}

/// An image that has gone on since its snapshot, closed.
pub(super) fn gone_on(recipe: Recipe, seed: u64) -> Result<Rig, Violation> {
    let mut rig = Rig::new(recipe, seed);
    rig.open(&OpenOptions::default())?;
    let worker = rig.worker();
    let random = fastrand::Rng::with_seed(seed);
    rig.driver.spawn(chaos(worker, random, 60, Mix::ALL));
    rig.run()?;
    rig.close()?;
    Ok(rig)
}

fn disk_of(rig: &Rig, snapshot: bool) -> Result<Vec<u8>, Violation> {
    read_tree(&rig.disk.contents(IMAGE), None, snapshot).map_err(Violation)
}

const SPECS: [LayerSpec; 1] = [LayerSpec {
    file: IMAGE,
    format: LayerFormat::Qcow2,
}];

pub(super) fn revert_in(rig: &mut Rig) -> Option<Result<SnapshotInfo, Error>> {
    let storage: SimStorage = rig.disk.storage();
    rig.driver
        .block_on(async move { revert(storage, IMAGE, &named("one")).await })
}

/// Opens, settles and closes; the image is clean, and its snapshot as ever.
pub(super) fn judge(rig: &mut Rig, disk: &[u8]) -> Result<(), Violation> {
    let storage = rig.disk.storage();
    let settled = rig
        .driver
        .block_on(async move { settle(storage, &SPECS).await });
    match settled {
        Some(Ok(())) => {}
        other => return violation(format!("cannot settle: {other:?}")),
    }
    let report = rig.check()?;
    if !report.is_consistent() || report.overlaps > 0 {
        return violation(format!("not consistent: {:?}", report.problems));
    }
    if disk_of(rig, false)? != disk {
        return violation("not the disk that it should be");
    }
    match &rig.snapshot {
        Some(content) if disk_of(rig, true)? != **content => violation("the snapshot has changed"),
        _ => Ok(()),
    }
}

/// QEMU repairs a copy, in which the disk and the snapshot are the same then.
fn judge_by_qemu(rig: &Rig, disk: &[u8]) -> Result<(), Violation> {
    let files = Files {
        directory: tempfile::tempdir().expect("directory"),
    };
    let path = files.path("cut.qcow2");
    rig.disk.export(IMAGE, &path).expect("a file");
    let check = |repair: &[&str]| {
        let mut command = Command::new("qemu-img");
        command.args(["check", "-q", "-f", "qcow2"]).args(repair);
        command.arg(&path).output().expect("qemu-img runs")
    };
    let repaired = check(&["-r", "all"]);
    let checked = check(&[]);
    if !checked.status.success() {
        return violation(format!("QEMU's repair: {repaired:?}, then {checked:?}"));
    }
    let bytes = std::fs::read(&path).expect("an image");
    if read_tree(&bytes, None, false).map_err(Violation)? != disk {
        return violation("QEMU's repair: not the disk that it should be");
    }
    match &rig.snapshot {
        Some(content) if read_tree(&bytes, None, true).map_err(Violation)? != **content => {
            violation("QEMU's repair: the snapshot has changed")
        }
        _ => Ok(()),
    }
}

#[test]
fn a_reverted_disk_is_the_snapshot_and_clean() {
    for (number, recipe) in (1..).zip(recipes()) {
        let mut rig = gone_on(recipe, number).expect("goes on");
        let snapshot = rig.snapshot.clone().expect("a snapshot");
        assert_ne!(disk_of(&rig, false).expect("a disk"), *snapshot);
        let info = revert_in(&mut rig).expect("no cut").expect("reverts");
        assert_eq!((&*info.id, &*info.name), ("1", "one"));
        judge(&mut rig, &snapshot).unwrap_or_else(|violation| panic!("{number}: {violation}"));
        assert!(rig.check().expect("a report").is_clean(), "{number}");
        // The disk has the size of that time, for requests and for what is made of it.
        *rig.model.borrow_mut() = super::model::Model::restart(&snapshot);
        rig.open(&OpenOptions::default()).expect("opens");
        let size = rig.image().virtual_size();
        assert_eq!(size, snapshot.len() as u64, "{number}");
        assert!(rig.read_whole().expect("reads") == **snapshot, "{number}");
        let worker = rig.worker();
        let past_end = rig.block_on(async move {
            let sg = SgList::from_buf(AlignedBuf::zeroed(1024));
            let last = GuestOffset::new(size - 512);
            let result = worker
                .worker
                .read(worker.worker.pin(), last, sg.slice(0, 1024));
            result.await.map_err(|error| error.kind())
        });
        assert_eq!(past_end, Err(ErrorKind::OutOfRange), "{number}");
        // Nothing written now reaches the snapshot.
        let worker = rig.worker();
        let random = fastrand::Rng::with_seed(number);
        rig.driver.spawn(chaos(worker, random, 40, Mix::ALL));
        rig.run().expect("no violation");
        rig.close().expect("closes");
        rig.judge_closed().expect("clean");
    }
}

/// Before the header is written it is the old disk, afterwards the snapshot; never anything else.
#[test]
fn a_cut_of_a_revert_leaves_the_old_disk_or_the_new() {
    for (number, recipe) in (1..).zip(recipes()) {
        let (mut old_seen, mut new_seen) = (0, 0);
        for step in 1.. {
            let mut rig = gone_on(recipe, number).expect("goes on");
            let old = disk_of(&rig, false).expect("a disk");
            let new = rig.snapshot.clone().expect("a snapshot");
            let at = rig.disk.changes() + step;
            rig.disk.cut_at(CutPoint::During(at));
            if revert_in(&mut rig).is_some() {
                assert!(step > 4, "it took fewer than {step} changes");
                break;
            }
            let mut random = fastrand::Rng::with_seed(number * 1000 + step);
            let mut seen = Vec::new();
            // Luck need not keep the header that names the new tree; with all that was written it is
            // there.
            for mode in [CutMode::Random, CutMode::AllUnflushed] {
                let cut = rig.disk.power_cut(&mut random, mode);
                let mut after = rig.after_cut(cut, step);
                let disk = disk_of(&after, false).expect("a disk");
                if seen.contains(&disk) {
                    continue;
                }
                let is_new = disk == *new;
                (old_seen, new_seen) =
                    (old_seen + u32::from(!is_new), new_seen + u32::from(is_new));
                let expected = if is_new { &*new } else { &old };
                judge_by_qemu(&after, expected)
                    .unwrap_or_else(|violation| panic!("{number}, cut at {step}: {violation}"));
                judge(&mut after, expected).unwrap_or_else(|violation| {
                    panic!("{number}, cut at {step}: {violation}\n{}", rig.disk.trace())
                });
                // And it can be done after that.
                let again = revert_in(&mut after).expect("no cut");
                again.unwrap_or_else(|error| panic!("{number}, {step}: {}", error.chain()));
                judge(&mut after, &new).expect("reverted");
                seen.push(disk);
            }
        }
        assert!(old_seen > 0 && new_seen > 0, "{number}");
    }
}

#[test]
fn what_cannot_be_reverted_to_is_left_as_it_is() {
    let recipe = recipes()[0];
    let rig = gone_on(recipe, 1).expect("goes on");
    let before = rig.disk.contents(IMAGE);
    rig.disk.set_immediate(true);
    let result = block_on(revert(rig.disk.storage(), IMAGE, &named("two")));
    assert_eq!(result.expect_err("no such one").kind(), ErrorKind::NotFound);
    assert_eq!(rig.disk.contents(IMAGE), before);
    let options = OpenOptions {
        snapshot: Some(named("one")),
        ..OpenOptions::default()
    };
    let open = |options: &OpenOptions| {
        block_on(Image::open(&rig.disk.storage(), &SPECS, options))
            .map(|image| image.virtual_size())
            .map_err(|error| error.kind())
    };
    assert_eq!(open(&options), Err(ErrorKind::Invalid), "not read-only");
    let options = OpenOptions {
        read_only: true,
        ..options
    };
    assert_eq!(open(&options), Ok(recipe.size));
    let options = OpenOptions {
        snapshot: Some(named("two")),
        ..options
    };
    assert_eq!(open(&options), Err(ErrorKind::NotFound));
}

// With QEMU.

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("text").to_owned()
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("the program runs");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn storage(path: &Path) -> BlockingStorage {
    let mode = OpenMode {
        write: true,
        direct: false,
    };
    let file = HostFile::open(path, mode).expect("image opens");
    BlockingStorage::new(vec![Arc::new(file)])
}

const FILE: [LayerSpec; 1] = [LayerSpec {
    file: FileId(0),
    format: LayerFormat::Qcow2,
}];

/// The whole disk, as we serve it read-only.
fn served(path: &Path, snapshot: Option<Selector>) -> Vec<u8> {
    let options = OpenOptions {
        read_only: true,
        snapshot,
        ..OpenOptions::default()
    };
    let storage = storage(path);
    let image = block_on(Image::open(&storage, &FILE, &options)).expect("opens");
    let worker = image.worker(storage);
    let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(image.virtual_size())));
    let start = GuestOffset::new(0);
    block_on(worker.read(worker.pin(), start, sg.slice(0, sg.len()))).expect("reads");
    sg.to_vec()
}

/// Snapshots `small` (4 MiB), `large` (6 MiB) and `state` (4 MiB and 2 MiB of VM state) of an image
/// whose disk has 5 MiB now, and the contents of their disks.
fn made_by_qemu(options: &str) -> (Files, Vec<(&'static str, Vec<u8>)>) {
    let files = Files {
        directory: tempfile::tempdir().expect("directory"),
    };
    let image = files.text("i.qcow2");
    let qemu_img = |arguments: &[&str]| run("qemu-img", arguments);
    let write = |command: &str| run("qemu-io", &["-f", "qcow2", "-c", command, &image]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "4M"]);
    write("write -P 1 0 3M");
    qemu_img(&["snapshot", "-c", "small", &image]);
    qemu_img(&["resize", "-q", "-f", "qcow2", &image, "6M"]);
    write("write -P 2 1M 5M");
    qemu_img(&["snapshot", "-c", "large", &image]);
    write("write -P 3 0 512k");
    write("write -P 4 4M 2M");
    qemu_img(&["snapshot", "-c", "state", &image]);
    qemu_img(&["resize", "-q", "-f", "qcow2", "--shrink", &image, "5M"]);
    write("write -P 5 100k 2M");
    let mut bytes = std::fs::read(files.path("i.qcow2")).expect("an image");
    make_vm_state(&mut bytes, 4 << 20, 2 << 20);
    std::fs::write(files.path("i.qcow2"), &bytes).expect("an image");
    let mut disk = vec![0; 6 << 20];
    disk[..3 << 20].fill(1);
    let small = disk[..4 << 20].to_vec();
    disk[1 << 20..].fill(2);
    let large = disk.clone();
    disk[..512 << 10].fill(3);
    let state = disk[..4 << 20].to_vec();
    let contents = vec![("small", small), ("large", large), ("state", state)];
    for (name, content) in &contents {
        let raw = files.text("s.raw");
        qemu_img(&["convert", "-l", name, "-O", "raw", &image, &raw]);
        // QEMU takes the size from the image.
        let theirs = std::fs::read(&raw).expect("raw");
        let common = theirs.len().min(content.len());
        assert!(theirs[..common] == content[..common], "{options} {name}");
    }
    (files, contents)
}

/// Calls the end of the third snapshot's disk VM state.
fn make_vm_state(bytes: &mut [u8], disk_size: u64, state_size: u64) {
    let header = Header::decode(bytes).expect("a header");
    let start = to_usize(header.snapshot_table_offset.get());
    let mut entries = crate::format::snapshot::decode_table(&bytes[start..], header.snapshot_count)
        .expect("a table");
    let entry = &mut entries[2];
    let extra = crate::format::SnapshotEntry::extra_data(state_size, disk_size, None);
    entry.extra[..16].copy_from_slice(&extra[..16]);
    entry.vm_state_size_32 = u32::try_from(state_size).expect("small");
    let table = crate::format::snapshot::encode_table(&entries).expect("a table");
    bytes[start..start + table.len()].copy_from_slice(&table);
}

#[test]
fn a_snapshot_shown_read_only_is_what_qemu_says() {
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k"] {
        let (files, contents) = made_by_qemu(options);
        for (number, (name, content)) in (1..).zip(&contents) {
            let path = files.path("i.qcow2");
            assert!(
                served(&path, Some(named(name))) == *content,
                "{options} {name}"
            );
            let by_id = Selector {
                id: Some(number.to_string()),
                name: None,
            };
            assert!(served(&path, Some(by_id)) == *content, "{options} {name}");
        }
    }
}

#[test]
fn snapshots_of_qemu_of_any_size_can_be_reverted_to() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=64",
        "cluster_size=1k,refcount_bits=4,lazy_refcounts=on",
    ] {
        let (files, contents) = made_by_qemu(options);
        let path = files.path("i.qcow2");
        let image = files.text("i.qcow2");
        // VM state by the last one, so that the larger disks come before and after.
        for name in ["small", "state", "large", "state", "small"] {
            let content = &contents
                .iter()
                .find(|(known, _)| *known == name)
                .expect("one")
                .1;
            let info = block_on(revert(storage(&path), FileId(0), &named(name)))
                .unwrap_or_else(|error| panic!("{options} {name}: {}", error.chain()));
            assert_eq!(info.disk_size, content.len() as u64);
            assert!(served(&path, None) == *content, "{options} {name}, at once");
            let served_disk = |snapshot: &str| served(&path, Some(named(snapshot)));
            for (other, content) in &contents {
                assert!(served_disk(other) == *content, "{options} {name}: {other}");
            }
            block_on(settle(storage(&path), &FILE)).expect("settles");
            run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
            assert!(served(&path, None) == *content, "{options} {name}");
        }
        for (name, content) in &contents {
            run("qemu-img", &["snapshot", "-a", name, &image]);
            run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
            let disk = served(&path, None);
            let same = disk[..content.len()] == **content;
            assert!(same, "{options}: QEMU reverts to {name}");
        }
    }
}

/// QEMU repairs what a revert leaves before our next open, too.
#[test]
fn the_repair_of_qemu_takes_a_reverted_image() {
    let (files, contents) = made_by_qemu("cluster_size=4k");
    let path = files.path("i.qcow2");
    let image = files.text("i.qcow2");
    block_on(revert(storage(&path), FileId(0), &named("large"))).expect("reverts");
    run(
        "qemu-img",
        &["check", "-q", "-r", "all", "-f", "qcow2", &image],
    );
    run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
    assert!(served(&path, None) == contents[1].1);
    assert!(served(&path, Some(named("state"))) == contents[2].1);
}
