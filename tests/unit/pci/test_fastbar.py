"""A BAR's registers on the fast path: as Python accesses them, where the BAR decodes, while it does."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator

import pytest
from support.fake_bar import GuestSpace, Region, Register

from kvmpass.kvm import FastFile, Fastpath, FastRegisters
from kvmpass.layout import PAGE, Range
from kvmpass.pci.bar import Bar, Trap
from kvmpass.pci.fastbar import parts

OFFSET = 3 << 40
NONE = Range(0, 0)


class FileRegion(Region):
    """One whose registers are in a file, as VFIO's are."""

    def __init__(self, size: int, fd: int, index: int = 2) -> None:
        super().__init__(size, index=index)
        self.file = FastFile(fd, OFFSET + (index << 20), size)
        os.pwrite(fd, self.data[:size], self.file.offset)

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= self.size - size
        return os.pread(self.file.fd, size, self.file.offset + offset)

    def write(self, offset: int, data: bytes) -> None:
        assert 0 <= offset <= self.size - len(data)
        os.pwrite(self.file.fd, data, self.file.offset + offset)


class Stage(GuestSpace):
    """Guest memory with a fast path, and a file for the devices' registers."""

    def __init__(self) -> None:
        super().__init__()
        self.fd, self.fastpath = os.memfd_create("kvmpass-test"), Fastpath()
        self.wiring = dataclasses.replace(self.wiring, fastpath=self.fastpath)

    def fast_bar(self, size: int, traps: tuple[Trap, ...] = (), index: int = 2, flags: int = 0) -> Bar:
        region = FileRegion(size, self.fd, index)
        self.bars.append(Bar(f"bar{index}", region, flags, self.wiring, traps, file=region.file))
        return self.bars[-1]

    def close(self) -> None:
        super().close()
        assert self.fastpath._registers == {}
        os.close(self.fd)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def emulated(data: bytearray) -> FastRegisters:
    return FastRegisters(data, bytearray(b"\xff") * len(data), -1, 0, NONE)


def trap(start: int, size: int, fast: bool = True) -> Trap:
    register = Register(size)
    register.data[:] = bytes(0x80 | at & 0x7F for at in range(size))
    return Trap(Range(start, size), register, registers=emulated(register.data) if fast else None)


def test_what_is_between_traps_is_the_files() -> None:
    file, table = FastFile(7, OFFSET, 0x100), emulated(bytearray(16))
    assert [*parts(0x100, [], None)] == []
    assert [*parts(0x100, [], file)] == [(0, file)]
    assert [*parts(0x100, [(Range(0x40, 16), table)], None)] == [(0x40, table)]
    found = [*parts(0x100, [(Range(0x60, 4), None), (Range(0x40, 16), table), (Range(0x71, 2), None)], file)]
    assert found == [
        (0, FastFile(7, OFFSET, 0x40)),
        (0x40, table),
        (0x50, FastFile(7, OFFSET + 0x50, 0x10)),
        (0x68, FastFile(7, OFFSET + 0x68, 8)),
        (0x78, FastFile(7, OFFSET + 0x78, 0x88)),
    ]
    assert [*parts(0x100, [(Range(0, 0xFC), None)], file)] == []
    assert [*parts(0x100, [(Range(4, 16), table)], None)] == [], "no quadword"


def test_what_a_malformed_device_has_is_left_to_python() -> None:
    """Emulated registers on top of each other, across the BAR's end, or beyond it."""
    file, table = FastFile(7, OFFSET, 0x80), emulated(bytearray(32))
    for start in (0x50, 0x70):
        assert [*parts(0x100, [(Range(0x60, 32), table), (Range(start, 32), None)], None)] == []
    inside = [(0, file.part(Range(0, 0x20))), (0x40, file.part(Range(0x40, 0x40)))]
    assert [*parts(0x100, [(Range(0x20, 32), table), (Range(0x28, 8), None)], file)] == inside
    for start in (0xF0, 0x100, 0x1000):
        assert [*parts(0x100, [(Range(start, 32), table)], file)] == [(0, file)]


@pytest.mark.parametrize("seed", range(6))
def test_accesses_are_those_of_python(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice((16, 64, 256, PAGE))
    traps, at = [], rng.randrange(16)
    while at + 40 < size:
        traps.append(
            trap(at, length := rng.randrange(1, 33), fast=bool(rng.randrange(2)) and not at % 8 + length % 8)
        )
        at += length + rng.randrange(64)
    bar = stage.fast_bar(size, tuple(traps))
    bar.decode(True)
    files = [
        Range(offset, part.size)
        for offset, part in parts(size, [(t.range, None) for t in traps], FastFile(0, 0, size))
    ]
    tables = [t.range for t in traps if t.registers is not None]
    reads = writes = 0
    for _ in range(3000):
        offset, length = rng.randrange(-8, size + 8), rng.choice((1, 2, 4, 8, rng.randrange(1, 10)))
        here = Range(bar.address + offset, length)
        whole = here.start % 8 + length <= 8
        in_file = whole and any(part.contains(Range(offset, length)) for part in files if offset >= 0)
        in_table = here.start % 4 + length <= 4 and any(
            t.contains(Range(offset, length)) for t in tables if offset >= 0
        )
        if rng.randrange(2):
            read = stage.fastpath.read(here.start, length)
            assert (read is not None) == (in_file or in_table), (offset, length)
            assert read in (None, bar.read(offset, length) if offset >= 0 else b"")
            reads += read is not None
        else:
            data = rng.randbytes(length)
            before = bar.read(offset, length) if 0 <= offset <= size - length else b""
            assert stage.fastpath.write(here.start, data) == in_file
            if before:
                assert bar.read(offset, length) == (data if in_file else before)
            writes += in_file
    assert [sum(kind) for kind in zip(*stage.fastpath.counts.values(), strict=True)] == [reads, writes]
    assert min(reads, writes) > 100


def test_a_failing_device_reads_as_ones(stage: Stage) -> None:
    bar = Bar("bar0", Region(64), 0, stage.wiring, file=FastFile(-1, 0, 64))
    stage.bars.append(bar)
    bar.decode(True)
    assert stage.fastpath.read(bar.address + 8, 8) == b"\xff" * 8
    assert stage.fastpath.write(bar.address + 8, bytes(8)), "lost"


def test_only_where_it_decodes(stage: Stage) -> None:
    """It moves, is sized, is switched off and on, and another one wants its place."""
    bar, home = stage.fast_bar(PAGE), stage.fastpath
    first = bar.address
    assert home.read(first, 4) is None
    bar.decode(True)
    assert home.read(first, 4) == bar.read(0, 4)
    bar.set_register(0xFFFF_FFFF, high=False)
    assert home.read(first, 4) is None
    bar.set_register(first + PAGE, high=False)
    assert (home.read(first, 4), home.read(first + PAGE, 4)) == (None, bar.read(0, 4))
    other = stage.fast_bar(PAGE, index=3)
    os.pwrite(stage.fd, b"else", OFFSET + (3 << 20))
    other.set_register(first + PAGE, high=False)
    other.decode(True)
    assert home.read(first + PAGE, 4) == bar.read(0, 4), "it has the place"
    other.decode(False)
    assert home.read(first + PAGE, 4) == bar.read(0, 4)
    other.decode(True)
    bar.decode(False)
    assert home.read(first + PAGE, 4) == b"else", "it has waited"
    other.decode(False)
    assert home.read(first + PAGE, 4) is None
    assert {*home.counts} == {" bar2", " bar3"}


def test_ports_are_left_to_python(stage: Stage) -> None:
    bar = stage.fast_bar(64, flags=1)
    bar.decode(True)
    assert stage.fastpath._registers == {}
