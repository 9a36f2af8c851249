//! Header extensions: the typed records between the header and the backing file name.
//!
//! The area is a list of `(type, length, data, padding to 8 bytes)`, ended by type 0 or by the end of
//! the area. Extensions that this program does not know are kept as they are. Limits that need other
//! header fields (is the bitmaps extension in force?) are `header`'s to apply.

#![forbid(unsafe_code)]

use super::{FormatError, Geometry, be_u32, be_u64, bytes_at};
use crate::units::{align_up, to_u64, to_usize};

/// End of the list.
pub const MAGIC_END: u32 = 0;
/// Name of the backing file's format.
pub const MAGIC_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Feature name table.
pub const MAGIC_FEATURE_NAMES: u32 = 0x6803_f857;
/// Persistent dirty bitmaps.
pub const MAGIC_BITMAPS: u32 = 0x2385_2875;
/// LUKS header pointer.
pub const MAGIC_CRYPTO_HEADER: u32 = 0x0537_be77;
/// Name of the external data file.
pub const MAGIC_DATA_FILE_NAME: u32 = 0x4441_5441;

/// Type and length before the data of an extension.
const HEAD_BYTES: u64 = 8;
/// Extensions start at multiples of this.
const ALIGNMENT: u64 = 8;
/// One entry of the feature name table: kind, bit, 46 bytes of name.
const FEATURE_NAME_BYTES: usize = 48;
/// Longest name of a backing format: what QEMU has room for.
const BACKING_FORMAT_BYTES_MAX: usize = 15;
/// Length of the bitmaps extension.
const BITMAPS_BYTES: u64 = 24;
/// Length of the encryption header extension: offset and length.
const CRYPTO_HEADER_BYTES: u64 = 16;
/// Most persistent bitmaps, QEMU's limit.
const BITMAPS_MAX: u32 = 65535;
/// Longest bitmap directory, QEMU's limit: 1 KiB for each of the most bitmaps.
const BITMAP_DIRECTORY_BYTES_MAX: u64 = 1024 * 65535;

/// Which feature word an entry of the feature name table speaks of.
pub mod feature_kind {
    /// `incompatible_features`.
    pub const INCOMPATIBLE: u8 = 0;
    /// `compatible_features`.
    pub const COMPATIBLE: u8 = 1;
    /// `autoclear_features`.
    pub const AUTOCLEAR: u8 = 2;
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// One of [`feature_kind`]; others are kept.
    pub kind: u8,
    /// Bit number in that word.
    pub bit: u8,
    /// What to call the feature, without the padding. At most 46 bytes are stored.
    pub name: String,
}

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Format of the backing file, as stored.
    BackingFormat(Vec<u8>),
    /// Names of features, for those who do not know them.
    FeatureNames(Vec<FeatureName>),
    /// Persistent bitmaps: the raw 24 bytes. In force only with the autoclear bit.
    Bitmaps([u8; 24]),
    /// Place of the LUKS header: the raw 16 bytes.
    CryptoHeader([u8; 16]),
    /// Name of the external data file, as stored.
    DataFileName(Vec<u8>),
    /// Any other type.
    Unknown {
        /// The type.
        magic: u32,
        /// The data without padding.
        data: Vec<u8>,
    },
}

impl Extension {
    /// Interprets the data of one extension.
    ///
    /// # Errors
    ///
    /// [`FormatError::FeatureNamesLength`], [`FormatError::ExtensionLength`] or
    /// [`FormatError::BackingFormatTooLong`].
    pub fn decode(magic: u32, data: &[u8]) -> Result<Self, FormatError> {
        Ok(match magic {
            MAGIC_BACKING_FORMAT if data.len() > BACKING_FORMAT_BYTES_MAX => {
                return Err(FormatError::BackingFormatTooLong {
                    length: to_u64(data.len()),
                    limit: to_u64(BACKING_FORMAT_BYTES_MAX),
                });
            }
            MAGIC_BACKING_FORMAT => Self::BackingFormat(data.to_vec()),
            MAGIC_FEATURE_NAMES => {
                let (entries, rest) = data.as_chunks::<FEATURE_NAME_BYTES>();
                if !rest.is_empty() {
                    return Err(FormatError::FeatureNamesLength {
                        found: to_u64(data.len()),
                    });
                }
                Self::FeatureNames(entries.iter().map(FeatureName::decode).collect())
            }
            MAGIC_BITMAPS => Self::Bitmaps(exactly(data, "bitmaps", BITMAPS_BYTES)?),
            MAGIC_CRYPTO_HEADER => {
                Self::CryptoHeader(exactly(data, "encryption", CRYPTO_HEADER_BYTES)?)
            }
            MAGIC_DATA_FILE_NAME => Self::DataFileName(data.to_vec()),
            _ => Self::Unknown {
                magic,
                data: data.to_vec(),
            },
        })
    }

    /// The extension's type.
    #[must_use]
    pub fn magic(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => MAGIC_BACKING_FORMAT,
            Self::FeatureNames(_) => MAGIC_FEATURE_NAMES,
            Self::Bitmaps(_) => MAGIC_BITMAPS,
            Self::CryptoHeader(_) => MAGIC_CRYPTO_HEADER,
            Self::DataFileName(_) => MAGIC_DATA_FILE_NAME,
            Self::Unknown { magic, .. } => *magic,
        }
    }

    /// The data without padding.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        match self {
            Self::BackingFormat(data) | Self::DataFileName(data) | Self::Unknown { data, .. } => {
                data.clone()
            }
            Self::FeatureNames(names) => names.iter().flat_map(FeatureName::encode).collect(),
            Self::Bitmaps(raw) => raw.to_vec(),
            Self::CryptoHeader(raw) => raw.to_vec(),
        }
    }

    /// Appends type, length, data and padding. `out` starts at a multiple of 8 bytes in the file.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let data = self.data();
        // A longer extension cannot be in an image: the caller compares with the cluster size.
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&self.magic().to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&data);
        out.resize(to_usize(align_up(to_u64(out.len()), ALIGNMENT)), 0);
    }
}

impl FeatureName {
    /// Reads one entry; the name ends at the first NUL.
    fn decode(entry: &[u8; FEATURE_NAME_BYTES]) -> Self {
        let [kind, bit, name @ ..] = entry;
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        Self {
            kind: *kind,
            bit: *bit,
            name: String::from_utf8_lossy(name).into_owned(),
        }
    }

    /// Writes one entry, cutting the name at 46 bytes.
    fn encode(&self) -> [u8; FEATURE_NAME_BYTES] {
        let mut entry = [0; FEATURE_NAME_BYTES];
        let [kind, bit, name @ ..] = &mut entry;
        *kind = self.kind;
        *bit = self.bit;
        for (place, byte) in name.iter_mut().zip(self.name.bytes()) {
            *place = byte;
        }
        entry
    }
}

/// The whole data of an extension whose length is fixed.
fn exactly<const N: usize>(
    data: &[u8],
    name: &'static str,
    expected: u64,
) -> Result<[u8; N], FormatError> {
    <[u8; N]>::try_from(data)
        .ok()
        .ok_or_else(|| FormatError::ExtensionLength {
            name,
            found: to_u64(data.len()),
            expected,
        })
}

/// Checks the content of a bitmaps extension that is in force.
///
/// # Errors
///
/// A reserved field that is not 0, a count or directory size outside the limits, a directory that
/// is not aligned to a cluster or ends past the largest host offset.
pub fn validate_bitmaps(raw: &[u8; 24], geometry: Geometry) -> Result<(), FormatError> {
    const WHAT: &str = "bitmaps header extension";
    let count = be_u32(raw, 0, WHAT)?;
    let reserved = be_u32(raw, 4, WHAT)?;
    let directory_bytes = be_u64(raw, 8, WHAT)?;
    let directory_offset = be_u64(raw, 16, WHAT)?;
    if reserved != 0 {
        return Err(FormatError::BitmapsReserved { found: reserved });
    }
    if !(1..=BITMAPS_MAX).contains(&count) {
        return Err(FormatError::BitmapsCount { found: count });
    }
    if !(1..=BITMAP_DIRECTORY_BYTES_MAX).contains(&directory_bytes) {
        return Err(FormatError::BitmapsDirectorySize {
            found: directory_bytes,
            limit: BITMAP_DIRECTORY_BYTES_MAX,
        });
    }
    super::header::validate_table(
        "bitmap directory",
        directory_offset,
        directory_bytes,
        geometry,
    )
}

/// Type and data of each extension in an area of the header, uninterpreted.
///
/// Ends after the end marker, at the end of the area, or with an error.
pub(super) struct RawExtensions<'a> {
    /// What there is of the area; shorter than `room` if the file is.
    area: &'a [u8],
    /// Where the area starts in the file, for messages.
    start: u64,
    /// Length of the area.
    room: u64,
    /// Where the next extension starts in the area.
    position: u64,
    /// Nothing more will come.
    ended: bool,
}

impl<'a> RawExtensions<'a> {
    /// Walks the area from `start` to `end` of the file whose first bytes are `bytes`.
    pub(super) fn new(bytes: &'a [u8], start: u64, end: u64) -> Self {
        let available = bytes.get(..to_usize(end)).unwrap_or(bytes);
        Self {
            area: available.get(to_usize(start)..).unwrap_or_default(),
            start,
            room: end.saturating_sub(start),
            position: 0,
            ended: false,
        }
    }

    /// The next extension; `None` at the end.
    fn step(&mut self) -> Result<Option<(u32, &'a [u8])>, FormatError> {
        let data_start = self.position.saturating_add(HEAD_BYTES);
        // Less than a head is left: older images end the area so, without a marker.
        let Some(room) = self.room.checked_sub(data_start) else {
            return Ok(None);
        };
        let [m0, m1, m2, m3, l0, l1, l2, l3] =
            bytes_at(self.area, to_usize(self.position), "header extension area")?;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        let length = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
        if length > room {
            return Err(FormatError::ExtensionTooLong {
                magic,
                offset: self.start.saturating_add(self.position),
                length,
                room,
            });
        }
        if magic == MAGIC_END {
            return Ok(None);
        }
        let data_end = data_start.saturating_add(length);
        let data = self
            .area
            .get(to_usize(data_start)..to_usize(data_end))
            .ok_or_else(|| FormatError::Truncated {
                what: "header extension area",
                needed: data_end,
                found: to_u64(self.area.len()),
            })?;
        self.position = align_up(data_end, ALIGNMENT);
        Ok(Some((magic, data)))
    }
}

impl<'a> Iterator for RawExtensions<'a> {
    type Item = Result<(u32, &'a [u8]), FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.step().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extensions() -> Vec<Extension> {
        let name = |kind, bit, name: &str| FeatureName {
            kind,
            bit,
            name: name.to_owned(),
        };
        vec![
            Extension::BackingFormat(b"qcow2".to_vec()),
            Extension::FeatureNames(vec![
                name(feature_kind::INCOMPATIBLE, 0, "dirty bit"),
                name(feature_kind::AUTOCLEAR, 63, &"x".repeat(46)),
                name(77, 255, ""),
            ]),
            Extension::Bitmaps([3; 24]),
            Extension::CryptoHeader([4; 16]),
            Extension::DataFileName(b"data.raw".to_vec()),
            Extension::Unknown {
                magic: 0x1234_5678,
                data: Vec::new(),
            },
            Extension::Unknown {
                magic: 0x8765_4321,
                data: vec![9; 7],
            },
        ]
    }

    fn area(extensions: &[Extension]) -> Vec<u8> {
        let mut out = Vec::new();
        for extension in extensions {
            extension.encode_into(&mut out);
        }
        out
    }

    /// Decodes an area of `room` bytes of which `bytes` are there.
    fn decode(bytes: &[u8], room: usize) -> Result<Vec<Extension>, FormatError> {
        RawExtensions::new(bytes, 0, to_u64(room))
            .map(|item| item.and_then(|(magic, data)| Extension::decode(magic, data)))
            .collect()
    }

    #[test]
    fn area_survives_a_round_trip() {
        let bytes = area(&extensions());
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(decode(&bytes, bytes.len()), Ok(extensions()));
    }

    #[test]
    fn area_ends_at_the_marker_or_where_no_head_fits() {
        let mut bytes = area(&extensions());
        let length = bytes.len();
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&[0xff; 64]);
        assert_eq!(decode(&bytes, bytes.len()), Ok(extensions()));
        assert_eq!(decode(&bytes, length), Ok(extensions()));
        assert_eq!(decode(&[0xff; 7], 7), Ok(Vec::new()));
        assert!(decode(&[0xff; 8], 8).is_err());
    }

    #[test]
    fn every_truncation_of_an_area_is_an_error() {
        let mut bytes = area(&extensions());
        bytes.extend_from_slice(&[0; 8]);
        for length in 0..bytes.len() {
            let result = decode(&bytes[..length], bytes.len());
            assert!(
                matches!(result, Err(FormatError::Truncated { .. })),
                "{length}: {result:?}"
            );
        }
    }

    #[test]
    fn a_backing_format_of_15_bytes_is_the_longest() {
        assert!(Extension::decode(MAGIC_BACKING_FORMAT, &[b'x'; 15]).is_ok());
        assert_eq!(
            Extension::decode(MAGIC_BACKING_FORMAT, &[b'x'; 16]),
            Err(FormatError::BackingFormatTooLong {
                length: 16,
                limit: 15
            })
        );
    }

    #[test]
    fn length_past_the_area_is_refused_for_the_marker_too() {
        for magic in [MAGIC_END, MAGIC_BACKING_FORMAT, 1] {
            let mut bytes = magic.to_be_bytes().to_vec();
            bytes.extend_from_slice(&9_u32.to_be_bytes());
            bytes.extend_from_slice(&[0; 8]);
            assert_eq!(
                decode(&bytes, 16),
                Err(FormatError::ExtensionTooLong {
                    magic,
                    offset: 0,
                    length: 9,
                    room: 8
                })
            );
            bytes[7] = 8;
            assert!(decode(&bytes, 16).is_ok());
        }
    }

    #[test]
    fn lengths_that_the_specification_fixes_are_checked() {
        for (magic, name, expected) in [
            (MAGIC_BITMAPS, "bitmaps", 24),
            (MAGIC_CRYPTO_HEADER, "encryption", 16),
        ] {
            for found in [0, expected - 1, expected + 1] {
                assert_eq!(
                    Extension::decode(magic, &vec![0; to_usize(found)]),
                    Err(FormatError::ExtensionLength {
                        name,
                        found,
                        expected
                    })
                );
            }
            assert!(Extension::decode(magic, &vec![0; to_usize(expected)]).is_ok());
        }
        for (length, good) in [(0, true), (47, false), (48, true), (49, false), (96, true)] {
            let result = Extension::decode(MAGIC_FEATURE_NAMES, &vec![0; length]);
            assert_eq!(result.is_ok(), good, "{length} bytes");
        }
    }

    #[test]
    fn feature_name_ends_at_its_first_nul_and_need_not_be_text() {
        let mut data = vec![2, 5];
        data.extend_from_slice(b"a\xffb\0rest");
        data.resize(48, 0);
        let name = FeatureName {
            kind: 2,
            bit: 5,
            name: "a\u{fffd}b".to_owned(),
        };
        assert_eq!(
            Extension::decode(MAGIC_FEATURE_NAMES, &data),
            Ok(Extension::FeatureNames(vec![name]))
        );
    }

    #[test]
    fn content_of_the_bitmaps_extension_is_checked() {
        let geometry = Geometry::new(16, 4).unwrap();
        let check = |count: u32, reserved: u32, bytes: u64, offset: u64| {
            let mut raw = [0; 24];
            raw[0..4].copy_from_slice(&count.to_be_bytes());
            raw[4..8].copy_from_slice(&reserved.to_be_bytes());
            raw[8..16].copy_from_slice(&bytes.to_be_bytes());
            raw[16..24].copy_from_slice(&offset.to_be_bytes());
            validate_bitmaps(&raw, geometry)
        };
        let limit = BITMAP_DIRECTORY_BYTES_MAX;
        assert_eq!(check(1, 0, 1, 0x1_0000), Ok(()));
        assert_eq!(check(65535, 0, limit, 0x1_0000), Ok(()));
        assert_eq!(
            check(0, 0, 1, 0x1_0000),
            Err(FormatError::BitmapsCount { found: 0 })
        );
        assert_eq!(
            check(65536, 0, 1, 0x1_0000),
            Err(FormatError::BitmapsCount { found: 65536 })
        );
        assert_eq!(
            check(1, 2, 1, 0x1_0000),
            Err(FormatError::BitmapsReserved { found: 2 })
        );
        for found in [0, limit + 1] {
            assert_eq!(
                check(1, 0, found, 0x1_0000),
                Err(FormatError::BitmapsDirectorySize { found, limit })
            );
        }
        assert!(matches!(
            check(1, 0, 1, 0x1_0200),
            Err(FormatError::TableUnaligned { .. })
        ));
        assert!(matches!(
            check(1, 0, 1, 1 << 56),
            Err(FormatError::TableOutOfRange { .. })
        ));
    }
}
