"""Requests to remove assigned devices: the host's through VFIO, and the guest's ejects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from kvmpass._ratelimit import limited_log
from kvmpass.events import DeviceError, DeviceRequest
from kvmpass.machine.device import AssignedDevice, DeviceState
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.machine.slots import Slots

log = limited_log(__name__)

EJECT_SECONDS = 10.0  # for a guest to eject what the host requests


class Requests:
    """Handles VFIO's ERR and REQ interrupts and ejects; devices are deassigned in the monitor's job thread.

    ``end`` is called for an uncorrected error. ``device_lock`` is the machine's.

    Synchronization: ``on_error`` and ``on_request`` are called in the monitor's interrupt thread, ``on_eject`` in a
    vCPU's. None of them blocks.
    """

    def __init__(
        self,
        slots: Slots,
        monitor: DeviceMonitor,
        device_lock: threading.RLock,
        deassign: Callable[[AssignedDevice], None],
        end: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._monitor = monitor
        self._device_lock = device_lock
        self._deassign = deassign
        self._end = end

    def on_error(self, device: AssignedDevice) -> None:
        """Handle VFIO's ERR interrupt: an uncorrected error."""
        device.failed = True
        self._end()
        self._monitor.emit_later(DeviceError(str(device.bdf)))

    def on_request(self, device: AssignedDevice) -> None:
        """Handle VFIO's REQ interrupt, which is repeated until the device is closed: ask the guest once."""
        if device.state is DeviceState.RELEASED:
            return
        self._monitor.emit_later(DeviceRequest(str(device.bdf)))
        if not device.requested:
            device.requested = True
            self._monitor.defer(partial(self._request_eject, device))

    def _request_eject(self, device: AssignedDevice) -> None:
        """Ask the guest to eject the device, and remove it after ``EJECT_SECONDS`` in any case, without blocking."""
        with self._device_lock:
            if self._slots.running() and device in self._slots.devices:
                self._slots.request_eject(device)
                self._monitor.defer(partial(self._remove, device), EJECT_SECONDS)
                return
        self._remove(device)

    def _remove(self, device: AssignedDevice) -> None:
        device.requested = False  # VFIO asks again if this fails
        with self._device_lock:
            if device.state is DeviceState.ASSIGNED and self._slots.running():
                log.warning("the guest did not eject %s within %g seconds", device.bdf, EJECT_SECONDS)
            self._deassign(device)

    def on_eject(self, slot: int) -> None:
        """Handle the guest's eject of ``slot``: unplug its devices, and deassign each of them later, once."""
        for device in list(self._slots.devices):
            if device.slot == slot and not device.ejected.is_set():
                try:
                    self._slots.unplug(device)
                except OSError as error:
                    log.warning("%s: %s", device.bdf, error)
                device.ejected.set()
                self._monitor.defer(partial(self._deassign, device))
