#!/usr/bin/env python3
"""Makes the corpus: images of every kind that qblkd serves or refuses, and their manifest.

    make.py OUTDIR [--small] [--only GLOB...] [--list]

Each image is described in OUTDIR/manifest.json, {"images": [...]}, with paths relative to OUTDIR:

    name, file, format      the image; format is qcow2 or raw
    kind                    good, bad (refused at open), bad-at-runtime (opens, some accesses fail),
                            inconsistent (refcounts or copied flags are wrong: for `check`)
    files                   all files that the image needs, to be copied together
    size, cluster_bits, version, refcount_bits      as the header has them
    options                 command line that opening it takes; a word "@/x" is OUTDIR/x
    raw, snapshots          companions with the content of the disk and of each internal snapshot
    clusters                good: L2 entries of the active tree by kind
    read_only, expect       good, but only for reading; `expect` is what the refusal to write says
    dirty, leaks_ok         good: the dirty bit is set; check may report leaks after a write
    expect, also_read_only  bad: for each group, stderr in lower case contains one of its words
    access, sets_corrupt, may_refuse                bad-at-runtime: see recipe.py
    check                   inconsistent: the exit code of qemu-img check

Needs qemu-img and qemu-io. The images are the same on every run, except for one with LUKS keys.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import os
import shutil
import sys
import traceback

import recipe

# Imported for the recipes that they register.
import good  # noqa: F401
import bad  # noqa: F401
import bad_backing  # noqa: F401
import damaged  # noqa: F401


def run_recipe(out, name, function):
    run = recipe.Recipe(out, name)
    function(run)
    return run.finish()


def main():
    parser = argparse.ArgumentParser(description="make the corpus of test images")
    parser.add_argument("outdir")
    parser.add_argument("--small", action="store_true", help="one or two of each kind only")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="only recipes of these names")
    parser.add_argument("--list", action="store_true", help="list the recipes and make nothing")
    args = parser.parse_args()

    chosen = [
        (name, function)
        for name, small, function in recipe.RECIPES
        if (small or not args.small)
        and (not args.only or any(fnmatch.fnmatch(name, glob) for glob in args.only))
    ]
    if not chosen:
        parser.error("no recipe has such a name")
    if args.list:
        print("\n".join(name for name, _ in chosen))
        return 0

    out = os.path.abspath(args.outdir)
    scratch = os.path.join(out, ".scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    os.makedirs(os.path.join(out, "raw"), exist_ok=True)
    # Threads suffice: nearly all the time goes by in child processes.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [(name, pool.submit(run_recipe, out, name, fn)) for name, fn in chosen]
    images, failed = [], False
    for name, run in runs:
        if run.exception():
            failed = True
            recipe.complain("recipe %s failed:" % name)
            traceback.print_exception(run.exception())
        else:
            images += run.result()
    shutil.rmtree(scratch)
    with open(os.path.join(out, "manifest.json"), "w", encoding="ascii") as manifest:
        json.dump({"images": images}, manifest, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
