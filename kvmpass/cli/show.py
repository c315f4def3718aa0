"""``kvmpass show``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvmpass import host
from kvmpass.cli import tables
from kvmpass.cli.documents import (
    backend_document,
    device_document,
    group_document,
    host_document,
    reserved_document,
    sibling_document,
)
from kvmpass.cli.format import (
    format_acs,
    format_bars,
    format_bridge,
    format_capabilities,
    format_link,
    format_reserved,
    format_sibling,
    format_sriov,
    format_verdict,
)
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import BDF
from kvmpass.cli.tree import tree_option
from kvmpass.host.drivers.driverctl import NO_DRIVER
from kvmpass.host.view.classes import class_name

if TYPE_CHECKING:
    from kvmpass.host.view.capabilities import Capabilities
    from kvmpass.host.view.description import Description

_LABEL = 14


@click.command()
@click.argument("bdf", type=BDF)
@host_command
@tree_option
def show(output: Output, bdf: host.Bdf, tree: host.Sysfs | None) -> int:
    """Show everything about one device and its IOMMU group.

    Its identity and driver; whether it can be assigned, and every blocker with its remedy; its BARs and capabilities;
    the other devices of its group, and why they share it; how the host uses it.

    Needs no root. Without root, the kernel shows only 64 bytes of configuration space, so capabilities are unknown,
    and a device that another user's process has open is not detected.

    \b
    Examples:
      kvmpass show 0000:01:00.0
      kvmpass show --json 01:00.0 | jq .capabilities.msix.vectors
    """
    found = host.describe(tree or host.Sysfs(), bdf)
    output.document(**_document(found))
    for line in _lines(found):
        output.text(line)
    if not found.complete:
        output.note("without root, devices that other users' processes have open are not detected")
    return 0


# --- for people


def _lines(found: Description) -> Iterator[str]:
    device = found.status.device
    yield click.style(f"{device.bdf}  {found.status.name}", bold=True)
    yield ""
    yield from _facts(_identity(found))
    yield ""
    yield from _facts(_verdict(found))
    if found.bars:
        yield ""
        yield from _facts([("BARs", list(format_bars(found.bars)))])
    yield ""
    yield from _facts([("Capabilities", _capabilities(found))])
    yield ""
    yield from _facts(_surroundings(found))


def _facts(facts: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Yield a label, and beside it the texts, one below the other."""
    for label, texts in facts:
        begin = click.style(f"{label:<{_LABEL}}", bold=True)
        for text in texts:
            yield from tables.fold(text, begin, " " * _LABEL)
            begin = " " * _LABEL


def _identity(found: Description) -> Iterator[tuple[str, list[str]]]:
    status, device = found.status, found.status.device
    words = class_name(device.class_code)
    ids = f"{device.vendor:04x}:{device.device:04x}, revision {device.revision:02x}"
    yield "Class", [f"{words} ({device.class_code:06x})"]
    yield "Ids", [ids]
    if device.subsystem_vendor:
        name = f" {found.subsystem_name}" if found.subsystem_name else ""
        yield "Subsystem", [f"{device.subsystem_vendor:04x}:{device.subsystem_device:04x}{name}"]
    override = [f"driver_override is {device.driver_override}"] if device.driver_override else []
    kept = (
        "driverctl keeps it without a driver"
        if found.driverctl == NO_DRIVER
        else f"driverctl binds {found.driverctl}"
    )
    boot = [f"{kept} at each boot"] if found.driverctl else []
    node = [status.cdev] if status.cdev else []
    yield "Driver", [", ".join([device.driver or "none", *node, *override, *boot])]
    yield "Power", [device.power_state]
    if link := format_link(status.link):
        yield "Link", [link]
    if device.numa_node is not None:
        yield "NUMA node", [str(device.numa_node)]
    yield "Reset", [", ".join(device.reset_methods) or "no method"]
    if sriov := format_sriov(status.sriov):
        virtual = " ".join(map(str, status.sriov.virtual_functions)) if status.sriov else ""
        yield "SR-IOV", [sriov, *([virtual] if virtual else [])]


def _verdict(found: Description) -> Iterator[tuple[str, list[str]]]:
    answer = [format_verdict(found.status, found.host)]
    for blocker in found.status.blockers:
        cause = f"{found.status.device.bdf} is in use: see below" if blocker.kind == "in-use" else blocker.cause
        answer += [f"- {cause}", f"  hint: {blocker.remedy}"]
    if host_blocker := found.host.blocker:
        whose = "" if found.host.ready else "no device of this host can be assigned: "
        answer += [f"- {whose}{host_blocker.cause}", f"  hint: {host_blocker.remedy}"]
    yield "Assignable", answer
    yield "In use", _uses(found)
    yield "Back end", [str(found.backend)]


def _uses(found: Description) -> list[str]:
    if found.uses or found.possible_uses:
        return [*found.uses, *(f"cannot be detected: {why}" for why in found.possible_uses)]
    return ["no" if found.complete else "no, as far as this user can see"]


def _capabilities(found: Description) -> list[str]:
    own = found.capabilities
    if not own.responds:
        return ["the device does not respond: it is powered off or removed"]
    if not own.readable:
        return ["unknown: without root the kernel shows only 64 bytes of configuration space"]
    return list(format_capabilities(own)) or ["none"]


def _surroundings(found: Description) -> Iterator[tuple[str, list[str]]]:
    if found.group is None:
        yield "IOMMU group", ["none"]
    else:
        alone = ", alone" if not found.siblings else ""
        yield (
            "IOMMU group",
            [
                f"{found.group.id}{alone}, default domain {found.group.type or 'unknown'}",
                *map(format_sibling, found.siblings),
            ],
        )
    yield "Above it", [*map(format_bridge, found.bridges)] or ["no bridge: the device is on a root bus"]
    if found.functions:
        others = ", ".join(map(str, found.functions))
        yield "Functions", [f"one of {len(found.functions) + 1}, with {others}", *format_acs(found.capabilities)]
    if found.group is not None and found.group.reserved:
        yield "Reserved", [*map(format_reserved, found.group.reserved)]


# --- for programs


def _document(found: Description) -> dict[str, Any]:
    group = found.group
    return {
        "host": host_document(found.host),
        "complete": found.complete,
        "backend": backend_document(found.backend),
        "device": device_document(found.status, found.host),
        "subsystem_name": found.subsystem_name,
        "driverctl": found.driverctl,
        "uses": found.uses,
        "possible_uses": found.possible_uses,
        "bars": [{**asdict(bar), "address": None if bar.address is None else hex(bar.address)} for bar in found.bars],
        "capabilities": _capability_document(found.capabilities),
        "iommu_group": group
        and {
            **group_document(group),
            "siblings": [*map(sibling_document, found.siblings)],
            "reserved_regions": [*map(reserved_document, group.reserved)],
        },
        "functions": found.functions,
        "bridges": found.bridges,
    }


def _capability_document(own: Capabilities) -> dict[str, Any]:
    document = asdict(own)
    if own.msix:
        places = {"table_offset": hex(own.msix.table_offset), "pba_offset": hex(own.msix.pba_offset)}
        document["msix"].update(places)
    if own.sriov:
        document["sriov"]["device"] = f"{own.sriov.device:04x}"
    return document
