#!/usr/bin/env python3
"""Makes a large qcow2 image with all metadata allocated and no data: for benchmarks.

    big.py SIZE OUT        e.g. big.py 2T /var/tmp/2T.qcow2

Version 3, 64 KiB clusters, 16-bit refcounts. Every L2 entry points to a host cluster of its own with
the copied flag set; the data area is a hole in the host file. `qemu-img check` finds it clean.
Layout: header, refcount table, L1 table, refcount blocks, L2 tables, data. A 2 TiB image takes
320 MiB on the host and a few seconds.
"""

import array
import os
import sys

import qcow2
from recipe import parse_size

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
REFCOUNTS_PER_BLOCK = CLUSTER // 2


def clusters(bytes_):
    return -(-bytes_ // CLUSTER)


def entries(first, count, flags=0):
    """`count` table entries for consecutive host clusters from `first` on, as bytes."""
    start = flags | first * CLUSTER
    table = array.array("Q", range(start, start + count * CLUSTER, CLUSTER))
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()


def header(size, l1_size, l1_first, refcount_first, refcount_clusters):
    fields = {
        "magic": qcow2.MAGIC,
        "version": 3,
        "cluster_bits": CLUSTER_BITS,
        "size": size,
        "l1_size": l1_size,
        "l1_table_offset": l1_first * CLUSTER,
        "refcount_table_offset": refcount_first * CLUSTER,
        "refcount_table_clusters": refcount_clusters,
        "refcount_order": 4,
        "header_length": 104,
    }
    # What follows the fields is an end marker of the header extensions: zeroes.
    data = bytearray(CLUSTER)
    for name, value in fields.items():
        offset, length = qcow2.HEADER[name]
        data[offset : offset + length] = value.to_bytes(length, "big")
    return data


def make(size, out):
    data_clusters = clusters(size)
    l2_tables = -(-data_clusters // L2_ENTRIES)
    l1_clusters = clusters(8 * l2_tables)
    # The refcount blocks count themselves: grow until nothing changes.
    blocks = table_clusters = 0
    while True:
        total = 1 + table_clusters + l1_clusters + blocks + l2_tables + data_clusters
        wanted = -(-total // REFCOUNTS_PER_BLOCK)
        if (wanted, clusters(8 * wanted)) == (blocks, table_clusters):
            break
        blocks, table_clusters = wanted, clusters(8 * wanted)
    l1_first = 1 + table_clusters
    blocks_first = l1_first + l1_clusters
    l2_first = blocks_first + blocks
    data_first = l2_first + l2_tables

    with open(out, "wb") as image:
        image.write(header(size, l2_tables, l1_first, 1, table_clusters))
        image.write(entries(blocks_first, blocks).ljust(table_clusters * CLUSTER, b"\0"))
        image.write(entries(l2_first, l2_tables, qcow2.COPIED).ljust(l1_clusters * CLUSTER, b"\0"))
        full = b"\0\1" * REFCOUNTS_PER_BLOCK
        for block in range(blocks):
            used = min(total - block * REFCOUNTS_PER_BLOCK, REFCOUNTS_PER_BLOCK)
            image.write(full if used == REFCOUNTS_PER_BLOCK else full[: 2 * used].ljust(CLUSTER, b"\0"))
        for table in range(l2_tables):
            first = table * L2_ENTRIES
            count = min(L2_ENTRIES, data_clusters - first)
            image.write(entries(data_first + first, count, qcow2.COPIED).ljust(CLUSTER, b"\0"))
        assert image.tell() == data_first * CLUSTER
        image.truncate(total * CLUSTER)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: big.py SIZE OUT   (SIZE with a suffix k, M, G or T)")
    size, out = parse_size(sys.argv[1]), sys.argv[2]
    if size <= 0 or size % 512:
        sys.exit("big.py: SIZE must be a positive multiple of 512")
    make(size, out)
    print("%s: %d bytes on disk" % (out, os.stat(out).st_blocks * 512))


if __name__ == "__main__":
    main()
