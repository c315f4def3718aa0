"""MSI-X as the guest programs it: which vectors VFIO signals, which messages KVM delivers, what is pending."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.fake_interrupts import FakeDevice, FakeKvm

from kvmpass.layout import Range
from kvmpass.pci.bar import Bar, Trapped
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.msix import Msix, PendingBits
from kvmpass.pciregs import MSIX_ENABLE, MSIX_MASK_ALL, MsixRegisters
from kvmpass.vfio.device import MSIX

AT, PENDING_AT, ADDRESS = 0x40, 0x8000, 0xFEE0_1000
ON, MASKED = MSIX_ENABLE, MSIX_ENABLE | MSIX_MASK_ALL


class Table:
    """A device with ``vectors``, and what a guest does to its table."""

    def __init__(self, vectors: int = 5, *, resizable: bool = True) -> None:
        self.before = descriptors()
        self.kvm, self.device = FakeKvm(), FakeDevice(msix=vectors, resizable=resizable)
        self.space = ConfigSpace()
        sink, own = self.device.irqs[MSIX], MsixRegisters(vectors, False, 0, 0, 0, PENDING_AT)
        self.msix = Msix(self.kvm.wiring, sink, self.space, AT, own)

    def set_control(self, value: int) -> None:
        self.space.write(AT + 2, value.to_bytes(2, "little"))
        self.msix.update()

    @property
    def pending(self) -> Trapped:
        [trap] = [trap for trap in self.msix.traps(0) if trap.range.start]
        assert trap.range.start == PENDING_AT
        return trap.device

    def program(self, vector: int, address: int = ADDRESS, data: int | None = None, masked: int = 0) -> None:
        self.msix.write(16 * vector, address.to_bytes(8, "little"))
        self.msix.write(16 * vector + 8, (0x40 + vector if data is None else data).to_bytes(4, "little"))
        self.msix.write(16 * vector + 12, masked.to_bytes(4, "little"))

    def mask(self, vector: int, masked: int = 1) -> None:
        self.msix.write(16 * vector + 12, masked.to_bytes(4, "little"))

    def interrupt(self, vector: int) -> None:
        self.device.interrupt(vector, self.kvm)

    @property
    def delivered(self) -> list[int]:
        """Data of the messages since the last look."""
        seen, self.kvm.delivered = self.kvm.delivered, []
        return [data for _, data in seen]

    @property
    def connected(self) -> list[int]:
        return sorted(data - 0x40 for _, data in self.kvm.messages)

    def close(self) -> None:
        self.kvm.refusing, self.device.refusing = set(), set()
        self.msix.disable()
        assert (self.kvm.routes, self.kvm.irqfds, self.device.active, descriptors()) == ({}, {}, None, self.before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def table() -> Iterator[Table]:
    table = Table()
    yield table
    table.close()


def old_kernel() -> Table:
    return Table(resizable=False)


# --- the table


def test_bits_of_the_capability() -> None:
    """Message control: enable is bit 15, the function's mask bit 14 (PCI Local Bus 3.0, section 6.8.2.3)."""
    assert (MSIX_ENABLE, MSIX_MASK_ALL) == (0x8000, 0x4000)


def test_the_capability_says_where_the_table_is() -> None:
    """Its reserved bits and its places are read-only, and each BAR has what is in it."""
    space, kvm, own = ConfigSpace(), FakeKvm(), MsixRegisters(65, False, 2, 0x1000, 4, 0x800)
    msix = Msix(kvm.wiring, FakeDevice(msix=65).irqs[MSIX], space, AT, own)
    assert space.read(AT + 2, 10) == struct.pack("<HII", 64, 0x1002, 0x804)
    assert [trap.range for trap in msix.traps(2)] == [Range(0x1000, 65 * 16)]
    assert [trap.range for trap in msix.traps(4)] == [Range(0x800, 16)]
    assert msix.traps(0) == []
    space.write(AT + 2, b"\xff" * 10)
    assert space.read(AT + 2, 10) == struct.pack("<HII", 64 | MSIX_ENABLE | MSIX_MASK_ALL, 0x1002, 0x804)
    assert msix.enabled


def test_after_a_reset_every_vector_is_masked(table: Table) -> None:
    assert table.msix.read(0, 80) == (bytes(12) + b"\1\0\0\0") * 5


def test_dwords_and_quadwords_are_stored(table: Table) -> None:
    model = bytearray(table.msix.read(0, 80))
    rng = random.Random(5)
    for _ in range(200):
        size = rng.choice([4, 8])
        at = rng.randrange(80 // size) * size
        data = rng.randbytes(size)
        table.msix.write(at, data)
        model[at : at + size] = data
        for entry in range(5):  # the upper 31 bits of vector control are reserved
            control = slice(16 * entry + 12, 16 * entry + 16)
            model[control] = bytes([model[control][0] & 1, 0, 0, 0])
        assert table.msix.read(0, 80) == model
    assert table.msix.read(16, 4) == model[16:20]
    assert table.kvm.log == [] == table.device.calls, "nothing is on"


@pytest.mark.parametrize(
    "offset, size", [(0, 1), (0, 2), (12, 1), (4, 8), (12, 8), (2, 4), (1, 4), (0, 3), (0, 5), (0, 16)]
)
def test_other_accesses_change_nothing(table: Table, offset: int, size: int) -> None:
    before = table.msix.read(0, 80)
    table.msix.write(offset, b"\xff" * size)
    assert table.msix.read(0, 80) == before


# --- vectors


def test_enabling_costs_one_call_and_no_route(table: Table) -> None:
    """Vector 0 turns MSI-X on in the device; the guest's masks are kept here."""
    table.set_control(ON)
    assert table.device.calls == [("set", MSIX, 0, 1)]
    assert table.kvm.log == []
    table.set_control(ON)
    assert len(table.device.calls) == 1


def test_an_unmasked_vector_is_delivered(table: Table) -> None:
    table.set_control(ON)
    for vector in (3, 0, 4):
        table.program(vector)
    assert table.connected == [0, 3, 4]
    assert table.device.calls == [("set", MSIX, 0, 1), ("set", MSIX, 3, 1), ("set", MSIX, 4, 1)]
    for vector in (0, 1, 3, 4):
        table.interrupt(vector)
    assert table.delivered == [0x40, 0x43, 0x44]


def test_programmed_before_it_is_enabled(table: Table) -> None:
    """As Linux does it: the function masked, entries written, then unmasked."""
    table.program(0)
    table.program(2)
    assert table.device.calls == []
    table.set_control(MASKED)
    assert (table.device.active, table.connected) == (MSIX, [])
    table.set_control(ON)
    assert table.connected == [0, 2]


def test_each_part_of_a_message_counts(table: Table) -> None:
    table.set_control(ON)
    table.program(1)
    table.msix.write(16, (ADDRESS + 0x2000).to_bytes(4, "little"))
    assert table.kvm.messages == {(ADDRESS + 0x2000, 0x41)}
    table.msix.write(24, (0xABCD).to_bytes(4, "little"))
    assert table.kvm.messages == {(ADDRESS + 0x2000, 0xABCD)}
    table.msix.write(24, (0x77 | 0 << 32).to_bytes(8, "little"))
    assert table.kvm.messages == {(ADDRESS + 0x2000, 0x77)}
    table.msix.write(20, (1).to_bytes(4, "little"))
    assert table.kvm.messages == set(), "that is memory above 4 GiB"
    table.msix.write(20, bytes(4))
    assert table.kvm.messages == {(ADDRESS + 0x2000, 0x77)}


def test_all_bits_of_the_data_are_delivered(table: Table) -> None:
    table.set_control(ON)
    for data in (0xFFFF_FFFF, 0x8000_0000, 1):
        table.program(1, data=data)
        assert table.kvm.messages == {(ADDRESS, data)}
    table.program(1, address=0xFEEF_FFFC)
    assert table.kvm.messages == {(0xFEEF_FFFC, 0x41)}


def test_masks_of_vector_and_function(table: Table) -> None:
    table.set_control(ON)
    table.program(1)
    table.program(2)
    table.mask(1)
    assert table.connected == [2]
    table.set_control(MASKED)
    assert table.connected == []
    table.program(3)
    assert table.connected == []
    table.set_control(ON)
    assert table.connected == [2, 3]
    table.mask(1, 0)
    assert table.connected == [1, 2, 3]
    table.mask(1, 0xFFFF_FFFE)
    assert table.connected == [1, 2, 3], "only bit 0 masks"


def test_writes_are_collected_while_all_vectors_are_masked(table: Table) -> None:
    calls: list[tuple[Range, bool]] = []
    bar = SimpleNamespace(collect=lambda part, wanted: calls.append((part, wanted)))
    [trap] = [trap for trap in table.msix.traps(0) if not trap.range.start]
    trap.connect(cast(Bar, bar))
    for control in (MSIX_MASK_ALL, MASKED, ON, MASKED, 0):
        table.set_control(control)
    assert [wanted for _, wanted in calls] == [False, True, False, True, False]
    assert {part for part, _ in calls} == {Range(0, 5 * 16)}, "the table, and nothing beside it"


def test_pending_interrupts_are_delivered_when_unmasked(table: Table) -> None:
    table.set_control(ON)
    table.program(2)
    table.mask(2)
    table.interrupt(2)
    assert (table.delivered, table.pending.read(0, 8)) == ([], b"\4" + bytes(7))
    table.mask(2, 0)
    assert (table.delivered, table.pending.read(0, 8)) == ([0x42], bytes(8))
    table.set_control(MASKED)
    table.interrupt(2)
    assert table.pending.read(0, 1) == b"\4"
    table.set_control(ON)
    assert table.delivered == [0x42]


def test_disable_leaves_nothing(table: Table) -> None:
    table.set_control(ON)
    table.program(1)
    table.set_control(0)
    assert (table.kvm.routes, table.device.active, table.device.calls[-1]) == ({}, None, ("disable", MSIX))
    assert descriptors() == table.before
    table.program(3)
    assert (table.kvm.routes, table.device.active) == ({}, None)
    table.set_control(ON)
    assert table.connected == [1, 3], "the table is kept"


def test_disable_is_idempotent(table: Table) -> None:
    table.set_control(0)
    table.set_control(MSIX_MASK_ALL)
    table.msix.disable()
    assert table.device.calls == [] == table.kvm.log


def test_the_irqfds_are_removed_before_the_sink_is_disabled(table: Table) -> None:
    table.set_control(ON)
    table.program(0)
    order: list[object] = []
    table.kvm.log = table.device.calls = order  # type: ignore[assignment]
    table.msix.disable()
    assert order == ["irqfd_deassign", "remove", ("disable", MSIX)]


# --- refusals


def test_a_vector_that_vfio_refuses_does_not_affect_others(table: Table) -> None:
    table.set_control(ON)
    table.program(1)
    table.device.refusing = {"set"}
    open_before = descriptors()
    table.program(2)
    assert (table.connected, descriptors()) == ([1], open_before)
    assert ("disable", MSIX) not in table.device.calls, "the others are not disturbed"
    table.device.refusing = set()
    table.program(2)
    assert table.connected == [1, 2], "and may come later"


def test_routes_that_run_out(table: Table) -> None:
    table.set_control(ON)
    table.kvm.limit = 2
    for vector in range(4):
        table.program(vector)
    assert table.connected == [0, 1]
    table.mask(0)
    table.program(3)
    assert table.connected == [1, 3]


@pytest.mark.parametrize("call", ["add", "irqfd"])
def test_a_vector_that_kvm_refuses_does_not_affect_others(table: Table, call: str) -> None:
    table.set_control(ON)
    table.program(1)
    table.kvm.refusing = {call}
    table.program(2)
    table.kvm.refusing = set()
    assert table.connected == [1]
    table.mask(2, 0)
    assert table.connected == [1, 2]


def test_a_failed_disable_ends_no_guest(table: Table) -> None:
    table.set_control(ON)
    table.program(1)
    table.device.refusing = {"disable"}
    table.set_control(0)
    assert table.kvm.routes == {}
    table.device.refusing = set()
    table.device.disable_irqs(MSIX)


# --- kernels before 6.5, which take new vectors only all at once


def test_new_vectors_restart_the_device_with_all_so_far() -> None:
    table = old_kernel()
    table.set_control(ON)
    table.program(3)
    assert (table.connected, table.device.wired) == ([3], {0, 3})
    table.program(1)
    assert (table.connected, table.device.wired) == ([1, 3], {0, 1, 3})
    for vector in (1, 2, 3):
        table.interrupt(vector)
    assert table.delivered == [0x41, 0x43]
    table.close()


def test_a_refused_restart_restores_the_others() -> None:
    table = old_kernel()
    table.set_control(ON)
    table.program(1)
    table.device.host = 3
    table.program(4)
    assert (table.connected, table.device.wired) == ([1], {0, 1})
    table.interrupt(1)
    assert table.delivered == [0x41]
    table.device.host = 5
    table.program(4)
    assert (table.connected, table.device.wired) == ([1, 4], {0, 1, 4})
    table.close()


def test_a_host_without_any_vector(table: Table) -> None:
    table.device.host = 0
    table.set_control(ON)
    table.program(1)
    assert (table.connected, table.device.active) == ([], None)
    table.device.host = 5
    table.program(1)
    assert (table.connected, table.device.active) == ([1], MSIX)


# --- many vectors


def test_pending_bits_of_many_vectors() -> None:
    """One bit each, in quadwords; any piece of them can be read, nothing written."""

    class Vector:
        def __init__(self, number: int) -> None:
            self.pending = number in raised

    raised = {0, 1, 7, 8, 31, 32, 63, 64, 69}
    bits = PendingBits([Vector(n) for n in range(70)])  # type: ignore[misc]
    whole = sum(1 << n for n in raised).to_bytes(16, "little")
    for size in (1, 2, 4, 8):
        for at in range(0, 16, size):
            assert bits.read(at, size) == whole[at : at + size]
    bits.write(0, bytes(8))
    assert bits.read(0, 16) == whole


def test_the_last_of_many_vectors() -> None:
    table = Table(64)
    table.set_control(ON)
    table.program(63)
    table.interrupt(63)
    assert table.delivered == [0x40 + 63]
    table.close()


def test_old_kernels_restart_once_for_all_that_one_write_unmasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 vectors behind the function's mask: off and on again once, not for each of them."""
    table = Table(2048, resizable=False)
    calls: list[str] = []
    for name in ("set_irqs", "disable_irqs"):
        real = getattr(table.device, name)
        monkeypatch.setattr(
            table.device, name, lambda *arguments, real=real, name=name: (calls.append(name), real(*arguments))[1]
        )
    table.set_control(MASKED)
    for vector in range(2048):
        table.program(vector, data=vector)
    assert calls == ["set_irqs"], "masked, only MSI-X itself is on"
    table.set_control(ON)
    assert calls == ["set_irqs", "disable_irqs", "set_irqs"]
    assert len(table.kvm.messages) == 2048
    calls.clear()
    table.set_control(MASKED)
    table.set_control(ON)
    assert calls == [], "they are on already"
    assert len(table.kvm.messages) == 2048
    table.close()


def test_old_kernels_with_too_few_vectors_enable_the_lowest() -> None:
    """Found in a few tries, and the guest goes on with those."""
    table = Table(64, resizable=False)
    table.device.host = 21
    table.set_control(MASKED)
    for vector in range(64):
        table.program(vector)
    table.set_control(ON)
    assert table.connected == list(range(21))
    table.close()
