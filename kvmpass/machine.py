"""A virtual machine that devices can be assigned to: its parts, put together and taken apart in order."""

from __future__ import annotations

import atexit
import enum
import logging
import re
import resource
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self
from weakref import WeakSet

from kvmpass._signals import deferred
from kvmpass.boot import acpi, ports
from kvmpass.boot.cpuid import guest_cpuid
from kvmpass.boot.e820 import e820_map
from kvmpass.boot.linux import KernelImage, LinuxEntry, load_linux
from kvmpass.bus import Bus
from kvmpass.devices.power import PowerControl, PowerEvent
from kvmpass.devices.serial import Serial16550
from kvmpass.domain import DmaMapping, Domain, compare
from kvmpass.errors import Closed, GuestError, LayoutError, NotAssignable
from kvmpass.host import Bdf, Sysfs, check_memory
from kvmpass.kvm import IrqRoutes, Memslots, System, Vcpu
from kvmpass.layout import PAGE, Layout, plan_layout
from kvmpass.memory import GuestMemory, RegionKind
from kvmpass.pci import CONFIG_ADDRESS, CONFIG_PORTS, AssignedFunction, BarSpace, ConfigPorts, Ecam, PciBus
from kvmpass.pci.config import COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY
from kvmpass.vcpus import Ending, VcpuThreads
from kvmpass.vfio import Device, Region

log = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from ``4096``, ``512M``, ``1G`` or ``1.5G``. Raises ``LayoutError`` for anything else."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise LayoutError(f"{text!r} is not a size: write a number and K, M, G or T, such as 512M")
    return int(float(match[1]) * _UNITS[match[2].upper()]) // PAGE * PAGE


def allow_descriptors() -> None:
    """Raise this process's soft limit of descriptors to its hard one: each MSI-X vector takes one, up to 2048."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class DeviceState(enum.Enum):
    ASSIGNED = "assigned"
    RELEASED = "released"


class AssignedDevice:
    """A device in this machine's domain. Made by ``Machine.assign``; gone after ``Machine.deassign``.

    Its registers are usable from Python: ``regions[0].read_int(0)``. Turn decoding and DMA on first: ``enable()``.
    """

    def __init__(self, bdf: Bdf, group: int, device: Device, undo: ExitStack) -> None:
        self.bdf = bdf
        self.group = group
        self.vfio = device
        self.slot: int | None = None
        self.state = DeviceState.ASSIGNED
        self._undo = undo

    @property
    def regions(self) -> dict[int, Region]:
        """By VFIO index: 0 to 5 the BARs, 6 the ROM, 7 configuration space; absent ones are absent."""
        return self.vfio.regions

    @property
    def config(self) -> Region:
        return self.vfio.config

    def enable(self, *, memory: bool = True, bus_master: bool = True) -> None:
        """Let the device decode its BARs, and do DMA. In a guest its driver does this."""
        command = self.config.read_int(COMMAND, 2)
        for bits, wanted in ((COMMAND_IO | COMMAND_MEMORY, memory), (COMMAND_MASTER, bus_master)):
            command = command | bits if wanted else command & ~bits
        self.config.write_int(COMMAND, command, 2)

    def reset(self) -> None:
        """Function or power-management reset, as VFIO chooses."""
        self.vfio.reset()

    def __repr__(self) -> str:
        return f"<AssignedDevice {self.bdf} {self.state.value}>"


# An interrupt may come between the end of a ``with`` body and ``__exit__``: what is open then is closed at exit,
# before host.borrow gives its devices back at exit (last registered, first called).
_open: WeakSet[Machine] = WeakSet()


@atexit.register
def _close_all() -> None:
    for machine in list(_open):
        machine.close()


class Machine:
    """One VM: memory, vCPUs, a DMA domain, a PCI bus. ``with Machine(memory="1G", cpus=2) as m:`` is its lifetime.

    ``memory``: bytes or text; ``cpus``: 1 to what KVM allows. Usable without a guest: ``memory`` reads and writes
    guest pages, assigned devices do DMA to them. Raises ``OSError`` (no ``/dev/kvm``), ``LayoutError``,
    ``ReservedRange``; then nothing is left behind.

    Call from one thread; the guest's vCPUs have their own. In the main thread Ctrl-C, SIGTERM and SIGHUP wait while
    a device goes in or out.
    """

    def __init__(self, memory: str | int = "1G", cpus: int = 1, *, sysfs: Sysfs | None = None) -> None:
        self._sysfs = sysfs or Sysfs()
        self._closed = False
        self._populated = False
        self._lock = threading.RLock()
        self._threads: VcpuThreads | None = None
        self._vcpus: list[Vcpu] = []
        self._entry: LinuxEntry | None = None
        self.cpus = cpus
        self.devices: list[AssignedDevice] = []
        with ExitStack() as undo:
            allow_descriptors()
            self._system = undo.enter_context(System())
            limit = self._system.max_vcpus
            if not 1 <= cpus <= limit:
                raise LayoutError(f"{cpus} CPUs: this host's KVM takes 1 to {limit}")
            size = parse_size(memory)
            self.layout: Layout = plan_layout(size, self._sysfs.reserved_regions(), self._phys_bits())
            self.vm = undo.enter_context(self._system.create_vm())
            self.vm.create_irqchip()
            self.routes = IrqRoutes(self.vm)
            self.memory = GuestMemory()
            undo.callback(self.memory.close)
            self.memslots = Memslots(self.vm)
            undo.callback(self.memslots.close)
            self.memory.listen(self.memslots)
            for index, part in enumerate(self.layout.ram):
                self.memory.add_ram(part.start, part.size, f"ram{index}")
            self._kvm_vfio = undo.enter_context(self.vm.create_vfio_device())
            self.domain = Domain(self.memory, self._kvm_vfio, self.layout.reserved)
            undo.callback(self.domain.close)
            self.ports = Bus("port")
            self.mmio = Bus("memory")
            self.pci = PciBus()
            self.ports.add(CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts(self.pci))
            self.mmio.add(self.layout.ecam.start, self.layout.ecam.size, Ecam(self.pci))
            self._bars = BarSpace(self.layout)
            self._sinks: list[Callable[[bytes], None]] = [lambda data: None] * len(ports.SERIAL_LINES)
            self.serials = [self._add_serial(number) for number in range(len(ports.SERIAL_LINES))]
            self.ports.add(ports.POWER_BASE, ports.POWER_SIZE, PowerControl(self._power_event))
            undo.callback(self._deassign_all)
            undo.callback(self._close_vcpus)
            _open.add(self)
            self._undo = undo.pop_all()

    def _phys_bits(self) -> int:
        """Width of the CPU's physical addresses (CPUID 8000_0008 EAX[7:0])."""
        leaves = {entry.function: entry for entry in self._system.get_supported_cpuid()}
        return leaves[0x8000_0008].eax & 0xFF if 0x8000_0008 in leaves else 40

    def close(self) -> None:
        """Stop the guest and release everything, in order; every step is tried. Twice is harmless."""
        if not self._closed:
            with deferred():
                self._closed = True
                _open.discard(self)
                self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- devices

    def assign(self, bdf: str | Bdf) -> AssignedDevice:
        """Put a device that is bound to vfio-pci into this machine (``kvmpass.host.borrow`` binds it).

        The first device pins and maps all memory. Raises ``BadAddress``, ``NoSuchDevice``, ``NotAssignable``,
        ``GroupNotViable``, ``DeviceInUse``, ``ReservedRange``, ``NotEnoughMemory`` or ``OSError``; then nothing has
        changed.
        """
        if self._closed:
            raise Closed("the machine is closed")
        found = self._sysfs.device(Bdf.parse(bdf) if isinstance(bdf, str) else bdf)
        if found.driver != "vfio-pci" or found.group is None:
            raise NotAssignable(
                f"{found.bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci",
                "use it inside `with kvmpass.host.borrow(bdf):`, or the command kvmpass assign",
            )
        if not self._populated:
            check_memory(self._sysfs, self.memory.ram_size)
            self.memory.populate()
            self._populated = True
        with deferred(), ExitStack() as undo:
            device = self.domain.attach(str(found.bdf), found.group)
            undo.callback(self.domain.detach, device)
            assigned = AssignedDevice(found.bdf, found.group, device, undo)
            function = AssignedFunction(device, self.vm, self.routes, self.memory, self.ports, self.mmio, self._bars)
            undo.callback(function.close)
            undo.callback(self._unplug, function)
            with self._lock:
                assigned.slot = self.pci.plug(function)
            self.devices.append(assigned)
            undo.callback(self.devices.remove, assigned)
            assigned._undo = undo.pop_all()
        return assigned

    def _unplug(self, function: AssignedFunction) -> None:
        with self._lock:
            self.pci.unplug(function)

    def deassign(self, device: AssignedDevice) -> None:
        """Take the device out again, backwards; every step is tried. A running guest is not told."""
        if device.state is DeviceState.RELEASED:
            return
        with deferred(), self._lock:
            device.state = DeviceState.RELEASED
            device._undo.close()

    def _deassign_all(self) -> None:
        with ExitStack() as steps:
            for device in list(self.devices):
                steps.callback(self.deassign, device)

    def audit(self) -> None:
        """Guest memory, KVM memslots and DMA mappings agree. Raises ``AuditFailed`` with every difference."""
        self.domain.audit()
        wanted = {
            DmaMapping(region.gpa, region.size, region.hva, region.kind is not RegionKind.ROM)
            for region in self.memory
        }
        found = {DmaMapping(slot.gpa, slot.size, slot.hva, not slot.readonly) for slot in self.memslots.ledger}
        compare("KVM memslots", wanted, found)

    # --- the guest

    def _add_serial(self, number: int) -> Serial16550:
        line = ports.SERIAL_LINES[number]
        serial = Serial16550(lambda data: self._sinks[number](data), lambda level: self.vm.irq_line(line.irq, level))
        self.ports.add(line.port, ports.SERIAL_PORTS, serial)
        return serial

    def connect_serial(self, number: int, on_output: Callable[[bytes], None]) -> Serial16550:
        """Where COM ``number`` + 1 sends what the guest writes; returns it, to push input into."""
        self._sinks[number] = on_output
        return self.serials[number]

    def load_linux(self, kernel: KernelImage, initrd: bytes | None, cmdline: str) -> None:
        """Put a kernel and what it needs to know into memory (64-bit boot protocol). Once for each machine.

        Raises ``BadKernel``, ``LayoutError``, ``NotEnoughMemory``.
        """
        tables = acpi.build_tables(self.layout, self.cpus)
        self._entry = load_linux(
            self.memory,
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            e820=e820_map(self.layout),
            rsdp=tables.rsdp,
        )
        for gpa, data in tables.tables:
            self.memory.write(gpa, data)

    def start(self) -> None:
        """Make the vCPUs and let the guest run. Raises ``GuestError`` if nothing was loaded or it runs already."""
        if self._entry is None or self._threads is not None:
            raise GuestError("load a kernel first, and start it once")
        entry, supported = self._entry, self._system.get_supported_cpuid()
        for index in range(self.cpus):
            vcpu = self.vm.create_vcpu(index)
            self._vcpus.append(vcpu)
            vcpu.set_cpuid2(guest_cpuid(supported, cpu=index, cpus=self.cpus))
        first = self._vcpus[0]
        first.enter_long_mode(
            cr3=entry.cr3,
            gdt=entry.gdt_base,
            gdt_limit=entry.gdt_limit,
            code=entry.code_selector,
            data=entry.data_selector,
        )
        first.set_regs(rip=entry.rip, rsi=entry.rsi, rflags=2)
        self._threads = VcpuThreads(self._vcpus, self.ports, self.mmio, self._lock)
        self._threads.start()

    def wait(self, timeout: float | None = None) -> Ending | None:
        """How the guest ended; None if it runs on after ``timeout`` seconds. Raises what made a vCPU fail."""
        if self._threads is None:
            raise GuestError("the guest was not started")
        return self._threads.wait(timeout)

    def stop(self, ending: Ending = Ending.STOPPED) -> None:
        """End the guest. From any thread, a bus device's too; ``wait()`` then returns ``ending``."""
        if self._threads is not None:
            self._threads.end(ending)

    @property
    def over(self) -> bool:
        """Whether a guest that was started has ended."""
        return self._threads is not None and self._threads.over

    @property
    def fault(self) -> str:
        """What KVM could not do for the guest, if that was its end."""
        return self._threads.fault if self._threads else ""

    @property
    def exits(self) -> int:
        """How often the guest left KVM for a device of ours."""
        return self._threads.exits if self._threads else 0

    def _power_event(self, event: PowerEvent) -> None:
        if event is PowerEvent.POWEROFF:
            self.stop(Ending.POWEROFF)
            return
        word = int.from_bytes(self.memory.read(ports.WARM_RESET_WORD, 2), "little")
        self.stop(Ending.PANIC if word == ports.WARM_RESET_MAGIC else Ending.REBOOT)

    def _close_vcpus(self) -> None:
        if self._threads is not None:
            self._threads.stop()
        vcpus, self._vcpus = self._vcpus, []
        for vcpu in vcpus:
            vcpu.close()


__all__ = ["AssignedDevice", "DeviceState", "Ending", "Machine", "parse_size"]
