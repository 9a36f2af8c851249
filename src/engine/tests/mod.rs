//! Tests of the engine as a whole, over real files and over the simulated disk.
//!
//! - `referee`: random work on real files, judged by `qemu-img`.
//! - `model`: random work of several workers against a model of every sector.
//! - `crash`: the power goes at every step (`cuts`). `faults`: every operation fails once.
//! - `gaps`: another thread comes between two statements.
//! - `hazards`: one dangerous interleaving per test. `rules`: every ordering rule is switched off
//!   once, and the others must notice.
//! - `oracle`: every snapshot that is taken under load is one instant.
//! - `snapshot_crash`: the power goes while snapshots come and go.
//! - `external`: an overlay takes the place of the image (`stage`), and the power goes.
//!   `external_faults`: every operation of that fails once.
//! - `snapshot_faults`: every operation of what snapshots do fails once.
//! - `snapshot`: snapshots taken and deleted under load, and the background work for them.
//! - `threads`: real threads on a real file.
//!
//! A failing test prints its seed; `SEED=n cargo test ...` replays it.

mod broken;
mod build;
mod crash;
mod cuts;
mod external;
mod external_faults;
mod faults;
mod gaps;
mod hazards;
mod model;
mod oracle;
mod rebuild;
mod referee;
mod revert;
mod rules;
mod snapshot;
mod snapshot_crash;
mod snapshot_faults;
mod stage;
mod support;
mod threads;
