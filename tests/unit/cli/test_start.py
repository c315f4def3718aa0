"""What the process of ``kvmpass start`` tells those who wait for its guest's end."""

from __future__ import annotations

import gc
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpass._garbage import collect_as_usual, collect_rarely
from kvmpass.cli import start
from kvmpass.cli.start import _answer
from kvmpass.guest import CopiedOut, GuestResult, GuestSpec
from kvmpass.machine import GuestOutcome
from kvmpass.session import messages


def result(failures: tuple[str, ...] = (), left_out: tuple[str, ...] = (), copies: int = 1) -> GuestResult:
    copied = CopiedOut("/results", "/tmp/results", 0, 0, left_out, None)
    return GuestResult(GuestOutcome.POWEROFF, None, failures, "", (copied,) * copies)


def test_warnings_have_the_guests_failures_and_what_is_missing() -> None:
    answer = _answer(result(("no files were sent: the guest hangs",), ("link: a symlink",)))
    assert answer == {
        "status": 0,
        "outcome": "the guest powered off",
        "warnings": [
            "warning: error in the guest: no files were sent: the guest hangs",
            "warning: --copy-out /results: left out: link: a symlink",
        ],
    }


def test_a_guest_with_many_failures_does_not_hide_what_is_missing() -> None:
    """Its init may report 64."""
    answer = _answer(result(tuple(map(str, range(64))), ("link: a symlink",), copies=2))
    assert answer["warnings"] == [
        *(f"warning: error in the guest: {number}" for number in range(8)),
        "warning: and more",
        *["warning: --copy-out /results: left out: link: a symlink"] * 2,
    ]


@pytest.mark.parametrize("letter", ["a", "\U0001d11e"])
def test_whatever_a_guest_makes_warnings_of_the_answer_can_be_sent(letter: str) -> None:
    """Each of the letters is twelve bytes in a message, in the worst case."""
    answer = _answer(result((letter * 4096,) * 64, (letter * 4096,) * 17, copies=20))
    assert answer["warnings"][-1] == "warning: and more"
    lines = [line for line in answer["warnings"] if line != "warning: and more"]
    assert {len(line) for line in lines} == {301}
    assert {line.rstrip(f"{letter}…") for line in lines} == {
        "warning: error in the guest: ",
        "warning: --copy-out /results: left out: ",
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        messages.send(ours, answer)
        assert messages.receive(theirs) == (answer, [])


@pytest.mark.parametrize("command", [True, False])
def test_garbage_is_collected_as_usual_once_the_guest_runs(command: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the command; a program that uses this package keeps what it has set."""
    usual, frozen, kept = gc.get_threshold(), gc.get_freeze_count(), GuestSpec(session=True)
    found: list[Any] = []

    def stay(*arguments: Any, **options: Any) -> GuestResult:
        found.append(gc.get_threshold())
        arguments[3](Path("/directory"))
        found.append(gc.get_threshold())
        return result()

    monkeypatch.setattr(start, "guest_spec", lambda *arguments, **options: kept)
    monkeypatch.setattr(start, "stay", stay)
    monkeypatch.setattr(start, "in_background", lambda run: run(lambda directory: found.append(directory)))
    try:
        gc.set_threshold(123, 4, 5)
        if command:
            collect_rarely()
        assert CliRunner().invoke(start.start, ["--name", "one"], obj=None).exit_code == 0
        assert found == [(50_000 if command else 123, 4, 5), Path("/directory"), (123, 4, 5)]
        assert (gc.get_freeze_count() > frozen) == command
    finally:
        collect_as_usual()
        gc.unfreeze()
        gc.set_threshold(*usual)
