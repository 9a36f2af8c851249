#!/usr/bin/env python3
"""Compares qblkd with qemu-storage-daemon: same image, same client, in turn.

Owns the set-up (images, servers, client), the order of the runs and the table. The load itself is
made by `examples/blkclient`. Each row is measured in pairs, one run per server, whose order
alternates; a ratio is the median of the pairs' ratios, so that slow drift of the machine cancels.
Needs only the standard library, qemu-img and qemu-storage-daemon.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@dataclass
class Row:
    """One line of the table."""

    medium: str  # tmpfs | cached | disk
    pattern: str  # the client's --rw
    block: str
    depth: int
    queues: int = 1
    poll: bool = False
    stride: str = ""  # distance of two blocks, if it is not the block
    fresh: bool = False  # a new empty image for each run

    @property
    def name(self):
        parts = [self.medium, self.pattern, self.block, f"qd{self.depth}", f"q{self.queues}"]
        return "-".join(parts + (["poll"] if self.poll else []))

    @property
    def direct(self):
        return self.medium == "disk"


def all_rows():
    """Every row, in the order of the table."""
    rows = []
    for medium in ("tmpfs", "cached", "disk"):
        for pattern in ("randread", "randwrite"):
            for depth in (1, 32):
                for queues in (1, 2):
                    rows.append(Row(medium, pattern, "4k", depth, queues))
        if medium == "tmpfs":
            rows.append(Row(medium, "randread", "4k", 1, 1, poll=True))
            rows.append(Row(medium, "randread", "4k", 32, 1, poll=True))
        for pattern in ("read", "write"):
            rows.append(Row(medium, pattern, "64k", 16))
            rows.append(Row(medium, pattern, "1M", 4))
        for queues in (1, 2):  # one write to each cluster: every one allocates
            rows.append(Row(medium, "alloc-write", "4k", 32, queues, stride="64k", fresh=True))
        rows.append(Row(medium, "alloc-write-seq", "4k", 32, fresh=True))
        rows.append(Row(medium, "alloc-write-seq", "64k", 16, fresh=True))
        for depth in (1, 8):
            rows.append(Row(medium, "write-flush", "4k", depth))
        rows.append(Row(medium, "write-flush", "4k", 8, 2))
    return rows


class Server:
    """A way to start one of the programs."""

    def __init__(self, name, args):
        self.name = name
        self.args = args

    def command(self, row, image, socket):
        if self.name == "qblkd":
            cache = "none" if row.direct else "writeback"
            return [
                self.args.qblkd, "--socket-path", socket, "--blk-file", image, "--cache", cache,
                "--num-queues", str(row.queues), *self.args.qblkd_args.split(),
            ]  # fmt: skip
        direct = "on" if row.direct else "off"
        aio = self.args.qsd_aio
        if aio == "native" and not row.direct:
            aio = "io_uring"  # native AIO works with O_DIRECT only
        thread = self.name == "qsd"
        return [
            self.args.qsd,
            *(["--object", "iothread,id=t0"] if thread else []),
            "--blockdev",
            f"driver=file,node-name=f,filename={image},aio={aio},cache.direct={direct},"
            "discard=unmap",
            "--blockdev",
            f"driver=qcow2,node-name=q,file=f,cache.direct={direct},discard=unmap",
            "--export",
            f"type=vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path={socket},writable=on,"
            f"num-queues={row.queues}" + (",iothread=t0" if thread else ""),
        ]  # fmt: skip


class Failed(Exception):
    """A run that gave no figures."""


class Bench:
    """Images, servers and runs."""

    def __init__(self, args, folders):
        self.args = args
        self.folders = folders
        self.scratch = folders["tmpfs"]
        self.seed = 0

    def new_image(self, path, size):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, f"{size}M"], check=True)

    def run(self, server, row, image, extra):
        """Starts `server`, runs the client once, stops the server; returns the figures."""
        socket = str(self.scratch / "vhost.sock")
        Path(socket).unlink(missing_ok=True)
        log = self.scratch / "server.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                server.command(row, str(image), socket), stdout=output, stderr=output
            )
        try:
            command = [
                self.args.client, "bench", "--socket", socket, "--rw", row.pattern,
                "--bs", row.block, "--iodepth", str(row.depth), "--queues", str(row.queues),
                "--server-pid", str(process.pid), "--seed", str(self.seed), *extra,
            ]  # fmt: skip
            if row.stride:
                command += ["--stride", row.stride]
            if row.poll:
                command.append("--poll")
            result = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if result.returncode != 0:
                told = (result.stderr or result.stdout).strip()
                raise Failed(f"{server.name}: {told}; {tail(log)}")
            return json.loads(result.stdout)
        finally:
            stop(process)

    def fill(self, row, image):
        """Makes an image whose clusters are all allocated, with content that is not zero."""
        self.new_image(image, self.args.size)
        whole = Row(row.medium, "write", "1M", 8)
        ios = ["--ios", str(self.args.size), "--runtime", "600"]
        self.run(Server("qsd", self.args), whole, image, ios)

    def prepared(self, row):
        """The filled image of the row's medium; made when first asked for."""
        folder = self.folders["tmpfs" if row.medium == "tmpfs" else "disk"]
        image = folder / "filled.qcow2"
        if not image.exists():
            self.fill(row, image)
        if row.medium == "cached":
            with open(image, "rb", buffering=0) as file:
                while file.read(4 * MIB):
                    pass
        return image

    def touch_memory(self, path):
        """Has the host back as much memory as a fresh image on tmpfs will take.

        On a virtual machine a page that it has never used costs several times as much as the write
        into it, and which run gets such pages is chance.
        """
        with open(path, "wb", buffering=0) as file:
            for _ in range(self.args.fresh_size + 64):
                file.write(bytes(MIB))
        path.unlink()

    def measure(self, server, row):
        """One run of one server."""
        runtime = str(self.args.runtime)
        if row.fresh:
            image = self.folders["tmpfs" if row.medium == "tmpfs" else "disk"] / "fresh.qcow2"
            image.unlink(missing_ok=True)
            if row.medium == "tmpfs":
                self.touch_memory(image)
            self.new_image(image, self.args.fresh_size)
            figures = self.run(server, row, image, ["--runtime", runtime])
            image.unlink()
            return figures
        image = self.prepared(row)
        return self.run(server, row, image, ["--runtime", runtime, "--ramp", "0.3"])


def tail(log):
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output from the server"


def stop(process):
    """Ends a server the polite way, then the other."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=120)  # it may have much to make durable
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Result:
    """All runs of one row: figures per server, in the order of the pairs."""

    row: Row
    runs: dict = field(default_factory=dict)
    problem: str = ""

    def median(self, server, *path):
        values = [pick(figures, path) for figures in self.runs[server]]
        values = [value for value in values if value is not None]
        return statistics.median(values) if values else float("nan")

    def ratios(self, ours, theirs, *path):
        """Ours / theirs, for each pair."""
        pairs = [
            (pick(a, path), pick(b, path)) for a, b in zip(self.runs[ours], self.runs[theirs])
        ]
        return [a / b for a, b in pairs if a and b] or [float("nan")]

    def ratio(self, ours, theirs, *path):
        return statistics.median(self.ratios(ours, theirs, *path))


def pick(figures, path):
    for key in path:
        figures = figures.get(key) if figures is not None else None
    return figures


def measure_row(bench, row, servers, pairs):
    result = Result(row, {server.name: [] for server in servers})
    for pair in range(pairs):
        bench.seed = pair + 1
        order = servers if pair % 2 == 0 else servers[::-1]
        for server in order:
            try:
                result.runs[server.name].append(bench.measure(server, row))
            except (Failed, subprocess.SubprocessError, json.JSONDecodeError) as error:
                result.problem = str(error)
                return result
    return result


def machine(folders):
    """What the figures were measured on."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    systems = {}
    for name, folder in folders.items():
        found = subprocess.run(
            ["findmnt", "-no", "FSTYPE", "-T", folder],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        systems[name] = (found.stdout.split() or ["?"])[-1]
    qsd = subprocess.run(
        ["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)),
        "file_systems": systems,
        "qemu": qsd.stdout.splitlines()[0] if qsd.stdout else "",
        "date": time.strftime("%Y-%m-%d"),
    }


def header(ours, theirs):
    ours, theirs = ours[:8], theirs[:8]
    return (
        f"{'row':34} {ours:>9} {theirs:>9} {'unit':>5} {'ratio':>6} {'(spread)':>11}"
        f" {'p99 us':>8} {theirs:>8} {'cpu us':>7} {theirs:>8} {'ratio':>6}"
    )


def line(result, ours, theirs):
    if result.problem:
        problem = " ".join(result.problem.split())
        return f"{result.row.name:34} FAILED {problem[:200]}"
    large = result.row.block in ("64k", "1M")
    what, unit, scale = ("mb_s", "MB/s", 1) if large else ("iops", "kIOPS", 1000)
    ratios = result.ratios(ours, theirs, what)
    spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
    return (
        f"{result.row.name:34} {result.median(ours, what) / scale:9.1f}"
        f" {result.median(theirs, what) / scale:9.1f} {unit:>5}"
        f" {statistics.median(ratios):6.2f} {spread:>11}"
        f" {result.median(ours, 'latency_us', 'p99'):8.0f}"
        f" {result.median(theirs, 'latency_us', 'p99'):8.0f}"
        f" {result.median(ours, 'server_cpu_us_per_io'):7.2f}"
        f" {result.median(theirs, 'server_cpu_us_per_io'):8.2f}"
        f" {result.ratio(ours, theirs, 'server_cpu_us_per_io'):6.2f}"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qblkd", default=str(ROOT / "target/release/qblkd"))
    parser.add_argument("--qblkd-args", default="", help="further options for qblkd")
    parser.add_argument("--client", default=str(ROOT / "target/release/examples/blkclient"))
    parser.add_argument("--qsd", default="qemu-storage-daemon")
    parser.add_argument("--qsd-aio", default="io_uring", choices=["io_uring", "native", "threads"])
    parser.add_argument(
        "--reference", default="qsd", choices=["qsd", "qsd-main", "both"],
        help="qemu-storage-daemon with an iothread (qsd), without (qsd-main), or both",
    )  # fmt: skip
    parser.add_argument(
        "--candidate", default="qblkd", choices=["qblkd", "qsd", "qsd-main"],
        help="what stands in the first column (qsd-main against qsd shows the noise)",
    )  # fmt: skip
    parser.add_argument("--rows", default="", help="only rows with one of these words, by comma")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runtime", type=float, default=3.0, help="seconds of each run")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the filled virtual disk")
    parser.add_argument("--fresh-size", type=int, default=2048, help="MiB of disks to allocate in")
    parser.add_argument("--quick", action="store_true", help="3 pairs of 1 s: to see that it works")
    parser.add_argument("--tmpfs", default="/dev/shm", help="folder for the tmpfs rows")
    parser.add_argument("--disk", default="", help="folder for the disk rows [default: target/]")
    parser.add_argument("--json", default="", metavar="OUT", help="write all figures to this file")
    parser.add_argument(
        "--require", action="store_true",
        help="exit 1 unless each row's ratio is >= 1.0, and >= 1.5 for cached 4k reads at qd32",
    )  # fmt: skip
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.runtime = min(args.pairs, 3), min(args.runtime, 1.0)
    return args


def required(row):
    """The least ratio that a row must reach."""
    cached = row.medium == "cached" and row.depth == 32 and row.pattern == "randread"
    return 1.5 if cached else 1.0


def main():
    args = parse_arguments()
    words = [word for word in args.rows.split(",") if word]
    rows = [row for row in all_rows() if not words or any(word in row.name for word in words)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if args.candidate == args.reference:
        sys.exit("candidate and reference are the same: nothing to compare")
    if not Path(args.client).exists():
        sys.exit("build the client first: cargo build --release --bins --example blkclient")
    references = ["qsd", "qsd-main"] if args.reference == "both" else [args.reference]
    names = [args.candidate] + [name for name in references if name != args.candidate]
    servers = [Server(name, args) for name in names]

    disk_parent = args.disk or str(ROOT / "target")
    Path(disk_parent).mkdir(exist_ok=True)
    folders = {
        "tmpfs": Path(tempfile.mkdtemp(prefix="qblkd-bench-", dir=args.tmpfs)),
        "disk": Path(tempfile.mkdtemp(prefix="qblkd-bench-", dir=disk_parent)),
    }
    results = []
    try:
        about = machine(folders)
        print(
            f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, Linux"
            f" {about['kernel']}; tmpfs rows on {about['file_systems']['tmpfs']}, the others on"
            f" {about['file_systems']['disk']}; {about['qemu']}"
        )
        print(f"medians of {args.pairs} pairs of {args.runtime:g} s, order alternating\n")
        bench = Bench(args, folders)
        print(header(names[0], names[1] if len(names) == 2 else "qemu"), flush=True)
        for row in rows:
            result = measure_row(bench, row, servers, args.pairs)
            results.append(result)
            for name in names[1:]:
                note = f"  ({name})" if len(names) > 2 else ""
                print(line(result, names[0], name) + note, flush=True)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        table = [
            {"row": result.row.name, "problem": result.problem, "runs": result.runs}
            for result in results
        ]
        Path(args.json).write_text(json.dumps({"machine": about, "rows": table}, indent=1))
    failed = [result.row.name for result in results if result.problem]
    slow = [
        result.row.name
        for result in results
        if not result.problem
        and any(not result.ratio(names[0], name, "iops") >= required(result.row)
                for name in names[1:])
    ]  # fmt: skip
    if slow:
        print("\nbelow the required ratio: " + ", ".join(slow))
    return 1 if failed or (args.require and slow) else 0


if __name__ == "__main__":
    sys.exit(main())
