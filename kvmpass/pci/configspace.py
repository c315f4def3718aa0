"""Configuration space as the guest reads and writes it: bytes of the device, and emulated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kvmpass._ratelimit import limited_log
from kvmpass.kvm import FastRegisters
from kvmpass.layout import Range
from kvmpass.pciregs import EXTENDED_SIZE

log = limited_log(__name__)

T = TypeVar("T")


def guarded(access: Callable[[], T], otherwise: T) -> T:
    """Access the device for the guest; return ``otherwise`` where VFIO refuses, as an empty bus would."""
    try:
        return access()
    except OSError as error:
        log.debug("device access refused: %s", error)
        return otherwise


class Registers(Protocol):
    """A device's configuration space, such as ``vfio.Region``. Its accesses raise ``OSError``."""

    @property
    def size(self) -> int:
        """Bytes: 256 or 4096."""

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``."""

    def read_int(self, offset: int, size: int = 4) -> int:
        """Read a little-endian register."""


class ConfigSpace:
    """4096 bytes, each the device's or emulated. A guest's write changes only the writable bits of an emulated byte.

    Without a device all bytes are emulated, as zeroes; with a device of 256 bytes the others are. VFIO decides which
    bytes of a device can be written, and what a write does (drivers/vfio/pci/vfio_pci_config.c). Offsets and sizes
    are inside the space.

    Synchronization: with the bus lock held.
    """

    def __init__(self, device: Registers | None = None) -> None:
        self._device = device
        self._value = bytearray(EXTENDED_SIZE)
        self._emulated = bytearray(EXTENDED_SIZE)  # 0xff for each emulated byte
        self._writable = bytearray(EXTENDED_SIZE)
        if self.device_size < EXTENDED_SIZE:
            self.emulate(self.device_size, bytes(EXTENDED_SIZE - self.device_size))

    def emulate(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        """Emulate the bytes at ``offset`` as ``data``; ``writable`` masks the bits that the guest can change."""
        end = offset + len(data)
        self._value[offset:end] = data
        self._emulated[offset:end] = b"\xff" * len(data)
        self._writable[offset:end] = writable.ljust(len(data), b"\0")

    def fast_registers(self, fd: int, offset: int, exits: Range) -> FastRegisters:
        """Return the space for a ``Fastpath``: the device's is at ``offset`` of ``fd``; Python reads ``exits``."""
        return FastRegisters(self._value, self._emulated, fd, offset, exits)

    def image(self) -> bytes:
        """Return all bytes of a space without a device."""
        return bytes(self._value)

    @property
    def device_size(self) -> int:
        """Bytes of the device's own space; 0 without a device."""
        return self._device.size if self._device else 0

    def get(self, offset: int, size: int) -> int:
        """Return the value of an emulated register."""
        return int.from_bytes(self._value[offset : offset + size], "little")

    def set(self, offset: int, value: int, size: int) -> None:
        """Set an emulated register, read-only bits included."""
        self._value[offset : offset + size] = value.to_bytes(size, "little")

    def device_int(self, offset: int, size: int) -> int:
        """Read a register of the device; 0 where VFIO refuses, or without a device."""
        device = self._device
        return guarded(lambda: device.read_int(offset, size), 0) if device else 0

    def read(self, offset: int, size: int) -> bytes:
        """Read what the guest sees; ones for the device's bytes where VFIO refuses."""
        end, device = offset + size, self._device
        values, emulated = bytes(self._value[offset:end]), self._emulated[offset:end]
        if device is None or all(emulated):
            return values
        read = guarded(lambda: device.read(offset, size), b"\xff" * size)
        if not any(emulated):
            return read
        return bytes(a if mask else b for a, b, mask in zip(values, read, emulated, strict=True))

    def write(self, offset: int, data: bytes) -> bool:
        """Write what the guest writes: each run of the device's bytes is one access of the device.

        Return whether VFIO accepted them all.
        """
        run, accepted, values = bytearray(), True, self._value[offset : offset + len(data)]
        for number, byte in enumerate(data):
            at = offset + number
            if self._emulated[at]:
                accepted &= self._pass(at - len(run), run)
                mask = self._writable[at]
                values[number] = values[number] & ~mask | byte & mask
            else:
                run.append(byte)
        self._value[offset : offset + len(data)] = values  # at once: a vCPU may read them on the fast path
        return accepted & self._pass(offset + len(data) - len(run), run)

    def _pass(self, offset: int, run: bytearray) -> bool:
        data, device = bytes(run), self._device
        run.clear()
        if device is None or not data:
            return True

        def write() -> bool:
            device.write(offset, data)
            return True

        return guarded(write, False)
