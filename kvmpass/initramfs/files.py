"""``--copy SRC:DST``: files copied from the host into the guest, with the libraries and interpreters they need."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from kvmpass.errors import KvmpassError
from kvmpass.initramfs import elf
from kvmpass.initramfs.cpio import Node, Tree


def split_spec(spec: str) -> tuple[Path, str]:
    """Split ``SRC:DST`` at the last colon. Return the source, and its path in the guest.

    ``DST`` is absolute. If it ends with a slash, the source is copied into that directory under its own name, as by
    ``cp -r SRC DST``; if the source ends with ``.`` or ``..``, its contents are. Raises ``KvmpassError``.
    """
    source, colon, target = spec.rpartition(":")
    if not colon or not source or not target.startswith("/"):
        raise KvmpassError(f"--copy {spec!r} is not SRC:DST with an absolute DST")
    name = source.rstrip("/").rpartition("/")[2]
    if target.endswith("/") and name not in (".", ".."):
        target += name
    return Path(source), target


def size_of(source: Path) -> int:
    """Return the bytes of the files that ``copy_into`` reads of ``source``, without libraries and interpreters.

    Files that cannot be looked at are left out.
    """
    try:
        status = source.stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        with os.scandir(source) as entries:
            return sum(size_of(Path(entry.path)) for entry in entries if not entry.is_symlink())
    except OSError:
        return 0


def copy_into(tree: Tree, source: Path, target: str, warn: Callable[[str], None] = lambda text: None) -> None:
    """Copy ``source``, a file or a directory with all below it, to ``target``.

    Modes and symlinks are preserved, but directories of the tree keep their mode, and ``source`` itself is followed.
    ELF files are copied with their dynamic linker and libraries, scripts with the interpreter of their first line,
    each to its own path. Raises ``KvmpassError`` if something is missing or cannot be copied, and the ``OSError`` of
    reading. Below a directory ``warn`` is called instead, and the file is left out, or incomplete.
    """
    if not source.exists():
        raise KvmpassError(f"--copy: {source} does not exist")
    if source.is_dir():
        _copy_directory(tree, source, target, warn)
    elif tree.is_directory(target):
        raise KvmpassError(
            f"--copy: {target} is a directory in the guest",
            f"write a slash at its end to copy {source.name} into it: {source}:{target.rstrip('/')}/",
        )
    else:
        _copy_file(tree, source, target)


def _copy_directory(tree: Tree, source: Path, target: str, warn: Callable[[str], None]) -> None:
    if not tree.is_directory(target):
        tree.directory(target, stat.S_IMODE(source.stat().st_mode))
    with os.scandir(source) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            place = f"{target.rstrip('/')}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                _copy_directory(tree, Path(entry.path), place, warn)
                continue
            try:
                if entry.is_symlink():
                    tree.symlink(place, str(Path(entry.path).readlink()))
                else:
                    _copy_file(tree, Path(entry.path), place)
            except (KvmpassError, OSError) as error:
                warn(f"--copy: {error}")


def _copy_file(tree: Tree, source: Path, target: str) -> None:
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):
        raise KvmpassError(f"--copy: {source} is neither a file, a directory nor a symlink")
    data = source.read_bytes()
    tree.add(target, Node(stat.S_IFREG | stat.S_IMODE(status.st_mode), data))
    if elf.is_elf(data):
        try:
            add_libraries(tree, source, data, target)
        except ValueError as error:
            # Not executable: data.
            if status.st_mode & 0o111:
                raise KvmpassError(f"{source} is a broken ELF file") from error
    elif data[:2] == b"#!" and status.st_mode & 0o111:
        _add_interpreter(tree, source, data)


def add_libraries(tree: Tree, source: Path, data: bytes, target: str) -> None:
    """Add what the ELF file ``source`` needs to start at ``target``, unless the tree has it.

    ``data``: its content. Raises ``ValueError`` for a broken ELF file, ``KvmpassError`` for a missing library.
    """
    for path, content in elf.closure(source, data, target).items():
        if path not in tree:
            tree.file(path, content, 0o755)


def _add_interpreter(tree: Tree, script: Path, data: bytes) -> None:
    words = data[2:256].split(b"\n", 1)[0].decode("utf-8", "surrogateescape").split()
    if not words:
        return
    place: str = words[0]
    located: str | None = place
    if place.rpartition("/")[2] == "env":
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        if not names:
            return
        import shutil

        place, located = f"/usr/bin/{names[0]}", shutil.which(names[0])  # env searches PATH
    if not place.startswith("/"):
        raise KvmpassError(f"{script} is run by {elf.printable(place)}, which is not an absolute path")
    if place in tree:  # busybox provides many
        return
    if located is None or not Path(located).is_file():
        raise KvmpassError(f"{script} is run by {elf.printable(place)}, not on this host")
    _copy_file(tree, Path(located), place)
