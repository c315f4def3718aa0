"""The part of a machine that has emulated PCI functions: any that are added, and a console with named ports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvmpass._signals import deferred
from kvmpass.errors import GuestError
from kvmpass.machine.execution import Execution
from kvmpass.pci import PciFunction, Wiring
from kvmpass.pci.bus import SLOTS

if TYPE_CHECKING:
    from kvmpass.machine.vcpus import GuestOutcome
    from kvmpass.virtio import Port

CONSOLE_SLOT = 31
"""The slot of the console: the last one, so that devices have the numbers that they have without it."""


class Functions(Execution):
    """The base of ``Machine`` that adds emulated functions.

    Synchronization: as ``Execution``.
    """

    def __init__(self, cpus: int) -> None:
        super().__init__(cpus)
        self._ports: dict[str, Port] = {}

    def add_function(self, make: Callable[[Wiring], PciFunction]) -> None:
        """Plug an emulated PCI function into a slot of its own until the machine is closed. Before ``start()``.

        ``make`` constructs it (``kvmpass.pci.function``); ``reset()`` calls it again, and the machine closes each
        function that it returned. Raises ``GuestError`` after ``start()``, ``LayoutError``, and what ``make``
        raises; then nothing has changed.
        """
        self._add_function(make, range(SLOTS))

    def _add_function(self, make: Callable[[Wiring], PciFunction], order: Iterable[int]) -> None:
        with deferred(), self._device_lock:
            self._check_usable()
            if self._threads is not None:
                raise GuestError("add functions before the guest is started")
            self._slots.add(make, order)

    def add_ports(self, names: Sequence[str]) -> None:
        """Give the guest a virtio console with named ports, until the machine is closed. Before ``start()``.

        Their names are printable ASCII. ``connect`` says where their output goes. Does nothing if the machine has
        these ports. Raises as ``add_function`` does, and ``GuestError`` if the machine has others.
        """
        from kvmpass.virtio import Port, VirtioConsole, VirtioFunction

        with self._device_lock:
            if tuple(names) == tuple(self._ports):
                return
            if self._ports:
                raise GuestError("this machine has named ports already")
            ports = [Port(name, partial(self._write_output, name)) for name in names]
            self._add_function(lambda wiring: VirtioFunction(VirtioConsole(ports), wiring, "console"), [CONSOLE_SLOT])
            self._ports = {port.name: port for port in ports}

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        """See ``Execution``. What a guest has written to its ports before its end has been passed on by then."""
        outcome = super().wait(timeout)
        if outcome is not None:
            for port in self._ports.values():
                port.on_receive()
        return outcome

    @property
    def ports(self) -> Mapping[str, Port]:
        """The named ports of ``add_ports``, by name."""
        return self._ports
