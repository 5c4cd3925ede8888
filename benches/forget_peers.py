#!/usr/bin/env python3
"""Deleting one snapshot, and giving its room back: snapfs forget + gc, restic forget --prune, borg delete + compact.

    forget_peers.py prepare DATA WORK [--vms N] [--days N] [--snapfs PROGRAM]
    forget_peers.py measure DATA WORK [--vms N] [--days N] [--snapfs PROGRAM]

DATA has images as vmNN/dayDD.img. `prepare` puts them into a store of each tool; `measure` deletes all
snapshots but the newest of each VM, the oldest first, with the page cache dropped before each, and prints the time of each deletion and the bytes
that it gave back. Of snapfs it prints, too, what part of the dead bytes was freed: of those in packs that are dead as a
whole or of which 30 % or more is dead, and of all. What is dead is what `gc --exact --dry-run` finds.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def used(folder):
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file() and "derived" not in f.parts)


def run(*command, env=None, cwd=None):
    done = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.returncode}: {done.stderr}")
    return done.stdout


def timed(*commands):
    subprocess.run(["sync"])
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        pass
    began = time.monotonic()
    for command, keywords in commands:
        run(*command, **keywords)
    return time.monotonic() - began


class Snapfs:
    name = "snapfs"

    def __init__(self, work, program):
        self.store, self.program = work / "snapfs", program

    def init(self):
        run(self.program, "init", self.store)

    def put(self, vm, day, source):
        run(self.program, "backup", self.store, f"{vm}/{day}.img", source)

    def delete(self, vm, day):
        forget = (self.program, "forget", self.store, f"{vm}/{day}.img")
        # The forgetting is part of the time; what is then dead is asked in between, and is not.
        took = timed((forget, {}))
        plan = json.loads(run(self.program, "gc", self.store, "--exact", "--dry-run", "--json"))["vms"]
        before = used(self.store)
        took += timed(((self.program, "gc", self.store), {}))
        freed = before - used(self.store)
        worth = sum(v["bytes_reclaimed"] for v in plan)
        left = sum(v["bytes_reclaimable_left"] for v in plan)
        of_worth = f"{freed / worth:.3f}" if worth > 100_000 else "nothing there"
        return took, freed, f"of dead bytes worth it ({worth / 1e6:.1f} MB): {of_worth}; of all ({(worth + left) / 1e6:.1f} MB): {freed / max(worth + left, 1):.3f}"


class Restic:
    name = "restic"

    def __init__(self, work, _):
        self.store = work / "restic"
        self.env = dict(os.environ, RESTIC_PASSWORD="x", RESTIC_REPOSITORY=str(self.store), RESTIC_CACHE_DIR=str(work / "restic-cache"))

    def init(self):
        run("restic", "init", "--repository-version", "2", env=self.env)

    def put(self, vm, day, source):
        run("restic", "backup", "--host", vm, "--tag", day, source, env=self.env)

    def delete(self, vm, day):
        snapshots = json.loads(run("restic", "snapshots", "--json", "--host", vm, "--tag", day, env=self.env))
        before = used(self.store)
        took = timed((("restic", "forget", "--prune", snapshots[0]["id"]), {"env": self.env}))
        return took, before - used(self.store), ""


class Borg:
    name = "borg, fixed 64 KiB"

    def __init__(self, work, _):
        self.store = work / "borg"
        self.env = dict(os.environ, BORG_REPO=str(self.store), BORG_BASE_DIR=str(work / "borg-base"),
                        BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes", BORG_RELOCATED_REPO_ACCESS_IS_OK="yes")

    def init(self):
        run("borg", "init", "-e", "none", env=self.env)

    def put(self, vm, day, source):
        run("borg", "create", "--sparse", "-C", "zstd,1", "--chunker-params", "fixed,65536", f"::{vm}-{day}", source.name,
            env=self.env, cwd=source.parent)

    def delete(self, vm, day):
        before = used(self.store)
        took = timed((("borg", "delete", f"::{vm}-{day}"), {"env": self.env}), (("borg", "compact"), {"env": self.env}))
        return took, before - used(self.store), ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["prepare", "measure"])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vms", type=int, default=3)
    parser.add_argument("--days", type=int, default=3)
    parser.add_argument("--snapfs", type=Path, default=Path("target/release/snapfs"))
    args = parser.parse_args()
    vms = sorted(v.name for v in args.data.iterdir() if v.is_dir())[: args.vms]
    days = [f"day{n:02d}" for n in range(args.days)]
    tools = [tool(args.work, args.snapfs.absolute()) for tool in (Snapfs, Restic, Borg)]
    if args.step == "prepare":
        shutil.rmtree(args.work, ignore_errors=True)
        args.work.mkdir(parents=True)
        for tool in tools:
            tool.init()
            for day in days:
                for vm in vms:
                    tool.put(vm, day, args.data / vm / f"{day}.img")
            print(f"{tool.name}: {used(tool.store) / 1e6:.0f} MB", flush=True)
        return
    medians = {}
    print("| tool | deletion | seconds | freed, MB | |\n|---|---|---|---|---|")
    for tool in tools:
        rows = []
        for day, vm in ((day, vm) for day in days[:-1] for vm in vms):
            took, freed, note = tool.delete(vm, day)
            rows.append(took)
            print(f"| {tool.name} | {vm}/{day} | {took:.2f} | {freed / 1e6:.1f} | {note} |", flush=True)
        medians[tool.name] = statistics.median(rows)
    ours = medians.pop("snapfs")
    for name, median in medians.items():
        print(f"{name}: median {median:.2f} s, {median / ours:.1f} times snapfs ({ours:.2f} s)")


if __name__ == "__main__":
    main()
