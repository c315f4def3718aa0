"""Configuration space whose bytes are the device's or emulated: which accesses reach the device."""

from __future__ import annotations

import errno
import random

import pytest

from kvmpass.pci.configspace import ConfigSpace, guarded


class Device:
    """Registers that keep what is written, and a list of the accesses; refuses while told to."""

    def __init__(self, size: int = 4096) -> None:
        self.data = bytearray(at & 0xFF for at in range(size))
        self.accesses: list[tuple[str, int, bytes]] = []
        self.refusing = False

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        assert offset + size <= self.size
        if self.refusing:
            raise OSError(errno.EIO, "pread")
        data = bytes(self.data[offset : offset + size])
        self.accesses.append(("read", offset, data))
        return data

    def write(self, offset: int, data: bytes) -> None:
        assert isinstance(data, bytes) and data and offset + len(data) <= self.size
        if self.refusing:
            raise OSError(errno.EIO, "pwrite")
        self.data[offset : offset + len(data)] = data
        self.accesses.append(("write", offset, data))

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.read(offset, size), "little")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def space(device: Device) -> ConfigSpace:
    return ConfigSpace(device)


def test_bytes_that_are_not_emulated_are_the_devices(device: Device, space: ConfigSpace) -> None:
    assert space.read(0x40, 4) == b"\x40\x41\x42\x43"
    space.write(0x40, b"new!")
    assert device.accesses == [("read", 0x40, b"\x40\x41\x42\x43"), ("write", 0x40, b"new!")]
    assert (space.device_size, space.device_int(0x40, 2)) == (4096, 0x656E)
    assert space.read(0xFFF, 1) == b"\xff"


def test_what_is_emulated_never_reaches_the_device(device: Device, space: ConfigSpace) -> None:
    space.emulate(0x40, b"abcd")
    assert space.read(0x40, 4) == b"abcd"
    space.write(0x40, b"\0\0\0\0")
    assert space.read(0x40, 4) == b"abcd", "nothing of it can be written"
    assert device.accesses == []
    assert (space.read(0x3F, 1), space.read(0x44, 1)) == (b"\x3f", b"\x44"), "and nothing around it is emulated"


def test_only_writable_bits_change(space: ConfigSpace) -> None:
    space.emulate(0x40, b"\xa5\xa5\xa5\xa5", b"\x0f\xf0")
    space.write(0x40, b"\xff\xff\xff\xff")
    assert space.read(0x40, 4) == b"\xaf\xf5\xa5\xa5"
    space.write(0x40, b"\0\0\0\0")
    assert space.read(0x40, 4) == b"\xa0\x05\xa5\xa5"
    assert space.get(0x40, 4) == 0xA5A5_05A0
    space.emulate(0x40, b"\0\0\0\0")
    space.write(0x40, b"\xff\xff\xff\xff")
    assert space.get(0x40, 4) == 0, "emulated again, without writable bits"


def test_set_changes_read_only_bits(space: ConfigSpace) -> None:
    space.emulate(0x40, bytes(4))
    space.set(0x40, 0x1234, 2)
    assert space.read(0x40, 4) == b"\x34\x12\0\0"
    assert (space.get(0x40, 2), space.get(0x41, 2)) == (0x1234, 0x12)


def test_a_mixed_read_combines_both_sources(device: Device, space: ConfigSpace) -> None:
    space.emulate(0x41, b"X")
    space.emulate(0x43, b"Y")
    assert space.read(0x40, 4) == b"\x40X\x42Y"
    assert [(what, at) for what, at, _ in device.accesses] == [("read", 0x40)], "in one access"


def test_a_mixed_write_goes_to_the_device_in_runs(device: Device, space: ConfigSpace) -> None:
    space.emulate(0x42, b"\0", b"\xff")
    space.write(0x40, b"abcde")
    assert device.accesses == [("write", 0x40, b"ab"), ("write", 0x43, b"de")]
    assert space.get(0x42, 1) == ord("c")
    device.accesses.clear()
    space.emulate(0x50, b"\0\0", b"\xff\xff")
    space.write(0x4F, b"abcd")
    assert device.accesses == [("write", 0x4F, b"a"), ("write", 0x52, b"d")]
    device.accesses.clear()
    space.write(0x50, b"xyz")
    assert device.accesses == [("write", 0x52, b"z")]
    space.write(0x4E, b"pqr")
    assert device.accesses[1:] == [("write", 0x4E, b"pq")]


def test_random_accesses_do_not_mix_both(device: Device, space: ConfigSpace) -> None:
    """Against a model of one byte at a time."""
    rng = random.Random(7)
    ours: dict[int, tuple[int, int]] = {}
    for _ in range(40):
        at = rng.randrange(0x100)
        ours[at] = rng.randrange(256), rng.randrange(256)
        space.emulate(at, bytes([ours[at][0]]), bytes([ours[at][1]]))
    for _ in range(400):
        at, size = rng.randrange(0x100), rng.randrange(1, 9)
        theirs = bytes(device.data)
        expected = bytes(ours[n][0] if n in ours else theirs[n] for n in range(at, at + size))
        assert space.read(at, size) == expected
        data = rng.randbytes(size)
        space.write(at, data)
        for n, byte in enumerate(data, at):
            if n in ours:
                value, mask = ours[n]
                ours[n] = value & ~mask | byte & mask, mask
                assert device.data[n] == theirs[n]
            else:
                assert device.data[n] == byte


def test_what_vfio_refuses_reads_as_ones_and_is_lost(device: Device, space: ConfigSpace) -> None:
    space.emulate(0x42, b"\5", b"\xff")
    device.refusing = True
    assert space.read(0x40, 4) == b"\xff\xff\5\xff"
    space.write(0x40, b"\1\2\3\4")
    assert space.read(0x40, 4) == b"\xff\xff\3\xff"
    assert space.device_int(0x40, 4) == 0
    device.refusing = False
    assert space.read(0x40, 4) == b"\x40\x41\3\x43"


def test_a_device_of_256_bytes_has_zeroes_above_them() -> None:
    device = Device(256)
    space = ConfigSpace(device)
    assert space.read(0x100, 0xF00) == bytes(0xF00)
    space.write(0x100, b"\xff" * 0xF00)
    assert space.read(0x100, 0xF00) == bytes(0xF00)
    assert device.accesses == []
    assert space.read(0xFC, 4) == b"\xfc\xfd\xfe\xff"
    space.write(0xFC, b"last")
    assert device.accesses[-1] == ("write", 0xFC, b"last")
    assert space.device_size == 256


def test_only_oserror_is_handled_for_the_device() -> None:
    def refused() -> bytes:
        raise OSError(errno.EIO, "pread")

    def broken() -> bytes:
        raise IndexError

    assert guarded(refused, b"\xff") == b"\xff"
    assert guarded(lambda: b"\1", b"\xff") == b"\1"
    with pytest.raises(IndexError):
        guarded(broken, b"\xff")


def test_a_write_returns_whether_vfio_accepted_it(device: Device, space: ConfigSpace) -> None:
    space.emulate(0x41, b"\0", b"\xff")
    assert space.write(0x40, b"abc") is True
    assert space.write(0x41, b"x") is True
    device.refusing = True
    assert space.write(0x41, b"y") is True, "that is ours"
    for at, data in ((0x40, b"a"), (0x42, b"c"), (0x40, b"ab"), (0x41, b"bc"), (0x40, b"abc")):
        assert space.write(at, data) is False
    device.refusing = False
    real = device.write

    def first_refused(offset: int, data: bytes) -> None:
        if offset == 0x40:
            raise OSError(errno.EIO, "pwrite")
        real(offset, data)

    device.write = first_refused  # type: ignore[method-assign]
    assert space.write(0x40, b"pqr") is False
    assert device.data[0x42] == ord("r"), "the rest of it is written"


def test_without_a_device_all_is_emulated() -> None:
    space = ConfigSpace()
    assert (space.device_size, space.device_int(0, 4), space.read(0, 4096)) == (0, 0, bytes(4096))
    space.emulate(0x40, b"\1\2", b"\xf0")
    assert space.write(0x3F, b"\xff" * 4), "no other device is accessed"
    assert space.read(0x3F, 4) == b"\0\xf1\2\0"
