"""CPUID leaves of the guest."""

from __future__ import annotations

import pytest

from kvmpass.boot.cpuid import guest_cpuid
from kvmpass.errors import HostNotReady
from kvmpass.kvm.types import CpuidEntry

SIGNATURE = (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)


def leaf(function: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0, index: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, 1 if index else 0, eax, ebx, ecx, edx)


SUPPORTED = [
    leaf(0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    leaf(1, 0x00A00F11, 0x07100800, 0x76F8320B, 0x178BFBFF),
    leaf(7, 0, 0x219C91A9),
    leaf(0xB, 1, 2, 0x100, 7),
    leaf(0xB, 4, 16, 0x201, 7, index=1),
    leaf(0x40000000, *SIGNATURE),
    leaf(0x40000001, 0x01007EFB),
    leaf(0x80000000, 0x80000023),
    leaf(0x80000001, 0x00A00F11, 0, 0x75C237FF, 0x2FD3FBFF),
    leaf(0x80000008, 0x3030, 0, 0x400F),
    leaf(0x8000000A, 1, 8, 0, 0xFF),
    leaf(0x8000001D, 0x00004121, 0x01C0003F, 0x3F),
    leaf(0x8000001D, 0x0003C163, 0x03C0003F, 0x7FFF, 1, index=3),
    leaf(0x8000001E, 7, 0x103),
    leaf(0x8000001F, 0x1),
    leaf(0x80000026, 1),
]


def made(cpu: int, cpus: int) -> dict[tuple[int, int], CpuidEntry]:
    entries = guest_cpuid(SUPPORTED, cpu=cpu, cpus=cpus)
    keys = [(entry.function, entry.index) for entry in entries]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, entries, strict=True))


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 200])
def test_topology_agrees_in_every_leaf(cpus: int) -> None:
    identifiers = set()
    for cpu in range(cpus):
        leaves = made(cpu, cpus)
        first, extended = leaves[1, 0], leaves[0x80000008, 0]
        core = leaves[0xB, 1]
        assert first.ebx >> 24 == core.edx == leaves[0xB, 0].edx == leaves[0x8000001E, 0].eax == cpu
        assert first.ebx >> 16 & 0xFF == core.ebx == (extended.ecx & 0xFF) + 1 == cpus
        assert core.eax & 0x1F == extended.ecx >> 12 & 0xF
        assert cpu >> core.eax == 0, "one socket"
        assert leaves[0xB, 0].eax == 0, "no SMT"
        assert leaves[0x8000001E, 0].ebx >> 8 & 0xFF == 0
        assert bool(first.edx & 1 << 28) == (cpus > 1)
        assert all(leaves[0xB, index].flags == 1 for index in range(3))
        identifiers.add(core.edx)
    assert len(identifiers) == cpus


def test_cpus_share_the_third_level_of_cache() -> None:
    leaves = made(0, 4)
    assert leaves[0x8000001D, 0].eax >> 14 & 0xFFF == 0
    assert leaves[0x8000001D, 3].eax >> 14 & 0xFFF == 3
    assert leaves[0x8000001D, 3].eax & 0x3FFF == 0x0163


def test_timers_and_hypervisor() -> None:
    leaves = made(1, 2)
    for bit in (21, 24, 31):
        assert leaves[1, 0].ecx & 1 << bit
    assert leaves[6, 0].eax & 1 << 2, "without ARAT Linux wants a PIT"
    assert leaves[0x40000000, 0] == SUPPORTED[5]
    assert leaves[0x40000001, 0] == SUPPORTED[6]
    assert leaves[7, 0] == SUPPORTED[2]


def test_hidden_leaves() -> None:
    leaves = made(0, 2)
    assert not leaves[0x80000001, 0].ecx & 1 << 2
    assert not {(0x8000000A, 0), (0x8000001F, 0), (0x80000026, 0)} & set(leaves)
    assert leaves[0x80000008, 0].eax == 0x3030, "the host's address widths"


def test_a_list_without_kvms_leaves_is_refused() -> None:
    with pytest.raises(HostNotReady):
        guest_cpuid([leaf(0), leaf(1)], cpu=0, cpus=1)
