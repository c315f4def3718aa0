"""A virtual machine of KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpass._dataclass import dataclass
from kvmpass._fd import OwnedFd, check
from kvmpass._native import ffi, lib
from kvmpass.kvm.fastpath import Fastpath
from kvmpass.kvm.types import Capability

if TYPE_CHECKING:
    from kvmpass.kvm.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """The route of a GSI to a message-signalled interrupt."""

    gsi: int
    """Global system interrupt, above the IOAPIC's pins."""
    address: int
    """Address of the message, 64 bits."""
    data: int
    """Data of the message, 32 bits."""


class VfioDevice(OwnedFd):
    """KVM's VFIO device (KVM_DEV_TYPE_VFIO): the VFIO files that this VM uses (virt/kvm/devices/vfio.rst).

    Synchronization: from any thread.
    """

    def file_add(self, fd: int) -> None:
        """Register a group or a device (``KVM_DEV_VFIO_FILE_ADD``), before its devices are opened.

        Raises ``OSError`` (``EEXIST``).
        """
        self._set(lib.KVM_DEV_VFIO_FILE_ADD, fd, "KVM_DEV_VFIO_FILE_ADD")

    def file_del(self, fd: int) -> None:
        """Unregister a group or a device (``KVM_DEV_VFIO_FILE_DEL``). Raises ``OSError`` (``ENOENT``)."""
        self._set(lib.KVM_DEV_VFIO_FILE_DEL, fd, "KVM_DEV_VFIO_FILE_DEL")

    def _set(self, attribute: int, fd: int, name: str) -> None:
        check(lib.kvm_set_device_attr_file(self.fd, lib.KVM_DEV_VFIO_FILE, attribute, fd), name)


class Vm(OwnedFd):
    """Memslots, interrupt controllers and vCPUs of one VM.

    Synchronization: from any thread.
    """

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def __repr__(self) -> str:
        return "<Vm closed>" if self.closed else f"<Vm fd {self.fd}>"

    def check_extension(self, capability: Capability) -> int:
        """Return the value of a capability for this VM (``KVM_CHECK_EXTENSION``); 0 where it is absent."""
        return check(lib.kvm_check_extension(self.fd, capability), "KVM_CHECK_EXTENSION")

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        """Map ``size`` bytes at ``hva`` into the guest at ``gpa``, all multiples of a page; size 0 deletes the slot.

        Raises ``OSError`` (``KVM_SET_USER_MEMORY_REGION``: ``EEXIST`` overlap, ``EINVAL``).
        """
        flags = lib.KVM_MEM_READONLY if readonly else 0
        check(
            lib.kvm_set_user_memory_region(self.fd, slot, flags, gpa, size, hva),
            "KVM_SET_USER_MEMORY_REGION",
            f"slot {slot}, guest-physical {gpa:#x}, size {size:#x}",
        )

    def create_irqchip(self) -> None:
        """Create PIC, IOAPIC and a local APIC for each vCPU in the kernel, before the first vCPU.

        Raises ``OSError`` (``KVM_CREATE_IRQCHIP``).
        """
        check(lib.kvm_create_irqchip(self.fd), "KVM_CREATE_IRQCHIP")

    def mask_pic(self) -> None:
        """Mask every input of both 8259s, which KVM creates unmasked (``KVM_SET_IRQCHIP``; arch/x86/kvm/i8259.c).

        Raises ``OSError``.
        """
        pic = ffi.new("struct kvm_pic_state *")
        for chip in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE):
            check(lib.kvm_get_irqchip_pic(self.fd, chip, pic), "KVM_GET_IRQCHIP", f"chip {chip}")
            pic.imr = 0xFF
            check(lib.kvm_set_irqchip_pic(self.fd, chip, pic), "KVM_SET_IRQCHIP", f"chip {chip}")

    def set_gsi_routing(self, table: Any, count: int) -> None:
        """Replace the routing table by ``count`` entries of ``struct kvmpass_route`` (``KVM_SET_GSI_ROUTING``).

        Raises ``OSError`` (``EINVAL``: KVM refuses an entry).
        """
        check(lib.kvm_set_gsi_routing(self.fd, table, count), "KVM_SET_GSI_ROUTING")

    def irqfd(self, eventfd: int, gsi: int) -> None:
        """Raise ``gsi`` inside the kernel when ``eventfd`` is signalled (``KVM_IRQFD``). Raises ``OSError``."""
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, 0, -1), "KVM_IRQFD", f"gsi {gsi}")

    def irqfd_resample(self, eventfd: int, gsi: int, resamplefd: int) -> None:
        """Assert the level-triggered ``gsi`` when ``eventfd`` is signalled, until the guest's EOI.

        KVM then deasserts it and signals ``resamplefd``, whose reader asserts it again if the device still does
        (``KVM_IRQFD_FLAG_RESAMPLE``). Undo it with ``irqfd_deassign``. Raises ``OSError``.
        """
        flags = lib.KVM_IRQFD_FLAG_RESAMPLE
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, flags, resamplefd), "KVM_IRQFD", f"gsi {gsi}, resample")

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        """Undo ``irqfd`` or ``irqfd_resample`` (``KVM_IRQFD_FLAG_DEASSIGN``). Raises ``OSError``."""
        check(lib.kvm_irqfd(self.fd, eventfd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN, -1), "KVM_IRQFD", f"gsi {gsi}")

    def ioeventfd(self, eventfd: int, address: int, size: int) -> None:
        """Signal ``eventfd`` when the guest writes ``size`` bytes to ``address``, inside the kernel, without an exit.

        1, 2, 4 or 8 bytes, whatever the value (``KVM_IOEVENTFD``). Raises ``OSError`` (``EEXIST``: there is one).
        """
        detail = f"guest-physical {address:#x}, size {size}"
        check(lib.kvm_ioeventfd(self.fd, eventfd, address, size, 0), "KVM_IOEVENTFD", detail)

    def ioeventfd_deassign(self, eventfd: int, address: int, size: int) -> None:
        """Undo ``ioeventfd`` (``KVM_IOEVENTFD_FLAG_DEASSIGN``). Raises ``OSError`` (``ENOENT``)."""
        detail = f"guest-physical {address:#x}, size {size}"
        flags = lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        check(lib.kvm_ioeventfd(self.fd, eventfd, address, size, flags), "KVM_IOEVENTFD", detail)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set the level of an interrupt line (``KVM_IRQ_LINE``). Raises ``OSError``."""
        check(lib.kvm_irq_line(self.fd, gsi, int(level)), "KVM_IRQ_LINE", f"gsi {gsi}")

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message without a route (``KVM_SIGNAL_MSI``). Return whether a vCPU accepted it.

        Raises ``OSError``.
        """
        detail = f"address {address:#x}, data {data:#x}"
        return check(lib.kvm_signal_msi(self.fd, address, data), "KVM_SIGNAL_MSI", detail) > 0

    def coalesce_port_writes(self, port: int, size: int) -> None:
        """Let KVM collect the guest's writes to ``size`` ports from ``port`` on (``KVM_REGISTER_COALESCED_MMIO``).

        The vCPU exits for none of them, but where the buffer is full: ``Vcpu.coalesced_writes`` has them. Only for
        registers whose writes have no effect before another access that exits. Does nothing where KVM lacks
        ``KVM_CAP_COALESCED_PIO`` (Linux 5.0). Raises ``OSError``.
        """
        if self.check_extension(Capability.COALESCED_PIO):
            check(lib.kvm_register_coalesced_mmio(self.fd, port, size, 1), "KVM_REGISTER_COALESCED_MMIO")

    def coalesce_writes(self, address: int, size: int) -> None:
        """Let KVM collect the guest's writes to ``size`` bytes from ``address`` on, as ``coalesce_port_writes`` does.

        Reads exit. Undo it with ``stop_coalescing`` (``KVM_REGISTER_COALESCED_MMIO``). Raises ``OSError``.
        """
        detail = f"guest-physical {address:#x}, size {size}"
        check(lib.kvm_register_coalesced_mmio(self.fd, address, size, 0), "KVM_REGISTER_COALESCED_MMIO", detail)

    def stop_coalescing(self, address: int, size: int) -> None:
        """Undo ``coalesce_writes`` (``KVM_UNREGISTER_COALESCED_MMIO``); what was collected is kept. Idempotent.

        Raises ``OSError``.
        """
        detail = f"guest-physical {address:#x}, size {size}"
        check(lib.kvm_unregister_coalesced_mmio(self.fd, address, size, 0), "KVM_UNREGISTER_COALESCED_MMIO", detail)

    def create_vcpu(self, index: int, fastpath: Fastpath | None = None) -> Vcpu:
        """Create vCPU number ``index`` (``KVM_CREATE_VCPU``), which accesses the registers of ``fastpath``.

        Raises ``OSError``.
        """
        from kvmpass.kvm.vcpu import Vcpu

        return Vcpu(check(lib.kvm_create_vcpu(self.fd, index), "KVM_CREATE_VCPU"), index, self._run_size, fastpath)

    def create_vfio_device(self) -> VfioDevice:
        """Create the VM's VFIO device (``KVM_CREATE_DEVICE``), one for each VM. Raises ``OSError``."""
        return VfioDevice(check(lib.kvm_create_device(self.fd, lib.KVM_DEV_TYPE_VFIO), "KVM_CREATE_DEVICE"))
