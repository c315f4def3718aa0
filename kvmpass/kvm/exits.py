"""Why KVM_RUN came back (struct kvm_run, Documentation/virt/kvm/api.rst section 5)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PortExit:
    """The guest accessed ``count`` times ``size`` bytes at one port. ``data`` holds what it writes, all of it."""

    port: int
    size: int
    count: int
    is_write: bool
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class MmioExit:
    """The guest accessed ``size`` bytes (1 to 8) of guest-physical memory without a memslot."""

    address: int
    size: int
    is_write: bool
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class InterruptedExit:
    """A signal, or ``immediate_exit``: nothing happened."""


@dataclass(frozen=True, slots=True)
class HaltExit:
    """HLT without an in-kernel interrupt controller."""


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """A triple fault."""


@dataclass(frozen=True, slots=True)
class SystemEventExit:
    kind: int


@dataclass(frozen=True, slots=True)
class MemoryFaultExit:
    """KVM could not resolve a guest access to ``size`` bytes at ``gpa``."""

    gpa: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class FailedExit:
    """The processor refused to enter the guest, or KVM failed to emulate an instruction."""

    what: str
    code: int
    detail: int


Exit = (
    PortExit | MmioExit | InterruptedExit | HaltExit | ShutdownExit | SystemEventExit | MemoryFaultExit | FailedExit
)
