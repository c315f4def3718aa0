"""Peer-to-peer: an edu device's DMA engine copies into and out of a BAR of another assigned device, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.witness import Edu, pattern

from kvmpass import host
from kvmpass.layout import PAGE, Range
from kvmpass.machine import Machine
from kvmpass.memory import RegionKind

pytestmark = pytest.mark.amdvi(profile="odd")

SCRATCH = 0x10_0000
SHARED = 2  # ivshmem's BAR with the shared memory


class Bench:
    """A machine with an edu, and a device whose BAR is memory."""

    def __init__(self, machine: Machine, edu: str, peer: str) -> None:
        self.machine = machine
        self.edu = Edu(machine.assign(edu))
        self.peer = machine.assign(peer)
        self.peer.enable()

    @property
    def bar(self) -> Range:
        """Where the guest sees the shared memory."""
        regions = [r for r in self.machine.memory if r.kind is RegionKind.BAR and r.name == f"bar{SHARED}"]
        assert len(regions) == 1
        return regions[0].range

    def copy(self, source: int, target: int) -> None:
        """16 bytes by the edu's DMA."""
        self.edu.load(source)
        self.edu.store(target)

    def check_reaches(self, offset: int) -> None:
        """Both directions at ``offset`` of the BAR."""
        memory, shared = self.machine.memory, self.peer.regions[SHARED]
        data, other = pattern(), pattern()
        memory.write(SCRATCH, data)
        self.copy(SCRATCH, self.bar.start + offset)
        assert shared.read(offset, 16) == data
        shared.write(offset, other)
        self.copy(self.bar.start + offset, SCRATCH)
        assert memory.read(SCRATCH, 16) == other


@pytest.fixture
def bench(edu: str, peer: str) -> Iterator[Bench]:
    with host.borrow(edu, peer), Machine(memory="8M", p2p=True) as machine:
        yield Bench(machine, edu, peer)
        machine.audit()


def test_the_first_and_the_last_page(bench: Bench) -> None:
    for offset in (0, bench.bar.size - PAGE):
        bench.check_reaches(offset)
    bench.machine.audit()
