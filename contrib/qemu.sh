#!/usr/bin/env bash
# contrib/qemu.sh SOCKET GUEST_SCRIPT [QUEUES] - boots the guest of mkguest.sh under QEMU, with the
# vhost-user-blk server that listens on SOCKET as its disk, and runs GUEST_SCRIPT in it.
#
# The guest's console is shown from the end of the boot on. The script finds the disk in $DISK and
# the files of contrib/fio in /fio, and runs under dash. Exit status: the script's; 124 when the time
# limit is over; 125 when the guest ended without a status (it crashed, or QEMU did not start); 126
# when the server (SERVER_PID) ended before the guest did.
#
# Environment:
#   GUEST        folder of mkguest.sh (contrib/guest)
#   LIMIT        seconds (300)
#   ACCEL        tcg or kvm (tcg: works everywhere, also in virtual machines; about 5 s to boot)
#   CPUS, MEMORY of the guest (2; 512, in MiB)
#   FILES        more files to copy into the guest's /
#   DEVICE       more options of the device, such as ",queue-size=256"
#   QEMU_OPTIONS more options of QEMU, split at blanks; before the device
#   RECONNECT_MS have QEMU connect again, so often, after the server went away (needs QEMU 9.2)
#   CONSOLE      file that keeps the whole console
#   SERVER_PID   process to watch

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -ge 2 && $# -le 3 ]] || die "usage: contrib/qemu.sh SOCKET GUEST_SCRIPT [QUEUES]"
socket=$1 guest_script=$2 queues=${3:-1}
guest=${GUEST:-$contrib/guest}
limit=${LIMIT:-300}
memory=${MEMORY:-512}
[[ -S $socket ]] || die "$socket is not a socket"
[[ -f $guest_script ]] || die "no file $guest_script"
[[ -f $guest/complete ]] || die "no complete guest in $guest: run contrib/mkguest.sh"
have qemu-system-x86_64 || die "no qemu-system-x86_64: contrib/quickstart.sh and contrib/test.sh install it"

make_scratch
console=${CONSOLE:-$scratch/console}

# A second archive after the first is unpacked over it.
mkdir -p "$scratch/extra/fio"
cp "$guest_script" "$scratch/extra/guest-script"
cp "$contrib"/fio/* "$scratch/extra/fio/"
for file in ${FILES-}; do cp -r "$file" "$scratch/extra/"; done
{
    cat "$guest/initramfs.cpio"
    (cd "$scratch/extra" && find . -mindepth 1 | "$guest/busybox" cpio -o -H newc -R 0:0 2>/dev/null)
} >"$scratch/initramfs.cpio"

case ${ACCEL:-tcg} in
kvm) accelerator=(-accel kvm -cpu host) ;;
*) accelerator=(-accel "tcg,thread=multi,tb-size=256" -cpu max) ;;
esac

# On a busy host the guest's CPUs stand still for minutes, which is no fault of its kernel; a disk that
# hangs is noticed by the time limit.
patient="nowatchdog rcupdate.rcu_cpu_stall_suppress=1 sysctl.kernel.hung_task_timeout_secs=0"

# vhost-user shares the guest's memory with the server: hence the memfd.
: >"$console"
# shellcheck disable=SC2086 # QEMU_OPTIONS is a list
start timeout -k 5 "$limit" qemu-system-x86_64 \
    -nodefaults -no-user-config -display none -no-reboot \
    -machine q35,memory-backend=memory "${accelerator[@]}" -smp "${CPUS:-2}" -m "$memory" \
    -object "memory-backend-memfd,id=memory,size=${memory}M,share=on" \
    -kernel "$guest/vmlinuz" -initrd "$scratch/initramfs.cpio" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable $patient" \
    -serial "file:$console" ${QEMU_OPTIONS-} \
    -chardev "socket,id=server,path=$socket${RECONNECT_MS:+,reconnect-ms=$RECONNECT_MS}" \
    -device "vhost-user-blk-pci,chardev=server,num-queues=$queues${DEVICE-}" \
    2>"$scratch/errors"
qemu_pid=$started_pid

show_console() {
    tail -n +1 -s 0.2 -f --pid="$qemu_pid" "$console" | sed -u -n -e 's/\r//g' -e '/^GUEST-BOOT/,/^GUEST-EXIT/ { s/^GUEST-BOOT/guest:/; /^GUEST-EXIT/d; s/^/    /; p }'
}
start show_console
console_pid=$started_pid

# Without its server the guest would hang until the time limit.
if [[ -n ${SERVER_PID-} ]]; then
    start tail -s 0.5 -f --pid="$SERVER_PID" /dev/null
    wait -n "$qemu_pid" "$started_pid" || true
    if ! kill -0 "$SERVER_PID" 2>/dev/null; then
        # Both may have ended in the same moment, after the guest was done.
        sleep 1
        if kill -0 "$qemu_pid" 2>/dev/null; then
            warn "the server ended while the guest was running"
            exit 126
        fi
    fi
fi
status=0
wait "$qemu_pid" || status=$?
wait "$console_pid" || true

sed 's/^/QEMU: /' "$scratch/errors" >&2
if [[ $status == 124 || $status == 137 ]]; then
    warn "the guest did not end within $limit s"
    exit 124
fi
guest_status=$(tr -d '\r' <"$console" | sed -n 's/^GUEST-EXIT \([0-9]*\) .*/\1/p' | tail -n 1)
if [[ -z $guest_status ]]; then
    warn "the guest ended without a status (QEMU: $status); the end of its console:"
    tail -n 30 "$console" | tr -d '\r' >&2
    exit 125
fi
exit "$guest_status"
