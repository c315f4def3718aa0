"""PCI devices and IOMMU groups in ``/sys``, ``/proc`` and ``/dev``, real or recorded.

Sources: drivers/pci/pci-sysfs.c, drivers/iommu/iommu.c, Documentation/ABI/testing/sysfs-bus-pci and
sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvmpass._dataclass import dataclass
from kvmpass.errors import HostNotReady, NoSuchDevice, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.kernel import kmsg
from kvmpass.host.kernel.kmsg import KernelLog, read_log
from kvmpass.layout import Range, Reserved
from kvmpass.modalias import pci_ids

PCI_DEVICES = "sys/bus/pci/devices"
PCI_DRIVERS = "sys/bus/pci/drivers"
VFIO_PCI = "vfio-pci"
IOMMU_GROUPS = "sys/kernel/iommu_groups"
NOIOMMU_NAME = "vfio-noiommu"  # drivers/vfio/group.c: vfio_noiommu_group_alloc
BARS = 6  # the first lines of `resource`; then the expansion ROM, then BARs of virtual functions, or windows

# include/linux/ioport.h
IORESOURCE_IO, IORESOURCE_MEM, IORESOURCE_MEM_64, IORESOURCE_UNSET = 0x100, 0x200, 0x0010_0000, 0x2000_0000

_IDENTITY = ("vendor", "device", "subsystem_vendor", "subsystem_device", "class")
_PIECE = 1 << 16  # bytes to read at once
_ATTRIBUTES = ("sys/bus/pci/", "sys/kernel/iommu_groups/")
_PAGE = 4096  # fs/kernfs/file.c: what is shorter than a page is all that the file has

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Resource:
    """One line of ``resource`` in sysfs."""

    start: int
    """Host-physical address."""
    end: int
    """The last address, inclusive."""
    flags: int
    """IORESOURCE_* of include/linux/ioport.h."""

    @property
    def size(self) -> int:
        """Bytes; 0 for an unused resource."""
        return self.end - self.start + 1 if self.flags else 0

    @property
    def is_memory(self) -> bool:
        """Whether it is memory, not I/O ports."""
        return bool(self.flags & IORESOURCE_MEM)

    @property
    def is_placed(self) -> bool:
        """Whether an address is assigned: if not, the kernel keeps only the size in ``start`` and ``end``."""
        return bool(self.size and self.start and not self.flags & IORESOURCE_UNSET)


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One PCI function at one moment."""

    bdf: Bdf
    """Its address."""
    vendor: int
    """Vendor ID, 16 bits."""
    device: int
    """Device ID, 16 bits."""
    subsystem_vendor: int
    """Subsystem vendor ID, 16 bits."""
    subsystem_device: int
    """Subsystem ID, 16 bits."""
    class_code: int
    """24 bits: base class, sub-class, programming interface."""
    revision: int
    """Revision ID, 8 bits."""
    driver: str | None
    """The driver it is bound to; None without one."""
    driver_override: str | None
    """``driver_override``; None if it is not set."""
    group: int | None
    """The number of its IOMMU group; None without one."""
    numa_node: int | None
    """Its NUMA node; None if unknown."""
    modalias: str
    """``modalias``; empty if unknown."""
    resources: tuple[Resource, ...]
    """BARs, ROM, VF BARs, windows: the lines of ``resource``."""
    power_state: str
    """The kernel's name: ``D0``, ``D3hot``, ``unknown`` …"""
    reset_methods: tuple[str, ...]
    """The kernel's names (``flr``, ``pm``, ``bus`` …) in order; empty without one, and before Linux 5.15."""

    @property
    def bars(self) -> tuple[Resource, ...]:
        """Its six BARs, used or not."""
        return self.resources[:BARS]

    @property
    def is_bridge(self) -> bool:
        """Host, ISA, PCI, CardBus and similar bridges; not all of base class 06: 0680 are switches of other kinds."""
        return self.class_code >> 8 in (0x0600, 0x0601, 0x0604, 0x0607, 0x0609)

    @property
    def is_pci_bridge(self) -> bool:
        """PCI-to-PCI bridges and root ports, whose driver does no DMA."""
        return self.class_code >> 8 == 0x0604

    def __str__(self) -> str:
        return f"{self.bdf} [{self.vendor:04x}:{self.device:04x}]"


@dataclass(frozen=True, slots=True)
class IommuGroup:
    """An IOMMU group: the smallest set of devices that the IOMMU can isolate."""

    id: int
    """Its number."""
    devices: tuple[Bdf, ...]
    """Its devices, by address."""
    type: str
    """The type of its default domain: ``DMA``, ``DMA-FQ``, ``identity``."""
    reserved: tuple[Reserved, ...]
    """Its reserved regions."""
    no_iommu: bool = False
    """A group that VFIO has created in no-IOMMU mode: its DMA is not translated."""


def modprobe_tool() -> str | None:
    """Return the path of modprobe, also if it is not in the PATH of a non-root user; None without it."""
    import shutil

    return shutil.which("modprobe", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Sysfs:
    """Reads ``/sys``, ``/proc`` and ``/dev`` under ``root``, again for every call; only :meth:`write` writes there.

    Synchronization: any thread.
    """

    recorded = False
    """Whether it is a recording of another host, or of another time."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = Path(root)
        self._prefix = "" if str(self.root) == "/" else str(self.root)

    # --- files

    def path(self, *parts: str) -> Path:
        """Return a path of this tree from parts without a leading slash."""
        return Path(self.place(*parts))

    def place(self, *parts: str) -> str:
        """Return the same as text. All reads use it."""
        return "/".join((self._prefix, *parts))

    def text(self, *parts: str) -> str | None:
        """Return a file's text without surrounding whitespace; None if it cannot be read."""
        try:
            return self.data(*parts).decode(errors="replace").strip()
        except OSError:
            return None

    def lines(self, *parts: str) -> list[str]:
        """Return a file's lines; empty if it cannot be read."""
        return (self.text(*parts) or "").splitlines()

    def fields(self, *parts: str, separator: str = ":") -> dict[str, str]:
        """Return the fields of a file of names and values, of each name the first; empty if it cannot be read."""
        pairs = [line.partition(separator) for line in self.lines(*parts)]
        return {name.strip(): value.strip() for name, _, value in reversed(pairs)}

    def data(self, *parts: str, size: int = -1) -> bytes:
        """Return a file's bytes, at most ``size``, without path objects or buffers, for speed. Raises ``OSError``."""
        fd = os.open(self.place(*parts), os.O_RDONLY | os.O_CLOEXEC)
        try:
            pieces = []
            if size < 0 and parts[0].startswith(_ATTRIBUTES):
                first = os.read(fd, _PIECE)
                if len(first) < _PAGE:
                    return first
                pieces.append(first)
            while size and (piece := os.read(fd, _PIECE if size < 0 else size)):
                pieces.append(piece)
                size -= len(piece) if size > 0 else 0
            return b"".join(pieces)
        finally:
            os.close(fd)

    def exists(self, *parts: str) -> bool:
        """Return whether a file or directory exists; false for a dangling link."""
        return os.path.exists(self.place(*parts))  # noqa: PTH110 - as for data()

    def number(self, *parts: str) -> int | None:
        """Return the number in a file, decimal or ``0x``; None without one."""
        with contextlib.suppress(ValueError, TypeError):
            return int(self.text(*parts) or "", 0)
        return None

    def link(self, *parts: str) -> str | None:
        """Return the last component of a link's target; None without a link."""
        try:
            return os.readlink(self.place(*parts)).rpartition("/")[2]  # noqa: PTH115 - as for data()
        except OSError:
            return None

    def names(self, *parts: str) -> list[str]:
        """Return the sorted names in a directory; empty if it cannot be read."""
        try:
            return sorted(os.listdir(self.place(*parts)))  # noqa: PTH208 - as for data()
        except OSError:
            return []

    def log(self, word: bytes = b"") -> KernelLog:
        """Return the kernel's log, as far as it reaches back; ``word`` as for :func:`kmsg.read_log`."""
        return read_log(self.place(kmsg.PATH), word)

    def ask(self, question: str, answer: Callable[[], _T]) -> _T:
        """Return the result of ``answer``, for a fact that is not in a file. A recorded tree has its host's result.

        ``question`` is its key there; the result must be a JSON value.
        """
        return answer()

    def write(self, path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        """Write ``text`` in one call. Raises ``OSError``, ``TimeoutError`` after ``timeout`` seconds.

        With a timeout another process writes, and keeps the descriptor ``held`` open until it exits.
        """
        if timeout is None:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
            return
        from kvmpass.host.kernel.writing import write_in_time

        write_in_time(path, text, timeout, held)

    def kernel(self) -> tuple[int, int]:
        """Return major and minor of the running kernel's version: ``(6, 12)``; zeros if unknown."""
        parts = (self.text("proc/sys/kernel/osrelease") or "0.0").replace("-", ".").split(".")
        numbers = [int(part) if part.isdecimal() else 0 for part in [*parts, "0"][:2]]
        return numbers[0], numbers[1]

    def load_module(self, name: str) -> None:
        """Load a module by modprobe. Raises ``HostNotReady``."""
        tool = modprobe_tool()
        reason = "modprobe is not installed"
        if tool is not None:
            import subprocess

            done = subprocess.run([tool, name], capture_output=True, text=True, errors="replace", check=False)
            if done.returncode == 0:
                return
            reason = (done.stderr.strip().splitlines() or [f"modprobe ended with {done.returncode}"])[-1]
        raise HostNotReady(
            f"the kernel module {name} cannot be loaded: {reason}",
            "use a kernel with VFIO (CONFIG_VFIO_PCI), with its modules installed",
        )

    # --- PCI devices

    def device_path(self, bdf: Bdf) -> Path:
        """Return the directory of a PCI function."""
        return self.path(PCI_DEVICES, str(bdf))

    def devices(self) -> list[PciDevice]:
        """Return all PCI functions, by address."""
        found = []
        for name in self.names(PCI_DEVICES):
            with contextlib.suppress(NoSuchDevice):  # unplugged concurrently
                found.append(self.device(Bdf.parse(name)))
        return sorted(found, key=lambda device: device.bdf)

    def device(self, bdf: Bdf) -> PciDevice:
        """Return one function. Raises ``NoSuchDevice``."""
        base = f"{PCI_DEVICES}/{bdf}"
        modalias = self.text(base, "modalias") or ""
        vendor, device, subsystem_vendor, subsystem_device, class_code = self._identity(base, modalias)
        group = self.link(base, "iommu_group") if self.exists(base, "iommu_group") else None
        node = self.number(base, "numa_node")
        found = PciDevice(
            bdf=bdf,
            vendor=vendor or 0,
            device=device or 0,
            subsystem_vendor=subsystem_vendor or 0,
            subsystem_device=subsystem_device or 0,
            class_code=class_code or 0,
            revision=self.number(base, "revision") or 0,
            driver=self.link(base, "driver"),
            driver_override=self.driver_override(bdf),
            group=int(group) if group is not None and group.isdecimal() else None,
            numa_node=node if node is not None and node >= 0 else None,
            modalias=modalias,
            resources=tuple(self._resources(base)),
            power_state=self.text(base, "power_state") or "unknown",
            reset_methods=tuple((self.text(base, "reset_method") or "").split()),
        )
        if vendor is None or not self.exists(base, "vendor"):  # or it was removed concurrently
            raise NoSuchDevice(f"there is no PCI device {bdf}", "kvmpass list shows the devices of this host")
        return found

    def _identity(self, base: str, modalias: str) -> list[int | None]:
        """Return vendor, device, those of the subsystem, and the class: one file has all of them (modalias_show)."""
        if ids := pci_ids(modalias):
            *numbers, base_class, sub_class, interface = ids
            return [*numbers, base_class << 16 | sub_class << 8 | interface]
        return [self.number(base, name) for name in _IDENTITY]

    def driver(self, bdf: Bdf) -> str | None:
        """Return the name of the driver that is bound at this moment; None without one."""
        return self.link(PCI_DEVICES, str(bdf), "driver")

    def driver_override(self, bdf: Bdf) -> str | None:
        """Return ``driver_override``; None if it is not set."""
        text = self.text(PCI_DEVICES, str(bdf), "driver_override")
        return None if text in (None, "", "(null)") else text

    def virtual_functions(self, bdf: Bdf) -> list[Bdf]:
        """Return the enabled virtual functions of a physical one, by address."""
        base = (PCI_DEVICES, str(bdf))
        links = [self.link(*base, name) for name in self.names(*base) if name.startswith("virtfn")]
        return sorted(Bdf.parse(link) for link in links if link is not None)

    def config(self, bdf: Bdf, size: int = 0x100, *, wake: bool = True) -> bytes:
        """Return the first ``size`` bytes of configuration space: at most 64 for non-root users; empty on errors.

        Not more: reading some registers has side effects. Reading resumes a device in D3cold, unless ``wake`` is
        false: then the result is empty.
        """
        if not wake and self.is_asleep(bdf):
            return b""
        try:
            return self.data(PCI_DEVICES, str(bdf), "config", size=size)
        except OSError:
            return b""

    def is_asleep(self, bdf: Bdf) -> bool:
        """Return whether it is in D3cold by runtime power management."""
        base = (PCI_DEVICES, str(bdf))
        return self.text(*base, "power_state") == "D3cold" and self.text(*base, "power/runtime_status") == "suspended"

    def _resources(self, base: str) -> Iterator[Resource]:
        for line in self.lines(base, "resource"):
            with contextlib.suppress(ValueError):
                start, end, flags = (int(word, 16) for word in line.split())
                yield Resource(start, end, flags)

    # --- IOMMU groups

    def groups(self, find: Callable[[int], IommuGroup] | None = None) -> list[IommuGroup]:
        """Return all IOMMU groups, by number; ``find`` returns one, by default as it is at this moment."""
        numbers = sorted(int(name) for name in self.names(IOMMU_GROUPS) if name.isdecimal())
        return [(find or self.group)(number) for number in numbers]

    def group(self, number: int) -> IommuGroup:
        """Return one group. Raises ``NotAssignable`` if the kernel has no such group."""
        base = f"{IOMMU_GROUPS}/{number}"
        members = [Bdf.parse(name) for name in self.names(base, "devices") if name.count(":") == 2]
        if not members and not self.exists(base):
            raise NotAssignable(f"there is no IOMMU group {number}")
        reserved = []
        for line in self.lines(base, "reserved_regions"):
            with contextlib.suppress(ValueError):
                start, last, kind = line.split()
                low = int(start, 16)
                # An empty region ends before it begins; one at 0 ends at all ones.
                reserved.append(Reserved(Range(low, (int(last, 16) - low + 1) % (1 << 64)), kind))
        return IommuGroup(
            id=number,
            devices=tuple(sorted(members)),
            type=self.text(base, "type") or "",
            reserved=tuple(reserved),
            no_iommu=self.text(base, "name") == NOIOMMU_NAME,
        )

    def reserved_regions(self) -> list[Reserved]:
        """Return the reserved regions of all groups, without duplicates, by address."""
        found = {reserved for group in self.groups() for reserved in group.reserved}
        return sorted(found, key=lambda reserved: (reserved.range, reserved.kind))
