"""The part of a machine that runs a guest: serial ports, loading of the kernel, lifetime of the vCPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvmpass import ports
from kvmpass._signals import importing
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.board.board import Board
from kvmpass.board.power import PowerEvent
from kvmpass.board.serial import Serial16550
from kvmpass.boot import acpi
from kvmpass.boot.e820 import e820_map
from kvmpass.boot.linux import BOOT_PARAMS, LONG_MODE, KernelImage, load_linux
from kvmpass.errors import Closed, GuestError
from kvmpass.layout import LOCAL_APIC_BASE, Layout
from kvmpass.machine.slots import Slots
from kvmpass.memory import GuestMemory

if TYPE_CHECKING:
    from kvmpass.boot.unpacking import Unpacking
    from kvmpass.kvm import IrqRoutes, System, Vcpu, Vm
    from kvmpass.machine.vcpus import Accesses, GuestOutcome, VcpuThreads

_NMI = 4 << 8  # delivery mode of a message (AMD64 manual volume 2, 16.11)
Output = Callable[[bytes], None]
"""Receives what the guest writes to a port."""


class Execution:
    """The base of ``Machine`` that runs its guest.

    Synchronization: from any thread. Three locks, taken in this order:

    - ``_device_lock`` guards the set of devices, their slots and states, the board, and whether the guest was
      started. It is held while a device is added or removed, for as long as that takes.
    - ``_bus_lock`` guards the buses, their functions and the hot plug controller. A vCPU holds it for each exit
      that it dispatches, which those of the fast path are not (``kvm.Fastpath``).
    - ``memory.lock`` guards the list of regions and what mirrors it.

    ``stop``, ``ended`` and ``wait`` take none of them: a device's error ends the guest without delay.
    """

    _slots: Slots
    layout: Layout
    memory: GuestMemory

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        """Number of vCPUs."""
        self.count_accesses = False
        """Whether ``access_counts`` counts; from the next ``start()`` on."""
        self.kernel_decompressed = False
        """Whether the kernel loaded last starts as a vmlinux; else it is a bzImage, which decompresses itself."""
        self._bus_lock = threading.RLock()
        self._device_lock = threading.RLock()
        self._closed = False
        self._broken = False  # a reset has failed half-way
        self._outputs: dict[int | str, Output] = {}
        self._throttle: Callable[[], None] = lambda: None
        self._linux: tuple[KernelImage, bytes | None, str, bool, int, Unpacking | None] | None = None
        self._entry: int | None = None
        self._threads: VcpuThreads | None = None
        self._vcpus: list[Vcpu] = []

    def _check_usable(self) -> None:
        if self._closed:
            raise Closed("the machine is closed")
        if self._broken:
            raise Closed("a reset of this machine failed: it can only be closed")

    @property
    def _board(self) -> Board:
        return self._slots.board

    @property
    def vm(self) -> Vm:
        """The KVM VM; ``reset()`` replaces it."""
        return self._board.vm

    @property
    def routes(self) -> IrqRoutes:
        """The VM's table of interrupt routes."""
        return self._board.routes

    # --- serial and named ports

    def _write_output(self, port: int | str, data: bytes) -> None:
        if output := self._outputs.get(port):
            output(data)

    def connect(self, outputs: Mapping[int | str, Output], throttle: Callable[[], None] = lambda: None) -> None:
        """Send what the guest writes to ``outputs`` until ``disconnect()``; drop the rest.

        By number: COM1 to COM4 (0 to 3); by name: a port of ``add_ports``. Outputs are called from a vCPU's thread,
        or from the one that serves a port, and must not block; ``throttle``, called between accesses to I/O ports,
        may. Nothing else limits what a guest writes: outputs bound what they keep. All survive ``reset()``. Raises
        ``GuestError`` while somebody is connected, ``IndexError`` for a serial port that the machine does not have.
        """
        for port in outputs:
            if isinstance(port, int):
                self.serial(port)
        with self._device_lock:
            if self._outputs:
                raise GuestError("this machine's serial ports are connected", "leave the other guest first")
            self._outputs, self._throttle = dict(outputs), throttle

    def disconnect(self) -> None:
        """Drop what the guest writes after this. Idempotent."""
        with self._device_lock:
            self._outputs, self._throttle = {}, lambda: None

    def serial(self, number: int) -> Serial16550:
        """Return the UART of COM ``number`` + 1, which takes input.

        ``reset()`` replaces it. Raises ``IndexError``.
        """
        if not 0 <= number < len(ports.SERIAL_LINES):
            raise IndexError(f"serial port {number}: a machine has 0 to {len(ports.SERIAL_LINES) - 1}, COM1 to COM4")
        return self._board.serials[number]

    # --- from loading to the end

    def load_linux(
        self,
        kernel: KernelImage,
        initrd: bytes | None,
        cmdline: str,
        ecam_alone: bool = False,
        serial_ports: int = len(ports.SERIAL_LINES),
        unpacking: Unpacking | None = None,
    ) -> None:
        """Load a kernel, its initrd, command line and tables into memory (64-bit boot protocol).

        ``ecam_alone``: the guest reaches configuration space by ECAM (``CONFIG_PCI_MMCONFIG``) and not by ports. That
        takes fewer exits. ``serial_ports``: how many the guest is told of, from COM1 on. ``unpacking``: of
        this kernel, which then does not decompress itself where that is possible. ``reset()`` loads all again, and
        the kernel decompresses itself if the cache no longer has the result.

        Raises ``BadKernel``, ``LayoutError``, ``NotEnoughMemory``, ``OSError``; ``ValueError`` for the ``unpacking``
        of another kernel.
        """
        if unpacking is not None and unpacking.kernel is not kernel:
            raise ValueError(f"the decompression of {unpacking.kernel.path}, and not of {kernel.path}")
        tables, e820 = acpi.build_tables(self.layout, self.cpus, serial_ports), e820_map(self.layout)
        loaded = load_linux(self.memory, kernel, initrd=initrd, cmdline=cmdline, e820=e820, unpacking=unpacking)
        self._entry, self.kernel_decompressed = loaded.entry, loaded.decompressed
        for gpa, data in tables.items():
            self.memory.write(gpa, data)
        with self._bus_lock:
            self._board.configure_by_ecam(ecam_alone)
        self._linux = (kernel, initrd, cmdline, ecam_alone, serial_ports, unpacking)

    def _start_vcpus(self, system: System, entry: int) -> None:
        """Run the guest from ``entry`` on. Raises ``OSError`` if KVM refuses: then no vCPU runs."""
        with importing():  # after the devices are attached, which does not wait for it
            from kvmpass.machine.vcpus import VcpuThreads

        with undo_on_error(self._close_vcpus):
            self._make_vcpus(system, entry)
        board = self._board
        self._threads = VcpuThreads(
            self._vcpus,
            board.ports,
            board.mmio,
            self._bus_lock,
            lambda: self._throttle(),
            self.count_accesses,
            board.fastpath,
        )
        self._threads.start()

    def _make_vcpus(self, system: System, entry: int) -> None:
        with importing():
            from kvmpass.boot import mtrr
            from kvmpass.boot.cpuid import guest_cpuid

        supported, types = system.get_supported_cpuid(), mtrr.mtrrs(system.physical_bits)
        for index in range(self.cpus):
            vcpu = self._board.vm.create_vcpu(index, self._board.fastpath)
            self._vcpus.append(vcpu)
            vcpu.set_cpuid2(guest_cpuid(supported, cpu=index, cpus=self.cpus))
            vcpu.set_msrs(types)
        first = self._vcpus[0]
        first.enter_long_mode(**LONG_MODE)
        first.set_regs(rip=entry, rsi=BOOT_PARAMS, rflags=2)

    def _close_vcpus(self) -> None:
        """Stop every vCPU and close it; ``wait()`` still returns the outcome. Idempotent."""
        if self._threads is not None:
            self._threads.stop()
        vcpus, self._vcpus = self._vcpus, []
        run_all(*(vcpu.close for vcpu in vcpus))

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        """Wait until the guest has ended, and return how; None after ``timeout`` seconds.

        Raises ``GuestError`` if it was not started, and the exception that ended a vCPU's thread.
        """
        threads = self._threads
        if threads is None:
            raise GuestError("the guest was not started")
        return threads.wait(timeout)

    def stop(self, outcome: GuestOutcome | None = None) -> None:
        """End the guest without waiting for its vCPUs; ``wait()`` returns ``outcome`` if this is the first end.

        None is ``GuestOutcome.STOPPED``.
        """
        if threads := self._threads:
            threads.end(outcome)

    def pause(self, timeout: float = 5.0) -> None:
        """Stop every vCPU until ``resume``: registers and memory keep their values, but for devices' DMA.

        Raises ``GuestError`` if the guest does not run, or a vCPU does not leave it within ``timeout`` seconds.
        """
        threads = self._threads
        if threads is None or threads.ended:
            raise GuestError("the guest does not run")
        if not threads.pause(timeout):
            raise GuestError(f"a vCPU has not left the guest within {timeout:g} seconds", "read the guest's output")

    def resume(self) -> None:
        """Resume a paused guest. Idempotent."""
        if threads := self._threads:
            threads.resume()

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs of a started guest, by number. Their registers are readable while it is paused."""
        return tuple(self._vcpus)

    def inject_nmi(self, cpu: int = 0) -> None:
        """Inject a non-maskable interrupt into vCPU number ``cpu``. Raises ``IndexError``, ``OSError``."""
        if not 0 <= cpu < self.cpus:
            raise IndexError(f"CPU {cpu}: this machine has {self.cpus}")
        self._board.vm.signal_msi(LOCAL_APIC_BASE | cpu << 12, _NMI)

    @property
    def ended(self) -> bool:
        """Whether a started guest has ended."""
        threads = self._threads
        return threads is not None and threads.ended

    @property
    def _running(self) -> bool:
        threads = self._threads
        return threads is not None and not threads.ended

    @property
    def fault(self) -> str:
        """Why KVM could not run the guest (``GuestOutcome.FAULT``); empty otherwise."""
        return self._threads.fault if self._threads else ""

    @property
    def exit_reasons(self) -> dict[str, int]:
        """Number of exits since the last start, by reason: ``Port``, ``Mmio`` … (``kvmpass.kvm.exits``)."""
        return self._threads.reasons if self._threads else {}

    @property
    def access_counts(self) -> dict[str, Accesses]:
        """Number of exits since the last start, by what the guest accessed, most first, if ``count_accesses`` is set.

        Accesses that do not leave KVM (memory, mapped BARs, doorbells of virtio, the APICs) are not among them.
        """
        return self._threads.accesses if self._threads else {}

    def _power_event(self, event: PowerEvent) -> None:
        from kvmpass.machine.vcpus import GuestOutcome  # loaded, where a guest runs

        if event is PowerEvent.POWEROFF:
            self.stop(GuestOutcome.POWEROFF)
            return
        word = int.from_bytes(self.memory.read(ports.WARM_RESET_WORD, 2), "little")
        self.stop(GuestOutcome.PANIC if word == ports.WARM_RESET_MAGIC else GuestOutcome.REBOOT)
