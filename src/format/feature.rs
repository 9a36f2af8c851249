//! The feature bits of a v3 header: which this program handles, what they are called, and the refusal
//! of those that it must not ignore.
//!
//! An incompatible feature that is not in [`INCOMPAT_SUPPORTED`] is refused under the name that the
//! image's own feature name table gives it, since only the program that set it knows what it means.

#![forbid(unsafe_code)]

use super::FormatError;
use super::extension::{Extension, FeatureName, MAGIC_FEATURE_NAMES, RawExtensions, feature_kind};

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

/// Refuses incompatible features that we do not handle, by the names that the image gives them.
///
/// An extension area that is damaged ends the search for names, not the refusal.
pub(super) fn check_incompatible(
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
pub(super) fn standard_feature_names() -> Extension {
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
