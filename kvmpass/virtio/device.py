"""The interface of a virtio device, which a new kind of device implements."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from kvmpass.virtio.queue import Virtqueue

VERSION_1 = 1 << 32
"""Feature bit: the device follows version 1 of the specification or later."""
INDIRECT = 1 << 28
"""Feature bit: the driver may use indirect descriptors."""


class VirtioDevice(Protocol):
    """A device with queues. ``RingError`` from any of its methods: the transport asks the driver for a reset.

    Synchronization: called with the transport's lock and ``GuestMemory.lock`` held. What the device does on its own
    goes through the ``run`` that ``start`` gave it.
    """

    @property
    def device_type(self) -> int:
        """The type (Virtual I/O Device 1.2, section 5)."""

    @property
    def class_code(self) -> int:
        """The 24 bits of class, subclass and interface of its PCI function."""

    @property
    def features(self) -> int:
        """The feature bits that it offers, besides ``VERSION_1``."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """The largest number of entries of each queue, powers of two."""

    @property
    def deferred(self) -> Collection[int]:
        """The queues that a thread serves, while the guest runs on; the others are served in the exit."""

    @property
    def remote(self) -> Collection[int]:
        """The queues that another process serves: KVM signals their ``Virtqueue.kick``."""

    @property
    def vectors(self) -> int:
        """Number of interrupt vectors."""

    @property
    def config(self) -> bytes:
        """The device configuration structure, which no driver writes."""

    def start(self, queues: Sequence[Virtqueue], features: int, run: Callable[[Callable[[], None]], None]) -> None:
        """Begin: the driver is ready (DRIVER_OK), with ``features``. Queues that it has not enabled are not used.

        ``run`` calls a function with the locks held, from any thread, if the driver is still ready then.
        """

    def serve(self, number: int) -> None:
        """Handle the driver's notification of queue ``number``, which is enabled."""

    def stop(self) -> None:
        """End: the driver has reset the device, or the function is closed. Idempotent."""

    @property
    def stopping(self) -> bool:
        """Whether memory may still be accessed after ``stop``: the driver sees the reset when it no longer may."""

    def allow(self, allowed: bool) -> None:
        """Access memory, or not: the function may (its bus master bit), or may not. Not before the first call.

        The transport calls nothing else that accesses memory while it may not.
        """

    def interrupts_changed(self) -> None:
        """Handle that a queue's vector, or what it signals, is another one now. Called without the locks."""

    def close(self) -> None:
        """Access no memory after this. Called without the locks, after ``stop``. Idempotent."""


class LocalDevice:
    """What a ``VirtioDevice`` has whose queues are all served here."""

    remote: Collection[int] = ()
    """See ``VirtioDevice``."""
    vectors = 2
    """One for changes of the configuration, one for all queues: Linux shares it where there are no more."""
    stopping = False
    """See ``VirtioDevice``."""

    def allow(self, allowed: bool) -> None:
        """See ``VirtioDevice``: what is called may."""

    def interrupts_changed(self) -> None:
        """See ``VirtioDevice``: each signal looks it up."""

    def close(self) -> None:
        """See ``VirtioDevice``: there is nothing more to do."""
