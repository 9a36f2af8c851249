//! Snapshots taken and deleted under load, and the background work: afterwards the image is clean,
//! without a leak or a wrong copied flag, and every snapshot holds what the disk held.

use super::build::{Fill, Hollow, Recipe};
use super::support::{Client, IMAGE, Mix, Rig, Violation, chaos, seeds, violation};
use crate::engine::{BackgroundKind, ErrorKind, NewSnapshot, OpenOptions, Selector, Step};
use crate::format::geometry::{SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use crate::format::{Header, SnapshotEntry, refcount};
use crate::storage::sim::{CutMode, OpKind, yield_now};
use crate::units::to_usize;

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
        // Without those that are not committed yet (v2).
        let there = client.worker.image().snapshots().into_iter();
        let there: Vec<String> = there.map(|snapshot| snapshot.name).collect();
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
        if random.bool() {
            let memory = [0, 64, 4 << 10][random.usize(..3)];
            let window = random.u64(1..200);
            rig.image().limit_memory(random.usize(1..9), window, memory);
        }
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

fn all_data() -> Recipe {
    Recipe {
        fill: |_| Fill::Data,
        ..Recipe::plain(12, 4 << 20)
    }
}

fn opened(recipe: Recipe) -> Rig {
    let mut rig = Rig::new(recipe, 1);
    rig.open(&OpenOptions::default()).expect("opens");
    rig
}

fn done(mut rig: Rig) {
    judge_settled(&mut rig).unwrap_or_else(|violation| panic!("{violation}"));
}

/// Three trees, each with something of its own, none of them counted when the middle one goes.
#[test]
fn several_unsettled_snapshots_and_a_delete_are_worked_off_in_order() {
    let mut rig = opened(all_data());
    let client = rig.worker();
    let kinds = rig.block_on(async move {
        for (name, first) in [("a", 0), ("b", 300), ("c", 4000)] {
            client.snapshot(name).await.expect("a snapshot");
            client.write(first, 40).await.expect("a write");
            client.discard(first + 100, 64).await.expect("a discard");
        }
        client.delete("b").await.expect("a delete");
        let done = client.settle().await;
        done.into_iter()
            .map(|status| (status.kind, status.name, status.done == status.total))
            .collect::<Vec<_>>()
    });
    let expected = [
        (BackgroundKind::Settle, "a"),
        (BackgroundKind::Settle, "b"),
        (BackgroundKind::Settle, "c"),
        (BackgroundKind::Delete, "b"),
    ];
    assert_eq!(
        kinds,
        expected.map(|(kind, name)| (kind, name.to_owned(), true))
    );
    done(rig);
}

/// What would be added and taken away again is not touched at all.
#[test]
fn a_snapshot_that_goes_before_it_is_settled_costs_no_walk() {
    let mut rig = opened(all_data());
    let client = rig.worker();
    let reads = rig.block_on(async move {
        client.snapshot("a").await.expect("a snapshot");
        client.write(77, 3).await.expect("a write");
        client.delete("a").await.expect("a delete");
        let disk = client.worker.storage().disk().clone();
        let before = disk.reads();
        let settled = client.worker.background_step().await.expect("a step");
        assert_eq!(settled, Step::Progress { bytes: 0 });
        assert!(client.worker.image().snapshots().is_empty());
        disk.reads() - before
    });
    assert_eq!(reads, 0);
    done(rig);
}

/// The last snapshot is gone: no write needs a new cluster any more.
#[test]
fn after_the_last_delete_everything_is_written_in_place() {
    let mut rig = opened(all_data());
    let client = rig.worker();
    rig.block_on(async move {
        client.snapshot("a").await.expect("a snapshot");
        client.settle().await;
        client.write(77, 3).await.expect("a write");
        let sectors = client.model.borrow().sectors();
        assert!(!client.is_in_place(200, 8), "shared with the snapshot");
        client.delete("a").await.expect("a delete");
        client.settle().await;
        for first in (0..sectors).step_by(8) {
            assert!(client.is_in_place(first, 8), "sector {first}");
        }
    });
    done(rig);
}

/// A request has taken a cluster and copies its old bytes, when the only other reference to them
/// goes: an owner now would write in place what the copy overtakes.
#[test]
fn a_taken_cluster_is_owned_again_only_after_it_is_given_back() {
    for seed in seeds(20) {
        let mut rig = Rig::new(all_data(), seed);
        rig.open(&OpenOptions::default()).expect("opens");
        let client = rig.worker();
        rig.block_on(async move {
            client.snapshot("a").await.expect("a snapshot");
            client.settle().await;
            // The table is copied now; the cluster of sector 8 is still shared.
            client.write(0, 1).await.expect("a write");
        });
        let writer = rig.worker();
        rig.disk.hold(|op| op.kind == OpKind::Write);
        let write = rig.driver.spawn(async move { writer.write(9, 1).await });
        rig.driver.run_until_stuck();
        let held: Vec<u64> = rig.disk.in_flight().iter().map(|op| op.id).collect();
        assert_eq!(held.len(), 1, "the copy of the cluster");
        rig.disk.hold(move |op| held.contains(&op.id));
        let deleter = rig.worker();
        let work = rig.driver.spawn_background(async move {
            deleter.delete("a").await.expect("a delete");
            deleter.settle().await
        });
        rig.driver.run_until_stuck();
        assert!(!write.is_done() && !work.is_done(), "nothing waits");
        let reader = rig.worker();
        assert!(
            !reader.is_in_place(8, 8),
            "SEED={seed}: owned while it is copied"
        );
        assert!(reader.is_in_place(16, 8), "SEED={seed}: others wait for it");
        rig.disk.release();
        rig.run().expect("no violation");
        rig.driver.run_until(|| work.is_done());
        assert!(reader.is_in_place(8, 8));
        done(rig);
    }
}

/// The engine took any name, and only the control socket knew the limit: an image could get two
/// snapshots that are one to QEMU's tools, which cut names off.
#[test]
fn a_name_that_qemu_cannot_pick_is_refused() {
    let mut rig = opened(Recipe::plain(12, 1 << 20));
    let client = rig.worker();
    rig.block_on(async move {
        let longest = "x".repeat(255);
        client.snapshot(&longest).await.expect("255 bytes");
        for name in ["", "a\0b", &"x".repeat(256), &"\u{e9}".repeat(128)] {
            let refused = client.snapshot(name).await.expect_err("no name");
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{name}");
        }
        client.settle().await;
    });
    done(rig);
}

/// A snapshot table that takes more clusters than a refcount block counts: the file grows by the table
/// and by new blocks behind it, one of which lay where another one counts, and nobody counted it.
#[test]
fn a_table_across_several_new_refcount_blocks_leaves_all_of_them_counted() {
    // 64 clusters to a block.
    let recipe = Recipe {
        refcount_order: 6,
        ..Recipe::plain(9, 64 << 10)
    };
    for count in [60, 150, 250, 400] {
        let mut rig = opened(recipe);
        let client = rig.worker();
        rig.block_on(async move {
            let new: Vec<_> = (0..count)
                .map(|number| NewSnapshot {
                    name: format!("{number:0255}"),
                    date_sec: 0,
                    date_nsec: 0,
                    vm_clock_nsec: 0,
                })
                .collect();
            let created = client.worker.create_snapshots(&new).await;
            assert_eq!(created.expect("snapshots").len(), count);
            client.settle().await;
        });
        let judged = rig.close().and_then(|()| rig.judge_closed());
        judged.unwrap_or_else(|violation| panic!("{count} snapshots: {violation}"));
    }
}

/// Refcounts of 2 bits have room for two snapshots. Who has deleted one and comes too early was told
/// to delete one.
#[test]
fn a_refusal_for_want_of_room_says_what_makes_room() {
    let recipe = Recipe {
        refcount_order: 1,
        ..Recipe::plain(12, 1 << 20)
    };
    let mut rig = opened(recipe);
    let client = rig.worker();
    rig.block_on(async move {
        client.snapshot("a").await.expect("a snapshot");
        client.snapshot("b").await.expect("a snapshot");
        let full = client.snapshot("c").await.expect_err("no room");
        assert!(full.to_string().contains("delete one first"), "{full}");
        client.delete("a").await.expect("a delete");
        let early = client.snapshot("c").await.expect_err("no room yet");
        assert!(early.to_string().contains("try again"), "{early}");
        client.settle().await;
        client.snapshot("c").await.expect("room");
        client.settle().await;
    });
    done(rig);
}

/// Refcounts of 4 bits and five compressed clusters in one host cluster: the third snapshot would
/// need 20 references.
#[test]
fn compressed_data_without_room_in_its_refcount_is_refused_before_the_instant() {
    let recipe = Recipe {
        fill: |cluster| {
            if cluster < 5 {
                Fill::Compressed
            } else {
                Fill::Data
            }
        },
        refcount_order: 2,
        ..Recipe::plain(12, 1 << 20)
    };
    for settle_first in [true, false] {
        let mut rig = opened(recipe);
        let client = rig.worker();
        rig.block_on(async move {
            let mut room = 0;
            let refused = loop {
                match client.snapshot(&format!("s{room}")).await {
                    Ok(_) => room += 1,
                    Err(error) => break error,
                }
                if settle_first {
                    client.settle().await;
                }
            };
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            assert!(refused.to_string().contains("compressed"), "{refused}");
            assert_eq!(room, 2);
        });
        done(rig);
    }
}

/// An image of which one cluster, the table at `0` or the data of an entry of it, has another count
/// in the file. The copied flags that contradict it go.
fn counted(recipe: Recipe, which: Option<u64>, count: u64) -> Rig {
    let rig = Rig::new(recipe, 1);
    let bytes = rig.disk.contents(IMAGE);
    let header = Header::decode(&bytes).expect("a header");
    let word = |at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    };
    let copied = 1 << 63;
    let mut at = header.l1_table_offset.get();
    if let Some(index) = which {
        at = (word(at) & 0x00ff_ffff_ffff_fe00) + index * 8;
    }
    let entry = word(at) & !copied;
    rig.disk.poke(IMAGE, at, &entry.to_be_bytes());
    let cluster = (entry & 0x00ff_ffff_ffff_ffff) >> recipe.cluster_bits;
    let block = word(header.refcount_table_offset.get());
    let geometry = recipe.geometry();
    let bytes_per_count = (1 << geometry.refcount_order()) / 8;
    let raw = count.to_be_bytes();
    let raw = &raw[8 - usize::try_from(bytes_per_count).expect("small")..];
    rig.disk.poke(IMAGE, block + cluster * bytes_per_count, raw);
    rig
}

fn full(order: u32, which: Option<u64>, count: u64) -> Rig {
    let recipe = Recipe {
        refcount_order: order,
        ..all_data()
    };
    let mut rig = counted(recipe, which, count);
    rig.open(&OpenOptions::default()).expect("opens");
    rig
}

/// As many snapshots as an image may have.
fn most_snapshots() -> Vec<SnapshotEntry> {
    let entry = |number: u32| SnapshotEntry {
        id: number.to_string().into_bytes(),
        name: format!("n{number}").into_bytes(),
        extra: SnapshotEntry::extra_data(0, 1 << 20, None),
        ..SnapshotEntry::default()
    };
    (1..=SNAPSHOTS_MAX).map(entry).collect()
}

/// A table that is as long as it may be but for 64 bytes: less than an entry.
fn longest_table() -> Vec<SnapshotEntry> {
    let entry = |number: usize, bytes: usize| SnapshotEntry {
        id: number.to_string().into_bytes(),
        name: vec![b'n'; bytes],
        extra: SnapshotEntry::extra_data(0, 1 << 20, None),
        ..SnapshotEntry::default()
    };
    let table_len = |entries: &[SnapshotEntry]| {
        let table = crate::format::snapshot::encode_table(entries).expect("a table");
        table.len()
    };
    let one = table_len(&[entry(100, 65_532)]);
    let wanted = to_usize(SNAPSHOT_TABLE_BYTES_MAX) - 64;
    let count = wanted / one - 1;
    let mut entries: Vec<_> = (100..100 + count)
        .map(|number| entry(number, 65_532))
        .collect();
    let empty = table_len(&[entry(1, 0)]);
    entries.push(entry(1, wanted - table_len(&entries) - empty));
    assert_eq!(table_len(&entries), wanted);
    entries
}

/// One more than the format allows, or longer than that: known before the instant, when clusters were
/// taken already.
#[test]
fn a_table_without_room_is_refused_before_the_instant_and_takes_nothing() {
    let tables: [Hollow; 2] = [most_snapshots, longest_table];
    let reasons = ["snapshots, more than 65536", "more than 0x4000000 bytes"];
    for (hollow, reason) in tables.into_iter().zip(reasons) {
        let recipe = Recipe {
            refcount_order: 5,
            fill: |_| Fill::Data,
            hollow: Some(hollow),
            ..Recipe::plain(16, 1 << 20)
        };
        let mut rig = opened(recipe);
        let before = rig.disk.contents(IMAGE).len();
        let client = rig.worker();
        let (refused, client) = rig.block_on(async move {
            client.write(5, 9).await.expect("a write");
            let refused = client.snapshot("a").await.expect_err("no room");
            (refused, client)
        });
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        let text = refused.to_string();
        assert!(text.contains("no room") && text.contains(reason), "{text}");
        assert!(!is_dirty(&rig) && rig.image().background().is_empty());
        assert!(client.is_in_place(5, 9), "something was frozen");
        drop(client);
        rig.close().expect("closes");
        assert_eq!(rig.disk.contents(IMAGE).len(), before, "clusters are kept");
        rig.judge_closed().expect("clean");
        // It was the table: with one less there is room.
        rig.open(&OpenOptions::default()).expect("opens");
        let client = rig.worker();
        rig.block_on(async move {
            let last = Selector {
                id: hollow()
                    .last()
                    .map(|entry| String::from_utf8(entry.id.clone()).expect("a number")),
                name: None,
            };
            client.worker.delete_snapshot(&last).await.expect("deleted");
            client.snapshot("a").await.expect("taken");
            client.settle().await;
        });
        rig.verdict().expect("no violation");
        rig.close().expect("closes");
        assert!(rig.check().expect("a report").is_clean());
    }
}

/// A count that nothing explains is at its maximum: a settle could not add to it.
#[test]
fn a_count_without_room_is_refused_before_the_instant_at_every_width() {
    for order in 3..=6 {
        for (which, steps_ahead) in [(None, 0), (Some(3), 1), (Some(3), 1000)] {
            let mut rig = full(order, which, refcount::most(order));
            let client = rig.worker();
            let refused = rig.block_on(async move {
                for _ in 0..steps_ahead {
                    client.worker.look_ahead().await.expect("a look");
                }
                // Not in the table at stake: it would be copied.
                client.write(5000, 9).await.expect("a write");
                let refused = client.snapshot("a").await.expect_err("no room");
                client.write(5008, 9).await.expect("a write");
                refused
            });
            assert_eq!(refused.kind(), ErrorKind::Unsupported, "{order}");
            assert!(refused.to_string().contains("have no room"), "{refused}");
            assert!(!is_dirty(&rig) && rig.image().background().is_empty());
        }
    }
}

/// The first snapshot need not look through all counts if there was time to do so before.
#[test]
fn a_look_ahead_spares_the_first_snapshot_the_reads() {
    let reads = [false, true].map(|looks_ahead| {
        let mut rig = opened(Recipe {
            fill: |_| Fill::Data,
            refcount_order: 6,
            ..Recipe::plain(9, 1 << 20)
        });
        let client = rig.worker();
        let reads = rig.block_on(async move {
            // The blocks that the snapshot itself needs are in memory.
            client.write(0, 9).await.expect("a write");
            client.flush().await.expect("a flush");
            while looks_ahead && client.worker.look_ahead().await.expect("a look") != Step::Idle {}
            let disk = client.worker.storage().disk().clone();
            let before = disk.reads();
            client.snapshot("a").await.expect("a snapshot");
            disk.reads() - before
        });
        done(rig);
        reads
    });
    assert!(reads[1] < reads[0], "{reads:?}");
}

/// Room for two: snapshots that are not settled yet need it, too, and a deleted one gives it back.
#[test]
fn snapshots_that_are_not_settled_count_for_the_room_of_the_next() {
    for order in 3..=6 {
        for settle_first in [true, false] {
            let mut rig = full(order, Some(3), refcount::most(order) - 2);
            let client = rig.worker();
            rig.block_on(async move {
                for name in ["a", "b"] {
                    client.snapshot(name).await.expect("there is room");
                    if settle_first {
                        client.settle().await;
                    }
                }
                let refused = client.snapshot("c").await.expect_err("no room");
                assert_eq!(refused.kind(), ErrorKind::Unsupported);
                client.settle().await;
                client.delete("a").await.expect("a delete");
                client.settle().await;
                client.snapshot("c").await.expect("there is room again");
                client.settle().await;
            });
            assert!(!is_dirty(&rig) && rig.image().background().is_empty());
        }
    }
}

/// A cluster that no snapshot would share may be counted as high as it likes.
#[test]
fn a_high_count_that_the_snapshot_does_not_share_is_no_reason_to_refuse() {
    let mut rig = full(4, Some(3), refcount::most(4));
    let client = rig.worker();
    rig.block_on(async move {
        // The cluster is copied: its count is the image's own business now.
        client.write(3 * 8, 8).await.expect("a write");
        client.flush().await.expect("a flush");
        client.snapshot("a").await.expect("a snapshot");
        client.settle().await;
    });
    assert!(!is_dirty(&rig) && rig.image().background().is_empty());
}

/// More than half of the counts of 16 bits can say, in one host cluster of compressed data.
#[test]
fn compressed_data_can_fill_a_count_of_16_bits() {
    const PIECES: u64 = 40_000;
    let recipe = Recipe {
        fill: |cluster| match cluster {
            0 => Fill::Compressed,
            _ => Fill::Zero,
        },
        ..Recipe::plain(9, PIECES << 9)
    };
    let mut rig = counted(recipe, Some(0), PIECES);
    let bytes = rig.disk.contents(IMAGE);
    let word = |at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    };
    let l1 = Header::decode(&bytes)
        .expect("a header")
        .l1_table_offset
        .get();
    let table = |index: u64| word(l1 + index * 8) & 0x00ff_ffff_ffff_fe00;
    let compressed = word(table(0));
    for piece in 1..PIECES {
        let at = table(piece / 64) + piece % 64 * 8;
        rig.disk.poke(IMAGE, at, &compressed.to_be_bytes());
    }
    rig.open(&OpenOptions::default()).expect("opens");
    let client = rig.worker();
    let refused = rig.block_on(async move { client.snapshot("a").await });
    let refused = refused.expect_err("80000 references");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("compressed"), "{refused}");
}

/// A damaged entry in a snapshot's table must not become a count of something else.
#[test]
fn a_damaged_entry_stops_the_work_with_an_error() {
    let recipe = Recipe {
        snapshot: true,
        ..all_data()
    };
    let bytes = recipe.build();
    let l1 = Header::decode(&bytes)
        .expect("a header")
        .l1_table_offset
        .get();
    let word = |at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    };
    let table = word(l1) & 0x00ff_ffff_ffff_fe00;
    let entry = word(table + 16);
    for damaged in [
        entry | 0x10,
        entry | 1 << 40,
        entry | 1 << 60,
        3 << 62 | 1 << 50,
    ] {
        let mut rig = opened(recipe);
        rig.disk.poke(IMAGE, table + 16, &damaged.to_be_bytes());
        let client = rig.worker();
        let error = rig.block_on(async move {
            client
                .delete("one")
                .await
                .expect("the table says nothing of it");
            loop {
                match client.worker.background_step().await {
                    Ok(Step::Progress { .. }) => {}
                    Ok(other) => panic!("{other:?}"),
                    Err(error) => break error,
                }
            }
        });
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{damaged:#x}");
        assert!(rig.image().has_failed());
    }
}

/// One operation of the background work fails; it goes on where it was, and counts nothing twice.
fn one_failure(
    recipe: Recipe,
    kind: OpKind,
    nth: u64,
    is_limited: bool,
) -> Result<bool, Violation> {
    let mut rig = Rig::new(recipe, nth);
    let small = OpenOptions {
        l2_cache_size: Some(1 << 10),
        l2_cache_entry_size: Some(512),
        refcount_cache_size: Some(0),
        ..OpenOptions::default()
    };
    rig.open(&small)?;
    if is_limited {
        // Several passes over the tables.
        rig.image().limit_memory(3, 150, 0);
    }
    let client = rig.worker();
    let result = rig.block_on(async move {
        for name in ["a", "b"] {
            client.snapshot(name).await?;
            client.write(30, 9).await?;
            client.discard(60, 8).await?;
        }
        client.settle().await;
        client.delete("a").await?;
        client.snapshot("c").await?;
        client.write(90, 9).await
    });
    result.map_err(|error| Violation(error.chain()))?;
    let before = rig.disk.count(kind);
    rig.disk.fail_nth_of(kind, nth, libc::EIO);
    let client = rig.worker();
    let errors = rig.block_on(async move {
        let mut errors = 0;
        loop {
            match client.worker.background_step().await {
                Ok(Step::Idle) => break,
                Ok(_) => {}
                Err(_) if client.worker.image().has_failed() => break,
                Err(_) => errors += 1,
            }
        }
        errors
    });
    let hit = rig.disk.count(kind) - before >= nth;
    rig.disk.clear_faults();
    if rig.image().has_failed() {
        return Ok(hit);
    }
    if errors > 1 {
        return violation(format!("{errors} errors of one failure"));
    }
    // What the file says without an orderly stop.
    let mut random = fastrand::Rng::with_seed(nth);
    let after = rig.after_cut(
        rig.disk.power_cut(&mut random, CutMode::NothingUnflushed),
        nth,
    );
    let report = after.check()?;
    if is_dirty(&after) || !report.is_consistent() {
        return violation(format!("called clean, but: {:?}", report.problems));
    }
    judge_settled(&mut rig)?;
    Ok(hit)
}

#[test]
fn a_step_that_fails_is_tried_again_and_counts_nothing_twice() {
    let recipe = Recipe {
        fill: mixed,
        ..Recipe::plain(9, 64 << 10)
    };
    for is_limited in [false, true] {
        for (kind, recoveries_min) in [(OpKind::Read, 3), (OpKind::Write, 3), (OpKind::Punch, 0)] {
            let mut recoveries = 0;
            for nth in 1.. {
                match one_failure(recipe, kind, nth, is_limited) {
                    Ok(true) => recoveries += 1,
                    Ok(false) => break,
                    Err(violation) => panic!("{kind:?} {nth}: {violation}"),
                }
            }
            assert!(recoveries > recoveries_min, "{kind:?}: {recoveries}");
        }
    }
}

/// There is no space for one of its tables, before the freeze or after it.
#[test]
fn a_create_that_fails_leaves_the_image_as_it_was() {
    for nth in 1..60 {
        let mut rig = opened(Recipe {
            fill: mixed,
            ..Recipe::plain(9, 64 << 10)
        });
        let client = rig.worker();
        rig.disk.fail_nth_of(OpKind::Write, nth, libc::ENOSPC);
        let created = rig.block_on(async move { client.snapshot("a").await.is_ok() });
        rig.disk.clear_faults();
        if rig.image().has_failed() {
            continue;
        }
        let client = rig.worker();
        rig.block_on(async move {
            client.write(30, 9).await.expect("a write");
        });
        judge_settled(&mut rig).unwrap_or_else(|violation| panic!("write {nth}: {violation}"));
        if created {
            return;
        }
    }
    panic!("every write of a create was made to fail");
}
