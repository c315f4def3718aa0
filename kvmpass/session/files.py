"""Files into a session's guest, and out of it."""

from __future__ import annotations

import io
import posixpath
import subprocess
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from kvmpass.errors import BadArchive, GuestError
from kvmpass.guest import CopiedOut
from kvmpass.guest.archive import ArchiveReader
from kvmpass.guest.destination import Destination
from kvmpass.guest.extract import Extraction
from kvmpass.initramfs import init, served

if TYPE_CHECKING:
    from kvmpass.guest.process import AgentProcess
    from kvmpass.initramfs.served import Entry
    from kvmpass.session.session import Session

_CHUNK = 1 << 16
_MAX_MESSAGE = 500
_UNPACK = 'mkdir -p "$1" && tar -x -f - -C "$1"'
_PACK = init.ARCHIVE.decode() + 'archive "$1" "$2"'


def unpacking(source: Path, target: str) -> tuple[list[str], str]:
    """Return the command that unpacks in the guest what ``pack`` writes, and the name that ``pack`` needs.

    ``target`` ends with a slash: the source gets its own name in it. Raises ``OSError`` if there is no source.
    """
    source.stat()
    if target.endswith("/"):
        target += source.resolve().name
    directory, name = posixpath.split(posixpath.normpath(target))
    return ["sh", "-c", _UNPACK, "sh", directory or "."], name


def pack(source: Path, name: str, file: IO[bytes]) -> None:
    """Write an archive of ``source``, which it calls ``name``. Raises ``OSError``.

    If ``source`` is a symlink it is followed; symlinks below it are copied as such. ``file`` has no buffer of its own
    that its end would write, if this can be interrupted while its reader stalls.
    """
    with tarfile.open(mode="w|", fileobj=cast("IO[bytes]", _UntilFailure(file))) as archive:
        archive.add(source.resolve(), name)


class _UntilFailure:
    """Writes to a file until that fails or is interrupted, such as by Ctrl-C; then it drops what comes.

    A ``TarFile`` writes what it has kept when it is closed, also because of an exception: it would block again.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: IO[bytes] | None = file

    def write(self, data: bytes) -> int:
        file, self._file = self._file, None
        if file is not None:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            self._file = file
        return len(data)


def packing(source: str, entry: Entry | None) -> list[str]:
    """Return the command, to be run in the initramfs, whose output ``unpack`` reads. Raises ``GuestError``."""
    if not source.startswith("/") or "\0" in source:
        raise GuestError(f"{source!r} is not an absolute path of the guest")
    return ["sh", "-c", _PACK, "sh", source, served.ROOT if entry is not None else ""]


def unpack(source: str, target: str, file: io.BufferedReader) -> CopiedOut:
    """Extract what the guest sends, as far as the limits. Raises ``KvmpassError`` if it is not complete."""
    extraction = Extraction(Destination.at(source, target, f"copy of {source!r}"))
    reader, cause = ArchiveReader(extraction), None
    try:
        while cause is None and extraction.error is None and (data := file.read1(_CHUNK)):
            try:
                reader.feed(data)
            except BadArchive as error:
                cause = str(error)
        result = extraction.result(cause)
    finally:
        extraction.close()
    if result.error is not None:
        left_out = "".join(f"; {line}" for line in result.left_out[:3])
        raise GuestError(f"{source} was not copied to {target}: {result.error}{left_out}")
    return result


def copy_in(session: Session, source: Path, target: str) -> None:
    """See ``Session.copy_in``."""
    command, name = unpacking(source, target)
    errors = bytearray()

    def keep(process: AgentProcess, stream: int, data: bytes) -> None:
        errors.extend(data[: _MAX_MESSAGE - len(errors)])
        process.grant(stream, len(data))

    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = session.spawn(command, stdin=pipe, stdout=null, stderr=pipe, captured=keep)
    assert process.stdin is not None
    try:
        pack(source, name, process.stdin)
        process.stdin.close()
        status = process.wait()
    finally:
        process.abandon()
    if status != 0:
        raise GuestError(f"{source} was not copied into the guest: {_line(errors)}")


def copy_out(session: Session, source: str, target: str) -> CopiedOut:
    """See ``Session.copy_out``."""
    process = session.outside(packing(source, session.entry), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        with process.stdout:
            return unpack(source, target, cast("io.BufferedReader", process.stdout))
    finally:
        process.abandon()


def _line(message: bytearray) -> str:
    text = message.decode(errors="replace").strip().partition("\n")[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "no reason given"
