"""The configuration of a guest's kernel, where this host has it."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from kvmpass.boot.linux import KernelImage

RUNNING = Path("/proc/config.gz")
_CONSOLE = ("VIRTIO_PCI", "VIRTIO_CONSOLE")


class KernelOptions:
    """The options of a kernel configuration, ``CONFIG_X``; unknown ones are neither built in nor modules."""

    def __init__(self, text: bytes = b"") -> None:
        self._lines = b"\n" + text
        self.known = bool(text)
        """Whether there is a configuration."""

    def built_in(self, *names: str) -> bool:
        """Whether all of the options are ``y``."""
        return all(b"\nCONFIG_%s=y\n" % name.encode() in self._lines for name in names)

    def has(self, name: str) -> bool:
        """Whether an option is ``y`` or ``m``."""
        return any(b"\nCONFIG_%s=%s\n" % (name.encode(), value) in self._lines for value in (b"y", b"m"))

    @classmethod
    def of(cls, kernel: KernelImage) -> KernelOptions:
        """Find the options of ``kernel``; none if no configuration of it is found."""
        for path in _places(kernel):
            try:
                data = path.read_bytes()
                return cls(_unpacked(data) if path.suffix == ".gz" else data)
            except (OSError, ValueError):
                continue
        return cls()


def _unpacked(data: bytes) -> bytes:
    """Return the content of a gzip file. Raises ``ValueError``."""
    import zlib

    try:
        return zlib.decompress(data, 16 + zlib.MAX_WBITS)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def ecam_alone(options: KernelOptions, parameters: Iterable[str]) -> bool:
    """Whether the kernel reaches configuration space by ECAM where there are no ports for it.

    It says, as an error, that it has no access, before it finds ECAM by ACPI (arch/x86/pci/init.c).
    ``parameters``: the user's, which may turn off either.
    """
    chosen = any(word.startswith(("acpi=", "pci=")) for word in parameters)
    return options.built_in("PCI_MMCONFIG") and not chosen


def has_console(options: KernelOptions, modules: Container[str]) -> bool:
    """Whether the kernel drives a virtio console, by itself or with ``modules`` that its init loads."""
    return all(options.built_in(name) or name.lower() in modules for name in _CONSOLE)


def agent_lacks(options: KernelOptions) -> list[str]:
    """Return the options that the kernel lacks for an agent beside another init; none if its options are unknown.

    A module may be in that initramfs, wherever this host has it.
    """
    wanted = (*_CONSOLE, "DEVTMPFS")
    return [f"CONFIG_{name}" for name in wanted if options.known and not options.has(name)]


def _places(kernel: KernelImage) -> Iterator[Path]:
    """Yield where the configuration of exactly this kernel would be."""
    image = Path(kernel.path).absolute()
    if kernel.banner and _is_running(kernel.banner):
        yield RUNNING
    if kernel.release:
        yield image.with_name(f"config-{kernel.release}")
        yield Path("/lib/modules", kernel.release, "config")
    if image.parts[-4:-1] == ("arch", "x86", "boot"):
        yield image.parents[3] / ".config"
    if kernel.vmlinux is not None:
        yield image.with_name(".config")


def _is_running(banner: str) -> bool:
    """Whether it is the version of the running kernel, time of the build included."""
    running = os.uname()
    return banner.startswith(f"{running.release} ") and banner.endswith(running.version)
