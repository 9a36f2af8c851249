//! The image header, v2 and v3, with its extensions and the backing file name: everything that must
//! lie in the first cluster.
//!
//! [`Header::decode`] accepts only what this program can serve; a feature that it cannot is refused by
//! the name that the image itself gives it. [`Header::patch_sector`] changes the fields that an open
//! image changes and keeps every other byte; all of them lie in the first 512 bytes, so one sector
//! write moves the image from one state to the next. [`Header::encode`] makes a new header.

#![forbid(unsafe_code)]

use super::extension::{
    Extension, FeatureName, MAGIC_FEATURE_NAMES, RawExtensions, feature_kind, validate_bitmaps,
};
use super::geometry::{
    HOST_OFFSET_END, L1_BYTES_MAX, REFCOUNT_ORDER_V2, REFTABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use super::{FormatError, Geometry, be_u32, be_u64, put};
use crate::units::{HostOffset, to_u64, to_usize};

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

/// Refcounts and copied flags may lag: repair before writing.
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Metadata is known to be damaged: do not write.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Guest data lies in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// The compression type is not zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// L2 entries have 16 bytes and subclusters.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// The incompatible features that this program handles.
pub const INCOMPAT_SUPPORTED: u64 = INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_COMPRESSION;
/// Refcounts may be updated late, under the dirty bit.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// The bitmaps extension agrees with the data.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// The external data file is a raw image.
pub const AUTOCLEAR_RAW_EXTERNAL: u64 = 1 << 1;

/// Smallest cluster size whose first cluster gets a feature name table: it takes 392 bytes, which in
/// a small first cluster are better left to the backing file name. QEMU draws the same line.
const FEATURE_NAMES_CLUSTER_SIZE_MIN: u64 = 8192;

/// The features that the specification names.
const FEATURES: [(u8, u8, &str); 8] = [
    (feature_kind::INCOMPATIBLE, 0, "dirty bit"),
    (feature_kind::INCOMPATIBLE, 1, "corrupt bit"),
    (feature_kind::INCOMPATIBLE, 2, "external data file"),
    (feature_kind::INCOMPATIBLE, 3, "compression type"),
    (feature_kind::INCOMPATIBLE, 4, "extended L2 entries"),
    (feature_kind::COMPATIBLE, 0, "lazy refcounts"),
    (feature_kind::AUTOCLEAR, 0, "bitmaps"),
    (feature_kind::AUTOCLEAR, 1, "raw external data"),
];

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

/// Refuses incompatible features that we do not handle, by the names that the image gives them.
///
/// An extension area that is damaged ends the search for names, not the refusal.
fn check_incompatible(
    incompatible: u64,
    raw_extensions: RawExtensions<'_>,
) -> Result<(), FormatError> {
    let bits = incompatible & !INCOMPAT_SUPPORTED;
    if bits == 0 {
        return Ok(());
    }
    let table = raw_extensions
        .map_while(Result::ok)
        .find(|&(magic, _)| magic == MAGIC_FEATURE_NAMES)
        .and_then(|(magic, data)| Extension::decode(magic, data).ok());
    let table = match &table {
        Some(Extension::FeatureNames(names)) => names.as_slice(),
        _ => &[],
    };
    let names: Vec<String> = (0..64_u8)
        .filter(|&bit| bits & (1 << bit) != 0)
        .map(|bit| incompatible_feature_name(bit, table))
        .collect();
    Err(FormatError::IncompatibleFeatures {
        names: names.join(", "),
        bits,
    })
}

/// The image's own name for a feature, or the specification's, or its number.
fn incompatible_feature_name(bit: u8, table: &[FeatureName]) -> String {
    let own = table
        .iter()
        .find(|name| (name.kind, name.bit) == (feature_kind::INCOMPATIBLE, bit))
        // The image is not trusted with the reader's terminal.
        .map(|name| name.name.replace(char::is_control, "?"))
        .filter(|name| !name.trim().is_empty());
    let specified = || {
        FEATURES
            .iter()
            .find(|&&(kind, number, _)| (kind, number) == (feature_kind::INCOMPATIBLE, bit))
            .map(|&(_, _, name)| name.to_owned())
    };
    own.or_else(specified)
        .unwrap_or_else(|| format!("incompatible feature bit {bit}"))
}

/// The feature name table that we write.
fn standard_feature_names() -> Extension {
    let names = FEATURES
        .iter()
        .map(|&(kind, bit, name)| FeatureName {
            kind,
            bit,
            name: name.to_owned(),
        })
        .collect();
    Extension::FeatureNames(names)
}
