"""Drives a running qblkd through the Python package qemu.qmp, as it comes from PyPI.

Usage: qmp_client.py SOCKET

Asks every query, provokes both classes of error, sends a batch, listens for events with a second
client, and ends the server with `quit`. Prints what went wrong and exits 1, or prints nothing and
exits 0.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

# Ends what would hang; no claim about speed.
TIMEOUT_SECONDS = 300


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


async def refusal(client, command, arguments=None):
    try:
        reply = await client.execute(command, arguments)
    except ExecuteError as error:
        return error.error_class, str(error)
    raise AssertionError(f"{command} {arguments} was not refused: {reply}")


async def converse(path):
    client = QMPClient("first")
    listener = QMPClient("second")
    await client.connect(path)
    await listener.connect(path)

    version = await client.execute("query-version")
    expect(version["package"].startswith("qblkd "), version)
    expect(client.greeting.QMP.version == version, client.greeting)

    names = {entry["name"] for entry in await client.execute("query-commands")}
    expect({"qmp_capabilities", "query-block", "quit"} <= names, names)

    (block,) = await client.execute("query-block")
    active = block["inserted"]
    expect(active["image"]["virtual-size"] >= 0, block)

    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    expect(nodes[0]["node-name"] == active["node-name"], nodes)

    (stats,) = await client.execute("query-blockstats")
    expect(stats["device"] == block["device"], stats)
    for member in ("rd_operations", "wr_bytes", "flush_operations", "failed_rd_operations"):
        expect(isinstance(stats["stats"][member], int), (member, stats))
    expect(isinstance(stats["x-qblkd"]["workers"], list), stats)

    class_, text = await refusal(client, "no-such-command")
    expect(class_ == "CommandNotFound", class_)
    expect(text == "The command no-such-command has not been found", text)
    class_, text = await refusal(client, "query-block", {"surprise": 1})
    expect((class_, text) == ("GenericError", "Parameter 'surprise' is unexpected"), text)

    # Under load `actual-size` grows from one reply to the next; the name of the device does not.
    replies = await asyncio.gather(*(client.execute("query-block") for _ in range(20)))
    names = {reply[0]["device"] for reply in replies}
    expect(names == {block["device"]}, f"replies to a batch: {names}")

    with listener.listener("SHUTDOWN") as events:
        expect(await client.execute("quit") == {}, "quit has a return value")
        event = await events.get()
    expect(event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event)
    expect(event["timestamp"]["seconds"] > 0, event)

    for connected in (client, listener):
        try:
            await connected.disconnect()
        except (EOFError, ConnectionError):
            # The server may have closed first.
            pass


def main():
    asyncio.run(asyncio.wait_for(converse(sys.argv[1]), TIMEOUT_SECONDS))


if __name__ == "__main__":
    main()
