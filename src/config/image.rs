//! The image that is served: which file, and how it is opened and cached.

use std::path::PathBuf;

use super::value::{CLUSTER_BYTES, DISK_BYTES_MAX, power_of_two, size};
use super::{ConfigError, Format};
use crate::args::{CacheArg, DiscardArg, FormatArg, LockingArg, ServeArgs};

/// The image, and how to use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Never write to it.
    pub read_only: bool,
    /// Name or id of the internal snapshot to serve; only where `read_only`.
    pub snapshot: Option<String>,
    /// How the host's page cache is used.
    pub cache: CacheMode,
    /// Give discarded space back.
    pub discard_unmaps: bool,
    /// Image locks.
    pub locking: Locking,
    /// Directories besides the image's own that backing files may be in.
    pub backing_dirs: Vec<PathBuf>,
    /// Directories besides the image's own that external snapshots may be made in.
    pub snapshot_dirs: Vec<PathBuf>,
    /// Budget for L2 slices; `None` for enough for the whole disk, up to a cap. Any size, also one
    /// that holds less than a slice: as with QEMU, the cache takes the least that it can work with.
    pub l2_cache_bytes: Option<u64>,
    /// Size of an L2 slice; `None` for 4 KiB or less. May exceed the cluster size, which the image
    /// has to refuse.
    pub l2_cache_entry_bytes: Option<u64>,
    /// Budget for refcount blocks, likewise; `None` for what the image suggests.
    pub refcount_cache_bytes: Option<u64>,
}

/// QEMU's cache modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// `none`
    None,
    /// `writeback`
    Writeback,
    /// `writethrough`
    Writethrough,
    /// `directsync`
    Directsync,
    /// `unsafe`
    Unsafe,
}

impl CacheMode {
    /// Whether the image is opened with O_DIRECT.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a write may complete before it is durable.
    pub fn is_writeback(self) -> bool {
        !matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Whether flushes do nothing.
    pub fn ignores_flush(self) -> bool {
        matches!(self, Self::Unsafe)
    }
}

/// Whether to take image locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// If the host can.
    Auto,
    /// Or fail.
    On,
    /// No.
    Off,
}

pub(super) fn image(args: ServeArgs) -> Result<ImageConfig, ConfigError> {
    let path = args.blk_file.ok_or(ConfigError::Usage(
        "no image given; use --blk-file FILE to say what to serve",
    ))?;
    if args.snapshot.is_some() && !args.read_only {
        return Err(ConfigError::Usage(
            "--snapshot needs --read-only: a snapshot is never written (to go on from it, use \
             `qblkd snapshot revert`)",
        ));
    }
    if args.snapshot.is_some() && args.format != FormatArg::Qcow2 {
        return Err(ConfigError::Usage(
            "--snapshot needs --format qcow2: a raw image has no snapshots",
        ));
    }
    let cache_size = |option, given: Option<String>| {
        let allowed = "a size, such as 32M";
        given
            .map(|given| size(option, &given, 0..=DISK_BYTES_MAX, allowed))
            .transpose()
    };
    let entry_size = |given: String| {
        let allowed = "a power of two from 512 to the image's cluster size, such as 4k";
        power_of_two("--l2-cache-entry-size", &given, CLUSTER_BYTES, allowed)
    };
    Ok(ImageConfig {
        path,
        format: args.format.into(),
        read_only: args.read_only,
        snapshot: args.snapshot,
        cache: args.cache.into(),
        discard_unmaps: args.discard == DiscardArg::Unmap,
        locking: args.locking.into(),
        backing_dirs: args.backing_dir,
        snapshot_dirs: args.snapshot_dir,
        l2_cache_bytes: cache_size("--l2-cache-size", args.l2_cache_size)?,
        l2_cache_entry_bytes: args.l2_cache_entry_size.map(entry_size).transpose()?,
        refcount_cache_bytes: cache_size("--refcount-cache-size", args.refcount_cache_size)?,
    })
}

impl From<CacheArg> for CacheMode {
    fn from(arg: CacheArg) -> Self {
        match arg {
            CacheArg::None => Self::None,
            CacheArg::Writeback => Self::Writeback,
            CacheArg::Writethrough => Self::Writethrough,
            CacheArg::Directsync => Self::Directsync,
            CacheArg::Unsafe => Self::Unsafe,
        }
    }
}

impl From<LockingArg> for Locking {
    fn from(arg: LockingArg) -> Self {
        match arg {
            LockingArg::Auto => Self::Auto,
            LockingArg::On => Self::On,
            LockingArg::Off => Self::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_modes_mean_what_they_mean_in_qemu() {
        let modes = [
            CacheMode::None,
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::Directsync,
            CacheMode::Unsafe,
        ];
        let meanings =
            modes.map(|mode| (mode.is_direct(), mode.is_writeback(), mode.ignores_flush()));
        assert_eq!(
            meanings,
            [
                (true, true, false),
                (false, true, false),
                (false, false, false),
                (true, false, false),
                (false, true, true),
            ]
        );
    }
}
