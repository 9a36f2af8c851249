//! Makes an empty image.
//!
//! All tables are laid out at once, in this order: header, refcount table, refcount blocks, L1 table
//! and, where space is preallocated, L2 tables and data clusters. Everything but the header's first
//! sector is written and made durable first, and where that goes there are zeroes until then. After a
//! crash there is either a whole image, or a file that nobody takes for one.

#![forbid(unsafe_code)]

use super::LayerFormat;
use super::error::{Error, ErrorKind};
use super::order::keeps;
use super::source::Source;
use crate::format::geometry::{CLUSTER_BITS_MAX, L1_BYTES_MAX, REFTABLE_BYTES_MAX};
use crate::format::header::COMPAT_LAZY_REFCOUNTS;
use crate::format::{Extension, Geometry, Header, L1Entry, L2Entry, RefcountTableEntry, refcount};
use crate::storage::{AlignedBuf, FileId, Storage};
use crate::units::{HostOffset, SECTOR_SIZE, checked_align_up, to_u64, to_usize};

/// Longest single write of zeroes, so that progress can be seen.
const ZEROES_STEP: u64 = 64 << 20;

/// What is allocated in advance.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// L2 tables and refcounts; the data clusters are holes in the file.
    Metadata,
    /// The same, and the host reserves the space.
    Falloc,
    /// The same, and zeroes are written everywhere.
    Full,
}

/// The backing file of a new image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// Its name as it will stand in the header.
    pub name: Vec<u8>,
    /// Its format.
    pub format: LayerFormat,
}

/// What the new image is like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateOptions {
    /// In bytes; rounded up to whole sectors.
    pub virtual_size: u64,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the refcount width.
    pub refcount_order: u32,
    /// 2 or 3.
    pub version: u32,
    /// Refcounts may lag under the dirty bit; v3 only.
    pub lazy_refcounts: bool,
    /// What is allocated in advance; not together with a backing file, which it would hide.
    pub preallocation: Preallocation,
    /// The backing file, if any. Whether it exists is the caller's to check.
    pub backing: Option<Backing>,
}

/// Where everything goes, in clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    reftable_start: u64,
    reftable_clusters: u64,
    blocks_start: u64,
    blocks: u64,
    l1_start: u64,
    l1_entries: u64,
    l2_start: u64,
    data_start: u64,
    end: u64,
}

impl Plan {
    /// Lays out an image of `size` bytes.
    fn new(geometry: Geometry, size: u64, preallocated: bool) -> Result<Self, Error> {
        let l1_entries = geometry.l1_entries_for(size);
        if l1_entries > L1_BYTES_MAX / 8 {
            let advice = if geometry.cluster_bits() == CLUSTER_BITS_MAX {
                let bytes_max = L1_BYTES_MAX / 8 * geometry.l2_table_span();
                format!("these are the largest, so that it has at most {bytes_max} bytes")
            } else {
                "use larger clusters".to_owned()
            };
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "a virtual disk of {size} bytes is too large for clusters of {} bytes: {advice}",
                    geometry.cluster_size()
                ),
            ));
        }
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        let (l2_clusters, data_clusters) = if preallocated {
            (l1_entries, geometry.clusters_for(size))
        } else {
            (0, 0)
        };
        // The refcounts count themselves: grow until what they cover includes them.
        let mut plan = Self {
            reftable_start: 1,
            reftable_clusters: 1,
            blocks_start: 0,
            blocks: 1,
            l1_start: 0,
            l1_entries,
            l2_start: 0,
            data_start: 0,
            end: 0,
        };
        loop {
            plan.blocks_start = plan.reftable_start + plan.reftable_clusters;
            plan.l1_start = plan.blocks_start + plan.blocks;
            plan.l2_start = plan.l1_start + l1_clusters;
            plan.data_start = plan.l2_start + l2_clusters;
            plan.end = plan.data_start + data_clusters;
            let blocks = plan.end.div_ceil(geometry.refcount_block_entries());
            let reftable_clusters = geometry.clusters_for(blocks * 8);
            if (blocks, reftable_clusters) == (plan.blocks, plan.reftable_clusters) {
                break;
            }
            (plan.blocks, plan.reftable_clusters) = (blocks, reftable_clusters);
        }
        if plan.reftable_clusters * geometry.cluster_size() > REFTABLE_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the refcount table would be too large: use larger clusters or narrower refcounts",
            ));
        }
        Ok(plan)
    }
}

/// Writes a new, empty image into `file`, over whatever is there. `progress` gets done and total
/// bytes of preallocation.
///
/// # Errors
///
/// `Invalid` for options that do not fit together, before anything is written; `Io` and `NoSpace`.
pub async fn create<S: Storage>(
    storage: &S,
    file: FileId,
    options: &CreateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let (header, plan) = prepare(options)?;
    let geometry = header.geometry();
    let cluster_size = geometry.cluster_size();
    let mut source = Source::new(storage, file)?;
    let end = plan.end * cluster_size;
    // What was there before must not be found under a new header, nor its header over new tables.
    if source.can_grow() {
        source.set_len(0).await?;
        source.set_len(end).await?;
    } else {
        if source.len < end {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "the image needs {end} bytes, the block device has {}",
                    source.len
                ),
            ));
        }
        source.write_zeroes(0, cluster_size, false).await?;
        source.sync().await?;
    }
    write_tables(&source, &plan, geometry).await?;
    if plan.data_start < plan.end {
        write_l2_tables(&source, &plan, geometry).await?;
        preallocate(
            &source,
            plan.data_start * cluster_size..end,
            options.preallocation,
            progress,
        )
        .await?;
    }
    let mut head = header
        .encode()
        .map_err(|error| Error::format("cannot make a header", error))?;
    head.resize(to_usize(cluster_size), 0);
    // A long backing name reaches past the sector that makes this an image.
    let (first, tail) = if keeps!(TailBeforeNewHeader) {
        head.split_at(to_usize(SECTOR_SIZE))
    } else {
        (&*head, &[][..])
    };
    if !tail.is_empty() {
        source.write(SECTOR_SIZE, tail).await?;
    }
    if keeps!(TablesBeforeNewHeader) {
        source.sync().await?;
    }
    source.write(0, first).await?;
    source.sync().await
}

/// Checks the options and makes the header and the plan of the image.
fn prepare(options: &CreateOptions) -> Result<(Header, Plan), Error> {
    let invalid = |text: &str| Err(Error::new(ErrorKind::Invalid, text));
    let geometry = Geometry::new(options.cluster_bits, options.refcount_order)
        .map_err(|error| Error::format("cannot make such an image", error))?;
    if !(2..=3).contains(&options.version) {
        return invalid("an image is of version 2 or 3");
    }
    if options.version < 3 && options.refcount_order != 4 {
        return invalid("refcounts of other than 16 bits need version 3 (compat 1.1)");
    }
    if options.version < 3 && options.lazy_refcounts {
        return invalid("lazy refcounts need version 3 (compat 1.1)");
    }
    if options.backing.is_some() && options.preallocation != Preallocation::Off {
        return invalid("preallocated clusters would hide the backing file");
    }
    let Some(size) = checked_align_up(options.virtual_size, SECTOR_SIZE) else {
        return invalid("the virtual size is too large");
    };
    let plan = Plan::new(geometry, size, options.preallocation != Preallocation::Off)?;
    let mut header = Header::new(options.version, geometry, size);
    let place = |cluster: u64| HostOffset::new(cluster * geometry.cluster_size());
    let narrow = |number: u64| match u32::try_from(number) {
        Ok(number) => Ok(number),
        Err(_) => Err(Error::new(
            ErrorKind::Invalid,
            "the virtual size is too large",
        )),
    };
    header.refcount_table_offset = place(plan.reftable_start);
    header.refcount_table_clusters = narrow(plan.reftable_clusters)?;
    header.l1_size = narrow(plan.l1_entries)?;
    if plan.l1_entries > 0 {
        header.l1_table_offset = place(plan.l1_start);
    }
    if options.lazy_refcounts {
        header.compatible |= COMPAT_LAZY_REFCOUNTS;
    }
    if let Some(backing) = &options.backing {
        header.backing_name = Some(backing.name.clone());
        let format: &[u8] = match backing.format {
            LayerFormat::Qcow2 => b"qcow2",
            LayerFormat::Raw => b"raw",
        };
        header
            .extensions
            .push(Extension::BackingFormat(format.to_vec()));
    }
    header
        .encode()
        .map_err(|error| Error::format("cannot make such a header", error))?;
    Ok((header, plan))
}

/// Writes refcount table, refcount blocks and L1 table.
async fn write_tables<S: Storage>(
    source: &Source<'_, S>,
    plan: &Plan,
    geometry: Geometry,
) -> Result<(), Error> {
    let cluster_size = geometry.cluster_size();
    let per_block = geometry.refcount_block_entries();
    let mut table = AlignedBuf::zeroed(to_usize(plan.reftable_clusters * cluster_size));
    let blocks = plan.blocks_start..plan.blocks_start + plan.blocks;
    for ((index, cluster), raw) in blocks.enumerate().zip(table.as_chunks_mut::<8>().0) {
        let offset = HostOffset::new(cluster * cluster_size);
        *raw = RefcountTableEntry::new(offset).0.to_be_bytes();
        let mut block = AlignedBuf::zeroed(to_usize(cluster_size));
        let counted = per_block.min(plan.end - to_u64(index) * per_block);
        for place in 0..to_usize(counted) {
            refcount::set(&mut block, geometry.refcount_order(), place, 1);
        }
        source.write_buf(offset.get(), block).await?;
    }
    source
        .write_buf(plan.reftable_start * cluster_size, table)
        .await?;
    let l1_clusters = plan.l2_start - plan.l1_start;
    let mut l1 = AlignedBuf::zeroed(to_usize(l1_clusters * cluster_size));
    if plan.data_start > plan.l2_start {
        for (cluster, raw) in (plan.l2_start..plan.data_start).zip(l1.as_chunks_mut::<8>().0) {
            let offset = HostOffset::new(cluster * cluster_size);
            *raw = L1Entry::new(offset, true).0.to_be_bytes();
        }
    }
    source.write_buf(plan.l1_start * cluster_size, l1).await
}

/// Writes L2 tables that map the guest's clusters to the data clusters, in order.
async fn write_l2_tables<S: Storage>(
    source: &Source<'_, S>,
    plan: &Plan,
    geometry: Geometry,
) -> Result<(), Error> {
    let cluster_size = geometry.cluster_size();
    let mut data = plan.data_start..plan.end;
    for cluster in plan.l2_start..plan.data_start {
        let mut table = AlignedBuf::zeroed(to_usize(cluster_size));
        for (raw, host) in table.as_chunks_mut::<8>().0.iter_mut().zip(data.by_ref()) {
            let offset = HostOffset::new(host * cluster_size);
            *raw = L2Entry::standard(offset, true).0.to_be_bytes();
        }
        source.write_buf(cluster * cluster_size, table).await?;
    }
    Ok(())
}

/// Prepares the data clusters.
async fn preallocate<S: Storage>(
    source: &Source<'_, S>,
    data: std::ops::Range<u64>,
    preallocation: Preallocation,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let total = data.end - data.start;
    let mut offset = data.start;
    while offset < data.end {
        let len = ZEROES_STEP.min(data.end - offset);
        match preallocation {
            // Holes of a new file are zeroes; a block device holds what it held before.
            Preallocation::Off | Preallocation::Metadata if source.can_grow() => return Ok(()),
            Preallocation::Off | Preallocation::Metadata => {
                source.write_zeroes(offset, len, true).await?;
            }
            Preallocation::Falloc => source.write_zeroes(offset, len, false).await?,
            Preallocation::Full => source.write_zero_bytes(offset, len).await?,
        }
        offset += len;
        progress(offset - data.start, total);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Arc;

    use super::*;
    use crate::engine::check::{Repair, check};
    use crate::storage::sim::{CutMode, Driver, Outcome, SimDisk, SimFileOptions};
    use crate::storage::{BlockingStorage, HostFile, OpenMode, block_on};

    fn options(virtual_size: u64) -> CreateOptions {
        CreateOptions {
            virtual_size,
            cluster_bits: 16,
            refcount_order: 4,
            version: 3,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            backing: None,
        }
    }

    fn make(path: &Path, options: &CreateOptions) -> BlockingStorage {
        std::fs::write(path, b"what was there before").unwrap();
        let file = HostFile::open(
            path,
            OpenMode {
                write: true,
                direct: false,
            },
        )
        .unwrap();
        let storage = BlockingStorage::new(vec![Arc::new(file)]);
        block_on(create(&storage, FileId(0), options, &mut |_, _| ())).unwrap();
        storage
    }

    /// Our own check, and QEMU's if it is there.
    fn assert_clean(path: &Path, storage: &BlockingStorage, what: &str) {
        let report = block_on(check(storage, FileId(0), Repair::None, &mut |_| ())).unwrap();
        assert!(report.is_clean(), "{what}: {:?}", report.problems);
        match Command::new("qemu-img").arg("check").arg(path).output() {
            Ok(output) => assert!(output.status.success(), "{what}: {output:?}"),
            Err(_) => {
                writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed").unwrap();
            }
        }
    }

    #[test]
    fn a_disk_that_is_too_large_is_refused_with_advice_that_can_be_followed() {
        let refusal = |cluster_bits| {
            let geometry = Geometry::new(cluster_bits, 4).unwrap();
            let refused = Plan::new(geometry, 1 << 62, false);
            refused.err().unwrap().to_string()
        };
        assert!(
            refusal(20).contains("use larger clusters"),
            "{}",
            refusal(20)
        );
        // Those are the largest. The L1 table has 2^22 entries at most, for 2^39 bytes each.
        let largest = refusal(21);
        assert!(!largest.contains("larger clusters"), "{largest}");
        assert!(largest.contains("at most 2305843009213693952"), "{largest}");
        let fits = Plan::new(Geometry::new(21, 4).unwrap(), 1 << 61, false);
        assert!(fits.is_ok());
    }

    /// A backing name can reach past the first sector of the header.
    #[test]
    fn a_power_cut_leaves_a_whole_image_or_none() {
        for (cluster_bits, name_bytes) in [(9, 8), (12, 1000), (16, 500)] {
            let options = CreateOptions {
                cluster_bits,
                backing: Some(Backing {
                    name: vec![b'x'; name_bytes],
                    format: LayerFormat::Qcow2,
                }),
                ..options(1 << 20)
            };
            let (mut whole, mut none) = (0, 0);
            for seed in 0..30 {
                let disk = SimDisk::new(seed);
                let file = disk.add_file(b"", SimFileOptions::default());
                let mut driver = Driver::new(seed, &disk);
                let mut random = fastrand::Rng::with_seed(seed);
                let (storage, wanted) = (disk.storage(), options.clone());
                driver.spawn(async move {
                    create(&storage, file, &wanted, &mut |_, _| ())
                        .await
                        .unwrap();
                });
                loop {
                    let disk = disk.clone();
                    let moment = || (disk.ops(), disk.in_flight().len());
                    let before = moment();
                    if driver.run_until(|| moment() != before) == Outcome::Stuck {
                        break;
                    }
                    let cut = disk.power_cut(&mut random, CutMode::Random);
                    let bytes = cut.contents(file);
                    if !bytes.starts_with(b"QFI\xfb") {
                        none += 1;
                        continue;
                    }
                    whole += 1;
                    let what = format!("{cluster_bits} {name_bytes}, seed {seed}");
                    let header = Header::decode(&bytes).unwrap();
                    let backing = options.backing.as_ref().unwrap();
                    assert_eq!(header.backing_name.as_ref(), Some(&backing.name), "{what}");
                    cut.set_immediate(true);
                    let storage = cut.storage();
                    let report =
                        block_on(check(&storage, file, Repair::None, &mut |_| ())).unwrap();
                    assert!(report.is_clean(), "{what}: {:?}", report.problems);
                }
            }
            assert!(whole > 10 && none > 10, "{whole} images, {none} others");
        }
    }

    #[test]
    fn every_cluster_size_and_refcount_width_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for cluster_bits in [9, 10, 12, 16, 21] {
            for refcount_order in 0..=6 {
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    ..options(70 << 20)
                };
                let storage = make(&path, &options);
                assert_clean(&path, &storage, &format!("{cluster_bits} {refcount_order}"));
            }
        }
    }

    #[test]
    fn every_preallocation_is_clean_and_reads_as_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for preallocation in [
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            for (cluster_bits, refcount_order) in [(9, 6), (12, 0), (16, 4)] {
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    preallocation,
                    ..options((9 << 20) + 512)
                };
                let storage = make(&path, &options);
                let what = format!("{preallocation:?} {cluster_bits}");
                assert_clean(&path, &storage, &what);
                let report =
                    block_on(check(&storage, FileId(0), Repair::None, &mut |_| ())).unwrap();
                assert_eq!(report.allocated_clusters, report.total_clusters, "{what}");
                let bytes = std::fs::read(&path).unwrap();
                let data = to_u64(bytes.len()) - report.total_clusters * (1 << cluster_bits);
                assert!(
                    bytes[to_usize(data)..].iter().all(|byte| *byte == 0),
                    "{what}"
                );
            }
        }
    }

    #[test]
    fn sizes_at_the_edges() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for (size, expected) in [
            (0, 0),
            (1, 512),
            (512, 512),
            (513, 1024),
            (1 << 50, 1 << 50),
        ] {
            let storage = make(&path, &options(size));
            let header = block_on(Source::new(&storage, FileId(0)).unwrap().header()).unwrap();
            assert_eq!(header.size, expected);
            assert_clean(&path, &storage, &format!("size {size}"));
        }
    }

    #[test]
    fn version_2_with_a_backing_file_names_it_and_its_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let backing = Backing {
            name: b"base \xff".to_vec(),
            format: LayerFormat::Raw,
        };
        let options = CreateOptions {
            version: 2,
            backing: Some(backing),
            ..options(1 << 20)
        };
        let storage = make(&path, &options);
        let header = block_on(Source::new(&storage, FileId(0)).unwrap().header()).unwrap();
        assert_eq!(header.backing_name.as_deref(), Some(&b"base \xff"[..]));
        assert_eq!(header.backing_format(), Some(&b"raw"[..]));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let backing = Some(Backing {
            name: b"base".to_vec(),
            format: LayerFormat::Raw,
        });
        let small = CreateOptions {
            cluster_bits: 9,
            ..options(1 << 40)
        };
        for (options, word) in [
            (
                CreateOptions {
                    refcount_order: 3,
                    version: 2,
                    ..options(512)
                },
                "16 bits",
            ),
            (
                CreateOptions {
                    lazy_refcounts: true,
                    version: 2,
                    ..options(512)
                },
                "lazy",
            ),
            (
                CreateOptions {
                    preallocation: Preallocation::Full,
                    backing,
                    ..options(512)
                },
                "backing file",
            ),
            (small, "larger clusters"),
            (options(u64::MAX), "too large"),
            (
                CreateOptions {
                    version: 4,
                    ..options(512)
                },
                "version",
            ),
        ] {
            let error = prepare(&options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
