//! Random work on a real file, judged by `qemu-img`.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::engine::{
    Image, LayerFormat, LayerSpec, NewSnapshot, OpenOptions, Selector, Step, Worker,
};
use crate::storage::{AlignedBuf, BlockingStorage, FileId, HostFile, OpenMode, SgList, block_on};
use crate::units::{GuestOffset, to_usize};

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

fn storage(path: &Path) -> BlockingStorage {
    let file = HostFile::open(
        path,
        OpenMode {
            write: true,
            direct: false,
        },
    )
    .expect("image opens");
    BlockingStorage::new(vec![Arc::new(file)])
}

/// Random writes, zeroes, discards and flushes against a model of bytes.
fn random_work(path: &Path, seed: u64, model: &mut [u8]) {
    let mut random = fastrand::Rng::with_seed(seed);
    let storage = storage(path);
    let specs = [LayerSpec {
        file: FileId(0),
        format: LayerFormat::Qcow2,
    }];
    let options = OpenOptions {
        l2_cache_size: Some(64 << 10),
        ..OpenOptions::default()
    };
    let image = block_on(Image::open(&storage, &specs, &options)).expect("image opens");
    let worker = image.worker(storage);
    let sectors = model.len() as u64 / 512;
    for _ in 0..400 {
        let start = random.u64(0..sectors);
        let count = (1 << random.u64(0..9)).min(sectors - start);
        let (offset, len) = (start * 512, count * 512);
        let range = to_usize(offset)..to_usize(offset + len);
        let guest = GuestOffset::new(offset);
        let pin = worker.pin();
        match random.u8(0..10) {
            0..=4 => {
                let fill = random.u8(1..);
                let bytes: Vec<u8> = (0..len)
                    .map(|n| fill.wrapping_add((n / 512).to_le_bytes()[0]))
                    .collect();
                model[range].copy_from_slice(&bytes);
                let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
                block_on(worker.write(pin, guest, sg)).expect("write");
            }
            5 | 6 => {
                model[range].fill(0);
                let unmap = random.bool();
                block_on(worker.write_zeroes(pin, guest, len, unmap)).expect("write zeroes");
            }
            7 => {
                block_on(worker.discard(pin, guest, len)).expect("discard");
                let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
                block_on(worker.read(worker.pin(), guest, sg.slice(0, len))).expect("read");
                let now = sg.to_vec();
                for (old, new) in model[range].chunks_mut(512).zip(now.chunks(512)) {
                    assert!(
                        new == &*old || new.iter().all(|byte| *byte == 0),
                        "{offset:#x}"
                    );
                    old.copy_from_slice(new);
                }
            }
            8 => block_on(worker.flush()).expect("flush"),
            _ => {
                let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(len)));
                block_on(worker.read(pin, guest, sg.slice(0, len))).expect("read");
                assert!(
                    sg.to_vec() == model[range],
                    "seed {seed}: {len:#x} at {offset:#x}"
                );
            }
        }
    }
    block_on(worker.close()).expect("close");
}

#[test]
fn qemu_agrees_after_random_work_on_every_kind() {
    let kinds: &[&[&str]] = &[
        &["cluster_size=65536"],
        &["cluster_size=512"],
        &["cluster_size=4096,refcount_bits=1"],
        &["cluster_size=2097152"],
        &["cluster_size=512,refcount_bits=64"],
        &["compat=0.10"],
        &["cluster_size=1024,refcount_bits=2,lazy_refcounts=on"],
        &["preallocation=metadata"],
    ];
    for (number, kind) in kinds.iter().enumerate() {
        for snapshot in [false, true] {
            if snapshot && kind[0].contains("refcount_bits=1") {
                continue;
            }
            let directory = tempfile::tempdir().expect("directory");
            let path = directory.path().join("t.qcow2");
            let name = path.to_str().expect("text");
            let size = 8 * 1024 * 1024 + 512_usize;
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                kind[0],
                name,
                &size.to_string(),
            ]);
            let mut model = vec![0; size];
            random_work(&path, number as u64, &mut model);
            if snapshot {
                qemu_img(&["snapshot", "-c", "one", name]);
                let old = model.clone();
                random_work(&path, 100 + number as u64, &mut model);
                qemu_img(&["check", "-f", "qcow2", name]);
                let raw = directory.path().join("snapshot.raw");
                let raw_name = raw.to_str().expect("text");
                qemu_img(&["convert", "-l", "one", "-O", "raw", name, raw_name]);
                assert!(
                    std::fs::read(&raw).expect("raw") == old,
                    "snapshot of {kind:?}"
                );
                qemu_img(&["snapshot", "-d", "one", name]);
            }
            random_work(&path, 200 + number as u64, &mut model);
            qemu_img(&["check", "-f", "qcow2", name]);
            let raw = directory.path().join("model.raw");
            std::fs::write(&raw, &model).expect("raw");
            let raw_name = raw.to_str().expect("text");
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw_name, name]);
        }
    }
}

/// Does something with the image and then all the background work.
fn commands(path: &Path, work: impl AsyncFnOnce(&Worker<BlockingStorage>)) {
    let storage = storage(path);
    let specs = [LayerSpec {
        file: FileId(0),
        format: LayerFormat::Qcow2,
    }];
    let opened = block_on(Image::open(&storage, &specs, &OpenOptions::default()));
    let worker = opened.expect("image opens").worker(storage);
    block_on(async {
        work(&worker).await;
        while worker.background_step().await.expect("a step") != Step::Idle {}
        worker.close().await.expect("image closes");
    });
}

fn compare_snapshot(path: &Path, snapshot: &str, content: &[u8]) {
    let directory = tempfile::tempdir().expect("directory");
    let raw = directory.path().join("snapshot.raw");
    let (name, raw_name) = (path.to_str().expect("text"), raw.to_str().expect("text"));
    qemu_img(&["convert", "-l", snapshot, "-O", "raw", name, raw_name]);
    assert!(
        std::fs::read(&raw).expect("raw") == content,
        "snapshot {snapshot} has changed"
    );
}

/// Snapshots of ours are right for QEMU, its own are right for us, and each deletes the other's.
#[test]
fn qemu_and_we_delete_each_others_snapshots() {
    let kinds = [
        "cluster_size=65536",
        "cluster_size=512,refcount_bits=8",
        "compat=0.10",
        "cluster_size=2097152",
        "cluster_size=4096,refcount_bits=64,preallocation=metadata",
    ];
    for (number, kind) in (0..).zip(kinds) {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("t.qcow2");
        let name = path.to_str().expect("text");
        let size = 8 * 1024 * 1024 + 512_usize;
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            kind,
            name,
            &size.to_string(),
        ]);
        let mut model = vec![0; size];
        random_work(&path, number, &mut model);
        commands(&path, async |worker| {
            let new = NewSnapshot {
                name: "ours".to_owned(),
                date_sec: 1,
                date_nsec: 2,
                vm_clock_nsec: 3,
            };
            worker.create_snapshots(&[new]).await.expect("a snapshot");
        });
        let ours = model.clone();
        random_work(&path, 100 + number, &mut model);
        qemu_img(&["check", "-f", "qcow2", name]);
        qemu_img(&["snapshot", "-c", "theirs", name]);
        let theirs = model.clone();
        random_work(&path, 200 + number, &mut model);
        qemu_img(&["check", "-f", "qcow2", name]);
        compare_snapshot(&path, "ours", &ours);
        compare_snapshot(&path, "theirs", &theirs);
        commands(&path, async |worker| {
            let theirs = Selector {
                id: None,
                name: Some("theirs".to_owned()),
            };
            worker.delete_snapshot(&theirs).await.expect("a delete");
        });
        qemu_img(&["check", "-f", "qcow2", name]);
        compare_snapshot(&path, "ours", &ours);
        random_work(&path, 300 + number, &mut model);
        qemu_img(&["snapshot", "-d", "ours", name]);
        qemu_img(&["check", "-f", "qcow2", name]);
        let raw = directory.path().join("model.raw");
        std::fs::write(&raw, &model).expect("raw");
        let raw_name = raw.to_str().expect("text");
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw_name, name]);
    }
}

/// The disk of a raw file has whole sectors. The part of the last one past the end of the file read
/// as zeroes even after it was written, until the image was opened again.
#[test]
fn the_last_sector_of_an_odd_raw_file_keeps_what_is_written() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("odd.raw");
    std::fs::write(&path, vec![7; 1000]).expect("raw");
    let storage = storage(&path);
    let specs = [LayerSpec {
        file: FileId(0),
        format: LayerFormat::Raw,
    }];
    let image =
        block_on(Image::open(&storage, &specs, &OpenOptions::default())).expect("image opens");
    assert_eq!(image.virtual_size(), 1024);
    let worker = image.worker(storage);
    let last = GuestOffset::new(512);
    let bytes = SgList::from_buf(AlignedBuf::from_slice(&[9; 512]));
    block_on(worker.write(worker.pin(), last, bytes)).expect("write");
    let found = SgList::from_buf(AlignedBuf::zeroed(512));
    block_on(worker.read(worker.pin(), last, found.slice(0, 512))).expect("read");
    assert_eq!(found.to_vec(), vec![9; 512]);
}
