"""Exceptions for which no errno exists.

A failed system call stays an ``OSError`` (see :func:`kvmpass._fd.check`). Everything here is raised by kvmpass
itself, before or instead of a call. Every message names the cause; the remedy, where there is one, is a note
(``exception.__notes__``), which the command line prints as a hint.
"""

from __future__ import annotations


class KvmpassError(Exception):
    """Base class. ``remedy`` becomes a note: what the user can do about it."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy:
            self.add_note(remedy)


class Closed(KvmpassError):
    """An object was used after it had been closed."""


# --- the host


class HostNotReady(KvmpassError):
    """The host lacks something every assignment needs: AMD-V, AMD-Vi, interrupt remapping, VFIO."""


class BadAddress(KvmpassError):
    """A text that is not a PCI address (``[dddd:]bb:dd.f``, hexadecimal)."""


class NoSuchDevice(KvmpassError):
    """No PCI device has that address on this host."""


class NotAssignable(KvmpassError):
    """A device of a kind that cannot be assigned: a bridge, or one without an IOMMU group."""


class GroupNotViable(KvmpassError):
    """Another device of the IOMMU group is bound to a host driver."""


class DeviceInUse(KvmpassError):
    """The host, or another process, uses the device at this moment."""


class DriverPinned(KvmpassError):
    """Another tool (driverctl) keeps the device on a driver, over reboots."""


class JournalError(KvmpassError):
    """The journal of borrowed devices cannot be read or written."""


class RestoreFailed(KvmpassError):
    """A device could not be given back as it was found."""


# --- the machine


class ReservedRange(KvmpassError):
    """Guest memory would lie where this host's IOMMU cannot translate."""


class LayoutError(KvmpassError):
    """A guest-physical layout that is impossible: overlap, misalignment, too large for the CPU."""


class NotEnoughMemory(KvmpassError):
    """The host has not the memory, or the process not the right to lock it."""


class AuditFailed(KvmpassError):
    """Guest memory, KVM memslots and DMA mappings disagree."""


class BadKernel(KvmpassError):
    """A file that is no kernel the boot protocol can start."""


class GuestError(KvmpassError):
    """The guest did something that ends it: an exit that cannot be handled, an emulation failure."""


# --- the lab


class LabError(KvmpassError):
    """The emulated host cannot be built or started."""
