"""Guests that stay: many commands in one boot, and what ends them."""

from __future__ import annotations

import hashlib
import json
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
from typing import Any

import pytest
from support.guests import kvmpass, run

import kvmpass as library
from kvmpass import host
from kvmpass.cli.main import main
from kvmpass.errors import GuestDied

pytestmark = [pytest.mark.amdvi(duration=25), pytest.mark.usefixtures("as_without_tests")]
SOAK = bool(os.environ.get("KVMPASS_SOAK"))
COMMANDS = 200 if SOAK else 30
AT_ONCE = 10
MEBIBYTE = 1 << 20
SECONDS = 100
KEY_SECONDS = 20


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def guests() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("ps", "--json").stdout)["guests"]
    return found


class Terminal:
    """``kvmpass`` on a terminal of its own: a child of this process, which has imported all that it needs."""

    def __init__(self, *arguments: str) -> None:
        self._pid, self.fd = pty.fork()
        if self._pid == 0:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - pytest's are not
            try:
                main(list(arguments))
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(1)
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
    """A guest with a drive, by the command."""
    started = run("assign", "-d", "--memory", "256M", "--name", "stage", nvme)
    assert (started.returncode, started.stdout) == (0, b"stage\n"), started.stderr
    yield "stage"
    for guest in guests():
        os.kill(guest["pid"], signal.SIGKILL)
    run("restore")


@pytest.mark.amdvi(duration=50)
def test_a_day_with_a_guest(stage: str, nvme: str, tmp_path: Path) -> None:
    """One boot: commands at once, what cannot be run, files, terminals, and at last a SIGKILL under load."""
    guest = guests()[0]
    assert (guest["name"], guest["devices"], guest["state"]) == (stage, [nvme], "running")

    def work(number: int) -> tuple[int, bytes, bytes]:
        words = kvmpass("exec", "-i", stage, "--", "sh", "-c", f"cat; echo {number} >&2; exit {number % 100}")
        done = subprocess.run(words, input=data, capture_output=True, timeout=SECONDS, check=False)
        return done.returncode, hashlib.sha256(done.stdout).digest(), done.stderr

    data = os.urandom(MEBIBYTE if SOAK else MEBIBYTE // 8)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, done in enumerate(pool.map(work, range(COMMANDS if SOAK else AT_ONCE))):
            assert done == (number % 100, hashlib.sha256(data).digest(), b"%d\n" % number)

    assert run("exec", stage, "--", "no-such-program").returncode == 127
    assert run("exec", stage, "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert run("exec", "--timeout", "1", stage, "--", "sleep", "100").returncode == 124
    assert run("exec", "-e", "A=b c", "-w", "/tmp", nvme, "--", "sh", "-c", "echo $A $PWD").stdout == b"b c /tmp\n"
    assert run("exec", "elsewhere", "--", "true").returncode == 125
    for arguments in (["--name", stage], ["--name", "other", nvme]):
        refused = run("start", *arguments)
        assert refused.returncode == 125, refused.stderr
        assert b"runs already" in refused.stderr or b"is assigned by process" in refused.stderr

    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_bytes(data)
    assert run("cp", str(tmp_path / "in"), f"{stage}:/tmp/").returncode == 0
    assert run("cp", f"{stage}:/tmp/in/file", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == data

    interactive(stage)
    attached(stage)
    assert b"console marker" in run("logs", stage).stdout

    load = [
        subprocess.Popen(kvmpass("exec", stage, "--", "cat", "/dev/zero"), stdout=subprocess.DEVNULL) for _ in "ab"
    ]
    time.sleep(0.5)
    os.kill(guest["pid"], signal.SIGKILL)
    assert [process.wait(SECONDS) for process in load] == [126, 126]
    assert [guest["state"] for guest in guests()] == ["dead"]
    restored = run("restore")
    assert (restored.returncode, b"stage: removed" in restored.stdout, driver(nvme)) == (0, True, "nvme")
    assert guests() == []


def interactive(guest: str) -> None:
    """A shell on a terminal: editing, a resize, Ctrl-C, Ctrl-Z."""
    terminal = Terminal("exec", "-it", guest, "--", "sh", "-l")
    terminal.expect("# ")
    terminal.type("echo abq\x7f\x1b[DX\r")  # a backspace, and the left arrow
    terminal.expect(r"\naXb\r\n")
    terminal.expect("# ")
    subprocess.run(["stty", "rows", "41", "cols", "97"], stdin=terminal.fd, check=True)
    terminal.type("until [ \"$(stty size)\" = '41 97' ]; do sleep 0.1; done; echo res''ized\r")
    terminal.expect("resized")
    terminal.expect("# ")
    terminal.type("sleep 1000; echo st''atus $?\r")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect("# ")
    terminal.type("sleep 1000\r")
    time.sleep(0.5)
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect("# ")
    terminal.type("fg\r")  # a shell with stopped jobs does not exit at once
    terminal.expect("sleep 1000\r\n")
    terminal.type("\x03")
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


def test_many_threads_and_a_panic(nvme: str) -> None:
    """One boot: commands from ten threads, each with a megabyte each way; then a panic while ten of them run."""
    data = os.urandom(MEBIBYTE)

    def work(number: int) -> None:
        result = guest.run(["sh", "-c", f"cat; echo {number} >&2; exit {number % 100}"], input=data, timeout=SECONDS)
        assert (result.returncode, result.stdout == data) == (number % 100, True)
        assert result.stderr == b"%d\n" % number

    with library.start([nvme], memory="256M") as guest, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(COMMANDS)))
        with pytest.raises(subprocess.TimeoutExpired):
            guest.run(["sleep", "1000"], timeout=0.5)
        full = guest.run(["sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt; cat /dev/zero >/mnt/file"])
        assert (full.returncode, b"No space left" in full.stderr) == (1, True)
        assert "Linux version" in guest.dmesg()
        waiting = [pool.submit(guest.run, ["sleep", "1000"]) for _ in range(AT_ONCE - 1)]
        waiting.append(pool.submit(guest.popen(["cat", "/dev/zero"], stdout=subprocess.DEVNULL).wait))
        with pytest.raises(GuestDied, match=r"the guest panicked: "):
            guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"], timeout=SECONDS)
        for future in waiting:
            died = future.exception(SECONDS)
            assert isinstance(died, GuestDied)
            assert "sysrq triggered crash" in died.console
        assert guest.stop().outcome is library.GuestOutcome.PANIC
    assert driver(nvme) == "nvme"
