"""Descriptors whose input is passed to a process in a guest."""

from __future__ import annotations

import os
import threading
import time

import pytest

from kvmpass.guest.input import Input
from kvmpass.session import streams
from kvmpass.session.streams import Cancel, InputPump


class FasterReader(Cancel):
    """Another reader takes what a descriptor has, each time that it was ready."""

    def wait(self, fd: int, events: int) -> bool:
        ready = super().wait(fd, events)
        if ready:
            os.read(fd, 100)
        return ready


def test_another_reader_of_the_same_pipe_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_JOIN_SECONDS", 0.1)
    read, write = os.pipe()
    input, cancel = Input(), FasterReader()
    pump = InputPump(read, input, cancel)
    os.write(write, b"taken")
    time.sleep(0.1)  # its thread is blocked now: it reads an empty pipe
    cancel.set()
    joining = threading.Thread(target=pump.join, daemon=True)
    joining.start()
    joining.join(20)
    assert not joining.is_alive()
    cancel.close()
    os.write(write, b"too late")
    pump._thread.join(20)
    assert not pump._thread.is_alive()
    assert input.waiting == 0
    os.close(write)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)
