"""Power off and reset, as ACPICA writes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmpass import ports
from kvmpass.board.power import PowerControl, PowerEvent


def control() -> tuple[PowerControl, list[PowerEvent]]:
    events: list[PowerEvent] = []
    return PowerControl(events.append), events


def test_s5_and_reset_through_the_registers_of_the_fadt() -> None:
    device, events = control()
    device.write(ports.SLEEP_STATUS - ports.POWER_BASE, b"\x80")
    assert events == []
    device.write(ports.SLEEP_CONTROL - ports.POWER_BASE, bytes([ports.S5_TYPE << 2 | 0x20]))
    assert events == [PowerEvent.POWEROFF]
    device.write(ports.RESET - ports.POWER_BASE, bytes([ports.RESET_VALUE]))
    assert events == [PowerEvent.POWEROFF, PowerEvent.RESET]


def test_other_values_do_nothing() -> None:
    device, events = control()
    device.write(0, bytes([ports.S5_TYPE << 2]))
    device.write(0, bytes([1 << 2 | 0x20]))
    device.write(4, b"\x00")
    assert events == []


@given(st.integers(0, 7), st.binary(min_size=1, max_size=8))
def test_nothing_raises(offset: int, data: bytes) -> None:
    device, _ = control()
    device.write(offset, data)
    assert device.read(offset, len(data)) == bytes(len(data))
