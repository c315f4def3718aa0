"""``kvmpass list``."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from kvmpass import host
from kvmpass.cli import tables
from kvmpass.cli.documents import backend_document, device_document, group_document, host_document
from kvmpass.cli.format import format_link, format_resets, format_sriov, format_verdict, group_blockers
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import complete_filter
from kvmpass.cli.tree import tree_option
from kvmpass.host.view.classes import class_name

if TYPE_CHECKING:
    from kvmpass.host.view.inventory import DeviceStatus, Inventory

_HEADING = ("Group", "Device", "Class", "Driver", "Assignable", "Name")
_GROUP_ALIGNED = frozenset({0})


@click.command()
@click.argument("filters", metavar="[FILTER]...", nargs=-1, shell_complete=complete_filter)
@click.option("-w", "--wide", is_flag=True, help="Also show NUMA node, link, reset methods and virtual functions.")
@host_command
@tree_option
def list(output: Output, filters: tuple[str, ...], wide: bool, tree: host.Sysfs | None) -> int:
    """Show PCI devices by IOMMU group, and which can be assigned.

    An IOMMU group is the smallest set of devices that the IOMMU can isolate. It is assigned as a whole. FILTER
    selects devices; without it, all are shown:

    \b
      0000:01:00.0  01:00.0     an address
      01:00                     all functions of a slot
      05.0                      device 05, function 0 of any bus
      10de:2204                 vendor:device
      eth0                      a network interface
      nvme0n1  /dev/sda1        a disk, a device node
      nvme                      a driver
      '0000:01:*'  '*geforce*'  a pattern for address, ids, driver, name

    Needs no root. Without root, devices that other users' processes have open are not detected.

    \b
    Examples:
      kvmpass list                  all devices of this host
      kvmpass list eth0 nvme        the card behind eth0, and all NVMe drives
      kvmpass list --json | jq -r '.devices[] | select(.assignable) | .bdf'

    The exit status is 1 if a FILTER selects nothing, else 0, whether or not devices can be assigned.
    """
    from kvmpass.host.view.inventory import take_inventory

    found = take_inventory(tree or host.Sysfs(), filters, details=wide or output.as_json)
    output.document(
        host=host_document(found.host),
        complete=found.complete,
        backend=backend_document(found.backend),
        iommu_groups=[{**group_document(group), "bdfs": group.devices} for group in found.groups],
        devices=[device_document(status, found.host) for status in found.devices],
        orphaned=found.orphaned,
    )
    for line in _lines(found, wide):
        output.text(line)
    if wide:
        output.text(f"IOMMU back end {found.backend}")
    if blocker := found.host.blocker:
        whose = "" if found.host.ready else "this host cannot assign devices: "
        output.note(f"{whose}{blocker.cause}\n  hint: {blocker.remedy}")
    if found.orphaned:
        output.note(
            f"a killed kvmpass did not restore {', '.join(map(str, found.orphaned))}\n  hint: run kvmpass restore"
        )
    if not found.complete:
        output.note("without root, devices that other users' processes have open are not detected")
    return 0


class _Row(NamedTuple):
    """A device: its cells up to the verdict, its name, and what stands on lines below, each after ``stem``."""

    cells: Sequence[str]
    name: str
    stem: str
    below: Sequence[str]


def _lines(found: Inventory, wide: bool) -> Iterator[str]:
    members: dict[int | None, builtins.list[DeviceStatus]] = {group.id: [] for group in found.groups}
    for status in found.devices:
        members.setdefault(status.device.group, []).append(status)
    tree = any(len(members[group.id]) > 1 for group in found.groups)
    grouped = [row for group in found.groups for row in _group(found, group, members[group.id], tree, wide)]
    indent = "  " if tree else ""
    alone = [_row(found, status, "-", indent, indent, wide) for status in members.get(None, ())]
    table = _Table([*grouped, *alone])
    if grouped:
        yield table.heading
        yield from table.lines(grouped)
    if grouped and alone:
        yield ""
    if alone:
        yield click.style("Devices without an IOMMU group: nothing would confine their DMA", bold=True)
        yield from [] if grouped else [table.heading]
        yield from table.lines(alone)


def _group(
    found: Inventory, group: host.IommuGroup, members: Sequence[DeviceStatus], tree: bool, wide: bool
) -> Iterator[_Row]:
    for number, status in enumerate(members):
        first, last = number == 0, number == len(members) - 1
        branch, stem = ("  ", "  ") if first and last else ("┬ ", "│ ") if first else ("├ ", "│ ")
        if last and not first:
            branch, stem = "└ ", "  "
        row = _row(found, status, str(group.id) if first else "", branch if tree else "", stem if tree else "", wide)
        reason = group_blockers(members) if last else None
        yield row._replace(below=[*row.below, reason]) if reason else row


def _row(found: Inventory, status: DeviceStatus, group: str, branch: str, stem: str, wide: bool) -> _Row:
    device = status.device
    cells = (group, f"{branch}{device.bdf}", class_name(device.class_code), device.driver or "-")
    facts = [
        format_link(status.link),
        f"NUMA node {device.numa_node}" if device.numa_node is not None else None,
        None if device.is_bridge else format_resets(device),
        format_sriov(status.sriov),
        status.cdev,
    ]
    below = [" · ".join(known)] if wide and (known := [fact for fact in facts if fact]) else []
    return _Row((*cells, format_verdict(status, found.host)), status.short_name, stem, below)


class _Table:
    """The name has a column where the terminal is wide enough for all of them, else a line of its own."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        sizes = tables.widths([_HEADING[:-1], *(row.cells for row in rows)])
        names = max((len(row.name) for row in rows), default=0)
        limit = tables.width()
        self._group = sizes[0]
        self._beside = limit is None or sum(sizes) + names + len(tables.GAP) * len(sizes) <= limit
        self._sizes = [*sizes, names] if self._beside else sizes

    @property
    def heading(self) -> str:
        return click.style(self._line(_HEADING[: len(self._sizes)]), bold=True)

    def lines(self, rows: Sequence[_Row]) -> Iterator[str]:
        for row in rows:
            yield self._line((*row.cells, row.name) if self._beside else row.cells)
            begin = " " * self._group + tables.GAP + row.stem + tables.GAP
            for text in row.below if self._beside else (row.name, *row.below):
                yield from map(tables.dim, tables.fold(text, begin, begin))

    def _line(self, cells: Sequence[str]) -> str:
        return tables.columns(cells, self._sizes, _GROUP_ALIGNED)
