//! Every ordering rule is switched off once, and the other tests' harness must notice.

use std::collections::HashSet;

use super::broken::{Broken, notices};
use super::crash::{Scenario, run, scenarios};
use super::hazards;
use crate::engine::order::Rule;

/// The scenario that a rule is for, tried first.
fn suspects(rule: Rule) -> Vec<Scenario> {
    let likely = match rule {
        Rule::DataBeforeL2 | Rule::TableBeforeL1 | Rule::DataBeforeLink => "copy on write of",
        Rule::UnlinkBeforeRelease | Rule::PinBeforeReuse | Rule::PunchBeforeReuse => "discard",
        Rule::PadReused | Rule::ZeroNewTable => "a device",
        Rule::JoinLaterFlush => "many queues",
        Rule::BlockBeforeName => "growth with",
        Rule::TableBeforeHeader => "growth of",
        Rule::RefcountBeforeL2
        | Rule::SyncAtEnd
        | Rule::TakeBeforeChange
        | Rule::LengthBeforeUse => "allocating",
        // Those of `Rule::SNAPSHOT` have tests of their own.
        _ => "",
    };
    let mut all = scenarios();
    all.sort_by_key(|scenario| !scenario.name.starts_with(likely));
    all
}

/// Seeds to try for each scenario.
const SEEDS: u64 = 12;

#[test]
fn every_rule_is_missed_when_it_is_broken() {
    for rule in Rule::ALL {
        let _broken = Broken::new(rule);
        let noticed = suspects(rule).iter().find_map(|scenario| {
            (1..=SEEDS).find_map(|seed| {
                notices(|| run(scenario, seed, 4, 2000, &mut HashSet::new()).map(drop))
                    .or_else(|| notices(|| hazards::all(seed)))
                    .map(|violation| format!("{} (seed {seed}): {violation}", scenario.name))
            })
        });
        let told = noticed.unwrap_or_else(|| panic!("nobody notices that {rule:?} is broken"));
        log::info!("{rule:?}: {told}");
    }
}
