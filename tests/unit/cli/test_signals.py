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
# Sends the signal at one moment of a command that would succeed.
MOMENTS = """
import atexit, os, sys
number, moment = int(sys.argv[1]), sys.argv[2]

class Importing:
    def find_spec(self, name, path, target=None):
        if name == moment:
            os.kill(os.getpid(), number)

class Freed:
    def __del__(self):
        os.kill(os.getpid(), number)
        str(number)

def callback():
    Freed()
    import time
    time.sleep(30)

sys.meta_path.insert(0, Importing())
if moment == "at exit":
    atexit.register(os.kill, os.getpid(), number)
from kvmpass.__main__ import main
if moment == "in a finalizer":
    import kvmpass.cli.main
    kvmpass.cli.main.kvmpass.callback = callback
sys.argv = ["kvmpass", "completion", "bash"]
main()
"""
# Signals and exceptions that Python drops, in a finalizer: what the second word does.
DROPPED = """
import os, signal, sys, threading, time
from kvmpass import _signals
from kvmpass._signals import raise_at_signals

class Freed:
    def __init__(self, *numbers):
        self.numbers = numbers

    def __del__(self):
        if not self.numbers:
            raise SystemExit(128 + signal.SIGTERM)
        for number in self.numbers:
            os.kill(os.getpid(), number)
        str(self)

def free(*numbers):
    Freed(*numbers)

raise_at_signals()
if sys.argv[1] in ("default", "two"):
    _signals._AGAIN_SECONDS = 0.5  # longer than a busy machine keeps the next statement waiting
match sys.argv[1]:
    case "default":
        free(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    case "two":
        free(signal.SIGTERM)
        free(signal.SIGHUP)
        try:
            time.sleep(30)
        except SystemExit as first:
            print(first.code, flush=True)
    case "exit":
        free()
        time.sleep(0.1)
        sys.exit(3)
    case "thread":
        thread = threading.Thread(target=free)
        thread.start()
        thread.join()
        time.sleep(0.1)
        sys.exit(3)
time.sleep(30)
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


@pytest.mark.parametrize("moment", ["enum", "click", "kvmpass.cli.completion", "in a finalizer", "at exit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("usual_signals")
def test_a_signal_ends_it_without_a_traceback_whenever_it_comes(number: signal.Signals, moment: str) -> None:
    """Python prints and drops what is raised in a finalizer, and in some of what an import calls."""
    words = [sys.executable, "-c", MOMENTS, str(int(number)), moment]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (128 + number, "")  # click ends the line of ^C


@pytest.mark.parametrize(
    ("case", "status", "printed", "error"),
    [
        ("default", -signal.SIGTERM, "", ""),
        ("two", 128 + signal.SIGHUP, f"{128 + signal.SIGTERM}", ""),
        ("exit", 3, "", "SystemExit: 143"),
        ("thread", 3, "", "SystemExit: 143"),
    ],
)
@pytest.mark.usefixtures("usual_signals")
def test_only_signals_are_raised_again(case: str, status: int, printed: str, error: str) -> None:
    """Each of them, whatever its handler is by then; and no exit of another origin."""
    words = [sys.executable, "-c", DROPPED, case]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (status, printed), done.stderr
    assert done.stderr.splitlines()[-1:] == ([error] if error else []), done.stderr
    assert "signal only works" not in done.stderr
