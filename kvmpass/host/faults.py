"""DMA that the AMD IOMMU blocked, as the kernel's log tells it while it happens.

The log, not the tracepoint ``iommu:io_page_fault``: it is there on every kernel, needs nothing switched on that a
killed process would leave on, and names the domain. Its price: the kernel prints at most ten faults of a device in
five seconds (drivers/iommu/amd/iommu.c: amd_iommu_report_page_fault), so that a count is a lower bound.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from kvmpass._fd import OwnedFd, open_node
from kvmpass.host.address import Bdf

KMSG = "/dev/kmsg"
_RECORD_LIMIT = 8192  # no record is longer (kernel/printk/printk.c: PRINTK_MESSAGE_MAX)
_WRITE = 0x20  # AMD IOMMU specification, 2.5.3: RW

# The device is the one of the message (it has a driver, or the word pci, before it), or is named in the event, with
# its segment since 6.0.
_EVENT = re.compile(
    r"(?:(?P<speaker>[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): )?AMD-Vi: Event logged \[IO_PAGE_FAULT "
    r"(?:device=(?P<device>[0-9a-f:]+\.[0-7]) )?"
    r"domain=0x(?P<domain>[0-9a-f]+) address=0x(?P<address>[0-9a-f]+) flags=0x(?P<flags>[0-9a-f]+)\]"
)


@dataclass(frozen=True, slots=True)
class DmaFault:
    """One blocked access. ``bdf`` is None where the kernel names no device.

    ``address`` is the I/O virtual address in bytes, ``domain`` the IOMMU's number for the translation, ``flags``
    those of the event (AMD IOMMU specification, 2.5.3), ``text`` the kernel's message. An emulated IOMMU says less:
    QEMU's has 0 for address and domain, and device 00:00.0 for those that are not on bus 0.
    """

    bdf: Bdf | None
    address: int
    domain: int
    flags: int
    text: str

    @property
    def write(self) -> bool:
        """Whether the device wanted to write; it wanted to read otherwise."""
        return bool(self.flags & _WRITE)


def parse_fault(text: str) -> DmaFault | None:
    """The fault that a message of the kernel's log tells of, or None for any other message."""
    match = _EVENT.search(text)
    if match is None:
        return None
    name = match["device"] or match["speaker"]
    address, domain, flags = (int(match[field], 16) for field in ("address", "domain", "flags"))
    return DmaFault(Bdf.parse(name) if name else None, address, domain, flags, text)


class FaultLog(OwnedFd):
    """The faults of the whole host from now on. The descriptor can be polled for reading; nothing blocks.

    Raises ``OSError``: ``EPERM`` or ``EACCES`` without CAP_SYSLOG (where ``kernel.dmesg_restrict`` is set),
    ``ENOENT`` without the node. ``lost`` counts how often the log ran over before it was read.
    """

    def __init__(self, path: str = KMSG) -> None:
        super().__init__(open_node(path, os.O_RDONLY | os.O_NONBLOCK))
        self.lost = 0
        os.lseek(self.fd, 0, os.SEEK_END)

    def read(self) -> list[DmaFault]:
        """Every fault since the last call, in order; empty if there was none. Each message of the log is one read."""
        faults: list[DmaFault] = []
        while True:
            try:
                record = os.read(self.fd, _RECORD_LIMIT)
            except BlockingIOError:
                return faults
            except BrokenPipeError:
                self.lost += 1
                continue
            if not record:
                return faults
            # priority,sequence,microseconds,flags;message\n KEY=value\n… (Documentation/ABI/testing/dev-kmsg)
            _, _, message = record.decode(errors="replace").partition(";")
            fault = parse_fault(message.partition("\n")[0])
            if fault is not None:
                faults.append(fault)


def open_fault_log(path: str = KMSG) -> FaultLog | str:
    """The log, or why this process cannot have it: it is worth having, and no reason to fail."""
    try:
        return FaultLog(path)
    except OSError as error:
        remedy = {
            errno.EPERM: "; run as root, with CAP_SYSLOG, or with kernel.dmesg_restrict=0",
            errno.EACCES: "; run as root",
            errno.ENOENT: "; the kernel has no CONFIG_PRINTK, or /dev lacks the node",
        }.get(error.errno or 0, "")
        return f"DMA faults cannot be seen: {path}: {os.strerror(error.errno or 0)}{remedy}"
