"""An assigned function over a device and a KVM that are made up here and hold their callers to the kernel's rules."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from kvmpass import ports
from kvmpass.bus import Bus
from kvmpass.kvm import Fastpath
from kvmpass.layout import MIB, PAGE, Range, plan_layout
from kvmpass.memory import GuestMemory, HostMapping, RegionKind
from kvmpass.pci import AssignedFunction, BarSpace, ConfigPorts, Ecam, PciBus, Wiring
from kvmpass.pciregs import COMMAND, COMMAND_MEMORY
from kvmpass.ports import IOAPIC_PINS
from kvmpass.vfio.device import CONFIG, INTX, MSI, MSIX, ROM, RegionInfo, RegionMapping
from support.fake_interrupts import FakeIrqs

TABLE_AT, PENDING_AT, VECTORS = 0x2000, 0x2800, 5
MSI_VECTORS = 4
MSIX_AT, EXPRESS_AT, MSI_AT, PM_AT, HIDDEN_AT = 0x40, 0x60, 0xA0, 0xC0, 0xD0
GSIS = (16, 17, 18, 19)


class FakeRegion:
    """A region as bytes. Like VFIO's it refuses what is outside of it, and memory that is not enabled (EIO)."""

    def __init__(self, info: RegionInfo, data: bytearray, enabled: Callable[[], bool] = lambda: True) -> None:
        self.info = info
        self.data = data
        self.accesses: list[tuple[str, int, int]] = []
        self._enabled = enabled
        self.refusing: Callable[[], bool] = lambda: False
        self.device: FakeDevice | None = None

    @property
    def size(self) -> int:
        return self.info.size

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        return self.info.mmap_areas

    def _access(self, kind: str, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.size:
            raise IndexError(f"{offset:#x}+{size:#x}")
        if not self._enabled() or self.refusing():
            raise OSError(errno.EIO, "VFIO refuses")
        self.accesses.append((kind, offset, size))
        del self.accesses[:-100]

    def read(self, offset: int, size: int) -> bytes:
        self._access("read", offset, size)
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self._access("write", offset, len(data))
        self.data[offset : offset + len(data)] = data

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.read(offset, size), "little")

    def mmap(self, area: Range) -> HostMapping:
        return FakeMapping(self.device, self.info.index, area)


class FakeMapping(RegionMapping):
    """Part of a BAR in this process, as memory of its own."""

    def __init__(self, device: Any, index: int, area: Range) -> None:
        HostMapping.__init__(self, area.size)
        self.device = device
        self.index = index
        self.area = area


class FakeConfig(FakeRegion):
    """Configuration space with VFIO's two command registers (drivers/vfio/pci/vfio_pci_config.c).

    ``virtual`` is what was written last: by it VFIO lets accesses of the device's memory pass. What reads back is the
    device's. A device without No_Soft_Reset loses it on the way from D3hot to D0, and the kernel brings back what it
    saved on the way down: not what was written meanwhile. ``before_silence`` is called before the device stops to
    respond at its BARs: a mapping of one for DMA would lead nowhere, and iommufd revokes it.
    """

    def __init__(self, info: RegionInfo, data: bytearray, power_at: int = 0, soft_reset: bool = True) -> None:
        super().__init__(info, data)
        self.before_silence: Callable[[], None] = lambda: None
        self.resets = 0
        self._power_at = power_at
        self._soft_reset = soft_reset
        self._saved = b""
        self.power = 0
        self.gone = False
        self.lying = False  # it says that it is in D0, whatever it was told
        self.virtual = int.from_bytes(data[COMMAND : COMMAND + 2], "little")

    @property
    def memory_enabled(self) -> bool:
        """``__vfio_pci_memory_enabled``."""
        return self.power < 3 and bool(self.virtual & COMMAND_MEMORY)

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(super().read(offset, size))
        if self.lying and offset <= self._power_at + 4 < offset + size:
            data[self._power_at + 4 - offset] &= ~3
        return b"\xff" * size if self.gone else bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self._access("write", offset, len(data))
        if self._silences(offset, data):
            self.before_silence()
        for at, byte in enumerate(data, offset):
            if self._power_at and at == EXPRESS_AT + 9:
                self.resets += byte >> 7
                byte &= 0x7F
            if COMMAND <= at < COMMAND + 2:
                shift = 8 * (at - COMMAND)
                self.virtual = self.virtual & ~(0xFF << shift) | byte << shift
            if self._power_at and at == self._power_at + 4:
                self.set_power(byte & 3)
                byte = byte & ~3 | self.power
            if not self.gone:
                self.data[at] = byte

    def _silences(self, offset: int, data: bytes) -> bool:
        """Whether the write turns memory decoding off, changes the power state, or resets (vfio_exp_config_write)."""
        bits = dict(enumerate(data, offset))
        off = COMMAND in bits and not bits[COMMAND] & COMMAND_MEMORY
        power = self._power_at and bits.get(self._power_at + 4, self.power) & 3
        return bool(off or power or (self._power_at and bits.get(EXPRESS_AT + 9, 0) & 0x80))

    def set_power(self, state: int) -> None:
        """``vfio_pci_set_power_state``; D1 and D2 are not supported."""
        if state in (1, 2) or state == self.power:
            return
        if state == 3:
            self._saved = bytes(self.data[COMMAND : COMMAND + 2])
        elif self._soft_reset:
            self.data[COMMAND : COMMAND + 2] = self._saved
        self.power = state
        self.data[self._power_at + 4] = self.data[self._power_at + 4] & ~3 | state

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: to D0 first, and the kernel saves and restores the rest."""
        self.before_silence()
        self.resets += 1
        self.set_power(0)


class FakeDevice:
    """BAR0: 64-bit, 16 KiB, with the MSI-X table in its third page; BAR2: I/O; BAR4: 32-bit, 256 bytes; a ROM.

    INTA, MSI with four maskable vectors, MSI-X with five. As with VFIO one kind of interrupt is on at a time.
    ``space``: another configuration space; its capabilities' places are then unknown here.
    """

    def __init__(self, space: bytes | None = None) -> None:
        self.name = "0000:00:00.0"
        self.fd = -1  # its file; what reads that reads ones
        self.refusing: Callable[[], bool] = lambda: False
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
        info = RegionInfo(CONFIG, len(space or config), 0, True, True, ())
        whole = FakeConfig(info, bytearray(space or config), 0 if space else PM_AT)
        self._memory_enabled = lambda: whole.memory_enabled
        self.regions: dict[int, FakeRegion] = {
            0: self._region(0, 4 * PAGE, mmap=True),
            2: self._region(2, 32, memory=False),
            4: self._region(4, 256),
            ROM: self._region(ROM, 2 * PAGE),
            CONFIG: whole,
        }
        self.regions[ROM].data[:4] = b"\x55\xaa\x04\x00"
        for region in self.regions.values():
            region.device = self
        self.irqs = {
            INTX: FakeIrqs(self, INTX, 1, False),
            MSI: FakeIrqs(self, MSI, MSI_VECTORS, True),
            MSIX: FakeIrqs(self, MSIX, VECTORS, True),
        }
        self.active: int | None = None
        self.irq_calls: list[tuple[Any, ...]] = []
        self.signals: dict[int, int] = {}

    def _region(self, index: int, size: int, mmap: bool = False, memory: bool = True) -> FakeRegion:
        areas = (Range(0, size),) if mmap else ()
        enabled = self._memory_enabled if memory else lambda: True
        return FakeRegion(RegionInfo(index, size, 0, True, True, areas), bytearray(size), enabled)

    @property
    def config(self) -> FakeConfig:
        config = self.regions[CONFIG]
        assert isinstance(config, FakeConfig)
        return config

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        self.refuse()
        if self.active not in (None, index):
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: another kind is on")
        if start + len(eventfds) > self.irqs[index].count:
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: no such vector")
        if self.active == MSIX and not self.irqs[MSIX].resizable and start + len(eventfds) > len(self.signals):
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: before Linux 6.5 no vector is added")
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
        """Harmless where it is off, like ``Device.disable_irqs``."""
        self.refuse()
        if self.active != index:
            return
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
    """irqfds and routes, with KVM's rules. What KVM refuses it has not done."""

    closed = False

    def __init__(self) -> None:
        self.refusing: Callable[[], bool] = lambda: False
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqfds: dict[int, int] = {}
        self.pins: dict[int, int] = {}  # a line can have several

    def refuse(self) -> None:
        """Fails while ``refusing`` says so: a test's own choice."""
        if self.refusing():
            raise OSError(errno.ENOMEM, "KVM refuses")

    def add(self, address: int, data: int) -> int:
        self.refuse()
        assert address >> 20 == 0xFEE
        gsi = next(n for n in range(IOAPIC_PINS, 4096) if n not in self.routes)
        self.routes[gsi] = (address, data)
        return gsi

    def remove(self, gsi: int) -> None:
        self.refuse()
        assert gsi not in self.irqfds, "the route goes after the irqfd"
        del self.routes[gsi]

    def coalesce_writes(self, address: int, size: int) -> None:
        self.refuse()

    def stop_coalescing(self, address: int, size: int) -> None:
        self.refuse()

    def irqfd(self, eventfd: int, gsi: int) -> None:
        self.refuse()
        assert gsi in self.routes, "the route comes before the irqfd"
        assert gsi not in self.irqfds
        assert os.fstat(eventfd)
        self.irqfds[gsi] = eventfd

    def irqfd_resample(self, eventfd: int, gsi: int, resamplefd: int) -> None:
        self.refuse()
        assert gsi in GSIS
        assert os.fstat(eventfd) and os.fstat(resamplefd)
        self.pins[eventfd] = gsi

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        self.refuse()
        assert os.fstat(eventfd)
        if gsi in GSIS:
            assert self.pins.pop(eventfd) == gsi
        else:
            assert self.irqfds.pop(gsi) == eventfd


class Board:
    """A bus with one function, and what it is wired to."""

    SLOT = 1

    def __init__(self, device: FakeDevice | None = None, *, p2p: bool = False) -> None:
        self.p2p = p2p
        self.layout = plan_layout(MIB)
        self.memory = GuestMemory()
        self.fastpath = Fastpath()
        self.ports, self.mmio, self.pci = Bus("port"), Bus("memory"), PciBus()
        self.ports.add(ports.PCI_CONFIG_BASE, ports.PCI_CONFIG_SIZE, ConfigPorts(self.pci))
        self.mmio.add(self.layout.ecam.start, self.layout.ecam.size, Ecam(self.pci))
        self.space = BarSpace(self.layout)
        self.device, self.kvm = device or FakeDevice(), FakeKvm()
        self.function = self.make()
        self.slot = self.SLOT
        self.pci.plug(self.function, self.slot)

    def make(self, device: FakeDevice | None = None) -> AssignedFunction:
        """A function of this board, not yet on its bus."""
        kvm: Any = self.kvm
        wiring = Wiring(kvm, kvm, self.memory, self.ports, self.mmio, self.space, GSIS, fastpath=self.fastpath)
        return AssignedFunction(device or self.device, wiring, p2p=self.p2p)  # type: ignore[arg-type]

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
        assert self.fastpath._registers == {}
        self.memory.close()
