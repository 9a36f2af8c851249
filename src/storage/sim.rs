//! The simulated disk (tests only): everything a host may do to us, from one seed.
//!
//! [`SimDisk`] holds files with a *current* content (what reads see) and a *durable* one (what a power
//! cut leaves), [`SimStorage`] is [`Storage`](super::Storage) on it, [`Driver`] runs tasks and
//! completes operations in an order drawn from a seed. Same seed, same program: same run.
//!
//! What may happen, and does:
//! - Operations are held until the scheduler completes them, in any order. Until then a write is
//!   visible in part (by sectors); its memory is read when a sector lands, not when it is submitted.
//!   A read takes its bytes at any moment before its completion.
//! - A completed write is volatile. `sync_data` makes durable what had completed when the sync was
//!   submitted; of anything else a power cut keeps what it likes.
//! - After a power cut each sector holds its durable content or that of any write since, whichever
//!   way the mode and the seed choose, and the length of a file is chosen likewise.
//! - Operations fail on demand. A failed write leaves part of itself. A failed sync leaves part of
//!   what it should have made durable, and *the rest never becomes durable by a later sync*, although
//!   reads show it (Linux marks such pages clean).
//!
//! Everything iterates in a fixed order, so that what is drawn depends on the seed alone.

mod cut;
mod disk;
mod driver;
mod fault;
mod file;
mod operation;
mod state;
mod storage;
mod task;

pub use self::cut::{CutMode, CutPoint};
pub use self::disk::SimDisk;
pub use self::driver::{Driver, Outcome};
pub use self::fault::Fault;
pub use self::file::SimFileOptions;
pub use self::operation::{OpInfo, OpKind};
pub use self::storage::SimStorage;
pub use self::task::{JoinHandle, yield_now};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::future::Future;
    use std::io;
    use std::rc::Rc;
    use std::task::{Context, Waker};

    use fastrand::Rng;

    use super::*;
    use crate::storage::{AlignedBuf, FileId, SgList, Storage, block_on};

    const FILE: FileId = FileId(0);

    fn disk(seed: u64, len: usize) -> SimDisk {
        let disk = SimDisk::new(seed);
        disk.add_file(&vec![b'o'; len], SimFileOptions::default());
        disk
    }

    fn immediate(len: usize) -> SimDisk {
        let disk = disk(1, len);
        disk.set_immediate(true);
        disk
    }

    fn bytes(byte: u8, len: usize) -> SgList {
        SgList::from_buf(AlignedBuf::from_slice(&vec![byte; len]))
    }

    fn write(disk: &SimDisk, offset: u64, byte: u8, len: usize) {
        block_on(disk.storage().write(FILE, offset, bytes(byte, len))).unwrap();
    }

    fn sync(disk: &SimDisk) -> io::Result<()> {
        block_on(disk.storage().sync_data(FILE))
    }

    /// One letter per sector, of the file as it is after a cut.
    fn left(disk: &SimDisk, seed: u64, mode: CutMode) -> String {
        let after = disk.power_cut(&mut Rng::with_seed(seed), mode);
        let contents = after.contents(FILE);
        contents
            .chunks(512)
            .map(|sector| char::from(sector[0]))
            .collect()
    }

    #[test]
    fn any_alignment_agrees_with_a_vec() {
        for seed in 0..10 {
            let model = super::super::host::tests::pattern(70_144, seed);
            let disk = SimDisk::new(seed);
            disk.add_file(&model, SimFileOptions::default());
            let mut driver = Driver::new(seed, &disk);
            let storage = disk.storage();
            driver.spawn(async move {
                super::super::host::tests::agrees_with_a_vec(&storage, model, seed).await;
            });
            assert_eq!(driver.run(), Outcome::Done);
        }
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let disk = immediate(1536);
        write(&disk, 0, b'f', 512);
        sync(&disk).unwrap();
        write(&disk, 512, b'x', 1024);
        write(&disk, 512, b'y', 512);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "foo");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "fyx");
        let random: BTreeSet<String> = (0..200)
            .map(|seed| left(&disk, seed, CutMode::Random))
            .collect();
        let all = ["foo", "fox", "fxo", "fxx", "fyo", "fyx"].map(String::from);
        assert_eq!(random, BTreeSet::from(all));
        let one_lost: BTreeSet<String> = (0..50)
            .map(|seed| left(&disk, seed, CutMode::AllButOneWrite))
            .collect();
        assert_eq!(one_lost, BTreeSet::from(["fyo", "fxx"].map(String::from)));
    }

    #[test]
    fn a_sync_covers_only_what_was_complete_when_it_was_submitted() {
        let disk = disk(1, 512);
        let mut driver = Driver::new(1, &disk);
        let (one, two) = (disk.storage(), disk.storage());
        disk.hold(|_| true);
        driver.spawn(async move { one.write(FILE, 0, bytes(b'x', 512)).await.unwrap() });
        assert_eq!(driver.run_until_stuck(), Outcome::Stuck);
        driver.spawn(async move { two.sync_data(FILE).await.unwrap() });
        assert_eq!(driver.run_until_stuck(), Outcome::Stuck);
        disk.complete(1);
        disk.complete(2);
        assert_eq!(driver.run(), Outcome::Done);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "x");
        driver.block_on({
            let storage = disk.storage();
            disk.release();
            async move { storage.sync_data(FILE).await }
        });
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "x");
    }

    #[test]
    fn a_write_in_flight_may_survive_a_cut_in_part() {
        let disk = disk(3, 1024);
        let mut driver = Driver::new(3, &disk);
        let storage = disk.storage();
        disk.cut_at(CutPoint::During(1));
        driver.spawn(async move { storage.write(FILE, 0, bytes(b'x', 1024)).await });
        assert_eq!(driver.run(), Outcome::PowerCut);
        let found: BTreeSet<String> = (0..100)
            .map(|seed| left(&disk, seed, CutMode::Random))
            .collect();
        assert_eq!(
            found,
            BTreeSet::from(["oo", "ox", "xo", "xx"].map(String::from))
        );
    }

    #[test]
    fn reads_race_with_writes_sector_by_sector() {
        let mut found = BTreeSet::new();
        for seed in 0..200 {
            let disk = disk(seed, 1024);
            let mut driver = Driver::new(seed, &disk);
            let (writer, reader) = (disk.storage(), disk.storage());
            driver.spawn(async move { writer.write(FILE, 0, bytes(b'x', 1024)).await.unwrap() });
            let read = driver.spawn(async move {
                let buf = AlignedBuf::zeroed(1024);
                reader.read_buf(FILE, 0, buf).await.1
            });
            assert_eq!(driver.run(), Outcome::Done);
            let buf = read.take().unwrap();
            found.insert([buf[0], buf[512]]);
            assert_eq!(disk.contents(FILE), vec![b'x'; 1024]);
        }
        assert_eq!(found, BTreeSet::from([*b"oo", *b"ox", *b"xo", *b"xx"]));
    }

    #[test]
    fn the_length_is_volatile_too() {
        let disk = immediate(512);
        let storage = disk.storage();
        block_on(storage.set_len(FILE, 1536)).unwrap();
        write(&disk, 1536, b'x', 512);
        assert_eq!(storage.len(FILE).unwrap(), 2048);
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o");
        assert_eq!(left(&disk, 1, CutMode::AllUnflushed), "o\0\0x");
        sync(&disk).unwrap();
        assert_eq!(left(&disk, 1, CutMode::NothingUnflushed), "o\0\0x");
        block_on(storage.set_len(FILE, 100)).unwrap();
        block_on(storage.set_len(FILE, 600)).unwrap();
        let contents = disk.contents(FILE);
        assert!(contents[..100].iter().all(|&byte| byte == b'o'));
        assert!(contents[100..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_cut_comes_where_it_was_set() {
        for (point, expected) in [
            (CutPoint::Before(2), "xo"),
            (CutPoint::After(1), "xo"),
            (CutPoint::During(2), "xy"),
            (CutPoint::After(2), "xy"),
        ] {
            let disk = disk(1, 1024);
            let mut driver = Driver::new(1, &disk);
            let storage = disk.storage();
            disk.cut_at(point);
            driver.spawn(async move {
                storage.write(FILE, 0, bytes(b'x', 512)).await.unwrap();
                storage.read(FILE, 0, bytes(0, 512)).await.unwrap();
                storage.write(FILE, 512, bytes(b'y', 512)).await.unwrap();
            });
            assert_eq!(driver.run(), Outcome::PowerCut, "{point:?}");
            assert_eq!(left(&disk, 1, CutMode::AllUnflushed), expected, "{point:?}");
        }
    }

    #[test]
    fn the_nth_operation_fails() {
        let disk = immediate(4096);
        disk.fail_nth_of(OpKind::Write, 2, libc::EIO);
        write(&disk, 0, b'x', 512);
        let storage = disk.storage();
        let error = block_on(storage.write(FILE, 512, bytes(b'x', 3584))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        write(&disk, 512, b'x', 512);
        disk.inject(Fault {
            kind: None,
            from: 2,
            count: u64::MAX,
            errno: libc::ENOSPC,
        });
        sync(&disk).unwrap();
        assert_eq!(sync(&disk).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert!(block_on(storage.read(FILE, 0, bytes(0, 512))).is_err());
        disk.clear_faults();
        sync(&disk).unwrap();
        assert_eq!(
            (disk.writes(), disk.syncs(), disk.reads(), disk.ops()),
            (3, 3, 1, 7)
        );
        assert_eq!(disk.changes(), 6);
    }

    #[test]
    fn what_a_failed_sync_lost_no_later_sync_brings_back() {
        let mut found = BTreeSet::new();
        for seed in 0..50 {
            let disk = disk(seed, 1024);
            disk.set_immediate(true);
            write(&disk, 0, b'x', 1024);
            disk.fail_nth_of(OpKind::Sync, 1, libc::EIO);
            sync(&disk).unwrap_err();
            sync(&disk).unwrap();
            assert_eq!(disk.contents(FILE), vec![b'x'; 1024]);
            found.insert(left(&disk, seed, CutMode::AllUnflushed));
        }
        assert_eq!(
            found,
            BTreeSet::from(["oo", "ox", "xo", "xx"].map(String::from))
        );
    }

    #[test]
    fn no_room_is_enospc() {
        let disk = immediate(1024);
        let storage = disk.storage();
        let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        disk.set_capacity(1536);
        block_on(storage.set_len(FILE, 4096)).unwrap();
        write(&disk, 2048, b'x', 512);
        let more = block_on(storage.write(FILE, 3072, bytes(b'x', 512)));
        assert_eq!(errno(more), Some(libc::ENOSPC));
        write(&disk, 2048, b'y', 512);
        assert!(block_on(storage.punch_hole(FILE, 0, 512)).unwrap());
        write(&disk, 3072, b'x', 512);
        assert_eq!(disk.allocated(), 1536);
        let options = SimFileOptions {
            can_grow: false,
            can_punch: false,
            ..Default::default()
        };
        disk.set_options(FILE, options);
        let past = block_on(storage.write(FILE, 4096, bytes(b'x', 512)));
        assert_eq!(errno(past), Some(libc::ENOSPC));
        assert!(block_on(storage.set_len(FILE, 8192)).is_err());
        assert!(!block_on(storage.punch_hole(FILE, 2048, 512)).unwrap());
        assert_eq!(disk.contents(FILE)[2048], b'y');
    }

    #[test]
    fn one_seed_gives_one_run() {
        let run = |seed: u64| {
            let disk = disk(seed, 8192);
            let mut driver = Driver::new(seed, &disk);
            for task in 0..4_u8 {
                let storage = disk.storage();
                driver.spawn(async move {
                    for round in 0..5 {
                        let byte = b'a' + task * 5 + round;
                        storage.write(FILE, 100, bytes(byte, 3000)).await.unwrap();
                        yield_now().await;
                        storage.sync_data(FILE).await.unwrap();
                    }
                });
            }
            assert_eq!(driver.run(), Outcome::Done);
            let after = disk.power_cut(&mut Rng::with_seed(seed), CutMode::Random);
            (disk.contents(FILE), after.contents(FILE), disk.trace())
        };
        assert!(run(7) == run(7));
        assert!(run(7) != run(8));
    }

    #[test]
    fn a_dropped_future_keeps_its_memory_until_the_operation_is_over() {
        let disk = disk(1, 512);
        let owner = Rc::new(());
        let mut sg = bytes(b'x', 512);
        sg.keep(Rc::<()>::clone(&owner));
        {
            let storage = disk.storage();
            let mut future = std::pin::pin!(storage.write(FILE, 0, sg));
            let mut context = Context::from_waker(Waker::noop());
            assert!(future.as_mut().poll(&mut context).is_pending());
        }
        assert_eq!(Rc::strong_count(&owner), 2);
        assert_eq!(Driver::new(1, &disk).drain(), Outcome::Done);
        assert_eq!(Rc::strong_count(&owner), 1);
        assert_eq!(disk.contents(FILE), vec![b'x'; 512]);
    }
}
