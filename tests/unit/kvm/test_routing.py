"""The table of interrupt routes: what KVM is given is what the table says, whatever comes and goes."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from kvmpass._native import lib
from kvmpass.kvm import Capability, IrqRoutes
from kvmpass.ports import IOAPIC_PINS


class FakeVm:
    """Keeps what it was given; refuses when told to."""

    closed = False

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self.refuse = False
        self.seen: list[tuple[int, ...]] = []

    def check_extension(self, capability: Capability) -> int:
        assert capability == Capability.IRQ_ROUTING
        return self.limit

    def set_gsi_routing(self, table: Any, count: int) -> None:
        if self.refuse:
            raise OSError(errno.EINVAL, "KVM_SET_GSI_ROUTING: Invalid argument")
        entries = [table[at] for at in range(count)]
        self.seen = [
            (e.gsi, e.address, e.data) if e.type == lib.KVM_IRQ_ROUTING_MSI else (e.gsi, e.irqchip, e.pin, e.type)
            for e in entries
        ]

    @property
    def messages(self) -> set[tuple[int, ...]]:
        return {entry for entry in self.seen if len(entry) == 3}


def routes_on(vm: FakeVm) -> IrqRoutes:
    return IrqRoutes(vm)  # type: ignore[arg-type]


def test_the_table_starts_with_the_ioapics_pins_and_none_of_the_pic() -> None:
    routes_on(vm := FakeVm())
    assert {entry[1] for entry in vm.seen} == {lib.KVM_IRQCHIP_IOAPIC}
    assert len(vm.seen) == IOAPIC_PINS
    assert {entry[0] for entry in vm.seen if entry[1] == lib.KVM_IRQCHIP_IOAPIC} == set(range(IOAPIC_PINS))


def test_random_changes_leave_the_requested_routes() -> None:
    routes, choose, wanted = routes_on(vm := FakeVm()), random.Random(1), {}
    for step in range(500):
        if wanted and (choose.random() < 0.5 or len(wanted) == vm.limit - IOAPIC_PINS):
            gsi = choose.choice(list(wanted))
            routes.remove(gsi)
            del wanted[gsi]
        else:
            gsi = routes.add(0xFEE0_0000, step)
            assert gsi not in wanted and gsi >= IOAPIC_PINS
            wanted[gsi] = step
        assert vm.messages == {(gsi, 0xFEE0_0000, data) for gsi, data in wanted.items()}
        assert [(route.gsi, route.data) for route in routes.msi] == sorted(wanted.items())
        assert len(vm.seen) == IOAPIC_PINS + len(wanted)


def test_a_refused_change_changes_nothing() -> None:
    routes = routes_on(vm := FakeVm())
    kept = [routes.add(0xFEE0_0000, data) for data in range(3)]
    before, vm.refuse = routes.msi, True
    with pytest.raises(OSError, match="KVM_SET_GSI_ROUTING"):
        routes.add(0xFEE0_0000, 9)
    with pytest.raises(OSError, match="KVM_SET_GSI_ROUTING"):
        routes.remove(kept[0])
    vm.refuse = False
    assert routes.msi == before
    routes.remove(kept[0])
    assert [route.data for route in routes.msi] == [1, 2]


def test_a_full_table_is_enospc() -> None:
    routes = routes_on(vm := FakeVm())
    for data in range(vm.limit - IOAPIC_PINS):
        routes.add(0xFEE0_0000, data)
    with pytest.raises(OSError, match="all 64 GSIs") as caught:
        routes.add(0xFEE0_0000, 99)
    assert caught.value.errno == errno.ENOSPC


def test_a_closed_vm_is_not_called() -> None:
    """Its routes have gone with it."""
    routes = routes_on(vm := FakeVm())
    gsi = routes.add(0xFEE0_0000, 1)
    vm.closed = vm.refuse = True
    routes.remove(gsi)
    assert routes.msi == []


def test_each_pin_of_the_ioapic_is_its_gsi() -> None:
    """KVM_IOAPIC_NUM_PINS is 24 (arch/x86/include/uapi/asm/kvm.h); messages come above."""
    routes = routes_on(vm := FakeVm())
    assert vm.seen == [(n, lib.KVM_IRQCHIP_IOAPIC, n, lib.KVM_IRQ_ROUTING_IRQCHIP) for n in range(24)]
    assert [routes.add(0xFEE0_0000, data) for data in range(3)] == [24, 25, 26]
    routes.remove(25)
    assert routes.add(0xFEE0_0000, 9) == 25
    assert vm.seen[:24] == [(n, lib.KVM_IRQCHIP_IOAPIC, n, lib.KVM_IRQ_ROUTING_IRQCHIP) for n in range(24)]


def test_all_bits_of_a_message_are_kept() -> None:
    routes = routes_on(vm := FakeVm())
    messages = [(0xFEE0_0000, 0), (0xFEEF_FFFC, 0xFFFF_FFFF), (0xFEE0_1000, 0x8000_0001)]
    gsis = [routes.add(*message) for message in messages]
    assert vm.messages == {(gsi, *message) for gsi, message in zip(gsis, messages, strict=True)}
    assert [(route.gsi, route.address, route.data) for route in routes.msi] == sorted(vm.messages)
    for gsi in reversed(gsis):
        routes.remove(gsi)
    assert (routes.msi, len(vm.seen)) == ([], 24)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whichever_is_removed_the_others_can_be_removed_after_it(victim: int) -> None:
    """The last entry takes the removed one's place in the table."""
    routes = routes_on(vm := FakeVm())
    gsis = [routes.add(0xFEE0_0000, data) for data in range(3)]
    vm.refuse = True
    with pytest.raises(OSError):
        routes.remove(gsis[victim])
    vm.refuse = False
    left = {gsi: data for data, gsi in enumerate(gsis)}
    for gsi in [gsis.pop(victim), *gsis]:
        routes.remove(gsi)
        del left[gsi]
        assert vm.messages == {(other, 0xFEE0_0000, data) for other, data in left.items()}
    with pytest.raises(KeyError):
        routes.remove(gsi)


def test_the_repr_counts_routes_and_free_gsis() -> None:
    routes = routes_on(FakeVm())
    routes.add(0xFEE0_0000, 1)
    assert repr(routes) == "<IrqRoutes 24 pins, 1 messages, 39 GSIs free>"
