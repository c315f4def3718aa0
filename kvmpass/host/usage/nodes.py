"""Device nodes that processes have open: disks, sound, input, GPUs, USB, serial lines, and any other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PCI_DEVICES, PciDevice
from kvmpass.host.usage import Use
from kvmpass.host.usage.storage import block_devices

_KINDS = {"dri": "GPU", "snd": "sound", "input": "input", "bus": "USB", "vfio": ""}
_NVIDIA = "proc/driver/nvidia/gpus"


def open_nodes(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield each node that a process has open; of processes that this user may inspect."""
    nodes = {f"/dev/{name}" for name in block_devices(look, device.bdf)}
    for number in look.below("sys/dev/char", device.bdf):
        name = look.node_name(number)
        if name and not name.startswith("vfio/"):
            nodes.add(f"/dev/{name}")
    nodes |= _nvidia(look, device)
    if look.holders.in_sysfs:
        nodes |= _own_files(look, device.bdf)
    for node, who in sorted(look.holders(nodes).items()):
        yield Use(f"{node} is open in {' and '.join(map(str, who))}{_kind(node)}")


def _kind(node: str) -> str:
    """Return the kind of node, if its name does not contain it."""
    if node.startswith("/dev/nvidia"):
        return " (GPU)"
    kind = _KINDS.get(node.removeprefix("/dev/").partition("/")[0])
    return f" ({kind})" if kind else ""


def _nvidia(look: Look, device: PciDevice) -> set[str]:
    """Return the node that NVIDIA's proprietary driver creates, which is not in sysfs."""
    if device.driver != "nvidia":
        return set()
    minor = look.sysfs.fields(_NVIDIA, str(device.bdf), "information").get("Device Minor", "")
    return {f"/dev/nvidia{minor}"} if minor.isdecimal() else set()


def _own_files(look: Look, bdf: Bdf) -> set[str]:
    """Its BARs in sysfs, which a user space driver or a flash tool maps."""
    path = os.path.realpath(look.sysfs.device_path(bdf))
    root = os.path.realpath(look.sysfs.root)
    place = f"/{os.path.relpath(path, root)}" if root != "/" else path
    names = look.sysfs.names(PCI_DEVICES, str(bdf))
    return {f"{place}/{name}" for name in names if re.fullmatch(r"resource\d(_wc)?", name)}
