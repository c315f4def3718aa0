"""The host's reports about a machine's devices, as events: VFIO's ERR and REQ interrupts, the IOMMU's faults."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from functools import partial

from kvmpass._eventloop import EventLoop
from kvmpass._log import Log
from kvmpass._ratelimit import RateLimit
from kvmpass._teardown import run_all
from kvmpass.events import DeviceError, DeviceEvent, DeviceEventsDropped, DeviceFault, DeviceIommuError, DeviceRequest
from kvmpass.host import Bdf
from kvmpass.host.kernel.faults import FaultLog, IommuEvent, open_fault_log
from kvmpass.vfio import Device, Irqs

log = Log(__name__)

_REPEATED = (DeviceError, DeviceFault, DeviceIommuError, DeviceRequest)  # a device, or the host, sets their rate
_MAX_WAITING = 1000  # events that a slow on_event has not received yet
_LAST_SECONDS = 1.0  # for those, and for what jobs emit, when the machine is closed


class DeviceMonitor:
    """Receives the host's reports and emits device events.

    ``on_event`` receives every event, in the thread that emits it; all are logged. Events that a device can repeat
    are limited to ten in five seconds for each device and kind; ``DeviceEventsDropped`` then says how many were
    dropped. ``assigned`` returns the devices whose faults are emitted.

    Synchronization: from any thread. Two threads of its own: one receives interrupts and faults and never blocks, the
    other runs what takes time, one job after the other: removal of devices, ``on_event``.
    """

    def __init__(
        self, on_event: Callable[[DeviceEvent], None] | None, assigned: Callable[[], Collection[Bdf]]
    ) -> None:
        self._on_event = on_event
        self._assigned = assigned
        self._loop = EventLoop("devices")
        self._jobs = EventLoop("device jobs")
        self._limit = RateLimit()
        self._lock = threading.Lock()  # of the two counts
        self._waiting = self._lost = 0
        self._faults: FaultLog | None = None
        self._watched: dict[Device, list[_Interrupt]] = {}

    def emit(self, event: DeviceEvent) -> None:
        """Log ``event`` and pass it to ``on_event``. An exception of ``on_event`` is logged, and goes no further."""
        if isinstance(event, _REPEATED):
            dropped = self._limit.admit((type(event), event.bdf))
            if dropped is None:
                return
            if dropped:
                self._deliver(DeviceEventsDropped(event.bdf, type(event).__name__, dropped))
        self._deliver(event)

    def _deliver(self, event: DeviceEvent) -> None:
        note = log.warning if isinstance(event, _REPEATED) else log.info
        note("%s", event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                log.exception("on_event failed for: %s", event)

    def emit_later(self, event: DeviceEvent) -> None:
        """Emit ``event`` in the job thread. Beyond a thousand pending events it is dropped and counted."""
        with self._lock:
            if self._waiting >= _MAX_WAITING:
                self._lost += 1
                return
            self._waiting += 1
        self.defer(partial(self._emit_waiting, event))

    def _emit_waiting(self, event: DeviceEvent) -> None:
        with self._lock:
            self._waiting -= 1
            lost, self._lost = self._lost, 0
        if lost:
            log.warning("%d events of devices were dropped: on_event is too slow", lost)
        self.emit(event)

    def defer(self, function: Callable[[], None], seconds: float = 0.0) -> None:
        """Run ``function`` in the job thread after ``seconds``. The queue has no limit: no guest may fill it."""
        self._jobs.call(function, seconds)

    def watch(self, device: Device, index: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever VFIO signals the interrupt ``index`` (``ERR``, ``REQ``) of ``device``.

        ``callback`` must not block. Does nothing where the device or the kernel has no such interrupt. Raises
        ``OSError``; ``unwatch`` undoes it in any case.
        """
        irqs = device.irqs.get(index)
        if irqs is None or not irqs.count:
            return
        interrupt = _Interrupt(irqs, callback)
        self._watched.setdefault(device, []).append(interrupt)
        self._loop.add_reader(interrupt.eventfd, interrupt.signalled)
        irqs.set_irqs(0, [interrupt.eventfd])

    def unwatch(self, device: Device) -> None:
        """Undo ``watch``: only a callback that runs already finishes. Runs every step even if one fails."""
        run_all(*(partial(self._close, interrupt) for interrupt in self._watched.pop(device, ())))

    def _close(self, interrupt: _Interrupt) -> None:
        remove = partial(self._loop.remove_reader, interrupt.eventfd)
        run_all(interrupt.irqs.disable_irqs, remove, interrupt.close)

    def follow_faults(self) -> None:
        """Emit what the host's IOMMU reports. Log the reason where the kernel's log is unreadable. Idempotent."""
        if self._faults is None:
            opened = open_fault_log()
            if isinstance(opened, str):
                log.info("%s", opened)
                return
            self._faults = opened
            self._loop.add_reader(opened.fd, self._read_faults)

    def _read_faults(self) -> None:
        assert self._faults is not None
        assigned = self._assigned()
        for found in self._faults.read():
            if found.bdf in assigned:
                self.emit_later(_event(found))

    def stop(self) -> None:
        """End both threads; only a callback that calls this goes on.

        Events that were emitted before, such as what ended the guest, are passed on for two seconds at most.
        """
        run_all(self._loop.close, self._emit_rest, self._jobs.close, *([self._faults.close] if self._faults else []))

    def _emit_rest(self) -> None:
        self._jobs.flush(_LAST_SECONDS)
        if self._waiting:  # a job has emitted them
            self._jobs.flush(_LAST_SECONDS)


def _event(found: IommuEvent) -> DeviceEvent:
    if found.access and found.address is not None:
        return DeviceFault(str(found.bdf), found.address, found.access)
    return DeviceIommuError(str(found.bdf), found.kind, found.text)


class _Interrupt:
    """An interrupt's eventfd, which one thread reads while another may close it."""

    def __init__(self, irqs: Irqs, callback: Callable[[], None]) -> None:
        self.irqs = irqs
        self._callback = callback
        self._lock = threading.Lock()
        self._open = True
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signalled(self) -> None:
        with self._lock:
            if not self._open:
                return
            os.eventfd_read(self.eventfd)
        self._callback()

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self.eventfd)
