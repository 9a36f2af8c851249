//! Owning again: after references are gone, tables and clusters that only the active tree refers to
//! get their copied flags back. Without it every later write would copy for nothing.
//!
//! A few tables at a time: their slices are loaded (through the shared store, since a flush writes
//! them), the counts of what they name are read, and then each table is decided under the L1 lock and
//! all its slice locks. Counts that are one stay one meanwhile: only the background work raises them,
//! and an entry that is as it was names what it named. Where something has changed, or a request has
//! taken a cluster (it may copy old bytes of it), the table is looked at again.
//!
//! While a snapshot is unsettled there is nothing to own: all that is not new is shared with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::alone::{Alone, Learnt};
use crate::engine::breath::breathe;
use crate::engine::cache::SliceKey;
use crate::engine::cache::slice::SliceBody;
use crate::engine::cache::store::Lookup;
use crate::engine::error::{Error, lock};
use crate::engine::layer::EntryPlace;
#[cfg(test)]
use crate::engine::order::{Gap, gap};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l1::L1Entry;
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{GuestOffset, HostOffset, to_u64, to_usize};

/// Bytes of tables that are looked at together (at least one table).
const BYTES_AT_ONCE: u64 = 512 << 10;
/// Tables that are read at a time.
const READS_IN_FLIGHT: usize = 16;
/// Bytes of modified slices after which a flush writes them.
const MODIFIED_MAX: u64 = 2 << 20;

/// How far the tables of the active tree are looked at.
#[derive(Debug, Default)]
pub(super) struct Reown {
    next: usize,
    /// L1 indices to be looked at again.
    again: Vec<usize>,
    /// A taken guest cluster that somebody waits for.
    taken: Option<u64>,
    modified: u64,
    /// Slices that only this work has loaded.
    loaded: Vec<SliceKey>,
}

impl Reown {
    /// Looks at these L1 indices only, of so many.
    pub(super) fn of(l1_len: usize, indices: Vec<usize>) -> Self {
        Self {
            next: l1_len,
            again: indices,
            ..Self::default()
        }
    }
}

/// What a step did.
pub(super) struct Done {
    pub(super) tables: u64,
    pub(super) bytes: u64,
}

/// A table of the active tree as it was found. Its slices stay in the store until it is dropped.
struct Found {
    l1_index: usize,
    entry: L1Entry,
    owned: bool,
    bodies: Vec<Arc<SliceBody>>,
    entries: Vec<L2Entry>,
    /// By entry: nobody else refers to its cluster. Unset where that was not asked.
    alone: Vec<bool>,
}

impl Drop for Found {
    fn drop(&mut self) {
        drop(Pinned(std::mem::take(&mut self.bodies)));
    }
}

/// Bodies that stay in the store as long as this lives.
struct Pinned(Vec<Arc<SliceBody>>);

impl Pinned {
    fn push(&mut self, body: Arc<SliceBody>) {
        body.pin();
        self.0.push(body);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for body in &self.0 {
            body.unpin();
        }
    }
}

/// What became of a table.
enum Decided {
    Done,
    Again {
        taken: Option<u64>,
    },
    /// A snapshot was frozen meanwhile.
    Unsettled,
}

impl<S: Storage> Worker<S> {
    /// Looks at some tables; `None` when all of them are as they should be.
    pub(super) async fn reown_on(
        &self,
        target: Target<'_>,
        reown: &mut Reown,
        alone: &mut Alone,
    ) -> Result<Option<Done>, Error> {
        let Target {
            mapping, active, ..
        } = target;
        if !lock(&active.drops).all_settled() {
            self.forget(reown);
            return Ok(None);
        }
        let cluster_size = mapping.geometry.cluster_size();
        let most = to_usize((BYTES_AT_ONCE / cluster_size).max(1));
        let mut indices = Vec::new();
        let mut next = reown.next;
        while next < mapping.l1.len() && indices.len() < most {
            if mapping.l1_entry(next).table_offset().is_some() {
                indices.push(next);
            }
            next += 1;
        }
        let from_again = indices.is_empty();
        if from_again {
            if reown.again.is_empty() {
                self.forget(reown);
                return Ok(None);
            }
            let listener = reown
                .taken
                .take()
                .and_then(|cluster| active.taken.listen(cluster));
            if let Some(listener) = listener {
                listener.await;
            }
            indices.extend(reown.again.iter().copied().take(most));
        }
        let mut done = Done {
            tables: if from_again { 0 } else { to_u64(indices.len()) },
            bytes: 0,
        };
        let mut again = Vec::new();
        let loaded_before = reown.loaded.len();
        let mut tables = self.find_tables(target, &indices, reown, alone).await?;
        let learnt = self.ask(target, &mut tables, alone).await?;
        done.bytes += learnt.bytes;
        if !learnt.complete {
            // The tables are looked at again when more is known. Found in the store then, their slices
            // would count as used.
            drop(tables);
            for key in reown.loaded.drain(loaded_before..) {
                self.image.store.forget_unused(key);
            }
            done.tables = 0;
            return Ok(Some(done));
        }
        for found in tables {
            breathe(cluster_size);
            let mut modified = 0;
            match self.decide(target, &found, &mut modified) {
                Decided::Done => {}
                Decided::Again { taken } => {
                    again.push(found.l1_index);
                    reown.taken = reown.taken.or(taken);
                }
                Decided::Unsettled => break,
            }
            reown.modified += modified;
            done.bytes += modified + cluster_size;
        }
        if from_again {
            reown.again.drain(..indices.len());
        } else {
            reown.next = next;
        }
        reown.again.extend(again);
        if reown.modified >= MODIFIED_MAX || self.image.store.wants_write_back() {
            self.flush().await?;
            self.forget(reown);
            reown.modified = 0;
        } else if reown.modified == 0 {
            // Nothing of it has to stay for a flush.
            self.forget(reown);
        }
        Ok(Some(done))
    }

    /// Lets go of slices that nobody else has used.
    fn forget(&self, reown: &mut Reown) {
        for key in reown.loaded.drain(..) {
            self.image.store.forget_unused(key);
        }
    }

    /// The tables that only the active tree names, with their slices.
    async fn find_tables(
        &self,
        target: Target<'_>,
        indices: &[usize],
        reown: &mut Reown,
        alone: &Alone,
    ) -> Result<Vec<Found>, Error> {
        let mapping = target.mapping;
        let mut tables = Vec::new();
        for l1_index in indices {
            let entry = mapping.l1_entry(*l1_index);
            if entry.table_offset().is_none() {
                continue;
            }
            let table = mapping.table(*l1_index, entry)?;
            tables.push((mapping.geometry.host_cluster(table).get(), *l1_index, entry));
        }
        tables.sort_unstable_by_key(|table| table.0);
        let clusters: Vec<u64> = tables.iter().map(|table| table.0).collect();
        let alone = self.are_alone_now(target, alone, &clusters).await?;
        let lone = tables.into_iter().zip(alone).filter(|(_, alone)| *alone);
        let mut tables = stream::iter(lone)
            .map(|((_, l1_index, entry), _)| self.find_table(target, l1_index, entry))
            .buffered(READS_IN_FLIGHT);
        let mut found = Vec::new();
        while let Some((table, loaded)) = tables.try_next().await? {
            found.push(table);
            reown.loaded.extend(loaded);
        }
        Ok(found)
    }

    /// Loads and pins all slices of a table that L1 still names. Where it does not, the table comes
    /// back without any. Says which slices nobody else has loaded.
    async fn find_table(
        &self,
        target: Target<'_>,
        l1_index: usize,
        entry: L1Entry,
    ) -> Result<(Found, Vec<SliceKey>), Error> {
        let Target {
            mapping, active, ..
        } = target;
        let mut found = Found {
            l1_index,
            entry,
            owned: active.is_owned(l1_index, self.generation()),
            bodies: Vec::new(),
            entries: Vec::new(),
            alone: Vec::new(),
        };
        // What is read while this is held is a table, not what came after it in its cluster.
        let pin = self.pin();
        let Some(table) = entry
            .table_offset()
            .filter(|_| mapping.l1_entry(l1_index) == entry)
        else {
            return Ok((found, Vec::new()));
        };
        let (bodies, loaded) = self.slices_of(target, l1_index, table).await?;
        found.bodies = bodies;
        drop(pin);
        for body in &found.bodies {
            found
                .entries
                .extend((0..body.len()).map(|index| body.entry(index)));
        }
        Ok((found, loaded))
    }

    /// All slices of a table, pinned; past this worker's directory, since each is needed once. What
    /// is not in the store is read in one go.
    async fn slices_of(
        &self,
        target: Target<'_>,
        l1_index: usize,
        table: HostOffset,
    ) -> Result<(Vec<Arc<SliceBody>>, Vec<SliceKey>), Error> {
        let Target { layer, mapping, .. } = target;
        let slice_bytes = mapping.slice_bytes();
        let key = |number: u64| {
            let place = EntryPlace {
                l1_index,
                slice_in_table: number * slice_bytes,
                index: 0,
            };
            layer.slice_key(table, &place)
        };
        let count = mapping.geometry.cluster_size() / slice_bytes;
        let mut bodies = Pinned(Vec::with_capacity(to_usize(count)));
        let mut loaded = Vec::new();
        let mut absent = Vec::new();
        let mut loading = Vec::new();
        for number in 0..count {
            match self.image.store.look_up(key(number)) {
                Lookup::Live(body) => bodies.push(body),
                Lookup::Loading(listener) => loading.push((number, listener)),
                Lookup::Absent(ticket) => absent.push((number, ticket)),
            }
        }
        if !absent.is_empty() {
            let len = to_usize(mapping.geometry.cluster_size());
            let buf = AlignedBuf::zeroed(len);
            let (read, buf) = self.storage.read_buf(layer.file, table.get(), buf).await;
            read.map_err(|error| Error::io(format!("cannot read the L2 table at {table}"), error))?;
            for (number, ticket) in absent {
                let start = to_usize(number * slice_bytes);
                let bytes = &buf[start..start + to_usize(slice_bytes)];
                let body = Self::new_body(mapping, key(number), bytes);
                // Pinned before others see it, and not looked up: whoever does that has used it.
                bodies.push(Arc::clone(&body));
                loaded.push(key(number));
                ticket.finish_unused(body);
            }
        }
        for (number, listener) in loading {
            listener.await;
            loop {
                match self.image.store.look_up(key(number)) {
                    Lookup::Live(body) => {
                        bodies.push(body);
                        break;
                    }
                    Lookup::Loading(listener) => listener.await,
                    // Evicted again: the store is very small.
                    Lookup::Absent(ticket) => {
                        let body = self.load_slice(layer, mapping, key(number)).await?;
                        bodies.push(Arc::clone(&body));
                        loaded.push(key(number));
                        ticket.finish_unused(body);
                        break;
                    }
                }
            }
        }
        bodies.0.sort_unstable_by_key(|body| body.key().get());
        Ok((std::mem::take(&mut bodies.0), loaded))
    }

    /// Finds out which clusters of some tables have one reference, where that makes a difference.
    async fn ask(
        &self,
        target: Target<'_>,
        tables: &mut [Found],
        alone: &mut Alone,
    ) -> Result<Learnt, Error> {
        let geometry = target.mapping.geometry;
        let mut clusters: Vec<u64> = Vec::new();
        let mut places: Vec<(usize, usize)> = Vec::new();
        for (number, found) in tables.iter_mut().enumerate() {
            breathe(geometry.cluster_size());
            for (index, entry) in found.entries.iter().enumerate() {
                if let Some(host) = may_be_owned(target, found, index, *entry)
                    && !(found.owned && entry.copied())
                {
                    clusters.push(geometry.host_cluster(host).get());
                    places.push((number, index));
                }
            }
            found.alone = vec![false; found.entries.len()];
        }
        let learnt = self
            .learn_alone(target, alone, clusters.iter().copied())
            .await?;
        if learnt.complete {
            let said = self.are_alone(target, alone, &clusters).await?;
            for ((number, index), said) in places.into_iter().zip(said) {
                tables[number].alone[index] = said;
            }
        }
        Ok(learnt)
    }

    /// Sets and clears the copied flags of a table, and owns it. Adds the bytes of modified slices.
    fn decide(&self, target: Target<'_>, found: &Found, modified: &mut u64) -> Decided {
        let Target {
            mapping, active, ..
        } = target;
        let Found { l1_index, .. } = *found;
        #[cfg(test)]
        gap(Gap::Own);
        let mut l1 = lock(&active.l1);
        if !lock(&active.drops).all_settled() {
            return Decided::Unsettled;
        }
        let mut guards: Vec<_> = found.bodies.iter().map(|body| body.lock()).collect();
        let owned = active.is_owned(l1_index, self.generation());
        let is_current = !found.bodies.is_empty()
            && mapping.l1_entry(l1_index) == found.entry
            && owned == found.owned
            && found.bodies.iter().all(|body| !body.is_retired());
        if !is_current {
            return Decided::Again { taken: None };
        }
        let first = to_u64(l1_index) << (mapping.geometry.cluster_bits() - 3);
        let taken = active
            .taken
            .within(&(first..first + mapping.geometry.l2_entries()));
        let mut wait = None;
        let mut changed_since = false;
        let mut index = 0;
        for (body, state) in found.bodies.iter().zip(&mut guards) {
            let mut differs = false;
            for at in 0..body.len() {
                let (then, now) = (found.entries[index], body.entry(at));
                let host = may_be_owned(target, found, index, now);
                let guest = first + to_u64(index);
                let alone = found.alone[index];
                index += 1;
                // A flag that a link has set in a table of ours is right, and stays right.
                if host.is_none() || (owned && now.copied()) {
                    continue;
                }
                let unchanged = then.with_copied(false) == now.with_copied(false);
                changed_since |= !unchanged;
                let mut own = alone && unchanged;
                if own && taken.contains(&guest) {
                    wait = Some(guest);
                    own = false;
                }
                // The file's flags may differ from those in memory (see `settle`): a table that
                // becomes ours is written wherever it maps something.
                differs |= !owned || own;
                body.set_entry_locked(state, at, now.with_copied(own));
            }
            if differs {
                self.image.store.mark_modified_locked(body, state);
                *modified += mapping.slice_bytes();
            }
        }
        if let Some(since) = active.owned_since.get(l1_index) {
            since.store(self.generation(), Ordering::Release);
        }
        if !found.entry.copied()
            && let Some(slot) = mapping.l1.get(l1_index)
        {
            slot.store(found.entry.with_copied(true).0, Ordering::Release);
            l1.modified.push(l1_index);
        }
        if changed_since || wait.is_some() {
            Decided::Again { taken: wait }
        } else {
            Decided::Done
        }
    }
}

/// The host cluster of an entry that may carry the copied flag.
fn may_be_owned(
    target: Target<'_>,
    found: &Found,
    index: usize,
    entry: L2Entry,
) -> Option<HostOffset> {
    let mapping = target.mapping;
    if entry.0 == 0 {
        return None;
    }
    let slice = index / mapping.slice_entries();
    let cluster = if found
        .bodies
        .get(slice)
        .is_none_or(|body| body.is_suspicious())
    {
        // Some entry of the slice is damaged: only the others count.
        let span = to_u64(found.l1_index).saturating_mul(mapping.geometry.l2_table_span());
        let inside = to_u64(index) << mapping.geometry.cluster_bits();
        let table = found.entry.table_offset().unwrap_or_default();
        mapping
            .cluster(table, GuestOffset::new(span.saturating_add(inside)), entry)
            .ok()
    } else {
        entry.decode(mapping.geometry, mapping.version).ok()
    };
    match cluster? {
        Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. } => Some(host),
        Cluster::Unallocated | Cluster::ZeroPlain | Cluster::Compressed { .. } => None,
    }
}
