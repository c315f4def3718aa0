"""The headers of the stock kernel, which modules for it are built against."""

from __future__ import annotations

from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab import debian, kernels
from kvmpass.lab.cache import Say, cache_root, locked, new_directory

_ABSOLUTE = "/usr/src/"


def package(release: str) -> str:
    """Debian's package with the headers of the kernel ``release`` (as ``uname -r`` says it)."""
    return f"linux-headers-{release}"


def cached(release: str) -> Path | None:
    """The directory for ``make -C``; ``None`` if it is not in the cache."""
    tree = _root(release) / "usr" / "src" / package(release)
    return tree if tree.is_dir() else None


def fetch(say: Say, *, again: bool = False) -> Path:
    """The directory for ``make -C DIR M=$PWD modules``, downloaded at first use with the stock kernel itself.

    Raises ``LabError`` if apt has no headers of the very release that the cache has as the stock kernel.
    """
    release = kernels.stock(say).release
    with locked("headers", say):
        tree = cached(release)
        if tree is None or again:
            with new_directory(_root(release)) as draft:
                _unpack(release, draft, say)
            tree = cached(release)
    if tree is None:
        raise LabError(f"{package(release)} has no headers in it")
    return tree


def _root(release: str) -> Path:
    return cache_root() / "kernels" / f"headers-{release}"


def _unpack(release: str, draft: Path, say: Say) -> None:
    try:
        common = debian.dependency(package(release), r"linux-headers-[^\s,]+-common")
        tools = debian.dependency(package(release), r"linux-kbuild-[^\s,]+")
    except LabError as error:
        error.add_note("kvmpass lab clean, if Debian has a newer kernel now: both are then fetched again")
        raise
    for name in (package(release), common, tools):
        debian.download_and_unpack(name, draft, say)
    tree = draft / "usr" / "src" / package(release)
    makefile = tree / "Makefile"
    makefile.write_text(makefile.read_text().replace(_ABSOLUTE, "../"))  # it would look where packages are installed
    (tree / "vmlinux").unlink(missing_ok=True)  # its types: with them each module's would need pahole
