"""What a DMA domain needs of the kernel's IOMMU interface: ``Backend``. Only a back end knows which interface it is.

A back end is one translation: devices are attached to it and reach the memory that is mapped in it. It hides the
order of its kernel interface, and registers VFIO's files (groups, or devices) with KVM:

- Type 1: the group joins a container, memory is mapped, the group is registered with KVM, the device is opened. The
  kernel unmaps everything when the last group leaves.
- IOAS: the device's character device is opened, registered with KVM, bound and attached to the empty IOAS, memory is
  mapped. VFIO answers ``Device``'s ioctls only after the bind, which resets the device. It is detached before it is
  closed.

So only the back end knows when mappings can exist: it calls its ``Mapper`` then. ``Machine(backend=…)`` takes one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import DependentDevice, Device


class KvmVfio(Protocol):
    """KVM's VFIO device (``kvmpass.kvm.VfioDevice``): the groups, or character devices, that a VM uses."""

    def file_add(self, fd: int) -> None:
        """Register the file (``KVM_DEV_VFIO_FILE_ADD``). Raises ``OSError`` (``EEXIST``)."""

    def file_del(self, fd: int) -> None:
        """Unregister the file (``KVM_DEV_VFIO_FILE_DEL``). Raises ``OSError`` (``ENOENT``)."""


class Mapper(KvmVfio, Protocol):
    """The domain, as its back end calls it in ``attaching``, ``detach`` and ``close``: it maps memory.

    It also registers VFIO files with the VM, if there is one: ``file_add`` and ``file_del``, which is idempotent.

    Synchronization: without the memory's lock, which it takes.
    """

    @property
    def p2p(self) -> bool:
        """Whether BARs of attached devices are mapped, too: ``attaching`` checks that the kernel can."""

    def map_all(self) -> None:
        """Check all memory against ``ranges`` and map what is not mapped, once the new device counts in ``ranges``.

        All or nothing. Raises ``ReservedRange``, ``OSError``: ``attaching`` fails with it.
        """

    def unmap_all(self) -> None:
        """Unmap everything, after the last device is closed and before it leaves the translation.

        Raises ``OSError``, ``AuditFailed``: the back end continues; the rest is unmapped with the translation.
        """


Open = Callable[[], Callable[[], Device]]
"""Opens a device; returns the call that completes its attachment and returns it. See ``Backend.attaching``."""


class Backend(Protocol):
    """One translation for all devices of a VM.

    Synchronization: ``map``, ``unmap``, ``unmap_rest`` and ``ranges`` are called from any thread with the memory's
    lock held, while memory is mapped; the others from one thread at a time, without that lock. ``Open`` is called
    from several threads, while the thread of their blocks waits for them.
    """

    @property
    def active(self) -> bool:
        """Whether mappings can exist."""

    def attaching(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> AbstractContextManager[Open]:
        """Attach a device to the translation: ``name`` is its PCI address, ``group`` its IOMMU group.

        The block makes the one call that it is given, which opens the device: this takes most of the time, for the
        kernel resets the device. Then it makes the call that this one returns, which completes the attachment and
        returns the device. Blocks of several devices can be nested, and the first of these calls be made at the same
        time in several threads; the second are made in one thread, in the order of the blocks, so that each maps or
        is refused as if the devices had been attached one by one. If the innermost block raises, nothing has changed.

        ``vf_token``: see ``Group.get_device_fd``. The file is registered with KVM before VFIO looks for a VM, which
        it does when the device is opened (type 1) or bound (IOAS). Block or call raise ``GroupNotViable`` where the
        kernel says so (type 1; an IOAS's bind reports ``EPERM``), ``OSError``, or what ``map_all`` raises;
        ``HostNotReady`` if ``Mapper.p2p`` is set and the kernel maps no BARs.
        """

    def detach(self, device: Device) -> None:
        """Detach the open ``device``, unregister it from KVM and close it. Runs every step even if one fails.

        A group that cannot leave the translation stays in it until ``close``, or until a device of it is attached.
        """

    def map(self, region: MemoryRegion) -> None:
        """Pin the region's memory and map it at ``region.gpa``: ROM read-only, RAM for reading and writing.

        With ``Mapper.p2p`` also BARs of attached devices, whose ``region.mapping`` is a ``vfio.RegionMapping``, for
        reading and writing; nothing is pinned then. Raises ``OSError``. Raises ``OverflowError`` only before the
        ioctl; after any other failure it may be mapped.
        """

    def unmap(self, region: MemoryRegion) -> int:
        """Undo ``map``. Return the number of bytes that were mapped there; 0 where the kernel reports ``ENOENT``.

        Raises ``OSError``.
        """

    def unmap_rest(self) -> int:
        """Undo all mappings. Return the number of bytes that were mapped. Raises ``OSError``."""

    def ranges(self) -> tuple[Range, ...]:
        """Return the usable I/O virtual addresses of the attached devices.

        Empty where the kernel does not list them.
        """

    def hot_reset(self, device: Device, dependent: Sequence[DependentDevice]) -> None:
        """Reset the slot or bus of ``device``. ``dependent``: all devices that this resets, each attached here.

        Raises ``OSError`` (``ENODEV``: neither slot nor bus can be reset).
        """

    def close(self) -> None:
        """Remove what could not leave before, after every device is detached. Idempotent."""


BackendFactory = Callable[[Mapper], Backend]
"""Constructs a back end for the domain."""
