"""The confined daemon, for real: what it sees, and that every end of every process is the end of all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kvmpass.errors import ShareError
from kvmpass.files import FileDaemon, User, caller, covers, find_daemon
from kvmpass.files import daemon as module
from kvmpass.files.daemon import CONFINE, refusal

NOBODY = User(65534, 65534)


def serving(source: Path, **arguments: Any) -> FileDaemon:
    """A daemon, or the reason why this machine has none."""
    if find_daemon() is None:
        pytest.skip("no virtiofsd: apt-get install qemu-system-common (Debian 12) or virtiofsd makes it run")
    try:
        return FileDaemon(source, caller({}), covers=covers(str(source), []), **arguments)
    except ShareError as error:
        if "user namespace" in str(error):
            pytest.skip(f"{error}: a machine with user namespaces makes it run")
        raise


@pytest.fixture
def daemon() -> Iterator[FileDaemon]:
    with serving(Path("/")) as made:
        yield made


def within(seconds: float, happens: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    """All processes below one, parents first."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found[1:]


def processes(daemon: FileDaemon) -> list[int]:
    """The three processes; the last one is the program, once it serves."""
    first = daemon._process.pid
    assert within(10, lambda: "virtiofsd" in Path(f"/proc/{[first, *children(first)][-1]}/comm").read_text())
    found = [first, *children(first)]
    assert within(10, lambda: str(Path(f"/proc/{found[-1]}/root").readlink()) == "/tmp")
    assert len(found) == 3
    return found


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_everything_is_read_only_and_the_kernels_own_is_covered(daemon: FileDaemon) -> None:
    _, _, program = processes(daemon)
    lines = [line.split() for line in Path(f"/proc/{program}/mountinfo").read_text().splitlines()]
    assert lines
    for line in lines:
        assert {"ro", "nosuid", "nodev"} <= set(line[5].split(",")), line
    root = Path(f"/proc/{program}/root")
    if os.geteuid() == 0:  # only root may look
        assert (root / "usr").is_dir()
        for name in ("proc", "sys", "dev", "run"):
            assert not list((root / name).iterdir())


def test_the_program_has_nothing_more_than_its_user(daemon: FileDaemon) -> None:
    first, second, program = processes(daemon)
    for pid in (first, second, program):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert set(status["Uid"].split()) == {str(caller({}).uid)}
        assert not os.geteuid() or not status["Groups"].strip()
    assert status["NoNewPrivs"] == "1"
    for kind in ("user", "mnt", "pid", "net"):
        own = {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for pid in ("self", program)}
        assert len(own) == 2, kind
    first_users, last_users = (str(Path(f"/proc/{pid}/ns/user").readlink()) for pid in (second, program))
    assert first_users != last_users, "its own mounts are not locked"
    limits = Path(f"/proc/{program}/limits").read_text()
    assert int(next(line.split()[4] for line in limits.splitlines() if "open files" in line)) <= 1 << 19


@pytest.mark.parametrize("number", range(3))
def test_when_one_process_is_killed_all_end(daemon: FileDaemon, number: int) -> None:
    found = processes(daemon)
    os.kill(found[number], signal.SIGKILL)
    assert within(10, lambda: not daemon.running)
    assert within(10, lambda: not alive(found)), alive(found)


@pytest.mark.parametrize(
    ("number", "remedy"), [(signal.SIGSEGV, "install another version"), (signal.SIGKILL, "lack of memory: dmesg")]
)
def test_how_it_has_ended_is_known(daemon: FileDaemon, number: signal.Signals, remedy: str) -> None:
    os.kill(processes(daemon)[-1], number)
    fate = daemon.fate()
    assert fate.startswith(f"{find_daemon()}, which serves /, was ended by {number.name}")
    assert remedy in fate


@pytest.mark.parametrize("end", ["kill -SEGV $$", "exit 3"])
def test_the_last_words_of_one_that_ends_at_once_are_kept(end: str) -> None:
    with TemporaryDirectory(dir="/var/tmp") as directory:
        program = Path(directory, "virtiofsd")
        program.write_text(f"#!/bin/sh\nseq 2000 >&2\necho the reason >&2\n{end}\n")
        for path in (program, program.parent):
            path.chmod(0o755)
        with serving(Path("/"), program=program) as daemon:
            fate = daemon.fate()
    if end == "exit 3":
        assert fate.startswith(f"{program}, which serves /, has exited with 3: ")
        assert fate.endswith("; 2000; the reason")
    else:
        assert fate.startswith(f"{program}, which serves /, was ended by SIGSEGV: ")
        assert fate.endswith("; 2000; the reason; it has crashed: install another version of it")
    assert len(fate) < 2000


def test_one_that_runs_has_no_fate(daemon: FileDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FATE_SECONDS", 0.01)
    assert daemon.fate() == ""


def test_closing_ends_all_and_leaves_no_descriptor() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with serving(Path("/")) as daemon:
        found = processes(daemon)
        assert "connection" in daemon.messages
        assert not daemon.connection.get_inheritable()
    daemon.close()
    assert daemon.messages == ""
    assert not alive(found)
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("number", range(3))
def test_closing_ends_one_that_is_stopped(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them can delay the end of what started it."""
    monkeypatch.setattr("kvmpass.files.daemon._END_SECONDS", 0.5)
    with serving(Path("/")) as daemon:
        found = processes(daemon)
        os.kill(found[number], signal.SIGSTOP)
    assert within(10, lambda: not alive(found)), alive(found)


def test_killing_the_process_that_started_it_ends_all(daemon: FileDaemon) -> None:
    """The fixture has shown that one can be started."""
    script = """import sys, time; from pathlib import Path; from kvmpass.files import FileDaemon, caller
daemon = FileDaemon(Path("/"), caller({})); print(daemon._process.pid, flush=True); time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = int(process.stdout.readline())
        found = [first, *children(first)]
        assert len(found) == 3
        process.kill()
        assert within(10, lambda: not alive(found)), alive(found)


def test_a_directory_that_the_user_cannot_read_is_refused(daemon: FileDaemon, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0)
    with pytest.raises(ShareError, match="cannot be served: Permission denied") as caught:
        serving(hidden)
    assert str(hidden) in caught.value.__notes__[0]
    with pytest.raises(ShareError, match="No such file"):
        serving(Path("/missing"))


def test_a_program_that_cannot_be_run_says_so(daemon: FileDaemon) -> None:
    with FileDaemon(Path("/"), caller({}), program=Path("/missing")) as other:
        assert within(10, lambda: not other.running)
        assert other.messages == "/missing: No such file or directory"
        assert other.messages == ""


def test_what_it_says_is_bounded_and_delays_nothing(daemon: FileDaemon) -> None:
    with TemporaryDirectory(dir="/var/tmp") as directory:
        program = Path(directory, "program")
        program.write_text("#!/bin/sh\nfor i in $(seq 100000); do echo complaint $i >&2; done\n")
        for path in (program, program.parent):
            path.chmod(0o755)
        with FileDaemon(Path("/"), caller({}), program=program) as other:
            assert within(30, lambda: not other.running)
            assert "; complaint 4400; complaint 4401; " in other.messages
            assert len(other.messages) < 2 * 4096


def test_without_a_daemon_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpass.files.daemon.find_daemon", lambda: None)
    with pytest.raises(ShareError, match="virtiofsd was not found") as caught:
        FileDaemon(Path("/"), NOBODY)
    assert "install" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "step, number, expected",
    [
        ("clone", errno.EPERM, "refuses the user namespace"),
        ("clone", errno.ENOSPC, "refuses the user namespace"),
        ("move_mount", errno.EACCES, "refuses the user namespace"),
        ("mount_setattr", errno.ENOSYS, "this kernel has no mount_setattr"),
        ("chdir", errno.EACCES, "/srv cannot be served"),
        ("bind", errno.ENOMEM, "confine: bind"),
    ],
)
def test_each_refusal_names_its_cause(step: str, number: int, expected: str) -> None:
    assert expected in str(refusal(step, number, Path("/srv"), NOBODY))


def test_the_program_explains_its_usage() -> None:
    done = subprocess.run([CONFINE, "1", "1", "ro", "/"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split()[:2]) == (125, ["usage:", str(CONFINE)])
