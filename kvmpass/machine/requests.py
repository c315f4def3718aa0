"""Requests to remove assigned devices: the host's through VFIO, and the guest's ejects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from kvmpass._dataclass import dataclass
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass.events import DeviceError, DeviceRequest
from kvmpass.machine.device import AssignedDevice, DeviceState
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.machine.slots import Slots

log = limited_log(__name__)

EJECT_SECONDS = 10.0  # for a guest to eject what the host requests


@dataclass(eq=False, slots=True)
class Requests:
    """Handles VFIO's ERR and REQ interrupts and ejects; devices are deassigned in the monitor's job thread.

    Synchronization: ``on_error`` and ``on_request`` are called in the monitor's interrupt thread, ``on_eject`` in a
    vCPU's. None of them blocks.
    """

    slots: Slots
    """The devices and their slots."""
    monitor: DeviceMonitor
    """What emits events and runs jobs."""
    device_lock: threading.RLock
    """The machine's."""
    deassign: Callable[[AssignedDevice], None]
    """Deassigns a device."""
    end: Callable[[], None]
    """Is called for an uncorrected error."""

    def on_error(self, device: AssignedDevice) -> None:
        """Handle VFIO's ERR interrupt: an uncorrected error."""
        device.failed = True
        self.end()
        self.monitor.emit_later(DeviceError(str(device.bdf)))

    def on_request(self, device: AssignedDevice) -> None:
        """Handle VFIO's REQ interrupt, which is repeated until the device is closed: ask the guest once."""
        if device.state is DeviceState.RELEASED:
            return
        self.monitor.emit_later(DeviceRequest(str(device.bdf)))
        if not device.requested:
            device.requested = True
            self.monitor.defer(partial(self._request_eject, device))

    def _request_eject(self, device: AssignedDevice) -> None:
        """Ask the guest to eject the device, and remove it after ``EJECT_SECONDS`` in any case, without blocking."""
        with self.device_lock:
            if self.slots.running() and device in self.slots.devices:
                self.slots.request_eject(device)
                self.monitor.defer(partial(self._remove, device), EJECT_SECONDS)
                return
        self._remove(device)

    def _remove(self, device: AssignedDevice) -> None:
        device.requested = False  # VFIO asks again if this fails
        with self.device_lock:
            if device.state is DeviceState.ASSIGNED and self.slots.running():
                log.warning("the guest did not eject %s within %g seconds", device.bdf, EJECT_SECONDS)
            self.deassign(device)

    def on_eject(self, slot: int) -> None:
        """Handle the guest's eject of ``slot``: unplug its devices, and deassign each of them later, once."""
        for device in list(self.slots.devices):
            if device.slot == slot and not device.ejected.is_set():
                with log_errors(log, "%s: %s", device.bdf):
                    self.slots.unplug(device)
                device.ejected.set()
                self.monitor.defer(partial(self.deassign, device))
