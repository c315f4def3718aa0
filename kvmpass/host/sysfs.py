"""The host's PCI devices and IOMMU groups, as the kernel shows them in a real or a recorded tree.

Sources: drivers/pci/pci-sysfs.c, drivers/iommu/iommu.c, Documentation/ABI/testing/sysfs-bus-pci and
sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvmpass.errors import HostNotReady, NoSuchDevice, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.kernel import kmsg
from kvmpass.host.kernel.kmsg import KernelLog, read_log
from kvmpass.layout import Range, Reserved

PCI_DEVICES = "sys/bus/pci/devices"
PCI_DRIVERS = "sys/bus/pci/drivers"
IOMMU_GROUPS = "sys/kernel/iommu_groups"
NOIOMMU_NAME = "vfio-noiommu"  # drivers/vfio/group.c: vfio_noiommu_group_alloc
BARS = 6  # the first lines of `resource`; then the expansion ROM, then BARs of virtual functions, or windows

# include/linux/ioport.h
IORESOURCE_IO, IORESOURCE_MEM, IORESOURCE_MEM_64, IORESOURCE_UNSET = 0x100, 0x200, 0x0010_0000, 0x2000_0000

_PIECE = 1 << 16  # bytes to read at once

_T = TypeVar("_T")
_WRITE = 'printf "%s" "$2" >"$1"'


@dataclass(frozen=True, slots=True)
class Resource:
    """One line of ``resource``: ``start`` and ``end`` (inclusive) are host-physical, ``flags`` IORESOURCE_*."""

    start: int
    end: int
    flags: int

    @property
    def size(self) -> int:
        """Bytes; 0 for an unused resource."""
        return self.end - self.start + 1 if self.flags else 0

    @property
    def is_memory(self) -> bool:
        return bool(self.flags & IORESOURCE_MEM)

    @property
    def is_placed(self) -> bool:
        """Whether ``start`` and ``end`` are addresses: the kernel keeps sizes there of what it could not place."""
        return bool(self.size and self.start and not self.flags & IORESOURCE_UNSET)


@dataclass(frozen=True, slots=True)
class PciDevice:
    """What the kernel says of one PCI function at one moment.

    ``class_code`` has 24 bits (base, sub-class, interface). ``driver_override`` is None where there is none,
    ``numa_node`` None where unknown, ``power_state`` the kernel's word (``D0``, ``D3hot``, ``unknown`` …).
    ``reset_methods`` are the kernel's words too (``flr``, ``pm``, ``bus`` …), in the order in which it tries; empty
    where it has no way, or does not say (before Linux 5.15).
    """

    bdf: Bdf
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    class_code: int
    revision: int
    driver: str | None
    driver_override: str | None
    group: int | None
    numa_node: int | None
    modalias: str
    resources: tuple[Resource, ...]
    power_state: str
    reset_methods: tuple[str, ...]

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
        """PCI-to-PCI bridges and root ports, whose own driver does no DMA."""
        return self.class_code >> 8 == 0x0604

    def __str__(self) -> str:
        return f"{self.bdf} [{self.vendor:04x}:{self.device:04x}]"


@dataclass(frozen=True, slots=True)
class IommuGroup:
    """The smallest set of devices the IOMMU can tell apart.

    ``type`` is the default domain's (``DMA``, ``DMA-FQ``, ``identity``). ``no_iommu`` marks the groups that
    VFIO makes up where no IOMMU protects anything.
    """

    id: int
    devices: tuple[Bdf, ...]
    type: str
    reserved: tuple[Reserved, ...]
    no_iommu: bool = False


def header_type(header: bytes) -> int | None:
    """Bits 0-6 of configuration byte 0x0e: 0 normal, 1 PCI bridge, 2 CardBus (PCI 3.0, 6.1); None where unknown."""
    return header[0x0E] & 0x7F if len(header) > 0x0E else None


def modprobe_tool() -> str | None:
    """The program, also where the path of an ordinary user leaves it out."""
    return shutil.which("modprobe", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Sysfs:
    """Reads ``/sys``, ``/proc`` and ``/dev`` under ``root``; :meth:`write` is the only place that writes there.

    Stateless: every call reads anew. Safe to share between threads.
    """

    recorded = False
    """Whether it is a recording: of another host, or of another time."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = Path(root)
        self._prefix = "" if str(self.root) == "/" else str(self.root)

    # --- files

    def path(self, *parts: str) -> Path:
        """A path of this tree from parts without a leading slash."""
        return Path(self.place(*parts))

    def place(self, *parts: str) -> str:
        """The same as text. Whatever is read is read by this name."""
        return "/".join((self._prefix, *parts))

    def text(self, *parts: str) -> str | None:
        """A file's text without surrounding blanks, or None where it is missing or cannot be read."""
        try:
            return self.data(*parts).decode(errors="replace").strip()
        except OSError:
            return None

    def data(self, *parts: str, size: int = -1) -> bytes:
        """A file's bytes, ``size`` of them at most. Raises ``OSError``.

        A host with thousands of functions has a hundred thousand files: no objects for paths, no buffers.
        """
        fd = os.open(self.place(*parts), os.O_RDONLY | os.O_CLOEXEC)
        try:
            pieces = []
            while size and (piece := os.read(fd, _PIECE if size < 0 else size)):
                pieces.append(piece)
                size -= len(piece) if size > 0 else 0
            return b"".join(pieces)
        finally:
            os.close(fd)

    def exists(self, *parts: str) -> bool:
        """Whether there is such a file or directory; a link without a target is none."""
        return os.path.exists(self.place(*parts))  # noqa: PTH110 - as for data()

    def number(self, *parts: str) -> int | None:
        """A file's number, decimal or ``0x``; None where there is none."""
        with contextlib.suppress(ValueError, TypeError):
            return int(self.text(*parts) or "", 0)
        return None

    def link(self, *parts: str) -> str | None:
        """The last component of a link's target, or None where there is no link."""
        try:
            return os.readlink(self.place(*parts)).rpartition("/")[2]  # noqa: PTH115 - as for data()
        except OSError:
            return None

    def names(self, *parts: str) -> list[str]:
        """The sorted names in a directory; empty where it is missing or closed to us."""
        try:
            return sorted(os.listdir(self.place(*parts)))  # noqa: PTH208 - as for data()
        except OSError:
            return []

    def log(self) -> KernelLog:
        """The kernel's, as far as it reaches back."""
        return read_log(self.place(kmsg.PATH))

    def ask(self, question: str, answer: Callable[[], _T]) -> _T:
        """What no file says: ``answer`` finds it out now. A recorded tree has the answers of its own host.

        ``question`` names it there; the answer must be what JSON has.
        """
        return answer()

    def write(self, path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        """Write ``text`` in one call. Raises ``OSError``, ``TimeoutError`` after ``timeout`` seconds.

        With a timeout another process writes: unbinding sleeps in the kernel for as long as anybody holds the
        device, and were it a thread of ours, this process could never exit and let go of it
        (drivers/vfio/vfio_main.c: vfio_unregister_group_dev). That process keeps ``held``, a
        descriptor, open to its end.
        """
        if timeout is None:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
            return
        helper = subprocess.Popen(
            ["/bin/sh", "-c", _WRITE, "sh", str(path), text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=() if held is None else (held,),
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
        assert helper.stderr is not None
        with helper.stderr as complaints:
            try:
                status = helper.wait(timeout)
            except subprocess.TimeoutExpired:
                helper.returncode = 0  # left to finish on its own: it cannot be killed there
                raise TimeoutError(
                    errno.ETIMEDOUT, f"no answer from the kernel in {timeout:g} s", str(path)
                ) from None
            if status:
                said = complaints.read().decode(errors="replace").strip()
                raise OSError(errno.EIO, said.rpartition(": ")[2] or f"helper ended with {status}", str(path))

    def kernel(self) -> tuple[int, int]:
        """The running kernel's version, as far as it matters: ``(6, 12)``; zeros where it is unknown."""
        parts = (self.text("proc/sys/kernel/osrelease") or "0.0").replace("-", ".").split(".")
        numbers = [int(part) if part.isdecimal() else 0 for part in [*parts, "0"][:2]]
        return numbers[0], numbers[1]

    def load_module(self, name: str) -> None:
        """``modprobe name``; it stays loaded. Raises ``HostNotReady``."""
        tool = modprobe_tool()
        reason = "modprobe is not installed"
        if tool is not None:
            done = subprocess.run([tool, name], capture_output=True, text=True, errors="replace", check=False)
            if done.returncode == 0:
                return
            reason = (done.stderr.strip().splitlines() or [f"modprobe ended with {done.returncode}"])[-1]
        raise HostNotReady(
            f"the kernel module {name} cannot be loaded: {reason}",
            "a kernel with VFIO (CONFIG_VFIO_PCI) and its modules is needed",
        )

    # --- PCI devices

    def device_path(self, bdf: Bdf) -> Path:
        return self.path(PCI_DEVICES, str(bdf))

    def devices(self) -> list[PciDevice]:
        """All PCI functions, by address."""
        found = []
        for name in self.names(PCI_DEVICES):
            with contextlib.suppress(NoSuchDevice):  # unplugged while we read
                found.append(self.device(Bdf.parse(name)))
        return sorted(found, key=lambda device: device.bdf)

    def device(self, bdf: Bdf) -> PciDevice:
        """One function. Raises ``NoSuchDevice``."""
        base = f"{PCI_DEVICES}/{bdf}"
        vendor = self.number(base, "vendor")
        group = self.link(base, "iommu_group") if self.exists(base, "iommu_group") else None
        node = self.number(base, "numa_node")
        found = PciDevice(
            bdf=bdf,
            vendor=vendor or 0,
            device=self.number(base, "device") or 0,
            subsystem_vendor=self.number(base, "subsystem_vendor") or 0,
            subsystem_device=self.number(base, "subsystem_device") or 0,
            class_code=self.number(base, "class") or 0,
            revision=self.number(base, "revision") or 0,
            driver=self.link(base, "driver"),
            driver_override=self.driver_override(bdf),
            group=int(group) if group is not None and group.isdecimal() else None,
            numa_node=node if node is not None and node >= 0 else None,
            modalias=self.text(base, "modalias") or "",
            resources=tuple(self._resources(base)),
            power_state=self.text(base, "power_state") or "unknown",
            reset_methods=tuple((self.text(base, "reset_method") or "").split()),
        )
        if vendor is None or not self.exists(base, "vendor"):  # or it went while we read: the rest is void
            raise NoSuchDevice(f"there is no PCI device {bdf}", "kvmpass list shows the devices of this host")
        return found

    def driver(self, bdf: Bdf) -> str | None:
        """The name of the driver bound at this moment."""
        return self.link(PCI_DEVICES, str(bdf), "driver")

    def driver_override(self, bdf: Bdf) -> str | None:
        text = self.text(PCI_DEVICES, str(bdf), "driver_override")
        return None if text in (None, "", "(null)") else text

    def has_sriov(self, bdf: Bdf) -> bool:
        """Whether it is a physical function that can have virtual ones, or a virtual one."""
        base = f"{PCI_DEVICES}/{bdf}"
        return bool(self.number(base, "sriov_totalvfs")) or self.link(base, "physfn") is not None

    def virtual_functions(self, bdf: Bdf) -> list[Bdf]:
        """The virtual functions that are enabled on a physical one, by address."""
        base = (PCI_DEVICES, str(bdf))
        links = [self.link(*base, name) for name in self.names(*base) if name.startswith("virtfn")]
        return sorted(Bdf.parse(link) for link in links if link is not None)

    def header_type(self, bdf: Bdf) -> int | None:
        """That of :func:`header_type`."""
        return header_type(self.config(bdf, 0x40, wake=False))

    def config(self, bdf: Bdf, size: int = 0x100, *, wake: bool = True) -> bytes:
        """The first bytes of configuration space: 64 at most without root; none where they cannot be read.

        No byte more: some registers do not like to be read. Reading wakes a device that is suspended without power,
        unless ``wake`` is false: then nothing is read of it.
        """
        if not wake and self.is_asleep(bdf):
            return b""
        try:
            return self.data(PCI_DEVICES, str(bdf), "config", size=size)
        except OSError:
            return b""

    def is_asleep(self, bdf: Bdf) -> bool:
        """Whether the kernel has taken its power away for as long as nobody needs it (runtime power management)."""
        base = (PCI_DEVICES, str(bdf))
        return self.text(*base, "power_state") == "D3cold" and self.text(*base, "power/runtime_status") == "suspended"

    def _resources(self, base: str) -> Iterator[Resource]:
        for line in (self.text(base, "resource") or "").splitlines():
            with contextlib.suppress(ValueError):
                start, end, flags = (int(word, 16) for word in line.split())
                yield Resource(start, end, flags)

    # --- IOMMU groups

    def groups(self) -> list[IommuGroup]:
        """All IOMMU groups, by number."""
        numbers = sorted(int(name) for name in self.names(IOMMU_GROUPS) if name.isdecimal())
        return [self.group(number) for number in numbers]

    def group(self, number: int) -> IommuGroup:
        """One group. Raises ``NotAssignable`` where the kernel has no such group."""
        base = f"{IOMMU_GROUPS}/{number}"
        if not self.exists(base):
            raise NotAssignable(f"there is no IOMMU group {number}")
        reserved = []
        for line in (self.text(base, "reserved_regions") or "").splitlines():
            with contextlib.suppress(ValueError):
                start, last, kind = line.split()
                low = int(start, 16)
                # A region of no bytes ends before it begins, at 0 with all ones.
                reserved.append(Reserved(Range(low, (int(last, 16) - low + 1) % (1 << 64)), kind))
        members = [Bdf.parse(name) for name in self.names(base, "devices") if name.count(":") == 2]
        return IommuGroup(
            id=number,
            devices=tuple(sorted(members)),
            type=self.text(base, "type") or "",
            reserved=tuple(reserved),
            no_iommu=self.text(base, "name") == NOIOMMU_NAME,
        )

    def reserved_regions(self) -> list[Reserved]:
        """The union over all groups, without doubles, by address."""
        found = {reserved for group in self.groups() for reserved in group.reserved}
        return sorted(found, key=lambda reserved: (reserved.range, reserved.kind))
