"""Records of the kernel's log, ``/dev/kmsg``, and who has written them.

A record is one line, ``priority,sequence,microseconds,flags;message``, and below it lines that begin with a blank:
what ``dev_printk`` adds (``SUBSYSTEM=pci``, ``DEVICE=+pci:0000:01:00.0``). Only the kernel writes with
facility 0: what user space writes has facility 1. A line break in a message is written as ``\\x0a``, so
that a message cannot forge a record. Source: Documentation/ABI/testing/dev-kmsg, kernel/printk/printk.c
(devkmsg_write, msg_print_ext_body).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from kvmpass._dataclass import dataclass
from kvmpass._fd import OwnedFd
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import BadAddress
from kvmpass.host.address import Bdf

PATH = "dev/kmsg"
_RECORD_LIMIT = 8192  # no record is longer (kernel/printk/printk.c: PRINTK_MESSAGE_MAX)
_BIGGEST_LOG = 64 << 20  # bytes: more than the maximum of log_buf_len; limits files that do not end


class Record(NamedTuple):  # a log has thousands
    """One record."""

    facility: int
    """Its syslog facility; 0: the kernel."""
    sequence: int
    """Its sequence number, 0 for the first after boot."""
    text: str
    """The message."""
    structured: bool = False
    """Whether the kernel has added a device of any bus (``dev_printk``)."""
    device: Bdf | None = None
    """That device, if it is a PCI function."""

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel has written it."""
        return self.facility == 0


@dataclass(frozen=True, slots=True)
class KernelLog:
    """The content of the log at one moment."""

    records: tuple[Record, ...] = ()
    """The records, oldest first."""
    complete: bool = True
    """Whether it reaches back to boot."""
    error: str | None = None
    """Why it cannot be read; None if it can."""

    def having(self, *words: str) -> list[str]:
        """Return the kernel's messages that contain one of ``words``."""
        return [text for text in self._own() if any(word in text for word in words)]

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the kernel's messages that match ``pattern`` as a whole."""
        return [text for text in self._own() if pattern.fullmatch(text)]

    def _own(self) -> Iterator[str]:
        return (record.text for record in self.records if record.by_kernel)


# Whole records only, of 8192 bytes at most: no number in them is long.
_RECORD = lazy_pattern(r"^([0-9]{1,20}),([0-9]{1,20}),[0-9]+(?:,[^;\n]*)?;(.*)((?:\n .*)*)", re.MULTILINE)
_DEVICE = lazy_pattern(r"^ DEVICE=(.*)", re.MULTILINE)


def parse_records(data: bytes) -> Iterator[Record]:
    """Yield whole records; other lines are skipped. Raises nothing."""
    for match in _RECORD.finditer(data.decode(errors="replace")):
        priority, sequence, text, properties = match.groups()
        found = _DEVICE.search(properties)
        device = found[1] if found else ""
        yield Record(int(priority) >> 3, int(sequence), text, bool(device), _function(device))


def _function(device: str) -> Bdf | None:
    kind, _, name = device.partition(":")
    try:
        return Bdf.parse(name) if kind == "+pci" else None
    except BadAddress:
        return None


def read_pieces(fd: int) -> Iterator[bytes | None]:
    """Yield what a descriptor (``O_NONBLOCK``) of the log has now: one record of ``/dev/kmsg``, any bytes of a file.

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


def read_log(path: str | os.PathLike[str], word: bytes = b"") -> KernelLog:
    """Return the content of the log, or the records whose text has ``word``. Raises nothing: see ``KernelLog.error``.

    ``path`` is ``/dev/kmsg``, or the regular file of a recording. Records that are chosen by a word lack their
    device: to parse thousands of others takes most of the time.
    """
    data = bytearray()
    try:
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as log:
            for piece in read_pieces(log.fd):
                data += piece or b""
                if len(data) >= _BIGGEST_LOG:
                    break
    except OSError as error:
        return KernelLog((), False, error.strerror or str(error))
    content = bytes(data)
    first = next(parse_records(content), None)
    if word:
        content = b"\n".join(line for line in content.split(b"\n") if word in line)
    return KernelLog(tuple(parse_records(content)), first is None or first.sequence == 0)
