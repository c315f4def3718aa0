"""A function that no device is behind, as a guest meets it: the protocols of kvmpass/pci/function.py are enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import emulated_edu as edu
from support.emulated_edu import EmulatedEdu
from support.fake_interrupts import FakeKvm

from kvmpass import pciregs
from kvmpass.bus import Bus
from kvmpass.layout import MIB, plan_layout
from kvmpass.memory import GuestMemory, RegionKind
from kvmpass.pci import BarSpace, PciBus, PciFunction, Wiring

MESSAGE = (0xFEE0_1000, 0x41)


class Guest:
    """What a guest with this function in slot 1 does."""

    def __init__(self) -> None:
        self.kvm, self.memory, self.ports, self.mmio, self.pci = (
            FakeKvm(),
            GuestMemory(),
            Bus("port"),
            Bus("memory"),
            PciBus(),
        )
        self.memory.add_ram(0, MIB, "ram")
        bars = BarSpace(plan_layout(MIB))
        self.edu = EmulatedEdu(Wiring(self.kvm, self.kvm, self.memory, self.ports, self.mmio, bars, ()))  # type: ignore[arg-type]
        self.function: PciFunction = self.edu
        self.pci.plug(self.function, 1)
        self.bar = self.config(pciregs.BAR0)

    def config(self, offset: int, size: int = 4, value: int | None = None) -> int:
        if value is not None:
            self.pci.write(0, 1 << 3, offset, value.to_bytes(size, "little"))
        return int.from_bytes(self.pci.read(0, 1 << 3, offset, size), "little")

    def read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.mmio.read(self.bar + offset, size), "little")

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.mmio.write(self.bar + offset, value.to_bytes(size, "little"))

    def enable(self) -> None:
        self.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
        [msix] = pciregs.capabilities(self.config)
        self.config(msix.offset + 2, 2, pciregs.MSIX_ENABLE)
        self.write(edu.TABLE, MESSAGE[0], 8)
        self.write(edu.TABLE + 8, MESSAGE[1])
        self.mask(0)

    def mask(self, masked: int) -> None:
        self.write(edu.TABLE + 12, masked)
        self.kvm.pump()

    def raise_interrupt(self) -> None:
        self.write(edu.RAISE, 1)
        self.kvm.pump()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.pci.unplug(guest.function)
    guest.function.close()
    guest.function.close()
    assert (guest.kvm.routes, guest.kvm.irqfds, guest.mmio._ranges) == ({}, {}, [])
    guest.memory.close()


def test_it_is_enumerated(guest: Guest) -> None:
    assert guest.config(0) == 0x11E8_1234
    assert guest.config(pciregs.BAR0, value=0xFFFF_FFFF) == -edu.SIZE & 0xFFFF_FFFF
    guest.config(pciregs.BAR0, value=guest.bar)
    [msix] = pciregs.capabilities(guest.config)
    assert pciregs.msix(guest.config, msix.offset) == pciregs.MsixRegisters(1, False, 0, edu.TABLE, 0, edu.PENDING)
    assert guest.read(edu.ID) == 0xFFFF_FFFF, "nothing decodes yet"


def test_its_registers_are_at_the_bars_address(guest: Guest) -> None:
    guest.enable()
    assert guest.read(edu.ID) == 0x0100_00ED
    guest.write(edu.LIVENESS, 0x1234_5678)
    assert guest.read(edu.LIVENESS) == 0xEDCB_A987
    before, guest.bar = guest.bar, guest.bar + edu.SIZE
    guest.config(pciregs.BAR0, value=guest.bar)
    assert guest.read(edu.LIVENESS) == 0xEDCB_A987
    assert guest.mmio.read(before, 4) == b"\xff" * 4
    assert guest.read(edu.SIZE - 4) == 0


def test_each_interrupt_is_a_message(guest: Guest) -> None:
    guest.raise_interrupt()
    assert guest.kvm.delivered == [], "nothing decodes yet"
    guest.enable()
    for number in range(1, 4):
        guest.raise_interrupt()
        assert guest.kvm.delivered == [MESSAGE] * number
        assert guest.read(edu.STATUS) == 1
        guest.write(edu.ACKNOWLEDGE, 1)
        assert guest.read(edu.STATUS) == 0


def test_an_interrupt_of_a_masked_vector_is_pending(guest: Guest) -> None:
    guest.enable()
    guest.mask(1)
    guest.raise_interrupt()
    assert (guest.kvm.delivered, guest.read(edu.PENDING, 8)) == ([], 1)
    guest.mask(0)
    assert (guest.kvm.delivered, guest.read(edu.PENDING, 8)) == ([MESSAGE], 0)


def test_it_reaches_the_guests_memory(guest: Guest) -> None:
    guest.enable()
    guest.memory.write(0x1000, b"there and back")
    for source, target, command in ((0x1000, edu.BUFFER, 0), (edu.BUFFER, 0x2000, edu.FROM_DEVICE)):
        for register, value in ((edu.SOURCE, source), (edu.TARGET, target), (edu.COUNT, 14)):
            guest.write(register, value, 8)
        guest.write(edu.COMMAND, edu.START | edu.INTERRUPT | command, 8)
    assert guest.memory.read(0x2000, 14) == b"there and back"
    [shown] = [region for region in guest.memory if region.kind is RegionKind.BAR]
    assert (shown.gpa, bytes(shown.mapping.view(0, 14))) == (guest.bar + edu.BUFFER, b"there and back"), "no exit"
    guest.write(edu.TARGET, 8 * MIB, 8)
    guest.write(edu.COMMAND, edu.START | edu.FROM_DEVICE, 8)
    assert guest.read(edu.STATUS) == edu.DMA_DONE
    assert guest.edu.registers.raised == 2
