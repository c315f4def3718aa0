"""Guests that stay, by the commands: many in one boot, terminals, other users, SIGKILL under load."""

from __future__ import annotations

import importlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from support.guests import kvmpass, run
from support.sessions import MEBIBYTE, driver, expected, guests, worker, zeroes

from kvmpass.cli.main import main
from kvmpass.session.directory import base_directory

pytestmark = [pytest.mark.amdvi(duration=25), pytest.mark.usefixtures("as_without_tests")]
SOAK = bool(os.environ.get("KVMPASS_SOAK"))
COMMANDS = 200 if SOAK else 10
AT_ONCE = 10
SECONDS = 100
KEY_SECONDS = 60
NOBODY = 65534


def be_kvmpass(*arguments: str) -> NoReturn:
    """In a forked process: run the command, with the descriptors that it has as standard streams."""
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - pytest's are not
    try:
        main(list(arguments))
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(1)


def as_nobody(*arguments: str) -> tuple[int, str]:
    """``kvmpass`` of another user, who looks where root's guests are: its status, and all that it prints."""
    importlib.import_module(f"kvmpass.cli.{arguments[0]}")  # that user may not read all of it
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(writer, number)
        os.environ["KVMPASS_RUNTIME_DIR"] = str(base_directory())
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        be_kvmpass(*arguments)
    os.close(writer)
    with os.fdopen(reader) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


class Terminal:
    """``kvmpass`` on a terminal of its own: a child of this process, which has imported all that it needs."""

    def __init__(self, *arguments: str) -> None:
        self._pid, self.fd = pty.fork()
        if self._pid == 0:
            be_kvmpass(*arguments)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a pattern, and forget what came up to its end."""
        deadline = time.monotonic() + KEY_SECONDS
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, (pattern, self.text)
            if select.select([self.fd], [], [], 1)[0]:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
        self.text = self.text[match.end() :]
        return match

    def end(self) -> int:
        """Its exit status; that of SIGKILL if it does not end."""
        try:
            while select.select([self.fd], [], [], KEY_SECONDS)[0]:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
            os.kill(self._pid, signal.SIGKILL)
        except OSError:  # the other side is closed
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self.fd)
        return status


@pytest.fixture
def stage(nvme: str) -> Iterator[str]:
    """A guest with a drive and this host's files, by the command."""
    started = run("assign", "-d", "--root", "host", "--memory", "384M", "--name", "stage", nvme)
    assert (started.returncode, started.stdout) == (0, b"stage\n"), started.stderr
    yield "stage"
    for guest in guests():
        os.kill(guest["pid"], signal.SIGKILL)
    run("restore")


@pytest.mark.amdvi(duration=60)
def test_a_day_with_a_guest(stage: str, nvme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One boot: commands at once, what cannot be run, files, terminals, and at last a SIGKILL under load."""
    guest = guests()[0]
    assert (guest["name"], guest["devices"], guest["state"]) == (stage, [nvme], "running")

    def work(number: int) -> tuple[int, bool, bytes]:
        words = kvmpass("exec", "-i", stage, "--", *worker(number))
        sent = data if SOAK or number == 0 else data[: MEBIBYTE // 8]
        done = subprocess.run(words, input=sent, capture_output=True, timeout=SECONDS, check=False)
        return done.returncode, done.stdout == sent, done.stderr

    data = os.urandom(MEBIBYTE)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, done in enumerate(pool.map(work, range(COMMANDS))):
            status = expected(number)
            assert done == (status if status >= 0 else 128 - status, True, b"%d\n" % number)

    assert run("exec", stage, "--", "no-such-program").returncode == 127
    assert run("exec", stage, "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert run("exec", "--timeout", "1", stage, "--", "sleep", "100").returncode == 124
    assert run("exec", "-e", "A=b c", "-w", "/tmp", nvme, "--", "sh", "-c", "echo $A $PWD").stdout == b"b c /tmp\n"
    assert run("exec", "elsewhere", "--", "true").returncode == 125
    for words, reason in (
        (("start", "--name", stage, nvme), f"a guest {stage} runs already"),
        (("start", "--name", "other", nvme), f"{nvme} is assigned to the guest {stage}"),
        (("assign", nvme, "--", "true"), f"{nvme} is assigned to the guest {stage}"),
    ):
        refused = run(*words)
        assert (refused.returncode, reason in refused.stderr.decode()) == (125, True), refused.stderr
    for words, status in ((["exec", stage, "--", "true"], 125), (["ps"], 1), (["stop", stage], 1)):
        denied, text = as_nobody(*words)
        assert (denied, "Permission denied" in text, nvme in text) == (status, True, False), text
    left_alone(stage)

    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_bytes(data)
    assert run("cp", str(tmp_path / "in"), f"{stage}:/tmp/").returncode == 0
    assert run("cp", f"{stage}:/tmp/in/file", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == data

    monkeypatch.setenv("TERM", "vt100")  # its programs ask the terminal nothing
    interactive(stage)
    attached(stage)
    assert b"console marker" in run("logs", stage).stdout

    load = [zeroes(stage) for _ in "ab"]
    os.kill(guest["pid"], signal.SIGKILL)
    for process in load:
        process.communicate(timeout=SECONDS)
    assert [process.returncode for process in load] == [126, 126]
    assert [guest["state"] for guest in guests()] == ["dead"]
    restored = run("restore")
    assert (restored.returncode, b"stage: removed" in restored.stdout, driver(nvme)) == (0, True, "nvme")
    assert guests() == []


def left_alone(guest: str) -> None:
    """A reader that stalls stops its own command only, and one that goes ends it; so do signals to ``exec``."""
    stalled = zeroes(guest)
    assert run("exec", guest, "--", "echo", "meanwhile").stdout == b"meanwhile\n"
    assert stalled.poll() is None
    assert stalled.stdout is not None
    stalled.stdout.close()
    assert stalled.wait(SECONDS) == 128 + signal.SIGPIPE

    script = "trap 'echo asked; exit 7' TERM; echo up; while :; do sleep 0.1; done"
    asked = subprocess.Popen(kvmpass("exec", guest, "--", "sh", "-c", script), stdout=subprocess.PIPE)
    assert asked.stdout is not None
    assert asked.stdout.readline() == b"up\n"
    asked.terminate()
    assert (asked.communicate(timeout=SECONDS)[0], asked.returncode) == (b"asked\n", 7)

    script = "echo $$; exec sleep 1000"
    killed = subprocess.Popen(kvmpass("exec", guest, "--", "sh", "-c", script), stdout=subprocess.PIPE)
    assert killed.stdout is not None
    pid = int(killed.stdout.readline())
    killed.kill()
    killed.communicate()
    script = f"while kill -0 {pid} 2>/dev/null; do sleep 0.1; done"
    assert run("exec", "--timeout", str(SECONDS), guest, "--", "sh", "-c", script).returncode == 0


def interactive(guest: str) -> None:
    """A shell on a terminal: editing, a resize, Ctrl-C, Ctrl-Z, vi that is stopped and goes on."""
    terminal = Terminal("exec", "-it", "-w", "/tmp", guest, "--", "bash", "--norc")
    terminal.expect("# ")
    terminal.type("cho abq\x7f\x1b[DX ${TERM}\x01e\x05\r")  # a backspace, the left arrow, to the begin, to the end
    terminal.expect(r"\raX vt100b\r\n")
    terminal.expect("# ")
    subprocess.run(["stty", "rows", "41", "cols", "97"], stdin=terminal.fd, check=True)
    terminal.type("until [ \"$(stty size)\" = '41 97' ]; do sleep 0.1; done; echo res''ized\r")
    terminal.expect("resized")
    terminal.expect("# ")
    terminal.type("sh -c 'echo sl\"\"eeping; exec sleep 1000'\r")
    terminal.expect("sleeping")
    terminal.type("\x03")
    terminal.expect("# ")
    terminal.type("echo st''atus $?\r")
    terminal.expect("status 130")
    terminal.type("vi written\r")
    terminal.expect(r"written.*\[New\]")
    terminal.type("iword")
    terminal.expect("word")
    terminal.type("\x1b")
    time.sleep(0.5)  # what follows it at once would be read as a key's sequence
    terminal.type(":w\r")
    terminal.expect("1L, 5B")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect("# ")
    terminal.type("cat written; fg\r")
    terminal.expect(r"\rword\r\n")
    terminal.expect("word")
    terminal.type(":q\r")
    terminal.expect("# ")
    terminal.type("exit 9\r")
    assert terminal.end() == 9, terminal.text


def attached(guest: str) -> None:
    """The console: attach, type, detach; what was typed before is there when it is attached again."""
    for number in range(2):
        console = Terminal("console", guest)
        console.expect("detaches from stage")
        if number == 0:
            console.expect("# ")
            console.type("kept=marker; echo console $kept\r")
        else:
            console.type("\recho again $kept\r")
        console.expect(r"console marker\r\n" if number == 0 else r"again marker\r\n")
        console.type("\x1d")
        assert console.end() == 0
