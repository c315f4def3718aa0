"""The emulated host's kernels: stock (Debian's), full and next (built from Debian's sources), or a file."""

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

# Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_VERSION_AT = 0x20E
_SETUP_SECTORS_AT, _PARAGRAPHS_AT = 0x1F1, 0x1F4
_NAME_KERNEL = "name a bzImage with --kernel, or stock, full or next"
# From this release on the kernel looks for the IOAPIC's PCI function (drivers/iommu/amd/init.c, check_sb_ioapic).
_SOUTHBRIDGE_SINCE = 7


@dataclass(frozen=True)
class Recipe:
    """How a kernel of the lab is built, and what names one that is built elsewhere."""

    name: str
    """What ``--kernel`` calls it."""
    about: str
    """What distinguishes it."""
    source: str
    """The Debian package with its source."""
    suites: tuple[str, ...]
    """The suites for apt, of which the last one has the package; empty: those of this machine."""
    config: str
    """The file of this package with its configuration, over ``tinyconfig``."""
    variable: str
    """The environment variable that names a bzImage to use instead."""
    command: str
    """The command that builds it."""
    minutes: int
    """How long that takes on two cores."""
    emulator: str
    """The QEMU that emulates its host unless another one is named."""

    @property
    def root(self) -> Path:
        """The directory of the kernel in the cache."""
        return cache_root() / "kernels" / self.name

    @property
    def available(self) -> bool:
        """Whether it has been built, or is named by its variable."""
        return bool(os.environ.get(self.variable)) or cached(self.root, self.name) is not None


FULL = Recipe(
    name="full",
    about="iommufd",
    source="linux-source-6.12",
    suites=(),
    config="kernel.config",
    variable="KVMPASS_LAB_KERNEL",
    command="kvmpass lab kernel",
    minutes=8,
    emulator="system",
)
NEXT = Recipe(
    name="next",
    about="Linux 7.3",
    source="linux-source-7.3",
    suites=debian.BACKPORTS,
    config="kernel-next.config",
    variable="KVMPASS_LAB_KERNEL_NEXT",
    command="kvmpass lab kernel --next",
    minutes=9,
    # Under QEMU 7.2 this kernel boots, but guests that run it have no console and no init.
    emulator="modern",
)
RECIPES = {recipe.name: recipe for recipe in (FULL, NEXT)}


@dataclass(frozen=True)
class Kernel:
    """A kernel that a host can boot."""

    name: str
    """``stock``, ``full``, ``next``, or the path of a bzImage."""
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

    @property
    def wants_southbridge(self) -> bool:
        """Whether it remaps interrupts only if the IOAPIC's function is an ISA bridge or an SMBus controller."""
        major = self.release.partition(".")[0]
        return major.isdecimal() and int(major) >= _SOUTHBRIDGE_SINCE


def kernel_release(image: Path) -> str:
    """Return what ``uname -r`` prints under a bzImage. Raises ``LabError`` for another file, and for half of one."""
    try:
        with image.open("rb") as file:
            head = file.read(0x10000)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise LabError(f"{image}: {error.strerror}", _NAME_KERNEL) from error
    if head[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise LabError(f"{image} is not a Linux kernel (bzImage) for x86", _NAME_KERNEL)
    # As kvmpass/boot/linux.py: in units of 16 bytes, rounded up. QEMU would start it, without a word on the console.
    start = ((head[_SETUP_SECTORS_AT] or 4) + 1) * 512
    code = int.from_bytes(head[_PARAGRAPHS_AT : _PARAGRAPHS_AT + 4], "little") * 16
    if code and size - start + 16 <= code:
        raise LabError(
            f"{image} is truncated: {max(0, size - start)} of {code} bytes of code", "name a whole one with --kernel"
        )
    at = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little") + 0x200
    words = head[at:].split(b"\0", 1)[0].split()
    if not words:
        raise LabError(f"the version of {image} is unknown")
    return words[0].decode("ascii", "replace")


def stock_root() -> Path:
    """Return the directory of the stock kernel in the cache."""
    return cache_root() / "kernels" / "stock"


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


def built(recipe: Recipe, say: Say) -> Kernel:
    """Return the kernel that the recipe's variable names, else the built one.

    Raises ``LabError`` if it has not been built.
    """
    named = os.environ.get(recipe.variable)
    if named:
        return from_file(Path(named), say, recipe.name)
    kernel = cached(recipe.root, recipe.name)
    if kernel is None:
        raise LabError(
            f"the {recipe.name} kernel has not been built",
            f"run {recipe.command}, which builds it (about {recipe.minutes} minutes on 2 cores); "
            f"{recipe.variable}=FILE names a built one",
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
    """Return the kernel for ``stock``, ``full``, ``next`` or a path. Raises ``LabError``."""
    if name == "stock":
        return stock(say)
    if name in RECIPES:
        return built(RECIPES[name], say)
    return from_file(Path(name), say)


def emulator_for(name: str) -> str:
    """Return the QEMU that emulates the host of a kernel (``stock``, ``full``, ``next``, a path) by default."""
    return RECIPES[name].emulator if name in RECIPES else "system"
