"""Loading a decompressed kernel: where it was linked to, and nothing of a file that is not as expected."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_files import vmlinux

from kvmpass.boot.vmlinux import Vmlinux
from kvmpass.layout import MIB, Range

CODE = Range(16 * MIB, 8 * MIB)


class Memory:
    """Guest memory that was not zero, and has nothing outside of ``CODE``."""

    def __init__(self) -> None:
        self.bytes = bytearray(b"\xaa" * CODE.size)

    def write(self, gpa: int, data: bytes | memoryview, /) -> None:
        assert CODE.contains(Range(gpa, len(data)))
        self.bytes[gpa - CODE.start : gpa - CODE.start + len(data)] = data


def parse(data: bytes) -> Vmlinux:
    return Vmlinux.parse(memoryview(data), CODE)


def test_segments_are_loaded_at_their_physical_addresses() -> None:
    memory, kernel = Memory(), parse(vmlinux())
    kernel.write(memory)
    assert kernel.entry == 16 * MIB
    assert memory.bytes[:4096] == b"code" * 1024
    assert memory.bytes[2 * MIB : 2 * MIB + 2048] == b"data" * 512
    assert memory.bytes[2 * MIB + 2048 : 2 * MIB + 8192] == bytes(6144), "the rest of a segment is zero"
    assert set(memory.bytes[4096 : 2 * MIB]) == set(memory.bytes[2 * MIB + 8192 :]) == {0xAA}


def test_an_entry_in_the_second_segment() -> None:
    assert parse(vmlinux(entry=18 * MIB + 2047)).entry == 18 * MIB + 2047
    with pytest.raises(ValueError, match="is in no segment"):
        parse(vmlinux(entry=18 * MIB + 2048))  # beyond what the file has of it


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too short"),
        (b"\x7fELF\x01" + bytes(100), "not an ELF program"),
        (vmlinux(machine=(18, "<H", 183)), "not an ELF program"),
        (vmlinux(kind=(16, "<H", 3)), "not an ELF program"),
        (vmlinux(size=(54, "<H", 32)), "table of program headers"),
        (vmlinux(count=(56, "<H", 0)), "table of program headers"),
        (vmlinux(count=(56, "<H", 0xFFFF)), "table of program headers"),
        (vmlinux(table=(32, "<Q", 2**64 - 56)), "table of program headers"),
        (vmlinux(offset=(64 + 8, "<Q", 2**64 - 1)), "is not in the file"),
        (vmlinux(size=(64 + 32, "<Q", 2**64 - 1)), "is not in the file"),
        (vmlinux((16 * MIB, b"x" * 4096, 4095)), "is not in the file"),
        (vmlinux((16 * MIB, b"x", 9 * MIB)), "overlaps another one, or is not in"),
        (vmlinux((16 * MIB, b"x", 2**64 - 1)), "overlaps another one, or is not in"),
        (vmlinux((16 * MIB, b"x", 8192), (16 * MIB + 4096, b"y", 4096)), "overlaps another one"),
        (vmlinux((17 * MIB, b"x", 4096), entry=17 * MIB), "nothing is loaded at 0x1000000"),
        (vmlinux((15 * MIB, b"x", 4096), (16 * MIB, b"y", 4096)), "nothing is loaded at"),
        (vmlinux((16 * MIB, b"x", 4096), (2**64 - 4096, b"y", 4096)), "overlaps another one, or is not in"),
        (vmlinux(kind=(64, "<I", 4), other=(64 + 56, "<I", 4)), "nothing is loaded"),
        (vmlinux(entry=0), "is in no segment"),
    ],
)
def test_other_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(data)


@given(st.lists(st.tuples(st.integers(0, 175), st.binary(min_size=1, max_size=8)), max_size=6))
def test_a_hostile_file_is_refused_or_loaded_inside_the_kernels_range(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(vmlinux())
    for at, change in changes:
        data[at : at + len(change)] = change
    try:
        kernel = parse(bytes(data))
    except ValueError:
        return
    kernel.write(Memory())
    assert CODE.contains(Range(kernel.entry, 1))


@pytest.mark.parametrize("size", [*range(0, 176, 7), 176, 5000, 6000])
def test_truncated_files_are_refused(size: int) -> None:
    with pytest.raises(ValueError):
        parse(vmlinux()[:size])


def test_the_test_files_are_as_the_format_says() -> None:
    assert struct.unpack_from("<HH", vmlinux(), 54) == (56, 2)
