# shellcheck shell=dash
# contrib/fio/verify.sh - the guest half of contrib/guest-test.sh: checksummed random I/O on all
# queues, discard and write-zeroes, and a file system that lives through fill, trim and unmount.
# Needs a disk of 1 GiB or more; all that is on it is lost.

# shellcheck source=guest-lib.sh
. /fio/guest-lib.sh

# file_sums FILE: a checksum of every file below /mnt.
file_sums() {
    (cd /mnt && find . -type f | LC_ALL=C sort | xargs sha256sum) >"$1"
}

mount_disk() {
    mount -t ext4 -o discard "$DISK" /mnt
}

fill_files() {
    mkdir /mnt/small /mnt/large
    for number in $(seq 200); do
        head -c $((number * 97)) /dev/urandom >"/mnt/small/$number" || return
    done
    for number in $(seq 12); do
        head -c $((number * 300007)) /dev/urandom >"/mnt/large/$number" || return
    done
    # Programs and modules too, so that not all of it is random.
    cp -r /bin /usr/lib/modules /mnt/
}

reads_as_zeroes() { # OFFSET LENGTH
    fio --name=zeroes --filename="$DISK" --direct=1 --ioengine=libaio --iodepth=8 --rw=read --bs=1m \
        --offset="$1" --size="$2" --verify=pattern --verify_pattern=0x00 --verify_fatal=1 \
        --output-format=terse --output=/dev/null
}

# 1. Checksummed I/O; then all of it compared again, when every job has ended.
run_fio verify.fio
run_fio verify.fio --verify_only

# 2. Write-zeroes and discard. What they leave elsewhere is compared by the next fio run.
check "blkdiscard --zeroout 128 MiB at 576 MiB after writing there" sh -c '
    dd if=/dev/urandom of=$DISK bs=1M seek=576 count=128 oflag=direct 2>/dev/null &&
    blkdiscard --zeroout --offset 576M --length 128M $DISK'
check "zeroes read back" reads_as_zeroes 576m 128m
check "blkdiscard 128 MiB at 704 MiB" blkdiscard --offset 704M --length 128M "$DISK"
run_fio verify.fio --verify_only

# 3. A file system.
check "mkfs.ext4" mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$DISK"
check "mount" mount_disk
check "write files" fill_files
check "checksums" file_sums /tmp/before
check "delete some" rm -r /mnt/large/3 /mnt/large/7 /mnt/small
grep -vE ' \./(large/[37]|small/.*)$' /tmp/before >/tmp/expected
check "fstrim" fstrim -v /mnt
check "write more files" sh -c 'mkdir /mnt/more && cp -r /usr/lib/modules /mnt/more/'
check "unmount" umount /mnt
check "e2fsck -fn" e2fsck -fn "$DISK"
drop_caches
check "mount again" mount_disk
check "files unchanged" sh -c 'cd /mnt && sha256sum -c /tmp/expected && [ $(wc -l </tmp/expected) -gt 100 ]'
check "unmount again" umount /mnt
check "e2fsck -fn again" e2fsck -fn "$DISK"

# 4. For guest-test.sh, which compares it with what QEMU reads from the image afterwards.
echo "DISK-SHA256 $(dd if="$DISK" bs=1M count=256 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)"

finish
