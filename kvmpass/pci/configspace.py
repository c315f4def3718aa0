"""Configuration space as the guest reads and writes it: the device's own bytes, and emulated ones in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kvmpass._ratelimit import limited_log
from kvmpass.pciregs import EXTENDED_SIZE

log = limited_log(__name__)

T = TypeVar("T")


def guarded(access: Callable[[], T], otherwise: T) -> T:
    """An access of the device on the guest's behalf: what VFIO refuses is answered like an empty bus."""
    try:
        return access()
    except OSError as error:
        log.debug("device access refused: %s", error)
        return otherwise


class Registers(Protocol):
    """The device's configuration space (``vfio.Region``): 256 or 4096 bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def read_int(self, offset: int, size: int = 4) -> int: ...


class ConfigSpace:
    """4096 bytes, each the device's or emulated. Of an emulated byte the guest changes its writable bits only.

    Without a device all of them are emulated, as zeroes; of one with 256 bytes those above. Which bytes of a device
    can be written, and what a write does to them, VFIO decides (drivers/vfio/pci/vfio_pci_config.c). Offsets and
    sizes are inside the space.
    """

    def __init__(self, device: Registers | None = None) -> None:
        self._device = device
        self._value = bytearray(EXTENDED_SIZE)
        self._emulated = bytearray(EXTENDED_SIZE)  # 0xff for each byte that the device is not asked for
        self._writable = bytearray(EXTENDED_SIZE)
        if self.device_size < EXTENDED_SIZE:
            self.emulate(self.device_size, bytes(EXTENDED_SIZE - self.device_size))

    def emulate(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        """From now on the bytes at ``offset`` are ours; ``writable`` masks the bits that the guest may change."""
        end = offset + len(data)
        self._value[offset:end] = data
        self._emulated[offset:end] = b"\xff" * len(data)
        self._writable[offset:end] = writable.ljust(len(data), b"\0")

    @property
    def device_size(self) -> int:
        """Bytes that the device itself has."""
        return self._device.size if self._device else 0

    def get(self, offset: int, size: int) -> int:
        """An emulated register's value."""
        return int.from_bytes(self._value[offset : offset + size], "little")

    def set(self, offset: int, value: int, size: int) -> None:
        """Change an emulated register, whatever the guest may write."""
        self._value[offset : offset + size] = value.to_bytes(size, "little")

    def device_int(self, offset: int, size: int) -> int:
        """A register of the device; 0 where VFIO refuses, or without one."""
        device = self._device
        return guarded(lambda: device.read_int(offset, size), 0) if device else 0

    def read(self, offset: int, size: int) -> bytes:
        end = offset + size
        own, ours, device = bytes(self._value[offset:end]), self._emulated[offset:end], self._device
        if device is None or all(ours):
            return own
        theirs = guarded(lambda: device.read(offset, size), b"\xff" * size)
        return bytes(a if mine else b for a, b, mine in zip(own, theirs, ours, strict=True))

    def write(self, offset: int, data: bytes) -> bool:
        """Emulated bytes change at once; each run of the device's own goes to the device as one access.

        Returns whether VFIO took them all.
        """
        run, taken = bytearray(), True
        for at, byte in enumerate(data, offset):
            if self._emulated[at]:
                taken &= self._pass(at - len(run), run)
                mask = self._writable[at]
                self._value[at] = self._value[at] & ~mask | byte & mask
            else:
                run.append(byte)
        return taken & self._pass(offset + len(data) - len(run), run)

    def _pass(self, offset: int, run: bytearray) -> bool:
        data, device = bytes(run), self._device
        run.clear()
        if device is None or not data:
            return True

        def write() -> bool:
            device.write(offset, data)
            return True

        return guarded(write, False)
