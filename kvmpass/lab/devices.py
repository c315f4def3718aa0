"""The emulated host's PCI devices: defaults for the known ones, and an address for each.

``NAME[,PROPERTY=VALUE…]`` is an argument of QEMU's ``-device``, with two properties of the lab: ``file=PATH``, a
drive's content, and ``size=SIZE``, of a drive that is created for the run, or of shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.layout import parse_size

FIRST_SLOT, LAST_SLOT = 0x04, 0x1E
"""Slots of bus 0 for devices. 01 is the IOMMU, 02 and 03 are used by the lab, 1f is the chipset."""
SOUTHBRIDGE = 0x14
"""Slot of the function that has the IOAPIC, as QEMU's IVRS table says (hw/i386/acpi-build.c)."""

NETWORK = frozenset({"e1000", "e1000e", "igb", "rtl8139", "virtio-net-pci", "vmxnet3"})
BRIDGES = frozenset({"pci-bridge", "pcie-root-port", "ioh3420", "pxb-pcie", "pcie-pci-bridge"})
EXPRESS_PORTS = frozenset({"pcie-root-port", "ioh3420", "pcie-pci-bridge", "x3130-upstream", "xio3130-downstream"})
DRIVES = frozenset({"ide-hd", "nvme", "nvme-ns", "scsi-hd", "usb-storage", "virtio-blk-pci"})
OTHERS = frozenset({"ahci", "edu", "ivshmem-plain", "nvme-subsys", "pci-testdev", "qemu-xhci", "virtio-9p-pci"})
KNOWN = NETWORK | BRIDGES | DRIVES | OTHERS
"""Devices that shell completion offers. All other devices of QEMU work, too."""

# QEMU has the IOAPIC's function on no bus. Of those that can be put there, this one lets its class be chosen.
_SOUTHBRIDGE = [
    *("-blockdev", "null-co,node-name=lab-southbridge,size=1048576,read-zeroes=on"),
    "-device",
    f"virtio-blk-pci,class=0x0601,drive=lab-southbridge,iommu_platform=on,disable-legacy=on,bus=pcie.0,"
    f"addr={SOUTHBRIDGE:02x}.0",
]


@dataclass
class QemuDevices:
    """The devices as QEMU needs them."""

    arguments: list[str] = field(default_factory=list)
    """Arguments of its command line."""
    files: list[tuple[Path, int]] = field(default_factory=list)
    """Path and size of each sparse file that must exist before it starts."""


@dataclass
class _Device:
    name: str
    properties: dict[str, str]

    def argument(self) -> str:
        """Its argument of ``-device``."""
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.properties.items())])


def qemu_devices(
    specs: Sequence[str],
    directory: Path,
    *,
    root_ports: bool,
    is_pci: Callable[[str], bool],
    southbridge: bool = False,
) -> QemuDevices:
    """Give each device its defaults and an address, in the order of ``specs``; files are below ``directory``.

    A device without an address is placed behind a PCIe root port of its own (``root_ports``), or on bus 0, in
    consecutive slots from 04 on. ``southbridge``: slot 14 has an ISA bridge, unless a device is there. Raises
    ``LabError`` for an invalid device, or one whose DMA the emulated IOMMU would not translate.
    """
    devices = [_parse(spec) for spec in specs]
    result = QemuDevices()
    used = _used_slots(devices)
    if southbridge and SOUTHBRIDGE not in used:
        result.arguments += _SOUTHBRIDGE
        used.add(SOUTHBRIDGE)
    free = iter([slot for slot in range(FIRST_SLOT, LAST_SLOT + 1) if slot not in used])
    ports = {device.properties.get("id") for device in devices if device.name in EXPRESS_PORTS}
    for number, device in enumerate(devices):
        if not root_ports and device.properties.get("bus") in ports - {None}:
            raise LabError(
                f"{device.name} is behind a PCIe port, and this QEMU's IOMMU does not translate its DMA",
                "use --qemu modern, or a pci-bridge",
            )
        children = _add_backend(device, number, directory, result)
        if not {"bus", "addr"} & device.properties.keys() and is_pci(device.name):
            slot = next(free, None)
            if slot is None:
                raise LabError("too many devices for bus 0", "put some behind a pci-bridge (bus=ID,addr=SLOT)")
            if root_ports and device.name not in BRIDGES:
                result.arguments += [
                    "-device",
                    f"pcie-root-port,id=lab-port{slot:02x},chassis={slot},slot={slot},addr={slot:02x}.0",
                ]
                device.properties["bus"] = f"lab-port{slot:02x}"
            else:
                device.properties |= {"bus": "pcie.0", "addr": f"{slot:02x}.0"}
        elif "addr" in device.properties and "bus" not in device.properties:
            device.properties["bus"] = "pcie.0"
        for each in (device, *children):
            result.arguments += ["-device", each.argument()]
    return result


def _parse(spec: str) -> _Device:
    name, *words = re.split(r"(?<!,),(?!,)", spec)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise LabError(f"{spec!r} is not a device", "write NAME[,PROPERTY=VALUE…], such as edu or nvme,size=1G")
    properties: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or key in properties:
            raise LabError(f"device {spec!r}: property {word!r} is empty or repeated")
        properties[key] = value if equals else "on"
    return _Device(name, properties)


def _used_slots(devices: Sequence[_Device]) -> set[int]:
    return {
        int(device.properties["addr"].split(".")[0], 16)
        for device in devices
        if device.properties.get("bus", "pcie.0") == "pcie.0"
        and re.fullmatch(r"(0x)?[0-9a-fA-F]+(\.[0-7])?", device.properties.get("addr", ""))
    }


def _add_backend(device: _Device, number: int, directory: Path, result: QemuDevices) -> list[_Device]:
    """Add a device's back end (a drive, a network, shared memory) and useful defaults.

    Returns devices that must come after it.
    """
    children = []
    properties = device.properties
    if device.name == "ahci":
        disk = _move(properties, "size", "file", "drive")
        disk["bus"] = properties.setdefault("id", f"lab-ahci{number}") + ".0"
        _add_drive(disk, number, directory, result)
        children.append(_Device("ide-hd", disk))
    elif device.name == "nvme" and "subsys" in properties and "drive" not in properties:
        # A controller in a subsystem accepts its namespaces as devices only.
        disk = _move(properties, "size", "file")
        disk["bus"] = properties.setdefault("id", f"lab-nvme{number}")
        _add_drive(disk, number, directory, result)
        children.append(_Device("nvme-ns", disk))
    elif device.name in DRIVES:
        _add_drive(properties, number, directory, result)
    elif device.name in NETWORK:
        if "netdev" not in properties:
            # One hub for all: the network devices of a lab are connected.
            result.arguments += ["-netdev", f"hubport,id=lab-net{number},hubid=0"]
            properties["netdev"] = f"lab-net{number}"
        properties.setdefault("romfile", "")
    elif device.name == "edu":
        properties.setdefault("dma_mask", "0xffffffffffffffff")
    elif device.name == "ivshmem-plain" and "memdev" not in properties:
        size = parse_size(properties.pop("size", "16M"))
        # reserve=off: memory that is never written to is not reserved.
        memory = f"memory-backend-ram,id=lab-memory{number},size={size},share=on,reserve=off"
        result.arguments += ["-object", memory]
        properties["memdev"] = f"lab-memory{number}"
    if device.name == "nvme":
        properties.setdefault("serial", f"LAB{number:05d}")
    if device.name.startswith("virtio-") and "-pci" in device.name:
        # Without it a virtio device bypasses the IOMMU. It excludes the legacy interface.
        properties.setdefault("iommu_platform", "on")
        if device.name.endswith("-pci") and properties["iommu_platform"] == "on":
            properties.setdefault("disable-legacy", "on")
    return children


def _move(properties: dict[str, str], *names: str) -> dict[str, str]:
    return {name: properties.pop(name) for name in names if name in properties}


def _add_drive(properties: dict[str, str], number: int, directory: Path, result: QemuDevices) -> None:
    """Add a drive made of ``file`` or ``size``, unless the device has one (QEMU's ``drive``)."""
    if "drive" in properties:
        return
    size = parse_size(properties.pop("size", "64M"))
    if "file" in properties:
        path = Path(properties.pop("file").replace(",,", ",")).absolute()
        if not path.exists():
            raise LabError(f"{path}: no such drive file")
    else:
        path = directory / f"drive{number}.raw"
        result.files.append((path, size))
    properties["drive"] = f"lab-drive{number}"
    result.arguments += ["-drive", f"if=none,id=lab-drive{number},format=raw,file={quote(path)}"]


def quote(path: Path) -> str:
    """Return a path as a value in QEMU's comma-separated arguments."""
    return str(path).replace(",", ",,")
