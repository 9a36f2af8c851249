#!/usr/bin/env python3
"""Resets a guest, then takes its disk away and gives it back, while it writes to it.

Usage: replug.py CONSOLE QMP SERVER QUEUES

The host half of the second part of guest-test.sh; contrib/fio/replug.sh is the guest's. CONSOLE is
the file with the guest's console, on which it says what it is ready for; QMP the socket of its QEMU,
which has the disk as device `disk` with the chardev `server` on the port `root0`; SERVER the socket of
the vhost-user server. Prints what was done. Needs only the standard library.
"""

import json
import socket
import sys
import time
from pathlib import Path

# Ends what would hang; no claim about speed.
PATIENCE_SECONDS = 300


def until(what, probe):
    """The first result of `probe` that is not false."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        result = probe()
        if result:
            return result
        time.sleep(0.1)
    sys.exit(f"replug.py: waited in vain for {what}")


class Qmp:
    """A connection to QEMU's monitor."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        until(path, lambda: self.connects(path))
        self.socket.settimeout(PATIENCE_SECONDS)
        self.lines = self.socket.makefile()
        self.events = []
        self.read()
        self.execute("qmp_capabilities")

    def connects(self, path):
        try:
            self.socket.connect(path)
        except OSError:
            return False
        return True

    def read(self):
        line = self.lines.readline()
        if not line:
            sys.exit("replug.py: QEMU has ended")
        return json.loads(line)

    def request(self, command, arguments):
        """The whole answer; events are kept."""
        request = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self.read()
            if "event" not in message:
                return message
            self.events.append(message)

    def execute(self, command, **arguments):
        answer = self.request(command, arguments)
        if "error" in answer:
            sys.exit(f"replug.py: {command}: {answer['error']['desc']}")
        return answer["return"]

    def wait_until_deleted(self, device):
        while not any(
            event["event"] == "DEVICE_DELETED" and event["data"].get("device") == device
            for event in self.events
        ):
            self.events.append(self.read())


def main():
    console, qmp_path, server, queues = sys.argv[1:]
    qmp = Qmp(qmp_path)

    def ready_for(what):
        word = f"READY-FOR-{what}".encode()
        until(word.decode(), lambda: Path(console).exists() and word in Path(console).read_bytes())

    ready_for("RESET")
    # qemu.sh has QEMU end instead.
    qmp.execute("set-action", reboot="reset")
    qmp.execute("system_reset")
    print("    reset the machine while it wrote")

    ready_for("UNPLUG")
    qmp.execute("set-action", reboot="shutdown")
    qmp.execute("device_del", id="disk")
    qmp.wait_until_deleted("disk")
    # The device lets go of it a little after the event.
    until("the chardev", lambda: "return" in qmp.request("chardev-remove", {"id": "server"}))
    print("    took the disk away while it wrote")
    address = {"type": "unix", "data": {"path": server}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    qmp.execute("chardev-add", id="server", backend=backend)
    device = {"driver": "vhost-user-blk-pci", "id": "disk", "chardev": "server", "bus": "root0"}
    qmp.execute("device_add", **device, **{"num-queues": int(queues)})
    print("    gave it back")


if __name__ == "__main__":
    main()
