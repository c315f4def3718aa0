"""How the guest's init waits: without a process where its shell can."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from kvmpass.initramfs import init

TIMES = 3


def wait(shell: list[str], directory: Path) -> tuple[float, list[str], str]:
    """Let a shell wait as init.sh does; return the seconds, the programs that it has run, and errors."""
    lines = init.SCRIPT.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if "read -t" in line)
    script = "\n".join(lines[first : lines.index("fi", first) + 1]).replace(init.DIRECTORY, str(directory))
    (directory / "settings").write_text("COMMAND=''\n")
    os.mkfifo(directory / "never")
    script += "\npause" * TIMES
    started = time.monotonic()
    done = subprocess.run(
        [*shell, "-c", script],
        env={"PATH": str(directory / "bin"), "RUN": str(directory / "run")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    run = directory / "run"
    return time.monotonic() - started, run.read_text().splitlines() if run.exists() else [], done.stderr


def provide(directory: Path, *names: str) -> None:
    """Make programs that record that they were run."""
    (directory / "bin").mkdir()
    for name in names:
        program = directory / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>"$RUN"\n')
        program.chmod(0o755)


def test_busybox_reads_with_a_time_limit(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox-static")
    provide(tmp_path)
    seconds, run, errors = wait([busybox, "sh"], tmp_path)
    assert (run, errors) == ([], "")
    assert seconds >= 0.02 * TIMES


@pytest.mark.parametrize(
    ("programs", "run"), [(("usleep", "sleep"), "usleep 20000"), (("sleep",), "sleep 1")], ids=["usleep", "sleep"]
)
def test_a_shell_that_reads_without_fractions_runs_a_program(
    tmp_path: Path, programs: tuple[str, ...], run: str
) -> None:
    """As a busybox without FEATURE_SH_READ_FRAC does, dash refuses the option."""
    dash = shutil.which("dash")
    if dash is None:
        pytest.skip("needs dash")
    provide(tmp_path, *programs)
    _, found, errors = wait([dash], tmp_path)
    assert (found, errors) == ([run] * TIMES, "")
