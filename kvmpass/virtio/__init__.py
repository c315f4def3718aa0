"""Virtio devices as PCI functions: the modern transport, split virtqueues served here, a console with named ports."""

from kvmpass.virtio.console import VirtioConsole
from kvmpass.virtio.device import VirtioDevice
from kvmpass.virtio.function import VirtioFunction
from kvmpass.virtio.port import Port
from kvmpass.virtio.queue import Chain, RingError, Virtqueue
from kvmpass.virtio.transport import Transport

__all__ = [
    "Chain",
    "Port",
    "RingError",
    "Transport",
    "VirtioConsole",
    "VirtioDevice",
    "VirtioFunction",
    "Virtqueue",
]
