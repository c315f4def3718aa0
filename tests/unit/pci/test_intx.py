"""INTx of an assigned function: one line, wired between VFIO and KVM, and unwired whatever fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_interrupts import FakeDevice, FakeKvm, readable

from kvmpass.pci.intx import Intx
from kvmpass.vfio.device import INTX

GSI = 17


class Line:
    def __init__(self) -> None:
        self.kvm, self.device = FakeKvm(), FakeDevice()
        self.intx = Intx(self.kvm, self.device.irqs[INTX], GSI)  # type: ignore[arg-type]
        self.descriptors = descriptors()

    @property
    def off(self) -> bool:
        """Nothing is wired, nothing is open."""
        return (self.device.active, self.kvm.pins, descriptors()) == (None, {}, self.descriptors)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.kvm.refusing, line.device.refusing = set(), set()
    line.intx.disable()
    assert line.off


def test_the_device_raises_and_the_guests_end_of_interrupt_unmasks(line: Line) -> None:
    """VFIO signals what KVM listens to; KVM signals what VFIO unmasks on."""
    assert not line.intx.active
    line.intx.enable()
    assert line.intx.active and line.device.active == INTX
    [(trigger, (gsi, resample))] = line.kvm.pins.items()
    assert (gsi, line.device.signals, line.device.unmask) == (GSI, [trigger], resample)
    assert not readable(trigger) and not readable(resample), "nothing has been raised"
    assert not os.get_inheritable(trigger) and not os.get_blocking(trigger) and not os.get_blocking(resample)


def test_enable_and_disable_are_idempotent(line: Line) -> None:
    line.intx.disable()
    assert line.device.calls == [] == line.kvm.log
    line.intx.enable()
    line.intx.enable()
    assert len(line.kvm.pins) == 1
    line.intx.disable()
    assert line.off and not line.intx.active
    line.intx.disable()
    line.intx.enable()
    assert line.intx.active


def test_the_sink_is_disabled_before_the_irqfd_is_removed(line: Line) -> None:
    line.intx.enable()
    order: list[str] = []
    line.device.calls, line.kvm.log = order, order  # type: ignore[assignment]
    line.intx.disable()
    assert order == [("disable", INTX), "irqfd_deassign"]


@pytest.mark.parametrize("who, call", [("kvm", "irqfd_resample"), ("device", "set"), ("device", "unmask")])
def test_a_failed_enable_leaves_nothing(line: Line, who: str, call: str) -> None:
    getattr(line, who).refusing = {call}
    with pytest.raises(OSError, match=call):
        line.intx.enable()
    assert line.off and not line.intx.active
    getattr(line, who).refusing = set()
    line.intx.enable()
    assert line.intx.active


@pytest.mark.parametrize("who, call", [("device", "disable"), ("kvm", "irqfd_deassign")])
def test_a_failed_disable_stays_recorded_and_can_be_repeated(line: Line, who: str, call: str) -> None:
    """The other step is done; the eventfds stay open for the side that still uses them."""
    line.intx.enable()
    [(trigger, (_, resample))] = line.kvm.pins.items()
    getattr(line, who).refusing = {call}
    with pytest.raises(OSError, match=call):
        line.intx.disable()
    assert (line.device.active == INTX, bool(line.kvm.pins)) == (who == "device", who == "kvm")
    assert not line.intx.active
    os.fstat(trigger)
    os.fstat(resample)
    getattr(line, who).refusing = set()
    line.intx.disable()
    assert line.off
    line.intx.enable()
    assert line.intx.active


@pytest.mark.parametrize("who, call", [("device", "disable"), ("kvm", "irqfd_deassign")])
def test_enable_first_finishes_a_failed_disable(line: Line, who: str, call: str) -> None:
    line.intx.enable()
    getattr(line, who).refusing = {call}
    for _ in range(2):
        with pytest.raises(OSError, match=call):
            line.intx.disable()
        with pytest.raises(OSError, match=call):
            line.intx.enable()
    getattr(line, who).refusing = set()
    line.intx.enable()
    assert line.intx.active and len(line.kvm.pins) == 1


def test_a_closed_vm_has_no_irqfds(line: Line) -> None:
    line.intx.enable()
    line.kvm.closed = True
    line.kvm.pins.clear()
    line.kvm.log.clear()
    line.intx.disable()
    assert (line.kvm.log, line.off) == ([], True)


def test_without_descriptors_nothing_is_left(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the two can be had, the second not (EMFILE)."""
    real = os.eventfd
    made: list[int] = []

    def few(initial: int, flags: int) -> int:
        if made:
            raise OSError(24, "eventfd")
        made.append(real(initial, flags))
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", few)
        with pytest.raises(OSError, match="eventfd"):
            line.intx.enable()
    assert line.off and not line.intx.active
    line.intx.enable()
    assert line.intx.active
