"""The control channel: the guest's init reports on the command that it runs, in lines.

The guest's end is the init of :mod:`kvmpass.initramfs`. A line is ``kvmpass 1 WORD …``. The guest is not trusted:
everything else is ignored.
"""

from __future__ import annotations

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern

MAX_LINE = 512  # bytes, with the newline; longer lines are ignored


@dataclass(frozen=True, slots=True)
class Ready:
    """The command is about to start."""

    uptime: float | None
    """The guest's uptime in seconds; None: not reported."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The command has ended, and all of its output has been sent."""

    status: int
    """Its exit status, 0-255."""


@dataclass(frozen=True, slots=True)
class GuestFailure:
    """The guest's init has failed before the command: a module that did not load, a missing serial port."""

    text: str
    """The reason, printable ASCII."""


@dataclass(frozen=True, slots=True)
class SizeRequest:
    """The guest requests the size of its console (:mod:`kvmpass.guest.size`)."""


ControlEvent = Ready | Exited | GuestFailure | SizeRequest

_READY = lazy_pattern(r"kvmpass 1 ready(?: ([0-9]{1,9}(?:\.[0-9]{1,3})?))?")
_EXIT = lazy_pattern(r"kvmpass 1 exit ([0-9]{1,3})")
_ERROR = lazy_pattern(r"kvmpass 1 error ([ -~]+)")


class ControlChannel:
    """Decode a stream of bytes into events.

    Synchronization: one thread at a time.
    """

    def __init__(self) -> None:
        self._line = b""

    def feed(self, data: bytes) -> list[ControlEvent]:
        """Return the events that ``data`` completes, in order."""
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[:MAX_LINE]
        return [event for line in lines if len(line) < MAX_LINE and (event := parse_line(line))]


def parse_line(line: bytes) -> ControlEvent | None:
    """Return the event of a line without its newline; None if there is none."""
    text = line.rstrip(b"\r").decode("ascii", "replace")
    if text == "kvmpass 1 size":
        return SizeRequest()
    if match := _READY.fullmatch(text):
        return Ready(float(match[1]) if match[1] else None)
    if (match := _EXIT.fullmatch(text)) and int(match[1]) <= 255:
        return Exited(int(match[1]))
    if match := _ERROR.fullmatch(text):
        return GuestFailure(match[1])
    return None
