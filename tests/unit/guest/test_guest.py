"""Runs of a guest, from the report of its command's status to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import cast

from kvmpass.guest import Guest, GuestResult
from kvmpass.guest.guest import CONTROL
from kvmpass.machine import Machine
from kvmpass.machine.vcpus import GuestOutcome
from kvmpass.virtio import Port

REPORT = b"kvmpass 1 ready 1.0\nkvmpass 1 exit 3\n"


class Vm:
    """A machine whose guest reports during the second of its waits, and ends as ``outcome`` in the third."""

    def __init__(self, outcome: GuestOutcome | None) -> None:
        self.sinks: dict[int | str, Callable[[bytes], None]] = {}
        self.ports: dict[str, Port] = {}
        self.waits: list[float | None] = []
        self.stopped_after: list[int] = []
        self.stopped_in_run: list[int] = []
        self.ended, self.fault = False, ""
        self._outcome = outcome

    def connect(
        self,
        outputs: Mapping[int | str, Callable[[bytes], None]],
        throttle: Callable[[], None],
    ) -> None:
        self.sinks = dict(outputs)

    def disconnect(self) -> None:
        self.sinks = {}

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped_after.append(len(self.waits))

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        if self.stopped_after:
            return GuestOutcome.STOPPED
        self.waits.append(timeout)
        if len(self.waits) == 2:
            self.sinks[CONTROL](REPORT)
        return self._outcome if len(self.waits) == 3 else None


def run(vm: Vm) -> GuestResult:
    """As ``Guest.run``; leaving the guest would stop the machine once more."""
    with Guest(cast(Machine, vm), console=None, output=lambda data: None, errors=lambda data: None) as guest:
        result = guest.run()
        vm.stopped_in_run = list(vm.stopped_after)
    return result


def test_a_guest_has_a_minute_from_its_report_on() -> None:
    """Its init writes the page cache to disks when it powers off."""
    vm = Vm(GuestOutcome.POWEROFF)
    result = run(vm)
    assert (result.outcome, result.status) == (GuestOutcome.POWEROFF, 3)
    assert vm.waits == [1.0, 1.0, 60.0]
    assert vm.stopped_in_run == []


def test_a_guest_that_does_not_power_off_is_stopped() -> None:
    vm = Vm(None)
    result = run(vm)
    assert (result.outcome, result.status) == (GuestOutcome.STOPPED, 3)
    assert vm.waits == [1.0, 1.0, 60.0]
    assert vm.stopped_in_run == [3]


class RebootingVm(Vm):
    """Its guest reboots in the middle of a line, and reports in the next boot."""

    def __init__(self) -> None:
        super().__init__(None)
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        self.waits.append(timeout)
        if self.resets == 0:
            self.sinks[CONTROL](b"kvmpass 1 ready 1.0\nkvmpass 1 err")
            return GuestOutcome.REBOOT
        if len(self.waits) == 2:
            self.sinks[CONTROL](REPORT)
            return None
        return GuestOutcome.POWEROFF


def test_an_unfinished_line_is_dropped_on_reboot() -> None:
    """Else it would hide the first line of the next boot."""
    vm = RebootingVm()
    with Guest(cast(Machine, vm), console=None, output=lambda data: None, errors=lambda data: None) as guest:
        result = guest.run(restart=True)
    assert (vm.resets, result.status, result.failures) == (1, 3, ())


class HangingVm(Vm):
    """Its guest neither reports nor ends."""

    def __init__(self, reports: bool = False) -> None:
        super().__init__(None)
        self.outcomes: list[GuestOutcome] = []
        self._reports = reports

    def stop(self, outcome: GuestOutcome = GuestOutcome.STOPPED) -> None:
        self.outcomes.append(outcome)

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        if self.outcomes:
            return self.outcomes[0]
        assert timeout is not None and 0 <= timeout <= 60
        self.waits.append(timeout)
        if self._reports:
            self.sinks[CONTROL](REPORT)
        time.sleep(timeout)
        return None


def test_a_guest_that_never_ends_is_stopped_after_its_timeout() -> None:
    vm = HangingVm()
    with Guest(cast(Machine, vm), console=None, output=lambda data: None, errors=lambda data: None) as guest:
        result = guest.run(timeout=0.05)
    assert (result.outcome, result.status) == (GuestOutcome.TIMEOUT, None)
    assert max(vm.waits) <= 0.05


def test_a_status_before_the_timeout_counts() -> None:
    """It hangs while it powers off: the command's status is known."""
    vm = HangingVm(reports=True)
    with Guest(cast(Machine, vm), console=None, output=lambda data: None, errors=lambda data: None) as guest:
        result = guest.run(timeout=0.05)
    assert (result.outcome, result.status) == (GuestOutcome.TIMEOUT, 3)
