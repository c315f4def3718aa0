"""Registers that KVM writes to an eventfd: handed over while the BAR decodes, wherever the guest has moved it."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_bar import MEMORY32, GuestSpace, Region
from support.fake_interrupts import FakeKvm

from kvmpass.layout import PAGE
from kvmpass.pci.bar import Bar, Doorbell


class Stage:
    """A BAR of two pages with two doorbells, on its first and its last bytes."""

    def __init__(self) -> None:
        self.guest, self.kvm = GuestSpace(), FakeKvm()
        vm: Any = self.kvm
        self.guest.wiring = dataclasses.replace(self.guest.wiring, vm=vm)
        self.eventfds = [os.eventfd(0), os.eventfd(0)]
        self.offsets = (0, 2 * PAGE - 4)
        self.region = Region(2 * PAGE)
        self.bar = self.make()

    def make(self) -> Bar:
        doorbells = [Doorbell(offset, 4, fd) for offset, fd in zip(self.offsets, self.eventfds, strict=True)]
        bar = Bar("bar0", self.region, MEMORY32, self.guest.wiring, doorbells=doorbells)
        self.guest.bars.append(bar)
        return bar

    def at(self, address: int) -> dict[tuple[int, int], int]:
        """What KVM has to have while the BAR decodes at ``address``."""
        return {(address + offset, 4): fd for offset, fd in zip(self.offsets, self.eventfds, strict=True)}

    def close(self) -> None:
        self.guest.close()
        for eventfd in self.eventfds:
            os.close(eventfd)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()
    assert stage.kvm.ioeventfds == {}


def test_doorbells_exist_while_the_bar_decodes(stage: Stage) -> None:
    bar, kvm = stage.bar, stage.kvm
    assert kvm.ioeventfds == {}
    for _ in range(2):
        bar.decode(True)
        bar.decode(True)
        assert kvm.ioeventfds == stage.at(bar.address)
        bar.decode(False)
        assert kvm.ioeventfds == {}
    bar.decode(True)
    bar.close()
    assert kvm.ioeventfds == {}


def test_doorbells_follow_the_bar(stage: Stage) -> None:
    """Moved, moved to where nothing decodes, sized, and put back."""
    bar, kvm = stage.bar, stage.kvm
    bar.decode(True)
    home = bar.address
    bar.set_register(home + 4 * PAGE, False)
    assert kvm.ioeventfds == stage.at(home + 4 * PAGE)
    bar.set_register(0xFFFF_FFFF, False)
    assert kvm.ioeventfds == {}
    bar.set_register(0x1000, False)  # in no window
    assert kvm.ioeventfds == {}
    bar.set_register(home, False)
    assert kvm.ioeventfds == stage.at(home)


def test_a_bar_that_waits_for_addresses_has_none(stage: Stage) -> None:
    other = stage.make()
    stage.bar.decode(True)
    other.decode(True)
    home = other.address
    other.set_register(stage.bar.address, False)
    assert stage.kvm.ioeventfds == stage.at(stage.bar.address), "those of the BAR that was there first"
    stage.bar.decode(False)
    other.retry()
    assert stage.kvm.ioeventfds == stage.at(other.address)
    assert other.address != home


def test_one_that_kvm_refuses_exits(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """The BAR decodes without it, and takes back only what KVM has."""
    bar, kvm = stage.bar, stage.kvm
    kvm.ioeventfds[bar.address, 4] = 99  # the first is in use: EEXIST
    with caplog.at_level(logging.WARNING):
        bar.decode(True)
    assert kvm.ioeventfds == stage.at(bar.address) | {(bar.address, 4): 99}
    assert "KVM_IOEVENTFD" in caplog.text
    bar.write(0, b"\1\2\3\4")
    assert stage.region.writes == [(0, b"\1\2\3\4")]
    bar.decode(False)
    assert kvm.ioeventfds == {(bar.address, 4): 99}
    kvm.ioeventfds.clear()


def test_one_that_kvm_keeps_delays_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    bar, kvm = stage.bar, stage.kvm
    bar.decode(True)
    kept: list[int] = []
    forget = kvm.ioeventfd_deassign

    def deassign(eventfd: int, address: int, size: int) -> None:
        forget(eventfd, address, size)
        kept.append(eventfd)
        raise OSError(errno.ENOMEM, "KVM_IOEVENTFD")

    monkeypatch.setattr(kvm, "ioeventfd_deassign", deassign)
    bar.decode(False)
    assert kept == stage.eventfds, "each of them was tried"
    assert stage.guest.bus._ranges == []


def test_a_closed_vm_is_not_asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.bar.decode(True)
    monkeypatch.setattr(stage.kvm, "closed", True, raising=False)
    stage.bar.close()
    assert "ioeventfd_deassign" not in stage.kvm.log
    stage.kvm.ioeventfds.clear()
