"""What a driver sets up a virtio device with: status, features, queues, and their registers.

(Virtual I/O Device 1.2, sections 2.1 to 3.1 and 4.1.4.3.)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from functools import partial

from kvmpass._ratelimit import limited_log
from kvmpass.memory import GuestMemory
from kvmpass.virtio.device import INDIRECT, VERSION_1, VirtioDevice
from kvmpass.virtio.interrupts import CONFIG_CHANGE, VectorSink
from kvmpass.virtio.queue import RingError, Virtqueue

log = limited_log(__name__)

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
"""Bits of the device status."""
NO_VECTOR = 0xFFFF

_COMMON = struct.Struct("<IIIIHHBBHHHHHQQQ")
COMMON_SIZE = _COMMON.size
"""Bytes of the common configuration structure."""

(
    _FEATURE_SELECT,
    _FEATURE,
    _DRIVER_FEATURE_SELECT,
    _DRIVER_FEATURE,
    _CONFIG_VECTOR,
    _QUEUES,
    _STATUS,
    _GENERATION,
    _QUEUE_SELECT,
    _QUEUE_SIZE,
    _QUEUE_VECTOR,
    _QUEUE_ENABLE,
    _QUEUE_NOTIFY_OFF,
) = (0, 4, 8, 12, 16, 18, 20, 21, 22, 24, 26, 28, 30)
_DESCRIPTORS, _AVAILABLE, _USED = 32, 40, 48
PASSIVE = (0, _STATUS), (_QUEUE_SELECT, _QUEUE_ENABLE), (_DESCRIPTORS, COMMON_SIZE)
"""Offsets of fields whose writes have no effect by themselves: neither device_status nor queue_enable."""
_ADDRESSES = {_DESCRIPTORS: "descriptors", _AVAILABLE: "available", _USED: "used"}


class Transport:
    """A device's status, features and queues.

    ``allowed``: whether the function may access memory now (the command register's bus master bit). Nothing raises,
    whatever a guest does.

    Synchronization: from any thread; ``_lock`` guards all of it and the device. It is taken after the bus lock, and
    before ``GuestMemory.lock``.
    """

    def __init__(
        self, memory: GuestMemory, device: VirtioDevice, sink: VectorSink, allowed: Callable[[], bool]
    ) -> None:
        self._memory = memory
        self.device = device
        """The device."""
        self._sink = sink
        self._allowed = allowed
        self._lock = threading.RLock()
        self._offered = device.features | VERSION_1
        self.queues = [Virtqueue(memory, size, sink) for size in device.queue_sizes]
        """The queues, by number."""
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {  # by offset and size
            (_STATUS, 1): self._set_status,
            (_FEATURE_SELECT, 4): self._select_feature,
            (_DRIVER_FEATURE_SELECT, 4): self._select_driver_feature,
            (_DRIVER_FEATURE, 4): self._accept,
            (_CONFIG_VECTOR, 2): self._set_config_vector,
            (_QUEUE_SELECT, 2): self._select_queue,
        }
        self._before_reset = 0
        self._ended = False
        self._set_defaults()
        sink.on_change = device.interrupts_changed

    def _set_defaults(self) -> None:
        self._status = 0
        self._feature_select = self._driver_feature_select = self._queue_select = 0
        self._accepted = 0
        self._config_vector = NO_VECTOR
        self._missed = False  # something was to be done while the function could not access memory

    @property
    def status(self) -> int:
        """The device status. While a device that was reset may still access memory, that from before (2.4.2)."""
        return self._status or (self._before_reset if self.device.stopping else 0)

    @property
    def _live(self) -> bool:
        return self._status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    def reset(self) -> None:
        """Reset the device: the driver does it by writing 0 to the status."""
        with self._lock, self._memory.lock:
            # What the guest has written before, while the thread that serves these was still to run.
            for number in sorted(self.device.deferred):
                self.notify(number)
            self._before_reset = self.status
            self.device.stop()
            self._set_defaults()
            for queue in self.queues:
                queue.reset()

    def end(self) -> None:
        """Reset the device for good: a guest whose accesses still arrive cannot set it up again. Idempotent."""
        with self._lock:
            self._ended = True
            self.reset()

    # --- the device

    def notify(self, number: int) -> None:
        """Handle the driver's notification of queue ``number``."""
        with self._lock:
            if number < len(self.queues) and self.queues[number].enabled:
                self.run(partial(self.device.serve, number))

    def run(self, function: Callable[[], None]) -> None:
        """Call a function of the device with the locks held, if the driver is ready."""
        with self._lock:
            if self._live and self._allowed():
                self._guarded(function)
            elif self._live:
                self._missed = True

    def access_changed(self) -> None:
        """Let the device access memory or not, as the function may.

        Serve all queues, if something was to be done while it could not.
        """
        with self._lock:
            self.device.allow(self._allowed())
            if self._missed and self._allowed():
                self._missed = False
                for number in range(len(self.queues)):
                    self.notify(number)

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            with self._memory.lock:
                function()
        except RingError as error:
            log.warning("%s: the guest's driver must reset it: %s", self._sink.name, error)
            self._status |= NEEDS_RESET
            if self._status & DRIVER_OK:
                self._sink.signal(CONFIG_CHANGE, self._config_vector)

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        if self._ended:
            return
        before, value = self._status, value & ~NEEDS_RESET
        if value & FEATURES_OK and not before & FEATURES_OK:
            acceptable = self._accepted & VERSION_1 and not self._accepted & ~self._offered
            value &= ~0 if acceptable else ~FEATURES_OK
        if not (value | before) & FEATURES_OK:
            value &= ~DRIVER_OK
        self._status = value | before
        if self._status & DRIVER_OK and not before & DRIVER_OK:
            for queue in self.queues:
                queue.indirect = bool(self._accepted & INDIRECT)
            self._guarded(partial(self.device.start, self.queues, self._accepted, self.run))

    # --- the common configuration structure

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of the structure from ``offset`` on."""
        with self._lock:
            queue = self._selected
            features = self._offered >> 32 * self._feature_select & 0xFFFF_FFFF if self._feature_select < 2 else 0
            accepted = self._accepted >> 32 * self._driver_feature_select if self._driver_feature_select < 2 else 0
            values = _COMMON.pack(
                self._feature_select,
                features,
                self._driver_feature_select,
                accepted & 0xFFFF_FFFF,
                self._config_vector,
                len(self.queues),
                self.status,
                0,  # the configuration structure does not change while a driver reads it
                self._queue_select,
                queue.size if queue else 0,
                queue.vector if queue else NO_VECTOR,
                queue.enabled if queue else 0,
                self._queue_select if queue else 0,
                queue.descriptors if queue else 0,
                queue.available if queue else 0,
                queue.used if queue else 0,
            )
        return values[offset : offset + size]

    @property
    def _selected(self) -> Virtqueue | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def write(self, offset: int, data: bytes) -> None:
        """Write a field; others than whole ones, and the halves of an address, are dropped (section 4.1.3.1)."""
        value, size = int.from_bytes(data, "little"), len(data)
        with self._lock:
            if write := self._writers.get((offset, size)):
                write(value)
            elif (queue := self._selected) is not None:
                self._write_queue(queue, offset, size, value)

    def _select_feature(self, value: int) -> None:
        self._feature_select = value

    def _select_driver_feature(self, value: int) -> None:
        self._driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self._queue_select = value

    def _set_config_vector(self, value: int) -> None:
        self._config_vector = self._vector(value)

    def _accept(self, value: int) -> None:
        if self._driver_feature_select < 2 and not self._status & FEATURES_OK:
            shift = 32 * self._driver_feature_select
            self._accepted = self._accepted & ~(0xFFFF_FFFF << shift) | value << shift

    def _vector(self, value: int) -> int:
        return value if value < self._sink.count else NO_VECTOR

    def _write_queue(self, queue: Virtqueue, offset: int, size: int, value: int) -> None:
        """Write a field of the selected queue; once it is enabled only its vector can change."""
        if (offset, size) == (_QUEUE_VECTOR, 2):
            queue.vector = self._vector(value)
            self.device.interrupts_changed()
        elif queue.enabled:
            return
        elif (offset, size) == (_QUEUE_SIZE, 2):
            queue.size = value
        elif (offset, size, value) == (_QUEUE_ENABLE, 2, 1):
            self._guarded(queue.enable)
        elif name := _ADDRESSES.get(offset & ~7):
            shift = 8 * (offset & 7)
            if shift in (0, 32) and size in (4, 8) and offset % size == 0:
                kept = getattr(queue, name) & ~((1 << 8 * size) - 1 << shift)
                setattr(queue, name, kept | value << shift)
