"""Load Linux from a bzImage or a vmlinux, with the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

Guest-physical memory below 1 MiB at the kernel's entry::

    0x06000  GDT                    0x20000  command line
    0x07000  boot_params            0xe0000  ACPI tables (kvmpass.boot.acpi)
    0x09000  page tables            0xf0000  RSDP

The kernel is at its preferred address (usually 16 MiB), the initrd as high as possible in the RAM below 4 GiB.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from kvmpass._dataclass import dataclass
from kvmpass.boot.acpi import RSDP_BASE
from kvmpass.boot.e820 import E820Entry, E820Type
from kvmpass.boot.vmlinux import FOUR_LEVELS, Vmlinux, Writes
from kvmpass.errors import BadKernel, NotEnoughMemory
from kvmpass.layout import GIB, MIB, PAGE, Range

if TYPE_CHECKING:
    from kvmpass.boot.unpacking import Unpacking

GDT_BASE = 0x6000
BOOT_PARAMS = 0x7000
PAGE_TABLES = 0x9000  # PML4, PDPT, four page directories: 6 pages
CMDLINE_BASE, CMDLINE_END = 0x20000, 0x30000

# null, unused, __BOOT_CS: 64-bit code (execute/read), __BOOT_DS: data (read/write); both flat, present, accessed.
GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

LONG_MODE = {"cr3": PAGE_TABLES, "gdt": GDT_BASE, "gdt_limit": 8 * len(GDT) - 1, "code": 0x10, "data": 0x18}
"""The first CPU's mode at the kernel's entry: arguments of ``Vcpu.enter_long_mode``."""

ENTRY_64 = 0x200  # startup_64, from the start of the protected-mode code
MINIMUM_PROTOCOL = 0x20C
XLF_KERNEL_64 = 1 << 0
LOADED_HIGH, QUIET = 1 << 0, 1 << 5
LOADER_UNDEFINED = 0xFF

HEADER_START = 0x1F1
PAYLOAD_AT = 0x248
_WANTED = "name a bzImage of a 64-bit x86 kernel, such as /boot/vmlinuz-$(uname -r)"
_ELF = b"\x7fELF"
# What arch/x86/boot/header.S has for any kernel.
_INITRD_MAX, _CMDLINE_MAX, _ALIGNMENT = 0x7FFF_FFFF, 2047, 2 * MIB


# Files that are often mistaken for a bzImage, by magic numbers (arm64: Documentation/arch/arm64/booting.rst).
_KINDS = (
    (0, b"\x1f\x8b", "compressed by gzip, as the kernels of other architectures are"),
    (0, b"\xfd7zXZ\0", "compressed by xz: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (0x38, b"ARM\x64", "a kernel for arm64"),
    (0x38, b"RSC\x05", "a kernel for RISC-V"),
    (0, b"070701", "a cpio archive: an initramfs is named with --initrd"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
)


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A bzImage and the fields of its setup header that loading needs; or a vmlinux, with such fields."""

    path: str
    """Its path, for messages."""
    header: bytes
    """The setup header, from file offset ``HEADER_START`` on."""
    payload: bytes | memoryview
    """The protected-mode code."""
    preferred: int
    """``pref_address``: the preferred load address."""
    init_size: int
    """Bytes that the kernel uses from its load address on before it reads the memory map."""
    alignment: int
    """``kernel_alignment``: bytes, a power of two."""
    relocatable: bool
    """Whether it can be loaded at another address."""
    initrd_max: int
    """``initrd_addr_max``: the highest address of an initrd."""
    cmdline_max: int
    """``cmdline_size``: bytes, without the terminating zero."""
    release: str
    """Its release, as in ``uname -r``; empty: unknown."""
    banner: str = ""
    """Its whole version: release, who has built it, number and time of the build; empty: unknown."""
    vmlinux: Vmlinux | None = None
    """What is loaded instead of ``payload``: the file was a vmlinux."""

    def compressed(self) -> memoryview:
        """Return the compressed kernel in the protected-mode code (protocol 2.08). Raises ``ValueError``."""
        offset, length = struct.unpack_from("<II", self.header, PAYLOAD_AT - HEADER_START)
        if not offset or length < 16 or offset + length > len(self.payload):
            raise ValueError("no payload")
        return memoryview(self.payload)[offset : offset + length]

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read and check a kernel: a bzImage or a vmlinux. Raises ``BadKernel``, or the ``OSError`` of reading it."""
        with Path(path).open("rb") as file:
            if file.read(len(_ELF)) == _ELF:
                return cls._from_vmlinux(file, str(path))
            file.seek(0)
            return cls.parse(file.read(), str(path))

    @classmethod
    def _from_vmlinux(cls, file: BinaryIO, path: str) -> Self:
        """Return the kernel in a vmlinux, with a setup header as that of its bzImage."""
        try:
            vmlinux = Vmlinux.read(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise BadKernel(f"{path}: not a vmlinux: {error}", _WANTED) from None
        code, banner = vmlinux.code, vmlinux.banner
        if not banner or code.start % _ALIGNMENT:
            raise BadKernel(f"{path}: an ELF file, but not a Linux kernel", _WANTED)
        page = bytearray(0x268)
        struct.pack_into("<HH4sH", page, 0x1FE, 0xAA55, 0, b"HdrS", 0x20F)
        page[0x211] = LOADED_HIGH
        struct.pack_into("<IIBBHI", page, 0x22C, _INITRD_MAX, _ALIGNMENT, 0, 21, XLF_KERNEL_64, _CMDLINE_MAX)
        struct.pack_into("<QI", page, 0x258, code.start, code.size)
        return cls(
            path,
            bytes(page[HEADER_START:]),
            b"",
            code.start,
            code.size,
            _ALIGNMENT,
            False,
            _INITRD_MAX,
            _CMDLINE_MAX,
            banner.split(" ", 1)[0],
            banner,
            vmlinux,
        )

    @classmethod
    def parse(cls, data: bytes, path: str = "kernel") -> Self:
        """Check and parse a bzImage. Raises ``BadKernel`` with the reason."""

        def bad(reason: str) -> BadKernel:
            return BadKernel(f"{path}: {reason}", _WANTED)

        for at, magic, kind in _KINDS:
            if data.startswith(magic, at):
                raise bad(kind)
        if len(data) < 0x268:
            raise bad(f"too short for a kernel: {len(data)} bytes")
        if data[0x202:0x206] != b"HdrS" or data[0x1FE:0x200] != b"\x55\xaa":
            raise bad("no Linux boot header")
        (protocol,) = struct.unpack_from("<H", data, 0x206)
        if protocol < MINIMUM_PROTOCOL:
            raise bad(f"boot protocol {protocol >> 8}.{protocol & 0xFF:02}, 2.12 or later is needed")
        (xloadflags,) = struct.unpack_from("<H", data, 0x236)
        if not data[0x211] & LOADED_HIGH:
            raise bad("a zImage, loaded low")
        if not xloadflags & XLF_KERNEL_64:
            raise bad("a 32-bit kernel: it has no 64-bit entry point")
        header_end = 0x202 + data[0x201]
        if not 0x268 <= header_end <= 0x290:
            raise bad(f"a setup header that ends at {header_end:#x}")
        start = ((data[HEADER_START] or 4) + 1) * 512
        (paragraphs,) = struct.unpack_from("<I", data, 0x1F4)
        payload = memoryview(data)[start:]  # tens of MiB, written to the guest from there
        # The field counts 16-byte units, rounded up.
        if len(payload) <= ENTRY_64 or len(payload) + 16 <= paragraphs * 16:
            raise bad(f"truncated: {len(payload)} of {paragraphs * 16} bytes of code")
        (initrd_max, alignment) = struct.unpack_from("<II", data, 0x22C)
        (cmdline_max,) = struct.unpack_from("<I", data, 0x238)
        (preferred, init_size) = struct.unpack_from("<QI", data, 0x258)
        if alignment & (alignment - 1) or not alignment:
            raise bad(f"kernel_alignment is {alignment:#x}, not a power of two")
        if init_size < len(payload):
            raise bad(f"init_size is {init_size:#x}, less than the code's {len(payload):#x}")
        banner = _banner(data, start)
        return cls(
            path,
            data[HEADER_START:header_end],
            payload,
            preferred,
            init_size,
            alignment,
            bool(data[0x234]),
            initrd_max,
            cmdline_max,
            banner.split(" ", 1)[0],
            banner,
        )


def _banner(data: bytes, setup_size: int) -> str:
    """Return ``kernel_version``, such as ``6.1.0-28-amd64 (…) #1 SMP …``."""
    (pointer,) = struct.unpack_from("<H", data, 0x20E)
    if not pointer or pointer + 0x200 >= setup_size:
        return ""
    return data[pointer + 0x200 : pointer + 0x600].split(b"\0", 1)[0].decode("latin-1")


def place_kernel(kernel: KernelImage, ram: Sequence[Range]) -> Range:
    """Place the kernel at its preferred address, else at the lowest aligned address above it, below 4 GiB.

    A relocatable kernel that is loaded below its preferred address relocates itself to it
    (Documentation/arch/x86/boot.rst, ``init_size``). Raises ``NotEnoughMemory`` if no range of ``ram`` has
    ``init_size`` bytes there.
    """
    candidates = [kernel.preferred]
    if kernel.relocatable:
        lowest = [max(part.start, kernel.preferred) for part in ram]
        candidates += [(start + kernel.alignment - 1) & -kernel.alignment for start in lowest]
    for start in candidates:
        wanted = Range(start, kernel.init_size)
        if wanted.end <= 4 * GIB and any(part.contains(wanted) for part in ram):
            return wanted
    low = max((part.size for part in ram), default=0) // MIB
    need = (kernel.preferred + kernel.init_size + MIB - 1) // MIB
    raise NotEnoughMemory(
        f"{kernel.path} needs {kernel.init_size // MIB} MiB of guest memory from {kernel.preferred:#x} on; "
        f"the largest range has {low} MiB",
        f"give the guest {need} MiB or more",
    )


def place_initrd(kernel: KernelImage, code: Range, size: int, ram: Sequence[Range]) -> Range:
    """Place an initrd of ``size`` bytes at a page, as high as RAM below 4 GiB and the kernel's limit allow.

    Not in ``code``, the kernel's range. Raises ``NotEnoughMemory``.
    """
    limit = min(kernel.initrd_max + 1, 4 * GIB)
    for part in sorted(ram, reverse=True):
        # Below the kernel only the first MiB is in use.
        for lowest, top in ((max(part.start, code.end), part.end), (part.start, min(part.end, code.start))):
            start = (min(top, limit) - size) & -PAGE
            if start >= max(lowest, MIB):
                return Range(start, size)
    available = sum(part.size for part in ram if part.start < limit) // MIB
    raise NotEnoughMemory(
        f"an initrd of {(size + MIB - 1) // MIB} MiB does not fit beside the kernel ({kernel.init_size // MIB} MiB) "
        f"in {available} MiB of guest memory below {limit:#x}",
        "give the guest more memory, or copy less into it",
    )


def page_tables() -> bytes:
    """Return PML4, PDPT and four page directories that identity-map the first 4 GiB in 2 MiB pages."""
    present_writable = 0x3
    pml4 = [PAGE_TABLES + PAGE | present_writable] + [0] * 511
    pdpt = [PAGE_TABLES + (2 + index) * PAGE | present_writable for index in range(4)] + [0] * 508
    directories = [index * 2 * MIB | present_writable | 0x80 for index in range(4 * 512)]
    return struct.pack(f"<{6 * 512}Q", *pml4, *pdpt, *directories)


def boot_params(kernel: KernelImage, code: Range, initrd: Range, e820: Sequence[E820Entry]) -> bytes:
    """Return ``struct boot_params``, 4 KiB: zero, except the setup header and the loader's fields."""
    page = bytearray(PAGE)
    page[HEADER_START : HEADER_START + len(kernel.header)] = kernel.header
    page[0x210] = LOADER_UNDEFINED
    page[0x211] &= ~QUIET & 0xFF
    struct.pack_into("<I", page, 0x214, code.start)
    struct.pack_into("<II", page, 0x218, initrd.start if initrd.size else 0, initrd.size)
    struct.pack_into("<I", page, 0x228, CMDLINE_BASE)
    struct.pack_into("<Q", page, 0x070, RSDP_BASE)
    page[0x1E8] = len(e820)
    page[0x2D0 : 0x2D0 + 20 * len(e820)] = b"".join(entry.pack() for entry in e820)
    return bytes(page)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel in guest memory."""

    entry: int
    """Where the first CPU starts, in ``LONG_MODE``, interrupts disabled, with ``BOOT_PARAMS`` in RSI."""
    decompressed: bool
    """Whether it was loaded as it was linked; else it is a bzImage, which decompresses itself."""


def load_linux(
    memory: Writes,
    kernel: KernelImage,
    *,
    initrd: bytes | memoryview | None,
    cmdline: str,
    e820: Sequence[E820Entry],
    unpacking: Unpacking | None = None,
) -> Loaded:
    """Write kernel, initrd, command line and boot_params into guest memory.

    ``unpacking``: of ``kernel``, whose result is loaded instead where it can be; else the kernel decompresses itself.

    The caller writes the ACPI tables. Raises ``BadKernel`` for an invalid command line, ``NotEnoughMemory``.
    """
    text = cmdline.encode("utf-8", "surrogateescape")
    limit = min(kernel.cmdline_max, CMDLINE_END - CMDLINE_BASE - 1)
    if len(text) > limit:
        raise BadKernel(f"a command line of {len(text)} bytes; {kernel.path} takes {limit}")
    if b"\0" in text:
        raise BadKernel("a kernel command line cannot contain a zero byte")
    ram = [entry.range for entry in e820 if entry.type is E820Type.USABLE]
    code = place_kernel(kernel, ram)
    image = initrd or b""
    place = place_initrd(kernel, code, len(image), ram) if image else Range(0, 0)

    memory.write(GDT_BASE, struct.pack(f"<{len(GDT)}Q", *GDT))
    memory.write(PAGE_TABLES, page_tables())
    memory.write(CMDLINE_BASE, text + b"\0")
    memory.write(BOOT_PARAMS, boot_params(kernel, code, place, e820))
    if image:
        memory.write(place.start, image)
    if kernel.vmlinux is not None:
        kernel.vmlinux.write(memory)
        return Loaded(kernel.vmlinux.entry, True)
    if unpacking is not None and (entry := _load_unpacked(memory, kernel, unpacking, code, ram)) is not None:
        return Loaded(entry, True)
    memory.write(code.start, kernel.payload)
    return Loaded(code.start + ENTRY_64, False)


def _load_unpacked(
    memory: Writes, kernel: KernelImage, unpacking: Unpacking, code: Range, ram: Sequence[Range]
) -> int | None:
    """Load the decompressed kernel if it can run at the address that it was linked to; return its entry point."""
    if code.start != kernel.preferred:
        unpacking.leave(f"no memory at {kernel.preferred:#x}, where it was linked to")
    elif max(part.end for part in ram) > FOUR_LEVELS:
        unpacking.leave("so much memory needs page tables of five levels")
    else:
        return unpacking.load(code, memory)
    return None
