"""Boards with an assigned function of a device that differs from the usual one, for several files of tests."""

from __future__ import annotations

from collections.abc import Callable

from support.fake_function import Board, FakeDevice

COMMAND, BAR0, BAR2, BAR4, ROM_BAR = 0x04, 0x10, 0x18, 0x20, 0x30


def made(change: Callable[[FakeDevice], None]) -> Board:
    device = FakeDevice()
    change(device)
    return Board(device)
