//! The protocols, each with its broken twins.

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::model::Builder;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::pin::{PinBoard, PinTable};
use crate::tag::Tag;

/// Explores `test`; preemptions beyond the bound add states, hardly ever findings.
fn explore(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// Whether loom finds a schedule in which `test` fails.
fn fails(test: impl Fn() + Sync + Send + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| explore(test))).is_err()
}

/// A cluster is unlinked, its epoch ends, and it is reused once no pin may know it.
fn reclaim(pinned: bool) {
    let board = Arc::new(PinBoard::new());
    // What the mapping says (1: the cluster), and what the cluster holds.
    let mapping = Arc::new(AtomicU64::new(1));
    let cluster = Arc::new(AtomicU64::new(7));
    let reader = {
        let (board, mapping, cluster) = (board.clone(), mapping.clone(), cluster.clone());
        thread::spawn(move || {
            let table = PinTable::new(&board);
            let pin = pinned.then(|| table.pin());
            if mapping.load(Ordering::Acquire) == 1 {
                let seen = cluster.load(Ordering::Acquire);
                assert_eq!(seen, 7, "the bytes of the cluster's next owner");
            }
            drop(pin);
        })
    };
    mapping.store(0, Ordering::Release);
    let ended = board.end_epoch();
    if board.oldest() > ended {
        cluster.store(9, Ordering::Release);
    }
    reader.join().unwrap();
}

#[test]
fn a_cluster_is_not_reused_while_a_pin_may_know_it() {
    explore(|| reclaim(true));
    assert!(fails(|| reclaim(false)), "the test cannot fail");
}

/// A request writes in place where its generation owns the table; the snapshot is read after grace.
fn grace(pinned: bool) {
    let board = Arc::new(PinBoard::new());
    let owned_since = Arc::new(AtomicU64::new(1));
    let cluster = Arc::new(AtomicU64::new(7));
    let writer = {
        let (board, owned, cluster) = (board.clone(), owned_since.clone(), cluster.clone());
        thread::spawn(move || {
            let table = PinTable::new(&board);
            let pin = table.pin();
            let generation = pin.generation();
            let pin = pinned.then_some(pin);
            if owned.load(Ordering::Acquire) == generation {
                cluster.store(8, Ordering::Release);
            }
            drop(pin);
        })
    };
    let generation = board.raise_generation();
    if board.end_grace(generation) {
        let committed = cluster.load(Ordering::Acquire);
        writer.join().unwrap();
        let later = cluster.load(Ordering::Acquire);
        assert_eq!(
            committed, later,
            "the snapshot has changed after its commit"
        );
    } else {
        writer.join().unwrap();
    }
}

#[test]
fn nothing_is_written_in_place_once_the_grace_is_over() {
    explore(|| grace(true));
    assert!(fails(|| grace(false)), "the test cannot fail");
}

/// Two queues and a freeze: write A completes before B is submitted. The avail index makes B
/// visible; its worker pins after (or, broken, before) it reads the index.
fn prefix(pin_after_avail: bool) {
    let board = Arc::new(PinBoard::new());
    let avail = Arc::new(AtomicU64::new(0));
    let b_generation = {
        let (board, avail) = (board.clone(), avail.clone());
        thread::spawn(move || {
            let table = PinTable::new(&board);
            if pin_after_avail {
                if avail.load(Ordering::Acquire) == 0 {
                    return None;
                }
                Some(table.pin().generation())
            } else {
                let pin = table.pin();
                (avail.load(Ordering::Acquire) != 0).then(|| pin.generation())
            }
        })
    };
    let a = {
        let (board, avail) = (board.clone(), avail.clone());
        thread::spawn(move || {
            let table = PinTable::new(&board);
            let generation = table.pin().generation();
            // A is complete; its writer submits B.
            avail.store(1, Ordering::Release);
            generation
        })
    };
    board.raise_generation();
    let a_generation = a.join().unwrap();
    if let Some(b_generation) = b_generation.join().unwrap() {
        assert!(
            b_generation >= a_generation,
            "B is in the snapshot, A is not"
        );
    }
}

#[test]
fn what_was_submitted_later_is_never_of_an_older_generation() {
    explore(|| prefix(true));
    assert!(fails(|| prefix(false)), "the test cannot fail");
}

/// One table with one entry, of which a link makes 5; a freeze; and a copy of the frozen table,
/// as a later request makes it. The link must be on the disk. Broken: the link does not look again under the slice lock.
fn link_and_freeze(looks_again: bool) {
    let board = Arc::new(PinBoard::new());
    // Which table L1 names, and since when it is ours.
    let l1 = Arc::new((Mutex::new(()), AtomicU64::new(0), AtomicU64::new(1)));
    // Tables with their slice locks.
    let tables = Arc::new([Mutex::new(1_u64), Mutex::new(0_u64)]);
    let linker = {
        let (board, l1, tables) = (board.clone(), l1.clone(), tables.clone());
        thread::spawn(move || {
            let pins = PinTable::new(&board);
            let pin = pins.pin();
            if l1.2.load(Ordering::Acquire) != pin.generation() {
                return;
            }
            let table = usize::try_from(l1.1.load(Ordering::Acquire)).unwrap();
            let mut entry = tables[table].lock().unwrap();
            let current = l1.2.load(Ordering::Acquire) == pin.generation()
                && l1.1.load(Ordering::Acquire) == table as u64;
            if current || !looks_again {
                *entry = 5;
            }
            drop(entry);
            drop(pin);
        })
    };
    let copier = {
        let (board, l1, tables) = (board.clone(), l1.clone(), tables.clone());
        thread::spawn(move || {
            let pins = PinTable::new(&board);
            let pin = pins.pin();
            if pin.generation() == 1 {
                return;
            }
            let _l1_lock = l1.0.lock().unwrap();
            let old = tables[0].lock().unwrap();
            *tables[1].lock().unwrap() = *old;
            l1.1.store(1, Ordering::Release);
            l1.2.store(board.generation(), Ordering::Release);
        })
    };
    let guard = l1.0.lock().unwrap();
    let frozen = l1.1.load(Ordering::Acquire);
    let generation = board.raise_generation();
    drop(guard);
    assert_eq!(
        frozen, 0,
        "a table of the next generation is in the snapshot"
    );
    linker.join().unwrap();
    copier.join().unwrap();
    assert!(board.end_grace(generation));
    let (snapshot, copy) = (*tables[0].lock().unwrap(), *tables[1].lock().unwrap());
    let copied = l1.1.load(Ordering::Acquire) == 1;
    assert!(
        !copied || snapshot == 1 || copy == snapshot,
        "a link is in the snapshot only"
    );
}

#[test]
fn a_link_is_on_the_disk_whether_or_not_the_snapshot_has_it() {
    explore(|| link_and_freeze(true));
    assert!(fails(|| link_and_freeze(false)), "the test cannot fail");
}

/// What is left out, or moved, when a slice is retired.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Break {
    Nothing,
    /// Nobody announces the retirement.
    Announcement,
    /// The slot is filled after the look at the body.
    Fill,
    /// The mark is taken off after the look at the body.
    Refresh,
}

/// A worker puts a slice into its directory and looks it up, while another thread announces some
/// other change, retires the body, and tells the guest. Who was told finds the slice no more.
fn retire(breaks: Break) {
    const KEY: u64 = 0x1_0000;
    let tag = Arc::new(Tag::vacant());
    let retired = Arc::new(AtomicU64::new(0));
    let told = Arc::new(AtomicU64::new(0));
    let worker = {
        let (tag, retired, told) = (tag.clone(), retired.clone(), told.clone());
        thread::spawn(move || {
            let is_live = || retired.load(Ordering::Acquire) == 0;
            let look_up = || {
                if tag.is(KEY) {
                    return true;
                }
                if breaks == Break::Refresh {
                    let was_live = is_live();
                    return tag.names(KEY) && tag.refresh(|| was_live);
                }
                tag.names(KEY) && tag.refresh(is_live)
            };
            if breaks == Break::Fill {
                let was_live = is_live();
                tag.fill(KEY, false, || was_live);
            } else {
                tag.fill(KEY, false, is_live);
            }
            look_up();
            let told = told.load(Ordering::Acquire) == 1;
            assert!(!(look_up() && told), "a hit of a retired slice");
        })
    };
    tag.announce();
    retired.fetch_or(1, Ordering::Release);
    if breaks != Break::Announcement {
        tag.announce();
    }
    told.store(1, Ordering::Release);
    worker.join().unwrap();
}

#[test]
fn a_slice_that_was_retired_is_not_found_any_more() {
    explore(|| retire(Break::Nothing));
    for breaks in [Break::Announcement, Break::Fill, Break::Refresh] {
        assert!(fails(move || retire(breaks)), "the test cannot fail");
    }
}
