"""The host's side of one process: what its agent may say of it, and when it has ended."""

from __future__ import annotations

import errno
import struct
import threading

import pytest

from kvmpass.errors import GuestDied, GuestError
from kvmpass.guest import frames
from kvmpass.guest.agent import Agent
from kvmpass.guest.frames import ERRORS, INPUT, NUMBERS, OUTPUT, STATUS, BadFrame, Frame, FrameReader, Payload
from kvmpass.guest.input import Input
from kvmpass.guest.process import WINDOW, AgentProcess
from kvmpass.session.streams import OutputPipe

GRANT = WINDOW // 2


class FakeAgent:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: str | None = None
        self.answering = True
        self.sent: list[Frame] = []

    def send(self, frames: bytes) -> None:
        self.sent += FrameReader().feed(frames)


class Stage:
    """A process, and what it has received; ``kept``: without a receiver."""

    def __init__(self, *, kept: bool = False, errors: bool = True, input: Input | None = None) -> None:
        self.agent = FakeAgent()
        self.received: list[tuple[int, bytes]] = []
        self.ended: list[AgentProcess] = []
        self.process = AgentProcess(
            self.agent,
            3,
            input=input,
            errors=errors,
            receive=None if kept else lambda process, stream, data: self.received.append((stream, data)),
            on_end=self.ended.append,
        )

    def say(self, kind: int, payload: bytes = b"", stream: int = 0) -> bool:
        return self.process.handle(Frame(3, kind, stream, payload))

    def end(self, *streams: int) -> list[bool]:
        return [self.say(frames.END, stream=stream) for stream in streams]


def pair(first: int, second: int = 0) -> bytes:
    return NUMBERS.pack(first, second)


def test_it_ends_with_its_last_stream_and_its_status() -> None:
    stage = Stage()
    assert not stage.say(frames.EXITED, pair(0, 7))
    assert not stage.say(frames.EXITED, pair(0, 8)), "the first counts"
    assert stage.end(STATUS, OUTPUT) == [False, False]
    assert stage.process.returncode is None
    with pytest.raises(TimeoutError, match="not as far after 0 seconds"):
        stage.process.wait(0)
    assert stage.end(ERRORS) == [True]
    assert (stage.process.returncode, stage.process.wait(0)) == (7, 7)
    assert stage.received == [(OUTPUT, b""), (ERRORS, b"")], "not of the status"
    assert stage.ended == []
    stage.process.end()
    assert stage.ended == [stage.process]


def test_the_status_may_come_last() -> None:
    stage = Stage(errors=False)
    assert stage.end(STATUS, OUTPUT) == [False, False]
    assert stage.say(frames.EXITED, pair(9))
    assert stage.process.returncode == -9


@pytest.mark.parametrize(("number", "status", "code"), [(64, 0, -64), (0, 255, 255), (1, 0, -1), (0, 0, 0)])
def test_ends_that_can_be(number: int, status: int, code: int) -> None:
    stage = Stage(errors=False)
    stage.end(STATUS, OUTPUT)
    assert stage.say(frames.EXITED, pair(number, status))
    assert stage.process.wait(0) == code


@pytest.mark.parametrize(("number", "status"), [(65, 0), (0, 256), (1 << 31, 0)])
def test_ends_that_cannot_be(number: int, status: int) -> None:
    with pytest.raises(BadFrame, match="an end by signal"):
        Stage().say(frames.EXITED, pair(number, status))


def test_no_more_than_was_granted() -> None:
    stage = Stage()
    for stream in (OUTPUT, ERRORS):
        stage.say(frames.DATA, bytes(WINDOW), stream)
        with pytest.raises(BadFrame, match="1 bytes more than were granted"):
            stage.say(frames.DATA, b"x", stream)


def test_grants_are_sent_together() -> None:
    stage = Stage()
    stage.say(frames.DATA, bytes(WINDOW), OUTPUT)
    stage.process.grant(OUTPUT, GRANT - 1)
    stage.process.grant(ERRORS, 1)
    assert stage.agent.sent == []
    stage.process.grant(OUTPUT, 1)
    assert stage.agent.sent == [Frame(3, frames.CREDIT, OUTPUT, pair(GRANT))]
    stage.say(frames.DATA, bytes(GRANT), OUTPUT)
    stage.process.grant(OUTPUT, GRANT - 1)
    with pytest.raises(BadFrame, match="1 bytes more"):
        stage.say(frames.DATA, b"x", OUTPUT)
    stage.end(ERRORS)
    stage.process.grant(ERRORS, WINDOW)
    assert len(stage.agent.sent) == 1, "it has ended"


def test_why_it_could_not_be_run() -> None:
    stage = Stage()
    with pytest.raises(TimeoutError):
        stage.process.wait_started(0)
    assert not stage.say(frames.DATA, pair(3, errno.ENOENT), STATUS)
    stage.end(STATUS)
    with pytest.raises(FileNotFoundError) as caught:
        stage.process.wait_started(0)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, frames.EXECUTE)


def test_it_is_not_started_while_its_agent_does_not_answer() -> None:
    stage = Stage()
    stage.agent.answering = False
    with pytest.raises(GuestError, match="does not answer"):
        stage.process.wait_started(0)
    stage.end(STATUS)
    stage.process.wait_started(0)


@pytest.mark.parametrize(
    ("stage", "number", "said"),
    [
        (0, 4095, (4095, "set up")),
        (1, 4096, (0, "change root")),
        (4, 0, (0, "set up")),
        (2, 1, (1, "change directory")),
    ],
)
def test_errors_that_can_be(stage: int, number: int, said: tuple[int, str]) -> None:
    process = Stage()
    process.say(frames.DATA, pair(stage, number), STATUS)
    error = process.process.error
    assert error is not None
    assert (error.errno, error.filename) == said


def test_one_that_was_refused_has_ended() -> None:
    stage = Stage()
    assert stage.say(frames.REFUSED, pair(errno.EAGAIN))
    assert stage.process.returncode == 127
    with pytest.raises(BlockingIOError) as caught:
        stage.process.wait_started(0)
    assert caught.value.filename == "set up"
    other = Stage()
    other.say(frames.EXITED, pair(0, 1))
    assert not other.say(frames.REFUSED, pair(errno.EAGAIN))
    assert (other.process.error, other.process.returncode) == (None, None)


def test_what_it_has_read_of_its_input() -> None:
    source = Input()
    stage = Stage(input=source)
    source.detach()
    source.attach(3, stage.agent.send)
    source.send(b"word")
    assert not stage.say(frames.CREDIT, pair(4), INPUT)
    with pytest.raises(BadFrame, match="more input was read than sent"):
        stage.say(frames.CREDIT, pair(1), INPUT)
    assert not stage.say(frames.END, stream=INPUT)
    assert source.send(b"nobody") == 0
    without = Stage()
    assert not without.say(frames.CREDIT, pair(4), INPUT)
    assert not without.say(frames.CREDIT, pair(4), OUTPUT)
    assert without.end(INPUT) == [False]


def test_what_is_kept_is_read_as_far_as_asked() -> None:
    stage = Stage(kept=True)
    with pytest.raises(TimeoutError):
        stage.process.read(timeout=0)
    stage.say(frames.DATA, b"abcdef", OUTPUT)
    stage.say(frames.DATA, bytes(GRANT), ERRORS)
    assert stage.process.read(size=4, timeout=0) == b"abcd"
    assert stage.process.read(timeout=0) == b"ef"
    assert stage.agent.sent == []
    assert stage.process.read(ERRORS, timeout=0) == bytes(GRANT)
    assert [frame.stream for frame in stage.agent.sent] == [ERRORS]
    stage.say(frames.DATA, b"last", OUTPUT)
    stage.agent.failure = "gone"
    assert stage.process.read(timeout=0) == b"last"
    with pytest.raises(GuestDied, match="gone"):
        stage.process.read(timeout=0)
    stage.end(OUTPUT)
    assert stage.process.read(timeout=0) == b""


def test_a_receiver_that_raises_loses_its_own_process_alone(caplog: pytest.LogCaptureFixture) -> None:
    """What comes after it in the port, of other processes, is handled: the frames of both are one buffer."""
    sent: list[Frame] = []
    received: list[bytes] = []
    agent = Agent(lambda frames: sent.extend(FrameReader().feed(frames)))

    def fail(process: AgentProcess, stream: int, data: Payload) -> None:
        raise MemoryError

    broken = agent.start(["a"], receive=fail)
    agent.start(["b"], receive=lambda process, stream, data: received.append(bytes(data)))
    sent.clear()
    word = [frames.encode(number, frames.DATA, b"word", OUTPUT) for number in (1, 2)]
    more = [frames.encode(1, frames.DATA, bytes(frames.MAX_DATA), OUTPUT)] * (GRANT // frames.MAX_DATA)
    agent.feed(frames.encode(0, frames.HELLO, pair(frames.VERSION)) + b"".join([*word, *more]))
    assert received == [b"word"]
    assert [(frame.process, frame.type) for frame in sent] == [(1, frames.SIGNAL), (1, frames.CREDIT)]
    agent.feed(b"".join([frames.encode(1, frames.END, stream=stream) for stream in (OUTPUT, ERRORS, STATUS)]))
    agent.feed(frames.encode(1, frames.EXITED, pair(9)))
    assert broken.returncode == -9
    assert isinstance(broken.receive_error, MemoryError)
    assert len(caplog.records) == 1


def test_who_reads_what_a_failed_receiver_got_sees_its_end() -> None:
    """Also of its other stream, and of one whose end fails as well."""
    agent = Agent(lambda frames: 0)
    pipes = {stream: OutputPipe(agent, GuestDied) for stream in (OUTPUT, ERRORS)}
    failing: list[int] = []

    def receive(process: AgentProcess, stream: int, data: Payload) -> None:
        if stream in failing:
            raise MemoryError
        pipes[stream](process, stream, data)
        if data:
            failing.append(ERRORS)

    process = agent.start(["a"], receive=receive)
    agent.feed(frames.encode(0, frames.HELLO, pair(frames.VERSION)))
    for stream in (OUTPUT, ERRORS, OUTPUT):
        agent.feed(frames.encode(1, frames.DATA, b"word", stream))
    agent.feed(b"".join([frames.encode(1, frames.END, stream=stream) for stream in (ERRORS, OUTPUT, STATUS)]))
    agent.feed(frames.encode(1, frames.EXITED, pair(9)))
    assert process.wait(0) == -9
    read: list[bytes | None] = []
    reading = threading.Thread(target=lambda: read.append(pipes[OUTPUT].read()), daemon=True)
    reading.start()
    reading.join(20)
    assert read == [b"word"]


def test_streams_that_it_does_not_have_are_ignored() -> None:
    stage = Stage(errors=False)
    assert not stage.say(frames.DATA, bytes(2 * WINDOW), ERRORS)
    assert stage.received == []
    stage.end(OUTPUT)
    assert not stage.say(frames.DATA, b"late", OUTPUT)
    assert stage.received == [(OUTPUT, b"")]


@pytest.mark.parametrize("number", [0, 65, -1])
def test_signals_that_are_none(number: int) -> None:
    stage = Stage()
    with pytest.raises(ValueError, match="signal"):
        stage.process.send_signal(number)
    assert stage.agent.sent == []


def test_signals_and_sizes_until_it_has_exited() -> None:
    stage = Stage()
    stage.process.send_signal(1)
    stage.process.send_signal(64)
    stage.process.kill()
    stage.process.resize(65535, 7)
    assert [(frame.type, frame.payload) for frame in stage.agent.sent] == [
        (frames.SIGNAL, struct.pack("<I", 1)),
        (frames.SIGNAL, struct.pack("<I", 64)),
        (frames.SIGNAL, struct.pack("<I", 9)),
        (frames.RESIZE, struct.pack("<HH", 65535, 7)),
    ]
    assert {(frame.process, frame.stream) for frame in stage.agent.sent} == {(3, 0)}
    stage.say(frames.EXITED, pair(0))
    stage.process.kill()
    stage.process.resize(1, 1)
    assert len(stage.agent.sent) == 4
