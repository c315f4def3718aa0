"""A virtio device whose queues a daemon serves (vhost-user).

No data passes through this process: KVM signals the daemon's eventfd when the driver notifies it, and delivers the
interrupt when the daemon signals that of the queue's MSI-X vector. Set-up and reset are the front end's thread's, so
that a daemon that takes its time delays no vCPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from kvmpass._dataclass import dataclass
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass.errors import DaemonError
from kvmpass.virtio.device import INDIRECT, VirtioDevice
from kvmpass.virtio.frontend import FrontEnd, RemoteRing
from kvmpass.virtio.queue import RingError, Virtqueue

log = limited_log(__name__)

EVENT_INDEX = 1 << 29
"""Feature bit: driver and device say from which entry on they want notifications."""
_RING_FEATURES = INDIRECT | EVENT_INDEX


@dataclass(frozen=True, slots=True)
class _Setup:
    """What a driver has set up: compared by identity."""

    features: int
    queues: tuple[Virtqueue, ...]
    rings: tuple[RemoteRing, ...]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class RemoteDevice:
    """A ``VirtioDevice`` over ``front``, which outlives it.

    ``features``: the bits of its type that are offered to the driver if the daemon has them; ``queues``: sizes.
    Raises ``DaemonError`` if the daemon has fewer queues.

    Synchronization: as ``VirtioDevice``; what the daemon has is guarded by ``FrontEnd.lock``.
    """

    deferred = ()

    def __init__(
        self,
        front: FrontEnd,
        *,
        device_type: int,
        class_code: int,
        features: int,
        queues: Sequence[int],
        config: bytes,
    ) -> None:
        if len(queues) > front.queues:
            raise DaemonError(
                f"the daemon of {front.name} serves {front.queues} queues, not {len(queues)}",
                "use a daemon for this kind of device",
            )
        self._front = front
        self.device_type, self.class_code, self.config = device_type, class_code, config
        self.features = front.features & (features | _RING_FEATURES)
        """See ``VirtioDevice``."""
        self.queue_sizes = tuple(queues)
        """See ``VirtioDevice``."""
        self.remote = range(len(queues))
        """See ``VirtioDevice``."""
        self.vectors = 1 + len(queues)
        """One for changes of the configuration, one for each queue."""
        self._run: Callable[[Callable[[], None]], None] = lambda function: None
        self._wanted: _Setup | None = None  # what the driver has set up last
        self._given: _Setup | None = None  # what the daemon has; guarded by the front end's lock
        self._bases: tuple[_Setup | None, dict[int, int]] = None, {}  # of rings that may not be accessed now
        self._allowed = False
        self._scheduled = False

    # --- from the transport: nothing blocks

    def start(self, queues: Sequence[Virtqueue], features: int, run: Callable[[Callable[[], None]], None]) -> None:
        """See ``VirtioDevice``."""
        self._check_daemon()
        enabled = tuple(queue for queue in queues if queue.enabled)
        rings = []
        for number, queue in enumerate(queues):
            if queue.enabled:
                if not all(self._front.reaches(place) for place in queue.places):
                    raise RingError("a ring is outside of the memory that the daemon has")
                rings.append(RemoteRing(number, queue.size, queue.places, queue.kick))
        self._run, self._wanted = run, _Setup(features, enabled, tuple(rings))
        self._schedule()

    def stop(self) -> None:
        """See ``VirtioDevice``."""
        self._wanted = None
        self._schedule()

    def allow(self, allowed: bool) -> None:
        """See ``VirtioDevice``."""
        if allowed != self._allowed:
            self._allowed = allowed
            self._schedule()

    def serve(self, number: int) -> None:
        """See ``VirtioDevice``: a notification that has exited."""
        self._check_daemon()
        if self._wanted:
            for ring in self._wanted.rings:
                if ring.number == number:
                    self._front.kick(ring)

    def interrupts_changed(self) -> None:
        """See ``VirtioDevice``."""
        if self._wanted:
            self._schedule()

    @property
    def stopping(self) -> bool:
        """See ``VirtioDevice``."""
        return self._given is not None and self._given is not self._wanted and not self._front.ended

    def _check_daemon(self) -> None:
        if self._front.ended:
            raise RingError(self._front.ended)

    def _schedule(self) -> None:
        if not self._scheduled:  # one at a time, however often a guest asks for it
            self._scheduled = True
            self._front.call(self._reconcile)

    # --- in the front end's thread

    def _reconcile(self) -> None:
        """Let the daemon have what the driver has set up last, while the function may access memory."""
        self._scheduled = False  # before it is looked at: what comes later comes again
        front = self._front
        with front.conversation():
            wanted = self._wanted if self._allowed else None
            if self._given is not None and self._given is not wanted:
                self._bases = self._given, front.take()
                self._given = None
            if wanted is not None and not front.ended:
                calls = self._calls(wanted)
                try:
                    if self._given is None:
                        front.on_loss = self._on_loss
                        self._given = wanted
                        bases = self._bases[1] if self._bases[0] is wanted else {}
                        front.give(wanted.features, wanted.rings, calls, bases)
                    else:
                        front.renew_calls(calls)
                        # What the daemon has signalled before has reached nobody.
                        self._signal(calls)
                finally:
                    self._close(calls)

    def _calls(self, setup: _Setup) -> dict[int, int]:
        calls = {}
        for ring, queue in zip(setup.rings, setup.queues, strict=True):
            calls[ring.number] = -1
            with log_errors(log, "%s: %s", self._front.name):
                calls[ring.number] = queue.call(self._front.signals)
        return calls

    def _signal(self, calls: dict[int, int]) -> None:
        for number, eventfd in calls.items():
            if eventfd >= 0:
                self._front.signals.send(("call", number), eventfd)

    @staticmethod
    def _close(calls: dict[int, int]) -> None:
        for eventfd in calls.values():
            if eventfd >= 0:
                os.close(eventfd)

    def _on_loss(self, reason: str) -> None:
        def fail() -> None:
            raise RingError(reason)

        self._run(fail)

    def close(self) -> None:
        """See ``VirtioDevice``."""
        self._reconcile()


_CHECKED: type[VirtioDevice] = RemoteDevice
