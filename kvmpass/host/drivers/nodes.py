"""The VFIO nodes of a device: they appear when it is bound to vfio-pci, and must be closed to unbind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from kvmpass.errors import HostNotReady, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.kernel.processes import holders
from kvmpass.host.sysfs import PciDevice, Sysfs
from kvmpass.host.usage import vfio_nodes


def check_closed(sysfs: Sysfs, bdf: Bdf) -> None:
    """Check that no process has the device open through VFIO. Raises ``RestoreFailed``.

    Unbinding would block until the holder closes it: for ever if the holder is this process.
    """
    device = sysfs.device(bdf)
    found = holders(sysfs, vfio_nodes(sysfs, bdf, None))
    held = {who for processes in found.values() for who in processes}
    if device.group is not None:
        shared = len(sysfs.group(device.group).devices) > 1
        for processes in holders(sysfs, vfio_nodes(sysfs, bdf, device.group)).values():
            # This process may have a shared group open for a sibling.
            held.update(who for who in processes if not shared or who.pid != os.getpid())
    if held:
        raise RestoreFailed(f"{bdf} is still open in {' and '.join(map(str, sorted(held)))}")


def wait_for_node(sysfs: Sysfs, device: PciDevice, seconds: float) -> None:
    """Wait until a VFIO node of the device exists. Raises ``HostNotReady`` after ``seconds``."""

    def appeared() -> bool:
        return any(sysfs.exists(node.lstrip("/")) for node in vfio_nodes(sysfs, device.bdf, device.group))

    if not wait_until(appeared, seconds):
        nodes = " or ".join(vfio_nodes(sysfs, device.bdf, device.group))
        raise HostNotReady(
            f"{device.bdf} is bound to vfio-pci, but {nodes} does not exist",
            "make sure that /dev is a devtmpfs, or that udev runs",
        )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``condition``, at most ``seconds``; return whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
