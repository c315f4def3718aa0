"""The kernel of a guest: the running one, a bzImage or vmlinux, or a directory with a kernel and its modules."""

from __future__ import annotations

import os
from pathlib import Path

from kvmpass._dataclass import dataclass
from kvmpass.boot.linux import KernelImage
from kvmpass.errors import BadKernel
from kvmpass.initramfs.modules import ModuleTree

_IMAGE = "arch/x86/boot/bzImage"


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A kernel and its modules."""

    image: KernelImage
    """The bzImage or vmlinux."""
    modules: ModuleTree
    """Its modules; there may be none."""
    symbols: Path | None = None
    """Its vmlinux, or that of its build tree, for a debugger."""


def host_kernel() -> Path:
    """Return the path of the running kernel's image in ``/boot``. Raises ``BadKernel`` if it is not found."""
    path = Path("/boot") / f"vmlinuz-{os.uname().release}"
    if not path.exists():
        raise BadKernel(f"the running kernel's image {path} was not found", "name a bzImage with --kernel")
    return path


def find_kernel(path: Path | None) -> GuestKernel:
    """Return the kernel at ``path``: bzImage, vmlinux, build tree or ``/lib/modules/RELEASE``; None: the running one.

    The modules of a bzImage or vmlinux are those in ``/lib/modules``. Raises ``BadKernel``, or the ``OSError`` of
    reading.
    """
    if path is None or not path.is_dir():
        try:
            image = KernelImage.from_file(path or host_kernel())
        except OSError as error:
            error.add_note("name a bzImage or vmlinux that this user may read with --kernel")
            raise
        symbols = path if image.vmlinux is not None else None
        return GuestKernel(image, ModuleTree(image.release or os.uname().release), symbols)
    if (path / "include/config/kernel.release").exists() or (path / _IMAGE).exists():
        return _built(path)
    if (path / "modules.dep").exists():
        return _installed(path.absolute())
    raise BadKernel(
        f"{path} has neither {_IMAGE} nor modules.dep",
        "name the directory in which a kernel was built, /lib/modules/RELEASE, or a bzImage",
    )


def _built(tree: Path) -> GuestKernel:
    if not (tree / _IMAGE).exists():
        raise BadKernel(f"{tree} has no {_IMAGE}", f"build it: make -C {tree} bzImage")
    image = KernelImage.from_file(tree / _IMAGE)
    try:
        release = (tree / "include/config/kernel.release").read_text().strip()
    except FileNotFoundError:
        release = image.release
    if image.release and release != image.release:
        raise BadKernel(
            f"{tree / _IMAGE} is kernel {image.release}, the modules of the tree are for {release}",
            f"build both again: make -C {tree} bzImage modules",
        )
    from kvmpass.initramfs.buildtree import BuildTree

    vmlinux = tree / "vmlinux"
    return GuestKernel(image, BuildTree(tree, release), vmlinux if vmlinux.exists() else None)


def _installed(directory: Path) -> GuestKernel:
    """Return the kernel of an installed tree: beside its modules, or in ``boot`` of the same file system."""
    release = directory.name
    places = [directory / "vmlinuz", *(parent / f"boot/vmlinuz-{release}" for parent in directory.parents[2:4])]
    image = next((place for place in places if place.exists()), None)
    if image is None:
        raise BadKernel(
            f"the kernel of {directory} was not found: neither {' nor '.join(map(str, places))}",
            "name its bzImage with --kernel",
        )
    return GuestKernel(KernelImage.from_file(image), ModuleTree(release, directory.parent))
