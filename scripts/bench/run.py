"""``make bench``: kvmpass, QEMU's vfio-pci and the least that C needs, in the same boot of the emulated host.

Writes ``docs/bench.json`` (all samples, and the counts that explain them), three pictures, and the tables of
``docs/attach-time.md``. Times in an emulated host are counts of instructions rather than nanoseconds: the ratios
count. On a host with an AMD IOMMU, as root, with devices named by ``KVMPASS_TEST_NVME`` …: ``run.py --here``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from inside import SECTIONS
from ioctls import REASONS
from report import (
    bars,
    bound_table,
    conditions,
    counts_table,
    document,
    growth,
    ioctls_table,
    sections_table,
    stages_table,
    summary,
    table,
    text,
    timeline,
)
from samples import Bench, Samples, merged
from starts import CPUS
from trees import trees

from kvmpass.lab import Lab, LabConfig
from kvmpass.testing.roles import from_environment

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
DEVICES = ("nvme", "nvme", "e1000e", "e1000e", "edu", "edu")
PARALLEL = ("parallel",)
"""Sections that have an emulated host of their own, with several CPUs, while no other runs."""
HALF = ("memory", "start", "spans", "processes")
"""Sections that take as long as the rest of those that run in a host with one CPU. No row is in both halves."""
REPLACED = 2
"""How many emulated hosts that end early are replaced, at most."""
LONGEST = 3600.0
"""Seconds for an emulated host without a limit, which takes 600 on a quiet machine: one that stops is replaced."""
LEAST_SECONDS = 90
"""Seconds that must be left of the limit for one to be replaced."""
RUNS = {"kvmpass": "a guest with a drive", "QEMU": "a guest of QEMU with a drive"}


def compile_programs(folder: Path) -> None:
    """Compile the programs in C, and edu's, which a guest runs."""
    for name in ("baseline", "until_run"):
        subprocess.run(["cc", "-O2", "-Wall", "-o", folder / name, HERE / f"{name}.c"], check=True)
    edu = HERE.parents[1] / "tests/amdvi/guest/edu.c"
    subprocess.run(["cc", "-O1", "-static", "-o", folder / "edu", edu], check=True)


def measure(
    folder: Path, rounds: int, kernel: str, here: bool, limit: float | None, sections: Sequence[str]
) -> dict[str, Any]:
    """Run sections on this host, or in an emulated one that ends after ``limit`` seconds.

    Where a fault of the emulator ends that early, another one measures the rounds that are missing.
    """
    found: dict[str, Any] = vars(Samples())
    left = dict.fromkeys(sections, rounds)
    until = None if limit is None else time.monotonic() + limit
    for number in range(1 + REPLACED):
        if number:
            found["replaced"] = {sections[0]: number}
        words = [sys.executable, str(HERE / "inside.py"), str(folder)]
        words += [f"{name}:{count}" for name, count in left.items()]
        if here:
            subprocess.run(words, check=True)
            complete = True
        else:
            seconds = LONGEST if until is None else until - time.monotonic()
            complete = run_emulated(words, folder, kernel, sections, seconds)
        result = folder / f"result-{next(iter(left))}"
        if result.exists():
            found = merged(found, json.loads(result.read_text()))
            result.unlink()
        left = {name: rounds - found["done"].get(name, 0) for name in sections}
        left = {name: count for name, count in left.items() if count}
        if complete or not left:
            break
        if until is not None and time.monotonic() + LEAST_SECONDS > until:
            break
    else:
        if limit is None:
            sys.exit("bench: too many emulated hosts ended early: nothing is written")
    if not found["samples"]:
        sys.exit("bench: nothing was measured")
    return found


def run_emulated(words: Sequence[str], folder: Path, kernel: str, sections: Sequence[str], timeout: float) -> bool:
    """Run words in an emulated host for sections. Return whether they ended, or else the host before them."""
    # The less memory, the sooner all of it was used.
    memory, cpus = "6G" if {*sections} & {*HALF, *PARALLEL} else "2G", CPUS if sections[0] in PARALLEL else 1
    config = LabConfig(devices=DEVICES, kernel=kernel, writable=(folder,), memory=memory, cpus=cpus, timeout=timeout)
    done = Lab(config).run(words, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer)
    if done.status:
        sys.exit(f"bench: {', '.join(sections)}: {done.summary}: nothing is written")
    if done.status is None:
        print(f"bench: {', '.join(sections)}: {done.summary}\n{done.console_tail}", file=sys.stderr)
    return done.status is not None


def outside(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure what needs no AMD host."""
    samples = Samples()
    started = time.monotonic()
    with trees(Bench(samples, folder, {})) as jobs:
        for _ in range(rounds):
            for job in jobs:
                job()
    samples.seconds["trees"] = time.monotonic() - started
    samples.save(folder / "result-outside")
    found: dict[str, Any] = json.loads((folder / "result-outside").read_text())
    return found


def write(found: dict[str, Any], output: Path) -> None:
    """Write the documents."""
    rows = found["rows"]
    output.joinpath("bench.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, content in documents(found).items():
        output.joinpath(name).write_text(content)
    print(text(rows))


def documents(found: dict[str, Any]) -> dict[str, str]:
    """Return the pictures, and the page with its tables, by the file's name."""
    counts = found["counts"]
    runs = {program: counts[name] for program, name in RUNS.items() if name in counts}
    blocks = {
        "conditions": conditions(found),
        "sections": sections_table(found["seconds"]),
        "ratios": table(found["rows"]),
        "counts": counts_table(counts.get("phases", {})),
        "stages": stages_table(counts),
        "bound": bound_table(found["samples"]),
        "ioctls": ioctls_table(counts.get("ioctls", {}), REASONS),
    }
    made = {
        "bench.svg": bars(found["rows"]),
        "bench-growth.svg": growth(found["samples"]),
        "attach-time.md": document((DOCS / "attach-time.md").read_text(), blocks),
    }
    return {**made, "bench-timeline.svg": timeline(runs)} if runs else made


def main() -> None:
    """Measure, and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(SECTIONS) + ",trees", help="sections, with commas between them")
    parser.add_argument("--kernel", default="full", help="of the emulated host: full, stock or a bzImage")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="emulated hosts at once")
    parser.add_argument("--limit", type=float, help="seconds for an emulated host; what it has measured then is kept")
    parser.add_argument("--here", action="store_true", help="measure on this host, as root")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing: make pictures and tables of bench.json"
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="directory for what is written")
    options = parser.parse_args()
    found: dict[str, Any]
    if options.redraw:
        found = json.loads((options.output / "bench.json").read_text())
        write({**found, "rows": summary(found["samples"])}, options.output)
        return
    wanted = options.only.split(",")
    if unknown := set(wanted) - {*SECTIONS, "trees"}:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    published = options.output.resolve() == DOCS.resolve()
    if published and (options.limit or {*SECTIONS, "trees"} - set(wanted)):
        parser.error("--only and --limit need --output DIR: the files in docs have every section")
    if options.here and "nvme" not in from_environment(os.environ):
        parser.error("--here assigns devices that are named only: KVMPASS_TEST_NVME=BDF …")
    inside = [name for name in SECTIONS if name in wanted]
    if options.here:
        shares, alone = [inside], []
    else:
        alone = [name for name in inside if name in PARALLEL]
        inside = [name for name in inside if name not in PARALLEL]
        shares = [[name for name in inside if (name in HALF) == half] for half in (False, True)]
    found = {name: {} for name in vars(Samples())}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.hosts) as pool:
        folder = Path(name)
        compile_programs(folder)
        work = partial(measure, folder, options.rounds, options.kernel, options.here, options.limit)
        together = [share for share in shares if share]
        parts = list(pool.map(work, together))
        parts += [work(alone)] if alone else []
        parts += [outside(folder, options.rounds)] if "trees" in wanted else []
    for part in parts:
        assert not found["samples"].keys() & part["samples"].keys(), "a row was measured in two hosts"
        for key, value in part.items():
            found[key].update(value)
    place = "this host" if options.here else "emulated host"
    rows = summary(found["samples"])
    for what, sections in (("failed", found["failures"]), ("repeated", found["repeated"])):
        for section, reasons in sections.items():
            print(f"bench: {section}: {len(reasons)} {what}, the first: {reasons[0]}", file=sys.stderr)
    if published and found["failures"]:
        sys.exit("bench: nothing is written")
    hosts = [] if options.here else [*together, *([alone] if alone else [])]
    where = {"place": place, "cpus": os.cpu_count(), "hosts": hosts, "at_once": min(options.hosts, len(together))}
    write({**where, "rounds": options.rounds, "rows": rows, **found}, options.output)


if __name__ == "__main__":
    main()
