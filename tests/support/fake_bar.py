"""What a BAR is over, made up: the device's region, a trapped part, KVM's memslots; and a guest of them all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

from kvmpass.bus import Bus
from kvmpass.layout import MIB, PAGE, Range, plan_layout
from kvmpass.memory import GuestMemory, HostMapping, RegionKind
from kvmpass.pci import BarSpace, Wiring
from kvmpass.pci.bar import Bar, RomBar, Trap
from kvmpass.pci.barspace import BarKind
from kvmpass.vfio.device import RegionInfo

IO, IO_RESERVED, MEMORY32, MEMORY64, PREFETCHABLE = 0b01, 0b11, 0b0000, 0b0100, 0b1000
ONES = b"\xff" * 16


class OnePage(HostMapping):
    """It may say that it is larger, and still unmaps no more than its page: behind it is other memory."""

    @property
    def _span(self) -> int:
        return PAGE


class Region:
    """What VFIO has of a BAR; accesses outside of it are a caller's mistake (vfio.Region raises IndexError)."""

    def __init__(self, size: int, areas: Sequence[Range] = (), index: int = 2) -> None:
        self.info = RegionInfo(index, size, 0, True, True, tuple(areas))
        self.data = bytearray((at * 7 + 1) & 0xFF for at in range(min(size, 4 * PAGE)))
        self.mappings: dict[Range, HostMapping] = {}
        self.refusing = self.refusing_mmap = False
        self.writes: list[tuple[int, bytes]] = []

    @property
    def size(self) -> int:
        return self.info.size

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        return self.info.mmap_areas

    def read(self, offset: int, size: int) -> bytes:
        assert size and offset >= 0 and offset + size <= self.size
        if self.refusing:
            raise OSError(errno.EIO, "pread")
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        assert data and offset >= 0 and offset + len(data) <= self.size
        if self.refusing:
            raise OSError(errno.EIO, "pwrite")
        self.data[offset : offset + len(data)] = data
        self.writes.append((offset, data))

    def mmap(self, area: Range) -> HostMapping:
        assert area.start % PAGE == 0 and area.size % PAGE == 0 and area.end <= self.size
        if self.refusing_mmap:
            raise OSError(errno.ENOMEM, "mmap")
        mapping = OnePage(PAGE)
        mapping.size = area.size
        self.mappings[area] = mapping
        return mapping

    @property
    def unmapped(self) -> bool:
        return not any(mapping._address for mapping in self.mappings.values())


class Register:
    """A trapped part: 16 registers' worth of bytes."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and offset + size <= len(self.data)
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data


class Listener:
    """KVM, which may refuse a memslot, or to delete one: those whose address ``which`` picks."""

    def __init__(self) -> None:
        self.refusing = ""
        self.which: Callable[[int], bool] = lambda address: True
        self.slots: list[Any] = []

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None: ...

    def region_added(self, region: Any) -> None:
        if self.refusing in ("added", "doubtful") and self.which(region.gpa):
            if self.refusing == "doubtful":  # it may have made the slot
                self.slots.append(region)
            raise OSError(errno.ENOSPC, "KVM_SET_USER_MEMORY_REGION")
        self.slots.append(region)

    def region_removed(self, region: Any) -> None:
        if self.refusing == "removed" and self.which(region.gpa):
            raise OSError(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION")
        self.slots.remove(region)

    def holds(self, region: Any) -> bool:
        return region in self.slots


class GuestSpace:
    """Guest memory, a bus and the windows; bars made here are closed at the end."""

    def __init__(self) -> None:
        self.layout = plan_layout(MIB)
        self.memory = GuestMemory()
        self.kvm = Listener()
        self.memory.listen(self.kvm)
        self.bus = Bus("test")
        self.space = BarSpace(self.layout)
        self.wiring = Wiring(None, None, self.memory, self.bus, self.bus, self.space, ())  # type: ignore[arg-type]
        self.bars: list[Bar] = []

    def bar(self, region: Region, flags: int = MEMORY32, traps: Sequence[Trap] = ()) -> Bar:
        bar = Bar(f"bar{region.info.index}", region, flags, self.wiring, traps)
        self.bars.append(bar)
        return bar

    def rom(self, region: Region) -> RomBar:
        rom = RomBar(region, self.wiring)
        self.bars.append(rom)
        return rom

    @property
    def slots(self) -> list[Range]:
        return [region.range for region in self.memory if region.kind is RegionKind.BAR]

    def close(self) -> None:
        for bar in self.bars:
            bar.close()
        assert (self.slots, self.bus._ranges) == ([], [])
        for kind, start in ((BarKind.IO, 0xC000), (BarKind.MEMORY32, self.layout.mmio32.start)):
            assert self.space.allocate(kind, 16).start == start, "an address was not given back"
        self.memory.close()
