#!/usr/bin/env python3
"""Measures what a disk costs that does little: start-up, memory, a trickle of requests, a check.

Usage: idle.py [--size 2T] [--runs N] [--dir DIR] [--qblkd PATH] [--client PATH]

Starts qblkd and qemu-storage-daemon in turn on an image with all metadata allocated
(contrib/corpus/big.py) and prints medians: milliseconds until a client can connect, anonymous memory
then, and the CPU that 100 reads a second cost, as a part of one core. Then the time of `qblkd check`
beside `qemu-img check`. Needs only the standard library, and what run.py needs.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
RATE = 100
RATE_SECONDS = 5


def commands(args, image, path):
    """Name and command of each server."""
    ours = [args.qblkd, "--socket-path", path, "--blk-file", image, "--log", "warn"]
    theirs = [
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=f,filename={image},aio=io_uring",
        "--blockdev", "driver=qcow2,node-name=q,file=f",
        "--export",
        f"type=vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path={path},writable=on",
    ]  # fmt: skip
    return {"qblkd": ours, "qblkd --poll-us 0": [*ours, "--poll-us", "0"], "qemu": theirs}


def start(command, path):
    """The server, and how long it took until a client could connect, in milliseconds."""
    Path(path).unlink(missing_ok=True)
    begun = time.monotonic()
    process = subprocess.Popen(command)
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(path)
                return process, (time.monotonic() - begun) * 1000
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"idle.py: {command[0]} ended with {process.returncode}")
                time.sleep(0.0002)


def anonymous_mib(process):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no RssAnon")


def cpu_ns(process):
    """Time that the threads of a process ran."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks)


def trickle_percent(args, process, path):
    """CPU of the server while it gets RATE requests a second, in percent of a core."""
    command = [
        args.client, "bench", "--socket", path, "--rw", "randread", "--bs", "4k", "--iodepth", "1",
        "--size", "64M", "--rate", str(RATE), "--runtime", str(RATE_SECONDS),
    ]  # fmt: skip
    before, begun = cpu_ns(process), time.monotonic()
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    spent, elapsed = cpu_ns(process) - before, time.monotonic() - begun
    if report["iops"] < 0.9 * RATE:
        print(f"idle.py: only {report['iops']:.0f} requests a second", file=sys.stderr)
    return spent / 1e7 / elapsed


def stop(process):
    process.terminate()
    process.wait(60)


def check_seconds(command, image):
    begun = time.monotonic()
    subprocess.run([*command, image], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2T", help="of the virtual disk (%(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="of each server (%(default)s)")
    parser.add_argument("--dir", help="where the image goes (a new folder in the temporary one)")
    parser.add_argument("--qblkd", default=str(RELEASE / "qblkd"))
    parser.add_argument("--client", default=str(RELEASE / "examples" / "blkclient"))
    return parser.parse_args()


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="qblkd-idle-") as folder:
        image, path = f"{folder}/big.qcow2", f"{folder}/s"
        big = ROOT / "contrib" / "corpus" / "big.py"
        subprocess.run([sys.executable, "-B", big, args.size, image], check=True)
        servers = commands(args, image, path)
        figures = {name: [] for name in servers}
        for _ in range(args.runs):
            for name, command in servers.items():
                process, started_ms = start(command, path)
                try:
                    memory = anonymous_mib(process)
                    figures[name].append((started_ms, memory, trickle_percent(args, process, path)))
                finally:
                    stop(process)
        print(f"{'server':20} {'start ms':>9} {'memory MiB':>11} {f'CPU % at {RATE}/s':>15}")
        for name, rows in figures.items():
            started_ms, memory, percent = (statistics.median(column) for column in zip(*rows))
            print(f"{name:20} {started_ms:9.1f} {memory:11.1f} {percent:15.2f}")
        tools = {"qblkd check": [args.qblkd, "check"], "qemu-img check": ["qemu-img", "check"]}
        seconds = {name: [] for name in tools}
        for _ in range(3):
            for name, command in tools.items():
                seconds[name].append(check_seconds(command, image))
        for name, found in seconds.items():
            print(f"{name:20} {statistics.median(found):9.2f} s")


if __name__ == "__main__":
    main()
