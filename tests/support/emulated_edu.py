"""A PCI function that no device is behind: QEMU's edu (docs/specs/edu.rst), with MSI-X in the place of MSI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from kvmpass import pciregs
from kvmpass._fd import OwnedFd
from kvmpass._teardown import run_all
from kvmpass.layout import PAGE, Range
from kvmpass.memory import HostMapping
from kvmpass.pci import Wiring
from kvmpass.pci.bar import Bar
from kvmpass.pci.bars import Bars
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.msix import Msix

IDENTITY = bytes.fromhex("34 12 e8 11")  # vendor and device
SIZE, TABLE, PENDING = 1 << 20, 0x80000, 0x81000
ID, LIVENESS, STATUS, RAISE, ACKNOWLEDGE = 0x00, 0x04, 0x24, 0x60, 0x64
SOURCE, TARGET, COUNT, COMMAND, BUFFER = 0x80, 0x88, 0x90, 0x98, 0x40000
START, FROM_DEVICE, INTERRUPT, DMA_DONE = 1, 2, 4, 0x100
_MSIX_AT = 0x40


class Registers:
    """What is behind BAR 0: a ``BarSource`` that traps but for its buffer, the ``InterruptSink`` of its one vector.

    The buffer is ordinary memory of this process, which the guest reaches without an exit.
    """

    name = "edu"
    size = SIZE
    mmap_areas = (Range(BUFFER, PAGE),)
    count, resizable = 1, True

    def __init__(self, wiring: Wiring) -> None:
        self._memory = wiring.memory
        self._values = {ID: 0x010000ED, LIVENESS: 0, STATUS: 0}
        self._file = OwnedFd(os.memfd_create("edu"))
        os.ftruncate(self._file.fd, PAGE)
        self._mapping = HostMapping(PAGE, fd=self._file.fd)
        self.buffer = self._mapping.view(0, PAGE)
        self._eventfd = -1
        self.raised = 0

    # --- BarSource

    def mmap(self, area: Range) -> HostMapping:
        return HostMapping(area.size, fd=self._file.fd, offset=area.start - BUFFER)

    def close(self) -> None:
        self._mapping.close()
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        return (self._values.get(offset, 0) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if offset == LIVENESS:
            self._values[LIVENESS] = ~value & 0xFFFF_FFFF
        elif offset == RAISE:
            self._raise(value)
        elif offset == ACKNOWLEDGE:
            self._values[STATUS] &= ~value
        elif offset in (SOURCE, TARGET, COUNT):
            self._values[offset] = value
        elif offset == COMMAND and value & START:
            with suppress(IndexError):  # no guest memory is there
                self._transfer(bool(value & FROM_DEVICE))
            if value & INTERRUPT:
                self._raise(DMA_DONE)

    def _transfer(self, from_device: bool) -> None:
        source, target, count = (self._values.get(register, 0) for register in (SOURCE, TARGET, COUNT))
        at = (source if from_device else target) - BUFFER
        if 0 <= at <= at + count <= PAGE:
            if from_device:
                self._memory.write(target, self.buffer[at : at + count])
            else:
                self.buffer[at : at + count] = self._memory.read(source, count)

    # --- InterruptSink

    def _raise(self, status: int) -> None:
        self._values[STATUS] |= status
        self.raised += 1
        if self._eventfd >= 0:
            os.eventfd_write(self._eventfd, 1)

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        [self._eventfd] = eventfds

    def disable_irqs(self) -> None:
        self._eventfd = -1


class EmulatedEdu:
    """The function: ``PciFunction``."""

    def __init__(self, wiring: Wiring) -> None:
        self.registers = Registers(wiring)
        self._space = space = ConfigSpace()
        space.emulate(0, IDENTITY)
        space.emulate(pciregs.COMMAND, bytes(2), bytes([pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER, 0]))
        space.emulate(pciregs.STATUS, pciregs.STATUS_CAPABILITIES.to_bytes(2, "little"))
        space.emulate(0x0B, b"\xff")  # of no class
        space.emulate(pciregs.INTERRUPT_LINE, b"\0", b"\xff")
        space.emulate(pciregs.CAPABILITIES, bytes([_MSIX_AT]))
        space.emulate(_MSIX_AT, bytes([pciregs.CAP_MSIX, 0]))
        own = pciregs.MsixRegisters(self.registers.count, False, 0, TABLE, 0, PENDING)
        self._msix = Msix(wiring, self.registers, space, _MSIX_AT, own)
        self._bars = Bars(space)
        self._bars.add(pciregs.BAR0, Bar("edu", self.registers, 0, wiring, self._msix.traps(0)))

    def config_read(self, offset: int, size: int) -> bytes:
        return self._space.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        if not self._bars.write(offset, data):
            self._space.write(offset, data)
            self._bars.decode(self._space.get(pciregs.COMMAND, 2))
            self._msix.update()

    def config_image(self) -> None: ...

    def set_multifunction(self, several: bool) -> None:
        self._space.set(pciregs.HEADER_TYPE, pciregs.MULTIFUNCTION if several else 0, 1)

    def close(self) -> None:
        run_all(self._msix.disable, self._bars.close, self.registers.close)
