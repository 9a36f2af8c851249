//! The process-wide store behind the directories: bodies by key, the byte budget, eviction.
//!
//! It is locked only when a directory misses. Loads of one slice by two threads become one read:
//! the second waits for the first. `modified` lists the bodies that a flush must write.
//! Only the store takes marks of a body away or retires it, and tells the directories.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use event_listener::{Event, EventListener};

use super::SliceKey;
use super::directory::Directories;
use super::sieve::{Sieve, Verdict};
use super::slice::{SliceBody, SliceState};
use crate::engine::error::lock;
use crate::engine::sync::Mutex;

/// So many modified bodies bother nobody, however small the budget is: writing them back costs two
/// `fdatasync`s.
const UNWRITTEN_MIN: usize = 1024;

#[derive(Debug)]
enum Place {
    Loading(Arc<Event>),
    Live(Arc<SliceBody>),
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Store {
    places: Mutex<Sieve<Place>>,
    /// Those that hold bodies from here.
    directories: Directories,
    /// Most bodies that the budget allows.
    bodies_max: usize,
    modified: Mutex<Vec<Arc<SliceBody>>>,
    modified_count: AtomicUsize,
}

/// What a lookup for loading found.
pub(crate) enum Lookup {
    /// It is here.
    Live(Arc<SliceBody>),
    /// Somebody reads it: wait, then look again.
    Loading(EventListener),
    /// The caller reads it and then calls [`LoadTicket::finish`].
    Absent(LoadTicket),
}

/// The duty to load a slice. Dropping it lets others try.
pub(crate) struct LoadTicket {
    store: Arc<Store>,
    key: SliceKey,
    event: Arc<Event>,
    finished: bool,
}

impl Store {
    pub(crate) fn new(bodies_max: usize) -> Arc<Self> {
        Arc::new(Self {
            places: Mutex::new(Sieve::default()),
            directories: Directories::default(),
            bodies_max: bodies_max.max(16),
            modified: Mutex::new(Vec::new()),
            modified_count: AtomicUsize::new(0),
        })
    }

    /// Where each directory over this store is known.
    pub(crate) fn directories(&self) -> &Directories {
        &self.directories
    }

    fn retire_body(&self, body: &SliceBody) {
        body.retire();
        self.directories.announce(body);
    }

    /// Finds a body, or says who brings it.
    pub(crate) fn look_up(self: &Arc<Self>, key: SliceKey) -> Lookup {
        let mut places = lock(&self.places);
        match places.get(key.get()) {
            Some(Place::Live(body)) => {
                body.visit();
                Lookup::Live(Arc::clone(body))
            }
            Some(Place::Loading(event)) => Lookup::Loading(event.listen()),
            None => {
                self.make_room(&mut places);
                let event = Arc::new(Event::new());
                places.insert(key.get(), Place::Loading(Arc::clone(&event)));
                Lookup::Absent(LoadTicket {
                    store: Arc::clone(self),
                    key,
                    event,
                    finished: false,
                })
            }
        }
    }

    /// Puts in the slices of a table that is new, so that nothing of it can be loading.
    pub(crate) fn insert_new(&self, body: Arc<SliceBody>) {
        let mut places = lock(&self.places);
        let key = body.key().get();
        // Left over only if the image names one cluster as data and as a table.
        if let Some(Place::Live(old)) = places.remove(key) {
            self.retire_body(&old);
        }
        self.make_room(&mut places);
        places.insert(key, Place::Live(body));
    }

    fn make_room(&self, places: &mut Sieve<Place>) {
        if places.len() < self.bodies_max {
            return;
        }
        // Dropped outside of the judge; a directory may still hold it, retired.
        let _evicted = places.evict(|place| match place {
            Place::Loading(_) => Verdict::Keep,
            Place::Live(body) => {
                let was_visited = body.unvisit();
                let goes = !was_visited && body.try_retire(|body| self.directories.is_pinned(body));
                // Also when it goes: a hit may have come between the two.
                if was_visited || goes {
                    self.directories.announce(body);
                }
                if goes { Verdict::Evict } else { Verdict::Keep }
            }
        });
    }

    /// Retires one slice because its table leaves the active tree for good.
    pub(crate) fn retire(&self, key: SliceKey) {
        let mut places = lock(&self.places);
        if let Some(Place::Live(body)) = places.get(key.get()) {
            self.retire_body(body);
            places.remove(key.get());
        }
    }

    /// Lets go of a slice that came with [`LoadTicket::finish_unused`], unless somebody has used it
    /// since.
    pub(crate) fn forget_unused(&self, key: SliceKey) {
        let mut places = lock(&self.places);
        if let Some(Place::Live(body)) = places.get(key.get())
            && !body.is_visited()
            && body.try_retire(|body| self.directories.is_pinned(body))
        {
            self.directories.announce(body);
            places.remove(key.get());
        }
    }

    /// Puts a body on the list of modified ones. Call it with the slice lock held.
    pub(crate) fn mark_modified_locked(&self, body: &Arc<SliceBody>, state: &mut SliceState) {
        if !state.modified {
            state.modified = true;
            lock(&self.modified).push(Arc::clone(body));
            self.modified_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes the list of modified bodies. Each is still modified and stays in the store until
    /// the caller has cleared its flag (under its lock, after pinning it).
    pub(crate) fn take_modified(&self) -> Vec<Arc<SliceBody>> {
        let list = std::mem::take(&mut *lock(&self.modified));
        self.modified_count.fetch_sub(list.len(), Ordering::Relaxed);
        list
    }

    /// There are so many modified bodies that somebody should write them back, while requests go on.
    pub(crate) fn wants_write_back(&self) -> bool {
        let limit = (self.bodies_max / 8).max(UNWRITTEN_MIN);
        self.modified_count.load(Ordering::Relaxed) > limit.min(self.bodies_max / 2)
    }

    /// Modified bodies crowd the budget: write back before more are made.
    pub(crate) fn must_write_back(&self) -> bool {
        self.modified_count.load(Ordering::Relaxed) > self.bodies_max / 2
    }
}

impl LoadTicket {
    /// As [`Self::finish`], for a body that its loader needs only once and keeps in no directory.
    pub(crate) fn finish_unused(self, body: Arc<SliceBody>) {
        body.unvisit();
        self.finish(body);
    }

    /// Publishes the loaded body and wakes who waited for it.
    pub(crate) fn finish(mut self, body: Arc<SliceBody>) {
        debug_assert_eq!(body.key(), self.key);
        self.finished = true;
        if let Some(place) = lock(&self.store.places).get_mut(self.key.get()) {
            *place = Place::Live(body);
        }
        self.event.notify(usize::MAX);
    }
}

impl Drop for LoadTicket {
    fn drop(&mut self) {
        if !self.finished {
            lock(&self.store.places).remove(self.key.get());
            self.event.notify(usize::MAX);
        }
    }
}
