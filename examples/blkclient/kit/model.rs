//! What every sector of the disk must hold.
//!
//! Each write has a version of its own, and the content of a sector is a function of (key, sector,
//! version), so the model keeps four bytes for a sector instead of 512 and any found content can be
//! told apart: another version, another sector's bytes, a torn mixture. Content that was there
//! before is kept in a base file. Knows nothing of requests in flight: callers never have two
//! overlapping ones, except reads.

use super::{Error, SECTOR_BYTES, index};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Reads as zeroes.
const ZERO: u32 = 0;
/// Holds what it held before the run: see the base file.
const FOREIGN: u32 = 1;
/// The first version that a write gets.
pub(crate) const VERSION_FIRST: u32 = 2;
/// Beside the value in the other bits, zeroes are allowed too (a discard may do nothing).
const OR_ZERO: u32 = 1 << 31;

const ZEROES: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];

/// The permitted content of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State(u32);

impl State {
    pub(crate) const ZERO: Self = Self(ZERO);
    pub(crate) const FOREIGN: Self = Self(FOREIGN);

    /// The content that write `version` gave the sector.
    pub(crate) fn version(version: u32) -> Self {
        Self(version)
    }

    /// The same, or zeroes.
    pub(crate) fn or_zero(self) -> Self {
        if self.0 == ZERO {
            self
        } else {
            Self(self.0 | OR_ZERO)
        }
    }

    /// The value without the alternative.
    fn sure(self) -> Self {
        Self(self.0 & !OR_ZERO)
    }

    /// Whether the sector may read as zeroes.
    fn admits_zero(self) -> bool {
        self.0 == ZERO || self.0 & OR_ZERO != 0
    }

    /// As it is stored in files.
    pub(crate) fn to_raw(self) -> u32 {
        self.0
    }

    /// As it was stored in a file.
    pub(crate) fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

/// A step of the splitmix64 sequence: cheap, and every bit of the input reaches the output.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills `sector_bytes` with what write `version` puts into `sector`: the sector number, the
/// version with a check value of the key, then pseudo-random words.
fn fill(key: u64, sector: u64, version: u32, sector_bytes: &mut [u8]) {
    let (label, body) = sector_bytes.split_at_mut(16);
    label[..8].copy_from_slice(&sector.to_le_bytes());
    label[8..12].copy_from_slice(&version.to_le_bytes());
    label[12..].copy_from_slice(&mix(key).to_le_bytes()[..4]);
    let mut word = mix(key ^ mix(sector) ^ (u64::from(version) << 32));
    for bytes in body.chunks_exact_mut(8) {
        word = word
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        bytes.copy_from_slice(&(word ^ (word >> 29)).to_le_bytes());
    }
}

/// Fills `bytes` with what write `version` puts at `sector` and behind.
pub(crate) fn fill_range(key: u64, sector: u64, version: u32, bytes: &mut [u8]) {
    for (number, sector_bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
        fill(key, number, version, sector_bytes);
    }
}

/// What found content looks like, for a report.
fn describe(key: u64, found: &[u8]) -> String {
    if found == ZEROES {
        return "zeroes".to_owned();
    }
    let word = |range: Range<usize>| {
        found[range]
            .iter()
            .rev()
            .fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
    };
    let (sector, version) = (word(0..8), word(8..12));
    let mut whole = [0; SECTOR_BYTES];
    fill(key, sector, u32::try_from(version).unwrap_or(0), &mut whole);
    if whole[..16] != found[..16] {
        let hex: Vec<_> = found[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        return format!(
            "bytes not of this run ({}; as a label: version {version} of sector {sector})",
            hex.join(" ")
        );
    }
    match whole
        .iter()
        .zip(found)
        .position(|(expected, found)| expected != found)
    {
        None => format!("version {version} of sector {sector}"),
        Some(byte) => format!("version {version} of sector {sector}, torn at byte {byte}"),
    }
}

/// The states of all sectors of the region under test, which starts at sector 0.
pub(crate) struct Model {
    pub(crate) key: u64,
    states: Vec<State>,
    base: Option<File>,
    next_version: u32,
}

impl Model {
    /// A disk of `sectors` sectors that must read as zeroes.
    pub(crate) fn zeroed(key: u64, sectors: u64) -> Self {
        let states = vec![State::ZERO; index(sectors)];
        Self {
            key,
            states,
            base: None,
            next_version: VERSION_FIRST,
        }
    }

    /// A model with known states. `base` holds the content of foreign sectors.
    pub(crate) fn restored(
        key: u64,
        states: Vec<State>,
        base: Option<File>,
        next_version: u32,
    ) -> Self {
        Self {
            key,
            states,
            base,
            next_version,
        }
    }

    /// Sets the file that holds the content of foreign sectors.
    pub(crate) fn set_base(&mut self, base: File) {
        self.base = Some(base);
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.states.len() as u64
    }

    pub(crate) fn next_version(&self) -> u32 {
        self.next_version
    }

    pub(crate) fn states(&self) -> &[State] {
        &self.states
    }

    /// The version for a new write.
    pub(crate) fn take_version(&mut self) -> Result<u32, Error> {
        let version = self.next_version;
        if version >= OR_ZERO {
            return Err(Error::Usage(
                "the run is too long: out of versions".to_owned(),
            ));
        }
        self.next_version += 1;
        Ok(version)
    }

    /// Applies `change` to the state of each sector of a range.
    pub(crate) fn update(&mut self, sectors: Range<u64>, change: impl Fn(u64, State) -> State) {
        for number in sectors {
            let state = &mut self.states[index(number)];
            *state = change(number, *state);
        }
    }

    /// Takes what the disk holds now as given: zeroes, or foreign content that goes to the base.
    pub(crate) fn learn(&mut self, first: u64, found: &[u8]) -> Result<(), Error> {
        for (number, found) in (first..).zip(found.chunks_exact(SECTOR_BYTES)) {
            if found == ZEROES {
                self.states[index(number)] = State::ZERO;
                continue;
            }
            self.states[index(number)] = State::FOREIGN;
            let base = self.base.as_ref().ok_or_else(|| {
                Error::Usage("the disk is not empty and there is no base file".to_owned())
            })?;
            base.write_all_at(found, number * SECTOR_BYTES as u64)
                .map_err(Error::io("writing the base file"))?;
        }
        Ok(())
    }

    /// Whether `found` is what `state` says that sector `number` holds, zeroes aside.
    fn holds(&self, number: u64, state: State, found: &[u8]) -> Result<bool, Error> {
        let mut expected = [0; SECTOR_BYTES];
        match state.sure() {
            State::ZERO => {}
            State::FOREIGN => self.read_base(number, &mut expected)?,
            State(version) => fill(self.key, number, version, &mut expected),
        }
        Ok(expected == found)
    }

    fn read_base(&self, number: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let base = self
            .base
            .as_ref()
            .ok_or_else(|| Error::Usage("foreign sectors, but no base file".to_owned()))?;
        base.read_exact_at(bytes, number * SECTOR_BYTES as u64)
            .map_err(Error::io("reading the base file"))
    }

    /// Compares what was read at `first` with the model. Where the model allows two contents, the
    /// one that was seen is the only one allowed from now on.
    pub(crate) fn check(&mut self, first: u64, found: &[u8], who: &str) -> Result<(), Error> {
        for (number, found) in (first..).zip(found.chunks_exact(SECTOR_BYTES)) {
            let state = self.states[index(number)];
            self.states[index(number)] = self.check_sector(number, &[state], found, who)?;
        }
        Ok(())
    }

    /// Compares one sector with several permitted states; returns the one that it is in.
    pub(crate) fn check_sector(
        &self,
        number: u64,
        permitted: &[State],
        found: &[u8],
        who: &str,
    ) -> Result<State, Error> {
        let is_zero = found == ZEROES;
        for state in permitted {
            if is_zero && state.admits_zero() {
                return Ok(State::ZERO);
            }
            if self.holds(number, *state, found)? {
                return Ok(state.sure());
            }
        }
        let expected: Vec<_> = permitted.iter().map(|state| self.name(*state)).collect();
        let what = format!(
            "sector {number} holds {}, expected {} ({who}; key {:#x})",
            describe(self.key, found),
            expected.join(" or "),
            self.key
        );
        Err(Error::Miscompare {
            sector: number,
            what,
        })
    }

    fn name(&self, state: State) -> String {
        let sure = match state.sure() {
            State::ZERO => "zeroes".to_owned(),
            State::FOREIGN => "its content from before the run".to_owned(),
            State(version) => format!("version {version}"),
        };
        let alternative = if state.0 & OR_ZERO != 0 {
            " or zeroes"
        } else {
            ""
        };
        format!("{sure}{alternative}")
    }

    /// Writes the expected content of the whole disk to a raw sparse file.
    pub(crate) fn write_raw(&self, path: &Path, capacity_bytes: u64) -> Result<(), Error> {
        let what = || format!("writing {}", path.display());
        // The base may be a file of the same name: write beside it, then replace.
        let temporary = path.with_extension("partial");
        let file = File::create(&temporary).map_err(Error::io(what()))?;
        file.set_len(capacity_bytes).map_err(Error::io(what()))?;
        let mut bytes = [0; SECTOR_BYTES];
        for (number, state) in (0..).zip(&self.states) {
            match *state {
                State::ZERO => continue,
                State::FOREIGN => self.read_base(number, &mut bytes)?,
                State(version) if version & OR_ZERO == 0 => {
                    fill(self.key, number, version, &mut bytes);
                }
                State(_) => {
                    return Err(Error::Usage(
                        "a final state is uncertain: verify first".into(),
                    ));
                }
            }
            file.write_all_at(&bytes, number * SECTOR_BYTES as u64)
                .map_err(Error::io(what()))?;
        }
        std::fs::rename(&temporary, path).map_err(Error::io(what()))
    }
}

/// Creates the base file: `path`, or one without a name.
pub(crate) fn create_base(path: Option<&Path>, bytes: u64) -> Result<File, Error> {
    let create = || -> io::Result<File> {
        let file = match path {
            Some(path) => File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)?,
            None => tempfile::tempfile()?,
        };
        file.set_len(bytes)?;
        Ok(file)
    };
    create().map_err(Error::io("creating the base file"))
}
