//! A power cut: when it comes, and what it leaves of what is not durable.

use std::collections::BTreeSet;

use fastrand::Rng;

/// When the power goes. Counted from 1 over changing operations (everything but reads).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutPoint {
    /// Instead of submitting the n-th: it never happens.
    Before(u64),
    /// With the n-th submitted but not completed.
    During(u64),
    /// When the n-th has completed, before anybody hears of it.
    After(u64),
}

/// What a power cut leaves of what is not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutMode {
    /// Each sector (or each operation, as the seed has it) by itself.
    Random,
    /// Nothing.
    NothingUnflushed,
    /// Everything, also of operations in flight.
    AllUnflushed,
    /// Everything but one operation.
    AllButOneWrite,
}

impl CutMode {
    /// Decides what becomes of the operations that are not durable.
    pub(super) fn choice(self, unflushed: BTreeSet<u64>, rng: &mut Rng) -> Choice<'_> {
        let chance = [0.05, 0.5, 0.95][rng.usize(..3)];
        let kept = match self {
            CutMode::NothingUnflushed => Some(BTreeSet::new()),
            CutMode::AllUnflushed => Some(unflushed),
            CutMode::AllButOneWrite => {
                let lost = rng.choice(unflushed.iter().copied());
                Some(
                    unflushed
                        .into_iter()
                        .filter(|&op| Some(op) != lost)
                        .collect(),
                )
            }
            CutMode::Random if rng.bool() => Some(
                unflushed
                    .into_iter()
                    .filter(|_| rng.f64() < chance)
                    .collect(),
            ),
            CutMode::Random => None,
        };
        Choice { chance, kept, rng }
    }
}

/// What is left after one cut.
pub(super) struct Choice<'a> {
    /// How likely an operation leaves something.
    chance: f64,
    /// The operations that leave all they did; `None`: each sector chooses for itself.
    kept: Option<BTreeSet<u64>>,
    rng: &'a mut Rng,
}

impl Choice<'_> {
    /// Which of the versions that these operations made of one sector stays; `None`: the durable one.
    pub(super) fn version(&mut self, ops: &[u64]) -> Option<usize> {
        let Choice { chance, kept, rng } = self;
        match kept {
            Some(kept) => ops.iter().rposition(|op| kept.contains(op)),
            None if ops.is_empty() || rng.f64() >= *chance => None,
            None if rng.bool() => Some(ops.len() - 1),
            None => Some(rng.usize(..ops.len())),
        }
    }
}
