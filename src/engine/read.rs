//! Reading on the slow path: whatever the fast path cannot resolve.

use super::ImageEvent;
use super::error::{Error, ErrorKind};
use super::layer::{Layer, LayerKind, Mapping};
use super::pin::PinGuard;
use super::worker::Worker;
use crate::format::l2::Cluster;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{GuestOffset, HostOffset, to_usize};

/// A resolved piece of the virtual disk, as far as one step sees.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece<'a> {
    Zero,
    /// Bytes of a layer's file.
    Data {
        layer: &'a Layer,
        host_offset: u64,
    },
    /// Part of a compressed cluster.
    Compressed {
        layer: &'a Layer,
        mapping: &'a Mapping,
        host: HostOffset,
        bytes: u64,
        inside: u64,
    },
}

impl<S: Storage> Worker<S> {
    /// Reads a range of the virtual disk into `sg`.
    ///
    /// # Errors
    /// `OutOfRange`; `Io` of the host; `Corrupt` where the mapping is damaged, which also stops
    /// writes to the image.
    pub async fn read(&self, pin: PinGuard, offset: GuestOffset, sg: SgList) -> Result<(), Error> {
        self.image.check_range(offset, sg.len())?;
        let result = self.read_range(offset.get(), &sg).await;
        drop(pin);
        self.seen(result).await
    }

    /// Reacts to corruption that an operation met, and to metadata that it could not write.
    pub(crate) async fn seen<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        match &result {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.mark_corrupt(&error.chain()).await;
            }
            Err(error) if error.kind() == ErrorKind::Failed => {
                self.image.fail(ImageEvent::Failed {
                    message: error.chain(),
                });
            }
            _ => {}
        }
        result
    }

    pub(crate) async fn read_range(&self, offset: u64, sg: &SgList) -> Result<(), Error> {
        let mut done = 0;
        while done < sg.len() {
            let (piece, len) = self.resolve(offset + done, sg.len() - done).await?;
            match piece {
                Piece::Zero => sg.fill_zero(done, len),
                Piece::Data { layer, host_offset } => self
                    .storage
                    .read(layer.file, host_offset, sg.slice(done, len))
                    .await
                    .map_err(|error| {
                        Error::io(
                            format!(
                                "cannot read {len:#x} bytes at {host_offset:#x} of layer {}",
                                layer.index
                            ),
                            error,
                        )
                    })?,
                Piece::Compressed {
                    layer,
                    mapping,
                    host,
                    bytes,
                    inside,
                } => {
                    let key = (layer.index, host.get());
                    let cached = self.decompressed.borrow().get(key);
                    let cluster = match cached {
                        Some(cluster) => cluster,
                        None => {
                            let cluster = self.decompress(layer, mapping, host, bytes).await?;
                            self.decompressed.borrow_mut().insert(key, cluster)
                        }
                    };
                    let start = to_usize(inside);
                    sg.copy_from(done, &cluster[start..start + to_usize(len)]);
                }
            }
            done += len;
        }
        Ok(())
    }

    /// What a taken cluster's range holds now: `None` where it reads as zeroes.
    pub(crate) async fn old_bytes(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<Option<AlignedBuf>, Error> {
        let mut done = 0;
        while done < len {
            let (piece, piece_len) = self.resolve(offset + done, len - done).await?;
            if !matches!(piece, Piece::Zero) {
                let buf = AlignedBuf::zeroed(to_usize(len));
                return self.read_buffer(offset, buf).await.map(Some);
            }
            done += piece_len;
        }
        Ok(None)
    }

    async fn read_buffer(&self, offset: u64, mut buf: AlignedBuf) -> Result<AlignedBuf, Error> {
        // Through a list that owns its own copy: a buffer lent to the kernel is not ours.
        let len = buf.len();
        let sg = SgList::from_buf(AlignedBuf::zeroed(len));
        self.read_range(offset, &sg).await?;
        sg.copy_to(0, &mut buf);
        Ok(buf)
    }

    /// Resolves the first piece of a range, through the backing chain.
    pub(crate) async fn resolve(&self, position: u64, len: u64) -> Result<(Piece<'_>, u64), Error> {
        let mut left = len;
        for layer in &self.image.layers {
            let Some(inside) = layer
                .size
                .checked_sub(position)
                .filter(|inside| *inside > 0)
            else {
                return Ok((Piece::Zero, left));
            };
            left = left.min(inside);
            let mapping = match &layer.kind {
                LayerKind::Raw => {
                    return Ok((
                        Piece::Data {
                            layer,
                            host_offset: position,
                        },
                        left,
                    ));
                }
                LayerKind::Qcow2(mapping) => mapping,
            };
            let resolved = self.resolve_in(layer, mapping, position, left).await;
            let (piece, len) = resolved.map_err(|error| match error.kind() {
                // The active image is sound when its backing file is not.
                ErrorKind::Corrupt if layer.index > 0 => Error::new(
                    ErrorKind::Io,
                    format!(
                        "layer {} of the backing chain: {}",
                        layer.index,
                        error.chain()
                    ),
                ),
                _ => error,
            })?;
            match piece {
                Some(piece) => return Ok((piece, len)),
                None => left = len,
            }
        }
        Ok((Piece::Zero, left))
    }

    /// Resolves in one qcow2 layer; no piece means that the next layer has it.
    async fn resolve_in<'a>(
        &self,
        layer: &'a Layer,
        mapping: &'a Mapping,
        position: u64,
        len: u64,
    ) -> Result<(Option<Piece<'a>>, u64), Error> {
        let geometry = mapping.geometry;
        let cluster_size = geometry.cluster_size();
        let place = mapping.place(GuestOffset::new(position));
        let l1_entry = mapping.l1_entry(place.l1_index);
        if l1_entry.0 == 0 {
            let span = geometry.l2_table_span();
            return Ok((None, len.min(span - position % span)));
        }
        let table = mapping.table(place.l1_index, l1_entry)?;
        let slice = self.slice(layer, mapping, table, &place).await?;
        let inside = geometry.offset_in_cluster(position);
        let mut run = (cluster_size - inside).min(len);
        let guest = GuestOffset::new(position);
        let first = mapping.cluster(table, guest, slice.body.entry(place.index))?;
        let mut next = place.index + 1;
        while run < len && next < slice.body.len() {
            let guest = GuestOffset::new(position + run);
            // A bad entry ends the run; its own turn will tell.
            let Ok(cluster) = mapping.cluster(table, guest, slice.body.entry(next)) else {
                break;
            };
            let follows = match (first, cluster) {
                (
                    Cluster::Standard { host, .. },
                    Cluster::Standard {
                        host: next_host, ..
                    },
                ) => next_host == host + (inside + run),
                (Cluster::Unallocated, Cluster::Unallocated)
                | (
                    Cluster::ZeroPlain | Cluster::ZeroAllocated { .. },
                    Cluster::ZeroPlain | Cluster::ZeroAllocated { .. },
                ) => true,
                _ => false,
            };
            if !follows {
                break;
            }
            run = (run + cluster_size).min(len);
            next += 1;
        }
        let piece = match first {
            Cluster::Unallocated => None,
            Cluster::ZeroPlain | Cluster::ZeroAllocated { .. } => Some(Piece::Zero),
            Cluster::Standard { host, .. } => Some(Piece::Data {
                layer,
                host_offset: host.get() + inside,
            }),
            Cluster::Compressed { host, bytes } => Some(Piece::Compressed {
                layer,
                mapping,
                host,
                bytes,
                inside,
            }),
        };
        Ok((piece, run))
    }
}
