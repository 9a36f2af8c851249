"""Recipes of images that open but hold damage: met at run time, or found by `check`.

`access` lists what to do, in order, each on the image as it was made: `eio` means that the access
fails with an I/O error and changes no guest data, `zeroes` that it may read as zeroes instead. With
`sets_corrupt`, an image opened for writing carries the corrupt bit afterwards. With `may_refuse`,
refusing to open it is as good, because the pointer is in a table that is loaded at open.
"""

import qcow2
from recipe import recipe

EIO = ["eio"]
FAR = 1 << 40


def access(op, offset=0, length=4096, outcomes=EIO):
    return {"op": op, "offset": offset, "length": length, "outcomes": outcomes}


READ_AND_WRITE = [access("read"), access("write")]


def damaged(name, accesses, small=False, snapshot=False, sets_corrupt=True, may_refuse=False):
    """Registers an image with data from 0 to 128k, broken by the decorated function."""

    def register(change):
        @recipe(name, small)
        def make(r):
            file = r.create(r.file(), "4M")
            r.io(file, [r.write(0, 131072)])
            if snapshot:
                r.snapshot(file, "one")
                r.io(file, [r.write(0, 131072)])
            with r.patch(file) as image:
                change(image)
            r.bad_at_runtime(file, accesses, sets_corrupt, may_refuse)

        return change

    return register


def points_at(target):
    """Guest cluster 0 is mapped, writable in place, to `target(image)`."""

    def change(image):
        image.set_l2_entry(0, qcow2.COPIED | target(image))

    return change


def table_at(target):
    """The only L2 table is said to be at `target(image)`."""

    def change(image):
        image.write_int(image.l1_entry_offset(0), 8, qcow2.COPIED | target(image))

    return change


# --- L2 entries ---

damaged("l2-entry-unaligned", READ_AND_WRITE, small=True)(
    points_at(lambda image: image.host_offset(0) + 512)
)
damaged("l2-entry-beyond", [access("read", outcomes=["eio", "zeroes"]), access("write")], small=True)(
    points_at(lambda image: FAR)
)
damaged("l2-entry-on-l1", [access("write")], small=True)(
    points_at(lambda image: image["l1_table_offset"])
)
damaged("l2-entry-on-refcount-table", [access("write")])(
    points_at(lambda image: image["refcount_table_offset"])
)
damaged("l2-entry-on-refcount-block", [access("write")])(
    points_at(lambda image: image.refcount_block(0))
)
damaged("l2-entry-on-snapshot-table", [access("write")], snapshot=True)(
    points_at(lambda image: image["snapshots_offset"])
)
damaged("l2-entry-zero-unaligned", [access("write")])(
    points_at(lambda image: image.host_offset(0) + 1024 | qcow2.ZERO)
)

# --- L1 entries ---

damaged("l1-entry-unaligned", READ_AND_WRITE, may_refuse=True)(
    table_at(lambda image: image.l2_entry_offset(0) + 512)
)
damaged("l1-entry-beyond", READ_AND_WRITE, small=True, may_refuse=True)(table_at(lambda image: FAR))
damaged("l1-entry-on-l1", [access("write")], may_refuse=True)(
    table_at(lambda image: image["l1_table_offset"])
)
damaged("l1-entry-on-refcount-table", [access("write")], may_refuse=True)(
    table_at(lambda image: image["refcount_table_offset"])
)

# --- Refcount table entries: an allocating write needs them ---


def refcount_block_at(value):
    def change(image):
        image.write_int(image["refcount_table_offset"], 8, value)

    return change


ALLOCATE = [access("write", offset=3 << 20)]
damaged("refcount-block-unaligned", ALLOCATE, may_refuse=True)(refcount_block_at(131072 + 512))
damaged("refcount-block-beyond", ALLOCATE, small=True, may_refuse=True)(refcount_block_at(FAR))

# --- Compressed clusters: damage of the data ---


def compressed(name, change, small=False, sets_corrupt=False):
    @recipe(name, small)
    def make(r):
        file = r.create(r.file(), "1M")
        r.io(file, [r.write(0, 65536, "-c", True), r.write(65536, 65536, "-c", True)])
        with r.patch(file) as image:
            change(image)
        # A partial write needs the old bytes, which cannot be had.
        r.bad_at_runtime(file, READ_AND_WRITE, sets_corrupt)


def spoil_stream(image):
    offset, _ = image.compressed_fields(0)
    image.write(offset, b"\xff" * 64)


def cut_stream(image):
    offset, _ = image.compressed_fields(0)
    image.set_compressed(0, offset // 512 * 512 + 511, 1)


def stream_beyond(image):
    _, sectors = image.compressed_fields(0)
    image.set_compressed(0, FAR, sectors)


def stream_in_header(image):
    image.set_compressed(0, 0, 4)


compressed("compressed-garbage", spoil_stream, small=True)
compressed("compressed-cut", cut_stream)
# These two descriptors point to where no cluster can be: that is metadata again.
compressed("compressed-beyond", stream_beyond, sets_corrupt=True)
compressed("compressed-in-header", stream_in_header, sets_corrupt=True)


# --- For `check`: refcounts and copied flags that are wrong ---


def inconsistent(name, code, small=False, snapshot=False):
    """Registers an image of which qemu-img check says `code`: 2 corruptions, 3 leaks."""

    def register(change):
        @recipe(name, small)
        def make(r):
            file = r.create(r.file(), "4M", cluster_size="4k")
            r.io(file, [r.write(0, 131072), r.write(2 << 20, 65536)])
            if snapshot:
                r.snapshot(file, "one")
                r.io(file, [r.write(0, 65536)])
            with r.patch(file) as image:
                change(image)
            # The damage is to bookkeeping only: the content is what it was.
            raw = r._companion(file, "qcow2", r.name + ".raw")
            r.describe(file, "inconsistent", check=code, raw=raw)

        return change

    return register


def unlink_clusters(image):
    for guest in range(2 << 20, (2 << 20) + 32768, 4096):
        image.set_l2_entry(guest, 0)


def unlink_table(image):
    image.write_int(image.l1_entry_offset(2 << 20), 8, 0)


def set_counts(value):
    def change(image):
        for guest in range(0, 16384, 4096):
            image.set_refcount(image.host_offset(guest), value)

    return change


def toggle_copied(image):
    for guest in range(0, 16384, 4096):
        image.set_l2_entry(guest, image.l2_entry(guest) ^ qcow2.COPIED)


def toggle_l1_copied(image):
    where = image.l1_entry_offset(0)
    image.write_int(where, 8, image.read_int(where, 8) ^ qcow2.COPIED)


def map_twice(image):
    """Two guest clusters share a host cluster that is counted once."""
    image.set_l2_entry(4096, image.l2_entry(0))


def lower_and_leak(image):
    unlink_clusters(image)
    set_counts(0)(image)


def forget_header(image):
    image.set_refcount(0, 0)


inconsistent("check-leaked-clusters", 3, small=True)(unlink_clusters)
inconsistent("check-leaked-table", 3)(unlink_table)
inconsistent("check-counts-too-high", 2)(set_counts(5))
inconsistent("check-counts-zero", 2, small=True)(set_counts(0))
inconsistent("check-copied-flags-missing", 2)(toggle_copied)
inconsistent("check-copied-flags-extra", 2, snapshot=True)(
    lambda image: image.set_l2_entry(2 << 20, image.l2_entry(2 << 20) | qcow2.COPIED)
)
inconsistent("check-l1-copied-flag-missing", 2)(toggle_l1_copied)
inconsistent("check-mapped-twice", 2)(map_twice)
inconsistent("check-low-and-leaked", 2)(lower_and_leak)
inconsistent("check-header-uncounted", 2)(forget_header)
