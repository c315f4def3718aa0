"""Values that KVM's ioctls exchange (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvmpass._native import lib


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


class Capability(IntEnum):
    """What ``check_extension`` asks for (Documentation/virt/kvm/api.rst, 4.4): 0 if absent, else what is said."""

    NR_MEMSLOTS = lib.KVM_CAP_NR_MEMSLOTS
    """Memslots of a VM."""
    NR_VCPUS = lib.KVM_CAP_NR_VCPUS
    """vCPUs that are recommended for a VM."""
    MAX_VCPUS = lib.KVM_CAP_MAX_VCPUS
    """vCPUs that a VM can have."""
    IRQCHIP = lib.KVM_CAP_IRQCHIP
    """Interrupt controllers in the kernel."""
    IRQ_ROUTING = lib.KVM_CAP_IRQ_ROUTING
    """Entries of a routing table."""
    IRQFD = lib.KVM_CAP_IRQFD
    """Interrupts from eventfds."""
    READONLY_MEM = lib.KVM_CAP_READONLY_MEM
    """Memslots that a guest cannot write."""
    IMMEDIATE_EXIT = lib.KVM_CAP_IMMEDIATE_EXIT
    """``immediate_exit`` in ``struct kvm_run``."""
    TSC_DEADLINE_TIMER = lib.KVM_CAP_TSC_DEADLINE_TIMER
    """The local APIC's timer has the TSC-deadline mode."""
    X2APIC_API = lib.KVM_CAP_X2APIC_API
    """Flags of KVM_X2APIC_API: interrupts with APIC ids of 32 bits."""
