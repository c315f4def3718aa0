"""Kernel modules: built in, loaded, or whether they can be loaded.

On this machine from the output of modprobe. For a recorded tree from the files that modprobe reads (modules.dep(5),
modprobe.d(5)).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence

from kvmpass._dataclass import dataclass
from kvmpass.host.kernel.cmdline import CommandLine, matches_ids
from kvmpass.host.sysfs import PciDevice, Sysfs, modprobe_tool

# In the order of modprobe.d(5).
MODPROBE_DIRECTORIES = (
    "etc/modprobe.d",
    "run/modprobe.d",
    "usr/local/lib/modprobe.d",
    "usr/lib/modprobe.d",
    "lib/modprobe.d",
)
# The kernel's default, for distributions without the link /lib, for NixOS.
MODULE_PLACES = ("lib/modules", "usr/lib/modules", "run/booted-system/kernel-modules/lib/modules")
_ASK_SECONDS = 10.0


class ModuleStatus(enum.StrEnum):
    """The state of a module."""

    LOADED = "loaded"
    BUILT_IN = "built in"
    LOADABLE = "loadable"
    BLOCKED = "kept from loading"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Module:
    """A module and where its state was read."""

    status: ModuleStatus
    """Its state."""
    seen: str
    """The file or command that was read."""
    value: str
    """The relevant line."""

    @property
    def usable(self) -> bool:
        """Whether it is loaded, built in, or loadable on demand."""
        return self.status not in (ModuleStatus.BLOCKED, ModuleStatus.MISSING)


def module(sysfs: Sysfs, name: str) -> Module:
    """Return the state of the module ``name`` (``-`` and ``_`` are equivalent). Loads nothing."""
    name = name.replace("-", "_")
    directory = f"sys/module/{name}"
    if sysfs.exists(directory):
        loaded = sysfs.exists(directory, "initstate")  # a built-in one has none (kernel/module/sysfs.c)
        return Module(ModuleStatus.LOADED if loaded else ModuleStatus.BUILT_IN, f"/{directory}", "present")
    told = sysfs.ask(f"module {name}", lambda: _asked(name) if str(sysfs.root) == "/" else None)
    found = _listed(sysfs, name) if told is None else Module(ModuleStatus(told[0]), told[1], told[2])
    if found.status is ModuleStatus.LOADABLE:
        return _obstacle(sysfs, name) or found
    return found


def _asked(name: str) -> list[str] | None:
    """Return the fields of a :class:`Module` by ``modprobe --show-depends``, which loads nothing; None without it."""
    tool = modprobe_tool()
    if tool is None:
        return None
    import subprocess

    try:
        done = subprocess.run(
            [tool, "--show-depends", name],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_ASK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    seen = f"modprobe --show-depends {name}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return [ModuleStatus.MISSING, seen, errors[-1].removeprefix("modprobe: FATAL: ")]
    action, _, what = lines[-1].partition(" ")  # the last is the module itself, the others are its dependencies
    if action == "builtin":
        return [ModuleStatus.BUILT_IN, seen, lines[-1]]
    if action == "install" and _is_stub(what.split()):
        return [ModuleStatus.BLOCKED, seen, lines[-1]]
    return [ModuleStatus.LOADABLE, seen, what.split(" ")[0] if action == "insmod" else lines[-1]]


def _listed(sysfs: Sysfs, name: str) -> Module:
    """Return the state by the lists of depmod and of the kernel build."""
    base = module_directory(sysfs)
    spelling = re.escape(name).replace("_", "[-_]")
    own = rf"((?:[\w./+-]*/)?{spelling}\.ko(?:\.\w+)?)"
    for listing, status, end in (
        ("modules.builtin", ModuleStatus.BUILT_IN, "$"),
        ("modules.dep", ModuleStatus.LOADABLE, ":"),
        ("modules.dep.bin", ModuleStatus.LOADABLE, ":"),  # the one that modprobe reads; some systems have no other
    ):
        match = re.search(rf"(?:^|[^\w./+-]){own}{end}", sysfs.text(base, listing) or "", re.MULTILINE)
        if match:
            return Module(status, f"/{base}/{listing}", match[1])
    return Module(ModuleStatus.MISSING, f"/{base}/modules.dep", f"{name} not found")


def module_directory(sysfs: Sysfs) -> str:
    """Return the directory of the running kernel's modules, without a leading slash; the default if none exists."""
    release = sysfs.text("proc/sys/kernel/osrelease") or "unknown"
    places = [f"{place}/{release}" for place in MODULE_PLACES]
    lists = ("modules.dep", "modules.dep.bin", "modules.builtin")
    return next((place for place in places if any(sysfs.exists(place, name) for name in lists)), places[0])


def modprobe_lines(sysfs: Sysfs) -> list[tuple[str, list[str]]]:
    """Return every line of modprobe's configuration: its file, its words.

    Files are sorted by name over all directories; of files with the same name only that in the first directory
    counts. A backslash at the end of a line continues it.
    """
    places: dict[str, str] = {}
    for directory in MODPROBE_DIRECTORIES:
        for file in sysfs.names(directory):
            if file.endswith(".conf"):
                places.setdefault(file, directory)
    found = []
    for file, directory in sorted(places.items()):
        text = (sysfs.text(directory, file) or "").replace("\\\n", " ")
        lines = [line.split() for line in text.splitlines() if line.strip()[:1] not in ("", "#")]
        found += [(f"/{directory}/{file}", words) for words in lines]
    return found


def _is_stub(words: Sequence[str]) -> bool:
    """Whether an ``install`` line's command only prevents loading."""
    return bool(words) and words[0].rpartition("/")[2] in ("true", "false", ":")


def vfio_ids(sysfs: Sysfs, device: PciDevice) -> Iterator[tuple[str, str]]:
    """Yield each entry of vfio-pci's ids that matches this device, and the file that has it."""
    entries = [("/proc/cmdline", entry) for entry in CommandLine(sysfs.text("proc/cmdline") or "").vfio_ids()]
    for file, words in modprobe_lines(sysfs):
        if words[0] == "options" and words[1:2] and words[1].replace("-", "_") == "vfio_pci":
            options = [word.removeprefix("ids=") for word in words[2:] if word.startswith("ids=")]
            entries += [(file, entry) for option in options for entry in option.strip('"').split(",")]
    ids = device.vendor, device.device, (device.subsystem_vendor, device.subsystem_device), device.class_code
    for source, entry in entries:
        if matches_ids(entry, *ids):
            yield source, entry


def _obstacle(sysfs: Sysfs, name: str) -> Module | None:
    """Return what prevents loading it. ``blacklist`` does not: it only hides aliases."""
    for file, words in modprobe_lines(sysfs):
        if words[0] == "install" and words[1:2] and words[1].replace("-", "_") == name and _is_stub(words[2:]):
            return Module(ModuleStatus.BLOCKED, file, " ".join(words))
    for parameter in CommandLine(sysfs.text("proc/cmdline") or "").of("module_blacklist"):
        if name in (parameter.value or "").replace("-", "_").split(","):
            return Module(ModuleStatus.BLOCKED, "/proc/cmdline", parameter.text)
    if sysfs.text("proc/sys/kernel/modules_disabled") == "1":
        return Module(ModuleStatus.BLOCKED, "/proc/sys/kernel/modules_disabled", "1")
    return None
