"""The configuration of a lab, and the result of a run in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvmpass.errors import LabError

REMOVABLE = frozenset({"svm", "iommu", "intremap"})
ACCELERATORS = ("auto", "tcg", "kvm")
WRITABLE_LIMIT = 8  # the functions of one PCI slot

# Exit statuses for runs whose command has none.
TIMED_OUT = 124
NOT_REPORTED = 126

LabOutcome = Literal["exited", "timeout", "panic", "silent"]
"""How a run ended. ``silent``: the host ended (power-off, reset) without reporting a status."""


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """One emulated host. Raises ``LabError`` for invalid values."""

    devices: tuple[str, ...] = ()
    """``NAME[,PROPERTY=VALUE…]`` for each PCI device (:mod:`kvmpass.lab.devices`)."""
    memory: str = "4G"
    """Size of the host's memory, as QEMU takes it."""
    cpus: int = 1
    """Number of the host's CPUs, from 1 on."""
    kernel: str = "stock"
    """``stock``, ``full``, ``next`` or the path of a bzImage."""
    append: str = ""
    """Appended to the host kernel's command line."""
    without: frozenset[str] = frozenset()
    """Features that the host lacks: ``svm``, ``iommu``, ``intremap``."""
    accel: str = "auto"
    """QEMU's accelerator: ``tcg``, ``kvm``, or ``auto`` for ``kvm`` if AMD-V can be nested."""
    qemu: str | None = None
    """``system``, ``modern`` or the path of a QEMU; ``None``: ``modern`` for the next kernel, else ``system``."""
    writable: tuple[Path, ...] = ()
    """Directories of this machine that the host may write to, at the same paths; at most 8."""
    iommu_trace: Path | None = None
    """File for the IOMMU's translations, one in each line."""
    timeout: float | None = None
    """Seconds for the run from the start of QEMU on: downloads do not count."""

    def __post_init__(self) -> None:
        unknown = self.without - REMOVABLE
        if unknown:
            raise LabError(
                f"unknown features: {', '.join(sorted(unknown))}",
                f"use some of {', '.join(sorted(REMOVABLE))}",
            )
        if self.accel not in ACCELERATORS:
            raise LabError(f"unknown accelerator {self.accel!r}", f"use one of {', '.join(ACCELERATORS)}")
        if self.kernel == "next" and self.qemu == "system":
            raise LabError(
                "the next kernel needs the modern QEMU: guests that run it die under the system's",
                "leave out `--qemu`: `modern` is the default with this kernel",
            )
        if not re.fullmatch(r"[1-9]\d*[KMGTkmgt]?", self.memory):
            raise LabError(f"{self.memory!r} is not a memory size", "write a number and K, M or G, such as 4G")
        if self.cpus < 1:
            raise LabError(f"a host needs at least one CPU, not {self.cpus}")
        if len(self.writable) > WRITABLE_LIMIT:
            raise LabError(f"at most {WRITABLE_LIMIT} directories can be writable in one lab")
        if self.timeout is not None and self.timeout <= 0:
            raise LabError(f"a timeout must be positive, not {self.timeout}")
        if self.iommu_trace is not None and "iommu" in self.without:
            raise LabError("a host without an IOMMU has no trace")


@dataclass(frozen=True)
class LabResult:
    """How a run ended."""

    status: int | None
    """The command's exit status, 128 + N if signal N ended it; ``None`` unless ``outcome`` is ``exited``."""
    outcome: LabOutcome
    """How the run ended."""
    console_tail: str
    """The last lines of the host kernel's console, or those of its panic."""
    seconds: float
    """Time from start to end."""
    started: bool = True
    """Whether the command was started."""
    woken: int = 0
    """How often the emulator used no CPU time for 20 s and was sent an interrupt."""

    @property
    def exit_status(self) -> int:
        """The exit status for a process that represents the run."""
        if self.status is not None:
            return self.status
        return TIMED_OUT if self.outcome == "timeout" else NOT_REPORTED

    @property
    def summary(self) -> str:
        """A line on how the run ended."""
        reason = {
            "exited": f"the command exited with {self.status}",
            "timeout": "the timeout expired",
            "panic": "the host's kernel panicked",
            "silent": "the host ended without reporting a status",
        }
        when = "" if self.started else ", before the command was started"
        return f"{reason[self.outcome]} after {self.seconds:.1f} s{when}"


def split_features(values: Iterable[str]) -> frozenset[str]:
    """Return the names in ``("svm,iommu", "intremap")`` as a set."""
    return frozenset(name for value in values for name in re.split(r"[,\s]+", value) if name)
