//! Compressed clusters: zlib (raw deflate) and zstd, decoded only.
//!
//! A compressed cluster never changes in place, so that decoded ones can be kept by where they
//! start. A start is never reused for another compressed cluster while the image is open: we write
//! none.

use std::rc::Rc;

use super::error::{Error, ErrorKind};
use super::layer::{Layer, Mapping};
use super::worker::Worker;
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostOffset, to_usize};

/// Decoded clusters per worker: a sequential reader needs one, a few interleaved ones a few.
const KEPT: usize = 4;

/// Layer and host offset of the compressed data.
type Key = (u8, u64);

/// The last few decoded clusters of a worker.
#[derive(Debug, Default)]
pub(crate) struct ClusterCache {
    clusters: Vec<(Key, Rc<[u8]>)>,
    next: usize,
}

impl ClusterCache {
    pub(crate) fn get(&self, key: Key) -> Option<Rc<[u8]>> {
        self.clusters
            .iter()
            .find(|(kept, _)| *kept == key)
            .map(|(_, cluster)| Rc::clone(cluster))
    }

    pub(crate) fn insert(&mut self, key: Key, cluster: Rc<[u8]>) -> Rc<[u8]> {
        let kept = (key, Rc::clone(&cluster));
        if self.clusters.len() < KEPT {
            self.clusters.push(kept);
        } else {
            self.clusters[self.next] = kept;
            self.next = (self.next + 1) % KEPT;
        }
        cluster
    }
}

impl<S: Storage> Worker<S> {
    /// Reads and decodes a compressed cluster.
    ///
    /// # Errors
    /// `Io` when it cannot be read or does not decode to a whole cluster. The mapping itself is
    /// sound then, so that the image is not marked corrupt.
    pub(crate) async fn decompress(
        &self,
        layer: &Layer,
        mapping: &Mapping,
        host: HostOffset,
        bytes: u64,
    ) -> Result<Rc<[u8]>, Error> {
        let buf = AlignedBuf::zeroed(to_usize(bytes));
        let (read, buf) = self.storage.read_buf(layer.file, host.get(), buf).await;
        read.map_err(|error| {
            Error::io(
                format!("cannot read the compressed cluster at {host}"),
                error,
            )
        })?;
        let cluster_size = to_usize(mapping.geometry.cluster_size());
        let mut cluster = vec![0; cluster_size];
        let decoded = if mapping.zstd {
            decode_zstd(&buf, &mut cluster)
        } else {
            decode_deflate(&buf, &mut cluster)
        };
        if decoded {
            Ok(cluster.into())
        } else {
            Err(Error::new(
                ErrorKind::Io,
                format!(
                    "the compressed cluster at {host} of layer {} does not decode",
                    layer.index
                ),
            ))
        }
    }
}

/// Raw deflate. The input ends somewhere in its last sector.
fn decode_deflate(input: &[u8], cluster: &mut [u8]) -> bool {
    let mut inflate = flate2::Decompress::new(false);
    let done = inflate.decompress(input, cluster, flate2::FlushDecompress::Finish);
    done.is_ok() && inflate.total_out() == u64::try_from(cluster.len()).unwrap_or(u64::MAX)
}

/// One zstd frame. The input ends somewhere in its last sector.
fn decode_zstd(input: &[u8], cluster: &mut [u8]) -> bool {
    let Ok(mut decoder) = zstd::stream::raw::Decoder::new() else {
        return false;
    };
    let mut source = zstd::stream::raw::InBuffer::around(input);
    let mut target = zstd::stream::raw::OutBuffer::around(cluster);
    while target.pos() < target.capacity() {
        let before = (source.pos(), target.pos());
        if zstd::stream::raw::Operation::run(&mut decoder, &mut source, &mut target).is_err() {
            return false;
        }
        if (source.pos(), target.pos()) == before {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn both_codecs_decode_a_cluster_followed_by_padding() {
        let cluster: Vec<u8> = (0..65536_u32)
            .map(|n| u8::try_from(n / 300).expect("small"))
            .collect();
        let mut deflate =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        deflate.write_all(&cluster).expect("memory");
        let mut packed = deflate.finish().expect("memory");
        packed.extend([0xaa; 300]);
        let mut out = vec![0; 65536];
        assert!(decode_deflate(&packed, &mut out));
        assert_eq!(out, cluster);
        let mut packed = zstd::bulk::compress(&cluster, 3).expect("memory");
        packed.extend([0xaa; 300]);
        let mut out = vec![0; 65536];
        assert!(decode_zstd(&packed, &mut out));
        assert_eq!(out, cluster);
    }

    #[test]
    fn broken_data_is_refused() {
        let mut out = vec![0; 65536];
        assert!(!decode_deflate(&[0xff; 512], &mut out));
        assert!(!decode_zstd(&[0xff; 512], &mut out));
        assert!(!decode_zstd(&[], &mut out));
        assert!(!decode_deflate(&[], &mut out));
    }
}
