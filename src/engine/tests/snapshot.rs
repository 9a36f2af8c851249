//! Snapshots taken and deleted under load, and the background work: afterwards the image is clean,
//! without a leak or a wrong copied flag, and every snapshot holds what the disk held.

use super::build::{Fill, Recipe};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, seeds, violation};
use crate::engine::{BackgroundKind, ErrorKind, OpenOptions, Step};
use crate::format::Header;
use crate::storage::sim::{OpKind, yield_now};

fn mixed(cluster: u64) -> Fill {
    match cluster % 6 {
        0 | 1 => Fill::Data,
        2 => Fill::Zero,
        3 => Fill::ZeroKept,
        4 => Fill::Compressed,
        _ => Fill::None,
    }
}

fn version_2(cluster: u64) -> Fill {
    match cluster % 3 {
        0 => Fill::Data,
        1 => Fill::Compressed,
        _ => Fill::None,
    }
}

/// Images that can have snapshots.
fn kinds() -> Vec<(&'static str, Recipe)> {
    let plain = |bits, size| Recipe {
        fill: mixed,
        ..Recipe::plain(bits, size)
    };
    let width = |order, bits, size| Recipe {
        refcount_order: order,
        ..plain(bits, size)
    };
    vec![
        ("512-byte clusters", plain(9, 96 << 10)),
        (
            "2-bit refcounts",
            Recipe {
                fill: |_| Fill::Data,
                ..width(1, 9, 64 << 10)
            },
        ),
        (
            "4-bit refcounts",
            Recipe {
                fill: |_| Fill::Data,
                ..width(2, 10, 96 << 10)
            },
        ),
        ("8-bit refcounts", width(3, 9, 96 << 10)),
        ("32-bit refcounts", width(5, 9, 96 << 10)),
        ("64-bit refcounts", width(6, 9, 128 << 10)),
        ("4 KiB clusters", plain(12, 384 << 10)),
        ("64 KiB clusters", plain(16, 1 << 20)),
        (
            "all data",
            Recipe {
                fill: |_| Fill::Data,
                ..plain(10, 192 << 10)
            },
        ),
        (
            "a snapshot and a backing file",
            Recipe {
                snapshot: true,
                backing: Some(100 << 10),
                ..plain(9, 96 << 10)
            },
        ),
        (
            "version 2",
            Recipe {
                version: 2,
                fill: version_2,
                ..plain(9, 96 << 10)
            },
        ),
        (
            "version 2 with a snapshot",
            Recipe {
                version: 2,
                fill: version_2,
                snapshot: true,
                ..plain(11, 128 << 10)
            },
        ),
        (
            "device",
            Recipe {
                device: Some(1500),
                can_punch: false,
                ..plain(9, 64 << 10)
            },
        ),
    ]
}

fn is_dirty(rig: &Rig) -> bool {
    Header::decode(&rig.disk.contents(IMAGE)).is_ok_and(|header| header.is_dirty())
}

/// Random creates and deletes.
async fn commands(client: Client, mut random: fastrand::Rng, count: u32, names: &'static str) {
    for number in 0..count {
        for _ in 0..random.u32(0..200) {
            yield_now().await;
        }
        let there: Vec<String> = client.snapshots.borrow().keys().cloned().collect();
        let own: Vec<_> = there
            .iter()
            .filter(|name| name.starts_with(names))
            .collect();
        let result = if own.is_empty() || random.u8(..3) > 0 {
            let result = client.snapshot(&format!("{names}{number}")).await;
            result.map(drop)
        } else {
            client.delete(own[random.usize(..own.len())]).await
        };
        match result {
            // Refcounts without room.
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(error) => client.complain(error.chain()),
            Ok(()) => {}
        }
    }
}

fn options(random: &mut fastrand::Rng) -> OpenOptions {
    OpenOptions {
        l2_cache_size: Some([1 << 10, 16 << 10, 1 << 20][random.usize(..3)]),
        l2_cache_entry_size: [Some(512), None][random.usize(..2)],
        refcount_cache_size: Some([0, 1 << 20][random.usize(..2)]),
        discard: random.u8(..4) > 0,
        ..OpenOptions::default()
    }
}

/// The work of before is done, and the file says so.
fn judge_settled(rig: &mut Rig) -> Result<(), Violation> {
    rig.settle()?;
    if is_dirty(rig) || !rig.image().background().is_empty() {
        return violation("dirty, although nothing is left to do");
    }
    if rig
        .image()
        .snapshots()
        .iter()
        .any(|snapshot| snapshot.unsettled)
    {
        return violation("unsettled, although nothing is left to do");
    }
    rig.close()?;
    rig.judge_closed()?;
    rig.judge_snapshots()
}

fn under_load(recipe: Recipe, seed: u64) -> Result<(), Violation> {
    let mut rig = Rig::new(recipe, seed);
    let mut random = fastrand::Rng::with_seed(seed);
    for round in ["a", "b"] {
        rig.open(&options(&mut random))?;
        for _ in 0..random.u64(1..4) {
            let load = chaos(rig.worker(), random.fork(), 60, Mix::ALL);
            rig.driver.spawn(load);
        }
        let work = commands(rig.worker(), random.fork(), 6, round);
        let commands = rig.driver.spawn(work);
        let settler = rig.worker();
        let keen = random.u32(1..40);
        rig.driver.spawn(async move {
            while !commands.is_done() && !settler.is_bad() {
                match settler.worker.background_step().await {
                    Ok(_) => {}
                    Err(error) => settler.complain(error.chain()),
                }
                for _ in 0..keen {
                    yield_now().await;
                }
            }
        });
        rig.run()?;
        judge_settled(&mut rig)?;
    }
    // Everything goes: what is left is one tree, all ours.
    rig.open(&OpenOptions::default())?;
    let client = rig.worker();
    let mut names: Vec<String> = rig
        .image()
        .snapshots()
        .into_iter()
        .map(|s| s.name)
        .collect();
    random.shuffle(&mut names);
    rig.block_on(async move {
        for name in names {
            client.delete(&name).await.expect("it is there");
        }
    });
    judge_settled(&mut rig)
}

#[test]
fn snapshots_under_load_leave_a_clean_image_with_their_content() {
    for (name, recipe) in kinds() {
        for seed in seeds(12) {
            if let Err(violation) = under_load(recipe, seed) {
                panic!("{name}, SEED={seed}: {violation}");
            }
        }
    }
}
