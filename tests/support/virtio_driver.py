"""A driver of a virtio function, as Linux's is: over configuration space, a BAR, and rings in the guest's memory."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from kvmpass import pciregs
from kvmpass.bus import Bus
from kvmpass.layout import MIB, plan_layout
from kvmpass.memory import Backing, GuestMemory
from kvmpass.pci import BarSpace, PciBus, Wiring
from kvmpass.virtio import Port, VirtioConsole, VirtioFunction
from kvmpass.virtio.device import VERSION_1, VirtioDevice
from kvmpass.virtio.function import CAP_COMMON, CAP_DEVICE, CAP_ISR, CAP_NOTIFY, CAP_PCI, TABLE
from kvmpass.virtio.transport import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from support.fake_interrupts import FakeKvm

SLOT = 31
NEXT, WRITE, INDIRECT = 1, 2, 4
MESSAGES = tuple((0xFEE0_1000, 0x41 + vector) for vector in range(5))  # of the vectors
RINGS, BUFFERS = 0x10000, 0x40000  # where the driver has them


class Ring:
    """The driver's side of one queue: a buffer for each descriptor, at a place of its own."""

    def __init__(self, memory: GuestMemory, number: int, size: int) -> None:
        self._memory = memory
        self.size = size
        self.table = RINGS + 0x1000 * number
        self.available, self.used = self.table + 0x400, self.table + 0x800
        self.buffers = BUFFERS + 0x20000 * number
        self.added = self.seen = 0
        memory.write(self.table, bytes(0x1000))

    def describe(self, at: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self._memory.write(self.table + 16 * at, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head: int) -> None:
        """Add a chain, without a notification."""
        self._memory.write(self.available + 4 + 2 * (self.added % self.size), struct.pack("<H", head))
        self.added = (self.added + 1) & 0xFFFF
        self._memory.write(self.available + 2, struct.pack("<H", self.added))

    def send(self, data: bytes) -> None:
        """Add one buffer that the device reads."""
        at = self.added % self.size
        place = self.buffers + 0x800 * at
        self._memory.write(place, data)
        self.describe(at, place, len(data))
        self.offer(at)

    def receive(self, size: int = 0x800) -> None:
        """Add one buffer that the device writes."""
        at = self.added % self.size
        self.describe(at, self.buffers + 0x800 * at, size, WRITE)
        self.offer(at)

    def returned(self) -> list[tuple[int, bytes]]:
        """Chains that the device has returned since the last call: its head, and what was written into it."""
        index = struct.unpack("<H", self._memory.read(self.used + 2, 2))[0]
        found = []
        while self.seen != index:
            at = self.used + 4 + 8 * (self.seen % self.size)
            head, written = struct.unpack("<II", self._memory.read(at, 8))
            address = struct.unpack("<Q", self._memory.read(self.table + 16 * head, 8))[0]
            found.append((head, self._memory.read(address, written)))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    @property
    def wants_notifications(self) -> bool:
        return not struct.unpack("<H", self._memory.read(self.used, 2))[0] & 1


class Driver:
    """A guest with a console whose ports are ``names``; what the guest writes to them is in ``said``."""

    def __init__(
        self,
        names: Sequence[str] = ("one", "two"),
        *,
        doorbells: bool = False,
        backing: Backing = Backing.ANONYMOUS,
    ) -> None:
        self.kvm, self.memory = FakeKvm(), GuestMemory()
        self.kvm.refusing = set() if doorbells else {"ioeventfd"}
        self.ports, self.mmio, self.pci = Bus("port"), Bus("memory"), PciBus()
        self.memory.add_ram(0, 4 * MIB, "ram", backing=backing)
        self.memory.add_rom(8 * MIB, b"rom")
        self._bars = BarSpace(plan_layout(16 * MIB))
        self.said: dict[str, bytearray] = {name: bytearray() for name in names}
        self.host: dict[str, Port] = {name: Port(name, self.said[name].extend) for name in names}
        self.make()

    def make(self) -> None:
        """Plug the function, as a machine and its reset do."""
        self.console = VirtioConsole(list(self.host.values()))
        self.plug(self.console)

    def plug(self, device: VirtioDevice) -> None:
        """Plug a function with ``device``."""
        vm: Any = self.kvm
        wiring = Wiring(vm, vm, self.memory, self.ports, self.mmio, self._bars, ())
        self.function = VirtioFunction(device, wiring, "console")
        self.pci.plug(self.function, SLOT)
        self.bar = self.config(pciregs.BAR0) & ~0xF
        self.rings: list[Ring] = []

    def close(self) -> None:
        self.pci.unplug(self.function)
        self.function.close()
        self.function.close()
        assert (self.kvm.routes, self.kvm.irqfds, self.kvm.ioeventfds, self.mmio._ranges) == ({}, {}, {}, [])
        assert not self.kvm.coalescing

    # --- PCI

    def config(self, offset: int, size: int = 4, value: int | None = None) -> int:
        if value is not None:
            self.pci.write(0, SLOT << 3, offset, value.to_bytes(size, "little"))
        return int.from_bytes(self.pci.read(0, SLOT << 3, offset, size), "little")

    def find(self, kind: int) -> int:
        """Where the vendor's capability of a kind is."""
        found = pciregs.capabilities(lambda offset, size: self.config(offset, size))
        return next(c.offset for c in found if c.id == pciregs.CAP_VENDOR and self.config(c.offset + 3, 1) == kind)

    def place(self, kind: int) -> int:
        """The guest-physical address of a structure."""
        return self.bar + self.config(self.find(kind) + 8)

    def enable(self, command: int = pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER) -> None:
        """As pci_enable_device, pci_set_master and pci_alloc_irq_vectors do."""
        self.config(pciregs.COMMAND, 2, command)
        found = pciregs.capabilities(lambda offset, size: self.config(offset, size))
        at = next(c.offset for c in found if c.id == pciregs.CAP_MSIX)
        self.config(at + 2, 2, pciregs.MSIX_ENABLE)
        vectors = self.config(at + 2, 2) & 0x7FF
        for vector, (address, data) in enumerate(MESSAGES[: vectors + 1]):
            entry = self.bar + TABLE + 16 * vector
            for offset, value in ((0, address), (8, data), (12, 0)):
                self.mmio.write(entry + offset, value.to_bytes(4, "little"))
        self.common, self.notifications = self.place(CAP_COMMON), self.place(CAP_NOTIFY)
        self.isr, self.device, self.window = self.place(CAP_ISR), self.place(CAP_DEVICE), self.find(CAP_PCI)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.mmio.read(self.common + offset, size), "little")

    def write(self, offset: int, value: int, size: int) -> None:
        self.mmio.write(self.common + offset, value.to_bytes(size, "little"))

    # --- the device

    @property
    def status(self) -> int:
        return self.read(20, 1)

    @property
    def features(self) -> int:
        found = 0
        for half in range(2):
            self.write(0, half, 4)
            found |= self.read(4, 4) << 32 * half
        return found

    def negotiate(self, features: int | None = None) -> bool:
        """Accept all features, or these; return whether the device does."""
        self.write(20, 0, 1)
        self.write(20, ACKNOWLEDGE, 1)
        self.write(20, ACKNOWLEDGE | DRIVER, 1)
        accepted = self.features if features is None else features
        for half in range(2):
            self.write(8, half, 4)
            self.write(12, accepted >> 32 * half & 0xFFFF_FFFF, 4)
        self.write(20, ACKNOWLEDGE | DRIVER | FEATURES_OK, 1)
        return bool(self.status & FEATURES_OK)

    def add_queue(self, number: int, *, enable: bool = True, vector: int = 1) -> Ring:
        self.write(22, number, 2)
        ring = Ring(self.memory, number, self.read(24, 2))
        self.write(26, vector, 2)
        for offset, address in ((32, ring.table), (40, ring.available), (48, ring.used)):
            self.write(offset, address & 0xFFFF_FFFF, 4)
            self.write(offset + 4, address >> 32, 4)
        if enable:
            self.write(28, 1, 2)
        return ring

    def ready(self) -> None:
        self.write(20, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, 1)

    def start(self, features: int | None = None, *, vectors: Sequence[int] = ()) -> None:
        """All that a driver does until it is ready, with empty rings. ``vectors``: of the queues, instead of 1."""
        self.enable()
        assert self.negotiate(features)
        self.write(16, 0, 2)
        numbers = range(self.read(18, 2))
        self.rings = [self.add_queue(n, vector=vectors[n] if vectors else 1) for n in numbers]
        self.ready()

    def notify(self, number: int) -> None:
        """As a guest does: KVM takes it where it has a doorbell. Returns when the device has served it."""
        place = self.notifications + 4 * number
        if (eventfd := self.kvm.ioeventfds.get((place, 2))) is None:
            self.mmio.write(place, number.to_bytes(2, "little"))
        else:
            os.eventfd_write(eventfd, 1)
            while select.select([eventfd], [], [], 0)[0]:  # else it may come after the function
                time.sleep(0.001)
            done = threading.Event()
            self.function._kicks._loop.call(done.set)
            assert done.wait(20)

    def interrupts(self) -> list[int]:
        """The data of the interrupts since the last call."""
        self.kvm.pump()
        found = [data for _, data in self.kvm.delivered]
        self.kvm.delivered.clear()
        return found

    # --- the console's control messages

    def tell(self, port: int, event: int, value: int) -> None:
        self.rings[3].send(struct.pack("<IHH", port, event, value))
        self.notify(3)

    def told(self) -> list[tuple[int, int, int, bytes]]:
        return [(*struct.unpack_from("<IHH", data), data[8:]) for _, data in self.rings[2].returned()]

    def open_ports(self) -> None:
        """As virtio_console's probe does, and programs that open all ports."""
        for _ in range(self.rings[2].size):
            self.rings[2].receive()
        self.notify(2)
        self.tell(0, 0, 1)
        for port, event, _, _ in self.told():
            assert event == 1
            self.tell(port, 3, 1)
            self.tell(port, 6, 1)


BASIC = VERSION_1
