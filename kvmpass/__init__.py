"""kvmpass: PCI device assignment on AMD hosts, over KVM, VFIO and AMD-Vi.

The public names, each imported when it is first used: ``import kvmpass`` costs nothing.
"""

from __future__ import annotations

from kvmpass._lazy import lazy_names

TYPE_CHECKING = False  # as in _lazy
if TYPE_CHECKING:
    from kvmpass.assignment.plan import Plan as Plan
    from kvmpass.assignment.plan import plan as plan
    from kvmpass.dma.domain import Domain as Domain
    from kvmpass.errors import KvmpassError as KvmpassError
    from kvmpass.guest import Guest as Guest
    from kvmpass.guest import GuestSpec as GuestSpec
    from kvmpass.guest import prepare as prepare
    from kvmpass.host import Bdf as Bdf
    from kvmpass.host import bind as bind
    from kvmpass.host import borrow as borrow
    from kvmpass.host import restore as restore
    from kvmpass.host import unbind as unbind
    from kvmpass.machine import AssignedDevice as AssignedDevice
    from kvmpass.machine import GuestOutcome as GuestOutcome
    from kvmpass.machine import Machine as Machine
    from kvmpass.memory import GuestMemory as GuestMemory
    from kvmpass.session import Session as Session
    from kvmpass.session import start as start

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.assignment.plan": ("Plan", "plan"),
        "kvmpass.dma.domain": ("Domain",),
        "kvmpass.errors": ("KvmpassError",),
        "kvmpass.guest": ("Guest", "GuestSpec", "prepare"),
        "kvmpass.host": ("Bdf", "bind", "borrow", "restore", "unbind"),
        "kvmpass.machine": ("AssignedDevice", "GuestOutcome", "Machine"),
        "kvmpass.memory": ("GuestMemory",),
        "kvmpass.session": ("Session", "start"),
    },
)
