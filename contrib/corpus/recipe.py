"""What a corpus recipe works with: tools, seeded data, and the manifest entry it leaves behind.

A recipe makes the files of one image. It owns the name space `<name>*` in the output folder (and the
folder `<name>/`), and draws all its randomness from a generator seeded with its name, so that the
corpus is the same on every machine and recipes can run side by side.
"""

import os
import random
import shutil
import subprocess
import sys

import qcow2

# In the order of registration: (name, belongs to the small corpus, function).
RECIPES = []


def recipe(name, small=True):
    """Registers the decorated function, which gets a `Recipe`, under `name`."""

    def register(function):
        assert name not in {known for known, _, _ in RECIPES}, name
        RECIPES.append((name, small, function))
        return function

    return register


def parse_size(text):
    """`64k` -> 65536."""
    if isinstance(text, int):
        return text
    shift = {"k": 10, "M": 20, "G": 30, "T": 40}.get(text[-1], 0)
    return int(text[:-1] if shift else text) << shift


class Recipe:
    """One run of one recipe."""

    def __init__(self, out, name):
        self.out = out
        self.name = name
        self.random = random.Random(name)
        self.entries = []
        self.made = []
        self.scratch = os.path.join(out, ".scratch", name)
        os.makedirs(self.scratch)

    # Files and tools.

    def path(self, file):
        return os.path.join(self.out, file)

    def file(self, suffix=".qcow2"):
        """The path, relative to the output folder, of a file of this recipe."""
        return self.made_file(self.name + suffix)

    def made_file(self, file):
        os.makedirs(os.path.dirname(self.path(file)), exist_ok=True)
        if file not in self.made:
            self.made.append(file)
        return file

    def run(self, *command, stdin=None):
        result = subprocess.run(
            [str(word) for word in command],
            cwd=self.out,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if result.returncode != 0:
            raise RuntimeError("%s: %s\n%s" % (self.name, " ".join(map(str, command)), result.stdout[-500:]))
        return result.stdout

    def create(self, file, size, backing=None, backing_fmt=None, **options):
        command = ["qemu-img", "create", "-q", "-f", "qcow2"]
        for option, value in options.items():
            command += ["-o", "%s=%s" % (option, value)]
        if backing is not None:
            # -u: the name is taken as it is; the file need not be there yet.
            command += ["-u", "-b", backing, "-F", backing_fmt]
        self.run(*command, file, parse_size(size))
        return file

    def io(self, file, commands, fmt="qcow2"):
        """Runs qemu-io commands; any that fails makes the recipe fail."""
        script = "\n".join(commands) + "\n"
        output = self.run("qemu-io", "-f", fmt, "-d", "unmap", file, stdin=script)
        for line in output.splitlines():
            if "failed" in line or "rror" in line or "nvalid" in line:
                raise RuntimeError("%s: qemu-io: %s" % (self.name, line))

    def raw_file(self, file, length, extents=6):
        """A raw file with some extents of data."""
        with open(self.path(file), "wb") as raw:
            raw.truncate(length)
            for _ in range(extents):
                offset = self.random.randrange(0, max(length // 512, 1)) * 512
                raw.seek(offset)
                raw.write(self.bytes(min(self.random.randrange(1, 128) * 512, length - offset)))
        return file

    def patch(self, file):
        return qcow2.Image(self.path(file))

    # Data.

    def bytes(self, length, compressible=False):
        """Bytes that occur nowhere else in the corpus, position by position."""
        if not compressible:
            return self.random.randbytes(length)
        seed = self.random.getrandbits(24)
        unit = b"".join(
            (seed << 32 | index).to_bytes(7, "big") + bytes([seed % 251]) * 57
            for index in range(length // 64 + 1)
        )
        return unit[:length]

    def write(self, offset, length, flags="", compressible=False):
        """A qemu-io command that writes fresh data."""
        pattern = os.path.join(self.scratch, str(len(os.listdir(self.scratch))))
        with open(pattern, "wb") as file:
            file.write(self.bytes(length, compressible))
        return "write %s -s %s %d %d" % (flags, os.path.relpath(pattern, self.out), offset, length)

    def mixture(self, file, size, cluster_size, count, compressed=True):
        """`count` random operations over a disk of `size` bytes; neighbours are likely."""
        whole = size // cluster_size
        if compressed and whole:
            # A process each: within one, QEMU 10 may pack compressed data into a host cluster that
            # was freed and is in use again. And it compresses only where nothing is allocated.
            chosen = sorted(self.random.sample(range(whole), min(count // 5, whole)))
            starts = [cluster * cluster_size for cluster in chosen]
            self.io(file, ["discard %d %d" % (start, cluster_size) for start in starts])
            self.io(file, [self.write(start, cluster_size, "-c", True) for start in starts])
        commands, hot = [], 0
        for _ in range(count):
            if self.random.random() < 0.5:
                hot = self.random.randrange(size // 512) * 512
            length = min(self.random.choice((512, 4096, cluster_size, 3 * cluster_size)), size - hot)
            length = self.random.randrange(1, length // 512 + 1) * 512
            first = hot // cluster_size * cluster_size
            clusters = min(max(length // cluster_size, 1) * cluster_size, size - first)
            roll = self.random.random()
            if roll < 0.70:
                commands.append(self.write(hot, length))
            elif roll < 0.80:
                commands.append("write -z %d %d" % (hot, length))
            elif roll < 0.90:
                commands.append("write -z -u %d %d" % (first, clusters))
            else:
                commands.append("discard %d %d" % (first, clusters))
            hot = (hot + length) // 512 * 512 % (size // 512 * 512)
        self.io(file, commands)

    # Snapshots.

    def snapshot(self, file, name):
        self.run("qemu-img", "snapshot", "-c", name, file)
        # The date is the only thing in the image that would differ from run to run.
        with self.patch(file) as image:
            for number, offset in enumerate(image.snapshot_offsets()):
                image.set_snapshot(offset, "date_sec", 1_500_000_000 + number)
                image.set_snapshot(offset, "date_nsec", 0)

    # Manifest.

    def describe(self, file, kind, **fields):
        """Adds the manifest entry of `file`, with what its header says."""
        entry = {"name": self.name, "file": file, "format": "qcow2", "kind": kind, "files": self.made}
        entry.update(size=None, cluster_bits=None, version=None, refcount_bits=None, options=[])
        if kind != "bad":
            if fields.get("format") == "raw":
                entry["size"] = os.path.getsize(self.path(file))
            else:
                with self.patch(file) as image:
                    for field in ("size", "cluster_bits", "version"):
                        entry[field] = image[field]
                    entry["refcount_bits"] = image.refcount_bits
        entry.update(fields)
        self.entries.append(entry)

    def good(self, file, want=(), **fields):
        """An image to be served: makes the raw companions and checks that `want`ed kinds occur."""
        fmt = fields.get("format", "qcow2")
        if fmt == "qcow2":
            with self.patch(file) as image:
                kinds = image.kinds()
                snapshots = self._snapshot_list(image)
            for kind in want:
                assert kinds[kind], "%s: no %s cluster (%s)" % (self.name, kind, kinds)
            if not any(fields.get(word) for word in ("dirty", "read_only", "leaks_ok")):
                self.run("qemu-img", "check", "-q", "-f", "qcow2", file)
            fields["clusters"] = kinds
            fields["snapshots"] = [
                self._snapshot_companion(file, number, *snapshot)
                for number, snapshot in enumerate(snapshots)
            ]
        fields["raw"] = self._companion(file, fmt, self.name + ".raw")
        self.describe(file, "good", **fields)

    def _companion(self, file, fmt, raw, *source):
        raw = os.path.join("raw", raw)
        # -U: an image whose dirty bit is set is only read here, never repaired.
        self.run("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", *source, file, raw)
        return raw

    @staticmethod
    def _snapshot_list(image):
        found = []
        for offset in image.snapshot_offsets():
            text = offset + qcow2.SNAPSHOT_EXTRA + image.get_snapshot(offset, "extra_data_size")
            id_size = image.get_snapshot(offset, "id_size")
            name_size = image.get_snapshot(offset, "name_size")
            names = image.read(text, id_size + name_size).decode()
            found.append((names[:id_size], names[id_size:]))
        return found

    def _snapshot_companion(self, file, number, snapshot_id, name):
        raw = "%s.snapshot%d.raw" % (self.name, number)
        raw = self._companion(file, "qcow2", raw, "-l", "snapshot.id=" + snapshot_id)
        size = os.path.getsize(self.path(raw))
        return {"id": snapshot_id, "name": name, "raw": raw, "size": size}

    def bad(self, file, *expect, also_read_only=True, **fields):
        """An image to be refused: for each group of `expect`, one of its words must be said."""
        groups = [[group] if isinstance(group, str) else list(group) for group in expect]
        assert groups and all(word == word.lower() for group in groups for word in group)
        self.describe(file, "bad", expect=groups, also_read_only=also_read_only, **fields)

    def bad_at_runtime(self, file, access, sets_corrupt=True, may_refuse=False):
        """An image that opens, but where the listed accesses meet damage."""
        self.describe(
            file,
            "bad-at-runtime",
            access=access,
            sets_corrupt=sets_corrupt,
            may_refuse=may_refuse,
        )

    def finish(self):
        shutil.rmtree(self.scratch)
        return self.entries


def complain(text):
    sys.stderr.write(text + "\n")
