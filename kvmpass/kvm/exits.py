"""Why KVM_RUN returned (struct kvm_run, Documentation/virt/kvm/api.rst section 5).

Named tuples: the cheapest values with names, as one is constructed for each exit.
"""

from __future__ import annotations

from typing import NamedTuple


class PortExit(NamedTuple):
    """The guest accessed a port (``KVM_EXIT_IO``)."""

    port: int
    """Port number."""
    size: int
    """Bytes of an access: 1, 2 or 4."""
    repeat: int
    """Number of accesses; more than 1 for a string instruction."""
    is_write: bool
    """Whether the guest writes."""
    data: bytes
    """What the guest writes, all accesses together; empty for a read."""
    offset: int
    """Where the data is in ``struct kvm_run``."""


class MmioExit(NamedTuple):
    """The guest accessed guest-physical memory without a memslot (``KVM_EXIT_MMIO``)."""

    address: int
    """Guest-physical address."""
    size: int
    """Bytes, 1 to 8."""
    is_write: bool
    """Whether the guest writes."""
    data: bytes
    """What the guest writes; empty for a read."""
    offset: int
    """Where the data is in ``struct kvm_run``."""


class InterruptedExit(NamedTuple):
    """A signal, or ``immediate_exit``: nothing to handle."""


class HaltExit(NamedTuple):
    """HLT without an in-kernel interrupt controller (``KVM_EXIT_HLT``)."""


class ShutdownExit(NamedTuple):
    """A triple fault (``KVM_EXIT_SHUTDOWN``)."""


class SystemEventExit(NamedTuple):
    """A system event (``KVM_EXIT_SYSTEM_EVENT``)."""

    kind: int
    """``KVM_SYSTEM_EVENT_…``."""


class MemoryFaultExit(NamedTuple):
    """KVM could not resolve a guest's access to its memory (``KVM_EXIT_MEMORY_FAULT``)."""

    gpa: int
    """Guest-physical address."""
    size: int
    """Bytes."""
    flags: int
    """``KVM_MEMORY_EXIT_FLAG_…``."""


class DeliveryExit(NamedTuple):
    """KVM did not emulate an access to a device during the delivery of an event (``KVM_INTERNAL_ERROR_DELIVERY_EV``).

    The guest's state has not changed: its next entry repeats the access.
    """

    gpa: int
    """Guest-physical address of the access."""


class FailedExit(NamedTuple):
    """The processor could not enter the guest, KVM could not emulate an instruction, or the exit is unknown."""

    what: str
    """What failed, in words."""
    code: int
    """``hardware_entry_failure_reason``, ``suberror``, or the unknown exit's reason."""
    detail: int
    """The CPU, or the first datum of an internal error."""


class RefusedExit(NamedTuple):
    """KVM_RUN failed: the guest has ended."""

    errno: int
    """Why."""


Exit = (
    PortExit
    | MmioExit
    | InterruptedExit
    | HaltExit
    | ShutdownExit
    | SystemEventExit
    | MemoryFaultExit
    | DeliveryExit
    | FailedExit
    | RefusedExit
)
"""What ``Vcpu.run`` returns."""
