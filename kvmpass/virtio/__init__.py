"""Virtio devices as PCI functions: the modern transport, split virtqueues served here, a console with named ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.virtio.console import VirtioConsole as VirtioConsole
    from kvmpass.virtio.device import VirtioDevice as VirtioDevice
    from kvmpass.virtio.function import VirtioFunction as VirtioFunction
    from kvmpass.virtio.port import Port as Port
    from kvmpass.virtio.queue import Chain as Chain
    from kvmpass.virtio.queue import RingError as RingError
    from kvmpass.virtio.queue import Virtqueue as Virtqueue
    from kvmpass.virtio.transport import Transport as Transport

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.virtio.console": ("VirtioConsole",),
        "kvmpass.virtio.device": ("VirtioDevice",),
        "kvmpass.virtio.function": ("VirtioFunction",),
        "kvmpass.virtio.port": ("Port",),
        "kvmpass.virtio.queue": (
            "Chain",
            "RingError",
            "Virtqueue",
        ),
        "kvmpass.virtio.transport": ("Transport",),
    },
)
