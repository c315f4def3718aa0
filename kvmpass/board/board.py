"""The part of a machine that a reset rebuilds: the VM, its interrupt controllers, its buses and its emulated devices.

Memory, the DMA domain and the open devices remain (``kvmpass.machine``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from kvmpass import ports
from kvmpass._dataclass import dataclass
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.board.hotplug import HotplugController
from kvmpass.board.power import PowerControl, PowerEvent
from kvmpass.board.serial import Serial16550
from kvmpass.bus import Bus
from kvmpass.kvm import Fastpath, IrqRoutes, System
from kvmpass.layout import Layout
from kvmpass.memory import GuestMemory
from kvmpass.pci import BarSpace, ConfigPorts, Ecam, PciBus, PciFunction, Wiring
from kvmpass.pci.readable import ReadableConfig

log = limited_log(__name__)

F = TypeVar("F", bound=PciFunction)


@dataclass(frozen=True, slots=True)
class BoardEvents:
    """The callbacks of a board.

    Synchronization: called from vCPU threads, with the bus lock held.
    """

    power: Callable[[PowerEvent], None]
    """Called when the guest powers off or resets."""
    eject: Callable[[int], None]
    """Called with the number of a slot that the guest ejects."""
    outputs: Sequence[Callable[[bytes], None]]
    """Called with the output of each serial port, COM1 first."""


class Board:
    """A VM and its fixed devices. ``close()`` closes the VM, and unplugs the remaining functions.

    Synchronization: ``plug``, ``unplug``, ``configure_by_ecam`` and ``close`` with the bus lock held; the rest with
    the machine's device lock.
    """

    def __init__(self, system: System, layout: Layout, memory: GuestMemory, events: BoardEvents) -> None:
        self._memory = memory
        with ExitStack() as undo:
            self.vm = undo.enter_context(system.create_vm())
            """The VM."""
            self.vm.create_irqchip()
            self.vm.mask_pic()  # the ACPI tables say that there is none
            self.routes = IrqRoutes(self.vm)
            """Its GSI routes."""
            self.kvm_vfio = undo.enter_context(self.vm.create_vfio_device())
            """Its KVM-VFIO device (Documentation/virt/kvm/devices/vfio.rst)."""
            self.ports = Bus("port")
            """The port space."""
            self.mmio = Bus("memory")
            """Guest-physical addresses without a memslot."""
            self.pci = PciBus()
            """The PCI bus."""
            self.fastpath = Fastpath()
            """What vCPUs access without Python."""
            self._config_ports: ConfigPorts | None = None
            self._readable: ReadableConfig | None = None
            self._ecam = layout.ecam
            self._add_config_ports()
            # The address alone does nothing: the access of the data exits.
            self.vm.coalesce_port_writes(ports.PCI_CONFIG_BASE, ports.PCI_ADDRESS_SIZE)
            self.mmio.add(layout.ecam.start, layout.ecam.size, Ecam(self.pci), Ecam.LABEL)
            self._bars = BarSpace(layout)
            self.serials: list[Serial16550] = []
            """COM1 to COM4."""
            for number, (line, output) in enumerate(zip(ports.SERIAL_LINES, events.outputs, strict=True), 1):
                self.serials.append(Serial16550(output, partial(self._drive, line.irq)))
                self.ports.add(line.port, ports.SERIAL_PORTS, self.serials[-1], f"COM{number}")
            self.ports.add(ports.POWER_BASE, ports.POWER_SIZE, PowerControl(events.power), "power control")
            self.hotplug = HotplugController(partial(self._drive, ports.EVENT_GSI), events.eject)
            """The ACPI hotplug controller."""
            self.ports.add(ports.HOTPLUG_BASE, ports.HOTPLUG_SIZE, self.hotplug, "hotplug controller")
            self._undo = undo.pop_all()

    def _add_config_ports(self) -> None:
        self._config_ports = ConfigPorts(self.pci)
        name = "PCI configuration ports"
        self.ports.add(ports.PCI_CONFIG_BASE, ports.PCI_CONFIG_SIZE, self._config_ports, name)

    def configure_by_ecam(self, alone: bool) -> None:
        """Set whether the guest reaches configuration space by ECAM alone. Raises ``OSError``.

        The ports are absent then, and what does not change by itself is read without an exit. Idempotent.
        """
        if alone and self._readable is None:
            self._readable = ReadableConfig(self.pci, self._memory, self._ecam, self.fastpath)
            if self._config_ports is not None:
                self.ports.remove(self._config_ports)
                self._config_ports = None
        elif not alone:
            if self._config_ports is None:
                self._add_config_ports()
            self._hide_readable()

    def _hide_readable(self) -> None:
        if self._readable is not None:
            self._readable.close()
            self._readable = None

    def _drive(self, gsi: int, level: bool) -> None:
        """Set the level of an emulated device's interrupt. If KVM fails, the guest misses it, and runs on."""
        with log_errors(log, "%s"):
            if not self.vm.closed:
                self.vm.irq_line(gsi, level)

    def plug(self, make: Callable[[Wiring], F], slot: int, number: int = 0) -> F:
        """Plug the function that ``make`` returns into ``slot`` as function ``number``. Raises ``LayoutError``."""
        gsis = tuple(ports.intx_gsi(slot, pin) for pin in range(4))
        place = f"{slot:02x}.{number}"
        wiring = Wiring(
            self.vm, self.routes, self._memory, self.ports, self.mmio, self._bars, gsis, place, self.fastpath
        )
        with undo_on_error() as undo:
            function = make(wiring)
            undo.callback(function.close)
            self.pci.plug(function, slot, number)
        return function

    def unplug(self, function: PciFunction) -> None:
        """Unplug and close a function. Runs every step even if one fails, and can then be called again."""
        run_all(partial(self.pci.unplug, function), function.close)

    def close(self) -> None:
        """Close the VM, and unplug all functions. Idempotent."""
        run_all(
            self._hide_readable,
            self._undo.close,
            *(partial(self.unplug, function) for function in self.pci.functions),
        )
