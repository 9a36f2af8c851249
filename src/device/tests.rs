//! The device as a front-end sees it: a real socket, real worker threads, a ring driven by hand.
//!
//! The front-end is the `vhost` crate's; the driver is this file, so that it can misbehave.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::engine::{LayerFormat, LayerSpec, OpenOptions};
use crate::storage::{BlockingStorage, FileId, OpenMode, block_on};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const QUEUE_SIZE: u16 = 16;
const REGION_LEN: u64 = 0x10_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x1_0000;
const DISK_LEN: u64 = 1 << 20;
/// Longer than anything here takes; a test that waits so long has failed.
const PATIENCE_MS: i32 = 20_000;

/// A raw disk whose sector n is filled with the byte n, and its device.
struct Device {
    server: Server,
    image: Arc<Image>,
    files: Vec<Arc<HostFile>>,
    folder: tempfile::TempDir,
}

impl Device {
    fn new(config: DeviceConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        let content: Vec<u8> = (0..DISK_LEN)
            .map(|at| (at / 512).to_le_bytes()[0])
            .collect();
        std::fs::write(&path, content).unwrap();
        let mode = OpenMode {
            write: true,
            direct: false,
        };
        let files = vec![Arc::new(HostFile::open(&path, mode).unwrap())];
        let layer = LayerSpec {
            file: FileId(0),
            format: LayerFormat::Raw,
        };
        let storage = BlockingStorage::new(files.clone());
        let image = block_on(Image::open(&storage, &[layer], &OpenOptions::default())).unwrap();
        Self {
            server: Server::start(Arc::clone(&image), files.clone(), config).unwrap(),
            image,
            files,
            folder,
        }
    }

    /// A device that serves one connection, and its front-end.
    fn connected() -> (Self, Driver) {
        let mut device = Self::new(DeviceConfig::default());
        let (theirs, ours) = UnixStream::pair().unwrap();
        device.server.serve(FrontEnd::Connection(theirs)).unwrap();
        let driver = Driver::new(ours);
        (device, driver)
    }
}

/// Front-end and driver of one vring (number 1, so that indices are not all zero).
struct Driver {
    frontend: Frontend,
    memory: GuestMemoryMmap<()>,
    backing: File,
    kick: EventFd,
    call: EventFd,
    submitted: u16,
}

const QUEUE: usize = 1;

fn wait_readable(event: &impl AsRawFd) {
    let epoll = Epoll::new().unwrap();
    let entry = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), entry)
        .unwrap();
    let mut events = [EpollEvent::default()];
    assert_eq!(epoll.wait(PATIENCE_MS, &mut events).unwrap(), 1, "timeout");
}

impl Driver {
    /// Connects and negotiates, and starts nothing.
    fn new(stream: UnixStream) -> Self {
        let backing = tempfile::tempfile().unwrap();
        backing.set_len(2 * REGION_LEN).unwrap();
        let region = |number: u64| {
            let file = FileOffset::new(backing.try_clone().unwrap(), number * REGION_LEN);
            (
                GuestAddress(number * REGION_LEN),
                usize::try_from(REGION_LEN).unwrap(),
                Some(file),
            )
        };
        let memory = GuestMemoryMmap::from_ranges_with_files([region(0), region(1)]).unwrap();
        let mut frontend = Frontend::from_stream(stream, 16);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(protocol & !VhostUserProtocolFeatures::BACKEND_REQ)
            .unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        // Without EVENT_IDX: every batch calls.
        frontend.set_features(features & !(1 << 29)).unwrap();
        assert_ne!(
            features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            0
        );
        Self {
            frontend,
            memory,
            backing,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            submitted: 0,
        }
    }

    /// Sends the memory table, the upper region first.
    fn set_mem_table(&self) {
        let mut regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
                mmap_offset: region.start_addr().0,
                mmap_handle: self.backing.as_raw_fd(),
            })
            .collect();
        regions.reverse();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    fn user_address(&self, guest_address: u64) -> u64 {
        let host = self.memory.get_host_address(GuestAddress(guest_address));
        host.unwrap().addr() as u64
    }

    fn start_ring(&mut self, size: u16, base: u16) {
        self.frontend.set_vring_num(QUEUE, size).unwrap();
        self.frontend.set_vring_base(QUEUE, base).unwrap();
        let addresses = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: self.user_address(DESCRIPTORS),
            used_ring_addr: self.user_address(USED),
            avail_ring_addr: self.user_address(AVAIL),
            log_addr: None,
        };
        self.frontend.set_vring_addr(QUEUE, &addresses).unwrap();
        self.frontend.set_vring_call(QUEUE, &self.call).unwrap();
        self.frontend.set_vring_kick(QUEUE, &self.kick).unwrap();
        self.frontend.set_vring_enable(QUEUE, true).unwrap();
    }

    fn start(&mut self) {
        self.set_mem_table();
        self.start_ring(QUEUE_SIZE, 0);
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + u64::from(index) * 16;
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn set_avail_index(&self, index: u16) {
        self.put(AVAIL + 2, index);
        self.kick.write(1).unwrap();
    }

    /// Makes the chain at descriptor 0 available, `count` times.
    fn submit(&mut self, count: u16) {
        for _ in 0..count {
            let slot = u64::from(self.submitted % QUEUE_SIZE);
            self.put(AVAIL + 4 + slot * 2, 0_u16);
            self.submitted = self.submitted.wrapping_add(1);
        }
        self.set_avail_index(self.submitted);
    }

    fn request(&mut self, kind: u32, sector: u64, data_len: u32, data_flags: u16) {
        self.put(HEADER, kind);
        self.put(HEADER + 8, sector);
        self.put(STATUS, 0xff_u8);
        self.descriptor(0, HEADER, 16, NEXT, 1);
        self.descriptor(1, DATA, data_len, NEXT | data_flags, 2);
        self.descriptor(2, STATUS, 1, WRITE, 0);
    }

    fn used_index(&self) -> u16 {
        self.get(USED + 2)
    }

    /// Waits until everything submitted is used; the status of the last request.
    fn wait(&self) -> u8 {
        while self.used_index() != self.submitted {
            wait_readable(&self.call);
            let _ = self.call.read();
        }
        self.get(STATUS)
    }

    /// Reads one sector and returns its status and first byte.
    fn read_sector(&mut self, sector: u64) -> (u8, u8) {
        self.put(DATA, 0xee_u8);
        self.request(0, sector, 512, WRITE);
        self.submit(1);
        (self.wait(), self.get(DATA))
    }

    fn used_len(&self, position: u16) -> u32 {
        self.get(USED + 4 + u64::from(position % QUEUE_SIZE) * 8 + 4)
    }
}

#[test]
fn reads_and_writes_reach_the_disk_with_regions_sent_in_any_order() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(7), (0, 7));
    assert_eq!(driver.used_len(0), 513);
    driver.put(DATA, 0x99_u8);
    driver.request(1, 7, 512, 0);
    driver.submit(1);
    assert_eq!(driver.wait(), 0);
    assert_eq!(driver.used_len(1), 1);
    assert_eq!(driver.read_sector(7), (0, 0x99));
}

#[test]
fn flush_and_serial_are_answered() {
    let config = DeviceConfig {
        serial: "disk-0".to_owned(),
        ..DeviceConfig::default()
    };
    let mut device = Device::new(config);
    let (theirs, ours) = UnixStream::pair().unwrap();
    device.server.serve(FrontEnd::Connection(theirs)).unwrap();
    let mut driver = Driver::new(ours);
    driver.start();
    driver.request(8, 0, 20, WRITE);
    driver.submit(1);
    assert_eq!(driver.wait(), 0);
    assert_eq!(driver.get::<[u8; 8]>(DATA), *b"disk-0\0\0");
    driver.request(4, 0, 0, 0);
    driver.submit(1);
    assert_eq!(driver.wait(), 0);
    let operations = &device.server.stats()[QUEUE % device.server.workers.len()].operations;
    assert_eq!(operations[OperationKind::Flush as usize].completed, 1);
}

#[test]
fn a_bad_request_gets_an_error_and_the_ring_goes_on() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(u64::MAX).0, 1);
    driver.request(77, 0, 512, WRITE);
    driver.submit(1);
    assert_eq!(driver.wait(), 2);
    // No writable byte at all: given back with nothing written.
    driver.descriptor(0, HEADER, 16, 0, 0);
    driver.submit(1);
    driver.wait();
    assert_eq!(driver.used_len(2), 0);
    assert_eq!(driver.read_sector(3), (0, 3));
}

#[test]
fn a_broken_ring_stands_still_until_it_is_started_again() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(1), (0, 1));
    driver.set_avail_index(driver.submitted.wrapping_add(QUEUE_SIZE + 1));
    assert_eq!(driver.frontend.get_vring_base(QUEUE).unwrap(), 1);
    assert_eq!(driver.used_index(), 1);
    driver.set_avail_index(1);
    driver.start_ring(QUEUE_SIZE, 1);
    assert_eq!(driver.read_sector(2), (0, 2));
}

#[test]
fn stopping_a_ring_drains_it() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    driver.request(0, 5, 4096, WRITE);
    driver.submit(QUEUE_SIZE);
    let base = driver.frontend.get_vring_base(QUEUE).unwrap();
    // What was taken is given back; what was not taken is left for the next start.
    assert_eq!(base, u32::from(driver.used_index()));
    driver.start_ring(QUEUE_SIZE, u16::try_from(base).unwrap());
    assert_eq!(driver.wait(), 0);
}

#[test]
fn disabling_and_reset_drain_and_the_ring_runs_again_afterwards() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    driver.request(0, 5, 4096, WRITE);
    driver.submit(8);
    driver.frontend.set_vring_enable(QUEUE, false).unwrap();
    let used = driver.used_index();
    driver.submit(1);
    assert_eq!(driver.used_index(), used);
    driver.frontend.set_vring_enable(QUEUE, true).unwrap();
    driver.wait();
    driver.frontend.reset_device().unwrap();
    let features = driver.frontend.get_features().unwrap();
    driver.frontend.set_features(features & !(1 << 29)).unwrap();
    driver.start_ring(QUEUE_SIZE, driver.submitted);
    assert_eq!(driver.read_sector(9), (0, 9));
}

#[test]
fn a_memory_table_may_change_under_load() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    for _ in 0..20 {
        driver.request(0, 5, 4096, WRITE);
        driver.submit(8);
        driver.set_mem_table();
        assert_eq!(driver.wait(), 0);
    }
    assert_eq!(driver.read_sector(6), (0, 6));
}

#[test]
fn a_ring_size_that_is_no_power_of_two_stops_that_ring_only() {
    let (_device, mut driver) = Device::connected();
    driver.set_mem_table();
    driver.start_ring(12, 0);
    driver.request(0, 4, 512, WRITE);
    driver.submit(1);
    assert_eq!(driver.frontend.get_vring_base(QUEUE).unwrap(), 0);
    driver.start_ring(QUEUE_SIZE, 0);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_kick_descriptor_may_be_replaced_on_a_running_ring() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(1), (0, 1));
    driver.kick = EventFd::new(0).unwrap();
    driver.frontend.set_vring_kick(QUEUE, &driver.kick).unwrap();
    assert_eq!(driver.read_sector(2), (0, 2));
    assert_eq!(driver.read_sector(3), (0, 3));
}

#[test]
fn the_dirty_log_survives_a_new_memory_table() {
    let (_device, mut driver) = Device::connected();
    driver.start();
    let log = tempfile::tempfile().unwrap();
    log.set_len(4096).unwrap();
    let region = VhostUserDirtyLogRegion {
        mmap_size: 4096,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    let marked = |page: u64| {
        use std::os::unix::fs::FileExt;
        let mut byte = [0];
        log.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    let clear = || {
        use std::os::unix::fs::FileExt;
        log.write_all_at(&[0; 4096], 0).unwrap();
    };
    driver.frontend.set_log_base(0, Some(region)).unwrap();
    driver.read_sector(1);
    // The first batch after the log appeared may mark more than it wrote.
    driver.frontend.get_vring_base(QUEUE).unwrap();
    driver.start_ring(QUEUE_SIZE, driver.submitted);
    for new_table in [false, true] {
        if new_table {
            driver.set_mem_table();
        }
        clear();
        assert_eq!(driver.read_sector(2), (0, 2));
        // Stopping the ring waits until the marks are there, too.
        driver.frontend.get_vring_base(QUEUE).unwrap();
        driver.start_ring(QUEUE_SIZE, driver.submitted);
        let pages = [DATA, STATUS, USED, HEADER, 0x1_8000].map(|at| marked(at >> 12));
        assert_eq!(
            pages,
            [true, true, true, false, false],
            "new table: {new_table}"
        );
    }
}

#[test]
fn a_malformed_message_ends_its_connection_only_and_the_next_is_served() {
    let mut device = Device::new(DeviceConfig::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    device.server.serve(FrontEnd::Listener(listener)).unwrap();
    let messages: [&[u32]; 4] = [
        // An unknown request, a body longer than any, half a header, a ring that is not there.
        &[99, 1, 0],
        &[1, 1, 0x1001],
        &[1],
        &[8, 1, 8, 1000, 16],
    ];
    for words in messages {
        let mut stream = UnixStream::connect(&path).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut rest).unwrap();
        assert!(rest.is_empty(), "{words:?} was answered");
    }
    let mut driver = Driver::new(UnixStream::connect(&path).unwrap());
    driver.start();
    assert_eq!(driver.read_sector(1), (0, 1));
    drop(driver);
    let mut driver = Driver::new(UnixStream::connect(&path).unwrap());
    driver.start();
    assert_eq!(driver.read_sector(2), (0, 2));
}

#[test]
fn a_region_that_its_file_does_not_hold_is_refused() {
    let (_device, driver) = Device::connected();
    driver.backing.set_len(REGION_LEN).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: REGION_LEN,
        memory_size: REGION_LEN,
        userspace_addr: REGION_LEN,
        mmap_offset: REGION_LEN,
        mmap_handle: driver.backing.as_raw_fd(),
    };
    assert!(driver.frontend.set_mem_table(&[region]).is_err());
}

#[test]
fn stop_finishes_what_is_in_flight() {
    let (device, mut driver) = Device::connected();
    driver.start();
    driver.request(0, 5, 4096, WRITE);
    driver.submit(8);
    device.server.stop();
    wait_readable(device.server.finished());
    let taken = driver.used_index();
    device.server.join().unwrap();
    assert_eq!(driver.used_index(), taken);
}

#[test]
fn the_departure_of_a_connected_front_end_is_told() {
    let (device, driver) = Device::connected();
    drop(driver);
    wait_readable(device.server.finished());
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let configs = [
        (
            DeviceConfig {
                queue_count: 65,
                ..DeviceConfig::default()
            },
            "number of queues",
        ),
        (
            DeviceConfig {
                queue_size_max: 1000,
                ..DeviceConfig::default()
            },
            "queue size",
        ),
        (
            DeviceConfig {
                block_size: 256,
                ..DeviceConfig::default()
            },
            "block size",
        ),
        (
            DeviceConfig {
                serial: "x".repeat(21),
                ..DeviceConfig::default()
            },
            "serial",
        ),
    ];
    for (config, word) in configs {
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// Another image of one byte value, with its files.
fn other_image(folder: &std::path::Path, len: u64, byte: u8) -> (Arc<Image>, Vec<Arc<HostFile>>) {
    let path = folder.join("other.raw");
    std::fs::write(&path, vec![byte; usize::try_from(len).unwrap()]).unwrap();
    let mode = OpenMode {
        write: true,
        direct: false,
    };
    let files = vec![Arc::new(HostFile::open(&path, mode).unwrap())];
    let layer = LayerSpec {
        file: FileId(0),
        format: LayerFormat::Raw,
    };
    let storage = BlockingStorage::new(files.clone());
    let image = block_on(Image::open(&storage, &[layer], &OpenOptions::default())).unwrap();
    (image, files)
}

#[test]
fn a_paused_device_takes_nothing_and_goes_on_with_the_image_that_it_was_given() {
    let (device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(7), (0, 7));
    let (image, files) = other_image(device.folder.path(), DISK_LEN, 0x77);
    let pauser = device.server.pauser();
    let paused = pauser.pause();
    assert_eq!(paused.rings_running(), 1);
    driver.request(0, 9, 512, WRITE);
    driver.submit(1);
    let (small, small_files) = other_image(tempfile::tempdir().unwrap().path(), 512, 0);
    let refused = paused.set_image(&device.image, &small, &small_files);
    assert!(matches!(refused, Err(DeviceError::ImageMismatch)));
    paused.set_image(&device.image, &image, &files).unwrap();
    // All messages of the workers are behind us, and so was the kick.
    assert_eq!(driver.used_index(), 1);
    drop(paused);
    assert_eq!((driver.wait(), driver.get(DATA)), (0, 0x77_u8));
    drop(pauser.pause());
    assert_eq!(driver.read_sector(3), (0, 0x77));
}

/// Bytes 0 to 7 of the configuration space, in sectors.
fn capacity(frontend: &mut Frontend) -> u64 {
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, bytes) = frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    u64::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn a_disk_gets_another_size_only_while_no_front_end_is_connected() {
    let mut device = Device::new(DeviceConfig::default());
    let path = device.folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    device.server.serve(FrontEnd::Listener(listener)).unwrap();
    let pauser = device.server.pauser();
    // One that has negotiated, and started no ring, may have read the size.
    let mut stream = UnixStream::connect(&path).unwrap();
    let mut driver = Driver::new(stream.try_clone().unwrap());
    assert_eq!(capacity(&mut driver.frontend), DISK_LEN / 512);
    assert!(pauser.keep_out().is_none());
    // It leaves, and sees the end of its connection.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    std::io::Read::read_to_end(&mut stream, &mut Vec::new()).unwrap();
    let nobody = pauser.keep_out().expect("nobody is connected");
    let (image, files) = other_image(device.folder.path(), 2 * DISK_LEN, 0x77);
    let paused = pauser.pause();
    assert_eq!(paused.rings_running(), 0);
    // Connected, and told nothing yet.
    let waiting = UnixStream::connect(&path).unwrap();
    let asking = std::thread::spawn(move || Driver::new(waiting));
    paused
        .set_image_of_any_size(&nobody, &device.image, &image, &files)
        .unwrap();
    drop((nobody, paused));
    let mut driver = asking.join().unwrap();
    assert_eq!(capacity(&mut driver.frontend), 2 * DISK_LEN / 512);
    assert!(pauser.keep_out().is_none());
    driver.start();
    assert_eq!(driver.read_sector(2 * DISK_LEN / 512 - 1), (0, 0x77));
    assert_eq!(driver.read_sector(2 * DISK_LEN / 512).0, 1);
}

#[test]
fn rings_stop_and_start_and_memory_changes_while_the_device_is_paused() {
    let (device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(7), (0, 7));
    let pauser = device.server.pauser();
    let paused = pauser.pause();
    driver.request(0, 9, 512, WRITE);
    driver.submit(1);
    assert_eq!(driver.frontend.get_vring_base(QUEUE).unwrap(), 1);
    driver.set_mem_table();
    driver.start_ring(QUEUE_SIZE, 1);
    driver.frontend.reset_device().unwrap();
    let features = driver.frontend.get_features().unwrap();
    driver.frontend.set_features(features & !(1 << 29)).unwrap();
    driver.start_ring(QUEUE_SIZE, 1);
    assert_eq!(driver.used_index(), 1);
    drop(paused);
    assert_eq!((driver.wait(), driver.get(DATA)), (0, 9_u8));
}

#[test]
fn a_paused_device_lets_its_front_end_go_and_ends_when_it_is_told() {
    let (device, mut driver) = Device::connected();
    driver.start();
    assert_eq!(driver.read_sector(7), (0, 7));
    let pauser = device.server.pauser();
    let paused = pauser.pause();
    drop(driver);
    wait_readable(device.server.finished());
    device.server.join().unwrap();
    // The workers are gone, and nobody waits for them.
    let (image, files) = other_image(device.folder.path(), DISK_LEN, 0x77);
    paused.set_image(&device.image, &image, &files).unwrap();
    drop(paused);
    assert_eq!(pauser.pause().rings_running(), 0);
}

#[test]
fn images_are_changed_under_load_and_each_read_is_of_one_of_them() {
    let (device, mut driver) = Device::connected();
    driver.start();
    let (image, files) = other_image(device.folder.path(), DISK_LEN, 0x77);
    let pauser = device.server.pauser();
    let own = (Arc::clone(&device.image), device.files.clone());
    std::thread::scope(|scope| {
        let changing = scope.spawn(move || {
            for round in 0..200 {
                let (image, files) = if round % 2 == 0 {
                    (&image, &files)
                } else {
                    (&own.0, &own.1)
                };
                pauser.pause().set_image(&own.0, image, files).unwrap();
            }
        });
        while !changing.is_finished() {
            let (status, byte) = driver.read_sector(9);
            assert_eq!(status, 0);
            assert!([9, 0x77].contains(&byte), "{byte}");
        }
    });
    assert_eq!(driver.read_sector(9), (0, 9));
}
