"""Loading a decompressed kernel: where it was linked to, and nothing of a file that is not as expected."""

from __future__ import annotations

import io
import struct
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_files import bzimage, vmlinux

from kvmpass.boot.linux import KernelImage, boot_params
from kvmpass.boot.vmlinux import Vmlinux, Writes, load
from kvmpass.errors import BadKernel
from kvmpass.layout import MIB, Range

CODE = Range(16 * MIB, 8 * MIB)


class Memory:
    """Guest memory that was not zero, and has nothing outside of ``CODE``."""

    def __init__(self) -> None:
        self.bytes = bytearray(b"\xaa" * CODE.size)

    def write(self, gpa: int, data: bytes | memoryview, /) -> None:
        assert CODE.contains(Range(gpa, len(data)))
        self.bytes[gpa - CODE.start : gpa - CODE.start + len(data)] = data


class Content:
    """A file that comes in pieces of ``each`` bytes, in a buffer that is used again."""

    def __init__(self, data: bytes, each: int) -> None:
        self.size, self._data, self._each = len(data), data, each

    def pieces(self) -> Generator[memoryview]:
        buffer = bytearray(self._each)
        for at in range(0, self.size, self._each):
            piece = self._data[at : at + self._each]
            buffer[:] = piece.ljust(self._each, b"?")
            yield memoryview(buffer)[: len(piece)]

    def close(self) -> None:
        raise AssertionError("who has it closes it")


def loaded(data: bytes, memory: Writes | None = None, each: int = MIB, code: Range = CODE) -> int:
    return load(Content(data, each), code, memory or Memory())


@pytest.mark.parametrize("each", [176, 1000, 4096, 4096 + 176, MIB])
def test_segments_are_loaded_at_their_physical_addresses(each: int) -> None:
    memory = Memory()
    assert loaded(vmlinux(), memory, each) == 16 * MIB
    assert memory.bytes[:4096] == b"code" * 1024
    assert memory.bytes[2 * MIB : 2 * MIB + 2048] == b"data" * 512
    assert memory.bytes[2 * MIB + 2048 : 2 * MIB + 8192] == bytes(6144), "the rest of a segment is zero"
    assert set(memory.bytes[4096 : 2 * MIB]) == set(memory.bytes[2 * MIB + 8192 :]) == {0xAA}


def test_an_entry_in_the_second_segment() -> None:
    assert loaded(vmlinux(entry=18 * MIB + 2047)) == 18 * MIB + 2047
    with pytest.raises(ValueError, match="is in no segment"):
        loaded(vmlinux(entry=18 * MIB + 2048))  # beyond what the file has of it


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
        (vmlinux((16 * MIB, b"x", 9 * MIB)), "is not in"),
        (vmlinux((16 * MIB, b"x", 2**64 - 1)), "is not in"),
        (vmlinux((16 * MIB, b"x", 8192), (16 * MIB + 4096, b"y", 4096)), "overlap"),
        (vmlinux((17 * MIB, b"x", 4096), entry=17 * MIB), "nothing is loaded at 0x1000000"),
        (vmlinux((15 * MIB, b"x", 4096), (16 * MIB, b"y", 4096)), "nothing is loaded at"),
        (vmlinux((16 * MIB, b"x", 4096), (2**64 - 4096, b"y", 4096)), "is not in"),
        (vmlinux(kind=(64, "<I", 4), other=(64 + 56, "<I", 4)), "is in no segment"),
        (vmlinux(entry=0), "is in no segment"),
    ],
)
def test_other_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        loaded(data)


@given(st.lists(st.tuples(st.integers(0, 175), st.binary(min_size=1, max_size=8)), max_size=6), st.integers(1, 7000))
def test_a_hostile_file_is_refused_or_loaded_inside_the_kernels_range(
    changes: list[tuple[int, bytes]], each: int
) -> None:
    data = bytearray(vmlinux())
    for at, change in changes:
        data[at : at + len(change)] = change
    with suppress(ValueError):
        assert CODE.contains(Range(loaded(bytes(data), each=each), 1))


@pytest.mark.parametrize("size", [*range(0, 176, 7), 176, 5000, 6000])
def test_truncated_files_are_refused(size: int) -> None:
    with pytest.raises(ValueError):
        loaded(vmlinux()[:size])


BANNER = b"Linux version 6.12.1-test (me@here) (gcc) #2 SMP Mon\n\0"


def elf(content: bytes = BANNER, **fields: tuple[int, str, int]) -> bytes:
    """A vmlinux with symbols behind what is loaded."""
    return vmlinux((16 * MIB, b"code" * 1024, 4096), (18 * MIB, content, 8192), **fields) + bytes(100_000)


def test_a_vmlinux_is_read_without_its_symbols(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf())
    kernel = KernelImage.from_file(path)
    assert kernel.release == "6.12.1-test"
    assert kernel.banner == "6.12.1-test (me@here) (gcc) #2 SMP Mon"
    found = kernel.vmlinux
    assert found is not None and len(found.content) == 4096 + len(BANNER)
    assert found.code == Range(16 * MIB, 2 * MIB + 8192)
    path.write_bytes(b"built again")
    memory = Memory()
    found.write(memory)
    assert memory.bytes[:4096] == b"code" * 1024
    assert memory.bytes[2 * MIB : 2 * MIB + 8192] == BANNER.ljust(8192, b"\0")
    with pytest.raises(ValueError, match="no payload"):
        kernel.compressed()


def test_a_vmlinux_has_the_setup_header_of_a_bzimage(tmp_path: Path) -> None:
    """Which is that of the bzImage in this test, but for what they differ in."""
    (tmp_path / "vmlinux").write_bytes(elf())
    kernel = KernelImage.from_file(tmp_path / "vmlinux")
    code = Range(kernel.preferred, kernel.init_size)
    page = boot_params(kernel, code, Range(0, 0), [])
    image = KernelImage.parse(bzimage(init_size=(0x260, "<I", kernel.init_size), relocatable=(0x234, "<B", 0)))
    wanted = bytearray(boot_params(image, code, Range(0, 0), []))
    for start, end in ((0x1F1, 0x1F8), (0x200, 0x202), (0x20E, 0x210), (0x234, 0x238)):
        wanted[start:end] = page[start:end]
    assert page[0x235:0x238] == b"\x15\x01\0"
    assert bytes(wanted[:0x268]) == page[:0x268]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (elf(b"no banner"), "an ELF file, but not a Linux kernel"),
        (b"\x7fELF", "not a vmlinux: too short"),
        (elf()[:4000], "not a vmlinux: the content of the segment"),
        (elf(start=(24, "<Q", 0)), "not a vmlinux: the entry point 0x0 is in no segment"),
        (vmlinux((4096, BANNER, 4096), entry=4096), "not a vmlinux: no kernel is loaded at"),
        (vmlinux((MIB, BANNER, 4096), entry=MIB), "an ELF file, but not a Linux kernel"),
        (vmlinux((16 * MIB, BANNER, 2**30 + 1)), "not a vmlinux: no kernel is loaded at"),
        (vmlinux((16 * MIB, BANNER, 4096), (2**63, b"x", 2**63)), "not a vmlinux: no kernel is loaded at"),
    ],
)
def test_other_elf_files_are_no_kernels(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(BadKernel, match=f"file: {reason}") as refused:
        KernelImage.from_file(tmp_path / "file")
    assert "name a bzImage" in refused.value.__notes__[0]


def test_a_file_that_becomes_shorter_while_it_is_read() -> None:
    for size in (100, 4000):
        with pytest.raises(ValueError, match="became shorter"):
            Vmlinux.read(io.BytesIO(elf()[:size]), len(elf()))


def test_headers_that_are_not_in_the_first_piece() -> None:
    with pytest.raises(ValueError, match="became shorter"):
        loaded(vmlinux(), each=64)


def test_the_test_files_are_as_the_format_says() -> None:
    assert struct.unpack_from("<HH", vmlinux(), 54) == (56, 2)


def test_zeros_are_written_without_holding_them() -> None:
    """A file may ask for a GiB of them."""
    sizes: list[int] = []

    class Counts:
        def write(self, gpa: int, data: bytes | memoryview, /) -> None:
            assert gpa == 16 * MIB + sum(sizes)
            sizes.append(len(data))

    code = Range(16 * MIB, 900 * MIB)
    data = vmlinux((16 * MIB, b"code", 900 * MIB - 3))
    loaded(data, Counts(), code=code)
    assert sum(sizes) == 900 * MIB - 3 and max(sizes) <= MIB
