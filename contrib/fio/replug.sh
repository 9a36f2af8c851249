# shellcheck shell=dash
# contrib/fio/replug.sh - the guest half of the second part of contrib/guest-test.sh: a disk that is
# reset with the machine, and then taken away and given back, each time in the middle of writes.
# contrib/replug.py is the other half; it waits for the lines READY-FOR-... on the console.
#
# The guest remembers nothing over a reset, so the disk's first sector says which boot this is. Needs
# a disk of 128 MiB that is all zeroes.

# shellcheck source=guest-lib.sh
. /fio/guest-lib.sh

# flushed ARGUMENT...: the region that must survive. Writes it, or reads it with --verify_only.
flushed() {
    fio --name=flushed --filename="$DISK" --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite \
        --bs=16k --offset=1m --size=31m --verify=crc32c --verify_fatal=1 --do_verify=0 --end_fsync=1 \
        --output-format=terse --output=/dev/null "$@"
}

# Writes with now and then a flush, in another region, for as long as there is a disk.
load() {
    fio --name=load --filename="$DISK" --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite \
        --bs=16k --offset=32m --size=96m --fsync=64 --time_based --runtime=86400 \
        --output-format=terse --output=/dev/null >/dev/null 2>&1
}

read_stamp() {
    dd if="$DISK" bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\0'
}

write_stamp() { # WORD
    printf %s "$1" | dd of="$DISK" bs=512 count=1 conv=sync,fsync oflag=direct 2>/dev/null
}

# under_load: the load runs, and has begun.
under_load() {
    load &
    load_pid=$!
    writes=$(written)
    while [ "$(written)" -lt $((writes + 50)) ]; do
        kill -0 "$load_pid" || return
        usleep 100000
    done
}

# Writes completed by the disk.
written() {
    read -r _ _ _ _ writes _ <"/sys/block/${DISK#/dev/}/stat"
    echo "$writes"
}

# disk_comes: sets DISK to the disk that there is, whatever its name now.
disk_comes() {
    tries=0
    while [ $tries -lt 600 ]; do
        for DISK in /dev/vd?; do
            [ ! -b "$DISK" ] || return 0
        done
        usleep 100000
        tries=$((tries + 1))
    done
    return 1
}

disk_goes() {
    tries=0
    while [ -b "$DISK" ]; do
        [ $tries -lt 600 ] || return
        usleep 100000
        tries=$((tries + 1))
    done
}

case $(read_stamp) in
'')
    check "write and flush" flushed
    check "stamp" write_stamp reset
    check "load" under_load
    echo "READY-FOR-RESET"
    # The machine is reset here.
    wait "$load_pid"
    echo "the load has ended before the reset"
    exit 1
    ;;
reset)
    check "what was flushed before the reset" flushed --verify_only
    check "write and flush again" flushed --randseed=2
    check "load" under_load
    echo "READY-FOR-UNPLUG"
    check "the disk goes" disk_goes
    # Its writes fail now, which ends it.
    wait "$load_pid"
    check "the disk comes back" disk_comes
    check "what was flushed before the unplug" flushed --randseed=2 --verify_only
    check "write and flush once more" flushed --randseed=3
    check "read it" flushed --randseed=3 --verify_only
    ;;
*)
    echo "the disk does not hold what it should"
    exit 1
    ;;
esac

echo "guest: $passed checks passed, $failed failed"
[ "$failed" = 0 ]
