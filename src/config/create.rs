//! `qblkd create`: the image to make.

use std::path::PathBuf;

use super::value::{CLUSTER_BYTES, DISK_BYTES_MAX, number, power_of_two, refuse, size};
use super::{ConfigError, Format};
use crate::args::{CompatArg, CreateArgs, PreallocationArg};

/// What `create` makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateConfig {
    /// The file.
    pub path: PathBuf,
    /// Size of the virtual disk, a multiple of 512; `None` for that of the backing file.
    pub virtual_size_bytes: Option<u64>,
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Logarithm of the refcount width.
    pub refcount_order: u32,
    /// Whether refcounts may lag.
    pub lazy_refcounts: bool,
    /// What to allocate.
    pub preallocation: Preallocation,
    /// The backing file as it will stand in the image, and its format.
    pub backing: Option<(PathBuf, Format)>,
    /// 2 or 3.
    pub version: u32,
}

/// What `create` allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    Off,
    /// Tables.
    Metadata,
    /// Tables and space.
    Falloc,
    /// Tables and zeroes.
    Full,
}

pub(super) fn create(args: CreateArgs) -> Result<CreateConfig, ConfigError> {
    const REFCOUNT_ALLOWED: &str = "1, 2, 4, 8, 16, 32 or 64";
    let cluster_allowed = "a power of two from 512 to 2M, such as 64k";
    let cluster_bytes = power_of_two(
        "--cluster-size",
        &args.cluster_size,
        CLUSTER_BYTES,
        cluster_allowed,
    )?;
    let refcount_bits = number(
        "--refcount-bits",
        args.refcount_bits,
        1..=64,
        REFCOUNT_ALLOWED,
    )?;
    if !refcount_bits.is_power_of_two() {
        return Err(refuse(
            "--refcount-bits",
            &refcount_bits.to_string(),
            REFCOUNT_ALLOWED,
        ));
    }
    let backing = match (args.backing_file, args.backing_format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some((file, format.into())),
        (Some(_), None) => {
            return Err(ConfigError::Usage(
                "--backing-file needs --backing-format qcow2 or raw: a format is never guessed",
            ));
        }
        (None, Some(_)) => {
            return Err(ConfigError::Usage(
                "--backing-format needs --backing-file; give both or neither",
            ));
        }
    };
    let preallocation = Preallocation::from(args.preallocation);
    if backing.is_some() && preallocation != Preallocation::Off {
        return Err(ConfigError::Usage(
            "--preallocation would hide the backing file; give one or the other",
        ));
    }
    let version = match args.compat {
        CompatArg::V2 => 2,
        CompatArg::V3 => 3,
    };
    if version < 3 && refcount_bits != 16 {
        return Err(ConfigError::Usage(
            "--compat 0.10 has no refcount width but 16; leave --refcount-bits out or use \
             --compat 1.1",
        ));
    }
    if version < 3 && args.lazy_refcounts {
        return Err(ConfigError::Usage("--lazy-refcounts needs --compat 1.1"));
    }
    if args.size.is_none() && backing.is_none() {
        return Err(ConfigError::Usage(
            "no size given; say how large the disk is, for example 20G",
        ));
    }
    Ok(CreateConfig {
        path: args.file,
        virtual_size_bytes: args.size.as_deref().map(disk_size).transpose()?,
        cluster_bits: cluster_bytes.trailing_zeros(),
        refcount_order: refcount_bits.trailing_zeros(),
        lazy_refcounts: args.lazy_refcounts,
        preallocation,
        backing,
        version,
    })
}

fn disk_size(given: &str) -> Result<u64, ConfigError> {
    let allowed = "a size of less than 8E, such as 20G";
    // Within range, rounding up cannot leave it: the largest size is a multiple itself.
    Ok(size("SIZE", given, 0..=DISK_BYTES_MAX, allowed)?.next_multiple_of(512))
}

impl From<PreallocationArg> for Preallocation {
    fn from(arg: PreallocationArg) -> Self {
        match arg {
            PreallocationArg::Off => Self::Off,
            PreallocationArg::Metadata => Self::Metadata,
            PreallocationArg::Falloc => Self::Falloc,
            PreallocationArg::Full => Self::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::created;

    #[test]
    fn create_has_qemus_defaults() {
        assert_eq!(
            created("20G").unwrap(),
            CreateConfig {
                path: "f".into(),
                virtual_size_bytes: Some(20 << 30),
                cluster_bits: 16,
                refcount_order: 4,
                lazy_refcounts: false,
                preallocation: Preallocation::Off,
                backing: None,
                version: 3,
            }
        );
    }

    #[test]
    fn every_create_option_arrives() {
        let options = "1k --cluster-size 512 --refcount-bits 64 --lazy-refcounts --compat v3 \
                       --backing-file base --backing-format raw";
        assert_eq!(
            created(options).unwrap(),
            CreateConfig {
                path: "f".into(),
                virtual_size_bytes: Some(1024),
                cluster_bits: 9,
                refcount_order: 6,
                lazy_refcounts: true,
                preallocation: Preallocation::Off,
                backing: Some(("base".into(), Format::Raw)),
                version: 3,
            }
        );
        assert_eq!(
            created("1k --preallocation full").unwrap().preallocation,
            Preallocation::Full
        );
        assert_eq!(created("1k --compat 0.10").unwrap().version, 2);
    }

    #[test]
    fn disk_sizes_are_rounded_up_to_sectors() {
        let sizes =
            ["0", "1", "512", "513"].map(|size| created(size).unwrap().virtual_size_bytes.unwrap());
        assert_eq!(sizes, [0, 512, 512, 1024]);
    }

    #[test]
    fn disk_sizes_end_below_8_eib() {
        let accepted =
            ["9223372036854775296", "9223372036854775297", "8E"].map(|size| created(size).is_ok());
        assert_eq!(accepted, [true, false, false]);
    }

    #[test]
    fn the_size_may_come_from_the_backing_file_only() {
        let overlay = created("--backing-file b --backing-format qcow2").unwrap();
        assert_eq!(overlay.virtual_size_bytes, None);
        assert!(created("").unwrap_err().contains("no size given"));
    }

    #[test]
    fn create_bounds_are_those_of_the_format() {
        let clusters = ["256", "512", "2M", "4M", "3k"]
            .map(|size| created(&format!("1M --cluster-size {size}")).is_ok());
        assert_eq!(clusters, [false, true, true, false, false]);
        let widths = ["0", "1", "3", "64", "128"]
            .map(|bits| created(&format!("1M --refcount-bits {bits}")).is_ok());
        assert_eq!(widths, [false, true, false, true, false]);
    }

    #[test]
    fn create_options_that_exclude_each_other_are_refused() {
        assert!(
            created("1M --backing-file b")
                .unwrap_err()
                .contains("--backing-format")
        );
        assert!(
            created("1M --backing-format raw")
                .unwrap_err()
                .contains("--backing-file")
        );
        assert!(
            created("1M --compat v2 --lazy-refcounts")
                .unwrap_err()
                .contains("--compat 1.1")
        );
        assert!(
            created("1M --compat v2 --refcount-bits 8")
                .unwrap_err()
                .contains("--compat 1.1")
        );
        let both = "1M --backing-file b --backing-format raw --preallocation metadata";
        assert!(created(both).unwrap_err().contains("--preallocation"));
    }
}
