"""Who has the device at this moment: another process through VFIO, or the host itself."""

from __future__ import annotations

from collections.abc import Iterator

from kvmpass.errors import DeviceInUse
from kvmpass.host.check import Check, Examined, Reading, Verdict, bad, good
from kvmpass.host.problems import Problem
from kvmpass.host.usage import usage, vfio_nodes

ASSIGNED = Problem(
    kind="assigned",
    brief="already assigned",
    cause="{bdf} {who}",
    remedy="stop that process first, or choose another device",
    error=DeviceInUse,
)
IN_USE = Problem(
    kind="in-use",
    brief="in use here",
    cause="{bdf} is in use: {reasons}",
    remedy="unmount, switch off or close what uses it, then try again",
    error=DeviceInUse,
    forceable=True,
)


def _assigned(examined: Examined) -> Verdict:
    found = list(_holders(examined))
    read = Reading("open nodes below /dev/vfio", "; ".join(found) or "of this device none")
    return bad(ASSIGNED, read, bdf=examined.bdf, who="; it ".join(found)) if found else good("no", read)


def _holders(examined: Examined) -> Iterator[str]:
    """Through its own nodes or its group's; through those of its virtual functions, which vanish with its driver."""
    sysfs, device, look = examined.sysfs, examined.device, examined.look
    members = () if examined.group is None else examined.group.devices
    own = vfio_nodes(sysfs, device.bdf, device.group)
    siblings = [node for other in members if other != device.bdf for node in vfio_nodes(sysfs, other, None)]
    what = "is assigned by" if len(members) <= 1 else f"is in IOMMU group {device.group}, assigned by"
    yield from _held(examined, [*own, *siblings], what)
    for function in sysfs.virtual_functions(device.bdf):
        found = look.device(function)
        nodes = vfio_nodes(sysfs, function, found.group) if found is not None else []
        yield from _held(examined, nodes, f"has the virtual function {function}, assigned by")


def _held(examined: Examined, nodes: list[str], what: str) -> Iterator[str]:
    held = examined.look.holders(nodes)
    if held:
        who = " and ".join(str(process) for process in sorted({one for found in held.values() for one in found}))
        yield f"{what} {who}"


def _free(examined: Examined) -> Verdict:
    reasons = usage(examined.look, examined.device)
    read = Reading("mounts, swap, holders, routes, open nodes, boot display", "; ".join(reasons) or "nothing")
    if reasons:
        return bad(IN_USE, read, bdf=examined.bdf, reasons="; ".join(reasons))
    return good("nobody uses it", read)


CHECKS = (
    Check(
        "device-assigned",
        "Not assigned",
        "who has its nodes open: those of its group, its own, those of its virtual functions",
        (ASSIGNED,),
        _assigned,
        ("device-kind",),
        device=True,
    ),
    Check(
        "device-free",
        "Not in use",
        "mounts, swap, holders (LVM, md, dm-crypt), default routes, open nodes, virtual functions, `boot_vga`",
        (IN_USE,),
        _free,
        ("device-kind",),
        device=True,
    ),
)
