"""One virtual machine's descriptor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmpass._fd import OwnedFd, check
from kvmpass._native import ffi, lib
from kvmpass.kvm.types import Capability
from kvmpass.kvm.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that delivers a message-signalled interrupt."""

    gsi: int
    address: int
    data: int


class VfioDevice(OwnedFd):
    """KVM's view of VFIO (KVM_DEV_TYPE_VFIO): which VFIO files this VM uses (devices/vfio.rst)."""

    def file_add(self, fd: int) -> None:
        """Register a group or a device. Call before the group's devices are opened."""
        self._set(lib.KVM_DEV_VFIO_FILE_ADD, fd, "KVM_DEV_VFIO_FILE_ADD")

    def file_del(self, fd: int) -> None:
        self._set(lib.KVM_DEV_VFIO_FILE_DEL, fd, "KVM_DEV_VFIO_FILE_DEL")

    def _set(self, attribute: int, fd: int, name: str) -> None:
        check(lib.kvm_set_device_attr_file(self.fd, lib.KVM_DEV_VFIO_FILE, attribute, fd), name)


class Vm(OwnedFd):
    """Memory slots, interrupt controllers and vCPUs of one VM."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def __repr__(self) -> str:
        return "<Vm closed>" if self.closed else f"<Vm fd {self.fd}>"

    def check_extension(self, capability: Capability) -> int:
        return check(lib.kvm_check_extension(self.fd, capability), "KVM_CHECK_EXTENSION")

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        """Show ``size`` bytes of this process at ``hva`` to the guest at ``gpa``. Size 0 deletes the slot."""
        flags = lib.KVM_MEM_READONLY if readonly else 0
        check(
            lib.kvm_set_user_memory_region(self.fd, slot, flags, gpa, size, hva),
            "KVM_SET_USER_MEMORY_REGION",
            f"slot {slot}, guest-physical {gpa:#x}, size {size:#x}",
        )

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC for each vCPU, in the kernel. Before the first vCPU."""
        check(lib.kvm_create_irqchip(self.fd), "KVM_CREATE_IRQCHIP")

    def mask_pic(self) -> None:
        """Mask every input of both 8259s, which KVM makes with all of them unmasked (arch/x86/kvm/i8259.c)."""
        pic = ffi.new("struct kvm_pic_state *")
        for chip in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE):
            check(lib.kvm_get_irqchip_pic(self.fd, chip, pic), "KVM_GET_IRQCHIP", f"chip {chip}")
            pic.imr = 0xFF
            check(lib.kvm_set_irqchip_pic(self.fd, chip, pic), "KVM_SET_IRQCHIP", f"chip {chip}")

    def set_gsi_routing(self, table: Any, count: int) -> None:
        """Replace the whole table: ``count`` of ``struct kvmpass_route``.

        ``OSError`` ``EINVAL`` if an entry's address or pin is not acceptable.
        """
        check(lib.kvm_set_gsi_routing(self.fd, table, count), "KVM_SET_GSI_ROUTING")

    def irqfd(self, eventfd: int, gsi: int) -> None:
        """Let ``eventfd`` raise ``gsi`` without leaving the kernel."""
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, 0, -1), "KVM_IRQFD", f"gsi {gsi}")

    def irqfd_resample(self, eventfd: int, gsi: int, resamplefd: int) -> None:
        """Let ``eventfd`` raise the level-triggered ``gsi``; ``resamplefd`` is signalled when the guest ends it.

        ``KVM_IRQFD_FLAG_RESAMPLE``: the line goes down with the guest's EOI, and whoever reads ``resamplefd`` says
        whether it comes up again. End it with ``irqfd_deassign``.
        """
        flags = lib.KVM_IRQFD_FLAG_RESAMPLE
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, flags, resamplefd), "KVM_IRQFD", f"gsi {gsi}, resample")

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN, -1), "KVM_IRQFD", f"gsi {gsi}")

    def irq_line(self, gsi: int, level: bool) -> None:
        check(lib.kvm_irq_line(self.fd, gsi, int(level)), "KVM_IRQ_LINE", f"gsi {gsi}")

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message at once; whether a vCPU took it. Needs no route, and does not wait for a vCPU."""
        detail = f"address {address:#x}, data {data:#x}"
        return check(lib.kvm_signal_msi(self.fd, address, data), "KVM_SIGNAL_MSI", detail) > 0

    def create_vcpu(self, index: int) -> Vcpu:
        return Vcpu(check(lib.kvm_create_vcpu(self.fd, index), "KVM_CREATE_VCPU"), index, self._run_size)

    def create_vfio_device(self) -> VfioDevice:
        return VfioDevice(check(lib.kvm_create_device(self.fd, lib.KVM_DEV_TYPE_VFIO), "KVM_CREATE_DEVICE"))
