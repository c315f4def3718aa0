"""The guest's PCI bus 0: its host bridge, its slots, and configuration space by ports and by ECAM."""

from __future__ import annotations

from kvmpass.errors import LayoutError
from kvmpass.pci.function import PciFunction
from kvmpass.pciregs import CONVENTIONAL_SIZE, EXTENDED_SIZE

SLOTS = 32
FUNCTIONS = 8


class HostBridge:
    """A host bridge that has nothing but a name: vendor 1b36, device 0008 (a generic PCI Express host bridge)."""

    _HEADER = bytes.fromhex("361b0800 00000000 00000006 00000000".replace(" ", ""))

    def config_read(self, offset: int, size: int) -> bytes:
        return self._HEADER.ljust(EXTENDED_SIZE, b"\0")[offset : offset + size]

    def config_write(self, offset: int, data: bytes) -> None:
        pass

    def set_multifunction(self, several: bool) -> None:
        pass

    def close(self) -> None:
        pass


class PciBus:
    """Bus 0 with the host bridge in slot 0. Absent functions read as all ones."""

    def __init__(self) -> None:
        self._functions: dict[int, PciFunction] = {0: HostBridge()}

    @property
    def functions(self) -> list[PciFunction]:
        """What is plugged."""
        return list(self._functions.values())

    def free_slot(self) -> int:
        """The first empty slot. Raises ``LayoutError`` if there is none."""
        taken = {devfn >> 3 for devfn in self._functions}
        slot = next((n for n in range(SLOTS) if n not in taken), None)
        if slot is None:
            raise LayoutError(f"all {SLOTS} slots of the guest's PCI bus are taken", "unplug a device first")
        return slot

    def plug(self, function: PciFunction, slot: int, number: int = 0) -> None:
        """Put ``function`` into a place. Raises ``LayoutError`` if it is taken."""
        devfn = slot << 3 | number
        if not (0 <= slot < SLOTS and 0 <= number < FUNCTIONS) or devfn in self._functions:
            raise LayoutError(f"slot {slot}, function {number} of the guest's PCI bus cannot be had")
        self._functions = {**self._functions, devfn: function}
        self._count(slot)

    def unplug(self, function: PciFunction) -> None:
        """Take ``function`` out, if it is in."""
        slots = {devfn >> 3 for devfn, other in self._functions.items() if other is function}
        self._functions = {devfn: other for devfn, other in self._functions.items() if other is not function}
        for slot in slots:
            self._count(slot)

    def _count(self, slot: int) -> None:
        first = self._functions.get(slot << 3)
        if first is not None:
            first.set_multifunction(sum(devfn >> 3 == slot for devfn in self._functions) > 1)

    def _find(self, bus: int, devfn: int) -> PciFunction | None:
        return self._functions.get(devfn) if bus == 0 else None

    def read(self, bus: int, devfn: int, offset: int, size: int) -> bytes:
        """Any access that stays inside the function's 4096 bytes; split at dwords, as hardware does."""
        function = self._find(bus, devfn)
        if function is None or offset + size > EXTENDED_SIZE:
            return b"\xff" * size
        return b"".join(function.config_read(at, length) for at, length in _dwords(offset, size))

    def write(self, bus: int, devfn: int, offset: int, data: bytes) -> None:
        function = self._find(bus, devfn)
        if function is None or offset + len(data) > EXTENDED_SIZE:
            return
        for at, length in _dwords(offset, len(data)):
            function.config_write(at, data[at - offset : at - offset + length])


def _dwords(offset: int, size: int) -> list[tuple[int, int]]:
    parts = []
    while size:
        length = min(size, 4 - offset % 4)
        parts.append((offset, length))
        offset, size = offset + length, size - length
    return parts


class ConfigPorts:
    """Ports 0xcf8 (address) and 0xcfc (data): 256 bytes of each function."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus
        self._address = 0

    def read(self, offset: int, size: int) -> bytes:
        if offset < 4:
            return self._address.to_bytes(4, "little")[offset : offset + size].ljust(size, b"\xff")
        if not self._enabled:
            return b"\xff" * size
        register = (self._address & 0xFC) + offset - 4
        if register + size > CONVENTIONAL_SIZE:
            return b"\xff" * size
        return self._bus.read(self._address >> 16 & 0xFF, self._address >> 8 & 0xFF, register, size)

    def write(self, offset: int, data: bytes) -> None:
        if offset < 4:
            if offset == 0 and len(data) == 4:  # narrower accesses do not reach the register
                self._address = int.from_bytes(data, "little") & 0x80FF_FFFC
            return
        register = (self._address & 0xFC) + offset - 4
        if self._enabled and register + len(data) <= CONVENTIONAL_SIZE:
            self._bus.write(self._address >> 16 & 0xFF, self._address >> 8 & 0xFF, register, data)

    @property
    def _enabled(self) -> bool:
        return bool(self._address & 1 << 31)


class Ecam:
    """The enhanced mechanism: 4096 bytes of each function, memory mapped (PCI Express base, section 7.2.2)."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> bytes:
        return self._bus.read(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, size)

    def write(self, offset: int, data: bytes) -> None:
        self._bus.write(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, data)
