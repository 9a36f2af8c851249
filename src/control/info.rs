//! What the queries report: plain structs that the daemon fills in, and their QEMU shapes.
//!
//! The daemon describes one device with its backing chain and its counters; this module makes
//! `BlockInfo`, `BlockDeviceInfo`, `ImageInfo` and `BlockStats` of QEMU's QMP reference from them,
//! including the members that never change here (no throttling, no encryption, no merging), since
//! typed clients insist on them. Nothing here reads an image or a counter.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::SnapshotInfo;

/// The one device that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The name given with `--id`.
    pub name: String,
    /// The active image first, then its backing chain down to the base. Never empty.
    pub chain: Vec<NodeInfo>,
}

impl DeviceInfo {
    /// Whether the device or one of its nodes is called `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.name == name || self.chain.iter().any(|node| node.node_name == name)
    }
}

/// One image of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Unique name of this image; that of the active one is the device's.
    pub node_name: String,
    /// `qcow2` or `raw`.
    pub format: &'static str,
    /// The path it was opened with.
    pub filename: String,
    /// Whether it is open for reading only.
    pub read_only: bool,
    /// How the host page cache is used.
    pub cache: CacheInfo,
    /// Size of the virtual disk in bytes.
    pub virtual_size_bytes: u64,
    /// Space that the file takes on the host in bytes, if known.
    pub actual_size_bytes: Option<u64>,
    /// The backing file, if there is one.
    pub backing: Option<BackingInfo>,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
}

/// QEMU's `BlockdevCacheInfo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheInfo {
    /// A completed write may still be volatile.
    pub writeback: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// How an image names its backing file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingInfo {
    /// The name as it stands in the image.
    pub filename: String,
    /// The path that it resolves to.
    pub full_filename: String,
    /// The format as it stands in the image, if it does.
    pub format: Option<String>,
}

/// Facts from a qcow2 header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size in bytes.
    pub cluster_size_bytes: u64,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether refcounts may lag.
    pub lazy_refcounts: bool,
    /// The dirty bit.
    pub dirty: bool,
    /// The corrupt bit.
    pub corrupt: bool,
    /// `zlib` or `zstd`.
    pub compression_type: &'static str,
    /// The internal snapshots, oldest first.
    pub internal_snapshots: Vec<InternalSnapshotInfo>,
}

/// QEMU's `SnapshotInfo`, with what it lacks under `x-qblkd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct InternalSnapshotInfo {
    /// Unique id, decimal digits.
    pub id: String,
    /// The user's name for it.
    pub name: String,
    /// Bytes of VM state stored with it.
    pub vm_state_size: u64,
    /// When it was taken, seconds since 1970.
    pub date_sec: u64,
    /// Nanoseconds part of that.
    pub date_nsec: u32,
    /// The guest's run time then, seconds.
    pub vm_clock_sec: u64,
    /// Nanoseconds part of that.
    pub vm_clock_nsec: u32,
    /// Instruction count of a recorded guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// What QEMU does not tell.
    #[serde(rename = "x-qblkd", skip_serializing_if = "Option::is_none")]
    pub more: Option<MoreSnapshotInfo>,
}

/// What QEMU does not tell of an internal snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MoreSnapshotInfo {
    /// Virtual size of the disk then, in bytes.
    pub disk_size: u64,
    /// Background work for it is not done yet.
    pub unsettled: bool,
}

impl From<&SnapshotInfo> for InternalSnapshotInfo {
    fn from(info: &SnapshotInfo) -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            id: info.id.clone(),
            name: info.name.clone(),
            vm_state_size: info.vm_state_size,
            date_sec: info.date_sec.into(),
            date_nsec: info.date_nsec,
            vm_clock_sec: info.vm_clock_nsec / SECOND,
            vm_clock_nsec: u32::try_from(info.vm_clock_nsec % SECOND).unwrap_or(0),
            icount: info.icount,
            more: Some(MoreSnapshotInfo {
                disk_size: info.disk_size,
                unsettled: info.unsettled,
            }),
        }
    }
}

/// Counters of one kind of request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OperationStats {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Requests that failed on the host.
    pub failed: u64,
    /// Requests that were refused.
    pub invalid: u64,
    /// Time from taking to completing, summed over the requests.
    pub total_time_ns: u64,
    /// How long the single requests took, if that is measured for this kind.
    pub latency: Option<LatencyHistogram>,
}

/// QEMU's `BlockLatencyHistogramInfo`: bin `i` counts the latencies from boundary `i - 1`, or zero,
/// up to but not including boundary `i`, or infinity. One more bin than boundaries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LatencyHistogram {
    /// In nanoseconds, ascending.
    pub boundaries: Vec<u64>,
    /// Counts.
    pub bins: Vec<u64>,
}

/// Counters of the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Reads.
    pub read: OperationStats,
    /// Writes.
    pub write: OperationStats,
    /// Flushes; their `bytes` are not reported.
    pub flush: OperationStats,
    /// Discards; their `latency` is not reported.
    pub unmap: OperationStats,
    /// The end of the highest byte ever written to the image file.
    pub write_highest_offset: u64,
    /// Time since the last request, if there was one.
    pub idle_time_ns: Option<u64>,
    /// One entry per worker thread.
    pub workers: Vec<WorkerStats>,
}

/// Metadata cache counters of one worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct WorkerStats {
    /// Which worker, from 0.
    pub worker: usize,
    /// Lookups served by the worker's own directory.
    pub metadata_cache_hits: u64,
    /// Lookups that had to go to the process-wide store.
    pub metadata_cache_misses: u64,
    /// Lookups served by the put table.
    pub put_table_hits: u64,
}

/// `query-block`: a list of one `BlockInfo`.
pub(super) fn block_list(device: &DeviceInfo) -> Value {
    json!([{
        "device": device.name,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "inserted": device.chain.first().map(|_| node(device, 0, false)),
    }])
}

/// `query-named-block-nodes`: a list of `BlockDeviceInfo`. With `flat`, an image does not carry its
/// backing chain inside its own description.
pub(super) fn node_list(device: &DeviceInfo, flat: bool) -> Value {
    (0..device.chain.len())
        .map(|index| node(device, index, flat))
        .collect()
}

/// `BlockDeviceInfo` of image `index` of the chain.
fn node(device: &DeviceInfo, index: usize, flat: bool) -> Value {
    let info = &device.chain[index];
    let below = device.chain.len() - index - 1;
    let mut value = json!({
        "file": info.filename,
        "node-name": info.node_name,
        "ro": info.read_only,
        "drv": info.format,
        "backing_file_depth": if flat { 0 } else { below },
        "active": true,
        "encrypted": false,
        "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image_chain(&device.chain[index..], flat),
        "cache": info.cache,
        "write_threshold": 0,
    });
    if let Some(backing) = &info.backing {
        value["backing_file"] = json!(backing.full_filename);
    }
    value
}

/// `ImageInfo` of the first image of `chain`, with those below it inside unless `flat`. Built from
/// the base upwards: no recursion over a chain whose length an image decides.
fn image_chain(chain: &[NodeInfo], flat: bool) -> Value {
    let shown = if flat { &chain[..1] } else { chain };
    let mut below = None;
    for info in shown.iter().rev() {
        let mut value = image(info);
        if let Some(below) = below {
            value.insert("backing-image".into(), Value::Object(below));
        }
        below = Some(value);
    }
    below.map_or(Value::Null, Value::Object)
}

fn image(info: &NodeInfo) -> Map<String, Value> {
    let mut value = Map::new();
    let mut put = |name: &str, member: Value| {
        value.insert(name.into(), member);
    };
    put("filename", json!(info.filename));
    put("format", json!(info.format));
    put("virtual-size", json!(info.virtual_size_bytes));
    if let Some(bytes) = info.actual_size_bytes {
        put("actual-size", json!(bytes));
    }
    put(
        "dirty-flag",
        json!(info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty)),
    );
    if let Some(backing) = &info.backing {
        put("backing-filename", json!(backing.filename));
        put("full-backing-filename", json!(backing.full_filename));
        if let Some(format) = &backing.format {
            put("backing-filename-format", json!(format));
        }
    }
    if let Some(qcow2) = &info.qcow2 {
        put("cluster-size", json!(qcow2.cluster_size_bytes));
        if !qcow2.internal_snapshots.is_empty() {
            put("snapshots", json!(qcow2.internal_snapshots));
        }
        put(
            "format-specific",
            json!({ "type": "qcow2", "data": qcow2_specific(qcow2) }),
        );
    }
    value
}

/// `ImageInfoSpecificQCow2`. Version 2 has none of the optional members.
fn qcow2_specific(qcow2: &Qcow2Info) -> Value {
    if qcow2.version < 3 {
        return json!({
            "compat": "0.10",
            "compression-type": qcow2.compression_type,
            "refcount-bits": qcow2.refcount_bits,
        });
    }
    json!({
        "compat": "1.1",
        "compression-type": qcow2.compression_type,
        "lazy-refcounts": qcow2.lazy_refcounts,
        "refcount-bits": qcow2.refcount_bits,
        "corrupt": qcow2.corrupt,
        "extended-l2": false,
    })
}

/// `query-blockstats` without `query-nodes`: a list of one `BlockStats`, with those of the backing
/// chain inside, and our own counters under `x-qblkd`. Built from the base upwards, like
/// [`image_chain`].
pub(super) fn device_stats_list(device: &DeviceInfo, stats: &DeviceStats) -> Value {
    let mut below = None;
    for index in (0..device.chain.len()).rev() {
        let mut value = node_stats(device, index, stats);
        if let Some(below) = below {
            value.insert("backing".into(), Value::Object(below));
        }
        below = Some(value);
    }
    let mut value = below.unwrap_or_default();
    value.insert("device".into(), json!(device.name));
    value.insert("x-qblkd".into(), json!({ "workers": stats.workers }));
    json!([value])
}

/// `query-blockstats` with `query-nodes`: one entry per image.
pub(super) fn node_stats_list(device: &DeviceInfo, stats: &DeviceStats) -> Value {
    (0..device.chain.len())
        .map(|index| Value::Object(node_stats(device, index, stats)))
        .collect()
}

/// `BlockStats` of image `index` of the chain, with those of its file as `parent`. Requests are
/// counted where the guest makes them, so only the active image has any, and only its file is
/// written to.
fn node_stats(device: &DeviceInfo, index: usize, stats: &DeviceStats) -> Map<String, Value> {
    let none = DeviceStats::default();
    let file = DeviceStats {
        write_highest_offset: stats.write_highest_offset,
        ..DeviceStats::default()
    };
    let (of_image, of_file) = if index == 0 {
        (stats, &file)
    } else {
        (&none, &none)
    };
    let mut value = Map::new();
    value.insert("node-name".into(), json!(device.chain[index].node_name));
    value.insert("stats".into(), device_stats(of_image, index == 0));
    // No node of its own: it has no name.
    let parent = json!({ "stats": device_stats(of_file, false) });
    value.insert("parent".into(), parent);
    value
}

/// `BlockDeviceStats`. `counts`: what fails and what is refused is in the times, where requests are
/// counted.
fn device_stats(stats: &DeviceStats, counts: bool) -> Value {
    let mut value = Map::new();
    let kinds = [
        ("rd", &stats.read),
        ("wr", &stats.write),
        ("flush", &stats.flush),
        ("unmap", &stats.unmap),
        ("zone_append", &OperationStats::default()),
    ];
    for (kind, operation) in kinds {
        let mut put = |name: String, number: u64| value.insert(name, json!(number));
        put(format!("{kind}_operations"), operation.operations);
        put(format!("failed_{kind}_operations"), operation.failed);
        put(format!("invalid_{kind}_operations"), operation.invalid);
        put(format!("{kind}_total_time_ns"), operation.total_time_ns);
        if kind != "flush" {
            put(format!("{kind}_bytes"), operation.bytes);
            put(format!("{kind}_merged"), 0);
        }
        if let (true, Some(latency)) = (kind != "unmap", &operation.latency) {
            value.insert(format!("{kind}_latency_histogram"), json!(latency));
        }
    }
    value.insert(
        "wr_highest_offset".into(),
        json!(stats.write_highest_offset),
    );
    if let Some(idle) = stats.idle_time_ns {
        value.insert("idle_time_ns".into(), json!(idle));
    }
    value.insert("account_invalid".into(), json!(counts));
    value.insert("account_failed".into(), json!(counts));
    value.insert("timed_stats".into(), json!([]));
    Value::Object(value)
}
