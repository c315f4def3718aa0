"""Events of devices: which are emitted, and that a listener delays no interrupt."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.events import DeviceError, DeviceEvent, DeviceEventsDropped, DeviceFault, DeviceIommuError, DeviceReset
from kvmpass.host import Bdf
from kvmpass.host.kernel.faults import EventParser, FaultLog
from kvmpass.machine import monitor as module
from kvmpass.machine.monitor import DeviceMonitor
from kvmpass.vfio.device import ERR, REQ

BDF = Bdf.parse("0000:01:00.0")


class Device:
    """A device whose interrupts have eventfds."""

    def __init__(self, *irqs: int) -> None:
        self.irqs = {
            index: SimpleNamespace(
                count=1, set_irqs=partial(self.set_irqs, index), disable_irqs=partial(self.disable_irqs, index)
            )
            for index in irqs
        }
        self.eventfds: dict[int, int] = {}

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        self.eventfds[index] = eventfds[start]

    def disable_irqs(self, index: int) -> None:
        del self.eventfds[index]


def test_a_listener_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def listener(event: DeviceEvent) -> None:
        raise RuntimeError("of the listener")

    monitor = DeviceMonitor(listener, list)
    monitor.emit(DeviceError("0000:01:00.0"))
    monitor.stop()
    assert "uncorrected error" in caplog.text
    assert "of the listener" in caplog.text


def busy(monitor: DeviceMonitor, work: Callable[[], object]) -> None:
    """Let the job thread do ``work``, and return once it does."""
    begun = threading.Event()

    def job() -> None:
        begun.set()
        work()

    monitor.defer(job)
    assert begun.wait(10)


def test_events_that_wait_are_passed_on_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the one that says why the guest has ended."""
    monkeypatch.setattr(module, "_LAST_SECONDS", 20.0)
    seen: list[DeviceEvent] = []
    monitor, go = DeviceMonitor(seen.append, list), threading.Event()
    busy(monitor, lambda: go.wait(10))
    events = [DeviceReset(str(BDF), "flr", 0.1, "assign"), DeviceReset(str(BDF), "flr", 0.2, "deassign")]
    for event in events:
        monitor.emit_later(event)
    threading.Timer(0.05, go.set).start()
    monitor.stop()
    assert seen == events


def test_what_a_waiting_job_emits_is_passed_on_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAST_SECONDS", 20.0)
    seen: list[DeviceEvent] = []
    monitor, go = DeviceMonitor(seen.append, list), threading.Event()
    event = DeviceError(str(BDF))
    busy(monitor, lambda: go.wait(10))
    monitor.defer(lambda: monitor.emit_later(event))
    threading.Timer(0.05, go.set).start()
    monitor.stop()
    assert seen == [event]


def test_a_job_that_takes_long_holds_up_the_end_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAST_SECONDS", 0.01)
    seen: list[DeviceEvent] = []
    monitor = DeviceMonitor(seen.append, list)

    def until_it_is_closed() -> None:
        while not monitor._jobs._closing:
            time.sleep(0.001)

    busy(monitor, until_it_is_closed)
    monitor.emit_later(DeviceError(str(BDF)))
    monitor.stop()
    assert not seen


def test_a_listener_may_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAST_SECONDS", 60.0)
    seen: list[DeviceEvent] = []
    ended = threading.Event()

    def listener(event: DeviceEvent) -> None:
        seen.append(event)
        monitor.stop()
        ended.set()

    monitor = DeviceMonitor(listener, list)
    go = threading.Event()
    busy(monitor, lambda: go.wait(10))
    for _ in range(2):
        monitor.emit_later(DeviceError(str(BDF)))
    go.set()
    assert ended.wait(20), "it waited for itself"
    assert len(seen) == 1


def test_an_interrupt_calls_back_until_unwatch() -> None:
    monitor, device, called = DeviceMonitor(None, list), Device(ERR), threading.Semaphore(0)
    monitor.watch(device, ERR, called.release)  # type: ignore[arg-type]
    monitor.watch(device, REQ, called.release)  # type: ignore[arg-type]
    assert list(device.eventfds) == [ERR], "it has no REQ"
    for _ in range(3):
        os.eventfd_write(device.eventfds[ERR], 1)
        assert called.acquire(timeout=10)
    monitor.unwatch(device)  # type: ignore[arg-type]
    monitor.unwatch(device)  # type: ignore[arg-type]
    assert device.eventfds == {}
    monitor.stop()


def test_faults_of_other_devices_are_not_emitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fault = "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000e address=0xd0000000 flags=0x0020]"
    reader, writer = os.pipe2(os.O_NONBLOCK)
    seen: list[DeviceEvent] = []
    received = threading.Event()

    class Log(FaultLog):
        def __init__(self) -> None:
            self._fd, self.lost, self._parser = reader, 0, EventParser()

    def listener(event: DeviceEvent) -> None:
        seen.append(event)
        received.set()

    monkeypatch.setattr(module, "open_fault_log", Log)
    monitor = DeviceMonitor(listener, lambda: {BDF})
    monitor.follow_faults()
    other = f"AMD-Vi: Event logged [INVALID_DEVICE_REQUEST device={BDF} pasid=0x00000 address=0x1000 flags=0x0a00]"
    texts = [f"vfio-pci 0000:02:00.0: {fault}", f"pci 0000:00:00.2: {other}", f"vfio-pci {BDF}: {fault}"]
    for text in texts:
        received.clear()
        os.write(writer, f"4,1,1,-;{text}\n".encode())
        assert received.wait(0.1 if "02:00.0" in text else 10) is ("02:00.0" not in text)
    monitor.stop()
    os.close(writer)
    assert seen == [
        DeviceIommuError(str(BDF), "INVALID_DEVICE_REQUEST", texts[1]),
        DeviceFault(str(BDF), 0xD000_0000, "write"),
    ]
    assert str(seen[1]).endswith("the IOMMU blocked a write to 0xd0000000")
    assert "the IOMMU reports INVALID_DEVICE_REQUEST (pci 0000:00:00.2" in str(seen[0])


def test_an_unreadable_kernel_log_is_logged_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "open_fault_log", lambda: "DMA faults cannot be seen: no /dev/kmsg")
    with caplog.at_level(logging.INFO):
        monitor = DeviceMonitor(None, list)
        monitor.follow_faults()
        monitor.stop()
    assert "cannot be seen" in caplog.text


def test_repeated_events_are_limited_to_ten_and_then_counted() -> None:
    events: list[DeviceEvent] = []
    monitor = DeviceMonitor(events.append, list)
    clock = SimpleNamespace(now=0.0)
    monitor._limit._clock = lambda: clock.now
    for number in range(100):
        monitor.emit(DeviceFault("0000:01:00.0", number, "read"))
        monitor.emit(DeviceReset("0000:01:00.0", "flr", 0.1, "request"))
    monitor.emit(DeviceFault("0000:02:00.0", 0, "read"))
    faults = [event for event in events if isinstance(event, DeviceFault)]
    assert [event.address for event in faults] == [*range(10), 0]
    assert sum(isinstance(event, DeviceReset) for event in events) == 100, "requested resets are not limited"
    clock.now = 10.0
    monitor.emit(DeviceFault("0000:01:00.0", 1000, "read"))
    assert events[-2:] == [
        DeviceEventsDropped("0000:01:00.0", "DeviceFault", 90),
        DeviceFault("0000:01:00.0", 1000, "read"),
    ]
    monitor.stop()


def test_a_slow_listener_delays_no_interrupt_and_fills_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    going_on, busy, called = threading.Event(), threading.Event(), threading.Semaphore(0)
    events: list[DeviceEvent] = []

    def listener(event: DeviceEvent) -> None:
        events.append(event)
        busy.set()
        assert going_on.wait(20)

    monitor, device = DeviceMonitor(listener, list), Device(ERR)
    monitor.watch(device, ERR, called.release)  # type: ignore[arg-type]
    monitor.emit_later(DeviceReset("0000:01:00.0", "flr", 0.1, "first"))
    assert busy.wait(10)
    os.eventfd_write(device.eventfds[ERR], 1)
    assert called.acquire(timeout=10), "the interrupt waits for the listener"
    for number in range(5000):
        monitor.emit_later(DeviceReset("0000:01:00.0", "flr", number, "then"))
    assert len(monitor._jobs._calls) <= 1000
    done = threading.Event()
    going_on.set()
    monitor.defer(done.set)
    assert done.wait(20)
    monitor.unwatch(device)  # type: ignore[arg-type]
    monitor.stop()
    assert len(events) == 1001
    assert "4000 events of devices were dropped" in caplog.text
