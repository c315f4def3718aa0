"""Problems of a host or a device in words: described once, filled in where they are found."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from kvmpass.errors import HostNotReady, KvmpassError
from kvmpass.host.address import Bdf
from kvmpass.layout import MIB


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why something cannot be done now: ``brief`` for a list, ``cause`` and ``remedy`` in full.

    ``kind`` is a word for programs; :mod:`kvmpass.host.blockers` has those of devices. ``commands`` belong to the
    remedy: lines to type as root. ``error`` is the exception that a refusal raises for it, unless ``denied`` names a
    file that this user may not open: then it is a ``PermissionError``. ``devices`` are the siblings that block the
    group. ``bindable`` and ``forceable`` are those of the :class:`Problem`.
    """

    kind: str
    brief: str
    cause: str
    remedy: str
    error: type[KvmpassError]
    commands: tuple[str, ...] = ()
    denied: str = ""
    devices: tuple[Bdf, ...] = ()
    bindable: bool = False
    forceable: bool = False

    def exception(self) -> Exception:
        """To be raised; the remedy is its note."""
        if not self.denied:
            return self.error(self.cause, self.remedy)
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.denied)
        refused.add_note(self.remedy)
        return refused


def mib(size: int) -> str:
    """Bytes in words."""
    return f"{size // MIB} MiB"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in general. The texts are templates (``str.format``); docs/troubleshooting.md shows them as they are.

    ``warning``: it does not keep a device from being assigned. ``bindable``: it keeps a device from being assigned,
    not from being bound to vfio-pci. ``forceable``: ``kvmpass bind --force`` overrides it.
    """

    kind: str
    brief: str
    cause: str
    remedy: str
    commands: tuple[str, ...] = ()
    error: type[KvmpassError] = HostNotReady
    warning: bool = False
    bindable: bool = False
    forceable: bool = False

    def found(self, *, denied: str = "", **values: object) -> Blocker:
        """The problem as it is here."""
        brief, cause, remedy = (text.format(**values) for text in (self.brief, self.cause, self.remedy))
        commands = tuple(line.format(**values) for line in self.commands)
        return Blocker(
            self.kind,
            brief,
            cause,
            remedy,
            self.error,
            commands,
            denied,
            bindable=self.bindable,
            forceable=self.forceable,
        )
