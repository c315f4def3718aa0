"""KVM's routes and irqfds, and the interrupts of a VFIO device, made up, with the kernel's rules.

(virt/kvm/eventfd.c: an eventfd has one irqfd, and one that is signalled already is delivered at once;
drivers/vfio/pci/vfio_pci_intrs.c: one kind at a time, and which calls need it on or off.)
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from kvmpass.vfio.device import INTX, MSI, MSIX, Irqs


class FakeKvm:
    """A VM and its routes in one. ``refusing``: names of calls that fail. ``delivered``: messages, in order."""

    closed = False

    FIRST_GSI = 24

    def __init__(self, limit: int = 4096) -> None:
        self.limit = limit
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqfds: dict[int, int] = {}
        self.ioeventfds: dict[tuple[int, int], int] = {}
        self.coalescing: set[tuple[int, int]] = set()
        self.delivered: list[tuple[int, int]] = []
        self.pins: dict[int, tuple[int, int]] = {}
        self.refusing: set[str] = set()
        self.log: list[str] = []
        self.wiring: Any = SimpleNamespace(vm=self, routes=self)

    def _call(self, name: str) -> None:
        self.log.append(name)
        if name in self.refusing:
            raise OSError(errno.EINVAL, name)

    # --- IrqRoutes

    def add(self, address: int, data: int) -> int:
        self._call("add")
        assert address >> 20 == 0xFEE, "memory is no message"
        if len(self.routes) >= self.limit:
            raise OSError(errno.ENOSPC, "KVM_SET_GSI_ROUTING")
        gsi = next(n for n in range(self.FIRST_GSI, 1 << 16) if n not in self.routes)
        self.routes[gsi] = (address, data)
        return gsi

    def remove(self, gsi: int) -> None:
        self._call("remove")
        assert gsi not in self.irqfds, "the route goes after the irqfd"
        del self.routes[gsi]

    # --- Vm

    def irqfd(self, eventfd: int, gsi: int) -> None:
        self._call("irqfd")
        assert gsi in self.routes and gsi not in self.irqfds, "the route comes before the irqfd"
        if eventfd in self.irqfds.values():
            raise OSError(errno.EBUSY, "KVM_IRQFD")
        os.fstat(eventfd)
        self.irqfds[gsi] = eventfd
        self.pump()

    def irqfd_resample(self, eventfd: int, gsi: int, resamplefd: int) -> None:
        self._call("irqfd_resample")
        assert eventfd != resamplefd and os.fstat(eventfd) and os.fstat(resamplefd)
        self.pins[eventfd] = (gsi, resamplefd)

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        self._call("irqfd_deassign")
        if self.pins.get(eventfd, (None,))[0] == gsi:
            del self.pins[eventfd]
        elif self.irqfds.get(gsi) == eventfd:
            del self.irqfds[gsi]
        else:
            raise AssertionError("no such irqfd")

    def ioeventfd(self, eventfd: int, address: int, size: int) -> None:
        self._call("ioeventfd")
        if (address, size) in self.ioeventfds:
            raise OSError(errno.EEXIST, "KVM_IOEVENTFD")
        os.fstat(eventfd)
        self.ioeventfds[address, size] = eventfd

    def coalesce_writes(self, address: int, size: int) -> None:
        self._call("coalesce_writes")
        assert (address, size) not in self.coalescing
        self.coalescing.add((address, size))

    def stop_coalescing(self, address: int, size: int) -> None:
        self._call("stop_coalescing")
        self.coalescing.remove((address, size))

    def ioeventfd_deassign(self, eventfd: int, address: int, size: int) -> None:
        self._call("ioeventfd_deassign")
        assert self.ioeventfds.pop((address, size)) == eventfd

    def pump(self) -> None:
        """Deliver what has been signalled."""
        for gsi, eventfd in self.irqfds.items():
            if readable(eventfd):
                os.eventfd_read(eventfd)
                self.delivered.append(self.routes[gsi])

    @property
    def messages(self) -> set[tuple[int, int]]:
        """What is connected, by address and data."""
        return {self.routes[gsi] for gsi in self.irqfds}


@dataclass(frozen=True, eq=False)
class FakeIrqs(Irqs):
    """One kind of a fake device's interrupts: the device does the work."""

    device: Any

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        self.device.set_irqs(self.index, start, eventfds)

    def set_unmask_eventfd(self, eventfd: int) -> None:
        self.device.set_unmask_eventfd(self.index, eventfd)

    def disable_irqs(self) -> None:
        self.device.disable_irqs(self.index)


class FakeDevice:
    """A device with these interrupts: INTx 0 or 1, MSI and MSI-X by their number of vectors."""

    name = "0000:01:00.0"

    def __init__(
        self, *, intx: int = 1, msi: int = 0, msix: int = 0, resizable: bool = True, host: int = 4096
    ) -> None:
        self.irqs = {
            INTX: FakeIrqs(self, INTX, intx, False),
            MSI: FakeIrqs(self, MSI, msi, False),
            MSIX: FakeIrqs(self, MSIX, msix, resizable),
        }
        self.host = host  # vectors that the host still has
        self.active: int | None = None
        self.signals: list[int] = []
        self.calls: list[tuple[Any, ...]] = []
        self.refusing: set[str] = set()
        self.unmask: int | None = None

    def _call(self, name: str, *arguments: int) -> None:
        self.calls.append((name, *arguments))
        if name in self.refusing:
            raise OSError(errno.EIO, name)

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        self._call("set", index, start, len(eventfds))
        end = start + len(eventfds)
        if self.active not in (None, index) or not eventfds or end > self.irqs[index].count:
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS")
        if self.active is not None and end > len(self.signals) and not self.irqs[index].resizable:
            raise OSError(errno.EINVAL, "VFIO_DEVICE_SET_IRQS: before Linux 6.5 vectors are not added")
        if end > self.host:
            raise OSError(errno.ENOSPC, "VFIO_DEVICE_SET_IRQS")
        assert all(fd == -1 or os.fstat(fd) for fd in eventfds)
        self.active = index
        self.signals += [-1] * (end - len(self.signals))
        self.signals[start:end] = eventfds

    def set_unmask_eventfd(self, index: int, eventfd: int) -> None:
        self._call("unmask", index)
        assert index == INTX == self.active and os.fstat(eventfd)
        self.unmask = eventfd

    def disable_irqs(self, index: int) -> None:
        self._call("disable", index)
        if self.active == index:  # as vfio.Device: harmless where it is off
            self.active, self.signals, self.unmask = None, [], None

    def interrupt(self, vector: int, kvm: FakeKvm) -> None:
        """As the device raises it: lost where VFIO has no eventfd for it."""
        if vector < len(self.signals) and self.signals[vector] != -1:
            os.eventfd_write(self.signals[vector], 1)
        kvm.pump()

    @property
    def wired(self) -> set[int]:
        """The vectors for which VFIO has an eventfd."""
        return {vector for vector, fd in enumerate(self.signals) if fd != -1}


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
