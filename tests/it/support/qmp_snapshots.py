"""Takes, lists and deletes internal snapshots of a running qblkd through the package qemu.qmp.

Usage: qmp_snapshots.py SOCKET

Prints what went wrong and exits 1, or prints nothing and exits 0. The server goes on.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

TIMEOUT_SECONDS = 30
TAKE = "blockdev-snapshot-internal-sync"
DELETE = "blockdev-snapshot-delete-internal-sync"


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


async def names(client):
    (block,) = await client.execute("query-block")
    return [entry["name"] for entry in block["inserted"]["image"].get("snapshots", [])]


async def concluded(events, count):
    """The ids of the next jobs that end, with the states that each has gone through."""
    states = {}
    while sum(path[-1] == "null" for path in states.values()) < count:
        data = (await events.get())["data"]
        states.setdefault(data["id"], []).append(data["status"])
    return states


async def converse(path):
    client = QMPClient("snapshots")
    await client.connect(path)
    with client.listener("JOB_STATUS_CHANGE") as events:
        expect(await client.execute(TAKE, {"device": "disk0", "name": "one"}) == {}, "a value")
        data = [{"device": "disk0", "name": name} for name in ("two", "three")]
        actions = [{"type": TAKE, "data": entry} for entry in data]
        expect(await client.execute("transaction", {"actions": actions}) == {}, "a value")
        expect(await names(client) == ["one", "two", "three"], await names(client))
        states = await concluded(events, 3)
    path = ["created", "running", "waiting", "pending", "concluded", "null"]
    expect(all(found == path for found in states.values()), states)
    expect(await client.execute("query-jobs") == [], "a job is left")

    try:
        await client.execute(TAKE, {"device": "disk0", "name": "two"})
        raise AssertionError("a name was taken twice")
    except ExecuteError as error:
        text = "Snapshot with name 'two' already exists on device 'disk0'"
        expect((error.error_class, str(error)) == ("GenericError", text), error)

    gone = await client.execute(DELETE, {"device": "disk0", "name": "two"})
    expect((gone["id"], gone["name"], gone["vm-state-size"]) == ("2", "two", 0), gone)
    expect(await names(client) == ["one", "three"], await names(client))
    await client.disconnect()


def main():
    asyncio.run(asyncio.wait_for(converse(sys.argv[1]), TIMEOUT_SECONDS))


if __name__ == "__main__":
    main()
