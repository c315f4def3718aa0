"""What a check is, what it finds, and how checks that need one another are gone through."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from kvmpass.errors import NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.kernel.cmdline import CommandLine
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.look import Look
from kvmpass.host.names import Names
from kvmpass.host.problems import Blocker, Problem
from kvmpass.host.sysfs import IommuGroup, PciDevice, Sysfs
from kvmpass.host.usage import Use, uses
from kvmpass.layout import GIB, PAGE


class Outcome(enum.StrEnum):
    PASS = "pass"
    WARN = "warn"
    """Works, but is not as it should be, or cannot be told."""
    FAIL = "fail"
    SKIPPED = "skipped"
    """Nothing can be said, or nothing new: it needs what an earlier check failed for."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was looked at, usually a file, and what it says."""

    source: str
    value: str

    def __str__(self) -> str:
        return f"{self.source}: {self.value}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``summary`` is a few words; ``trouble`` is there for ``warn`` and ``fail``.

    ``needs`` is the check that failed, of one that was skipped. ``bdf`` is None for what is the host's.
    """

    check: str
    title: str
    outcome: Outcome
    summary: str
    read: tuple[Reading, ...] = ()
    trouble: Blocker | None = None
    needs: str | None = None
    bdf: Bdf | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check's function returns: ``summary`` for a pass, else the problem."""

    read: tuple[Reading, ...]
    summary: str = ""
    trouble: Blocker | None = None
    warning: bool = False


def good(summary: str, *read: Reading) -> Verdict:
    return Verdict(read, summary)


def bad(problem: Problem, *read: Reading, denied: str = "", **values: object) -> Verdict:
    return Verdict(read, "", problem.found(denied=denied, **values), problem.warning)


@dataclass(frozen=True, slots=True)
class Check:
    """One precondition. ``looks_at`` names what is read, ``problems`` everything that it can find.

    ``needs`` are checks without which it says nothing. ``device``: it asks about one device. ``vital``: an assignment
    is refused if it fails, before anything changes; the others are worth knowing, or are asked elsewhere.
    """

    id: str
    title: str
    looks_at: str
    problems: tuple[Problem, ...]
    run: Callable[[Examined], Verdict]
    needs: tuple[str, ...] = ()
    device: bool = False
    vital: bool = False


class Examined:
    """A host under examination, and what is wanted of it. What several checks read is read once.

    ``memory`` is the guest's, in bytes; ``huge_page`` the bytes of the pages that it must come from, or 0; ``locked``
    what must be locked, if that is another number; ``memlock`` replaces this process's limit (-1: none).
    ``together`` are devices that are taken with ``bdf``. Whoever asks about many devices passes one ``look``.
    ``wake``: a device that is suspended may be woken to ask it. ``cpus`` are the guest's.
    ``overhead`` is what it costs beside its memory, in bytes, if that is known.
    """

    def __init__(
        self,
        sysfs: Sysfs,
        bdf: Bdf | None = None,
        *,
        together: Iterable[Bdf] = (),
        memory: int = GIB,
        huge_page: int = 0,
        locked: int | None = None,
        memlock: int | None = None,
        look: Look | None = None,
        wake: bool = True,
        cpus: int = 1,
        overhead: int | None = None,
    ) -> None:
        self.sysfs = sysfs
        self.overhead = overhead
        self.cpus = cpus
        self.bdf = bdf
        self.together = tuple(together)
        self.memory = memory
        self.huge_page = huge_page if huge_page > PAGE else 0
        self.locked = memory if locked is None else locked
        self.memlock = memlock
        self.look = look or Look(sysfs)
        self.wake = wake

    @classmethod
    def of(
        cls, sysfs: Sysfs, device: PciDevice, together: Iterable[Bdf], look: Look | None, *, wake: bool = False
    ) -> Self:
        """A device that was just read."""
        examined = cls(sysfs, device.bdf, together=together, look=look, wake=wake)
        examined.__dict__["device"] = device  # where the cached property looks first
        return examined

    @property
    def names(self) -> Names:
        return self.look.names

    # --- the host

    @cached_property
    def cpu(self) -> tuple[str, frozenset[str]]:
        """The first CPU's vendor and flags."""
        vendor, flags = "", frozenset[str]()
        for line in (self.sysfs.text("proc/cpuinfo") or "").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "vendor_id":
                vendor = value.strip()
            elif key.strip() == "flags":
                flags = frozenset(value.split())
                break
        return vendor, flags

    @cached_property
    def command_line(self) -> CommandLine:
        """The kernel's."""
        return CommandLine(self.sysfs.text("proc/cmdline") or "")

    @cached_property
    def iommus(self) -> list[str]:
        """The AMD IOMMUs that the kernel drives."""
        return [name for name in self.sysfs.names("sys/class/iommu") if name.startswith("ivhd")]

    @cached_property
    def groups(self) -> list[IommuGroup]:
        return self.sysfs.groups()

    @property
    def log(self) -> KernelLog:
        """The kernel's, as far as it reaches back."""
        return self.look.log

    # --- this process

    @cached_property
    def status(self) -> dict[str, str]:
        """Its ``/proc/self/status``."""
        lines = (self.sysfs.text("proc/self/status") or "").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def capable(self, capability: int) -> bool:
        """Whether it has one of CAP_* (include/uapi/linux/capability.h)."""
        try:
            return bool(int(self.status.get("CapEff", "0"), 16) >> capability & 1)
        except ValueError:
            return False

    @property
    def user(self) -> int:
        """Its real user."""
        words = self.status.get("Uid", "").split()
        return int(words[0]) if words and words[0].isdecimal() else os.getuid()

    def own_memory(self, field: str) -> int:
        """Bytes of it, such as ``VmSize``; 0 where the kernel does not say."""
        words = self.status.get(field, "").split()
        return int(words[0]) * 1024 if words and words[0].isdecimal() else 0

    def seen(self, path: str, value: str | None = None) -> Reading:
        """The reading of a file; ``value`` where its text would be too much."""
        text = self.sysfs.text(path) if value is None else value
        return Reading(f"/{path}", "not there, or not readable" if text is None else text)

    # --- the device

    @cached_property
    def device(self) -> PciDevice:
        """Raises ``NoSuchDevice``; checks that use it need the one that asks whether it is there."""
        assert self.bdf is not None
        return self.sysfs.device(self.bdf)

    @property
    def present(self) -> bool:
        try:
            return self.device.bdf == self.bdf
        except NoSuchDevice:
            return False

    @cached_property
    def header(self) -> bytes:
        """The first 64 bytes of configuration space; empty where only waking the device would get them."""
        return self.sysfs.config(self.device.bdf, 0x40, wake=self.wake)

    @cached_property
    def uses(self) -> list[Use]:
        """What the host does with the device, or may do unseen."""
        return uses(self.look, self.device)

    @cached_property
    def group(self) -> IommuGroup | None:
        """The device's."""
        return None if self.device.group is None else self.look.group(self.device.group)


def examine(checks: Sequence[Check], examined: Examined) -> Iterator[Finding]:
    """Make the checks in their order, one at a time as the caller asks for them."""
    failed: dict[str, str] = {}  # checks that failed, and those skipped for it: the one that failed first
    for check in checks:
        bdf = examined.bdf if check.device else None
        cause = next((failed[need] for need in check.needs if need in failed), None)
        if cause is not None:
            failed[check.id] = cause
            yield Finding(check.id, check.title, Outcome.SKIPPED, "", needs=cause, bdf=bdf)
            continue
        verdict = check.run(examined)
        outcome = Outcome.PASS
        if verdict.trouble is not None:
            outcome = Outcome.WARN if verdict.warning else Outcome.FAIL
        if outcome is Outcome.FAIL:
            failed[check.id] = check.id
        summary = verdict.trouble.brief if verdict.trouble else verdict.summary
        yield Finding(check.id, check.title, outcome, summary, verdict.read, verdict.trouble, bdf=bdf)
