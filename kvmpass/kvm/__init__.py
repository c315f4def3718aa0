"""Objects over KVM's file descriptors (Documentation/virt/kvm/api.rst)."""

from kvmpass.kvm.fastpath import FastFile, Fastpath, FastRegisters
from kvmpass.kvm.memslots import Memslot, Memslots
from kvmpass.kvm.routing import IrqRoutes
from kvmpass.kvm.system import System
from kvmpass.kvm.types import Capability, CpuidEntry
from kvmpass.kvm.vcpu import Vcpu, install_kick
from kvmpass.kvm.vm import MsiRoute, VfioDevice, Vm

__all__ = [
    "Capability",
    "CpuidEntry",
    "FastFile",
    "FastRegisters",
    "Fastpath",
    "IrqRoutes",
    "Memslot",
    "Memslots",
    "MsiRoute",
    "System",
    "Vcpu",
    "VfioDevice",
    "Vm",
    "install_kick",
]
