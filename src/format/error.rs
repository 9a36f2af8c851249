//! The one error type of the format layer.
//!
//! One variant for each distinct way in which an image can be wrong, or right but beyond what this
//! program supports. A variant carries what was found and where, so that its sentence is enough for
//! somebody who has only the log.

#![forbid(unsafe_code)]

use thiserror::Error;

use crate::units::HostOffset;

/// Why bytes are not a qcow2 structure that this program can use.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The input ends before the structure does.
    #[error("{what} is cut short: needs {needed:#x} bytes, found {found:#x}")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Bytes that must be there at least.
        needed: u64,
        /// Bytes that are there.
        found: u64,
    },

    /// The file is something else.
    #[error("not a qcow2 image: magic is {found:#010x}, expected 0x514649fb")]
    Magic {
        /// The first four bytes.
        found: u32,
    },

    /// Neither version 2 nor 3.
    #[error("qcow2 version {found} is not supported, only 2 and 3 are")]
    Version {
        /// The version field.
        found: u32,
    },

    /// Cluster size below 512 bytes or above 2 MiB.
    #[error("cluster_bits is {found}, must be 9 to 21")]
    ClusterBits {
        /// The field's value.
        found: u32,
    },

    /// Refcounts wider than 64 bits.
    #[error("refcount_order is {found}, must be 0 to 6")]
    RefcountOrder {
        /// The field's value.
        found: u32,
    },

    /// A v2 image was asked to hold something that only v3 has.
    #[error("a version 2 image cannot have {what}")]
    NotInVersion2 {
        /// The v3 feature.
        what: &'static str,
    },

    /// `header_length` does not cover the mandatory fields.
    #[error("header_length is {found}, must be at least {minimum}")]
    HeaderLengthTooSmall {
        /// The field's value.
        found: u32,
        /// Length of the fields that must be there.
        minimum: u32,
    },

    /// `header_length` is not a multiple of 8.
    #[error("header_length is {found}, must be a multiple of 8")]
    HeaderLengthUnaligned {
        /// The field's value.
        found: u32,
    },

    /// The header is longer than the first cluster.
    #[error("header_length is {found}, more than the cluster size {cluster_size:#x}")]
    HeaderLengthTooLarge {
        /// The field's value.
        found: u32,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// Encrypted with a known method.
    #[error("encryption ({method}) is not supported")]
    Encryption {
        /// The method's name.
        method: &'static str,
    },

    /// Encrypted with a method that the specification does not name.
    #[error("encryption method {found} is unknown")]
    EncryptionMethod {
        /// The field's value.
        found: u32,
    },

    /// Incompatible feature bits that this program must not ignore.
    #[error("unsupported incompatible feature: {names}")]
    IncompatibleFeatures {
        /// Names of all such features, separated by commas.
        names: String,
        /// The bits.
        bits: u64,
    },

    /// A compression method that the specification does not name.
    #[error("compression type {found} is unknown")]
    CompressionType {
        /// The field's value.
        found: u8,
    },

    /// The type differs from zlib, but older readers are not warned.
    #[error("compression type is {name}, but the compression type feature bit is not set")]
    CompressionBitMissing {
        /// The type's name.
        name: &'static str,
    },

    /// Older readers are warned for nothing.
    #[error("the compression type feature bit is set, but the compression type is zlib")]
    CompressionBitSet,

    /// The backing file name lies over the header's fields.
    #[error("backing file name at {offset:#x} overlaps the header of {header_length:#x} bytes")]
    BackingNameInHeader {
        /// Where the name starts.
        offset: u64,
        /// Length of the fields.
        header_length: u32,
    },

    /// The backing file name is longer than the specification allows.
    #[error("backing file name has {length} bytes, more than 1023")]
    BackingNameTooLong {
        /// Bytes of the name.
        length: u64,
    },

    /// The backing file name is not inside the first cluster.
    #[error(
        "backing file name of {length} bytes at {offset:#x} ends outside the first cluster of \
         {cluster_size:#x} bytes"
    )]
    BackingNameOutsideCluster {
        /// Where the name starts.
        offset: u64,
        /// Bytes of the name.
        length: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// No room for the backing file name in an image that is being made.
    #[error(
        "header with backing file name needs {needed} bytes, but must fit in one cluster of \
         {cluster_size} bytes"
    )]
    BackingNameDoesNotFit {
        /// Bytes of header, extensions and name.
        needed: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// No room for the header extensions in an image that is being made.
    #[error(
        "header with extensions needs {needed} bytes, but must fit in one cluster of \
         {cluster_size} bytes"
    )]
    HeaderDoesNotFit {
        /// Bytes of header and extensions.
        needed: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// A table does not start at a cluster boundary.
    #[error("{table} at {offset} is not aligned to the cluster size {cluster_size:#x}")]
    TableUnaligned {
        /// The table's name.
        table: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// A table ends past what a host offset can express.
    #[error("{table} of {bytes:#x} bytes at {offset} ends past the largest host offset")]
    TableOutOfRange {
        /// The table's name.
        table: &'static str,
        /// Where it starts.
        offset: HostOffset,
        /// Its length.
        bytes: u64,
    },

    /// A table that is in use starts in cluster 0.
    #[error("{table} at {offset} overlaps the header")]
    TableInHeader {
        /// The table's name.
        table: &'static str,
        /// Where it starts.
        offset: HostOffset,
    },

    /// The L1 table is longer than 32 MiB.
    #[error("L1 table has {entries} entries, more than {limit}")]
    L1TooLarge {
        /// Entries of the table.
        entries: u64,
        /// The largest lawful number.
        limit: u64,
    },

    /// The L1 table does not reach to the end of the virtual disk.
    #[error("L1 table has {entries} entries, but a virtual size of {size:#x} needs {needed}")]
    L1TooSmall {
        /// Entries of the table.
        entries: u64,
        /// Entries that the virtual size needs.
        needed: u64,
        /// The virtual size in bytes.
        size: u64,
    },

    /// The image says that it has no refcount table.
    #[error("image has no refcount table")]
    RefcountTableMissing,

    /// The refcount table is longer than 8 MiB.
    #[error("refcount table has {bytes:#x} bytes, more than {limit:#x}")]
    RefcountTableTooLarge {
        /// Bytes of the table.
        bytes: u64,
        /// The largest lawful number.
        limit: u64,
    },

    /// More internal snapshots than the limit.
    #[error("image has {count} internal snapshots, more than {limit}")]
    TooManySnapshots {
        /// Snapshots that the header counts.
        count: u64,
        /// The largest lawful number.
        limit: u64,
    },

    /// A header extension runs past the extension area.
    #[error(
        "header extension {magic:#010x} at {offset:#x} has {length:#x} bytes, but only {room:#x} \
         are left"
    )]
    ExtensionTooLong {
        /// The extension's type.
        magic: u32,
        /// Where it starts in the file.
        offset: u64,
        /// Bytes of data it claims.
        length: u64,
        /// Bytes up to the end of the area.
        room: u64,
    },

    /// No name of a format is that long.
    #[error("header extension with the backing format has {length} bytes, more than {limit}")]
    BackingFormatTooLong {
        /// Bytes of the name.
        length: u64,
        /// The most that QEMU accepts.
        limit: u64,
    },

    /// A header extension of fixed size has another one.
    #[error("{name} header extension has {found} bytes, expected {expected}")]
    ExtensionLength {
        /// The extension's name.
        name: &'static str,
        /// Bytes of data it claims.
        found: u64,
        /// Bytes that the specification gives it.
        expected: u64,
    },

    /// The feature name table is not a whole number of entries.
    #[error("feature name table has {found} bytes, must be a multiple of 48")]
    FeatureNamesLength {
        /// Bytes of the table.
        found: u64,
    },

    /// The encryption header is there, but nothing is encrypted.
    #[error("encryption header extension in an image that is not encrypted")]
    CryptoHeaderUnexpected,

    /// Reserved field of the bitmaps extension.
    #[error("bitmaps header extension has reserved field {found:#x}, must be 0")]
    BitmapsReserved {
        /// The field's value.
        found: u32,
    },

    /// No bitmap, or more than 65535.
    #[error("bitmaps header extension counts {found} bitmaps, must be 1 to 65535")]
    BitmapsCount {
        /// Bitmaps that the extension counts.
        found: u32,
    },

    /// Length of the bitmap directory is 0 or above the limit.
    #[error("bitmap directory has {found:#x} bytes, must be 1 to {limit:#x}")]
    BitmapsDirectorySize {
        /// Bytes of the directory.
        found: u64,
        /// The largest lawful number.
        limit: u64,
    },

    /// Bits of a table entry that must be 0.
    #[error("{what} {entry:#018x} has reserved bits {bits:#x} set")]
    ReservedBits {
        /// Which kind of entry.
        what: &'static str,
        /// The whole entry.
        entry: u64,
        /// The reserved bits that are set.
        bits: u64,
    },

    /// A table entry points between cluster boundaries.
    #[error("{what} {entry:#018x} is not aligned to the cluster size {cluster_size:#x}")]
    EntryUnaligned {
        /// Which kind of entry.
        what: &'static str,
        /// The whole entry.
        entry: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
    },

    /// A table entry points past what a host offset can express.
    #[error("{what} {entry:#018x} points past the largest host offset")]
    EntryOutOfRange {
        /// Which kind of entry.
        what: &'static str,
        /// The whole entry.
        entry: u64,
    },

    /// The zero flag in an image whose version has none.
    #[error("L2 entry {entry:#018x} has the zero flag, which version 2 does not have")]
    ZeroFlagInVersion2 {
        /// The whole entry.
        entry: u64,
    },

    /// A snapshot table entry carries more extra data than the limit.
    #[error(
        "snapshot table entry {index} has {found:#x} bytes of extra data, more than {limit:#x}"
    )]
    SnapshotExtraTooLarge {
        /// Position in the table.
        index: u64,
        /// Bytes of extra data.
        found: u64,
        /// The largest lawful number.
        limit: u64,
    },

    /// The snapshot table is longer than 64 MiB.
    #[error("snapshot table has more than {limit:#x} bytes")]
    SnapshotTableTooLarge {
        /// The largest lawful number.
        limit: u64,
    },

    /// Text of a snapshot is longer than its length field can say.
    #[error("snapshot {what} has {found} bytes, more than {limit}")]
    SnapshotTextTooLong {
        /// ID or name.
        what: &'static str,
        /// Bytes of the text.
        found: u64,
        /// The largest lawful number.
        limit: u64,
    },
}

impl FormatError {
    /// Whether the image is, as far as is known, a good one that needs a feature we do not have.
    /// Everything else is a defect of the image.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            Self::Version { .. }
                | Self::Encryption { .. }
                | Self::EncryptionMethod { .. }
                | Self::IncompatibleFeatures { .. }
                | Self::CompressionType { .. }
                | Self::NotInVersion2 { .. }
        )
    }
}
