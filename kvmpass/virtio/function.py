"""A virtio device as a PCI function: the modern transport (Virtual I/O Device 1.2, section 4.1).

One BAR has everything, a page each: common configuration, ISR status, device configuration, notifications, and the
MSI-X table with its pending bits. Capabilities are in the order in which Linux looks for them, as each is searched
from the start.
"""

from __future__ import annotations

from kvmpass import pciregs
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.layout import PAGE, Range
from kvmpass.memory import HostMapping
from kvmpass.pci.bar import Bar
from kvmpass.pci.bars import Bars
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import Wiring
from kvmpass.pci.msix import Msix
from kvmpass.virtio.device import VirtioDevice
from kvmpass.virtio.interrupts import VectorSink
from kvmpass.virtio.kicks import Kicks
from kvmpass.virtio.transport import COMMON_SIZE, PASSIVE, Transport

log = limited_log(__name__)

VENDOR, DEVICE_BASE, SUBSYSTEM = 0x1AF4, 0x1040, 0x1100
"""Identity of a modern virtio function (section 4.1.2)."""
COMMON, ISR, CONFIG, NOTIFY, TABLE, PENDING = (PAGE * page for page in range(6))
"""Offsets in the BAR."""
COLLECTED = tuple(Range(COMMON + start, end - start) for start, end in PASSIVE)
"""Registers of the BAR whose writes KVM collects."""
BAR_SIZE = 8 * PAGE
PAGES = {
    COMMON: "common configuration",
    ISR: "ISR status",
    CONFIG: "device configuration",
    NOTIFY: "notification",
}
"""What is in the BAR's pages, for statistics."""
NOTIFY_STEP = 4
"""Bytes from one queue's notification to the next one's."""

CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI = 1, 2, 3, 4, 5
"""Types of the vendor's capabilities."""
_FIRST_AT = 0x40
_CAP_SIZE = 16  # of the capabilities without a field of their own
_WINDOW_BAR, _WINDOW_OFFSET, _WINDOW_LENGTH, _WINDOW_DATA = 4, 8, 12, 16  # in CAP_PCI


class Registers:
    """What is behind the BAR: a ``BarSource``. Nothing is mapped.

    Synchronization: with the bus lock held.
    """

    size = BAR_SIZE
    mmap_areas: tuple[Range, ...] = ()

    def __init__(self, transport: Transport, sink: VectorSink) -> None:
        self._transport = transport
        self._sink = sink

    def mmap(self, area: Range) -> HostMapping:
        """See ``BarSource``: there is nothing to map."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> bytes:
        """Read a register; zeroes where there is none."""
        page, at = offset // PAGE * PAGE, offset % PAGE
        data = b""
        if page == COMMON:
            data = self._transport.read(at, size)
        elif page == CONFIG:
            data = self._transport.device.config[at : at + size]
        elif offset == ISR:
            data = bytes([self._sink.take_reasons()])
        return data.ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write a register; dropped where there is none."""
        page, at = offset // PAGE * PAGE, offset % PAGE
        if page == COMMON:
            self._transport.write(at, data)
        elif page == NOTIFY:
            self._transport.notify(at // NOTIFY_STEP)


class VirtioFunction:
    """A ``PciFunction`` over ``device``.

    Raises ``LayoutError``, ``OSError``.

    Synchronization: with the bus lock held.
    """

    def __init__(self, device: VirtioDevice, wiring: Wiring, name: str) -> None:
        sink = VectorSink(name, device.vectors)
        self._quiesced = False
        self._space = space = ConfigSpace()
        self.transport = Transport(wiring.memory, device, sink, self._is_master)
        """Status, features and queues."""
        self._registers = Registers(self.transport, sink)
        self._add_header(device)
        self._window_at = self._add_capabilities(device)
        at = self._window_at + _CAP_SIZE + 4
        space.set(self._window_at + 1, at, 1)
        space.emulate(at, bytes([pciregs.CAP_MSIX, 0]))
        own = pciregs.MsixRegisters(device.vectors, False, 0, TABLE, 0, PENDING)
        self._msix = Msix(wiring, sink, space, at, own)
        self._bars = Bars(space)
        self._kicks = Kicks(name, self.transport, device.deferred, device.remote)
        with undo_on_error(self._kicks.close, self._kicks.stop):
            doorbells = self._kicks.doorbells(NOTIFY, NOTIFY_STEP)
            self._bar = Bar(name, self._registers, 0, wiring, self._msix.traps(0), doorbells, PAGES, COLLECTED)
            self._bars.add(pciregs.BAR0, self._bar)

    def _add_header(self, device: VirtioDevice) -> None:
        space = self._space
        identity = VENDOR.to_bytes(2, "little") + (DEVICE_BASE + device.device_type).to_bytes(2, "little")
        space.emulate(0, identity)
        writable = pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER
        space.emulate(pciregs.COMMAND, bytes(2), writable.to_bytes(2, "little"))
        space.emulate(pciregs.STATUS, pciregs.STATUS_CAPABILITIES.to_bytes(2, "little"))
        space.emulate(pciregs.REVISION, b"\1" + device.class_code.to_bytes(3, "little"))
        subsystem = VENDOR.to_bytes(2, "little") + SUBSYSTEM.to_bytes(2, "little")
        space.emulate(pciregs.SUBSYSTEM, subsystem)
        space.emulate(pciregs.INTERRUPT_LINE, b"\0", b"\xff")
        space.emulate(pciregs.CAPABILITIES, bytes([_FIRST_AT]))

    def _add_capabilities(self, device: VirtioDevice) -> int:
        """Add the vendor's capabilities (section 4.1.4); return where the last one is."""
        notify_size = NOTIFY_STEP * len(device.queue_sizes)
        places = (
            (CAP_COMMON, COMMON, COMMON_SIZE, b""),
            (CAP_ISR, ISR, 1, b""),
            (CAP_NOTIFY, NOTIFY, notify_size, NOTIFY_STEP.to_bytes(4, "little")),
            (CAP_DEVICE, CONFIG, len(device.config), b""),
            (CAP_PCI, 0, 0, bytes(4)),
        )
        at = _FIRST_AT
        for kind, offset, length, own in places:
            size = _CAP_SIZE + len(own)
            following = at + size if kind != CAP_PCI else 0
            head = bytes([pciregs.CAP_VENDOR, following, size, kind, 0, 0, 0, 0])
            place = offset.to_bytes(4, "little") + length.to_bytes(4, "little")
            self._space.emulate(at, head + place + own)
            at = following or at
        # The window: bar, offset and length, and the data, are the guest's.
        self._space.emulate(at + _WINDOW_BAR, b"\0", b"\xff")
        self._space.emulate(at + _WINDOW_OFFSET, bytes(12), b"\xff" * 12)
        return at

    def _is_master(self) -> bool:
        return bool(self._space.get(pciregs.COMMAND, 2) & pciregs.COMMAND_MASTER)

    def config_read(self, offset: int, size: int) -> bytes:
        """See ``PciFunction``."""
        if offset & ~3 == self._window_at + _WINDOW_DATA and (place := self._window()):
            self._space.set(self._window_at + _WINDOW_DATA, int.from_bytes(self._bar.read(*place), "little"), 4)
        return self._space.read(offset, size)

    def config_image(self) -> bytes | None:
        """See ``PciFunction``."""
        return None if self._window() else self._space.image()

    def config_write(self, offset: int, data: bytes) -> None:
        """See ``PciFunction``."""
        with log_errors(log, "%s: %s", self._bar.name):
            if self._bars.write(offset, data):
                return
            self._space.write(offset, data)
            if offset & ~3 == self._window_at + _WINDOW_DATA and (place := self._window()):
                value = self._space.get(self._window_at + _WINDOW_DATA, 4)
                self._bar.write(place[0], (value & (1 << 8 * place[1]) - 1).to_bytes(place[1], "little"))
            self._bars.decode(self._space.get(pciregs.COMMAND, 2))
            self._msix.update()
        if offset & ~3 == pciregs.COMMAND:
            self.transport.access_changed()

    def _window(self) -> tuple[int, int] | None:
        """Return offset and length of an access through configuration space (section 4.1.4.9); None if invalid."""
        at = self._window_at
        bar, offset, length = (self._space.get(at + field, size) for field, size in ((4, 1), (8, 4), (12, 4)))
        valid = bar == 0 and length in (1, 2, 4) and offset % length == 0 and offset + length <= BAR_SIZE
        return (offset, length) if valid else None

    def set_multifunction(self, several: bool) -> None:
        """See ``PciFunction``."""
        self._space.set(pciregs.HEADER_TYPE, pciregs.MULTIFUNCTION if several else 0, 1)

    def quiesce(self) -> None:
        """End the thread and the device: it accesses no memory after this, whatever the guest writes. Idempotent.

        Synchronization: from any thread, without the bus lock if possible: a daemon may take its time.
        """
        if not self._quiesced:
            run_all(self._kicks.stop, self.transport.end, self.transport.device.close)
            self._quiesced = True

    def close(self) -> None:
        """See ``PciFunction``."""
        # KVM takes a doorbell back by its eventfd.
        run_all(self.quiesce, self._msix.disable, self._bars.close, self._kicks.close)
