"""Recipes of the images that qblkd serves."""

import os

import qcow2
from recipe import parse_size, recipe

# A cluster size, and a disk size that needs several L2 tables where that stays small.
SIZES = {"512": "2M", "1k": "2M", "4k": "5M", "64k": "8M", "256k": "8M", "2M": "9M"}


def mixed(name, size, cluster_size, count=60, small=True, want=(), mix=None, **options):
    """Registers an image that holds a random mixture of everything qemu-io can write."""

    @recipe(name, small)
    def make(r):
        file = r.create(r.file(), size, cluster_size=cluster_size, **options)
        r.mixture(file, parse_size(size), parse_size(cluster_size), count, **(mix or {}))
        r.good(file, want)


# --- Versions, cluster sizes, refcount widths ---

for cluster, disk in SIZES.items():
    mixed("v3-cluster-" + cluster, disk, cluster, small=cluster in ("512", "64k"))
    mixed(
        "v2-cluster-" + cluster, disk, cluster, small=cluster == "64k", compat="0.10", want=("normal",)
    )

for bits in (1, 2, 4, 8, 16, 32, 64):
    # Width 1 has no room for several compressed clusters in one host cluster.
    mixed(
        "refcount-%d" % bits,
        "3M",
        "4k" if bits != 64 else "512",
        small=bits in (1, 64),
        refcount_bits=bits,
        mix={"compressed": bits > 1},
    )


@recipe("many-l2-tables")
def many_l2_tables(r):
    """64k clusters, data in three L2 tables and at the very end."""
    size = parse_size("1G") + parse_size("600M")
    file = r.create(r.file(), size)
    offsets = [0, 511 << 20, 512 << 20, (1 << 30) - 4096, 1 << 30, size - 65536]
    r.io(file, [r.write(offset, 65536) for offset in offsets])
    r.good(file, ("normal",))


@recipe("empty")
def empty(r):
    r.good(r.create(r.file(), "4M"))


@recipe("empty-v2", small=False)
def empty_v2(r):
    r.good(r.create(r.file(), "4M", compat="0.10"))


# --- Disk and file sizes ---

for label, bytes_ in {
    "zero": 0,
    "one-sector": 512,
    "1000-sectors": 512000,
    "1M-and-a-sector": (1 << 20) + 512,
    "2M-less-a-sector": (2 << 20) - 512,
}.items():

    def unaligned(r, bytes_=bytes_, compat="1.1"):
        file = r.create(r.file(), bytes_, compat=compat)
        if bytes_:
            r.io(file, [r.write(0, 512), r.write(bytes_ - 512, 512)])
        r.good(file)

    recipe("size-" + label)(unaligned)
    recipe("size-%s-v2" % label, small=False)(
        lambda r, bytes_=bytes_: unaligned(r, bytes_, compat="0.10")
    )


@recipe("size-unaligned-small-clusters", small=False)
def size_unaligned_small_clusters(r):
    size = 1001 * 512
    file = r.create(r.file(), size, cluster_size="4k")
    r.mixture(file, size, 4096, 30)
    r.io(file, [r.write(size - 1024, 1024)])
    r.good(file, ("normal",))


def cut_tail(r, file, keep):
    """Ends the host file `keep` bytes into its last data cluster, the rest of which is zero."""
    with r.patch(file) as image:
        last = max(image.host_offset(offset) for offset in range(0, image["size"], image.cluster_size))
        image.write(last + keep, bytes(image.cluster_size - keep))
        image.truncate(last + keep)


@recipe("tail-mid-cluster")
def tail_mid_cluster(r):
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(offset, 65536) for offset in range(0, 1 << 20, 65536)])
    cut_tail(r, file, 4096 + 512)
    r.good(file, ("normal",))


@recipe("tail-mid-sector", small=False)
def tail_mid_sector(r):
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(offset, 65536) for offset in range(0, 1 << 20, 65536)])
    cut_tail(r, file, 1234)
    r.good(file, ("normal",))


@recipe("tail-compressed")
def tail_compressed(r):
    """The file ends with the last byte of a compressed stream, before the sectors it is given."""
    file = r.create(r.file(), "256k")
    r.io(file, [r.write(offset, 65536, "-c", True) for offset in range(0, 4 * 65536, 65536)])
    with r.patch(file) as image:
        end, at = 0, 0
        for guest in range(0, 4 * 65536, 65536):
            offset, sectors = image.compressed_fields(guest)
            end = max(end, offset // 512 * 512 + sectors * 512)
        tail = image.read(0, end).rstrip(b"\0")
        at = len(tail)
        image.truncate(at)
    r.good(file, ("compressed",))


# --- Zero clusters ---


@recipe("zero-clusters")
def zero_clusters(r):
    file = r.create(r.file(), "2M")
    r.io(
        file,
        [
            r.write(0, 1 << 20),
            "write -z 65536 131072",
            "write -z -u 262144 131072",
            "write -z 1572864 65536",
            "write -z 4096 8192",
        ],
    )
    r.good(file, ("normal", "zero_plain", "zero_allocated", "unallocated"))


@recipe("zero-over-backing")
def zero_over_backing(r):
    """Zero clusters, plain and allocated, that hide the data of a backing file."""
    base = r.raw_file(r.file(".base.raw"), 1 << 20, 30)
    file = r.create(r.file(), "1M", base, "raw")
    r.io(
        file,
        [
            r.write(0, 200000 // 512 * 512),
            "write -z 0 65536",
            "write -z -u 65536 65536",
            "write -z 524288 131072",
            "write -z 700416 512",
        ],
    )
    r.good(file, ("normal", "zero_plain", "zero_allocated", "unallocated"))


@recipe("discarded")
def discarded(r):
    file = r.create(r.file(), "8M")
    r.io(
        file,
        [r.write(0, 8 << 20)]
        + ["discard %d 196608" % (offset << 16) for offset in range(0, 128, 8)]
        + ["discard 66048 200000"],
    )
    r.good(file, ("normal",))


# --- Preallocation ---

for mode in ("metadata", "falloc", "full"):

    @recipe("prealloc-" + mode, small=mode == "metadata")
    def preallocated(r, mode=mode):
        file = r.create(r.file(), "4M", preallocation=mode)
        r.io(file, [r.write(1 << 20, 70144), "write -z 2097152 65536"])
        r.good(file, ("normal", "zero_allocated"))


# --- Compressed clusters ---

for method in ("zlib", "zstd"):
    for cluster in ("4k", "64k", "2M"):

        @recipe("%s-cluster-%s" % (method, cluster), small=cluster == "64k")
        def converted(r, method=method, cluster=cluster):
            """All compressed, as `qemu-img convert -c` leaves it."""
            source = os.path.join(r.scratch, "source.raw")
            with open(source, "wb") as raw:
                raw.truncate(5 << 20)
                raw.seek(300000)
                raw.write(r.bytes(3 << 20, compressible=True))
            options = "compression_type=%s,cluster_size=%s" % (method, cluster)
            file = r.file()
            r.run("qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", options, source, file)
            r.good(file, ("compressed",))

    @recipe("%s-and-normal" % method)
    def compressed_and_normal(r, method=method):
        """Some clusters compressed, some overwritten since, some never compressed."""
        file = r.create(r.file(), "4M", compression_type=method)
        compress = [r.write(at, 65536, "-c", True) for at in range(0, 2 << 20, 65536)]
        r.io(file, compress + [r.write(100352, 70144), "discard 1048576 65536", r.write(3 << 20, 131072)])
        r.good(file, ("compressed", "normal", "unallocated"))

    @recipe("%s-in-backing" % method, small=False)
    def compressed_in_backing(r, method=method):
        base = r.create(r.file(".base.qcow2"), "2M", compression_type=method, cluster_size="4k")
        r.io(base, [r.write(at, 4096, "-c", True) for at in range(0, 1 << 20, 4096)])
        file = r.create(r.file(), "2M", base, "qcow2")
        r.io(file, [r.write(69632, 512), r.write(524288, 65536, "-c", True)])
        r.good(file, ("normal", "compressed", "unallocated"))


@recipe("zlib-v2", small=False)
def zlib_v2(r):
    file = r.create(r.file(), "1M", compat="0.10", cluster_size="4k")
    r.io(file, [r.write(at, 4096, "-c", True) for at in range(0, 1 << 20, 8192)])
    r.good(file, ("compressed", "unallocated"))


@recipe("compressed-and-snapshot")
def compressed_and_snapshot(r):
    """Host clusters with several compressed clusters, each counted twice."""
    file = r.create(r.file(), "1M", cluster_size="16k")
    r.io(file, [r.write(at, 16384, "-c", True) for at in range(0, 1 << 20, 16384)])
    r.snapshot(file, "before")
    r.io(file, [r.write(20480, 4096), "discard 65536 81920", r.write(65536, 16384, "-c", True)])
    r.good(file, ("compressed", "normal", "unallocated"))


# --- Backing chains ---


@recipe("chain-raw")
def chain_raw(r):
    base = r.raw_file(r.file(".base.raw"), 2 << 20)
    file = r.create(r.file(), "2M", base, "raw")
    r.io(file, [r.write(4096, 512), r.write(1 << 20, 65536)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-three")
def chain_three(r):
    """qcow2 on qcow2 on raw, each with other cluster sizes and each shorter than the one above."""
    base = r.raw_file(r.file(".base.raw"), 1_000_448)
    middle = r.create(r.file(".middle.qcow2"), 1_500_160, base, "raw", cluster_size="4k")
    r.mixture(middle, 1_500_160, 4096, 20)
    file = r.create(r.file(), "3M", middle, "qcow2", cluster_size="64k")
    r.mixture(file, 3 << 20, 65536, 12)
    r.good(file, ("normal", "unallocated"))


@recipe("chain-large-on-small-clusters", small=False)
def chain_large_on_small(r):
    base = r.create(r.file(".base.qcow2"), "6M", cluster_size="512", refcount_bits=1)
    r.mixture(base, 6 << 20, 512, 60, compressed=False)
    file = r.create(r.file(), "6M", base, "qcow2", cluster_size="2M")
    r.io(file, [r.write((2 << 20) + 512, 1024)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-small-on-large-clusters", small=False)
def chain_small_on_large(r):
    base = r.create(r.file(".base.qcow2"), "6M", cluster_size="2M")
    r.io(base, [r.write(3 << 20, 1 << 20)])
    file = r.create(r.file(), "6M", base, "qcow2", cluster_size="512")
    r.mixture(file, 6 << 20, 512, 60)
    r.good(file, ("normal", "unallocated"))


@recipe("chain-longer-backing", small=False)
def chain_longer_backing(r):
    """The backing file is longer than the overlay; what lies past the end must not show."""
    base = r.raw_file(r.file(".base.raw"), 4 << 20, 40)
    file = r.create(r.file(), (1 << 20) + 512, base, "raw")
    r.io(file, [r.write(512, 512)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-ends-mid-cluster")
def chain_ends_mid_cluster(r):
    """The backing file ends inside a cluster of the overlay, and inside a sector."""
    base = r.file(".base.raw")
    with open(r.path(base), "wb") as raw:
        raw.write(r.bytes(300_000))
    file = r.create(r.file(), "1M", base, "raw")
    # Copies the cluster in which the backing file ends.
    r.io(file, [r.write(262144, 512)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-v2-on-v3", small=False)
def chain_v2_on_v3(r):
    """A v2 overlay has no zero flag: zeroes over backing data must be written out."""
    base = r.create(r.file(".base.qcow2"), "2M")
    r.io(base, [r.write(0, 2 << 20)])
    file = r.create(r.file(), "2M", base, "qcow2", compat="0.10")
    r.io(file, [r.write(65536, 4096), "write -z 131072 65536"])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-snapshots-in-backing", small=False)
def chain_snapshots_in_backing(r):
    base = r.create(r.file(".base.qcow2"), "2M")
    r.io(base, [r.write(0, 1 << 20)])
    r.snapshot(base, "old")
    r.io(base, [r.write(0, 300032)])
    file = r.create(r.file(), "2M", base, "qcow2")
    r.io(file, [r.write(65536, 512)])
    r.snapshot(file, "top")
    r.good(file, ("shared", "unallocated"))


@recipe("chain-eight", small=False)
def chain_eight(r):
    below, fmt = r.raw_file(r.file(".0.raw"), 1 << 20, 10), "raw"
    for level in range(1, 8):
        image = r.create(r.file(".%d.qcow2" % level), "1M", below, fmt, cluster_size="4k")
        r.mixture(image, 1 << 20, 4096, 6)
        below, fmt = image, "qcow2"
    file = r.create(r.file(), "1M", below, fmt)
    r.io(file, [r.write(70144, 512)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-subfolder")
def chain_subfolder(r):
    """The backing file lies below the image's own folder: allowed without an option."""
    base = r.raw_file(r.made_file(r.name + "/bases/base.raw"), 1 << 20)
    file = r.create(r.made_file(r.name + "/top.qcow2"), "1M", "bases/base.raw", "raw")
    assert base.endswith("bases/base.raw")
    r.io(file, [r.write(65536, 512)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-backing-dir")
def chain_backing_dir(r):
    """The backing files lie in a folder beside the image's own: only with --backing-dir."""
    r.raw_file(r.made_file(r.name + "/bases/low.raw"), 1 << 20)
    middle = r.create(r.made_file(r.name + "/bases/middle.qcow2"), "1M", "low.raw", "raw")
    r.io(middle, [r.write(131072, 4096)])
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "../bases/middle.qcow2", "qcow2")
    r.io(file, [r.write(65536, 512)])
    r.good(file, ("normal", "unallocated"), options=["--backing-dir", "@/%s/bases" % r.name])


@recipe("chain-link-inside", small=False)
def chain_link_inside(r):
    """A symbolic link that resolves to a file in the image's own folder."""
    r.raw_file(r.made_file(r.name + "/target.raw"), 1 << 20)
    link = r.made_file(r.name + "/link.raw")
    if not os.path.lexists(r.path(link)):
        os.symlink("target.raw", r.path(link))
    file = r.create(r.made_file(r.name + "/top.qcow2"), "1M", "link.raw", "raw")
    r.io(file, [r.write(65536, 512)])
    r.good(file, ("normal", "unallocated"))


@recipe("chain-dirty-backing", small=False)
def chain_dirty_backing(r):
    """The dirty bit of a backing file says nothing about its mapping: it is served as it is."""
    base = r.create(r.file(".base.qcow2"), "1M")
    r.io(base, [r.write(0, 524288)])
    with r.patch(base) as image:
        image["incompatible_features"] |= qcow2.INCOMPAT_DIRTY
    file = r.create(r.file(), "1M", base, "qcow2")
    r.good(file)


# --- Internal snapshots ---

for bits in (2, 16):

    @recipe("snapshots-refcount-%d" % bits)
    def snapshots(r, bits=bits):
        """Several snapshots, one deleted again, and work between them."""
        file = r.create(r.file(), "2M", cluster_size="4k", refcount_bits=bits)
        # A width of 2 counts to 3: the active tree and two snapshots, no compressed neighbours.
        names = ("first", "second") if bits == 2 else ("first", "second", "third", "fourth")
        for name in names:
            r.mixture(file, 2 << 20, 4096, 25, compressed=bits > 2)
            r.snapshot(file, name)
        if bits > 2:
            r.run("qemu-img", "snapshot", "-d", "second", file)
        r.mixture(file, 2 << 20, 4096, 10, compressed=bits > 2)
        r.good(file, ("shared", "normal"))


@recipe("snapshot-all-shared")
def snapshot_all_shared(r):
    """Nothing written since the snapshot: every table and cluster is shared."""
    file = r.create(r.file(), "2M")
    r.io(file, [r.write(0, 1 << 20), "write -z 1048576 65536"])
    r.snapshot(file, "now")
    r.good(file, ("shared", "zero_plain"))


@recipe("snapshot-v2", small=False)
def snapshot_v2(r):
    file = r.create(r.file(), "2M", cluster_size="4k", compat="0.10")
    r.mixture(file, 2 << 20, 4096, 25)
    r.snapshot(file, "one")
    r.mixture(file, 2 << 20, 4096, 10)
    r.good(file, ("shared", "normal"))


@recipe("snapshot-512", small=False)
def snapshot_512(r):
    """Small clusters: the L1 table and the snapshot's copy of it span several clusters."""
    file = r.create(r.file(), "4M", cluster_size="512")
    r.mixture(file, 4 << 20, 512, 80)
    r.snapshot(file, "one")
    r.mixture(file, 4 << 20, 512, 30)
    r.good(file, ("shared", "normal"))


@recipe("snapshot-smaller-disk")
def snapshot_smaller_disk(r):
    """The disk was made larger after the snapshot."""
    file = r.create(r.file(), "1M", cluster_size="4k")
    r.io(file, [r.write(0, 1 << 20)])
    r.snapshot(file, "small")
    r.run("qemu-img", "resize", "-q", "-f", "qcow2", file, 5 << 20)
    r.io(file, [r.write(4 << 20, 65536), r.write(4096, 512)])
    r.good(file, ("shared", "normal"))


@recipe("snapshot-vm-state", small=False)
def snapshot_vm_state(r):
    """A snapshot with vm state, which lies past the end of the disk in both L1 tables."""
    file = r.create(r.file(), "2M", cluster_size="4k")
    r.io(file, [r.write(0, 65536), r.write(1 << 20, 1 << 20)])
    with r.patch(file) as image:
        image["size"] = 1 << 20
    r.snapshot(file, "running")
    with r.patch(file) as image:
        (offset,) = image.snapshot_offsets()
        image.set_snapshot(offset, "vm_state_size", 1 << 20)
        image.set_snapshot(offset, "vm_state_size_long", 1 << 20)
    r.good(file, ("shared",))


@recipe("snapshot-many", small=False)
def snapshot_many(r):
    file = r.create(r.file(), "256k", cluster_size="512", refcount_bits=8)
    for number in range(40):
        r.io(file, [r.write(number * 1024, 512)])
        r.snapshot(file, "s%02d-with-quite-a-long-name" % number)
    r.good(file, ("shared",))


@recipe("snapshot-deleted", small=False)
def snapshot_deleted(r):
    """The last snapshot is gone again: no cluster is shared, and the copied flags are back."""
    file = r.create(r.file(), "2M", cluster_size="4k")
    r.mixture(file, 2 << 20, 4096, 25, compressed=False)
    r.snapshot(file, "gone")
    r.mixture(file, 2 << 20, 4096, 10, compressed=False)
    r.run("qemu-img", "snapshot", "-d", "gone", file)
    r.good(file, ("normal",))


# --- Lazy refcounts, dirty and corrupt bits ---


@recipe("lazy-refcounts")
def lazy_refcounts(r):
    file = r.create(r.file(), "2M", lazy_refcounts="on")
    r.io(file, [r.write(0, 300032)])
    r.good(file, ("normal",))


@recipe("dirty")
def dirty(r):
    """The dirty bit is set, and the refcounts are right all the same."""
    file = r.create(r.file(), "2M", lazy_refcounts="on")
    r.io(file, [r.write(0, 300032)])
    with r.patch(file) as image:
        image["incompatible_features"] |= qcow2.INCOMPAT_DIRTY
    r.good(file, ("normal",), dirty=True)


def dirty_with(name, change, small=True, snapshot=False):
    """Registers a dirty image in which `change` has spoilt what the bit excuses."""

    @recipe(name, small)
    def make(r):
        file = r.create(r.file(), "2M", cluster_size="4k")
        r.mixture(file, 2 << 20, 4096, 30, compressed=False)
        r.io(file, [r.write(0, 65536)])
        if snapshot:
            r.snapshot(file, "kept")
            r.io(file, [r.write(1 << 20, 65536)] + [r.write(8192, 4096)])
        with r.patch(file) as image:
            image["incompatible_features"] |= qcow2.INCOMPAT_DIRTY
            change(image)
        r.good(file, ("normal",), dirty=True)


def lower(image):
    for guest in range(0, 40960, 4096):
        image.set_refcount(image.host_offset(guest), 0)


def higher(image):
    for guest in range(0, 40960, 4096):
        image.set_refcount(image.host_offset(guest), 3)


def lower_tables(image):
    """Counts of the L2 table itself and of shared clusters lag behind."""
    image.set_refcount(image.l2_entry_offset(0), 1)
    for guest in range(16384, 65536, 4096):
        image.set_refcount(image.host_offset(guest), 1)


def flip_copied(image):
    for guest in range(0, 65536, 4096):
        image.set_l2_entry(guest, image.l2_entry(guest) ^ qcow2.COPIED)


dirty_with("dirty-counts-too-low", lower)
dirty_with("dirty-counts-too-high", higher, small=False)
dirty_with("dirty-copied-flags", flip_copied, small=False)
dirty_with("dirty-snapshot-counts", lower_tables, snapshot=True)
dirty_with("dirty-snapshot-copied-flags", flip_copied, small=False, snapshot=True)


@recipe("corrupt-bit")
def corrupt_bit(r):
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(0, 300032)])
    with r.patch(file) as image:
        image["incompatible_features"] |= qcow2.INCOMPAT_CORRUPT
    r.good(file, ("normal",), read_only=True, expect=[["corrupt"]])


# --- Features and extensions that are passed over ---


@recipe("bitmaps")
def bitmaps(r):
    """Persistent bitmaps: the autoclear bit goes before the first write."""
    file = r.create(r.file(), "2M")
    r.run("qemu-img", "bitmap", "--add", file, "backup0")
    r.run("qemu-img", "bitmap", "--add", "-g", "32k", file, "backup1")
    r.io(file, [r.write(0, 300032)])
    r.good(file, ("normal",), leaks_ok=True)


@recipe("bitmaps-stale", small=False)
def bitmaps_stale(r):
    """The bitmaps extension without its autoclear bit: stale, to be ignored."""
    file = r.create(r.file(), "2M")
    r.run("qemu-img", "bitmap", "--add", file, "backup0")
    with r.patch(file) as image:
        image["autoclear_features"] = 0
    r.good(file, leaks_ok=True)


@recipe("unknown-autoclear")
def unknown_autoclear(r):
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(0, 300032)])
    with r.patch(file) as image:
        image["autoclear_features"] = 1 << 37
    r.good(file, ("normal",))


@recipe("unknown-compatible", small=False)
def unknown_compatible(r):
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(0, 300032)])
    with r.patch(file) as image:
        image["compatible_features"] |= 1 << 41
    r.good(file, ("normal",))


@recipe("unknown-extension")
def unknown_extension(r):
    base = r.raw_file(r.file(".base.raw"), 1 << 20)
    file = r.create(r.file(), "1M", base, "raw")
    with r.patch(file) as image:
        image.set_extensions(image.extensions() + [(0x51424C4B, b"thirteen byte")])
    r.io(file, [r.write(0, 512)])
    r.good(file, ("normal",))


@recipe("extension-backing-format-alone", small=False)
def extension_backing_format_alone(r):
    """A backing format, but no backing file."""
    file = r.create(r.file(), "1M")
    with r.patch(file) as image:
        image.set_extensions([(qcow2.EXT_BACKING_FORMAT, b"qcow2")] + image.extensions())
    r.good(file)


@recipe("header-104", small=False)
def header_104(r):
    """The header ends before the compression type, as older writers leave it."""
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(0, 70144), r.write(131072, 65536, "-c", True)])
    with r.patch(file) as image:
        extensions = image.extensions()
        image["header_length"] = 104
        image.set_extensions(extensions)
    r.good(file, ("normal", "compressed"))


@recipe("header-128", small=False)
def header_128(r):
    """The header has fields of a later revision, all zero."""
    file = r.create(r.file(), "1M")
    r.io(file, [r.write(0, 70144)])
    with r.patch(file) as image:
        extensions = image.extensions()
        image.write(104, bytes(24))
        image["header_length"] = 128
        image.set_extensions(extensions)
    r.good(file, ("normal",))


@recipe("l1-longer-than-needed", small=False)
def l1_longer(r):
    file = r.create(r.file(), "8M", cluster_size="4k")
    r.io(file, [r.write(0, 70144)])
    with r.patch(file) as image:
        image["size"] = 1 << 20
    r.good(file, ("normal",))


# --- Raw images ---

for label, bytes_ in {"plain": 3 << 20, "one-sector": 512, "unaligned": (1 << 20) + 512}.items():

    @recipe("raw-" + label, small=label == "plain")
    def raw(r, bytes_=bytes_):
        r.good(r.raw_file(r.file(".img"), bytes_), format="raw")


# --- Random mixtures ---

MIXTURES = [
    ("512", 16, "zlib"),
    ("1k", 4, "zstd"),
    ("2k", 8, "zlib"),
    ("4k", 64, "zstd"),
    ("8k", 32, "zlib"),
    ("16k", 16, "zstd"),
    ("32k", 16, "zlib"),
    ("64k", 16, "zlib"),
    ("128k", 8, "zstd"),
    ("512k", 16, "zstd"),
]

for number, (cluster, bits, method) in enumerate(MIXTURES):

    @recipe("mixture-%d" % number, small=number in (0, 7))
    def mixture(r, cluster=cluster, bits=bits, method=method):
        """Everything at once: a chain of two, compressed clusters, snapshots, odd sizes."""
        step = parse_size(cluster)
        size = min(max(200 * step, 1 << 20), 4 << 20) + 512 * r.random.randrange(1, 9)
        base_size = size // 1024 * 512
        base = r.create(r.file(".base.qcow2"), base_size, cluster_size="4k")
        r.mixture(base, base_size, 4096, 40)
        file = r.create(
            r.file(),
            size,
            base,
            "qcow2",
            cluster_size=cluster,
            refcount_bits=bits,
            compression_type=method,
        )
        # A narrow count and packed compressed clusters do not go together with snapshots.
        compressed = bits > 4
        for name in ("one", "two"):
            r.mixture(file, size, step, 25, compressed)
            r.snapshot(file, name)
        r.mixture(file, size, step, 25, compressed)
        r.good(file, ("normal", "unallocated"))
