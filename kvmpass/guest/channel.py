"""The control channel: what the guest's init says about the command it runs, line by line.

The guest side is the init of :mod:`kvmpass.initramfs`. A line is ``kvmpass 1 WORD …``; everything else is ignored,
and so is what does not parse: nothing here trusts the guest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LINE = 512


@dataclass(frozen=True, slots=True)
class Ready:
    """The command is about to start; ``uptime`` of the guest in seconds, if it told."""

    uptime: float | None


@dataclass(frozen=True, slots=True)
class Exited:
    """The command ended with ``status`` (0-255) and its output has been sent."""

    status: int


@dataclass(frozen=True, slots=True)
class GuestFailure:
    """The guest could not do something before the command: a module that did not load, a port that is not there."""

    text: str


@dataclass(frozen=True, slots=True)
class SizeWanted:
    """The guest waits for the size of its console (:mod:`kvmpass.guest.size`)."""


ControlEvent = Ready | Exited | GuestFailure | SizeWanted

_READY = re.compile(r"kvmpass 1 ready(?: ([0-9]{1,9}(?:\.[0-9]{1,3})?))?")
_EXIT = re.compile(r"kvmpass 1 exit ([0-9]{1,3})")
_ERROR = re.compile(r"kvmpass 1 error ([ -~]+)")


class ControlChannel:
    """Turns bytes, in pieces of any size, into events. Not thread-safe: feed it from one callback."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._overlong = False

    def feed(self, data: bytes) -> list[ControlEvent]:
        """The events that ``data`` completes, in order."""
        events: list[ControlEvent] = []
        for byte in data:
            if byte != 0x0A:
                if len(self._line) < MAX_LINE:
                    self._line.append(byte)
                else:
                    self._overlong = True
                continue
            event = None if self._overlong else parse_line(bytes(self._line))
            self._line.clear()
            self._overlong = False
            if event is not None:
                events.append(event)
        return events


def parse_line(line: bytes) -> ControlEvent | None:
    """The event of one line without its end; ``None`` if it is none."""
    text = line.rstrip(b"\r").decode("ascii", "replace")
    if text == "kvmpass 1 size":
        return SizeWanted()
    if match := _READY.fullmatch(text):
        return Ready(float(match[1]) if match[1] else None)
    if (match := _EXIT.fullmatch(text)) and int(match[1]) <= 255:
        return Exited(int(match[1]))
    if match := _ERROR.fullmatch(text):
        return GuestFailure(match[1])
    return None
