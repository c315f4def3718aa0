"""An assigned function as the guest sees it: the device's registers where they are harmless, emulated ones elsewhere.

Passed through (VFIO virtualises and protects them, drivers/vfio/pci/vfio_pci_config.c): identity, command and status,
power management, the PCI Express capability's device registers, vendor-specific ones. Emulated: BARs, the expansion
ROM's, INTx, MSI and MSI-X, the lists of capabilities.
"""

from __future__ import annotations

from contextlib import suppress

from kvmpass import pciregs
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.kvm import FastFile, FastRegisters
from kvmpass.layout import Range
from kvmpass.pci import capabilities
from kvmpass.pci.bar import Bar, RomBar
from kvmpass.pci.bars import Bars
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import Wiring
from kvmpass.pci.intx import Intx
from kvmpass.pci.msi import Msi
from kvmpass.pci.msix import Msix
from kvmpass.vfio import Device, Irqs
from kvmpass.vfio.device import BAR0, INTX, MSI, MSIX, ROM

log = limited_log(__name__)

_PMCSR = 4  # in the power management capability: control and status
_POWER_STATE = 0b11
# Function level reset, which VFIO then does (PCI Express base, 7.5.3.4; Advanced Capabilities for Conventional PCI).
_RESETS = ((pciregs.CAP_EXPRESS, 9, 0x80), (pciregs.CAP_ADVANCED_FEATURES, 4, 0x01))
_PINS = 4
_NO_RESPONSE = 0xFFFF  # what any register reads of a device that does not respond


class AssignedFunction:
    """A ``PciFunction`` over an open VFIO device: configuration space, BARs and interrupts.

    ``close()`` removes it from the guest; the device stays open. Nothing raises for what a guest writes. ``p2p``:
    whether other devices reach its BARs (``dma.Domain``), which then do not decode while the guest resets it.

    Synchronization: with the bus lock held.
    """

    def __init__(self, device: Device, wiring: Wiring, *, p2p: bool = False) -> None:
        self._device = device
        self._p2p = p2p
        self._suspended = False
        self._resets: list[tuple[int, int]] = []  # registers in which a bit resets the function
        self._space = ConfigSpace(device.config)
        self._bars = Bars(self._space)
        self._intx: Intx | None = None
        self._msi: Msi | None = None
        self._msix: Msix | None = None
        self._enabled = 0  # the decoding bits as last written, which VFIO checks
        self._awake = True  # whether the power state was last written as D0
        with undo_on_error(self.close):
            self._make_header(wiring)
            self._make_messages(wiring, self._make_capabilities())
            self._make_bars(wiring)
            self._update_interrupts()
            pending = self._msi.pending if self._msi else Range(0, 0)
            self._fast_registers = self._space.fast_registers(device.fd, device.config.info.offset, pending)

    # --- construction

    def _make_header(self, wiring: Wiring) -> None:
        space = self._space
        space.emulate(pciregs.HEADER_TYPE, bytes([space.device_int(pciregs.HEADER_TYPE, 1) & ~pciregs.MULTIFUNCTION]))
        space.emulate(pciregs.INTERRUPT_LINE, b"\xff", b"\xff")
        pin = space.device_int(pciregs.INTERRUPT_PIN, 1)
        sink = self._irqs(INTX)
        if sink and 1 <= pin <= _PINS:
            self._intx = Intx(wiring.vm, sink, wiring.gsis[pin - 1])
        space.emulate(pciregs.INTERRUPT_PIN, bytes([pin if self._intx else 0]))

    def _irqs(self, index: int) -> Irqs | None:
        """Look up the device's interrupts of one kind; None without a vector."""
        irqs = self._device.irqs.get(index)
        return irqs if irqs and irqs.count else None

    def _make_capabilities(self) -> dict[int, int]:
        """Link the capabilities; return the offsets of the conventional ones that are shown, by identifier."""
        space, read = self._space, self._device.config.read_int
        absent = {
            number for number, index in ((pciregs.CAP_MSI, MSI), (pciregs.CAP_MSIX, MSIX)) if not self._irqs(index)
        }
        shown = capabilities.link(space, pciregs.capabilities(read), frozenset(absent))
        if self._device.config.size >= pciregs.EXTENDED_SIZE:
            capabilities.link_extended(space, pciregs.extended_capabilities(read))
        if express := shown.get(pciregs.CAP_EXPRESS):
            capabilities.unlink_express(space, express)
        self._power_at = shown.get(pciregs.CAP_POWER, 0)
        if self._p2p:
            self._resets = [
                (capability.offset + at, bit)
                for capability in pciregs.capabilities(read)
                for id_, at, bit in _RESETS
                if capability.id == id_
            ]
        return shown

    def _make_messages(self, wiring: Wiring, shown: dict[int, int]) -> None:
        space = self._space
        if (at := shown.get(pciregs.CAP_MSI)) and (sink := self._irqs(MSI)):
            self._msi = Msi(wiring, sink, space, at, pciregs.msi(space.device_int, at))
        if (at := shown.get(pciregs.CAP_MSIX)) and (sink := self._irqs(MSIX)):
            self._msix = Msix(wiring, sink, space, at, pciregs.msix(space.device_int, at))

    def _make_bars(self, wiring: Wiring) -> None:
        for index in range(pciregs.BARS):
            region = self._device.regions.get(BAR0 + index)
            if region is not None:
                at = pciregs.BAR0 + 4 * index
                traps = self._msix.traps(index) if self._msix else ()
                file = FastFile(self._device.fd, region.info.offset, region.size)
                flags = self._space.device_int(at, 4)
                self._bars.add(at, Bar(f"bar{index}", region, flags, wiring, traps, file=file))
        if rom := self._device.regions.get(ROM):
            self._bars.add(pciregs.ROM, RomBar(rom, wiring))
        self._take_over()

    def set_multifunction(self, several: bool) -> None:
        """Set header type, bit 7: whether the slot of this function 0 has other functions."""
        kept = self._space.get(pciregs.HEADER_TYPE, 1) & ~pciregs.MULTIFUNCTION
        self._space.set(pciregs.HEADER_TYPE, kept | (pciregs.MULTIFUNCTION if several else 0), 1)

    # --- resets by the host

    def suspend(self) -> None:
        """Stop decoding until ``resume``, whatever the guest writes. Raises ``OSError``: it decodes as before."""
        self._bars.decode(0)
        self._suspended = True

    def resume(self) -> None:
        """Decode as the device's registers say after the reset."""
        self._suspended = False
        self._bars.decode(self._decoded())

    # --- the end

    def close(self) -> None:
        """Disable the interrupts, remove the BARs from the guest and unmap them. Runs every step even if one fails.

        Raises ``OSError``: what failed stays as it is, and ``close`` can be called again. Idempotent.
        """
        kinds = (self._intx, self._msi, self._msix)
        run_all(*(interrupt.disable for interrupt in kinds if interrupt), self._bars.close)

    # --- interrupts

    @property
    def interrupt(self) -> str:
        """The kind that the guest has enabled: ``MSI-X``, ``MSI``, ``INTx`` or ``none``."""
        if message := self._message:
            return message.KIND
        return "INTx" if self._intx and self._intx.active else "none"

    @property
    def _message(self) -> Msix | Msi | None:
        """The kind of messages that the guest has enabled."""
        return next((kind for kind in (self._msix, self._msi) if kind and kind.enabled), None)

    def _update_interrupts(self) -> None:
        """Enable the kind that the guest uses: after the others are disabled, as VFIO allows one at a time."""
        message = self._message
        for kind in (self._msix, self._msi):
            if kind and kind is not message:
                with log_errors(log, "%s %s: %s", self._device.name, kind.KIND):
                    kind.disable()
        if self._intx:
            with log_errors(log, "%s INTx: %s", self._device.name):
                self._intx.disable() if message else self._intx.enable()
        if message:
            message.update()

    # --- configuration space

    def config_read(self, offset: int, size: int) -> bytes:
        """See ``PciFunction``."""
        if self._msi is not None and self._msi.pending.overlaps(Range(offset, size)):
            self._msi.refresh_pending()
        return self._space.read(offset, size)

    def config_image(self) -> FastRegisters:
        """See ``PciFunction``: the device changes its registers, too."""
        return self._fast_registers

    def config_write(self, offset: int, data: bytes) -> None:
        """See ``PciFunction``."""
        # KVM may keep a memslot.
        with log_errors(log, "%s: write of configuration space at %#x: %s", self._device.name, offset):
            self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if self._bars.write(offset, data):
            return
        if offset < pciregs.COMMAND + 2 and end > pciregs.COMMAND:
            self._write_command(offset, data)
        elif self._power_at and offset < self._power_at + _PMCSR + 1 <= end:
            self._write_power(offset, data)
        elif self._starts_reset(offset, data):
            self._change_decoding(offset, data, self._enabled, self._awake)
        else:
            self._space.write(offset, data)
            if any(own and offset < own.end and end > own.start for own in (self._msi, self._msix)):
                self._update_interrupts()

    # VFIO allows accesses of the device's memory while the command register was last *written* with decoding on and
    # the device is in D0 (__vfio_pci_memory_enabled, drivers/vfio/pci/vfio_pci_config.c). What the register *reads*
    # can differ: a device that D3hot resets returns with its earlier value, an unplugged one reads as ones. A BAR
    # decodes while both agree: otherwise an access faults, or reaches a BAR that the guest has disabled.

    def _take_over(self) -> None:
        """Write the command register as it reads, so that VFIO knows of decoding that is on already."""
        command = self._command()
        if command == _NO_RESPONSE:
            command = 0
        with suppress(OSError):
            self._device.config.write(pciregs.COMMAND, command.to_bytes(2, "little"))
            self._enabled = command & pciregs.COMMAND_DECODING
        self._bars.decode(self._decoded())

    def _write_command(self, offset: int, data: bytes) -> None:
        """Turn decoding off before the write reaches the device and on after it: its mapping faults while it is off.

        A write that does not change decoding, such as one that masks INTx, is one access of the device.
        """
        enabled = data[0] & pciregs.COMMAND_DECODING if offset == pciregs.COMMAND else self._enabled
        if enabled == self._enabled == self._bars.decoding:
            self._space.write(offset, data)
            return
        self._change_decoding(offset, data, enabled, self._awake)

    def _write_power(self, offset: int, data: bytes) -> None:
        """Turn decoding off in any state but D0, where the mapping faults (PCI Power Management, 5.4)."""
        awake = not data[self._power_at + _PMCSR - offset] & _POWER_STATE
        self._change_decoding(offset, data, self._enabled, awake)

    def _starts_reset(self, offset: int, data: bytes) -> bool:
        """Whether the write may reset the function while other devices reach its BARs."""
        return any(0 <= at - offset < len(data) and data[at - offset] & bit for at, bit in self._resets)

    def _change_decoding(self, offset: int, data: bytes, enabled: int, awake: bool) -> None:
        decodes = awake and not self._starts_reset(offset, data)
        self._bars.decode(self._bars.decoding & enabled if decodes else 0)  # raises: the write is not done
        done = self._space.write(offset, data)
        self._enabled = enabled if done else self._enabled & enabled
        self._awake = awake if done else self._awake and awake
        self._bars.decode(self._decoded())

    def _command(self) -> int:
        return self._space.device_int(pciregs.COMMAND, 2)

    def _decoded(self) -> int:
        """Return the decoding bits on which the device's registers and the last write agree; 0 outside of D0."""
        if self._suspended or not self._awake or not self._enabled:
            return 0
        try:
            asleep = self._power_at and self._device.config.read_int(self._power_at + _PMCSR, 1) & _POWER_STATE
        except OSError:
            return 0
        return 0 if asleep else self._enabled & self._command()
