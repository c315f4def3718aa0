"""``kvmpass plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from kvmpass.assignment.plan import DevicePlan, Plan
from kvmpass.assignment.plan import plan as make_plan
from kvmpass.cli import findings, tables
from kvmpass.cli.documents import backend_document, blocker_document, reserved_document, sibling_document
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import BDF, SIZE, backend_option, files_option, hugepages_option, p2p_option
from kvmpass.cli.tree import tree_option
from kvmpass.guest.spec import GuestSpec
from kvmpass.host import Bdf, Sysfs
from kvmpass.host.sysfs import VFIO_PCI
from kvmpass.layout import size_text, translated
from kvmpass.pci import BarPreview, Vectors
from kvmpass.pci.barspace import BarKind


@click.command()
@click.argument("bdf", nargs=-1, required=True, type=BDF)
@click.option(
    "--memory", default="1G", show_default=True, type=SIZE, help="Guest memory: a number with K, M, G or T."
)
@click.option("--cpus", default=1, show_default=True, help="Number of vCPUs.")
@hugepages_option
@files_option
@backend_option
@p2p_option
@host_command
@tree_option
def plan(
    output: Output,
    bdf: tuple[Bdf, ...],
    memory: int,
    cpus: int,
    backing: str,
    root: str,
    shares: tuple[str, ...],
    backend: str,
    p2p: bool,
    tree: Sysfs | None,
) -> int:
    """Show what kvmpass assign would do, and change nothing.

    The plan has the changes of drivers; each device's group, reset, interrupts and BARs; each region of the guest's
    memory with its address for KVM and the IOMMU; locked memory and file descriptors; and every blocker, not only the
    first. The addresses are computed by the same code as in assign.

    It works on any machine: without KVM the CPU's own address width is used, without an IOMMU no address is reserved.
    Root can read more. Exit status: 0 if nothing blocks the assignment, else 1.
    """
    daemons = GuestSpec(root=root, shares=shares).daemons
    made = make_plan(
        bdf,
        memory=memory,
        cpus=cpus,
        backing=backing,
        daemons=daemons,
        backend=backend,
        p2p=p2p,
        sysfs=tree,
    )
    output.document(**_document(made))
    for device in made.devices:
        _show_device(output, device, made.p2p)
    _show_memory(output, made)
    descriptors = made.descriptors
    output.text(click.style("file descriptors", bold=True))
    parts = ["the machine", f"its {tables.count(made.cpus, 'vCPU')}", "its devices"]
    parts += [f"its {tables.count(daemons, 'daemon')}"] if daemons else []
    output.text(f"  {descriptors.fixed} for {', '.join(parts[:-1])} and {parts[-1]}")
    output.text(f"  {descriptors.vectors} more at most, one for each MSI or MSI-X vector that the guest unmasks")
    output.text(f"  limit (RLIMIT_NOFILE): {'none' if descriptors.limit is None else descriptors.limit}")
    for title, blockers, colour in (("warnings", made.warnings, "yellow"), ("blockers", made.blockers, "red")):
        if blockers:
            output.text(click.style(title, fg=colour, bold=True))
        for blocker in blockers:
            findings.show_blocker(output, blocker)
    output.text()
    refusal = f"kvmpass assign would refuse: {tables.count(len(made.blockers), 'blocker')}"
    output.text(f"{refusal if made.blockers else 'no blockers'}; nothing was changed")
    return 1 if made.blockers else 0


def _show_device(output: Output, device: DevicePlan, p2p: bool) -> None:
    group = "no IOMMU group" if device.group is None else f"IOMMU group {device.group}"
    output.text(click.style(f"{device.bdf}  {device.short_name}, {group}", bold=True))
    driver = device.driver or "(none)"
    hands = "vfio-pci, not changed" if driver == VFIO_PCI else f"{driver} -> vfio-pci -> {driver}"
    rows = [("driver", hands)]
    for sibling in device.siblings:
        role = {"assigned": "is assigned, too", "blocks": "blocks the group"}.get(sibling.role, "is not changed")
        other = f"{sibling.device.bdf} {sibling.short_name} ({sibling.device.driver or 'no driver'})"
        rows.append(("group", f"{other}: {role}"))
    rows.append(("reset", _resets(device.reset_methods)))
    rows.append(("vectors", _vectors(device.vectors)))
    rows += [(bar.name, _bar(bar, p2p)) for bar in device.bars]
    for label, text in rows:
        output.text(f"  {label:<8}{text}")


def _resets(methods: tuple[str, ...]) -> str:
    if not methods:
        return "none of its own"
    return methods[0] + (f", then {', '.join(methods[1:])}" if methods[1:] else "")


def _vectors(vectors: Vectors) -> str:
    if vectors.msix is None:
        return "unknown without root"
    kinds = ((f"{vectors.msix} MSI-X", vectors.msix), (f"{vectors.msi} MSI", vectors.msi), ("INTx", vectors.intx))
    return ", ".join(text for text, present in kinds if present) or "none"


def _bar(bar: BarPreview, p2p: bool) -> str:
    kind = f"{size_text(bar.size)}, {bar.kind.value.replace('io', 'ports')}"
    dma = "peer-to-peer DMA" if p2p else "no DMA"
    if bar.mapped is None:
        return f"{kind}: memslots, {dma}; their number is unknown without root"
    how = f"{tables.count(len(bar.mapped), 'memslot')}, {dma}" if bar.mapped else "trapped"
    rest = bar.size - sum(part.size for part in bar.mapped)
    trapped = f", {size_text(rest)} trapped" if bar.mapped and rest else ""
    return f"{kind}: {how}{trapped}"


def _show_memory(output: Output, made: Plan) -> None:
    output.text(click.style("memory", bold=True))
    if made.memory:
        rows = [("slot", "guest-physical (= IOVA)", "size", "name", "access", "backing"), *_rows(made)]
        for text in tables.table(rows):
            output.text(f"  {text}")
        output.text(
            f"  {tables.count(made.map_calls, 'map call')}, {made.locked} bytes locked ({size_text(made.locked)})"
        )
    if made.backing.automatic:
        output.text(click.wrap_text(f"backing {made.backing}", 80, "  ", "    "))
    if made.nodes.reason:
        output.text(click.wrap_text(str(made.nodes), 80, "  ", "    "))
    if made.small_pages:
        output.text("  pages of 4 KiB: memfds have no transparent huge pages on this host")
        output.text("  (shmem_enabled); --hugepages takes huge ones from its pool")
    if made.p2p:
        calls = made.peer_map_calls
        more = "an unknown number of map calls" if calls is None else tables.count(calls, "more map call")
        output.text(f"  peer-to-peer: {more} while all BARs decode")
    output.text(f"  IOMMU back end {made.backend}")
    output.text(f"  {made.phys_bits} bits of guest-physical address ({made.phys_bits_source})")
    if not made.confined:
        output.text("  this host has no IOMMU groups: reserved ranges are unknown")
        return
    reserved = made.memory.layout.reserved if made.memory else ()
    output.text("  reserved ranges, without guest memory:")
    for line in reserved:
        if not translated(line):
            output.text(f"    {line}")
    if any(map(translated, reserved)):
        output.text("  reserved ranges that the kernel maps, or because of which it refuses a device:")
    for line in filter(translated, reserved):
        output.text(f"    {line}")


def _rows(made: Plan) -> Iterator[tuple[str, ...]]:
    for slot, region in enumerate(made.memory.regions if made.memory else ()):
        access = "read-write" if region.kind.guest_writable else "read-only"
        yield str(slot), str(region.range), size_text(region.range.size), region.name, access, str(region.backing)


def _document(made: Plan) -> dict[str, Any]:
    memory = made.memory
    return {
        "devices": [_device_document(device) for device in made.devices],
        "cpus": made.cpus,
        "backend": backend_document(made.backend),
        "backing": {"name": str(made.backing.backing), "reason": made.backing.reason},
        "memory_regions": None
        if memory is None
        else [
            {
                "slot": slot,
                "name": region.name,
                "gpa": hex(region.range.start),
                "iova": hex(region.range.start) if region.kind.dma else None,
                "size": region.range.size,
                "guest_writable": region.kind.guest_writable,
                "device_writable": region.kind.dma_writable,
                "backing": str(region.backing),
            }
            for slot, region in enumerate(memory.regions)
        ],
        "map_calls": made.map_calls,
        "p2p": made.p2p,
        "peer_map_calls": made.peer_map_calls,
        "numa": {"nodes": list(made.nodes.nodes), "reason": made.nodes.reason},
        "small_pages": made.small_pages,
        "locked": made.locked,
        "phys_bits": made.phys_bits,
        "phys_bits_source": made.phys_bits_source,
        "reserved_regions": None
        if not made.confined or memory is None
        else [*map(reserved_document, memory.layout.reserved)],
        "descriptors": made.descriptors,
        "blockers": [*map(blocker_document, made.blockers)],
        "warnings": [*map(blocker_document, made.warnings)],
    }


def _device_document(device: DevicePlan) -> dict[str, Any]:
    vectors = device.vectors
    return {
        "bdf": device.bdf,
        "short_name": device.short_name,
        "driver": device.driver,
        "group": device.group,
        "siblings": [*map(sibling_document, device.siblings)],
        "reset_methods": device.reset_methods,
        "interrupts": {"msix": vectors.msix, "msi": vectors.msi, "intx": vectors.intx},
        "bars": [
            {
                "name": bar.name,
                "io": bar.kind is BarKind.IO,
                "bits": {BarKind.MEMORY32: 32, BarKind.MEMORY64: 64}.get(bar.kind),
                "size": bar.size,
                "memslots": None
                if bar.mapped is None
                else [{"offset": hex(part.start), "size": part.size} for part in bar.mapped],
            }
            for bar in device.bars
        ],
    }
