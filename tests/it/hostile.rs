//! Guests and front-ends that mean harm: whatever they send, the server lives and serves the next.
//!
//! Random messages and random rings, from a seed that a failure names (`QBLKD_HOSTILE_SEED` replays
//! it). Besides staying alive, the device must write only where a chain told it to, and the image
//! must be clean afterwards. Single rules of the ring have their tests in the device layer.

use crate::kit::chaos;
use crate::support::command::LIMIT;
use crate::support::driver::{
    AVAIL, DATA, DESCRIPTORS, Driver, HEADER, IN, INDIRECT, IOERR, MEMORY_BYTES, NEXT, OK, OUT,
    QUEUE_SIZE, STATUS, USED, WRITE,
};
use crate::support::qemu::{self, CHECK_CLEAN};
use crate::support::server::Server;
use crate::support::{Failure, ensure, have_tools};
use fastrand::Rng;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const DISK_BYTES: u64 = 16 << 20;
const DISK_SECTORS: u64 = DISK_BYTES / 512;
/// Connections with random messages, and rings with random chains.
const CONNECTIONS: u32 = 300;
const RINGS: u32 = 300;
/// How long an answer to a random message is waited for.
const ANSWER: Duration = Duration::from_millis(20);
/// How long a kick may wait to be taken before the ring is stopped without it, as when a bad chain has
/// ended its service.
const TAKEN: Duration = Duration::from_secs(1);
/// Length of a vhost-user header: request, flags, size.
const HEADER_BYTES: usize = 12;

/// A server whose image is checked at the end.
struct Victim {
    server: Server,
    file: PathBuf,
    _dir: TempDir,
}

impl Victim {
    fn new() -> Self {
        let (dir, file) = qemu::new_image(DISK_BYTES).unwrap();
        let words = ["--num-queues", "4", "--log", "off", "--blk-file"].map(OsStr::new);
        let server = Server::start(words.into_iter().chain([file.as_os_str()])).unwrap();
        Self {
            server,
            file,
            _dir: dir,
        }
    }

    /// It still serves as it should, and ends as it should.
    fn expect_unharmed(mut self) -> Result<(), Failure> {
        if !self.server.is_alive() {
            return Err(format!("died: {:?}", self.server.finish()?).into());
        }
        chaos::run(&chaos::Options {
            requests_max: 500,
            ..chaos::Options::new(&self.server.socket, 2, Duration::from_secs(30))
        })?;
        let ended = self.server.terminate()?;
        ensure(ended.code()? == 0, || format!("SIGTERM: {ended:?}"))?;
        ensure(!ended.stderr.contains("panicked"), || ended.stderr.clone())?;
        qemu::expect_check(&self.file, &[CHECK_CLEAN])
    }
}

/// Runs `attack` with numbers from a seed, on a victim that must be unharmed by it.
fn attack(name: &str, attack: impl Fn(&mut Victim, &mut Rng) -> Result<(), Failure>) {
    if !have_tools(name, &["qemu-img"]) {
        return;
    }
    let seed = std::env::var("QBLKD_HOSTILE_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |text| text.parse().unwrap());
    let mut victim = Victim::new();
    let attacked = attack(&mut victim, &mut Rng::with_seed(seed));
    let unharmed = victim.expect_unharmed();
    if let Err(failure) = attacked.and(unharmed) {
        panic!("QBLKD_HOSTILE_SEED={seed}: {failure}");
    }
}

// --- Messages ---

#[test]
fn random_bytes_instead_of_messages_hurt_nobody() {
    attack(
        "random_bytes_instead_of_messages_hurt_nobody",
        |victim, random| {
            for _ in 0..CONNECTIONS {
                let mut stream = UnixStream::connect(&victim.server.socket)?;
                let bytes: Vec<u8> = (0..random.usize(1..600)).map(|_| random.u8(..)).collect();
                // The server may hang up in the middle.
                stream.write_all(&bytes).ok();
            }
            Ok(())
        },
    );
}

/// A number that a length, an offset or an index may well be compared with.
fn edge(random: &mut Rng) -> u64 {
    const EDGES: &[u64] = &[
        0,
        1,
        8,
        0xfff,
        0x1000,
        0xffff,
        MEMORY_BYTES,
        1 << 31,
        u32::MAX as u64,
        1 << 32,
        i64::MAX as u64,
        u64::MAX - 0xfff,
        u64::MAX,
    ];
    let edge = random.choice(EDGES).copied().unwrap_or(0);
    match random.u8(0..4) {
        0 => edge.wrapping_add(1),
        1 => edge.wrapping_sub(1),
        2 => edge,
        _ => random.u64(0..64),
    }
}

/// A message with a lawful header and any body.
fn random_message(random: &mut Rng) -> Vec<u8> {
    const VERSION: u32 = 1;
    const NEED_REPLY: u32 = 8;
    let request = random.u32(0..46);
    let body: Vec<u8> = (0..random.usize(0..10))
        .flat_map(|_| match random.bool() {
            true => edge(random).to_ne_bytes(),
            // Two words, as indices and states are.
            false => {
                let [low, high] = [random.u32(0..6), random.u32(0..3)].map(u64::from);
                (low | high << 32).to_ne_bytes()
            }
        })
        .collect();
    let mut size = u32::try_from(body.len()).unwrap();
    if random.u8(0..16) == 0 {
        size = random.u32(..);
    }
    let flags = VERSION | if random.bool() { NEED_REPLY } else { 0 };
    let mut message = Vec::new();
    for word in [request, flags, size] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend(body);
    message
}

/// Descriptors of all sorts, most of them not what any message wants.
fn descriptors() -> Result<Vec<Box<dyn AsRawFd>>, Failure> {
    let memory = tempfile::tempfile()?;
    memory.set_len(MEMORY_BYTES)?;
    // A call to it would wait for ever.
    let full = EventFd::new(0)?;
    full.write(u64::MAX - 1)?;
    let (reader, writer) = std::io::pipe()?;
    Ok(vec![
        Box::new(memory),
        Box::new(tempfile::tempfile()?),
        Box::new(File::open("/dev/null")?),
        Box::new(File::open("/dev/zero")?),
        Box::new(File::open("/")?),
        Box::new(reader),
        Box::new(writer),
        Box::new(UnixStream::pair()?.0),
        Box::new(full),
        Box::new(EventFd::new(0)?),
    ])
}

#[test]
fn random_messages_with_random_descriptors_hurt_nobody() {
    let name = "random_messages_with_random_descriptors_hurt_nobody";
    attack(name, |victim, random| {
        let files = descriptors()?;
        for _ in 0..CONNECTIONS {
            let mut stream = UnixStream::connect(&victim.server.socket)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            for _ in 0..random.usize(1..12) {
                let message = random_message(random);
                let fds: Vec<RawFd> = (0..random.usize(0..4))
                    .filter_map(|_| random.choice(&files))
                    .map(|file| file.as_raw_fd())
                    .collect();
                if stream.send_with_fds(&[&message[..]], &fds).is_err() {
                    break;
                }
                // Mostly in step, sometimes in a rush. Nothing at all: it has hung up.
                if random.bool() && matches!(stream.read(&mut [0; HEADER_BYTES + 4096]), Ok(0)) {
                    break;
                }
            }
        }
        Ok(())
    });
}

#[test]
fn a_front_end_that_says_nothing_or_half_is_left_behind() {
    let name = "a_front_end_that_says_nothing_or_half_is_left_behind";
    attack(name, |victim, _| {
        for length in 0..HEADER_BYTES {
            let mut stream = UnixStream::connect(&victim.server.socket)?;
            stream.write_all(&[1; HEADER_BYTES][..length])?;
        }
        // More than one at a time: they wait in the listener's queue, and leave.
        let waiting: Vec<_> = (0..8)
            .map(|_| UnixStream::connect(&victim.server.socket))
            .collect();
        drop(waiting);
        Ok(())
    });
}

#[test]
fn a_call_that_nobody_takes_does_not_stop_the_worker() {
    let name = "a_call_that_nobody_takes_does_not_stop_the_worker";
    attack(name, |victim, _| {
        let mut driver = Driver::negotiate(UnixStream::connect(&victim.server.socket)?, 0)?;
        // Blocks every further write, unless somebody reads it.
        let full = EventFd::new(0)?;
        full.write(u64::MAX - 1)?;
        driver.call = full;
        driver.start()?;
        driver.lay_out(IN, 0, 512, WRITE)?;
        driver.submit(&[0; 8])?;
        wait_until_used(&driver, 8, LIMIT)?;
        // Stopping the ring needs the worker, too.
        driver.stop_ring()?;
        ensure(driver.used_index()? == 8, || {
            "not all were given back".into()
        })
    });
}

// --- Rings ---

/// Looks at the used index until it has arrived, or for as long as `limit`: a hostile chain may never
/// come back.
fn wait_until_used(driver: &Driver, index: u16, limit: Duration) -> Result<(), Failure> {
    let started = Instant::now();
    while driver.used_index()? != index && started.elapsed() < limit {
        thread::yield_now();
    }
    Ok(())
}

/// Waits until the device has taken the last kick or given a chain back, so that a busy machine has no
/// part in whether it begins.
fn wait_until_taken(driver: &Driver) -> Result<(), Failure> {
    let epoll = Epoll::new()?;
    let entry = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, driver.kick.as_raw_fd(), entry)?;
    let started = Instant::now();
    while driver.used_index()? == 0
        && epoll.wait(0, &mut [EpollEvent::default()])? == 1
        && started.elapsed() < TAKEN
    {
        thread::yield_now();
    }
    Ok(())
}

/// Where random chains may have data: away from the ring and the headers, so that it is known what
/// the device was told.
const BUFFERS: Range<u64> = DATA..MEMORY_BYTES;

/// Lays a random table of descriptors and random headers; returns where the device may write.
fn random_chains(driver: &Driver, random: &mut Rng) -> Result<Vec<Range<u64>>, Failure> {
    const LENGTHS: &[u32] = &[
        0,
        1,
        15,
        16,
        17,
        511,
        512,
        513,
        4096,
        65536,
        1 << 20,
        1 << 31,
    ];
    const KINDS: &[u32] = &[0, 1, 4, 8, 11, 13, 2, 99, u32::MAX];
    const SECTORS: &[u64] = &[0, 1, DISK_SECTORS - 1, DISK_SECTORS, 1 << 55, u64::MAX];
    let mut writable = Vec::new();
    for header in 0..8_u64 {
        let at = HEADER + header * 64;
        driver.put(at, random.choice(KINDS).copied().unwrap_or(0))?;
        let sector = match random.bool() {
            true => random.u64(0..DISK_SECTORS),
            false => random.choice(SECTORS).copied().unwrap_or(0),
        };
        driver.put(at + 8, sector)?;
    }
    for index in 0..QUEUE_SIZE {
        let mut flags = 0;
        if random.u8(0..8) != 0 {
            flags |= NEXT;
        }
        if random.bool() {
            flags |= WRITE;
        }
        let mut length = random.choice(LENGTHS).copied().unwrap_or(0);
        let mut address = match random.u8(0..8) {
            0 => edge(random),
            1 => MEMORY_BYTES - random.u64(0..1024),
            _ => random.u64(BUFFERS),
        };
        if flags & WRITE == 0 && random.bool() {
            (address, length) = (HEADER + random.u64(0..8) * 64, 16);
        }
        if flags & WRITE != 0 && random.bool() {
            length = 1;
        }
        let end = address.saturating_add(length.into());
        if flags & WRITE != 0 {
            // An edge may lie on the ring; then this descriptor is for reading.
            if address < BUFFERS.start {
                flags &= !WRITE;
            } else {
                writable.push(address..end);
            }
        }
        let next = match random.u8(0..16) {
            0 => random.u16(..),
            1 => index,
            _ => random.u16(0..QUEUE_SIZE),
        };
        driver.descriptor(index, address, length, flags, next)?;
    }
    Ok(writable)
}

/// The first byte that changed outside of the used ring and of what is `writable`.
fn stray_write(before: &[u8], after: &[u8], writable: &[Range<u64>]) -> Option<u64> {
    let used = USED..USED + 4 + u64::from(QUEUE_SIZE) * 8 + 2;
    (0_u64..)
        .zip(before.iter().zip(after))
        .filter(|(_, (before, after))| before != after)
        .map(|(at, _)| at)
        .find(|at| !used.contains(at) && !writable.iter().any(|range| range.contains(at)))
}

#[test]
fn random_chains_change_no_memory_but_their_own() {
    attack(
        "random_chains_change_no_memory_but_their_own",
        |victim, random| {
            let mut given_back = 0;
            for round in 0..RINGS {
                let mut driver = Driver::connect(&victim.server.socket)?;
                let writable = random_chains(&driver, random)?;
                let heads: Vec<u16> = (0..random.usize(1..=usize::from(QUEUE_SIZE)))
                    .map(|_| match random.u8(0..32) {
                        0 => random.u16(..),
                        _ => random.u16(0..QUEUE_SIZE),
                    })
                    .collect();
                let slots = u64::from(QUEUE_SIZE);
                let ring = AVAIL..AVAIL + 4 + slots * 2;
                let before = driver.snapshot()?;
                driver.submit(&heads)?;
                wait_until_taken(&driver)?;
                wait_until_used(&driver, u16::try_from(heads.len())?, ANSWER)?;
                // Stopping it drains it: what was taken has been given back.
                driver.stop_ring()?;
                given_back += u32::from(driver.used_index()?);
                let after = driver.snapshot()?;
                let mut allowed = writable;
                // Written by this side.
                allowed.push(ring);
                let stray = stray_write(&before, &after, &allowed);
                ensure(stray.is_none(), || {
                    format!("round {round}: a byte changed at {stray:#x?}")
                })?;
            }
            // Most chains have a place for a status.
            ensure(given_back > RINGS, || {
                format!("{given_back} chains came back")
            })
        },
    );
}

#[test]
fn random_bytes_as_ring_and_tables_hurt_nobody() {
    attack(
        "random_bytes_as_ring_and_tables_hurt_nobody",
        |victim, random| {
            for _ in 0..RINGS {
                let mut driver = Driver::connect(&victim.server.socket)?;
                random_chains(&driver, random)?;
                // Tables of descriptors anywhere, tables in themselves, and tables over the ring.
                for index in 0..QUEUE_SIZE {
                    if random.bool() {
                        let table = match random.u8(0..4) {
                            0 => DESCRIPTORS + random.u64(0..256),
                            1 => USED + random.u64(0..64),
                            2 => edge(random),
                            _ => random.u64(0..MEMORY_BYTES),
                        };
                        let length = match random.bool() {
                            true => random.u32(0..64) * 16,
                            false => random.u32(..),
                        };
                        driver.descriptor(index, table, length, INDIRECT, random.u16(..))?;
                    }
                }
                for _ in 0..64 {
                    let at = random.u64(0..MEMORY_BYTES / 8) * 8;
                    driver.put(at, random.u64(..))?;
                }
                // Once a plausible index, once any.
                driver.submit(&[random.u16(0..QUEUE_SIZE)])?;
                if random.bool() {
                    driver.set_avail_index(random.u16(..))?;
                }
                wait_until_used(&driver, 1, ANSWER / 4)?;
                driver.stop_ring()?;
            }
            Ok(())
        },
    );
}

#[test]
fn rings_that_are_not_in_memory_are_not_served() {
    attack(
        "rings_that_are_not_in_memory_are_not_served",
        |victim, random| {
            for _ in 0..RINGS / 4 {
                let mut driver = Driver::negotiate(UnixStream::connect(&victim.server.socket)?, 0)?;
                driver.share_memory()?;
                let mut place = |usual: u64| match random.u8(0..3) {
                    0 => edge(random),
                    1 => MEMORY_BYTES - random.u64(0..256),
                    _ => usual,
                };
                let places = [place(DESCRIPTORS), place(AVAIL), place(USED)];
                // Refusing is as good as not serving it.
                if driver.start_ring(places[0], places[1], places[2]).is_ok() {
                    driver.kick.write(1)?;
                    wait_until_used(&driver, 1, ANSWER / 4)?;
                    driver.stop_ring()?;
                }
            }
            Ok(())
        },
    );
}

#[test]
fn memory_that_goes_away_under_load_is_let_go() {
    attack("memory_that_goes_away_under_load_is_let_go", |victim, _| {
        for _ in 0..20 {
            let mut driver = Driver::connect(&victim.server.socket)?;
            driver.lay_out(OUT, 8, 65536, 0)?;
            driver.submit(&[0; 16])?;
            // A new table in the middle of it: drained, then served on.
            driver.share_memory()?;
            driver.wait()?;
            ensure(driver.get::<u8>(STATUS)? == OK, || "status".into())?;
            let beyond = driver.request(OUT, DISK_SECTORS, 512, 0)?;
            ensure(beyond == IOERR, || format!("beyond the disk: {beyond}"))?;
        }
        Ok(())
    });
}

/// A request of which one descriptor lies in memory that the front-end has cut off: looking there was
/// a bus error, which ended the process.
#[test]
fn memory_that_is_shortened_under_a_request_costs_the_ring_alone() {
    const LOST: u64 = DATA + 0x1_0000;
    const PLACES: [[u64; 3]; 3] = [
        [LOST, DATA, STATUS],
        [HEADER, LOST, STATUS],
        [HEADER, DATA, LOST],
    ];
    let name = "memory_that_is_shortened_under_a_request_costs_the_ring_alone";
    attack(name, |victim, _| {
        for [header, data, status] in PLACES {
            let mut driver = Driver::connect(&victim.server.socket)?;
            driver.lay_out(IN, 0, 512, WRITE)?;
            driver.descriptor(0, header, 16, NEXT, 1)?;
            driver.descriptor(1, data, 512, NEXT | WRITE, 2)?;
            driver.descriptor(2, status, 1, WRITE, 0)?;
            driver.shorten_memory(LOST)?;
            driver.submit(&[0])?;
            wait_until_taken(&driver)?;
            driver.stop_ring()?;
        }
        Ok(())
    });
}
