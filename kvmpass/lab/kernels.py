"""The emulated host's kernels: stock (Debian's), full, or a file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab import debian, modules
from kvmpass.lab.cache import Say, cache_root, fill_directory

STOCK_PACKAGE = "linux-image-6.12-amd64"
STOCK_IMAGE = r"linux-image-6\.12\.[0-9.]+\S*-amd64"
FULL_VARIABLE = "KVMPASS_LAB_KERNEL"

# Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_VERSION_AT = 0x20E


@dataclass(frozen=True)
class Kernel:
    """A kernel that a host can boot."""

    name: str
    """``stock``, ``full``, or the path of a bzImage."""
    image: Path
    """The bzImage."""
    release: str
    """What ``uname -r`` prints."""
    modules: Path | None = None
    """The directory for ``/lib/modules/RELEASE``."""
    config: Path | None = None
    """The file for ``/boot/config-RELEASE``."""

    @property
    def identity(self) -> str:
        """A hash that changes when the image file or its modules do."""
        at = self.image.stat()
        text = f"{self.image}:{at.st_size}:{at.st_mtime_ns}:{self.modules}"
        if self.modules is not None:
            text += f":{self.modules.stat().st_mtime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def kernel_release(image: Path) -> str:
    """Return what ``uname -r`` prints under a bzImage. Raises ``LabError`` for another file."""
    try:
        with image.open("rb") as file:
            head = file.read(0x10000)
    except OSError as error:
        raise LabError(f"{image}: {error.strerror}") from error
    if head[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise LabError(f"{image} is not a Linux kernel (bzImage) for x86")
    at = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little") + 0x200
    words = head[at:].split(b"\0", 1)[0].split()
    if not words:
        raise LabError(f"the version of {image} is unknown")
    return words[0].decode("ascii", "replace")


def stock_root() -> Path:
    """Return the directory of the stock kernel in the cache."""
    return cache_root() / "kernels" / "stock"


def full_root() -> Path:
    """Return the directory of the full kernel in the cache."""
    return cache_root() / "kernels" / "full"


def cached(root: Path, name: str) -> Kernel | None:
    """Return the kernel below ``root``, a tree like that of Debian's packages; ``None`` if there is none."""
    images = sorted((root / "boot").glob("vmlinuz-*")) if root.is_dir() else []
    if not images:
        return None
    release = images[0].name.removeprefix("vmlinuz-")
    folder, config = root / "lib" / "modules" / release, root / "boot" / f"config-{release}"
    return Kernel(name, images[0], release, folder if folder.is_dir() else None, config if config.is_file() else None)


def stock(say: Say) -> Kernel:
    """Return Debian's kernel, which is downloaded at first use. Raises ``LabError``."""

    def unpack(draft: Path) -> None:
        package = debian.dependency(STOCK_PACKAGE, STOCK_IMAGE)
        debian.download_and_unpack(package, draft, say)
        release = package.removeprefix("linux-image-")
        modules.index(draft, release)
        modules.unpack_usual(draft, release)

    fill_directory(stock_root(), unpack, "kernel", say)
    kernel = cached(stock_root(), "stock")
    if kernel is None:
        raise LabError(f"{STOCK_PACKAGE} does not contain a kernel")
    return kernel


def full(say: Say) -> Kernel:
    """Return the kernel with iommufd: that of ``KVMPASS_LAB_KERNEL``, or the built one.

    Raises ``LabError`` if it has not been built.
    """
    named = os.environ.get(FULL_VARIABLE)
    if named:
        return from_file(Path(named), say, "full")
    kernel = cached(full_root(), "full")
    if kernel is None:
        raise LabError(
            "the full kernel has not been built",
            f"kvmpass lab kernel builds it (about 8 minutes on 2 cores); {FULL_VARIABLE}=FILE names a built one",
        )
    return kernel


def from_file(image: Path, say: Say, name: str | None = None) -> Kernel:
    """Return a kernel for a bzImage. Raises ``LabError`` if it is none.

    Its modules are those in ``/lib/modules``, else it has only the built-in ones that the lists beside it name.
    """
    image = image.absolute()
    release = kernel_release(image)
    installed = Path("/lib/modules") / release
    if (installed / "modules.dep").is_file():
        config = Path("/boot") / f"config-{release}"
        return Kernel(name or str(image), image, release, installed, config if config.is_file() else None)
    kernel = Kernel(name or str(image), image, release)
    root = cache_root() / "kernels" / f"builtin-{kernel.identity}"
    fill_directory(root, lambda draft: modules.index_builtin(image.parent, draft, release), "kernel", say)
    return replace(kernel, modules=root / "lib" / "modules" / release)


def find(name: str, say: Say) -> Kernel:
    """Return the kernel for ``stock``, ``full`` or a path. Raises ``LabError``."""
    if name == "stock":
        return stock(say)
    if name == "full":
        return full(say)
    return from_file(Path(name), say)
