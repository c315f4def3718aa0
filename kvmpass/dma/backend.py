"""What a DMA domain needs of an IOMMU. Another back end implements ``Backend``; nothing else knows which one it is.

A back end is one translation: devices are attached to it and reach what is mapped in it. It hides the order of its
kernel interface, and registers with KVM the files that its interface has (groups, or devices' own):

- Type 1: the group joins a container, memory is mapped, KVM is told of the group, the device is opened. Mappings
  vanish with the last group.
- IOAS: the device's character device is opened, KVM is told of it, it is bound and attached to the empty IOAS, memory
  is mapped. VFIO tells nothing of a device that is not bound (``Device`` asks), and resets it when it is bound.

So only the back end knows when mappings can exist: it calls its ``Mapper`` then. ``Machine(backend=…)`` takes one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import DependentDevice, Device


class KvmVfio(Protocol):
    """KVM's register of VFIO files (``kvmpass.kvm.VfioDevice``): groups, or devices that were opened on their own."""

    def file_add(self, fd: int) -> None:
        """Let KVM know the file. Raises ``OSError`` (``EEXIST``)."""

    def file_del(self, fd: int) -> None:
        """Let KVM forget the file. Raises ``OSError`` (``ENOENT``)."""


class Mapper(Protocol):
    """Who fills the translation: ``Domain``. A back end calls it from ``attach``, ``detach`` and ``close``.

    Synchronization: it takes the lock of the memory itself.
    """

    def map_all(self) -> None:
        """A device is in the translation, and ``ranges`` counts it: check all memory, map what is not mapped yet.

        All or nothing. What it raises (``ReservedRange``, ``OSError``) refuses the device.
        """

    def unmap_all(self) -> None:
        """Called when the last device is closed, before it leaves the translation.

        Raises ``OSError``, ``AuditFailed``: the back end goes on, and what is left vanishes with the translation.
        """


class Backend(Protocol):
    """One translation for all devices of a VM.

    Synchronization: ``map``, ``unmap``, ``unmap_rest`` and ``ranges`` are called from any thread with the memory's
    lock held, while memory is mapped; the others from one thread at a time, without that lock.
    """

    @property
    def active(self) -> bool:
        """Whether mappings can exist. Once it is false, none does."""

    def attach(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Device:
        """Put a device into the translation and open it: ``name`` is its PCI address, ``group`` its IOMMU group.

        ``vf_token``: see ``Group.get_device_fd``. KVM knows its file before the device's driver in VFIO looks for a
        VM, which it does when the device is opened (type 1) or bound (IOAS). Raises ``GroupNotViable`` where the
        kernel refuses the group (an interface that says so by ``EBUSY`` or ``EINVAL`` alone is translated),
        ``OSError``, or what ``map_all`` raises; then nothing has changed.
        """

    def detach(self, device: Device) -> None:
        """Let KVM drop its file, close ``device`` and take it out. It is open until then. Runs every step.

        What cannot leave the translation stays in it until ``close``, or until something of its group is attached.
        """

    def map(self, region: MemoryRegion) -> None:
        """Pin the region's memory; devices reach it at ``region.gpa``, RAM for writing too. Raises ``OSError``.

        Raises ``OverflowError`` only before the kernel is asked. After any other failure it may be mapped.
        """

    def unmap(self, region: MemoryRegion) -> int:
        """Undo ``map``; returns how many bytes were mapped there. Raises ``OSError``.

        0 if none were, also where the kernel says so by ``ENOENT``.
        """

    def unmap_rest(self) -> int:
        """Undo every mapping that there may still be; returns how many bytes there were. Raises ``OSError``."""

    def ranges(self) -> tuple[Range, ...]:
        """The I/O virtual addresses that every device here can be given; none where the kernel does not list them."""

    def hot_reset(self, device: Device, dependent: Sequence[DependentDevice]) -> None:
        """Reset the slot or bus of ``device``. ``dependent``: all that this resets, each attached here.

        Raises ``OSError`` (``ENODEV``) where there is no such reset.
        """

    def rebind_kvm(self, kvm_vfio: KvmVfio | None) -> None:
        """Register the attached files with another VM, or none, after the old one has dropped them."""

    def close(self) -> None:
        """Take out what could not leave before; every device is detached. Idempotent."""


BackendFactory = Callable[[Mapper, KvmVfio | None], Backend]
