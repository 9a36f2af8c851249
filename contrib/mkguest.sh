#!/usr/bin/env bash
# contrib/mkguest.sh [DIRECTORY] - a Linux guest for QEMU: vmlinuz and initramfs.cpio.
#
# The stock kernel of the distribution and a small root of its packages (fio, e2fsprogs, xfsprogs,
# util-linux, busybox), all fetched with apt and unpacked, never installed: needs no root and changes
# nothing on the host. The packages are resolved against an empty system, so the guest does not
# depend on what the host has.
#
# DIRECTORY is $GUEST, or contrib/guest, by default. It is built once; a second run finds it complete and returns
# at once. `complete` is written last and holds a digest of the recipe (this file and its variables):
# an interrupted or outdated guest is built again. Runs in parallel wait for each other.
#
# Environment: GUEST_KERNEL, a kernel package (default: the distribution's smallest for machines
# like QEMU's).

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

out=$(realpath -m -- "${1:-${GUEST:-$contrib/guest}}")

# COMMAND:PACKAGE
tools=(
    busybox:busybox-static dash:dash fio:fio
    mke2fs:e2fsprogs e2fsck:e2fsprogs dumpe2fs:e2fsprogs
    mkfs.xfs:xfsprogs xfs_repair:xfsprogs xfs_io:xfsprogs
    blkdiscard:util-linux lsblk:util-linux fstrim:util-linux flock:util-linux
)
# Modules and folders of modules, below /lib/modules/VERSION/kernel. What a kernel has built in, or
# does not have, is passed over.
modules=(
    arch/x86/crypto crypto lib
    drivers/virtio drivers/block/virtio_blk
    fs/mbcache fs/jbd2 fs/ext4 fs/xfs
)

[[ $(uname -m) == x86_64 ]] || die "the guest is made for x86-64 only"
if ! have apt-get || ! have dpkg; then
    die "the guest is made of Debian packages, with apt-get and dpkg: copy a contrib/guest folder from a machine that has them"
fi

# shellcheck source=/dev/null
kernel=${GUEST_KERNEL:-$(. /etc/os-release && [[ $ID == ubuntu ]] && echo linux-image-virtual || echo linux-image-cloud-amd64)}
recipe=$({ cat "${BASH_SOURCE[0]}" && echo "$kernel"; } | sha256sum | cut -d' ' -f1)

is_complete() {
    [[ -s $out/vmlinuz && -s $out/initramfs.cpio && -x $out/busybox && -f $out/complete && $(<"$out/complete") == "$recipe" ]]
}

mkdir -p "$out"
exec 9>"$out/.lock"
if ! flock -n 9; then
    say "waiting for another run that makes this guest"
    flock 9
fi
if is_complete; then
    say "guest: $out is complete"
    exit 0
fi

# What a killed run has left; the lock is ours.
rm -rf -- "$out"/.build.*
work=$(mktemp -d "$out/.build.XXXXXX")
on_exit 'rm -rf -- "$work"'
log=$work/log

# ---- packages ------------------------------------------------------------------------------

mkdir -p "$work"/{debs/partial,lists/partial,cache}
: >"$work/status"
apt_options=(
    -q
    -o Dir::State="$work" -o Dir::State::status="$work/status" -o Dir::State::Lists="$work/lists"
    -o Dir::Cache="$work/cache" -o Dir::Cache::archives="$work/debs"
    -o APT::Architecture=amd64 -o APT::Install-Recommends=0 -o APT::Sandbox::User=
    -o Debug::NoLocking=1 -o Acquire::Retries=3
)
fetch() {
    "$@" >>"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die "could not fetch the guest's packages: $*"
    }
}

say "guest: fetching packages (about 100 MB)"
fetch apt-get "${apt_options[@]}" update
# A meta package depends on the image proper, and on much that a guest without an installation
# (initramfs tools, boot loader hooks) does not need: take the image by itself, and its modules
# where they are a package of their own.
case $kernel in
linux-image-[0-9]*) image=$kernel ;;
*) image=$(apt-cache "${apt_options[@]}" depends "$kernel" | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1) ;;
esac
[[ -n $image ]] || die "no kernel package behind '$kernel': set GUEST_KERNEL"
kernel_packages=("$image")
kernel_modules=$(apt-cache "${apt_options[@]}" depends "$image" | sed -n 's/^ *Depends: *\(linux-modules-[0-9].*\)/\1/p' | head -n 1)
[[ -z $kernel_modules ]] || kernel_packages+=("$kernel_modules")
mapfile -t packages < <(printf '%s\n' "${tools[@]#*:}" | sort -u)
fetch apt-get "${apt_options[@]}" -y --download-only install "${packages[@]}"
mkdir "$work/kernel_debs"
cd "$work/kernel_debs"
fetch apt-get "${apt_options[@]}" download "${kernel_packages[@]}"
cd "$work"

# ---- unpack --------------------------------------------------------------------------------

say "guest: unpacking"
mkdir -p root/usr/{bin,sbin,lib,lib64} kernel_root
for directory in bin sbin lib lib64; do ln -s "usr/$directory" "root/$directory"; done
# Through the symlinks of the merged /usr: `dpkg -x` would put a folder in their place.
for deb in debs/*.deb; do
    dpkg --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C root \
        --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale --exclude=./usr/share/perl
done
for deb in kernel_debs/*.deb; do dpkg -x "$deb" kernel_root; done
kernel_image=$(echo kernel_root/boot/vmlinuz-*)
[[ -f $kernel_image ]] || die "no kernel in $image"
version=${kernel_image##*/vmlinuz-}
module_root=kernel_root/lib/modules/$version
[[ -d $module_root ]] || module_root=kernel_root/usr/lib/modules/$version

# ---- initramfs -----------------------------------------------------------------------------

say "guest: initramfs for Linux $version"
tree=$work/initramfs
libraries=usr/lib/x86_64-linux-gnu
mkdir -p "$tree"/{bin,dev,proc,sys,tmp,run,mnt,etc,$libraries,usr/lib/modules}
ln -s bin "$tree/sbin"
ln -s usr/lib "$tree/lib"
ln -s "$libraries" "$tree/lib64"
loader=$(readlink -f "root/$libraries/ld-linux-x86-64.so.2")
cp "$loader" "$tree/$libraries/ld-linux-x86-64.so.2"
# Some packages (Ceph's, which fio links to) keep libraries in a folder of their own.
library_path=$(find "$work/root/$libraries" -name '*.so.*' -printf '%h\n' | LC_ALL=C sort -u | paste -sd:)
for tool in "${tools[@]%%:*}"; do
    file=
    for directory in usr/bin usr/sbin; do
        [[ ! -e root/$directory/$tool ]] || file=$(readlink -f "root/$directory/$tool")
    done
    [[ -n $file ]] || die "no $tool in its package"
    cp "$file" "$tree/bin/$tool"
    [[ $tool != busybox ]] || continue # the only static one
    # The guest's own loader lists the libraries, from the guest's own root.
    "$loader" --inhibit-cache --library-path "$library_path" --list "$file" >needed
    ! grep 'not found' needed || die "libraries of $tool are missing"
    while read -r library; do
        cp -nL "$library" "$tree/$libraries/"
    done < <(sed -n 's/.* => \([^ ]*\) .*/\1/p' needed)
done
[[ ! -d root/$libraries/fio ]] || cp -r "root/$libraries/fio" "$tree/$libraries/"
cp root/etc/mke2fs.conf "$tree/etc/"
ln -s mke2fs "$tree/bin/mkfs.ext4"
# Not busybox as sh: Debian's prefers its own applets (mke2fs, blkdiscard, fstrim) to the real ones.
ln -s dash "$tree/bin/sh"
for applet in $(root/bin/busybox --list); do
    [[ -e $tree/bin/$applet || -L $tree/bin/$applet ]] || ln -s busybox "$tree/bin/$applet"
done
echo 'root:x:0:0:root:/:/bin/sh' >"$tree/etc/passwd"
echo 'root:x:0:' >"$tree/etc/group"

guest_modules=$tree/usr/lib/modules/$version
mkdir "$guest_modules"
cp "$module_root"/modules.* "$guest_modules/"
for module in "${modules[@]}"; do
    for file in "$module_root/kernel/$module" "$module_root/kernel/$module".ko*; do
        [[ -e $file ]] || continue
        mkdir -p "$(dirname "$guest_modules/kernel/$module")"
        cp -r "$file" "$(dirname "$guest_modules/kernel/$module")/"
    done
done
find "$guest_modules" -name '*.ko.xz' -exec xz -d {} + -o -name '*.ko.zst' -exec zstd -q -d --rm {} + -o -name '*.ko.gz' -exec gzip -d {} +
root/bin/busybox depmod -b "$tree/usr" "$version" 2>>"$log" || die "depmod failed: $(tail -n 3 "$log")"

# /init hands over to /guest-script, which qemu.sh adds, and tells qemu.sh its status.
cat >"$tree/init" <<'INIT'
#!/bin/dash
export PATH=/bin HOME=/ TERM=dumb
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd
exec </dev/null >/dev/console 2>&1
for module in virtio_pci virtio_blk crc32c_intel ext4 xfs; do
    modprobe "$module" 2>/dev/null
done
export DISK=/dev/vda
tries=0
while [ ! -b $DISK ] && [ $tries -lt 100 ]; do
    usleep 100000
    tries=$((tries + 1))
done
read -r up _ </proc/uptime
echo "GUEST-BOOT Linux $(uname -r), $(nproc) CPUs, $DISK: $(cat /sys/block/vda/size 2>/dev/null || echo no) sectors, $(ls /sys/block/vda/mq 2>/dev/null | wc -l) queues, booted in $up s"
cd /
sh /guest-script
status=$?
sync
read -r up _ </proc/uptime
echo "GUEST-EXIT $status at $up s"
# The console is a serial line: let it drain.
usleep 100000
poweroff -f
INIT
chmod +x "$tree/init"

# busybox's cpio, here and in qemu.sh: it is at hand wherever the guest is.
(cd "$tree" && find . | LC_ALL=C sort | "$work/root/bin/busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$work/initramfs.cpio"

# ---- into place ----------------------------------------------------------------------------

rm -f "$out/complete"
mv "$work/initramfs.cpio" "$out/initramfs.cpio"
mv "$kernel_image" "$out/vmlinuz"
cp "$tree/bin/busybox" "$out/busybox"
# The data must not be younger than the word that it is there.
sync -f "$out"
echo "$recipe" >"$work/complete"
mv "$work/complete" "$out/complete"
say "guest: $(du -m "$out/initramfs.cpio" | cut -f1) MB initramfs, Linux $version, in $out"
