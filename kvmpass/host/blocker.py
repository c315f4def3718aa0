"""Blockers: why a device, or this host, cannot be used for assignment. Described once, filled in where found."""

from __future__ import annotations

import errno
import os

from kvmpass._dataclass import dataclass, replace
from kvmpass.errors import HostNotReady, KvmpassError
from kvmpass.host.address import Bdf
from kvmpass.layout import MIB


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why something cannot be done now, or a warning about it."""

    kind: str
    """Machine-readable identifier; the checks in :mod:`kvmpass.host.blockers` have those of devices."""
    brief: str
    """A few words, for a list."""
    cause: str
    """What is wrong, on what, why: one sentence without a full stop."""
    remedy: str
    """What to do about it."""
    commands: tuple[str, ...] = ()
    """The remedy as shell commands, to be typed as root."""
    error: type[KvmpassError] = HostNotReady
    """The exception that :meth:`exception` makes, unless ``denied`` is set."""
    denied: str = ""
    """A file that this user may not open: :meth:`exception` makes a ``PermissionError``; else empty."""
    bdf: Bdf | None = None
    """The device; None if it concerns the host."""
    blocked_by: tuple[Bdf, ...] = ()
    """The siblings that keep the IOMMU group from being viable."""
    warning: bool = False
    """It does not block assignment."""
    bindable: bool = False
    """It blocks assignment, but not binding to vfio-pci."""
    forceable: bool = False
    """``kvmpass bind --force`` overrides it."""

    def exception(self) -> Exception:
        """Return the exception for a refusal; the remedy is its note."""
        if not self.denied:
            return self.error(self.cause, self.remedy)
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.denied)
        refused.add_note(self.remedy)
        return refused


@dataclass(frozen=True, slots=True)
class BlockerTemplate(Blocker):
    """A :class:`Blocker` before its values are known. docs/troubleshooting.md shows the templates as they are.

    ``brief``, ``cause``, ``remedy`` and ``commands`` are ``str.format`` templates; the other fields are those of the
    :class:`Blocker`.
    """

    def fill(self, *, denied: str = "", blocked_by: tuple[Bdf, ...] = (), **values: object) -> Blocker:
        """Return the blocker with ``values`` in its texts. Raises ``KeyError`` for a value that is missing."""
        brief, cause, remedy = (text.format(**values) for text in (self.brief, self.cause, self.remedy))
        commands = tuple(line.format(**values) for line in self.commands)
        found = replace(self, brief=brief, cause=cause, remedy=remedy, commands=commands)
        return replace(found, denied=denied, blocked_by=blocked_by)


def mib(size: int) -> str:
    """``size`` bytes as text, in whole MiB."""
    return f"{size // MIB} MiB"
