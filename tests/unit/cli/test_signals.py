"""A signal that was ignored at the start stays ignored; any other signal ends the command."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Replaces the emulated host: sends the signal while it runs, then returns the status of a program that fails.
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
    """The exit status of ``kvmpass lab run``, started with ``ignored`` signals, after ``sent``."""

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
def test_a_signal_that_was_ignored_does_not(number: signal.Signals) -> None:
    assert status(number, number) == 7


@pytest.mark.usefixtures("usual_signals")
def test_the_end_of_a_child_is_seen_if_sigchld_was_ignored() -> None:
    assert status(signal.SIGHUP, signal.SIGHUP, signal.SIGCHLD) == 7
