"""MSI as the guest programs it in its capability: how many vectors, which messages, what is masked and pending."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_interrupts import FakeDevice, FakeKvm

from kvmpass import pciregs
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.msi import Msi
from kvmpass.pciregs import MSI_ENABLE
from kvmpass.vfio.device import MSI

AT, ADDRESS = 0x50, 0xFEE0_2000
WIDE, MASKABLE = 1 << 7, 1 << 8


class Registers:
    """A device's configuration space with an MSI capability at ``AT``."""

    size = 256

    def __init__(self, control: int) -> None:
        self.data = bytearray(b"\xee" * 256)
        struct.pack_into("<BBH", self.data, AT, 0x05, 0, control)
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.written += range(offset, offset + len(data))

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.read(offset, size), "little")


class Capability:
    """What a guest does: writes, of which the function tells Msi; reads, before which pending bits are fetched."""

    def __init__(self, capable: int = 2, flags: int = WIDE | MASKABLE, *, vfio: int = 32, host: int = 32) -> None:
        self.before = descriptors()
        self.kvm, self.device = FakeKvm(), FakeDevice(msi=vfio, host=host)
        self.registers = Registers(capable << 1 | flags)
        self.space = ConfigSpace(self.registers)
        self.space.emulate(0xF0, b"\x12\x34", b"\xff\0")  # another capability's, above it
        sink, own = self.device.irqs[MSI], pciregs.msi(self.space.device_int, AT)
        self.msi = Msi(self.kvm.wiring, sink, self.space, AT, own)
        self.data_at = 12 if flags & WIDE else 8
        self.mask_at = self.data_at + 4

    def read(self, offset: int, size: int) -> int:
        self.msi.refresh_pending()
        return int.from_bytes(self.space.read(AT + offset, size), "little")

    def write(self, offset: int, value: int, size: int) -> None:
        self.space.write(AT + offset, value.to_bytes(size, "little"))
        self.msi.update()

    def program(self, multiple: int = 0, address: int = ADDRESS, data: int = 0x40) -> None:
        self.write(4, address & 0xFFFF_FFFF, 4)
        if self.data_at == 12:
            self.write(8, address >> 32, 4)
        self.write(self.data_at, data, 2)
        self.write(2, multiple << 4 | MSI_ENABLE, 2)

    @property
    def messages(self) -> list[tuple[int, int]]:
        return sorted(self.kvm.messages)

    def close(self) -> None:
        self.kvm.refusing, self.device.refusing = set(), set()
        self.msi.disable()
        assert (self.kvm.routes, self.kvm.irqfds, self.device.active, descriptors()) == ({}, {}, None, self.before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def msi() -> Iterator[Capability]:
    capability = Capability()
    yield capability
    capability.close()


# --- the capability's four forms (PCI Local Bus 3.0, figure 6-9)


@pytest.mark.parametrize("flags, size", [(0, 12), (WIDE, 16), (MASKABLE, 20), (WIDE | MASKABLE, 24)])
def test_the_registers_and_their_writable_bits(flags: int, size: int) -> None:
    capability = Capability(2, flags)
    data_at = 12 if flags & WIDE else 8
    assert (capability.msi.start, capability.msi.end) == (AT, AT + size)
    writable = {2: 0x71, 4: 0xFC, 5: 0xFF, 6: 0xFF, 7: 0xFF, data_at: 0xFF, data_at + 1: 0xFF}
    if flags & WIDE:
        writable |= dict.fromkeys(range(8, 12), 0xFF)
    if flags & MASKABLE:
        writable[data_at + 4] = 0x0F
    fixed = {2: 2 << 1 | flags & 0xFF, 3: flags >> 8}
    for value in (0xFF, 0x00):
        capability.space.write(AT + 2, bytes([value]) * (size - 2))
        for offset in range(2, size):
            expected = fixed.get(offset, 0) & ~writable.get(offset, 0) | value & writable.get(offset, 0)
            assert capability.space.read(AT + offset, 1)[0] == expected, f"+{offset}"
    assert capability.registers.written == [], "none of it is the device's"
    assert capability.space.read(AT + size, 1) == b"\xee", "what follows is"
    capability.space.write(0xF0, b"\xab\xcd")
    assert capability.space.read(0xEF, 4) == b"\xee\xab\x34\xee", "and others' registers are where they were"
    capability.close()


@pytest.mark.parametrize(
    "capable, vfio, shown",
    [(0, 32, 0), (5, 32, 5), (3, 4, 2), (3, 5, 2), (3, 7, 2), (3, 8, 3), (2, 1, 0), (7, 64, 5), (2, 0, 0)],
)
def test_no_more_vectors_than_vfio_has(capable: int, vfio: int, shown: int) -> None:
    capability = Capability(capable, vfio=vfio)
    assert capability.read(2, 2) >> 1 & 7 == shown
    capability.close()


# --- messages


@pytest.mark.parametrize("flags", [0, WIDE, MASKABLE, WIDE | MASKABLE])
@pytest.mark.parametrize("multiple", [0, 1, 2])
def test_vectors_share_an_address_and_number_their_data(flags: int, multiple: int) -> None:
    capability = Capability(2, flags)
    capability.program(multiple, data=0x40)
    assert capability.messages == [(ADDRESS, 0x40 + n) for n in range(1 << multiple)]
    assert capability.device.wired == set(range(1 << multiple))
    for vector in reversed(range(1 << multiple)):
        capability.device.interrupt(vector, capability.kvm)
    assert [data for _, data in capability.kvm.delivered] == [0x40 + n for n in reversed(range(1 << multiple))]
    capability.close()


def test_low_bits_of_the_data_are_the_vectors(msi: Capability) -> None:
    msi.program(2, data=0x47)
    assert msi.messages == [(ADDRESS, 0x44 + n) for n in range(4)]
    msi.program(1, data=0x47)
    assert msi.messages == [(ADDRESS, 0x46), (ADDRESS, 0x47)]
    msi.program(0, data=0x47)
    assert msi.messages == [(ADDRESS, 0x47)]
    msi.program(7, data=0xFFFF)
    assert msi.messages == [(ADDRESS, 0xFFFC + n) for n in range(4)], "no more than it is capable of"


def test_disabled_it_uses_no_resources(msi: Capability) -> None:
    msi.write(4, ADDRESS, 4)
    msi.write(2, 0x70, 2)
    assert not msi.msi.enabled
    assert msi.kvm.log == [] == msi.device.calls


def test_another_message_reroutes_all_vectors(msi: Capability) -> None:
    msi.program(1)
    msi.write(4, ADDRESS + 0x1000, 4)
    assert msi.messages == [(ADDRESS + 0x1000, 0x40), (ADDRESS + 0x1000, 0x41)]
    msi.write(12, 0x60, 2)
    assert msi.messages == [(ADDRESS + 0x1000, 0x60), (ADDRESS + 0x1000, 0x61)]
    calls = len(msi.device.calls)
    assert calls == 1, "VFIO is not called again"


def test_only_messages_are_routed(msi: Capability) -> None:
    msi.program(1)
    msi.write(8, 1, 4)
    assert msi.kvm.routes == {}
    msi.write(8, 0, 4)
    msi.write(4, 0x1000, 4)
    assert msi.kvm.routes == {}
    msi.write(4, ADDRESS, 4)
    assert len(msi.messages) == 2


def test_another_number_of_vectors_restarts_it(msi: Capability) -> None:
    msi.program(0)
    msi.program(2)
    assert [call for call in msi.device.calls if call[0] == "set"] == [("set", MSI, 0, 1), ("set", MSI, 0, 4)]
    assert ("disable", MSI) in msi.device.calls
    assert len(msi.messages) == 4
    msi.write(2, 0, 2)
    assert (msi.kvm.routes, msi.device.active, descriptors()) == ({}, None, msi.before)
    msi.write(2, 2 << 4 | 1, 2)
    assert len(msi.messages) == 4


# --- masks


def test_masked_vectors_are_pending(msi: Capability) -> None:
    msi.program(2)
    msi.write(16, 0b1010, 4)
    assert msi.messages == [(ADDRESS, 0x40), (ADDRESS, 0x42)]
    msi.device.interrupt(3, msi.kvm)
    msi.device.interrupt(0, msi.kvm)
    assert msi.read(20, 4) == 0b1000
    msi.device.interrupt(1, msi.kvm)
    assert msi.read(20, 4) == 0b1010
    msi.kvm.delivered.clear()
    msi.write(16, 0b0010, 4)
    assert (msi.kvm.delivered, msi.read(20, 4)) == ([(ADDRESS, 0x43)], 0b0010)
    msi.write(16, 0, 4)
    assert (msi.kvm.delivered, msi.read(20, 4)) == ([(ADDRESS, 0x43), (ADDRESS, 0x41)], 0)


def test_the_last_of_32_vectors() -> None:
    capability = Capability(5)
    capability.program(5)
    capability.write(16, 1 << 31, 4)
    assert capability.messages == [(ADDRESS, 0x40 + n) for n in range(31)]
    capability.device.interrupt(31, capability.kvm)
    assert capability.read(20, 4) == 1 << 31
    capability.write(16, 0, 4)
    assert capability.kvm.delivered == [(ADDRESS, 0x5F)]
    capability.close()


def test_masks_beyond_the_vectors_do_not_exist(msi: Capability) -> None:
    msi.write(16, 0xFFFF_FFFF, 4)
    assert msi.read(16, 4) == 0b1111
    msi.write(20, 0xFFFF_FFFF, 4)
    assert msi.read(20, 4) == 0, "pending bits are read-only"


@pytest.mark.parametrize("flags", [0, WIDE])
def test_without_masks_nothing_is_pending(flags: int) -> None:
    capability = Capability(2, flags)
    capability.program(2)
    behind = capability.msi.end - AT
    before = capability.space.read(AT + behind, 8)
    capability.msi.refresh_pending()
    assert capability.space.read(AT + behind, 8) == before
    assert len(capability.messages) == 4
    capability.close()


# --- refusals


@pytest.mark.parametrize("host, signalled", [(1, 1), (2, 2), (3, 2), (4, 4), (31, 16), (32, 32)])
def test_a_host_with_fewer_vectors_enables_those(host: int, signalled: int, caplog: pytest.LogCaptureFixture) -> None:
    """In powers of two: the device then raises those that it has been given."""
    capability = Capability(5, host=host)
    capability.program(5, data=0x40)
    told = f"the host has {signalled} vectors, the guest wants 32" in caplog.text
    assert told == (signalled < 32) and bool(caplog.records) == told
    assert capability.device.wired == set(range(signalled))
    assert capability.messages == [(ADDRESS, 0x40 + n) for n in range(signalled)]
    calls = list(capability.device.calls)
    capability.write(12, 0x80, 2)
    assert capability.device.calls == calls, "and it is not called again"
    capability.close()


def test_a_host_without_any_vector() -> None:
    capability = Capability(2, host=0)
    capability.program(2)
    assert (capability.messages, capability.device.active) == ([], None)
    requested = [count for name, *_, count in capability.device.calls if name == "set"]
    assert requested == [4, 2, 1]
    capability.close()


def test_other_errors_are_not_retried_with_fewer(msi: Capability) -> None:
    msi.device.refusing = {"set"}
    msi.program(2)
    assert [call[0] for call in msi.device.calls].count("set") == 1
    assert (msi.messages, msi.device.active) == ([], None)


@pytest.mark.parametrize("call", ["add", "irqfd"])
def test_a_refusal_of_kvm_ends_no_guest(msi: Capability, call: str) -> None:
    msi.kvm.refusing = {call}
    msi.program(1)
    assert msi.kvm.irqfds == {} == msi.kvm.routes
    msi.kvm.refusing = set()
    msi.write(12, 0x40, 2)
    assert len(msi.messages) == 2


def test_the_order_of_disable(msi: Capability) -> None:
    msi.program(0)
    order: list[object] = []
    msi.kvm.log = msi.device.calls = order  # type: ignore[assignment]
    msi.msi.disable()
    assert order == ["irqfd_deassign", "remove", ("disable", MSI)]
    msi.msi.disable()
    assert len(order) == 3
