"""The guest's PCI bus 0: its host bridge, its slots, and configuration space by ports and by ECAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import LayoutError
from kvmpass.kvm import FastRegisters
from kvmpass.pci.function import PciFunction
from kvmpass.pciregs import CONVENTIONAL_SIZE, EXTENDED_SIZE

log = limited_log(__name__)

SLOTS = 32
"""Device numbers of a bus."""
FUNCTIONS = 8
"""Functions of a device."""


class HostBridge:
    """A ``PciFunction`` with an identity only: vendor 1b36, device 0008 (a generic PCI Express host bridge)."""

    # Ones from the end of a conventional function's space on: it has no extended space (Linux: pci_cfg_space_size).
    _IMAGE = (
        bytes.fromhex("361b0800 00000000 00000006 00000000")
        .ljust(CONVENTIONAL_SIZE, b"\0")
        .ljust(EXTENDED_SIZE, b"\xff")
    )

    def config_read(self, offset: int, size: int) -> bytes:
        """See ``PciFunction``."""
        return self._IMAGE[offset : offset + size]

    def config_image(self) -> bytes:
        """See ``PciFunction``."""
        return self._IMAGE

    def config_write(self, offset: int, data: bytes) -> None:
        """Drop the write."""

    def set_multifunction(self, several: bool) -> None:
        """Do nothing: the slot has one function."""

    def close(self) -> None:
        """Do nothing."""


class PciBus:
    """Bus 0 with the host bridge in slot 0. Absent functions read as ones.

    Synchronization: with the bus lock held.
    """

    def __init__(self) -> None:
        self._functions: dict[int, PciFunction] = {0: HostBridge()}
        self._observer: Callable[[int], None] = _ignore

    @property
    def functions(self) -> list[PciFunction]:
        """The functions on the bus."""
        return list(self._functions.values())

    @property
    def present(self) -> list[int]:
        """Device and function numbers (devfn) of the functions on the bus."""
        return list(self._functions)

    def observe(self, observer: Callable[[int], None] | None) -> None:
        """Call ``observer`` with device and function number (devfn) when what a function says may have changed."""
        self._observer = observer or _ignore

    def image(self, devfn: int) -> bytes | FastRegisters | None:
        """Return the 4096 bytes that a guest reads of a function, ones for an absent one; or ``config_image``'s."""
        function = self._functions.get(devfn)
        return _ABSENT if function is None else function.config_image()

    def free_slot(self, order: Iterable[int] = range(SLOTS)) -> int:
        """Return the first empty slot in ``order``. Raises ``LayoutError`` if there is none."""
        used = {devfn >> 3 for devfn in self._functions}
        slot = next((n for n in order if n not in used), None)
        if slot is None:
            raise LayoutError(f"all {SLOTS} slots of the guest's PCI bus are in use", "unplug a device first")
        return slot

    def plug(self, function: PciFunction, slot: int, number: int = 0) -> None:
        """Add ``function`` at a device and function number. Raises ``LayoutError`` if that is in use or invalid.

        Raises ``OSError`` if KVM keeps memory that says that it is absent. Then nothing has changed.
        """
        devfn = slot << 3 | number
        if not (0 <= slot < SLOTS and 0 <= number < FUNCTIONS) or devfn in self._functions:
            raise LayoutError(f"slot {slot}, function {number} of the guest's PCI bus is unavailable")
        self._functions = {**self._functions, devfn: function}
        with undo_on_error(partial(self.unplug, function)):
            self._count(slot)
            self._observer(devfn)

    def unplug(self, function: PciFunction) -> None:
        """Remove ``function``: its registers are not read any more. Idempotent.

        Raises ``OSError`` if KVM keeps memory with what it says. Runs every step even if one fails.
        """
        removed = [devfn for devfn, other in self._functions.items() if other is function]
        self._functions = {devfn: other for devfn, other in self._functions.items() if other is not function}
        steps = (
            partial(call, at)
            for devfn in removed
            for call, at in ((self._observer, devfn), (self._count, devfn >> 3))
        )
        run_all(*steps)

    def _count(self, slot: int) -> None:
        first = self._functions.get(slot << 3)
        if first is not None:
            first.set_multifunction(sum(devfn >> 3 == slot for devfn in self._functions) > 1)
            self._observer(slot << 3)

    def _find(self, bus: int, devfn: int) -> PciFunction | None:
        return self._functions.get(devfn) if bus == 0 else None

    def read(self, bus: int, devfn: int, offset: int, size: int) -> bytes:
        """Read configuration space, dword by dword; ones outside of a function's 4096 bytes."""
        function = self._find(bus, devfn)
        if function is None or offset + size > EXTENDED_SIZE:
            return b"\xff" * size
        if (offset & 3) + size <= 4:  # nearly every access
            return function.config_read(offset, size)
        return b"".join(function.config_read(at, length) for at, length in _dwords(offset, size))

    def write(self, bus: int, devfn: int, offset: int, data: bytes) -> None:
        """Write configuration space, dword by dword; dropped outside of a function's 4096 bytes."""
        function = self._find(bus, devfn)
        if function is None or offset + len(data) > EXTENDED_SIZE:
            return
        for at, length in _dwords(offset, len(data)):
            function.config_write(at, data[at - offset : at - offset + length])
        with log_errors(log, "configuration space: %s"):
            self._observer(devfn)


_ABSENT = b"\xff" * EXTENDED_SIZE


def _ignore(devfn: int) -> None:
    """Do nothing: nobody observes."""


def _dwords(offset: int, size: int) -> list[tuple[int, int]]:
    parts = []
    while size:
        length = min(size, 4 - offset % 4)
        parts.append((offset, length))
        offset, size = offset + length, size - length
    return parts


class ConfigPorts:
    """Ports 0xcf8 (address) and 0xcfc (data): 256 bytes of each function (PCI Local Bus 3.0, section 3.2.2.3.2).

    Synchronization: with the bus lock held.
    """

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus
        self._address = 0

    def read(self, offset: int, size: int) -> bytes:
        """Read the address, or the register that it selects."""
        if offset < 4:
            return self._address.to_bytes(4, "little")[offset : offset + size].ljust(size, b"\xff")
        target = self._target(offset, size)
        return self._bus.read(*target, size) if target else b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Write the address, or the register that it selects."""
        if offset < 4:
            if offset == 0 and len(data) == 4:  # narrower accesses are not for this register
                self._address = int.from_bytes(data, "little") & 0x80FF_FFFC
            return
        if target := self._target(offset, len(data)):
            self._bus.write(*target, data)

    def _target(self, offset: int, size: int) -> tuple[int, int, int] | None:
        """Return bus, device and function, and register of an access of the data; None where there is no target."""
        register = (self._address & 0xFC) + offset - 4
        if not self._address & 1 << 31 or register + size > CONVENTIONAL_SIZE:
            return None
        return self._address >> 16 & 0xFF, self._address >> 8 & 0xFF, register


class Ecam:
    """The enhanced mechanism: 4096 bytes of each function, memory mapped (PCI Express base, section 7.2.2).

    Synchronization: with the bus lock held.
    """

    LABEL = "ECAM"
    """Its label, for statistics."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> bytes:
        """Read a function's configuration space."""
        return self._bus.read(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write a function's configuration space."""
        self._bus.write(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, data)
