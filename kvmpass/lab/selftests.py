"""The kernel's own VFIO selftests (tools/testing/selftests/vfio), built and run in an emulated host."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from kvmpass.errors import LabError
from kvmpass.lab.build import compiles, unpack_source
from kvmpass.lab.cache import Say, cache_errors, cache_root, fill_directory, missing_packages, need_tool
from kvmpass.lab.channels import Writer
from kvmpass.lab.config import LabConfig, LabResult
from kvmpass.lab.kernels import NEXT
from kvmpass.lab.lab import Lab

FOLDER = "tools/testing/selftests/vfio"
TOOLS = ("gcc", "make", "bc", "xz")
HEADERS = {"uuid/uuid.h": "uuid-dev"}
LOG_LINES = 30
SECONDS = 600
"""The time limit of each test program: under emulation one needs minutes at worst."""

IGB, EDU = "0x8086:0x10c9", "0x1234:0x11e8"
DEVICES: dict[str, tuple[str, ...]] = {
    "vfio_iommufd_setup_test": (EDU,),
    "vfio_pci_device_init_perf_test": (IGB, EDU),
}
"""PCI functions of each test, by vendor and device ID; those of a test that is not listed are ``DEFAULT_DEVICES``."""
DEFAULT_DEVICES = (IGB,)
"""The igb has all that the other tests look for: their driver for it, BARs, MSI, MSI-X, reset, virtual functions."""

# Pages of 1 GiB and of 2 MiB are reserved at boot: without them a third of the mapping tests is skipped. vfio-pci
# makes virtual functions for the tests of VF tokens.
APPEND = "hugepagesz=1G hugepages=1 hugepagesz=2M hugepages=16 vfio_pci.enable_sriov=1"

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """How one test program ended."""

    name: str
    """The program."""
    outcome: Outcome
    """``skipped`` if it has run no case at all."""
    cases: tuple[int, int, int] = (0, 0, 0)
    """How many of its cases passed, failed, and were skipped."""


@dataclass
class TapReader:
    """Passes on TAP to ``target``, and reads the verdicts from it (Documentation/dev-tools/ktap.rst)."""

    target: Writer
    """Receives everything unchanged."""
    verdicts: list[Verdict] = field(default_factory=list)
    """The programs that have ended."""
    _rest: bytes = b""
    _counts: tuple[int, int, int] = (0, 0, 0)

    def write(self, data: bytes, /) -> None:
        """Take a part of the output, and pass it on. Raises what ``target`` raises."""
        self.target.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._read(line.decode("utf-8", "replace"))

    def flush(self) -> None:
        """Flush ``target``."""
        self.target.flush()

    def _read(self, line: str) -> None:
        if totals := re.match(r"# # Totals: pass:(\d+) fail:(\d+) .*\bskip:(\d+)", line):
            self._counts = (int(totals[1]), int(totals[2]), int(totals[3]))
        elif ended := re.match(r"(not )?ok \d+ selftests: vfio: (\S+)( # SKIP)?", line):
            outcome: Outcome = "failed" if ended[1] else "skipped" if ended[3] else "passed"
            self.verdicts.append(Verdict(ended[2], outcome, self._counts))
            self._counts = (0, 0, 0)


def missing_requirements() -> list[str]:
    """Return the Debian packages that building the tests needs and this machine does not have."""
    lacking = missing_packages(TOOLS)
    return lacking + [package for header, package in HEADERS.items() if not lacking and not compiles(header)]


def programs(directory: Path) -> list[str]:
    """Return the names of the test programs in a directory, sorted."""
    return sorted(path.name for path in directory.glob("vfio_*_test") if path.is_file())


def cached(tree: Path | None = None) -> Path:
    """Return the directory in the cache for test programs, of ``tree`` or of the next kernel. It may not exist."""
    return cache_root() / "selftests" / ("next" if tree is None else "tree")


@cache_errors()
def build(say: Say, tree: Path | None = None, *, again: bool = False) -> Path:
    """Return a directory with the test programs.

    They are built once, into the cache, from the source of the next kernel (``again``: once more); or from ``tree``,
    a kernel source, each time: into the cache, too, but for the headers, which are made in the tree. Raises
    ``LabError`` with the missing packages, or if they cannot be built; ``say`` then has the compiler's output.
    """
    target = cached(tree)
    if tree is not None and not (tree / FOLDER).is_dir():
        raise LabError(f"{tree} has no {FOLDER}", "name a kernel source from Linux 6.18 on")

    def make(draft: Path) -> None:
        lacking = missing_requirements()
        if lacking:
            raise LabError("packages to build the selftests are missing", f"apt-get install {' '.join(lacking)}")
        if tree is not None:
            _compile(tree.absolute(), draft, say)
            return
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_root()) as name:
            _compile(unpack_source(NEXT, Path(name), say), draft, say)

    fill_directory(target, make, "selftests", say, again=again or tree is not None)
    return target


def _compile(tree: Path, target: Path, say: Say) -> None:
    say(f"building the selftests of {tree.name}")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_root()) as output:
        _make(say, "-C", str(tree), "headers")
        _make(say, "-C", str(tree / FOLDER), f"OUTPUT={output}")
        for name in programs(Path(output)):
            shutil.copy(Path(output) / name, target / name)
    if not programs(target):
        raise LabError(f"{tree / FOLDER} does not contain tests for x86-64")


def _make(say: Say, *arguments: str) -> None:
    done = subprocess.run(
        [need_tool("make"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = done.stdout.splitlines()[-LOG_LINES:]
        for line in lines:
            say(f"  | {line}")
        # Not any "error": the compiler's command line has -Werror.
        errors = [line for line in lines if "error: " in line] or lines[-1:] or ["unknown reason"]
        raise LabError(f"the selftests could not be built: {errors[0].strip()}")


def choose(directory: Path, names: Sequence[str]) -> list[str]:
    """Return the programs with these names, all of them without names. Raises ``LabError`` for an unknown name."""
    known = programs(directory)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LabError(f"no selftest {', '.join(unknown)}", f"use some of {', '.join(known)}")
    return list(dict.fromkeys(names)) or known


def configuration(kernel: str = "next", timeout: float | None = None) -> LabConfig:
    """Return the emulated host for the tests. ``kernel``: as that of :class:`LabConfig`."""
    # Behind root ports: virtual functions have groups of their own there.
    return LabConfig(devices=("igb", "edu"), kernel=kernel, qemu="modern", append=APPEND, timeout=timeout)


def run(
    directory: Path, names: Sequence[str], config: LabConfig, target: Writer, say: Say
) -> tuple[LabResult, list[Verdict]]:
    """Run test programs of a directory in an emulated host, write their TAP to ``target``, and return the verdicts.

    Raises ``LabError`` if the host cannot be started.
    """
    reader = TapReader(target)
    tests = [f"{name}={','.join(DEVICES.get(name, DEFAULT_DEVICES))}" for name in names]
    script = files("kvmpass.lab").joinpath("selftests.sh").read_text()
    command = ["sh", "-c", script, "selftests", str(directory), str(SECONDS), *tests]
    return Lab(config, say).run(command, stdout=reader), reader.verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return a line about all tests, and what failed."""
    passed, failed, skipped = (
        sum(counts) for counts in zip((0, 0, 0), *(each.cases for each in verdicts), strict=True)
    )
    names = [verdict.name for verdict in verdicts if verdict.outcome == "failed"]
    cases = f"{len(verdicts)} selftests: {passed} cases passed, {failed} failed, {skipped} skipped"
    return f"{cases}; failed: {', '.join(names)}" if names else cases
