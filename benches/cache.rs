//! What a lookup of the metadata cache costs, from 16 to 1 000 000 slots, beside a plain array load
//! and two older designs.
//!
//! ```text
//! cargo bench --bench cache [-- --quick] [--sizes 16,1000,1000000]
//! ```
//!
//! One operation finds a slice by its host offset and loads one of its entries. Who is measured:
//!
//! - `array`: the reference, `slices[offset / slice_size][index]`: a plain array of boxed slices of
//!   the same size. The least that a cache of separate bodies can do.
//! - `flat`: `entries[offset / 8 + index]`, one load from one array. No cache can be like this,
//!   since nothing in it can be evicted; it shows what memory alone costs.
//! - `get`: our directory on the fast path, where a lookup pins nothing and so needs no put.
//! - `get+put`: our directory for a request that may suspend: get and pin, load, put by ticket.
//! - `scan`: the design of 2015: a table of cached slices, searched from the start by offset to get
//!   and again by address to put.
//! - `probe`: the design of today: the search starts at a hash of the offset and goes on to the next
//!   place until it matches, and remembers the least recently used place on its way as the victim;
//!   put computes the place from the address.
//!
//! The older two are written from their published ideas. Their tables lie in one allocation, so that
//! put can tell a table by its address; ours are boxed one by one, as the engine has them.
//!
//! Patterns, all from fixed seeds and made before the clock runs: `chained` are hits in random
//! order, where the next lookup depends on the entry that the last one loaded: the time of one
//! lookup. `apart` are hits in random order that do not depend on each other, so that the processor
//! overlaps them: the rate of lookups in a tight loop that does nothing else. `mixed` is `chained`
//! with one lookup in eight for one of all slices, of which there are an eighth more than slots; the
//! design replaces what it chooses, and a body that is missing is there without I/O. The array has
//! all slices then.
//!
//! A slice has 512 entries (4 KiB) as long as a copy of all stays below 64 MiB, fewer above: the
//! line `entries` says how many.
//!
//! A slice's offset is its number times its size, so that the array needs no more than a shift.
//!
//! `--callgrind-case NAME SLOTS ITERATIONS` runs one case and nothing else, for
//! `contrib/bench/cache-instructions.sh`. Without `--bench`, which `cargo bench` adds, all cases run
//! once at a small size, as a test.

use std::collections::HashMap;
use std::env;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qblkd::engine::cache::{CacheCounters, Directories, Directory, SliceBody, SliceKey};
use qblkd::units::HostOffset;

/// 4 KiB slices, the default.
const ENTRIES_MAX: usize = 512;
/// The fewest entries that fill a cache line.
const ENTRIES_MIN: usize = 8;
const BYTES_MAX: usize = 64 << 20;
/// Lookups of a pattern before it repeats.
const PATTERN_MAX: usize = 1 << 21;
const SIZES: &[usize] = &[
    16, 64, 256, 1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000,
];
const SIZES_QUICK: &[usize] = &[16, 1_000, 64_000, 1_000_000];
/// What the array may be exceeded by.
const RATIO_MAX: f64 = 1.5;

/// The number of the first slice: an empty place of a baseline, whose offset is 0, matches none.
const FIRST: usize = 1;

/// Slices of one size.
#[derive(Clone, Copy)]
struct Shape {
    /// Entries of a slice: a power of two.
    len: usize,
    /// The size of a slice as a power of two.
    bits: u32,
}

impl Shape {
    fn new(len: usize) -> Self {
        Self {
            len,
            bits: (len * 8).trailing_zeros(),
        }
    }

    fn offset_of(self, number: usize) -> u64 {
        (number as u64) << self.bits
    }

    #[inline]
    fn number_of(self, offset: u64) -> usize {
        usize::try_from(offset >> self.bits).unwrap_or(0)
    }

    /// The entries of a slice: each holds the slice's offset, so that a wrong answer shows.
    fn entries(self, number: usize) -> impl Iterator<Item = AtomicU64> {
        let offset = self.offset_of(number);
        (0..self.len).map(move |_| AtomicU64::new(offset))
    }
}

/// How many entries a slice has when there are `count` slices.
fn entries_for(count: usize) -> usize {
    let most = BYTES_MAX / 8 / count.max(1);
    let power = if most.is_power_of_two() {
        most
    } else {
        most.next_power_of_two() / 2
    };
    power.clamp(ENTRIES_MIN, ENTRIES_MAX)
}

/// One lookup of a pattern.
#[derive(Clone, Copy)]
struct Step {
    offset: u64,
    index: usize,
}

/// The first `slots` slices are resident before a pattern starts.
fn pattern(slots: usize, shape: Shape, mixed: bool) -> Vec<Step> {
    let mut random = fastrand::Rng::with_seed(0x7162_6c6b_6400 + slots as u64);
    let all = if mixed { slices_in_all(slots) } else { slots };
    let count = (slots * 16).next_power_of_two().clamp(1 << 16, PATTERN_MAX);
    (0..count)
        .map(|_| {
            let among = if mixed && random.u32(..8) == 0 {
                all
            } else {
                slots
            };
            let number = FIRST + random.usize(..among);
            Step {
                offset: shape.offset_of(number),
                index: random.usize(..shape.len),
            }
        })
        .collect()
}

/// Slices there are: those that fit, and an eighth more.
fn slices_in_all(slots: usize) -> usize {
    slots + slots.div_ceil(8)
}

/// The numbers from 0 to the last slice's.
fn numbers(slots: usize) -> std::ops::Range<usize> {
    0..FIRST + slices_in_all(slots)
}

/// Something that finds slices. What misses is done outside of the loop of hits, for everybody. All are inlined by force, lest a call and the registers that it saves
/// are measured for some of them.
trait Cache {
    /// Loads entry `index` of the slice at `offset`. `None`: it is not here.
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64>;

    /// Does what is left to do for a lookup that was answered `None`.
    fn miss(&mut self, offset: u64, index: usize) -> u64;
}

/// The `miss` of a cache that has everything or brings it in `look_up`.
macro_rules! never_misses {
    () => {
        fn miss(&mut self, offset: u64, _index: usize) -> u64 {
            unreachable!("{offset:#x} was not found")
        }
    };
}

/// See `array` in the text above.
struct Array {
    slices: Vec<Box<[AtomicU64]>>,
    shape: Shape,
}

impl Array {
    fn new(slots: usize, shape: Shape) -> Self {
        let slices = numbers(slots)
            .map(|number| shape.entries(number).collect())
            .collect();
        Self { slices, shape }
    }
}

impl Cache for Array {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        Some(self.slices[self.shape.number_of(offset)][index].load(Ordering::Acquire))
    }

    never_misses!();
}

/// See `flat` in the text above. Also the memory that the baselines' tables are in.
#[derive(Clone)]
struct Flat {
    entries: Arc<[AtomicU64]>,
    shape: Shape,
}

impl Flat {
    fn new(slots: usize, shape: Shape) -> Self {
        let entries = numbers(slots)
            .flat_map(|number| shape.entries(number))
            .collect();
        Self { entries, shape }
    }

    /// Where the entries of a slice start.
    #[inline]
    fn start_of(offset: u64) -> usize {
        usize::try_from(offset / 8).unwrap_or(0)
    }
}

impl Cache for Flat {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        Some(self.entries[Self::start_of(offset) + index].load(Ordering::Acquire))
    }

    never_misses!();
}

/// Our directory; `bodies` stand for the store behind it.
struct Ours {
    directory: Directory,
    bodies: Arc<[Arc<SliceBody>]>,
    shape: Shape,
}

fn bodies(slots: usize, shape: Shape) -> Arc<[Arc<SliceBody>]> {
    // First the entries of all, so that they lie as close together as those of the array.
    let entries: Vec<_> = numbers(slots)
        .map(|number| shape.entries(number).collect())
        .collect();
    let body = |(number, entries)| {
        let key = SliceKey::new(0, HostOffset::new(shape.offset_of(number)));
        Arc::new(SliceBody::new(key, entries, false))
    };
    numbers(slots).zip(entries).map(body).collect()
}

impl Ours {
    fn new(slots: usize, bodies: &Arc<[Arc<SliceBody>]>, shape: Shape) -> Self {
        let counters = Arc::new(CacheCounters::default());
        let mut directory = Directory::new(slots, counters, &Directories::default());
        for body in &bodies[FIRST..FIRST + slots] {
            directory.install(Arc::clone(body), shape.bits);
        }
        Self {
            directory,
            bodies: Arc::clone(bodies),
            shape,
        }
    }

    /// Brings a slice that the directory does not have.
    #[cold]
    #[inline(never)]
    fn bring(&mut self, offset: u64, index: usize, pins: bool) -> u64 {
        let body = &self.bodies[self.shape.number_of(offset)];
        self.directory.install(Arc::clone(body), self.shape.bits);
        if pins {
            let ticket = self.directory.pin(body);
            self.directory.put(&ticket);
        }
        body.entry(index).0
    }
}

impl Cache for Ours {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        let key = SliceKey::new(0, HostOffset::new(offset));
        let found = self.directory.get(key, self.shape.bits)?;
        Some(found.entry(index).0)
    }

    fn miss(&mut self, offset: u64, index: usize) -> u64 {
        self.bring(offset, index, false)
    }
}

/// Our directory, for lookups of requests that may suspend.
struct OursPinned(Ours);

impl Cache for OursPinned {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        let Self(ours) = self;
        let key = SliceKey::new(0, HostOffset::new(offset));
        let (found, ticket) = ours.directory.get_pinned(key, ours.shape.bits)?;
        let entry = found.entry(index).0;
        ours.directory.put(&ticket);
        Some(entry)
    }

    fn miss(&mut self, offset: u64, index: usize) -> u64 {
        self.0.bring(offset, index, true)
    }
}

/// A place in the table of a baseline.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Host offset of the slice that is here; 0: none.
    offset: u64,
    /// Where its entries are. In the published designs each place has its own memory, which a miss
    /// reads into; here, where nothing is read, it is the slice's.
    table: usize,
    /// When it was last put.
    used_at: u64,
    /// Gets without a put yet.
    users: u32,
}

/// The baselines' table. `scan` and `probe` differ in the search only.
struct Table {
    places: Vec<Place>,
    flat: Flat,
    clock: u64,
}

impl Table {
    /// All places taken, each slice where a search for it finds it soonest.
    fn new(slots: usize, flat: &Flat, start: fn(u64, Shape, usize) -> usize) -> Self {
        let mut places = vec![Place::default(); slots];
        let mut free_from: HashMap<usize, usize> = HashMap::new();
        for number in FIRST..FIRST + slots {
            let offset = flat.shape.offset_of(number);
            let first = start(offset, flat.shape, slots);
            // Goes on where the last search from this start ended: places only fill.
            let mut place = free_from.get(&first).copied().unwrap_or(first);
            while places[place].offset != 0 {
                place = (place + 1) % slots;
            }
            free_from.insert(first, place);
            places[place] = Place {
                offset,
                table: Flat::start_of(offset),
                used_at: number as u64,
                users: 0,
            };
        }
        Self {
            places,
            flat: flat.clone(),
            clock: slots as u64,
        }
    }

    /// Searches all places once, from `start`, for a match, else for the victim.
    #[inline]
    fn get(&mut self, offset: u64, start: usize) -> usize {
        let mut oldest = u64::MAX;
        let mut victim = start;
        let mut place = start;
        loop {
            let seen = &self.places[place];
            if seen.offset == offset {
                break;
            }
            if seen.users == 0 && seen.used_at < oldest {
                oldest = seen.used_at;
                victim = place;
            }
            place += 1;
            if place == self.places.len() {
                place = 0;
            }
            if place == start {
                place = victim;
                self.places[place].offset = offset;
                self.places[place].table = Flat::start_of(offset);
                break;
            }
        }
        self.places[place].users += 1;
        place
    }

    #[inline]
    fn put(&mut self, place: usize) {
        let seen = &mut self.places[place];
        seen.users -= 1;
        if seen.users == 0 {
            self.clock += 1;
            seen.used_at = self.clock;
        }
    }
}

/// The design of 2015.
struct Scan(Table);

impl Cache for Scan {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        let got = self.0.get(offset, 0);
        let table = self.0.places[got].table;
        let entry = self.0.flat.entries[table + index].load(Ordering::Acquire);
        if let Some(place) = self.0.places.iter().position(|seen| seen.table == table) {
            self.0.put(place);
        }
        Some(entry)
    }

    never_misses!();
}

/// The design of today.
struct Probe(Table);

/// Where a search starts: neighbours four places apart.
fn probe_start(offset: u64, shape: Shape, slots: usize) -> usize {
    shape.number_of(offset) * 4 % slots
}

impl Cache for Probe {
    #[inline(always)]
    fn look_up(&mut self, offset: u64, index: usize) -> Option<u64> {
        let start = probe_start(offset, self.0.flat.shape, self.0.places.len());
        let place = self.0.get(offset, start);
        let table = self.0.places[place].table;
        let entry = self.0.flat.entries[table + index].load(Ordering::Acquire);
        self.0.put(place);
        Some(entry)
    }

    never_misses!();
}

/// Where in a pattern a run is.
#[derive(Clone, Copy)]
struct Progress {
    at: usize,
    end: usize,
    /// `carried` or `wrong`.
    found: u64,
}

impl Progress {
    fn new(at: usize, count: usize) -> Self {
        Self {
            at,
            end: at + count,
            found: 0,
        }
    }
}

/// Runs lookups whose offsets depend on the entries before. Every entry holds its slice's offset, so
/// `carried` stays 0, which the processor cannot know. Returns what `carried` was at the end.
fn run_chained<C: Cache>(cache: &mut C, steps: &[Step], from: &mut usize, count: usize) -> u64 {
    let mut progress = Progress::new(*from, count);
    while let Some(step) = chained_hits(cache, steps, &mut progress) {
        progress.found = cache.miss(step.offset, step.index) ^ step.offset;
    }
    *from = progress.end;
    progress.found
}

/// Goes on to the end, or to a lookup that misses, and returns that.
#[inline(never)]
fn chained_hits<C: Cache>(cache: &mut C, steps: &[Step], progress: &mut Progress) -> Option<Step> {
    let Progress {
        mut at,
        end,
        found: mut carried,
    } = *progress;
    let mut missed = None;
    while at < end {
        let step = steps[at & (steps.len() - 1)];
        at += 1;
        let offset = step.offset ^ carried;
        let Some(entry) = cache.look_up(offset, step.index) else {
            missed = Some(Step { offset, ..step });
            break;
        };
        carried = entry ^ offset;
    }
    progress.at = at;
    progress.found = carried;
    missed
}

/// Runs lookups that do not depend on each other. Returns 0 when each entry was the right one.
fn run_apart<C: Cache>(cache: &mut C, steps: &[Step], from: &mut usize, count: usize) -> u64 {
    let mut progress = Progress::new(*from, count);
    while let Some(step) = apart_hits(cache, steps, &mut progress) {
        progress.found |= cache.miss(step.offset, step.index) ^ step.offset;
    }
    *from = progress.end;
    progress.found
}

/// As [`chained_hits`].
#[inline(never)]
fn apart_hits<C: Cache>(cache: &mut C, steps: &[Step], progress: &mut Progress) -> Option<Step> {
    let Progress {
        mut at,
        end,
        found: mut wrong,
    } = *progress;
    let mut missed = None;
    while at < end {
        let step = steps[at & (steps.len() - 1)];
        at += 1;
        let Some(entry) = cache.look_up(step.offset, step.index) else {
            missed = Some(step);
            break;
        };
        wrong |= entry ^ step.offset;
    }
    progress.at = at;
    progress.found = wrong;
    missed
}

/// How a pattern is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pattern {
    Chained,
    Apart,
    Mixed,
}

impl Pattern {
    const ALL: [Self; 3] = [Self::Chained, Self::Apart, Self::Mixed];

    fn name(self) -> &'static str {
        match self {
            Self::Chained => "chained",
            Self::Apart => "apart",
            Self::Mixed => "mixed",
        }
    }
}

/// Does so many steps of a pattern from a place on, and moves the place; returns how many entries
/// were of another slice.
type Run = Box<dyn FnMut(Pattern, &[Step], &mut usize, usize) -> u64>;

/// One column of the report.
struct Case {
    name: &'static str,
    run: Run,
    /// Where in the pattern it is.
    from: usize,
    /// Lookups of a round.
    count: usize,
    /// The shortest round, in ns per lookup.
    best: f64,
}

impl Case {
    fn new<C: Cache + 'static>(name: &'static str, mut cache: C) -> Self {
        let run = Box::new(move |pattern, steps: &[Step], from: &mut usize, count| {
            if pattern == Pattern::Apart {
                run_apart(&mut cache, steps, from, count)
            } else {
                run_chained(&mut cache, steps, from, count)
            }
        });
        Self {
            name,
            run,
            from: 0,
            count: 16,
            best: f64::INFINITY,
        }
    }

    fn round(&mut self, pattern: Pattern, steps: &[Step]) -> Duration {
        let start = Instant::now();
        let wrong = (self.run)(pattern, steps, &mut self.from, self.count);
        let took = start.elapsed();
        assert_eq!(wrong, 0, "{} found an entry of another slice", self.name);
        took
    }

    /// Finds how many lookups a round of `goal` has, which also warms the caches.
    fn calibrate(&mut self, pattern: Pattern, steps: &[Step], goal: Duration) {
        while self.round(pattern, steps) < goal {
            self.count *= 2;
        }
    }

    fn measure(&mut self, pattern: Pattern, steps: &[Step]) -> f64 {
        // Who ran before has left other slices in the processor's caches, or the same.
        self.round(pattern, steps);
        let took = self.round(pattern, steps);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let each = took.as_nanos() as f64 / self.count as f64;
        self.best = self.best.min(each);
        each
    }
}

const NAMES: [&str; 6] = ["array", "flat", "get", "get+put", "scan", "probe"];
/// Those of them that are judged by [`RATIO_MAX`].
const OURS: [&str; 2] = ["get", "get+put"];

/// What the cases of one size share, so that few copies of the slices exist.
struct Size {
    slots: usize,
    shape: Shape,
    flat: Flat,
    bodies: Arc<[Arc<SliceBody>]>,
}

impl Size {
    fn new(slots: usize, name: Option<&str>) -> Self {
        let shape = Shape::new(entries_for(slots));
        let wants = |names: &[&str]| name.is_none_or(|name| names.contains(&name));
        let flat = if wants(&["flat", "scan", "probe"]) {
            slots
        } else {
            0
        };
        let ours = if wants(&["get", "get+put"]) { slots } else { 0 };
        Self {
            slots,
            shape,
            flat: Flat::new(flat, shape),
            bodies: bodies(ours, shape),
        }
    }

    fn case(&self, name: &str) -> Option<Case> {
        let table = |start| Table::new(self.slots, &self.flat, start);
        let ours = || Ours::new(self.slots, &self.bodies, self.shape);
        Some(match name {
            "array" => Case::new("array", Array::new(self.slots, self.shape)),
            "flat" => Case::new("flat", self.flat.clone()),
            "get" => Case::new("get", ours()),
            "get+put" => Case::new("get+put", OursPinned(ours())),
            "scan" => Case::new("scan", Scan(table(|_, _, _| 0))),
            "probe" => Case::new("probe", Probe(table(probe_start))),
            _ => return None,
        })
    }
}

/// The middle of the ratios of one case to the first, round by round.
fn middle(mut ratios: Vec<f64>) -> f64 {
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures all cases at one size in turn, so that a slow spell of the machine hits all of them.
/// Returns the ratios of [`OURS`].
fn measure_size(
    out: &mut impl Write,
    pattern_kind: Pattern,
    size: &Size,
    rounds: usize,
    goal: Duration,
) -> io::Result<[f64; OURS.len()]> {
    let steps = pattern(size.slots, size.shape, pattern_kind == Pattern::Mixed);
    let mut cases: Vec<Case> = NAMES.iter().filter_map(|name| size.case(name)).collect();
    for case in &mut cases {
        case.calibrate(pattern_kind, &steps, goal);
    }
    let mut ratios = vec![Vec::new(); cases.len()];
    for _ in 0..rounds {
        let mut array = f64::NAN;
        for (case, ratios) in cases.iter_mut().zip(&mut ratios) {
            let each = case.measure(pattern_kind, &steps);
            if case.name == "array" {
                array = each;
            }
            ratios.push(each / array);
        }
    }
    write!(out, "{:>9} {:>8}", size.slots, size.shape.len)?;
    let mut ours = [f64::NAN; OURS.len()];
    for (case, ratios) in cases.iter().zip(ratios) {
        let ratio = middle(ratios);
        match case.name {
            "array" => write!(out, " {:>9.1}", case.best)?,
            "scan" | "probe" => write!(out, " {:>12.1} {ratio:>9.2}", case.best)?,
            _ => write!(out, " {:>8.1} {ratio:>5.2}", case.best)?,
        }
        if let Some(place) = OURS.iter().position(|name| *name == case.name) {
            ours[place] = ratio;
        }
    }
    writeln!(out)?;
    out.flush()?;
    Ok(ours)
}

fn report(out: &mut impl Write, sizes: &[usize], rounds: usize, goal: Duration) -> io::Result<()> {
    writeln!(
        out,
        "ns per lookup (shortest of {rounds} rounds); x: ratio to the array (median)"
    )?;
    let mut worst = [[0_f64; OURS.len()]; Pattern::ALL.len()];
    for (kind, worst) in Pattern::ALL.into_iter().zip(&mut worst) {
        writeln!(out, "\npattern {}", kind.name())?;
        writeln!(
            out,
            "{:>9} {:>8} {:>9} {:>8} {:>5} {:>8} {:>5} {:>8} {:>5} {:>12} {:>9} {:>12} {:>9}",
            "slots",
            "entries",
            "array",
            "flat",
            "x",
            "get",
            "x",
            "get+put",
            "x",
            "scan",
            "x",
            "probe",
            "x"
        )?;
        for &slots in sizes {
            let size = Size::new(slots, None);
            let ratios = measure_size(out, kind, &size, rounds, goal)?;
            for (worst, ratio) in worst.iter_mut().zip(ratios) {
                *worst = worst.max(ratio);
            }
        }
    }
    writeln!(out)?;
    for (kind, worst) in Pattern::ALL.into_iter().zip(worst) {
        for (name, worst) in OURS.iter().zip(worst) {
            let met = if worst <= RATIO_MAX {
                "within"
            } else {
                "above"
            };
            writeln!(
                out,
                "{name}, {}: at most {worst:.2} x the array: {met} {RATIO_MAX}",
                kind.name()
            )?;
        }
    }
    Ok(())
}

/// One case with a given number of lookups, hits in random order.
fn run_one(name: &str, slots: usize, count: usize) -> Result<(), String> {
    let size = Size::new(slots, Some(name));
    let mut case = size
        .case(name)
        .ok_or_else(|| format!("no case '{name}': {NAMES:?}"))?;
    let steps = pattern(slots, size.shape, false);
    case.count = count;
    case.round(Pattern::Chained, &steps);
    Ok(())
}

/// Every case and pattern once, with the answers checked.
fn run_as_test() {
    for slots in [16, 100] {
        let size = Size::new(slots, None);
        for kind in Pattern::ALL {
            let steps = pattern(slots, size.shape, kind == Pattern::Mixed);
            for mut case in NAMES.iter().filter_map(|name| size.case(name)) {
                case.count = 2_000;
                case.round(kind, &steps);
            }
        }
    }
}

#[derive(Default)]
struct Args {
    bench: bool,
    quick: bool,
    sizes: Option<Vec<usize>>,
    one: Option<(String, usize, usize)>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut parsed = Args::default();
    let number = |text: Option<String>| {
        let text = text.ok_or("a number is missing")?;
        text.parse::<usize>()
            .map_err(|error| format!("'{text}': {error}"))
    };
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => parsed.bench = true,
            "--quick" => parsed.quick = true,
            "--sizes" => {
                let list = args.next().ok_or("--sizes: a list is missing")?;
                let sizes: Result<Vec<_>, _> = list
                    .split(',')
                    .map(|text| number(Some(text.to_owned())))
                    .collect();
                let sizes = sizes?;
                if let Some(size) = sizes.iter().find(|size| !(16..=1 << 24).contains(*size)) {
                    return Err(format!("{size} slots: must be 16 to {}", 1 << 24));
                }
                parsed.sizes = Some(sizes);
            }
            "--callgrind-case" => {
                let name = args.next().ok_or("--callgrind-case: a name is missing")?;
                parsed.one = Some((name, number(args.next())?, number(args.next())?));
            }
            // What `cargo test` and its harness say to every target.
            "--test" | "--nocapture" | "-q" | "--quiet" => {}
            other => {
                return Err(format!(
                    "unknown argument '{other}': --quick, --sizes N,.., --callgrind-case NAME \
                     SLOTS ITERATIONS"
                ));
            }
        }
    }
    Ok(parsed)
}

fn run() -> Result<(), String> {
    let args = parse(env::args().skip(1))?;
    if let Some((name, slots, count)) = args.one {
        return run_one(&name, slots, count);
    }
    if !args.bench {
        run_as_test();
        return Ok(());
    }
    let (sizes, rounds, goal) = if args.quick {
        (SIZES_QUICK, 7, Duration::from_millis(10))
    } else {
        (SIZES, 15, Duration::from_millis(40))
    };
    let sizes = args.sizes.as_deref().unwrap_or(sizes);
    report(&mut io::stdout().lock(), sizes, rounds, goal).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Nobody is left to tell when stderr is gone.
            let _ = writeln!(io::stderr(), "error: {message}");
            ExitCode::FAILURE
        }
    }
}
