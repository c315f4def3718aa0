"""Registers that are read without Python: what C reads is what Python reads, and nothing of what was removed."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmpass._native import lib
from kvmpass.kvm import Fastpath, FastRegisters, fastpath
from kvmpass.layout import PAGE, Range
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.vfio.device import CONFIG, Device, Region, RegionInfo
from tests.support.bare import FakeLib, bare

BASE = 0xE000_0000
OFFSET = 7 << 40  # VFIO's regions are far apart in a device's file
NONE = Range(0, 0)


@contextmanager
def file_of(data: bytes, offset: int = 0) -> Iterator[int]:
    fd = os.memfd_create("kvmpass-test")
    try:
        os.pwrite(fd, data, offset)
        yield fd
    finally:
        os.close(fd)


def emulated(data: bytes) -> FastRegisters:
    return FastRegisters(bytearray(data), bytearray(b"\xff" * len(data)), -1, 0, NONE)


def from_file(fd: int, size: int = PAGE) -> FastRegisters:
    return FastRegisters(bytearray(size), bytearray(size), fd, 0, NONE)


class Spaces:
    """Configuration spaces with random registers, of devices of either size, and where a guest reads them."""

    def __init__(self, fd: int, rng: random.Random) -> None:
        self.path, self.spaces = Fastpath(), dict[int, tuple[ConfigSpace, Range]]()
        for devfn in rng.sample(range(256), rng.randrange(1, 6)):
            size = rng.choice((256, PAGE, PAGE))
            at = OFFSET + rng.randrange(100) * PAGE
            os.pwrite(fd, rng.randbytes(size), at)
            device = bare(Device, _fd=fd, name=f"{devfn:02x}")
            info = RegionInfo(CONFIG, size, at, readable=True, writable=True, mmap_areas=())
            space = ConfigSpace(Region(device, info))
            for _ in range(rng.randrange(60)):
                length = rng.randrange(1, 17)
                space.emulate(rng.randrange(PAGE - length), rng.randbytes(length), rng.randbytes(length))
            exits = Range(rng.randrange(PAGE), rng.choice((0, 0, 4, 100)))
            self.spaces[devfn] = space, exits
            self.path.set(BASE + devfn * PAGE, space.fast_registers(fd, at, exits), "ECAM")

    def expected(self, at: int, size: int) -> bytes | None:
        """As ``PciBus`` and the function read it; None for what Python reads."""
        found = self.spaces.get(at // PAGE)
        if found is None or not 1 <= size <= 4 or at % 4 + size > 4 or found[1].overlaps(Range(at % PAGE, size)):
            return None
        return found[0].read(at % PAGE, size)


@pytest.mark.parametrize("seed", range(8))
def test_it_reads_what_python_reads(seed: int) -> None:
    """Of each byte of a page, at its ends too, in every size, while Python changes the registers."""
    rng, answered = random.Random(seed), 0
    with file_of(b"", OFFSET) as fd:
        stage = Spaces(fd, rng)
        for number in range(6000):
            devfn = rng.choice([*stage.spaces, rng.randrange(256)])
            at = devfn * PAGE + rng.choice((rng.randrange(PAGE), rng.randrange(0x100), PAGE - 1 - rng.randrange(9)))
            size = rng.choice((1, 2, 4, 8, rng.randrange(10)))
            read = stage.path.read(BASE + at, size)
            assert read == stage.expected(at, size), (hex(at), size)
            answered += read is not None
            if number % 5 == 0 and devfn in stage.spaces:
                start = rng.randrange(PAGE // 4) * 4 + rng.randrange(4)
                stage.spaces[devfn][0].write(start, rng.randbytes(rng.randrange(5 - start % 4)))
        assert stage.path.counts == {"ECAM": (answered, 0)}
        assert answered > 1000


def test_a_file_that_does_not_answer_reads_as_ones() -> None:
    """Refused, as by VFIO, or short; what is emulated is still read."""
    path = Fastpath()
    values, own = bytearray(b"abcdefgh"), bytearray(b"\0\xff\0\0\xff\xff\xff\xff")
    path.set(BASE, FastRegisters(values, own, -1, 0, NONE), "refused")
    with file_of(b"\1\2\3\4\5") as fd:
        path.set(BASE + 8, FastRegisters(values, own, fd, 2, NONE), "short")
        assert path.read(BASE, 4) == b"\xffb\xff\xff"
        assert path.read(BASE + 1, 1) == b"b"
        assert path.read(BASE + 4, 4) == b"efgh"
        assert path.read(BASE + 8, 2) == b"\3b"
        assert path.read(BASE + 8, 4) == b"\xffb\xff\xff"
    assert path.counts == {"refused": (3, 0), "short": (2, 0)}


def test_what_it_has_is_found_and_nothing_around_it() -> None:
    path = Fastpath()
    places = [BASE, BASE + 8, BASE + 0x100, 0, (1 << 64) - 8]
    for number, place in enumerate(places):
        path.set(place, emulated(bytes([number]) * 8), "here")
    for number, place in enumerate(places):
        assert path.read(place, 4) == path.read(place + 4, 4) == bytes([number]) * 4
    for absent in (8, BASE - 4, BASE + 16, BASE + 0xFC, BASE + 0x108, (1 << 64) - 12):
        assert path.read(absent, 4) is None
    path.remove(BASE + 8)
    path.remove(BASE + 8)
    assert path.read(BASE + 8, 4) is None and path.read(BASE, 4) == bytes(4)
    for place in places:
        path.remove(place)
    assert all(path.read(place, 4) is None for place in places)


def test_what_does_not_fit_is_refused() -> None:
    path, whole = Fastpath(), emulated(bytes(16))
    path.set(BASE, whole, "here")
    path.set(BASE, whole, "here")
    for place, registers in (
        (BASE + 4, emulated(bytes(8))),
        (BASE + 16, emulated(bytes(4))),
        (BASE + 16, emulated(b"")),
        (BASE + 8, emulated(bytes(8))),
        (BASE - 8, emulated(bytes(16))),
        (BASE + 16, FastRegisters(bytearray(8), bytearray(16), -1, 0, NONE)),
    ):
        with pytest.raises(ValueError, match="registers at"):
            path.set(place, registers, "here")
    path.set(BASE, emulated(b"\1" * 8), "instead")
    assert (path.read(BASE, 4), path.read(BASE + 8, 4)) == (b"\1" * 4, None)
    with pytest.raises(BufferError):
        path._registers[BASE][0].values.append(1)


class Readers:
    """Threads that read one register as fast as they can, and what they have read."""

    def __init__(self, path: Fastpath, at: int, count: int = 3) -> None:
        self.seen = set[bytes | None]()
        self.number = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(path, at)) for _ in range(count)]

    def _read(self, path: Fastpath, at: int) -> None:
        while not self._over.is_set():
            self.seen.add(path.read(at, 4))
            self.number += 1

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_file_is_not_read_after_its_removal() -> None:
    """Its number is another file's at once, as a descriptor's is; nor do readers hold up who removes it."""
    path = Fastpath()
    with file_of(b"good" * 1024) as good, file_of(b"evil" * 1024) as evil, Readers(path, BASE) as readers:
        fd, slowest, end = os.dup(good), 0.0, time.monotonic() + 1
        registers = from_file(fd)
        while time.monotonic() < end or (len(readers.seen) < 2 and time.monotonic() < end + 20):
            os.dup2(good, fd)
            path.set(BASE, registers, "here")
            started = time.monotonic()
            path.remove(BASE)
            slowest = max(slowest, time.monotonic() - started)
            os.dup2(evil, fd)
        os.close(fd)
    assert readers.seen == {b"good", None}
    assert slowest < 5


def test_a_removal_waits_for_the_reads_in_progress() -> None:
    """A file whose reads take about a millisecond, of which one is nearly always in progress."""
    path, tries, waited, shortest = Fastpath(), 30, 0.0, 1e9
    memory = bytearray(32 << 20)
    fd = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
    for _ in range(tries):
        started = time.monotonic()
        os.pread(fd, 4, 0)
        shortest = min(shortest, time.monotonic() - started)
    with Readers(path, BASE, count=1) as readers:
        for _ in range(tries):
            path.set(BASE, from_file(fd), "here")
            number = path.counts["here"][0]
            while path.counts["here"][0] < number + 2:
                time.sleep(shortest / 10)
            started = time.monotonic()
            path.remove(BASE)
            waited += time.monotonic() - started
    os.close(fd)
    assert len(memory) and len(readers.seen - {None}) == 1
    assert waited > tries * shortest / 5


def test_a_register_that_changes_is_read_whole() -> None:
    space, path = ConfigSpace(), Fastpath()
    space.emulate(0, bytes(8), b"\xff" * 8)
    path.set(BASE, space.fast_registers(-1, 0, NONE), "here")
    with Readers(path, BASE + 4) as readers:
        end = time.monotonic() + 0.5
        while time.monotonic() < end or (len(readers.seen) < 2 and time.monotonic() < end + 20):
            space.write(4, b"\xff" * 4)
            space.set(4, 0, 4)
    assert readers.seen == {bytes(4), b"\xff" * 4}


@pytest.mark.parametrize("after", [False, True])
def test_what_a_signal_has_interrupted_can_be_removed(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Its handler may raise before C has the table, and after that."""
    path = Fastpath()

    def interrupted(*arguments: Any) -> int:
        if after:
            lib.kvmpass_fastpath_set(*arguments)
        raise KeyboardInterrupt

    for change in (lambda: path.set(BASE, emulated(bytes(8)), "here"), lambda: path.remove(BASE)):
        monkeypatch.setattr(fastpath, "lib", FakeLib(kvmpass_fastpath_set=interrupted))
        with pytest.raises(KeyboardInterrupt):
            change()
        monkeypatch.undo()
        path.remove(BASE)
        assert path.read(BASE, 4) is None
        path.set(BASE, emulated(bytes(8)), "here")
        assert path.read(BASE, 4) == bytes(4)
