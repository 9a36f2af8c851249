//! The image header, v2 and v3, with its extensions and the backing file name: everything that must
//! lie in the first cluster.
//!
//! [`Header::decode`] accepts only what this program can serve; a feature that it cannot is refused by
//! the name that the image itself gives it. [`Header::patch_sector`] changes the fields that an open
//! image changes and keeps every other byte; all of them lie in the first 512 bytes, so one sector
//! write moves the image from one state to the next. [`Header::encode`] makes a new header.

#![forbid(unsafe_code)]

use super::extension::{Extension, RawExtensions, validate_bitmaps};
use super::feature::{check_incompatible, standard_feature_names};
use super::geometry::{
    HOST_OFFSET_END, L1_BYTES_MAX, REFCOUNT_ORDER_V2, REFTABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use super::{FormatError, Geometry, be_u32, be_u64, put};
use crate::units::{HostOffset, to_u64, to_usize};

pub use super::feature::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_EXTERNAL, COMPAT_LAZY_REFCOUNTS, INCOMPAT_COMPRESSION,
    INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY, INCOMPAT_EXTENDED_L2, INCOMPAT_SUPPORTED,
};

/// The first four bytes of every qcow2 image.
pub const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a v2 header.
pub const HEADER_LENGTH_V2: u32 = 72;
/// Bytes of a v3 header that must be there.
pub const HEADER_LENGTH_V3_MIN: u32 = 104;
/// Bytes of a v3 header as we write it: with the compression type, padded to 8 bytes.
pub const HEADER_LENGTH_V3: u32 = 112;
/// Longest backing file name.
pub const BACKING_NAME_BYTES_MAX: u64 = 1023;

/// Offset of the magic.
pub const OFFSET_MAGIC: usize = 0;
/// Offset of the version.
pub const OFFSET_VERSION: usize = 4;
/// Offset of the backing file name's offset.
pub const OFFSET_BACKING_OFFSET: usize = 8;
/// Offset of the backing file name's length.
pub const OFFSET_BACKING_LENGTH: usize = 16;
/// Offset of `cluster_bits`.
pub const OFFSET_CLUSTER_BITS: usize = 20;
/// Offset of the virtual size.
pub const OFFSET_SIZE: usize = 24;
/// Offset of the encryption method.
pub const OFFSET_CRYPT_METHOD: usize = 32;
/// Offset of the number of L1 entries.
pub const OFFSET_L1_SIZE: usize = 36;
/// Offset of the L1 table's offset.
pub const OFFSET_L1_TABLE: usize = 40;
/// Offset of the refcount table's offset.
pub const OFFSET_REFCOUNT_TABLE: usize = 48;
/// Offset of the refcount table's length in clusters.
pub const OFFSET_REFCOUNT_TABLE_CLUSTERS: usize = 56;
/// Offset of the number of internal snapshots.
pub const OFFSET_SNAPSHOT_COUNT: usize = 60;
/// Offset of the snapshot table's offset.
pub const OFFSET_SNAPSHOT_TABLE: usize = 64;
/// Offset of the incompatible features, v3 only as all that follow.
pub const OFFSET_INCOMPATIBLE: usize = 72;
/// Offset of the compatible features.
pub const OFFSET_COMPATIBLE: usize = 80;
/// Offset of the autoclear features.
pub const OFFSET_AUTOCLEAR: usize = 88;
/// Offset of `refcount_order`.
pub const OFFSET_REFCOUNT_ORDER: usize = 96;
/// Offset of `header_length`.
pub const OFFSET_HEADER_LENGTH: usize = 100;
/// Offset of the compression type, if `header_length` reaches so far.
pub const OFFSET_COMPRESSION_TYPE: usize = 104;

/// Smallest cluster size whose first cluster gets a feature name table: it takes 392 bytes, which in
/// a small first cluster are better left to the backing file name. QEMU draws the same line.
const FEATURE_NAMES_CLUSTER_SIZE_MIN: u64 = 8192;

const HEADER: &str = "header";

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum CompressionType {
    /// Raw deflate stream.
    #[default]
    Zlib = 0,
    /// Zstandard frame.
    Zstd = 1,
}

impl CompressionType {
    /// Name on the command line and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// The header field's value.
    const fn to_byte(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }
}

impl TryFrom<u8> for CompressionType {
    type Error = FormatError;

    fn try_from(found: u8) -> Result<Self, FormatError> {
        match found {
            0 => Ok(Self::Zlib),
            1 => Ok(Self::Zstd),
            _ => Err(FormatError::CompressionType { found }),
        }
    }
}

/// The header of an image that this program can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3. A v2 header has no feature bits, and refcounts of 16 bits.
    pub version: u32,
    /// Cluster size and refcount width. They never change in the life of an image.
    geometry: Geometry,
    /// Backing file name as stored, without a terminator. Never empty.
    pub backing_name: Option<Vec<u8>>,
    /// Where that name was found, 0 if there is none; [`encode`](Self::encode) places it afresh.
    pub backing_offset: u64,
    /// Virtual size in bytes; any number.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table is.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table is.
    pub refcount_table_offset: HostOffset,
    /// Length of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table is.
    pub snapshot_table_offset: HostOffset,
    /// Incompatible features, only bits of [`INCOMPAT_SUPPORTED`].
    pub incompatible: u64,
    /// Compatible features, unknown ones too.
    pub compatible: u64,
    /// Autoclear features, unknown ones too: whoever writes the image clears what he does not keep.
    pub autoclear: u64,
    /// Bytes of the fields before the extensions.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Fields behind those we know, as long as `header_length` says; kept as they are.
    pub unknown_fields: Vec<u8>,
    /// All extensions in their order.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// A header for a new image without features, tables or a backing file.
    #[must_use]
    pub fn new(version: u32, geometry: Geometry, size: u64) -> Self {
        Self {
            version,
            geometry,
            backing_name: None,
            backing_offset: 0,
            size,
            l1_size: 0,
            l1_table_offset: HostOffset::ZERO,
            refcount_table_offset: HostOffset::ZERO,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshot_table_offset: HostOffset::ZERO,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            header_length: if version < 3 {
                HEADER_LENGTH_V2
            } else {
                HEADER_LENGTH_V3
            },
            compression_type: CompressionType::Zlib,
            unknown_fields: Vec::new(),
            extensions: Vec::new(),
        }
    }

    /// Cluster size and refcount width.
    #[must_use]
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether refcounts and copied flags may lag.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Whether metadata is known to be damaged.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// Whether refcounts may be updated late.
    #[must_use]
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & COMPAT_LAZY_REFCOUNTS != 0
    }

    /// The backing file's format as stored, if the image names one.
    #[must_use]
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::BackingFormat(format) => Some(format.as_slice()),
                _ => None,
            })
    }

    /// Reads and checks the header.
    ///
    /// `bytes` is the first cluster or as much of it as the file has; a caller who does not know the
    /// cluster size gives up to 2 MiB. Bytes past the first cluster are not looked at.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, or a feature that is not supported
    /// ([`FormatError::is_unsupported`]).
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let u32_at = |offset| be_u32(bytes, offset, HEADER);
        let u64_at = |offset| be_u64(bytes, offset, HEADER);
        let offset_at = |offset| u64_at(offset).map(HostOffset::new);

        let magic = u32_at(OFFSET_MAGIC)?;
        if magic != MAGIC {
            return Err(FormatError::Magic { found: magic });
        }
        let version = u32_at(OFFSET_VERSION)?;
        if !(2..=3).contains(&version) {
            return Err(FormatError::Version { found: version });
        }
        let v3 = version == 3;
        let order = if v3 {
            u32_at(OFFSET_REFCOUNT_ORDER)?
        } else {
            REFCOUNT_ORDER_V2
        };
        let cluster_bits = u32_at(OFFSET_CLUSTER_BITS)?;
        // The width is checked after the features, which may be why it looks wrong.
        let cluster_size = Geometry::new(cluster_bits, 0)?.cluster_size();
        let header_length = if v3 {
            u32_at(OFFSET_HEADER_LENGTH)?
        } else {
            HEADER_LENGTH_V2
        };
        check_header_length(header_length, version, cluster_size)?;
        // All fields are there if the last byte is.
        let fields = bytes
            .get(..to_usize(u64::from(header_length)))
            .ok_or_else(|| FormatError::Truncated {
                what: HEADER,
                needed: u64::from(header_length),
                found: to_u64(bytes.len()),
            })?;
        let name = BackingName::decode(bytes, header_length, cluster_size)?;
        let extensions_end = if name.offset == 0 {
            cluster_size
        } else {
            name.offset
        };
        let raw_extensions = || RawExtensions::new(bytes, u64::from(header_length), extensions_end);

        let features_at = |offset| if v3 { u64_at(offset) } else { Ok(0) };
        let incompatible = features_at(OFFSET_INCOMPATIBLE)?;
        check_incompatible(incompatible, raw_extensions())?;
        check_encryption(u32_at(OFFSET_CRYPT_METHOD)?)?;
        let geometry = Geometry::new(cluster_bits, order)?;
        // Older v3 headers end before the compression type, which then is zlib.
        let compression = fields.get(OFFSET_COMPRESSION_TYPE).copied().unwrap_or(0);

        let header = Self {
            version,
            geometry,
            backing_offset: name.offset,
            backing_name: name.load(bytes)?,
            size: u64_at(OFFSET_SIZE)?,
            l1_size: u32_at(OFFSET_L1_SIZE)?,
            l1_table_offset: offset_at(OFFSET_L1_TABLE)?,
            refcount_table_offset: offset_at(OFFSET_REFCOUNT_TABLE)?,
            refcount_table_clusters: u32_at(OFFSET_REFCOUNT_TABLE_CLUSTERS)?,
            snapshot_count: u32_at(OFFSET_SNAPSHOT_COUNT)?,
            snapshot_table_offset: offset_at(OFFSET_SNAPSHOT_TABLE)?,
            incompatible,
            compatible: features_at(OFFSET_COMPATIBLE)?,
            autoclear: features_at(OFFSET_AUTOCLEAR)?,
            header_length,
            compression_type: CompressionType::try_from(compression)?,
            unknown_fields: fields
                .get(to_usize(u64::from(HEADER_LENGTH_V3))..)
                .unwrap_or_default()
                .to_vec(),
            extensions: raw_extensions()
                .map(|item| item.and_then(|(magic, data)| Extension::decode(magic, data)))
                .collect::<Result<_, _>>()?,
        };
        header.validate()?;
        Ok(header)
    }

    /// The whole header with extensions and backing file name, to be padded with zeroes to the end of
    /// the first cluster.
    ///
    /// A v3 header without a feature name table gets the usual one if there is plenty of room.
    ///
    /// # Errors
    ///
    /// [`FormatError::BackingNameDoesNotFit`] or [`FormatError::HeaderDoesNotFit`] in the first
    /// cluster, or a field that [`decode`](Self::decode) would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let cluster_size = self.geometry.cluster_size();
        check_header_length(self.header_length, self.version, cluster_size)?;
        check_incompatible(self.incompatible, RawExtensions::new(&[], 0, 0))?;
        self.validate()?;

        let mut out = vec![0; to_usize(u64::from(self.header_length))];
        put(&mut out, OFFSET_MAGIC, MAGIC.to_be_bytes());
        put(&mut out, OFFSET_VERSION, self.version.to_be_bytes());
        put(
            &mut out,
            OFFSET_CLUSTER_BITS,
            self.geometry.cluster_bits().to_be_bytes(),
        );
        self.put_changing_fields(&mut out);
        if self.version >= 3 {
            put(
                &mut out,
                OFFSET_REFCOUNT_ORDER,
                self.geometry.refcount_order().to_be_bytes(),
            );
            put(
                &mut out,
                OFFSET_HEADER_LENGTH,
                self.header_length.to_be_bytes(),
            );
            if self.header_length > HEADER_LENGTH_V3_MIN {
                put(
                    &mut out,
                    OFFSET_COMPRESSION_TYPE,
                    [self.compression_type.to_byte()],
                );
            }
            out.truncate(to_usize(u64::from(
                self.header_length.min(HEADER_LENGTH_V3),
            )));
            out.extend_from_slice(&self.unknown_fields);
            out.resize(to_usize(u64::from(self.header_length)), 0);
        }
        for extension in &self.extensions {
            extension.encode_into(&mut out);
        }
        if self.wants_feature_names() {
            standard_feature_names().encode_into(&mut out);
        }
        // The end marker: type 0, length 0.
        out.extend_from_slice(&[0; 8]);
        if to_u64(out.len()) > cluster_size {
            return Err(FormatError::HeaderDoesNotFit {
                needed: to_u64(out.len()),
                cluster_size,
            });
        }
        if let Some(name) = &self.backing_name {
            let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
            let offset = to_u64(out.len());
            put(&mut out, OFFSET_BACKING_OFFSET, offset.to_be_bytes());
            put(&mut out, OFFSET_BACKING_LENGTH, length.to_be_bytes());
            out.extend_from_slice(name);
            let needed = to_u64(out.len());
            if needed > cluster_size {
                return Err(FormatError::BackingNameDoesNotFit {
                    needed,
                    cluster_size,
                });
            }
        }
        Ok(out)
    }

    /// Updates virtual size, tables and features in the first sector of the image, and keeps every
    /// other byte.
    pub fn patch_sector(&self, sector: &mut [u8; 512]) {
        self.put_changing_fields(sector);
    }

    /// The fields that change in the life of an open image. A v2 header has no feature words; other
    /// things may stand in their place.
    fn put_changing_fields(&self, sector: &mut [u8]) {
        put(sector, OFFSET_SIZE, self.size.to_be_bytes());
        put(sector, OFFSET_L1_SIZE, self.l1_size.to_be_bytes());
        put(
            sector,
            OFFSET_L1_TABLE,
            self.l1_table_offset.get().to_be_bytes(),
        );
        put(
            sector,
            OFFSET_REFCOUNT_TABLE,
            self.refcount_table_offset.get().to_be_bytes(),
        );
        put(
            sector,
            OFFSET_REFCOUNT_TABLE_CLUSTERS,
            self.refcount_table_clusters.to_be_bytes(),
        );
        put(
            sector,
            OFFSET_SNAPSHOT_COUNT,
            self.snapshot_count.to_be_bytes(),
        );
        put(
            sector,
            OFFSET_SNAPSHOT_TABLE,
            self.snapshot_table_offset.get().to_be_bytes(),
        );
        if self.version >= 3 {
            put(sector, OFFSET_INCOMPATIBLE, self.incompatible.to_be_bytes());
            put(sector, OFFSET_COMPATIBLE, self.compatible.to_be_bytes());
            put(sector, OFFSET_AUTOCLEAR, self.autoclear.to_be_bytes());
        }
    }

    /// Whether [`encode`](Self::encode) adds the usual feature name table.
    fn wants_feature_names(&self) -> bool {
        self.version >= 3
            && self.geometry.cluster_size() >= FEATURE_NAMES_CLUSTER_SIZE_MIN
            && !self
                .extensions
                .iter()
                .any(|e| matches!(e, Extension::FeatureNames(_)))
    }

    /// What must hold between the fields, for a header that was read and for one to be written.
    fn validate(&self) -> Result<(), FormatError> {
        if self.version < 3 {
            self.validate_version_2()?;
        }
        let compression_bit = self.incompatible & INCOMPAT_COMPRESSION != 0;
        match (self.compression_type, compression_bit) {
            (CompressionType::Zlib, true) => return Err(FormatError::CompressionBitSet),
            (CompressionType::Zstd, false) => {
                return Err(FormatError::CompressionBitMissing {
                    name: self.compression_type.name(),
                });
            }
            (CompressionType::Zlib, false) | (CompressionType::Zstd, true) => {}
        }
        if let Some(name) = &self.backing_name
            && to_u64(name.len()) > BACKING_NAME_BYTES_MAX
        {
            return Err(FormatError::BackingNameTooLong {
                length: to_u64(name.len()),
            });
        }
        self.validate_l1()?;
        self.validate_refcount_table()?;
        self.validate_snapshot_table()?;
        self.extensions
            .iter()
            .try_for_each(|extension| match extension {
                // Without the bit the extension is a leftover that nobody may trust or complain about.
                Extension::Bitmaps(raw) if self.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                    validate_bitmaps(raw, self.geometry)
                }
                Extension::CryptoHeader(_) => Err(FormatError::CryptoHeaderUnexpected),
                _ => Ok(()),
            })
    }

    /// A v2 header has no place to say any of this.
    fn validate_version_2(&self) -> Result<(), FormatError> {
        let what = if self.incompatible | self.compatible | self.autoclear != 0 {
            "feature bits"
        } else if self.geometry.refcount_order() != REFCOUNT_ORDER_V2 {
            "a refcount width other than 16 bits"
        } else if self.compression_type != CompressionType::Zlib {
            "a compression type other than zlib"
        } else if self.header_length != HEADER_LENGTH_V2 {
            "a header length other than 72"
        } else {
            return Ok(());
        };
        Err(FormatError::NotInVersion2 { what })
    }

    /// Length, place and reach of the active L1 table.
    fn validate_l1(&self) -> Result<(), FormatError> {
        let entries = u64::from(self.l1_size);
        let limit = L1_BYTES_MAX / 8;
        if entries > limit {
            return Err(FormatError::L1TooLarge { entries, limit });
        }
        let needed = self.geometry.l1_entries_for(self.size);
        if entries < needed {
            return Err(FormatError::L1TooSmall {
                entries,
                needed,
                size: self.size,
            });
        }
        self.validate_used_table("L1 table", self.l1_table_offset, entries.saturating_mul(8))
    }

    /// Length and place of the refcount table.
    fn validate_refcount_table(&self) -> Result<(), FormatError> {
        let clusters = u64::from(self.refcount_table_clusters);
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        if clusters == 0 {
            return Err(FormatError::RefcountTableMissing);
        }
        if bytes > REFTABLE_BYTES_MAX {
            return Err(FormatError::RefcountTableTooLarge {
                bytes,
                limit: REFTABLE_BYTES_MAX,
            });
        }
        self.validate_used_table("refcount table", self.refcount_table_offset, bytes)
    }

    /// Number and place of the internal snapshots; the table's length shows only when it is read.
    fn validate_snapshot_table(&self) -> Result<(), FormatError> {
        let count = u64::from(self.snapshot_count);
        let limit = u64::from(SNAPSHOTS_MAX);
        if count > limit {
            return Err(FormatError::TooManySnapshots { count, limit });
        }
        // Each entry has at least 40 bytes.
        let bytes = count.saturating_mul(40);
        self.validate_used_table("snapshot table", self.snapshot_table_offset, bytes)
    }

    /// [`validate_table`], and a table that is not empty is not the header either.
    fn validate_used_table(
        &self,
        table: &'static str,
        offset: HostOffset,
        bytes: u64,
    ) -> Result<(), FormatError> {
        validate_table(table, offset.get(), bytes, self.geometry)?;
        if bytes > 0 && offset == HostOffset::ZERO {
            return Err(FormatError::TableInHeader { table, offset });
        }
        Ok(())
    }
}

/// Where the header says that the backing file name is.
struct BackingName {
    /// Start of the name, 0 if there is none.
    offset: u64,
    /// Bytes of the name.
    length: u64,
}

impl BackingName {
    /// Reads and checks both fields.
    fn decode(bytes: &[u8], header_length: u32, cluster_size: u64) -> Result<Self, FormatError> {
        let offset = be_u64(bytes, OFFSET_BACKING_OFFSET, HEADER)?;
        let length = u64::from(be_u32(bytes, OFFSET_BACKING_LENGTH, HEADER)?);
        if offset == 0 {
            return Ok(Self { offset, length: 0 });
        }
        if offset < u64::from(header_length) {
            return Err(FormatError::BackingNameInHeader {
                offset,
                header_length,
            });
        }
        if length > BACKING_NAME_BYTES_MAX {
            return Err(FormatError::BackingNameTooLong { length });
        }
        if offset
            .checked_add(length)
            .is_none_or(|end| end > cluster_size)
        {
            return Err(FormatError::BackingNameOutsideCluster {
                offset,
                length,
                cluster_size,
            });
        }
        Ok(Self { offset, length })
    }

    /// The name, if there is one and it is not empty.
    fn load(&self, bytes: &[u8]) -> Result<Option<Vec<u8>>, FormatError> {
        if self.length == 0 {
            return Ok(None);
        }
        let end = self.offset.saturating_add(self.length);
        let name = bytes.get(to_usize(self.offset)..to_usize(end));
        name.map(|name| Some(name.to_vec()))
            .ok_or_else(|| FormatError::Truncated {
                what: "backing file name",
                needed: end,
                found: to_u64(bytes.len()),
            })
    }
}

/// Checks that a table of `bytes` bytes can be at `offset`.
pub(super) fn validate_table(
    table: &'static str,
    offset: u64,
    bytes: u64,
    geometry: Geometry,
) -> Result<(), FormatError> {
    if !geometry.is_cluster_aligned(offset) {
        return Err(FormatError::TableUnaligned {
            table,
            offset: HostOffset::new(offset),
            cluster_size: geometry.cluster_size(),
        });
    }
    if offset
        .checked_add(bytes)
        .is_none_or(|end| end > HOST_OFFSET_END)
    {
        return Err(FormatError::TableOutOfRange {
            table,
            offset: HostOffset::new(offset),
            bytes,
        });
    }
    Ok(())
}

/// `header_length` covers the mandatory fields and fits in the first cluster.
fn check_header_length(found: u32, version: u32, cluster_size: u64) -> Result<(), FormatError> {
    let minimum = if version < 3 {
        HEADER_LENGTH_V2
    } else {
        HEADER_LENGTH_V3_MIN
    };
    if found < minimum {
        return Err(FormatError::HeaderLengthTooSmall { found, minimum });
    }
    if !found.is_multiple_of(8) {
        return Err(FormatError::HeaderLengthUnaligned { found });
    }
    if u64::from(found) > cluster_size {
        return Err(FormatError::HeaderLengthTooLarge {
            found,
            cluster_size,
        });
    }
    Ok(())
}

/// Only no encryption is supported.
fn check_encryption(method: u32) -> Result<(), FormatError> {
    match method {
        0 => Ok(()),
        1 => Err(FormatError::Encryption { method: "AES" }),
        2 => Err(FormatError::Encryption { method: "LUKS" }),
        found => Err(FormatError::EncryptionMethod { found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::extension::{FeatureName, MAGIC_BITMAPS, MAGIC_CRYPTO_HEADER};

    /// A header of 1 GiB with tables behind the first cluster.
    fn header(version: u32, cluster_bits: u32) -> Header {
        let geometry = Geometry::new(cluster_bits, 4).unwrap();
        let cluster = |index| HostOffset::new(index * geometry.cluster_size());
        let mut header = Header::new(version, geometry, 1 << 30);
        header.l1_size = u32::try_from(geometry.l1_entries_for(header.size)).unwrap();
        header.refcount_table_offset = cluster(1);
        header.refcount_table_clusters = 1;
        header.l1_table_offset = cluster(3);
        header
    }

    /// One that uses everything.
    fn full() -> Header {
        let mut header = header(3, 16);
        header.backing_name = Some(b"dir/base.qcow2".to_vec());
        header.incompatible = INCOMPAT_DIRTY | INCOMPAT_COMPRESSION;
        header.compression_type = CompressionType::Zstd;
        header.compatible = COMPAT_LAZY_REFCOUNTS | 1 << 40;
        header.autoclear = 1 << 50;
        header.snapshot_count = 2;
        header.snapshot_table_offset = HostOffset::new(0x7_0000);
        header.extensions = vec![
            Extension::BackingFormat(b"qcow2".to_vec()),
            standard_feature_names(),
            Extension::Unknown {
                magic: 0x1234_5678,
                data: vec![1, 2, 3],
            },
        ];
        header
    }

    /// The same as [`Header::decode`] would give it back.
    fn placed(header: &Header, bytes: &[u8]) -> Header {
        let mut header = header.clone();
        if header.wants_feature_names() {
            header.extensions.push(standard_feature_names());
        }
        if let Some(name) = &header.backing_name {
            header.backing_offset = to_u64(bytes.len() - name.len());
        }
        header
    }

    /// The error of a good v3 header in which `bytes` stand at `offset`.
    fn patched(offset: usize, bytes: &[u8]) -> Result<Header, FormatError> {
        let mut image = full().encode().unwrap();
        image.resize(65536, 0);
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        Header::decode(&image)
    }

    fn error_u32(offset: usize, value: u32) -> FormatError {
        patched(offset, &value.to_be_bytes()).unwrap_err()
    }

    fn error_u64(offset: usize, value: u64) -> FormatError {
        patched(offset, &value.to_be_bytes()).unwrap_err()
    }

    #[test]
    fn header_survives_a_round_trip_at_every_version_and_cluster_size() {
        let mut headers = vec![full()];
        for cluster_bits in 9..=21 {
            for version in [2, 3] {
                let mut plain = header(version, cluster_bits);
                headers.push(plain.clone());
                plain.backing_name = Some(b"base".to_vec());
                plain
                    .extensions
                    .push(Extension::BackingFormat(b"raw".to_vec()));
                headers.push(plain);
            }
        }
        for header in &headers {
            let bytes = header.encode().unwrap();
            assert_eq!(Header::decode(&bytes), Ok(placed(header, &bytes)));
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = full().encode().unwrap();
        let name_offset = bytes.len() - 14;
        assert_eq!(bytes[0..8], *b"QFI\xfb\0\0\0\x03");
        assert_eq!(bytes[8..16], to_u64(name_offset).to_be_bytes());
        assert_eq!(bytes[16..20], 14_u32.to_be_bytes());
        assert_eq!(bytes[20..24], 16_u32.to_be_bytes());
        assert_eq!(bytes[24..32], (1_u64 << 30).to_be_bytes());
        assert_eq!(bytes[32..36], [0; 4]);
        assert_eq!(bytes[36..40], 2_u32.to_be_bytes());
        assert_eq!(bytes[40..48], 0x3_0000_u64.to_be_bytes());
        assert_eq!(bytes[48..56], 0x1_0000_u64.to_be_bytes());
        assert_eq!(bytes[56..60], 1_u32.to_be_bytes());
        assert_eq!(bytes[60..64], 2_u32.to_be_bytes());
        assert_eq!(bytes[64..72], 0x7_0000_u64.to_be_bytes());
        assert_eq!(bytes[72..80], 9_u64.to_be_bytes());
        assert_eq!(bytes[80..88], (1_u64 | 1 << 40).to_be_bytes());
        assert_eq!(bytes[88..96], (1_u64 << 50).to_be_bytes());
        assert_eq!(bytes[96..100], 4_u32.to_be_bytes());
        assert_eq!(bytes[100..104], 112_u32.to_be_bytes());
        assert_eq!(bytes[104..112], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[name_offset..], *b"dir/base.qcow2");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let mut plain = header(2, 9);
        plain.size = 0;
        plain.l1_size = 0;
        for header in [full(), header(3, 16), header(2, 16), plain] {
            let bytes = header.encode().unwrap();
            for length in 0..bytes.len() {
                let result = Header::decode(&bytes[..length]);
                assert!(
                    matches!(result, Err(FormatError::Truncated { .. })),
                    "{length} bytes"
                );
            }
            assert!(Header::decode(&bytes).is_ok());
        }
    }

    #[test]
    fn every_single_bit_flip_is_accepted_or_a_named_error() {
        for header in [full(), header(3, 9), header(2, 16)] {
            let mut bytes = header.encode().unwrap();
            let used = bytes.len();
            bytes.resize(bytes.len().max(512), 0);
            for bit in 0..used * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                match Header::decode(&bytes) {
                    // What was accepted obeys the limits that the rest of the program relies on.
                    Ok(header) => assert_eq!(header.validate(), Ok(()), "bit {bit}"),
                    Err(error) => assert!(error.to_string().len() > 15, "bit {bit}: {error}"),
                }
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn magic_and_version_are_checked_first() {
        assert_eq!(
            Header::decode(b"QFI"),
            Err(FormatError::Truncated {
                what: "header",
                needed: 4,
                found: 3
            })
        );
        assert_eq!(
            error_u32(OFFSET_MAGIC, 0x4b44_4d56),
            FormatError::Magic { found: 0x4b44_4d56 }
        );
        for found in [0, 1, 4, u32::MAX] {
            assert_eq!(
                error_u32(OFFSET_VERSION, found),
                FormatError::Version { found }
            );
        }
    }

    #[test]
    fn cluster_bits_and_refcount_order_are_checked() {
        for found in [0, 8, 22, u32::MAX] {
            assert_eq!(
                error_u32(OFFSET_CLUSTER_BITS, found),
                FormatError::ClusterBits { found }
            );
        }
        for found in [7, 32, u32::MAX] {
            assert_eq!(
                error_u32(OFFSET_REFCOUNT_ORDER, found),
                FormatError::RefcountOrder { found }
            );
        }
        for order in 0..=6_u32 {
            let header = patched(OFFSET_REFCOUNT_ORDER, &order.to_be_bytes()).unwrap();
            assert_eq!(header.geometry().refcount_order(), order);
        }
    }

    #[test]
    fn header_length_is_checked() {
        for (found, error) in [
            (
                0,
                FormatError::HeaderLengthTooSmall {
                    found: 0,
                    minimum: 104,
                },
            ),
            (
                96,
                FormatError::HeaderLengthTooSmall {
                    found: 96,
                    minimum: 104,
                },
            ),
            (
                103,
                FormatError::HeaderLengthTooSmall {
                    found: 103,
                    minimum: 104,
                },
            ),
            (105, FormatError::HeaderLengthUnaligned { found: 105 }),
            (
                65544,
                FormatError::HeaderLengthTooLarge {
                    found: 65544,
                    cluster_size: 65536,
                },
            ),
        ] {
            assert_eq!(error_u32(OFFSET_HEADER_LENGTH, found), error);
        }
    }

    #[test]
    fn header_of_104_bytes_means_zlib() {
        let mut short = header(3, 16);
        short.header_length = 104;
        let mut bytes = short.encode().unwrap();
        // The byte where a longer header has its compression type belongs to the first extension.
        assert_eq!(bytes[104], 0x68);
        assert_eq!(
            Header::decode(&bytes).unwrap().compression_type,
            CompressionType::Zlib
        );
        bytes[OFFSET_INCOMPATIBLE + 7] = 8;
        assert_eq!(Header::decode(&bytes), Err(FormatError::CompressionBitSet));
    }

    #[test]
    fn unknown_header_fields_are_kept() {
        let mut long = header(3, 16);
        long.header_length = 128;
        long.unknown_fields = vec![0xab; 16];
        let bytes = long.encode().unwrap();
        assert_eq!(bytes[112..128], [0xab; 16]);
        assert_eq!(Header::decode(&bytes), Ok(placed(&long, &bytes)));
    }

    #[test]
    fn compression_type_and_its_feature_bit_go_together() {
        assert_eq!(
            patched(OFFSET_COMPRESSION_TYPE, &[2]),
            Err(FormatError::CompressionType { found: 2 })
        );
        assert_eq!(
            patched(OFFSET_COMPRESSION_TYPE, &[0]),
            Err(FormatError::CompressionBitSet)
        );
        assert_eq!(
            patched(OFFSET_INCOMPATIBLE, &0_u64.to_be_bytes()),
            Err(FormatError::CompressionBitMissing { name: "zstd" })
        );
    }

    #[test]
    fn encryption_is_refused_by_name() {
        for (method, message) in [
            (1, "encryption (AES) is not supported"),
            (2, "encryption (LUKS) is not supported"),
            (3, "encryption method 3 is unknown"),
        ] {
            let error = error_u32(OFFSET_CRYPT_METHOD, method);
            assert_eq!(error.to_string(), message);
            assert!(error.is_unsupported());
        }
    }

    #[test]
    fn unsupported_features_are_refused_by_the_names_in_the_image() {
        let mut named = full();
        let name = |bit, name: &str| FeatureName {
            kind: 0,
            bit,
            name: name.to_owned(),
        };
        named.extensions[1] = Extension::FeatureNames(vec![
            FeatureName {
                kind: 1,
                bit: 63,
                name: "wrong word".to_owned(),
            },
            name(2, "data\u{1b}[0m elsewhere"),
            name(4, ""),
            name(63, "time travel"),
        ]);
        let mut bytes = named.encode().unwrap();
        let bits = 1 << 2 | 1 << 4 | 1 << 5 | 1 << 63;
        put(
            &mut bytes,
            OFFSET_INCOMPATIBLE,
            (bits | INCOMPAT_DIRTY).to_be_bytes(),
        );
        let error = Header::decode(&bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unsupported incompatible feature: data?[0m elsewhere, extended L2 entries, \
             incompatible feature bit 5, time travel"
        );
        assert!(error.is_unsupported());
    }

    #[test]
    fn unsupported_features_have_names_without_a_table() {
        for (bits, names) in [
            (INCOMPAT_DATA_FILE, "external data file"),
            (INCOMPAT_EXTENDED_L2, "extended L2 entries"),
            (1 << 62, "incompatible feature bit 62"),
        ] {
            // Small clusters have no feature name table.
            let mut bytes = header(3, 9).encode().unwrap();
            put(&mut bytes, OFFSET_INCOMPATIBLE, u64::to_be_bytes(bits));
            let names = names.to_owned();
            assert_eq!(
                Header::decode(&bytes),
                Err(FormatError::IncompatibleFeatures { names, bits })
            );
        }
    }

    #[test]
    fn damaged_extensions_do_not_hide_an_unsupported_feature() {
        let mut bytes = header(3, 16).encode().unwrap();
        put(&mut bytes, 116, u32::MAX.to_be_bytes());
        assert!(matches!(
            Header::decode(&bytes),
            Err(FormatError::ExtensionTooLong { .. })
        ));
        put(
            &mut bytes,
            OFFSET_INCOMPATIBLE,
            INCOMPAT_EXTENDED_L2.to_be_bytes(),
        );
        assert!(matches!(
            Header::decode(&bytes),
            Err(FormatError::IncompatibleFeatures { .. })
        ));
    }

    #[test]
    fn dirty_and_corrupt_bits_are_read() {
        let bits = |bits: u64| {
            let header = patched(
                OFFSET_INCOMPATIBLE,
                &(bits | INCOMPAT_COMPRESSION).to_be_bytes(),
            );
            header
                .map(|header| (header.is_dirty(), header.is_corrupt()))
                .unwrap()
        };
        assert_eq!(bits(0), (false, false));
        assert_eq!(bits(INCOMPAT_DIRTY), (true, false));
        assert_eq!(bits(INCOMPAT_CORRUPT), (false, true));
        assert!(full().has_lazy_refcounts());
        assert!(!header(3, 16).has_lazy_refcounts());
    }

    #[test]
    fn version_2_has_no_features_and_16_bit_refcounts() {
        let mut image = header(2, 16).encode().unwrap();
        image.resize(65536, 0);
        let header_2 = Header::decode(&image).unwrap();
        assert_eq!(header_2.header_length, 72);
        assert_eq!(header_2.geometry().refcount_order(), 4);
        // Extensions start where version 3 has its features.
        put(&mut image, 72, MAGIC_BITMAPS.to_be_bytes());
        put(&mut image, 76, 24_u32.to_be_bytes());
        let header_2 = Header::decode(&image).unwrap();
        assert_eq!(header_2.incompatible, 0);
        assert_eq!(header_2.extensions, [Extension::Bitmaps([0; 24])]);

        let mut with_feature = header(2, 16);
        with_feature.incompatible = INCOMPAT_DIRTY;
        let mut with_width = Header::new(2, Geometry::new(16, 5).unwrap(), 0);
        with_width.refcount_table_clusters = 1;
        let mut with_length = header(2, 16);
        with_length.header_length = 80;
        for bad in [with_feature, with_width, with_length] {
            assert!(matches!(
                bad.encode(),
                Err(FormatError::NotInVersion2 { .. })
            ));
        }
    }

    #[test]
    fn place_of_the_backing_file_name_is_checked() {
        let place = |offset: u64, length: u32| {
            let mut image = header(3, 16).encode().unwrap();
            image.resize(65536, b'n');
            put(&mut image, OFFSET_BACKING_OFFSET, offset.to_be_bytes());
            put(&mut image, OFFSET_BACKING_LENGTH, length.to_be_bytes());
            Header::decode(&image).map(|header| header.backing_name.map(|name| name.len()))
        };
        assert_eq!(place(0, 5), Ok(None));
        assert_eq!(place(1024, 0), Ok(None));
        assert_eq!(place(1024, 1023), Ok(Some(1023)));
        assert_eq!(
            place(1024, 1024),
            Err(FormatError::BackingNameTooLong { length: 1024 })
        );
        assert_eq!(place(65535, 1), Ok(Some(1)));
        for (offset, length) in [(65535, 2), (65536, 1), (u64::MAX, 1)] {
            assert!(matches!(
                place(offset, length),
                Err(FormatError::BackingNameOutsideCluster { .. })
            ));
        }
        assert!(matches!(
            place(111, 1),
            Err(FormatError::BackingNameInHeader { .. })
        ));
    }

    #[test]
    fn place_of_every_table_is_checked() {
        for (field, table) in [
            (OFFSET_L1_TABLE, "L1 table"),
            (OFFSET_REFCOUNT_TABLE, "refcount table"),
            (OFFSET_SNAPSHOT_TABLE, "snapshot table"),
        ] {
            assert!(
                patched(field, &((1_u64 << 56) - 0x1_0000).to_be_bytes()).is_ok(),
                "{table}"
            );
            assert_eq!(
                error_u64(field, 0x3_0200),
                FormatError::TableUnaligned {
                    table,
                    offset: HostOffset::new(0x3_0200),
                    cluster_size: 65536
                }
            );
            for offset in [1 << 56, !0xffff] {
                assert!(matches!(
                    error_u64(field, offset),
                    FormatError::TableOutOfRange { table: found, .. } if found == table
                ));
            }
            assert_eq!(
                error_u64(field, 0),
                FormatError::TableInHeader {
                    table,
                    offset: HostOffset::ZERO
                }
            );
        }
    }

    #[test]
    fn l1_table_covers_the_virtual_size_within_its_limit() {
        let sized = |size: u64, l1_size: u32| {
            let mut header = full();
            header.size = size;
            header.l1_size = l1_size;
            header.encode().map(|_| ())
        };
        let span = 512_u64 << 20;
        assert_eq!(sized(0, 0), Ok(()));
        assert_eq!(sized(0, 5), Ok(()));
        assert_eq!(sized(1, 1), Ok(()));
        assert_eq!(
            sized(1, 0),
            Err(FormatError::L1TooSmall {
                entries: 0,
                needed: 1,
                size: 1
            })
        );
        assert_eq!(sized(span, 1), Ok(()));
        assert_eq!(
            sized(span + 1, 1),
            Err(FormatError::L1TooSmall {
                entries: 1,
                needed: 2,
                size: span + 1
            })
        );
        assert_eq!(sized(span << 22, 4 << 20), Ok(()));
        assert!(matches!(
            sized(0, (4 << 20) + 1),
            Err(FormatError::L1TooLarge { .. })
        ));
        assert!(matches!(
            sized(u64::MAX, 4 << 20),
            Err(FormatError::L1TooSmall { .. })
        ));
    }

    #[test]
    fn empty_disk_needs_no_l1_table() {
        let mut empty = header(3, 16);
        empty.size = 0;
        empty.l1_size = 0;
        empty.l1_table_offset = HostOffset::ZERO;
        let bytes = empty.encode().unwrap();
        assert_eq!(Header::decode(&bytes).unwrap().size, 0);
    }

    #[test]
    fn counts_of_the_other_tables_are_checked() {
        assert_eq!(
            error_u32(OFFSET_REFCOUNT_TABLE_CLUSTERS, 0),
            FormatError::RefcountTableMissing
        );
        assert!(patched(OFFSET_REFCOUNT_TABLE_CLUSTERS, &128_u32.to_be_bytes()).is_ok());
        assert_eq!(
            error_u32(OFFSET_REFCOUNT_TABLE_CLUSTERS, 129),
            FormatError::RefcountTableTooLarge {
                bytes: 129 << 16,
                limit: 8 << 20
            }
        );
        assert!(patched(OFFSET_SNAPSHOT_COUNT, &65536_u32.to_be_bytes()).is_ok());
        assert_eq!(
            error_u32(OFFSET_SNAPSHOT_COUNT, 65537),
            FormatError::TooManySnapshots {
                count: 65537,
                limit: 65536
            }
        );
    }

    #[test]
    fn bitmaps_extension_is_checked_only_when_in_force() {
        let mut with_bitmaps = header(3, 16);
        with_bitmaps.extensions = vec![Extension::Bitmaps([0; 24])];
        let mut bytes = with_bitmaps.encode().unwrap();
        assert!(Header::decode(&bytes).is_ok());
        put(
            &mut bytes,
            OFFSET_AUTOCLEAR,
            AUTOCLEAR_BITMAPS.to_be_bytes(),
        );
        assert_eq!(
            Header::decode(&bytes),
            Err(FormatError::BitmapsCount { found: 0 })
        );
    }

    #[test]
    fn encryption_header_without_encryption_is_refused() {
        let mut bytes = header(3, 16).encode().unwrap();
        put(&mut bytes, 112, MAGIC_CRYPTO_HEADER.to_be_bytes());
        put(&mut bytes, 116, 16_u32.to_be_bytes());
        bytes.resize(65536, 0);
        bytes[136..].fill(0);
        assert_eq!(
            Header::decode(&bytes),
            Err(FormatError::CryptoHeaderUnexpected)
        );
    }

    #[test]
    fn backing_name_that_does_not_fit_beside_the_header_is_refused() {
        // 112 bytes of header and 8 of end marker leave 392 in a cluster of 512 bytes.
        let mut small = header(3, 9);
        small.backing_name = Some(vec![b'n'; 392]);
        assert_eq!(small.encode().unwrap().len(), 512);
        small.backing_name = Some(vec![b'n'; 393]);
        assert_eq!(
            small.encode(),
            Err(FormatError::BackingNameDoesNotFit {
                needed: 513,
                cluster_size: 512
            })
        );
        small
            .extensions
            .push(Extension::DataFileName(vec![b'n'; 393]));
        assert_eq!(
            small.encode(),
            Err(FormatError::HeaderDoesNotFit {
                needed: 528,
                cluster_size: 512
            })
        );
        let mut large = header(3, 16);
        large.backing_name = Some(vec![b'n'; 1024]);
        assert_eq!(
            large.encode(),
            Err(FormatError::BackingNameTooLong { length: 1024 })
        );
    }

    #[test]
    fn patch_changes_the_fields_that_change_and_nothing_else() {
        let bytes = full().encode().unwrap();
        let mut sector: [u8; 512] = bytes[..512].try_into().unwrap();
        let mut changed = full();
        changed.size = 1 << 29;
        changed.l1_size = 3;
        changed.l1_table_offset = HostOffset::new(0xa_0000);
        changed.refcount_table_offset = HostOffset::new(0xb_0000);
        changed.refcount_table_clusters = 2;
        changed.snapshot_count = 7;
        changed.snapshot_table_offset = HostOffset::new(0xc_0000);
        changed.incompatible = INCOMPAT_COMPRESSION;
        changed.compatible = 0;
        changed.autoclear = 0;
        changed.patch_sector(&mut sector);
        let expected = changed.encode().unwrap();
        assert_eq!(sector[..], expected[..512]);
    }

    #[test]
    fn patch_leaves_the_extensions_of_version_2_alone() {
        let mut sector = [0xee; 512];
        header(2, 16).patch_sector(&mut sector);
        assert_eq!(sector[72..], [0xee; 440]);
        assert_eq!(sector[..24], [0xee; 24]);
        assert_eq!(sector[24..32], (1_u64 << 30).to_be_bytes());
    }

    #[test]
    fn feature_name_table_is_the_one_of_other_writers() {
        let bytes = header(3, 16).encode().unwrap();
        assert_eq!(bytes[112..120], [0x68, 0x03, 0xf8, 0x57, 0, 0, 1, 0x80]);
        assert_eq!(bytes[120..131], *b"\0\0dirty bit");
        assert_eq!(bytes[456..475], *b"\x02\x01raw external data");
        assert_eq!(bytes.len(), 512);
        assert_eq!(header(3, 12).encode().unwrap().len(), 120);
        assert_eq!(header(2, 16).encode().unwrap().len(), 80);
    }

    #[test]
    fn backing_format_is_found_among_the_extensions() {
        assert_eq!(full().backing_format(), Some(b"qcow2".as_slice()));
        assert_eq!(header(3, 16).backing_format(), None);
    }
}
