#!/usr/bin/env bash
# contrib/quickstart.sh - see qblkd work: a Linux guest under QEMU writes and verifies data on a qcow2
# image that qblkd serves. Installs what is missing, builds, runs, stops everything, checks the image.
#
# Takes a few minutes the first time, most of them for the build. Everything it makes is in target/,
# contrib/guest/ and a temporary folder that is removed; nothing keeps running.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_scratch
image=$scratch/disk.qcow2
socket=$scratch/vhost.sock
log=$scratch/server.log

step "Tools: a compiler, QEMU, and a guest made of Debian packages"
need_rust
need_qemu
run "$contrib/mkguest.sh"
say "$(cargo --version); $(qemu-system-x86_64 --version | head -n 1)"

step "Build: cargo build --release"
use_qblkd release
say "${QBLKD:-$SERVER}"

step "Image: an empty qcow2 image of 1 GiB"
create_image "$image" 1G
qemu-img info "$image" | sed -n 's/^\(file format\|virtual size\|disk size\|cluster_size\)/    \1/p'

step "Serve it: $SERVER listens on a Unix socket"
start_server "$socket" "$image" "$log" 2
say "process $server_pid serves $image on $socket"

step "Guest: QEMU boots Linux on it; fio writes with checksums and reads everything back"
say "booting (QEMU emulates the CPU: the speed below is that of the emulation)"
status=0
LIMIT=${LIMIT:-600} SERVER_PID=$server_pid run "$contrib/qemu.sh" "$socket" "$contrib/fio/quickstart.sh" 2 || status=$?
if [[ $status != 0 ]]; then
    say "the log of $SERVER:"
    tail -n 50 "$log" | sed 's/^/    /'
    die "the guest failed with status $status"
fi

step "Stop: SIGTERM to $SERVER"
stop_server "$log"
say "ended with status 0; the image is $(du -m "$image" | cut -f1) MiB now"

step "Check the image"
if [[ $SERVER == qblkd ]]; then
    say "qblkd check:"
    "$QBLKD" check "$image" | sed 's/^/        /'
fi
say "qemu-img check:"
qemu-img check "$image" | sed 's/^/        /'

step "Done: the guest got back all that it wrote, and the image is consistent"
