"""``/dev/kvm``: the KVM subsystem."""

from __future__ import annotations

from kvmpass._fd import OwnedFd, check, open_node
from kvmpass._native import ffi, lib
from kvmpass._teardown import undo_on_error
from kvmpass.errors import LayoutError
from kvmpass.kvm.types import Capability, CpuidEntry
from kvmpass.kvm.vm import Vm

_MAX_CPUID = 256
MAX_APIC_IDS = 255
"""APIC ids of 8 bits; all ones are a broadcast (AMD64 manual volume 2, 16.11)."""


def check_apic_ids(count: int) -> None:
    """Raise ``LayoutError`` for more CPUs than the interrupts of a guest's devices reach."""
    if count > MAX_APIC_IDS:
        raise LayoutError(
            f"{count} CPUs: a guest takes {MAX_APIC_IDS}",
            "use fewer: interrupts of devices reach APIC IDs of 8 bits; more need interrupt remapping in the guest",
        )


class System(OwnedFd):
    """The KVM subsystem: capabilities, and virtual machines to make.

    Raises ``OSError`` where the node is absent or access is denied, and for an API version other than 12.

    Synchronization: from any thread.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(open_node(path))
        with undo_on_error(self.close):
            version = check(lib.kvm_get_api_version(self.fd), "KVM_GET_API_VERSION")
            if version != lib.KVM_API_VERSION:
                raise OSError(f"{path}: KVM API version {version}, not {lib.KVM_API_VERSION}")

    def check_extension(self, capability: Capability) -> int:
        """Return the value of a capability (``KVM_CHECK_EXTENSION``); 0 where it is absent."""
        return check(lib.kvm_check_extension(self.fd, capability), "KVM_CHECK_EXTENSION")

    @property
    def max_vcpus(self) -> int:
        """Number of vCPUs that a VM can have."""
        return self.check_extension(Capability.MAX_VCPUS) or 4

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """Return the CPUID leaves that KVM supports on this host (``KVM_GET_SUPPORTED_CPUID``).

        Raises ``OSError``.
        """
        entries = ffi.new("struct kvm_cpuid_entry2[]", _MAX_CPUID)
        count = check(lib.kvm_get_supported_cpuid(self.fd, entries, _MAX_CPUID), "KVM_GET_SUPPORTED_CPUID")
        return [
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in (entries[i] for i in range(count))
        ]

    @property
    def physical_bits(self) -> int:
        """Width of the CPU's physical addresses (CPUID 8000_0008 EAX[7:0])."""
        leaves = {entry.function: entry for entry in self.get_supported_cpuid()}
        return leaves[0x8000_0008].eax & 0xFF if 0x8000_0008 in leaves else 40

    def create_vm(self) -> Vm:
        """Create a VM without memory and vCPUs (``KVM_CREATE_VM``). Raises ``OSError``."""
        run_size = check(lib.kvm_get_vcpu_mmap_size(self.fd), "KVM_GET_VCPU_MMAP_SIZE")
        return Vm(check(lib.kvm_create_vm(self.fd), "KVM_CREATE_VM"), run_size)


def check_vcpus(count: int, most: int) -> None:
    """Raise ``LayoutError`` for more vCPUs than ``most``, or none."""
    if not 1 <= count <= most:
        raise LayoutError(f"{count} CPUs: this host's KVM takes 1 to {most}")
    check_apic_ids(count)
