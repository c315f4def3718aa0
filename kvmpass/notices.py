"""What the host says about a machine's devices, as events: VFIO's ERR and REQ interrupts, the IOMMU's faults."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack

from kvmpass.events import DeviceError, DeviceEvent, DeviceFault, DeviceIommuError, DeviceRequest
from kvmpass.host import Bdf, FaultLog, IommuEvent, open_fault_log
from kvmpass.vfio import Device
from kvmpass.watch import Watch

log = logging.getLogger(__name__)

_WARNINGS = (DeviceError, DeviceFault, DeviceIommuError, DeviceRequest)


class Notices:
    """Watches from a thread of its own, and hands events on.

    ``on_event`` gets every event, from whatever thread it is told in; all are logged. ``ours`` gives the devices
    whose faults matter.
    """

    def __init__(self, on_event: Callable[[DeviceEvent], None] | None, ours: Callable[[], Collection[Bdf]]) -> None:
        self._on_event = on_event
        self._ours = ours
        self._watch = Watch("devices")
        self._faults: FaultLog | None = None

    def tell(self, event: DeviceEvent) -> None:
        """Log it and pass it on; what ``on_event`` raises is logged, too: it must not keep a device from its due."""
        level = logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO
        log.log(level, "%s", event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                log.exception("on_event failed for: %s", event)

    def later(self, function: Callable[[], None]) -> None:
        """Do it in the watching thread: what a vCPU's must not wait for."""
        self._watch.call(function)

    def on_irq(self, device: Device, index: int, callback: Callable[[], None], undo: ExitStack) -> None:
        """Call back from the watching thread whenever VFIO raises the interrupt ``index`` (ERR, REQ).

        Nothing happens where the device or the kernel has no such interrupt. ``undo`` gets what ends it.
        """
        if index not in device.irqs or not device.irqs[index].count:
            return
        notice = _Notice(callback)
        undo.callback(notice.close)
        undo.callback(self._watch.remove, notice.eventfd)
        self._watch.add(notice.eventfd, notice.signalled)
        undo.callback(device.disable_irqs, index)
        device.set_irqs(index, 0, [notice.eventfd])

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
                self.tell(_event(found))

    def stop(self) -> None:
        """No more callbacks after this."""
        self._watch.close()
        if self._faults is not None:
            self._faults.close()


def _event(found: IommuEvent) -> DeviceEvent:
    if found.access and found.address is not None:
        return DeviceFault(str(found.bdf), found.address, found.access)
    return DeviceIommuError(str(found.bdf), found.kind, found.text)


class _Notice:
    """An eventfd that one thread reads while another may close it."""

    def __init__(self, callback: Callable[[], None]) -> None:
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
