//! Guest memory that its front-end takes away.
//!
//! The memory belongs to the front-end, which can shorten the file behind it while it is mapped here.
//! From then on an access to the missing pages is a bus error, and that ends a process by default. So
//! mappings that a front-end can shorten are watched ([`Watch`]): a bus error in one of them puts
//! empty memory in its place and counts a loss. A worker that sees [`losses`] change gives up the
//! ring it is serving: what it reads there is no longer what the driver wrote.
//!
//! Why unsafe is needed here, and not elsewhere: a signal handler, which maps memory over a mapping.
//!
//! The ownership argument: a `Watch` is dropped before the mappings it names are, so the handler only
//! ever replaces a mapping that exists. Whoever unmaps it later unmaps what took its place. The handler
//! uses atomics and system calls that are safe in a signal handler, and nothing else.

#![expect(unsafe_code, reason = "a signal handler; see the module's text")]

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use libc::{SIGBUS, siginfo_t};
use log::warn;

/// Mappings that can be watched: twice (old and new during a change of the memory table) as many
/// regions as the framework takes, each with its part of the dirty log.
const RANGES_MAX: usize = 2 * 2 * 512;

/// What is watched.
static RANGES: [WatchedRange; RANGES_MAX] = [const { WatchedRange::new() }; RANGES_MAX];

/// Held by who changes `RANGES`.
static CHANGE: Mutex<()> = Mutex::new(());

/// Mappings lost so far.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// What was to happen on a bus error before: for those that are not ours.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// How often a watched mapping has been lost.
#[inline]
pub(super) fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// One mapping. Free while `start` is 0.
struct WatchedRange {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl WatchedRange {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
        }
    }

    /// Start and length, if the range is in use and holds `address`.
    fn holding(&self, address: usize) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        // Else the range is being taken by another mapping, which nobody uses yet.
        let is_whole = start == self.start.load(Ordering::Relaxed);
        (is_whole && start != 0 && (start..end).contains(&address)).then_some((start, end - start))
    }
}

/// Watches mappings until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    /// Places in `RANGES`.
    places: Vec<usize>,
}

impl Watch {
    /// Watches mappings, given by their first and last byte. Drop it before they are unmapped.
    pub(super) fn new(mappings: impl Iterator<Item = (*const u8, *const u8)>) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            if let Err(error) = install() {
                warn!("a front-end that shortens guest memory will end the process: {error}");
            }
        });
        let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = (0..RANGES_MAX).filter(|place| {
            let start = RANGES.get(*place).map(|range| &range.start);
            start.is_some_and(|start| start.load(Ordering::Relaxed) == 0)
        });
        let page = page_size();
        let mut places = Vec::new();
        for ((first, last), place) in mappings.zip(&mut free) {
            let range = &RANGES[place];
            let end = (last.addr() / page + 1) * page;
            range.end.store(end, Ordering::Relaxed);
            let start = first.addr() / page * page;
            range.start.store(start, Ordering::Release);
            places.push(place);
        }
        Self { places }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        for place in &self.places {
            RANGES[*place].start.store(0, Ordering::Release);
        }
    }
}

fn page_size() -> usize {
    // SAFETY: takes a number, returns a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// Makes bus errors ours.
fn install() -> io::Result<()> {
    // SAFETY: `sigaction` is a C struct of integers and an optional function: zero is a value of it.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null action changes nothing; `previous` is a valid place for the answer.
    if unsafe { libc::sigaction(SIGBUS, ptr::null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Once only; see `Watch::new`.
    let _ = PREVIOUS.set(previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_bus_error;
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` names a handler of the form that SA_SIGINFO asks for, which keeps to what a
    // handler may do (see the module's text).
    if unsafe { libc::sigaction(SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_bus_error(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler with SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS is among the signals whose information has an address; where a process sent it,
    // this is another integer, and `si_code` says so.
    let address = unsafe { info.si_addr() }.addr();
    // Positive: the kernel found the fault.
    let is_fault = info.si_code > 0;
    let found = RANGES.iter().find_map(|range| range.holding(address));
    if is_fault
        && let Some((start, len)) = found
        && put_empty_memory(start, len)
    {
        LOSSES.fetch_add(1, Ordering::Release);
        return;
    }
    // Not ours: what was to happen before happens when the access is repeated.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: `previous` is what `sigaction` has returned for this signal.
        unsafe { libc::sigaction(signal, ptr::from_ref(previous), ptr::null_mut()) };
    }
    if !is_fault {
        // SAFETY: may be called in a handler; the signal comes when the handler returns.
        unsafe { libc::raise(signal) };
    }
}

/// Replaces a mapping by memory that reads as zeroes.
fn put_empty_memory(start: usize, len: usize) -> bool {
    let start = ptr::without_provenance_mut::<c_void>(start);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping of guest memory or of the dirty log that exists (see the module's
    // text). It is only reached through raw pointers, as other processes change it anyway.
    let mapped = unsafe { libc::mmap(start, len, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}
