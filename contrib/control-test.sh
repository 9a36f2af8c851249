#!/usr/bin/env bash
# contrib/control-test.sh - the control socket of a running qblkd, as other people's tools see it:
# the Python package qemu.qmp asks and listens (tests/it/support/qmp_client.py), and ends the server
# with `quit`, which must leave a clean image and status 0. The vhost-user socket is there meanwhile.
#
# QBLKD names the program to test (default: builds the release one); QBLKD_TEST_PYTHON an interpreter
# that has qemu.qmp (default: python3). Without the package: exit status 77, skipped.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_scratch
image=$scratch/disk.qcow2
control=$scratch/control.sock
log=$scratch/server.log
python=${QBLKD_TEST_PYTHON:-python3}

if ! "$python" -c 'import qemu.qmp'; then
    warn "SKIPPED: $python has no package qemu.qmp; contrib/test.sh installs it"
    exit 77
fi
use_qblkd release
create_image "$image" 64M
start_server "$scratch/vhost.sock" "$image" "$log" 2 --control "$control"
wait_for_socket "$control" "$server_pid" || die "no control socket: $(<"$log")"

# -B: leave no compiled files in the source tree.
run timeout 60 "$python" -B "$repo/tests/it/support/qmp_client.py" "$control" || die "the client failed; the server's log: $(<"$log")"

# The client has told it to end.
wait_for_server "$log"
say "$SERVER ended with status 0 after quit"
qemu-img check "$image"
