//! Check and repair against QEMU as referee: both look at the same damaged images, and what we
//! repaired QEMU must find clean.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::{Repair, Report, check, repair_dirty};
use crate::engine::error::{Error, ErrorKind};
use crate::storage::sim::{CutMode, CutPoint, SimDisk, SimFileOptions};
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};

/// Runs a command line and gives back its exit code and output.
fn run(line: &str) -> (i32, String) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text.into_owned())
}

/// Runs a command line that must succeed.
fn must(line: &str) {
    let (code, text) = run(line);
    assert_eq!(code, 0, "{line}: {text}");
}

/// Whether the referee is there.
fn have_qemu() -> bool {
    let found = run("qemu-img --version && qemu-io --version").0 == 0;
    if !found {
        writeln!(
            std::io::stderr(),
            "SKIPPED: qemu-img and qemu-io are not installed"
        )
        .unwrap();
    }
    found
}

fn storage(path: &Path, write: bool) -> BlockingStorage {
    let file = HostFile::open(
        path,
        OpenMode {
            write,
            direct: false,
        },
    )
    .unwrap();
    BlockingStorage::new(vec![Arc::new(file)])
}

fn check_file(path: &Path, repair: Repair) -> Result<Report, Error> {
    let storage = storage(path, repair != Repair::None);
    block_on(check(&storage, FileId(0), repair, &mut |_| ()))
}

/// What `qemu-img check` says, in the same order as [`ours`].
fn theirs(path: &Path) -> [u64; 7] {
    let (_, text) = run(&format!(
        "qemu-img check --output=json {} 2>/dev/null",
        path.display()
    ));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    [
        "corruptions",
        "leaks",
        "check-errors",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
        "image-end-offset",
    ]
    .map(|name| json.get(name).map_or(0, |value| value.as_u64().unwrap()))
}

fn ours(report: &Report) -> [u64; 7] {
    [
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
        report.image_end_offset,
    ]
}

/// An image with an internal snapshot, data that is shared and data that is not, a zero cluster and
/// compressed clusters.
fn make_image(dir: &Path, options: &str) -> PathBuf {
    let (path, raw) = (dir.join("image.qcow2"), dir.join("raw"));
    let (image, source) = (path.display(), raw.display());
    let snapshot = !["bits=1,", "bits=2,", "bits=4"]
        .iter()
        .any(|narrow| options.contains(narrow));
    must(&format!(
        "head -c 300000 /bin/sh | base64 > {source}; truncate -s 4M {source}"
    ));
    must(&format!(
        "qemu-img convert -c -f raw -O qcow2 -o {options} {source} {image}"
    ));
    must(&format!(
        "qemu-io -f qcow2 -c 'write 1M 300k' -c 'write 2M 64k' -c 'write 3M 8k' {image}"
    ));
    if snapshot {
        must(&format!("qemu-img snapshot -c s1 {image}"));
        must(&format!(
            "qemu-io -f qcow2 -c 'write 1M 64k' -c 'write 3500k 4k' {image}"
        ));
    }
    path
}

/// Reads and writes big-endian words of an image under test.
struct Words(File);

impl Words {
    fn open(path: &Path) -> Self {
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    fn get(&self, offset: u64) -> u64 {
        let mut raw = [0; 8];
        self.0.read_exact_at(&mut raw, offset).unwrap();
        u64::from_be_bytes(raw)
    }

    fn set(&self, offset: u64, value: u64) {
        self.0.write_all_at(&value.to_be_bytes(), offset).unwrap();
    }

    fn l1(&self) -> u64 {
        self.get(40)
    }

    fn l2(&self) -> u64 {
        self.get(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn reftable(&self) -> u64 {
        self.get(48)
    }

    fn refblock(&self) -> u64 {
        self.get(self.reftable())
    }

    /// The L2 entry of the guest cluster at 2 MiB, with 64 KiB clusters.
    fn entry(&self) -> u64 {
        self.l2() + 8 * 32
    }
}

/// Damages a 64 KiB-cluster image, checks that both see the same, repairs it, and lets QEMU judge,
/// also that the repair changes nothing of what the guest sees.
fn damage_is_found_and_repaired(damage: impl Fn(&Words)) {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    damage(&Words::open(&path));
    let reference = dir.path().join("reference");
    must(&format!(
        "qemu-img convert -U -O raw {} {}",
        path.display(),
        reference.display()
    ));
    found_and_repaired(&path, &reference);
}

/// The second half of [`damage_is_found_and_repaired`].
fn found_and_repaired(path: &Path, reference: &Path) {
    let report = check_file(path, Repair::None).unwrap();
    assert!(!report.is_clean());
    assert_eq!(ours(&report), theirs(path), "{:#?}", report.problems);
    let repaired = check_file(path, Repair::All).unwrap();
    assert!(repaired.is_clean(), "{:#?}", repaired.problems);
    assert_eq!(repaired.corruptions_fixed, report.corruptions);
    let (code, text) = run(&format!("qemu-img check {}", path.display()));
    assert_eq!(code, 0, "{text}");
    let (code, text) = run(&format!(
        "qemu-img compare {} {}",
        path.display(),
        reference.display()
    ));
    assert_eq!(code, 0, "{text}");
}

/// Damages an image beyond repair, checks that both see the same, and that a repair keeps the guest's
/// view of the disk and every refcount that may be needed.
fn damage_is_found_and_kept(damage: impl Fn(&Words)) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    damage(&Words::open(&path));
    let report = check_file(&path, Repair::None).unwrap();
    assert_eq!(ours(&report), theirs(&path), "{:#?}", report.problems);
    let repaired = check_file(&path, Repair::All).unwrap();
    assert!(!repaired.is_consistent());
    assert_eq!(
        repaired.leaks, report.leaks,
        "a cluster that may be needed was freed"
    );
    repaired
}

#[test]
fn sound_images_of_every_geometry_agree_with_qemu() {
    if !have_qemu() {
        return;
    }
    for options in [
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,cluster_size=512",
        "compat=1.1,cluster_size=4096",
        "compat=1.1,cluster_size=2M",
        "refcount_bits=1,compat=1.1",
        "compat=1.1,refcount_bits=2,cluster_size=4096",
        "compat=1.1,refcount_bits=4",
        "compat=1.1,refcount_bits=8,cluster_size=1k",
        "compat=1.1,refcount_bits=32",
        "compat=1.1,refcount_bits=64,lazy_refcounts=on",
        "compat=1.1,compression_type=zstd",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = make_image(dir.path(), options);
        let report = check_file(&path, Repair::None).unwrap();
        assert_eq!(
            ours(&report),
            theirs(&path),
            "{options}: {:#?}",
            report.problems
        );
        assert_eq!(
            report.compressed_clusters > 0,
            !options.contains("2M"),
            "{options}"
        );
        assert_eq!(report.overlaps, 0, "{options}: {:#?}", report.problems);
    }
}

#[test]
fn a_bitmap_in_force_is_counted() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    must(&format!("qemu-img bitmap --add {} one", path.display()));
    must(&format!(
        "qemu-io -f qcow2 -c 'write 2M 64k' {}",
        path.display()
    ));
    must(&format!("qemu-img bitmap --add {} two", path.display()));
    let report = check_file(&path, Repair::None).unwrap();
    assert_eq!(ours(&report), theirs(&path), "{:#?}", report.problems);
    assert!(report.is_clean());
}

#[test]
fn refcount_too_low() {
    damage_is_found_and_repaired(|words| {
        let refcount = words.refblock() + 2 * (words.get(words.entry()) >> 16 & 0xffff);
        let pair = words.get(refcount);
        words.set(
            refcount,
            pair & 0x0000_ffff_ffff_ffff | 0x0001_0000_0000_0000,
        );
    });
}

#[test]
fn refcount_of_zero() {
    damage_is_found_and_repaired(|words| {
        let refcount = words.refblock() + 2 * (words.get(words.entry()) >> 16 & 0xffff);
        words.set(refcount, words.get(refcount) & 0x0000_ffff_ffff_ffff);
    });
}

#[test]
fn refcount_too_high_of_many_clusters() {
    damage_is_found_and_repaired(|words| {
        words.set(words.refblock() + 16, 0x0007_0007_0007_0007);
    });
}

#[test]
fn copied_flag_of_an_l2_entry() {
    damage_is_found_and_repaired(|words| {
        words.set(words.entry(), words.get(words.entry()) ^ 1 << 63);
    });
}

#[test]
fn copied_flag_of_an_l1_entry() {
    damage_is_found_and_repaired(|words| words.set(words.l1(), words.get(words.l1()) ^ 1 << 63));
}

#[test]
fn copied_flag_without_an_l2_table_is_cleared() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1,cluster_size=4k");
    let words = Words::open(&path);
    words.set(words.l1(), 1 << 63);
    // What the L2 table named is lost, and freed: nothing tells it from a leak.
    assert!(check_file(&path, Repair::None).unwrap().corruptions > 0);
    assert!(check_file(&path, Repair::All).unwrap().is_clean());
    assert_eq!(words.get(words.l1()), 0);
    must(&format!("qemu-img check {}", path.display()));
}

#[test]
fn guest_cluster_mapped_twice() {
    damage_is_found_and_repaired(|words| {
        words.set(words.l2() + 8 * 50, words.get(words.entry()));
    });
}

#[test]
fn data_mapped_over_an_l2_table() {
    damage_is_found_and_repaired(|words| words.set(words.l2() + 8 * 50, words.l2()));
}

#[test]
fn data_mapped_over_the_refcount_table() {
    damage_is_found_and_repaired(|words| words.set(words.l2() + 8 * 50, words.reftable()));
}

#[test]
fn zero_cluster_with_crooked_host_cluster() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    // QEMU cannot read the damaged image: guest cluster 50 has to be as it was, all zeroes.
    let reference = dir.path().join("reference");
    must(&format!(
        "qemu-img convert -O raw {} {}",
        path.display(),
        reference.display()
    ));
    let words = Words::open(&path);
    words.set(words.l2() + 8 * 50, 0x5_0201);
    found_and_repaired(&path, &reference);
}

#[test]
fn refcount_block_lost() {
    damage_is_found_and_repaired(|words| words.set(words.reftable(), 0));
}

#[test]
fn refcount_block_on_the_l1_table() {
    damage_is_found_and_repaired(|words| words.set(words.reftable(), words.l1()));
}

#[test]
fn refcount_block_with_reserved_bits() {
    damage_is_found_and_repaired(|words| words.set(words.reftable(), words.refblock() | 1));
}

#[test]
fn refcount_block_past_the_end_of_the_file() {
    damage_is_found_and_repaired(|words| words.set(words.reftable() + 8, 0x4000_0000));
}

#[test]
fn data_past_the_end_of_the_file_stays() {
    if have_qemu() {
        let left = damage_is_found_and_kept(|words| words.set(words.l2() + 8 * 50, 0x1000_0000));
        assert_eq!(left.corruptions, 1);
        assert_eq!(left.dangling_end, 0x1001_0000);
    }
}

/// An image without refcounts, and an entry past those of its data.
fn without_refcounts(dir: &Path, entry: u64) -> (PathBuf, Words) {
    let path = make_image(dir, "compat=1.1");
    let words = Words::open(&path);
    words.set(words.reftable(), 0);
    words.set(words.l2() + 8 * 50, entry);
    (path, words)
}

/// The new refcount structure went behind the cluster that an entry names past the end of the file.
/// The file had grown over that cluster then, and its count said that it is free.
#[test]
fn rebuild_counts_what_the_file_grows_over() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = without_refcounts(dir.path(), 0x1000_0000);
    let repaired = check_file(&path, Repair::All).unwrap();
    assert!(repaired.is_clean(), "{:#?}", repaired.problems);
    must(&format!("qemu-img check {}", path.display()));
}

#[test]
fn l2_table_past_the_end_of_the_file_frees_nothing() {
    if have_qemu() {
        damage_is_found_and_kept(|words| words.set(words.l1(), 0x8000_0000_1000_0000));
    }
}

/// Two things are wrong with it, and QEMU's check counts both.
#[test]
fn crooked_l2_table_past_the_end_of_the_file_counts_twice() {
    if have_qemu() {
        damage_is_found_and_kept(|words| words.set(words.l1(), 0x8000_0000_1000_0200));
    }
}

#[test]
fn snapshot_with_crooked_l1_table_frees_nothing() {
    if have_qemu() {
        damage_is_found_and_kept(|words| {
            let table = words.get(64);
            words.set(table, words.get(table) | 0x200);
        });
    }
}

#[test]
fn reserved_bits_in_l1_and_l2_entries_are_found() {
    if have_qemu() {
        damage_is_found_and_kept(|words| words.set(words.l1(), words.get(words.l1()) | 1));
        damage_is_found_and_kept(|words| words.set(words.entry(), words.get(words.entry()) | 2));
    }
}

#[test]
fn copied_flag_on_a_compressed_cluster_is_cleared() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    assert_ne!(
        words.get(words.l2()) & 1 << 62,
        0,
        "the first cluster is compressed"
    );
    words.set(words.l2(), words.get(words.l2()) | 1 << 63);
    let report = check_file(&path, Repair::None).unwrap();
    assert_eq!(ours(&report), theirs(&path));
    assert!(check_file(&path, Repair::All).unwrap().is_clean());
    must(&format!("qemu-img check {}", path.display()));
}

#[test]
fn unaligned_refcount_block_is_a_check_error_and_is_rebuilt() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    words.set(words.reftable(), words.refblock() | 0x200);
    let report = check_file(&path, Repair::None).unwrap();
    assert_eq!(report.corruptions, theirs(&path)[0]);
    assert_eq!(report.check_errors, theirs(&path)[2]);
    assert!(check_file(&path, Repair::All).unwrap().is_clean());
    must(&format!("qemu-img check {}", path.display()));
}

#[test]
fn repairing_leaks_alone_frees_them_and_leaves_corruption() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    words.set(words.refblock() + 16, 0x0007_0007_0007_0007);
    words.set(words.l2() + 8 * 50, words.get(words.entry()));
    let report = check_file(&path, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed > 0), (0, true));
    assert!(report.corruptions > 0);
    assert_eq!(ours(&report), theirs(&path));
}

/// The file could grow, but not over what the entry names, nor behind it.
#[test]
fn a_rebuild_without_room_names_the_entry_that_is_in_the_way() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, words) = without_refcounts(dir.path(), 0x8000_0800_0000_0000);
    // No two free clusters in a row: what is allocated is mapped up to the end of the file.
    let clusters = std::fs::metadata(&path).unwrap().len() >> 16;
    for cluster in 1..clusters {
        words.set(words.l2() + 8 * (60 + cluster), cluster << 16);
    }
    let refused = check_file(&path, Repair::All).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert!(refused.to_string().contains("0x80000010000"), "{refused}");
}

#[test]
fn repairing_leaks_alone_refuses_a_lost_refcount_block() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    words.set(words.reftable(), 0);
    let error = check_file(&path, Repair::Leaks).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(
        words.get(72),
        0,
        "nothing was written, not even the dirty bit"
    );
}

#[test]
fn dirty_image_with_lagging_refcounts_is_made_clean() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1,lazy_refcounts=on");
    must(&format!(
        "qemu-io -f qcow2 -c 'write 2200k 500k' -c flush -c abort {} || true",
        path.display()
    ));
    assert_eq!(Words::open(&path).get(72), 1, "qemu left the dirty bit");
    let report = block_on(repair_dirty(&storage(&path, true), FileId(0))).unwrap();
    assert!(
        report.is_clean() && report.corruptions_fixed > 0,
        "{report:?}"
    );
    assert_eq!(Words::open(&path).get(72), 0);
    must(&format!("qemu-img check {}", path.display()));
}

#[test]
fn corrupt_bit_goes_once_the_image_is_clean() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    words.set(72, 3);
    let sound = words.get(words.entry());
    words.set(words.entry(), sound | 2);
    assert!(block_on(repair_dirty(&storage(&path, true), FileId(0))).is_err());
    assert_eq!(words.get(72), 3, "still damaged: both bits stay");
    words.set(words.entry(), sound);
    assert!(check_file(&path, Repair::All).unwrap().is_clean());
    assert_eq!(words.get(72), 0);
}

#[test]
fn dirty_image_with_a_dangling_entry_can_be_served_but_stays_dirty() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make_image(dir.path(), "compat=1.1");
    let words = Words::open(&path);
    words.set(72, 1);
    words.set(words.l2() + 8 * 50, 0x8000_0000_1000_0000);
    let report = block_on(repair_dirty(&storage(&path, true), FileId(0))).unwrap();
    assert_eq!((report.corruptions, report.dangling), (1, 1));
    assert_eq!(report.dangling_end, 0x1001_0000);
    assert_eq!(words.get(72), 1);
}

/// The power goes at every write and flush of a repair. Whatever that leaves: the image says that it
/// is dirty, or is no worse than before, or is repaired; the next repair makes it clean, and the guest
/// sees the same disk as ever.
#[test]
fn power_cut_at_any_point_of_a_repair_leaves_the_next_one_able() {
    if !have_qemu() {
        return;
    }
    let seed = std::env::var("SEED").map_or_else(|_| 1, |text| text.parse().unwrap());
    for (compat, rebuild) in [
        ("1.1", false),
        ("1.1", true),
        ("0.10", false),
        ("0.10", true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = make_image(dir.path(), &format!("compat={compat}"));
        let words = Words::open(&path);
        // Too low, too high, a flag, a cluster mapped twice; and the whole structure.
        words.set(words.refblock() + 16, 0x0007_0000_0001_0002);
        words.set(words.l1(), words.get(words.l1()) ^ 1 << 63);
        words.set(words.l2() + 8 * 50, words.get(words.entry()));
        if rebuild {
            words.set(words.reftable(), words.refblock() | 1);
        }
        let reference = dir.path().join("reference");
        must(&format!(
            "qemu-img convert -U -O raw {} {}",
            path.display(),
            reference.display()
        ));
        let damaged = std::fs::read(&path).unwrap();
        let disk_of = |cut: Option<CutPoint>| {
            let disk = SimDisk::new(seed);
            disk.set_immediate(true);
            let file = disk.add_file(&damaged, SimFileOptions::default());
            if let Some(cut) = cut {
                disk.cut_at(cut);
            }
            drop(block_on(check(
                &disk.storage(),
                file,
                Repair::All,
                &mut |_| (),
            )));
            disk
        };
        let steps = disk_of(None).changes();
        assert!(steps > 5, "the repair takes {steps} steps");
        let unrepaired = check_file(&path, Repair::None).unwrap();
        let modes = [
            CutMode::Random,
            CutMode::NothingUnflushed,
            CutMode::AllUnflushed,
        ];
        for (step, mode) in (1..=steps + 1).flat_map(|step| modes.map(|mode| (step, mode))) {
            let what = format!("compat {compat}, rebuild {rebuild}, step {step}, {mode:?}");
            let mut random = fastrand::Rng::with_seed(seed ^ step);
            let disk = disk_of(Some(CutPoint::During(step))).power_cut(&mut random, mode);
            disk.set_immediate(true);
            let left = disk.contents(FileId(0));
            let found = block_on(check(&disk.storage(), FileId(0), Repair::None, &mut |_| ()));
            let found = found.unwrap();
            let dirty = compat == "1.1" && left[79] & 1 == 1;
            let no_worse = compat == "0.10" || found == unrepaired;
            assert!(
                dirty || no_worse || found.is_consistent(),
                "{what}: {found:#?}"
            );
            let again = block_on(check(&disk.storage(), FileId(0), Repair::All, &mut |_| ()));
            assert!(again.unwrap().is_clean(), "{what}");
            disk.export(FileId(0), &path).unwrap();
            must(&format!("qemu-img check {}", path.display()));
            must(&format!(
                "qemu-img compare {} {}",
                path.display(),
                reference.display()
            ));
        }
    }
}

/// Random bytes of the metadata are changed. Whatever that does, a check ends without a panic, a
/// repair too, and an image that we call clean afterwards is clean for QEMU.
#[test]
fn random_damage_never_panics_and_a_repair_holds() {
    if !have_qemu() {
        return;
    }
    let seed = std::env::var("SEED").map_or_else(|_| 1, |text| text.parse().unwrap());
    let rounds = std::env::var("ROUNDS").map_or_else(|_| 60, |text| text.parse().unwrap());
    let mut random = fastrand::Rng::with_seed(seed);
    let mut repaired = 0;
    for options in [
        "compat=1.1",
        "compat=1.1,cluster_size=512,refcount_bits=8",
        "compat=0.10",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = make_image(dir.path(), options);
        let sound = std::fs::read(&path).unwrap();
        let words = Words::open(&path);
        let cluster_size = 1_u64 << (words.get(16) & 63);
        let table = words.get(64);
        // Places that matter: the tables and the beginning of the header's cluster.
        let places = [
            0,
            words.l1(),
            words.l2(),
            words.reftable(),
            words.refblock(),
            table,
            cluster_size,
        ];
        for round in 0..rounds {
            let mut damaged = sound.clone();
            for _ in 0..random.usize(1..5) {
                let place = places[random.usize(..places.len())];
                let near = if random.bool() { 128 } else { cluster_size };
                let index = usize::try_from(place + random.u64(..near)).unwrap() % damaged.len();
                damaged[index] ^= 1 << random.u8(..8);
            }
            std::fs::write(&path, &damaged).unwrap();
            drop(check_file(&path, Repair::None));
            if check_file(&path, Repair::All).is_ok_and(|report| report.is_clean()) {
                repaired += 1;
                let (code, text) = run(&format!("qemu-img check {}", path.display()));
                assert_eq!(code, 0, "{options} seed {seed} round {round}: {text}");
            }
        }
    }
    assert!(
        repaired > rounds,
        "only {repaired} images could be repaired"
    );
}
