"""The headers of the stock kernel, for building modules."""

from __future__ import annotations

from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab import debian, kernels
from kvmpass.lab.cache import Say, cache_root, fill_directory

_ABSOLUTE = "/usr/src/"


def package(release: str) -> str:
    """Return the name of Debian's package with the headers of a kernel (``uname -r``)."""
    return f"linux-headers-{release}"


def cached(release: str) -> Path | None:
    """Return the directory for ``make -C``, ``None`` if it is not in the cache."""
    tree = _root(release) / "usr" / "src" / package(release)
    return tree if tree.is_dir() else None


def fetch(say: Say, *, again: bool = False) -> Path:
    """Return the directory for ``make -C DIR M=$PWD modules``; headers and kernel are downloaded at first use.

    ``again``: download the headers even if they are in the cache. Raises ``LabError`` if apt has no headers of the
    stock kernel in the cache.
    """
    release = kernels.stock(say).release
    fill_directory(_root(release), lambda draft: _unpack(release, draft, say), "headers", say, again=again)
    tree = cached(release)
    if tree is None:
        raise LabError(f"{package(release)} does not contain headers")
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
    makefile.write_text(makefile.read_text().replace(_ABSOLUTE, "../"))  # the packages are not installed
    (tree / "vmlinux").unlink(missing_ok=True)  # with its BTF, modules could not be built without pahole
