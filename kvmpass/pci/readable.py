"""Configuration space as memory: what the guest reads by ECAM without an exit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.kvm import Fastpath, FastRegisters
from kvmpass.layout import Range
from kvmpass.memory import GuestMemory, HostMapping, MemoryRegion
from kvmpass.pci.bus import FUNCTIONS, SLOTS, Ecam, PciBus
from kvmpass.pciregs import EXTENDED_SIZE

log = limited_log(__name__)

_COUNT = SLOTS * FUNCTIONS
_STEP = 64  # bytes that are compared at once


class ReadableConfig:
    """Read-only memory over the ECAM window of bus 0, until ``close``.

    It has the functions that say what a guest reads (``PciFunction.config_image``), and the absent ones, as ones. An
    access of the others exits, as every write does; reads of those with ``FastRegisters`` are left to the fast path.
    Raises ``OSError``, ``LayoutError``.

    Synchronization: with the bus lock held.
    """

    def __init__(self, bus: PciBus, memory: GuestMemory, window: Range, fastpath: Fastpath) -> None:
        self._bus = bus
        self._fastpath = fastpath
        self._memory = memory
        self._base = window.start
        self._readable = [True] * _COUNT
        self._regions: dict[Range, MemoryRegion] = {}
        self._mapping = HostMapping(_COUNT * EXTENDED_SIZE)
        self._page = self._mapping.view(0, self._mapping.size)
        self._page[:] = b"\xff" * self._mapping.size
        self._images = [b"\xff" * EXTENDED_SIZE] * _COUNT  # what is there
        with undo_on_error(self.close):
            for devfn in bus.present:
                self._update(devfn)
            self._show()
            bus.observe(self.update)

    def close(self) -> None:
        """Remove the memory from the guest. Runs every step even if one fails; idempotent. Raises ``OSError``."""
        self._bus.observe(None)
        for devfn in range(_COUNT):  # the fast path has registers of BARs, too
            self._fastpath.remove(self._base + devfn * EXTENDED_SIZE)
        run_all(*(partial(self._remove, range_) for range_ in [*self._regions]))
        self._mapping.close()

    def update(self, devfn: int) -> None:
        """Show what a function says now, after a change. Raises ``OSError`` where KVM keeps a memslot."""
        if self._update(devfn):
            self._show()

    def _update(self, devfn: int) -> bool:
        """Update a function's page. Return whether it becomes readable, or ceases to be."""
        image = self._bus.image(devfn)
        at = self._base + devfn * EXTENDED_SIZE
        if isinstance(image, FastRegisters):
            self._fastpath.set(at, image, Ecam.LABEL)
        else:  # first: the file may be closed after this
            self._fastpath.remove(at)
        before, self._readable[devfn] = self._readable[devfn], isinstance(image, bytes)
        if isinstance(image, bytes) and image != self._images[devfn]:
            shown, self._images[devfn] = self._images[devfn], image
            page = self._page[devfn * EXTENDED_SIZE : (devfn + 1) * EXTENDED_SIZE]
            for at in range(0, EXTENDED_SIZE, _STEP):
                if shown[at : at + _STEP] != image[at : at + _STEP]:
                    for dword in range(at, at + _STEP, 4):  # a vCPU that reads one at the moment sees it whole
                        page[dword : dword + 4] = image[dword : dword + 4]
        return before != self._readable[devfn]

    def _runs(self) -> Iterator[Range]:
        """Yield the ranges of the window in which everything is readable."""
        start = None
        for devfn in range(_COUNT + 1):
            readable = devfn < _COUNT and self._readable[devfn]
            if readable and start is None:
                start = devfn
            elif not readable and start is not None:
                yield Range(start * EXTENDED_SIZE, (devfn - start) * EXTENDED_SIZE)
                start = None

    def _show(self) -> None:
        wanted = [*self._runs()]
        for range_ in [*self._regions]:
            if range_ not in wanted:
                self._remove(range_)
        for range_ in wanted:
            if range_ not in self._regions:
                with log_errors(log, "configuration space: %s"):  # accesses exit then: slower, but correct
                    self._regions[range_] = self._memory.add_registers(
                        self._base + range_.start, range_.size, self._mapping, range_.start, "configuration space"
                    )

    def _remove(self, range_: Range) -> None:
        self._memory.remove(self._regions[range_])
        del self._regions[range_]
