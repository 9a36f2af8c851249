//! [`Storage`](crate::storage::Storage) on a ring: the calls of the slow path.

use std::any::Any;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};

use super::Ring;
use super::operation::{Request, RingOp};
use crate::storage::file::{Direction, HostFile, transfer};
use crate::storage::host::{HostStorage, RawIo, Target, no_such_file};
use crate::storage::{FileId, SgList};

/// Storage on a [`Ring`]. Clones share ring and file table.
pub type RingStorage = HostStorage<RingIo>;

/// What [`RingStorage`] is made of.
pub struct RingIo {
    ring: Ring,
}

impl RingStorage {
    /// Storage over `files`; their ids are their indices. One to a ring.
    ///
    /// # Errors
    /// If there are more files than ids.
    pub fn new(ring: Ring, files: Vec<Arc<HostFile>>) -> io::Result<RingStorage> {
        for file in files {
            ring.core.borrow_mut().add_file(file)?;
        }
        Ok(HostStorage::over(RingIo { ring }))
    }

    /// Storage over other files on a ring that has served: the files of the storage before are
    /// forgotten, and it must not be used any more.
    ///
    /// # Panics
    /// If an operation is queued or in flight, since it may name a file by its place in the table;
    /// or if there are more files than ids.
    #[must_use]
    pub fn replace(ring: Ring, files: Vec<Arc<HostFile>>) -> RingStorage {
        assert_eq!(ring.io_in_flight(), 0, "files are replaced under I/O");
        ring.core.borrow_mut().forget_files();
        for file in files {
            assert!(
                ring.core.borrow_mut().add_file(file).is_ok(),
                "more files than ids"
            );
        }
        HostStorage::over(RingIo { ring })
    }

    /// Adds a file to the table.
    ///
    /// # Errors
    /// If the table is full.
    pub fn add_file(&self, file: Arc<HostFile>) -> io::Result<FileId> {
        self.raw().ring.core.borrow_mut().add_file(file)
    }

    /// The ring it works on.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.raw().ring
    }
}

impl RingIo {
    async fn other(&self, entry: Entry, keep: Option<Rc<dyn Any>>) -> io::Result<()> {
        RingOp::new(&self.ring, Request::Other { entry, keep })
            .await
            .map(drop)
    }
}

impl RawIo for RingIo {
    fn file(&self, id: FileId) -> io::Result<Arc<HostFile>> {
        let core = self.ring.core.borrow();
        let file = core.files.get(id).map(|entry| Arc::clone(&entry.file));
        file.ok_or_else(|| no_such_file(id))
    }

    async fn transfer(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: SgList,
    ) -> io::Result<usize> {
        // io_uring takes an offset of all ones as "the file's own position".
        if i64::try_from(offset).is_err() {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        if target.file.is_in_memory() {
            // Once around the caller's loop first: many copies at once would keep all else waiting.
            self.other(opcode::Nop::new().build(), None).await?;
            return transfer(direction, target.fd(), offset, &sg);
        }
        let Target { id, buffered, .. } = target;
        let request = Request::Transfer {
            direction,
            id,
            buffered,
            offset,
            sg,
        };
        let count = RingOp::new(&self.ring, request).await?;
        usize::try_from(count).map_err(io::Error::other)
    }

    async fn fallocate(
        &self,
        target: Target<'_>,
        mode: i32,
        offset: u64,
        len: u64,
        keep: Option<Rc<dyn Any>>,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(Fd(target.fd()), len)
            .offset(offset)
            .mode(mode)
            .build();
        self.other(entry, keep).await
    }

    async fn fdatasync(&self, target: Target<'_>) -> io::Result<()> {
        if target.file.is_in_memory() {
            // The kernel never waits there; its worker threads would.
            return target.file.as_file().sync_data();
        }
        let entry = opcode::Fsync::new(Fd(target.fd()))
            .flags(FsyncFlags::DATASYNC)
            .build();
        self.other(entry, None).await
    }

    async fn ftruncate(&self, target: Target<'_>, len: u64) -> io::Result<()> {
        if !self.ring.core.borrow().can_truncate {
            return target.file.as_file().set_len(len);
        }
        self.other(opcode::Ftruncate::new(Fd(target.fd()), len).build(), None)
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Poll;

    use super::*;
    use crate::storage::file::IOV_MAX;
    use crate::storage::host::tests::{
        WAYS, agrees_with_a_vec, crooked, file_of, open_way, pattern, places,
    };
    use crate::storage::{AlignedBuf, OpenMode, Storage};

    fn ring() -> Ring {
        Ring::new(64).unwrap()
    }

    #[test]
    fn any_alignment_agrees_with_a_vec() {
        for dir in places() {
            for way in WAYS {
                for (seed, len) in [(1, 65_536), (2, 100_001), (3, 70_144)] {
                    let path = file_of(&dir, &pattern(len, seed));
                    let Some(file) = open_way(&path, way) else {
                        continue;
                    };
                    let ring = ring();
                    let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
                    ring.run(agrees_with_a_vec(&storage, pattern(len, seed), seed));
                    assert_eq!(ring.in_flight(), 0);
                    let on_disk = std::fs::metadata(&path).unwrap().len();
                    assert_eq!(
                        on_disk, len as u64,
                        "{way:?}: the length of the file changed"
                    );
                }
            }
        }
    }

    #[test]
    fn a_list_of_many_segments_is_transferred_whole() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &[]), (false, None)).unwrap();
        let ring = ring();
        let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let bytes = pattern(701 * (2 * IOV_MAX + 5), 9);
        ring.run(storage.write(FileId(0), 77, crooked(&bytes)))
            .unwrap();
        let back = crooked(&vec![0; bytes.len()]);
        ring.run(storage.read(FileId(0), 77, back.clone())).unwrap();
        assert!(back.to_vec() == bytes);
        ring.run(storage.set_len(FileId(0), 1000)).unwrap();
        assert_eq!(storage.len(FileId(0)).unwrap(), 1000);
    }

    #[test]
    fn more_slow_operations_than_slots_all_complete() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &[]), (false, None)).unwrap();
        let ring = Ring::new(16).unwrap();
        let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let mut writes: Vec<Pin<Box<dyn Future<Output = io::Result<()>>>>> = Vec::new();
        for nr in 0..100_u64 {
            let storage = storage.clone();
            let sg = SgList::from_buf(AlignedBuf::from_slice(&pattern(512, nr)));
            writes.push(Box::pin(async move {
                storage.write(FileId(0), nr * 512, sg).await
            }));
        }
        // Some give up while they wait: their turn goes to others.
        let given_up = ring.run(std::future::poll_fn(|context| {
            for write in &mut writes {
                assert!(write.as_mut().poll(context).is_pending());
            }
            Poll::Ready(writes.split_off(90))
        }));
        drop(given_up);
        for write in writes {
            ring.run(write).unwrap();
        }
        let bytes = storage.file(FileId(0)).unwrap();
        let mut found = vec![0; 90 * 512];
        std::os::unix::fs::FileExt::read_exact_at(bytes.as_file(), &mut found, 0).unwrap();
        let expected: Vec<u8> = (0..90).flat_map(|nr| pattern(512, nr)).collect();
        assert!(found == expected);
    }

    /// Two rings on two threads do read-change-writes of one host block; none is lost.
    #[test]
    fn read_change_writes_of_two_rings_lose_nothing() {
        let dir = &places()[0];
        let Some(file) = open_way(&file_of(dir, &[0; 4096]), (true, Some(4096))) else {
            return;
        };
        let file = Arc::new(file);
        std::thread::scope(|scope| {
            for sector in 0..2_u64 {
                let file = Arc::clone(&file);
                scope.spawn(move || {
                    let ring = ring();
                    let storage = RingStorage::new(ring.clone(), vec![file]).unwrap();
                    for round in 1..=50_u8 {
                        let sg = SgList::from_buf(AlignedBuf::from_slice(&[round; 512]));
                        ring.run(storage.write(FileId(0), sector * 512, sg))
                            .unwrap();
                        let back = SgList::from_buf(AlignedBuf::zeroed(512));
                        ring.run(storage.read(FileId(0), sector * 512, back.clone()))
                            .unwrap();
                        assert_eq!(back.to_vec(), [round; 512]);
                    }
                });
            }
        });
    }

    #[test]
    fn files_beyond_the_registered_table_work_too() {
        let dir = &places()[0];
        let path = file_of(dir, &pattern(512, 3));
        let ring = ring();
        let mode = OpenMode::default();
        let file = Arc::new(HostFile::open(&path, mode).unwrap());
        let storage = RingStorage::new(ring.clone(), vec![file; 70]).unwrap();
        let (result, buf) = ring.run(storage.read_buf(FileId(69), 0, AlignedBuf::zeroed(1024)));
        result.unwrap();
        assert!(buf[..512] == pattern(512, 3) && buf[512..] == [0; 512]);
        // Opened for reading only.
        assert!(
            ring.run(storage.write(FileId(69), 0, SgList::zeroes(1)))
                .is_err()
        );
    }
}
