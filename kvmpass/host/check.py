"""Checks of a host or a device: what they read, what they find, and in which order they run."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

from kvmpass._dataclass import dataclass, replace
from kvmpass.host.address import Bdf
from kvmpass.host.backend import AUTO, BackendChoice, choose_backend
from kvmpass.host.blocker import Blocker, BlockerTemplate
from kvmpass.host.kernel.cmdline import CommandLine
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.look import Look
from kvmpass.host.sysfs import IommuGroup, PciDevice, Sysfs
from kvmpass.host.usage import Use, uses
from kvmpass.layout import GIB


class Outcome(enum.StrEnum):
    """The result of one check."""

    PASS = "pass"
    """Nothing blocks assignment."""
    WARN = "warn"
    """Assignment works, but the host is not as it should be, or its state is unknown."""
    FAIL = "fail"
    """Assignment is blocked."""
    SKIPPED = "skipped"
    """The check did not run: it depends on a check that failed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One thing that a check has read."""

    source: str
    """Usually a path."""
    value: str
    """Its content, or the part of it that matters."""

    def __str__(self) -> str:
        return f"{self.source}: {self.value}"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    """The check's ``id``."""
    title: str
    """The check's title."""
    outcome: Outcome
    """Whether it passed."""
    summary: str
    """A few words; empty if the check was skipped."""
    read: tuple[Reading, ...] = ()
    """What the check has read."""
    blocker: Blocker | None = None
    """Set for ``warn`` and ``fail``."""
    needs: str | None = None
    """The ``id`` of the failed check for which this one was skipped."""
    bdf: Bdf | None = None
    """The device; None for a check of the host."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check's function returns; made by :func:`passed` and :func:`failed`."""

    read: tuple[Reading, ...]
    """What the check has read."""
    summary: str = ""
    """A few words for a check that passed."""
    blocker: Blocker | None = None
    """None for a check that passed."""


def passed(summary: str, *read: Reading) -> Verdict:
    """Return the verdict of a check that found nothing; ``summary`` is a few words."""
    return Verdict(read, summary)


def failed(template: BlockerTemplate, *read: Reading, **values: Any) -> Verdict:
    """Return the verdict of a check that found ``template``; ``values`` are those of :meth:`BlockerTemplate.fill`."""
    return Verdict(read, "", template.fill(**values))


@dataclass(frozen=True, slots=True)
class Check:
    """One precondition of assignment."""

    id: str
    """Machine-readable identifier."""
    title: str
    """A few words."""
    looks_at: str
    """What is read, in Markdown."""
    templates: tuple[BlockerTemplate, ...]
    """Every blocker that the check can find."""
    run: Callable[[CheckContext], Verdict]
    """The check itself. Only reads; raises nothing."""
    needs: tuple[str, ...] = ()
    """Checks that this one depends on, by ``id``: if one of them fails, this one is skipped."""
    device: bool = False
    """Whether the check is about one device."""
    vital: bool = False
    """Whether :func:`kvmpass.host.doctor.check_host` refuses if the check fails."""


def precondition(
    id: str,
    title: str,
    looks_at: str,
    templates: tuple[BlockerTemplate, ...],
    *,
    needs: tuple[str, ...] = (),
    device: bool = False,
    vital: bool = False,
) -> Callable[[Callable[[CheckContext], Verdict]], Check]:
    """Make the decorated function a :class:`Check` with these fields."""
    return lambda run: Check(id, title, looks_at, templates, run, needs, device, vital)


device_precondition = partial(precondition, device=True)
"""The same for a check of one device."""


class CheckContext:
    """What checks work on: the host, a device, and the planned guest. What several checks need is read once.

    Synchronization: for one thread.
    """

    def __init__(
        self,
        look: Look,
        bdf: Bdf | None = None,
        *,
        together: Collection[Bdf] = (),
        memory: int = GIB,
        huge_page: int = 0,
        locked: int | None = None,
        overhead: int | None = None,
        cpus: int = 1,
        daemons: int = 0,
        memfds: int = 0,
        wanted_backend: str = AUTO,
        p2p: bool = False,
        passed: BackendChoice | None = None,
        wake: bool = True,
        shown: bool = True,
    ) -> None:
        self.look = look
        """The host; callers that check many devices pass the same."""
        self.bdf = bdf
        """The device; None for checks of the host only."""
        self.together = together
        """Devices that are assigned with ``bdf``."""
        self.memory = memory
        """The guest's memory, in bytes."""
        self.huge_page = huge_page
        """The size of its pages in bytes; 0: ordinary pages."""
        self.locked = locked
        """The bytes to lock if they differ from ``memory``."""
        self.overhead = overhead
        """What the guest needs besides its memory, in bytes; None if unknown."""
        self.cpus = cpus
        """Its number of vCPUs."""
        self.daemons = daemons
        """How many daemons serve it files."""
        self.memfds = memfds
        """How many regions of its memory are memfds."""
        self.wanted_backend = wanted_backend
        """The IOMMU back end that is asked for, one of ``kvmpass.host.backend.BACKENDS``."""
        self.p2p = p2p
        """Whether devices are to reach each other's BARs."""
        self.passed = passed
        """The back end of which another process passes the descriptors: this one opens none of its nodes."""
        self.wake = wake
        """Whether a suspended device may be resumed to read its configuration space."""
        self.shown = shown
        """Whether what checks have read is shown: if not, they need not read what is only for that."""

    @property
    def sysfs(self) -> Sysfs:
        """The files of the host."""
        return self.look.sysfs

    @property
    def to_lock(self) -> int:
        """The bytes to lock."""
        return self.memory if self.locked is None else self.locked

    # --- the host

    @cached_property
    def cpu(self) -> tuple[str, frozenset[str]]:
        """The first CPU's vendor and flags."""
        fields = self.look.fields("proc/cpuinfo")
        return fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split())

    @cached_property
    def command_line(self) -> CommandLine:
        """The kernel's command line."""
        return CommandLine(self.sysfs.text("proc/cmdline") or "")

    @cached_property
    def iommus(self) -> list[str]:
        """The AMD IOMMUs that the kernel uses, by their names in ``/sys/class/iommu``."""
        return [name for name in self.sysfs.names("sys/class/iommu") if name.startswith("ivhd")]

    @property
    def groups(self) -> list[IommuGroup]:
        """All IOMMU groups."""
        return self.look.groups

    @property
    def log(self) -> KernelLog:
        """The kernel's log, as far as it reaches back."""
        return self.look.log

    @cached_property
    def backend(self) -> BackendChoice:
        """The interface to the IOMMU that a machine with these devices uses."""
        if self.passed is not None:
            return self.passed
        devices = dict.fromkeys((*([self.bdf] if self.bdf is not None else ()), *self.together))
        return choose_backend(self.sysfs, devices, self.wanted_backend, p2p=self.p2p)

    # --- this process

    @cached_property
    def status(self) -> dict[str, str]:
        """The fields of ``/proc/self/status``."""
        return self.look.fields("proc/self/status")

    def capable(self, capability: int) -> bool:
        """Whether this process has a capability, CAP_* of include/uapi/linux/capability.h."""
        try:
            return bool(int(self.status.get("CapEff", "0"), 16) >> capability & 1)
        except ValueError:
            return False

    @property
    def user(self) -> int:
        """The real user ID of this process."""
        words = self.status.get("Uid", "").split()
        return int(words[0]) if words and words[0].isdecimal() else os.getuid()

    def own_memory(self, field: str) -> int:
        """Bytes of this process's memory by a field of ``/proc/self/status`` such as ``VmSize``; 0 if unknown."""
        words = self.status.get(field, "").split()
        return int(words[0]) * 1024 if words and words[0].isdecimal() else 0

    def seen(self, path: str, value: str | None = None) -> Reading:
        """Return the reading of the file ``path``; ``value`` replaces its text."""
        text = self.sysfs.text(path) if value is None else value
        return Reading(f"/{path}", "not found, or not readable" if text is None else text)

    # --- the device

    @cached_property
    def device(self) -> PciDevice:
        """The device. Raises ``NoSuchDevice``: checks that use it depend on the check ``device``."""
        assert self.bdf is not None
        return self.look.require(self.bdf)

    @property
    def present(self) -> bool:
        """Whether there is a device, and it exists."""
        return self.bdf is not None and self.look.device(self.bdf) is not None

    @cached_property
    def header(self) -> bytes:
        """The first 64 bytes of configuration space; empty for a suspended device unless ``wake`` is set."""
        return self.sysfs.config(self.device.bdf, 0x40, wake=self.wake)  # it may be suspended since it was looked at

    @cached_property
    def uses(self) -> list[Use]:
        """What the host uses the device for, or may use it for."""
        return uses(self.look, self.device)

    @cached_property
    def group(self) -> IommuGroup | None:
        """The device's IOMMU group; None without one."""
        return None if self.device.group is None else self.look.group(self.device.group)


def run_checks(checks: Iterable[Check], context: CheckContext) -> Iterator[Finding]:
    """Run ``checks`` in order, each when the caller asks for its finding; skip those that depend on a failed one."""
    for check, verdict in _verdicts(checks, context):
        bdf = context.bdf if check.device else None
        if isinstance(verdict, str):
            yield Finding(check.id, check.title, Outcome.SKIPPED, "", needs=verdict, bdf=bdf)
            continue
        outcome, summary, blocker = Outcome.PASS, verdict.summary, verdict.blocker
        if blocker is not None:
            outcome, summary = Outcome.WARN if blocker.warning else Outcome.FAIL, blocker.brief
            blocker = replace(blocker, bdf=bdf)
        yield Finding(check.id, check.title, outcome, summary, verdict.read, blocker, bdf=bdf)


def _verdicts(checks: Iterable[Check], context: CheckContext) -> Iterator[tuple[Check, Verdict | str]]:
    """Yield each check with its verdict, or the ``id`` of the failed one for which it is skipped."""
    causes: dict[str, str] = {}  # of each check that failed or was skipped: the check that failed first
    for check in checks:
        cause = next((causes[need] for need in check.needs if need in causes), None) if causes else None
        if cause is not None:
            causes[check.id] = cause
            yield check, cause
            continue
        verdict = check.run(context)
        if verdict.blocker is not None and not verdict.blocker.warning:
            causes[check.id] = check.id
        yield check, verdict


def failures(checks: Iterable[Check], context: CheckContext) -> Iterator[Blocker]:
    """Run ``checks`` as :func:`run_checks`; yield the blockers of those that fail, without warnings."""
    for check, verdict in _verdicts(checks, context):
        if isinstance(verdict, Verdict) and verdict.blocker is not None and not verdict.blocker.warning:
            yield replace(verdict.blocker, bdf=context.bdf if check.device else None)
