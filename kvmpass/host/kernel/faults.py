"""Events of the AMD IOMMU from the kernel's log: blocked DMA and others.

The log, not the tracepoint ``iommu:io_page_fault``: every kernel has it, nothing must be enabled that a killed
process would leave enabled, and it has the domain. But the kernel prints at most ten faults of a device in five
seconds (drivers/iommu/amd/iommu.c: amd_iommu_report_page_fault): a count is a lower bound.

The formats, all of ``iommu_print_event`` and ``amd_iommu_report_page_fault`` (drivers/iommu/amd_iommu.c until 5.7,
drivers/iommu/amd/iommu.c since):

====================  ==========================================================================================
until 4.10            ``AMD-Vi: Event logged [`` and, a record of its own since 4.9, ``IO_PAGE_FAULT device=…]``
4.11 to 4.14          a page fault of a device with data: ``DRIVER BDF: AMD-Vi: Event logged [IO_PAGE_FAULT …]``;
                      every other event in two records, the first with the IOMMU's name before it (``iommu ivhd0:``)
some of 4.18 to 5.8   without ``AMD-Vi:`` where a device or an IOMMU comes first (``pci_err``), EL8's among them
since 6.0             ``device=`` has a segment
====================  ==========================================================================================
"""

from __future__ import annotations

import errno
import os
import re

from kvmpass._dataclass import dataclass
from kvmpass._fd import OwnedFd, open_node
from kvmpass._lazy import lazy_pattern
from kvmpass.host.address import PATTERN, Bdf
from kvmpass.host.kernel.kmsg import PATH, Record, parse_records, read_pieces

KMSG = f"/{PATH}"
PAGE_FAULT = "IO_PAGE_FAULT"
UNATTACHED = "DEVICE_NOT_ATTACHED"  # not the kernel's name: it prints a sentence
# AMD IOMMU specification, 2.5.3
_INTERRUPT, _PRESENT, _WRITE, _PERMISSION, _TRANSLATION = 0x8, 0x10, 0x20, 0x40, 0x100
_PATIENCE = 16  # records of other CPUs that may be between the two records of one event

_FUNCTION = r"(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"
# The kernel begins a message about a device with its driver's name (or its bus's), its address and a colon. No other
# colon may precede the event: strings from a device follow one (``usb 1-1: Product: …``).
_HEAD = lazy_pattern(
    r"(?:iommu (?P<iommu>ivhd\d{1,4}): |"
    rf"(?:[^:\[\]]{{1,64}} )?(?P<speaker>{PATTERN}): )?"
    r"(?P<prefix>AMD-Vi: )?Event logged \[(?P<body>.*)",
    re.DOTALL,
)
_BODY = lazy_pattern(
    rf"(?P<kind>[A-Z][A-Z_]{{3,39}})(?: device=(?P<device>{_FUNCTION}),?)?"
    r"(?P<fields>(?:,? (?:domain|pasid|address|flags|tag|vmg_tag|spa|gpa|flags_rmp|type)=0x[0-9a-f]{1,16})*)\]"
)
_FIELD = lazy_pattern(r" ([a-z_]+)=0x([0-9a-f]+)")
_UNATTACHED = "Device not attached to domain properly]"
_UNATTACHED_DEVICE = lazy_pattern(
    rf"(?:AMD-Vi: )?  device=(?P<device>{_FUNCTION}) domain=0x(?P<domain>[0-9a-f]{{1,8}})"
)


@dataclass(frozen=True, slots=True)
class IommuEvent:
    """One event of an IOMMU; a field that the event does not have is None.

    QEMU's IOMMU reports 0 for address and domain, and device 00:00.0 for devices that are not on bus 0.
    """

    bdf: Bdf | None
    """The device."""
    kind: str
    """The kernel's name: ``IO_PAGE_FAULT`` for a blocked access, ``IOTLB_INV_TIMEOUT`` …"""
    address: int | None
    """The I/O virtual address, in bytes."""
    domain: int | None
    """The domain ID."""
    flags: int | None
    """The flags of the event (AMD IOMMU specification, 2.5)."""
    text: str
    """The kernel's message."""

    @property
    def access(self) -> str:
        """What a page fault blocked: ``read``, ``write``, ``interrupt``, ``translation request``; else empty.

        The specification defines the write flag only for a present page; hardware sets it for others, too, and the
        kernel relies on it (IS_WRITE_REQUEST).
        """
        if self.kind != PAGE_FAULT or self.flags is None:
            return ""
        if self.flags & _INTERRUPT:
            return "interrupt"
        if self.flags & _TRANSLATION:
            return "translation request"
        return "write" if self.flags & _WRITE else "read"

    @property
    def reason(self) -> str:
        """The cause of a page fault: ``not mapped``, ``not permitted``; empty if unknown."""
        if self.kind != PAGE_FAULT or self.flags is None:
            return ""
        if not self.flags & _PRESENT:
            return "not mapped"
        return "not permitted" if self.flags & _PERMISSION else ""


class EventParser:
    """Parses events from the kernel's records, in their order.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self._begun: str | None = None  # an event whose second record is missing so far
        self._speaker: Bdf | None = None
        self._left = 0

    def feed(self, record: Record) -> IommuEvent | None:
        """Return the event that ``record`` contains or completes; None for any other. Raises nothing."""
        if not record.by_kernel:
            return None
        head = _HEAD.fullmatch(record.text)
        if head is not None:
            return self._head(record, head)
        if self._begun is None or record.structured:  # the second halves are printk's, about no device
            return None
        self._left -= 1
        event = self._second(record.text)
        if event is not None or not self._left:
            self._begun = None
        return event

    def _head(self, record: Record, head: re.Match[str]) -> IommuEvent | None:
        self._begun = None
        speaker = Bdf.parse(head["speaker"]) if head["speaker"] else None
        if not (speaker or head["iommu"] or head["prefix"]) or (record.structured and record.device != speaker):
            return None
        body = head["body"]
        if body in ("", _UNATTACHED):
            self._begun, self._speaker, self._left = record.text, speaker, _PATIENCE
            return None
        return _event(body, speaker, record.text)

    def _second(self, text: str) -> IommuEvent | None:
        begun, self_text = self._begun or "", text.rstrip()
        if begun.endswith(_UNATTACHED):
            found = _UNATTACHED_DEVICE.fullmatch(self_text)
            if found is None:
                return None
            return IommuEvent(
                Bdf.parse(found["device"]), UNATTACHED, None, int(found["domain"], 16), None, f"{begun}{self_text}"
            )
        return _event(self_text, self._speaker, begun + self_text)


def _event(body: str, speaker: Bdf | None, text: str) -> IommuEvent | None:
    match = _BODY.fullmatch(body)
    if match is None:
        return None
    device = Bdf.parse(match["device"]) if match["device"] else None
    fields = {name: int(value, 16) for name, value in _FIELD.findall(match["fields"])}
    kind = match["kind"]
    if device is None and kind in (PAGE_FAULT, "RMP_PAGE_FAULT", "RMP_HW_ERROR"):
        device = speaker  # printed for the device itself; the others are printed for the IOMMU
    address = fields.get("address", fields.get("gpa", fields.get("spa")))
    return IommuEvent(device, kind, address, fields.get("domain"), fields.get("flags"), text)


class FaultLog(OwnedFd):
    """The IOMMU events of the whole host from now on. The descriptor can be polled for reading; nothing blocks.

    Raises ``OSError``: ``EPERM`` or ``EACCES`` without CAP_SYSLOG (if ``kernel.dmesg_restrict`` is set), ``ENOENT``
    without the node. ``lost`` counts how often records were overwritten before they were read.

    Synchronization: for one thread.
    """

    def __init__(self, path: str = KMSG) -> None:
        super().__init__(open_node(path, os.O_RDONLY | os.O_NONBLOCK))
        self.lost = 0
        self._parser = EventParser()
        os.lseek(self.fd, 0, os.SEEK_END)

    def read(self) -> list[IommuEvent]:
        """Return every event since the last call, in order. Raises ``OSError``."""
        events: list[IommuEvent] = []
        for piece in read_pieces(self.fd):
            if piece is None:
                self.lost += 1
                self._parser = EventParser()  # half of an event may be lost
                continue
            events += [event for record in parse_records(piece) if (event := self._parser.feed(record))]
        return events


def open_fault_log(path: str = KMSG) -> FaultLog | str:
    """Return the log, or why it cannot be opened, as a message with a remedy: a machine works without it."""
    try:
        return FaultLog(path)
    except OSError as error:
        remedy = {
            errno.EPERM: "; run as root, with CAP_SYSLOG, or with kernel.dmesg_restrict=0",
            errno.EACCES: "; run as root",
            errno.ENOENT: "; the kernel has no CONFIG_PRINTK, or /dev lacks the node",
        }.get(error.errno or 0, "")
        return f"DMA faults cannot be seen: {path}: {os.strerror(error.errno or 0)}{remedy}"
