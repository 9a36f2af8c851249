//! Reading many clusters of metadata at once, and writing many pieces of it.
//!
//! Neighbours in the file are read by one request, and several requests are in flight, so that tables
//! that lie all over the file do not cost a round trip each. All of them share one buffer: one for
//! each would be a page at least, where a cluster may be 512 bytes.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::ops::Range;

use futures_util::stream::{self, StreamExt};

use super::breath::breathe;
use crate::storage::buffer::BufOwner;
use crate::storage::{AlignedBuf, FileId, SgList, Storage};
use crate::units::{to_u64, to_usize};

/// Bytes of one request (at least one cluster).
const PIECE_BYTES: u64 = 256 << 10;
/// Requests in flight at a time.
const IN_FLIGHT: usize = 32;

/// Clusters that were read.
pub(super) struct Read {
    /// One after the other; anything in the place of those that failed.
    pub(super) buf: AlignedBuf,
    /// Which could not be read, in ascending order, and why.
    pub(super) failed: Vec<(Range<usize>, io::Error)>,
}

/// Reads the clusters at these host offsets, which ascend where that is possible.
pub(super) async fn read_clusters<S: Storage>(
    storage: &S,
    file: FileId,
    cluster_size: u64,
    starts: &[u64],
) -> Read {
    let cluster_bytes = to_usize(cluster_size);
    let len = starts.len() * cluster_bytes;
    let owner = BufOwner::new(AlignedBuf::zeroed(len));
    let whole = owner.sg(len);
    let read = |piece: Range<usize>| {
        let at = to_u64(piece.start) * cluster_size;
        let part = whole.slice(at, to_u64(piece.len()) * cluster_size);
        async move {
            let result = storage.read(file, starts[piece.start], part).await;
            breathe(to_u64(piece.len()) * cluster_size);
            result.err().map(|error| (piece, error))
        }
    };
    let mut failed: Vec<_> = stream::iter(pieces(cluster_size, starts))
        .map(read)
        .buffered(IN_FLIGHT)
        .filter_map(std::future::ready)
        .collect()
        .await;
    drop(whole);
    let buf = owner.into_buf().unwrap_or_else(|| {
        // The reads are over, so nothing should hold the buffer. If something does, it is not ours.
        let error = io::Error::other("a finished read kept its buffer");
        failed = vec![(0..starts.len(), error)];
        AlignedBuf::zeroed(len)
    });
    Read { buf, failed }
}

/// Writes pieces of metadata, each to its host offset. Returns when none is in flight any more, also after
/// one has failed: a later write to the same place must not be overtaken by an earlier one.
///
/// # Errors
/// The first failure, and the host offset of the piece.
pub(super) async fn write_pieces<'a, S: Storage>(
    storage: &S,
    file: FileId,
    pieces: impl IntoIterator<Item = (u64, &'a [u8])>,
) -> Result<(), (u64, io::Error)> {
    let failed = Cell::new(false);
    let write = |(host_offset, bytes): (u64, &'a [u8])| {
        let failed = &failed;
        async move {
            let sg = SgList::from_buf(AlignedBuf::from_slice(bytes));
            let written = storage.write(file, host_offset, sg).await;
            failed.set(failed.get() || written.is_err());
            written.map_err(|error| (host_offset, error))
        }
    };
    let mut writes = stream::iter(pieces)
        .take_while(|_| std::future::ready(!failed.get()))
        .map(write)
        .buffer_unordered(IN_FLIGHT);
    let mut result = Ok(());
    while let Some(written) = writes.next().await {
        result = result.and(written);
    }
    result
}

/// The requests for these clusters.
fn pieces(cluster_size: u64, starts: &[u64]) -> Vec<Range<usize>> {
    let most = to_usize((PIECE_BYTES / cluster_size).max(1));
    let mut pieces: Vec<Range<usize>> = Vec::new();
    for (index, start) in starts.iter().enumerate() {
        match pieces.last_mut() {
            Some(last)
                if last.len() < most
                    && starts[index - 1].checked_add(cluster_size) == Some(*start) =>
            {
                last.end += 1;
            }
            _ => pieces.push(index..index + 1),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::block_on;
    use crate::storage::sim::{Driver, Fault, OpKind, SimDisk, SimFileOptions};

    #[test]
    fn neighbours_are_one_request_as_long_as_it_is_short() {
        let starts = [512, 1024, 2048, 2560, 3072, 0, 512];
        assert_eq!(pieces(512, &starts), [0..2, 2..5, 5..7]);
        assert_eq!(pieces(512, &[]), []);
        let large = 2 << 20;
        assert_eq!(pieces(large, &[0, large]), [0..1, 1..2]);
    }

    #[test]
    fn a_failed_write_is_told_when_the_others_are_over() {
        let disk = SimDisk::new(1);
        let file = disk.add_file(&[0; 4096], SimFileOptions::default());
        let mut driver = Driver::new(1, &disk);
        disk.hold(|operation| operation.offset == 512);
        disk.fail_nth_of(OpKind::Write, 2, 28);
        let storage = disk.storage();
        let told = driver.spawn(async move {
            let pieces = [512, 1024, 2048].map(|offset| (offset, [1; 512]));
            let pieces = pieces.iter().map(|(offset, bytes)| (*offset, &bytes[..]));
            write_pieces(&storage, file, pieces).await
        });
        driver.run_until_stuck();
        assert!(!told.is_done(), "a write is in flight");
        assert_eq!(disk.in_flight().len(), 1);
        disk.release();
        driver.run();
        let (offset, error) = told.take().expect("is over").expect_err("has failed");
        assert_eq!((offset, error.raw_os_error()), (1024, Some(28)));
    }

    #[test]
    fn clusters_come_in_the_order_of_the_question_and_each_request_fails_by_itself() {
        let disk = SimDisk::new(1);
        let content: Vec<u8> = (0..8).flat_map(|cluster| [cluster; 512]).collect();
        let file = disk.add_file(&content, SimFileOptions::default());
        disk.set_immediate(true);
        let storage = disk.storage();
        let starts = [7, 0, 1, 4, 6].map(|cluster| cluster * 512);
        let first = |read: &Read, index: usize| read.buf[index * 512];
        let read = block_on(read_clusters(&storage, file, 512, &starts));
        let found = [0, 1, 2, 3, 4].map(|index| first(&read, index));
        assert_eq!(found, [7, 0, 1, 4, 6]);
        assert!(read.failed.is_empty());
        disk.inject(Fault {
            kind: Some(OpKind::Read),
            from: 2,
            count: 1,
            errno: 5,
        });
        let read = block_on(read_clusters(&storage, file, 512, &starts));
        let failed = read.failed.iter().flat_map(|(which, _)| which.clone());
        assert_eq!(failed.collect::<Vec<_>>(), [1, 2]);
        assert_eq!([0, 3, 4].map(|index| first(&read, index)), [7, 4, 6]);
    }
}
