"""A process that outlives the command that has started it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from kvmpass.session.directory import MESSAGES


def in_background(run: Callable[[Callable[[Path], None]], int]) -> int:
    """Call ``run`` in a process of its own, and return once that has called what ``run`` gets; or its status.

    In the new process this raises ``SystemExit`` with what ``run`` returns. Until it is ready, its standard error is
    this process's, and whatever ends this process ends it; then it closes what this process has inherited. The file
    ``messages`` in the directory that it is ready with gets what it prints later. Only for a process with one thread.
    """
    inherited = _inherited()
    ready, made = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.setsid()
        _redirect(os.devnull, os.O_RDONLY, 0)
        raise SystemExit(run(lambda directory: _detach(made, directory, inherited)))
    os.close(made)
    try:
        if os.read(ready, 1):
            return 0
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status if status >= 0 else 128 - status
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(ready)


def _inherited() -> list[int]:
    """Return the descriptors, but for the standard ones, that this process has from the one that has started it.

    Python opens none that are inheritable (PEP 446).
    """
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
        with suppress(OSError):  # that of the listing itself
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
    return found


def _detach(made: int, directory: Path, inherited: Sequence[int]) -> None:
    """Leave the starter's files and working directory, and let it go. Raises ``BrokenPipeError`` if it has ended."""
    for fd in (1, 2):
        _redirect(directory / MESSAGES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, fd)
    for fd in inherited:  # a script's lock (flock(2)), for example; until now an option may have named it
        with suppress(OSError):
            os.close(fd)
    os.chdir("/")
    os.write(made, b".")
    os.close(made)


def _redirect(path: str | Path, flags: int, fd: int) -> None:
    opened = os.open(path, flags | os.O_CLOEXEC, 0o600)
    os.dup2(opened, fd)
    os.close(opened)
