"""An assigned function as the guest sees it: the device's own registers where they are harmless, ours elsewhere.

Passed through (VFIO virtualises and protects them, drivers/vfio/pci/vfio_pci_config.c): identity, status, the PCI
Express capability's device registers. Ours: BARs, MSI-X, the list of capabilities. Capabilities that are not known to
work, extended ones among them, are hidden.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

from kvmpass.bus import Bus
from kvmpass.kvm import IrqRoutes, Vm
from kvmpass.layout import Range
from kvmpass.memory import GuestMemory
from kvmpass.pci import config
from kvmpass.pci.bar import Bar, guarded
from kvmpass.pci.msix import CONTROL_ENABLE, CONTROL_MASK_ALL, ENTRY_SIZE, Msix
from kvmpass.pci.space import BarKind, BarSpace
from kvmpass.vfio import Device
from kvmpass.vfio.device import BAR0, MSIX

log = logging.getLogger(__name__)

_BARS = 6
_EXPRESS_TYPE_MASK, _EXPRESS_ROOT_COMPLEX_ENDPOINT = 0xF0, 0x90
_EXPRESS_ENDPOINTS = (0x00, 0x10)
_EXPRESS_LINK_REGISTERS = (Range(0x0C, 8), Range(0x2C, 8))  # capabilities, control, status; 1 and 2


class AssignedFunction:
    """Configuration space, BARs and MSI-X. ``close()`` takes it out of the guest; the device stays open.

    Everything but ``close`` and ``reset`` is called with the bus lock held.
    """

    def __init__(
        self, device: Device, vm: Vm, routes: IrqRoutes, memory: GuestMemory, ports: Bus, mmio: Bus, space: BarSpace
    ) -> None:
        self._device = device
        self._shadow = bytearray(config.CONVENTIONAL_SIZE)
        self._ours = bytearray(config.CONVENTIONAL_SIZE)  # 0xff for each byte that the device is not asked for
        self._bars: dict[int, Bar] = {}
        self._msix: Msix | None = None
        self._msix_at = 0
        capabilities = config.capabilities(device.config.read_int)
        self._claim(config.HEADER_TYPE, bytes([device.config.read_int(config.HEADER_TYPE, 1) & 0x7F]))
        self._claim(config.BAR0, bytes(4 * _BARS))
        self._claim(config.ROM, bytes(4))
        self._claim(config.INTERRUPT_LINE, b"\xff")
        self._claim(config.INTERRUPT_PIN, b"\0")
        self._link([cap for cap in capabilities if cap.id in (config.CAP_MSIX, config.CAP_EXPRESS)])
        trap = self._make_msix(vm, routes)
        with ExitStack() as undo:
            undo.callback(self._close_bars)
            self._make_bars(memory, ports, mmio, space, trap)
            undo.pop_all()

    # --- construction

    def _claim(self, offset: int, data: bytes) -> None:
        self._shadow[offset : offset + len(data)] = data
        self._ours[offset : offset + len(data)] = b"\xff" * len(data)

    def _link(self, visible: list[config.Capability]) -> None:
        """Everything above the header is ours and empty, except the visible capabilities, relinked."""
        self._claim(config.HEADER_SIZE, bytes(config.CONVENTIONAL_SIZE - config.HEADER_SIZE))
        pointer = config.CAPABILITIES
        self._claim(pointer, b"\0")
        for capability in visible:
            at = capability.offset
            if capability.id == config.CAP_MSIX:
                if not self._device.irqs[MSIX].count:
                    continue
                self._msix_at = at
                self._claim(at, self._device.config.read(at, 12))
                self._set16(at + 2, self._get16(at + 2) & ~(CONTROL_ENABLE | CONTROL_MASK_ALL))
            else:
                self._pass_express(at)
            self._claim(at, bytes([capability.id]))
            self._claim(pointer, bytes([at]))
            pointer = at + 1
            self._claim(pointer, b"\0")

    def _pass_express(self, at: int) -> None:
        """The device's own, but without a link: on the guest's root bus it is an integrated endpoint."""
        flags = self._device.config.read_int(at + 2, 2)
        size = min(0x3C if flags & 0xF >= 2 else 0x14, config.CONVENTIONAL_SIZE - at)
        self._ours[at : at + size] = bytes(size)
        if flags & _EXPRESS_TYPE_MASK in _EXPRESS_ENDPOINTS:
            flags = flags & ~_EXPRESS_TYPE_MASK | _EXPRESS_ROOT_COMPLEX_ENDPOINT
            for registers in _EXPRESS_LINK_REGISTERS:
                if registers.end <= size:
                    self._claim(at + registers.start, bytes(registers.size))
        self._claim(at + 2, flags.to_bytes(2, "little"))

    def _make_msix(self, vm: Vm, routes: IrqRoutes) -> dict[int, tuple[Range, Msix]]:
        """Its table as a trap for the BAR that holds it."""
        at = self._msix_at
        if not at:
            return {}
        vectors = (self._get16(at + 2) & 0x7FF) + 1
        table = int.from_bytes(self._shadow[at + 4 : at + 8], "little")
        self._msix = Msix(vm, routes, self._device, vectors)
        return {table & 7: (Range(table & ~7, vectors * ENTRY_SIZE), self._msix)}

    def _make_bars(
        self, memory: GuestMemory, ports: Bus, mmio: Bus, space: BarSpace, trap: dict[int, tuple[Range, Msix]]
    ) -> None:
        for index in range(_BARS):
            region = self._device.regions.get(BAR0 + index)
            if region is None:
                continue
            flags = self._device.config.read_int(config.BAR0 + 4 * index)
            bus = ports if flags & 1 else mmio
            self._bars[index] = Bar(region, flags, memory, bus, space, trap.get(index))

    def _get16(self, offset: int) -> int:
        return int.from_bytes(self._shadow[offset : offset + 2], "little")

    def _set16(self, offset: int, value: int) -> None:
        self._shadow[offset : offset + 2] = value.to_bytes(2, "little")

    # --- the end

    def close(self) -> None:
        """Interrupts off, then BARs out of the guest, then unmapped. Every step is tried."""
        with ExitStack() as steps:
            steps.callback(self._close_bars)
            if self._msix:
                steps.callback(self._msix.disable)

    def _close_bars(self) -> None:
        bars, self._bars = self._bars, {}
        with ExitStack() as steps:
            for bar in bars.values():
                steps.callback(bar.close)

    # --- configuration space

    def config_read(self, offset: int, size: int) -> bytes:
        if offset >= config.CONVENTIONAL_SIZE:
            return bytes(size)
        ours = self._ours[offset : offset + size]
        if config.BAR0 <= offset < config.BAR0 + 4 * _BARS:
            return self._bar_register(offset & ~3).to_bytes(4, "little")[offset & 3 : (offset & 3) + size]
        own = bytes(self._shadow[offset : offset + size])
        if all(ours):
            return own
        theirs = guarded(lambda: self._device.config.read(offset, size), b"\xff" * size)
        return bytes(a if mine else b for a, b, mine in zip(own, theirs, ours, strict=True))

    def config_write(self, offset: int, data: bytes) -> None:
        if offset >= config.CONVENTIONAL_SIZE:
            return
        end = offset + len(data)
        if config.BAR0 <= offset < config.BAR0 + 4 * _BARS:
            self._write_bar(offset, data)
        elif offset <= config.INTERRUPT_LINE < end:
            self._shadow[config.INTERRUPT_LINE] = data[config.INTERRUPT_LINE - offset]
        elif config.COMMAND <= offset < config.COMMAND + 4:
            self._write_command(offset, data)
        elif self._msix and offset <= self._msix_at + 3 < end:
            self._write_msix_control(data[self._msix_at + 3 - offset])
        elif not any(self._ours[offset:end]):
            guarded(lambda: self._device.config.write(offset, data), None)

    def _write_command(self, offset: int, data: bytes) -> None:
        """Decoding goes off before the device hears of it and on after: its mapping faults while it is off."""
        before = guarded(lambda: self._device.config.read_int(config.COMMAND, 2), 0)
        after = before
        if offset == config.COMMAND:
            after = before & ~0xFF | data[0]
        if offset <= config.COMMAND + 1 < offset + len(data):
            after = after & 0xFF | data[config.COMMAND + 1 - offset] << 8
        for bar in self._bars.values():
            bit = config.COMMAND_IO if bar.kind is BarKind.IO else config.COMMAND_MEMORY
            if before & bit and not after & bit:
                bar.disconnect()
        guarded(lambda: self._device.config.write(offset, data), None)
        now = guarded(lambda: self._device.config.read_int(config.COMMAND, 2), 0)
        for bar in self._bars.values():
            bit = config.COMMAND_IO if bar.kind is BarKind.IO else config.COMMAND_MEMORY
            if now & bit and not before & bit:
                bar.connect()

    def _bar_at(self, offset: int) -> tuple[Bar | None, bool]:
        """The BAR that has the register at ``offset``, and whether it is its upper half."""
        index = (offset - config.BAR0) // 4
        if index in self._bars:
            return self._bars[index], False
        below = self._bars.get(index - 1)
        return (below, True) if below and below.kind is BarKind.MEMORY64 else (None, False)

    def _bar_register(self, offset: int) -> int:
        bar, high = self._bar_at(offset)
        return bar.register(high) if bar else 0

    def _write_bar(self, offset: int, data: bytes) -> None:
        bar, high = self._bar_at(offset & ~3)
        if bar is None:
            return
        value = bytearray(bar.register(high).to_bytes(4, "little"))
        value[offset & 3 : (offset & 3) + len(data)] = data
        bar.set_register(int.from_bytes(value, "little"), high)
        command = guarded(lambda: self._device.config.read_int(config.COMMAND, 2), 0)
        if command & (config.COMMAND_IO if bar.kind is BarKind.IO else config.COMMAND_MEMORY):
            bar.connect()

    def _write_msix_control(self, upper: int) -> None:
        assert self._msix is not None
        at = self._msix_at + 2
        value = self._get16(at) & 0x7FF | upper << 8 & (CONTROL_ENABLE | CONTROL_MASK_ALL)
        self._set16(at, value)
        self._msix.set_control(value)
