"""One message-signalled interrupt between VFIO and KVM: delivered, remembered while masked, gone at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_interrupts import FakeKvm

from kvmpass.pci.vector import MessageVector, is_message

FIRST, SECOND = (0xFEE0_1000, 0x41), (0xFEE0_2000, 0x52)


@pytest.fixture
def kvm() -> FakeKvm:
    return FakeKvm()


@pytest.fixture
def vector(kvm: FakeKvm) -> Iterator[MessageVector]:
    before = descriptors()
    vector = MessageVector(kvm, kvm)  # type: ignore[arg-type]
    yield vector
    kvm.refusing.clear()
    vector.close()
    assert (kvm.routes, kvm.irqfds, descriptors()) == ({}, {}, before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("address", [0xFEE0_0000, 0xFEEF_FFFF, 0xFEE0_1000])
def test_messages(address: int) -> None:
    """AMD64 manual, volume 2, section 16.11."""
    assert is_message(address)


@pytest.mark.parametrize(
    "address", [0, 0xFEDF_FFFF, 0xFEF0_0000, 0x1_FEE0_0000, (1 << 64) - 1, 0xFEE0_0000 << 32, 0xFEE]
)
def test_everything_else_is_memory(address: int) -> None:
    assert not is_message(address)


def test_it_uses_no_resources_until_it_is_used(vector: MessageVector, kvm: FakeKvm) -> None:
    assert (vector.open, vector.connected, vector.pending) == (False, False, False)
    vector.disconnect()
    vector.close()
    assert kvm.log == []


def test_the_eventfd_is_created_once_and_not_inherited(vector: MessageVector) -> None:
    fd = vector.eventfd
    assert (vector.eventfd, vector.open, os.get_inheritable(fd), os.get_blocking(fd)) == (fd, True, False, False)


def test_what_is_raised_is_delivered(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    assert (vector.connected, kvm.messages) == (True, {FIRST})
    os.eventfd_write(vector.eventfd, 1)
    kvm.pump()
    assert (kvm.delivered, vector.pending) == ([FIRST], False)
    assert kvm.log == ["add", "irqfd"]


def test_the_same_message_again_makes_no_call(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    vector.connect(*FIRST)
    assert kvm.log == ["add", "irqfd"]


@pytest.mark.parametrize("other", [SECOND, (FIRST[0], SECOND[1]), (SECOND[0], FIRST[1])])
def test_another_message_replaces_it(vector: MessageVector, kvm: FakeKvm, other: tuple[int, int]) -> None:
    vector.connect(*FIRST)
    vector.connect(*other)
    assert (kvm.messages, len(kvm.routes)) == ({other}, 1)


def test_a_masked_interrupt_is_pending_and_delivered_later(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    vector.disconnect()
    assert (vector.connected, vector.open, vector.pending, kvm.routes) == (False, True, False, {})
    os.eventfd_write(vector.eventfd, 1)
    assert vector.pending
    assert vector.pending, "looking does not clear it"
    vector.connect(*SECOND)
    assert (kvm.delivered, vector.pending) == ([SECOND], False)


def test_connected_it_is_never_pending(vector: MessageVector, kvm: FakeKvm) -> None:
    """KVM delivers it at once; in between it is not masked."""
    vector.connect(*FIRST)
    os.eventfd_write(vector.eventfd, 1)
    assert not vector.pending
    kvm.pump()


@pytest.mark.parametrize("call", ["add", "irqfd"])
def test_what_kvm_refuses_leaves_nothing(vector: MessageVector, kvm: FakeKvm, call: str) -> None:
    kvm.refusing = {call}
    with pytest.raises(OSError, match=call):
        vector.connect(*FIRST)
    assert (vector.connected, kvm.routes, kvm.irqfds) == (False, {}, {})
    kvm.refusing = set()
    vector.connect(*FIRST)
    assert kvm.messages == {FIRST}


def test_the_irqfd_is_removed_before_its_route(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    kvm.log.clear()
    vector.disconnect()
    assert kvm.log == ["irqfd_deassign", "remove"]
    vector.disconnect()
    assert kvm.log == ["irqfd_deassign", "remove"]


def test_close_releases_everything(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    fd = vector.eventfd
    vector.close()
    assert (vector.open, vector.connected, kvm.irqfds, kvm.routes) == (False, False, {}, {})
    with pytest.raises(OSError):
        os.fstat(fd)
    vector.close()
    vector.connect(*SECOND)
    assert kvm.messages == {SECOND}, "it can be used again"


def test_descriptor_0_is_one_like_any_other(vector: MessageVector, kvm: FakeKvm) -> None:
    """Of a process that was started without a standard input."""
    saved = os.dup(0)
    os.close(0)
    try:
        assert (vector.eventfd, vector.open) == (0, True)
        assert not vector.pending
        os.eventfd_write(0, 1)
        assert vector.pending
        vector.connect(*FIRST)
        assert kvm.delivered == [FIRST]
        vector.close()
        with pytest.raises(OSError):
            os.fstat(0)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


# --- what KVM does not undo


def test_an_irqfd_that_kvm_keeps_stays_with_its_route_and_its_eventfd(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    fd = vector.eventfd
    kvm.refusing = {"irqfd_deassign"}
    for end in (vector.disconnect, vector.close, lambda: vector.connect(*SECOND)):
        with pytest.raises(OSError, match="irqfd_deassign"):
            end()
        assert (vector.connected, vector.eventfd, kvm.messages) == (True, fd, {FIRST})
        os.fstat(fd)
    kvm.refusing = set()
    vector.connect(*SECOND)
    assert (kvm.messages, len(kvm.routes)) == ({SECOND}, 1)


def test_a_route_that_kvm_keeps_is_removed_later(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    kvm.refusing = {"remove"}
    with pytest.raises(OSError, match="remove"):
        vector.disconnect()
    assert (vector.connected, kvm.irqfds, len(kvm.routes)) == (False, {}, 1)
    kvm.refusing = set()
    vector.connect(*SECOND)
    assert (kvm.messages, len(kvm.routes)) == ({SECOND}, 1)
    kvm.refusing = {"remove"}
    with pytest.raises(OSError, match="remove"):
        vector.close()
    assert (vector.open, kvm.irqfds) == (False, {}), "no irqfd: the eventfd can be closed"


def test_a_closed_vm_has_no_irqfds(vector: MessageVector, kvm: FakeKvm) -> None:
    vector.connect(*FIRST)
    kvm.closed = True
    kvm.irqfds.clear()
    kvm.log.clear()
    vector.close()
    assert (kvm.log, vector.connected, vector.open) == (["remove"], False, False)
