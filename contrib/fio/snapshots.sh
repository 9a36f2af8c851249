# shellcheck shell=dash
# contrib/fio/snapshots.sh - the guest half of contrib/guest-snapshots.sh: a file system in which
# files are made, removed and verified with checksums, while the host takes snapshots of the disk.
# The host starts when it reads SNAPSHOTS-BEGIN on the console and stops at SNAPSHOTS-END.

# shellcheck source=guest-lib.sh
. /fio/guest-lib.sh

mount_disk() {
    mount -t ext4 -o discard "$DISK" /mnt
}

# Makes trees and removes them, so that the journal has work in every snapshot.
churn() {
    round=0
    while [ ! -e /tmp/stop ]; do
        round=$((round + 1))
        tree=/mnt/tree-$((round % 3))
        rm -rf "$tree" && mkdir "$tree" && cp -r /etc /usr/lib/modules "$tree/" && sync || return
    done
}

check "mkfs.ext4" mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$DISK"
check "mount" mount_disk
mkdir /mnt/fio

echo "SNAPSHOTS-BEGIN"
churn &
churn_pid=$!
run_fio snapshots.fio
echo "SNAPSHOTS-END"
: >/tmp/stop
check "making and removing trees" wait "$churn_pid"

# Everything once more from the disk, after the last snapshot.
drop_caches
run_fio snapshots.fio --verify_only
check "unmount" umount /mnt
check "e2fsck -fn" e2fsck -fn "$DISK"
finish
