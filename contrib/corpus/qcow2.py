"""A small reader and patcher of qcow2 metadata, for the corpus of test images.

It exists to break images on purpose and to look at what a tool made: nothing is validated, every
field can be set to any value. Names and offsets follow the qcow2 specification; integers are big
endian.
"""

import os
import struct

MAGIC = 0x514649FB

# Header fields: name -> (offset, bytes).
HEADER = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    # Version 3 from here on.
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}

# Fields of a snapshot table entry: name -> (offset, bytes); the extra data starts at 40.
SNAPSHOT = {
    "l1_table_offset": (0, 8),
    "l1_size": (8, 4),
    "id_size": (12, 2),
    "name_size": (14, 2),
    "date_sec": (16, 4),
    "date_nsec": (20, 4),
    "vm_state_size": (32, 4),
    "extra_data_size": (36, 4),
    "vm_state_size_long": (40, 8),
    "disk_size": (48, 8),
}
SNAPSHOT_EXTRA = 40

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
AUTOCLEAR_BITMAPS = 1 << 0

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FFFFFFFFFFFE00


class Image:
    """An image file that is open for patching; use it as a context manager."""

    def __init__(self, path):
        self.path = path
        self.fd = os.open(path, os.O_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self.fd)

    # Raw bytes.

    def read(self, offset, length):
        return os.pread(self.fd, length, offset)

    def write(self, offset, data):
        assert os.pwrite(self.fd, data, offset) == len(data)

    def read_int(self, offset, length):
        return int.from_bytes(self.read(offset, length), "big")

    def write_int(self, offset, length, value):
        self.write(offset, value.to_bytes(length, "big"))

    def length(self):
        return os.fstat(self.fd).st_size

    def truncate(self, length):
        os.ftruncate(self.fd, length)

    # Header.

    def __getitem__(self, field):
        offset, length = HEADER[field]
        if self.is_v2() and offset >= 72:
            return 4 if field == "refcount_order" else 72 if field == "header_length" else 0
        return self.read_int(offset, length)

    def __setitem__(self, field, value):
        self.write_int(*HEADER[field], value)

    def is_v2(self):
        return self.read_int(4, 4) < 3

    @property
    def cluster_size(self):
        return 1 << self["cluster_bits"]

    @property
    def refcount_bits(self):
        return 1 << self["refcount_order"]

    # Header extensions.

    def extensions(self):
        """List of (type, data), without the end marker."""
        found, offset = [], self["header_length"]
        while True:
            kind, length = struct.unpack(">II", self.read(offset, 8))
            if kind == EXT_END:
                return found
            found.append((kind, self.read(offset + 8, length)))
            offset += 8 + (length + 7) // 8 * 8

    def set_extensions(self, extensions, backing=None):
        """Rewrites all that follows the header fields in cluster 0: extensions, then the name."""
        area = b""
        for kind, data in extensions:
            area += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        area += struct.pack(">II", EXT_END, 0)
        start = self["header_length"]
        if backing is None and self["backing_file_offset"]:
            backing = self.read(self["backing_file_offset"], self["backing_file_size"])
        if backing:
            self["backing_file_offset"] = start + len(area)
            self["backing_file_size"] = len(backing)
            area += backing
        assert start + len(area) <= self.cluster_size
        self.write(start, area + bytes(self.cluster_size - start - len(area)))

    def set_backing(self, name, fmt):
        """Names a backing file; `fmt` None leaves its format out."""
        kept = [(k, d) for k, d in self.extensions() if k != EXT_BACKING_FORMAT]
        if fmt is not None:
            kept.insert(0, (EXT_BACKING_FORMAT, fmt.encode()))
        self.set_extensions(kept, os.fsencode(name))

    # Mapping tables.

    def l1_entry_offset(self, guest_offset):
        return self["l1_table_offset"] + 8 * (guest_offset >> (2 * self["cluster_bits"] - 3))

    def l2_entry_offset(self, guest_offset):
        table = self.read_int(self.l1_entry_offset(guest_offset), 8) & OFFSET_MASK
        assert table, "no L2 table at %#x" % guest_offset
        index = (guest_offset >> self["cluster_bits"]) & (self.cluster_size // 8 - 1)
        return table + 8 * index

    def l2_entry(self, guest_offset):
        return self.read_int(self.l2_entry_offset(guest_offset), 8)

    def set_l2_entry(self, guest_offset, value):
        self.write_int(self.l2_entry_offset(guest_offset), 8, value)

    def host_offset(self, guest_offset):
        return self.l2_entry(guest_offset) & OFFSET_MASK

    def compressed_fields(self, guest_offset):
        """(host offset, 512-byte sectors touched) of a compressed cluster descriptor."""
        entry = self.l2_entry(guest_offset)
        assert entry & COMPRESSED
        shift = 62 - (self["cluster_bits"] - 8)
        offset = entry & ((1 << shift) - 1)
        return offset, ((entry & (COMPRESSED - 1)) >> shift) + 1

    def set_compressed(self, guest_offset, host_offset, sectors):
        shift = 62 - (self["cluster_bits"] - 8)
        self.set_l2_entry(guest_offset, COMPRESSED | (sectors - 1) << shift | host_offset)

    def kinds(self):
        """How often each kind of L2 entry occurs in the active tree."""
        counts = dict.fromkeys(
            ("normal", "shared", "zero_plain", "zero_allocated", "compressed", "unallocated"), 0
        )
        l1 = self.read(self["l1_table_offset"], 8 * self["l1_size"])
        for (l1_entry,) in struct.iter_unpack(">Q", l1):
            if not l1_entry & OFFSET_MASK:
                continue
            table = self.read(l1_entry & OFFSET_MASK, self.cluster_size)
            table += bytes(self.cluster_size - len(table))
            for (entry,) in struct.iter_unpack(">Q", table):
                counts[self._kind(entry)] += 1
        return counts

    @staticmethod
    def _kind(entry):
        if entry & COMPRESSED:
            return "compressed"
        if entry & ZERO:
            return "zero_allocated" if entry & OFFSET_MASK else "zero_plain"
        if not entry & OFFSET_MASK:
            return "unallocated"
        return "normal" if entry & COPIED else "shared"

    # Refcounts.

    def refcount_block(self, host_offset):
        """Host offset of the refcount block that counts the cluster at `host_offset`."""
        per_block = self.cluster_size * 8 // self.refcount_bits
        index = (host_offset >> self["cluster_bits"]) // per_block
        return self.read_int(self["refcount_table_offset"] + 8 * index, 8) & OFFSET_MASK

    def set_refcount(self, host_offset, value):
        bits = self.refcount_bits
        per_block = self.cluster_size * 8 // bits
        index = (host_offset >> self["cluster_bits"]) % per_block
        block = self.refcount_block(host_offset)
        assert block, "no refcount block for %#x" % host_offset
        if bits >= 8:
            self.write_int(block + index * bits // 8, bits // 8, value)
            return
        # Narrow counts are packed from the low bits of a byte up.
        where, shift = block + index * bits // 8, index * bits % 8
        mask = (1 << bits) - 1 << shift
        byte = self.read_int(where, 1)
        self.write_int(where, 1, byte & ~mask | value << shift)

    # Internal snapshots.

    def snapshot_offsets(self):
        """Host offset of each entry of the snapshot table."""
        offsets, offset = [], self["snapshots_offset"]
        for _ in range(self["nb_snapshots"]):
            offsets.append(offset)
            size = SNAPSHOT_EXTRA
            for field in ("extra_data_size", "id_size", "name_size"):
                at, length = SNAPSHOT[field]
                size += self.read_int(offset + at, length)
            offset += (size + 7) // 8 * 8
        return offsets

    def set_snapshot(self, entry_offset, field, value):
        offset, length = SNAPSHOT[field]
        self.write_int(entry_offset + offset, length, value)

    def get_snapshot(self, entry_offset, field):
        offset, length = SNAPSHOT[field]
        return self.read_int(entry_offset + offset, length)
