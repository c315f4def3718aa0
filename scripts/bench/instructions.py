"""What Python executes until ``kvmpass assign`` has attached a device: instructions in user space, by valgrind.

Imports are most of it, and a busy machine does not change their number. Needs neither KVM nor an emulated host.
Writes the table to ``docs/attach-time.md``, or to ``--output DIR``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from report import document, instructions_table

DOCS = Path(__file__).parents[2] / "docs"
PARTS = {
    "Python": "",
    "click": "click",
    "options of `assign`": "kvmpass.cli.assign",
    "checks": "kvmpass.host.blockers, kvmpass.host.doctor.vital",
    "machine": "kvmpass.machine.machine",
    "kernel and initramfs": "kvmpass.guest.image",
    "virtio console": "kvmpass.virtio.function, kvmpass.virtio.console",
    "binding": "kvmpass.host.drivers.borrow",
}
"""What each part imports beyond the parts before it, in the order of a run."""
# As in a run: garbage is not collected, and nothing is finalized before the device is attached.
SCRIPT = """
import gc, os, sys
gc.disable()
{imports}
print(len(sys.modules), sum(name.startswith("kvmpass") for name in sys.modules), flush=True)
os._exit(0)
"""


class Count(NamedTuple):
    """What a process has executed and loaded."""

    instructions: int
    """In user space."""
    modules: int
    """In ``sys.modules``."""
    own: int
    """Modules of kvmpass among them."""


def count(modules: list[str]) -> Count:
    """Import modules in a process of its own. Raises ``CalledProcessError``."""
    script = SCRIPT.format(imports="".join(f"import {names}\n" for names in modules if names))
    words = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    loaded, own = map(int, done.stdout.split())
    return Count(int(found[1]), loaded, own)


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DOCS, help="directory for the page")
    options = parser.parse_args()
    imports = list(PARTS.values())
    counts = [count(imports[: number + 1]) for number in range(len(imports))]
    block = instructions_table(dict(zip(PARTS, counts, strict=True)))
    page = document((DOCS / "attach-time.md").read_text(), {"instructions": block})
    options.output.joinpath("attach-time.md").write_text(page)
    print(block)


if __name__ == "__main__":
    main()
