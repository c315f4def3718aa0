"""Messages and descriptors over a socket, and what is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpass.session import messages
from kvmpass.session.messages import MAX_DESCRIPTORS, MAX_MESSAGE, BadMessage

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The descriptors of received messages are closed again, or the test fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)
    before = len([*Path("/proc/self/fd").iterdir()])
    yield ours, theirs
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    ours.close()
    theirs.close()


def test_a_message_with_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    messages.send(ours, {"do": "exec", "text": "\udc80"}, [0, 1, 2])
    received = messages.receive(theirs)
    assert received is not None
    message, fds = received
    try:
        assert message == {"do": "exec", "text": "\udc80"}
        assert len(fds) == MAX_DESCRIPTORS
        assert [os.get_inheritable(fd) for fd in fds] == [False] * 3
        assert all(os.path.sameopenfile(fd, number) for number, fd in enumerate(fds))
    finally:
        for fd in fds:
            os.close(fd)
    messages.send(ours, {})
    assert messages.receive(theirs) == ({}, [])
    ours.shutdown(socket.SHUT_WR)
    assert messages.receive(theirs) is None


def test_the_largest_message(pair: Pair) -> None:
    ours, theirs = pair
    text = "x" * (MAX_MESSAGE - len('{"a": ""}'))
    messages.send(ours, {"a": text})
    assert messages.receive(theirs) == ({"a": text}, [])
    with pytest.raises(BadMessage, match=f"a message of {MAX_MESSAGE + 1} bytes, at most {MAX_MESSAGE}"):
        messages.send(ours, {"a": text + "x"})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x" * (MAX_MESSAGE + 2), "too large"),
        (b'{"a": 1', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not an object"),
        (b"1", "not an object"),
        (b"", "an empty message with descriptors"),
    ],
    ids=range(7),
)
def test_what_is_none(pair: Pair, data: bytes, said: str) -> None:
    """Its descriptors are closed."""
    ours, theirs = pair
    socket.send_fds(ours, [data], [0, 1])
    with pytest.raises(BadMessage, match=said):
        messages.receive(theirs)


def test_too_many_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [b"{}"], [0] * (MAX_DESCRIPTORS + 1))
    with pytest.raises(BadMessage, match="more descriptors"):
        messages.receive(theirs)


def test_whose_process_it_is(pair: Pair) -> None:
    assert messages.peer(pair[0]) == os.geteuid()
