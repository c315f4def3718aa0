"""The guest's memory map in the boot protocol (E820)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

from kvmpass._dataclass import dataclass
from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, Layout, Range

LOW_MEMORY_END = 0x9FC00  # extended BIOS data area, VGA window and firmware follow
TABLE_LIMIT = 128  # entries in struct boot_params (E820_MAX_ENTRIES_ZEROPAGE)


class E820Type(IntEnum):
    """The type of an entry (ACPI 6.5, table 15.2)."""

    USABLE = 1
    """RAM."""
    RESERVED = 2
    """Not to be used."""


@dataclass(frozen=True, slots=True)
class E820Entry:
    """An entry of the map."""

    range: Range
    """Guest-physical addresses."""
    type: E820Type
    """Usable or reserved."""

    def pack(self) -> bytes:
        """Encode ``struct boot_e820_entry``, 20 bytes."""
        return struct.pack("<QQI", self.range.start, self.range.size, self.type)


def _merge(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for part in sorted(ranges):
        if merged and part.start <= merged[-1].end:
            start = merged[-1].start
            merged[-1] = Range(start, max(merged[-1].end, part.end) - start)
        else:
            merged.append(part)
    return merged


def e820_map(layout: Layout) -> list[E820Entry]:
    """Return the map of ``layout``, sorted, without overlaps.

    RAM is usable, except the last part of the first MiB. Reserved: the ECAM window (Linux uses ECAM only if the map
    or ACPI reserves it), and the layout's reserved ranges below 4 GiB or between RAM.

    Raises ``LayoutError`` for less than 2 MiB of RAM from address 0 on, and for too many ranges for boot_params.
    """
    ram = sorted(layout.ram)
    if not ram or ram[0].start != 0 or ram[0].size < 2 * MIB:
        raise LayoutError("a guest needs RAM from address 0 on, 2 MiB at least")
    end = max(ram[-1].end, 4 * GIB)
    usable = [Range(0, LOW_MEMORY_END), Range(MIB, ram[0].size - MIB), *ram[1:]]
    holes = [layout.ecam]
    holes += [item.range for item in layout.reserved if item.kind != "direct" and item.range.start < end]
    reserved = _merge([Range(LOW_MEMORY_END, MIB - LOW_MEMORY_END), *holes])
    for hole in reserved:
        for part in usable:
            if hole.overlaps(part):
                raise LayoutError(f"RAM at {part} overlaps the reserved range {hole}")
    entries = [E820Entry(part, E820Type.USABLE) for part in _merge(usable)]
    entries += [E820Entry(hole, E820Type.RESERVED) for hole in reserved]
    if len(entries) > TABLE_LIMIT:
        raise LayoutError(f"the memory map has {len(entries)} ranges, the boot protocol takes {TABLE_LIMIT}")
    return sorted(entries, key=lambda entry: entry.range.start)
