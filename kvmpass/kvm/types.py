"""Values that KVM's ioctls exchange (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from enum import IntEnum

from kvmpass._dataclass import dataclass
from kvmpass._native import lib


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One leaf of the guest's CPUID (struct kvm_cpuid_entry2)."""

    function: int
    """EAX of the query."""
    index: int
    """ECX of the query, where ``flags`` says that it matters."""
    flags: int
    """``KVM_CPUID_FLAG_…``."""
    eax: int
    """EAX of the answer."""
    ebx: int
    """EBX of the answer."""
    ecx: int
    """ECX of the answer."""
    edx: int
    """EDX of the answer."""


class Capability(IntEnum):
    """A capability that is used here, and what its value is where it is present (virt/kvm/api.rst, 4.4)."""

    MAX_VCPUS = lib.KVM_CAP_MAX_VCPUS
    """Number of vCPUs that a VM can have."""
    IRQ_ROUTING = lib.KVM_CAP_IRQ_ROUTING
    """Number of entries of a routing table."""
    COALESCED_PIO = lib.KVM_CAP_COALESCED_PIO
    """1."""
