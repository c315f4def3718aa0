"""The map of guest-physical addresses, planned before the machine is constructed.

RAM is below 3 GiB and from 4 GiB up; in between are ECAM, the 32-bit window for BARs, IOAPIC and local APIC; the
64-bit window for BARs is the largest gap above RAM. Guest-physical addresses are I/O virtual addresses, so RAM and
both windows avoid every range that this host's IOMMU does not translate
(``/sys/kernel/iommu_groups/*/reserved_regions``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvmpass._dataclass import dataclass
from kvmpass.errors import LayoutError, ReservedRange

PAGE = 0x1000
MIB = 1 << 20
GIB = 1 << 30

LOW_RAM_LIMIT = 0xC000_0000
MMIO32_BASE, MMIO32_SIZE = 0xC000_0000, 0x2000_0000
ECAM_BASE, ECAM_SIZE = 0xE000_0000, 1 * MIB  # one bus
IO_WINDOW_BASE, IO_WINDOW_SIZE = 0xC000, 0x4000  # ports for BARs
IOAPIC_BASE = 0xFEC0_0000
LOCAL_APIC_BASE = 0xFEE0_0000
HIGH_RAM_BASE = 4 * GIB
MMIO64_LEAST = GIB
GUEST_BITS = 48  # four levels of nested page tables (AMD64 manual, volume 2, 15.25.3); wider hosts need a fifth


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes of a text such as ``4096``, ``512M``, ``1G`` or ``1.5G``, rounded down to pages.

    Raises ``LayoutError`` for anything else.
    """
    if isinstance(text, int):
        return text
    rest = text.strip().upper()
    rest = rest.removesuffix("IB" if rest.endswith("IB") else "B")
    unit = rest[-1:] if rest[-1:] in _UNITS else ""
    number = rest.removesuffix(unit).rstrip()
    whole, dot, fraction = number.partition(".")
    if not whole.isdecimal() or bool(dot) != fraction.isdecimal():
        raise LayoutError(f"{text!r} is not a size: write a number and K, M, G or T, such as 512M")
    return int(float(number) * _UNITS[unit]) // PAGE * PAGE


def size_text(size: int) -> str:
    """Text such as ``16 MiB``, in the largest unit of which ``size`` is a multiple."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >> power and size % (1 << power) == 0:
            return f"{size >> power} {unit}"
    return f"{size} bytes"


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """A range of addresses or offsets."""

    start: int
    """First address."""
    size: int
    """Bytes."""

    @property
    def end(self) -> int:
        """First address after the range."""
        return self.start + self.size

    @property
    def last(self) -> int:
        """Last address of the range."""
        return self.start + self.size - 1

    def overlaps(self, other: Range) -> bool:
        """Whether the ranges have an address in common."""
        return bool(self.size and other.size) and self.start < other.end and other.start < self.end

    def contains(self, other: Range) -> bool:
        """Whether all of ``other`` is in this range."""
        return self.start <= other.start and other.end <= self.end

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.last:#x}" if self.size else f"{self.start:#x} (0 bytes)"


@dataclass(frozen=True, slots=True)
class Reserved:
    """One line of a group's ``reserved_regions`` (Documentation/ABI/testing/sysfs-kernel-iommu_groups)."""

    range: Range
    """I/O virtual addresses."""
    kind: str
    """The kernel's word: ``msi``, ``reserved``, ``direct`` …"""

    def __str__(self) -> str:
        return f"{self.range} {self.kind}"


@dataclass(frozen=True, slots=True)
class Layout:
    """One machine's map of guest-physical addresses."""

    ram: tuple[Range, ...]
    """RAM, in order."""
    mmio32: Range
    """Window for BARs below 4 GiB."""
    mmio64: Range
    """Window for 64-bit BARs."""
    ecam: Range
    """Memory-mapped configuration space."""
    reserved: tuple[Reserved, ...]
    """The host's reserved regions, in order."""

    @property
    def ram_size(self) -> int:
        """Bytes of RAM."""
        return sum(part.size for part in self.ram)


# Direct-mapped regions of the firmware: the kernel maps them itself, or refuses the device. RAM need not avoid them.
_TRANSLATED_KINDS = ("direct", "direct-relaxable")


def plan_layout(ram_size: int, reserved: Iterable[Reserved] = (), phys_bits: int = 40, page: int = PAGE) -> Layout:
    """Lay out ``ram_size`` bytes of RAM and the windows for BARs.

    ``reserved``: the union of all groups' reserved regions; ``phys_bits``: the CPU's physical address width;
    ``page``: bytes of a page of the RAM, whose ranges are multiples of it. Raises ``LayoutError`` for a size that
    cannot be laid out, ``ReservedRange`` if a fixed window is reserved.
    """
    if ram_size < MIB or ram_size % page:
        size = f"{page} bytes" if page < MIB else f"{page >> 20} MiB"
        raise LayoutError(f"{ram_size:#x} bytes of RAM: at least 1 MiB, in whole pages of {size}")
    bits = min(phys_bits, GUEST_BITS)
    reserved = tuple(sorted(set(reserved), key=lambda line: line.range))
    avoid = [line.range for line in reserved if not translated(line)]
    high = Range(HIGH_RAM_BASE, max(0, (1 << bits) - HIGH_RAM_BASE))
    gaps = [gap for window in (Range(0, LOW_RAM_LIMIT), high) for gap in _gaps(window, avoid, page)]
    ram: list[Range] = []
    left = ram_size
    for gap in gaps:
        taken = min(gap.size // page * page, left)
        if taken:
            ram.append(Range(gap.start, taken))
            left -= taken
    if left:
        raise LayoutError(f"{ram_size:#x} bytes of RAM do not fit into {bits} bits of physical address")
    top = max(HIGH_RAM_BASE, ram[-1].end)
    space = Range(top, max(0, high.end - top))
    largest = max(_gaps(space, avoid, GIB), key=lambda gap: gap.size, default=Range(top, 0))
    mmio64 = Range(largest.start, largest.size // GIB * GIB)
    if mmio64.size < MMIO64_LEAST:
        raise LayoutError(
            f"{ram_size:#x} bytes of RAM leave no room for a window for BARs above {top:#x}, in {bits} bits of "
            f"physical address: the largest gap has {largest.size:#x} bytes, {MMIO64_LEAST:#x} are needed",
            "give the guest 1 GiB less memory, or more where addresses are reserved",
        )
    layout = Layout(tuple(ram), Range(MMIO32_BASE, MMIO32_SIZE), mmio64, Range(ECAM_BASE, ECAM_SIZE), reserved)
    for name, window in (("32-bit BAR window", layout.mmio32), ("ECAM", layout.ecam)):
        if line := find_reserved(window, reserved):
            raise ReservedRange(f"the {name} {window} falls into this host's reserved range {line}")
    return layout


def translated(line: Reserved) -> bool:
    """Whether memory may be in that range: the kernel maps it itself, or refuses the device."""
    return line.kind in _TRANSLATED_KINDS


def find_reserved(range_: Range, reserved: Iterable[Reserved]) -> Reserved | None:
    """Return the first untranslated range that ``range_`` overlaps; None without one."""
    return next((line for line in reserved if not translated(line) and line.range.overlaps(range_)), None)


def _gaps(window: Range, avoid: Iterable[Range], align: int = PAGE) -> Iterator[Range]:
    """Yield what is left of ``window`` without ``avoid`` (sorted), each gap starting at a multiple of ``align``."""
    at = window.start
    for hole in [*avoid, Range(window.end, 0)]:
        start = -(-at // align) * align
        end = min(hole.start, window.end)
        if end > start:
            yield Range(start, end - start)
        at = max(at, hole.end)
