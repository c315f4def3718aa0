"""``kvmpass monitor``."""

from __future__ import annotations

import select
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from kvmpass import host
from kvmpass.cli.main import FAILED
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import complete_filter

if TYPE_CHECKING:
    from kvmpass.host.view.watching import HostEvent

_LABELS = {
    "device-added": "added",
    "device-removed": "removed",
    "device-changed": "changed",
    "driver-bound": "bound",
    "driver-unbound": "unbound",
    "group-appeared": "appeared",
    "group-vanished": "vanished",
    "events-lost": "lost",
}
_COLOURS = {"driver-bound": "green", "driver-unbound": "yellow", "device-removed": "red", "events-lost": "red"}


@click.command()
@click.argument("filters", metavar="[FILTER]...", nargs=-1, shell_complete=complete_filter)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="End after this time."
)
@host_command
def monitor(output: Output, filters: tuple[str, ...], count: int | None, timeout: float | None) -> int:
    """Show events of PCI devices, drivers and VFIO groups.

    \b
      added, removed       a device was added or removed
      bound, unbound       a device was bound to or unbound from a driver
      changed              something else: an error, virtual functions
      appeared, vanished   a group's node /dev/vfio/N
      lost                 events arrived faster than they were read

    FILTER selects devices as in kvmpass list. It is evaluated at each event, so it may name a device that is added
    later. Needs neither root nor udevd. Each event is one line, written as it happens; with --json it is a JSON
    document (JSON Lines).

    \b
    Examples:
      kvmpass monitor
      kvmpass monitor --json 0000:01:00.0 | jq --unbuffered -r .event
      kvmpass monitor --count 1 --timeout 10 eth0

    It ends at Ctrl-C (exit status 130), at SIGTERM (143), or when the reader closes its output (0). The exit status
    is 1 if --timeout expires before --count is reached.
    """
    sysfs = host.Sysfs()
    names = host.Names(sysfs)
    events = host.watch_events(sysfs, filters, timeout=timeout, until=_output_closed)
    output.note("watching")
    seen = 0
    try:
        for event in events:
            _print(output, sysfs, names, event)
            sys.stdout.flush()
            seen += 1
            if seen == count:
                return 0
    except BrokenPipeError:
        return 0
    if count is not None and not _output_closed():
        output.note(f"{seen} of {count} events in {timeout:g} seconds")
        return FAILED
    return 0


def _output_closed() -> bool:
    """Whether the reader of standard output has closed it. A pipe shows this before it is written to."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print(output: Output, sysfs: host.Sysfs, names: host.Names, event: HostEvent) -> None:
    output.record(
        time=datetime.fromtimestamp(event.time, UTC).isoformat(timespec="microseconds"),
        event=event.kind,
        bdf=event.bdf,
        vendor=None if event.bdf is None else f"{event.vendor:04x}",
        device=None if event.bdf is None else f"{event.device:04x}",
        driver=event.driver,
        group=event.group,
        bdfs=event.devices,
        detail=event.detail,
    )
    moment = time.strftime("%H:%M:%S", time.localtime(event.time)) + f".{int(event.time * 1000) % 1000:03d}"
    label = click.style(f"{_LABELS[event.kind]:8}", fg=_COLOURS.get(event.kind))
    what = f"/dev/vfio/{event.group}" if event.bdf is None and event.group is not None else str(event.bdf or "")
    output.text(f"{moment}  {label}  {what:12}  {_about(sysfs, names, event)}".rstrip())


def _about(sysfs: host.Sysfs, names: host.Names, event: HostEvent) -> str:
    if event.kind == "events-lost":
        return "some events: they arrived faster than they were read"
    if event.bdf is None:
        return " ".join(map(str, event.devices))
    if event.kind == "driver-bound":
        return f"to {event.driver}"
    if event.kind == "driver-unbound":
        return f"from {event.driver or 'its driver'}"
    if event.kind == "device-changed":
        return event.detail or ""
    group = f"group {event.group}" if event.group is not None else "no group"
    return f"{group}, {names.of_ids(event.bdf, event.vendor, event.device)}"
