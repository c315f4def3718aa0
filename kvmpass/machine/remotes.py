"""The part of a machine that has virtio devices which daemons serve, from their connection to its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._signals import deferred
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import GuestError
from kvmpass.events import DaemonEnded, DeviceReleased
from kvmpass.machine.functions import CONSOLE_SLOT, Functions
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.machine.requests import EJECT_SECONDS
from kvmpass.pci import Wiring

if TYPE_CHECKING:
    import socket

    from kvmpass.virtio import VirtioFunction
    from kvmpass.virtio.device import VirtioDevice
    from kvmpass.virtio.frontend import FrontEnd


log = limited_log(__name__)


class Remote:
    """A virtio device that a daemon serves, from ``Machine.add_remote`` to ``Machine.remove_remote``.

    Synchronization: the machine's device lock; ``ejected`` from any thread.
    """

    def __init__(
        self, front: FrontEnd, make: Callable[[FrontEnd], VirtioDevice], on_close: Callable[[], object]
    ) -> None:
        self.name = front.name
        """Its name in messages and events."""
        self.front = front
        """The connection to its daemon."""
        self.slot = -1
        """Its device number on the guest's bus 0."""
        self.ejected = threading.Event()
        """Set when the guest has ejected it."""
        self.function: VirtioFunction | None = None
        """What the guest sees of it; the machine's reset replaces it."""
        self._make = make
        self.on_close = on_close
        """Called when the connection is closed for good."""

    def make(self, wiring: Wiring) -> VirtioFunction:
        """Construct its function. Raises as ``VirtioFunction`` does, and ``DaemonError``."""
        from kvmpass.virtio import VirtioFunction

        self.function = VirtioFunction(self._make(self.front), wiring, self.name)
        return self.function


class Remotes(Functions):
    """The base of ``Machine`` that has devices of daemons.

    Synchronization: as ``Execution``. Nothing waits for a daemon with the bus lock held while the guest runs.
    """

    _monitor: DeviceMonitor

    def __init__(self, cpus: int) -> None:
        super().__init__(cpus)
        self._remotes: list[Remote] = []

    def add_filesystem(
        self,
        tag: str,
        daemon: str | os.PathLike[str] | socket.socket,
        on_close: Callable[[], object] = lambda: None,
        fate: Callable[[], str] = lambda: "",
    ) -> Remote:
        """Give the guest a virtio file system that a daemon such as virtiofsd serves.

        The guest mounts it by its ``tag`` (1 to 36 printable ASCII characters): ``mount -t virtiofs TAG DIR``. See
        ``add_remote``.
        """
        from kvmpass.virtio.fs import VirtioFs

        return self.add_remote(f"file system {tag}", daemon, lambda front: VirtioFs(front, tag), on_close, fate)

    def add_remote(
        self,
        name: str,
        daemon: str | os.PathLike[str] | socket.socket,
        make: Callable[[FrontEnd], VirtioDevice],
        on_close: Callable[[], object] = lambda: None,
        fate: Callable[[], str] = lambda: "",
    ) -> Remote:
        """Give the guest a virtio device that a daemon serves over vhost-user. A running guest is notified.

        ``name``: of the device, for messages and events. ``daemon``: the path where it listens, or a connected
        socket, which the machine takes over. ``make`` constructs the device, again at each ``reset()``: a
        ``kvmpass.virtio.remote.RemoteDevice``. The daemon maps all of the guest's RAM, which must be memfds
        (``Machine(backing=Backing.MEMFD)``), and serves the requests without this process. It is inside the guest's
        trust; its process is the caller's, for which ``on_close`` is called once the machine has closed the
        connection for good. ``fate`` is called in a thread when the connection is lost before: it returns what the
        caller knows of the reason, as a clause, or nothing, within a second or so.

        If it ends, does not finish a set-up, a reset or a change of memory within ten seconds, or violates the
        protocol, ``on_event`` receives a ``DaemonEnded``, and the guest is ended as by an uncorrected error of a
        device. Raises ``DaemonError``,
        ``GuestError`` (private memory), ``LayoutError`` (tag, no slot), ``OSError`` (``connect``); then nothing has
        changed, except that the connection is closed.
        """
        from kvmpass.virtio.frontend import FrontEnd
        from kvmpass.virtio.vhost_user import connect

        connection = connect(daemon) if isinstance(daemon, str | os.PathLike) else daemon
        with undo_on_error() as undo:
            undo.callback(connection.close)
            self._check_usable()
            front = FrontEnd(name, connection, self.memory, partial(self._on_daemon_end, name, fate))
            undo.callback(front.close)
            remote = Remote(front, make, on_close)
            with deferred(), self._device_lock:
                self._check_usable()
                remote.slot = self._slots.add(remote.make, range(CONSOLE_SLOT - 1, 0, -1))
                self._remotes.append(remote)
        return remote

    def remove_remote(self, remote: Remote, timeout: float = EJECT_SECONDS) -> None:
        """Ask a running guest to eject a device of ``add_remote``, wait until it has, and close the connection.

        Raises ``GuestError`` if the guest does not eject it within ``timeout`` seconds: it has it still then, and
        may eject it later if it has read the request. Idempotent.
        """
        if remote in self._remotes:
            if self._running and not self._slots.wait_for_eject(remote.slot, remote.ejected, timeout):
                raise GuestError(
                    f"the guest did not eject {remote.name} within {timeout:g} seconds",
                    "read the guest's console: a program may use the device",
                )
            self._remove(remote)

    def _on_eject_remote(self, slot: int) -> None:
        """Handle the guest's eject of ``slot``, in a vCPU's thread: what waits for the daemon is done later."""
        for remote in list(self._remotes):
            if remote.slot == slot and not remote.ejected.is_set() and remote.function is not None:
                with log_errors(log, "%s: %s", remote.name):
                    self._slots.hide(slot, remote.function)
                remote.ejected.set()
                self._monitor.defer(partial(self._remove, remote))

    def _remove(self, remote: Remote) -> None:
        with deferred(), self._device_lock:
            if remote not in self._remotes:
                return
            self._remotes.remove(remote)
            function = remote.function
            assert function is not None
            run_all(
                partial(self._slots.hide, remote.slot, function),
                function.quiesce,
                partial(self._slots.close_function, function),
                remote.front.close,
                remote.on_close,
            )
            if self._running:
                self._monitor.emit_later(DeviceReleased(remote.name, "guest" if remote.ejected.is_set() else "host"))

    def _check_daemons(self) -> None:
        """Raise ``GuestError`` if a daemon has ended."""
        for remote in self._remotes:
            if remote.front.ended:
                raise GuestError(
                    f"{remote.name} is gone: {remote.front.ended}", "make another machine, with a daemon that runs"
                )

    def _on_daemon_end(self, name: str, fate: Callable[[], str], reason: str) -> None:
        try:
            reason = "; ".join(filter(None, (reason, fate())))
        finally:
            self._monitor.emit_later(DaemonEnded(name, reason))  # first: it says why the guest ends
            self._end_for_error()

    def _end_for_error(self) -> None:
        """End the guest for an error of a device, unless that is not wanted."""
        raise NotImplementedError

    def _close_remotes(self) -> None:
        """Close the connections to the daemons, whose functions are closed, and let the daemons' owners know."""
        remotes, self._remotes = self._remotes, []
        # One that was ejected last is not on the bus, and may not be closed.
        functions = [remote.function for remote in remotes if remote.function is not None]
        run_all(
            *(partial(self._slots.close_function, function) for function in functions),
            *(remote.front.close for remote in remotes),
            *(remote.on_close for remote in remotes),
        )

    def _remove_ejected(self) -> None:
        """Remove the devices that the guest has ejected, now."""
        run_all(*(partial(self._remove, remote) for remote in self._remotes if remote.ejected.is_set()))
