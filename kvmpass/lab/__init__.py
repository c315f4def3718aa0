"""An AMD host with AMD-V, AMD-Vi, interrupt remapping and PCI devices, in one command, emulated by QEMU."""

from kvmpass.lab.config import LabConfig, LabResult
from kvmpass.lab.lab import Lab

__all__ = ["Lab", "LabConfig", "LabResult"]
