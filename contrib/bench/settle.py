#!/usr/bin/env python3
"""Measures the background work of snapshots on an image that nobody uses meanwhile.

Usage: settle.py [--sizes 512G,2T] [--cluster-size 64k] [--runs N] [--dir DIR] [--qblkd PATH]

For each size, and for clusters in order and scattered over the file (contrib/corpus/big.py), starts
qblkd, takes a snapshot and deletes it again, and prints medians: milliseconds until each command was
answered, seconds until its work was done, and by how much anonymous memory was higher than before, at
most. Then the same for the rebuild of the image with its dirty bit set, from the start of qblkd on.
Needs only the standard library.
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
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
POLL_SECONDS = 0.01
DIRTY_BYTE = 79  # of the header: the least significant byte of the incompatible features


class Control:
    """A client of the control socket."""

    def __init__(self, path, process):
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None:
                    sys.exit(f"settle.py: qblkd ended with {process.returncode}")
                time.sleep(0.001)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        message = json.dumps({"execute": command, "arguments": arguments})
        self.socket.sendall(message.encode() + b"\n")
        while True:
            reply = json.loads(self.lines.readline())
            if "error" in reply:
                sys.exit(f"settle.py: {command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]


def anonymous_mib(process):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no RssAnon")


def worked_off(control, process):
    """Waits for the background work; returns how much anonymous memory there was at most, in MiB."""
    most = 0.0
    while control.run("query-jobs"):
        most = max(most, anonymous_mib(process))
        time.sleep(POLL_SECONDS)
    return most


def timed(control, process, command, **arguments):
    """Milliseconds to the answer, seconds to the end of the work, MiB more than before at most."""
    before = anonymous_mib(process)
    begun = time.monotonic()
    control.run(command, **arguments)
    answered_ms = (time.monotonic() - begun) * 1000
    most = worked_off(control, process)
    return answered_ms, time.monotonic() - begun, max(0.0, most - before)


@contextmanager
def serving(args, image, folder):
    path = f"{folder}/control"
    command = [args.qblkd, "--socket-path", f"{folder}/s", "--blk-file", image,
               "--control", path, "--log", "warn"]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        yield Control(path, process), process
    finally:
        process.terminate()
        process.wait(60)


def measure(args, image, folder):
    with serving(args, image, folder) as (control, process):
        name = {"device": "disk0", "name": "a"}
        create = timed(control, process, "blockdev-snapshot-internal-sync", **name)
        delete = timed(control, process, "blockdev-snapshot-delete-internal-sync", **name)
    with open(image, "r+b") as file:
        file.seek(DIRTY_BYTE)
        file.write(b"\1")
    begun = time.monotonic()
    with serving(args, image, folder) as (control, process):
        most = worked_off(control, process)
        rebuild = (time.monotonic() - begun, most)
    return create + delete + rebuild


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="512G,2T", help="of the virtual disk (%(default)s)")
    parser.add_argument("--cluster-size", default="64k", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="on each image (%(default)s)")
    parser.add_argument("--dir", help="where the images go (a new folder in the temporary one)")
    parser.add_argument("--qblkd", default=str(RELEASE / "qblkd"))
    return parser.parse_args()


def main():
    args = parse_arguments()
    print(f"{'image':16} {'create ms':>10} {'settle s':>9} {'MiB':>6}"
          f" {'delete ms':>10} {'done s':>9} {'MiB':>6} {'rebuild s':>10} {'MiB':>6}")  # fmt: skip
    big = ROOT / "contrib" / "corpus" / "big.py"
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="qblkd-settle-") as folder:
        for size in args.sizes.split(","):
            for layout in ([], ["--scattered"]):
                image = f"{folder}/big.qcow2"
                subprocess.run(
                    [sys.executable, "-B", big, *layout, "--cluster-size", args.cluster_size,
                     size, image],
                    check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                runs = [measure(args, image, folder) for _ in range(args.runs)]
                columns = [statistics.median(column) for column in zip(*runs)]
                name = f"{size} {'scattered' if layout else 'in order'}"
                print("{:16} {:10.1f} {:9.2f} {:6.1f} {:10.1f} {:9.2f} {:6.1f} {:10.2f} {:6.1f}".format(
                    name, *columns), flush=True)  # fmt: skip
                os.unlink(image)


if __name__ == "__main__":
    main()
