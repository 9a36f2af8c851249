#!/usr/bin/env bash
# contrib/guest-snapshots.sh - snapshots of a disk that a real client is using: QEMU boots a stock Linux
# on a qcow2 image; while fio writes and verifies files of an ext4 there (contrib/fio/snapshots.sh),
# internal snapshots are created, listed and deleted over the control socket. Then SIGTERM must end
# the server with status 0, qemu-img must find the image clean and list the snapshots that were kept,
# and each of them, exported, must be a file system as after a power cut: once the journal is
# replayed, e2fsck -fn finds nothing.
#
# Exit status 0 when all of that holds. QBLKD names the program to test (default: builds the release
# one); SERVER=qemu-storage-daemon tests the test.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_scratch
image=$scratch/disk.qcow2
socket=$scratch/vhost.sock
control=$scratch/control.sock
log=$scratch/server.log
console=$scratch/console
kept=$scratch/kept

need_qemu
need_packages python3:python3
PATH=$PATH:/usr/sbin:/sbin
need_packages e2fsck:e2fsprogs
run "$contrib/mkguest.sh"
use_qblkd release

create_image "$image" 1G
case $SERVER in
qblkd)
    device=disk0
    start_server "$socket" "$image" "$log" 2 --control "$control"
    ;;
*)
    device=disk
    start_server "$socket" "$image" "$log" 2 \
        --chardev "socket,id=control,path=$control,server=on,wait=off" --monitor chardev=control
    ;;
esac

# Creates, lists and deletes until the guest says that it is done; writes the names that are left to
# the file KEPT. Every third snapshot is kept, up to eight of them; the others live for a moment.
take_snapshots() {
    python3 - "$control" "$device" "$console" "$kept" <<'END'
import json, random, socket, sys, time

control, device, console, kept_file = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect(control)
stream = connection.makefile("rw")
json.loads(stream.readline())


def execute(command, **arguments):
    stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    stream.flush()
    while True:
        answer = json.loads(stream.readline())
        if "error" in answer:
            sys.exit(f"{command} {arguments}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]


def listed():
    nodes = execute("query-named-block-nodes")
    node = next(node for node in nodes if node["node-name"] == device)
    return [snapshot["name"] for snapshot in node["image"].get("snapshots", [])]


def guest_said(word):
    with open(console, errors="replace") as file:
        return any(line.strip() == word for line in file)


def expect(names):
    found = listed()
    if found != names:
        sys.exit(f"the server lists {found}, not {names}")


execute("qmp_capabilities")
deadline = time.monotonic() + 300
while not guest_said("SNAPSHOTS-BEGIN"):
    if time.monotonic() > deadline:
        sys.exit("the guest did not begin")
    time.sleep(0.1)

seed = time.time_ns()
rng = random.Random(seed)
names, short_lived, deleted, slowest, number = [], [], 0, 0.0, 0
while not guest_said("SNAPSHOTS-END"):
    name = f"s{number}"
    began = time.monotonic()
    execute("blockdev-snapshot-internal-sync", device=device, name=name)
    slowest = max(slowest, time.monotonic() - began)
    names.append(name)
    expect(names)
    if number % 3 or len(names) - len(short_lived) > 8:
        short_lived.append(name)
    number += 1
    # In any order, and sometimes right after another.
    while short_lived and (len(short_lived) > 3 or rng.random() < 0.4):
        name = short_lived.pop(rng.randrange(len(short_lived)))
        returned = execute("blockdev-snapshot-delete-internal-sync", device=device, name=name)
        if returned["name"] != name:
            sys.exit(f"{name} was deleted, the server says {returned}")
        names.remove(name)
        expect(names)
        deleted += 1
    time.sleep(rng.choice([0.0, 0.1, 0.5, 1.0]))
with open(kept_file, "w") as file:
    file.writelines(f"{name}\n" for name in names)
print(f"    snapshots: {number} created, {deleted} deleted, {len(names)} kept;"
      f" slowest answer {slowest * 1000:.0f} ms (seed {seed})")
if number < 5 or deleted < 1:
    sys.exit("too few snapshots for a test")
END
}

: >"$console"
start take_snapshots
taker_pid=$started_pid
status=0
LIMIT=${LIMIT:-600} SERVER_PID=$server_pid CONSOLE=$console run "$contrib/qemu.sh" "$socket" "$contrib/fio/snapshots.sh" 2 || status=$?
if [[ $status != 0 ]]; then
    say "the log of $SERVER:"
    tail -n 50 "$log" | sed 's/^/    /'
    die "the guest failed with status $status"
fi
wait "$taker_pid" || die "taking snapshots failed"
stop_server "$log"
say "$SERVER ended with status 0"

qemu-img check "$image"

mapfile -t names <"$kept"
in_image=$(qemu-img snapshot -l "$image" | awk '$1 ~ /^[0-9]+$/ { print $2 }' | sort)
[[ $in_image == "$(sort "$kept")" ]] ||
    die "qemu-img lists $(paste -sd' ' <<<"$in_image"), the server had $(paste -sd' ' "$kept")"
for name in "${names[@]}"; do
    raw=$scratch/snapshot.raw
    qemu-img convert -f qcow2 -O raw -l "snapshot.name=$name" "$image" "$raw"
    # What a mount would do: replay the journal, finish what was being removed. Without -f it does
    # not look any further, so that it mends nothing that the next command should find.
    status=0
    e2fsck -p "$raw" >"$scratch/replay" 2>&1 || status=$?
    [[ $status -le 1 ]] || { sed 's/^/    /' "$scratch/replay"; die "$name: replaying the journal failed"; }
    e2fsck -fn "$raw" >"$scratch/fsck" 2>&1 || {
        sed 's/^/    /' "$scratch/replay" "$scratch/fsck"
        die "$name: not a clean file system"
    }
done
say "${#names[@]} snapshots, each a clean file system after its journal was replayed"
