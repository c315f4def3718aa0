"""Which capabilities of an assigned function the guest sees, and their lists without the hidden ones.

Passed through: what VFIO virtualises or protects. Emulated: MSI and MSI-X, whose messages are the guest's. Hidden:
what belongs to the host (SR-IOV, ATS, PRI, PASID: translation is the host's), what describes the device's place in a
fabric that the guest does not see (ACS, ARI, VC, L1 substates, LTR, DPC, PTM), what moves or resizes BARs (EA,
resizable BARs), and unknown ones.
"""

from __future__ import annotations

from kvmpass import pciregs
from kvmpass.layout import Range
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pciregs import Capability

_SHOWN = frozenset(
    {
        pciregs.CAP_POWER,
        pciregs.CAP_VPD,
        pciregs.CAP_MSI,
        pciregs.CAP_VENDOR,
        pciregs.CAP_EXPRESS,
        pciregs.CAP_MSIX,
        pciregs.CAP_SATA,
        pciregs.CAP_ADVANCED_FEATURES,
    }
)
_SHOWN_EXTENDED = frozenset(
    {
        pciregs.EXT_AER,
        pciregs.EXT_SERIAL_NUMBER,
        pciregs.EXT_POWER_BUDGETING,
        pciregs.EXT_VENDOR,
        pciregs.EXT_DESIGNATED_VENDOR,
    }
)

_SIZES = {pciregs.CAP_POWER: 8, pciregs.CAP_MSIX: 12, pciregs.CAP_EXPRESS: 4}
_EXPRESS_TYPE_MASK, _EXPRESS_ROOT_COMPLEX_ENDPOINT = 0xF0, 0x90
_EXPRESS_ENDPOINTS = (0x00, 0x10)
_EXPRESS_LINK_REGISTERS = (Range(0x0C, 8), Range(0x2C, 8))  # capabilities, control, status; 1 and 2


def link(space: ConfigSpace, found: list[Capability], absent: frozenset[int] = frozenset()) -> dict[int, int]:
    """Link the shown capabilities in the order of ``found`` and hide the others. Return offsets by identifier.

    ``absent``: identifiers that this function cannot have. Without an entry the pointer is zero. A capability whose
    registers overlap the next one, or the end of the space, is hidden, as devices may have any contents.
    """
    shown: dict[int, int] = {}
    pointer = pciregs.CAPABILITIES
    space.emulate(pointer, b"\0")
    for capability in found:
        at = capability.offset
        again = capability.id in shown and capability.id != pciregs.CAP_VENDOR
        cut = capability.end - at < _size(space, capability)
        if capability.id not in _SHOWN or capability.id in absent or again or cut:
            space.emulate(at, bytes(capability.end - at))
            continue
        space.emulate(at, bytes([capability.id, 0]))
        space.set(pointer, at, 1)
        pointer = at + 1
        shown.setdefault(capability.id, at)
    return shown


def _size(space: ConfigSpace, capability: Capability) -> int:
    """Bytes of the registers that are emulated or read here; 2 for capabilities that are passed through."""
    if capability.id != pciregs.CAP_MSI:
        return _SIZES.get(capability.id, 2)
    if capability.offset + 4 > pciregs.CONVENTIONAL_SIZE:
        return 4
    return pciregs.msi(space.device_int, capability.offset).size


def link_extended(space: ConfigSpace, found: list[Capability]) -> None:
    """Link the shown extended capabilities and hide the others; a null capability replaces a hidden one at 0x100."""
    shown = [cap for cap in found if cap.id in _SHOWN_EXTENDED]
    for capability in found:
        if capability not in shown:
            space.emulate(capability.offset, bytes(capability.end - capability.offset))
    if not found or not shown:
        if space.device_size > pciregs.CONVENTIONAL_SIZE:
            space.emulate(pciregs.CONVENTIONAL_SIZE, bytes(4))
        return
    chain = shown if shown[0].offset == pciregs.CONVENTIONAL_SIZE else [_NULL, *shown]
    for capability, following in zip(chain, [*chain[1:], None], strict=True):
        after = following.offset if following else 0
        header = capability.id | capability.version << 16 | after << 20
        space.emulate(capability.offset, header.to_bytes(4, "little"))


_NULL = Capability(0, pciregs.CONVENTIONAL_SIZE, pciregs.CONVENTIONAL_SIZE + 4, 1)


def unlink_express(space: ConfigSpace, at: int) -> None:
    """Hide the link registers of the capability at ``at``: on the root bus an endpoint is an integrated one.

    PCI Express base, section 7.5.3: registers of version 2 capabilities end at 0x3c.
    """
    flags = space.device_int(at + 2, 2)
    size = min(0x3C if flags & 0xF >= 2 else 0x14, pciregs.CONVENTIONAL_SIZE - at)
    if flags & _EXPRESS_TYPE_MASK in _EXPRESS_ENDPOINTS:
        flags = flags & ~_EXPRESS_TYPE_MASK | _EXPRESS_ROOT_COMPLEX_ENDPOINT
        for registers in _EXPRESS_LINK_REGISTERS:
            if registers.end <= size:
                space.emulate(at + registers.start, bytes(registers.size))
    space.emulate(at + 2, flags.to_bytes(2, "little"))
