//! Making and copying L2 tables: the only places that change the L1 table.
//!
//! Allowed outcomes of a power cut: the L1 entry names the old table or the new one with all its
//! content; the old table's refcount goes down only after the new name is durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::active::{Active, Dropped};
use super::cache::SliceKey;
use super::cache::slice::SliceBody;
use super::error::{Error, ErrorKind, lock};
use super::layer::{EntryPlace, Layer, Mapping};
use super::order::keeps;
use super::pin::PinGuard;
use super::taken::TakenGuard;
use super::worker::{PinnedSlice, Worker};
use crate::format::l1::L1Entry;
use crate::format::l2::L2Entry;
use crate::storage::Storage;
use crate::units::{HostOffset, to_u64};

/// The active layer in its parts, as every write needs it.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) layer: &'a Layer,
    pub(crate) mapping: &'a Mapping,
    pub(crate) active: &'a Active,
}

impl<S: Storage> Worker<S> {
    /// The L2 table of an L1 index, ours alone in the generation of `pin`: made or copied if need
    /// be. A pin of a generation that has passed is renewed where the table is not owned in it.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Corrupt`; nothing is half-linked then.
    pub(crate) async fn owned_table(
        &self,
        target: Target<'_>,
        l1_index: usize,
        pin: &mut PinGuard,
    ) -> Result<HostOffset, Error> {
        loop {
            let mut owned = target.active.is_owned(l1_index, pin.generation());
            if !owned && pin.renew() {
                owned = target.active.is_owned(l1_index, pin.generation());
            }
            let entry = target.mapping.l1_entry(l1_index);
            if entry.0 == 0 {
                self.make_table(target, l1_index).await?;
                continue;
            }
            let table = target.mapping.table(l1_index, entry)?;
            if owned {
                return Ok(table);
            }
            self.copy_table(target, l1_index, table).await?;
        }
    }

    /// Links an empty table, unless somebody else was quicker.
    async fn make_table(&self, target: Target<'_>, l1_index: usize) -> Result<(), Error> {
        let Target {
            mapping, active, ..
        } = target;
        let Some(_taken) = take_table(active, l1_index).await else {
            return Ok(());
        };
        if mapping.l1_entry(l1_index).0 != 0 {
            return Ok(());
        }
        let host = self.new_table_cluster(target).await?;
        let mut l1 = lock(&active.l1);
        l1.unnamed_tables.insert(host.get());
        l1.modified.push(l1_index);
        self.store_l1(target, l1_index, host);
        Ok(())
    }

    /// A cluster that is counted and reads as zeroes, with its blocks on the host allocated, so
    /// that writing the table back later does not run out of space.
    async fn new_table_cluster(&self, target: Target<'_>) -> Result<HostOffset, Error> {
        let Target {
            layer,
            mapping,
            active,
        } = target;
        let run = self.allocate(active, 1).await?;
        let host = active.allocator.offset(run.start);
        let cluster_size = mapping.geometry.cluster_size();
        let zeroed = if keeps!(ZeroNewTable) {
            self.storage
                .write_zeroes(layer.file, host.get(), cluster_size, false)
                .await
        } else {
            Ok(())
        };
        if let Err(error) = zeroed {
            active.allocator.give_back(run.start, 1);
            return Err(Error::io(
                format!("cannot initialise the L2 table at {host}"),
                error,
            ));
        }
        if let Err(error) = active.allocator.publish(&self.storage, run.start, 1).await {
            active.allocator.give_back(run.start, 1);
            return Err(error);
        }
        Ok(host)
    }

    /// Names a table in the resident L1. The L1 lock is held.
    fn store_l1(&self, target: Target<'_>, l1_index: usize, host: HostOffset) {
        let entry = L1Entry::new(host, true);
        if let Some(slot) = target.mapping.l1.get(l1_index) {
            slot.store(entry.0, Ordering::Release);
        }
        if let Some(since) = target.active.owned_since.get(l1_index) {
            since.store(self.image.board.generation(), Ordering::Release);
        }
    }

    /// Puts a copy of a shared table in its place, with every copied flag cleared.
    pub(crate) async fn copy_table(
        &self,
        target: Target<'_>,
        l1_index: usize,
        old: HostOffset,
    ) -> Result<(), Error> {
        let Target {
            layer,
            mapping,
            active,
        } = target;
        let Some(_taken) = take_table(active, l1_index).await else {
            return Ok(());
        };
        let entry = mapping.l1_entry(l1_index);
        if entry.table_offset() != Some(old) || active.is_owned(l1_index, self.generation()) {
            return Ok(());
        }
        let mut old_slices = Vec::new();
        let mut at = 0;
        while at < mapping.geometry.cluster_size() {
            let place = EntryPlace {
                l1_index,
                slice_in_table: at,
                index: 0,
            };
            old_slices.push(self.slice(layer, mapping, old, &place).await?);
            at += mapping.slice_bytes();
        }
        refuse_misleading(mapping, old, &old_slices)?;
        let host = self.new_table_cluster(target).await?;
        let new_slices = self.new_slices(layer, mapping, host, &old_slices);
        let copied = {
            let mut l1 = lock(&active.l1);
            let guards: Vec<_> = old_slices.iter().map(|slice| slice.body.lock()).collect();
            let current = mapping.l1_entry(l1_index);
            let valid = current == entry
                && !active.is_owned(l1_index, self.generation())
                && old_slices.iter().all(|slice| !slice.body.is_retired());
            if valid {
                for (old_slice, new_slice) in old_slices.iter().zip(&new_slices) {
                    let mut state = new_slice.lock();
                    for index in 0..new_slice.len() {
                        let entry = shared(old_slice.body.entry(index));
                        new_slice.set_entry_locked(&mut state, index, entry);
                    }
                    self.image.store.mark_modified_locked(new_slice, &mut state);
                }
                l1.unnamed_tables.insert(host.get());
                l1.modified.push(l1_index);
                self.store_l1(target, l1_index, host);
                let start = mapping.geometry.host_cluster(old).get();
                active.drop_shared(Dropped {
                    start,
                    count: 1,
                    tables: true,
                });
            }
            drop(guards);
            valid
        };
        for slice in &new_slices {
            slice.unpin();
        }
        if !copied {
            let epoch = self.image.board.end_epoch();
            let cluster = mapping.geometry.host_cluster(host).get();
            active
                .allocator
                .release(&self.storage, cluster, 1, epoch, true)
                .await?;
        }
        Ok(())
    }

    /// Empty, pinned slices of a table that nothing names yet.
    fn new_slices(
        &self,
        layer: &Layer,
        mapping: &Mapping,
        host: HostOffset,
        like: &[PinnedSlice<'_>],
    ) -> Vec<Arc<SliceBody>> {
        let mut at = 0;
        let mut slices = Vec::with_capacity(like.len());
        for old in like {
            let key = SliceKey::new(layer.index, host + at);
            let entries = (0..old.body.len()).map(|_| AtomicU64::new(0)).collect();
            let body = Arc::new(SliceBody::new(key, entries, old.body.is_suspicious()));
            body.pin();
            self.image.store.insert_new(Arc::clone(&body));
            slices.push(body);
            at += mapping.slice_bytes();
        }
        slices
    }

    pub(crate) fn generation(&self) -> u64 {
        self.image.board.generation()
    }
}

/// Takes one L2 table; `None` after somebody else has let go of it, who may have changed it.
async fn take_table(active: &Active, l1_index: usize) -> Option<TakenGuard> {
    let index = to_u64(l1_index);
    match active.taken_tables.try_take(index..index + 1) {
        Ok(taken) => Some(taken),
        Err(listener) => {
            listener.await;
            None
        }
    }
}

/// Refuses a table with entries that point into what the file has lost.
fn refuse_misleading(
    mapping: &Mapping,
    table: HostOffset,
    slices: &[PinnedSlice<'_>],
) -> Result<(), Error> {
    for slice in slices.iter().filter(|slice| slice.body.is_suspicious()) {
        for index in 0..slice.body.len() {
            let entry = slice.body.entry(index);
            if mapping.misleads(table, entry) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "the L2 table at {table} points far past the end of the file, which was \
                         cut short ({:#018x})",
                        entry.0
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// An entry as it stands in a table whose clusters are shared. A compressed entry has no copied
/// flag: its bit 63 is 0 already.
fn shared(entry: L2Entry) -> L2Entry {
    if entry.is_compressed() {
        entry
    } else {
        entry.with_copied(false)
    }
}
