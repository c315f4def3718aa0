"""The process of ``kvmpass start``: a session that serves requests in its directory until the guest's end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from kvmpass import host
from kvmpass._ratelimit import limited_log
from kvmpass.events import DeviceEvent, DeviceReleased
from kvmpass.guest import GuestResult, GuestSpec, Sink
from kvmpass.session.console import Console
from kvmpass.session.directory import GuestDirectory, GuestStatus
from kvmpass.session.opening import open_session
from kvmpass.session.server import Server

log = limited_log(__name__)

_LOOK_SECONDS = 5.0  # between looks for the directory, which logind removes at a user's last logout


class _Status:
    """Keeps the status document of a guest up to date. Raises ``OSError`` if it cannot be written at all.

    Later a document that cannot be written, on a full disk for example, is only logged: the guest runs on, and each
    ``set`` tries again.

    Synchronization: ``set`` and ``note`` from any thread; ``_lock`` guards what is written.
    """

    def __init__(self, directory: GuestDirectory, name: str, devices: Sequence[host.Bdf]) -> None:
        self._directory = directory
        self._name = name
        self._devices = [*map(str, devices)]
        self._state = "starting"
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._lock = threading.Lock()
        self._stale = False  # whether the document lacks the latest change
        self._write()

    def _update(self) -> None:
        try:
            self._write()
            self._stale = False
        except OSError as error:
            if not self._stale:  # once, not at each look
                log.warning("the status of the guest %s cannot be written: %s", self._name, error)
            self._stale = True

    def _write(self) -> None:
        if self._directory.exists:  # else a file there would be another guest's
            status = GuestStatus(self._name, os.getpid(), tuple(self._devices), self._state, self._since)
            self._directory.write(status)

    def set(self, state: str) -> None:
        """Set the guest's state."""
        with self._lock:
            if state != self._state or self._stale:
                self._state = state
                self._update()

    def note(self, event: DeviceEvent) -> None:
        """Take a device that was removed from the running guest out of the document."""
        with self._lock:
            if isinstance(event, DeviceReleased) and event.bdf in self._devices:
                self._devices.remove(event.bdf)
                self._update()


def stay(
    name: str,
    devices: Sequence[host.Bdf],
    spec: GuestSpec,
    ready: Callable[[Path], None],
    answer: Callable[[GuestResult], dict[str, Any]],
    log: Sink | None = None,
    reason: Callable[[BaseException], str] = str,
    **options: Any,
) -> GuestResult:
    """Run a guest, and serve requests for it until it has ended or one wants it stopped; return how it ended.

    ``ready`` is called with its directory once it runs commands, ``answer`` with how it ended: it returns what those
    who wait for the end are told; ``reason`` returns it of an error. ``log`` gets what the console prints as well.
    ``options``: those of ``open_session``. A guest whose directory was removed is stopped: nobody could find it any
    more. Its devices are rebound, and its directory is removed, when this returns or raises.
    """
    with GuestDirectory.claim(name) as directory, closing(Console(directory.path, log)) as console:
        status = _Status(directory, name, devices)
        server: Server | None = None
        ended: dict[str, Any] = {"error": "the guest's process has failed"}
        try:
            with open_session(devices, spec, name=name, console=console, on_event=status.note, **options) as session:
                console.session = session
                server = Server(session, directory.path, console)
                status.set("running")
                ready(directory.path)
                while not server.wait(_LOOK_SECONDS) and directory.exists:
                    status.set("running" if session.answering else "not answering")
                status.set("stopping")
                result = session.stop(server.stop_seconds)
            ended = answer(result)
            return result
        except BaseException as error:
            cause = f"the guest's process has failed: {reason(error) or type(error).__name__}"
            ended = {"error": cause, "hints": list(getattr(error, "__notes__", ()))}
            raise
        finally:
            if server is not None:
                server.finish(**ended)
