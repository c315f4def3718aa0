"""What a function's configuration space says of it: interrupts, resets, power, translation services, isolation.

Read from ``config`` in sysfs, of which only root sees more than the first 64 bytes. Sources of offsets and bits:
include/uapi/linux/pci_regs.h; PCI Express base specification 5.0, the sections named at each reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from kvmpass import pciregs
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs
from kvmpass.pciregs import Capability, MsiRegisters, MsixRegisters, Read

_T = TypeVar("_T")

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

# PCI Code and ID Assignment Specification, sections 2 and 3: what is told by its name only.
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
_READ = frozenset(
    {
        pciregs.CAP_MSI,
        pciregs.CAP_MSIX,
        pciregs.CAP_EXPRESS,
        pciregs.CAP_ADVANCED_FEATURES,
        pciregs.CAP_POWER,
    }
)
_READ_EXTENDED = frozenset(
    {pciregs.EXT_SRIOV, pciregs.EXT_ATS, pciregs.EXT_PRI, pciregs.EXT_PASID, pciregs.EXT_ACS, pciregs.EXT_AER}
)


@dataclass(frozen=True, slots=True)
class Express:
    """``kind`` is the device/port type in words; ``flr`` whether it can reset this function alone."""

    kind: str
    flr: bool
    slot: bool


@dataclass(frozen=True, slots=True)
class Power:
    """States that the function has, and from which it can wake the host (PME)."""

    states: tuple[str, ...]
    wakes_from: tuple[str, ...]
    keeps_state: bool  # No_Soft_Reset: D3hot to D0 is no reset


@dataclass(frozen=True, slots=True)
class SriovRegisters:
    """``first`` and ``stride`` give the routing ids of the virtual functions relative to the physical one."""

    total: int
    initial: int
    enabled: int
    first: int
    stride: int
    device: int


@dataclass(frozen=True, slots=True)
class Service:
    """A translation service of the device; ``detail`` is the queue depth (ATS) or the width in bits (PASID)."""

    enabled: bool
    detail: int | None = None


@dataclass(frozen=True, slots=True)
class Acs:
    """Access control services: the bits that the function has, and those that are on, by their short names."""

    supported: tuple[str, ...]
    enabled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """All None and empty where ``readable`` is false: without root, or a device that does not answer.

    ``answers`` is false where all bytes read as ones: the device is powered off, or gone.
    """

    readable: bool
    answers: bool
    memory_enabled: bool
    io_enabled: bool
    bus_master: bool
    multifunction: bool
    msi: MsiRegisters | None = None
    msix: MsixRegisters | None = None
    express: Express | None = None
    advanced_flr: bool = False
    power: Power | None = None
    sriov: SriovRegisters | None = None
    ats: Service | None = None
    pri: Service | None = None
    pasid: Service | None = None
    acs: Acs | None = None
    aer: bool = False
    others: tuple[str, ...] = ()


def read_config(sysfs: Sysfs, bdf: Bdf) -> bytes:
    """The readable part of configuration space: 0, 64, 256 or 4096 bytes."""
    try:
        return sysfs.data(PCI_DEVICES, str(bdf), "config")
    except OSError:
        return b""


def capabilities_of(sysfs: Sysfs, bdf: Bdf) -> Capabilities:
    return decode(read_config(sysfs, bdf))


def decode(space: bytes) -> Capabilities:
    """Configuration space as values. Never fails: what lies beyond the end reads as zero."""

    def read(offset: int, size: int) -> int:
        return int.from_bytes(space[offset : offset + size], "little")

    answers = bool(space.strip(b"\xff"))
    command = read(pciregs.COMMAND, 2) if answers else 0
    header = Capabilities(
        readable=answers and len(space) > pciregs.HEADER_SIZE,
        answers=answers,
        memory_enabled=bool(command & pciregs.COMMAND_MEMORY),
        io_enabled=bool(command & pciregs.COMMAND_IO),
        bus_master=bool(command & pciregs.COMMAND_MASTER),
        multifunction=answers and bool(read(pciregs.HEADER_TYPE, 1) & pciregs.MULTIFUNCTION),
    )
    if not header.readable:
        return header
    found = pciregs.capabilities(read)
    more = pciregs.extended_capabilities(read) if len(space) > pciregs.CONVENTIONAL_SIZE else []

    def plain(number: int, reader: Callable[[Read, int], _T]) -> _T | None:
        return _first(found, number, read, reader)

    def extended(number: int, reader: Callable[[Read, int], _T]) -> _T | None:
        return _first(more, number, read, reader)

    return replace(
        header,
        msi=plain(pciregs.CAP_MSI, pciregs.msi),
        msix=plain(pciregs.CAP_MSIX, pciregs.msix),
        express=plain(pciregs.CAP_EXPRESS, _express),
        advanced_flr=plain(pciregs.CAP_ADVANCED_FEATURES, _advanced_flr) or False,
        power=plain(pciregs.CAP_POWER, _power),
        sriov=extended(pciregs.EXT_SRIOV, _sriov),
        ats=extended(pciregs.EXT_ATS, _ats),
        pri=extended(pciregs.EXT_PRI, _pri),
        pasid=extended(pciregs.EXT_PASID, _pasid),
        acs=extended(pciregs.EXT_ACS, _acs),
        aer=any(one.id == pciregs.EXT_AER for one in more),
        others=_others(found, more),
    )


def _first(found: list[Capability], number: int, read: Read, reader: Callable[[Read, int], _T]) -> _T | None:
    return next((reader(read, one.offset) for one in found if one.id == number), None)


def _others(found: list[Capability], more: list[Capability]) -> tuple[str, ...]:
    """Names of what has no reader here; numbers of what has no name."""
    names = [_NAMES.get(one.id, f"capability {one.id:#04x}") for one in found if one.id not in _READ]
    names += [
        _EXTENDED_NAMES.get(one.id, f"extended capability {one.id:#06x}")
        for one in more
        if one.id not in _READ_EXTENDED and one.id
    ]
    return tuple(dict.fromkeys(names))


def _express(read: Read, at: int) -> Express:
    """Capabilities register: 7.5.3.2; device capabilities: 7.5.3.3."""
    flags = read(at + 2, 2)
    kind = EXPRESS_TYPES.get(flags >> 4 & 0xF, f"type {flags >> 4 & 0xF:#x}")
    return Express(kind, bool(read(at + 4, 4) >> 28 & 1), bool(flags & 0x100))


def _advanced_flr(read: Read, at: int) -> bool:
    """Function level reset of a conventional function (Advanced Capabilities for Conventional PCI, 3)."""
    return bool(read(at + 3, 1) & 0b10)


def _power(read: Read, at: int) -> Power:
    """Capabilities: 7.5.2.1; control: 7.5.2.2. D0 and D3hot every function has."""
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
        first=read(at + 0x14, 2),
        stride=read(at + 0x16, 2),
        device=read(at + 0x1A, 2),
    )


def _ats(read: Read, at: int) -> Service:
    """10.5.1. A queue depth of 0 stands for 32."""
    return Service(bool(read(at + 6, 2) & 0x8000), read(at + 4, 2) & 0x1F or 32)


def _pri(read: Read, at: int) -> Service:
    """10.5.2."""
    return Service(bool(read(at + 4, 2) & 1))


def _pasid(read: Read, at: int) -> Service:
    """7.8.8."""
    return Service(bool(read(at + 6, 2) & 1), read(at + 4, 2) >> 8 & 0x1F)


def _acs(read: Read, at: int) -> Acs:
    """7.7.8."""

    def bits(value: int) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(ACS_BITS) if value >> bit & 1)

    return Acs(bits(read(at + 4, 2)), bits(read(at + 6, 2)))
