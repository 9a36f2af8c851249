"""Recipes of images that must be refused: header, tables, extensions, snapshots, truncation.

Each starts from a sound image with data, so that nothing but the one patched field is wrong.
"""

import os
import struct

import qcow2
from recipe import recipe

BEYOND = ("beyond", "past the end", "end of the file", "end of file", "outside", "truncated", "short")
ALIGN = ("align", "multiple")


def broken(name, *expect, small=False, prepare=None, size="1M", also_read_only=True, **options):
    """Registers a sound image that the decorated function then breaks with an open `Image`."""

    def register(change):
        @recipe(name, small)
        def make(r):
            file = r.create(r.file(), size, **options)
            r.io(file, [r.write(0, 131072)])
            if prepare:
                prepare(r, file)
            with r.patch(file) as image:
                change(image)
            r.bad(file, *expect, also_read_only=also_read_only)

        return change

    return register


def field(name, which, value, *expect, **more):
    """Registers an image with one header field set to a value that is wrong."""

    @broken(name, *expect, **more)
    def change(image):
        image[which] = value(image) if callable(value) else value


# --- Header fields ---

field("bad-magic", "magic", 0x514649FC, ("magic", "not a qcow2", "not qcow2"), small=True)
field("bad-version-0", "version", 0, "version")
field("bad-version-1", "version", 1, "version")
field("bad-version-4", "version", 4, "version", small=True)
for bits in (0, 8, 22, 64, 0xFFFFFFFF):
    words = ("cluster_bits", "cluster size", "cluster bits")
    field("bad-cluster-bits-%d" % bits, "cluster_bits", bits, words, small=bits in (8, 22))
for method, label in ((1, "aes"), (2, "luks-number"), (3, "unknown")):
    field("bad-crypt-" + label, "crypt_method", method, "encrypt", small=method == 1)
field("bad-crypt-v2", "crypt_method", 1, "encrypt", compat="0.10")
for length in (0, 100, 109, 65537, 0xFFFFFFF8):
    words = ("header length", "header_length", "header is")
    field("bad-header-length-%d" % length, "header_length", length, words, small=length == 100)
for order in (7, 64, 0xFFFFFFFF):
    words = ("refcount_order", "refcount order", "refcount width", "refcount_bits", "refcount bits")
    field("bad-refcount-order-%d" % order, "refcount_order", order, words, small=order == 7)
field("bad-size-huge", "size", (1 << 64) - 512, ("size", "l1", "large"))


@recipe("bad-version-qcow1")
def version_qcow1(r):
    """The older format, with the same magic."""
    file = r.file(".qcow")
    r.run("qemu-img", "create", "-q", "-f", "qcow", file, "1M")
    r.bad(file, "version")


@recipe("bad-format-vmdk", small=False)
def format_vmdk(r):
    file = r.file(".vmdk")
    r.run("qemu-img", "create", "-q", "-f", "vmdk", file, "1M")
    r.bad(file, ("magic", "not a qcow2", "not qcow2"))


@recipe("bad-format-raw")
def format_raw(r):
    """A raw image that is opened as qcow2 must not be probed into being served."""
    file = r.file(".img")
    with open(r.path(file), "wb") as raw:
        raw.write(r.bytes(1 << 20))
    r.bad(file, ("magic", "not a qcow2", "not qcow2"))


@recipe("bad-luks")
def luks(r):
    file = r.file()
    secret = ["--object", "secret,id=s,data=corpus"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    r.run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, file, "1M")
    r.bad(file, "encrypt")


# --- L1 table ---

L1 = ("l1",)
field("bad-l1-size-small", "l1_size", 0, L1, small=True)
field("bad-l1-size-too-small", "l1_size", 1, L1, size="8M", cluster_size="4k")
field("bad-l1-size-large", "l1_size", (32 << 20) // 8 + 1, L1, small=True)
field("bad-l1-size-max", "l1_size", 0xFFFFFFFF, L1)
field("bad-l1-offset-unaligned", "l1_table_offset", lambda i: i["l1_table_offset"] + 8, L1, ALIGN)
field("bad-l1-offset-zero", "l1_table_offset", 0, L1)
field("bad-l1-offset-beyond", "l1_table_offset", 1 << 40, L1, BEYOND, small=True)
field("bad-l1-offset-huge", "l1_table_offset", 0xFFFFFFFFFFFF0000, L1)

# --- Refcount table ---

REFCOUNT = ("refcount table", "refcount_table")
field(
    "bad-refcount-table-unaligned",
    "refcount_table_offset",
    lambda i: i["refcount_table_offset"] + 512,
    REFCOUNT,
    ALIGN,
)
field("bad-refcount-table-zero", "refcount_table_offset", 0, REFCOUNT)
field("bad-refcount-table-beyond", "refcount_table_offset", 1 << 40, REFCOUNT, BEYOND, small=True)
field("bad-refcount-table-huge", "refcount_table_offset", 0xFFFFFFFFFFFF0000, REFCOUNT)
field("bad-refcount-table-clusters-0", "refcount_table_clusters", 0, REFCOUNT, also_read_only=False)
field("bad-refcount-table-clusters-max", "refcount_table_clusters", 0xFFFFFFFF, REFCOUNT, small=True)
field("bad-refcount-table-9M", "refcount_table_clusters", (8 << 20) // 65536 + 1, REFCOUNT)

# --- Features ---


@recipe("bad-data-file")
def data_file(r):
    data = r.file(".data")
    file = r.create(r.file(), "1M", data_file=data)
    r.bad(file, ("external data file", "data file"))


@recipe("bad-data-file-raw", small=False)
def data_file_raw(r):
    data = r.file(".data")
    file = r.create(r.file(), "1M", data_file=data, data_file_raw="on")
    r.bad(file, ("external data file", "data file"))


@recipe("bad-extended-l2")
def extended_l2(r):
    file = r.create(r.file(), "1M", extended_l2="on")
    r.io(file, [r.write(0, 65536)])
    r.bad(file, ("extended l2", "extended_l2"))


def add_feature_name(image, kind, bit, name):
    extensions = dict(image.extensions())
    table = extensions.get(qcow2.EXT_FEATURE_NAMES, b"")
    entry = bytes([kind, bit]) + name.encode().ljust(46, b"\0")
    extensions[qcow2.EXT_FEATURE_NAMES] = table + entry
    image.set_extensions(list(extensions.items()))


@broken("bad-incompatible-named", "time travel", small=True)
def incompatible_named(image):
    image["incompatible_features"] = 1 << 42
    add_feature_name(image, 0, 42, "time travel")


@broken("bad-incompatible-named-otherwise", ("43", "0x80000000000"))
def incompatible_named_otherwise(image):
    """The table names bit 43 among the compatible features only: that is not its name."""
    image["incompatible_features"] = 1 << 43
    add_feature_name(image, 1, 43, "innocent")


@broken("bad-incompatible-unnamed", ("unknown", "unsupported", "not supported"), ("5", "0x20"))
def incompatible_unnamed(image):
    image["incompatible_features"] = 1 << 5
    image.set_extensions([])


@broken("bad-incompatible-63", ("unknown", "unsupported", "not supported"), ("63", "0x8000000000000000"))
def incompatible_63(image):
    image["incompatible_features"] = 1 << 63


@broken("bad-incompatible-and-dirty", ("6", "0x40"))
def incompatible_and_dirty(image):
    """Nothing may be repaired in an image that has features we do not know."""
    image["incompatible_features"] = qcow2.INCOMPAT_DIRTY | 1 << 6


# --- Compression type ---

COMPRESSION = ("compression",)
field("bad-compression-without-bit", "compression_type", 1, COMPRESSION, small=True)


@broken("bad-compression-bit-without-type", COMPRESSION)
def compression_bit_alone(image):
    image["incompatible_features"] |= qcow2.INCOMPAT_COMPRESSION


@broken("bad-compression-unknown", COMPRESSION, small=True)
def compression_unknown(image):
    image["incompatible_features"] |= qcow2.INCOMPAT_COMPRESSION
    image["compression_type"] = 2


@broken("bad-compression-header-104", COMPRESSION)
def compression_header_104(image):
    """The bit is set, but the header ends before the type."""
    extensions = image.extensions()
    image["incompatible_features"] |= qcow2.INCOMPAT_COMPRESSION
    image["header_length"] = 104
    image.set_extensions(extensions)


# --- Header extensions ---


def raw_extension(kind, length):
    def change(image):
        image.write(image["header_length"], struct.pack(">II", kind, length))

    return change


broken("bad-extension-length", "extension", small=True)(raw_extension(0x51424C4B, 65536))
broken("bad-extension-length-max", "extension")(raw_extension(0x51424C4B, 0xFFFFFFFF))
broken("bad-extension-backing-format-long", ("extension", "backing format"))(
    raw_extension(qcow2.EXT_BACKING_FORMAT, 1024)
)


def add_bitmap(r, file):
    r.run("qemu-img", "bitmap", "--add", file, "backup0")


def spoil_bitmaps(offset, data):
    def change(image):
        extensions = dict(image.extensions())
        old = extensions[qcow2.EXT_BITMAPS]
        extensions[qcow2.EXT_BITMAPS] = old[:offset] + data + old[offset + len(data) :]
        image.set_extensions(list(extensions.items()))

    return change


BITMAPS = "bitmap"
broken("bad-bitmaps-count-0", BITMAPS, prepare=add_bitmap)(spoil_bitmaps(0, bytes(4)))
broken("bad-bitmaps-count-max", BITMAPS, prepare=add_bitmap)(spoil_bitmaps(0, b"\xff" * 4))
broken("bad-bitmaps-reserved", BITMAPS, prepare=add_bitmap)(spoil_bitmaps(4, b"\0\0\0\1"))
broken("bad-bitmaps-directory-unaligned", BITMAPS, prepare=add_bitmap)(spoil_bitmaps(23, b"\x10"))


@broken("bad-bitmaps-short", BITMAPS, prepare=add_bitmap)
def bitmaps_short(image):
    extensions = dict(image.extensions())
    extensions[qcow2.EXT_BITMAPS] = extensions[qcow2.EXT_BITMAPS][:16]
    image.set_extensions(list(extensions.items()))


# --- Snapshot table ---


def take_snapshots(r, file):
    r.snapshot(file, "one")
    r.io(file, [r.write(0, 4096)])
    r.snapshot(file, "two")


SNAPSHOTS = ("snapshot",)
more = {"prepare": take_snapshots}
field("bad-snapshots-count-65537", "nb_snapshots", 65537, SNAPSHOTS, small=True, **more)
field("bad-snapshots-count-max", "nb_snapshots", 0xFFFFFFFF, SNAPSHOTS, **more)
field(
    "bad-snapshots-unaligned",
    "snapshots_offset",
    lambda i: i["snapshots_offset"] + 8,
    SNAPSHOTS,
    ALIGN,
    **more,
)
field("bad-snapshots-beyond", "snapshots_offset", 1 << 40, SNAPSHOTS, BEYOND, small=True, **more)
field("bad-snapshots-huge", "snapshots_offset", 0xFFFFFFFFFFFF0000, SNAPSHOTS, **more)
field("bad-snapshots-zero", "snapshots_offset", 0, SNAPSHOTS, **more)


def snapshot_field(name, which, value, small=False):
    @broken(name, SNAPSHOTS, small=small, **more)
    def change(image):
        image.set_snapshot(image.snapshot_offsets()[1], which, value)


snapshot_field("bad-snapshot-l1-size", "l1_size", 0xFFFFFFFF)
snapshot_field("bad-snapshot-extra-size", "extra_data_size", 0xFFFFFFFF, small=True)


@broken("bad-snapshots-cut", SNAPSHOTS, **more)
def snapshots_cut(image):
    """The file ends inside the snapshot table."""
    image.write(image.length(), bytes(-image.length() % image.cluster_size))
    table = image.read(image["snapshots_offset"], 4096)
    end = image.length()
    image.write(end, table[:60])
    image["snapshots_offset"] = end


def not_closed(image):
    """Leaves what a repair would find to do: the dirty bit, and a count that is too high."""
    image["incompatible_features"] |= qcow2.INCOMPAT_DIRTY
    image.set_refcount(image.host_offset(0), 3)


@broken("bad-dirty-snapshots-cut", SNAPSHOTS, **more)
def dirty_snapshots_cut(image):
    """No repair makes up for a lost snapshot table, so none may begin."""
    snapshots_cut(image)
    not_closed(image)


@broken("bad-dirty-snapshot-l1-beyond", SNAPSHOTS, small=True, **more)
def dirty_snapshot_l1_beyond(image):
    image.set_snapshot(image.snapshot_offsets()[1], "l1_table_offset", 1 << 40)
    not_closed(image)


@broken("bad-dirty-and-corrupt", "corrupt", small=True, also_read_only=False)
def dirty_and_corrupt(image):
    """Whoever marked it corrupt wants to be asked before it is repaired."""
    not_closed(image)
    image["incompatible_features"] |= qcow2.INCOMPAT_CORRUPT


# --- Truncated files ---

for length in (0, 4, 71, 103):

    @broken("bad-truncated-%d" % length, BEYOND + ("too small", "small", "eof", "empty"), small=length == 71)
    def truncated(image, length=length):
        image.truncate(length)


for label, length in (("header", 112), ("one-cluster", 65536)):

    @broken("bad-truncated-" + label, BEYOND + ("eof",), small=True)
    def truncated_tables(image, length=length):
        image.truncate(length)


@recipe("bad-garbage", small=False)
def garbage(r):
    """A right magic and version, then noise."""
    file = r.file()
    with open(r.path(file), "wb") as raw:
        raw.write(struct.pack(">II", qcow2.MAGIC, 3) + r.bytes(200_000))
    # Whichever field is met first.
    r.bad(file, ("cluster", "encrypt", "feature", "header", "backing", "size", "l1", "refcount"))


@recipe("bad-folder", small=False)
def folder(r):
    file = r.file("")
    os.makedirs(r.path(file), exist_ok=True)
    r.bad(file, ("regular file", "directory", "not a file"))


@recipe("bad-fifo", small=False)
def fifo(r):
    """Nobody writes to it: an opener that does not look first waits for ever."""
    file = r.file(".fifo")
    if not os.path.exists(r.path(file)):
        os.mkfifo(r.path(file))
    r.bad(file, ("regular file", "fifo", "not a file", "pipe"))
