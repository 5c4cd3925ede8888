#!/usr/bin/env python3
"""How fast one VM is backed up while another one of the same store is collected.

    beside_gc.py WORK IMAGE [--runs N] [--mib N] [--snapfs PROGRAM]

VM B has an image of N MiB (1024) of noise, and a later one of which every second 64 KiB is new; the first was forgotten, so every
pack of it is half dead. Runs alternate: IMAGE is backed up into VM A alone, and while `gc` collects B. Objects never change, so
B is put back by hard links for each run. Collection must last longer than the backup, or the run is not counted.
"""
import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PIECE = 64 << 10


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.returncode}: {done.stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--snapfs", type=Path, default=Path("target/release/snapfs"))
    parser.add_argument("--limit-rate")
    args = parser.parse_args()
    program, store = args.snapfs.absolute(), args.work / "store"
    kept = args.work / "B"
    if not kept.exists():
        shutil.rmtree(args.work, ignore_errors=True)
        args.work.mkdir(parents=True)
        run(program, "init", store)
        made, seeded = args.work / "made.img", random.Random(1)
        with open(made, "wb") as out:
            for _ in range(args.mib << 20 >> 16):
                out.write(seeded.randbytes(PIECE))
        run(program, "backup", store, "B/0.img", made)
        with open(made, "r+b") as out:
            for at in range(0, args.mib << 20, 2 * PIECE):
                out.seek(at)
                out.write(seeded.randbytes(PIECE))
        run(program, "backup", store, "B/1.img", made)
        run(program, "forget", store, "B/0.img")
        made.unlink()
        os.rename(store / "vms/B", kept)
    # In memory, so that the disk is used by the stores alone.
    with open(args.image, "rb") as image:
        while image.read(8 << 20):
            pass
    allocated = args.image.stat().st_blocks * 512
    rates = {False: [], True: []}
    for number in range(2 * args.runs):
        beside = number % 2 == 1
        for vm in ("A", "B"):
            shutil.rmtree(store / "vms" / vm, ignore_errors=True)
            shutil.rmtree(store / "derived/vms" / vm, ignore_errors=True)
        run("cp", "-al", kept, store / "vms/B")
        run("sync")
        limit = ["--limit-rate", args.limit_rate] if args.limit_rate else []
        gc = subprocess.Popen([program, "gc", store, "B", *limit], stdout=subprocess.DEVNULL) if beside else None
        began = time.monotonic()
        run(program, "backup", store, "A/0.img", args.image)
        took = time.monotonic() - began
        is_counted = True
        if gc:
            is_counted = gc.poll() is None
            if gc.wait():
                sys.exit("gc failed")
        rate = allocated / took / 1e6
        print(f"{'beside gc' if beside else 'alone'}: {rate:.0f} MB/s ({took:.2f} s){'' if is_counted else ', gc was done before'}, "
              f"gc and backup {time.monotonic() - began:.2f} s", flush=True)
        if is_counted:
            rates[beside].append(rate)
    if not rates[True]:
        sys.exit("gc was always done before: give it more with --mib")
    alone, beside = (statistics.median(rates[key]) for key in (False, True))
    print(f"medians: alone {alone:.0f} MB/s, beside gc {beside:.0f} MB/s: {beside / alone:.3f}")


if __name__ == "__main__":
    main()
