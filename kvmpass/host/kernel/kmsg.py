"""The records of the kernel's log, ``/dev/kmsg``, and who wrote them.

A record is one line, ``priority,sequence,microseconds,flags;message``, and below it lines that begin with a blank:
what ``dev_printk`` adds (``SUBSYSTEM=pci``, ``DEVICE=+pci:0000:01:00.0``). The kernel writes with facility 0, and
nobody else can: what user space puts there becomes facility 1. A line break in a message is written as ``\\x0a``, so
that a message cannot make a record. Source: Documentation/ABI/testing/dev-kmsg, kernel/printk/printk.c
(devkmsg_write, msg_print_ext_body).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpass.errors import BadAddress
from kvmpass.host.address import Bdf

PATH = "dev/kmsg"
_RECORD_LIMIT = 8192  # no record is longer (kernel/printk/printk.c: PRINTK_MESSAGE_MAX)
_BIGGEST_LOG = 64 << 20  # bytes: more than log_buf_len may make it, and an end for a file that has none


@dataclass(frozen=True, slots=True)
class Record:
    """``text`` is the message; ``device`` the PCI function that the kernel says it is about, as ``dev_printk`` does.

    ``structured``: the kernel says about which device it is, of whatever bus.
    """

    facility: int
    sequence: int
    text: str
    structured: bool = False
    device: Bdf | None = None

    @property
    def by_kernel(self) -> bool:
        return self.facility == 0


@dataclass(frozen=True, slots=True)
class KernelLog:
    """What is in the log now. ``complete``: it reaches back to the boot. ``error`` says why it cannot be read."""

    records: tuple[Record, ...] = ()
    complete: bool = True
    error: str | None = None

    def having(self, *words: str) -> list[str]:
        """The kernel's own messages that hold one of ``words``."""
        return [one.text for one in self.records if one.by_kernel and any(word in one.text for word in words)]

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """The kernel's own messages that are such from the first character to the last."""
        return [one.text for one in self.records if one.by_kernel and pattern.fullmatch(one.text)]


def parse_records(data: bytes) -> Iterator[Record]:
    """Whole records; lines that are none are left out. Raises nothing."""
    lines: list[str] = []
    for line in data.decode(errors="replace").split("\n"):
        if lines and not line.startswith(" "):
            yield from _record(lines)
            lines = []
        if lines or not line.startswith(" "):
            lines.append(line)
    yield from _record(lines)


def _record(lines: list[str]) -> Iterator[Record]:
    if not lines:
        return
    head, separator, text = lines[0].partition(";")
    fields = head.split(",")
    if not separator or len(fields) < 3 or not all(field.isascii() and field.isdecimal() for field in fields[:3]):
        return
    properties = dict(line[1:].partition("=")[::2] for line in lines[1:])
    device = properties.get("DEVICE", "")
    yield Record(int(fields[0]) >> 3, int(fields[1]), text, bool(device), _function(device))


def _function(device: str) -> Bdf | None:
    kind, _, name = device.partition(":")
    try:
        return Bdf.parse(name) if kind == "+pci" else None
    except BadAddress:
        return None


def read_pieces(fd: int) -> Iterator[bytes | None]:
    """What a descriptor (``O_NONBLOCK``) of the log has now: of ``/dev/kmsg`` a record each, of a file any bytes.

    None stands for records that were overwritten before they were read. Raises ``OSError``.
    """
    while True:
        try:
            piece = os.read(fd, _RECORD_LIMIT)
        except BlockingIOError:
            return
        except BrokenPipeError:
            yield None
            continue
        if not piece:
            return
        yield piece


def read_log(path: str | os.PathLike[str]) -> KernelLog:
    """All that the log has now. Raises nothing: ``error`` says what is in the way.

    Of a regular file, as a recorded host has it, all lines are read.
    """
    data = bytearray()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return KernelLog((), False, error.strerror or str(error))
    try:
        for piece in read_pieces(fd):
            data += piece or b""
            if len(data) >= _BIGGEST_LOG:
                break
    except OSError as error:
        return KernelLog((), False, error.strerror or str(error))
    finally:
        os.close(fd)
    records = tuple(parse_records(bytes(data)))
    return KernelLog(records, not records or records[0].sequence == 0)
