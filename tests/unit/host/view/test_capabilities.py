"""Configuration spaces decoded: recorded ones, which lspci decoded too, and what no recording has."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.config_spaces import IGB, NVME, ROOT_PORT

from kvmpass.host.view.capabilities import Acs, Ats, Capabilities, Express, Pasid, Power, Pri, SriovRegisters, decode
from kvmpass.host.view.isolation import acs_state
from kvmpass.pciregs import MsiRegisters, MsixRegisters


def test_a_drive() -> None:
    own = decode(NVME)
    assert (own.readable, own.responds, own.memory_enabled, own.bus_master) == (True, True, True, True)
    assert own.msi is None
    assert own.msix == MsixRegisters(63, True, 0, 0x2000, 0, 0x3000)
    assert own.express == Express("endpoint", flr=True, slot=False)
    assert own.power == Power(("D0", "D3hot"), (), no_soft_reset=True)
    assert own.sriov == SriovRegisters(total=2, initial=2, enabled=0, first_offset=1, stride=1, device=0x0010)
    assert (own.aer, own.acs, own.others) == (False, None, ("ARI",))


def test_a_network_card() -> None:
    own = decode(IGB)
    assert own.msi == MsiRegisters(1, enabled=False, address64=True, maskable=True)
    assert own.msix == MsixRegisters(10, True, 3, 0, 3, 0x2000)
    assert own.power == Power(("D0", "D3hot"), (), no_soft_reset=False)
    assert own.sriov == SriovRegisters(total=8, initial=8, enabled=0, first_offset=128, stride=2, device=0x10CA)
    assert own.aer


def test_a_root_port() -> None:
    own = decode(ROOT_PORT)
    assert own.express == Express("root port", flr=False, slot=True)
    assert own.acs == Acs(("SV", "TB", "RR", "CR", "UF", "DT"), ("SV", "RR", "CR", "UF"))
    assert own.others == ("bridge subsystem ids",)
    assert acs_state(own) == (True, ())


@pytest.mark.parametrize("size", [0, 64])
def test_what_a_user_without_rights_reads(size: int) -> None:
    own = decode(NVME[:size])
    assert not own.readable
    assert own.msix is None and own.express is None and own.others == ()
    assert own.memory_enabled == (size == 64), "the header is there"
    assert own.responds == (size == 64)


def test_a_device_that_is_off() -> None:
    own = decode(b"\xff" * 4096)
    assert not own.responds and not own.readable and not own.bus_master and not own.multifunction


def test_conventional_space_only() -> None:
    own = decode(NVME[:256])
    assert own.readable and own.msix is not None
    assert own.sriov is None, "it lies beyond"


def build(*capabilities: tuple[int, bytes], extended: tuple[tuple[int, bytes], ...] = ()) -> bytes:
    """A header, then capabilities (identifier, what follows the two bytes of the list), then extended ones."""
    space = bytearray(4096)
    struct.pack_into("<HHHH", space, 0, 0x1022, 0x1234, 0x2, 0x10)
    at, pointer = 0x40, 0x34
    for number, body in capabilities:
        space[pointer] = at
        space[at : at + 2 + len(body)] = bytes([number, 0]) + body
        pointer, at = at + 1, at + (2 + len(body) + 3) // 4 * 4
    at = 0x100
    for index, (number, body) in enumerate(extended):
        size = (4 + len(body) + 3) // 4 * 4
        after = at + size if index + 1 < len(extended) else 0
        struct.pack_into("<I", space, at, number | 1 << 16 | after << 20)
        space[at + 4 : at + 4 + len(body)] = body
        at += size
    return bytes(space)


def test_translation_services() -> None:
    """Bits by include/uapi/linux/pci_regs.h: PCI_ATS_CTRL_ENABLE, PCI_PRI_CTRL_ENABLE, PCI_PASID_CTRL_ENABLE."""
    ats = struct.pack("<HH", 0x0000, 0x8000)
    pri = struct.pack("<HH", 0x0001, 0)
    pasid = struct.pack("<HH", 0x1006, 0x0000)
    own = decode(build(extended=((0x0F, ats), (0x13, pri), (0x1B, pasid))))
    assert own.ats == Ats(True, 32)
    assert own.pri == Pri(True)
    assert own.pasid == Pasid(False, 16)


def test_a_conventional_function() -> None:
    """Multiple vectors, wake-up from D3, an FLR in the advanced features, and what has no name."""
    msi = struct.pack("<HIH", 5 << 1 | 1, 0, 0)
    power = struct.pack("<HH", 0x0200 | 0xC800, 0)
    af = bytes([6, 0b11, 0, 0])
    own = decode(build((0x05, msi), (0x01, power), (0x13, af), (0x42, b"\0\0"), extended=((0x77, b""),)))
    assert own.msi == MsiRegisters(32, enabled=True, address64=False, maskable=False)
    assert own.power == Power(("D0", "D1", "D3hot"), ("D0", "D3hot", "D3cold"), no_soft_reset=False)
    assert own.advanced_flr
    assert own.express is None
    assert own.others == ("capability 0x42", "extended capability 0x0077")


@given(st.binary(max_size=4096))
def test_whatever_a_device_answers_is_decoded(space: bytes) -> None:
    assert isinstance(decode(space), Capabilities)


def bridge(kind: int, supported: int | None, enabled: int = 0) -> Capabilities:
    acs = () if supported is None else ((0x0D, struct.pack("<HH", supported, enabled)),)
    return decode(build((0x10, struct.pack("<H", kind << 4 | 2) + bytes(32)), extended=acs))


@pytest.mark.parametrize(
    "own, state",
    [
        (bridge(4, 0x5F, 0x1D), (True, ())),
        (bridge(4, 0x5F, 0x05), (False, ("CR", "UF"))),
        (bridge(4, 0x01, 0x01), (True, ())),  # what a port does not have counts as on: pci_acs_flags_enabled
        (bridge(4, None), (False, ())),
        (bridge(6, 0x1D, 0x1D), (True, ())),
        (bridge(5, None), (None, ())),
        (bridge(7, 0x1D, 0x1D), (False, ())),
        (decode(build()), (False, ())),
        (decode(b""), (None, ())),
    ],
)
def test_what_a_bridge_isolates(own: Capabilities, state: tuple[bool | None, tuple[str, ...]]) -> None:
    assert acs_state(own) == state
