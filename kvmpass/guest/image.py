"""What a guest boots: a kernel, the initramfs that is made for its devices, the kernel command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpass.boot.cmdline import kernel_command_line
from kvmpass.boot.linux import KernelImage
from kvmpass.errors import BadKernel, NotEnoughMemory
from kvmpass.initramfs import GuestRoot, parameters
from kvmpass.layout import MIB
from kvmpass.machine import Machine

_START = 8 * MIB  # what a kernel allocates before it unpacks: Debian's 6.1 panics with 3 MiB, and works with 5
_SLACK = 32 * MIB  # beyond the least, in advice


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What to boot. Without ``kernel`` the host's own, without ``initrd`` one made for the devices' modaliases.

    ``command``: argument list to run instead of a shell on the console; it needs the made initramfs.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    copy: tuple[str, ...] = ()
    modules: tuple[Path, ...] = ()
    command: tuple[str, ...] | None = None
    verbose: bool = False
    terminal: str = "linux"
    terminal_size: tuple[int, int] = (24, 80)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A checked kernel, its initramfs and its command line: nothing of the host has been touched for it."""

    kernel: KernelImage
    initrd: bytes
    cmdline: str
    unpacked: int = 0
    """Bytes of memory that the initramfs takes in the guest once it is unpacked; 0: unknown."""
    warnings: tuple[str, ...] = ()
    """What could not be copied as it should be."""

    @property
    def needed(self) -> int:
        """Bytes of memory without which the kernel cannot start, or cannot unpack the initramfs.

        It runs at its preferred address or above, and takes ``init_size`` from there on before it looks at its memory
        (Documentation/arch/x86/boot.rst). It unpacks into a tmpfs, which takes half of the memory beside the kernel
        and the archive (``shmem_default_max_blocks``, mm/shmem.c;
        Documentation/filesystems/ramfs-rootfs-initramfs.rst).
        """
        return self.kernel.init_size + max(self._before_files, self._for_files)

    @property
    def _before_files(self) -> int:
        return self.kernel.preferred + _START

    @property
    def _for_files(self) -> int:
        return 2 * self.unpacked + len(self.initrd)

    def load(self, machine: Machine) -> None:
        """Into the memory of a machine that has not started. Raises ``NotEnoughMemory`` if it does not fit."""
        if machine.memory.ram_size < self.needed:
            least = -(-(self.needed + _SLACK) // (16 * MIB)) * 16
            what, more = f"the guest's kernel takes {self.needed / MIB:.0f} MiB to start", ""
            if self.unpacked and self._for_files > self._before_files:
                files = f"the guest's files take {self.unpacked / MIB:.0f} MiB unpacked"
                what, more = f"{files}, and half of its memory may hold files", ", or copy less into it"
            raise NotEnoughMemory(
                f"{what}: {machine.memory.ram_size // MIB} MiB are too little",
                f"give the guest {least} MiB (--memory {least}M){more}",
            )
        machine.load_linux(self.kernel, self.initrd, self.cmdline)


def host_kernel() -> Path:
    """The kernel this host runs, where Debian puts it. Raises ``BadKernel`` if it is not there."""
    path = Path("/boot") / f"vmlinuz-{os.uname().release}"
    if not path.exists():
        raise BadKernel(f"the running kernel's image {path} is not there", "name a bzImage with --kernel")
    return path


def prepare(spec: GuestSpec, modaliases: Sequence[str]) -> GuestImage:
    """Read the kernel and make or read the initramfs. Raises ``BadKernel``, ``KvmpassError`` or ``OSError``."""
    kernel = KernelImage.from_file(spec.kernel or host_kernel())
    append = parameters.words(spec.append)
    unpacked, warnings = 0, tuple[str, ...]()
    if spec.initrd is not None:
        initrd = spec.initrd.read_bytes()
    else:
        root = GuestRoot()
        release = kernel.release or os.uname().release
        root.add_modules(release, modaliases, files=spec.modules, parameters=parameters.module_parameters(append))
        for copy in spec.copy:
            root.copy(copy)
        if spec.command is not None:
            root.run_command(spec.command)
        root.terminal(spec.terminal, spec.terminal_size)
        initrd = root.build()
        unpacked, warnings = root.tree.unpacked_size, tuple(root.warnings)
    command_line = kernel_command_line(verbose=spec.verbose, strict=spec.command is not None, extra=append)
    return GuestImage(kernel, initrd, command_line, unpacked, warnings)
