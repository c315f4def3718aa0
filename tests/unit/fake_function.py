"""An assigned function over a device and a KVM that are made up here and hold their callers to the kernel's rules."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from kvmpass.bus import Bus
from kvmpass.kvm.routing import IOAPIC_PINS
from kvmpass.layout import MIB, PAGE, Range, plan_layout
from kvmpass.memory import GuestMemory, HostMapping, RegionKind
from kvmpass.pci import CONFIG_ADDRESS, CONFIG_PORTS, AssignedFunction, BarSpace, ConfigPorts, Ecam, PciBus, Wiring
from kvmpass.vfio.device import CONFIG, INTX, MSI, MSIX, ROM, IrqInfo, RegionInfo

TABLE_AT, PENDING_AT, VECTORS = 0x2000, 0x2800, 5
MSI_VECTORS = 4
MSIX_AT, EXPRESS_AT, MSI_AT, PM_AT, HIDDEN_AT = 0x40, 0x60, 0xA0, 0xC0, 0xD0
GSIS = (16, 17, 18, 19)


class FakeRegion:
    """A region as bytes."""

    def __init__(self, info: RegionInfo, data: bytearray) -> None:
        self.info = info
        self.data = data
        self.accesses: list[tuple[str, int, int]] = []

    @property
    def size(self) -> int:
        return self.info.size

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and offset + size <= self.size
        self.accesses.append(("read", offset, size))
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= self.size
        self.accesses.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def mmap(self, area: Range) -> HostMapping:
        return HostMapping(area.size)


class FakeDevice:
    """BAR0: 64-bit, 16 KiB, with the MSI-X table in its third page; BAR2: I/O; BAR4: 32-bit, 256 bytes; a ROM.

    INTA, MSI with four maskable vectors, MSI-X with five. As with VFIO one kind of interrupt is on at a time.
    """

    def __init__(self) -> None:
        self.name = "0000:00:00.0"
        config = bytearray(4096)
        config[0:4] = bytes.fromhex("34128765")
        config[0x06] = 0x10
        config[0x0E] = 0x80
        config[0x10:0x14] = (0x4).to_bytes(4, "little")
        config[0x18:0x1C] = (0x1).to_bytes(4, "little")
        config[0x34] = MSI_AT
        config[0x3D] = 1
        chain = (
            (MSI_AT, 0x05, MSIX_AT),
            (MSIX_AT, 0x11, HIDDEN_AT),
            (HIDDEN_AT, 0x14, PM_AT),
            (PM_AT, 0x01, EXPRESS_AT),
            (EXPRESS_AT, 0x10, 0),
        )
        for at, id_, following in chain:
            config[at : at + 2] = bytes([id_, following])
        config[MSI_AT + 2 : MSI_AT + 4] = (1 << 8 | 1 << 7 | 2 << 1).to_bytes(2, "little")
        config[MSIX_AT + 2 : MSIX_AT + 4] = (VECTORS - 1).to_bytes(2, "little")
        config[MSIX_AT + 4 : MSIX_AT + 8] = TABLE_AT.to_bytes(4, "little")
        config[MSIX_AT + 8 : MSIX_AT + 12] = PENDING_AT.to_bytes(4, "little")
        config[EXPRESS_AT + 2 : EXPRESS_AT + 4] = (0x0002).to_bytes(2, "little")
        config[EXPRESS_AT + 0x0C : EXPRESS_AT + 0x14] = b"\xff" * 8
        config[HIDDEN_AT + 4 : HIDDEN_AT + 8] = b"\xee" * 4
        # SR-IOV first, a serial number, ATS, a vendor's own.
        for at, id_, following in (
            (0x100, 0x10, 0x140),
            (0x140, 0x03, 0x150),
            (0x150, 0x0F, 0x160),
            (0x160, 0x0B, 0),
        ):
            config[at : at + 4] = (id_ | 1 << 16 | following << 20).to_bytes(4, "little")
        self.regions = {
            0: self._region(0, 4 * PAGE, mmap=True),
            2: self._region(2, 32),
            4: self._region(4, 256),
            ROM: self._region(ROM, 2 * PAGE),
            CONFIG: FakeRegion(RegionInfo(CONFIG, 4096, 0, True, True, (), False), config),
        }
        self.regions[ROM].data[:4] = b"\x55\xaa\x04\x00"
        self.irqs = {
            INTX: IrqInfo(INTX, 1, True, True, True, False),
            MSI: IrqInfo(MSI, MSI_VECTORS, True, False, False, True),
            MSIX: IrqInfo(MSIX, VECTORS, True, False, False, True),
        }
        self.refusing: Callable[[], bool] = lambda: False
        self.active: int | None = None
        self.irq_calls: list[tuple[Any, ...]] = []
        self.signals: dict[int, int] = {}

    def _region(self, index: int, size: int, mmap: bool = False) -> FakeRegion:
        areas = (Range(0, size),) if mmap else ()
        return FakeRegion(RegionInfo(index, size, 0, True, True, areas, True), bytearray(size))

    @property
    def config(self) -> FakeRegion:
        return self.regions[CONFIG]

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        self.refuse()
        if self.active not in (None, index):
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: another kind is on")
        assert start >= 0 and start + len(eventfds) <= self.irqs[index].count
        for vector, fd in enumerate(eventfds, start):
            assert fd == -1 or os.fstat(fd)
            self.signals[vector] = fd
        self.active = index
        if index != INTX:
            self.irq_calls.append(("set", start, len(eventfds)))

    def set_unmask_eventfd(self, index: int, eventfd: int) -> None:
        self.refuse()
        assert index == INTX == self.active
        assert os.fstat(eventfd)

    def disable_irqs(self, index: int) -> None:
        if self.active != index:
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: not on")
        self.active = None
        self.signals.clear()
        if index != INTX:
            self.irq_calls.append(("disable",))

    def refuse(self) -> None:
        """Fails while ``refusing`` says so: a test's own choice."""
        if self.refusing():
            raise OSError(errno.EIO, "VFIO refuses")

    def interrupt(self, vector: int) -> None:
        """As the device raises it."""
        os.eventfd_write(self.signals[vector], 1)


class FakeKvm:
    """irqfds and routes, with KVM's rules."""

    def __init__(self) -> None:
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqfds: dict[int, int] = {}
        self.pins: dict[int, int] = {}  # a line can have several

    def add(self, address: int, data: int) -> int:
        assert address >> 20 == 0xFEE
        gsi = next(n for n in range(IOAPIC_PINS, 4096) if n not in self.routes)
        self.routes[gsi] = (address, data)
        return gsi

    def remove(self, gsi: int) -> None:
        assert gsi not in self.irqfds, "the route goes after the irqfd"
        del self.routes[gsi]

    def irqfd(self, eventfd: int, gsi: int) -> None:
        assert gsi in self.routes, "the route comes before the irqfd"
        assert gsi not in self.irqfds
        assert os.fstat(eventfd)
        self.irqfds[gsi] = eventfd

    def irqfd_resample(self, eventfd: int, gsi: int, resamplefd: int) -> None:
        assert gsi in GSIS
        assert os.fstat(eventfd) and os.fstat(resamplefd)
        self.pins[eventfd] = gsi

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        if gsi in GSIS:
            assert self.pins.pop(eventfd) == gsi
        else:
            assert self.irqfds.pop(gsi) == eventfd


class Board:
    """A bus with one function, and what it is wired to."""

    SLOT = 1

    def __init__(self, device: FakeDevice | None = None) -> None:
        self.layout = plan_layout(MIB)
        self.memory = GuestMemory()
        self.ports, self.mmio, self.pci = Bus("port"), Bus("memory"), PciBus()
        self.ports.add(CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts(self.pci))
        self.mmio.add(self.layout.ecam.start, self.layout.ecam.size, Ecam(self.pci))
        self.space = BarSpace(self.layout)
        self.device, self.kvm = device or FakeDevice(), FakeKvm()
        self.function = self.make()
        self.slot = self.SLOT
        self.pci.plug(self.function, self.slot)

    def make(self, device: FakeDevice | None = None) -> AssignedFunction:
        """A function of this board, not yet on its bus."""
        wiring = Wiring(self.kvm, self.kvm, self.memory, self.ports, self.mmio, self.space, GSIS)  # type: ignore[arg-type]
        return AssignedFunction(device or self.device, wiring)  # type: ignore[arg-type]

    def make_at(self, slot: int, device: FakeDevice, number: int = 0) -> AssignedFunction:
        """Another function on the bus; the caller takes it out again."""
        function = self.make(device)
        self.pci.plug(function, slot, number)
        return function

    def config_read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.pci.read(0, self.slot << 3, offset, size), "little")

    def config_write(self, offset: int, value: int, size: int = 4) -> None:
        self.pci.write(0, self.slot << 3, offset, value.to_bytes(size, "little"))

    def bars(self) -> list[Range]:
        return [region.range for region in self.memory if region.kind is RegionKind.BAR]

    def close(self) -> None:
        """Nothing may be left."""
        self.pci.unplug(self.function)
        self.function.close()
        assert self.bars() == []
        assert self.kvm.routes == {} == self.kvm.irqfds == self.kvm.pins
        assert self.device.active is None
        self.memory.close()
