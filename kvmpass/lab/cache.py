"""The lab's cache: unpacked kernels, initramfs images, an unpacked QEMU; and the tools that fill it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from kvmpass._cache import cache_root as cache_root
from kvmpass._log import Log
from kvmpass.errors import LabError

Say = Callable[[str], None]
"""Receives progress: one line for each step that takes longer than a second."""

log = Log("kvmpass.lab")

# Debian packages of tools whose name is not the package's.
PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "modprobe": "kmod",
    "setpriv": "util-linux",
    "xz": "xz-utils",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def cache_errors() -> Iterator[None]:
    """Add a hint to an ``OSError`` of writing to the cache: its directory, and the variable that names another one.

    It can be used as a decorator, too.
    """
    try:
        yield
    except OSError as error:
        root = cache_root()
        if error.filename is None and error.errno in _FULL:  # write(2) has no path
            error.filename = str(root)
        names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        here = any(root.is_relative_to(name) or name.is_relative_to(root) for name in names)
        if here and error.errno in (*_FULL, *_NOT_WRITABLE):
            _name_cache(error)
        raise


def _name_cache(error: OSError | LabError) -> None:
    full = (
        "" if isinstance(error, OSError) and error.errno in _NOT_WRITABLE else "kvmpass lab clean empties the cache; "
    )
    note = f"{full}set KVMPASS_CACHE to use another directory than {cache_root()}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def find_tool(name: str) -> Path | None:
    """Return the path of a program, ``None`` if it is missing. The ``sbin`` directories are searched, too."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    return Path(found) if found else None


def missing_packages(tools: Iterable[str]) -> list[str]:
    """Return the Debian packages of those tools that are missing on this machine."""
    return [PACKAGES.get(tool, tool) for tool in tools if find_tool(tool) is None]


def need_tool(name: str) -> Path:
    """As ``find_tool``, but raises ``LabError`` with the package that has the program."""
    found = find_tool(name)
    if found is None:
        [package] = missing_packages([name])
        raise LabError(f"{name} is missing", f"apt-get install {package}")
    return found


def run_tool(arguments: Sequence[str | Path], failure: str, remedy: str | None = None, **more: object) -> str:
    """Run a program, found as by ``need_tool``, and return its output.

    ``more`` are arguments of ``subprocess.run``. Raises ``LabError(failure, remedy)`` with the last line of the
    output if the exit status is not 0.
    """
    name, *words = map(str, arguments)
    done = subprocess.run(  # type: ignore[call-overload]
        [need_tool(name), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        **more,
    )
    log.debug("%s: status %d", name, done.returncode)
    if done.returncode:
        output = done.stdout + done.stderr
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        error = LabError(f"{failure}: {last.strip()}" if last else failure, remedy)
        if any(os.strerror(number) in output for number in (*_FULL, errno.EROFS)):
            _name_cache(error)
        raise error
    return str(done.stdout)


@contextmanager
def locked(name: str, say: Say) -> Iterator[Path]:
    """Hold the cache's lock ``name``; yields the cache's directory. Reports when it has to wait for another run."""
    with cache_errors():
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{name}.lock").open("w") as file:
            if not _try_lock(file):
                say(f"waiting for another run that prepares {name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield root


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory, which replaces ``target`` at the end, or is removed after an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fill_directory(target: Path, make: Callable[[Path], None], lock: str, say: Say, *, again: bool = False) -> None:
    """Let ``make`` fill a directory of the cache, unless it is there, or ``again``; under the cache's ``lock``."""
    with locked(lock, say):
        if again or not target.is_dir():
            with new_directory(target) as draft:
                make(draft)


@cache_errors()
def write_atomic(target: Path, content: bytes) -> None:
    """Write a file so that it is never seen incomplete (rename(2))."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).rename(target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def run_directory() -> Iterator[Path]:
    """Yield a directory for one run, removed at its end. Directories of killed runs are removed first."""
    with cache_errors():
        runs = cache_root() / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        for old in runs.iterdir():
            _remove_if_abandoned(old)
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=runs))
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _remove_if_abandoned(directory: Path) -> None:
    with suppress(OSError), (directory / "lock").open("r") as lock:
        if _try_lock(lock):
            shutil.rmtree(directory, ignore_errors=True)


def used_bytes(path: Path) -> int:
    """Return the bytes on disk below ``path``. Hard links count once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                at = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - tens of thousands of files
                seen[at.st_dev, at.st_ino] = at.st_blocks * 512
    return sum(seen.values())


@cache_errors()
def clean() -> int:
    """Remove the cache, and return the number of bytes freed. Raises ``LabError`` while it is in use."""
    root = cache_root()
    for lock in root.glob(".*.lock"):
        with lock.open("w") as file:
            if not _try_lock(file):
                name = lock.name.removeprefix(".").removesuffix(".lock")
                raise LabError(f"another run prepares {name} in this cache", "wait until it ends")
    runs = root / "runs"
    if runs.is_dir():
        for run in runs.iterdir():
            _remove_if_abandoned(run)
        if any(runs.iterdir()):
            raise LabError("a lab that is running uses this cache", "wait until it ends")
    size = used_bytes(root)
    shutil.rmtree(root, ignore_errors=True)
    return size
