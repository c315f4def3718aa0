"""A process's input on its way: frames, windows, ends, and processes that are replaced."""

from __future__ import annotations

import threading

import pytest

from kvmpass.guest.frames import DATA, END, INPUT, INPUT_WINDOW, MAX_PAYLOAD, FrameReader
from kvmpass.guest.input import Input

IN_A_WINDOW = INPUT_WINDOW // MAX_PAYLOAD * MAX_PAYLOAD  # in whole frames


class Sent:
    """What is sent to an agent."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self.frames: list[tuple[int, int, int, bytes]] = []

    def __call__(self, data: bytes) -> None:
        self.frames += [(f.process, f.type, f.stream, f.payload) for f in self._reader.feed(data)]

    @property
    def sizes(self) -> list[int]:
        return [len(payload) for _, _, _, payload in self.frames]


@pytest.fixture
def source() -> Input:
    return Input()


@pytest.fixture
def sent() -> Sent:
    return Sent()


def test_it_waits_for_its_process(source: Input, sent: Sent) -> None:
    assert source.send(b"first") == 5
    source.end()
    assert not source.wait_below(5, 0)
    assert source.wait_below(6, 0)
    source.detach()
    source.attach(7, sent)
    assert sent.frames == [(7, DATA, INPUT, b"first"), (7, END, INPUT, b"")]
    assert source.waiting == 5, "the process has not read it"
    assert source.granted(5)
    assert source.waiting == 0
    source.end()
    assert source.send(b"late") == 0
    assert len(sent.frames) == 2
    assert not source.granted(1), "more than was sent"


def test_a_window_of_whole_frames(source: Input, sent: Sent) -> None:
    source.detach()
    source.attach(1, sent)
    assert source.send(bytes(300_000)) == 300_000
    assert sent.sizes == [MAX_PAYLOAD] * 4
    rest = INPUT_WINDOW - IN_A_WINDOW
    assert source.granted(MAX_PAYLOAD - rest - 1)
    assert len(sent.frames) == 4, "a byte less than a frame"
    assert source.granted(1)
    assert sent.sizes == [MAX_PAYLOAD] * 5
    assert source.granted(INPUT_WINDOW)
    assert sent.sizes == [MAX_PAYLOAD] * 9
    last = 300_000 - 9 * MAX_PAYLOAD
    assert source.waiting == IN_A_WINDOW + last
    assert not source.granted(IN_A_WINDOW + 1), "more than was sent"


def test_exactly_a_frame_and_a_window(source: Input, sent: Sent) -> None:
    source.detach()
    source.attach(1, sent)
    source.send(bytes(MAX_PAYLOAD))
    assert sent.sizes == [MAX_PAYLOAD]
    source.send(bytes(INPUT_WINDOW - MAX_PAYLOAD))
    assert sum(sent.sizes) == INPUT_WINDOW
    source.send(b"x")
    assert sum(sent.sizes) == INPUT_WINDOW
    assert source.granted(1)
    assert sum(sent.sizes) == INPUT_WINDOW + 1


def test_what_nobody_reads_is_dropped(source: Input, sent: Sent) -> None:
    source.detach()
    source.attach(1, sent)
    source.send(bytes(INPUT_WINDOW + 10))
    source.drop()
    source.drop()
    assert source.waiting == 0
    assert source.send(b"more") == 0
    source.end()
    count = len(sent.frames)
    assert source.granted(INPUT_WINDOW - MAX_PAYLOAD)
    assert len(sent.frames) == count


def test_the_next_process_gets_what_waits(source: Input, sent: Sent) -> None:
    """As after a guest's reboot: with a window of its own, and the end."""
    source.detach()
    source.attach(1, sent)
    source.send(bytes(INPUT_WINDOW) + b"rest")
    source.end()
    source.drop()
    source.detach()
    assert source.send(b"late") == 0, "it has ended"
    source.attach(2, sent)
    assert sent.frames[-1] == (2, END, INPUT, b"")
    other, again = Input(), Sent()
    other.detach()
    other.attach(1, again)
    other.send(bytes(IN_A_WINDOW) + bytes(MAX_PAYLOAD))
    other.end()
    assert len(again.frames) == 4
    other.detach()
    assert other.waiting == MAX_PAYLOAD, "nothing is on the way any more"
    other.attach(2, again)
    assert again.frames[4:] == [(2, DATA, INPUT, bytes(MAX_PAYLOAD)), (2, END, INPUT, b"")]


def test_who_sends_from_a_callback_comes_second(source: Input) -> None:
    order: list[bytes] = []

    def send(data: bytes) -> None:
        if not order:
            source.send(b"second")
            assert order == [], "while the first is being sent"
        order.append(data[12:])

    source.detach()
    source.attach(1, send)
    source.send(b"first")
    assert order == [b"first", b"second"]


def test_a_failure_to_send_does_not_block_the_next(source: Input, sent: Sent) -> None:
    def fail(data: bytes) -> None:
        raise OSError("once")

    source.detach()
    with pytest.raises(OSError, match="once"):
        source.attach(1, fail) or source.send(b"x")  # type: ignore[func-returns-value]
    source.detach()
    source.attach(2, sent)
    source.send(b"y")
    assert sent.frames == [(2, DATA, INPUT, b"y")]


@pytest.mark.parametrize("dropped", [False, True])
def test_who_waits_is_woken(source: Input, sent: Sent, dropped: bool) -> None:
    source.detach()
    source.attach(1, sent)
    source.send(b"word")
    woken: list[bool] = []
    waiting = threading.Thread(target=lambda: woken.append(source.wait_below(4, 20)))
    waiting.start()
    waiting.join(0.05)
    assert not woken
    if dropped:
        source.drop()
    else:
        source.granted(1)
    waiting.join(10)
    assert woken == [True]
