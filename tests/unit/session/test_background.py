"""A process that outlives the command that has started it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, time
from pathlib import Path
from kvmpass.session.background import in_background

def run(ready):
    Path("pid").write_text(str(os.getpid()))
    ready(Path.cwd())
    time.sleep(60)
    return 0

in_background(run)
"""


def test_it_keeps_no_descriptor_of_its_starter(tmp_path: Path) -> None:
    """A script's flock would not be released, and a reader of its pipe would wait for the guest's end."""
    read, write = os.pipe()
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, pass_fds=[write], check=True, timeout=60)
    os.close(write)
    try:
        assert select.select([read], [], [], 10)[0]
        assert os.read(read, 1) == b""
    finally:
        os.close(read)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


KILLED = """
import os, sys
from pathlib import Path
from kvmpass.session.background import in_background

def run(ready):
    print(os.getpid(), flush=True)
    os.read(int(sys.argv[1]), 1)
    directory = Path.cwd()
    try:
        ready(directory)
    finally:
        (directory / "unwound").touch()
    return 0

in_background(run)
"""


def test_it_ends_in_order_if_its_starter_was_killed(tmp_path: Path) -> None:
    """Nobody waits for it, nor knows its name: its devices must not stay with it."""
    read, write = os.pipe()
    words = [sys.executable, "-c", KILLED, str(read)]
    with subprocess.Popen(words, cwd=tmp_path, pass_fds=[read], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        end = os.pidfd_open(int(starter.stdout.readline()))
        starter.kill()
        starter.wait(60)
        os.close(read)
        os.close(write)  # it goes on
    assert select.select([end], [], [], 60)[0]
    os.close(end)
    assert (tmp_path / "unwound").exists()
