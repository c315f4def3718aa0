"""The exit status of a command whose guest has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass.cli.main import ASSIGN_FAILED, GUEST_SILENT, TIME_UP
from kvmpass.machine import GuestOutcome

if TYPE_CHECKING:
    from kvmpass.guest import GuestResult

_CRASHED = (GuestOutcome.PANIC, GuestOutcome.TRIPLE_FAULT, GuestOutcome.FAULT, GuestOutcome.DEVICE_ERROR)


def exit_status(result: GuestResult, *, command: bool) -> int:
    """Return the exit status; ``command``: whether the guest had one to run, whose status counts."""
    if result.outcome is GuestOutcome.TIMEOUT and result.status is None:
        return TIME_UP
    if result.status is None and (command or result.outcome in _CRASHED):
        return GUEST_SILENT
    incomplete = any(copied.error is not None for copied in result.copied_out)
    return result.status or (ASSIGN_FAILED if incomplete else 0)
