"""Objects over KVM's file descriptors (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.kvm.fastpath import FastFile as FastFile
    from kvmpass.kvm.fastpath import Fastpath as Fastpath
    from kvmpass.kvm.fastpath import FastRegisters as FastRegisters
    from kvmpass.kvm.memslots import Memslot as Memslot
    from kvmpass.kvm.memslots import Memslots as Memslots
    from kvmpass.kvm.routing import IrqRoutes as IrqRoutes
    from kvmpass.kvm.system import System as System
    from kvmpass.kvm.types import Capability as Capability
    from kvmpass.kvm.types import CpuidEntry as CpuidEntry
    from kvmpass.kvm.vcpu import Vcpu as Vcpu
    from kvmpass.kvm.vcpu import install_kick as install_kick
    from kvmpass.kvm.vm import MsiRoute as MsiRoute
    from kvmpass.kvm.vm import VfioDevice as VfioDevice
    from kvmpass.kvm.vm import Vm as Vm

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.kvm.fastpath": (
            "FastFile",
            "FastRegisters",
            "Fastpath",
        ),
        "kvmpass.kvm.memslots": (
            "Memslot",
            "Memslots",
        ),
        "kvmpass.kvm.routing": ("IrqRoutes",),
        "kvmpass.kvm.system": ("System",),
        "kvmpass.kvm.types": (
            "Capability",
            "CpuidEntry",
        ),
        "kvmpass.kvm.vcpu": (
            "Vcpu",
            "install_kick",
        ),
        "kvmpass.kvm.vm": (
            "MsiRoute",
            "VfioDevice",
            "Vm",
        ),
    },
)
