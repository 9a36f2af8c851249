//! The [`Storage`] contract over real host files: everything that is the same whether the thread
//! blocks or has an io_uring.
//!
//! Owns the care that the kernel's calls need: short transfers, bytes past the end, EINTR, bounce
//! buffers and read-change-write for direct I/O, and the fallbacks of `fallocate`. The calls
//! themselves are a [`RawIo`]: [`BlockingIo`] here, the ring in `ring.rs`.
//!
//! Who waits for whom on a direct file (a buffered one has no such rules):
//! - A write that covers host blocks only in part reads the block, changes it and writes it back
//!   under the file's range lock for those blocks, so two of them never undo each other.
//! - With host blocks of at most 512 bytes no other write shares a block with it (data and metadata
//!   come in 512-byte sectors at least), so aligned writes take no lock. With larger blocks every
//!   write, punch and write-zeroes takes it.
//! - The pages of an odd end of file ([`HostFile`]'s tail) are written through the page cache, under
//!   the lock, and by nobody else.
//!
//! An operation takes one range at most, and lends the guard to the kernel together with its
//! memory: dropping the future does not give the range back early.
//!
//! A direct write that makes a file grow, or that hits an odd end made by `set_len`, may leave the
//! file longer than asked by less than a host block of zeroes. A tail found at open keeps its exact
//! length.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;

use super::buffer::{AlignedBuf, BufOwner, SgList};
use super::file::{self, Direction, Feature, HostFile, HostFileKind, is_unsupported};
use super::{FileId, Storage};

/// Misaligned transfers are bounced in pieces of this size; a multiple of every host block.
const BOUNCE_LEN_MAX: u64 = 1 << 20;

/// EAGAIN on a file means "no resources just now" and passes; so many in a row do not.
const EAGAIN_MAX: u32 = 10_000;

/// Which descriptor of which file.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub(crate) id: FileId,
    pub(crate) file: &'a Arc<HostFile>,
    /// The second descriptor, through the page cache.
    pub(crate) buffered: bool,
}

impl Target<'_> {
    pub(crate) fn fd(&self) -> RawFd {
        match self.file.buffered_fd() {
            Some(fd) if self.buffered => fd,
            _ => self.file.fd(),
        }
    }
}

/// What the kernel offers, one call each: may be short, may fail with EINTR. Public in name only,
/// this module is private.
pub trait RawIo: 'static {
    /// The file behind an id.
    fn file(&self, id: FileId) -> io::Result<Arc<HostFile>>;
    /// One vectored read or write; gives the bytes done.
    fn transfer(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: SgList,
    ) -> impl Future<Output = io::Result<usize>>;
    /// One `fallocate`; `keep` is held until the kernel is done.
    fn fallocate(
        &self,
        target: Target<'_>,
        mode: i32,
        offset: u64,
        len: u64,
        keep: Option<Rc<dyn Any>>,
    ) -> impl Future<Output = io::Result<()>>;
    /// One `fdatasync`.
    fn fdatasync(&self, target: Target<'_>) -> impl Future<Output = io::Result<()>>;
    /// One `ftruncate`.
    fn ftruncate(&self, target: Target<'_>, len: u64) -> impl Future<Output = io::Result<()>>;
}

/// Storage on host files by way of the calls of `R`. Clones share the file table.
pub struct HostStorage<R> {
    raw: Rc<R>,
}

impl<R> Clone for HostStorage<R> {
    fn clone(&self) -> Self {
        HostStorage {
            raw: Rc::clone(&self.raw),
        }
    }
}

/// Storage by blocking system calls: its futures are ready at once. For opening and for tools.
pub type BlockingStorage = HostStorage<BlockingIo>;

/// What [`BlockingStorage`] is made of.
pub struct BlockingIo {
    files: RefCell<Vec<Arc<HostFile>>>,
}

impl BlockingStorage {
    /// Storage over `files`; their ids are their indices.
    #[must_use]
    pub fn new(files: Vec<Arc<HostFile>>) -> BlockingStorage {
        HostStorage::over(BlockingIo {
            files: RefCell::new(files),
        })
    }

    /// Adds a file to the table.
    ///
    /// # Errors
    /// If the table is full.
    pub fn add_file(&self, file: Arc<HostFile>) -> io::Result<FileId> {
        let mut files = self.raw.files.borrow_mut();
        let id = u16::try_from(files.len()).map_err(io::Error::other)?;
        files.push(file);
        Ok(FileId(id))
    }
}

impl<R: RawIo> HostStorage<R> {
    pub(crate) fn over(raw: R) -> HostStorage<R> {
        HostStorage { raw: Rc::new(raw) }
    }

    pub(crate) fn raw(&self) -> &R {
        &self.raw
    }

    /// The file behind an id, if there is one.
    #[must_use]
    pub fn file(&self, id: FileId) -> Option<Arc<HostFile>> {
        self.raw.file(id).ok()
    }

    /// Transfers all of `sg` as it is. A read that meets the end of the file zeroes the rest.
    async fn transfer_all(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: &SgList,
    ) -> io::Result<()> {
        let align = if target.buffered {
            1
        } else {
            target.file.offset_align()
        };
        let (mut done, mut refused) = (0, 0);
        while done < sg.len() {
            let rest = sg.slice(done, sg.len() - done);
            let at = offset.checked_add(done).ok_or_else(beyond_offsets)?;
            let count = match self.raw.transfer(direction, target, at, rest).await {
                Ok(count) => count as u64,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error)
                    if error.raw_os_error() == Some(libc::EAGAIN) && refused < EAGAIN_MAX =>
                {
                    refused += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            refused = 0;
            match direction {
                // A direct read ends inside of a block only at the end of the file, and could not
                // be continued from there.
                Direction::Read if count == 0 || !count.is_multiple_of(align) => {
                    let end = done + count;
                    sg.fill_zero(end, sg.len() - end);
                    return Ok(());
                }
                // Whole blocks only: the rest of the last one is written again.
                Direction::Write if count < align => {
                    let text = "the host wrote less than a block of what it was given";
                    return Err(io::Error::new(io::ErrorKind::WriteZero, text));
                }
                Direction::Read | Direction::Write => done += count - count % align,
            }
        }
        Ok(())
    }

    /// A direct transfer of whatever alignment; the caller holds the range where one is needed, and
    /// `keep` is its guard.
    async fn transfer_direct(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: &SgList,
        keep: Option<&Rc<dyn Any>>,
    ) -> io::Result<()> {
        if is_aligned(target.file, offset, sg) {
            return self
                .transfer_all(direction, target, offset, &kept(sg.clone(), keep))
                .await;
        }
        let align = target.file.offset_align();
        let end = offset.checked_add(sg.len()).ok_or_else(beyond_offsets)?;
        let mut at = offset;
        while at < end {
            let start = at - at % align;
            let piece_end = end.min(start.saturating_add(BOUNCE_LEN_MAX));
            let stop = piece_end
                .checked_next_multiple_of(align)
                .ok_or_else(beyond_offsets)?;
            let len = stop - start;
            let mut bounce = SgList::from_buf(AlignedBuf::zeroed(buffer_len(len)?));
            bounce = kept(bounce, keep);
            let data = sg.slice(at - offset, piece_end - at);
            match direction {
                Direction::Read => {
                    self.transfer_all(Direction::Read, target, start, &bounce)
                        .await?;
                    copy(&bounce.slice(at - start, data.len()), &data);
                }
                Direction::Write => {
                    let last = stop - align;
                    if at != start {
                        let block = bounce.slice(0, align);
                        self.transfer_all(Direction::Read, target, start, &block)
                            .await?;
                    }
                    if piece_end != stop && (last != start || at == start) {
                        let block = bounce.slice(last - start, align);
                        self.transfer_all(Direction::Read, target, last, &block)
                            .await?;
                    }
                    copy(&data, &bounce.slice(at - start, data.len()));
                    self.transfer_all(Direction::Write, target, start, &bounce)
                        .await?;
                }
            }
            at = piece_end;
        }
        Ok(())
    }

    /// Writes what may be part inside and part outside of the tail; the range is held if needed.
    async fn write_held(
        &self,
        target: Target<'_>,
        offset: u64,
        sg: &SgList,
        keep: Option<&Rc<dyn Any>>,
    ) -> io::Result<()> {
        let file = target.file;
        if !file.mode().direct {
            return self
                .transfer_all(Direction::Write, target, offset, &kept(sg.clone(), keep))
                .await;
        }
        let end = offset.checked_add(sg.len()).ok_or_else(beyond_offsets)?;
        if !file.touches_tail(offset, end) {
            return self
                .transfer_direct(Direction::Write, target, offset, sg, keep)
                .await;
        }
        let tail = file.tail();
        let (from, to) = (offset.max(tail.start), end.min(tail.end));
        if offset < from {
            let head = sg.slice(0, from - offset);
            self.transfer_direct(Direction::Write, target, offset, &head, keep)
                .await?;
        }
        let middle = kept(sg.slice(from - offset, to - from), keep);
        let through_cache = Target {
            buffered: true,
            ..target
        };
        self.transfer_all(Direction::Write, through_cache, from, &middle)
            .await?;
        if to < end {
            let rest = sg.slice(to - offset, end - to);
            self.transfer_direct(Direction::Write, target, to, &rest, keep)
                .await?;
        }
        Ok(())
    }

    /// Takes the range lock for a change of `offset..end`, if this file and range need it.
    async fn lock_range(
        &self,
        file: &HostFile,
        offset: u64,
        end: u64,
    ) -> io::Result<Option<Rc<dyn Any>>> {
        let align = file.offset_align();
        let aligned = (offset | end).is_multiple_of(align);
        if !file.mode().direct || (align <= 512 && aligned && !file.touches_tail(offset, end)) {
            return Ok(None);
        }
        let stop = end
            .checked_next_multiple_of(align)
            .ok_or_else(beyond_offsets)?;
        Ok(Some(Rc::new(
            file.ranges().lock(offset - offset % align, stop).await,
        )))
    }

    /// `fallocate` with `mode`, if the host can: `Ok(false)` if not (remembered), with nothing done.
    async fn try_fallocate(
        &self,
        target: Target<'_>,
        feature: Feature,
        range: (u64, u64),
        keep: Option<&Rc<dyn Any>>,
    ) -> io::Result<bool> {
        if target.file.lacks(feature) {
            return Ok(false);
        }
        let mode = libc::FALLOC_FL_KEEP_SIZE
            | match feature {
                Feature::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
                Feature::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            };
        loop {
            let (start, end) = range;
            match self
                .raw
                .fallocate(target, mode, start, end - start, keep.cloned())
                .await
            {
                Ok(()) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if is_unsupported(&error) => {
                    target.file.note_missing(feature);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes a range read as zeroes by the first of `features` that the host has. `Ok(false)`: it has
    /// none of them, nothing was done.
    async fn deallocate(
        &self,
        target: Target<'_>,
        (start, end): (u64, u64),
        features: &[Feature],
    ) -> io::Result<bool> {
        let guard = self.lock_range(target.file, start, end).await?;
        let keep = guard.as_ref();
        // A block device takes whole blocks only; the edges are written.
        let block = target.file.block_size();
        let inner = (start.next_multiple_of(block), end - end % block);
        if inner.0 >= inner.1 {
            self.write_zeroes_held(target, (start, end), keep).await?;
            return Ok(true);
        }
        let mut done = false;
        for &feature in features {
            done = done || self.try_fallocate(target, feature, inner, keep).await?;
        }
        if done {
            self.write_zeroes_held(target, (start, inner.0), keep)
                .await?;
            self.write_zeroes_held(target, (inner.1, end), keep).await?;
        }
        Ok(done)
    }

    /// Writes zeroes, in pieces that one system call takes.
    async fn write_zeroes_held(
        &self,
        target: Target<'_>,
        (start, end): (u64, u64),
        keep: Option<&Rc<dyn Any>>,
    ) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let stop = end.min(at - at % BOUNCE_LEN_MAX + BOUNCE_LEN_MAX);
            self.write_held(target, at, &SgList::zeroes(stop - at), keep)
                .await?;
            at = stop;
        }
        Ok(())
    }
}

impl<R: RawIo> Storage for HostStorage<R> {
    async fn read(&self, id: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        assert!(sg.is_writable(), "read into the shared zero bytes");
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        self.transfer_direct(Direction::Read, target, offset, &sg, None)
            .await
    }

    async fn read_buf(
        &self,
        id: FileId,
        offset: u64,
        buf: AlignedBuf,
    ) -> (io::Result<()>, AlignedBuf) {
        let len = buf.len();
        let owner = BufOwner::new(buf);
        let result = self.read(id, offset, owner.sg(len)).await;
        match owner.into_buf() {
            Some(buf) => (result, buf),
            // The operation is over, so no list should be left. Were one, the caller must not get
            // memory that the kernel may still write to.
            None => (
                Err(io::Error::other("a finished read kept its buffer")),
                AlignedBuf::zeroed(len),
            ),
        }
    }

    async fn write(&self, id: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        let end = offset.checked_add(sg.len()).ok_or_else(beyond_offsets)?;
        let guard = self.lock_range(&file, offset, end).await?;
        self.write_held(target, offset, &sg, guard.as_ref()).await
    }

    async fn write_zeroes(&self, id: FileId, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        let Some(range) = inside(&file, offset, len)? else {
            return Ok(());
        };
        let features: &[Feature] = if unmap {
            &[Feature::PunchHole, Feature::ZeroRange]
        } else {
            &[Feature::ZeroRange]
        };
        if self.deallocate(target, range, features).await? {
            return Ok(());
        }
        let guard = self.lock_range(&file, range.0, range.1).await?;
        self.write_zeroes_held(target, range, guard.as_ref()).await
    }

    async fn punch_hole(&self, id: FileId, offset: u64, len: u64) -> io::Result<bool> {
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        let Some(range) = inside(&file, offset, len)? else {
            return Ok(true);
        };
        self.deallocate(target, range, &[Feature::PunchHole]).await
    }

    async fn sync_data(&self, id: FileId) -> io::Result<()> {
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        loop {
            match self.raw.fdatasync(target).await {
                // The kernel gave up waiting before it looked for errors: nothing was lost.
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                result => return result,
            }
        }
    }

    async fn reserve(&self, id: FileId, offset: u64, len: u64) {
        let Ok(file) = self.raw.file(id) else { return };
        // In memory a reservation would be pages of zeroes, made at once.
        if file.kind() != HostFileKind::Regular || file.is_in_memory() {
            return;
        }
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        let mode = libc::FALLOC_FL_KEEP_SIZE;
        if let Err(error) = self.raw.fallocate(target, mode, offset, len, None).await {
            log::debug!("cannot reserve {len:#x} bytes at {offset:#x}: {error}");
        }
    }

    async fn set_len(&self, id: FileId, len: u64) -> io::Result<()> {
        let file = self.raw.file(id)?;
        let target = Target {
            id,
            file: &file,
            buffered: false,
        };
        if file.kind() != HostFileKind::Regular {
            let text = "a block device cannot change its size";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        loop {
            match self.raw.ftruncate(target, len).await {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                result => return result,
            }
        }
    }

    fn len(&self, id: FileId) -> io::Result<u64> {
        self.raw.file(id)?.len()
    }

    fn can_grow(&self, id: FileId) -> bool {
        self.raw
            .file(id)
            .is_ok_and(|file| file.kind() == HostFileKind::Regular)
    }
}

pub(crate) fn no_such_file(id: FileId) -> io::Error {
    io::Error::other(format!("no file {} in the table", id.0))
}

/// The part of a range that the file has: past its end everything reads as zeroes.
fn inside(file: &HostFile, offset: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    let end = offset
        .checked_add(len)
        .ok_or_else(beyond_offsets)?
        .min(file.len()?);
    Ok((offset < end).then_some((offset, end)))
}

fn beyond_offsets() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

fn buffer_len(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}

fn kept(mut sg: SgList, keep: Option<&Rc<dyn Any>>) -> SgList {
    if let Some(keep) = keep {
        sg.keep(Rc::clone(keep));
    }
    sg
}

/// Whether the host takes this as it is. Unlike [`HostFile::direct_ok`] it is not about locks.
fn is_aligned(file: &HostFile, offset: u64, sg: &SgList) -> bool {
    if !file.mode().direct {
        return true;
    }
    let (lens, bases) = sg.iovecs().fold((offset, 0), |(lens, bases), iov| {
        (
            lens | iov.iov_len as u64,
            bases | iov.iov_base.addr() as u64,
        )
    });
    lens.is_multiple_of(file.offset_align()) && bases.is_multiple_of(file.mem_align())
}

/// Copies between two lists of one length, by way of a small piece.
fn copy(from: &SgList, to: &SgList) {
    let mut piece = [0; 4096];
    let mut at = 0;
    while at < from.len() {
        let rest =
            usize::try_from(from.len() - at).map_or(piece.len(), |rest| rest.min(piece.len()));
        from.copy_to(at, &mut piece[..rest]);
        to.copy_from(at, &piece[..rest]);
        at += rest as u64;
    }
}

impl RawIo for BlockingIo {
    fn file(&self, id: FileId) -> io::Result<Arc<HostFile>> {
        self.files
            .borrow()
            .get(usize::from(id.0))
            .cloned()
            .ok_or_else(|| no_such_file(id))
    }

    async fn transfer(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: SgList,
    ) -> io::Result<usize> {
        file::transfer(direction, target.fd(), offset, &sg)
    }

    async fn fallocate(
        &self,
        target: Target<'_>,
        mode: i32,
        offset: u64,
        len: u64,
        _keep: Option<Rc<dyn Any>>,
    ) -> io::Result<()> {
        file::fallocate(target.fd(), mode, offset, len)
    }

    async fn fdatasync(&self, target: Target<'_>) -> io::Result<()> {
        target.file.as_file().sync_data()
    }

    async fn ftruncate(&self, target: Target<'_>, len: u64) -> io::Result<()> {
        target.file.as_file().set_len(len)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::storage::{OpenMode, block_on};
    use std::path::{Path, PathBuf};
    use tempfile::TempDir;

    /// A scratch directory on a disk (O_DIRECT is meant there) and one on tmpfs.
    pub(crate) fn places() -> Vec<TempDir> {
        // Beside the test's program: the folder for temporary files may be in memory.
        let program = std::env::current_exe().unwrap();
        let on_disk = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let mut places = vec![on_disk];
        if Path::new("/dev/shm").is_dir() {
            places.push(tempfile::tempdir_in("/dev/shm").unwrap());
        }
        places
    }

    pub(crate) fn file_of(dir: &TempDir, bytes: &[u8]) -> PathBuf {
        let path = dir.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A pattern that differs from byte to byte and between seeds.
    pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| random.u8(1..)).collect()
    }

    /// The ways to open a file that must all behave alike: (direct, alignment asked for).
    pub(crate) const WAYS: [(bool, Option<u64>); 3] =
        [(false, None), (true, None), (true, Some(4096))];

    /// Opens for writing; `None` if the file system has no direct I/O.
    pub(crate) fn open_way(path: &Path, (direct, align): (bool, Option<u64>)) -> Option<HostFile> {
        let file = match HostFile::open(
            path,
            OpenMode {
                write: true,
                direct,
            },
        ) {
            Err(error) if direct && error.kind() == io::ErrorKind::Unsupported => return None,
            result => result.unwrap(),
        };
        Some(match align {
            Some(align) => file.with_alignment(align, align),
            None => file,
        })
    }

    /// A list of `bytes` in segments of odd sizes at odd addresses.
    pub(crate) fn crooked(bytes: &[u8]) -> SgList {
        let mut list = SgList::empty();
        for (nr, piece) in bytes.chunks(701).enumerate() {
            let shift = nr % 3;
            let mut buf = AlignedBuf::zeroed(piece.len() + shift);
            buf[shift..].copy_from_slice(piece);
            let end = buf.len();
            list.append(SgList::from_buf_range(buf, shift..end));
        }
        list
    }

    /// Random writes, zeroes, punches and reads of any alignment against a `Vec`, through `storage`.
    pub(crate) async fn agrees_with_a_vec<S: Storage>(storage: &S, mut model: Vec<u8>, seed: u64) {
        let id = FileId(0);
        let mut random = fastrand::Rng::with_seed(seed);
        for step in 0..60 {
            let start = random.usize(0..model.len());
            let sector = random.bool();
            let start = if sector { start & !511 } else { start };
            let mut len = random.usize(1..=(model.len() - start).min(20_000));
            if sector {
                len = (len & !511).max(512).min(model.len() - start);
            }
            let range = start..start + len;
            let (offset, len64) = (start as u64, len as u64);
            match random.u8(0..6) {
                0 => {
                    storage
                        .write_zeroes(id, offset, len64, random.bool())
                        .await
                        .unwrap();
                    model[range].fill(0);
                }
                1 => {
                    if storage.punch_hole(id, offset, len64).await.unwrap() {
                        model[range].fill(0);
                    }
                }
                2 | 3 => {
                    let bytes = pattern(len, step);
                    let sg = if random.bool() {
                        crooked(&bytes)
                    } else {
                        SgList::from_buf(AlignedBuf::from_slice(&bytes))
                    };
                    storage.write(id, offset, sg).await.unwrap();
                    model[range].copy_from_slice(&bytes);
                }
                _ => {
                    let sg = crooked(&vec![0xee; len]);
                    storage.read(id, offset, sg.clone()).await.unwrap();
                    assert!(
                        sg.to_vec() == model[range],
                        "step {step} of seed {seed}: read"
                    );
                }
            }
        }
        storage.sync_data(id).await.unwrap();
        let (result, all) = storage
            .read_buf(id, 0, AlignedBuf::zeroed(model.len()))
            .await;
        result.unwrap();
        assert!(all[..] == model[..], "seed {seed}: whole file");
    }

    fn storage(file: HostFile) -> BlockingStorage {
        BlockingStorage::new(vec![Arc::new(file)])
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
                    let storage = storage(file);
                    block_on(agrees_with_a_vec(&storage, pattern(len, seed), seed));
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
    fn bytes_past_the_end_read_as_zeroes() {
        for dir in places() {
            for way in WAYS {
                let path = file_of(&dir, &pattern(5000, 4));
                let Some(file) = open_way(&path, way) else {
                    continue;
                };
                let sg = SgList::from_buf(AlignedBuf::from_slice(&[0xee; 8192]));
                block_on(storage(file).read(FileId(0), 512, sg.clone())).unwrap();
                let mut expected = pattern(5000, 4)[512..].to_vec();
                expected.resize(8192, 0);
                assert!(sg.to_vec() == expected, "{way:?}");
            }
        }
    }

    #[test]
    fn zeroes_past_the_end_do_not_make_the_file_longer() {
        for dir in places() {
            for way in WAYS {
                let path = file_of(&dir, &pattern(8192, 5));
                let Some(file) = open_way(&path, way) else {
                    continue;
                };
                let storage = storage(file);
                block_on(storage.write_zeroes(FileId(0), 4096, 1 << 20, false)).unwrap();
                block_on(storage.write_zeroes(FileId(0), 1 << 30, 512, true)).unwrap();
                let found = std::fs::read(&path).unwrap();
                assert_eq!(found.len(), 8192);
                assert!(found[4096..].iter().all(|&byte| byte == 0));
                assert_eq!(found[..4096], pattern(8192, 5)[..4096]);
            }
        }
    }

    #[test]
    fn writes_past_the_end_make_the_file_grow() {
        for dir in places() {
            for way in WAYS {
                let path = file_of(&dir, &[]);
                let Some(file) = open_way(&path, way) else {
                    continue;
                };
                let storage = storage(file);
                block_on(storage.write(FileId(0), 8192, SgList::zeroes(3 << 20))).unwrap();
                block_on(storage.write(FileId(0), 100, crooked(&pattern(9000, 6)))).unwrap();
                let found = std::fs::read(&path).unwrap();
                assert_eq!(found.len(), 8192 + (3 << 20));
                assert!(found[100..9100] == pattern(9000, 6));
                assert!(found[9100..].iter().all(|&byte| byte == 0));
                block_on(storage.set_len(FileId(0), 4096)).unwrap();
                assert_eq!(storage.len(FileId(0)).unwrap(), 4096);
            }
        }
    }

    #[test]
    fn punching_gives_space_back() {
        use std::os::unix::fs::MetadataExt;
        let dir = &places()[0];
        let path = file_of(dir, &pattern(1 << 20, 7));
        let storage = storage(open_way(&path, (false, None)).unwrap());
        block_on(storage.sync_data(FileId(0))).unwrap();
        if block_on(storage.punch_hole(FileId(0), 0, 1 << 20)).unwrap() {
            block_on(storage.sync_data(FileId(0))).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0);
        }
    }

    /// With host blocks of 4096 bytes eight sectors share a block: eight threads write one each, by
    /// read-change-write, over and over. Were the lock missing, one would bring back old bytes of
    /// another.
    #[test]
    fn read_change_writes_of_one_block_lose_nothing() {
        let dir = &places()[0];
        let path = file_of(dir, &[0; 4096]);
        let Some(file) = open_way(&path, (true, Some(4096))) else {
            return;
        };
        let file = Arc::new(file);
        std::thread::scope(|scope| {
            for sector in 0..8_u8 {
                let file = Arc::clone(&file);
                scope.spawn(move || {
                    let storage = BlockingStorage::new(vec![file]);
                    for round in 1..=30_u8 {
                        let offset = u64::from(sector) * 512;
                        let bytes = [round; 512];
                        let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
                        block_on(storage.write(FileId(0), offset, sg)).unwrap();
                        let back = SgList::from_buf(AlignedBuf::zeroed(512));
                        block_on(storage.read(FileId(0), offset, back.clone())).unwrap();
                        assert_eq!(back.to_vec(), bytes, "sector {sector} lost round {round}");
                    }
                });
            }
        });
    }

    #[test]
    fn the_fast_path_takes_what_the_host_takes() {
        let dir = &places()[0];
        let path = file_of(dir, &pattern(200_000, 8));
        let Some(file) = open_way(&path, (true, Some(512))) else {
            return;
        };
        let buf = AlignedBuf::zeroed(8192);
        let base = buf.as_ptr().cast_mut();
        let iov = |shift: usize, len: usize| {
            [libc::iovec {
                iov_base: base.wrapping_add(shift).cast(),
                iov_len: len,
            }]
        };
        let (read, write) = (Direction::Read, Direction::Write);
        assert!(file.direct_ok(read, 512, &iov(0, 1024)));
        assert!(file.direct_ok(write, 512, &iov(512, 1024)));
        assert!(!file.direct_ok(read, 511, &iov(0, 1024)));
        assert!(!file.direct_ok(read, 512, &iov(0, 1000)));
        assert!(!file.direct_ok(read, 512, &iov(1, 1024)));
        // The end of the file is in the middle of a block: its pages are the slow path's.
        assert!(file.direct_ok(write, 196_608 - 512, &iov(0, 512)));
        assert!(!file.direct_ok(write, 196_608, &iov(0, 512)));
        assert!(file.direct_ok(read, 196_608, &iov(0, 512)));
        let large = open_way(&path, (true, Some(4096))).unwrap();
        assert!(large.direct_ok(read, 4096, &iov(0, 4096)));
        assert!(!large.direct_ok(write, 4096, &iov(0, 4096)));
        let buffered = open_way(&path, (false, None)).unwrap();
        assert!(buffered.direct_ok(write, 3, &iov(1, 7)));
    }

    #[test]
    fn a_huge_offset_is_an_error_and_no_panic() {
        let dir = &places()[0];
        let path = file_of(dir, &[1; 512]);
        let storage = storage(open_way(&path, (false, None)).unwrap());
        let sg = || SgList::from_buf(AlignedBuf::zeroed(512));
        for offset in [u64::MAX, u64::MAX - 511, 1 << 63] {
            assert!(block_on(storage.write(FileId(0), offset, sg())).is_err());
            assert!(block_on(storage.read(FileId(0), offset, sg())).is_err());
        }
        assert!(block_on(storage.write_zeroes(FileId(0), u64::MAX, 2, true)).is_err());
        assert!(block_on(storage.read(FileId(9), 0, sg())).is_err());
    }

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap();
        assert!(made.success());
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let refusal = |path: &Path| {
            let error = HostFile::open(
                path,
                OpenMode {
                    write: true,
                    direct: false,
                },
            )
            .unwrap_err();
            error.to_string()
        };
        assert!(refusal(&fifo).starts_with("it is a FIFO"));
        assert!(refusal(&socket).starts_with("it is a socket"));
        assert!(refusal(dir.path()).starts_with("it is a directory"));
        assert!(refusal(Path::new("/dev/null")).starts_with("it is a character device"));
    }

    /// A loop device with blocks of 4096 bytes, gone with the value.
    struct LoopDevice(PathBuf);

    impl LoopDevice {
        fn new(file: &Path) -> Option<LoopDevice> {
            use std::io::Write;
            let mut losetup = std::process::Command::new("losetup");
            losetup
                .args(["--find", "--show", "--sector-size", "4096"])
                .arg(file);
            match losetup.output() {
                Ok(output) if output.status.success() => {
                    let name = String::from_utf8(output.stdout).unwrap();
                    Some(LoopDevice(PathBuf::from(name.trim())))
                }
                _ => {
                    let text = "SKIPPED: no loop device can be made, block devices are not tested";
                    writeln!(io::stderr(), "{text}").unwrap();
                    None
                }
            }
        }
    }

    impl Drop for LoopDevice {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup")
                .arg("-d")
                .arg(&self.0)
                .status();
        }
    }

    #[test]
    fn a_block_device_with_large_blocks_agrees_with_a_vec() {
        let dir = &places()[0];
        let Some(device) = LoopDevice::new(&file_of(dir, &pattern(98_304, 1))) else {
            return;
        };
        let mut model = pattern(98_304, 1);
        for direct in [false, true] {
            let file = HostFile::open(
                &device.0,
                OpenMode {
                    write: true,
                    direct,
                },
            )
            .unwrap();
            assert_eq!(file.kind(), HostFileKind::BlockDevice);
            assert_eq!(file.offset_align(), if direct { 4096 } else { 1 });
            let storage = storage(file);
            assert_eq!(storage.len(FileId(0)).unwrap(), 98_304);
            assert!(!storage.can_grow(FileId(0)));
            assert!(block_on(storage.set_len(FileId(0), 4096)).is_err());
            block_on(agrees_with_a_vec(&storage, model, 1));
            let (result, now) =
                block_on(storage.read_buf(FileId(0), 0, AlignedBuf::zeroed(98_304)));
            result.unwrap();
            model = now.to_vec();
            let past = SgList::from_buf(AlignedBuf::zeroed(4096));
            let error = block_on(storage.write(FileId(0), 98_304, past)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        }
    }
}
