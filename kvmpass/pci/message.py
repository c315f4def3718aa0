"""What MSI and MSI-X have in common: an enable bit in message control, and vectors that a sink signals."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpass._teardown import run_all
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import InterruptSink, Wiring
from kvmpass.pci.vector import MessageVector


class MessageCapability:
    """A capability at ``at`` of ``space`` with ``vectors`` vectors: the base of ``Msi`` and ``Msix``.

    Nothing but ``disable`` raises, whatever a guest writes.

    Synchronization: with the bus lock held.
    """

    KIND: str
    """``MSI`` or ``MSI-X``."""
    ENABLE: int
    """The enable bit of message control."""

    def __init__(self, wiring: Wiring, sink: InterruptSink, space: ConfigSpace, at: int, vectors: int) -> None:
        self._sink = sink
        self._space = space
        self.start = at
        """Where the capability begins."""
        self._vectors = [MessageVector(wiring.vm, wiring.routes) for _ in range(vectors)]
        self._signalled: set[int] = set()  # by the sink

    @property
    def _control(self) -> int:
        return self._space.get(self.start + 2, 2)

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled it."""
        return bool(self._control & self.ENABLE)

    def disable(self) -> None:
        """Remove irqfds and routes, disable the sink, close the eventfds. Runs every step even if one fails.

        Raises ``OSError``: what failed stays as it is, and ``disable`` can be called again. Idempotent.
        """
        used = [vector for vector in self._vectors if vector.open]
        run_all(*(vector.disconnect for vector in used), self._close_vectors)

    def _close_vectors(self) -> None:
        self._stop_signalling()
        run_all(*(vector.close for vector in self._vectors))

    def _stop_signalling(self) -> None:
        if self._signalled:
            self._sink.disable_irqs()
            self._signalled = set()


def pending_bits(vectors: Sequence[MessageVector]) -> int:
    """Return a bit for each vector: whether the device has raised it while the guest masks it."""
    return sum(vector.pending << bit for bit, vector in enumerate(vectors))
