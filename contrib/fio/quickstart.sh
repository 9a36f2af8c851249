# shellcheck shell=dash
# contrib/fio/quickstart.sh - the guest half of contrib/quickstart.sh: does the disk keep what it is
# given? Checksummed random I/O on two queues, then a file system, written and checked.

# shellcheck source=guest-lib.sh
. /fio/guest-lib.sh

lsblk -d -o NAME,SIZE,TYPE,DISC-MAX,RO "$DISK"
run_fio quickstart.fio
check "mkfs.ext4" mkfs.ext4 -q -F "$DISK"
check "mount" mount -t ext4 "$DISK" /mnt
check "copy files to it" cp -r /bin /usr/lib /mnt/
(cd / && find bin -type f && cd usr && find lib -type f) >/tmp/files
(cd /usr && sed 's,^bin/,/&,' /tmp/files | xargs sha256sum | sed 's, /bin/, bin/,') >/tmp/sums
check "fstrim" fstrim -v /mnt
check "unmount" umount /mnt
drop_caches
check "mount again" mount -t ext4 "$DISK" /mnt
check "all $(wc -l </tmp/sums) files are the same" sh -c 'cd /mnt && sha256sum -c /tmp/sums'
check "unmount again" umount /mnt
check "e2fsck -fn" e2fsck -fn "$DISK"

finish
