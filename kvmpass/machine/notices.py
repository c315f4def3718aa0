"""What the host says about a machine's devices, as events: VFIO's ERR and REQ interrupts, the IOMMU's faults."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection
from functools import partial

from kvmpass._ratelimit import RateLimit
from kvmpass._teardown import run_all
from kvmpass.events import DeviceError, DeviceEvent, DeviceEventsDropped, DeviceFault, DeviceIommuError, DeviceRequest
from kvmpass.host import Bdf
from kvmpass.host.kernel.faults import FaultLog, IommuEvent, open_fault_log
from kvmpass.machine.watch import Watch
from kvmpass.vfio import Device

log = logging.getLogger(__name__)

_REPEATED = (DeviceError, DeviceFault, DeviceIommuError, DeviceRequest)  # as often as a device, or the host, likes
_MAX_WAITING = 1000  # events that a slow on_event has not seen yet


class Notices:
    """Watches the host, and hands events on.

    ``on_event`` gets every event, from whatever thread it is told in; all are logged. Of what a device can repeat ten
    are told in five seconds for each device and kind, then how many were dropped (``DeviceEventsDropped``). ``ours``
    gives the devices whose faults matter.

    Synchronization: from any thread. There are two of its own: one hears of what happens and waits for nothing, the
    other one does what takes time, one thing after the other: devices that leave, ``on_event``.
    """

    def __init__(self, on_event: Callable[[DeviceEvent], None] | None, ours: Callable[[], Collection[Bdf]]) -> None:
        self._on_event = on_event
        self._ours = ours
        self._watch = Watch("devices")
        self._jobs = Watch("device jobs")
        self._limit = RateLimit()
        self._lock = threading.Lock()  # of the two counts
        self._waiting = self._lost = 0
        self._faults: FaultLog | None = None
        self._watched: dict[Device, list[_Notice]] = {}

    def tell(self, event: DeviceEvent) -> None:
        """Log it and pass it on; what ``on_event`` raises is logged, too: it must not keep a device from its due."""
        if isinstance(event, _REPEATED):
            dropped = self._limit.admit((type(event), event.bdf))
            if dropped is None:
                return
            if dropped:
                self._pass(DeviceEventsDropped(event.bdf, type(event).__name__, dropped))
        self._pass(event)

    def _pass(self, event: DeviceEvent) -> None:
        level = logging.WARNING if isinstance(event, _REPEATED) else logging.INFO
        log.log(level, "%s", event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                log.exception("on_event failed for: %s", event)

    def tell_later(self, event: DeviceEvent) -> None:
        """The same, in the thread for what takes time. Events beyond a thousand that wait are dropped and counted."""
        with self._lock:
            if self._waiting >= _MAX_WAITING:
                self._lost += 1
                return
            self._waiting += 1
        self.later(partial(self._tell_waiting, event))

    def _tell_waiting(self, event: DeviceEvent) -> None:
        with self._lock:
            self._waiting -= 1
            lost, self._lost = self._lost, 0
        if lost:
            log.warning("%d events of devices were dropped: on_event is too slow", lost)
        self.tell(event)

    def later(self, function: Callable[[], None], seconds: float = 0.0) -> None:
        """Do it in the thread for what takes time, in so many seconds. No guest may be able to repeat that."""
        if seconds:
            self._jobs.call_later(seconds, function)
        else:
            self._jobs.call(function)

    def watch(self, device: Device, index: int, callback: Callable[[], None]) -> None:
        """Call back from the watching thread whenever VFIO raises the interrupt ``index`` (ERR, REQ).

        ``callback`` must not wait. Nothing happens where the device or the kernel has no such interrupt. Raises
        ``OSError``; ``unwatch`` ends it in any case.
        """
        if index not in device.irqs or not device.irqs[index].count:
            return
        notice = _Notice(index, callback)
        self._watched.setdefault(device, []).append(notice)
        self._watch.add(notice.eventfd, notice.signalled)
        device.set_irqs(index, 0, [notice.eventfd])

    def unwatch(self, device: Device) -> None:
        """No callbacks for ``device`` after this, but for one that runs. Runs every step even if one fails."""
        run_all(
            step
            for notice in self._watched.pop(device, ())
            for step in (
                partial(device.disable_irqs, notice.index),
                partial(self._watch.remove, notice.eventfd),
                notice.close,
            )
        )

    def follow_faults(self) -> None:
        """From now on tell what the host's IOMMU reports. Where the kernel's log is out of reach, say why."""
        if self._faults is None:
            opened = open_fault_log()
            if isinstance(opened, str):
                log.info("%s", opened)
                return
            self._faults = opened
            self._watch.add(opened.fd, self._read_faults)

    def _read_faults(self) -> None:
        assert self._faults is not None
        ours = self._ours()
        for found in self._faults.read():
            if found.bdf in ours:
                self.tell_later(_event(found))

    def stop(self) -> None:
        """No more callbacks after this, but for one that calls it."""
        run_all((self._watch.close, self._jobs.close, *([self._faults.close] if self._faults else [])))


def _event(found: IommuEvent) -> DeviceEvent:
    if found.access and found.address is not None:
        return DeviceFault(str(found.bdf), found.address, found.access)
    return DeviceIommuError(str(found.bdf), found.kind, found.text)


class _Notice:
    """An eventfd that one thread reads while another may close it."""

    def __init__(self, index: int, callback: Callable[[], None]) -> None:
        self.index = index
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
