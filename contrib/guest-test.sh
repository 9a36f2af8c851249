#!/usr/bin/env bash
# contrib/guest-test.sh - one test with a real client: QEMU boots a stock Linux on a qcow2 image served
# by qblkd, with two queues. In the guest: fio --verify, discard, write-zeroes, ext4 with fstrim and
# e2fsck (contrib/fio/verify.sh). Then SIGTERM must end the server with status 0, qemu-img must find
# the image clean, and QEMU must read from it what the guest last read from the disk.
#
# Exit status 0 when all of that holds. QBLKD names the program to test (default: builds the release
# one); SERVER=qemu-storage-daemon tests the test.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_scratch
image=$scratch/disk.qcow2
socket=$scratch/vhost.sock
log=$scratch/server.log
console=$scratch/console

need_qemu
run "$contrib/mkguest.sh"
use_qblkd release

create_image "$image" 1G
start_server "$socket" "$image" "$log" 2
status=0
LIMIT=${LIMIT:-600} SERVER_PID=$server_pid CONSOLE=$console run "$contrib/qemu.sh" "$socket" "$contrib/fio/verify.sh" 2 || status=$?
if [[ $status != 0 ]]; then
    say "the log of $SERVER:"
    tail -n 50 "$log" | sed 's/^/    /'
    die "the guest failed with status $status"
fi
stop_server "$log"
say "$SERVER ended with status 0"

qemu-img check "$image"

in_guest=$(tr -d '\r' <"$console" | sed -n 's/^DISK-SHA256 //p')
qemu-img dd -f qcow2 -O raw bs=1M count=256 "if=$image" "of=$scratch/disk.raw"
in_image=$(sha256sum <"$scratch/disk.raw" | cut -d' ' -f1)
[[ -n $in_guest && $in_guest == "$in_image" ]] ||
    die "the guest read '$in_guest' from the first 256 MiB, qemu-img '$in_image'"
say "qemu-img reads the same data as the guest"

QBLKD=${QBLKD-} run "$contrib/guest-snapshots.sh"
