//! Workers on real threads and a real file: what the simulation's single thread cannot interleave.
//!
//! Each thread has its own stripes of the disk and knows their content; tables, refcount blocks, the
//! allocator and flushes are shared. Not deterministic, so a failure is a race.

use std::path::Path;
use std::sync::Arc;

use super::build::{Fill, Recipe};
use super::model::sector_bytes;
use crate::engine::check::{Repair, check};
use crate::engine::{Image, LayerFormat, LayerSpec, OpenOptions};
use crate::storage::{AlignedBuf, BlockingStorage, FileId, HostFile, OpenMode, SgList, block_on};
use crate::units::{GuestOffset, to_usize};

const THREADS: u64 = 4;
/// Sectors of a stripe: less than a cluster, so that threads meet in clusters too.
const STRIPE: u64 = 4;

fn storage(path: &Path) -> BlockingStorage {
    let file = HostFile::open(
        path,
        OpenMode {
            write: true,
            direct: false,
        },
    )
    .expect("opens");
    BlockingStorage::new(vec![Arc::new(file)])
}

/// Random work on the stripes of one thread; returns their versions.
fn work(image: &Arc<Image>, path: &Path, thread: u64, versions: &mut [u32], requests: u32) {
    let worker = image.worker(storage(path));
    let mut random = fastrand::Rng::with_seed(thread);
    let stripes = versions.len() as u64 / STRIPE;
    for request in 0..requests {
        let stripe = random.u64(..stripes);
        let first = (stripe * THREADS + thread) * STRIPE;
        let offset = GuestOffset::new(first * 512);
        let mine = &mut versions[to_usize(stripe * STRIPE)..to_usize((stripe + 1) * STRIPE)];
        let pin = worker.pin();
        match random.u8(..10) {
            0..=4 => {
                mine.fill(request + 100);
                let bytes: Vec<u8> = (first..first + STRIPE)
                    .flat_map(|sector| sector_bytes(sector, request + 100))
                    .collect();
                let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
                block_on(worker.write(pin, offset, sg)).expect("write");
            }
            5 | 6 => {
                mine.fill(0);
                block_on(worker.write_zeroes(pin, offset, STRIPE * 512, true)).expect("zeroes");
            }
            7 => block_on(worker.flush()).expect("flush"),
            _ => {
                let sg = SgList::from_buf(AlignedBuf::zeroed(to_usize(STRIPE * 512)));
                block_on(worker.read(pin, offset, sg.slice(0, STRIPE * 512))).expect("read");
                let expected: Vec<u8> = (first..first + STRIPE)
                    .zip(&*mine)
                    .flat_map(|(sector, version)| sector_bytes(sector, *version))
                    .collect();
                assert!(sg.to_vec() == expected, "thread {thread}, sector {first}");
            }
        }
    }
}

#[test]
fn threads_that_share_tables_and_clusters_lose_nothing() {
    // Clusters of one stripe (whole clusters are freed and reused) and of two.
    for cluster_bits in [11, 12] {
        let fill = |cluster| {
            if cluster % 2 == 0 {
                Fill::Data
            } else {
                Fill::None
            }
        };
        let recipe = Recipe {
            fill,
            ..Recipe::plain(cluster_bits, 1 << 20)
        };
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("t.qcow2");
        std::fs::write(&path, recipe.build()).expect("image");
        let specs = [LayerSpec {
            file: FileId(0),
            format: LayerFormat::Qcow2,
        }];
        let options = OpenOptions {
            no_flush: true,
            l2_cache_size: Some(0),
            l2_cache_entry_size: Some(512),
            refcount_cache_size: Some(0),
            ..OpenOptions::default()
        };
        let image = block_on(Image::open(&storage(&path), &specs, &options)).expect("opens");
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (image, path) = (&image, &path);
                scope.spawn(move || {
                    let stripes = recipe.sectors() / STRIPE / THREADS;
                    let mut versions: Vec<u32> = (0..stripes)
                        .flat_map(|stripe| {
                            let first = (stripe * THREADS + thread) * STRIPE;
                            (first..first + STRIPE).map(|sector| recipe.value(sector))
                        })
                        .collect();
                    work(image, path, thread, &mut versions, 4000);
                });
            }
        });
        let worker = image.worker(storage(&path));
        block_on(worker.close()).expect("closes");
        let report = block_on(check(&storage(&path), FileId(0), Repair::None, &mut |_| ()));
        let report = report.expect("check");
        assert!(report.is_clean(), "{:?}", report.problems);
    }
}
