"""Recipes of images that must be refused for the sake of their backing file."""

import os
import shutil
import socket

from bad import broken
from recipe import recipe

# What the refusal of a name outside the image's own folder must contain: the way to allow it.
OPTION = "--backing-dir"
NOT_A_FILE = ("regular file", "block device", "not a file")


def named(name, backing, fmt, *expect, small=False):
    """Registers an overlay with `backing` as its backing file name, as it is."""

    @recipe(name, small)
    def make(r):
        file = r.create(r.file(), "1M")
        with r.patch(file) as image:
            image.set_backing(backing(r) if callable(backing) else backing, fmt)
        r.bad(file, *expect)


# --- The name ---


@broken("bad-backing-name-long", ("backing",), ("long", "length", "1023", "size"), small=True)
def name_long(image):
    image.set_backing("n" * 1024, "raw")


@broken("bad-backing-name-size-max", ("backing",))
def name_size_max(image):
    image.set_backing("base.raw", "raw")
    image["backing_file_size"] = 0xFFFFFFFF


@broken("bad-backing-name-crosses-cluster", ("backing",), small=True)
def name_crosses(image):
    image["backing_file_offset"] = image.cluster_size - 4
    image["backing_file_size"] = 8


@broken("bad-backing-name-beyond", ("backing",))
def name_beyond(image):
    image["backing_file_offset"] = 1 << 40
    image["backing_file_size"] = 8


@broken("bad-backing-name-huge-offset", ("backing",))
def name_huge(image):
    image["backing_file_offset"] = (1 << 64) - 4
    image["backing_file_size"] = 8


PROTOCOL = ("protocol", "prefix")
for label, text in {
    "nbd": "nbd://localhost:1/x",
    "nbd-unix": "nbd:unix:/run/nbd.sock",
    "json": 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    "file": "file:base.raw",
    "http": "http://localhost/base.qcow2",
}.items():
    named("bad-backing-" + label, text, "raw", PROTOCOL, small=label in ("nbd", "json"))

# --- The format ---

FORMAT = ("backing format", "backing file format", "format of the backing", "backing-format")


def data_beside(r):
    return r.raw_file(r.file(".base.raw"), 1 << 20)


named("bad-backing-no-format", data_beside, None, FORMAT, small=True)
named("bad-backing-format-vmdk", data_beside, "vmdk", "vmdk")
named("bad-backing-format-empty", data_beside, "", ("format",))


@recipe("bad-backing-no-format-qcow2", small=False)
def no_format_qcow2(r):
    """The backing file is plainly qcow2: still not probed."""
    base = r.create(r.file(".base.qcow2"), "1M")
    file = r.create(r.file(), "1M")
    with r.patch(file) as image:
        image.set_backing(base, None)
    r.bad(file, FORMAT)


@recipe("bad-backing-no-format-v2", small=False)
def no_format_v2(r):
    base = r.raw_file(r.file(".base.raw"), 1 << 20)
    file = r.create(r.file(), "1M", compat="0.10")
    with r.patch(file) as image:
        image.set_backing(base, None)
    r.bad(file, FORMAT)


named("bad-backing-raw-as-qcow2", data_beside, "qcow2", ("magic", "not a qcow2", "not qcow2"))


# --- What the backing file is ---

MISSING = ("no such file", "not found", "does not exist")
named("bad-backing-missing", "bad-backing-missing.nowhere", "raw", MISSING, small=True)


@recipe("bad-backing-folder", small=False)
def backing_folder(r):
    base = r.file(".base")
    os.makedirs(r.path(base), exist_ok=True)
    r.bad(r.create(r.file(), "1M", base, "raw"), NOT_A_FILE)


@recipe("bad-backing-fifo")
def backing_fifo(r):
    """Nobody writes to it: an opener that does not look first waits for ever."""
    base = r.file(".base.fifo")
    if not os.path.exists(r.path(base)):
        os.mkfifo(r.path(base))
    r.bad(r.create(r.file(), "1M", base, "raw"), NOT_A_FILE)


@recipe("bad-backing-socket", small=False)
def backing_socket(r):
    base = r.file(".sock")
    if os.path.lexists(r.path(base)):
        os.unlink(r.path(base))
    # Bound under its short name: a socket's path must fit 108 bytes.
    with socket.socket(socket.AF_UNIX) as bound:
        folder = os.open(r.out, os.O_RDONLY)
        bound.bind("/proc/self/fd/%d/%s" % (folder, base))
        os.close(folder)
    r.bad(r.create(r.file(), "1M", base, "raw"), NOT_A_FILE)


@recipe("bad-backing-encrypted", small=False)
def backing_encrypted(r):
    base = r.create(r.file(".base.qcow2"), "1M")
    with r.patch(base) as image:
        image["crypt_method"] = 1
    r.bad(r.create(r.file(), "1M", base, "qcow2"), "encrypt")


@recipe("bad-backing-unknown-feature", small=False)
def backing_unknown_feature(r):
    base = r.create(r.file(".base.qcow2"), "1M")
    with r.patch(base) as image:
        image["incompatible_features"] = 1 << 17
    r.bad(r.create(r.file(), "1M", base, "qcow2"), ("17", "0x20000"))


@recipe("bad-backing-truncated", small=False)
def backing_truncated(r):
    base = r.create(r.file(".base.qcow2"), "1M")
    with r.patch(base) as image:
        image.truncate(50)
    r.bad(r.create(r.file(), "1M", base, "qcow2"), ("short", "truncated", "end of", "small", "beyond"))


# --- Where it is ---

named("bad-backing-absolute", "/etc/hostname", "raw", OPTION, small=True)
named("bad-backing-device", "/dev/zero", "raw", (OPTION,) + NOT_A_FILE)


@recipe("bad-backing-dot-dot")
def dot_dot(r):
    """A file that exists and is a sound image, but outside the folder of the overlay."""
    r.create(r.made_file(r.name + "/bases/base.qcow2"), "1M")
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "../bases/base.qcow2", "qcow2")
    r.bad(file, OPTION)


@recipe("bad-backing-link-outside")
def link_outside(r):
    """The name is in the folder, what it resolves to is not."""
    r.raw_file(r.made_file(r.name + "/bases/base.raw"), 1 << 20)
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "link.raw", "raw")
    link = r.made_file(r.name + "/disks/link.raw")
    if not os.path.lexists(r.path(link)):
        os.symlink("../bases/base.raw", r.path(link))
    r.bad(file, OPTION)


@recipe("bad-backing-linked-folder", small=False)
def linked_folder(r):
    """A symbolic link in the middle of the name leads outside."""
    r.raw_file(r.made_file(r.name + "/bases/base.raw"), 1 << 20)
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "sub/base.raw", "raw")
    link = r.made_file(r.name + "/disks/sub")
    if not os.path.lexists(r.path(link)):
        os.symlink("../bases", r.path(link))
    r.bad(file, OPTION)


@recipe("bad-backing-similar-folder", small=False)
def similar_folder(r):
    """`disks-2` begins like `disks`, but is another folder."""
    r.raw_file(r.made_file(r.name + "/disks-2/base.raw"), 1 << 20)
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "../disks-2/base.raw", "raw")
    r.bad(file, OPTION)


@recipe("bad-backing-second-outside", small=False)
def second_outside(r):
    """The first backing file is in the folder, but its own backing file is not."""
    r.raw_file(r.made_file(r.name + "/bases/low.raw"), 1 << 20)
    r.create(r.made_file(r.name + "/disks/middle.qcow2"), "1M", "../bases/low.raw", "raw")
    file = r.create(r.made_file(r.name + "/disks/top.qcow2"), "1M", "middle.qcow2", "qcow2")
    r.bad(file, OPTION)


# --- Loops and depth ---

LOOP = ("loop", "cycle", "itself", "already", "twice", "deep", "depth")


@recipe("bad-backing-itself")
def itself(r):
    file = r.create(r.file(), "1M")
    with r.patch(file) as image:
        image.set_backing(file, "qcow2")
    r.bad(file, LOOP)


@recipe("bad-backing-loop")
def loop(r):
    other = r.file(".other.qcow2")
    file = r.create(r.file(), "1M", other, "qcow2")
    r.create(other, "1M", file, "qcow2")
    r.bad(file, LOOP)


@recipe("bad-backing-loop-by-link", small=False)
def loop_by_link(r):
    """The image again, under another name."""
    link = r.file(".link.qcow2")
    file = r.create(r.file(), "1M", link, "qcow2")
    if not os.path.lexists(r.path(link)):
        os.link(r.path(file), r.path(link))
    r.bad(file, LOOP)


@recipe("bad-backing-deep")
def deep(r, depth=300):
    """No loop, but more files than any chain needs."""
    names = [r.made_file("%s/%d.qcow2" % (r.name, level)) for level in range(depth)]
    r.create(names[0], "64k", cluster_size="512")
    for below, above in zip(names, names[1:]):
        shutil.copy(r.path(names[0]), r.path(above))
        with r.patch(above) as image:
            image.set_backing(os.path.basename(below), "qcow2")
    r.bad(names[-1], ("deep", "depth", "long", "too many", "chain"))
