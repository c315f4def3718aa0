"""What a guest is to be made of."""

from __future__ import annotations

from pathlib import Path

from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError
from kvmpass.memory import Backing

MINIMAL, HOST = "minimal", "host"
"""Roots of a guest that are no directory: the initramfs, and this host's ``/``."""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What to boot. ``command`` and ``copy`` to ``shares`` need the initramfs that ``prepare`` makes (``check``)."""

    kernel: Path | None = None
    """A bzImage or vmlinux, a kernel's build tree or ``/lib/modules/RELEASE``; None: the running kernel."""
    initrd: Path | None = None
    """An initramfs; None: one made for the devices' modaliases."""
    append: str = ""
    """Words to append to the kernel command line."""
    copy: tuple[str, ...] = ()
    """Files to copy into the guest, as ``SRC:DST``."""
    modules: tuple[Path, ...] = ()
    """Kernel modules to load, which replace the kernel's own."""
    command: tuple[str, ...] | None = None
    """The arguments of a command to run instead of a shell on the console."""
    copy_out: tuple[str, ...] = ()
    """Files and directories to bring out when the command has ended, or a session is stopped, as ``SRC[:DST]``."""
    root: str = MINIMAL
    """The guest's root: ``minimal``, the initramfs; ``host``, this host's own; or a directory."""
    shares: tuple[str, ...] = ()
    """Directories of this host for the guest, as ``SRC[:DST][,rw]``; read-only without ``rw``."""
    session: bool = False
    """Whether the guest stays, without a command, and its agent runs what the host starts: beside ``initrd``, too."""
    interactive: bool = False
    """Whether the command has input: then it needs a virtio console, as serial ports pass none."""
    tty: bool = False
    """Whether the command has a terminal, of ``terminal_size``: it needs a virtio console, too."""
    environment: tuple[str, ...] = ()
    """Variables for the command, as ``NAME=VALUE``."""
    directory: str = ""
    """Where the command starts; empty: ``/root``, or the caller's directory in the host's root."""
    verbose: bool = False
    """Whether the kernel prints its messages."""
    terminal: str = "linux"
    """``TERM`` of the command, or of the shell on the console."""
    terminal_size: tuple[int, int] = (24, 80)
    """Rows and columns of the terminal."""
    kaslr: bool = False
    """Whether a bzImage decompresses itself, to a random address if the kernel has KASLR; it boots more slowly."""

    def backing(self, wanted: Backing = Backing.ANONYMOUS) -> Backing:
        """Return the backing for the memory of its machine, ``wanted`` where it may choose: see ``GuestImage``."""
        return wanted.shared if self.daemons else wanted

    @property
    def daemons(self) -> int:
        """How many daemons serve it files of this host."""
        return (self.root != MINIMAL) + len(self.shares)

    def check(self) -> None:
        """Raise ``KvmpassError`` if something is to be in an initramfs that is the user's own."""
        if self.initrd is None:
            return
        if self.command is not None or self.copy or self.modules:
            raise KvmpassError("--initrd replaces the root file system that COMMAND, --copy and --module need")
        if self.root != MINIMAL or self.shares:
            raise KvmpassError("--initrd replaces the root file system that mounts --root and --share")
        if self.copy_out:
            raise KvmpassError(
                "--initrd replaces the root file system that sends files when it ends",
                "run kvmpass cp while the guest runs, if its own root has sh, find and cpio",
            )

    @property
    def copied_size(self) -> int:
        """Bytes that ``prepare`` allocates for ``initrd``, or for the files of ``copy``.

        Those are read first, and then written to an archive; so is ``initrd`` for a session. Files that cannot be
        looked at are left out. Raises ``KvmpassError`` as ``prepare``.
        """
        if self.initrd is None and not self.copy:
            return 0
        from kvmpass.initramfs import files

        if self.initrd is not None:
            return (2 if self.session else 1) * files.size_of(self.initrd)
        return 2 * sum(files.size_of(files.split_spec(copy)[0]) for copy in self.copy)
