"""Writes to sysfs that may never return."""

from __future__ import annotations

import errno
from pathlib import Path

_WRITE = 'printf "%s" "$2" >"$1"'


def write_in_time(path: Path, text: str, timeout: float, held: int | None = None) -> None:
    """Write ``text`` by another process. Raises ``OSError``, ``TimeoutError`` after ``timeout`` seconds.

    That process keeps the descriptor ``held`` open until it exits: a thread of this one that waits in
    vfio_unregister_group_dev would keep it from exiting and closing the device.
    """
    import subprocess

    helper = subprocess.Popen(
        ["/bin/sh", "-c", _WRITE, "sh", str(path), text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=() if held is None else (held,),
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    )
    assert helper.stderr is not None
    with helper.stderr:
        try:
            _, message = helper.communicate(timeout=timeout)  # wait() would look only every 50 ms
        except subprocess.TimeoutExpired:
            helper.returncode = 0  # it exits by itself: it cannot be killed there
            raise TimeoutError(errno.ETIMEDOUT, f"no answer from the kernel in {timeout:g} s", str(path)) from None
    if helper.returncode:
        reason = message.decode(errors="replace").strip().rpartition(": ")[2]
        raise OSError(errno.EIO, reason or f"helper exited with status {helper.returncode}", str(path))
