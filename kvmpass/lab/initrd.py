"""The emulated host's initramfs: busybox, and the modules for its root file system."""

from __future__ import annotations

import gzip
import hashlib
import stat
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.initramfs.cpio import Node, newc
from kvmpass.initramfs.modules import decompress, module_name
from kvmpass.lab.cache import Say, cache_root, locked, need_tool, write_atomic
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.modules import loaded_by

ROOT_MODULES = ("9p", "9pnet_virtio", "overlay")
FOLDERS = ("bin", "dev", "mods", "newroot", "proc", "ro", "rw", "sys")
DIRECTORY = Node(stat.S_IFDIR | 0o755)
_FORMAT = 2  # part of the cached files' names: increment it when their content changes for the same inputs


def padded(data: bytes) -> bytes:
    """Pad ``data`` to a multiple of four bytes: another archive may follow there."""
    return data + bytes(-len(data) % 4)


def regular(content: bytes) -> Node:
    """Return a file that all users can read."""
    return Node(stat.S_IFREG | 0o644, content)


def executable(content: bytes) -> Node:
    """Return a program that all users can run."""
    return Node(stat.S_IFREG | 0o755, content)


def base(kernel: Kernel, say: Say) -> Path:
    """Return the cached part of the initramfs, which is the same for all runs of a kernel. Raises ``LabError``."""
    busybox = static_busybox()
    at = busybox.stat()
    inputs = f"{_FORMAT}:{kernel.identity}:{busybox}:{at.st_size}:{at.st_mtime_ns}"
    key = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    target = cache_root() / "initrd" / f"{kernel.release}-{key}.cpio.gz"
    with locked("initrd", say):
        if not target.is_file():
            files = dict.fromkeys(FOLDERS, DIRECTORY)
            files["bin/busybox"] = executable(busybox.read_bytes())
            for number, module in enumerate(root_modules(kernel)):
                files[f"mods/{number:02d}-{module_name(module)}.ko"] = regular(decompress(module))
            write_atomic(target, gzip.compress(newc(files.items()), 1))
    return target


def static_busybox() -> Path:
    """Return a busybox that needs no libraries. Raises ``LabError``."""
    busybox = need_tool("busybox")
    # The first pages of a dynamically linked program contain the name of its loader.
    if b"/ld-linux-x86-64" in busybox.read_bytes()[:4096]:
        raise LabError(f"{busybox} is not statically linked", "apt-get install busybox-static")
    return busybox


def root_modules(kernel: Kernel) -> list[Path]:
    """Return the files of the modules that the root file system needs, in loading order."""
    if kernel.modules is None:
        return []
    index = kernel.modules / "modules.dep"
    if not index.is_file() or not index.stat().st_size:
        return []
    return loaded_by(kernel.modules.parents[2], kernel.release, ROOT_MODULES)
