"""The image that a guest boots: kernel, initramfs and kernel command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass, replace
from kvmpass._teardown import undo_on_error
from kvmpass.boot.cmdline import QUIET, kernel_command_line, uarts
from kvmpass.boot.linux import KernelImage
from kvmpass.boot.unpacking import Unpacking
from kvmpass.errors import BadKernel, NotEnoughMemory
from kvmpass.guest.kernel import GuestKernel, find_kernel
from kvmpass.guest.options import KernelOptions, agent_lacks, ecam_alone, has_console
from kvmpass.guest.spec import MINIMAL, GuestSpec
from kvmpass.initramfs import GuestRoot, init, parameters
from kvmpass.initramfs.served import DRIVERS, Entry
from kvmpass.layout import MIB
from kvmpass.memory import Backing
from kvmpass.modalias import pci_ids
from kvmpass.ports import SERIAL_LINES

if TYPE_CHECKING:
    from kvmpass.guest.directories import Directory
    from kvmpass.machine import Machine

_START = 8 * MIB  # what a kernel allocates before it unpacks: Debian's 6.1 panics with 3 MiB, and works with 5
_SLACK = 32 * MIB  # beyond the minimum, in the hint
_COMMUNICATION = 0x07  # base class (include/linux/pci_ids.h)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A kernel, its initramfs and its command line."""

    kernel: KernelImage
    """The kernel, checked."""
    initrd: bytes
    """The initramfs."""
    cmdline: str
    """The kernel command line."""
    unpacked: int = 0
    """Bytes of memory that the initramfs takes in the guest once it is unpacked; 0: unknown."""
    warnings: tuple[str, ...] = ()
    """Files that could not be copied completely, and modules for none of the devices."""
    ports: tuple[str, ...] = ()
    """Named ports that its init uses. Without any the guest has no virtio console, which takes time to boot."""
    directories: tuple[Directory, ...] = ()
    """Directories of this host that it mounts: their daemons need shared memory (``backing``)."""
    entry: Entry | None = None
    """How programs start in its root; None: in the initramfs itself."""
    symbols: Path | None = None
    """The vmlinux of the kernel's build tree, for a debugger."""

    ecam_alone: bool = False
    """Whether its kernel reaches configuration space by ECAM, so that the machine needs no ports for it."""
    serial_ports: int = len(SERIAL_LINES)
    """How many it uses. Each that the kernel probes takes tens of exits."""
    unpacking: Unpacking | None = None
    """Decompression of the kernel on this host; None: the kernel decompresses itself."""

    def on_serial_ports(self) -> GuestImage:
        """Return it for a machine without a virtio console, such as QEMU's: it uses COM1 to COM4."""
        cmdline = self.cmdline.replace(f"{uarts(self.serial_ports)} ", f"{uarts(len(SERIAL_LINES))} ")
        return replace(self, ports=(), cmdline=cmdline, serial_ports=len(SERIAL_LINES), unpacking=None)

    def backing(self, wanted: Backing = Backing.ANONYMOUS) -> Backing:
        """Return the backing for the memory of a machine that it is loaded into, ``wanted`` where it may choose."""
        return wanted.shared if self.directories else wanted

    @property
    def least_memory(self) -> int:
        """Bytes of memory that a machine must have at least to load it.

        The kernel runs at its preferred address or above, and uses ``init_size`` bytes from there on before it reads
        the memory map (Documentation/arch/x86/boot.rst). It unpacks into a tmpfs, which is limited to half of the
        memory beside the kernel and the archive (``shmem_default_max_blocks``, mm/shmem.c;
        Documentation/filesystems/ramfs-rootfs-initramfs.rst).
        """
        files = 2 * self.unpacked + len(self.initrd)
        return self.kernel.init_size + max(self.kernel.preferred + _START, files)

    def load(self, machine: Machine) -> None:
        """Load it into the memory of a machine that has not started, and start its daemons.

        They end when the machine is closed. Raises ``NotEnoughMemory``, ``ShareError``, ``DaemonError``.
        """
        with undo_on_error(*([self.unpacking.cancel] if self.unpacking is not None else ())):
            self._check_memory(machine)
            if self.ports:
                machine.add_ports(self.ports)
            for directory in self.directories:
                directory.serve(machine)
            machine.load_linux(
                self.kernel, self.initrd, self.cmdline, self.ecam_alone, self.serial_ports, self.unpacking
            )

    def _check_memory(self, machine: Machine) -> None:
        needed = self.least_memory
        if machine.memory.ram_size < needed:
            least = -(-(needed + _SLACK) // (16 * MIB)) * 16
            what, more = f"the guest's kernel needs {needed / MIB:.0f} MiB to start", ""
            if self.unpacked and needed > self.kernel.init_size + self.kernel.preferred + _START:
                unpacked = f"the guest's files need {self.unpacked / MIB:.0f} MiB unpacked"
                what, more = f"{unpacked}, and at most half of its memory can hold files", ", or copy less into it"
            raise NotEnoughMemory(
                f"{what}: {machine.memory.ram_size // MIB} MiB are too little",
                f"give the guest {least} MiB (--memory {least}M){more}",
            )


def _sources(copy_out: Sequence[str]) -> list[str]:
    """Return what ``--copy-out`` brings out of the guest. Raises ``KvmpassError``."""
    if not copy_out:
        return []
    from kvmpass.guest.destination import Destination

    return [Destination.parse(text).source for text in copy_out]


def _serial_cards(modaliases: Sequence[str]) -> int:
    """Return how many devices are communication controllers: a serial card may be any sub-class of them."""
    return sum(ids is not None and ids[4] == _COMMUNICATION for ids in map(pci_ids, modaliases))


def prepare(spec: GuestSpec, modaliases: Sequence[str], memory: int = 0) -> GuestImage:
    """Read the kernel and make or read the initramfs. Raises ``BadKernel``, ``KvmpassError`` or ``OSError``.

    ``memory``: bytes of RAM of the machine that will load it. If the kernel fits into them, its decompression
    begins now, in a thread; else when it is loaded.
    """
    spec.check()
    served: tuple[Directory, ...] = ()
    if spec.root != MINIMAL or spec.shares:
        from kvmpass.guest.directories import directories

        served = directories(spec.root, spec.shares)
    kernel = find_kernel(spec.kernel)
    if spec.kaslr and kernel.image.vmlinux is not None:
        raise BadKernel(
            f"{kernel.image.path}: a vmlinux starts where it was linked to, without KASLR",
            "name its bzImage with --kernel, or leave --kaslr out",
        )
    unpacking = None if spec.kaslr or kernel.image.vmlinux is not None else Unpacking(kernel.image)
    with undo_on_error(*([unpacking.cancel] if unpacking is not None else ())):
        if unpacking is not None and kernel.image.preferred + kernel.image.init_size <= memory:
            unpacking.begin()
        return _with_initramfs(spec, modaliases, kernel, served, unpacking)


def _with_initramfs(
    spec: GuestSpec,
    modaliases: Sequence[str],
    kernel: GuestKernel,
    served: tuple[Directory, ...],
    unpacking: Unpacking | None,
) -> GuestImage:
    brought_out = _sources(spec.copy_out)
    append = parameters.words(spec.append)
    with_agent = spec.command is not None or spec.session
    unpacked, warnings, entry = 0, tuple[str, ...](), None
    options, serial_ports = KernelOptions(), len(SERIAL_LINES)
    if spec.initrd is not None:
        initrd = spec.initrd.read_bytes()
        if spec.session:
            from kvmpass.initramfs import beside

            if lacking := agent_lacks(KernelOptions.of(kernel.image)):
                raise BadKernel(
                    f"kernel {kernel.image.release} lacks {', '.join(lacking)}, which the agent beside an init needs",
                    "name another kernel with --kernel, or leave --initrd out",
                )
            initrd, append = beside.before(initrd, kernel.modules, append)
    else:
        root = GuestRoot()
        root.add_modules(
            kernel.modules,
            modaliases,
            files=spec.modules,
            parameters=parameters.module_parameters(append),
            also=init.PORT_DRIVERS if with_agent else (),
            needed=DRIVERS if served else (),
        )
        if served:
            from kvmpass.guest.directories import mount

            entry = mount(root, spec.root, served)
        for copy in spec.copy:
            root.copy(copy)
        if spec.command is not None:
            needs = "-t" if spec.tty else "-i" if spec.interactive else ""
            root.run_command(spec.command, spec.environment, spec.directory, needs_agent=needs)
        elif spec.session:
            root.run_agent("a session")
        root.copy_out(brought_out)
        root.terminal(spec.terminal, spec.terminal_size)
        initrd = root.build()
        options = KernelOptions.of(kernel.image)
        if with_agent and has_console(options, root.loads):
            serial_ports = 1  # the others would take the place of the console's port
        unpacked, warnings = root.tree.unpacked_size, tuple(root.warnings)
    command_line = kernel_command_line(
        verbose=spec.verbose,
        strict=with_agent,
        quiet="quiet" if spec.initrd is not None else QUIET,
        serial_ports=serial_ports,
        serial_cards=_serial_cards(modaliases),
        extra=append,
    )
    ports = (init.AGENT_PORT,) if with_agent and (spec.initrd is None or spec.session) else ()
    return GuestImage(
        kernel.image,
        initrd,
        command_line,
        unpacked,
        warnings,
        ports,
        served,
        entry,
        kernel.symbols,
        ecam_alone(options, append),
        serial_ports,
        unpacking,
    )
