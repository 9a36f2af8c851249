//! The open image with its backing chain, the locks on their files, and how they are given back.

use std::sync::Arc;

use crate::config::{ImageConfig, Locking as LockingConfig};
use crate::engine::chain::{ChainOptions, OpenLayer, open_chain};
use crate::engine::info::{ImageInfo, info};
use crate::engine::{self, ErrorKind, Image, LayerFormat, LayerSpec, OpenOptions, Selector};
use crate::format::snapshot::SnapshotEntry;
use crate::storage::lock::{ImageLock, LOCK_PATIENCE, LockKind, Locking};
use crate::storage::{BlockingStorage, FileId, HostFile, block_on};

/// A file of the chain and what it said about itself when it was opened.
#[derive(Debug)]
pub(super) struct Node {
    /// Its name on the control socket; stays the same while it is part of the chain.
    pub(super) name: String,
    pub(super) layer: OpenLayer,
    /// None for a raw file.
    pub(super) info: Option<ImageInfo>,
    /// Given back last: fields drop in this order. None only where it could not be had.
    pub(super) lock: Option<ImageLock>,
}

/// An open virtual disk with everything that it holds on the host.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) image: Arc<Image>,
    /// Active layer first.
    pub(super) nodes: Arc<[Node]>,
}

impl Chain {
    /// Opens the image of the command line: its files, their locks, its metadata. `id` names it.
    pub(super) fn open(config: &ImageConfig, id: &str) -> Result<Self, engine::Error> {
        let mut locks = Vec::new();
        let options = ChainOptions {
            read_only: config.read_only,
            direct: config.cache.is_direct(),
            backing_dirs: config.backing_dirs.clone(),
        };
        let format = config.format.into();
        let layers = open_chain(&config.path, format, &options, &mut |file, read_only| {
            locks.push(lock(config, file, read_only)?);
            Ok(())
        })?;
        let specs = specs(&layers);
        let storage = storage(&layers);
        let mut options = open_options(config);
        if let Some(wanted) = &config.snapshot {
            options.snapshot = Some(find_snapshot(&storage, wanted)?);
        }
        let image = block_on(Image::open(&storage, &specs, &options))?;
        let mut nodes = Vec::with_capacity(layers.len());
        for (index, (layer, lock)) in layers.into_iter().zip(locks).enumerate() {
            nodes.push(Node {
                name: match index {
                    0 => id.to_owned(),
                    below => format!("{id}-backing{below}"),
                },
                info: node_info(&layer)?,
                layer,
                lock: Some(lock),
            });
        }
        Ok(Self {
            image,
            nodes: nodes.into(),
        })
    }

    /// Bytes of the disk of a layer, which `node` is about. That of the active one may be another than
    /// when it was opened (a revert), or is that of a snapshot.
    pub(super) fn virtual_size(&self, index: usize, node: &Node) -> u64 {
        match &node.info {
            _ if index == 0 => self.image.virtual_size(),
            Some(info) => info.header.size,
            None => node.layer.file.len().unwrap_or(0),
        }
    }

    /// The files in the order of their ids.
    pub(super) fn files(&self) -> Vec<Arc<HostFile>> {
        self.nodes
            .iter()
            .map(|node| Arc::clone(&node.layer.file))
            .collect()
    }

    /// Bytes of the active image's file now.
    pub(super) fn file_len(&self) -> u64 {
        self.nodes
            .first()
            .and_then(|node| node.layer.file.len().ok())
            .unwrap_or(0)
    }

    /// The active image has met corruption, or could not write its metadata.
    pub(super) fn is_corrupt(&self) -> bool {
        self.image.has_failed()
    }

    /// Writes back what is left and closes the image in order. No request may be in flight.
    pub(super) fn close(&self) -> Result<(), engine::Error> {
        let worker = self.image.worker(BlockingStorage::new(self.files()));
        block_on(worker.close())
    }
}

/// Locks a file of the chain as the configuration has it.
pub(super) fn lock(
    config: &ImageConfig,
    file: &Arc<HostFile>,
    read_only: bool,
) -> Result<ImageLock, engine::Error> {
    let locking = match config.locking {
        LockingConfig::Auto => Locking::Auto,
        LockingConfig::On => Locking::On,
        LockingConfig::Off => Locking::Off,
    };
    let kind = if read_only {
        LockKind::Reader
    } else {
        LockKind::Writer
    };
    ImageLock::take(file, kind, locking, LOCK_PATIENCE).map_err(|error| {
        engine::Error::new(
            ErrorKind::Locked,
            format!("cannot lock '{}': {error}", file.path().display()),
        )
    })
}

/// How the configuration has an image opened.
pub(super) fn open_options(config: &ImageConfig) -> OpenOptions {
    OpenOptions {
        read_only: config.read_only,
        discard: config.discard_unmaps,
        no_flush: config.cache.ignores_flush(),
        l2_cache_size: config.l2_cache_bytes,
        l2_cache_entry_size: config.l2_cache_entry_bytes,
        refcount_cache_size: config.refcount_cache_bytes,
        snapshot: None,
    }
}

/// The layers for the engine: their ids are their indices.
pub(super) fn specs<'a>(layers: impl IntoIterator<Item = &'a OpenLayer>) -> Vec<LayerSpec> {
    layers
        .into_iter()
        .zip(0..)
        .map(|(layer, number)| LayerSpec {
            file: FileId(number),
            format: layer.format,
        })
        .collect()
}

/// Blocking access to the files of layers.
pub(super) fn storage(layers: &[OpenLayer]) -> BlockingStorage {
    BlockingStorage::new(layers.iter().map(|layer| Arc::clone(&layer.file)).collect())
}

/// What a file says about itself now; nothing if it is raw.
pub(super) fn node_info(layer: &OpenLayer) -> Result<Option<ImageInfo>, engine::Error> {
    match layer.format {
        LayerFormat::Raw => Ok(None),
        LayerFormat::Qcow2 => {
            let storage = BlockingStorage::new(vec![Arc::clone(&layer.file)]);
            block_on(info(&storage, FileId(0))).map(Some)
        }
    }
}

/// The internal snapshot of this name in the active image, or else that of this id.
fn find_snapshot(storage: &BlockingStorage, wanted: &str) -> Result<Selector, engine::Error> {
    let snapshots = block_on(info(storage, FileId(0)))?.snapshots;
    pick_snapshot(&snapshots, wanted)
}

fn pick_snapshot(snapshots: &[SnapshotEntry], wanted: &str) -> Result<Selector, engine::Error> {
    let given = Some(wanted.to_owned());
    let named = snapshots
        .iter()
        .filter(|entry| entry.name == wanted.as_bytes());
    match named.count() {
        0 if snapshots.iter().any(|entry| entry.id == wanted.as_bytes()) => Ok(Selector {
            id: given,
            name: None,
        }),
        0 => Err(engine::Error::new(
            ErrorKind::NotFound,
            format!(
                "the image has no snapshot with the name or id '{wanted}'; `qblkd snapshot list` \
                 shows those that it has"
            ),
        )),
        1 => Ok(Selector {
            id: None,
            name: given,
        }),
        _ => Err(engine::Error::new(
            ErrorKind::Invalid,
            format!(
                "several snapshots of the image are named '{wanted}'; give the id, which `qblkd \
                 snapshot list` shows"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of several of one name the first was served.
    #[test]
    fn a_name_goes_before_an_id_and_must_be_the_only_one() {
        let list = [
            SnapshotEntry::named("1", "2"),
            SnapshotEntry::named("2", "x"),
            SnapshotEntry::named("3", "y"),
            SnapshotEntry::named("4", "y"),
        ];
        let by_name = pick_snapshot(&list, "2").unwrap();
        assert_eq!((by_name.id, by_name.name.as_deref()), (None, Some("2")));
        let by_id = pick_snapshot(&list, "3").unwrap();
        assert_eq!((by_id.id.as_deref(), by_id.name), (Some("3"), None));
        let kind = |wanted| pick_snapshot(&list, wanted).unwrap_err().kind();
        assert_eq!(kind("y"), ErrorKind::Invalid);
        assert_eq!(kind("z"), ErrorKind::NotFound);
        assert_eq!(kind(""), ErrorKind::NotFound);
    }
}
