"""Who uses the device now: a process through VFIO, or the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvmpass.errors import DeviceInUse, KvmpassError
from kvmpass.host.address import Bdf
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, device_precondition, failed, passed
from kvmpass.host.drivers.journal import Journal
from kvmpass.host.kernel.processes import Process
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs
from kvmpass.host.usage import known_nodes, untraced, vfio_nodes

ASSIGNED = BlockerTemplate(
    kind="assigned",
    brief="already assigned",
    cause="{bdf} {who}",
    remedy="stop that process first, or choose another device",
    error=DeviceInUse,
)
IN_USE = BlockerTemplate(
    kind="in-use",
    brief="in use here",
    cause="{bdf} is in use: {reasons}",
    remedy="unmount, disable or close what uses it, then try again",
    error=DeviceInUse,
    forceable=True,
)
HELD = BlockerTemplate(
    kind="mounted",
    brief="mounted here",
    cause="{bdf} is in use: {reasons}; unbinding its driver would block until that use ends",
    remedy="unmount it first",
    error=DeviceInUse,
)
MAY_BE_IN_USE = BlockerTemplate(
    kind="use-unknown",
    brief="may be in use here",
    cause="it is unknown whether {bdf} is in use: {reasons}",
    remedy="make sure that this host does not need it; then bind it by kvmpass bind --force {bdf}, and assign it",
    commands=("kvmpass bind --force {bdf}",),
    error=DeviceInUse,
    forceable=True,
)


@device_precondition(
    "device-assigned",
    "Not assigned",
    "which process has its nodes open: those of its group, its own, those of its virtual functions; kvmpass's "
    "journal",
    (ASSIGNED,),
    needs=("device-kind",),
)
def _assigned(context: CheckContext) -> Verdict:
    found = list(_holders(context))
    borrower = context.look.remembered("borrowers", borrowers).get(context.device.bdf)
    if borrower is not None and not found:  # just before it opens a node, or just after
        found = [f"is assigned by {borrower}"]
    read = Reading("open nodes below /dev/vfio, kvmpass's journal", "; ".join(found) or "none of this device")
    return failed(ASSIGNED, read, bdf=context.bdf, who="; it ".join(found)) if found else passed("no", read)


def borrowers(look: Look) -> dict[Bdf, Process]:
    """Return the running processes that have borrowed devices, from kvmpass's journal on this machine."""
    found: dict[Bdf, Process] = {}
    answer: object = look.sysfs.ask("borrowed", lambda: _borrowed_now(look.sysfs))
    for entry in answer if isinstance(answer, list) else ():
        with contextlib.suppress(KvmpassError, ValueError, TypeError):  # a recorded answer is not trusted
            bdf, pid, command = entry
            found[Bdf.parse(str(bdf))] = Process(int(pid), str(command))
    return found


def _borrowed_now(sysfs: Sysfs) -> list[tuple[str, int, str]]:
    if str(sysfs.root) != "/":
        return []
    return [(str(entry.bdf), entry.pid, entry.command) for entry in Journal().find(lambda e: e.is_owned(sysfs))]


def _holders(context: CheckContext) -> Iterator[str]:
    """Through its own nodes or its group's; through those of its virtual functions, which its driver removes."""
    device, look = context.device, context.look
    members = () if context.group is None else context.group.devices
    own = known_nodes(look, device.bdf, context.group)
    siblings = [node for other in members if other != device.bdf for node in known_nodes(look, other, None)]
    what = "is assigned by" if len(members) <= 1 else f"is in IOMMU group {device.group}, assigned by"
    yield from _held(context, [*own, *siblings], what)
    for function in look.virtual_functions(device.bdf):
        found = look.device(function)
        nodes = vfio_nodes(look.sysfs, function, found.group) if found is not None else []
        yield from _held(context, nodes, f"has the virtual function {function}, assigned by")


def _held(context: CheckContext, nodes: list[str], what: str) -> Iterator[str]:
    held = context.look.holders(nodes)
    if held:
        who = " and ".join(
            str(process) for process in sorted({holder for found in held.values() for holder in found})
        )
        yield f"{what} {who}"


@device_precondition(
    "device-free",
    "Not in use",
    "mounts in all namespaces (disks, btrfs, 9p, virtio-fs, flash), swap, holders (LVM, md, dm-crypt); default "
    "routes, connections, bridges, bonds; keyboards and consoles; open nodes (disks, GPU, sound, input, USB …); "
    "DMA channels, virtual functions, `boot_vga`",
    (IN_USE, HELD),
    needs=("device-kind",),
)
def _free(context: CheckContext) -> Verdict:
    found = context.uses
    texts = "; ".join(use.text for use in found if use.seen)
    read = Reading("uses of devices", texts or "none of this device")
    for template, wanted in ((HELD, any(use.waits for use in found)), (IN_USE, bool(texts))):
        if wanted:
            return failed(template, read, bdf=context.bdf, reasons=texts)
    return passed("no use is visible" if untraced(context.look, context.device) else "not in use", read)


@device_precondition(
    "device-use-known",
    "Its use is visible",
    "storage without disks, network functions without interfaces, vsock, CXL memory",
    (MAY_BE_IN_USE,),
    needs=("device-kind",),
)
def _known(context: CheckContext) -> Verdict:
    texts = "; ".join(use.text for use in context.uses if not use.seen)
    if texts:
        return failed(MAY_BE_IN_USE, Reading("uses of devices", texts), bdf=context.bdf, reasons=texts)
    note = untraced(context.look, context.device)
    return passed(
        f"not all: {note}" if note else "all visible", Reading("its driver", context.device.driver or "none")
    )


CHECKS = (_assigned, _free, _known)
