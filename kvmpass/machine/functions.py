"""The part of a machine that has emulated PCI functions: any that are added, and a console with named ports."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvmpass._signals import deferred
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import GuestError
from kvmpass.events import DaemonEnded
from kvmpass.machine.execution import Execution
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.pci import PciFunction, Wiring
from kvmpass.virtio import Port, VirtioConsole, VirtioFunction

if TYPE_CHECKING:
    import socket

    from kvmpass.virtio.device import VirtioDevice
    from kvmpass.virtio.frontend import FrontEnd

CONSOLE_SLOT = 31
"""The slot of the console: the last one, so that devices have the numbers that they have without it."""
DAEMON_SLOT = 30
"""The slot of the first device that a daemon serves; the next ones have the slots before it."""


class Functions(Execution):
    """The base of ``Machine`` that adds emulated functions.

    Synchronization: as ``Execution``.
    """

    _monitor: DeviceMonitor

    def __init__(self, cpus: int) -> None:
        super().__init__(cpus)
        self._ports: dict[str, Port] = {}
        self._front_ends: list[FrontEnd] = []
        self._daemon_ends: list[Callable[[], object]] = []

    def add_function(self, make: Callable[[Wiring], PciFunction]) -> None:
        """Plug an emulated PCI function into a slot of its own until the machine is closed. Before ``start()``.

        ``make`` constructs it (``kvmpass.pci.function``); ``reset()`` calls it again, and the machine closes each
        function that it returned. Raises ``GuestError`` after ``start()``, ``LayoutError``, and what ``make``
        raises; then nothing has changed.
        """
        self._add_function(make, None)

    def _add_function(self, make: Callable[[Wiring], PciFunction], slot: int | None) -> None:
        with deferred(), self._device_lock:
            self._check_usable()
            if self._threads is not None:
                raise GuestError("add functions before the guest is started")
            self._slots.add(make, slot)

    def add_ports(self, names: Sequence[str]) -> None:
        """Give the guest a virtio console with named ports, until the machine is closed. Before ``start()``.

        Their names are printable ASCII. ``connect`` says where their output goes. Does nothing if the machine has
        these ports. Raises as ``add_function`` does, and ``GuestError`` if the machine has others.
        """
        with self._device_lock:
            if tuple(names) == tuple(self._ports):
                return
            if self._ports:
                raise GuestError("this machine has named ports already")
            ports = [Port(name, partial(self._write_output, name), partial(self._room_of, name)) for name in names]
            self._add_function(lambda wiring: VirtioFunction(VirtioConsole(ports), wiring, "console"), CONSOLE_SLOT)
            self._ports = {port.name: port for port in ports}

    def _end_for_error(self) -> None:
        """End the guest for an error of a device, unless that is not wanted."""
        raise NotImplementedError

    def _room_of(self, name: str) -> bool:
        return self._has_room(name)

    @property
    def ports(self) -> Mapping[str, Port]:
        """The named ports of ``add_ports``, by name."""
        return self._ports

    def add_filesystem(
        self,
        tag: str,
        daemon: str | os.PathLike[str] | socket.socket,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Give the guest a virtio file system that a daemon such as virtiofsd serves. Before ``start()``.

        The guest mounts it by its ``tag`` (1 to 36 printable ASCII characters): ``mount -t virtiofs TAG DIR``.
        ``daemon``: the path where it listens, or a connected socket, which the machine takes over. The daemon maps
        all of the guest's RAM, which must be memfds (``Machine(backing=Backing.MEMFD)``), and serves the requests
        without this process. It is inside the guest's trust; its process is the caller's, for which ``on_close`` is
        called once the machine has closed the connection for good.

        If it ends, does not answer within ten seconds, or violates the protocol, ``on_event`` receives a
        ``DaemonEnded``, and the guest is ended as by an uncorrected error of a device. Raises ``DaemonError``,
        ``GuestError`` (private memory; after ``start()``), ``LayoutError`` (tag, slot), ``OSError`` (``connect``);
        then nothing has changed, except that the connection is closed.
        """
        from kvmpass.virtio.fs import VirtioFs

        self.add_remote(f"file system {tag}", daemon, lambda front: VirtioFs(front, tag), on_close)

    def add_remote(
        self,
        name: str,
        daemon: str | os.PathLike[str] | socket.socket,
        make: Callable[[FrontEnd], VirtioDevice],
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Give the guest any virtio device that a daemon serves over vhost-user. Before ``start()``.

        ``name``: of the device, for messages and events. ``make`` constructs it, again at each ``reset()``: a
        ``kvmpass.virtio.remote.RemoteDevice``. See ``add_filesystem`` for the rest.
        """
        from kvmpass.virtio.frontend import FrontEnd
        from kvmpass.virtio.vhost_user import connect

        connection = connect(daemon) if isinstance(daemon, str | os.PathLike) else daemon
        with self._device_lock, undo_on_error() as undo:
            undo.callback(connection.close)
            self._check_usable()
            front = FrontEnd(name, connection, self.memory, partial(self._on_daemon_end, name))
            undo.callback(front.close)
            slot = DAEMON_SLOT - len(self._front_ends)
            self._add_function(lambda wiring: VirtioFunction(make(front), wiring, name), slot)
            self._front_ends.append(front)
            self._daemon_ends.append(on_close)

    def _on_daemon_end(self, name: str, reason: str) -> None:
        self._end_for_error()
        self._monitor.emit_later(DaemonEnded(name, reason))

    def _close_front_ends(self) -> None:
        """Close the connections to the daemons, whose functions are closed, and let the daemons' owners know."""
        run_all(*(front.close for front in self._front_ends), *self._daemon_ends)
