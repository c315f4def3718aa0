"""A vCPU's buffer of collected writes, which KVM fills (struct kvm_coalesced_mmio_ring)."""

from __future__ import annotations

import struct
from typing import Any

from kvmpass.kvm import Vcpu
from tests.support.bare import bare

ENTRIES = 170  # KVM_COALESCED_MMIO_MAX: (4096 - 8) / 24


def vcpu_with(ring: bytearray) -> Any:
    view = memoryview(ring)
    return bare(Vcpu, _ring=view, _ring_ends=view[:8].cast("I"))


def put(ring: bytearray, is_port: bool, address: int, data: bytes) -> None:
    """What KVM does (virt/kvm/coalesced_mmio.c)."""
    last = struct.unpack_from("=I", ring, 4)[0]
    struct.pack_into("=QII8s", ring, 8 + 24 * last, address, len(data), is_port, data.ljust(8, b"\xaa"))
    struct.pack_into("=I", ring, 4, (last + 1) % ENTRIES)


def test_writes_come_in_order_and_once_also_across_the_end() -> None:
    ring = bytearray(4096)
    vcpu = vcpu_with(ring)
    assert list(vcpu.coalesced_writes()) == []
    expected = []
    for number in range(1000):
        expected.append((number % 5 > 0, 0xCF8 + number % 4, bytes([number & 0xFF]) * (1 << number % 3)))
        put(ring, *expected[-1])
        if number % 7 == 6:
            assert list(vcpu.coalesced_writes()) == expected
            expected = []
    assert struct.unpack_from("=II", ring) == (994 % ENTRIES, 1000 % ENTRIES)


def test_a_guest_that_writes_on_is_not_waited_for() -> None:
    """Another vCPU adds a write for each that is taken."""
    ring = bytearray(4096)
    vcpu = vcpu_with(ring)
    put(ring, True, 0xCF8, b"abcd")
    taken = 0
    for _ in vcpu.coalesced_writes():
        put(ring, True, 0xCF8, b"abcd")
        taken += 1
    assert taken == ENTRIES
