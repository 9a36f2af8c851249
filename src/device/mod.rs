//! virtio-blk over vhost-user, on an engine image.
//!
//! [`Server`] is the face for the daemon. Inside: `front_door` accepts front-ends and relays them to
//! the framework; `backend` and `vring` are what the framework sees; `worker` threads serve the
//! rings (`queue`), parse requests (`request`) over guest memory (`guest_buf`, `bitmap`, `lost_memory`)
//! and run the
//! engine's asynchronous path on an `executor`. `config_space` is what the device says about itself.
//!
//! Knows virtio and vhost-user, nothing of qcow2.
//!
//! Threads: workers live as long as the server; the serving thread and, for each connection, the
//! framework's two. The thread that owns the server never waits, except in [`Server::join`].

mod backend;
mod bitmap;
mod config_space;
mod error;
mod executor;
mod front_door;
mod guest_buf;
mod lost_memory;
mod queue;
mod request;
mod stats;
mod vring;
mod worker;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::backend::Backend;
use self::config_space::{ConfigSpace, Geometry};
use self::front_door::PrivateListener;
use self::request::{SECTOR_SIZE, SERIAL_SIZE};
use self::worker::{WorkerHandle, WorkerParts};
use crate::engine::{CacheStats, Image};
use crate::storage::HostFile;

pub use self::error::DeviceError;
pub use self::front_door::FrontEnd;
pub use self::stats::{LATENCY_BUCKETS, OperationKind, OperationSnapshot, WorkerSnapshot};

/// The most virtqueues: the framework keeps them in a 64-bit mask.
pub const QUEUES_MAX: u16 = 64;
/// The largest ring (VIRTIO: 32768).
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// Host files of an image: their ids are 16 bits wide.
const FILES_MAX: usize = 1 << 16;
/// The longest serial that GET_ID can return.
pub const SERIAL_MAX: usize = SERIAL_SIZE;

/// How a device is offered.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Virtqueues on offer, at most [`QUEUES_MAX`].
    pub queue_count: u16,
    /// Largest ring that is accepted: a power of two.
    pub queue_size_max: u16,
    /// Worker threads; no more are started than there are queues.
    pub threads: usize,
    /// Longest time a worker polls before it sleeps; zero: never.
    pub poll_max: Duration,
    /// Logical block size in bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    /// The string that GET_ID returns, at most [`SERIAL_MAX`] bytes.
    pub serial: String,
    /// Whether the write cache is on at start (the driver can change it).
    pub writeback: bool,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            queue_count: 16,
            queue_size_max: 1024,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            poll_max: Duration::from_micros(32),
            block_size: 512,
            serial: String::new(),
            writeback: true,
        }
    }
}

impl DeviceConfig {
    fn check(&self) -> Result<(), DeviceError> {
        let bad = |option, value: u64, allowed| {
            Err(DeviceError::BadOption {
                option,
                value,
                allowed,
            })
        };
        if !(1..=QUEUES_MAX).contains(&self.queue_count) {
            return bad("number of queues", self.queue_count.into(), "1 to 64");
        }
        if !self.queue_size_max.is_power_of_two() || self.queue_size_max > QUEUE_SIZE_MAX {
            let value = self.queue_size_max.into();
            return bad("queue size", value, "a power of two up to 32768");
        }
        if !self.block_size.is_power_of_two() || !(512..=65536).contains(&self.block_size) {
            let value = self.block_size.into();
            return bad("block size", value, "a power of two from 512 to 65536");
        }
        if self.serial.len() > SERIAL_MAX {
            let value = self.serial.len() as u64;
            return bad("length of the serial", value, "up to 20 bytes");
        }
        if self.threads == 0 {
            return bad("number of threads", 0, "1 or more");
        }
        Ok(())
    }

    fn serial_bytes(&self) -> [u8; SERIAL_SIZE] {
        let mut bytes = [0; SERIAL_SIZE];
        for (to, from) in bytes.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        bytes
    }
}

/// A device with its worker threads, and at most one serving thread.
pub struct Server {
    config: DeviceConfig,
    space: Arc<ConfigSpace>,
    workers: Arc<[WorkerHandle]>,
    threads: Vec<JoinHandle<()>>,
    serving: Option<JoinHandle<()>>,
    stop: Arc<EventFd>,
    finished: Arc<EventFd>,
    /// Held by who has stopped the workers.
    pausing: Arc<Mutex<()>>,
    /// Held while a front-end is connected, or by who keeps front-ends out.
    door: Arc<Mutex<()>>,
}

/// Stops a running device between two requests, for instance to give it another image. For any
/// thread that may wait.
#[derive(Clone)]
pub struct Pauser {
    space: Arc<ConfigSpace>,
    workers: Arc<[WorkerHandle]>,
    pausing: Arc<Mutex<()>>,
    door: Arc<Mutex<()>>,
}

/// A device on which nothing is in flight, and nothing is begun until this value is dropped. Front-ends
/// may still come and go, stop and start their rings, and change their memory.
pub struct Paused<'a> {
    space: &'a ConfigSpace,
    workers: &'a [WorkerHandle],
    rings_running: usize,
    _alone: MutexGuard<'a, ()>,
}

/// No front-end is connected, and none has read the configuration space of the disk as it is, until
/// this value is dropped. One that connects meanwhile waits.
pub struct NoFrontEnd<'a> {
    _door: MutexGuard<'a, ()>,
}

impl Pauser {
    /// Returns when every request that was begun is complete, and visible to the driver as such.
    /// This is one instant for all queues: what completed before it was begun before it on whatever
    /// queue, and what is submitted after a completion that was seen before it comes after it.
    #[must_use]
    pub fn pause(&self) -> Paused<'_> {
        // The guard has no state that a panic could leave half-changed.
        let alone = self.pausing.lock().unwrap_or_else(PoisonError::into_inner);
        let rings_running = worker::pause(&self.workers);
        Paused {
            space: &self.space,
            workers: &self.workers,
            rings_running,
            _alone: alone,
        }
    }

    /// Keeps front-ends out; `None` if one is connected. It need not have started a ring for that.
    #[must_use]
    pub fn keep_out(&self) -> Option<NoFrontEnd<'_>> {
        match self.door.try_lock() {
            Ok(door) => Some(NoFrontEnd { _door: door }),
            // Nobody is behind a door that was left open by a panic.
            Err(TryLockError::Poisoned(door)) => Some(NoFrontEnd {
                _door: door.into_inner(),
            }),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Paused<'_> {
    /// Rings that were in service when the device was paused.
    #[must_use]
    pub fn rings_running(&self) -> usize {
        self.rings_running
    }

    /// Gives the device another image of the same size. `files` are its host files, in the order of
    /// their ids. Nobody uses the old image any more when this returns.
    ///
    /// # Errors
    /// `ImageMismatch`: the guest would notice the change. Nothing has happened then.
    pub fn set_image(
        &self,
        old: &Image,
        image: &Arc<Image>,
        files: &[Arc<HostFile>],
    ) -> Result<(), DeviceError> {
        if old.virtual_size() != image.virtual_size() {
            return Err(DeviceError::ImageMismatch);
        }
        self.exchange(old, image, files)
    }

    /// Gives the device another image, of whatever size, which nobody has to notice. Otherwise as
    /// [`Self::set_image`].
    ///
    /// # Errors
    /// `ImageMismatch`: only one of the two can be written. Nothing has happened then.
    pub fn set_image_of_any_size(
        &self,
        _nobody: &NoFrontEnd<'_>,
        old: &Image,
        image: &Arc<Image>,
        files: &[Arc<HostFile>],
    ) -> Result<(), DeviceError> {
        self.exchange(old, image, files)?;
        let sector_count = image.virtual_size() / SECTOR_SIZE;
        self.space.set_sector_count(sector_count);
        Ok(())
    }

    fn exchange(
        &self,
        old: &Image,
        image: &Arc<Image>,
        files: &[Arc<HostFile>],
    ) -> Result<(), DeviceError> {
        if old.is_read_only() != image.is_read_only() || files.len() > FILES_MAX {
            return Err(DeviceError::ImageMismatch);
        }
        worker::set_image(self.workers, image, files);
        Ok(())
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        worker::resume(self.workers);
    }
}

impl Server {
    /// Starts the workers. `files` are the image's host files, in the order of their ids.
    ///
    /// # Errors
    /// An option out of range, or a host without io_uring.
    pub fn start(
        image: Arc<Image>,
        files: Vec<Arc<HostFile>>,
        config: DeviceConfig,
    ) -> Result<Self, DeviceError> {
        config.check()?;
        let sector_count = image.virtual_size() / SECTOR_SIZE;
        let geometry = Geometry {
            block_size: config.block_size,
            cluster_size: image.cluster_size(),
            queue_count: config.queue_count,
            read_only: image.is_read_only(),
        };
        let space = Arc::new(ConfigSpace::new(sector_count, geometry, config.writeback));
        let event = |flags| {
            EventFd::new(flags)
                .map(Arc::new)
                .map_err(DeviceError::system("make an eventfd"))
        };
        let mut server = Self {
            space: Arc::clone(&space),
            workers: Arc::new([]),
            threads: Vec::new(),
            serving: None,
            pausing: Arc::default(),
            door: Arc::default(),
            stop: event(EFD_CLOEXEC | EFD_NONBLOCK)?,
            finished: event(EFD_CLOEXEC | EFD_NONBLOCK)?,
            config,
        };
        let parts = WorkerParts {
            image,
            files,
            config: space,
            serial: server.config.serial_bytes(),
            block_size: server.config.block_size,
            poll_max: server.config.poll_max,
            worker_count: server.config.threads.min(server.config.queue_count.into()),
        };
        // If one fails, dropping `server` ends those before it.
        let mut workers = Vec::new();
        for number in 0..parts.worker_count {
            let finished = Arc::clone(&server.finished);
            let (worker, thread) = worker::spawn(number, parts.clone(), move || signal(&finished))?;
            workers.push(worker);
            server.threads.push(thread);
            server.workers = workers.clone().into();
        }
        Ok(server)
    }

    /// Serves front-ends on a thread of its own, until [`Server::stop`], or until the only one of a
    /// connected socket has left.
    ///
    /// # Errors
    /// No thread or no private socket could be made.
    ///
    /// # Panics
    /// If called twice.
    pub fn serve(&mut self, front_end: FrontEnd) -> Result<(), DeviceError> {
        assert!(self.serving.is_none(), "a server serves one socket");
        let mut private = PrivateListener::new()?;
        let space = Arc::clone(&self.space);
        let workers = Arc::clone(&self.workers);
        let (queue_count, queue_size_max) = (self.config.queue_count, self.config.queue_size_max);
        let stop = Arc::clone(&self.stop);
        let finished = Arc::clone(&self.finished);
        let door = Arc::clone(&self.door);
        let thread = std::thread::Builder::new()
            .name("front-door".to_owned())
            .spawn(move || {
                front_door::serve(front_end, &mut private, &door, &stop, || {
                    Backend::new(
                        Arc::clone(&space),
                        Arc::clone(&workers),
                        queue_count,
                        queue_size_max,
                    )
                });
                signal(&finished);
            })
            .map_err(DeviceError::system("start the serving thread"))?;
        self.serving = Some(thread);
        Ok(())
    }

    /// Asks the serving thread to end: requests in flight finish, then the connection is closed.
    /// Returns at once; [`Server::finished`] becomes readable when it is done.
    pub fn stop(&self) {
        signal(&self.stop);
        if self.serving.is_none() {
            signal(&self.finished);
        }
    }

    /// Readable when serving has ended: stopped, or the front-end of a connected socket has left, or
    /// a worker has died.
    #[must_use]
    pub fn finished(&self) -> &EventFd {
        &self.finished
    }

    /// Counters of each worker.
    #[must_use]
    pub fn stats(&self) -> Vec<WorkerSnapshot> {
        self.workers
            .iter()
            .map(|worker| worker.stats().snapshot())
            .collect()
    }

    /// Metadata-cache counters of each worker, over all images that it has served.
    #[must_use]
    pub fn cache_stats(&self) -> Vec<CacheStats> {
        self.workers.iter().map(WorkerHandle::cache_stats).collect()
    }

    /// What stops the device for a moment, from any thread.
    #[must_use]
    pub fn pauser(&self) -> Pauser {
        Pauser {
            space: Arc::clone(&self.space),
            workers: Arc::clone(&self.workers),
            pausing: Arc::clone(&self.pausing),
            door: Arc::clone(&self.door),
        }
    }

    /// A way to read the counters of each worker from any thread, also after the server has ended.
    pub fn stats_reader(&self) -> impl Fn() -> Vec<WorkerSnapshot> + Send + use<> {
        let workers = Arc::clone(&self.workers);
        move || {
            let stats = workers.iter().map(|worker| worker.stats().snapshot());
            stats.collect()
        }
    }

    /// Ends serving and the workers, and waits for them. Nothing is in flight afterwards.
    ///
    /// # Errors
    /// A worker had ended before it was told to.
    pub fn join(mut self) -> Result<(), DeviceError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), DeviceError> {
        let mut result = Ok(());
        self.stop();
        if let Some(serving) = self.serving.take()
            && serving.join().is_err()
        {
            error!("the serving thread has panicked");
        }
        for (number, worker) in self.workers.iter().enumerate() {
            if worker.is_gone() && !self.threads.is_empty() {
                result = Err(DeviceError::WorkerGone { worker: number });
            }
            worker.exit();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a worker thread has panicked");
            }
        }
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            error!("{error}");
        }
    }
}

fn signal(event: &EventFd) {
    if let Err(error) = event.write(1) {
        error!("cannot signal an event: {error}");
    }
}
