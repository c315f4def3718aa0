"""Frames as bytes."""

from __future__ import annotations

import pytest

from kvmpass.guest.frames import (
    CREDIT,
    DATA,
    MAX_DATA,
    MAX_FRAME,
    MAX_PAYLOAD,
    NUMBERS,
    OUTPUT,
    BadFrame,
    Frame,
    FrameReader,
    encode,
)


def test_a_frame_is_a_header_and_its_payload() -> None:
    assert encode(0x01020304, DATA, b"abc", OUTPUT) == b"\3\0\0\0\4\3\2\1\2\1\0\0abc"
    assert len(encode(1, DATA, bytes(MAX_PAYLOAD))) == MAX_FRAME


@pytest.mark.parametrize("cut", range(28))
def test_frames_may_come_in_parts(cut: int) -> None:
    data, reader = encode(1, DATA, b"abcd", OUTPUT) + encode(2, CREDIT), FrameReader()
    first = reader.feed(data[:cut])
    assert len(first) == (cut >= 16) + (cut >= 28)
    assert first + reader.feed(data[cut:]) == [Frame(1, DATA, OUTPUT, b"abcd"), Frame(2, CREDIT, 0, b"")]
    assert reader._rest == b""


def test_no_frame_is_larger() -> None:
    assert len(FrameReader().feed(encode(1, DATA, bytes(MAX_DATA)))) == 1
    with pytest.raises(BadFrame, match=f"a frame of {MAX_DATA + 1} bytes"):
        FrameReader().feed(encode(1, DATA, bytes(MAX_DATA + 1)))


def test_a_large_payload_is_a_view_of_what_came() -> None:
    data = encode(1, DATA, bytes(5000))
    [frame] = FrameReader().feed(data)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is data


def test_two_numbers() -> None:
    assert Frame(0, CREDIT, 0, NUMBERS.pack(5, 0xFFFF_FFFF)).numbers() == (5, 0xFFFF_FFFF)
    for payload in (b"", bytes(7), bytes(9)):
        with pytest.raises(BadFrame, match=f"{len(payload)} bytes in a frame of type {CREDIT}"):
            Frame(0, CREDIT, 0, payload).numbers()
