"""Runs of a guest, from the report of its command's status to its end."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from kvmpass.errors import GuestError
from kvmpass.guest import Guest, GuestResult, output
from kvmpass.guest import guest as module
from kvmpass.guest.copyout import CopyOut
from kvmpass.guest.extract import Extraction
from kvmpass.guest.frames import (
    DATA,
    END,
    EXITED,
    HELLO,
    MAX_PROCESSES,
    NUMBERS,
    POWER_OFF,
    READY,
    START,
    STATUS,
    VERSION,
    FrameReader,
    encode,
)
from kvmpass.guest.frames import ERRORS as ERRORS_STREAM
from kvmpass.guest.frames import OUTPUT as OUTPUT_STREAM
from kvmpass.guest.guest import CONSOLE, CONTROL
from kvmpass.initramfs import init
from kvmpass.initramfs.cpio import Node, newc
from kvmpass.initramfs.init import AGENT_PORT
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


class SendingVm(Vm):
    """Its guest's agent runs the command, and panics in the fourth wait, while it sends files."""

    def __init__(self) -> None:
        super().__init__(None)
        self.received = bytearray()
        self.ports = {init.AGENT_PORT: cast(Port, self)}

    def reset(self) -> None:
        """As the port's."""

    def sender(self) -> Callable[[bytes], int]:
        return self.send

    def send(self, data: bytes) -> int:
        self.received += data
        return 0

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        self.waits.append(timeout)
        if len(self.waits) == 2:
            said = [encode(0, HELLO, NUMBERS.pack(VERSION, 1000)), encode(0, READY)]
            said += [encode(1, END, stream=stream) for stream in (OUTPUT_STREAM, ERRORS_STREAM, STATUS)]
            said += [encode(1, EXITED, NUMBERS.pack(0, 3))]
            self.sinks[init.AGENT_PORT](b"".join(said))
        return GuestOutcome.PANIC if len(self.waits) == 4 else None


def test_the_status_counts_even_if_the_guest_dies_while_it_sends_files(tmp_path: Path) -> None:
    """Its minute begins once they have been sent."""
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm), console=None, output=silent, errors=silent, copy_out=[f"/results:{tmp_path}/"]
    ) as guest:
        result = guest.run()
    assert b"/kvmpass/files" in vm.received
    assert (result.outcome, result.status, vm.waits) == (GuestOutcome.PANIC, 3, [1.0] * 4)
    assert [copied.error for copied in result.copied_out] == ["the guest has not sent all of it"]
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_stalls_does_not_delay_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest has ended: who waits for the rest has given the devices back before."""
    go_on = threading.Event()
    monkeypatch.setattr(Extraction, "content", lambda self, data: go_on.wait(20))
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    file = newc([("file", Node(stat.S_IFREG | 0o644, b"content"))])
    try:
        with Guest(
            cast(Machine, vm), console=None, output=silent, errors=silent, copy_out=[f"/results:{tmp_path}/"]
        ) as guest:
            monkeypatch.setattr(vm, "wait", partial(sends, vm, vm.wait, encode(2, DATA, file, OUTPUT_STREAM)))
            guest.follow()
            assert [copied.error for copied in guest.result(0.1).copied_out] == ["the destination has not taken it"]
            go_on.set()
            assert [copied.error for copied in guest.result().copied_out] == [None]
    finally:
        go_on.set()


def sends(vm: Vm, wait: Callable[..., GuestOutcome | None], frame: bytes, timeout: float) -> GuestOutcome | None:
    """Wait; in the third wait the guest sends ``frame``."""
    outcome = wait(timeout)
    if len(vm.waits) == 3:
        vm.sinks[init.AGENT_PORT](frame)
    return outcome


def test_a_session_sends_its_files_before_it_powers_off(tmp_path: Path) -> None:
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm),
        console=None,
        output=silent,
        errors=silent,
        session=True,
        copy_out=[f"/results:{tmp_path}/"],
    ) as guest:
        guest._start_command()
        assert vm.received == b""
        for _ in "ab":  # its agent answers in the second wait
            vm.wait()
        guest.power_off()
        assert b"/kvmpass/files" in vm.received
        assert encode(0, POWER_OFF) not in vm.received
        ends = [encode(1, END, stream=stream) for stream in (OUTPUT_STREAM, ERRORS_STREAM, STATUS)]
        vm.sinks[init.AGENT_PORT](b"".join([*ends, encode(1, EXITED, NUMBERS.pack(0, 0))]))
        assert vm.received.endswith(encode(0, POWER_OFF))


class StalledVm(SendingVm):
    """Its guest sends much, but none of its files, and powers off if it is told to."""

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        super().wait(timeout)
        assert len(self.waits) < 1000
        if len(self.waits) > 2:
            time.sleep(0.01)
            said = encode(2, DATA, stream=OUTPUT_STREAM) + encode(2, DATA, b"?", ERRORS_STREAM)
            self.sinks[init.AGENT_PORT](said)
        return GuestOutcome.POWEROFF if self.received.endswith(encode(0, POWER_OFF)) else None


def test_a_guest_that_sends_none_of_its_files_powers_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a timeout would never end, and its disks lack what it has written."""
    monkeypatch.setattr(module, "_FILES_SECONDS", 0.2)
    vm = StalledVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm), console=None, output=silent, errors=silent, copy_out=[f"/results:{tmp_path}/"]
    ) as guest:
        result = guest.run()
    assert (result.outcome, result.status) == (GuestOutcome.POWEROFF, 3)
    assert result.failures == ("the guest has sent none of its files for 0.2 seconds",)
    assert [copied.error for copied in result.copied_out] == ["the guest has not sent all of it"]


class Clock:
    """Time that only passes where it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class PatientVm(SendingVm):
    """Its guest sends a byte of its files in the third wait, no more, and powers off if it is told to.

    A wait takes a second; the fourth ``stopped`` seconds more, in which kvmpass is stopped. The byte is written in
    wait ``written``.
    """

    def __init__(self, clock: Clock, stopped: float, written: int) -> None:
        super().__init__()
        self._clock, self._stopped, self._written = clock, stopped, written
        self.go_on = threading.Event()
        self.guest: Guest

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        if self.received.endswith(encode(0, POWER_OFF)):
            return GuestOutcome.POWEROFF
        if len(self.waits) == 3:  # the one in which the other guest panics
            self.waits.append(timeout)
            self._clock.now += self._stopped
        else:
            super().wait(timeout)
        self._clock.now += 1
        assert len(self.waits) < 1000
        if len(self.waits) == 3:
            self.sinks[init.AGENT_PORT](encode(2, DATA, b"0", OUTPUT_STREAM))
        if len(self.waits) == self._written:
            self.go_on.set()
            deadline = time.monotonic() + 20
            while self.guest._to_files is not None and self.guest._to_files.busy:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        return None


@pytest.mark.parametrize(("stopped", "written", "waits"), [(0, 3, 62), (3600, 3, 63), (0, 200, 258)])
def test_a_minute_without_files_counts_while_the_guest_can_send_them(
    stopped: float, written: int, waits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may send no more than a window until that is written, and is stopped together with kvmpass."""
    vm = PatientVm(clock := Clock(), stopped, written)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(CopyOut, "__call__", lambda self, data: vm.go_on.wait(20))
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm), console=None, output=silent, errors=silent, copy_out=[f"/results:{tmp_path}/"]
    ) as guest:
        vm.guest = guest
        result = guest.run()
    assert result.failures == ("the guest has sent none of its files for 60 seconds",)
    assert waits <= len(vm.waits) <= waits + 3


def test_files_that_have_not_come_by_the_second_power_off_are_left_out(tmp_path: Path) -> None:
    """Also while as many commands run as users can start."""
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm),
        console=None,
        output=silent,
        errors=silent,
        session=True,
        copy_out=[f"/results:{tmp_path}/"],
    ) as guest:
        guest._start_command()
        assert guest.agent is not None
        for _ in range(MAX_PROCESSES - 1):
            guest.agent.start(["sleep", "1000"])
        guest.power_off()
        assert (b"/kvmpass/files" in vm.received, guest.sending_files) == (True, True)
        assert encode(0, POWER_OFF) not in vm.received
        guest.power_off()
        assert vm.received.endswith(encode(0, POWER_OFF))
        assert not guest.sending_files


def full(*_: object) -> None:
    raise MemoryError


def test_output_that_is_lost_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command is killed: a status alone would say that something in the guest did it."""
    monkeypatch.setattr(output.Outlet, "_queue", full)
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(cast(Machine, vm), console=None, output=silent, errors=silent) as guest:
        guest._start_command()
        vm.sinks[AGENT_PORT](encode(0, HELLO, NUMBERS.pack(VERSION, 1000)) + encode(1, DATA, b"word", OUTPUT_STREAM))
        guest._start_command = lambda: None  # type: ignore[method-assign]
        with pytest.raises(GuestError, match=r"some of the command's output is lost: MemoryError\(\)"):
            guest.run()


def test_why_files_are_lost_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vm = SendingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(
        cast(Machine, vm), console=None, output=silent, errors=silent, copy_out=[f"/results:{tmp_path}/"]
    ) as guest:
        ends = [encode(2, END, stream=stream) for stream in (OUTPUT_STREAM, ERRORS_STREAM, STATUS)]
        sent = b"".join([encode(2, DATA, b"word", OUTPUT_STREAM), *ends, encode(2, EXITED, NUMBERS.pack(0, 9))])
        monkeypatch.setattr(vm, "wait", partial(sends, vm, vm.wait, sent))
        monkeypatch.setattr(output.Outlet, "_queue", full)
        result = guest.run()
    assert [copied.error for copied in result.copied_out] == ["some of the files are lost: MemoryError()"]


class PanickingVm(SendingVm):
    """Its guest's agent is ready; the console prints what a terminal would obey, and the guest panics."""

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        self.sinks[init.AGENT_PORT](encode(0, HELLO, NUMBERS.pack(VERSION, 1000)) + encode(0, READY))
        self.sinks[CONSOLE](b"Kernel panic - \x1b]0;title\x07\xc2\x9b31m: no init\r\n")
        return GuestOutcome.PANIC


def test_why_a_guest_died_is_printable() -> None:
    """The text is the guest's, and is shown on terminals."""
    vm = PanickingVm()
    silent: Callable[[bytes], None] = lambda data: None  # noqa: E731
    with Guest(cast(Machine, vm), console=None, output=silent, errors=silent, session=True) as guest:
        guest.run()
        assert guest.agent is not None
        assert guest.agent.failure == "the guest panicked: Kernel panic -  ]0;title  31m: no init"


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


class RebootingSenderVm(Vm):
    """Its guest reboots while the reader of its command's output stalls; that goes on in the next boot."""

    def __init__(self) -> None:
        super().__init__(None)
        self.port = Port(AGENT_PORT, lambda data: None)
        self.ports = {AGENT_PORT: self.port}
        self.go_on, self.took_new = threading.Event(), threading.Event()
        self.sent: list[int] = []

    def reset(self) -> None:
        """As the machine's."""

    def output(self, data: bytes) -> None:
        assert self.go_on.wait(20)
        if b"new" in data:
            self.took_new.set()

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        self.waits.append(timeout)
        first = len(self.waits) == 1
        content = [bytes(30_000)] * 10 if first else [b"new"]
        said = [encode(0, HELLO, NUMBERS.pack(VERSION, 1000)), encode(0, READY)]
        said += [encode(1, DATA, data, OUTPUT_STREAM) for data in content]
        self.sinks[AGENT_PORT](b"".join(said))
        if first:
            return GuestOutcome.REBOOT
        self.go_on.set()
        assert self.took_new.wait(20)
        self.sent = [frame.type for frame in FrameReader().feed(self.port.take(1 << 20))]
        return GuestOutcome.POWEROFF


def test_what_a_reader_took_from_before_a_reboot_is_not_granted_after_it() -> None:
    """The processes of both boots have the same numbers: the next one would write more than the host expects."""
    vm = RebootingSenderVm()
    with Guest(cast(Machine, vm), console=None, output=vm.output, errors=lambda data: None) as guest:
        guest.run(restart=True)
    assert vm.sent == [START]


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
        result = guest.run(timeout=0.5)
    assert (result.outcome, result.status) == (GuestOutcome.TIMEOUT, 3)


def test_a_guest_that_was_not_run_has_no_result() -> None:
    vm = cast(Machine, Vm(GuestOutcome.POWEROFF))
    with (
        Guest(vm, console=None, output=lambda data: None, errors=lambda data: None) as guest,
        pytest.raises(GuestError, match="the guest was not run to its end"),
    ):
        guest.result()


def test_the_image_may_be_loaded_into_a_machine_that_is_connected() -> None:
    """Its ports come with it: the command is started all the same."""
    vm = Vm(GuestOutcome.POWEROFF)
    with Guest(cast(Machine, vm), console=None, output=lambda data: None, errors=lambda data: None) as guest:
        vm.ports[AGENT_PORT] = Port(AGENT_PORT, lambda data: None)
        guest.run()
    assert init.RUN_COMMAND[1].encode() in vm.ports[AGENT_PORT].take(1000)


class ClosedVm(Vm):
    """Its guest's agent ends once it is ready, or before; the guest itself powers off in wait ``waits``.

    A wait takes a second, but each that ``longer`` names. It is told to power off in wait ``told``, or never.
    ``read_late``: what the agent has said is read after its end.
    """

    def __init__(
        self, clock: Clock, ready: bool, waits: int, longer: Mapping[int, float], told: int, read_late: bool
    ) -> None:
        super().__init__(None)
        self.port = Port(AGENT_PORT, lambda data: None)
        self.ports = {AGENT_PORT: self.port}
        self._said = [encode(0, HELLO, NUMBERS.pack(VERSION, 1000)), *([encode(0, READY)] if ready else [])]
        self._clock, self._last, self._longer = clock, waits, longer
        self._told, self._read_late = told, read_late
        self.guest: Guest

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        self.waits.append(timeout)
        self._clock.now += self._longer.get(len(self.waits), 1)
        if len(self.waits) == 1 and not self._read_late:
            self.sinks[AGENT_PORT](b"".join(self._said))
        if len(self.waits) == self._told:
            self.guest.power_off()
        if len(self.waits) == 1:
            self.port.on_close()
            if self._read_late:
                self.sinks[AGENT_PORT](b"".join(self._said))
        return GuestOutcome.POWEROFF if len(self.waits) == self._last else None


ENDED, POWERED_OFF = "the agent in the guest has ended", f"the guest {GuestOutcome.POWEROFF.value}"


@pytest.mark.parametrize("read_late", [False, True])
@pytest.mark.parametrize(
    ("ready", "waits", "longer", "told", "reason"),
    [
        (True, 10, {}, 0, ENDED),
        (True, 6, {}, 0, POWERED_OFF),  # its init ends all programs first
        (False, 10, {}, 0, POWERED_OFF),  # another program: the agent has not begun
        (True, 2, {2: 50}, 1, POWERED_OFF),  # it writes its page cache, after its agent has ended
        (True, 7, {}, 6, POWERED_OFF),
        (True, 7, {3: 3600}, 0, POWERED_OFF),  # kvmpass was stopped, and the guest with it
        (True, 10, {3: 3600}, 0, ENDED),
    ],
)
def test_who_waits_for_an_agent_that_has_ended_is_told(
    ready: bool,
    waits: int,
    longer: Mapping[int, float],
    told: int,
    reason: str,
    read_late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm = ClosedVm(clock := Clock(), ready, waits, longer, told, read_late)
    monkeypatch.setattr(module, "time", clock)
    with Guest(cast(Machine, vm), console=None, output=print, errors=print, session=True) as guest:
        vm.guest = guest
        guest.follow()
        assert guest.agent is not None
        assert guest.agent.failure == reason


class ReopenedVm(ClosedVm):
    """Another program has had the port: it is closed before the agent opens it, and stays."""

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        outcome = super().wait(timeout)
        if len(self.waits) == 1:
            self.port.on_open()
        return outcome


def test_an_agent_that_has_opened_its_port_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = ReopenedVm(clock := Clock(), True, 10, {}, 0, True)
    monkeypatch.setattr(module, "time", clock)
    with Guest(cast(Machine, vm), console=None, output=print, errors=print, session=True) as guest:
        guest.follow()
        assert guest.agent is not None
        assert guest.agent.failure == POWERED_OFF
