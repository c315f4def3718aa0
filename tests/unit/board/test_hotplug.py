"""The hotplug controller: notifications, ejects, and other accesses."""

from __future__ import annotations

import pytest

from kvmpass.board.hotplug import DOWN, EJECT, UP, HotplugController


class Wires:
    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.ejected: list[int] = []
        self.controller = HotplugController(self.levels.append, self.ejected.append)


@pytest.fixture
def wires() -> Wires:
    return Wires()


def test_the_interrupt_is_high_until_both_registers_are_read(wires: Wires) -> None:
    wires.controller.announce(3)
    wires.controller.announce(31)
    wires.controller.request_eject(5)
    assert wires.levels == [True]
    assert wires.controller.read(UP, 4) == (1 << 3 | 1 << 31).to_bytes(4, "little")
    assert wires.controller.read(UP, 4) == bytes(4)
    assert wires.levels == [True]
    assert wires.controller.read(DOWN, 4) == (1 << 5).to_bytes(4, "little")
    assert wires.controller.read(DOWN, 4) == bytes(4)
    assert wires.levels == [True, False]


def test_a_removed_device_withdraws_its_notifications(wires: Wires) -> None:
    wires.controller.announce(3)
    wires.controller.forget(3)
    assert wires.levels == [True, False]
    assert wires.controller.read(UP, 4) == bytes(4)


def test_a_withdrawn_eject_request_leaves_the_device_check(wires: Wires) -> None:
    wires.controller.announce(3)
    wires.controller.request_eject(3)
    wires.controller.withdraw(3)
    assert wires.controller.read(DOWN, 4) == bytes(4)
    assert wires.controller.read(UP, 4) == (1 << 3).to_bytes(4, "little")


def test_the_guest_ejects_slots_by_their_bits(wires: Wires) -> None:
    wires.controller.write(EJECT, (1 << 1 | 1 << 30).to_bytes(4, "little"))
    assert wires.ejected == [1, 30]


@pytest.mark.parametrize("offset", range(12))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_other_accesses_do_nothing(wires: Wires, offset: int, size: int) -> None:
    wires.controller.announce(1)
    if (offset, size) not in ((UP, 4), (DOWN, 4)):
        assert wires.controller.read(offset, size) == bytes(size)
    if (offset, size) != (EJECT, 4):
        wires.controller.write(offset, b"\xff" * size)
    assert wires.ejected == []
    assert wires.controller.read(UP, 4) in (b"\2\0\0\0", bytes(4))
