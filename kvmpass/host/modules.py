"""Kernel modules: in the kernel, loaded, or what loading them would meet.

Read from the files that modprobe reads (modules.dep(5), modprobe.d(5)), so that recorded trees can be asked, too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpass.host.cmdline import CommandLine, matches_ids
from kvmpass.host.sysfs import PciDevice, Sysfs

# In the order of modprobe.d(5).
MODPROBE_DIRECTORIES = ("etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d")


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
    base = f"lib/modules/{sysfs.text('proc/sys/kernel/osrelease') or 'unknown'}"
    for listing, status in (("modules.builtin", ModuleStatus.BUILT_IN), ("modules.dep", ModuleStatus.LOADABLE)):
        for line in (sysfs.text(base, listing) or "").splitlines():
            path = line.partition(":")[0]
            if path.rpartition("/")[2].partition(".ko")[0].replace("-", "_") == name:
                obstacle = _obstacle(sysfs, name) if status is ModuleStatus.LOADABLE else None
                return obstacle or Module(name, status, f"/{base}/{listing}", path)
    return Module(name, ModuleStatus.MISSING, f"/{base}/modules.dep", f"no {name}")


def modprobe_lines(sysfs: Sysfs) -> list[tuple[str, list[str]]]:
    """Every line of modprobe's configuration: its file, its words."""
    found = []
    for directory in MODPROBE_DIRECTORIES:
        for file in sysfs.names(directory):
            if file.endswith(".conf"):
                lines = (sysfs.text(directory, file) or "").splitlines()
                found += [
                    (f"/{directory}/{file}", line.split()) for line in lines if line.strip()[:1] not in ("", "#")
                ]
    return found


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
        stub = words[0] == "install" and len(words) > 2 and words[2].rpartition("/")[2] in ("true", "false", ":")
        if stub and words[1].replace("-", "_") == name:
            return Module(name, ModuleStatus.BLOCKED, file, " ".join(words))
    for parameter in CommandLine(sysfs.text("proc/cmdline") or "").of("module_blacklist"):
        if name in (parameter.value or "").replace("-", "_").split(","):
            return Module(name, ModuleStatus.BLOCKED, "/proc/cmdline", parameter.text)
    if sysfs.text("proc/sys/kernel/modules_disabled") == "1":
        return Module(name, ModuleStatus.BLOCKED, "/proc/sys/kernel/modules_disabled", "1")
    return None
