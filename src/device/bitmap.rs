//! The dirty log of live migration: which pages of guest memory this process has written.
//!
//! Owns the bitmap type that the framework puts into every guest memory region ([`DirtyBitmap`]) and
//! the view of the front-end's log for one region ([`RegionLog`]). The framework maps the log and
//! calls [`BitmapReplace::replace`]; who writes to guest memory marks.
//!
//! Why not the framework's own bitmap: it clones an `Arc` and takes a lock on every access, also
//! when nobody migrates. Here a region without a log costs nothing, because workers learn from one
//! epoch counter, once per batch, that a log has appeared ([`log_epoch`]).
//!
//! Invariants: write first, mark afterwards (a page marked before it is written can be sent in its
//! old state and never again). A log never goes away while its region lives, it is only replaced.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestMemoryRegion};

use super::lost_memory::Watch;

/// vhost-user: the log has one bit for each 4 KiB of guest physical address space.
const LOG_PAGE_SHIFT: u32 = 12;
/// Pages that one byte of the log covers.
const PAGES_PER_BYTE: u64 = 8;

/// Counts how often a log was put into any region. Workers compare it once per batch.
static LOG_EPOCH: AtomicU64 = AtomicU64::new(0);

/// The current log epoch; changes after a log was installed or replaced.
pub(super) fn log_epoch() -> u64 {
    LOG_EPOCH.load(Ordering::Acquire)
}

/// The front-end's log, as seen from one memory region.
#[derive(Debug, Clone)]
pub(super) struct RegionLog {
    /// Watches the region's part of `log`. Before it, so that it is dropped first.
    _watch: Arc<Watch>,
    log: Arc<MmapLogReg>,
    /// Number of the region's first page in the log, which starts at guest physical address 0.
    first_page: u64,
    /// Pages of the region, the last one possibly in part.
    page_count: u64,
    /// Offset of the region's first byte in its first page.
    page_offset: u64,
}

impl RegionLog {
    fn mark(&self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        let first_page = self.page_offset.saturating_add(offset) >> LOG_PAGE_SHIFT;
        let last_page =
            self.page_offset.saturating_add(offset).saturating_add(last) >> LOG_PAGE_SHIFT;
        for page in first_page..=last_page.min(self.page_count.saturating_sub(1)) {
            let (byte, bit) = self.position(page);
            self.log[byte].fetch_or(1 << bit, Ordering::Relaxed);
        }
    }

    fn is_marked(&self, offset: u64) -> bool {
        let page = self.page_offset.saturating_add(offset) >> LOG_PAGE_SHIFT;
        if page >= self.page_count {
            return false;
        }
        let (byte, bit) = self.position(page);
        self.log[byte].load(Ordering::Relaxed) & (1 << bit) != 0
    }

    /// Byte and bit of a page of the region. `new` has checked that the last page lies in the log.
    fn position(&self, page: u64) -> (usize, u32) {
        let page = self.first_page + page;
        (
            (page / PAGES_PER_BYTE) as usize,
            (page % PAGES_PER_BYTE) as u32,
        )
    }

    /// The same log for another region.
    pub(super) fn for_region<R: GuestMemoryRegion>(&self, region: &R) -> io::Result<Self> {
        Self::new(region, Arc::clone(&self.log))
    }
}

impl MemRegionBitmap for RegionLog {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Self> {
        let start = region.start_addr().raw_value();
        let last = region
            .len()
            .checked_sub(1)
            .and_then(|len| start.checked_add(len))
            .ok_or(io::ErrorKind::InvalidData)?;
        // The framework's own view is made only for its check that the log covers the region: the
        // length of the mapping is visible to nobody else, and indexing past it panics.
        AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        let (first_page, last_page) = (start >> LOG_PAGE_SHIFT, last >> LOG_PAGE_SHIFT);
        let byte = |page: u64| log[(page / PAGES_PER_BYTE) as usize].as_ptr().cast_const();
        let watch = Watch::new(std::iter::once((byte(first_page), byte(last_page))));
        Ok(Self {
            _watch: Arc::new(watch),
            log,
            first_page,
            page_count: last_page - first_page + 1,
            page_offset: start & ((1 << LOG_PAGE_SHIFT) - 1),
        })
    }
}

/// Bitmap of one guest memory region: nothing, until a log is installed.
#[derive(Debug, Clone, Default)]
pub(super) struct DirtyBitmap {
    slot: Arc<LogSlot>,
    /// Where in the region this view starts (the framework's slices are views).
    base: u64,
}

#[derive(Debug, Default)]
struct LogSlot {
    /// Set after `log` and never cleared; spares everybody the lock while there is no log.
    present: AtomicBool,
    log: RwLock<Option<RegionLog>>,
}

impl DirtyBitmap {
    /// The region's log, if there is one.
    pub(super) fn log(&self) -> Option<RegionLog> {
        if !self.slot.present.load(Ordering::Acquire) {
            return None;
        }
        // A panic cannot leave a half-written `Option` behind, so poison means nothing here.
        self.slot
            .log
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn with_log<T>(&self, read: impl FnOnce(&RegionLog) -> T) -> Option<T> {
        if !self.slot.present.load(Ordering::Acquire) {
            return None;
        }
        let log = self.slot.log.read().unwrap_or_else(PoisonError::into_inner);
        log.as_ref().map(read)
    }
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let offset = self.base.saturating_add(offset as u64);
        self.with_log(|log| log.mark(offset, len as u64));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let offset = self.base.saturating_add(offset as u64);
        self.with_log(|log| log.is_marked(offset)).unwrap_or(false)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            slot: Arc::clone(&self.slot),
            base: self.base.saturating_add(offset as u64),
        }
    }
}

impl BitmapSlice for DirtyBitmap {}

impl WithBitmapSlice<'_> for DirtyBitmap {
    type S = Self;
}

impl NewBitmap for DirtyBitmap {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl BitmapReplace for DirtyBitmap {
    type InnerBitmap = RegionLog;

    fn replace(&self, log: RegionLog) {
        *self
            .slot
            .log
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(log);
        self.slot.present.store(true, Ordering::Release);
        LOG_EPOCH.fetch_add(1, Ordering::AcqRel);
    }
}
