"""What a lab is made of, and what a run in it came to: plain values."""

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

TIMED_OUT = 124
NOT_REPORTED = 126

LabOutcome = Literal["exited", "timeout", "panic", "silent"]


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """One emulated host. Raises ``LabError`` for values that no host can have.

    ``devices`` are ``NAME[,PROPERTY=VALUE…]``; ``memory`` is a size as QEMU takes it; ``append`` goes to the host
    kernel's command line; ``without`` names features that this host shall lack; the directories in ``writable``
    are shared with the real machine at the same path; ``timeout`` (seconds) bounds the run from the moment QEMU is
    started, so downloads do not count.
    """

    devices: tuple[str, ...] = ()
    memory: str = "4G"
    cpus: int = 1
    kernel: str = "stock"
    append: str = ""
    without: frozenset[str] = frozenset()
    accel: str = "auto"
    qemu: str = "system"
    writable: tuple[Path, ...] = ()
    iommu_trace: Path | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        unknown = self.without - REMOVABLE
        if unknown:
            raise LabError(
                f"a lab cannot be without {', '.join(sorted(unknown))}",
                f"use some of {', '.join(sorted(REMOVABLE))}",
            )
        if self.accel not in ACCELERATORS:
            raise LabError(f"unknown accelerator {self.accel!r}", f"use one of {', '.join(ACCELERATORS)}")
        if not re.fullmatch(r"[1-9]\d*[KMGTkmgt]?", self.memory):
            raise LabError(f"{self.memory!r} is not a memory size", "write a number and K, M or G, such as 4G")
        if self.cpus < 1:
            raise LabError(f"a host needs at least one CPU, not {self.cpus}")
        if len(self.writable) > WRITABLE_LIMIT:
            raise LabError(f"at most {WRITABLE_LIMIT} directories can be writable in one lab")
        if self.timeout is not None and self.timeout <= 0:
            raise LabError(f"a timeout must be positive, not {self.timeout}")
        if self.iommu_trace is not None and "iommu" in self.without:
            raise LabError("a host without an IOMMU has nothing to trace")


@dataclass(frozen=True)
class LabResult:
    """How a run ended.

    ``status`` is the command's own exit status, 128 + the signal's number if one ended it, ``None`` unless
    ``outcome`` is ``exited``. ``silent`` is a host that went away (power-off, reset) without a word.
    ``console_tail`` holds the last lines of the host kernel's console, ``seconds`` the time from start to end.
    ``started`` tells whether the command was reached at all, ``woken`` how often the emulator used no CPU time for
    20 s and was sent an interrupt.
    """

    status: int | None
    outcome: LabOutcome
    console_tail: str
    seconds: float
    started: bool = True
    woken: int = 0

    @property
    def exit_status(self) -> int:
        """The status for a process that stands for the run."""
        if self.status is not None:
            return self.status
        return TIMED_OUT if self.outcome == "timeout" else NOT_REPORTED

    @property
    def summary(self) -> str:
        """One line on an end that was not the command's."""
        reason = {
            "exited": f"the command exited with {self.status}",
            "timeout": "the time was up",
            "panic": "the host's kernel panicked",
            "silent": "the host ended without reporting a status",
        }
        when = "" if self.started else ", before the command was started"
        return f"{reason[self.outcome]} after {self.seconds:.1f} s{when}"


def split_features(values: Iterable[str]) -> frozenset[str]:
    """``("svm,iommu", "intremap")`` as a set of names."""
    return frozenset(name for value in values for name in re.split(r"[,\s]+", value) if name)
