//! Opening: from the files of a chain to an [`Image`].
//!
//! Nothing is written here. An image that was not closed in order and is opened for writing is served
//! at once, if its refcount structure allows that, while its counts are made anew in the background
//! (see `snapshot::rebuild`): no copied flag and no count of it is trusted, and clusters are taken
//! only past its end. Where that cannot be (a block device, a damaged refcount structure) it is
//! repaired first, which is the one thing that writes here. Everything that the format lets us judge cheaply is judged now: the header, the places of
//! the L1 table, the refcount table and the snapshot table, and that they do not overlap. L1 and L2
//! entries are judged when they are used.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::active::{Active, Drops, L1State};
use super::allocator::{Allocator, AllocatorParts};
use super::cache::SliceKey;
use super::cache::store::Store;
use super::check;
use super::error::{Error, ErrorKind};
use super::header_owner::HeaderOwner;
use super::layer::{Layer, LayerKind, LostData, Mapping};
use super::order::FlushGate;
use super::pin::PinBoard;
use super::protected::Protected;
use super::snapshot::{Rebuild, Selector, Snapshots, Table, Task};
use super::taken::Taken;
use super::{Image, State};
use crate::engine::sync::Mutex;
use crate::format::geometry::{Geometry, HOST_OFFSET_END};
use crate::format::header::{CompressionType, Header};
use crate::format::l1::L1Entry;
use crate::format::refcount::{self, RefcountTableEntry};
use crate::format::snapshot::{SnapshotEntry, decode_table};
use crate::storage::{AlignedBuf, FileId, Storage};
use crate::units::{HostOffset, SECTOR_SIZE, align_down, to_u64, to_usize};

/// Most layers of a chain: a layer's index is part of a slice's key.
pub(crate) const LAYERS_MAX: usize = 200;
/// L2 cache budget when none is given: what the disk needs, at most this.
const L2_CACHE_BYTES_DEFAULT_MAX: u64 = 256 << 20;
/// Bytes of a slice when none is given.
const SLICE_BYTES_DEFAULT: u64 = 4096;
/// Refcount block budget when none is given.
const REFCOUNT_CACHE_BYTES_DEFAULT: u64 = 4 << 20;
/// Guard gap behind an image that was not closed in order: an eighth of it, at least this many
/// clusters ...
const GUARD_GAP_CLUSTERS_MIN: u64 = 64;
/// ... and at most this many bytes. It is a hole in the file.
const GUARD_GAP_BYTES_MAX: u64 = 1 << 30;
/// With more refcount blocks for clusters past the end of the file, the file was cut short.
const BLOCKS_PAST_END_MAX: usize = 16;
/// Bytes of the first read: enough for the fixed fields.
const HEADER_PROBE: u64 = 512;

/// What a layer's file holds. Never probed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayerFormat {
    /// A qcow2 image.
    Qcow2,
    /// Guest bytes as they are.
    Raw,
}

/// One file of the chain, active layer first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerSpec {
    /// The file in the storage handle.
    pub file: FileId,
    /// What it holds.
    pub format: LayerFormat,
}

/// How to open an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenOptions {
    /// Never write to any file.
    pub read_only: bool,
    /// Give blocks of freed clusters and of discarded ranges back to the host.
    pub discard: bool,
    /// Make nothing durable on purpose (`cache=unsafe`).
    pub no_flush: bool,
    /// Bytes of L2 slices in memory; `None`: twice what the whole disk has, at most 256 MiB.
    pub l2_cache_size: Option<u64>,
    /// Bytes of one slice: a power of two from 512 to the cluster size; `None`: 4 KiB or a cluster.
    pub l2_cache_entry_size: Option<u64>,
    /// Bytes of refcount blocks in memory; `None`: 4 MiB.
    pub refcount_cache_size: Option<u64>,
    /// Show the disk as it is in this internal snapshot of the active layer; only read-only.
    pub snapshot: Option<Selector>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            discard: true,
            no_flush: false,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            snapshot: None,
        }
    }
}

/// A parsed qcow2 layer before it becomes part of an image.
struct Parsed {
    header: Header,
    snapshots: Table,
    l1: Box<[u64]>,
    refcount_table: Vec<u64>,
    protected: Protected,
    file_len: u64,
    /// Growth begins here or later: the end of the file, or of dangling entries past it.
    managed_end: u64,
    /// The counts are not to be trusted.
    untrusted: bool,
}

impl Image {
    /// Opens a chain of files.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported` name what is wrong; `Io`, `NoSpace` (a repair); `Invalid` for
    /// an empty or too long chain.
    pub async fn open<S: Storage>(
        storage: &S,
        specs: &[LayerSpec],
        options: &OpenOptions,
    ) -> Result<Arc<Self>, Error> {
        check_request(specs, options)?;
        let board = Arc::new(PinBoard::new());
        let mut layers = Vec::with_capacity(specs.len());
        let mut write_side = None;
        let mut read_only_snapshots = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let (layer, parts) = open_layer(storage, index, spec, options).await?;
            layers.push(layer);
            if index == 0
                && let Some(parts) = &parts
            {
                let header = &parts.header;
                read_only_snapshots = parts.snapshots.infos(header.size, header.is_dirty());
            }
            if index == 0 && !options.read_only {
                write_side = parts;
            }
        }
        let (bodies_max, directory_slots) = cache_size(&layers, options);
        let store = Store::new(bodies_max);
        let active = match (write_side, layers.first()) {
            (Some(parts), Some(layer)) => {
                Some(active(storage, layer, parts, options, &board, &store))
            }
            _ => None,
        };
        let state = match (&active, options.read_only) {
            (_, true) => State::ReadOnly,
            // The first write to a qcow2 image has something to do before it.
            (Some(_), false) => State::Opened,
            (None, false) => State::Ready,
        };
        Ok(Arc::new(Self {
            layers,
            active,
            board,
            store,
            directory_slots,
            state: AtomicU8::new(state as u8),
            gate: FlushGate::default(),
            discard: options.discard,
            no_flush: options.no_flush,
            read_only_snapshots,
            event_sink: Mutex::default(),
            write_back_sink: Mutex::default(),
            write_back_asked: AtomicBool::new(false),
        }))
    }
}

/// Refuses a chain or options that no image can be opened with.
fn check_request(specs: &[LayerSpec], options: &OpenOptions) -> Result<(), Error> {
    if specs.is_empty() || specs.len() > LAYERS_MAX {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "a backing chain has 1 to {LAYERS_MAX} files, not {}",
                specs.len()
            ),
        ));
    }
    if options.snapshot.is_some() && !options.read_only {
        return Err(Error::new(
            ErrorKind::Invalid,
            "a snapshot can only be served read-only (--read-only)",
        ));
    }
    if options.snapshot.is_some() && specs.first().map(|spec| spec.format) == Some(LayerFormat::Raw)
    {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a raw image has no internal snapshots",
        ));
    }
    Ok(())
}

/// Opens file number `index` of the chain; with it comes what writing to it needs.
async fn open_layer<S: Storage>(
    storage: &S,
    index: usize,
    spec: &LayerSpec,
    options: &OpenOptions,
) -> Result<(Layer, Option<WriteParts>), Error> {
    let read_only = options.read_only || index > 0;
    let layer_index = u8::try_from(index).unwrap_or(u8::MAX);
    let (size, kind, parts) = match spec.format {
        LayerFormat::Raw => {
            let len = file_len(storage, spec.file)?;
            // The disk has whole sectors; the last one is completed when it is written.
            let len = if index == 0 {
                len.next_multiple_of(SECTOR_SIZE)
            } else {
                len
            };
            (len, LayerKind::Raw, None)
        }
        LayerFormat::Qcow2 => {
            let parsed = if read_only {
                parse(storage, spec.file, true).await
            } else {
                parse_for_writing(storage, spec.file).await
            };
            let mut parsed = parsed.map_err(|error| {
                if index == 0 {
                    error
                } else {
                    error.context(format!("layer {index} of the backing chain"))
                }
            })?;
            if let Some(bytes) = options.l2_cache_entry_size
                && index == 0
                && bytes > parsed.header.geometry().cluster_size()
            {
                let cluster_size = parsed.header.geometry().cluster_size();
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "--l2-cache-entry-size is {bytes}, more than the image's cluster \
                         size of {cluster_size}; give at most that"
                    ),
                ));
            }
            if index == 0
                && let Some(selector) = &options.snapshot
            {
                show_snapshot(storage, spec.file, &mut parsed, selector).await?;
            }
            // Like QEMU: a partial last sector is not part of the disk.
            let size = align_down(parsed.header.size, SECTOR_SIZE);
            let (mapping, parts) = mapping(parsed, options);
            (size, LayerKind::Qcow2(mapping), Some(parts))
        }
    };
    let layer = Layer {
        file: spec.file,
        index: layer_index,
        key: SliceKey::new(layer_index, HostOffset::new(0)),
        size,
        kind,
    };
    Ok((layer, parts))
}

fn file_len<S: Storage>(storage: &S, file: FileId) -> Result<u64, Error> {
    storage
        .len(file)
        .map_err(|error| Error::io("cannot get the length of the image", error))
}

async fn read<S: Storage>(
    storage: &S,
    file: FileId,
    offset: u64,
    len: u64,
    what: &str,
) -> Result<AlignedBuf, Error> {
    let (read, buf) = storage
        .read_buf(file, offset, AlignedBuf::zeroed(to_usize(len)))
        .await;
    read.map_err(|error| Error::io(format!("cannot read the {what} at {offset:#x}"), error))?;
    Ok(buf)
}

/// Reads and decodes the header of a qcow2 image.
pub(crate) async fn read_header<S: Storage>(storage: &S, file: FileId) -> Result<Header, Error> {
    let len = file_len(storage, file)?;
    let probe = read(storage, file, 0, len.min(HEADER_PROBE), "image header").await?;
    let cluster_bits = probe.get(20..24).and_then(|word| word.try_into().ok());
    let cluster_bits = cluster_bits.map_or(0, u32::from_be_bytes);
    // A value out of range is for the decoder to refuse.
    let cluster_size = if (9..=21).contains(&cluster_bits) {
        1 << cluster_bits
    } else {
        512
    };
    let bytes = read(storage, file, 0, len.min(cluster_size), "image header").await?;
    Header::decode(&bytes).map_err(|error| Error::format("cannot use the image", error))
}

/// Parses an image that will be written to. One that was not closed in order is served with
/// untrusted counts, or repaired first where that cannot be.
async fn parse_for_writing<S: Storage>(storage: &S, file: FileId) -> Result<Parsed, Error> {
    let header = read_header(storage, file).await?;
    if !header.is_dirty() || header.is_corrupt() {
        return parse(storage, file, false).await;
    }
    // What no repair mends is refused before a repair writes.
    tables(storage, file, &header, file_len(storage, file)?).await?;
    if storage.can_grow(file) {
        match parse(storage, file, false).await {
            Ok(mut parsed) => {
                if let Some(end) = untrusted_end(storage, file, &parsed).await? {
                    log::info!(
                        "the image has the dirty bit: its refcounts are counted anew while it is \
                         served"
                    );
                    parsed.untrusted = true;
                    parsed.managed_end = end;
                    return Ok(parsed);
                }
            }
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => log::info!("repair before serving: {}", error.chain()),
        }
    }
    let dangling_end = repair(storage, file).await?;
    let mut parsed = parse(storage, file, false).await?;
    // Entries past the end of the file that a repair had to leave: nothing may ever be allocated
    // where they point, and what is there is not data.
    parsed.managed_end = parsed.managed_end.max(dangling_end);
    Ok(parsed)
}

/// Where clusters may be taken in an image that was not closed in order: past the end of the file,
/// and past what lost entries may point to. `None`: the refcount structure and the L1 table do not
/// look as if the file had all its clusters but the last few.
async fn untrusted_end<S: Storage>(
    storage: &S,
    file: FileId,
    parsed: &Parsed,
) -> Result<Option<u64>, Error> {
    let geometry = parsed.header.geometry();
    let clusters = geometry.clusters_for(parsed.file_len);
    let past_end = |raw: &u64| {
        L1Entry(*raw)
            .table_offset()
            .is_some_and(|table| table.get() >= parsed.file_len)
    };
    if clusters > check::CLUSTERS_MAX || parsed.l1.iter().any(past_end) {
        return Ok(None);
    }
    let per_block = geometry.refcount_block_entries();
    let last_block = clusters.saturating_sub(1) / per_block;
    let named = |block: &u64| {
        let entry = usize::try_from(*block)
            .ok()
            .and_then(|index| parsed.refcount_table.get(index));
        entry.copied().filter(|entry| *entry != 0)
    };
    let later: Vec<(u64, u64)> = (last_block..to_u64(parsed.refcount_table.len()))
        .filter_map(|block| Some((block, named(&block)?)))
        .collect();
    if later.len() > BLOCKS_PAST_END_MAX {
        return Ok(None);
    }
    // A cluster that was counted may be named: one that lay past the end is lost.
    let mut counted_end = clusters;
    for (block, offset) in later {
        let bytes = geometry.cluster_size();
        let counts = read(storage, file, offset, bytes, "refcount block").await?;
        let last = (0..per_block)
            .rev()
            .find(|index| refcount::get(&counts, geometry.refcount_order(), to_usize(*index)) != 0);
        if let Some(last) = last {
            counted_end = counted_end.max(block * per_block + last + 1);
        }
    }
    let gap = (clusters / 8)
        .min(GUARD_GAP_BYTES_MAX >> geometry.cluster_bits())
        .max(GUARD_GAP_CLUSTERS_MIN);
    let end = (counted_end + gap).checked_mul(geometry.cluster_size());
    Ok(end.filter(|end| *end < HOST_OFFSET_END))
}

/// Repairs an image that was not closed in order, before it is served. Returns where the entries
/// end that point past the end of the file; 0 if there are none.
async fn repair<S: Storage>(storage: &S, file: FileId) -> Result<u64, Error> {
    log::info!("the image was not closed in order: repairing it before it is served");
    let report = check::repair_dirty(storage, file).await?;
    log::info!(
        "the image is repaired: {} errors and {} leaked clusters",
        report.corruptions_fixed,
        report.leaks_fixed
    );
    if report.dangling > 0 {
        log::warn!(
            "{} entries point past the end of the file: lost data",
            report.dangling
        );
    }
    Ok(report.dangling_end)
}

/// Puts the tree of an internal snapshot in the place of the active one.
async fn show_snapshot<S: Storage>(
    storage: &S,
    file: FileId,
    parsed: &mut Parsed,
    selector: &Selector,
) -> Result<(), Error> {
    let Some(entry) = parsed
        .snapshots
        .find(selector)
        .and_then(|index| parsed.snapshots.entries.get(index))
    else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the image has no snapshot {selector}"),
        ));
    };
    let geometry = parsed.header.geometry();
    parsed.header.size = entry.disk_size().unwrap_or(parsed.header.size);
    // What lies past the end of the disk is VM state.
    let l1_used = geometry
        .l1_entries_for(parsed.header.size)
        .min(u64::from(entry.l1_size));
    let offset = entry.l1_offset.get();
    let l1 = read(storage, file, offset, l1_used * 8, "snapshot's L1 table").await?;
    parsed.l1 = words(&l1).collect();
    Ok(())
}

async fn parse<S: Storage>(storage: &S, file: FileId, read_only: bool) -> Result<Parsed, Error> {
    let header = read_header(storage, file).await?;
    if header.is_corrupt() && !read_only {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image is marked corrupt: repair it (qblkd check --repair all) or open it with \
             --read-only",
        ));
    }
    let file_len = file_len(storage, file)?;
    let geometry = header.geometry();
    let mut tables = tables(storage, file, &header, file_len).await?;
    let table_offset = header.refcount_table_offset.get();
    let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    tables.places.push(place(
        "refcount table",
        geometry,
        table_offset,
        table_bytes,
        file_len,
    )?);
    let mut refcount_table = Vec::new();
    if !read_only {
        let table = read(storage, file, table_offset, table_bytes, "refcount table").await?;
        refcount_table = words(&table).collect();
    }
    for (index, raw) in refcount_table
        .iter()
        .enumerate()
        .filter(|(_, raw)| **raw != 0)
    {
        let entry = RefcountTableEntry(*raw);
        entry.validate(geometry).map_err(|error| {
            Error::format(
                format!("refcount table entry {index} is {raw:#018x}"),
                error,
            )
        })?;
        let offset = entry.block_offset().map_or(0, HostOffset::get);
        if offset >= file_len {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("refcount block {index} at {offset:#x} lies past the end of the file"),
            ));
        }
        let cluster = offset >> geometry.cluster_bits();
        let block = ("refcount block", cluster..cluster + 1);
        tables.places.push(block);
    }
    disjoint(tables.places.clone())?;
    let places = tables.places.into_iter();
    let protected = Protected::new(places.map(|(_, clusters)| clusters).collect());
    let snapshots = Table {
        entries: tables.snapshots,
        pending: Vec::new(),
        start: header.snapshot_table_offset.get() >> geometry.cluster_bits(),
        count: geometry.clusters_for(tables.snapshot_bytes),
    };
    Ok(Parsed {
        header,
        snapshots,
        l1: tables.l1,
        refcount_table,
        protected,
        file_len,
        managed_end: file_len,
        untrusted: false,
    })
}

/// What a repair needs to find whole, and leaves where it is.
struct Tables {
    /// The active L1 table, as far as the disk reaches.
    l1: Box<[u64]>,
    snapshots: Vec<SnapshotEntry>,
    /// Length of the snapshot table.
    snapshot_bytes: u64,
    /// Clusters of the header, the L1 tables and the snapshot table; no two of them overlap.
    places: Vec<(&'static str, Range<u64>)>,
}

async fn tables<S: Storage>(
    storage: &S,
    file: FileId,
    header: &Header,
    file_len: u64,
) -> Result<Tables, Error> {
    let geometry = header.geometry();
    let mut places = vec![("header", 0..1)];
    let l1_bytes = u64::from(header.l1_size) * 8;
    let l1_offset = header.l1_table_offset.get();
    places.push(place("L1 table", geometry, l1_offset, l1_bytes, file_len)?);
    let l1_used = geometry
        .l1_entries_for(header.size)
        .min(u64::from(header.l1_size));
    let l1 = read(storage, file, l1_offset, l1_used * 8, "L1 table").await?;
    let (snapshots, snapshot_bytes) = snapshots(storage, file, header, file_len).await?;
    if header.snapshot_count > 0 {
        let offset = header.snapshot_table_offset.get();
        places.push(place(
            "snapshot table",
            geometry,
            offset,
            snapshot_bytes,
            file_len,
        )?);
    }
    for (index, snapshot) in snapshots.iter().enumerate() {
        let bytes = u64::from(snapshot.l1_size) * 8;
        let name = "L1 table of a snapshot";
        let place = place(name, geometry, snapshot.l1_offset.get(), bytes, file_len)
            .map_err(|error| error.context(format!("snapshot {index} is damaged")))?;
        places.push(place);
    }
    disjoint(places.clone())?;
    Ok(Tables {
        l1: words(&l1).collect(),
        snapshots,
        snapshot_bytes,
        places,
    })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|chunk| chunk.try_into().map_or(0, u64::from_be_bytes))
}

/// The clusters of a table that must lie within the file.
fn place(
    name: &'static str,
    geometry: Geometry,
    offset: u64,
    bytes: u64,
    file_len: u64,
) -> Result<(&'static str, Range<u64>), Error> {
    let end = offset.saturating_add(bytes);
    // The file may end within the last cluster of a table, not before its last byte.
    if end > file_len && bytes > 0 {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the {name} at {offset:#x} (+{bytes:#x}) lies past the end of the file"),
        ));
    }
    let start = offset >> geometry.cluster_bits();
    Ok((name, start..start + geometry.clusters_for(bytes)))
}

/// No two tables share a cluster.
fn disjoint(mut places: Vec<(&'static str, Range<u64>)>) -> Result<(), Error> {
    places.retain(|(_, clusters)| !clusters.is_empty());
    places.sort_by_key(|(_, clusters)| clusters.start);
    for pair in places.windows(2) {
        if let [(name, clusters), (next_name, next)] = pair
            && next.start < clusters.end
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the {name} and the {next_name} overlap in the image"),
            ));
        }
    }
    Ok(())
}

/// The snapshot table and its length in bytes.
async fn snapshots<S: Storage>(
    storage: &S,
    file: FileId,
    header: &Header,
    file_len: u64,
) -> Result<(Vec<SnapshotEntry>, u64), Error> {
    if header.snapshot_count == 0 {
        return Ok((Vec::new(), 0));
    }
    let offset = header.snapshot_table_offset.get();
    let fault = |error| Error::format("the snapshot table is damaged", error);
    // Most tables are far shorter than the limit: read on only if the first piece is too short.
    let whole = file_len.saturating_sub(offset);
    let mut len = whole.min(1 << 20);
    loop {
        let bytes = read(storage, file, offset, len, "snapshot table").await?;
        let decoded = decode_table(&bytes, header.snapshot_count);
        match decoded {
            Ok(entries) => {
                let used = crate::format::snapshot::encode_table(&entries).map_err(fault)?;
                // The padding of the last entry may lie past the end of the file.
                return Ok((entries, to_u64(used.len()).min(whole)));
            }
            Err(error) => {
                let limit = whole.min(crate::format::geometry::SNAPSHOT_TABLE_BYTES_MAX);
                if len >= limit {
                    return Err(fault(error));
                }
                len = limit;
            }
        }
    }
}

/// What an open image needs besides its mapping, to be written to.
struct WriteParts {
    header: Header,
    refcount_table: Vec<u64>,
    file_len: u64,
    managed_end: u64,
    snapshots: Table,
    untrusted: bool,
}

fn mapping(mut parsed: Parsed, options: &OpenOptions) -> (Mapping, WriteParts) {
    let geometry = parsed.header.geometry();
    let start = geometry.clusters_for(parsed.file_len);
    let lost = start..geometry.clusters_for(parsed.managed_end);
    let lost = if lost.is_empty() {
        LostData::none()
    } else {
        parsed.protected.add(lost.clone());
        let bytes = |cluster: u64| cluster << geometry.cluster_bits();
        LostData::new(bytes(lost.start)..bytes(lost.end), parsed.untrusted)
    };
    let slice_bytes = options
        .l2_cache_entry_size
        .unwrap_or(SLICE_BYTES_DEFAULT)
        .clamp(512, geometry.cluster_size());
    let mapping = Mapping {
        geometry,
        version: parsed.header.version,
        zstd: parsed.header.compression_type == CompressionType::Zstd,
        l1: parsed.l1.iter().map(|raw| AtomicU64::new(*raw)).collect(),
        slice_bits: slice_bytes.ilog2(),
        protected: Arc::new(Mutex::new(parsed.protected)),
        host_end: AtomicU64::new(parsed.file_len),
        lost,
    };
    let parts = WriteParts {
        header: parsed.header,
        refcount_table: parsed.refcount_table,
        file_len: parsed.file_len,
        managed_end: parsed.managed_end,
        snapshots: parsed.snapshots,
        untrusted: parsed.untrusted,
    };
    (mapping, parts)
}

fn active<S: Storage>(
    storage: &S,
    layer: &Layer,
    parts: WriteParts,
    options: &OpenOptions,
    board: &Arc<PinBoard>,
    store: &Arc<Store>,
) -> Active {
    let LayerKind::Qcow2(mapping) = &layer.kind else {
        unreachable!("only a qcow2 layer has a header");
    };
    let WriteParts {
        header, untrusted, ..
    } = parts;
    let owned_since = mapping
        .l1
        .iter()
        .map(|raw| L1Entry(raw.load(Ordering::Relaxed)))
        .map(|entry| {
            if entry.copied() && !untrusted {
                board.generation()
            } else {
                0
            }
        })
        .map(AtomicU64::new)
        .collect();
    let clear_autoclear = header.autoclear != 0;
    if clear_autoclear {
        log::info!(
            "the first write will clear autoclear features {:#x} (persistent bitmaps become \
             invalid)",
            header.autoclear
        );
    }
    let l1_offset = header.l1_table_offset.get();
    let disk_size = header.size;
    let mut snapshots = Snapshots::new(parts.snapshots, disk_size, untrusted);
    let mut drops = Drops::default();
    if untrusted {
        let key = snapshots.next_key();
        drops.freeze(key);
        snapshots.begin_rebuild(Rebuild::new(key, &header, mapping, parts.file_len));
    } else if header.version < 3 {
        snapshots.push(Task::Look, 0);
    }
    let parts = AllocatorParts {
        geometry: mapping.geometry,
        file: layer.file,
        slice_bits: mapping.slice_bits,
        table: parts.refcount_table,
        table_offset: header.refcount_table_offset.get(),
        table_clusters: header.refcount_table_clusters,
        protected: Arc::clone(&mapping.protected),
        file_len: parts.managed_end,
        untrusted,
        can_grow: storage.can_grow(layer.file),
        discard: options.discard,
        cache_bytes: options
            .refcount_cache_size
            .unwrap_or(REFCOUNT_CACHE_BYTES_DEFAULT),
    };
    let header = Arc::new(HeaderOwner::new(layer.file, header));
    let allocator = Allocator::new(
        parts,
        Arc::clone(board),
        Arc::clone(&header),
        Arc::clone(store),
    );
    Active {
        owned_since,
        l1_offset,
        l1: Mutex::new(L1State::default()),
        taken_tables: Arc::new(Taken::default()),
        taken: Arc::new(Taken::default()),
        allocator,
        drops: Mutex::new(drops),
        snapshots,
        disk_size,
        header,
        clear_autoclear,
    }
}

/// Bodies in the store, and slots of each directory.
fn cache_size(layers: &[Layer], options: &OpenOptions) -> (usize, usize) {
    let mut needed = 0_u64;
    let mut slice_bytes = options
        .l2_cache_entry_size
        .unwrap_or(SLICE_BYTES_DEFAULT)
        .max(512);
    for layer in layers {
        if let LayerKind::Qcow2(mapping) = &layer.kind {
            needed += to_u64(mapping.l1.len()) * mapping.geometry.cluster_size();
            slice_bytes = slice_bytes.min(mapping.slice_bytes());
        }
    }
    let budget = options
        .l2_cache_size
        // Twice: half of the budget may be modified before requests have to write it back.
        .unwrap_or_else(|| (needed * 2).min(L2_CACHE_BYTES_DEFAULT_MAX));
    let bodies = to_usize(budget / slice_bytes);
    (bodies, bodies)
}
