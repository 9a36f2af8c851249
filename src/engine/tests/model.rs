//! What each sector of a disk may hold, and random work of several workers against it.
//!
//! A write is a *version* of the sectors that it covers, with the moments at which it began and
//! ended. A version may be seen by who looks since moment `t` unless another one began after its end
//! and itself ended before `t`. That one rule judges reads (`t`: when the read began), the content
//! after a power cut (`t`: when the last flush that completed began) and truly overlapping requests.

use std::collections::BTreeSet;
use std::ops::Range;

use super::build::{Fill, Recipe};
use super::support::{Mix, Rig, Violation, chaos, seed, seeds};
use crate::engine::OpenOptions;
use crate::units::to_usize;

/// Version of a new image's data.
pub(super) const INITIAL: u32 = 1;
/// Version of a backing file's data.
pub(super) const BACKING: u32 = 2;
/// Versions from here on are writes.
const FIRST_WRITE: u32 = 16;

/// The bytes of a version of a sector: every word says which it is. Version 0 is zeroes.
pub(super) fn sector_bytes(sector: u64, version: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    if version != 0 {
        let word = (sector + 1) << 32 | u64::from(version);
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// Which version of which sector these bytes are; `None` for a mixture or something else.
fn parse(bytes: &[u8]) -> Option<(u64, u32)> {
    let mut words = bytes
        .chunks_exact(8)
        .map(|chunk| chunk.try_into().map_or(0, u64::from_le_bytes));
    let first = words.next()?;
    if words.any(|word| word != first) {
        return None;
    }
    Some((
        (first >> 32).wrapping_sub(1),
        u32::try_from(first & 0xffff_ffff).ok()?,
    ))
}

#[derive(Clone, Copy, Debug)]
struct Version {
    value: u32,
    start: u64,
    /// `u64::MAX` while it is in flight.
    end: u64,
    /// It certainly took place once it has ended (not a failed write, not a discard).
    certain: bool,
}

/// See the module text.
#[derive(Clone, Debug)]
pub(super) struct Model {
    sectors: Vec<Vec<Version>>,
    now: u64,
    next: u32,
    /// When the latest completed flush began.
    flushed: u64,
    /// When the reads and flushes in flight began.
    watching: BTreeSet<u64>,
}

/// A change in flight.
pub(super) struct Change {
    sectors: Range<u64>,
    start: u64,
}

impl Model {
    pub(super) fn new(values: impl Iterator<Item = u32>) -> Self {
        let initial = |value| {
            vec![Version {
                value,
                start: 0,
                end: 0,
                certain: true,
            }]
        };
        Self {
            sectors: values.map(initial).collect(),
            now: 1,
            next: FIRST_WRITE,
            flushed: 1,
            watching: BTreeSet::new(),
        }
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A new version, for a write.
    pub(super) fn new_value(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    pub(super) fn begin(&mut self, sectors: Range<u64>, value: u32, certain: bool) -> Change {
        let start = self.tick();
        let oldest = self
            .flushed
            .min(self.watching.first().copied().unwrap_or(u64::MAX));
        for sector in sectors.clone() {
            let versions = &mut self.sectors[to_usize(sector)];
            if versions.len() > 8 {
                let all = versions.clone();
                versions.retain(|version| !is_superseded(&all, version, oldest));
            }
            versions.push(Version {
                value,
                start,
                end: u64::MAX,
                certain,
            });
        }
        Change { sectors, start }
    }

    pub(super) fn end(&mut self, change: &Change, succeeded: bool) {
        let end = self.tick();
        for sector in change.sectors.clone() {
            let versions = &mut self.sectors[to_usize(sector)];
            for version in versions
                .iter_mut()
                .filter(|version| version.start == change.start)
            {
                version.end = end;
                version.certain &= succeeded;
            }
        }
    }

    /// A read or a flush begins.
    pub(super) fn watch(&mut self) -> u64 {
        let start = self.tick();
        self.watching.insert(start);
        start
    }

    pub(super) fn unwatch(&mut self, start: u64) {
        self.watching.remove(&start);
    }

    pub(super) fn flushed(&mut self, start: u64) {
        self.flushed = self.flushed.max(start);
    }

    pub(super) fn flush_floor(&self) -> u64 {
        self.flushed
    }

    /// Judges bytes that somebody saw who has been looking since `since`.
    pub(super) fn judge(&self, first: u64, bytes: &[u8], since: u64) -> Result<(), Violation> {
        for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
            let versions = &self.sectors[to_usize(sector)];
            let fault = match parse(bytes) {
                None => "a mixture".to_owned(),
                Some((found, value)) if value != 0 && found != sector => {
                    format!("version {value} of sector {found}")
                }
                Some((_, value)) => {
                    let mut same = versions.iter().filter(|version| version.value == value);
                    if same.any(|version| !is_superseded(versions, version, since)) {
                        continue;
                    }
                    format!("version {value}")
                }
            };
            return Err(Violation(format!(
                "sector {sector} holds {fault} since {since}; it had {versions:?}"
            )));
        }
        Ok(())
    }

    /// Judges a snapshot that was asked for at `called` and there at `returned`: one instant between
    /// them. Whatever completed before a write in it was submitted is in it, too.
    pub(super) fn judge_snapshot(
        &self,
        bytes: &[u8],
        called: u64,
        returned: u64,
    ) -> Result<(), Violation> {
        let mut newest = called;
        for (versions, bytes) in self.sectors.iter().zip(bytes.chunks(512)) {
            // Zeroes do not say which write they are of.
            let seen = parse(bytes).filter(|(_, value)| *value != 0);
            let version =
                seen.and_then(|(_, value)| versions.iter().find(|version| version.value == value));
            newest = newest.max(version.map_or(0, |version| version.start));
        }
        if newest > returned {
            return Err(Violation(format!(
                "holds what was submitted at {newest}, after it was there at {returned}"
            )));
        }
        self.judge(0, bytes, newest)
            .map_err(|error| Violation(format!("is no instant ({called} to {returned}): {error}")))
    }

    /// What bytes that were judged make the model of a disk that starts again from them.
    pub(super) fn restart(bytes: &[u8]) -> Self {
        let values = bytes
            .chunks(512)
            .map(|bytes| parse(bytes).map_or(0, |(_, value)| value));
        let mut model = Self::new(values.collect::<Vec<_>>().into_iter());
        // Not to be mistaken for a version of before.
        model.next = 1 << 24;
        model
    }
}

fn is_superseded(versions: &[Version], version: &Version, since: u64) -> bool {
    versions
        .iter()
        .any(|later| later.certain && version.end < later.start && later.end < since)
}

/// Every kind of image, small enough for many of them.
pub(super) fn kinds() -> Vec<(&'static str, Recipe)> {
    let mixed = |cluster: u64| match cluster % 6 {
        0 | 1 => Fill::Data,
        2 => Fill::Zero,
        3 => Fill::ZeroKept,
        4 => Fill::Compressed,
        _ => Fill::None,
    };
    let version_2 = |cluster: u64| match cluster % 3 {
        0 => Fill::Data,
        1 => Fill::Compressed,
        _ => Fill::None,
    };
    let plain = Recipe::plain;
    vec![
        ("512-byte clusters", plain(9, 192 << 10)),
        (
            "1-bit refcounts",
            Recipe {
                refcount_order: 0,
                ..plain(9, 128 << 10)
            },
        ),
        (
            "2-bit refcounts",
            Recipe {
                refcount_order: 1,
                ..plain(10, 128 << 10)
            },
        ),
        (
            "4-bit refcounts",
            Recipe {
                refcount_order: 2,
                ..plain(11, 128 << 10)
            },
        ),
        (
            "8-bit refcounts",
            Recipe {
                refcount_order: 3,
                ..plain(9, 128 << 10)
            },
        ),
        (
            "32-bit refcounts",
            Recipe {
                refcount_order: 5,
                ..plain(9, 192 << 10)
            },
        ),
        (
            "64-bit refcounts",
            Recipe {
                refcount_order: 6,
                ..plain(9, 192 << 10)
            },
        ),
        (
            "4 KiB clusters",
            Recipe {
                fill: mixed,
                ..plain(12, 512 << 10)
            },
        ),
        (
            "64 KiB clusters",
            Recipe {
                fill: mixed,
                ..plain(16, 1 << 20)
            },
        ),
        ("2 MiB clusters", plain(21, 4 << 20)),
        (
            "unaligned size",
            Recipe {
                fill: mixed,
                ..plain(12, (256 << 10) + 1536)
            },
        ),
        (
            "version 2",
            Recipe {
                version: 2,
                fill: version_2,
                ..plain(12, 256 << 10)
            },
        ),
        (
            "version 2 with a backing file",
            Recipe {
                version: 2,
                backing: Some(100 << 10),
                ..plain(12, 192 << 10)
            },
        ),
        (
            "backing file",
            Recipe {
                fill: mixed,
                backing: Some(150 << 9),
                ..plain(11, 192 << 10)
            },
        ),
        (
            "snapshot",
            Recipe {
                fill: mixed,
                snapshot: true,
                ..plain(10, 128 << 10)
            },
        ),
        (
            "snapshot, backing file, no holes",
            Recipe {
                fill: mixed,
                snapshot: true,
                backing: Some(100 << 10),
                can_punch: false,
                ..plain(9, 128 << 10)
            },
        ),
        (
            "version 2 snapshot",
            Recipe {
                version: 2,
                fill: version_2,
                snapshot: true,
                ..plain(10, 128 << 10)
            },
        ),
        (
            "device",
            Recipe {
                fill: mixed,
                device: Some(400),
                can_punch: false,
                ..plain(11, 256 << 10)
            },
        ),
        (
            "autoclear",
            Recipe {
                autoclear: 1 << 40,
                ..plain(12, 128 << 10)
            },
        ),
        (
            "refcount table grows",
            Recipe {
                refcount_order: 6,
                fill: |cluster| {
                    if cluster < 3800 {
                        Fill::Data
                    } else {
                        Fill::None
                    }
                },
                ..plain(9, 3 << 20)
            },
        ),
    ]
}

/// Random work of several workers, closed and opened again; everything is judged all the time.
fn random_work(recipe: Recipe, seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::new(recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..3 {
        let options = OpenOptions {
            l2_cache_size: Some([1 << 10, 16 << 10, 1 << 20][random.usize(..3)]),
            l2_cache_entry_size: [Some(512), None][random.usize(..2)],
            refcount_cache_size: Some([0, 1 << 20][random.usize(..2)]),
            discard: random.u8(..4) > 0,
            ..OpenOptions::default()
        };
        rig.open(&options)?;
        for _ in 0..random.u64(1..5) {
            let worker = rig.worker();
            let random = random.fork();
            rig.driver.spawn(chaos(worker, random, 60, Mix::ALL));
        }
        rig.run()?;
        rig.close()?;
        rig.judge_closed()?;
    }
    Ok(())
}

#[test]
fn random_work_on_every_kind_of_image_agrees_with_the_model() {
    for (name, recipe) in kinds() {
        for seed in seeds(6) {
            if let Err(violation) = random_work(recipe, seed) {
                panic!("{name}, SEED={seed}: {violation}");
            }
        }
    }
}

#[test]
fn the_model_knows_wrong_content() {
    let mut model = Model::new([INITIAL, INITIAL].into_iter());
    let value = model.new_value();
    let change = model.begin(0..1, value, true);
    let since = model.watch();
    assert!(
        model.judge(0, &sector_bytes(0, INITIAL), since).is_ok(),
        "in flight: old"
    );
    assert!(
        model.judge(0, &sector_bytes(0, value), since).is_ok(),
        "in flight: new"
    );
    assert!(
        model.judge(1, &sector_bytes(1, value), since).is_err(),
        "never written"
    );
    assert!(
        model.judge(1, &sector_bytes(0, INITIAL), since).is_err(),
        "another sector's"
    );
    model.end(&change, true);
    assert!(
        model.judge(0, &sector_bytes(0, INITIAL), since).is_ok(),
        "began before the end"
    );
    let later = model.watch();
    assert!(
        model.judge(0, &sector_bytes(0, INITIAL), later).is_err(),
        "lost"
    );
    assert!(
        model
            .judge(0, &sector_bytes(0, INITIAL), model.flush_floor())
            .is_ok(),
        "not flushed"
    );
    let mut torn = sector_bytes(0, value);
    torn[500] ^= 1;
    assert!(
        model.judge(0, &torn, since).is_err(),
        "torn within a sector"
    );
    assert_ne!(seed(), 0);
}
