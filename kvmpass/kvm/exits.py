"""Why KVM_RUN came back (struct kvm_run, Documentation/virt/kvm/api.rst section 5).

Named tuples, because one is made for each exit and they are the cheapest values that have names.
"""

from __future__ import annotations

from typing import NamedTuple


class PortExit(NamedTuple):
    """The guest accessed ``repeat`` times ``size`` bytes at one port. ``data`` holds what it writes, all of it."""

    port: int
    size: int
    repeat: int
    is_write: bool
    data: bytes
    offset: int


class MmioExit(NamedTuple):
    """The guest accessed ``size`` bytes (1 to 8) of guest-physical memory without a memslot."""

    address: int
    size: int
    is_write: bool
    data: bytes
    offset: int


class InterruptedExit(NamedTuple):
    """A signal, or ``immediate_exit``: nothing happened."""


class HaltExit(NamedTuple):
    """HLT without an in-kernel interrupt controller."""


class ShutdownExit(NamedTuple):
    """A triple fault."""


class SystemEventExit(NamedTuple):
    kind: int


class MemoryFaultExit(NamedTuple):
    """KVM could not resolve a guest access to ``size`` bytes at ``gpa``."""

    gpa: int
    size: int
    flags: int


class FailedExit(NamedTuple):
    """The processor refused to enter the guest, or KVM failed to emulate an instruction."""

    what: str
    code: int
    detail: int


class RefusedExit(NamedTuple):
    """KVM_RUN itself failed with ``errno``: the guest cannot go on."""

    errno: int


Exit = (
    PortExit
    | MmioExit
    | InterruptedExit
    | HaltExit
    | ShutdownExit
    | SystemEventExit
    | MemoryFaultExit
    | FailedExit
    | RefusedExit
)
