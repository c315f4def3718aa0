"""The size of the console: one line for each question, and no more, whatever the guest does."""

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


def test_it_is_told_at_once_and_when_it_changes() -> None:
    line = Line()
    size = ConsoleSize(line.push)
    size.set(24, 80)
    assert line.read() == b"", "nobody asked"
    size.asked()
    assert line.read() == b"24 80\n"
    size.asked()
    size.set(24, 80)
    assert line.read() == b"", "it knows that"
    size.set(50, 132)
    size.set(51, 132)
    assert line.read() == b"50 132\n"
    size.asked()
    assert line.read() == b"51 132\n", "the latest, of what it missed"


def test_a_guest_that_starts_again_is_told_again() -> None:
    line = Line()
    size = ConsoleSize(line.push)
    size.asked()
    size.set(24, 80)
    size.asked()
    size.forget()
    assert line.read() == b"24 80\n"
    size.set(30, 80)
    assert line.read() == b"", "it has not asked"
    size.asked()
    assert line.read() == b"30 80\n"


def test_a_guest_that_asks_without_end_and_reads_nothing_gets_one_line() -> None:
    line, chance = Line(), random.Random(1)
    size = ConsoleSize(line.push)
    for number in range(10_000):
        chance.choice((size.asked, size.forget, lambda number=number: size.set(number, 80)))()
        assert len(line.waiting) <= len("99999 80\n")
    last = number
    size.set(last, 80)
    line.read()
    size.asked()
    assert line.read() == b"%d 80\n" % last
