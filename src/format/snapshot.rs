//! The snapshot table: one entry of variable length for each internal snapshot.
//!
//! Entries start at multiples of 8 bytes. Their extra data is kept byte for byte, so that a table
//! that is read and written again loses nothing, whoever wrote it; its known fields are read through
//! methods. The table's length is stored nowhere: it follows from the entries.

#![forbid(unsafe_code)]

use super::geometry::{L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use super::header::validate_table;
use super::{FormatError, Geometry, be_u16, be_u32, be_u64};
use crate::units::{HostOffset, align_up, to_u64, to_usize};

/// Bytes of an entry before its extra data.
const FIXED_BYTES: usize = 40;

/// Entries start at multiples of this.
const ALIGNMENT: u64 = 8;

/// Most extra data of one entry, QEMU's limit.
const EXTRA_BYTES_MAX: u64 = 1024;

/// Extra data that a v3 image must have: VM state size and disk size.
const EXTRA_BYTES_V3: usize = 16;

const ENTRY: &str = "snapshot table entry";

/// An internal snapshot as the snapshot table describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where the snapshot's L1 table is.
    pub l1_offset: HostOffset,
    /// Entries of that table: as many as the active one had then.
    pub l1_size: u32,
    /// Unique ID, by custom a decimal number.
    pub id: Vec<u8>,
    /// Name; not necessarily unique.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// When it was taken: nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// VM state size as the fixed part says it; [`vm_state_size`](Self::vm_state_size) is the truth.
    pub vm_state_size_32: u32,
    /// Extra data, known and unknown fields alike; see [`extra_data`](Self::extra_data).
    pub extra: Vec<u8>,
}

impl SnapshotEntry {
    /// An entry with nothing but an id and a name.
    #[cfg(test)]
    pub(crate) fn named(id: &str, name: &str) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            ..Self::default()
        }
    }

    /// Extra data for a new entry of a v3 image. `icount` is the instruction count of a guest that
    /// is being recorded or replayed.
    #[must_use]
    pub fn extra_data(vm_state_size: u64, disk_size: u64, icount: Option<u64>) -> Vec<u8> {
        let icount = icount.unwrap_or(u64::MAX);
        [vm_state_size, disk_size, icount]
            .into_iter()
            .flat_map(u64::to_be_bytes)
            .collect()
    }

    /// Bytes of saved VM state, 0 for a snapshot of the disk alone.
    #[must_use]
    pub fn vm_state_size(&self) -> u64 {
        self.extra_u64(0)
            .unwrap_or(u64::from(self.vm_state_size_32))
    }

    /// Virtual size of the disk at that time, if the entry says so.
    #[must_use]
    pub fn disk_size(&self) -> Option<u64> {
        self.extra_u64(8)
    }

    /// Instruction count at that time, if there was one.
    #[must_use]
    pub fn icount(&self) -> Option<u64> {
        self.extra_u64(16).filter(|&icount| icount != u64::MAX)
    }

    /// Whether the entry has all the extra data that an image of `version` must have. One that has
    /// not can be used, but a checker reports it.
    #[must_use]
    pub fn is_complete(&self, version: u32) -> bool {
        version < 3 || self.extra.len() >= EXTRA_BYTES_V3
    }

    /// Checks the snapshot's L1 table against the limits for tables.
    ///
    /// # Errors
    ///
    /// [`FormatError::L1TooLarge`], or what is wrong with the table's place.
    pub fn validate(&self, geometry: Geometry) -> Result<(), FormatError> {
        let entries = u64::from(self.l1_size);
        let limit = L1_BYTES_MAX / 8;
        if entries > limit {
            return Err(FormatError::L1TooLarge { entries, limit });
        }
        let bytes = entries.saturating_mul(8);
        validate_table("snapshot L1 table", self.l1_offset.get(), bytes, geometry)
    }

    /// Reads the entry at the start of `bytes`; also says how many bytes it takes, without padding.
    ///
    /// `index` is its position in the table, for messages.
    ///
    /// # Errors
    ///
    /// [`FormatError::Truncated`] if `bytes` ends before the entry does, with the length that must be
    /// there at least; [`FormatError::SnapshotExtraTooLarge`].
    pub fn decode(bytes: &[u8], index: u64) -> Result<(Self, usize), FormatError> {
        // The longest stretch first, so that a caller who must read more learns of all of it.
        let extra_bytes = be_u32(bytes, 36, ENTRY)?;
        let id_bytes = usize::from(be_u16(bytes, 12, ENTRY)?);
        let name_bytes = usize::from(be_u16(bytes, 14, ENTRY)?);
        if u64::from(extra_bytes) > EXTRA_BYTES_MAX {
            return Err(FormatError::SnapshotExtraTooLarge {
                index,
                found: u64::from(extra_bytes),
                limit: EXTRA_BYTES_MAX,
            });
        }
        let id_start = FIXED_BYTES.saturating_add(to_usize(u64::from(extra_bytes)));
        let name_start = id_start.saturating_add(id_bytes);
        let end = name_start.saturating_add(name_bytes);
        let part = |from: usize, to: usize| {
            bytes
                .get(from..to)
                .map(<[u8]>::to_vec)
                .ok_or_else(|| FormatError::Truncated {
                    what: ENTRY,
                    needed: to_u64(end),
                    found: to_u64(bytes.len()),
                })
        };
        let entry = Self {
            l1_offset: HostOffset::new(be_u64(bytes, 0, ENTRY)?),
            l1_size: be_u32(bytes, 8, ENTRY)?,
            id: part(id_start, name_start)?,
            name: part(name_start, end)?,
            date_sec: be_u32(bytes, 16, ENTRY)?,
            date_nsec: be_u32(bytes, 20, ENTRY)?,
            vm_clock_nsec: be_u64(bytes, 24, ENTRY)?,
            vm_state_size_32: be_u32(bytes, 32, ENTRY)?,
            extra: part(FIXED_BYTES, id_start)?,
        };
        Ok((entry, end))
    }

    /// Appends the entry and its padding. `out` starts at a multiple of 8 bytes in the file.
    fn encode_into(&self, index: u64, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let text_length = |what, text: &[u8]| {
            u16::try_from(text.len())
                .ok()
                .ok_or_else(|| FormatError::SnapshotTextTooLong {
                    what,
                    found: to_u64(text.len()),
                    limit: u64::from(u16::MAX),
                })
        };
        let extra_bytes = u32::try_from(self.extra.len())
            .ok()
            .filter(|&bytes| u64::from(bytes) <= EXTRA_BYTES_MAX)
            .ok_or_else(|| FormatError::SnapshotExtraTooLarge {
                index,
                found: to_u64(self.extra.len()),
                limit: EXTRA_BYTES_MAX,
            })?;
        out.extend_from_slice(&self.l1_offset.get().to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&text_length("ID", &self.id)?.to_be_bytes());
        out.extend_from_slice(&text_length("name", &self.name)?.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size_32.to_be_bytes());
        out.extend_from_slice(&extra_bytes.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(to_usize(align_up(to_u64(out.len()), ALIGNMENT)), 0);
        Ok(())
    }

    /// The 64-bit number at `offset` of the extra data, if the data reaches so far.
    fn extra_u64(&self, offset: usize) -> Option<u64> {
        be_u64(&self.extra, offset, "snapshot extra data").ok()
    }
}

/// Reads `count` entries from the start of `bytes`, which may be longer than the table.
///
/// # Errors
///
/// A count or length above the limits, [`FormatError::Truncated`] if `bytes` ends before the table
/// does, or what is wrong with an entry.
pub fn decode_table(bytes: &[u8], count: u32) -> Result<Vec<SnapshotEntry>, FormatError> {
    check_count(u64::from(count))?;
    let mut entries = Vec::new();
    let mut position = 0_u64;
    for index in 0..u64::from(count) {
        let rest = bytes.get(to_usize(position)..).unwrap_or_default();
        let (entry, length) = SnapshotEntry::decode(rest, index).map_err(|error| match error {
            FormatError::Truncated { needed, .. } => FormatError::Truncated {
                what: "snapshot table",
                needed: position.saturating_add(needed),
                found: to_u64(bytes.len()),
            },
            other => other,
        })?;
        let end = position.saturating_add(to_u64(length));
        check_length(end)?;
        position = align_up(end, ALIGNMENT);
        entries.push(entry);
    }
    Ok(entries)
}

/// Writes a whole table, each entry padded to 8 bytes.
///
/// # Errors
///
/// More entries, text or extra data than the format or the limits allow.
pub fn encode_table(entries: &[SnapshotEntry]) -> Result<Vec<u8>, FormatError> {
    check_count(to_u64(entries.len()))?;
    let mut out = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        entry.encode_into(to_u64(index), &mut out)?;
    }
    check_length(to_u64(out.len()))?;
    Ok(out)
}

/// Refuses a table of too many entries.
fn check_count(count: u64) -> Result<(), FormatError> {
    let limit = u64::from(SNAPSHOTS_MAX);
    if count > limit {
        Err(FormatError::TooManySnapshots { count, limit })
    } else {
        Ok(())
    }
}

/// Refuses a table of too many bytes.
fn check_length(bytes: u64) -> Result<(), FormatError> {
    let limit = SNAPSHOT_TABLE_BYTES_MAX;
    if bytes > limit {
        Err(FormatError::SnapshotTableTooLarge { limit })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, name: &str, extra: Vec<u8>) -> SnapshotEntry {
        SnapshotEntry {
            l1_offset: HostOffset::new(0x5_0000),
            l1_size: 2,
            id: id.into(),
            name: name.into(),
            date_sec: 1_700_000_000,
            date_nsec: 999_999_999,
            vm_clock_nsec: 0x1234_5678_9abc_def0,
            vm_state_size_32: 7,
            extra,
        }
    }

    /// Entries whose lengths meet every remainder of the alignment, with extra data of every kind.
    fn entries() -> Vec<SnapshotEntry> {
        let mut unknown = SnapshotEntry::extra_data(5, 6, Some(7));
        unknown.extend_from_slice(b"more");
        vec![
            entry("1", "", Vec::new()),
            entry("2", "a", vec![1, 2, 3]),
            entry("3", "ab", SnapshotEntry::extra_data(1 << 40, 1 << 30, None)),
            entry("4", "abcdef", unknown),
            entry("", "abcdefgh", vec![0; 1024]),
        ]
    }

    #[test]
    fn table_survives_a_round_trip_byte_for_byte() {
        let table = encode_table(&entries()).unwrap();
        let decoded = decode_table(&table, 5).unwrap();
        assert_eq!(decoded, entries());
        assert_eq!(encode_table(&decoded).unwrap(), table);
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let extra = SnapshotEntry::extra_data(0x1122, 0x3344, None);
        let table = encode_table(&[entry("12", "name", extra)]).unwrap();
        assert_eq!(table[0..8], 0x5_0000_u64.to_be_bytes());
        assert_eq!(table[8..12], 2_u32.to_be_bytes());
        assert_eq!(table[12..16], [0, 2, 0, 4]);
        assert_eq!(table[16..20], 1_700_000_000_u32.to_be_bytes());
        assert_eq!(table[20..24], 999_999_999_u32.to_be_bytes());
        assert_eq!(table[24..32], 0x1234_5678_9abc_def0_u64.to_be_bytes());
        assert_eq!(table[32..36], 7_u32.to_be_bytes());
        assert_eq!(table[36..40], 24_u32.to_be_bytes());
        assert_eq!(table[40..48], 0x1122_u64.to_be_bytes());
        assert_eq!(table[48..56], 0x3344_u64.to_be_bytes());
        assert_eq!(table[56..64], [0xff; 8]);
        assert_eq!(table[64..70], *b"12name");
        assert_eq!(table[70..], [0, 0]);
    }

    #[test]
    fn extra_fields_are_there_only_when_the_data_reaches_so_far() {
        let full = SnapshotEntry::extra_data(1 << 40, 1 << 30, Some(9));
        for (bytes, vm_state_size, disk_size, icount) in [
            (0, 7, None, None),
            (7, 7, None, None),
            (8, 1 << 40, None, None),
            (15, 1 << 40, None, None),
            (16, 1 << 40, Some(1 << 30), None),
            (23, 1 << 40, Some(1 << 30), None),
            (24, 1 << 40, Some(1 << 30), Some(9)),
        ] {
            let entry = entry("1", "n", full[..bytes].to_vec());
            assert_eq!(entry.vm_state_size(), vm_state_size, "{bytes} bytes");
            assert_eq!(entry.disk_size(), disk_size, "{bytes} bytes");
            assert_eq!(entry.icount(), icount, "{bytes} bytes");
            assert_eq!(entry.is_complete(3), bytes >= 16, "{bytes} bytes");
            assert!(entry.is_complete(2));
        }
    }

    #[test]
    fn every_truncation_names_a_length_that_helps() {
        // The last entry needs no padding, so the table ends with its name.
        let whole = encode_table(&entries()).unwrap();
        for length in 0..whole.len() {
            let error = decode_table(&whole[..length], 5).unwrap_err();
            assert!(
                matches!(error, FormatError::Truncated { needed, .. } if needed > to_u64(length)),
                "{length} bytes: {error}"
            );
        }
    }

    #[test]
    fn padding_after_the_last_entry_may_be_missing() {
        let mut table = encode_table(&[entry("1", "n", Vec::new())]).unwrap();
        table.truncate(42);
        assert_eq!(decode_table(&table, 1).unwrap().len(), 1);
        table.truncate(41);
        assert!(decode_table(&table, 1).is_err());
    }

    #[test]
    fn limits_are_inclusive() {
        let with_extra = |bytes| [entry("1", "n", vec![0; bytes])];
        assert!(encode_table(&with_extra(1024)).is_ok());
        assert!(matches!(
            encode_table(&with_extra(1025)),
            Err(FormatError::SnapshotExtraTooLarge {
                index: 0,
                found: 1025,
                limit: 1024
            })
        ));
        let mut table = encode_table(&with_extra(1024)).unwrap();
        table[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        assert!(matches!(
            decode_table(&table, 1),
            Err(FormatError::SnapshotExtraTooLarge {
                index: 0,
                found: 1025,
                limit: 1024
            })
        ));
        let with_name = |bytes| {
            [SnapshotEntry {
                name: vec![b'n'; bytes],
                ..entry("1", "", vec![])
            }]
        };
        assert!(encode_table(&with_name(65535)).is_ok());
        assert!(matches!(
            encode_table(&with_name(65536)),
            Err(FormatError::SnapshotTextTooLong {
                what: "name",
                found: 65536,
                limit: 65535
            })
        ));
        assert!(matches!(
            decode_table(&[], SNAPSHOTS_MAX + 1),
            Err(FormatError::TooManySnapshots {
                count: 65537,
                limit: 65536
            })
        ));
        assert!(matches!(
            decode_table(&[], SNAPSHOTS_MAX),
            Err(FormatError::Truncated { .. })
        ));
    }

    #[test]
    fn table_of_more_than_64_mib_is_refused() {
        // 1025 entries of 65536 bytes: one more than fits.
        let big = SnapshotEntry {
            name: vec![b'n'; 65496],
            ..entry("", "", vec![])
        };
        let entries = vec![big; 1025];
        assert_eq!(encode_table(&entries[..1024]).unwrap().len(), 64 << 20);
        let limit = SNAPSHOT_TABLE_BYTES_MAX;
        assert_eq!(
            encode_table(&entries),
            Err(FormatError::SnapshotTableTooLarge { limit })
        );
        let mut table = encode_table(&entries[..1024]).unwrap();
        assert_eq!(decode_table(&table, 1024).unwrap().len(), 1024);
        table.extend_from_slice(&encode_table(&entries[..1]).unwrap());
        assert_eq!(
            decode_table(&table, 1025),
            Err(FormatError::SnapshotTableTooLarge { limit })
        );
    }

    #[test]
    fn place_of_the_l1_table_is_checked() {
        let geometry = Geometry::new(16, 4).unwrap();
        let good = entry("1", "n", vec![]);
        let at = |offset| SnapshotEntry {
            l1_offset: HostOffset::new(offset),
            ..good.clone()
        };
        let of = |l1_size| SnapshotEntry {
            l1_size,
            ..good.clone()
        };
        assert_eq!(good.validate(geometry), Ok(()));
        assert!(matches!(
            at(0x5_0200).validate(geometry),
            Err(FormatError::TableUnaligned {
                table: "snapshot L1 table",
                ..
            })
        ));
        assert_eq!(at((1 << 56) - 0x1_0000).validate(geometry), Ok(()));
        assert!(matches!(
            at(1 << 56).validate(geometry),
            Err(FormatError::TableOutOfRange {
                table: "snapshot L1 table",
                ..
            })
        ));
        assert_eq!(of(4 << 20).validate(geometry), Ok(()));
        assert!(matches!(
            of((4 << 20) + 1).validate(geometry),
            Err(FormatError::L1TooLarge { .. })
        ));
    }

    #[test]
    fn every_single_bit_flip_decodes_or_is_a_named_error() {
        let table = encode_table(&entries()).unwrap();
        for bit in 0..table.len() * 8 {
            let mut flipped = table.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Err(error) = decode_table(&flipped, 5) {
                assert!(error.to_string().contains("snapshot"), "bit {bit}: {error}");
            }
        }
    }
}
