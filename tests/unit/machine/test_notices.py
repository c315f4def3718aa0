"""What is told of devices, and that nobody who listens can keep a device from its due."""

from __future__ import annotations

import logging
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.events import DeviceError, DeviceEvent, DeviceEventsDropped, DeviceFault, DeviceIommuError, DeviceReset
from kvmpass.host import Bdf
from kvmpass.host.kernel.faults import EventParser, FaultLog
from kvmpass.machine import notices
from kvmpass.machine.notices import Notices
from kvmpass.vfio.device import ERR, REQ

BDF = Bdf.parse("0000:01:00.0")


class Device:
    """Signals what it was given."""

    def __init__(self, *irqs: int) -> None:
        self.irqs = {index: SimpleNamespace(count=1) for index in irqs}
        self.eventfds: dict[int, int] = {}

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        self.eventfds[index] = eventfds[start]

    def disable_irqs(self, index: int) -> None:
        del self.eventfds[index]


def test_a_listener_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def listener(event: DeviceEvent) -> None:
        raise RuntimeError("of the listener")

    told = Notices(listener, list)
    told.tell(DeviceError("0000:01:00.0"))
    told.stop()
    assert "uncorrected error" in caplog.text
    assert "of the listener" in caplog.text


def test_an_interrupt_calls_back_until_it_is_undone() -> None:
    told, device, called = Notices(None, list), Device(ERR), threading.Semaphore(0)
    told.watch(device, ERR, called.release)  # type: ignore[arg-type]
    told.watch(device, REQ, called.release)  # type: ignore[arg-type]
    assert list(device.eventfds) == [ERR], "it has no REQ"
    for _ in range(3):
        os.eventfd_write(device.eventfds[ERR], 1)
        assert called.acquire(timeout=10)
    told.unwatch(device)  # type: ignore[arg-type]
    told.unwatch(device)  # type: ignore[arg-type]
    assert device.eventfds == {}
    told.stop()


def test_faults_of_other_devices_are_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fault = "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000e address=0xd0000000 flags=0x0020]"
    reader, writer = os.pipe2(os.O_NONBLOCK)
    seen: list[DeviceEvent] = []
    told_one = threading.Event()

    class Log(FaultLog):
        def __init__(self) -> None:
            self._fd, self.lost, self._parser = reader, 0, EventParser()

    def listener(event: DeviceEvent) -> None:
        seen.append(event)
        told_one.set()

    monkeypatch.setattr(notices, "open_fault_log", Log)
    told = Notices(listener, lambda: {BDF})
    told.follow_faults()
    other = f"AMD-Vi: Event logged [INVALID_DEVICE_REQUEST device={BDF} pasid=0x00000 address=0x1000 flags=0x0a00]"
    texts = [f"vfio-pci 0000:02:00.0: {fault}", f"pci 0000:00:00.2: {other}", f"vfio-pci {BDF}: {fault}"]
    for text in texts:
        told_one.clear()
        os.write(writer, f"4,1,1,-;{text}\n".encode())
        assert told_one.wait(0.1 if "02:00.0" in text else 10) is ("02:00.0" not in text)
    told.stop()
    os.close(writer)
    assert seen == [
        DeviceIommuError(str(BDF), "INVALID_DEVICE_REQUEST", texts[1]),
        DeviceFault(str(BDF), 0xD000_0000, "write"),
    ]
    assert str(seen[1]).endswith("the IOMMU blocked a write to 0xd0000000")
    assert "the IOMMU reports INVALID_DEVICE_REQUEST (pci 0000:00:00.2" in str(seen[0])


def test_without_the_kernels_log_it_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "open_fault_log", lambda: "DMA faults cannot be seen: no /dev/kmsg")
    with caplog.at_level(logging.INFO):
        told = Notices(None, list)
        told.follow_faults()
        told.stop()
    assert "cannot be seen" in caplog.text


def test_what_a_device_repeats_is_told_ten_times_and_then_counted() -> None:
    events: list[DeviceEvent] = []
    told = Notices(events.append, list)
    clock = SimpleNamespace(now=0.0)
    told._limit._clock = lambda: clock.now
    for number in range(100):
        told.tell(DeviceFault("0000:01:00.0", number, "read"))
        told.tell(DeviceReset("0000:01:00.0", "flr", 0.1, "request"))
    told.tell(DeviceFault("0000:02:00.0", 0, "read"))
    faults = [event for event in events if isinstance(event, DeviceFault)]
    assert [event.address for event in faults] == [*range(10), 0]
    assert sum(isinstance(event, DeviceReset) for event in events) == 100, "what is asked for is told each time"
    clock.now = 10.0
    told.tell(DeviceFault("0000:01:00.0", 1000, "read"))
    assert events[-2:] == [
        DeviceEventsDropped("0000:01:00.0", "DeviceFault", 90),
        DeviceFault("0000:01:00.0", 1000, "read"),
    ]
    told.stop()


def test_a_slow_listener_holds_up_no_interrupt_and_fills_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    going_on, busy, called = threading.Event(), threading.Event(), threading.Semaphore(0)
    events: list[DeviceEvent] = []

    def listener(event: DeviceEvent) -> None:
        events.append(event)
        busy.set()
        assert going_on.wait(20)

    told, device = Notices(listener, list), Device(ERR)
    told.watch(device, ERR, called.release)  # type: ignore[arg-type]
    told.tell_later(DeviceReset("0000:01:00.0", "flr", 0.1, "first"))
    assert busy.wait(10)
    os.eventfd_write(device.eventfds[ERR], 1)
    assert called.acquire(timeout=10), "the interrupt waits for the listener"
    for number in range(5000):
        told.tell_later(DeviceReset("0000:01:00.0", "flr", number, "then"))
    assert told._jobs._calls.qsize() <= 1000
    done = threading.Event()
    going_on.set()
    told.later(done.set)
    assert done.wait(20)
    told.unwatch(device)  # type: ignore[arg-type]
    told.stop()
    assert len(events) == 1001
    assert "4000 events of devices were dropped" in caplog.text
