"""The byte streams between an emulated host and this process."""

from __future__ import annotations

import io
import os
import threading
import time

import pytest

from kvmpass.lab.channels import Channels, Lines, Pump


def test_bytes_are_copied_and_counted() -> None:
    channels, target = Channels(["out"]), io.BytesIO()
    pump = Pump(channels.outer["out"], target, lambda: None)
    pump.start()
    os.write(channels.inner["out"], b"x" * 1000)
    assert pump.wait_for(1000, time.monotonic() + 5)
    assert not pump.wait_for(1001, time.monotonic() + 0.05)
    channels.close_inner()
    assert pump.wait_for(1001, time.monotonic() + 5), "the end of the port ends the wait"
    assert target.getvalue() == b"x" * 1000
    channels.close()


def test_a_writer_that_fails_is_reported() -> None:
    class Broken(io.BytesIO):
        def write(self, data: object) -> int:
            raise BrokenPipeError

    channels, failed = Channels(["out"]), threading.Event()
    pump = Pump(channels.outer["out"], Broken(), failed.set)
    pump.start()
    os.write(channels.inner["out"], b"x")
    assert failed.wait(5)
    assert isinstance(pump.failure, BrokenPipeError)
    channels.close_inner()
    pump.join(5)
    channels.close()


def test_lines_have_deadlines() -> None:
    channels = Channels(["status"])
    lines = Lines(channels.outer["status"])
    os.write(channels.inner["status"], b"ready\nexit 0")
    assert lines.read(time.monotonic() + 5) == "ready"
    with pytest.raises(TimeoutError):
        lines.read(time.monotonic() + 0.05)
    channels.close_inner()
    assert lines.read(time.monotonic() + 5) is None
    channels.close()
