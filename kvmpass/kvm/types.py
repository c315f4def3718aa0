"""Values that KVM's ioctls exchange (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One leaf of the guest's CPUID (struct kvm_cpuid_entry2)."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int
