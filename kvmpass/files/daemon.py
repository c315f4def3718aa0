"""A daemon that serves files of this host to a guest by vhost-user, confined so that neither can do anything else.

The guest speaks FUSE to the daemon, and nothing that it does in there binds: a read-only mount is one of the host.
``cffi_build/confine.c`` has the namespaces and mounts.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import ShareError
from kvmpass.files.program import INSTALL, arguments, find_daemon
from kvmpass.files.user import User

CONFINE = Path(__file__).with_name("confine")
PRELOADED = CONFINE.with_name("noatime.so")
LISTENER, PLACE = 3, "/tmp"  # as confine.c has them
_START_SECONDS = 20.0
_END_SECONDS = 5.0  # for processes of which the first one exits as soon as it reads
_FATE_SECONDS = 1.0  # from the end of the connection to that of the processes
_SIGNALLED = 128  # confine.c: status_of
_PIPE = 65536  # bytes, unless made larger
_MOST_MESSAGES = 1024
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_NAMESPACES = ("clone", "unshare", "uid_map", "gid_map", "setgroups", "mount", "move_mount", "mount_tmpfs")


class FileDaemon:
    """A running daemon that serves ``source``, an absolute path without symlinks, and all that is mounted below it.

    Read-only, unless ``writable``. ``user`` is whom the daemon runs as; this process must be root, or that user.
    ``covers``: directories and files in it that are empty for the guest (:func:`kvmpass.files.covers`). ``program``:
    virtiofsd, found where distributions have it. The process ends with ``close()``, with the connection, and with
    this process, however that ends. Raises ``ShareError``, or the ``OSError`` of a failed call.

    Synchronization: ``close`` while no other thread uses the object.
    """

    def __init__(
        self,
        source: Path,
        user: User,
        *,
        writable: bool = False,
        covers: Sequence[str] = (),
        program: Path | None = None,
    ) -> None:
        program = program or find_daemon()
        if program is None:
            raise ShareError("virtiofsd was not found on this host", INSTALL)
        self._program = program
        self.source = source
        """The directory of this host."""
        self.user = user
        """The user whom it runs as."""
        ids = (user.uid, user.gid) if os.geteuid() == 0 else (-1, -1)
        access = "rw" if writable else "ro"
        words = [str(CONFINE), *map(str, ids), access, str(source), *covers, "--"]
        with undo_on_error() as undo:
            self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._control.close)
            # What nobody reads is dropped: the guest must not fill anything by making the daemon complain.
            self._messages, messages = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._messages)
            # A copy, as the daemon's user may have no permission for the directory of the original.
            with control, os.fdopen(messages, "wb") as errors, os.fdopen(os.memfd_create("noatime"), "wb") as library:
                library.write(PRELOADED.read_bytes())
                library.flush()
                self._process = subprocess.Popen(
                    [*words, *arguments(program, LISTENER, PLACE)],
                    stdin=control.fileno(),
                    stdout=library,
                    stderr=errors,
                    cwd="/",
                    env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                )
            undo.callback(self._end)
            self.connection = self._connect()
            """A connection to the daemon, of which there is one. Who takes it over closes it."""

    def _connect(self) -> socket.socket:
        self._control.settimeout(_START_SECONDS)
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, 128, 1)
        except TimeoutError:
            raise ShareError(f"{CONFINE.name}: no answer within {_START_SECONDS:g} s") from None
        if message == b"ok" and descriptors:
            os.set_inheritable(descriptors[0], False)
            return socket.socket(fileno=descriptors[0])
        step, _, number = message.decode("ascii", "replace").partition(" ")
        if not number.isdecimal():
            raise ShareError(f"{CONFINE.name} has ended: {self.messages or 'no reason given'}")
        raise refusal(step, int(number), self.source, self.user)

    @property
    def messages(self) -> str:
        """What the daemon has said since the last time: in one line. Empty after ``close()``.

        It is the last 1 KiB of the first 64 KiB.
        """
        if self._messages < 0:
            return ""
        try:
            said = os.read(self._messages, _PIPE)[-_MOST_MESSAGES:]
        except BlockingIOError:
            return ""
        lines = said.decode("utf-8", "replace").splitlines()
        return "; ".join("".join(c if c.isprintable() else " " for c in line).strip() for line in lines)

    def fate(self) -> str:
        """Return how it has ended, what it has said, and what to do; after a second, if it runs on, nothing."""
        try:
            status = self._process.wait(_FATE_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        number = status - _SIGNALLED if status > _SIGNALLED else -status
        names = {entry.value: entry.name for entry in signal.Signals}
        how = f"was ended by {names[number]}" if number in names else f"has exited with {status}"
        remedy = ""
        if number in _CRASHES:
            remedy = "; it has crashed: install another version of it"
        elif number == signal.SIGKILL:
            remedy = "; see if the kernel has ended it for lack of memory: dmesg"
        said = self.messages
        return f"{self._program}, which serves {self.source}, {how}{f': {said}' if said else ''}{remedy}"

    @property
    def running(self) -> bool:
        """Whether the daemon has not ended."""
        return self._process.poll() is None

    def _end(self) -> None:
        self._control.close()  # whereupon they all end
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the others have it as their parent, and end with it
            self._process.wait()

    def close(self) -> None:
        """End the daemon. Idempotent."""
        messages, self._messages = self._messages, -1
        run_all(self.connection.close, self._end, *([lambda: os.close(messages)] if messages >= 0 else ()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def refusal(step: str, number: int, source: Path, user: User) -> Exception:
    """Return the exception for a call of ``confine.c`` that failed with errno ``number``."""
    if step in ("open_tree", "chdir") and number in (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return ShareError(
            f"{source} cannot be served: {os.strerror(number)} for {user.name}, as whom its files are read",
            f"let {user.name} read {source} and pass through the directories above it",
        )
    if number == errno.ENOSYS:
        return ShareError(
            f"this kernel has no {step}, without which no files can be served read-only",
            "boot Linux 5.12 or later",
        )
    if step in _NAMESPACES and number in (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EUSERS, errno.EINVAL):
        return ShareError(
            f"this host refuses the user namespace that confines virtiofsd ({step}: {os.strerror(number)})",
            "enable user namespaces: kvmpass doctor names the setting",
        )
    return OSError(number, f"{CONFINE.name}: {step}: {os.strerror(number)}")
