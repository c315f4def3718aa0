"""Loading a kernel: a bzImage made from the boot protocol's table of fields."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.kernel_files import CODE, bzimage

from kvmpass import ports
from kvmpass.boot import linux
from kvmpass.boot.cmdline import kernel_command_line
from kvmpass.boot.e820 import E820Entry, E820Type
from kvmpass.boot.linux import KernelImage, load_linux, place_kernel
from kvmpass.errors import BadKernel, NotEnoughMemory
from kvmpass.layout import GIB, MIB, Range


class Memory:
    """Guest memory that records writes, and fails for overlaps and addresses outside RAM."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.writes: list[tuple[int, bytes]] = []

    def write(self, gpa: int, data: bytes | memoryview, /) -> None:
        assert gpa >= 0
        assert gpa + len(data) <= self.size
        for other, there in self.writes:
            assert gpa + len(data) <= other or other + len(there) <= gpa, f"{gpa:#x} overlaps {other:#x}"
        self.writes.append((gpa, bytes(data)))

    def read(self, gpa: int, size: int) -> bytes:
        for start, data in self.writes:
            if start <= gpa and gpa + size <= start + len(data):
                return data[gpa - start : gpa - start + size]
        return bytes(size)


def memory_map(size: int) -> list[E820Entry]:
    return [
        E820Entry(Range(0, 0x9FC00), E820Type.USABLE),
        E820Entry(Range(0x9FC00, MIB - 0x9FC00), E820Type.RESERVED),
        E820Entry(Range(MIB, size - MIB), E820Type.USABLE),
    ]


def load(size: int = 64 * MIB, initrd: bytes | None = b"initrd", data: bytes | None = None) -> tuple[Memory, int]:
    memory = Memory(size)
    kernel = KernelImage.parse(data or bzimage())
    loaded = load_linux(memory, kernel, initrd=initrd, cmdline="console=ttyS0", e820=memory_map(size))
    assert not loaded.decompressed
    return memory, loaded.entry


def translate(memory: Memory, cr3: int, address: int) -> int:
    """Walk the page tables as a CPU does."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 511), 8))
        assert entry & 3 == 3, "not present or not writable"
        table = entry & 0x000F_FFFF_FFFF_F000
        if entry & 0x80:
            assert shift == 21
            return table | address & 0x1F_FFFF
    raise AssertionError("no 2 MiB page")


def test_entry_state() -> None:
    memory, entry = load()
    assert entry == 16 * MIB + 0x200
    state = linux.LONG_MODE
    assert memory.read(16 * MIB, len(CODE)) == CODE
    for address in (0, entry, linux.BOOT_PARAMS, 3 * GIB + 5, 4 * GIB - 1):
        assert translate(memory, state["cr3"], address) == address
    descriptors = struct.unpack("<4Q", memory.read(state["gdt"], state["gdt_limit"] + 1))
    code, data = descriptors[state["code"] // 8], descriptors[state["data"] // 8]
    assert code >> 53 & 1, "not a 64-bit code segment"
    assert code >> 43 & 1
    assert not data >> 43 & 1
    assert code >> 47 & data >> 47 & 1


def test_boot_params() -> None:
    memory, _ = load()
    page = memory.read(linux.BOOT_PARAMS, 4096)
    initrd, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(initrd, size) == b"initrd"
    assert initrd == 64 * MIB - 4096
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(cmdline, 14) == b"console=ttyS0\0"
    assert struct.unpack_from("<Q", page, 0x70) == (0xF0000,)
    assert page[0x210] == 0xFF
    assert page[0x1EF] == 0, "sentinel: not zero invalidates other fields"
    assert page[0x1E8] == 3
    assert struct.unpack_from("<QQI", page, 0x2D0 + 40) == (MIB, 63 * MIB, 1)
    assert page[0x202:0x206] == b"HdrS"


def test_without_initrd() -> None:
    memory, _ = load(initrd=None)
    assert struct.unpack_from("<II", memory.read(linux.BOOT_PARAMS, 4096), 0x218) == (0, 0)


def test_the_initrd_is_below_the_kernels_limit_and_outside_its_range() -> None:
    low_limit = bzimage(initrd_addr_max=(0x22C, "<I", 20 * MIB - 1))
    memory, _ = load(initrd=bytes(8 * MIB), data=low_limit)
    (initrd,) = struct.unpack_from("<I", memory.read(linux.BOOT_PARAMS, 4096), 0x218)
    assert initrd + 8 * MIB <= 16 * MIB


def test_a_relocatable_kernel_is_loaded_above_its_preferred_address() -> None:
    """Not below: it would relocate itself to its preferred address, beyond the end of memory there."""
    ram = [Range(MIB, 19 * MIB), Range(33 * MIB, 31 * MIB)]
    assert place_kernel(KernelImage.parse(bzimage()), ram) == Range(34 * MIB, 8 * MIB)
    for relocatable in (0, 1):
        data = bzimage(relocatable=(0x234, "<B", relocatable))
        with pytest.raises(NotEnoughMemory, match="8 MiB of guest memory") as caught:
            load(size=20 * MIB, data=data)
        assert caught.value.__notes__ == ["give the guest 24 MiB or more"]
        load(size=24 * MIB, data=data)


def test_an_initrd_that_does_not_fit() -> None:
    with pytest.raises(NotEnoughMemory, match="initrd of 60 MiB"):
        load(initrd=bytes(60 * MIB))


def _set(offset: int, form: str, value: int) -> Callable[[], bytes]:
    return lambda: bzimage(broken=(offset, form, value))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: b"", "too short"),
        (lambda: b"\x7fELF" + bytes(4096), "no Linux boot header"),
        (lambda: b"\x1f\x8b\x08" + bytes(4096), "compressed by gzip"),
        (lambda: b"\xfd7zXZ\0" + bytes(4096), "compressed by xz"),
        (lambda: b"MZ".ljust(0x38, b"\0") + b"ARM\x64" + bytes(4096), "a kernel for arm64"),
        (lambda: b"070701" + bytes(4096), "--initrd"),
        (lambda: bytes(4096), "no Linux boot header"),
        (_set(0x206, "<H", 0x020B), "protocol 2.11"),
        (_set(0x236, "<H", 0), "32-bit"),
        (_set(0x211, "<B", 0), "zImage"),
        (_set(0x230, "<I", 3), "power of two"),
        (_set(0x260, "<I", 100), "init_size"),
        (_set(0x201, "<B", 0xFF), "setup header"),
        (lambda: bzimage()[:-1024], "truncated"),
    ],
)
def test_invalid_kernels_are_refused(data: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(BadKernel, match=reason) as caught:
        KernelImage.parse(data(), "/boot/x")
    assert str(caught.value).startswith("/boot/x: ")
    assert "vmlinuz" in caught.value.__notes__[0]


@pytest.mark.parametrize("size", range(0, 16 * 1024, 509))
def test_truncated_kernels_are_refused(size: int) -> None:
    with pytest.raises(BadKernel):
        KernelImage.parse(bzimage()[:size])


def test_command_lines() -> None:
    kernel = KernelImage.parse(bzimage())
    for text in ("x" * 2048, "a\0b"):
        with pytest.raises(BadKernel, match="command line"):
            load_linux(Memory(64 * MIB), kernel, initrd=None, cmdline=text, e820=memory_map(64 * MIB))
    words = kernel_command_line(extra=["quiet", "x=1"]).split()
    assert "console=ttyS0,115200" in words
    assert {"reboot=panic_warm", "pty.legacy_count=0"} <= {*words}
    assert not any("skip_txen_test" in word for word in words), "it is for all ports: a card may need the test"
    assert words[-1] == "x=1"
    assert "quiet" not in kernel_command_line(verbose=True)


def test_from_file_and_release(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    kernel = KernelImage.from_file(path)
    assert kernel.release == "6.12.1-test"
    assert kernel.path == str(path)
    assert KernelImage.parse(bzimage(kernel_version=(0x20E, "<H", 0))).release == ""
    with pytest.raises(FileNotFoundError):
        KernelImage.from_file(tmp_path / "none")


def test_intx_lines_are_free_of_serial_lines() -> None:
    lines = {ports.intx_gsi(device, pin) for device in range(32) for pin in range(4)}
    assert lines == set(range(16, 24))
    assert lines.isdisjoint(line.irq for line in ports.SERIAL_LINES)
