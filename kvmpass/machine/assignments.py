"""The part of a machine that assigns devices: from the back end's choice to a device's return."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvmpass._signals import deferred
from kvmpass._teardown import run_all
from kvmpass.dma import Domain
from kvmpass.errors import Closed, NotAssignable
from kvmpass.events import DeviceReleased, DeviceReset
from kvmpass.host import Bdf, Sysfs
from kvmpass.host.address import parse_distinct
from kvmpass.host.backend import BackendChoice, check_backend
from kvmpass.host.doctor import check_memory
from kvmpass.host.limits import page_tables
from kvmpass.machine.backends import use_backend
from kvmpass.machine.device import AssignedDevice, BoundDevice, DeviceState, find_bound
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.machine.remotes import Remotes
from kvmpass.machine.requests import EJECT_SECONDS, Requests
from kvmpass.memory import MachineMemory
from kvmpass.vfio.device import ERR, REQ

if TYPE_CHECKING:
    from kvmpass.machine.passed import PassedIommu

_NONE: Mapping[Bdf, Any] = {}
V = TypeVar("V")


class Assignments(Remotes):
    """The base of ``Machine`` that assigns devices, resets and deassigns them.

    Synchronization: from any thread; ``Execution`` says which lock guards what.
    """

    domain: Domain
    _monitor: DeviceMonitor
    _requests: Requests
    _ram: MachineMemory

    def __init__(self, cpus: int, sysfs: Sysfs, backend: str | None) -> None:
        super().__init__(cpus)
        self._sysfs = sysfs
        self._wanted_backend = backend
        if backend is not None:
            check_backend(backend)
        self.backend: BackendChoice | None = None
        """The back end in use, and why; None with a factory, and before the first device that is not passed."""
        self._iommu: PassedIommu | None = None
        self.devices: list[AssignedDevice] = []
        """The assigned devices, in the order of their assignment."""

    def populate(self) -> None:
        """Allocate all of the guest's memory now. Idempotent.

        ``assign`` does it otherwise. Done before any device is rebound, it leaves the host unchanged even if this
        process is killed for lack of memory. Raises ``NotEnoughMemory``, ``HostNotReady`` (no thread for it) or
        ``OSError``.
        """
        with self.populating():
            pass

    @contextmanager
    def populating(self) -> Iterator[None]:
        """Allocate all of the guest's memory while the block runs: it is complete behind the block. Idempotent.

        Raises as ``populate``, ``NotEnoughMemory`` before the block. An exception of the block ends the allocation.

        Synchronization: from any thread. Other threads wait with what changes the set of devices, and with ``close``.
        """
        with self._device_lock:
            self._check_usable()
            added = self.memory.ordinary_size - self._ram.begun_size  # the rest was checked before it began
            if not self._ram.populated and (added > 0 or not self._ram.begun):
                check_memory(self._sysfs, added, locked=self.memory.ram_size, overhead=page_tables(added))
            try:
                self._ram.begin()
                yield
                self._ram.wait()
            except BaseException:
                self._ram.stop()  # the caller unmaps the memory next
                raise

    def assign(
        self, bdf: str | Bdf | None = None, *, fd: int | None = None, vf_token: uuid.UUID | None = None
    ) -> AssignedDevice:
        """Assign a device that is bound to vfio-pci (``kvmpass.host.borrow`` binds it) to this machine.

        ``fd``: its character device that is open and not bound, or its open group, for a machine with ``iommu_fd``;
        ``bdf`` is then needed only where a group has several devices. The machine uses a duplicate.

        The first device pins and maps all memory; further devices add no mappings. A running guest is notified
        (ACPI hot plug). A function shares the slot of its device's function 0 if that is assigned to this machine
        and no guest has enumerated it yet; otherwise it gets a slot of its own. ``vf_token``: the VF token (UUID) of
        a virtual function whose physical function is bound to vfio-pci too, or of that physical function. Raises
        ``BadAddress``, ``NoSuchDevice``, ``NotAssignable``, ``GroupNotViable``, ``DeviceInUse``, ``ReservedRange``,
        ``NotEnoughMemory``, ``HostNotReady`` (the back end is unavailable), ``BadDescriptor`` or ``OSError``; then
        nothing has changed, except that a passed character device may be bound, and must be opened again.
        """
        self._check_usable()
        found = self._find(Bdf.parse(bdf) if isinstance(bdf, str) else bdf, fd)
        [device] = self._assign([found], {found.bdf: fd} if fd is not None else {}, {found.bdf: vf_token})
        return device

    def assign_all(
        self,
        bdfs: Sequence[str | Bdf],
        *,
        fds: Mapping[str, int] | Mapping[Bdf, int] = _NONE,
        vf_tokens: Mapping[str, uuid.UUID | None] | Mapping[Bdf, uuid.UUID | None] = _NONE,
    ) -> list[AssignedDevice]:
        """Assign several devices, all or none, in this order; otherwise as ``assign``.

        A running guest is notified once all are plugged in.
        They are opened at the same time, so that their resets take as long as that of one; those with VF
        tokens one after the other. ``fds`` and ``vf_tokens`` are by address. Raises ``ValueError`` for those of
        another device.
        """
        self._check_usable()
        wanted = parse_distinct(bdfs)
        fd_of, token_of = _by_address("a descriptor", fds, wanted), _by_address("a VF token", vf_tokens, wanted)
        return self._assign([self._find(bdf, fd_of.get(bdf)) for bdf in wanted], fd_of, token_of)

    def _assign(
        self, found: Sequence[BoundDevice], fds: Mapping[Bdf, int], vf_tokens: Mapping[Bdf, uuid.UUID | None]
    ) -> list[AssignedDevice]:
        tokens = {str(bdf): token for bdf, token in vf_tokens.items() if token is not None}
        groups = {str(device.bdf): device.group for device in found}
        with self._device_lock:
            self.populate()
            offered = nullcontext() if self._iommu is None else self._iommu.offer(found, fds)
            with deferred(), offered:
                self._monitor.follow_faults()
                if self._iommu is None and self._wanted_backend and not self.domain.active:
                    bdfs = [device.bdf for device in found]
                    self.backend = use_backend(
                        self.domain, self._sysfs, bdfs, self._wanted_backend, vf_token=bool(tokens)
                    )
                opened = self.domain.attach_all(groups, tokens)
                devices: list[AssignedDevice] = []
                try:
                    for bound, vfio in zip(found, opened, strict=True):
                        devices.append(AssignedDevice(bound, vfio, self._bus_lock))
                    for device in devices:
                        self._connect(device)
                    for device in devices:  # last: a guest that probes one must not lose it when another fails
                        self._slots.announce(device)
                except BaseException as error:
                    undo = [partial(self._undo, device) for device in reversed(devices)]
                    undo += [partial(self.domain.detach, vfio) for vfio in opened[len(devices) :]]
                    run_all(*undo, failure=error)
                    raise
        return devices

    def _undo(self, device: AssignedDevice) -> None:
        if device in self.devices:
            self.deassign(device)
        else:
            run_all(*self._return_steps(device))

    def _find(self, bdf: Bdf | None, fd: int | None) -> BoundDevice:
        """Return the device that ``assign`` is to open, by its descriptor or its node."""
        if (fd is None) is not (self._iommu is None):
            raise ValueError("a device is assigned by its descriptor (fd) in a machine with iommu_fd, and only there")
        if self._iommu is not None and fd is not None:
            device = self._iommu.device(fd, bdf)
            assert device.group is not None
            return BoundDevice(device.bdf, device.group, device.reset_methods)
        if bdf is None:
            raise TypeError("assign() needs the device's address or descriptor")
        return find_bound(self._sysfs, bdf)

    def _connect(self, device: AssignedDevice) -> None:
        """Monitor a device that is in the domain, and plug it into the guest's bus."""
        if device.vfio.resettable:  # the kernel resets a device when it is opened, and again when it is closed
            self._monitor.emit(device.reset_event(device.vfio.open_seconds, "assign"))
        device.quiesce()
        self._monitor.watch(device.vfio, ERR, partial(self._requests.on_error, device))
        self._monitor.watch(device.vfio, REQ, partial(self._requests.on_request, device))
        self._slots.plug(device)
        self.devices.append(device)

    def _return_steps(self, device: AssignedDevice) -> Iterable[Callable[[], None]]:
        """Return the steps for a device that is unplugged from the guest's bus."""
        return (
            device.quiesce,  # before the translation goes, so that it blocks no DMA of a device that was busy
            partial(self._monitor.unwatch, device.vfio),
            partial(self.domain.detach, device.vfio),
            partial(self._emit_closed, device),
        )

    def _emit_closed(self, device: AssignedDevice) -> None:
        if device.vfio.resets_at_close:
            self._monitor.emit(device.reset_event(device.vfio.close_seconds, "deassign"))

    def unplug(self, device: AssignedDevice, timeout: float = EJECT_SECONDS) -> None:
        """Ask the running guest to eject ``device``, wait until it has, and deassign it.

        A guest ejects a slot: devices that share it are deassigned, too. Raises ``GuestError`` if the guest does not
        eject it within ``timeout`` seconds: it is still assigned then, and ``deassign`` removes it without asking. A
        guest that has read the request may eject it later; it is then deassigned (``DeviceReleased`` by ``guest``).
        """
        if self._has(device):
            ejected = self._slots.eject(device, timeout) if self._running else [device]
            run_all(*(partial(self.deassign, device) for device in ejected))

    def deassign(self, device: AssignedDevice) -> None:
        """Undo ``assign``, without asking a running guest. Idempotent.

        Raises ``OSError`` where KVM keeps a memslot over the device's pages, or the IOMMU a mapping: it stays
        assigned and its pages mapped, and ``deassign`` can be repeated. ``close`` ends what KVM keeps; a device whose
        BAR is still mapped for DMA stays open. After that every step runs even if one fails.
        """
        with deferred(), self._device_lock:
            if not self._has(device):
                return
            self._slots.unplug(device)
            device.state = DeviceState.RELEASED
            self.devices.remove(device)
            by = "guest" if device.ejected.is_set() else "host"
            run_all(*self._return_steps(device))
            if self._running:
                self._monitor.emit(DeviceReleased(str(device.bdf), by))

    def _deassign_unless_closed(self, device: AssignedDevice) -> None:
        with self._device_lock:
            if not self._closed:
                self.deassign(device)

    def _has(self, device: AssignedDevice) -> bool:
        """Whether ``device`` is still assigned. Raises ``NotAssignable`` for one of another machine."""
        if device.state is DeviceState.ASSIGNED and device not in self.devices:
            raise NotAssignable(f"{device.bdf} is not assigned to this machine")
        return device.state is DeviceState.ASSIGNED

    def _deassign_all(self) -> None:
        run_all(*(partial(self.deassign, device) for device in list(self.devices)))

    def reset_device(self, device: AssignedDevice, reason: str = "request") -> DeviceReset:
        """Reset the function, or else its slot or bus if all devices there are assigned to this machine.

        Raises ``NotAssignable`` where others are affected, ``OSError`` where there is no reset, or where a BAR that
        other devices reach cannot be unmapped before it.
        """
        with self._device_lock:
            if not self._has(device):
                raise Closed(f"{device.bdf} is no longer assigned")
            started = time.monotonic()
            method = None
            with self._suspended(device) if self.domain.p2p else nullcontext():
                if device.vfio.resettable:
                    device.vfio.reset()
                else:
                    self.domain.hot_reset(device.vfio)
                    method = "bus"
            device.failed = False
        event = device.reset_event(time.monotonic() - started, reason, method)
        self._monitor.emit(event)
        return event

    @contextmanager
    def _suspended(self, device: AssignedDevice) -> Iterator[None]:
        """Keep the BARs of all devices that a reset of ``device`` resets from being targets of DMA."""
        vfio = device.vfio
        names = [vfio.name] if vfio.resettable else [other.name for other in self.domain.dependent(vfio)]
        with deferred(), ExitStack() as stack:
            for other in self.devices:
                if other.vfio.name in names:
                    stack.enter_context(other.suspended())
            yield


def _by_address(what: str, values: Mapping[str, V] | Mapping[Bdf, V], wanted: Sequence[Bdf]) -> dict[Bdf, V]:
    found = {Bdf.parse(bdf) if isinstance(bdf, str) else bdf: value for bdf, value in values.items()}
    for bdf in found:
        if bdf not in wanted:
            raise ValueError(f"{what} of {bdf}, which is not among the devices")
    return found
