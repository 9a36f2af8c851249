#!/usr/bin/env python3
"""Makes a large qcow2 image with all metadata allocated and no data: for benchmarks.

    big.py [--scattered] [--cluster-size BYTES] SIZE OUT
                           e.g. big.py 2T /var/tmp/2T.qcow2

Version 3, 16-bit refcounts, clusters of 64 KiB unless told otherwise. Every L2 entry points to a host
cluster of its own with the copied flag set; the data area is a hole in the host file. `qemu-img check`
finds it clean. Layout: header, refcount table, L1 table, refcount blocks, L2 tables, data; or, with
--scattered, L2 tables and data mixed in no order, so that each L2 table reaches all refcount blocks.
A 2 TiB image takes 320 MiB on the host and some seconds.
"""

import argparse
import array
import os
import random
import sys

import qcow2
from recipe import parse_size

SEED = 1


class Layout:
    """Where everything is, in clusters."""

    def __init__(self, size, cluster_size):
        self.size = size
        self.cluster_size = cluster_size
        self.l2_entries = cluster_size // 8
        self.per_block = cluster_size // 2
        self.data_clusters = self.clusters(size)
        self.l2_tables = -(-self.data_clusters // self.l2_entries)
        l1_clusters = self.clusters(8 * self.l2_tables)
        # The refcount blocks count themselves: grow until nothing changes.
        self.blocks = self.table_clusters = 0
        while True:
            self.tables_first = 1 + self.table_clusters + l1_clusters + self.blocks
            self.total = self.tables_first + self.l2_tables + self.data_clusters
            wanted = -(-self.total // self.per_block)
            if (wanted, self.clusters(8 * wanted)) == (self.blocks, self.table_clusters):
                break
            self.blocks, self.table_clusters = wanted, self.clusters(8 * wanted)
        self.l1_first = 1 + self.table_clusters
        self.blocks_first = self.l1_first + l1_clusters

    def clusters(self, bytes_):
        return -(-bytes_ // self.cluster_size)

    def entries(self, hosts, flags=0):
        """Table entries for these host clusters, as bytes."""
        table = array.array("Q", [flags | host * self.cluster_size for host in hosts])
        if sys.byteorder == "little":
            table.byteswap()
        return table.tobytes()

    def run(self, first, count, flags=0):
        """Table entries for `count` host clusters from `first` on, as bytes."""
        return self.entries(range(first, first + count), flags)

    def header(self):
        fields = {
            "magic": qcow2.MAGIC,
            "version": 3,
            "cluster_bits": self.cluster_size.bit_length() - 1,
            "size": self.size,
            "l1_size": self.l2_tables,
            "l1_table_offset": self.l1_first * self.cluster_size,
            "refcount_table_offset": self.cluster_size,
            "refcount_table_clusters": self.table_clusters,
            "refcount_order": 4,
            "header_length": 104,
        }
        # What follows the fields is an end marker of the header extensions: zeroes.
        data = bytearray(self.cluster_size)
        for name, value in fields.items():
            offset, length = qcow2.HEADER[name]
            data[offset : offset + length] = value.to_bytes(length, "big")
        return data


def in_order(layout):
    """For each L2 table its host cluster and those of its entries."""
    data_first = layout.tables_first + layout.l2_tables
    for table in range(layout.l2_tables):
        first = table * layout.l2_entries
        count = min(layout.l2_entries, layout.data_clusters - first)
        yield layout.tables_first + table, range(data_first + first, data_first + first + count)


def scattered(layout):
    """The same, each time one cluster from each of many stripes, in no order."""
    source = random.Random(SEED)
    tables = layout.l2_tables
    # One stripe for each entry and one for the table itself; a stripe has one cluster for each table.
    stripes = [
        (layout.tables_first + stripe * tables, source.randrange(tables))
        for stripe in range(layout.l2_entries + 1)
    ]
    source.shuffle(stripes)
    for table in range(tables):
        hosts = [first + (table + turn) % tables for first, turn in stripes]
        yield hosts.pop(table * 7919 % len(hosts)), hosts


def make(size, cluster_size, is_scattered, out):
    layout = Layout(size, cluster_size)
    places = scattered(layout) if is_scattered else in_order(layout)
    with open(out, "wb") as image:
        image.write(layout.header())
        blocks = layout.run(layout.blocks_first, layout.blocks)
        image.write(blocks.ljust(layout.table_clusters * cluster_size, b"\0"))
        image.seek(layout.blocks_first * cluster_size)
        full = b"\0\1" * layout.per_block
        for block in range(layout.blocks):
            used = min(layout.total - block * layout.per_block, layout.per_block)
            image.write(full[: 2 * used].ljust(cluster_size, b"\0"))
        tables = []
        for table, hosts in places:
            tables.append(table)
            image.seek(table * cluster_size)
            image.write(layout.entries(hosts, qcow2.COPIED).ljust(cluster_size, b"\0"))
        image.seek(layout.l1_first * cluster_size)
        image.write(layout.entries(tables, qcow2.COPIED))
        image.truncate(layout.total * cluster_size)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--scattered", action="store_true")
    parser.add_argument("--cluster-size", type=parse_size, default=1 << 16)
    parser.add_argument("size", type=parse_size)
    parser.add_argument("out")
    args = parser.parse_args()
    size, cluster_size = args.size, args.cluster_size
    if cluster_size & (cluster_size - 1) or not 512 <= cluster_size <= 2 << 20:
        sys.exit("big.py: the cluster size must be a power of two from 512 to 2M")
    if size <= 0 or size % 512:
        sys.exit("big.py: SIZE must be a positive multiple of 512")
    if args.scattered and size % (cluster_size * cluster_size // 8):
        sys.exit("big.py: a scattered image must have full L2 tables")
    make(size, cluster_size, args.scattered, args.out)
    print("%s: %d bytes on disk" % (args.out, os.stat(args.out).st_blocks * 512))


if __name__ == "__main__":
    main()
