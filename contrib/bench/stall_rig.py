"""What the snapshot benchmark runs: a server with its control socket, a load, room to write.

Owns the processes and ends them; knows neither the order of a run nor what is made of its figures.
All moments are `time.monotonic_ns()`, the clock of the client's timeline.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from run import stop, tail
from stall_timeline import SECOND, Timeline

GIB = 1 << 30
DEVICE = "disk0"


class Failed(Exception):
    """A run that gave no figures."""


class Hung(Failed):
    """A command that was not answered within the limit."""


class Refused(Failed):
    """A command that was answered with an error."""

    def __init__(self, command, error):
        super().__init__(f"{command}: {error['desc']}")
        self.kind = error["class"]


def now():
    return time.monotonic_ns()


class Qmp:
    """A control connection. Commands go one at a time; events are dropped."""

    def __init__(self, path, limit):
        self.limit = limit
        self.buffer = b""
        deadline = now() + int(limit * SECOND)
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                self.socket.close()
                if now() > deadline:
                    raise Failed(f"no control socket {path}") from error
                time.sleep(0.005)
        self.receive(deadline)
        self.execute("qmp_capabilities")

    def close(self):
        self.socket.close()

    def receive(self, deadline):
        """The next message."""
        while b"\n" not in self.buffer:
            left = (deadline - now()) / SECOND
            try:
                self.socket.settimeout(max(left, 0.001))
                data = self.socket.recv(1 << 16)
            except TimeoutError as error:
                raise Hung(f"no answer within {self.limit:g} s") from error
            except ConnectionResetError:
                data = b""
            if not data:
                raise Failed("the server closed the control connection")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def execute(self, command, **arguments):
        """Returns what the command returned, and when it was sent and answered."""
        message = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        asked = now()
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = self.receive(asked + int(self.limit * SECOND))
            if "return" in answer:
                return answer["return"], asked, now()
            if "error" in answer:
                raise Refused(command, answer["error"])


class Server:
    """One of the programs, serving an image."""

    def __init__(self, name, args, image, folder):
        self.name = name
        self.args = args
        self.image = image
        self.socket = str(folder / "vhost.sock")
        self.control = str(folder / "control.sock")
        self.log = folder / "server.log"
        self.process = None
        self.qmp = None
        self.started = 0

    def command(self):
        direct = self.args.medium == "disk"
        if self.name == "qblkd":
            return [
                self.args.qblkd, "--socket-path", self.socket, "--blk-file", str(self.image),
                "--control", self.control, "--id", DEVICE,
                "--cache", "none" if direct else "writeback",
                *self.args.qblkd_args.split(),
            ]  # fmt: skip
        cache = f"cache.direct={'on' if direct else 'off'},discard=unmap"
        # Without an iothread: with one it hangs in most snapshots.
        return [
            self.args.qsd,
            "--blockdev", f"driver=file,node-name=f,filename={self.image},aio=io_uring,{cache}",
            "--blockdev", f"driver=qcow2,node-name={DEVICE},file=f,{cache}",
            "--chardev", f"socket,id=c,path={self.control},server=on,wait=off",
            "--monitor", "chardev=c",
            "--export", f"type=vhost-user-blk,id=e,node-name={DEVICE},addr.type=unix,"
            f"addr.path={self.socket},writable=on,num-queues={self.args.queues}",
        ]  # fmt: skip

    def start(self):
        for path in (self.socket, self.control):
            Path(path).unlink(missing_ok=True)
        with open(self.log, "ab") as log:
            self.started = now()
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.qmp = None
        return self

    def connect(self):
        """Opens the control connection, once."""
        if self.qmp is None:
            try:
                self.qmp = Qmp(self.control, self.args.limit)
            except Failed as failed:
                raise Failed(f"{self.name}: {failed}; {tail(self.log)}") from failed
        return self.qmp

    def create(self, name):
        _, asked, answered = self.connect().execute(
            "blockdev-snapshot-internal-sync", device=DEVICE, name=name
        )
        return asked, answered

    def delete(self, name):
        _, asked, answered = self.connect().execute(
            "blockdev-snapshot-delete-internal-sync", device=DEVICE, name=name
        )
        return asked, answered

    def is_busy(self):
        """Whether anything is left to do in the background."""
        try:
            jobs, _, _ = self.connect().execute("query-jobs")
        except Refused as refused:
            if refused.kind != "CommandNotFound":
                raise
            return self.is_dirty()
        return any(job["status"] not in ("concluded", "null") for job in jobs)

    def is_dirty(self):
        """Whether the header in the file has the dirty bit."""
        with open(self.image, "rb") as image:
            return image.read(80)[79] & 1 == 1

    def memory_mib(self):
        """(anonymous, all) resident memory."""
        values = {}
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "VmRSS"):
                values[key] = int(value.split()[0]) / 1024
        return values["RssAnon"], values["VmRSS"]

    def kill(self):
        self.disconnect()
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def terminate(self):
        """Ends it in order; returns how many seconds that took."""
        self.disconnect()
        asked = now()
        stop(self.process)
        if self.process.returncode != 0:
            raise Failed(f"{self.name} ended with {self.process.returncode}; {tail(self.log)}")
        return (now() - asked) / SECOND

    def disconnect(self):
        if self.qmp:
            self.qmp.close()
        self.qmp = None


class Load:
    """A client that works until it is told to stop, or has done a number of requests."""

    def __init__(self, args, server, folder, pattern, seed, options=(), ios=0):
        self.file = folder / "timeline.json"
        self.file.unlink(missing_ok=True)
        command = [
            args.client, "bench", "--socket", server.socket, "--rw", pattern, "--bs", "4k",
            "--iodepth", str(args.iodepth), "--queues", str(args.queues), "--runtime", "3600",
            "--connect-timeout", "60", "--seed", str(seed), "--timeline", str(self.file),
            *(["--ios", str(ios)] if ios else ["--remote"]), *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def send(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Failed("the client is gone: " + self.process.stderr.read().strip()) from error

    def confine(self, size):
        """From now on only the first bytes of the disk."""
        self.send(f"region 0 {size}")

    def release(self):
        """From now on all of the region that it began with."""
        self.send("region all")

    def check(self):
        if self.process.poll() is not None:
            raise Failed("the client is gone: " + self.process.stderr.read().strip())

    def finish(self, limit):
        """Ends it, unless it ends by itself; returns its timeline."""
        try:
            # This closes its standard input: the end of a load that is steered.
            out, error = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as expired:
            self.kill()
            raise Hung(f"the client did not end within {limit:g} s") from expired
        if self.process.returncode != 0:
            raise Failed(f"the client: {(error or out).strip()}")
        return Timeline.load(self.file)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                pipe.close()
            except BrokenPipeError:
                pass


class Room:
    """The space that images may still take."""

    def __init__(self, folder, medium, reserve_gib):
        self.folder = folder
        self.medium = medium
        self.reserve = reserve_gib * GIB

    def free(self):
        free = shutil.disk_usage(self.folder).free
        if self.medium == "tmpfs":  # its files are memory, whatever its own limit
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable"):
                    free = min(free, int(line.split()[1]) << 10)
        return free

    def is_short(self):
        return self.free() < self.reserve


def space(image):
    """(length, bytes on the host) of an image."""
    status = os.stat(image)
    return status.st_size, status.st_blocks * 512


def check(image):
    """What `qemu-img check` counts: (corruptions, leaks)."""
    found = subprocess.run(
        ["qemu-img", "check", "--output=json", str(image)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        report = json.loads(found.stdout)
    except json.JSONDecodeError as error:
        raise Failed(f"qemu-img check: {found.stderr.strip()}") from error
    return report.get("corruptions", 0), report.get("leaks", 0)
