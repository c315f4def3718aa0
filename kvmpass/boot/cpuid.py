"""The guest's CPUID: the leaves that KVM supports, with the guest's topology (AMD64 manual volume 3, appendix E).

One socket, ``cpus`` cores, one thread each; APIC ID = CPU number. Leaves without topology are KVM's, its own
(Documentation/virt/kvm/x86/cpuid.rst) among them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmpass._dataclass import replace
from kvmpass.errors import HostNotReady
from kvmpass.kvm.types import CpuidEntry

SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

KVM_SIGNATURE_LEAF = 0x4000_0000

X2APIC, TSC_DEADLINE, HYPERVISOR = 1 << 21, 1 << 24, 1 << 31  # 1.ECX
HTT = 1 << 28  # 1.EDX: more than one logical processor
ARAT = 1 << 2  # 6.EAX: the APIC timer never stops
CMP_LEGACY, SVM, NODEID_MSR = 1 << 1, 1 << 2, 1 << 19  # 8000_0001.ECX

# Leaves with the host's topology; SVM and encrypted memory, which the guest does not have. Leaves B and 8000_001E are
# written again; 1F and 8000_0026 extend B.
DROPPED = frozenset({0x0B, 0x1F, 0x8000_000A, 0x8000_001E, 0x8000_001F, 0x8000_0026})


def guest_cpuid(supported: Sequence[CpuidEntry], *, cpu: int, cpus: int) -> list[CpuidEntry]:
    """Return the entries for KVM_SET_CPUID2 of CPU ``cpu`` (from 0) of ``cpus``.

    ``supported``: from KVM_GET_SUPPORTED_CPUID. The TSC-deadline timer is set although that never lists it; the
    caller provides an in-kernel APIC and KVM_CAP_TSC_DEADLINE_TIMER. Raises ``HostNotReady`` without KVM's signature.
    """
    width = (cpus - 1).bit_length()
    leaves = {(entry.function, entry.index): entry for entry in supported if entry.function not in DROPPED}
    if (KVM_SIGNATURE_LEAF, 0) not in leaves or (1, 0) not in leaves:
        raise HostNotReady("KVM reports no CPUID leaves of its own: this is no KVM that Linux would recognise")
    leaves.setdefault((6, 0), CpuidEntry(6, 0, 0, 0, 0, 0, 0))
    for key, entry in leaves.items():
        match entry.function:
            case 0:
                leaves[key] = replace(entry, eax=max(entry.eax, 0xB))
            case 1:
                leaves[key] = replace(
                    entry,
                    ebx=entry.ebx & 0xFFFF | min(cpus, 255) << 16 | (cpu & 0xFF) << 24,
                    ecx=entry.ecx | X2APIC | TSC_DEADLINE | HYPERVISOR,
                    edx=entry.edx | HTT if cpus > 1 else entry.edx & ~HTT,
                )
            case 4 | 0x8000_001D:
                leaves[key] = _cache(entry, cpus, width)
            case 6:
                leaves[key] = replace(entry, eax=entry.eax | ARAT)
            case 0x8000_0001:
                hidden = NODEID_MSR | CMP_LEGACY | SVM
                leaves[key] = replace(entry, ecx=entry.ecx & ~hidden | (CMP_LEGACY if cpus > 1 else 0))
            case 0x8000_0008:
                leaves[key] = replace(entry, ecx=entry.ecx & ~0xF0FF | min(cpus - 1, 255) | width << 12)
    for index, (eax, ebx, ecx) in enumerate(((0, 1, 0x100), (width, cpus, 0x201), (0, 0, 2))):
        leaves[0xB, index] = CpuidEntry(0xB, index, SIGNIFICANT_INDEX, eax, ebx, ecx, cpu)
    highest = leaves.get((0x8000_0000, 0))
    if highest is not None and highest.eax >= 0x8000_001E:
        # Core ID, one thread; node 0 of one.
        leaves[0x8000_001E, 0] = CpuidEntry(0x8000_001E, 0, 0, cpu, cpu & 0xFF, 0, 0)
    return [leaves[key] for key in sorted(leaves)]


def _cache(entry: CpuidEntry, cpus: int, width: int) -> CpuidEntry:
    """Return a cache of leaf 4 or 8000_001D: all CPUs share the third level, others belong to a core."""
    level = entry.eax >> 5 & 7
    if not entry.eax & 0x1F:
        return entry
    sharing = min(cpus, 4096) - 1 if level >= 3 else 0
    eax = entry.eax & 0x3FFF | sharing << 14
    if entry.function == 4:
        eax |= min((1 << width) - 1, 63) << 26
    return replace(entry, eax=eax)
