"""The size of the console: one line for each request."""

from __future__ import annotations

import random

from kvmpass.guest.size import ConsoleSize


class Line:
    """A guest's serial port without a FIFO: what has been pushed waits until it is read."""

    def __init__(self) -> None:
        self.waiting = bytearray()

    def push(self, data: bytes) -> int:
        self.waiting += data
        return len(self.waiting)

    def read(self) -> bytes:
        data = bytes(self.waiting)
        self.waiting.clear()
        return data


def test_a_request_is_answered_at_once_or_when_the_size_changes() -> None:
    line = Line()
    size = ConsoleSize(line.push)
    size.set(24, 80)
    assert line.read() == b"", "not requested"
    size.requested()
    assert line.read() == b"24 80\n"
    size.requested()
    size.set(24, 80)
    assert line.read() == b"", "not new"
    size.set(50, 132)
    size.set(51, 132)
    assert line.read() == b"50 132\n"
    size.requested()
    assert line.read() == b"51 132\n", "the latest"


def test_a_reset_guest_gets_the_size_again() -> None:
    line = Line()
    size = ConsoleSize(line.push)
    size.requested()
    size.set(24, 80)
    size.requested()
    size.reset()
    assert line.read() == b"24 80\n"
    size.set(30, 80)
    assert line.read() == b"", "not requested"
    size.requested()
    assert line.read() == b"30 80\n"


def test_requests_of_a_guest_that_reads_nothing_queue_one_line() -> None:
    line, chance = Line(), random.Random(1)
    size = ConsoleSize(line.push)
    for number in range(10_000):
        chance.choice((size.requested, size.reset, lambda number=number: size.set(number, 80)))()
        assert len(line.waiting) <= len("99999 80\n")
    last = number
    size.set(last, 80)
    line.read()
    size.requested()
    assert line.read() == b"%d 80\n" % last
