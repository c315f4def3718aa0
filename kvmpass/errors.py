"""Exceptions for which no errno exists.

A failed system call is an ``OSError`` (:func:`kvmpass._fd.check`). The exceptions here are raised by kvmpass itself,
before or instead of a call. The message names the cause; the remedy, if there is one, is a note
(``exception.__notes__``), which the command line prints as a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpass.events import DeviceEvent


class KvmpassError(Exception):
    """Base class. ``remedy``, what the user can do about it, becomes a note."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy:
            self.add_note(remedy)


class Closed(KvmpassError):
    """An object was used after it had been closed."""


# --- the host


class HostNotReady(KvmpassError):
    """The host lacks what every assignment needs: AMD-V, AMD-Vi, interrupt remapping, VFIO."""


class BadAddress(KvmpassError):
    """A text that is not a PCI address (``[dddd:]bb:dd.f``, hexadecimal)."""


class NoSuchDevice(KvmpassError):
    """No PCI device has that address on this host."""


class NotAssignable(KvmpassError):
    """A device that cannot be assigned: a bridge, one without an IOMMU group, or not bound to vfio-pci."""


class GroupNotViable(KvmpassError):
    """Another device of the IOMMU group is bound to a host driver."""


class DeviceInUse(KvmpassError):
    """The host, or another process, uses the device."""


class ProgramError(KvmpassError):
    """A program that is not started with borrowed devices: not found, or it does not know what it would get."""

    def __init__(self, message: str, remedy: str | None = None, exit_status: int = 125) -> None:
        super().__init__(message, remedy)
        self.exit_status = exit_status
        """That of a shell: 126 not executable, 127 not found; else 125."""


class BadDescriptor(KvmpassError):
    """A descriptor that was passed is not what it must be, or something uses it already."""


class ShareError(KvmpassError):
    """Files of this host that cannot be served to a guest, or a host that cannot confine the daemon that does it."""


class DriverPinned(KvmpassError):
    """Another tool (driverctl) binds the device to a driver at each boot."""


class JournalError(KvmpassError):
    """The journal of borrowed devices cannot be read or written."""


class RestoreFailed(KvmpassError):
    """A device could not be rebound to its driver."""


# --- the machine


class ReservedRange(KvmpassError):
    """Guest memory would be at addresses that this host's IOMMU does not translate."""


class LayoutError(KvmpassError):
    """An impossible map of guest-physical addresses: overlap, misalignment, too large for the CPU."""


class NotEnoughMemory(KvmpassError):
    """The host does not have enough memory, or the process must not lock as much."""


class AuditFailed(KvmpassError):
    """Guest memory, KVM's memslots and the DMA mappings differ."""


class BadKernel(KvmpassError):
    """A file that is not a bootable Linux kernel."""


class DaemonError(KvmpassError):
    """A daemon that serves a virtio device has violated the vhost-user protocol, has not answered, or has ended."""


class GuestError(KvmpassError):
    """An operation that the guest's state does not allow, or an exit of the guest that cannot be handled."""


class GuestDied(GuestError):
    """The guest, or the agent in it, has ended while something was expected of it."""

    def __init__(self, reason: str, *, console: str = "", events: Sequence[DeviceEvent] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        """How it has ended, in one line."""
        self.console = console
        """The last 64 KiB of its console, of a session's guest."""
        self.events = tuple(events)
        """The latest events of its devices, of a session's guest."""


class BadArchive(KvmpassError):
    """What a guest sent as its files is not an archive of files."""


# --- the lab


class LabError(KvmpassError):
    """The emulated host cannot be built or started."""
