//! The power goes at every step: what all tests of that share.
//!
//! A scenario runs once. Whenever an operation was submitted or has completed, the disk is copied as
//! some power cuts would leave it (unflushed sectors kept or lost in random subsets, writes torn
//! between sectors), and each copy that was not seen before is judged. What that means is the test's.

use std::collections::HashSet;

use super::support::{Rig, Violation, fingerprint, seeds, violation};
use crate::storage::FileId;
use crate::storage::sim::{CutMode, JoinHandle, Outcome, SimDisk};

/// Distinct states that each scenario must reach.
const STATES_MIN: usize = 500;

/// Where and how often the power goes in one run.
pub(super) struct Cuts<'a> {
    /// Cuts at each moment.
    pub(super) cuts: usize,
    /// It goes at one moment in so many.
    pub(super) moments: u8,
    /// No more states than that.
    pub(super) states_max: usize,
    /// What was judged, also in earlier runs.
    pub(super) seen: &'a mut HashSet<u64>,
}

/// A number for the content of all files.
fn state(disk: &SimDisk) -> u64 {
    (0..disk.file_count()).fold(0_u64, |state, file| {
        state.rotate_left(1) ^ fingerprint(&disk.contents(FileId(file)))
    })
}

impl Cuts<'_> {
    /// Runs `tasks` to their end. `judge` gets what a cut has left, a seed, and the state's number.
    pub(super) fn run(
        &mut self,
        rig: &mut Rig,
        tasks: &[JoinHandle<()>],
        random: &mut fastrand::Rng,
        mut judge: impl FnMut(Rig, u64, usize) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        loop {
            let disk = rig.disk.clone();
            let moment = move || (disk.ops(), disk.in_flight().len());
            let before = moment();
            let outcome = rig.driver.run_until(|| moment() != before);
            rig.verdict()?;
            if outcome == Outcome::Stuck {
                if tasks.iter().all(JoinHandle::is_done) {
                    return Ok(());
                }
                return violation("deadlock");
            }
            if self.seen.len() >= self.states_max || random.u8(..self.moments) != 0 {
                continue;
            }
            for _ in 0..self.cuts {
                let mode = match random.u8(..10) {
                    0 => CutMode::NothingUnflushed,
                    1 => CutMode::AllUnflushed,
                    2 | 3 => CutMode::AllButOneWrite,
                    _ => CutMode::Random,
                };
                let cut = rig.disk.power_cut(random, mode);
                if !self.seen.insert(state(&cut)) {
                    continue;
                }
                let seed = random.u64(..);
                let after = rig.after_cut(cut, seed);
                judge(after, seed, self.seen.len()).map_err(|violation| {
                    let trace = rig.disk.trace();
                    Violation(format!("{violation}\nbefore the cut ({mode:?}):\n{trace}"))
                })?;
            }
        }
    }
}

/// Runs a scenario with one seed after the other until enough states were judged. `run` stops at
/// `states_max` states.
pub(super) fn survives(
    name: &str,
    seeds_max: u64,
    run: impl Fn(u64, usize, &mut HashSet<u64>) -> Result<(), Violation>,
) {
    let mut seen = HashSet::new();
    let replay = std::env::var_os("SEED").is_some();
    for seed in seeds(seeds_max) {
        if let Err(violation) = run(seed, STATES_MIN + 50, &mut seen) {
            panic!("{name}, SEED={seed}: {violation}");
        }
        if seen.len() >= STATES_MIN {
            break;
        }
    }
    assert!(
        replay || seen.len() >= STATES_MIN,
        "{name}: only {} distinct states",
        seen.len()
    );
}

/// A test for each scenario of a list, by its name, which `$survives` gets; and one that none is
/// missing.
macro_rules! cut_tests {
    ($all:ident, $survives:ident: $($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                $survives($name);
            }
        )*

        #[test]
        fn each_has_its_test() {
            let names = [$($name),*];
            assert!($all().iter().map(|one| one.name).eq(names));
        }
    };
}
pub(super) use cut_tests;
