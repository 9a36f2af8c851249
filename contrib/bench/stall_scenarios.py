"""The runs of the snapshot benchmark: what is done to a server, and which figures come out.

Each function works on a fresh copy of an image and returns a dictionary of figures; None stands for
what could not be measured. A server that settles in the background is waited for; for one that does
everything before it answers, answered and settled are the same moment.
"""

import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stall_rig import Failed, Hung, Load, Room, Server, check, now, space
from stall_timeline import MS, SECOND

SMALL_REGION = 16 << 20  # a load confined to it soon has copied all its clusters
MANY_REGION = 64 << 20
MANY_KEPT = 3  # snapshots that exist at any time of the `many` run
MANY_PACE = 10  # so many may be unsettled: else the run measures a queue that grows without end
TOUCHED = 4 << 30  # more than most runs copy
ASK_INTERVAL = 0.01  # seconds between two questions whether a server is busy
QUICK_SETTLE = 100 * MS  # what settles faster leaves no time to measure rates in


@dataclass
class Run:
    """Everything that a scenario needs to know."""

    args: object
    folder: Path
    server: str
    original: Path  # the image to copy
    seed: int
    limit: float  # seconds for any one wait
    notes: list = field(default_factory=list)

    def room(self):
        return Room(self.folder, self.args.medium, self.args.reserve)


@contextmanager
def serving(run):
    """A server on a fresh copy of the image; both are gone afterwards."""
    image = run.folder / f"{run.server}.qcow2"
    subprocess.run(["cp", "--sparse=always", run.original, image], check=True)
    server = Server(run.server, run.args, image, run.folder)
    try:
        yield server.start()
    finally:
        server.kill()
        image.unlink(missing_ok=True)


def touch_memory(run):
    """Has the host back as much memory as the copies of a run on tmpfs will take.

    On a virtual machine a page that it has not used lately costs several times as much as the write
    into it, and which run gets such pages is chance.
    """
    if run.args.medium != "tmpfs":
        return
    path, piece = run.folder / "touched", bytes(1 << 20)
    with open(path, "wb", buffering=0) as file:
        while file.tell() < TOUCHED and not run.room().is_short():
            file.write(piece)
    path.unlink()


@contextmanager
def loading(run, server, pattern, *options):
    """A load that has warmed up."""
    load = Load(run.args, server, run.folder, pattern, run.seed, options)
    try:
        pause(run, load, 1.0)
        yield load
    finally:
        load.kill()


def pause(run, load, seconds):
    """Lets the load go on. Returns whether there was room enough for all that time."""
    room, end = run.room(), now() + int(seconds * SECOND)
    while now() < end:
        if load:
            load.check()
        if room.is_short():
            if load:
                load.confine(SMALL_REGION)
            note = "the load was confined to a small region for want of space"
            if note not in run.notes:
                run.notes.append(note)
            return False
        time.sleep(max(0.0, min(0.1, (end - now()) / SECOND)))
    return True


def settled(run, server, load, open_until):
    """Waits until nothing is left to do; from `open_until` on the load stays in a small region, so
    that a long settle does not fill the disk with copies. Returns when it was done."""
    deadline = now() + int(run.limit * SECOND)
    room, confined = run.room(), False
    while server.is_busy():
        if now() > deadline:
            raise Hung(f"not settled within {run.limit:g} s")
        if load:
            load.check()
            if not confined and (now() > open_until or room.is_short()):
                load.confine(SMALL_REGION)
                confined = True
        time.sleep(ASK_INTERVAL)
    return now()


def stall(run):
    """Random writes; a snapshot is taken, settles, and is deleted."""
    args, marks = run.args, {}
    touch_memory(run)
    with serving(run) as server, loading(run, server, "randwrite") as load:
        server.connect()
        marks["began"] = now()
        pause(run, load, args.before)
        marks["create"], marks["created"] = server.create("s1")
        copying_until = marks["created"] + int(args.after * SECOND)
        marks["settled"] = settled(run, server, load, copying_until)
        left = (copying_until - now()) / SECOND
        if left > 0:
            marks["copied"] = copying_until if pause(run, load, left) else now()
        else:
            marks["copied"] = copying_until
        pause(run, load, 0.5)
        load.release()
        pause(run, load, 0.5)
        marks["delete"], marks["deleted"] = server.delete("s1")
        marks["cleaned"] = settled(
            run, server, load, marks["deleted"] + int(args.after * SECOND)
        )
        pause(run, load, min(args.after, 2.0))
        timeline = load.finish(run.limit)
        server.terminate()
        corruptions, leaks = check(server.image)
    before = timeline.gap_ended_ms(marks["began"], marks["create"])
    creating = timeline.gap_ms(marks["create"], marks["settled"])
    deleting = timeline.gap_ms(marks["delete"], marks["cleaned"])
    return {
        "marks": marks,
        "timeline": timeline,
        "gap_before": before,
        "gap_create": creating,
        "gap_create_above": creating - before,
        "gap_delete": deleting,
        "gap_delete_above": deleting - before,
        "gaps_create": timeline.longest_gaps(marks["create"], marks["settled"], marks["create"]),
        "gaps_delete": timeline.longest_gaps(marks["delete"], marks["cleaned"], marks["delete"]),
        "create_ms": (marks["created"] - marks["create"]) / MS,
        "delete_ms": (marks["deleted"] - marks["delete"]) / MS,
        "settle_write_s": (marks["settled"] - marks["create"]) / SECOND,
        "clean_s": (marks["cleaned"] - marks["delete"]) / SECOND,
        "iops_before": timeline.iops(marks["began"], marks["create"]),
        "iops_after": timeline.iops(marks["created"], marks["copied"]),
        "corruptions": corruptions,
        "leaks": leaks,
    }


def rates(run, pattern, skip, *options):
    """The rate of a load before a snapshot and while it settles."""
    with serving(run) as server, loading(run, server, pattern, *options) as load:
        server.connect()
        began = now()
        # Asking whether it is settled disturbs the load too: the same is done before.
        while now() < began + int(min(run.args.before, 5.0) * SECOND):
            server.is_busy()
            time.sleep(ASK_INTERVAL)
        asked, answered = server.create("s1")
        end = settled(run, server, None, 0)
        timeline = load.finish(run.limit)
        server.terminate()
    before = timeline.iops(began, asked)
    first = answered + int(skip * SECOND)
    during = timeline.iops(first, end) if end - first >= QUICK_SETTLE else None
    return {
        "before": before,
        "during": during,
        "ratio": during / before if during is not None and before else None,
        "settle_s": (end - asked) / SECOND,
        "gap_before": timeline.gap_ended_ms(began, asked),
        "gap_create": timeline.gap_ms(asked, end),
    }


def reads(run):
    """Random reads while a snapshot settles."""
    return rates(run, "randread", 0.0)


def copied(run):
    """Writes to clusters that were already copied while a snapshot settles."""
    return rates(run, "randwrite", 0.3, "--size", str(SMALL_REGION))


def idle(run):
    """A snapshot that nobody disturbs."""
    with serving(run) as server:
        server.connect()
        asked, answered = server.create("s1")
        end = settled(run, server, None, 0)
        memory, _ = server.memory_mib()
        deleted, _ = server.delete("s1")
        clean = settled(run, server, None, 0)
        server.terminate()
        corruptions, leaks = check(server.image)
    return {
        "create_ms": (answered - asked) / MS,
        "settle_s": (end - asked) / SECOND,
        "clean_s": (clean - deleted) / SECOND,
        "memory_mib": memory,
        "corruptions": corruptions,
        "leaks": leaks,
    }


def kill(run, after_s):
    """SIGKILL in the middle of a settle; how soon the next process serves a read, and whether the
    image is clean in the end."""
    with serving(run) as server:
        server.connect()
        with loading(run, server, "randwrite"):
            asked, _ = server.create("s1")
            while now() < asked + int(after_s * SECOND):
                time.sleep(0.001)
            was_dirty = server.is_dirty()
            server.kill()
        # The client waits for the socket, so that the time is the server's.
        Path(server.socket).unlink(missing_ok=True)
        load = Load(run.args, server, run.folder, "randread", run.seed, ios=16)
        try:
            time.sleep(0.3)
            server.start()
            timeline = load.finish(run.limit)
        finally:
            load.kill()
        first_ms = (timeline.first_completion - server.started) / MS
        repaired = settled(run, server, None, 0)
        deadline = now() + int(run.limit * SECOND)
        while server.is_dirty() and now() < deadline:
            time.sleep(0.05)
        repaired = max(repaired, now())
        started = server.started
        server.terminate()
        corruptions, leaks = check(server.image)
        listed = subprocess.run(
            ["qemu-img", "snapshot", "-l", str(server.image)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return {
        "was_dirty": was_dirty,
        "first_ms": first_ms,
        "repair_s": (repaired - started) / SECOND,
        "corruptions": corruptions,
        "leaks": leaks,
        "kept": " s1 " in listed.stdout,
    }


def many(run, count):
    """Snapshots created and deleted one after the other under load."""
    with serving(run) as server:
        length, blocks = space(server.image)
        with loading(run, server, "randwrite", "--size", str(MANY_REGION)) as load:
            server.connect()
            began, memory = now(), []
            samples = {count * part // 10 for part in (1, 4, 7)}
            for number in range(count):
                if number in samples:
                    memory.append(server.memory_mib()[0])
                server.create(f"s{number}")
                if number >= MANY_KEPT:
                    server.delete(f"s{number - MANY_KEPT}")
                load.check()
                if number % MANY_PACE == 0:
                    settled(run, server, None, 0)
                if run.room().is_short():
                    raise Failed(f"no space left after {number + 1} snapshots")
            for number in range(max(count - MANY_KEPT, 0), count):
                server.delete(f"s{number}")
            settled(run, server, None, 0)
            seconds = (now() - began) / SECOND
            memory.append(server.memory_mib()[0])
            timeline = load.finish(run.limit)
        server.terminate()
        corruptions, leaks = check(server.image)
        length_after, blocks_after = space(server.image)
    # Each snapshot kept may hold a version of each cluster of the region, and the load one more.
    # What else the file grew was not given back yet when the load needed it.
    needed = length + (MANY_KEPT + 1) * MANY_REGION
    return {
        "count": count,
        "seconds": seconds,
        "corruptions": corruptions,
        "leaks": leaks,
        "length_mib": [length >> 20, length_after >> 20],
        "length_needed_mib": needed >> 20,
        "host_mib": [blocks >> 20, blocks_after >> 20],
        "rss_anon_mib": memory,
        "gap": timeline.gap_ms(began, began + int(seconds * SECOND)),
        "iops": timeline.iops(began, began + int(seconds * SECOND)),
    }
