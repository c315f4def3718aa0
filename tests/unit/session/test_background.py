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
