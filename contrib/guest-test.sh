#!/usr/bin/env bash
# contrib/guest-test.sh [verify|replug] - two tests with a real client: QEMU boots a stock
# Linux on a qcow2 image served by qblkd, with two queues. Both run unless one is named.
#
# verify  In the guest: fio --verify, discard, write-zeroes, ext4 with fstrim and e2fsck
#         (contrib/fio/verify.sh). Afterwards QEMU must read from the image what the guest last read
#         from the disk.
# replug  While the guest writes, the machine is reset; when it writes again, the disk is unplugged
#         and plugged (contrib/replug.py, contrib/fio/replug.sh). What was flushed before must be
#         there.
#
# At the end of each, SIGTERM must end the server with status 0, and qemu-img must find the image
# clean.
#
# Exit status 0 when all of that holds. QBLKD names the program to test (default: builds the release
# one); SERVER=qemu-storage-daemon tests the tests.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -gt 0 ]] || set -- verify replug
for name in "$@"; do
    [[ $name == verify || $name == replug ]] || die "no test '$name': verify, replug"
done
make_scratch
image=$scratch/disk.qcow2
socket=$scratch/vhost.sock
log=$scratch/server.log
console=$scratch/console

need_qemu
need_packages python3:python3
run "$contrib/mkguest.sh"
use_qblkd release

# run_guest SCRIPT SIZE: runs SCRIPT of contrib/fio in the guest on a new disk of SIZE, ends the
# server, and checks the image.
run_guest() {
    local status=0
    rm -f "$image"
    create_image "$image" "$2"
    start_server "$socket" "$image" "$log" 2
    LIMIT=${LIMIT:-600} SERVER_PID=$server_pid CONSOLE=$console run "$contrib/qemu.sh" "$socket" "$contrib/fio/$1" 2 || status=$?
    if [[ $status != 0 ]]; then
        say "the log of $SERVER:"
        tail -n 50 "$log" | sed 's/^/    /'
        die "the guest failed with status $status"
    fi
    stop_server "$log"
    say "$SERVER ended with status 0"
    qemu-img check "$image"
}

test_verify() {
    local in_guest in_image
    run_guest verify.sh 1G
    in_guest=$(tr -d '\r' <"$console" | sed -n 's/^DISK-SHA256 //p')
    qemu-img dd -f qcow2 -O raw bs=1M count=256 "if=$image" "of=$scratch/disk.raw"
    in_image=$(sha256sum <"$scratch/disk.raw" | cut -d' ' -f1)
    [[ -n $in_guest && $in_guest == "$in_image" ]] ||
        die "the guest read '$in_guest' from the first 256 MiB, qemu-img '$in_image'"
    say "qemu-img reads the same data as the guest"
}

test_replug() {
    local qmp=$scratch/qmp.sock replug_pid
    rm -f "$console"
    start "$contrib/replug.py" "$console" "$qmp" "$socket" 2
    replug_pid=$started_pid
    DEVICE=,id=disk,bus=root0 \
        QEMU_OPTIONS="-qmp unix:$qmp,server=on,wait=off -device pcie-root-port,id=root0,chassis=1" \
        run_guest replug.sh 128M
    wait "$replug_pid" || die "replug.py failed with status $?"
}

for name in "$@"; do
    step "guest: $name"
    "test_$name"
done
