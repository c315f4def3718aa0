"""What ``kvmpass assign`` says of its steps, and of the devices' events."""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvmpass.events import DeviceEvent

_MAX_EVENTS = 256


class Progress:
    """Progress; events are printed if ``verbose``, the latest are stored in ``outcome``."""

    def __init__(self, verbose: bool, outcome: dict[str, Any]) -> None:
        self._verbose = verbose
        self._outcome = outcome

    def say(self, line: str) -> None:
        """Print a line on standard error."""
        click.echo(f"kvmpass: {line}", err=True)

    def note(self, event: DeviceEvent) -> None:
        """Record an event. A stalled reader of standard error misses it: it must not delay a device's release."""
        self._outcome["events"].append(str(event))
        if len(self._outcome["events"]) > _MAX_EVENTS:  # a guest may reboot, or a device fail, again and again
            del self._outcome["events"][0]
            self._outcome["events_dropped"] += 1
        from kvmpass.events import DaemonEnded  # loaded, where there is an event

        # A daemon's end is that of the guest, which says no more than that a device has failed.
        shown = self._verbose or isinstance(event, DaemonEnded)
        if shown and select.select([], [sys.stderr], [], 0)[1]:
            click.echo(f"kvmpass: device {event}", err=True)
