"""Values that KVM's ioctls exchange (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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
    """A capability of KVM (Documentation/virt/kvm/api.rst, 4.4), and what its value is where it is present."""

    NR_MEMSLOTS = lib.KVM_CAP_NR_MEMSLOTS
    """Number of memslots that a VM can have."""
    NR_VCPUS = lib.KVM_CAP_NR_VCPUS
    """Recommended maximum number of vCPUs."""
    MAX_VCPUS = lib.KVM_CAP_MAX_VCPUS
    """Number of vCPUs that a VM can have."""
    IRQCHIP = lib.KVM_CAP_IRQCHIP
    """1: in-kernel interrupt controllers."""
    IRQ_ROUTING = lib.KVM_CAP_IRQ_ROUTING
    """Number of entries of a routing table."""
    IRQFD = lib.KVM_CAP_IRQFD
    """1: interrupts from eventfds."""
    READONLY_MEM = lib.KVM_CAP_READONLY_MEM
    """1: read-only memslots."""
    IMMEDIATE_EXIT = lib.KVM_CAP_IMMEDIATE_EXIT
    """1: ``immediate_exit`` in ``struct kvm_run``."""
    TSC_DEADLINE_TIMER = lib.KVM_CAP_TSC_DEADLINE_TIMER
    """1: TSC-deadline mode of the local APIC's timer."""
    X2APIC_API = lib.KVM_CAP_X2APIC_API
    """Flags ``KVM_X2APIC_API_…``: 32-bit APIC ids in interrupts."""
