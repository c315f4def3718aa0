"""The initramfs of a guest: busybox, modules for its devices, the user's files.

The guest's init mounts the usual file systems (cffi_build/agent/init.c: no process for each). A script then loads
the modules, waits for the drivers, and runs a shell on the console, or a command. For a command it becomes the agent,
which runs what the host starts over a port of a virtio console (:mod:`kvmpass.guest.agent`). Where the kernel has no
driver for it, it runs the command itself, whose output, errors and status go through ttyS1, ttyS2 and ttyS3; on the
host :mod:`kvmpass.guest.channel` reads the status.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from kvmpass._lazy import lazy_pattern
from kvmpass.errors import KvmpassError
from kvmpass.initramfs import elf, files, init, served
from kvmpass.initramfs.companions import companions
from kvmpass.initramfs.cpio import Node, Tree
from kvmpass.initramfs.modules import ModuleTree, plan
from kvmpass.modalias import pci_ids

__all__ = ["GuestRoot", "find_busybox"]

APPLETS_ABSENT = ("busybox", "init", "linuxrc")  # the program itself, and names that the kernel runs

_PROGRAMS = ("/bin", "/usr/bin", "/sbin", "/usr/sbin", "/usr/local/bin")
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"
_GROUP = b"root:x:0:\n"
_PROFILE = b"PS1='guest# '\n"
_IN_INITRAMFS = served.Entry()
_NOTHING: Mapping[str, bytes] = MappingProxyType({})
_VARIABLE = lazy_pattern(r"[A-Za-z_][A-Za-z0-9_]*=")


def find_busybox() -> Path:
    """Return the path of the host's busybox. Raises ``KvmpassError`` if it is not installed."""
    places = [f"{place}/busybox" for place in _PROGRAMS]
    # Unlike a Path, this finds nothing in a directory that the user may not search, and raises nothing.
    found = next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)  # noqa: PTH113
    if found is None:
        raise KvmpassError(
            "no busybox on this host: the guest's root file system is made from it",
            "install it (Debian: apt-get install busybox-static)",
        )
    return Path(found)


def _applets(program: Path) -> list[str]:
    """Return the names that a busybox has. Raises ``KvmpassError`` if it fails, ``OSError``."""
    # Without subprocess: to import it takes as long as all that is read for the initramfs.
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as output:
        try:
            actions = [(os.POSIX_SPAWN_DUP2, writer, 1)]
            child = os.posix_spawn(program, [str(program), "--list"], os.environ, file_actions=actions)
        finally:
            os.close(writer)
        names = output.read().decode(errors="replace").split()
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:  # SIGCHLD is ignored, as some supervisors leave it: the kernel keeps no status
        status = 0 if names else 1
    if status:
        raise KvmpassError(
            f"{program} --list failed with status {status}: the guest's root file system is made from it",
            "install another busybox (Debian: apt-get install busybox-static)",
        )
    return names


class GuestRoot:
    """The builder of a guest's initramfs.

    Call its methods in any order, then ``build``. All raise ``KvmpassError``, and the ``OSError`` of reading a file.
    """

    def __init__(self, busybox: Path | None = None) -> None:
        self.tree = Tree()
        """The files."""
        self._settings = {
            "COMMAND": "",
            "AGENT": "",  # what it is needed for, if serial ports cannot take its place
            "PORT": init.AGENT_PORT,
            "MOUNTS": "",
            "SHELL_SCRIPT": "",
            "EXPECTED": "",
            "TERM": "linux",
            "TERMINAL_SIZE": "rows 24 cols 80",
        }
        self._loads: list[tuple[str, ...]] = []
        self._copied: dict[str, Node | None] = {}  # by name in the archive; may have been replaced since
        self._source: Path | None = None  # whose files are the root of programs
        self._entry = _IN_INITRAMFS
        self._targets: tuple[str, ...] = ()  # where directories of the host are mounted
        self.warnings: list[str] = []
        """Files that could not be copied completely, and modules for none of the devices."""
        for path in ("/dev", "/proc", "/sys", "/run", "/mnt", "/etc", init.DIRECTORY):
            self.tree.directory(path)
        self.tree.directory("/root", 0o700)
        self.tree.directory("/tmp", 0o1777)
        # The kernel opens /dev/console for init before anything is mounted.
        self.tree.character_device("/dev/console", 5, 1)
        self.tree.character_device("/dev/null", 1, 3, 0o666)
        self.tree.add(f"{init.DIRECTORY}/never", Node(stat.S_IFIFO | 0o600))  # to wait with a time limit
        self.tree.file("/etc/passwd", _PASSWD)
        self.tree.file("/etc/group", _GROUP)
        self.tree.file("/etc/profile", _PROFILE)
        self._add_busybox(busybox or find_busybox())

    def _add_busybox(self, program: Path) -> None:
        data = program.read_bytes()
        self.tree.file("/usr/bin/busybox", data, 0o755)
        if elf.is_elf(data):
            files.add_libraries(self.tree, program, data, "/usr/bin/busybox")
        applets = (applet for applet in _applets(program) if applet not in APPLETS_ABSENT)
        self.tree.symlinks("/usr/bin", applets, "busybox")

    def add_modules(
        self,
        tree: ModuleTree,
        modaliases: Iterable[str],
        *,
        files: Sequence[Path] = (),
        parameters: Mapping[str, str],
        also: Iterable[str] = (),
        needed: Iterable[str] = (),
    ) -> None:
        """Load the drivers of ``tree`` for ``modaliases`` and their companions, and the user's ``files``.

        ``also``: names of further modules of the kernel, which are loaded where it has them; ``needed``: the same,
        but ``KvmpassError`` is raised if the kernel is known to have one neither as a module nor built in.
        ``parameters``: by the name of a module, as from
        :func:`kvmpass.initramfs.parameters.module_parameters`. If the tree does not exist, only ``files``
        are loaded. Call it once.
        """
        aliases, needed = list(modaliases), list(needed)
        for name in needed:
            if tree.lacks(name):
                raise KvmpassError(
                    f"the guest's kernel {tree.release} has no module {name}, which the host's files need",
                    "use a kernel with CONFIG_VIRTIO_FS and CONFIG_OVERLAY_FS, or leave out --root and --share",
                )
        behind, modules = companions(aliases)
        made = plan(tree, [*aliases, *behind], files, [*also, *needed, *modules])
        for path in made.idle:
            self.warnings.append(
                f"--module {path}: no alias of it matches a device that is assigned: for these the kernel's own "
                f"drivers are loaded (modinfo -F alias {path})"
            )
        for module in made.modules:
            self.tree.file(f"{init.DIRECTORY}/modules/{module.name}.ko", module.data)
            under_test = "yes" if module.under_test else ""
            self._loads.append(("load", module.name, under_test, parameters.get(module.name, "")))
        found = (pci_ids(alias) for alias in aliases if alias in made.matched)
        self._settings["EXPECTED"] = " ".join(f"{ids[0]:04x}:{ids[1]:04x}" for ids in found if ids)

    def serve(
        self,
        mounts: Sequence[served.Served],
        source: Path | None = None,
        entry: served.Entry = _IN_INITRAMFS,
        *,
        empty: Sequence[str] = (),
        contents: Mapping[str, bytes] = _NOTHING,
    ) -> None:
        """Mount directories of the host. Call it before ``copy`` and ``run_command``, and load their drivers.

        If one of them is the guest's root: ``source`` is that directory on the host, ``entry`` how programs start in
        it. ``empty``: its directories that are empty in the guest; ``contents``: files that the guest has in it
        instead of the host's, by path. Raises ``ValueError`` for a root without ``source``.
        """
        if served.add(self.tree, mounts, empty):
            if source is None:
                raise ValueError("a guest's root needs its source, the directory on the host")
            self._source, self._entry = source, entry
            for path in (*served.OWN, *empty):
                if not (source / path.lstrip("/")).is_dir():  # nothing can be mounted there otherwise
                    self.tree.directory(served.UPPER + path)
            for path, data in contents.items():
                self.tree.file(served.UPPER + path, data)
            self._settings["SHELL_SCRIPT"] = f"{init.DIRECTORY}/command"
            self._command(())
        self._targets = tuple(mount.target for mount in mounts)
        self._settings["MOUNTS"] = "yes"

    @property
    def loads(self) -> set[str]:
        """Names of the modules that the guest's init loads."""
        return {words[1] for words in self._loads}

    def copy(self, spec: str) -> None:
        """Copy ``SRC:DST``, as on the command line; see :func:`kvmpass.initramfs.files.copy_into`."""
        source, target = files.split_spec(spec)
        if self._source is not None:
            target = served.UPPER + served.in_root(self._source, target)
        before = self.tree.names
        files.copy_into(self.tree, source, target, self.warnings.append)
        self._copied |= {name: self.tree.get(f"/{name}") for name in self.tree.names - before}

    def run_command(
        self,
        command: Sequence[str],
        environment: Sequence[str] = (),
        directory: str = "",
        *,
        needs_agent: str = "",
    ) -> None:
        """Run ``command`` instead of a shell. Its first word is a path, or searched for in the guest's PATH.

        ``environment``: variables for it, as ``NAME=VALUE``. ``directory``: where it starts; empty: ``/root``, or as
        the entry of the root says. ``needs_agent``: what serial ports do not have, for the message if the guest has
        no virtio console.
        """
        if not command:
            raise KvmpassError("an empty command")
        for variable in environment:
            if not _VARIABLE.match(variable):
                raise KvmpassError(f"{variable!r} is not NAME=VALUE with a NAME of letters, digits and underscores")
        if any("\0" in word for word in (*command, *environment, directory)):
            raise KvmpassError("a command's argument cannot contain a zero byte")
        self.run_agent(needs_agent)
        if self._source is None and not any(variable.startswith("PATH=") for variable in environment):
            self._check_program(command[0])
        self._command(command, environment, directory)

    def run_agent(self, purpose: str) -> None:
        """Run the agent instead of a shell. ``purpose``: for what; if empty, serial ports can take its place."""
        self._settings |= {"COMMAND": "yes", "AGENT": purpose}

    def _check_program(self, word: str) -> None:
        """Add a warning if a command's first word is not found in the initramfs, nor below what is mounted there."""
        if word.startswith("/"):
            found = word in self.tree or any(word.startswith(f"{target}/") for target in self._targets)
        else:
            found = "/" in word or any(f"{directory}/{word}" in self.tree for directory in init.PATH.split(":"))
        if not found:
            self.warnings.append(
                f"{word} is not in the guest's minimal root file system: --root host gives it this host's programs, "
                "--copy a single one"
            )

    def _command(self, command: Sequence[str], environment: Sequence[str] = (), directory: str = "") -> None:
        if self._source:
            script = self._entry.script(command, environment, directory)
        else:
            script = init.calls(("export", variable) for variable in environment)
            script += served.change_directory(directory) + init.calls([("exec", *command)])
        self.tree.file(f"{init.DIRECTORY}/command", script)

    def copy_out(self, sources: Sequence[str]) -> None:
        """Let the host get archives of ``sources``, paths in the guest, when the command has ended.

        After ``run_command`` or ``run_agent``.
        """
        if sources:
            self._settings["AGENT"] = "--copy-out"
            root = (served.ROOT,) if self._source else ()
            calls = init.calls([("archive", source, *root) for source in sources])
            self.tree.file(f"{init.DIRECTORY}/files", init.ARCHIVE + calls)

    def terminal(self, term: str, size: tuple[int, int]) -> None:
        """Set ``TERM``, and rows and columns, of the interactive shell's terminal."""
        self._settings |= {"TERM": term, "TERMINAL_SIZE": f"rows {size[0]} cols {size[1]}"}

    def build(self) -> bytes:
        """Return the initramfs; equal content gives equal bytes.

        Uncompressed: the guest boots faster, at the price of memory.
        """
        # Last, so that no copied file replaces them.
        self.tree.file(f"{init.DIRECTORY}/agent", init.agent(), 0o755)
        self.tree.symlink("/init", f"{init.DIRECTORY}/agent")
        self.tree.file(f"{init.DIRECTORY}/init.sh", init.SCRIPT.read_bytes(), 0o755)
        self.tree.file(f"{init.DIRECTORY}/settings", init.assignments(self._settings))
        self.tree.file(f"{init.DIRECTORY}/load", init.calls(self._loads))
        copied = {name for name, node in self._copied.items() if self.tree.get(f"/{name}") is node}
        return self.tree.archive(init.COMPLETE, copied)
