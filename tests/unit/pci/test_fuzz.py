"""What a hostile guest may do to its PCI devices: random accesses without end, with every rule checked as they go.

Random, seeded, and aimed: nine accesses of ten go where something happens. In between the device is reset, sleeps, is
gone, comes back, lies; in most of the runs KVM and VFIO refuse now and then. ``KVMPASS_SOAK=1`` makes ten million.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time

import pytest
from support.fake_function import (
    EXPRESS_AT,
    MSI_AT,
    MSIX_AT,
    PENDING_AT,
    PM_AT,
    TABLE_AT,
    VECTORS,
    Board,
    FakeDevice,
    FakeRegion,
)
from support.strict_iommu import StrictIommu

from kvmpass import ports
from kvmpass.bus import Bus
from kvmpass.dma import Domain, Mapper
from kvmpass.kvm import Memslots
from kvmpass.layout import GIB, PAGE, Range
from kvmpass.memory import RegionKind
from kvmpass.pci import AssignedFunction
from kvmpass.pci.barspace import IO_WINDOW
from kvmpass.pci.vector import MessageVector
from kvmpass.vfio.device import INTX, RegionInfo

SOAK = os.environ.get("KVMPASS_SOAK") == "1"
ACCESSES = 10_000_000 if SOAK else 150_000
SEEDS = range(4)

REGISTERS = (0x04, 0x06, 0x0C, *range(0x10, 0x28, 4), 0x30, 0x34, 0x3C, MSI_AT, MSI_AT + 2, MSI_AT + 4, MSI_AT + 8)
REGISTERS += (MSI_AT + 12, MSI_AT + 16, MSI_AT + 20, MSIX_AT, MSIX_AT + 2, MSIX_AT + 3, MSIX_AT + 4, PM_AT + 4)
REGISTERS += (0x100, 0x140, 0xFFC, EXPRESS_AT + 8)


def vectors_of(function: AssignedFunction) -> list[MessageVector]:
    return [*(function._msix._vectors if function._msix else ()), *(function._msi._vectors if function._msi else ())]


class StrictVm:
    """KVM's rules for memory slots, and ours for a guest's BARs. What KVM refuses it has not done."""

    closed = False

    def __init__(self, board: Board) -> None:
        self.slots: dict[int, Range] = {}
        self._kvm = board.kvm
        self._windows = (board.layout.mmio32, board.layout.mmio64)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        self._kvm.refuse()
        if size == 0:
            if slot not in self.slots:
                raise OSError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION: no such slot")
            del self.slots[slot]
            return
        here = Range(gpa, size)
        assert slot not in self.slots
        assert gpa % PAGE == size % PAGE == hva % PAGE == 0
        assert any(window.contains(here) for window in self._windows), f"a memslot at {here}"
        assert not any(other.overlaps(here) for other in self.slots.values()), f"two memslots at {here}"
        self.slots[slot] = here


class Large(FakeDevice):
    """With a BAR of 8 GiB, one of a page, and two I/O BARs of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.config.data[0x20:0x24] = (0xC).to_bytes(4, "little")
        info = RegionInfo(4, 8 * GIB, 0, True, True, (Range(0, 8 * GIB),))
        self.regions[4] = _LargeRegion(info, bytearray(), self._memory_enabled)
        self.regions[4].device = self


class _LargeRegion(FakeRegion):
    """Reads as zeroes; nothing is allocated behind it."""

    def read(self, offset: int, size: int) -> bytes:
        self._access("read", offset, size)
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        self._access("write", offset, len(data))


class Guest:
    """Three functions: slot 1 with two of them, slot 2 with one. Every choice comes from one random generator.

    ``refusals``: one call of KVM or VFIO in so many fails; 0 for none. ``p2p``: each reaches the others' BARs.
    """

    def __init__(self, seed: int, refusals: int = 0, *, p2p: bool = False) -> None:
        self.random = random.Random(seed)
        self.board = Board(Large(), p2p=p2p)
        self.vm = StrictVm(self.board)
        self.memslots = Memslots(self.vm)  # type: ignore[arg-type]
        self.board.memory.listen(self.memslots)
        self.devices = [self.board.device, FakeDevice(), FakeDevice()]
        for number, device in enumerate(self.devices):
            device.name = f"0000:0{number}:00.0"
        self.domain = Domain(self.board.memory, self.make_iommu, p2p=p2p)
        for number, device in enumerate(self.devices):
            self.domain.attach(device.name, number)
        self.others = [self.board.make_at(1, self.devices[1], 5), self.board.make_at(2, self.devices[2])]
        self.functions: list[AssignedFunction] = [self.board.function, *self.others]
        self.places = (1 << 3, 1 << 3 | 5, 2 << 3)
        if refusals:
            self.set_refusing(refusals)
        layout = self.board.layout
        self.homes = [layout.mmio64.start, layout.mmio64.start + 8 * GIB, layout.mmio32.start, layout.mmio32.end]
        self.homes += [layout.mmio64.end - 4 * PAGE, 0, layout.ecam.start, 0xFEE0_0000, 0xFEC0_0000, IO_WINDOW.start]

    def make_iommu(self, mapper: Mapper) -> StrictIommu:
        layout = self.board.layout
        self.iommu = StrictIommu(mapper, self.devices, (layout.mmio32, layout.mmio64), self.board.kvm.refuse)
        return self.iommu

    def number(self, size: int) -> int:
        """A value that a register may not like."""
        choice = self.random.randrange(8)
        if choice == 0:
            return 0
        if choice == 1:
            return (1 << 8 * size) - 1
        if choice == 2:
            return self.random.choice((0xFEE0_0000, 0x8000, 0xC000, 3, 7, 0x71)) & (1 << 8 * size) - 1
        if choice < 6:
            home = self.random.choice(self.homes) + self.random.choice((0, 0, PAGE, TABLE_AT, 1, 4))
            return (home >> self.random.choice((0, 0, 32))) & (1 << 8 * size) - 1
        return self.random.getrandbits(8 * size)

    def place(self) -> tuple[Bus, int]:
        """A bus and an address at which a device may be."""
        choice, board = self.random.randrange(10), self.board
        if choice < 5:
            register = self.random.choice(REGISTERS) if choice < 4 else self.random.randrange(0x1000)
            devfn = self.random.choice(self.places) if choice < 4 else self.random.randrange(256)
            register += self.random.choice((0, 0, 0, 1, 2, 3))
            return board.mmio, board.layout.ecam.start + (devfn << 12) + register
        if choice == 5:
            return board.ports, ports.PCI_CONFIG_BASE + self.random.randrange(8)
        if choice == 6:
            return board.ports, IO_WINDOW.start + self.random.randrange(0x100)
        table = self.random.choice((TABLE_AT, TABLE_AT, PENDING_AT)) + self.random.randrange(0x60)
        return board.mmio, self.random.choice(self.homes) + table

    def config(self, register: int, value: int, size: int, place: int | None = None) -> None:
        devfn = self.random.choice(self.places) if place is None else place
        self.board.pci.write(0, devfn, register, value.to_bytes(size, "little"))

    def unmask_a_vector(self) -> None:
        """As a driver would, wherever the table may be."""
        self.config(MSIX_AT + 2, self.random.choice((0x8000, 0x8000, 0xC000, 0)), 2)
        entry = self.random.choice(self.homes) + TABLE_AT + 16 * self.random.randrange(VECTORS)
        address = self.random.choice((0xFEE0_1000, 0xFEE0_0000, 0x1000))
        for offset, value in ((0, address), (4, 0), (8, 0x41), (12, self.random.choice((0, 0, 1)))):
            self.board.mmio.write(entry + offset, value.to_bytes(4, "little"))

    def move_a_bar(self) -> None:
        """To a place that another one may have."""
        home, place = self.random.choice(self.homes), self.random.choice(self.places)
        self.config(0x10, home & 0xFFFF_FFFF, 4, place)
        self.config(0x14, home >> 32, 4, place)
        self.config(0x04, 0x7, 2, place)

    def set_refusing(self, one_in: int) -> None:
        """One call of KVM's and of VFIO's in so many; 0 for none any more."""

        def refusing() -> bool:
            return bool(one_in) and not self.random.randrange(one_in)

        self.board.kvm.refusing = refusing
        for device in self.devices:
            device.refusing = device.config.refusing = refusing

    def sleep_or_wake(self) -> None:
        """Down, a write of the command register there, up again: VFIO and the device then disagree."""
        place = self.random.choice(self.places)
        for state, command in ((3, self.random.choice((0, 2, 7))), (0, None)):
            self.config(PM_AT + 4, state, self.random.choice((1, 2, 4)), place)
            if command is not None:
                self.config(0x04, command, 2, place)
            if self.random.randrange(3) == 0:
                break

    def reset_a_device(self) -> None:
        """By the host: not while other devices reach its BARs, whatever the guest does meanwhile."""
        number = self.random.randrange(len(self.devices))
        device, function = self.devices[number], self.functions[number]
        if not self.board.p2p:
            device.config.reset()
            return
        with contextlib.suppress(OSError):
            function.suspend()
            for _ in range(3):
                self.move_a_bar()
            device.config.reset()
            function.resume()

    def pull_or_push(self) -> None:
        """A device that is gone reads as ones; it may come back. Another says that it is awake, true or not."""
        config = self.random.choice(self.devices).config
        config.gone = not config.gone and not self.random.randrange(3)
        config.lying = not self.random.randrange(3)

    def step(self) -> None:
        if not self.random.randrange(20):
            special = (self.unmask_a_vector, self.move_a_bar, self.move_a_bar, self.sleep_or_wake)
            self.random.choice((*special, self.reset_a_device, self.pull_or_push))()
        bus, address = self.place()
        size = self.random.choice((1, 2, 3, 4, 4, 4, 5, 6, 7, 8))
        if self.random.randrange(3):
            bus.write(address, self.number(size).to_bytes(size, "little"))
        else:
            fast, read = self.board.fastpath.read(address, size), bus.read(address, size)
            assert len(read) == size
            # What is a file's here reads as ones there.
            assert bus is not self.board.mmio or fast in (None, read, b"\xff" * size)
        if not self.random.randrange(16):
            device = self.random.choice(self.devices)
            for vector, eventfd in device.signals.items():
                if eventfd >= 0:
                    device.interrupt(vector)
                    break

    def check(self, exactly: bool = True) -> None:
        """What is shown is recorded, mapped here, and let pass by VFIO; ``exactly``: and nothing else is recorded."""
        board = self.board
        slots = {(slot.gpa, slot.size) for slot in self.memslots.ledger}
        made = {(range_.start, range_.size) for range_ in self.vm.slots.values()}
        assert made <= slots
        ledger = {(mapping.iova, mapping.size) for mapping in self.domain.ledger}
        mapped = {(range_.start, range_.size) for range_ in self.iommu.mapped}
        assert mapped <= ledger <= {(region.gpa, region.size) for region in board.memory}
        assert all(device.config.memory_enabled for device in self.iommu.mapped.values())
        for device, function in zip(self.devices, self.functions, strict=True):
            shown = [region for bar in function._bars for region in bar._shown.values()]
            assert all(region.hva for region in shown), "unmapped under a memslot"
            if any((region.gpa, region.size) in made for region in shown):
                assert device.config.memory_enabled, "KVM_RUN would return EFAULT: VFIO refuses these pages"
        for gpa, (registers, _) in board.fastpath._registers.items():
            bar = board.mmio._find(gpa, registers.size)
            assert bar is not None and bar[1]._connected, "accessed where no BAR decodes"  # type: ignore[attr-defined]
        assert set(board.kvm.irqfds) <= set(board.kvm.routes)
        heard = [vector for function in self.functions for vector in vectors_of(function) if vector.connected]
        assert sorted(vector._eventfd for vector in heard) == sorted(board.kvm.irqfds.values()), "it was closed"
        if exactly:
            assert made == slots
            assert mapped == ledger == (slots if board.p2p else set())
            self.domain.audit()
            for function in self.functions:
                for bar in function._bars:
                    assert len(bar._shown) == (len(bar._mappings) if bar._connected else 0)
            assert slots == {(region.gpa, region.size) for region in board.memory if region.kind is RegionKind.BAR}
            assert set(board.kvm.irqfds) == set(board.kvm.routes)
            assert len(board.kvm.pins) == sum(device.active == INTX for device in self.devices)

    def close(self) -> None:
        """Again and again while KVM and VFIO refuse: what is left is as it must be each time, at the end nothing."""
        for one_in in (2, 3, 5, 0):
            self.set_refusing(one_in)
            for function in self.functions:
                self.board.pci.unplug(function)
                with contextlib.suppress(OSError):
                    function.close()
            self.check(exactly=False)
        for other in self.others:
            self.board.pci.unplug(other)
            other.close()
        self.domain.close()
        self.board.close()
        assert self.vm.slots == {}


@pytest.mark.parametrize("refusals", [0, 7, 100], ids=["willing", "failing", "failing-rarely"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_hostile_guest(seed: int, refusals: int) -> None:
    """No exception, no wrong size, no memslot outside of the windows, no two at one place, nothing left behind.

    No memslot over pages that VFIO refuses, or that are no longer mapped here, whatever is refused. With peer-to-peer
    the devices reach what the guest sees of their BARs, exactly, and nothing where a device does not respond.
    """
    guest = Guest(seed, refusals, p2p=bool(seed % 2))
    count = ACCESSES // len(SEEDS) // 3
    started, mapped = time.monotonic(), 0
    for number in range(count):
        guest.step()
        if number % 10 == 0:
            guest.check(exactly=not refusals)
            mapped += bool(guest.vm.slots)
    guest.set_refusing(0)
    for device in guest.devices:
        device.config.gone = False
    guest.check(exactly=not refusals)
    guest.close()
    assert mapped, "not one BAR was ever mapped: the accesses miss what they are aimed at"
    assert bool(guest.iommu.calls) == guest.board.p2p
    print(f"seed {seed}: {count} accesses in {time.monotonic() - started:.1f} s")
