"""The process of a guest that stays: serves the requests of :mod:`.client` until the guest's end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmpass._ratelimit import limited_log
from kvmpass.errors import GuestDied, GuestError, KvmpassError
from kvmpass.session import messages
from kvmpass.session.console import Console
from kvmpass.session.directory import SOCKET
from kvmpass.session.files import packing
from kvmpass.session.process import GuestProcess
from kvmpass.session.session import STOP_SECONDS, Session

log = limited_log(__name__)

MAX_CONNECTIONS = 128
_REQUEST_SECONDS = 10.0
_NOT_RUN, _DIED, _FAILED = 127, 126, 125
# Of a request: what it asks for, what it is made of, and what this process lacks (a thread, memory).
_REFUSALS = (
    KvmpassError,
    subprocess.SubprocessError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    MemoryError,
)


class Server:
    """Serve requests for ``session`` on a socket in ``directory``, from threads of its own, until ``finish``.

    Only processes of this user, and of root, are served; a client that stalls delays no other.

    Synchronization: ``wait`` and ``finish`` from one thread. ``_lock`` guards the set of connections.
    """

    def __init__(self, session: Session, directory: Path, console: Console) -> None:
        self._session, self._console = session, console
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._over = threading.Event()
        self._done = threading.Event()
        self.stop_seconds = STOP_SECONDS
        """That the guest has to power off; a request to stop says."""
        self._answer: dict[str, Any] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(f"/proc/self/fd/{fd}/{SOCKET}")
        finally:
            os.close(fd)
        self._socket.listen(MAX_CONNECTIONS)
        for work, name in ((self._accept, "requests"), (self._watch, "end")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the guest has ended, or is to be stopped; ``timeout`` seconds at most. Return whether."""
        return self._over.wait(timeout)

    def finish(self, **answer: Any) -> None:
        """Answer those who wait for the guest's end; serve nothing more."""
        self._answer = answer
        self._done.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._socket.close()
        with self._lock:
            threads, connections = [*self._threads], [*self._connections]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # as if the client had left
        for thread in threads:
            thread.join(1.0)

    def _watch(self) -> None:
        self._session.wait()
        self._over.set()

    # --- connections

    def _accept(self) -> None:
        while not self._done.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or no descriptor is free
                if self._done.wait(0.1):
                    return
                continue
            with self._lock:
                refused = self._begin(connection)
            if refused is not None:
                self._reply(connection, {"error": refused})
                _drain(connection)
                connection.close()

    def _begin(self, connection: socket.socket) -> str | None:
        """Serve a connection in a thread; return why not. ``_lock`` is held: ``finish`` joins what is in the set."""
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"{MAX_CONNECTIONS} requests are served already"
        thread = threading.Thread(target=self._serve, args=[connection], name="request", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # a limit of this user, or of the control group
            return f"the guest's process has no thread for the request: {error}"
        self._connections.add(connection)
        self._threads.add(thread)
        return None

    def _serve(self, connection: socket.socket) -> None:
        fds: list[int] = []
        try:
            if messages.peer(connection) not in (0, os.geteuid()):
                return
            connection.settimeout(_REQUEST_SECONDS)
            received = messages.receive(connection)
            if received is None:
                return
            request, fds = received
            connection.settimeout(None)
            self._reply(connection, self._handle(connection, request, fds))
        except messages.BadMessage as error:
            self._reply(connection, {"error": f"the request was not understood: {error}"})
        except OSError as error:
            log.debug("a request was not served: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
            _drain(connection)
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())

    def _handle(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "exec": self._exec,
            "pack": self._pack,
            "console": self._attach,
            "stop": self._stop,
            "wait": self._wait,
        }
        handler = handlers.get(str(request.get("do")))
        if handler is None:
            return {"error": "an unknown request"}
        try:
            return handler(connection, request, fds)
        except GuestDied as error:
            return {"error": error.reason, "status": _DIED}
        except (*_REFUSALS, OSError) as error:
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            status = _NOT_RUN if isinstance(error, OSError) else _FAILED
            return {"error": str(text), "hints": list(getattr(error, "__notes__", ())), "status": status}

    @staticmethod
    def _reply(connection: socket.socket, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            messages.send(connection, answer)

    # --- requests

    def _exec(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """Run a command with the client's descriptors: standard input if there are three, output and errors."""
        if len(fds) not in (2, 3):
            raise ValueError("two or three descriptors are needed")
        args = [str(word) for word in request["args"]]
        size = request.get("size")
        process = self._session.popen(
            args,
            stdin=fds[0] if len(fds) == 3 else None,
            stdout=fds[-2],
            stderr=subprocess.STDOUT if os.path.sameopenfile(fds[-2], fds[-1]) else fds[-1],
            tty=(_number(size[0]), _number(size[1])) if size else False,
            cwd=str(request["cwd"]) if request.get("cwd") else None,
            env={str(name): str(value) for name, value in dict(request.get("env") or {}).items()},
        )
        return self._watched(connection, process)

    def _pack(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """Write an archive of a file or directory of the guest to the client's descriptor."""
        command = packing(str(request["path"]), self._session.entry)
        return self._watched(connection, self._session.outside(command, stdout=fds[0]))

    def _watched(self, connection: socket.socket, process: GuestProcess) -> dict[str, Any]:
        """Return the status of a process that ends when the client does."""
        listening = threading.Thread(target=self._listen, args=[connection, process], name="signals", daemon=True)
        try:
            listening.start()
            return {"status": process.wait()}
        except OSError as error:  # not of running it: some of its output is missing
            raise GuestError(f"the command's output cannot be written: {error.strerror}") from error
        finally:
            process.abandon()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # wakes the thread
            if listening.ident is not None:
                listening.join()

    @staticmethod
    def _listen(connection: socket.socket, process: GuestProcess) -> None:
        """Pass on signals and sizes; the client's end ends the command."""
        try:
            while (received := messages.receive(connection)) is not None:
                message, fds = received
                for fd in fds:
                    os.close(fd)
                if "signal" in message:
                    process.send_signal(_number(message["signal"]))
                if "size" in message:
                    rows, columns = message["size"]
                    process.resize(_number(rows), _number(columns))
        except (OSError, messages.BadMessage, ValueError, TypeError):
            pass
        process.abandon()

    def _attach(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """Show the console, and type what comes, until the client closes the connection."""
        source, target = fds
        with self._console.attached(source, target):
            while (received := messages.receive(connection)) is not None:
                message, more = received
                for fd in more:
                    os.close(fd)
                rows, columns = message["size"]
                self._console.resize(_number(rows), _number(columns))
        return {}

    def _stop(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        seconds = float(request["timeout"])
        if not 0 <= seconds <= 3600:
            raise ValueError("a timeout of 0 to 3600 seconds")
        self.stop_seconds = seconds
        self._over.set()
        return self._wait(connection, request, fds)

    def _wait(self, connection: socket.socket, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        while not self._done.wait(1.0):
            if _has_gone(connection):
                return {}
        return self._answer


def _drain(connection: socket.socket) -> None:
    """Read what the client still sends: its answer is lost if the connection is closed with messages in it (unix(7)).

    A size, for example, on the way to a command that was not found.
    """
    with contextlib.suppress(OSError):  # ``BlockingIOError``: nothing is left
        connection.shutdown(socket.SHUT_RD)
        while connection.recv(1, socket.MSG_DONTWAIT):
            pass


def _has_gone(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _number(value: object) -> int:
    """Return a number of 0 to 65535 from a message. Raises ``ValueError``."""
    if not isinstance(value, int) or not 0 <= value <= 65535:
        raise ValueError(f"{value!r} is not a number of 0 to 65535")
    return value
