//! DISCARD and WRITE_ZEROES, as virtio-blk defines them.
//!
//! Whole clusters change their entry; parts of clusters are written as zeroes (WRITE_ZEROES) or
//! left alone (DISCARD, whose effect on them is free to choose).
//!
//! | | v3 | v2 |
//! |---|---|---|
//! | zero, may unmap | plain zero entry (unallocated where nothing lies below) | unallocated where nothing lies below, else zeroes are written |
//! | zero, keep | zero entry that keeps its own cluster | zeroes are written |
//! | discard | as zero, may unmap | only where nothing lies below |

use super::error::Error;
use super::layer::LayerKind;
use super::pin::PinGuard;
use super::table::Target;
use super::worker::Worker;
use crate::format::l2::{Cluster, L2Entry};
use crate::storage::{SgList, Storage};
use crate::units::{GuestOffset, HostOffset, to_u64};

/// Zeroes written in one go where an entry cannot say "zero".
const ZERO_CHUNK: u64 = 1 << 20;

/// What a range should become.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wish {
    Discard,
    Zero { unmap: bool },
}

impl<S: Storage> Worker<S> {
    /// Tells the image that a range is not needed. It reads as zeroes or as before afterwards.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub async fn discard(&self, pin: PinGuard, offset: GuestOffset, len: u64) -> Result<(), Error> {
        self.image.check_range(offset, len)?;
        self.prepare_write().await?;
        if !self.image.discard {
            return Ok(());
        }
        self.change(pin, offset, len, Wish::Discard).await
    }

    /// Makes a range read as zeroes. `unmap` allows to give its clusters back.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub async fn write_zeroes(
        &self,
        pin: PinGuard,
        offset: GuestOffset,
        len: u64,
        unmap: bool,
    ) -> Result<(), Error> {
        self.image.check_range(offset, len)?;
        self.prepare_write().await?;
        let unmap = unmap && self.image.discard;
        self.change(pin, offset, len, Wish::Zero { unmap }).await
    }

    async fn change(
        &self,
        mut pin: PinGuard,
        offset: GuestOffset,
        len: u64,
        wish: Wish,
    ) -> Result<(), Error> {
        let Some(layer) = self.image.layers.first() else {
            return Ok(());
        };
        let result = match (&layer.kind, &self.image.active) {
            (LayerKind::Qcow2(mapping), Some(active)) => {
                let target = Target {
                    layer,
                    mapping,
                    active,
                };
                self.change_range(target, &mut pin, offset.get(), len, wish)
                    .await
            }
            _ => {
                let fault = |error| Error::io("cannot zero a range of the raw image", error);
                match wish {
                    Wish::Discard => self
                        .storage
                        .punch_hole(layer.file, offset.get(), len)
                        .await
                        .map(|_| ())
                        .map_err(fault),
                    Wish::Zero { unmap } => self
                        .storage
                        .write_zeroes(layer.file, offset.get(), len, unmap)
                        .await
                        .map_err(fault),
                }
            }
        };
        drop(pin);
        self.seen(result).await
    }

    async fn change_range(
        &self,
        target: Target<'_>,
        pin: &mut PinGuard,
        offset: u64,
        len: u64,
        wish: Wish,
    ) -> Result<(), Error> {
        let geometry = target.mapping.geometry;
        let cluster_size = geometry.cluster_size();
        let end = offset + len;
        // The cluster that the disk ends in counts as whole when the range reaches that end.
        let whole_end = if end >= target.layer.size {
            geometry.cluster_align_up(end)
        } else {
            end
        };
        let mut position = offset;
        while position < end {
            let inside = geometry.offset_in_cluster(position);
            if inside > 0 || position + cluster_size > whole_end {
                let part = (cluster_size - inside).min(end - position);
                if wish != Wish::Discard {
                    self.zero_bytes(pin, position, part).await?;
                }
                position += part;
                continue;
            }
            let whole = geometry.cluster_align_down(whole_end - position);
            position += self
                .change_clusters(target, pin, position, whole, wish)
                .await?;
        }
        Ok(())
    }

    /// Writes zeroes over part of a range, unless it reads as zeroes already.
    async fn zero_bytes(&self, pin: &mut PinGuard, position: u64, len: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZERO_CHUNK);
            if self.old_bytes(position + done, part).await?.is_some() {
                self.write_range(pin, position + done, &SgList::zeroes(part))
                    .await?;
            }
            done += part;
        }
        Ok(())
    }

    /// Changes the entries of whole clusters; returns how many bytes it dealt with.
    async fn change_clusters(
        &self,
        target: Target<'_>,
        pin: &mut PinGuard,
        position: u64,
        len: u64,
        wish: Wish,
    ) -> Result<u64, Error> {
        let Target { mapping, .. } = target;
        let below = self.has_below(position);
        let place = mapping.place(GuestOffset::new(position));
        if mapping.l1_entry(place.l1_index).0 == 0 && !below {
            let span = mapping.geometry.l2_table_span();
            return Ok(len.min(span - position % span));
        }
        if mapping.version < 3 && (below || wish == (Wish::Zero { unmap: false })) {
            let part = len.min(ZERO_CHUNK.max(mapping.geometry.cluster_size()));
            let part = part.min(mapping.geometry.l2_table_span());
            if wish != Wish::Discard {
                let inside_disk = target.layer.size.next_multiple_of(512) - position;
                self.zero_bytes(pin, position, part.min(inside_disk))
                    .await?;
            }
            return Ok(part);
        }
        let span = self.look(target, pin, position, len).await?;
        let count = span.entries.len();
        let bytes = to_u64(count) * mapping.geometry.cluster_size();
        let already = (0..count).try_fold(true, |already, index| {
            Ok(already && wanted(span.cluster(index)?, wish, below).is_none())
        })?;
        if already {
            return Ok(bytes);
        }
        if pin.renew() {
            return Ok(0);
        }
        let Some(taken) = self.take(&span, count).await else {
            return Ok(0);
        };
        self.link(&span, count, |_, cluster| wanted(cluster, wish, below))
            .await?;
        drop(taken);
        self.relieve().await?;
        Ok(bytes)
    }

    /// May something other than zeroes show through an unallocated cluster at `position`?
    fn has_below(&self, position: u64) -> bool {
        self.image
            .layers
            .get(1)
            .is_some_and(|layer| position < layer.size)
    }
}

/// The entry that fulfils a wish; `None` when the present one does.
fn wanted(cluster: Cluster, wish: Wish, below: bool) -> Option<L2Entry> {
    let gone = if below {
        L2Entry::zero_plain()
    } else {
        L2Entry::UNALLOCATED
    };
    let keep = |host: HostOffset, copied| Some(L2Entry::zero_allocated(host, copied));
    match (wish, cluster) {
        (_, Cluster::Unallocated) => below.then(L2Entry::zero_plain),
        (_, Cluster::ZeroPlain) | (Wish::Zero { unmap: false }, Cluster::ZeroAllocated { .. }) => {
            None
        }
        (Wish::Zero { unmap: false }, Cluster::Standard { host, copied }) => keep(host, copied),
        (Wish::Zero { unmap: false }, Cluster::Compressed { .. }) => Some(L2Entry::zero_plain()),
        (
            Wish::Discard | Wish::Zero { unmap: true },
            Cluster::Standard { .. } | Cluster::ZeroAllocated { .. } | Cluster::Compressed { .. },
        ) => Some(gone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostOffset = HostOffset::new(0x5_0000);

    #[test]
    fn nothing_below_shows_through_a_discarded_cluster() {
        let standard = Cluster::Standard {
            host: HOST,
            copied: true,
        };
        assert_eq!(
            wanted(standard, Wish::Discard, true),
            Some(L2Entry::zero_plain())
        );
        assert_eq!(
            wanted(standard, Wish::Discard, false),
            Some(L2Entry::UNALLOCATED)
        );
        assert_eq!(wanted(Cluster::Unallocated, Wish::Discard, false), None);
    }

    #[test]
    fn zeroing_without_unmap_keeps_the_cluster() {
        let standard = Cluster::Standard {
            host: HOST,
            copied: true,
        };
        let wish = Wish::Zero { unmap: false };
        assert_eq!(
            wanted(standard, wish, true),
            Some(L2Entry::zero_allocated(HOST, true))
        );
        assert_eq!(wanted(Cluster::ZeroPlain, wish, true), None);
    }
}
