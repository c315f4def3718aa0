"""A virtual machine that devices can be assigned to: construction, assignment, reset, teardown."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Self
from weakref import WeakSet

from kvmpass import ports
from kvmpass._fd import raise_nofile_limit
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._signals import deferred
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.board.board import Board, BoardEvents
from kvmpass.dma import Domain, Type1
from kvmpass.errors import GuestError, NotAssignable
from kvmpass.events import DeviceEvent
from kvmpass.host import Sysfs
from kvmpass.host.backend import AUTO
from kvmpass.kvm import Memslots, System
from kvmpass.kvm.system import check_vcpus
from kvmpass.layout import Layout, Range, parse_size
from kvmpass.machine.assignments import Assignments
from kvmpass.machine.device import AssignedDevice
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.machine.requests import Requests
from kvmpass.machine.slots import Slots
from kvmpass.memory import Backing, MachineMemory, plan_memory
from kvmpass.memory.audit import Mirrored, compare

if TYPE_CHECKING:
    from kvmpass.dma import BackendFactory

log = limited_log(__name__)


# An interrupt may come between the end of a ``with`` body and ``__exit__``: machines that are still open are closed
# at exit, before host.borrow rebinds its devices at exit (last registered, first called).
_open: WeakSet[Machine] = WeakSet()


@atexit.register
def _close_all() -> None:
    for machine in list(_open):
        machine.close()


class Machine(Assignments):
    """One VM: memory, vCPUs, a DMA domain, a PCI bus. ``with Machine(memory="1G", cpus=2) as m:`` is its lifetime.

    ``memory``: bytes, or text such as ``512M``, or memory that exists already, with its ``backing``: the machine owns
    it from the call on, and closes it even if the machine cannot be made. ``cpus``: 1 to KVM's limit. Usable without
    a guest: ``memory`` reads and writes guest pages, and assigned devices do DMA to them. Raises ``OSError`` (no
    ``/dev/kvm``), ``LayoutError``, ``ReservedRange``, ``ValueError`` (no such ``backend``; another machine's
    memory), ``Closed`` (memory that is closed); then nothing is left behind.

    ``backing``: huge pages of the host's pools instead of anonymous memory (``NotEnoughMemory`` if they are too few).
    ``backend``: ``auto``, ``iommufd`` or ``type1`` (``kvmpass.host.backend``), or a ``kvmpass.dma.BackendFactory``.
    ``iommu_fd``: an open ``/dev/iommu`` or ``/dev/vfio/vfio`` that no other VM uses, of which the machine keeps a
    duplicate; devices then come by descriptors, too (``assign``), and neither node is opened.
    ``p2p``: peer-to-peer, each device's DMA reaches the BARs of the other devices where the guest has placed them,
    while they decode and are not reset by the guest or by ``reset_device``.
    ``on_event`` receives a ``kvmpass.events.DeviceEvent`` for each error, fault, reset and removal of a device. It is
    called from a thread of the machine, or from the one whose call caused the event; events are logged in any case.
    It must not wait for the machine. An uncorrected error of a device ends the guest, unless ``stop_on_error`` is
    false.

    In the main thread SIGINT, SIGTERM, SIGHUP and SIGQUIT are deferred while a device is added or removed.

    Synchronization: from any thread; ``Execution`` says which lock guards what.
    """

    def __init__(
        self,
        memory: str | int | MachineMemory = "1G",
        cpus: int = 1,
        *,
        backing: Backing = Backing.ANONYMOUS,
        backend: str | BackendFactory = AUTO,
        iommu_fd: int | None = None,
        sysfs: Sysfs | None = None,
        on_event: Callable[[DeviceEvent], None] | None = None,
        stop_on_error: bool = True,
        p2p: bool = False,
    ) -> None:
        with undo_on_error() as undo:
            if isinstance(memory, MachineMemory):
                memory.claim()
                undo.callback(memory.close)
            super().__init__(cpus, sysfs or Sysfs(), backend if isinstance(backend, str) else None)
            self._stop_on_error = stop_on_error
            raise_nofile_limit()
            if iommu_fd is not None:
                from kvmpass.machine.passed import PassedIommu

                self._iommu = undo.enter_context(PassedIommu(self._sysfs, iommu_fd, self._wanted_backend))
                self.backend = self._iommu.check_unused().choice
            self._system = undo.enter_context(System())
            check_vcpus(cpus, self._system.max_vcpus)
            if not isinstance(memory, MachineMemory):
                reserved, bits = self._sysfs.reserved_regions(), self._system.physical_bits
                memory = MachineMemory(plan_memory(parse_size(memory), reserved, bits, backing))
                undo.callback(memory.close)
            self._ram = memory
            self.layout: Layout = memory.plan.layout
            """Guest-physical addresses of RAM and of the BAR windows."""
            self.memory = memory.regions
            """The list of the guest's memory regions."""
            self._slots = Slots(self._make_board(), self.devices, self._bus_lock, lambda: self._running, p2p)
            undo.callback(lambda: self._board.close())
            self.memslots = Memslots(self._board.vm)
            """The regions as KVM memslots."""
            undo.callback(self.memslots.close)
            self.memory.listen(self.memslots)
            made = self._iommu or (backend if callable(backend) else Type1)  # Type1 until the first device
            self.domain = Domain(self.memory, made, self._board.kvm_vfio, self.layout.reserved, p2p=p2p)
            """The DMA domain of all assigned devices."""
            undo.callback(self.domain.close)
            self._monitor = DeviceMonitor(on_event, lambda: {device.bdf for device in list(self.devices)})
            self._requests = Requests(
                self._slots, self._monitor, self._device_lock, self._deassign_unless_closed, self._end_for_error
            )
        _open.add(self)

    def _make_board(self) -> Board:
        outputs = [partial(self._write_output, number) for number in range(len(ports.SERIAL_LINES))]
        events = BoardEvents(self._power_event, self._on_eject, outputs)
        return Board(self._system, self.layout, self.memory, events)

    def close(self) -> None:
        """Stop the guest and release everything, in order. Runs every step even if one fails; idempotent.

        A memslot that KVM does not delete ends with the VM: only then its pages are unmapped and its device closed.
        """
        with deferred():
            with self._device_lock:
                closed, self._closed = self._closed, True
            if closed:
                return
            _open.discard(self)
            # The first two without the lock: the machine's own threads, which they join, may wait for it.
            run_all(self._close_vcpus, self._monitor.stop, self._release)

    def _release(self) -> None:
        """Devices; the VM; devices whose removal failed while the VM existed; daemons; mappings; memory."""
        with self._device_lock:
            run_all(
                self._deassign_all,
                partial(self.domain.rebind_kvm, None),
                partial(self._slots.close, self._board),
                self._deassign_all,
                self._close_remotes,
                self.domain.close,
                *([self._iommu.close] if self._iommu else []),
                self.memslots.close,
                self._ram.close,
                self._system.close,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def audit(self) -> None:
        """Compare KVM's memslots, the DMA mappings and what daemons have with the guest's memory.

        Raises ``AuditFailed`` with every difference.
        """
        with self._bus_lock, self.memory.lock:  # else a guest may move a BAR in between
            self.domain.audit()
            wanted = {Mirrored(region.range, region.hva, region.kind.guest_writable) for region in self.memory}
            slots = self.memslots.ledger
            found = {Mirrored(Range(slot.gpa, slot.size), slot.hva, not slot.readonly) for slot in slots}
            compare("KVM memslots", wanted, found)
            for remote in list(self._remotes):
                remote.front.audit()

    # --- the guest

    def start(self) -> None:
        """Create the vCPUs and run the guest.

        Raises ``GuestError`` if no kernel was loaded, or the guest was started before. Raises ``OSError`` if KVM
        refuses; then call ``reset()`` before the next try.
        """
        with self._device_lock:
            self._check_usable()
            if self._entry is None or self._threads is not None:
                raise GuestError("load a kernel first, and start it once")
            if self._stop_on_error:
                self._check_daemons()
            for device in self.devices:
                if device.failed and self._stop_on_error:
                    raise GuestError(f"{device.bdf} has had an uncorrected error", "try Machine.reset_device")
                if device.number and all(other.number or other.slot != device.slot for other in self.devices):
                    self._slots.unplug(device)  # without function 0 a guest does not enumerate the slot
                    self._slots.plug(device)
            self._start_vcpus(self._system, self._entry)

    def reset(self) -> None:
        """Reset the machine: stop the guest, reset its devices, load the kernel again. ``start()`` boots it.

        A new VM replaces the old one over the same memory: mappings, open devices and their slots stay. Interrupts
        are disabled before a device is reset. KVM keeps the VM that a device was opened for, without memory and
        vCPUs, until the device is closed. Raises ``OSError``: the machine can then only be closed.
        """
        with deferred(), self._device_lock:
            self._check_usable()
            self._close_vcpus()
            self._threads = None
            self._broken = True
            for device in list(self.devices):
                if device.ejected.is_set():  # its removal is pending
                    self.deassign(device)
            self._remove_ejected()
            devices = sorted(self.devices, key=lambda device: device.bdf)
            for device in devices:
                self._slots.unplug(device)
            for step in (AssignedDevice.quiesce, partial(self.reset_device, reason="guest reset")):
                for device in devices:  # all are quiesced before the first reset, which may be a bus reset
                    try:
                        step(device)
                    except (OSError, NotAssignable) as error:
                        log.warning("%s cannot be reset: %s", device.bdf, error)
            old = self._board
            with undo_on_error() as undo:
                board = self._make_board()
                undo.callback(board.close)
                undo.callback(self.memslots.move, old.vm)
                self.memslots.move(board.vm)
                undo.callback(self.domain.rebind_kvm, old.kvm_vfio)
                self.domain.rebind_kvm(board.kvm_vfio)
                self._slots.use(board)
            with log_errors(log, "%s"):  # no vCPU runs in the old VM
                run_all(partial(self.memslots.leave, old.vm), partial(self._slots.close, old))
            for device in devices:
                self._slots.plug(device)
            if self._linux is not None:
                self.load_linux(*self._linux)
            self._broken = False

    def _on_eject(self, slot: int) -> None:
        self._requests.on_eject(slot)
        self._on_eject_remote(slot)

    def _end_for_error(self) -> None:
        if self._stop_on_error:
            from kvmpass.machine.vcpus import GuestOutcome  # loaded, where a guest runs

            self.stop(GuestOutcome.DEVICE_ERROR)
