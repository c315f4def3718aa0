"""The lines of the control channel, and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.guest.channel import MAX_LINE, ControlChannel, Exited, GuestFailure, Ready, SizeRequest, parse_line


def test_a_run() -> None:
    channel = ControlChannel()
    events = []
    for byte in b"kvmpass 1 ready 3\nkvmpass 1 exit 7\n":
        events += channel.feed(bytes([byte]))
    assert events == [Ready(3.0), Exited(7)]


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (b"kvmpass 1 ready", Ready(None)),
        (b"kvmpass 1 ready 12.34\r", Ready(12.34)),
        (b"kvmpass 1 exit 0", Exited(0)),
        (b"kvmpass 1 exit 255", Exited(255)),
        (b"kvmpass 1 error module e1000e did not load", GuestFailure("module e1000e did not load")),
        (b"kvmpass 1 error \x1b[2J", None),
        (b"kvmpass 1 size", SizeRequest()),
        (b"kvmpass 1 size 24 80", None),
        (b"kvmpass 1 exit 256", None),
        (b"kvmpass 1 exit -1", None),
        (b"kvmpass 1 exit \xd9\xa3", None),
        (b"kvmpass 2 exit 0", None),
        (b" kvmpass 1 exit 0", None),
        (b"", None),
    ],
)
def test_lines(line: bytes, event: object) -> None:
    assert parse_line(line) == event


def test_an_overlong_line_is_dropped_as_a_whole() -> None:
    channel = ControlChannel()
    assert channel.feed(b"x" * (MAX_LINE * 10)) == []
    assert channel.feed(b"kvmpass 1 exit 1\n") == []
    assert channel.feed(b"kvmpass 1 exit 2\n") == [Exited(2)]
    text = "x" * (MAX_LINE - len("kvmpass 1 error \n"))
    assert channel.feed(f"kvmpass 1 error {text}\nkvmpass 1 error {text}x\n".encode()) == [GuestFailure(text)]


@given(st.lists(st.binary()))
def test_garbage_never_raises_and_never_grows(pieces: list[bytes]) -> None:
    channel = ControlChannel()
    for piece in pieces:
        channel.feed(piece)
    assert len(channel._line) <= MAX_LINE
    assert channel.feed(b"\nkvmpass 1 exit 3\n")[-1:] == [Exited(3)]
