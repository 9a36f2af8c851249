//! Memory that may be lent to the kernel: [`AlignedBuf`] and the scatter-gather list [`SgList`].
//!
//! Unsafe is needed here because an aligned heap block, memory of a guest, and a list of raw
//! segments have no safe representation: the kernel and the guest write to that memory behind the
//! compiler's back, so no `&[u8]` or `&mut [u8]` over a list's memory may ever exist. All other
//! modules handle such memory through these two types only.
//!
//! Ownership: an [`SgList`] is a list of raw segments together with reference-counted owners of the
//! memory behind them. Clones and slices share the owners, so that memory lives until the last list
//! that names it is gone. Neither type is shared between threads while it is in a list (`Rc`).
//! Access from outside is by copying only, with `ptr::copy`, and bounds are checked on the list, so
//! every safe method is sound for any argument. A guest that changes its memory during a copy gets
//! a mix of old and new bytes, and that is its own affair.

#![expect(
    unsafe_code,
    reason = "raw memory for the kernel; see the module's text"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{self, NonNull};
use std::rc::Rc;

use smallvec::SmallVec;

/// Alignment of every [`AlignedBuf`]: no host asks for more than a page.
pub const BUFFER_ALIGN: usize = 4096;

/// Size of the shared area of zero bytes that [`SgList::zeroes`] names again and again.
const ZERO_AREA_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct ZeroArea([u8; ZERO_AREA_LEN]);

/// In read-only memory: the kernel refuses to read a file into it (`EFAULT`).
static ZERO_AREA: ZeroArea = ZeroArea([0; ZERO_AREA_LEN]);

/// A heap buffer whose start is aligned for O_DIRECT; zeroed when made.
pub struct AlignedBuf {
    /// Start of `len` initialised bytes of this buffer alone; dangling (but aligned) if `len` is 0.
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer is the only owner of its memory (`ptr` is never copied out of it except into an
// `SgList`, which takes the buffer along and is itself not `Send`).
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes.
    ///
    /// # Panics
    /// If `len` exceeds `isize::MAX` less a page.
    #[must_use]
    pub fn zeroed(len: usize) -> AlignedBuf {
        if len == 0 {
            let ptr = NonNull::new(ptr::without_provenance_mut(BUFFER_ALIGN));
            return AlignedBuf {
                ptr: ptr.unwrap_or(NonNull::dangling()),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero, checked just above.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout)
        };
        AlignedBuf { ptr, len }
    }

    /// A buffer with a copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    fn layout(len: usize) -> Layout {
        match Layout::from_size_align(len, BUFFER_ALIGN) {
            Ok(layout) => layout,
            Err(_) => panic!("a buffer of {len} bytes cannot exist"),
        }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: `zeroed` allocated `ptr` with this layout, and only when `len` is not zero.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` starts `len` initialised bytes (field's invariant). A buffer inside an
        // `SgList` is never dereferenced: `BufOwner` keeps it private.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// A buffer that lends its memory to an [`SgList`]; nobody can look into it while it does.
pub(crate) struct BufOwner(Rc<AlignedBuf>);

impl BufOwner {
    pub(crate) fn new(buf: AlignedBuf) -> BufOwner {
        BufOwner(Rc::new(buf))
    }

    /// A list over the first `len` bytes of the buffer.
    pub(crate) fn sg(&self, len: usize) -> SgList {
        SgList::over(&self.0, 0..len)
    }

    /// The buffer again, once no list names it: `None` while one does.
    pub(crate) fn into_buf(self) -> Option<AlignedBuf> {
        Rc::into_inner(self.0)
    }
}

/// One contiguous piece of memory in a list.
#[derive(Clone, Copy)]
struct Part {
    ptr: *mut u8,
    len: usize,
}

impl Part {
    /// Part of the shared zero bytes, which may only be read.
    fn is_zero_area(&self) -> bool {
        let start = ZERO_AREA.0.as_ptr().addr();
        (start..start + ZERO_AREA_LEN).contains(&self.ptr.addr())
    }
}

/// A scatter-gather list that keeps its memory alive. Cheap to clone and to slice.
///
/// Contents are reached by copying ([`SgList::copy_to`] and friends), never as a slice.
#[derive(Clone, Default)]
pub struct SgList {
    /// Never of length zero each; their memory is kept by `owners`, or by the promise given to
    /// [`SgList::from_raw`], or is the static zero area.
    parts: SmallVec<[Part; 4]>,
    owners: SmallVec<[Rc<dyn Any>; 2]>,
    /// Sum of the parts' lengths.
    len: u64,
}

impl SgList {
    /// A list of no bytes.
    #[must_use]
    pub fn empty() -> SgList {
        SgList::default()
    }

    /// The whole buffer.
    #[must_use]
    pub fn from_buf(buf: AlignedBuf) -> SgList {
        let range = 0..buf.len;
        SgList::from_buf_range(buf, range)
    }

    /// Part of a buffer.
    ///
    /// # Panics
    /// If `range` does not lie inside the buffer.
    #[must_use]
    pub fn from_buf_range(buf: AlignedBuf, range: Range<usize>) -> SgList {
        SgList::over(&Rc::new(buf), range)
    }

    fn over(buf: &Rc<AlignedBuf>, range: Range<usize>) -> SgList {
        assert!(
            range.start <= range.end && range.end <= buf.len,
            "range {range:?} is outside of a buffer of {} bytes",
            buf.len
        );
        let mut list = SgList::empty();
        if !range.is_empty() {
            let ptr = buf.ptr.as_ptr().wrapping_add(range.start);
            list.push(Part {
                ptr,
                len: range.len(),
            });
            list.owners.push(Rc::<AlignedBuf>::clone(buf));
        }
        list
    }

    /// `len` zero bytes, to write from; copying into such a list panics.
    #[must_use]
    pub fn zeroes(len: u64) -> SgList {
        let mut list = SgList::empty();
        let mut left = len;
        while left != 0 {
            let piece = usize::try_from(left).map_or(ZERO_AREA_LEN, |left| left.min(ZERO_AREA_LEN));
            list.push(Part {
                ptr: ZERO_AREA.0.as_ptr().cast_mut(),
                len: piece,
            });
            left -= piece as u64;
        }
        list
    }

    /// A list over memory of somebody else, in the order given; parts of length zero are skipped.
    ///
    /// # Safety
    /// Each `(ptr, len)` must be valid for reads and writes, from this thread and by the kernel,
    /// until every clone and slice of the list is dropped. `keep` is held as long as they are and
    /// can guarantee it; with `None` the caller does, by draining. No reference to that memory may
    /// be used meanwhile.
    #[must_use]
    pub unsafe fn from_raw(parts: &[(*mut u8, usize)], keep: Option<Rc<dyn Any>>) -> SgList {
        let mut list = SgList::empty();
        for &(ptr, len) in parts {
            list.push(Part { ptr, len });
        }
        list.owners.extend(keep);
        list
    }

    fn push(&mut self, part: Part) {
        if part.len != 0 {
            self.parts.push(part);
            self.len += part.len as u64;
        }
    }

    /// Bytes in the list.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if the list has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Part of the list; shares its memory and owners.
    ///
    /// # Panics
    /// If the range is not inside the list.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> SgList {
        let mut list = SgList {
            owners: self.owners.clone(),
            ..SgList::default()
        };
        self.for_each(offset, len, |part| list.push(part));
        list
    }

    /// Adds `other` at the end.
    pub fn append(&mut self, other: SgList) {
        self.parts.extend(other.parts);
        self.owners.extend(other.owners);
        self.len += other.len;
    }

    /// Holds `owner` until this list, and each clone and slice made from now on, is dropped.
    pub fn keep(&mut self, owner: Rc<dyn Any>) {
        self.owners.push(owner);
    }

    /// Copies `bytes` into the list's memory at `offset`.
    ///
    /// # Panics
    /// If they do not fit, or if that part of the list is made of [`SgList::zeroes`].
    pub fn copy_from(&self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        self.for_each(offset, bytes.len() as u64, |part| {
            assert!(!part.is_zero_area(), "copy into the shared zero bytes");
            let from = bytes[done..done + part.len].as_ptr();
            // SAFETY: `part` is writable memory inside the list (`parts`' invariant; not the zero
            // area, checked above), and `for_each` yields `bytes.len()` bytes in total.
            unsafe { ptr::copy(from, part.ptr, part.len) };
            done += part.len;
        });
    }

    /// Copies the list's memory at `offset` into `bytes`.
    ///
    /// # Panics
    /// If the list has fewer bytes from there on.
    pub fn copy_to(&self, offset: u64, bytes: &mut [u8]) {
        let mut done = 0;
        let len = bytes.len() as u64;
        self.for_each(offset, len, |part| {
            let to = bytes[done..done + part.len].as_mut_ptr();
            // SAFETY: `part` is readable memory inside the list (`parts`' invariant), and
            // `for_each` yields `bytes.len()` bytes in total.
            unsafe { ptr::copy(part.ptr, to, part.len) };
            done += part.len;
        });
    }

    /// Sets `len` bytes at `offset` to zero.
    ///
    /// # Panics
    /// As [`SgList::copy_from`].
    pub fn fill_zero(&self, offset: u64, len: u64) {
        self.for_each(offset, len, |part| {
            assert!(!part.is_zero_area(), "write into the shared zero bytes");
            // SAFETY: as in `copy_from`.
            unsafe { ptr::write_bytes(part.ptr, 0, part.len) };
        });
    }

    /// A copy of the bytes.
    ///
    /// # Panics
    /// If the list is larger than the address space.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let Ok(len) = usize::try_from(self.len) else {
            panic!("a list of {} bytes", self.len)
        };
        let mut bytes = vec![0; len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// True if every byte is one of the shared zero bytes, known without looking at memory.
    #[must_use]
    pub fn is_zeroes_hint(&self) -> bool {
        self.parts.iter().all(Part::is_zero_area)
    }

    /// True if the list's memory may be written, that is if no part is of the shared zero bytes.
    pub(crate) fn is_writable(&self) -> bool {
        !self.parts.iter().any(Part::is_zero_area)
    }

    /// The segments as the kernel wants them. The pointers are good as long as the list is.
    pub(crate) fn iovecs(&self) -> impl ExactSizeIterator<Item = libc::iovec> {
        self.parts.iter().map(|part| libc::iovec {
            iov_base: part.ptr.cast(),
            iov_len: part.len,
        })
    }

    /// Calls `f` with the pieces of `offset..offset + len`, in order.
    fn for_each(&self, offset: u64, len: u64, mut f: impl FnMut(Part)) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} of a list of {} bytes",
            self.len
        );
        let (mut skip, mut left) = (offset, len);
        for part in &self.parts {
            if left == 0 {
                break;
            }
            let part_len = part.len as u64;
            if skip >= part_len {
                skip -= part_len;
                continue;
            }
            let take = (part_len - skip).min(left);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "both are at most part.len, a usize"
            )]
            let (at, take_len) = (skip as usize, take as usize);
            f(Part {
                ptr: part.ptr.wrapping_add(at),
                len: take_len,
            });
            (skip, left) = (0, left - take);
        }
    }
}

impl fmt::Debug for SgList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SgList({} bytes in {} parts)",
            self.len,
            self.parts.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abc() -> SgList {
        let mut list = SgList::from_buf(AlignedBuf::from_slice(b"abcd"));
        list.append(SgList::from_buf_range(
            AlignedBuf::from_slice(b"..efgh.."),
            2..6,
        ));
        list.append(SgList::from_buf(AlignedBuf::from_slice(b"ijkl")));
        list
    }

    #[test]
    fn a_buffer_is_aligned_and_zeroed() {
        let buf = AlignedBuf::zeroed(5000);
        assert_eq!(buf.as_ptr().addr() % BUFFER_ALIGN, 0);
        assert!(buf.iter().all(|&byte| byte == 0));
        assert_eq!(AlignedBuf::zeroed(0).len(), 0);
    }

    #[test]
    fn parts_read_as_one_run_of_bytes() {
        assert_eq!(abc().len(), 12);
        assert_eq!(abc().to_vec(), b"abcdefghijkl");
        assert_eq!(abc().iovecs().len(), 3);
    }

    #[test]
    fn a_slice_shares_the_memory() {
        let list = abc();
        let slice = list.slice(3, 6);
        slice.copy_from(0, b"DEFGHI");
        slice.fill_zero(2, 1);
        drop(slice.clone());
        assert_eq!(list.to_vec(), b"abcDE\0GHIjkl");
        drop(list);
        assert_eq!(slice.to_vec(), b"DE\0GHI");
    }

    #[test]
    fn an_empty_slice_at_the_end_is_fine() {
        assert!(abc().slice(12, 0).is_empty());
        assert_eq!(SgList::empty().to_vec(), b"");
    }

    #[test]
    #[should_panic(expected = "of a list of 12 bytes")]
    fn a_slice_past_the_end_panics() {
        let _ = abc().slice(8, 5);
    }

    #[test]
    #[should_panic(expected = "of a list of 12 bytes")]
    fn a_slice_that_wraps_around_panics() {
        let _ = abc().slice(u64::MAX, 2);
    }

    #[test]
    fn zeroes_take_no_memory_and_know_what_they_are() {
        let list = SgList::zeroes(ZERO_AREA_LEN as u64 * 2 + 1);
        assert_eq!(list.iovecs().len(), 3);
        assert!(list.is_zeroes_hint() && !list.is_writable());
        assert!(list.to_vec().iter().all(|&byte| byte == 0));
        let mut mixed = abc();
        mixed.append(SgList::zeroes(3));
        assert!(!mixed.is_zeroes_hint() && !mixed.is_writable());
        assert!(mixed.slice(0, 12).is_writable());
        assert_eq!(mixed.slice(10, 5).to_vec(), b"kl\0\0\0");
    }

    #[test]
    #[should_panic(expected = "shared zero bytes")]
    fn zeroes_cannot_be_written() {
        SgList::zeroes(10).copy_from(0, b"x");
    }

    #[test]
    fn owners_live_as_long_as_the_last_slice() {
        let owner = Rc::new(17_u8);
        let mut memory = *b"memory";
        let parts = [(memory.as_mut_ptr(), 3), (memory.as_mut_ptr(), 0)];
        // SAFETY: `memory` outlives the lists of this test and is not used meanwhile.
        let list = unsafe { SgList::from_raw(&parts, Some(Rc::<u8>::clone(&owner))) };
        let slice = list.slice(1, 1);
        drop(list);
        assert_eq!(Rc::strong_count(&owner), 2);
        drop(slice);
        assert_eq!(Rc::strong_count(&owner), 1);
    }

    #[test]
    fn a_lent_buffer_comes_back_when_no_list_is_left() {
        let owner = BufOwner::new(AlignedBuf::zeroed(8));
        let list = owner.sg(4);
        list.copy_from(0, b"back");
        drop(list);
        assert_eq!(&*owner.into_buf().unwrap(), b"back\0\0\0\0");
    }
}
