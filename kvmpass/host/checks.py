"""What must hold before a device is assigned: of the host, of the device and its group, of the memory.

Every check only reads. Each refusal is one exception whose message is the cause and whose note is the remedy.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from kvmpass.errors import DeviceInUse, GroupNotViable, HostNotReady, KvmpassError, NotAssignable, NotEnoughMemory
from kvmpass.host import processes
from kvmpass.host.address import Bdf
from kvmpass.host.processes import Holders
from kvmpass.host.sysfs import PCI_DRIVERS, IommuGroup, PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI, usage, vfio_nodes

MIB = 1 << 20
CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
AMD_VENDORS = frozenset({"AuthenticAMD", "HygonGenuine"})

# Drivers that leave the device's DMA to others (`driver_managed_dma` in struct pci_driver), so that the kernel
# still hands the group to user space (drivers/iommu/iommu.c: iommu_device_use_default_domain).
HARMLESS_DRIVERS = frozenset({VFIO_PCI, "pci-stub", "pcieport"})


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why a device cannot be taken now: ``brief`` for a list, ``cause`` and ``remedy`` in full.

    ``kind`` is ``bridge``, ``no-group``, ``no-iommu``, ``group-not-viable``, ``assigned`` or ``in-use``; ``error`` is
    the exception that :func:`check_assignable` raises for it. ``devices`` are the siblings in the way, if any are.
    """

    kind: str
    brief: str
    cause: str
    remedy: str
    error: type[KvmpassError]
    devices: tuple[Bdf, ...] = ()


def check_assignable(sysfs: Sysfs, bdf: Bdf, together: Iterable[Bdf] = ()) -> PciDevice:
    """Return the device if it can be taken now; ``together`` names devices that are taken with it.

    Raises ``NoSuchDevice``, or the first of :func:`blockers`: ``NotAssignable`` (bridge, no IOMMU group, no-IOMMU
    group); ``GroupNotViable`` with the siblings and their drivers; ``DeviceInUse`` with every use that is visible.
    A device that this very process holds is in use too.
    """
    device = sysfs.device(bdf)
    for blocker in blockers(sysfs, device, together):
        raise blocker.error(blocker.cause, blocker.remedy)
    return device


def blockers(
    sysfs: Sysfs, device: PciDevice, together: Iterable[Bdf] = (), holders: Holders | None = None
) -> Iterator[Blocker]:
    """Every reason why the device cannot be taken now, the most basic first; none: it can.

    ``holders`` tells who has nodes open: :class:`~kvmpass.host.processes.OpenNodes`, one look at all processes, for
    whoever asks about many devices. Without it each call looks anew.
    """
    holders = holders or partial(processes.holders, sysfs)
    unfit = _unfit(sysfs, device)
    if unfit is not None:
        yield unfit
    elif device.group is not None:
        group = sysfs.group(device.group)
        yield from _unviable(sysfs, device, group, {device.bdf, *together})
        yield from users(sysfs, device, holders)


def users(sysfs: Sysfs, device: PciDevice, holders: Holders | None = None) -> Iterator[Blocker]:
    """Of the reasons against a device those for which somebody must let go first: ``assigned`` and ``in-use``."""
    holders = holders or partial(processes.holders, sysfs)
    yield from _assigned(sysfs, device, holders)
    reasons = usage(sysfs, device, holders)
    if reasons:
        yield Blocker(
            kind="in-use",
            brief="in use here",
            cause=f"{device.bdf} is in use: {'; '.join(reasons)}",
            remedy="unmount, switch off or close what uses it, then try again",
            error=DeviceInUse,
        )


def _unfit(sysfs: Sysfs, device: PciDevice) -> Blocker | None:
    """What no driver change would cure."""
    bdf = device.bdf
    if device.is_bridge or sysfs.header_type(bdf) in (1, 2):
        return Blocker(
            kind="bridge",
            brief="is a bridge",
            cause=f"{bdf} is a bridge (class {device.class_code:06x}): bridges cannot be assigned",
            remedy="assign a device behind it",
            error=NotAssignable,
        )
    if device.group is None:
        what = "it is the IOMMU" if device.class_code >> 8 == 0x0806 else "the IOMMU does not cover it"
        return Blocker(
            kind="no-group",
            brief="no IOMMU group",
            cause=f"{bdf} has no IOMMU group: {what}, so nothing would confine its DMA",
            remedy="turn on the IOMMU (AMD-Vi) in the firmware's setup if no device of this host has a group",
            error=NotAssignable,
        )
    group = sysfs.group(device.group)
    if group.no_iommu:
        return Blocker(
            kind="no-iommu",
            brief="no-IOMMU group",
            cause=f"{bdf} is in a no-IOMMU group ({group.id}): nothing would confine its DMA",
            remedy="switch off vfio's enable_unsafe_noiommu_mode and turn on the IOMMU (AMD-Vi)",
            error=NotAssignable,
        )
    return None


def _unviable(sysfs: Sysfs, device: PciDevice, group: IommuGroup, ours: set[Bdf]) -> Iterator[Blocker]:
    siblings = [sysfs.device(other) for other in group.devices if other not in ours]
    busy = [sibling for sibling in siblings if not is_harmless(sibling)]
    if busy:
        who = ", ".join(f"{sibling.bdf} (driver {sibling.driver})" for sibling in busy)
        yield Blocker(
            kind="group-not-viable",
            brief="group not viable",
            cause=f"{device.bdf} shares IOMMU group {group.id} with {who}, which the host uses",
            remedy="a group is assigned as a whole: unbind the others from their drivers, or use another slot",
            error=GroupNotViable,
            devices=tuple(sibling.bdf for sibling in busy),
        )


def is_harmless(device: PciDevice) -> bool:
    """Whether its group can be handed to user space as long as this device's driver stays as it is."""
    return device.driver is None or device.driver in HARMLESS_DRIVERS or device.is_pci_bridge


def _assigned(sysfs: Sysfs, device: PciDevice, holders: Holders) -> Iterator[Blocker]:
    members = () if device.group is None else sysfs.group(device.group).devices
    own = vfio_nodes(sysfs, device.bdf, device.group)
    siblings = [node for other in members if other != device.bdf for node in vfio_nodes(sysfs, other, None)]
    what = "is assigned by" if len(members) <= 1 else f"is in IOMMU group {device.group}, assigned by"
    yield from _held(holders, [*own, *siblings], f"{device.bdf} {what}")
    for function in sysfs.virtual_functions(device.bdf):  # they vanish with its driver, or keep it waiting
        nodes = vfio_nodes(sysfs, function, sysfs.device(function).group)
        yield from _held(holders, nodes, f"{device.bdf} has the virtual function {function}, assigned by")


def _held(holders: Holders, nodes: list[str], what: str) -> Iterator[Blocker]:
    held = holders(nodes)
    if held:
        who = " and ".join(str(process) for process in sorted({one for found in held.values() for one in found}))
        yield Blocker(
            kind="assigned",
            brief="already assigned",
            cause=f"{what} {who}",
            remedy="stop that process first, or choose another device",
            error=DeviceInUse,
        )


def check_host(sysfs: Sysfs) -> None:
    """Check what every assignment needs: AMD-V, KVM, AMD-Vi with interrupt remapping, VFIO, the right to use them.

    Raises ``HostNotReady`` or ``PermissionError``. Loads no module: it is enough that vfio-pci can
    be loaded.
    """
    _check_amd_v(sysfs)
    _check_amd_vi(sysfs)
    if interrupt_remapping(sysfs) is False:
        raise HostNotReady(
            "interrupt remapping is off: a device could raise any interrupt of this host",
            "remove intremap=off from the kernel's command line, or turn on the IOMMU (AMD-Vi) with interrupt "
            "remapping in the firmware's setup; allow_unsafe_interrupts is not accepted instead",
        )
    if not sysfs.path(PCI_DRIVERS, VFIO_PCI).is_dir() and not sysfs.module_available("vfio-pci"):
        raise HostNotReady(
            "the driver vfio-pci is missing: it is neither in this kernel nor a module that can be loaded",
            "use a kernel with CONFIG_VFIO_PCI, with its modules installed",
        )
    _check_access(sysfs, "dev/kvm", "run as root, or join the group that owns /dev/kvm (often kvm)")
    if sysfs.path("dev/vfio/vfio").exists():
        _check_access(sysfs, "dev/vfio/vfio", "run as root")


def _check_amd_v(sysfs: Sysfs) -> None:
    vendor, flags = _cpu(sysfs)
    has_kvm = sysfs.path("dev/kvm").exists()
    if vendor not in AMD_VENDORS:
        raise HostNotReady(f"this CPU is {vendor or 'unknown'}, not AMD: AMD-V is needed", "use an AMD host")
    if "svm" not in flags:
        if has_kvm:
            raise HostNotReady(
                "the KVM of this host is not AMD-V: the CPU shows no svm flag (a virtual machine with another KVM)",
                "use real hardware, turn on nested virtualization outside, or use the lab (kvmpass lab)",
            )
        raise HostNotReady(
            "AMD-V is absent or off: the CPU shows no svm flag",
            "turn on SVM (AMD-V) in the firmware's setup, or nested virtualization where this is a guest",
        )
    if not has_kvm:
        raise HostNotReady("there is no /dev/kvm: KVM is not loaded", "modprobe kvm_amd, and see dmesg if it refuses")
    if not sysfs.path("sys/module/kvm_amd").is_dir():
        raise HostNotReady("the KVM of this host is not AMD-V: kvm_amd is not loaded", "modprobe kvm_amd")


def _cpu(sysfs: Sysfs) -> tuple[str, frozenset[str]]:
    vendor, flags = "", frozenset[str]()
    for line in (sysfs.text("proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "vendor_id":
            vendor = value.strip()
        elif key.strip() == "flags":
            flags = frozenset(value.split())
            break
    return vendor, flags


def _check_amd_vi(sysfs: Sysfs) -> None:
    if any(name.startswith("ivhd") for name in sysfs.names("sys/class/iommu")) and sysfs.groups():
        return
    if not sysfs.path("sys/firmware/acpi/tables/IVRS").exists():
        raise HostNotReady(
            "AMD-Vi is off: the firmware describes no IOMMU (there is no ACPI table IVRS)",
            "turn on the IOMMU (AMD-Vi) in the firmware's setup",
        )
    words = (sysfs.text("proc/cmdline") or "").split()
    off = [word for word in words if word in ("iommu=off", "amd_iommu=off", "acpi=off")]
    if off:
        raise HostNotReady(
            f"AMD-Vi is off: {' and '.join(off)} is on the kernel's command line", "remove it and reboot"
        )
    raise HostNotReady(
        "AMD-Vi is off: the firmware describes an IOMMU (ACPI table IVRS), but the kernel does not use it",
        "use a kernel with CONFIG_AMD_IOMMU and see dmesg for AMD-Vi",
    )


def interrupt_remapping(sysfs: Sysfs) -> bool | None:
    """Whether the IOMMU remaps interrupts; None where the kernel does not tell.

    The kernel puts ``IR-`` before the name of every interrupt chip behind a remapping domain
    (arch/x86/kernel/apic/msi.c and io_apic.c, drivers/iommu/amd/iommu.c).
    Where it does not tell, ``VFIO_SET_IOMMU`` has the last word (EPERM).
    """
    chips = [sysfs.text("sys/kernel/irq", number, "chip_name") or "" for number in sysfs.names("sys/kernel/irq")]
    if not any(chips):
        chips = [word for line in (sysfs.text("proc/interrupts") or "").splitlines() for word in line.split()]
    if any(chip.startswith(("IR-", "AMD-IR")) for chip in chips):
        return True
    return False if any(chip.startswith(("IO-APIC", "PCI-MSI")) for chip in chips) else None


def _check_access(sysfs: Sysfs, node: str, remedy: str) -> None:
    if not os.access(sysfs.path(node), os.R_OK | os.W_OK, effective_ids=True):
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"/{node}")
        error.add_note(remedy)
        raise error


def check_memory(
    sysfs: Sysfs, size_bytes: int, *, huge_page: int = 0, locked: int | None = None, memlock: int | None = None
) -> None:
    """Check that ``size_bytes`` of guest memory exist and may be locked; ``locked`` is more if there is more to lock.

    ``huge_page`` is the page size in bytes when the memory comes from hugetlbfs, else 0. ``memlock`` replaces
    RLIMIT_MEMLOCK (bytes, -1 without limit), which does not count under CAP_IPC_LOCK. Raises ``NotEnoughMemory``:
    pinning more than there is would wake the out-of-memory killer instead.
    """
    if huge_page:
        pool = f"sys/kernel/mm/hugepages/hugepages-{huge_page >> 10}kB"
        free = (sysfs.number(pool, "free_hugepages") or 0) * huge_page
        if free < size_bytes:
            raise NotEnoughMemory(
                f"the guest needs {_mib(size_bytes)} of {huge_page >> 10} KiB pages, {_mib(free)} of them are free",
                f"reserve more: write the number of pages to /{pool}/nr_hugepages",
            )
    else:
        available = _available(sysfs)
        if available is not None and available < size_bytes:
            raise NotEnoughMemory(
                f"the guest needs {_mib(size_bytes)} of memory, {_mib(available)} are available on this host",
                "give the guest less memory, or free some",
            )
    if _capable(sysfs, CAP_IPC_LOCK):
        return
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if memlock is None else memlock
    locked = size_bytes if locked is None else locked
    if limit != resource.RLIM_INFINITY and limit < locked:
        raise NotEnoughMemory(
            f"the guest's {_mib(locked)} must be locked in memory, this process may lock {_mib(limit)}",
            f"raise the limit (ulimit -l {-(-locked // 1024)}, or memlock in limits.conf), or run as root",
        )


def _available(sysfs: Sysfs) -> int | None:
    for line in (sysfs.text("proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _capable(sysfs: Sysfs, capability: int) -> bool:
    for line in (sysfs.text("proc/self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"
