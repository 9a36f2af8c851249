//! What the control socket learns of the device: the chain and the counters in control's words.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::chain::Node;
use super::jobs::Background;
use crate::config::ServeConfig;
use crate::control::info::{
    BackingInfo, CacheInfo, DeviceInfo, DeviceStats, InternalSnapshotInfo, LatencyHistogram,
    NodeInfo, OperationStats, Qcow2Info, WorkerStats,
};
use crate::control::job::JobInfo;
use crate::control::{CommandError, Event, Handler, IoErrorAction, IoOperation, Order, Ticket};
use crate::device::{LATENCY_BUCKETS, OperationKind, OperationSnapshot, Server};
use crate::engine::{ImageEvent, LayerFormat, SnapshotInfo, snapshot_info};
use crate::format::Header;
use crate::format::header::CompressionType;
use crate::format::snapshot::SnapshotEntry;

/// Latency bins start at 2^10 ns, about a microsecond: nothing is faster.
const FIRST_BOUNDARY_BIT: usize = 10;
/// ... and end at 2^34 ns, some 17 s.
const LAST_BOUNDARY_BIT: usize = 34;
const _: () = assert!(LAST_BOUNDARY_BIT < LATENCY_BUCKETS);

/// Answers one round of commands.
pub(super) struct Report<'a> {
    config: &'a ServeConfig,
    server: &'a Server,
    background: &'a mut Background,
    /// A client asked to quit.
    pub(super) quit: bool,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        config: &'a ServeConfig,
        server: &'a Server,
        background: &'a mut Background,
    ) -> Self {
        Self {
            config,
            server,
            background,
            quit: false,
        }
    }

    fn node(&self, index: usize, node: &Node, below: Option<&Node>) -> NodeInfo {
        let cache = self.config.image.cache;
        NodeInfo {
            node_name: node.name.clone(),
            format: match node.layer.format {
                LayerFormat::Qcow2 => "qcow2",
                LayerFormat::Raw => "raw",
            },
            filename: text(&node.layer.path),
            read_only: node.layer.read_only,
            cache: CacheInfo {
                writeback: cache.is_writeback(),
                direct: cache.is_direct(),
                no_flush: cache.ignores_flush(),
            },
            virtual_size_bytes: self.background.chain().virtual_size(index, node),
            actual_size_bytes: node
                .layer
                .file
                .as_file()
                .metadata()
                .ok()
                .map(|metadata| metadata.blocks() * 512),
            backing: below.and_then(|below| {
                let header = &node.info.as_ref()?.header;
                Some(BackingInfo {
                    filename: bytes(header.backing_name.as_deref()?),
                    full_filename: text(&below.layer.path),
                    format: header.backing_format().map(bytes),
                })
            }),
            qcow2: node.info.as_ref().map(|info| Qcow2Info {
                version: info.header.version,
                cluster_size_bytes: info.header.geometry().cluster_size(),
                refcount_bits: info.header.geometry().refcount_bits(),
                lazy_refcounts: info.header.has_lazy_refcounts(),
                dirty: info.header.is_dirty(),
                corrupt: info.header.is_corrupt()
                    || (index == 0 && self.background.chain().is_corrupt()),
                compression_type: match info.header.compression_type {
                    CompressionType::Zlib => "zlib",
                    CompressionType::Zstd => "zstd",
                },
                internal_snapshots: if index == 0 {
                    let snapshots = self.background.snapshots();
                    snapshots.iter().map(InternalSnapshotInfo::from).collect()
                } else {
                    let snapshots = info.snapshots.iter();
                    snapshots
                        .map(|entry| snapshot(entry, &info.header))
                        .collect()
                },
            }),
        }
    }
}

impl Handler for Report<'_> {
    fn device_info(&mut self) -> DeviceInfo {
        let nodes = &self.background.chain().nodes;
        let chain = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| self.node(index, node, nodes.get(index + 1)))
            .collect();
        DeviceInfo {
            name: self.config.disk.id.clone(),
            chain,
        }
    }

    fn device_stats(&mut self) -> DeviceStats {
        let workers = self.server.stats();
        let sum = |kind: OperationKind| {
            let of_kind = workers
                .iter()
                .map(|worker| &worker.operations[kind as usize]);
            operations(of_kind)
        };
        let caches = self.server.cache_stats();
        DeviceStats {
            read: sum(OperationKind::Read),
            write: sum(OperationKind::Write),
            flush: sum(OperationKind::Flush),
            unmap: sum(OperationKind::Unmap),
            write_highest_offset: self.background.chain().file_len(),
            idle_time_ns: None,
            workers: caches
                .iter()
                .enumerate()
                .map(|(worker, cache)| WorkerStats {
                    worker,
                    metadata_cache_hits: cache.hits,
                    metadata_cache_misses: cache.misses,
                    put_table_hits: cache.put_table_hits,
                })
                .collect(),
        }
    }

    fn jobs(&mut self) -> Vec<JobInfo> {
        self.background.jobs()
    }

    fn set_job_speed(&mut self, id: &str, speed: u64) {
        self.background.set_speed(id, speed);
    }

    fn dismiss_job(&mut self, id: &str) {
        self.background.dismiss(id);
    }

    fn order(&mut self, ticket: Ticket, order: Order) -> Result<(), CommandError> {
        self.background.order(ticket, order)
    }

    fn quit(&mut self) {
        self.quit = true;
    }
}

fn text(path: &Path) -> String {
    bytes(path.as_os_str().as_bytes())
}

fn bytes(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// A snapshot of a backing file, which nobody changes.
fn snapshot(entry: &SnapshotEntry, header: &Header) -> InternalSnapshotInfo {
    InternalSnapshotInfo::from(&SnapshotInfo {
        unsettled: header.is_dirty(),
        ..snapshot_info(entry, header.size)
    })
}

fn operations<'a>(snapshots: impl Iterator<Item = &'a OperationSnapshot>) -> OperationStats {
    let mut stats = OperationStats::default();
    let mut buckets = [0; LATENCY_BUCKETS];
    for snapshot in snapshots {
        stats.operations += snapshot.completed;
        stats.bytes += snapshot.bytes;
        stats.failed += snapshot.failed;
        stats.invalid += snapshot.unsupported;
        stats.total_time_ns += snapshot.total_ns;
        for (sum, count) in buckets.iter_mut().zip(snapshot.latency) {
            *sum += count;
        }
    }
    stats.latency = Some(histogram(&buckets));
    stats
}

/// Bucket n of the device counts [2^n, 2^(n+1)) ns.
fn histogram(buckets: &[u64; LATENCY_BUCKETS]) -> LatencyHistogram {
    let (below, rest) = buckets.split_at(FIRST_BOUNDARY_BIT);
    let (inner, above) = rest.split_at(LAST_BOUNDARY_BIT - FIRST_BOUNDARY_BIT);
    let mut bins = vec![below.iter().sum()];
    bins.extend(inner);
    bins.push(above.iter().sum());
    LatencyHistogram {
        boundaries: (FIRST_BOUNDARY_BIT..=LAST_BOUNDARY_BIT)
            .map(|bit| 1 << bit)
            .collect(),
        bins,
    }
}

/// An image's event in the words of the control socket. `node` is the name of the active node.
pub(super) fn event(device: &str, node: &str, event: ImageEvent) -> Event {
    let io_error = |operation, nospace, reason| Event::BlockIoError {
        qom_path: String::new(),
        device: device.to_owned(),
        node_name: node.to_owned(),
        operation,
        action: IoErrorAction::Report,
        nospace,
        reason,
    };
    match event {
        ImageEvent::Corrupted { message: msg } => Event::BlockImageCorrupted {
            device: device.to_owned(),
            node_name: node.to_owned(),
            msg,
            offset: None,
            size: None,
            fatal: true,
        },
        ImageEvent::Failed { message } => io_error(IoOperation::Write, false, message),
        ImageEvent::RequestFailed {
            write,
            no_space,
            message,
        } => {
            let operation = if write {
                IoOperation::Write
            } else {
                IoOperation::Read
            };
            io_error(operation, no_space, message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_has_one_bin_more_than_boundaries_and_loses_nothing() {
        let buckets = std::array::from_fn(|bucket| bucket as u64 + 1);
        let histogram = histogram(&buckets);
        assert_eq!(histogram.bins.len(), histogram.boundaries.len() + 1);
        assert_eq!(
            histogram.bins.iter().sum::<u64>(),
            buckets.iter().sum::<u64>()
        );
        // [2^10, 2^11) lies between the first two boundaries.
        assert_eq!(histogram.bins[1], buckets[10]);
    }

    #[test]
    fn a_failed_request_is_an_io_error_and_damage_is_corruption() {
        let failed = ImageEvent::RequestFailed {
            write: true,
            no_space: true,
            message: "full".to_owned(),
        };
        let Event::BlockIoError {
            operation,
            nospace,
            device,
            node_name,
            ..
        } = event("disk0", "top", failed)
        else {
            panic!("not an I/O error");
        };
        assert_eq!((operation, nospace), (IoOperation::Write, true));
        // After an external snapshot the device has a node of another name.
        assert_eq!((&*device, &*node_name), ("disk0", "top"));
        let corrupted = ImageEvent::Corrupted {
            message: "bad".to_owned(),
        };
        assert!(matches!(
            event("disk0", "top", corrupted),
            Event::BlockImageCorrupted { fatal: true, .. }
        ));
    }
}
