"""The emulators: which QEMU, the features of its IOMMU, and which versions are known to be broken."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab.cache import cache_root, find_tool

PROGRAM = "qemu-system-x86_64"
SUPPORTED = "use Debian 12's QEMU 7.2 (apt-get install qemu-system-x86) or `--qemu modern`"

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Emulator:
    """A QEMU: its version, and how it is started."""

    name: str
    """``system``, ``modern``, or the path of a program."""
    path: Path
    """The program."""
    version: Version
    """Its version."""
    prefix: tuple[str, ...]
    """The first words of its command line."""
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Environment variables that it needs."""

    @property
    def version_text(self) -> str:
        """Its version, such as ``7.2.22``."""
        return ".".join(str(part) for part in self.version)

    @property
    def root_ports(self) -> bool:
        """Whether DMA of devices behind a PCIe root port is translated (until 10.0: no)."""
        return self.version >= (11, 0, 0)

    def help(self, device: str) -> str | None:
        """Return the list of a device's properties, ``None`` if this QEMU does not have the device."""
        return _device_help(self, device)

    def is_pci(self, device: str) -> bool:
        """Return whether a device is on a PCI bus. Raises ``LabError`` if this QEMU does not have the device."""
        text = self.help(device)
        if text is None:
            raise LabError(
                f"QEMU {self.version_text} has no device {device!r}", f"run {PROGRAM} -device help: it lists them"
            )
        return re.search(r"^\s*addr=", text, re.MULTILINE) is not None

    def iommu(self, *, intremap: bool) -> str:
        """Return the ``-device`` argument of the AMD IOMMU. Raises ``LabError`` if this QEMU has none."""
        words = ["amd-iommu", f"intremap={'on' if intremap else 'off'}"]
        known = self.help("amd-iommu")
        if known is None:
            raise LabError(f"QEMU {self.version_text} has no AMD IOMMU", SUPPORTED)
        # Releases that have this property translate only if it is on.
        if "dma-remap=" in known:
            words.append("dma-remap=on")
        if "xtsup=" in known and intremap:
            words.append("xtsup=on")
        return ",".join(words)


@functools.cache
def _device_help(emulator: Emulator, device: str) -> str | None:
    return _output(emulator.prefix, emulator.environment, "-machine", "none", "-device", f"{device},help")


def _output(prefix: tuple[str, ...], environment: Mapping[str, str], *arguments: str) -> str | None:
    """Run a QEMU and return what it prints, ``None`` if it fails. Raises ``LabError`` if it cannot be run."""
    try:
        done = subprocess.run(
            [*prefix, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{prefix[0]} cannot be run: {error}") from error
    return done.stdout if done.returncode == 0 else None


def judge(version: Version) -> tuple[bool, str]:
    """Return whether a version may be used, and what is known about it."""
    if version[:2] == (10, 0):
        return False, (
            "broken: with an AMD IOMMU its IOAPIC delivers nothing under TCG, so timers and legacy interrupts hang"
        )
    if version[:2] == (7, 2):
        return True, "tested (devices on bus 0 or behind a pci-bridge)"
    if version[:2] == (11, 1):
        return True, "tested (root ports, virtual functions, fault events)"
    if version < (7, 2, 0):
        return False, "too old: 7.2 is the first version that works"
    return True, "untested: each start checks that DMA is translated"


def modern_root() -> Path:
    """Return the directory of the modern QEMU in the cache."""
    return cache_root() / "qemu" / "modern"


def modern() -> Emulator:
    """Return the modern QEMU. Raises ``LabError`` if it is not in the cache."""
    root = modern_root()
    program = root / "usr" / "bin" / PROGRAM
    if not program.is_file():
        raise LabError("the modern QEMU is not in the cache", "kvmpass lab qemu fetches it (about 2 minutes)")
    library = root / "usr" / "lib" / "x86_64-linux-gnu"
    share = root / "usr" / "share"
    prefix = (
        str(library / "ld-linux-x86-64.so.2"),
        *("--library-path", str(library)),
        str(program),
        *("-L", str(share / "qemu"), "-L", str(share / "seabios")),
    )
    return probe("modern", program, prefix, {"QEMU_MODULE_DIR": str(library / "qemu")})


def system() -> Emulator:
    """Return the installed QEMU. Raises ``LabError`` if there is none."""
    found = find_tool(PROGRAM)
    if found is None:
        raise LabError("no QEMU is installed", "apt-get install qemu-system-x86")
    return probe("system", found)


def probe(
    name: str, path: Path, prefix: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> Emulator:
    """Return a QEMU with the version that it reports. Raises ``LabError``. An empty ``prefix`` is the program."""
    prefix, environment = prefix or (str(path),), environment or {}
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)", _output(prefix, environment, "--version") or "")
    if found is None:
        raise LabError(f"{path} is no QEMU system emulator", SUPPORTED)
    return Emulator(name, path, (int(found[1]), int(found[2]), int(found[3])), prefix, environment)


def find(name: str) -> Emulator:
    """Return the QEMU for ``system``, ``modern`` or a path. Raises ``LabError`` if it is missing or broken."""
    if name == "system":
        emulator = system()
    elif name == "modern":
        emulator = modern()
    else:
        path = Path(name).absolute()
        emulator = probe(str(path), path)
    usable, verdict = judge(emulator.version)
    if not usable:
        raise LabError(f"QEMU {emulator.version_text} ({emulator.path}) is {verdict}", SUPPORTED)
    return emulator


def accelerator(asked: str) -> str:
    """Return ``tcg`` or ``kvm``. ``auto`` is ``kvm`` only if the CPU's AMD-V can be nested."""
    if asked != "auto":
        return asked
    nested = Path("/sys/module/kvm_amd/parameters/nested")
    try:
        able = nested.read_text().strip() in {"1", "Y"} and os.access("/dev/kvm", os.R_OK | os.W_OK)
        svm = re.search(r"^flags\b.*\bsvm\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return "tcg"
    return "kvm" if able and svm else "tcg"
