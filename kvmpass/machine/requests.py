"""What the host says about assigned devices, and the guest when it ejects one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from kvmpass._ratelimit import limited_log
from kvmpass.events import DeviceError, DeviceRequest
from kvmpass.machine.device import AssignedDevice, DeviceState
from kvmpass.machine.notices import Notices
from kvmpass.machine.slots import Slots

log = limited_log(__name__)

EJECT_SECONDS = 10.0  # for a guest to eject what the host requests


class Requests:
    """Errors, the host's requests for a device, and ejects: each ends in ``deassign``, in the thread for such things.

    ``end`` ends the guest for an error, if that is wanted. ``moves`` is the machine's lock of moves.

    Synchronization: ``on_error`` and ``on_request`` are called in the watching thread, ``on_eject`` in a vCPU's. None
    of them waits.
    """

    def __init__(
        self,
        slots: Slots,
        notices: Notices,
        moves: threading.RLock,
        deassign: Callable[[AssignedDevice], None],
        end: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._notices = notices
        self._moves = moves
        self._deassign = deassign
        self._end = end

    def on_error(self, device: AssignedDevice) -> None:
        """VFIO's ERR interrupt: an uncorrected error."""
        device.failed = True
        self._end()
        self._notices.tell_later(DeviceError(str(device.bdf)))

    def on_request(self, device: AssignedDevice) -> None:
        """VFIO's REQ interrupt, which it repeats until the device is closed; the guest is asked once."""
        if device.state is DeviceState.RELEASED:
            return
        self._notices.tell_later(DeviceRequest(str(device.bdf)))
        if not device.requested:
            device.requested = True
            self._notices.later(partial(self._request_eject, device))

    def _request_eject(self, device: AssignedDevice) -> None:
        """The guest ejects the device, or it is taken after a while; meanwhile nothing waits for that guest."""
        with self._moves:
            if self._slots.running() and device in self._slots.devices:
                self._slots.request_eject(device)
                self._notices.later(partial(self._take, device), EJECT_SECONDS)
                return
        self._take(device)

    def _take(self, device: AssignedDevice) -> None:
        device.requested = False  # VFIO asks again if this fails
        with self._moves:
            if device.state is DeviceState.ASSIGNED and self._slots.running():
                log.warning("the guest has not let go of %s within %g seconds", device.bdf, EJECT_SECONDS)
            self._deassign(device)

    def on_eject(self, slot: int) -> None:
        """The guest sees nothing there any more; the rest is done elsewhere, once."""
        for device in [one for one in list(self._slots.devices) if one.slot == slot and not one.ejected.is_set()]:
            try:
                self._slots.unplug(device)
            except OSError as error:
                log.warning("%s: %s", device.bdf, error)
            device.ejected.set()
            self._notices.later(partial(self._deassign, device))
