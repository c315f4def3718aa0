"""Kernel modules in files: their dependencies, their compression, their index."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from kvmpass.initramfs.modules import decompress
from kvmpass.lab.cache import run_tool

BUILTIN_LISTS = ("modules.builtin", "modules.builtin.modinfo", "modules.order")

# Loaded at each boot, or for a device that labs often have.
USUAL = (
    *("9p", "9pnet_virtio", "overlay", "vfio-pci", "kvm_amd"),
    *("nvme", "ahci", "sd_mod", "virtio_blk", "xhci_pci", "usb_storage", "uio_pci_generic"),
    *("e1000", "e1000e", "igb", "virtio_net"),
    *("i2c_i801", "lpc_ich"),
)


def index(root: Path, release: str) -> None:
    """Write the index for modprobe in ``root/lib/modules/RELEASE``. Raises ``LabError``."""
    run_tool(["depmod", "-b", root, release], f"no module index for {release}")


def index_builtin(lists: Path, root: Path, release: str) -> None:
    """Make ``root/lib/modules/RELEASE`` for a kernel without modules, from its lists of built-in drivers.

    Raises ``LabError``.
    """
    modules = root / "lib" / "modules" / release
    modules.mkdir(parents=True)
    for name in BUILTIN_LISTS:
        if (lists / name).is_file():
            shutil.copy(lists / name, modules / name)
    (modules / "modules.order").touch()
    (modules / "modules.builtin").touch()
    index(root, release)


def loaded_by(root: Path, release: str, names: Iterable[str]) -> list[Path]:
    """Return the files of modules and of their dependencies, in loading order, without built-in ones.

    Raises ``LabError`` if the kernel has no such module.
    """
    files: dict[Path, None] = {}
    for name in names:
        show: list[str | Path] = ["modprobe", "-d", root, "-S", release, "--show-depends", name]
        for line in run_tool(show, f"kernel {release} has no module {name}").splitlines():
            match line.split():
                case ["insmod", path, *_]:
                    files[Path(path)] = None
    return list(files)


def unpack_usual(root: Path, release: str) -> None:
    """Decompress the usual modules in place: an emulated host would need more time for it than for its boot."""
    for path in loaded_by(root, release, USUAL):
        if path.suffix != ".ko":
            path.with_suffix("").write_bytes(decompress(path))
            path.unlink()
    index(root, release)
