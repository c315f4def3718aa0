"""Kernel modules: in the kernel, loaded, or what loading them would meet.

On this machine modprobe is asked, which knows where its modules are. For a recorded tree the files are read that
modprobe reads (modules.dep(5), modprobe.d(5)).
"""

from __future__ import annotations

import enum
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
# The kernel's own, a distribution's whose /lib is no link, NixOS's.
MODULE_PLACES = ("lib/modules", "usr/lib/modules", "run/booted-system/kernel-modules/lib/modules")
_ASK_SECONDS = 10.0


class ModuleStatus(enum.StrEnum):
    LOADED = "loaded"
    BUILT_IN = "built in"
    LOADABLE = "loadable"
    BLOCKED = "kept from loading"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Module:
    """``seen`` is the file that tells, ``value`` what it says."""

    name: str
    status: ModuleStatus
    seen: str
    value: str

    @property
    def usable(self) -> bool:
        """It works, or will once somebody asks for it."""
        return self.status not in (ModuleStatus.BLOCKED, ModuleStatus.MISSING)


def module(sysfs: Sysfs, name: str) -> Module:
    """How things stand with the module ``name`` (``-`` and ``_`` are the same). Loads nothing."""
    name = name.replace("-", "_")
    directory = f"sys/module/{name}"
    if sysfs.path(directory).is_dir():
        loaded = sysfs.path(directory, "initstate").exists()  # a built-in one has none (kernel/module/sysfs.c)
        return Module(name, ModuleStatus.LOADED if loaded else ModuleStatus.BUILT_IN, f"/{directory}", "there")
    told = sysfs.ask(f"module {name}", lambda: _told(sysfs, name))
    found = _listed(sysfs, name) if told is None else Module(name, ModuleStatus(told[0]), told[1], told[2])
    if found.status is ModuleStatus.LOADABLE:
        return _obstacle(sysfs, name) or found
    return found


def _told(sysfs: Sysfs, name: str) -> list[str] | None:
    """The same for a record: what modprobe says, of this machine only."""
    found = _asked(name) if str(sysfs.root) == "/" else None
    return None if found is None else [str(found.status), found.seen, found.value]


def _asked(name: str) -> Module | None:
    """What ``modprobe --show-depends`` says; None where it cannot be asked. It loads nothing."""
    tool = modprobe_tool()
    if tool is None:
        return None
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
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return Module(name, ModuleStatus.MISSING, seen, said[-1].removeprefix("modprobe: FATAL: "))
    action, _, what = lines[-1].partition(" ")  # the last is the module's own, the others are what it needs
    if action == "builtin":
        return Module(name, ModuleStatus.BUILT_IN, seen, lines[-1])
    if action == "install" and _is_stub(what.split()):
        return Module(name, ModuleStatus.BLOCKED, seen, lines[-1])
    return Module(name, ModuleStatus.LOADABLE, seen, what.split(" ")[0] if action == "insmod" else lines[-1])


def _listed(sysfs: Sysfs, name: str) -> Module:
    """What the lists say that depmod and the kernel's build have left."""
    base = module_directory(sysfs)
    spelling = re.escape(name).replace("_", "[-_]")
    own = rf"((?:[\w./+-]*/)?{spelling}\.ko(?:\.\w+)?)"
    for listing, status, end in (
        ("modules.builtin", ModuleStatus.BUILT_IN, "$"),
        ("modules.dep", ModuleStatus.LOADABLE, ":"),
        ("modules.dep.bin", ModuleStatus.LOADABLE, ":"),  # the one that modprobe reads; some systems keep no other
    ):
        match = re.search(rf"(?:^|[^\w./+-]){own}{end}", sysfs.text(base, listing) or "", re.MULTILINE)
        if match:
            return Module(name, status, f"/{base}/{listing}", match[1])
    return Module(name, ModuleStatus.MISSING, f"/{base}/modules.dep", f"no {name}")


def module_directory(sysfs: Sysfs) -> str:
    """Where the running kernel's modules are, without a leading slash; the usual place if nowhere."""
    release = sysfs.text("proc/sys/kernel/osrelease") or "unknown"
    places = [f"{place}/{release}" for place in MODULE_PLACES]
    lists = ("modules.dep", "modules.dep.bin", "modules.builtin")
    return next((place for place in places if any(sysfs.exists(place, name) for name in lists)), places[0])


def modprobe_lines(sysfs: Sysfs) -> list[tuple[str, list[str]]]:
    """Every line of modprobe's configuration: its file, its words.

    Files count in the order of their names, wherever they are; of one name only the first directory's counts.
    A line that ends with a backslash goes on in the next.
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
    """Whether an ``install`` line's command is one that only keeps the module out."""
    return bool(words) and words[0].rpartition("/")[2] in ("true", "false", ":")


def vfio_ids(sysfs: Sysfs, device: PciDevice) -> Iterator[tuple[str, str]]:
    """Where vfio-pci is told to take this device by its ids, and the entry that does it."""
    entries = [("/proc/cmdline", one) for one in CommandLine(sysfs.text("proc/cmdline") or "").vfio_ids()]
    for file, words in modprobe_lines(sysfs):
        if words[0] == "options" and words[1:2] and words[1].replace("-", "_") == "vfio_pci":
            options = [word.removeprefix("ids=") for word in words[2:] if word.startswith("ids=")]
            entries += [(file, one) for option in options for one in option.strip('"').split(",")]
    ids = device.vendor, device.device, (device.subsystem_vendor, device.subsystem_device), device.class_code
    for source, entry in entries:
        if matches_ids(entry, *ids):
            yield source, entry


def _obstacle(sysfs: Sysfs, name: str) -> Module | None:
    """What keeps modprobe from loading it. ``blacklist`` does not: it only hides aliases."""
    for file, words in modprobe_lines(sysfs):
        if words[0] == "install" and words[1:2] and words[1].replace("-", "_") == name and _is_stub(words[2:]):
            return Module(name, ModuleStatus.BLOCKED, file, " ".join(words))
    for parameter in CommandLine(sysfs.text("proc/cmdline") or "").of("module_blacklist"):
        if name in (parameter.value or "").replace("-", "_").split(","):
            return Module(name, ModuleStatus.BLOCKED, "/proc/cmdline", parameter.text)
    if sysfs.text("proc/sys/kernel/modules_disabled") == "1":
        return Module(name, ModuleStatus.BLOCKED, "/proc/sys/kernel/modules_disabled", "1")
    return None
