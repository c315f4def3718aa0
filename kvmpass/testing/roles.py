"""Roles: names such as ``nvme``, ``edu`` and ``nic2`` for the PCI devices of tests.

On real hardware the environment names it (``KVMPASS_TEST_<ROLE>=BDF``). In the lab the devices are found in sysfs, in
the order of their addresses, so that no test depends on a slot number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from kvmpass._dataclass import dataclass, replace
from kvmpass._lazy import lazy_pattern

PREFIX = "KVMPASS_TEST_"
NOT_ROLES = frozenset({"DESTRUCTIVE", "PLAN"})
BDF = lazy_pattern(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")

NVME, XHCI, AHCI, ISA_BRIDGE = 0x010802, 0x0C0330, 0x010601, 0x060100
EDU, IVSHMEM, VIRTIO_BLK = (0x1234, 0x11E8), (0x1AF4, 0x1110), (0x1AF4, 0x1042)
E1000, E1000E, IGB = (0x8086, 0x100E), (0x8086, 0x10D3), (0x8086, 0x10C9)


@dataclass(frozen=True, slots=True)
class Candidate:
    """The properties of a PCI function that decide on its roles."""

    bdf: str
    """Its PCI address."""
    id: tuple[int, int]
    """Vendor and device ID."""
    class_code: int
    """Base class, subclass and programming interface, 24 bits."""
    members: int
    """Number of functions in its IOMMU group, 0 without a group."""
    vfs: int
    """Number of virtual functions that it can have (TotalVFs)."""

    @property
    def alone(self) -> bool:
        """Whether it is the only function of its IOMMU group."""
        return self.members == 1


def scan(sysfs: Path = Path("/sys")) -> list[Candidate]:
    """Return all PCI functions, in the order of their addresses."""
    return [_read(path) for path in sorted((sysfs / "bus/pci/devices").glob("*"))]


def _read(path: Path) -> Candidate:
    def number(name: str) -> int:
        file = path / name
        return int(file.read_text(), 0) if file.exists() else 0

    group = path / "iommu_group" / "devices"
    return Candidate(
        bdf=path.name,
        id=(number("vendor"), number("device")),
        class_code=number("class"),
        members=sum(1 for _ in group.iterdir()) if group.is_dir() else 0,
        vfs=number("sriov_totalvfs"),
    )


# Description and condition of each role. Further devices of the same kind have numbers: nvme, nvme2, …
ROLES: Mapping[str, tuple[str, Callable[[Candidate], bool]]] = {
    "nvme": (
        "an NVMe drive that is alone in its group",
        lambda d: d.class_code == NVME and d.alone and not d.vfs,
    ),
    "nic": ("an e1000e network card that is alone in its group", lambda d: d.id == E1000E and d.alone),
    "legacy_nic": (
        "an e1000 network card, which has INTx only, alone in its group",
        lambda d: d.id == E1000 and d.alone,
    ),
    "edu": ("QEMU's edu device, alone in its group", lambda d: d.id == EDU and d.alone),
    "ahci": ("a SATA controller with a disk, alone in its group", lambda d: d.class_code == AHCI and d.alone),
    # The lab's southbridge (kvmpass.lab.devices) is a virtio drive, too, with the class of an ISA bridge.
    "virtio_blk": (
        "a virtio drive that is alone in its group",
        lambda d: d.id == VIRTIO_BLK and d.alone and d.class_code != ISA_BRIDGE,
    ),
    "xhci": ("a USB controller that is alone in its group", lambda d: d.class_code == XHCI and d.alone),
    "ivshmem": ("QEMU's shared memory device, alone in its group", lambda d: d.id == IVSHMEM and d.alone),
    "peer": (
        "QEMU's shared memory device, alone behind a root port whose bus can be reset",
        lambda d: d.id == IVSHMEM and d.alone and not d.bdf.startswith("0000:00:"),
    ),
    "sibling": (
        "QEMU's shared memory device, behind a bridge with others whose bus can be reset",
        lambda d: d.id == IVSHMEM and d.members > 1,
    ),
    "multifunction": (
        "a function that shares its group with another function",
        lambda d: d.class_code == NVME and d.members > 1,
    ),
    "bridged": ("a device that shares its group with a bridge", lambda d: d.id == EDU and d.members > 1),
    "sriov": ("a device with virtual functions", lambda d: d.vfs > 0),
    "nvme_pf": ("an NVMe controller with virtual functions", lambda d: d.class_code == NVME and d.vfs > 0),
    "igb": ("an igb network card with virtual functions, alone in its group", lambda d: d.id == IGB and d.alone),
}


def base_role(role: str) -> str:
    """Return a role without its number: ``nvme`` for ``nvme2``."""
    return role.rstrip("0123456789")


def variable(role: str) -> str:
    """Return the name of the environment variable for a role."""
    return PREFIX + role.upper()


def discover(sysfs: Path = Path("/sys")) -> dict[str, str]:
    """Return the PCI address for each role that this (emulated) host has.

    Without an IOMMU there are no groups, and each device counts as alone.
    """
    found = scan(sysfs)
    if not any(device.members for device in found):
        found = [replace(device, members=1) for device in found]
    roles: dict[str, str] = {}
    for base, (_, matches) in ROLES.items():
        for number, device in enumerate(filter(matches, found), start=1):
            roles[base if number == 1 else f"{base}{number}"] = device.bdf
    return roles


def devices_of_kind(roles: Mapping[str, str], kind: str) -> list[str]:
    """Return the addresses for a role and its numbered ones, in the order of their numbers."""
    there = (role for role in roles if base_role(role) == kind)
    return [roles[role] for role in sorted(there, key=lambda role: (len(role), role))]


def group_of(bdf: str, sysfs: Path = Path("/sys")) -> str:
    """Return the path of a device's IOMMU group, or of the device if it has none."""
    device = sysfs / "bus/pci/devices" / bdf
    group = device / "iommu_group"
    return str((group if group.exists() else device).resolve())


def divide(roles: Mapping[str, str], workers: int, group: Callable[[str], str] = group_of) -> list[dict[str, str]]:
    """Divide the devices among workers: for each its roles, as many of a kind for one as for another.

    A device belongs to one worker, and so does an IOMMU group, because a group has one user. Devices that are left
    over are in no share, so that it does not depend on the worker what its tests find.
    """
    owners: dict[str, int] = {}
    shares: list[dict[str, str]] = [{} for _ in range(workers)]
    for kind in dict.fromkeys(map(base_role, roles)):
        own: list[list[str]] = [[] for _ in range(workers)]
        for bdf in devices_of_kind(roles, kind):
            counts = [*map(len, own)]
            own[owners.setdefault(group(bdf), counts.index(min(counts)))].append(bdf)
        for share, mine in zip(shares, own, strict=True):
            for number, bdf in enumerate(mine[: min(map(len, own))], start=1):
                share[kind if number == 1 else f"{kind}{number}"] = bdf
    return shares


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the PCI address for each role in ``KVMPASS_TEST_<ROLE>``.

    Raises ``ValueError`` for an unknown role or an invalid address.
    """
    roles: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        role = name.removeprefix(PREFIX).lower()
        if not name.startswith(PREFIX) or role.upper() in NOT_ROLES or not value:
            continue
        if base_role(role) not in ROLES:
            raise ValueError(f"{name}: unknown role; known: {', '.join(ROLES)}, also with a number from 2 on")
        bdf = value.lower() if value.count(":") == 2 else f"0000:{value.lower()}"
        if not BDF.fullmatch(bdf):
            raise ValueError(f"{name}={value}: invalid PCI address")
        roles[role] = bdf
    return roles
