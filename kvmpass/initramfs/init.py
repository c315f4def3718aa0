"""The guest's init, and the files in ``/kvmpass`` that it reads."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from kvmpass.errors import KvmpassError

DIRECTORY = "/kvmpass"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""``PATH`` of the guest, as init.sh sets it."""
COMPLETE = f"{DIRECTORY}/complete"  # the archive's last file
AGENT = Path(__file__).with_name("agent")
"""The program that runs processes for the host, and init's start: ``cffi_build/agent``, built with the extension."""
AGENT_PORT = "kvmpass.agent"
"""Its port of a virtio console; serial ports take its place where the kernel has no driver."""
RUN_COMMAND = ("/bin/sh", f"{DIRECTORY}/command")
"""What the host lets it start: the guest's command."""
SEND_FILES = ("/bin/sh", f"{DIRECTORY}/files")
"""The same when the command has ended: its output are archives of the files to bring out."""
# An archive of a file or a directory, which it names "." (kvmpass/guest/extract.py); without files if there is none.
ARCHIVE = b"""\
archive() { # PATH [ROOT]
    # From outside of another root, its absolute symlinks lead elsewhere.
    [ -z "$2" ] || set -- "$2$(chroot "$2" readlink -f "$1" || echo "$1")"
    if [ -d "$1" ]; then
        (cd "$1" && find . -print0 | cpio -o -0 -H newc)
    elif [ -f "$1" ]; then
        (cd "$(dirname "$1")" && printf '%s\\0' "${1##*/}" | cpio -o -0 -L -H newc)
    else
        cpio -o -H newc </dev/null
    fi
}
"""
PORT_DRIVERS = ("virtio_pci", "virtio_console")
"""The modules of its drivers."""
SCRIPT = Path(__file__).with_name("init.sh")
"""What PID 1 becomes once it has mounted file systems: ``cffi_build/agent/init.c``."""


def agent() -> bytes:
    """Return the agent's program. Raises ``KvmpassError`` if it was not built."""
    if not AGENT.exists():
        raise KvmpassError(f"{AGENT} was not built", "install kvmpass (make venv, or pip install .)")
    return AGENT.read_bytes()


def assignments(settings: dict[str, str]) -> bytes:
    """Return shell assignments of ``settings``."""
    return _encode(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())


def calls(commands: Iterable[Iterable[str]]) -> bytes:
    """Return a shell script that runs ``commands``, each a command's words, unchanged."""
    return _encode(f"{shlex.join(words)}\n" for words in commands)


def _encode(lines: Iterable[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")
