"""Profiles: the emulated hosts that tests can ask for, and what a marked test asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from kvmpass.lab.config import LabConfig, LabResult

MARKER = "amdvi"
DEFAULT_PROFILE = "base"
DEFAULT_TIMEOUT = 300.0
DEFAULT_DURATION = 3.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One emulated host: the options of a lab, and whether real hardware can stand in for it.

    ``kernel`` and ``qemu`` are ``None`` where the run's own choice (``--lab-kernel``, ``--lab-qemu``) holds.
    ``roles`` overrides discovery: role to PCI address. ``timeout`` is in seconds, for the whole life of the lab.
    ``writable`` names directories that a host may write to for good, relative to pytest's rootdir or absolute; they
    are made where they are missing. Six at most.
    """

    devices: tuple[str, ...] = ()
    memory: str = "2G"
    cpus: int = 1
    kernel: str | None = None
    qemu: str | None = None
    append: str = ""
    without: frozenset[str] = frozenset()
    timeout: float | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    lab_only: bool = False
    writable: tuple[str, ...] = ()


_BASE = (
    # Fixed slots: what a test finds must not depend on what else is plugged.
    "nvme,addr=04.0",
    "nvme,addr=05.0",
    "edu,addr=06.0",
    "edu,addr=07.0",
    "e1000e,addr=08.0",
    # Refusals: two functions in one group, a device that shares its group with a bridge.
    "nvme,addr=10.0,multifunction=on",
    "nvme,addr=10.1",
    "pci-bridge,id=bridge0,chassis_nr=1,addr=11.0",
    "edu,bus=bridge0,addr=01.0",
)
# A physical function, whose virtual functions QEMU 7.2 leaves without a group.
_SRIOV = (
    "nvme-subsys,id=subsys0",
    "nvme,subsys=subsys0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2,addr=04.0",
)
# Every kind of device that a guest is seen to drive; docs/devices.md.
_DEVICES = (
    "nvme,addr=04.0",
    "edu,addr=05.0",
    "e1000e,addr=06.0",
    "e1000e,addr=07.0",
    "e1000,addr=08.0",
    "ahci,addr=09.0",
    "qemu-xhci,id=usb,addr=0a.0",
    "usb-storage,bus=usb.0",
    "virtio-blk-pci,addr=0b.0",
    "ivshmem-plain,size=1G,addr=0c.0",
    "ivshmem-plain,size=8G,addr=0d.0",
)
# What QEMU 7.2 lacks or does not translate: no addresses, so that each sits behind a root port.
_MODERN = (
    "nvme-subsys,id=subsys0",
    "nvme,subsys=subsys0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
    "igb",
    "e1000e",
)
_SMALL = ("nvme,addr=04.0", "edu,addr=05.0")

DEFAULT_PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # Huge pages from the start: a host that has run for a while may take minutes to find some.
        "base": Profile(devices=_BASE, memory="6G", append="hugepages=48"),
        "large": Profile(devices=("nvme,addr=04.0",), memory="12G"),
        "sriov": Profile(devices=_SRIOV),
        "devices": Profile(devices=_DEVICES, memory="4G"),
        "modern": Profile(devices=_MODERN, memory="4G"),
        "no-svm": Profile(devices=_SMALL, without=frozenset({"svm"}), lab_only=True),
        "no-iommu": Profile(devices=_SMALL, without=frozenset({"iommu"}), lab_only=True),
        "no-intremap": Profile(devices=_SMALL, without=frozenset({"intremap"}), lab_only=True),
    }
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What one test asks for: the merged arguments of its ``amdvi`` markers."""

    profile: str = DEFAULT_PROFILE
    timeout: float = DEFAULT_TIMEOUT
    duration: float = DEFAULT_DURATION
    kernel: str | None = None
    qemu: str | None = None

    @classmethod
    def of(cls, item: pytest.Item) -> Requirement | None:
        """The requirement of a marked test, ``None`` for any other. Raises ``UsageError`` for a bad marker."""
        marks = list(item.iter_markers(MARKER))
        if not marks:
            return None
        merged: dict[str, Any] = {}
        for mark in reversed(marks):  # the closest comes first, and wins
            if mark.args:
                raise pytest.UsageError(f"{item.nodeid}: the marker {MARKER} takes keyword arguments only")
            merged.update(mark.kwargs)
        try:
            return replace(cls(), **merged)
        except TypeError as error:
            unknown = sorted(set(merged) - set(cls.__dataclass_fields__))
            raise pytest.UsageError(f"{item.nodeid}: {MARKER} has no argument {', '.join(unknown)}") from error


class LabLike(Protocol):
    """What the plugin needs of :class:`kvmpass.lab.Lab`."""

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: BinaryIO,
        stderr: BinaryIO,
    ) -> LabResult:
        """Boot, run one command as root inside, power off. Blocks."""

    def cpu_time(self) -> float | None:
        """Seconds of CPU time that the emulator has used, ``None`` if unknown. Called from another thread."""

    def stop(self) -> None:
        """End the emulated host at once; ``run`` returns. Called from another thread, harmless when it is over."""


class Hooks:
    """Hooks for the ``conftest.py`` of a project that uses the plugin."""

    @pytest.hookspec
    def pytest_kvmpass_profiles(self, config: pytest.Config) -> Mapping[str, Profile]:
        """Profiles by name, in addition to or instead of ``DEFAULT_PROFILES``."""
        raise NotImplementedError

    @pytest.hookspec(firstresult=True)
    def pytest_kvmpass_lab(self, config: pytest.Config, lab: LabConfig) -> LabLike | None:
        """The lab that runs a profile; a test of the plugin itself gives another one than :mod:`kvmpass.lab`."""


def profiles(config: pytest.Config) -> dict[str, Profile]:
    """Every profile by its name: the built-in ones, then those of the hook."""
    known = dict(DEFAULT_PROFILES)
    for more in config.hook.pytest_kvmpass_profiles(config=config):
        known.update(more)
    return known
