"""A root file system for a guest, made on the spot: busybox, the modules its device needs, the user's files.

The guest's init mounts what a Linux program expects, loads the modules, waits for the drivers, and then runs a shell
on the console, or one command. A command's standard output, standard error and status leave on serial ports of their
own (ttyS1, ttyS2, ttyS3), read on the host by :mod:`kvmpass.guest.channel`.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvmpass.errors import KvmpassError
from kvmpass.initramfs import elf, files, init
from kvmpass.initramfs.companions import companions
from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.modules import ModulePlan, ModuleTree, plan

__all__ = ["GuestRoot", "ModulePlan", "ModuleTree", "find_busybox"]

APPLETS_ABSENT = ("busybox", "init", "linuxrc")  # the program itself, and names with a meaning of their own

_PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"
_GROUP = b"root:x:0:\n"
_PROFILE = b"PS1='guest# '\n"


def find_busybox() -> Path:
    """The host's busybox. Raises ``KvmpassError`` if it has none."""
    found = shutil.which("busybox", path="/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin")
    if found is None:
        raise KvmpassError(
            "no busybox on this host: the guest's root file system is made from it",
            "install it (Debian: apt-get install busybox-static)",
        )
    return Path(found)


def _pci_id(modalias: str) -> str | None:
    match = re.match(r"pci:v0000([0-9A-F]{4})d0000([0-9A-F]{4})", modalias)
    return f"{match[1]}:{match[2]}".lower() if match else None


class GuestRoot:
    """Collects what a guest's root file system shall have; ``build()`` gives the initramfs.

    The methods may be called in any order. Every error is a ``KvmpassError``, or the ``OSError`` of reading a file.
    """

    def __init__(self, busybox: Path | None = None) -> None:
        self.tree = Tree()
        self._plan = ModulePlan((), frozenset())
        self._parameters: dict[str, str] = {}
        self._expected: list[str] = []
        self._command: list[str] | None = None
        self._term = "linux"
        self._size = (24, 80)
        self._copied: frozenset[str] = frozenset()
        self.warnings: list[str] = []  # what may not be as it was meant
        for path in ("/dev", "/proc", "/sys", "/run", "/mnt", "/etc", init.DIRECTORY):
            self.tree.directory(path)
        self.tree.directory("/root", 0o700)
        self.tree.directory("/tmp", 0o1777)
        # The kernel opens /dev/console for init before anything is mounted.
        self.tree.character_device("/dev/console", 5, 1)
        self.tree.character_device("/dev/null", 1, 3, 0o666)
        for name, target in init.STREAMS.items():
            self.tree.symlink(f"{init.DIRECTORY}/dev/{name}", target)
        self.tree.file("/etc/passwd", _PASSWD)
        self.tree.file("/etc/group", _GROUP)
        self.tree.file("/etc/profile", _PROFILE)
        self.tree.file("/etc/fstab", init.FSTAB)
        self._add_busybox(busybox or find_busybox())

    def _add_busybox(self, program: Path) -> None:
        data = program.read_bytes()
        self.tree.file("/usr/bin/busybox", data, 0o755)
        if elf.is_elf(data):
            files.add_libraries(self.tree, program, data, "/usr/bin/busybox")
        listing = subprocess.run([program, "--list"], check=True, capture_output=True, text=True)
        for applet in listing.stdout.split():
            if applet not in APPLETS_ABSENT:
                self.tree.symlink(f"/usr/bin/{applet}", "busybox")

    def add_modules(
        self,
        release: str,
        modaliases: Iterable[str],
        *,
        files: Sequence[Path] = (),
        extra: Iterable[str] = (),
        parameters: Mapping[str, str] | None = None,
        root: Path = Path("/lib/modules"),
    ) -> ModulePlan:
        """Load kernel ``release``'s drivers for ``modaliases`` and what is behind them, and ``files`` of the user.

        ``extra`` names further modules of that kernel. ``parameters``, by the name of a module, is what the kernel
        gets for it (:func:`kvmpass.initramfs.parameters.module_parameters`). A kernel whose ``root/release`` does not
        exist has nothing to load but ``files``. Call it once. Returns what will be loaded.
        """
        aliases = list(modaliases)
        behind = companions(aliases)
        self._plan = plan(ModuleTree(release, root), [*aliases, *behind.modaliases], files, [*behind.modules, *extra])
        self._parameters = dict(parameters or {})
        for path in self._plan.idle:
            self.warnings.append(
                f"--module {path}: no alias of it matches a device that is assigned: for these the kernel's own "
                f"drivers are loaded (modinfo -F alias {path})"
            )
        for module in self._plan.modules:
            self.tree.file(f"{init.DIRECTORY}/modules/{module.name}.ko", module.data)
        identifiers = [_pci_id(alias) for alias in aliases if alias in self._plan.matched]
        self._expected = [identifier for identifier in identifiers if identifier is not None]
        return self._plan

    def copy(self, spec: str) -> None:
        """``SRC:DST`` as on the command line; see :func:`kvmpass.initramfs.files.copy_into`."""
        source, target = files.split_spec(spec)
        before = self.tree.names
        files.copy_into(self.tree, source, target, self.warnings.append)
        self._copied |= self.tree.names - before

    def run_command(self, command: Sequence[str]) -> None:
        """Run ``command`` instead of a shell. Its first word is a path, or looked up in the guest's PATH."""
        if not command:
            raise KvmpassError("an empty command")
        if any("\0" in word for word in command):
            raise KvmpassError("a command's argument cannot contain a zero byte")
        self._command = list(command)

    def terminal(self, term: str, size: tuple[int, int] = (24, 80)) -> None:
        """What the interactive shell is told about its terminal: ``TERM``, and rows and columns."""
        self._term = term
        self._size = size

    def build(self, *, compress: bool = False) -> bytes:
        """The initramfs; equal content gives equal bytes.

        Not compressed unless asked: memory is cheaper than the guest's time, above all without hardware
        virtualization below.
        """
        if self._command is not None:
            self.tree.file(f"{init.DIRECTORY}/command", init.command_script(self._command))
        script = init.init_script(
            modules=[
                (module.name, module.under_test, self._parameters.get(module.name, ""))
                for module in self._plan.modules
            ],
            expected=self._expected,
            command=self._command is not None,
            term=self._term,
            size=self._size,
        )
        self.tree.file("/init", script, 0o755)
        archive = self.tree.archive(init.COMPLETE, self._copied)
        return gzip.compress(archive, 1, mtime=0) if compress else archive
