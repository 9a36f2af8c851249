//! Images made from a recipe, and a reader of images, both without the engine.
//!
//! The builder lays clusters one after the other, keeps an exact count of references and writes the
//! refcount blocks last, so that what it makes is clean. The reader walks one tree of tables. Both
//! use `format` for the bytes of single values, nothing else.

use std::io::Write as _;

use super::model::{BACKING, INITIAL, sector_bytes};
use crate::format::l1::L1Entry;
use crate::format::l2::{Cluster, L2Entry, compressed_host_clusters};
use crate::format::refcount;
use crate::format::snapshot::{SnapshotEntry, encode_table};
use crate::format::{Geometry, Header};
use crate::units::{GuestOffset, HostOffset, to_u64, to_usize};

/// What a guest cluster of a new image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    None,
    Data,
    Zero,
    ZeroKept,
    Compressed,
}

/// Makes entries of a snapshot table.
pub(super) type Hollow = fn() -> Vec<SnapshotEntry>;

/// An image to be made.
#[derive(Clone, Copy)]
pub(super) struct Recipe {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) size: u64,
    /// By guest cluster.
    pub(super) fill: fn(u64) -> Fill,
    /// With an internal snapshot of that.
    pub(super) snapshot: bool,
    /// Bytes of the disk in the snapshot, where it had another size then.
    pub(super) snapshot_size: Option<u64>,
    /// Instead of that: snapshots without an L1 table, of others.
    pub(super) hollow: Option<Hollow>,
    /// Bytes of a raw backing file.
    pub(super) backing: Option<u64>,
    /// A block device with this many clusters of old bytes behind the image.
    pub(super) device: Option<u64>,
    /// The host can punch holes.
    pub(super) can_punch: bool,
    pub(super) autoclear: u64,
}

impl Recipe {
    pub(super) const fn plain(cluster_bits: u32, size: u64) -> Self {
        Self {
            version: 3,
            cluster_bits,
            refcount_order: 4,
            size,
            fill: |_| Fill::None,
            snapshot: false,
            snapshot_size: None,
            hollow: None,
            backing: None,
            device: None,
            can_punch: true,
            autoclear: 0,
        }
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry::new(self.cluster_bits, self.refcount_order).expect("a valid recipe")
    }

    pub(super) fn sectors(&self) -> u64 {
        self.size / 512
    }

    /// Bytes of the disk in the snapshot.
    pub(super) fn size_then(&self) -> u64 {
        self.snapshot_size.unwrap_or(self.size)
    }

    /// The version (see `model`) of a sector of the new disk.
    pub(super) fn value(&self, sector: u64) -> u32 {
        match (self.fill)((sector * 512) >> self.cluster_bits) {
            Fill::Data | Fill::Compressed => INITIAL,
            Fill::Zero | Fill::ZeroKept => 0,
            Fill::None if self.backing.is_some_and(|size| sector * 512 < size) => BACKING,
            Fill::None => 0,
        }
    }

    /// The bytes of the backing file.
    pub(super) fn backing_bytes(&self) -> Option<Vec<u8>> {
        let size = self.backing?;
        Some(
            (0..size / 512)
                .flat_map(|sector| sector_bytes(sector, BACKING))
                .collect(),
        )
    }

    /// The bytes of the image.
    pub(super) fn build(&self) -> Vec<u8> {
        let mut builder = Builder {
            geometry: self.geometry(),
            version: self.version,
            bytes: Vec::new(),
            counts: Vec::new(),
            packed: 0..0,
        };
        builder.build(self)
    }
}

struct Builder {
    geometry: Geometry,
    version: u32,
    bytes: Vec<u8>,
    counts: Vec<u64>,
    /// Room for compressed data.
    packed: std::ops::Range<u64>,
}

impl Builder {
    fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// New clusters for `bytes` bytes, counted once.
    fn alloc(&mut self, bytes: u64) -> u64 {
        let at = to_u64(self.bytes.len());
        let clusters = self.geometry.clusters_for(bytes);
        self.bytes.resize(
            self.bytes.len() + to_usize(clusters * self.cluster_size()),
            0,
        );
        self.counts
            .resize(self.counts.len() + to_usize(clusters), 1);
        at
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[to_usize(at)..to_usize(at) + bytes.len()].copy_from_slice(bytes);
    }

    fn put_word(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_be_bytes());
    }

    fn word(&self, at: u64) -> u64 {
        word(&self.bytes, at)
    }

    fn build(&mut self, recipe: &Recipe) -> Vec<u8> {
        let cluster_size = self.cluster_size();
        self.alloc(1);
        // Both disks are made in one, then each gets its part.
        let whole = recipe.size.max(recipe.size_then());
        let l1_size = self.geometry.l1_entries_for(recipe.size);
        let l1 = self.alloc(l1_size * 8);
        let entries = self.geometry.l1_entries_for(whole);
        assert!(
            self.geometry.clusters_for(entries * 8) == self.geometry.clusters_for(l1_size * 8),
            "the longer L1 table fits into the clusters of the shorter"
        );
        for cluster in 0..self.geometry.clusters_for(whole) {
            self.map(recipe, l1, cluster, whole / 512);
        }
        let mut header = Header::new(recipe.version, self.geometry, recipe.size);
        header.l1_size = u32::try_from(l1_size).expect("a small image");
        header.l1_table_offset = HostOffset::new(l1);
        header.autoclear = recipe.autoclear;
        if recipe.snapshot {
            let table = self.snapshot(recipe, l1);
            header.snapshot_count = 1;
            header.snapshot_table_offset = HostOffset::new(table);
        }
        if let Some(entries) = recipe.hollow {
            let entries = entries();
            let table = encode_table(&entries).expect("valid entries");
            let at = self.alloc(to_u64(table.len()));
            self.put(at, &table);
            header.snapshot_count = u32::try_from(entries.len()).expect("a possible number");
            header.snapshot_table_offset = HostOffset::new(at);
        }
        // Refcount blocks count themselves too: as many as cover all with them.
        let entries = self.geometry.refcount_block_entries();
        let table = self.alloc(cluster_size);
        let mut blocks = Vec::new();
        while to_u64(blocks.len()) * entries < to_u64(self.counts.len()) {
            blocks.push(self.alloc(cluster_size));
        }
        assert!(
            to_u64(blocks.len()) * 8 <= cluster_size,
            "the refcount table has one cluster"
        );
        for (number, block) in (0..).zip(&blocks) {
            self.put_word(table + number * 8, *block);
        }
        for (cluster, count) in (0..).zip(self.counts.clone()) {
            let start = to_usize(blocks[to_usize(cluster / entries)]);
            let block = &mut self.bytes[start..start + to_usize(cluster_size)];
            let order = self.geometry.refcount_order();
            refcount::set(block, order, to_usize(cluster % entries), count);
        }
        header.refcount_table_offset = HostOffset::new(table);
        header.refcount_table_clusters = 1;
        let encoded = header.encode().expect("a valid header");
        self.put(0, &encoded);
        let mut bytes = std::mem::take(&mut self.bytes);
        if let Some(more) = recipe.device {
            bytes.resize(bytes.len() + to_usize(more * cluster_size), 0xee);
        }
        bytes
    }

    /// Makes a cluster of a disk of so many sectors.
    fn map(&mut self, recipe: &Recipe, l1: u64, cluster: u64, sectors: u64) {
        let fill = (recipe.fill)(cluster);
        if fill == Fill::None {
            return;
        }
        let cluster_size = self.cluster_size();
        let guest = GuestOffset::new(cluster * cluster_size);
        let l1_at = l1 + self.geometry.l1_index(guest) * 8;
        if self.word(l1_at) == 0 {
            let table = self.alloc(cluster_size);
            self.put_word(l1_at, L1Entry::new(HostOffset::new(table), true).0);
        }
        let table = L1Entry(self.word(l1_at))
            .table_offset()
            .expect("just set")
            .get();
        let first = cluster * cluster_size / 512;
        let data: Vec<u8> = (first..first + cluster_size / 512)
            .flat_map(|sector| {
                let inside = sector < sectors;
                sector_bytes(sector, if inside { recipe.value(sector) } else { 0 })
            })
            .collect();
        let entry = match fill {
            Fill::None => return,
            Fill::Zero => L2Entry::zero_plain(),
            Fill::Data => {
                let host = self.alloc(cluster_size);
                self.put(host, &data);
                L2Entry::standard(HostOffset::new(host), true)
            }
            Fill::ZeroKept => {
                let host = self.alloc(cluster_size);
                self.put(host, &vec![0xcc; to_usize(cluster_size)]);
                L2Entry::zero_allocated(HostOffset::new(host), true)
            }
            Fill::Compressed => self.compress(&data),
        };
        self.put_word(table + self.geometry.l2_index(guest) * 8, entry.0);
    }

    /// Several compressed clusters in one host cluster, where they fit.
    fn compress(&mut self, data: &[u8]) -> L2Entry {
        let mut encoder =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).expect("memory");
        let packed = encoder.finish().expect("memory");
        let len = to_u64(packed.len());
        assert!(len <= self.cluster_size());
        if self.packed.end - self.packed.start < len {
            let start = self.alloc(self.cluster_size());
            let cluster = to_usize(start / self.cluster_size());
            self.counts[cluster] = 0;
            self.packed = start..start + self.cluster_size();
        }
        let at = self.packed.start;
        self.packed.start += len;
        self.put(at, &packed);
        let entry = L2Entry::compressed(self.geometry, HostOffset::new(at), len).expect("fits");
        self.count(entry, 1);
        entry
    }

    fn count(&mut self, entry: L2Entry, add: u64) {
        let clusters = match entry
            .decode(self.geometry, self.version)
            .expect("our own entry")
        {
            Cluster::Unallocated | Cluster::ZeroPlain => return,
            Cluster::Standard { host, .. } | Cluster::ZeroAllocated { host, .. } => {
                let cluster = self.geometry.host_cluster(host).get();
                cluster..=cluster
            }
            Cluster::Compressed { host, bytes } => {
                let touched = compressed_host_clusters(self.geometry, host, bytes);
                touched.start().get()..=touched.end().get()
            }
        };
        for cluster in clusters {
            self.counts[to_usize(cluster)] += add;
        }
    }

    /// Takes a snapshot; returns where the snapshot table is. Tables past the end of one of the two
    /// disks are the other's alone.
    fn snapshot(&mut self, recipe: &Recipe, l1: u64) -> u64 {
        let now = self.geometry.l1_entries_for(recipe.size);
        let then = self.geometry.l1_entries_for(recipe.size_then());
        let copy = self.alloc(then * 8);
        for index in 0..then {
            let entry = L1Entry(self.word(l1 + index * 8)).with_copied(false);
            self.put_word(copy + index * 8, entry.0);
            if index >= now {
                self.put_word(l1 + index * 8, 0);
                continue;
            }
            self.put_word(l1 + index * 8, entry.0);
            let Some(table) = entry.table_offset() else {
                continue;
            };
            self.counts[to_usize(self.geometry.host_cluster(table).get())] += 1;
            for l2_index in 0..self.geometry.l2_entries() {
                let at = table.get() + l2_index * 8;
                let entry = L2Entry(self.word(at));
                if !entry.is_compressed() {
                    self.put_word(at, entry.with_copied(false).0);
                }
                self.count(entry, 1);
            }
        }
        let entry = SnapshotEntry {
            l1_offset: HostOffset::new(copy),
            l1_size: u32::try_from(then).expect("a small image"),
            id: b"1".to_vec(),
            name: b"one".to_vec(),
            extra: SnapshotEntry::extra_data(0, recipe.size_then(), None),
            ..SnapshotEntry::default()
        };
        let table = encode_table(&[entry]).expect("a valid entry");
        let at = self.alloc(to_u64(table.len()));
        self.put(at, &table);
        at
    }
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = to_usize(at);
    bytes.get(at..at + 8).map_or(0, |word| {
        u64::from_be_bytes(word.try_into().expect("8 bytes"))
    })
}

/// The disk of an image's first snapshot, or of its active tree, read without the engine.
pub(super) fn read_tree(
    bytes: &[u8],
    backing: Option<&[u8]>,
    snapshot: bool,
) -> Result<Vec<u8>, String> {
    let header = Header::decode(bytes).map_err(|error| error.to_string())?;
    if snapshot {
        let entries = snapshot_entries(bytes)?;
        let entry = entries.first().ok_or("the snapshot is gone")?;
        return read_entry(bytes, backing, &header, entry);
    }
    let l1 = header.l1_table_offset.get();
    read_root(bytes, backing, &header, l1, header.size)
}

/// The disk of the snapshot with this id.
pub(super) fn read_snapshot(
    bytes: &[u8],
    backing: Option<&[u8]>,
    id: &str,
) -> Result<Vec<u8>, String> {
    let header = Header::decode(bytes).map_err(|error| error.to_string())?;
    let entries = snapshot_entries(bytes)?;
    let entry = entries.iter().find(|entry| entry.id == id.as_bytes());
    let entry = entry.ok_or_else(|| format!("snapshot {id} is gone"))?;
    read_entry(bytes, backing, &header, entry)
}

fn read_entry(
    bytes: &[u8],
    backing: Option<&[u8]>,
    header: &Header,
    entry: &SnapshotEntry,
) -> Result<Vec<u8>, String> {
    let size = entry.disk_size().ok_or("the snapshot has no disk size")?;
    read_root(bytes, backing, header, entry.l1_offset.get(), size)
}

/// The entries of the snapshot table.
pub(super) fn snapshot_entries(bytes: &[u8]) -> Result<Vec<SnapshotEntry>, String> {
    let header = Header::decode(bytes).map_err(|error| error.to_string())?;
    let table = bytes
        .get(to_usize(header.snapshot_table_offset.get())..)
        .unwrap_or_default();
    crate::format::snapshot::decode_table(table, header.snapshot_count)
        .map_err(|error| error.to_string())
}

/// The disk of so many bytes that hangs on an L1 table.
fn read_root(
    bytes: &[u8],
    backing: Option<&[u8]>,
    header: &Header,
    l1: u64,
    size: u64,
) -> Result<Vec<u8>, String> {
    let geometry = header.geometry();
    let cluster_size = to_usize(geometry.cluster_size());
    let mut disk = Vec::with_capacity(to_usize(size));
    while to_u64(disk.len()) < size {
        let guest = GuestOffset::new(to_u64(disk.len()));
        let table = L1Entry(word(bytes, l1 + geometry.l1_index(guest) * 8)).table_offset();
        let entry = table.map_or(L2Entry::UNALLOCATED, |table| {
            L2Entry(word(bytes, table.get() + geometry.l2_index(guest) * 8))
        });
        let mut data = vec![0; cluster_size];
        match entry
            .decode(geometry, header.version)
            .map_err(|error| error.to_string())?
        {
            Cluster::ZeroPlain | Cluster::ZeroAllocated { .. } => {}
            Cluster::Unallocated => {
                let below = backing
                    .and_then(|bytes| bytes.get(disk.len()..))
                    .unwrap_or_default();
                let len = below.len().min(cluster_size);
                data[..len].copy_from_slice(&below[..len]);
            }
            Cluster::Standard { host, .. } => {
                let there = bytes.get(to_usize(host.get())..).unwrap_or_default();
                let len = there.len().min(cluster_size);
                data[..len].copy_from_slice(&there[..len]);
            }
            Cluster::Compressed { host, bytes: len } => {
                let start = to_usize(host.get());
                let end = bytes.len().min(start + to_usize(len));
                let mut inflate = flate2::Decompress::new(false);
                inflate
                    .decompress(
                        &bytes[start..end],
                        &mut data,
                        flate2::FlushDecompress::Finish,
                    )
                    .map_err(|error| error.to_string())?;
            }
        }
        disk.extend(data);
    }
    disk.truncate(to_usize(size));
    Ok(disk)
}

/// How many clusters past the end of the file have a reference count: leaks that a checker does not
/// see until the file grows over them.
pub(super) fn counted_past_the_end(bytes: &[u8]) -> Result<u64, String> {
    let header = Header::decode(bytes).map_err(|error| error.to_string())?;
    let geometry = header.geometry();
    let end = geometry.clusters_for(to_u64(bytes.len()));
    let entries = geometry.refcount_block_entries();
    let table = header.refcount_table_offset.get();
    let words = u64::from(header.refcount_table_clusters) * geometry.cluster_size() / 8;
    let mut counted = 0;
    for block in 0..words {
        let at = to_usize(word(bytes, table + block * 8));
        let Some(content) = bytes.get(at..at + to_usize(geometry.cluster_size())) else {
            continue;
        };
        let past = (0..entries).filter(|index| {
            block * entries + index >= end
                && refcount::get(content, geometry.refcount_order(), to_usize(*index)) > 0
        });
        counted += if at == 0 { 0 } else { to_u64(past.count()) };
    }
    Ok(counted)
}
