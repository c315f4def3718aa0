"""Hostile agents and hosts.

Whatever an agent sends, the host keeps little, calls back nothing that is wrong, and hangs nobody. Whatever the agent
gets, it stays in step or ends.
"""

from __future__ import annotations

import os
import random
import runpy
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import setuptools
from support.agent import LocalAgent
from support.repository import ROOT

from kvmpass.errors import GuestDied
from kvmpass.guest import frames
from kvmpass.guest.agent import Agent
from kvmpass.guest.frames import NUMBERS, BadFrame, FrameReader, encode
from kvmpass.guest.input import Input
from kvmpass.guest.process import WINDOW, AgentProcess

SEEDS = 2000 if os.environ.get("KVMPASS_SOAK") else 150
FRAMES = 300
HELLO = encode(0, frames.HELLO, NUMBERS.pack(frames.VERSION, 1000)) + encode(0, frames.READY)


def numbers(process: int, kind: int, first: int, second: int = 0, stream: int = 0) -> bytes:
    return encode(process, kind, NUMBERS.pack(first, second), stream)


def random_frame(rng: random.Random) -> bytes:
    """Mostly of the right form, so that it gets far."""
    kind = rng.choice([*range(1, 9), *range(16, 22), frames.DATA, frames.END, frames.CREDIT, rng.randrange(256)])
    process = rng.choice([0, 1, 2, 3, 4, rng.randrange(1 << 32)])
    payload = rng.choice(
        [
            b"",
            NUMBERS.pack(
                rng.choice([0, 1, 9, rng.randrange(1 << 32)]), rng.choice([0, 1, 255, rng.randrange(1 << 32)])
            ),
            rng.randbytes(rng.randrange(64)),
            bytes(rng.randrange(frames.MAX_PAYLOAD)),
        ]
    )
    return encode(process, kind, payload, rng.choice([0, 1, 2, 3, rng.randrange(256)]))


@pytest.mark.parametrize("batch", range(10))
def test_random_frames(batch: int) -> None:
    for seed in range(batch, SEEDS, 10):
        rng = random.Random(seed)
        sent = bytearray()
        failures: list[str] = []
        ended: list[AgentProcess] = []
        received = dict.fromkeys(range(1, 5), 0)
        agent = Agent(sent.extend, on_failure=failures.append, on_bad_frame=failures.append)

        def receive(process: AgentProcess, stream: int, data: bytes, received: dict[int, int] = received) -> None:
            assert stream in (frames.OUTPUT, frames.ERRORS)
            received[process.number] += len(data)

        source = Input()
        processes = [
            agent.start(["a"], input=source, receive=receive, on_end=ended.append),
            agent.start(["b"], receive=receive, on_end=ended.append),
            agent.start(["c"], on_end=ended.append),
            agent.start(["d"], terminal=(1, 1), on_end=ended.append),
        ]
        source.send(bytes(300_000))
        agent.feed(HELLO)
        for _ in range(FRAMES):
            data = random_frame(rng)
            cut = rng.randrange(len(data))
            agent.feed(data[:cut])
            agent.feed(data[cut:])
            if agent.failure is not None:
                break
        assert len(agent._reader._rest) < frames.MAX_FRAME
        assert len(ended) == len(set(ended))
        assert all(size <= 2 * WINDOW for size in received.values())
        assert all(len(kept) <= WINDOW for process in processes for kept in process._kept.values())
        assert set(agent._processes) <= {1, 2, 3, 4}
        FrameReader().feed(bytes(sent))  # what was sent is made of frames
        size = len(sent)
        agent.fail("over")
        for process in processes:
            if process.returncode is None:
                with pytest.raises(GuestDied):
                    process.wait(0)
            else:
                assert -64 <= process.returncode <= 255
        agent.feed(random_frame(rng))
        assert len(sent) == size


def test_random_bytes() -> None:
    for seed in range(SEEDS):
        rng = random.Random(seed)
        failures: list[str] = []
        agent = Agent(lambda data: None, on_bad_frame=failures.append)
        for _ in range(5):
            agent.feed(rng.randbytes(rng.randrange(1, 100)))
        assert len(failures) <= 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        (numbers(1, frames.DATA, 0, stream=frames.STATUS) * 2, "more than were granted"),
        (encode(1, frames.DATA, b"x", frames.STATUS), "a status of 1 bytes"),
        (encode(1, frames.DATA, bytes(32000), frames.OUTPUT) * 33, "more than were granted"),
        (numbers(1, frames.CREDIT, 1), "more input was read than sent"),
        (encode(1, frames.CREDIT, b"x"), "1 bytes in a frame"),
        (numbers(1, frames.EXITED, 65), "an end by signal 65"),
        (numbers(1, frames.EXITED, 0, 256), "status 256"),
        (b"\xff" * 12, "a frame of 4294967295 bytes"),
    ],
)
def test_what_violates_the_protocol(wrong: bytes, said: str) -> None:
    failures: list[str] = []
    agent = Agent(lambda data: None, on_bad_frame=failures.append)
    process = agent.start(["a"], input=Input(), receive=lambda process, stream, data: None)
    agent.feed(HELLO + wrong)
    assert len(failures) == 1 and said in failures[0]
    with pytest.raises(GuestDied, match="violated its protocol"):
        process.wait(0)
    with pytest.raises(GuestDied):
        agent.start(["b"])


@pytest.mark.parametrize(
    "first",
    [
        encode(0, frames.READY),
        numbers(0, frames.HELLO, frames.VERSION + 1),
        encode(0, frames.HELLO, b"x"),
        encode(1, frames.END),
    ],
)
def test_the_version_comes_first(first: bytes) -> None:
    agent = Agent(lambda data: None)
    agent.feed(first + HELLO)
    assert agent.failure is not None
    assert not agent.ready


def test_late_frames_and_those_of_strangers_are_ignored() -> None:
    agent = Agent(lambda data: None)
    process = agent.start(["a"])
    end = b"".join(encode(1, frames.END, stream=stream) for stream in (1, 2, 3))
    agent.feed(HELLO + encode(7, frames.DATA, b"x", 1) + numbers(1, frames.EXITED, 0, 3) + end)
    assert process.wait(0) == 3
    agent.feed(
        encode(1, frames.DATA, bytes(32000), 1) * 100 + numbers(1, frames.EXITED, 0, 4) + encode(9, frames.PONG)
    )
    assert (agent.failure, process.returncode, agent._processes, agent._pings) == (None, 3, {}, {})


def test_failures_are_shown_without_control_characters() -> None:
    failures: list[str] = []
    agent = Agent(lambda data: None, on_failure=failures.append)
    agent.feed(HELLO + encode(0, frames.FAILURE, b"a\x1b[31m\xffb" + bytes(2000)))
    assert failures[0].startswith("a [31m") and failures[0].isprintable()
    assert len(failures[0]) == 512


def test_a_reader_of_frames_keeps_less_than_one() -> None:
    reader = FrameReader()
    frame = encode(5, frames.DATA, bytes(frames.MAX_DATA), 1)
    assert reader.feed(frame[:-1]) == []
    (found,) = reader.feed(frame[-1:] + b"\0")
    assert (found.process, found.type, found.stream, len(found.payload)) == (5, frames.DATA, 1, frames.MAX_DATA)
    with pytest.raises(BadFrame, match="bytes"):
        FrameReader().feed((frames.MAX_DATA + 1).to_bytes(4, "little") + bytes(8))


# --- the other way round: the program itself, and a host that sends anything

PROGRAMS = (
    (b"true",),
    (b"cat",),
    (b"head", b"-c", b"100000", b"/dev/zero"),
    (b"sleep", b"0.05"),
    (b"/nowhere",),
)
LARGEST = (1 << 32) - 1


def random_start(rng: random.Random) -> bytes:
    """What starts one of these programs, or is not quite that: no other name of a program is ever sent."""
    words, variables = rng.choice(PROGRAMS), rng.choice([(), (b"A=b",)])
    head = frames.START_HEAD.pack(
        rng.choice([0, 1, 2, 3, 4, 7, rng.getrandbits(32)]),
        rng.choice([0, 1, 4096, WINDOW, LARGEST]),
        rng.getrandbits(16),
        rng.getrandbits(16),
        rng.choice([len(words)] * 4 + [0, len(words) + 1, LARGEST]),
        rng.choice([len(variables)] * 4 + [len(variables) + 1, LARGEST]),
    )
    strings = (rng.choice([b"", b"", b"/nowhere"]), rng.choice([b"", b"/", b"/nowhere"]), *words, *variables)
    payload = head + b"".join(string + b"\0" for string in strings)
    return payload if rng.randrange(4) else payload[: rng.randrange(len(payload))]


def random_frames(rng: random.Random) -> bytes:
    """One frame of a host; seldom one that is too large, after which nothing can be decoded."""
    process, stream = rng.choice([0, *range(1, 80), rng.getrandbits(32)]), rng.choice([0, 0, 1, 2, 3, 255])
    kind = rng.choice([1, 1, *range(1, 8), *range(1, 8), rng.randrange(256)])
    if rng.randrange(400) == 0:
        return b"\xff" * 4 + rng.randbytes(rng.randrange(8, 64))
    if kind == frames.START:
        return encode(process, kind, random_start(rng), rng.choice([0, 0, 0, 1]))
    if kind == frames.POWER_OFF and rng.randrange(50):
        kind = frames.PING
    number = NUMBERS.pack(rng.choice([0, 1, 9, 15, WINDOW, LARGEST]), 0)
    small = rng.randbytes(rng.randrange(64))
    return encode(process, kind, rng.choice([b"", number, number, small, bytes(rng.randrange(8000))]), stream)


@pytest.fixture
def trapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program, built so that undefined behaviour traps."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    sources, arguments = runpy.run_path(str(ROOT / "setup.py"))["PROGRAMS"]["kvmpass/initramfs/agent"]
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    files = [ROOT / "cffi_build" / source for source in sources]
    subprocess.run(["gcc", *arguments, *checks, "-o", tmp_path / "agent", *files], check=True)
    return tmp_path / "agent"


def test_a_host_that_sends_anything(trapping: Path) -> None:
    """The program ends by itself, or goes on answering; what it sends is always of the right form."""
    ends, answered = set[int](), 0
    for seed in range(SEEDS // 5):
        rng = random.Random(seed)
        local = LocalAgent(program=trapping)
        for _ in range(FRAMES):
            data = random_frames(rng)
            cut = rng.randrange(len(data))
            local.send(data[:cut])
            local.send(data[cut:])
            if local.agent.failure is not None:
                break
        with suppress(GuestDied):
            local.agent.ping(20)
            answered += 1
        ends.add(local.close())
        assert local.failures == [], seed
    assert ends <= {0, 1}, "by a signal"
    assert 0 < answered < SEEDS // 5, "the frames miss what they are aimed at"
