"""A signal that the command line was told to ignore stays ignored; any other ends it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# In place of the emulated host: the signal that comes while it runs, then the status of a program that fails.
PROGRAM = """
import os, subprocess, sys
import kvmpass.cli.lab
from kvmpass.cli.main import main
from kvmpass.lab import LabResult

class Lab:
    def __init__(self, config, say):
        pass

    def run(self, command):
        os.kill(os.getpid(), int(command[0]))
        return LabResult(subprocess.run(["sh", "-c", "exit 7"]).returncode, "exited", "", 0, True)

kvmpass.cli.lab.Lab = Lab
main(["lab", "run", "--", sys.argv[1]])
"""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def status(sent: signal.Signals, *ignored: signal.Signals) -> int:
    """Of ``kvmpass lab run``, started with some signals ignored, that is sent one while it runs."""

    def prepare() -> None:
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    words = [sys.executable, "-c", PROGRAM, str(int(sent))]
    return subprocess.run(words, preexec_fn=prepare, timeout=120, check=False).returncode


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.usefixtures("usual_signals")
def test_a_signal_ends_it(number: signal.Signals) -> None:
    assert status(number, *(other for other in ENDING if other != number)) == 128 + number


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.usefixtures("usual_signals")
def test_one_that_it_was_told_to_ignore_does_not(number: signal.Signals) -> None:
    assert status(number, number) == 7


@pytest.mark.usefixtures("usual_signals")
def test_how_its_children_end_is_seen_where_that_was_ignored() -> None:
    assert status(signal.SIGHUP, signal.SIGHUP, signal.SIGCHLD) == 7
