"""Files into a session's guest, and out of it."""

from __future__ import annotations

import io
import os
import posixpath
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvmpass.errors import BadArchive, GuestError
from kvmpass.guest import CopiedOut
from kvmpass.guest.archive import ArchiveReader
from kvmpass.guest.destination import Destination
from kvmpass.guest.extract import Extraction
from kvmpass.initramfs import init, served

if TYPE_CHECKING:
    from kvmpass.session.session import Session

_CHUNK = 1 << 16
_MAX_MESSAGE = 500
_UNPACK = 'mkdir -p "$1" && tar -x -f - -C "$1"'
_PACK = init.ARCHIVE.decode() + 'archive "$1" "$2"'


def copy_in(session: Session, source: Path, target: str) -> None:
    """Send ``source`` as an archive, which the guest's tar unpacks. See ``Session.copy_in``."""
    if target.endswith("/"):
        target += source.resolve().name
    directory, name = posixpath.split(posixpath.normpath(target))
    source.stat()
    with session.popen(
        ["sh", "-c", _UNPACK, "sh", directory or "."],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as unpacking:
        assert unpacking.stdin is not None and unpacking.stderr is not None
        try:
            with tarfile.open(mode="w|", fileobj=unpacking.stdin, dereference=source.is_symlink()) as archive:
                archive.add(source, name)
        except BaseException:
            unpacking.kill()
            raise
        unpacking.stdin.close()
        message = unpacking.stderr.read(_MAX_MESSAGE)
        unpacking.stderr.close()
        if unpacking.wait() != 0:
            raise GuestError(f"{source} was not copied into the guest: {_line(message)}")


def copy_out(session: Session, source: str, target: str) -> CopiedOut:
    """Extract the archive that the guest sends. See ``Session.copy_out``."""
    if not source.startswith("/") or "\0" in source:
        raise GuestError(f"{source!r} is not an absolute path of the guest")
    extraction = Extraction(Destination.at(source, target, f"copy of {source!r}"))
    reader = ArchiveReader(extraction)
    cause = None
    try:
        root = served.ROOT if session.entry is not None else ""
        with session.outside(["sh", "-c", _PACK, "sh", source, root], stdout=subprocess.PIPE) as packing:
            output = cast("io.BufferedReader[Any]", packing.stdout)
            try:
                while data := output.read1(_CHUNK):
                    reader.feed(data)
            except BadArchive as error:
                cause = str(error)
                packing.kill()
        result = extraction.result(cause)
    finally:
        extraction.close()
    if result.error is not None:
        left_out = "".join(f"; {line}" for line in result.left_out[:3])
        raise GuestError(f"{source} was not copied to {os.fspath(target)}: {result.error}{left_out}")
    return result


def _line(message: bytes) -> str:
    text = message.decode(errors="replace").strip().partition("\n")[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "no reason given"
