"""Capabilities of a function, from its configuration space: interrupts, reset, power, ATS/PRI/PASID, ACS.

Read from ``config`` in sysfs; non-root users see the first 64 bytes only. Sources of offsets and bits:
include/uapi/linux/pci_regs.h; PCI Express base specification 5.0, the sections named at each reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmpass import pciregs
from kvmpass._dataclass import dataclass, replace
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs
from kvmpass.pciregs import MsiRegisters, MsixRegisters, Read

# Source validation, translation blocking, request and completion redirect, upstream forwarding, egress control,
# direct translated; from bit 0 on.
ACS_BITS = ("SV", "TB", "RR", "CR", "UF", "EC", "DT")

EXPRESS_TYPES = {
    0x0: "endpoint",
    0x1: "legacy endpoint",
    0x4: "root port",
    0x5: "switch upstream port",
    0x6: "switch downstream port",
    0x7: "PCIe to PCI bridge",
    0x8: "PCI to PCIe bridge",
    0x9: "integrated endpoint",
    0xA: "root complex event collector",
}

# PCI Code and ID Assignment Specification, sections 2 and 3: capabilities that are shown by name only.
_NAMES = {
    0x02: "AGP",
    pciregs.CAP_VPD: "VPD",
    0x04: "slot identification",
    0x06: "CompactPCI hot swap",
    0x07: "PCI-X",
    0x08: "HyperTransport",
    pciregs.CAP_VENDOR: "vendor-specific",
    0x0A: "debug port",
    0x0C: "hot plug",
    0x0D: "bridge subsystem ids",
    0x0F: "secure device",
    pciregs.CAP_SATA: "SATA",
    0x14: "enhanced allocation",
}
_EXTENDED_NAMES = {
    0x02: "virtual channel",
    pciregs.EXT_SERIAL_NUMBER: "serial number",
    pciregs.EXT_POWER_BUDGETING: "power budgeting",
    pciregs.EXT_VENDOR: "vendor-specific",
    0x0E: "ARI",
    0x12: "multicast",
    0x15: "resizable BAR",
    0x16: "dynamic power allocation",
    0x17: "TPH",
    0x18: "LTR",
    0x19: "secondary PCIe",
    0x1D: "DPC",
    0x1E: "L1 substates",
    0x1F: "PTM",
    pciregs.EXT_DESIGNATED_VENDOR: "designated vendor-specific",
    0x24: "VF resizable BAR",
    0x25: "data link feature",
    0x26: "16 GT/s",
    0x27: "lane margining",
    0x2A: "32 GT/s",
    0x2E: "DOE",
}


@dataclass(frozen=True, slots=True)
class Express:
    """The PCI Express capability."""

    kind: str
    """Device/port type as text, one of :data:`EXPRESS_TYPES`."""
    flr: bool
    """Function Level Reset is supported."""
    slot: bool
    """The port is connected to a slot."""


@dataclass(frozen=True, slots=True)
class Power:
    """The power management capability."""

    states: tuple[str, ...]
    """Supported states (``D0`` … ``D3hot``)."""
    pme_states: tuple[str, ...]
    """States in which the function can assert PME#."""
    no_soft_reset: bool
    """D3hot to D0 does not reset the function."""


@dataclass(frozen=True, slots=True)
class SriovRegisters:
    """The SR-IOV capability of a physical function (PF); VF: virtual function."""

    total: int
    """TotalVFs."""
    initial: int
    """InitialVFs."""
    enabled: int
    """NumVFs if VF Enable is set, else 0."""
    first_offset: int
    """First VF Offset: routing ID of the first VF, relative to the PF's."""
    stride: int
    """VF Stride: distance between the routing IDs of two VFs."""
    device: int
    """VF Device ID."""


@dataclass(frozen=True, slots=True)
class Ats:
    """Address Translation Services."""

    enabled: bool
    """Whether it is enabled."""
    queue_depth: int
    """Invalidate Queue Depth: 1 to 32."""


@dataclass(frozen=True, slots=True)
class Pri:
    """Page Request Interface."""

    enabled: bool
    """Whether it is enabled."""


@dataclass(frozen=True, slots=True)
class Pasid:
    """Process Address Space ID."""

    enabled: bool
    """Whether it is enabled."""
    width: int
    """Max PASID Width, in bits."""


@dataclass(frozen=True, slots=True)
class Acs:
    """Access Control Services, by the short names of :data:`ACS_BITS`."""

    supported: tuple[str, ...]
    """Bits of the ACS Capability register."""
    enabled: tuple[str, ...]
    """Bits of the ACS Control register."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities of a function; None for a capability that it does not have."""

    readable: bool
    """False for non-root users, and for a device that does not respond; then the capabilities are unknown."""
    responds: bool
    """False if all bytes read as ones: the device is powered off, or gone."""
    memory_enabled: bool
    """Memory Space Enable, in the Command register."""
    io_enabled: bool
    """I/O Space Enable."""
    bus_master: bool
    """Bus Master Enable."""
    multifunction: bool
    """The device has several functions (Header Type, bit 7)."""
    msi: MsiRegisters | None = None
    """MSI."""
    msix: MsixRegisters | None = None
    """MSI-X."""
    express: Express | None = None
    """PCI Express."""
    advanced_flr: bool = False
    """Function Level Reset by the Advanced Features capability of conventional PCI."""
    power: Power | None = None
    """Power management."""
    sriov: SriovRegisters | None = None
    """SR-IOV, of a physical function."""
    ats: Ats | None = None
    """Address Translation Services."""
    pri: Pri | None = None
    """Page Request Interface."""
    pasid: Pasid | None = None
    """Process Address Space ID."""
    acs: Acs | None = None
    """Access Control Services."""
    aer: bool = False
    """Advanced Error Reporting."""
    others: tuple[str, ...] = ()
    """Names of all other capabilities; the number for one without a name."""


def read_config(sysfs: Sysfs, bdf: Bdf) -> bytes:
    """Return the readable part of configuration space: 0, 64, 256 or 4096 bytes."""
    try:
        return sysfs.data(PCI_DEVICES, str(bdf), "config")
    except OSError:
        return b""


def capabilities_of(sysfs: Sysfs, bdf: Bdf) -> Capabilities:
    """Return the capabilities of a function. Reading them resumes a suspended device."""
    return decode(read_config(sysfs, bdf))


def decode(space: bytes) -> Capabilities:
    """Decode configuration space. Raises nothing: bytes beyond the end of ``space`` read as zero."""

    def read(offset: int, size: int) -> int:
        return int.from_bytes(space[offset : offset + size], "little")

    responds = bool(space.strip(b"\xff"))
    command = read(pciregs.COMMAND, 2) if responds else 0
    header = Capabilities(
        readable=responds and len(space) > pciregs.HEADER_SIZE,
        responds=responds,
        memory_enabled=bool(command & pciregs.COMMAND_MEMORY),
        io_enabled=bool(command & pciregs.COMMAND_IO),
        bus_master=bool(command & pciregs.COMMAND_MASTER),
        multifunction=responds and bool(read(pciregs.HEADER_TYPE, 1) & pciregs.MULTIFUNCTION),
    )
    if not header.readable:
        return header
    lists = [(pciregs.capabilities(read), _DECODED, _NAMES, "capability {:#04x}")]
    if len(space) > pciregs.CONVENTIONAL_SIZE:
        more = [capability for capability in pciregs.extended_capabilities(read) if capability.id]
        lists.append((more, _EXTENDED, _EXTENDED_NAMES, "extended capability {:#06x}"))
    decoded: dict[str, Any] = {}
    others = []
    for found, readers, names, unknown in lists:
        for capability in found:
            if capability.id in readers:
                name, reader = readers[capability.id]
                decoded.setdefault(name, reader(read, capability.offset))  # of several the first counts
            else:
                others.append(names.get(capability.id, unknown.format(capability.id)))
    return replace(header, **decoded, others=tuple(dict.fromkeys(others)))


def _express(read: Read, at: int) -> Express:
    """Capabilities register: 7.5.3.2; device capabilities: 7.5.3.3."""
    flags = read(at + 2, 2)
    kind = EXPRESS_TYPES.get(flags >> 4 & 0xF, f"type {flags >> 4 & 0xF:#x}")
    return Express(kind, bool(read(at + 4, 4) >> 28 & 1), bool(flags & 0x100))


def _advanced_flr(read: Read, at: int) -> bool:
    """Return whether a function has FLR without PCI Express (Advanced Capabilities for Conventional PCI, 3)."""
    return bool(read(at + 3, 1) & 0b10)


def _power(read: Read, at: int) -> Power:
    """Capabilities: 7.5.2.1; control: 7.5.2.2. Every function has D0 and D3hot."""
    control = read(at + 2, 2)
    states = ["D0", *(["D1"] if control & 0x200 else []), *(["D2"] if control & 0x400 else []), "D3hot"]
    wakes = [name for bit, name in enumerate(("D0", "D1", "D2", "D3hot", "D3cold")) if control >> (11 + bit) & 1]
    return Power(tuple(states), tuple(wakes), bool(read(at + 4, 2) & 8))


def _sriov(read: Read, at: int) -> SriovRegisters:
    """9.3.3."""
    enabled = read(at + 0x10, 2) if read(at + 8, 2) & 1 else 0
    return SriovRegisters(
        total=read(at + 0x0E, 2),
        initial=read(at + 0x0C, 2),
        enabled=enabled,
        first_offset=read(at + 0x14, 2),
        stride=read(at + 0x16, 2),
        device=read(at + 0x1A, 2),
    )


def _ats(read: Read, at: int) -> Ats:
    """10.5.1. A queue depth of 0 stands for 32."""
    return Ats(bool(read(at + 6, 2) & 0x8000), read(at + 4, 2) & 0x1F or 32)


def _pri(read: Read, at: int) -> Pri:
    """10.5.2."""
    return Pri(bool(read(at + 4, 2) & 1))


def _pasid(read: Read, at: int) -> Pasid:
    """7.8.8."""
    return Pasid(bool(read(at + 6, 2) & 1), read(at + 4, 2) >> 8 & 0x1F)


def _acs(read: Read, at: int) -> Acs:
    """7.7.8."""

    def bits(value: int) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(ACS_BITS) if value >> bit & 1)

    return Acs(bits(read(at + 4, 2)), bits(read(at + 6, 2)))


# The field of Capabilities for each capability that is decoded, and what decodes it.
_DECODED: dict[int, tuple[str, Callable[[Read, int], Any]]] = {
    pciregs.CAP_MSI: ("msi", pciregs.msi),
    pciregs.CAP_MSIX: ("msix", pciregs.msix),
    pciregs.CAP_EXPRESS: ("express", _express),
    pciregs.CAP_ADVANCED_FEATURES: ("advanced_flr", _advanced_flr),
    pciregs.CAP_POWER: ("power", _power),
}
_EXTENDED: dict[int, tuple[str, Callable[[Read, int], Any]]] = {
    pciregs.EXT_SRIOV: ("sriov", _sriov),
    pciregs.EXT_ATS: ("ats", _ats),
    pciregs.EXT_PRI: ("pri", _pri),
    pciregs.EXT_PASID: ("pasid", _pasid),
    pciregs.EXT_ACS: ("acs", _acs),
    pciregs.EXT_AER: ("aer", lambda read, at: True),
}
