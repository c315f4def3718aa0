"""Profiles: the emulated hosts that tests can request, and what a marked test requires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from kvmpass._dataclass import dataclass, replace

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from kvmpass.lab.config import LabConfig, LabResult

MARKER = "amdvi"
DEFAULT_PROFILE = "base"
DEFAULT_TIMEOUT = 300.0
DEFAULT_DURATION = 2.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One emulated host: options of :class:`kvmpass.lab.LabConfig`, and whether real hardware can replace it."""

    devices: tuple[str, ...] = ()
    """``NAME[,PROPERTY=VALUE…]`` for each PCI device."""
    memory: str = "2G"
    """Size of the host's memory, as QEMU takes it."""
    cpus: int = 1
    """Number of the host's CPUs."""
    kernel: str | None = None
    """``stock``, ``full``, ``next`` or a path; ``None``: that of the run (``--lab-kernel``)."""
    qemu: str | None = None
    """``system``, ``modern`` or a path; ``None``: that of the run (``--lab-qemu``)."""
    append: str = ""
    """Appended to the host kernel's command line."""
    without: frozenset[str] = frozenset()
    """Features that the host lacks: ``svm``, ``iommu``, ``intremap``."""
    timeout: float | None = None
    """Seconds for the whole life of the host, boot included."""
    roles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """PCI address by role, where discovery finds the wrong device."""
    lab_only: bool = False
    """Whether tests are skipped on real hardware."""
    writable: tuple[str, ...] = ()
    """Directories outside that the host may write to, at most six: absolute, or relative to pytest's rootdir."""


_BASE = (
    # Fixed slots: a device's address must not depend on the other devices.
    "nvme,addr=04.0",
    "nvme,addr=05.0",
    "edu,addr=06.0",
    "edu,addr=07.0",
    "e1000e,addr=08.0",
    "e1000e,addr=09.0",
    # Refusals: two functions in one group, a device that shares its group with a bridge.
    "nvme,addr=10.0,multifunction=on",
    "nvme,addr=10.1",
    "pci-bridge,id=bridge0,chassis_nr=1,addr=11.0",
    "edu,bus=bridge0,addr=01.0",
)
# A physical function. Under QEMU 7.2 its virtual functions have no IOMMU group.
_SRIOV = (
    "nvme-subsys,id=subsys0",
    "nvme,subsys=subsys0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2,addr=04.0",
)
# Each kind of device that docs/devices.md lists.
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
# Devices that QEMU 7.2 lacks or whose DMA it does not translate: without addresses, each is behind a root port.
_MODERN = (
    "nvme-subsys,id=subsys0",
    "nvme,subsys=subsys0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
    "igb",
    "e1000e",
)
# Few devices for what only the newest kernel has, and for the kernel's own VFIO selftests.
_NEXT = ("igb", "edu", "edu", "ivshmem-plain,size=64M")
_HUGE_PAGES = "hugepagesz=1G hugepages=1 hugepagesz=2M hugepages=16"
_SMALL = ("nvme,addr=04.0", "edu,addr=05.0")

DEFAULT_PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # Huge pages are reserved at boot: later the host may need minutes to find free ones.
        "base": Profile(devices=_BASE, memory="6G", append="hugepages=48"),
        "large": Profile(devices=("nvme,addr=04.0",), memory="12G"),
        "sriov": Profile(devices=_SRIOV),
        "devices": Profile(devices=_DEVICES, memory="4G"),
        "modern": Profile(devices=_MODERN, memory="4G"),
        "next": Profile(devices=_NEXT, memory="4G", kernel="next", append=f"{_HUGE_PAGES} vfio_pci.enable_sriov=1"),
        "no-svm": Profile(devices=_SMALL, without=frozenset({"svm"}), lab_only=True),
        "no-iommu": Profile(devices=_SMALL, without=frozenset({"iommu"}), lab_only=True),
        "no-intremap": Profile(devices=_SMALL, without=frozenset({"intremap"}), lab_only=True),
    }
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What one test requires: the merged arguments of its ``amdvi`` markers."""

    profile: str = DEFAULT_PROFILE
    """Name of its profile."""
    timeout: float = DEFAULT_TIMEOUT
    """Seconds for each of setup, call and teardown."""
    duration: float = DEFAULT_DURATION
    """Expected seconds of all phases together, in the emulated host."""
    kernel: str | None = None
    """``full``, ``next`` or ``stock``; ``None``: that of the profile or the run."""
    qemu: str | None = None
    """``modern`` or ``system``; ``None``: that of the profile or the run."""

    @classmethod
    def of(cls, item: pytest.Item) -> Requirement | None:
        """Return the requirement of a marked test, ``None`` for any other test.

        Raises ``UsageError`` if an argument of the marker is unknown.
        """
        marks = list(item.iter_markers(MARKER))
        if not marks:
            return None
        merged: dict[str, Any] = {}
        for mark in reversed(marks):  # the closest comes first, and takes precedence
            if mark.args:
                raise pytest.UsageError(f"{item.nodeid}: the marker {MARKER} takes keyword arguments only")
            merged.update(mark.kwargs)
        try:
            return replace(cls(), **merged)
        except TypeError as error:
            unknown = sorted(set(merged) - set(cls.__dataclass_fields__))
            raise pytest.UsageError(f"{item.nodeid}: {MARKER} has no argument {', '.join(unknown)}") from error


class LabLike(Protocol):
    """The methods of :class:`kvmpass.lab.Lab` that the plugin uses."""

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: BinaryIO,
        stderr: BinaryIO,
    ) -> LabResult:
        """Boot a host, run one command as root inside, end the host. Blocks."""

    def cpu_time(self) -> float | None:
        """Return the seconds of CPU time that the emulator has used, ``None`` if unknown.

        Synchronization: called from another thread.
        """

    def stop(self) -> None:
        """End the emulated host; ``run`` returns. Idempotent.

        Synchronization: called from another thread.
        """


class Hooks:
    """Hooks for the ``conftest.py`` of a project that uses the plugin."""

    @pytest.hookspec
    def pytest_kvmpass_profiles(self, config: pytest.Config) -> Mapping[str, Profile]:
        """Return profiles by name, in addition to or instead of ``DEFAULT_PROFILES``."""
        raise NotImplementedError

    @pytest.hookspec(firstresult=True)
    def pytest_kvmpass_lab(self, config: pytest.Config, lab: LabConfig) -> LabLike | None:
        """Return the lab that runs a profile. Tests of the plugin itself replace :class:`kvmpass.lab.Lab`."""


def profiles(config: pytest.Config) -> dict[str, Profile]:
    """Return all profiles by name: the built-in ones, updated by those of the hook."""
    known = dict(DEFAULT_PROFILES)
    for more in config.hook.pytest_kvmpass_profiles(config=config):
        known.update(more)
    return known
