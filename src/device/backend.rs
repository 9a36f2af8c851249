//! The adapter to `vhost-user-backend`: one per connection, thin.
//!
//! Owns what lasts as long as a connection: its ring controls, the memory it has shared. Answers the
//! framework's questions about features and configuration, and passes memory tables to the workers.
//! Rings start and stop in `vring.rs`; the framework's own ring thread has nothing to do here.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, warn};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::bitmap::BitmapReplace;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::bitmap::{DirtyBitmap, RegionLog};
use super::config_space::ConfigSpace;
use super::guest_buf::{SharedMemory, bitmap_of};
use super::lost_memory::Watch;
use super::vring::{FrameworkMemory, Vring, VringControl};
use super::worker::{WorkerHandle, set_memory};

/// One connection's side of the device.
pub(super) struct Backend {
    config: Arc<ConfigSpace>,
    workers: Arc<[WorkerHandle]>,
    controls: Vec<Arc<VringControl>>,
    queue_size_max: u16,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A region's view of the dirty log, to put the log back after a change of the memory table:
    /// the framework gives new regions none.
    log: Option<RegionLog>,
    /// Watches the memory in use. Before it, so that it is dropped first.
    watch: Option<Watch>,
    /// The memory in use.
    memory: Option<Arc<SharedMemory>>,
    /// What ends the framework's ring thread. Made before the framework asks: without it, that
    /// thread could never be joined.
    exit_event: Option<(EventConsumer, EventNotifier)>,
    /// Descriptors that the framework takes and never closes.
    leaked: Vec<RawFd>,
}

impl Backend {
    pub(super) fn new(
        config: Arc<ConfigSpace>,
        workers: Arc<[WorkerHandle]>,
        queue_count: u16,
        queue_size_max: u16,
    ) -> io::Result<Arc<Self>> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let state = State {
            exit_event: Some(new_event_consumer_and_notifier(flags)?),
            ..State::default()
        };
        config.reset();
        let controls = (0..usize::from(queue_count))
            .map(|index| VringControl::new(index, workers[index % workers.len()].clone()))
            .collect();
        Ok(Arc::new(Self {
            config,
            workers,
            controls,
            queue_size_max,
            state: Mutex::new(state),
        }))
    }

    pub(super) fn controls(&self) -> impl Iterator<Item = Arc<VringControl>> {
        self.controls.iter().cloned()
    }

    /// Stops all rings for good; returns when nothing is in flight.
    pub(super) fn close_rings(&self) {
        for control in &self.controls {
            control.close();
        }
    }

    /// Lets go of guest memory. After `close_rings`, when the framework's loop has ended.
    pub(super) fn release_memory(&self) {
        set_memory(&self.workers, None);
        let mut state = self.lock();
        state.watch = None;
        state.memory = None;
    }

    /// The descriptors that the framework leaves open, to be closed after it is gone.
    pub(super) fn take_leaked(&self) -> Vec<RawFd> {
        std::mem::take(&mut self.lock().leaked)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only whole values are stored under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a log that the old regions have into new regions that have none.
    fn carry_log(state: &mut State, memory: &SharedMemory) {
        let old_log = state
            .memory
            .as_ref()
            .and_then(|memory| memory.iter().find_map(|region| bitmap_of(region).log()));
        if old_log.is_some() {
            state.log = old_log;
        }
        let Some(log) = &state.log else { return };
        for region in memory.iter() {
            let bitmap = bitmap_of(region);
            if bitmap.log().is_some() {
                continue;
            }
            match log.for_region(region) {
                Ok(log) => bitmap.replace(log),
                // The front-end sends a larger log before it relies on it.
                Err(error) => debug!("a new memory region is not logged: {error}"),
            }
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = DirtyBitmap;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.controls.len()
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size_max.into()
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn acked_features(&self, features: u64) {
        self.config.accept(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        ConfigSpace::protocol_features()
    }

    /// The rings are disabled, and so drained, when the framework calls this.
    fn reset_device(&self) {
        self.config.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // An empty answer is how the protocol says no.
        self.config.read(offset, size).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if !self.config.write(offset, bytes) {
            // An error would end the connection; a driver's odd write is not worth that.
            warn!(
                "write of {} bytes at {offset} of the configuration space is ignored",
                bytes.len()
            );
        }
        Ok(())
    }

    fn update_memory(&self, memory: FrameworkMemory) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        let watch = Watch::new(memory.iter().map(|region| {
            let first = region.as_ptr().cast_const();
            (first, first.wrapping_add(region.size().saturating_sub(1)))
        }));
        let old = {
            let mut state = self.lock();
            Self::carry_log(&mut state, &memory);
            let old_memory = state.memory.replace(Arc::clone(&memory));
            (state.watch.replace(watch), old_memory)
        };
        set_memory(&self.workers, Some(&memory));
        // The watch first, then the memory, which no worker uses any more.
        drop(old);
        for control in &self.controls {
            control.retry();
        }
        Ok(())
    }

    /// One thread for all vrings; it sleeps, as no kick ever reaches it.
    fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX]
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let mut state = self.lock();
        let (consumer, notifier) = state.exit_event.take()?;
        // The framework registers this descriptor and forgets it.
        state.leaked.push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    /// The framework has marked the ring as not ready, whose hook has drained it already.
    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        Ok(())
    }

    /// Called when a ring becomes enabled. Never fails: an error ends the framework's thread.
    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        _vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        Ok(())
    }
}
