//! Which contents a sector may have after the server was killed.
//!
//! Keeps, beside the model, the state that a completed FLUSH covers, and the list of later changes
//! in submission order. Changes to one sector never overlap in time, so their order of submission
//! is their order on the disk. After a kill a sector may hold its flushed state or what any later
//! change gave it, completed or not.

use super::disk::Segment;
use super::model::{Model, State};
use super::{Error, SECTOR_BYTES, index};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What a request does to the sectors of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Effect {
    /// Each sector gets the content of this version.
    Write(u32),
    /// Each sector reads as zeroes.
    Zero,
    /// Sectors in the inner range read as zeroes, the others as before or as zeroes.
    Discard {
        /// First sector that must read as zeroes.
        zero_from: u64,
        /// First sector behind those.
        zero_to: u64,
    },
}

impl Effect {
    /// A discard of `segment` where whole clusters of `cluster_sectors` must read as zeroes.
    /// 0: a discard may do nothing at all.
    pub(crate) fn discard(segment: &Segment, cluster_sectors: u64) -> Self {
        let end = segment.sector + u64::from(segment.sectors);
        if cluster_sectors == 0 {
            return Self::Discard {
                zero_from: end,
                zero_to: end,
            };
        }
        Self::Discard {
            zero_from: segment.sector.next_multiple_of(cluster_sectors),
            zero_to: end / cluster_sectors * cluster_sectors,
        }
    }

    /// The state of sector `number` after it, given the one before.
    pub(crate) fn apply(self, number: u64, before: State) -> State {
        match self {
            Self::Write(version) => State::version(version),
            Self::Zero => State::ZERO,
            Self::Discard { zero_from, zero_to } if (zero_from..zero_to).contains(&number) => {
                State::ZERO
            }
            Self::Discard { .. } => before.or_zero(),
        }
    }
}

/// A change that no completed flush covers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Change {
    /// Names the change towards [`Journal::complete`].
    pub(crate) id: u64,
    pub(crate) sectors: Range<u64>,
    pub(crate) effect: Effect,
    /// When it completed, on the journal's clock.
    #[serde(skip)]
    completed_at: Option<u64>,
}

/// The flushed state of all sectors and the changes since.
pub(crate) struct Journal {
    durable: Vec<State>,
    changes: Vec<Change>,
    /// Counts completions.
    clock: u64,
    next_id: u64,
}

impl Journal {
    /// Starts from the model's states, which must be durable.
    pub(crate) fn new(model: &Model) -> Self {
        Self {
            durable: model.states().to_vec(),
            changes: Vec::new(),
            clock: 0,
            next_id: 0,
        }
    }

    /// A change is about to be submitted.
    pub(crate) fn submit(&mut self, sectors: Range<u64>, effect: Effect) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.changes.push(Change {
            id,
            sectors,
            effect,
            completed_at: None,
        });
        id
    }

    /// The change has completed.
    pub(crate) fn complete(&mut self, id: u64) {
        self.clock += 1;
        if let Ok(at) = self.changes.binary_search_by_key(&id, |change| change.id) {
            self.changes[at].completed_at = Some(self.clock);
        }
    }

    /// A flush is about to be submitted: it covers what has completed until now.
    pub(crate) fn flush_mark(&self) -> u64 {
        self.clock
    }

    /// The flush with this mark has completed.
    pub(crate) fn flushed(&mut self, mark: u64) {
        let durable = &mut self.durable;
        self.changes.retain(|change| {
            let covered = change
                .completed_at
                .is_some_and(|completed_at| completed_at <= mark);
            if covered {
                for number in change.sectors.clone() {
                    let state = &mut durable[index(number)];
                    *state = change.effect.apply(number, *state);
                }
            }
            !covered
        });
    }

    /// Writes all that [`Permitted`] needs to know.
    pub(crate) fn save(
        &self,
        path: &Path,
        model: &Model,
        base: Option<&Path>,
    ) -> Result<(), Error> {
        save(
            path,
            model.key,
            model.next_version(),
            base,
            &self.durable,
            &self.changes,
        )
    }
}

/// First line of a state file, as JSON; the states follow as little-endian words.
#[derive(Serialize, Deserialize)]
struct Header {
    key: u64,
    sectors: u64,
    next_version: u32,
    base: Option<PathBuf>,
    changes: Vec<Change>,
}

fn save(
    path: &Path,
    key: u64,
    next_version: u32,
    base: Option<&Path>,
    durable: &[State],
    changes: &[Change],
) -> Result<(), Error> {
    let header = Header {
        key,
        sectors: durable.len() as u64,
        next_version,
        base: base.map(Path::to_owned),
        changes: changes.to_vec(),
    };
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        let text = serde_json::to_vec(&header)?;
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(&text)?;
        for state in durable {
            file.write_all(&state.to_raw().to_le_bytes())?;
        }
        file.flush()
    };
    write().map_err(Error::io(format!("writing {}", path.display())))
}

/// A state file that was read back: what each sector may hold.
pub(crate) struct Permitted {
    pub(crate) model: Model,
    pub(crate) base: Option<PathBuf>,
    changes: Vec<Change>,
}

impl Permitted {
    /// Reads a state file.
    pub(crate) fn load(path: &Path) -> Result<Self, Error> {
        let read = || -> std::io::Result<(Header, Vec<State>)> {
            let mut file = BufReader::new(File::open(path)?);
            let mut length = [0; 8];
            file.read_exact(&mut length)?;
            let mut text = vec![0; index(u64::from_le_bytes(length))];
            file.read_exact(&mut text)?;
            let header: Header = serde_json::from_slice(&text)?;
            let mut words = vec![0; index(header.sectors) * 4];
            file.read_exact(&mut words)?;
            let states = words
                .chunks_exact(4)
                .map(|word| {
                    State::from_raw(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                })
                .collect();
            Ok((header, states))
        };
        let (header, states) = read().map_err(Error::io(format!("reading {}", path.display())))?;
        let base = match &header.base {
            None => None,
            Some(base) => {
                Some(File::open(base).map_err(Error::io(format!("opening {}", base.display())))?)
            }
        };
        let model = Model::restored(header.key, states, base, header.next_version);
        Ok(Self {
            model,
            base: header.base,
            changes: header.changes,
        })
    }

    /// Whether no change is pending: the states of the model are all that is permitted.
    pub(crate) fn is_settled(&self) -> bool {
        self.changes.is_empty()
    }

    /// Compares what was read at `first` with what is permitted, and pins it.
    pub(crate) fn check(&mut self, first: u64, found: &[u8]) -> Result<(), Error> {
        let end = first + (found.len() / SECTOR_BYTES) as u64;
        let near: Vec<&Change> = self
            .changes
            .iter()
            .filter(|change| change.sectors.start < end && change.sectors.end > first)
            .collect();
        let mut permitted = Vec::new();
        for (number, found) in (first..).zip(found.chunks_exact(SECTOR_BYTES)) {
            permitted.clear();
            permitted.push(self.model.states()[index(number)]);
            for change in near
                .iter()
                .filter(|change| change.sectors.contains(&number))
            {
                let before = permitted[permitted.len() - 1];
                permitted.push(change.effect.apply(number, before));
            }
            let pinned = self
                .model
                .check_sector(number, &permitted, found, "after the kill")?;
            self.model.update(number..number + 1, |_, _| pinned);
        }
        Ok(())
    }

    /// Writes the pinned states as a new state file.
    pub(crate) fn save_pinned(&self, path: &Path) -> Result<(), Error> {
        let model = &self.model;
        save(
            path,
            model.key,
            model.next_version(),
            self.base.as_deref(),
            model.states(),
            &[],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::fill_range;
    use super::*;

    const KEY: u64 = 0x51;

    fn permitted(journal: Journal) -> Permitted {
        let model = Model::restored(KEY, journal.durable, None, 100);
        Permitted {
            model,
            base: None,
            changes: journal.changes,
        }
    }

    fn content(sector: u64, version: u32) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR_BYTES];
        fill_range(KEY, sector, version, &mut bytes);
        bytes
    }

    /// Sector 1: version 5 flushed; then 6 completed while the flush ran, 7 never completed.
    fn three_writes_one_flush() -> Journal {
        let mut journal = Journal::new(&Model::zeroed(KEY, 4));
        let first = journal.submit(1..2, Effect::Write(5));
        journal.complete(first);
        let mark = journal.flush_mark();
        let second = journal.submit(1..2, Effect::Write(6));
        journal.complete(second);
        journal.flushed(mark);
        journal.submit(1..2, Effect::Write(7));
        journal
    }

    #[test]
    fn flushed_and_later_contents_are_permitted() {
        for version in [5, 6, 7] {
            let mut permitted = permitted(three_writes_one_flush());
            permitted.check(1, &content(1, version)).unwrap();
        }
    }

    #[test]
    fn content_older_than_the_flush_is_a_miscompare() {
        let mut permitted = permitted(three_writes_one_flush());
        let zeroes = [0; SECTOR_BYTES];
        assert!(matches!(
            permitted.check(1, &zeroes),
            Err(Error::Miscompare { sector: 1, .. })
        ));
    }

    #[test]
    fn a_torn_sector_is_a_miscompare() {
        let mut torn = content(1, 5);
        torn[256..].copy_from_slice(&content(1, 6)[256..]);
        let outcome = permitted(three_writes_one_flush()).check(1, &torn);
        assert!(
            outcome
                .unwrap_err()
                .to_string()
                .contains("torn at byte 256")
        );
    }

    #[test]
    fn the_bytes_of_another_sector_are_a_miscompare() {
        let outcome = permitted(three_writes_one_flush()).check(1, &content(2, 5));
        assert!(
            outcome
                .unwrap_err()
                .to_string()
                .contains("version 5 of sector 2")
        );
    }

    #[test]
    fn what_was_seen_after_a_kill_is_pinned() {
        let mut permitted = permitted(three_writes_one_flush());
        permitted.check(1, &content(1, 6)).unwrap();
        assert_eq!(permitted.model.states()[1], State::version(6));
    }

    #[test]
    fn a_write_in_flight_when_the_flush_was_submitted_is_not_durable() {
        let mut journal = Journal::new(&Model::zeroed(KEY, 4));
        let write = journal.submit(0..1, Effect::Write(5));
        let mark = journal.flush_mark();
        journal.complete(write);
        journal.flushed(mark);
        permitted(journal).check(0, &[0; SECTOR_BYTES]).unwrap();
    }

    #[test]
    fn a_discard_zeroes_the_whole_clusters_and_leaves_the_edges_open() {
        let segment = Segment {
            sector: 7,
            sectors: 18,
            unmap: false,
        };
        let effect = Effect::discard(&segment, 8);
        assert_eq!(
            effect,
            Effect::Discard {
                zero_from: 8,
                zero_to: 24
            }
        );
        let before = State::version(9);
        assert_eq!(effect.apply(7, before), before.or_zero());
        assert_eq!(effect.apply(8, before), State::ZERO);
        assert_eq!(effect.apply(24, before), before.or_zero());
    }
}
