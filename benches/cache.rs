//! What a lookup of the metadata cache costs, from 16 to 1 000 000 slots, beside a plain array load
//! and two older designs.
//!
//! ```text
//! cargo bench --bench cache [-- --quick] [--sizes 16,1000,1000000]
//! ```
//!
//! One operation finds a slice by its host offset and loads one of its entries. Who is measured:
//!
//! - `array`: the reference, `slices[number][index]`: a plain array of boxed slices of the same
//!   size, indexed by the slice number. The least that a cache of separate bodies can do.
//! - `flat`: `entries[number * len + index]`, one load from one array. No cache can be like this,
//!   since nothing in it can be evicted or found by offset; it shows what memory alone costs.
//! - `get`: our directory on the fast path, where a lookup pins nothing and so needs no put.
//! - `get+put`: our directory for a request that suspends: get, pin in the put table, put by ticket.
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
//! lookup, and what the goal is about: a request's lookup stands between its descriptor and its I/O,
//! with hundreds of instructions around it. `apart` are hits in random order that do not depend on each other, so that the processor
//! overlaps them: the rate of lookups in a tight loop that does nothing else. `mixed` is `chained`
//! with one lookup in eight for one of all slices, of which there are an eighth more than slots; the
//! design replaces what it chooses, and a body that is missing is there without I/O. The array has
//! all slices then, and never replaces any.
//!
//! The goal: `get` takes at most 1.5 times as long as `array` at every size, pattern `chained`, and
//! the same number of instructions. `get+put` has no such goal: its pins are atomic, and a request
//! that suspends waits for far more than that.
//!
//! A slice has 512 entries (4 KiB) as long as a copy of all stays below 64 MiB, fewer above: the
//! line `entries` says how many.
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

use qblkd::engine::cache::{CacheCounters, Directory, SliceBody, SliceKey};
use qblkd::units::HostOffset;

/// 4 KiB slices, the default.
const SLICE_BITS: u32 = 12;
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
/// The goal for `get`, as a multiple of `array`.
const RATIO_MAX: f64 = 1.5;

/// The table of one slice in the file. Not zero, so that an empty place of a baseline matches none.
fn offset_of(number: usize) -> u64 {
    (number as u64 + 16) << SLICE_BITS
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

/// The entries of a slice: each holds the slice's number, so that a wrong answer shows.
fn entries(number: usize, len: usize) -> impl Iterator<Item = AtomicU64> {
    (0..len).map(move |_| AtomicU64::new(number as u64))
}

/// One lookup of a pattern.
#[derive(Clone, Copy)]
struct Step {
    number: u32,
    index: u32,
}

/// Slices `0..slots` are resident before a pattern starts.
fn pattern(slots: usize, len: usize, mixed: bool) -> Vec<Step> {
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
            let number = u32::try_from(random.usize(..among)).unwrap_or(0);
            let index = u32::try_from(random.usize(..len)).unwrap_or(0);
            Step { number, index }
        })
        .collect()
}

/// Slices there are: those that fit, and an eighth more.
fn slices_in_all(slots: usize) -> usize {
    slots + slots.div_ceil(8)
}

/// Something that finds slices.
trait Cache {
    /// Loads entry `index` of slice `number`.
    fn look_up(&mut self, number: usize, index: usize) -> u64;
}

/// See `array` in the text above.
struct Array(Vec<Box<[AtomicU64]>>);

impl Array {
    fn new(slots: usize, len: usize) -> Self {
        Self(
            (0..slices_in_all(slots))
                .map(|number| entries(number, len).collect())
                .collect(),
        )
    }
}

impl Cache for Array {
    #[inline(always)]
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        self.0[number][index].load(Ordering::Acquire)
    }
}

/// See `flat` in the text above. Also the memory that the baselines' tables are in.
#[derive(Clone)]
struct Flat {
    entries: Arc<[AtomicU64]>,
    len: usize,
}

impl Flat {
    fn new(slots: usize, len: usize) -> Self {
        let entries = (0..slices_in_all(slots))
            .flat_map(|number| entries(number, len))
            .collect();
        Self { entries, len }
    }
}

impl Cache for Flat {
    #[inline(always)]
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        self.entries[number * self.len + index].load(Ordering::Acquire)
    }
}

/// Our directory; `bodies` stand for the store behind it.
struct Ours {
    directory: Directory,
    bodies: Arc<[Arc<SliceBody>]>,
}

/// The same for requests that suspend.
struct OursPinned(Ours);

fn bodies(slots: usize, len: usize) -> Arc<[Arc<SliceBody>]> {
    (0..slices_in_all(slots))
        .map(|number| {
            let key = SliceKey::new(0, HostOffset::new(offset_of(number)));
            Arc::new(SliceBody::new(key, entries(number, len).collect(), false))
        })
        .collect()
}

impl Ours {
    fn new(slots: usize, bodies: &Arc<[Arc<SliceBody>]>) -> Self {
        let mut directory = Directory::new(slots, Arc::new(CacheCounters::default()));
        for body in &bodies[..slots] {
            directory.install(Arc::clone(body), SLICE_BITS);
        }
        Self {
            directory,
            bodies: Arc::clone(bodies),
        }
    }

    /// The directory has not got it.
    #[cold]
    fn load(&mut self, number: usize) -> Arc<SliceBody> {
        let body = Arc::clone(&self.bodies[number]);
        self.directory.install(Arc::clone(&body), SLICE_BITS);
        body
    }
}

impl Cache for Ours {
    #[inline(always)]
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        let key = SliceKey::new(0, HostOffset::new(offset_of(number)));
        match self.directory.get(key, SLICE_BITS) {
            Some(found) => found.entry(index).0,
            None => self.load(number).entry(index).0,
        }
    }
}

impl Cache for OursPinned {
    #[inline(always)]
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        let Self(ours) = self;
        let key = SliceKey::new(0, HostOffset::new(offset_of(number)));
        let body = match ours.directory.get(key, SLICE_BITS) {
            Some(found) => Arc::clone(found.body()),
            None => ours.load(number),
        };
        let ticket = ours.directory.pin(&body);
        let entry = body.entry(index).0;
        ours.directory.put(&ticket);
        entry
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
    fn new(slots: usize, flat: &Flat, start: fn(u64, usize) -> usize) -> Self {
        let mut places = vec![Place::default(); slots];
        let mut free_from: HashMap<usize, usize> = HashMap::new();
        for number in 0..slots {
            let offset = offset_of(number);
            let first = start(offset, slots);
            // Goes on where the last search from this start ended: places only fill.
            let mut place = free_from.get(&first).copied().unwrap_or(first);
            while places[place].offset != 0 {
                place = (place + 1) % slots;
            }
            free_from.insert(first, place);
            places[place] = Place {
                offset,
                table: number * flat.len,
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
    fn get(&mut self, number: usize, start: usize) -> usize {
        let offset = offset_of(number);
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
                self.places[place].table = number * self.flat.len;
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
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        let got = self.0.get(number, 0);
        let table = self.0.places[got].table;
        let entry = self.0.flat.entries[table + index].load(Ordering::Acquire);
        if let Some(place) = self.0.places.iter().position(|seen| seen.table == table) {
            self.0.put(place);
        }
        entry
    }
}

/// The design of today.
struct Probe(Table);

/// Where a search starts: neighbours four places apart.
fn probe_start(offset: u64, slots: usize) -> usize {
    usize::try_from(offset >> SLICE_BITS).unwrap_or(0) * 4 % slots
}

impl Cache for Probe {
    #[inline(always)]
    fn look_up(&mut self, number: usize, index: usize) -> u64 {
        let start = probe_start(offset_of(number), self.0.places.len());
        let place = self.0.get(number, start);
        let table = self.0.places[place].table;
        let entry = self.0.flat.entries[table + index].load(Ordering::Acquire);
        self.0.put(place);
        entry
    }
}

/// Runs lookups whose numbers depend on the entries before. Every entry holds its slice's number, so
/// `carried` stays 0, which the processor cannot know. Returns what `carried` was at the end.
#[inline(never)]
fn run_chained<C: Cache>(cache: &mut C, steps: &[Step], from: &mut usize, count: usize) -> u64 {
    let mut carried = 0;
    for _ in 0..count {
        let step = steps[*from & (steps.len() - 1)];
        *from += 1;
        let number = u64::from(step.number) ^ carried;
        let entry = cache.look_up(usize::try_from(number).unwrap_or(0), step.index as usize);
        carried = entry ^ number;
    }
    carried
}

/// Runs lookups that do not depend on each other. Returns 0 when each entry was the right one.
#[inline(never)]
fn run_apart<C: Cache>(cache: &mut C, steps: &[Step], from: &mut usize, count: usize) -> u64 {
    let mut wrong = 0;
    for _ in 0..count {
        let step = steps[*from & (steps.len() - 1)];
        *from += 1;
        wrong |= cache.look_up(step.number as usize, step.index as usize) ^ u64::from(step.number);
    }
    wrong
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

/// Runs so many lookups of a pattern from a place in it on. Returns 0 when all answers were right.
type Run = dyn FnMut(Pattern, &[Step], &mut usize, usize) -> u64;

/// One column of the report.
struct Case {
    name: &'static str,
    run: Box<Run>,
    /// Where in the pattern it is.
    from: usize,
    /// Lookups per round.
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
        // The case before has filled the processor's caches with its own.
        self.round(pattern, steps);
        let took = self.round(pattern, steps);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let each = took.as_nanos() as f64 / self.count as f64;
        self.best = self.best.min(each);
        each
    }
}

const NAMES: [&str; 6] = ["array", "flat", "get", "get+put", "scan", "probe"];

/// What the cases of one size share, so that few copies of the slices exist.
struct Size {
    slots: usize,
    len: usize,
    flat: Flat,
    bodies: Arc<[Arc<SliceBody>]>,
}

impl Size {
    fn new(slots: usize, name: Option<&str>) -> Self {
        let len = entries_for(slots);
        let wants = |names: &[&str]| name.is_none_or(|name| names.contains(&name));
        let flat = if wants(&["flat", "scan", "probe"]) {
            slots
        } else {
            0
        };
        let ours = if wants(&["get", "get+put"]) { slots } else { 0 };
        Self {
            slots,
            len,
            flat: Flat::new(flat, len),
            bodies: bodies(ours, len),
        }
    }

    fn case(&self, name: &str) -> Option<Case> {
        let table = |start| Table::new(self.slots, &self.flat, start);
        Some(match name {
            "array" => Case::new("array", Array::new(self.slots, self.len)),
            "flat" => Case::new("flat", self.flat.clone()),
            "get" => Case::new("get", Ours::new(self.slots, &self.bodies)),
            "get+put" => Case::new("get+put", OursPinned(Ours::new(self.slots, &self.bodies))),
            "scan" => Case::new("scan", Scan(table(|_, _| 0))),
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
fn measure_size(
    out: &mut impl Write,
    pattern_kind: Pattern,
    size: &Size,
    rounds: usize,
    goal: Duration,
) -> io::Result<f64> {
    let steps = pattern(size.slots, size.len, pattern_kind == Pattern::Mixed);
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
    write!(out, "{:>9} {:>8}", size.slots, size.len)?;
    let mut worst = f64::NAN;
    for (case, ratios) in cases.iter().zip(ratios) {
        let ratio = middle(ratios);
        match case.name {
            "array" => write!(out, " {:>9.1}", case.best)?,
            "scan" | "probe" => write!(out, " {:>12.1} {ratio:>9.2}", case.best)?,
            _ => write!(out, " {:>8.1} {ratio:>5.2}", case.best)?,
        }
        if case.name == "get" {
            worst = ratio;
        }
    }
    writeln!(out)?;
    out.flush()?;
    Ok(worst)
}

fn report(out: &mut impl Write, sizes: &[usize], rounds: usize, goal: Duration) -> io::Result<()> {
    writeln!(
        out,
        "ns per lookup (shortest of {rounds} rounds); x: ratio to the array (median)"
    )?;
    let mut worst = [0_f64; Pattern::ALL.len()];
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
            *worst = worst.max(measure_size(out, kind, &size, rounds, goal)?);
        }
    }
    writeln!(out)?;
    for (kind, worst) in Pattern::ALL.into_iter().zip(worst) {
        let verdict = match kind {
            Pattern::Chained if worst <= RATIO_MAX => format!(" (goal {RATIO_MAX}: met)"),
            Pattern::Chained => format!(" (goal {RATIO_MAX}: MISSED)"),
            Pattern::Apart | Pattern::Mixed => String::new(),
        };
        writeln!(
            out,
            "get, {}: at most {worst:.2} x the array{verdict}",
            kind.name()
        )?;
    }
    Ok(())
}

/// One case with a given number of lookups, hits in random order.
fn run_one(name: &str, slots: usize, count: usize) -> Result<(), String> {
    let size = Size::new(slots, Some(name));
    let mut case = size
        .case(name)
        .ok_or_else(|| format!("no case '{name}': {NAMES:?}"))?;
    let steps = pattern(slots, size.len, false);
    case.count = count;
    case.round(Pattern::Chained, &steps);
    Ok(())
}

/// Every case and pattern once, with the answers checked.
fn run_as_test() {
    for slots in [16, 100] {
        let size = Size::new(slots, None);
        for kind in Pattern::ALL {
            let steps = pattern(slots, size.len, kind == Pattern::Mixed);
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
