"""The channels of a command: named ports of a virtio console, or serial ports where the guest has none."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from kvmpass.guest import Guest, GuestResult, GuestSpec, prepare
from kvmpass.machine import Machine
from kvmpass.memory import RegionKind

pytestmark = pytest.mark.amdvi(duration=12)
SIZE = 10_000_000
ROUNDS, INPUTS = (10, 20) if os.environ.get("KVMPASS_SOAK") else (1, 1)


class Gate:
    """A reader that stalls once it has read ``limit`` bytes, until it is opened."""

    def __init__(self, limit: int) -> None:
        self.read = bytearray()
        self.opened = threading.Event()
        self.in_time = True
        self._limit = limit

    def __call__(self, data: bytes) -> None:
        self.read += data
        if len(self.read) >= self._limit and not self.opened.is_set():
            self.in_time = self.opened.wait(60)


def test_output_and_input_arrive_and_a_stalled_reader_delays_nobody_else(tmp_path: Path) -> None:
    """10 MB out byte for byte, again while its reader stalls, and 5 MB in, without an exit for each buffer.

    The long form: 100 MB each way, and at least 5 MB/s out.
    """
    content, typed = os.urandom(SIZE), os.urandom(SIZE // 2)
    reading, ended = list[float](), list[float]()
    (tmp_path / "data").write_bytes(content)
    script = f"""for n in {" ".join(["."] * ROUNDS)}; do cat /data; done; echo first >&2; cat /data & sleep 1
        echo second >&2; wait; echo third >/dev/stderr; sha256sum; echo end >/dev/stdout"""
    spec = GuestSpec(command=("sh", "-c", script), copy=(f"{tmp_path}/data:/data",), interactive=True)
    image = prepare(spec, [])
    output, errors, times = Gate(SIZE * ROUNDS + 1), bytearray(), list[float]()

    def on_output(data: bytes) -> None:
        (times if len(output.read) < SIZE * ROUNDS else ended).append(time.monotonic())
        output(data)

    def on_errors(data: bytes) -> None:
        errors.extend(data)
        if b"second" in errors:
            output.opened.set()
        if b"third" in errors:
            reading.append(time.monotonic())

    with (
        Machine(memory="192M") as machine,
        Guest(machine, console=None, output=on_output, errors=on_errors, interactive=True) as guest,
    ):
        image.load(machine)
        assert guest.input is not None
        for _ in range(INPUTS):
            guest.input.send(typed)
        guest.input.end()
        result = guest.run(timeout=240 * ROUNDS)
        exits = machine.exit_reasons
    rate = ROUNDS * SIZE / 1e6 / (times[-1] - times[0])
    rate_in = INPUTS * SIZE / 2e6 / (ended[-1] - reading[0])
    print(f"{rate:.1f} MB/s out, {rate_in:.1f} MB/s in", exits, len(output.read), bytes(output.read[-100:]), errors)
    assert (result.status, result.failures) == (0, ()), result
    assert output.in_time, "errors waited for the reader of the output"
    size = (ROUNDS + 1) * SIZE
    assert bytes(output.read[:size]) == content * (ROUNDS + 1)
    assert output.read[size:].decode() == f"{hashlib.sha256(typed * INPUTS).hexdigest()}  -\nend\n"
    assert errors == b"first\nsecond\nthird\n"
    assert sum(exits.values()) < 2000, "those of the boot, and none for each buffer"
    if ROUNDS > 1:
        assert rate > 5


def test_what_a_command_leaves_behind_does_not_delay_its_end() -> None:
    """It holds the pipe of the output open. What it wrote before has arrived."""
    script = "(echo child; >/said; exec sleep 1000) & until [ -e /said ]; do usleep 10000; done; echo parent; exit 4"
    result, said, _ = run(True, script)
    assert (result.status, sorted(said.split())) == (4, [b"child", b"parent"])


def run(image_ports: bool, script: str) -> tuple[GuestResult, bytes, dict[str, int]]:
    said = bytearray()
    image = prepare(GuestSpec(command=("sh", "-c", script)), [])
    if not image_ports:
        image = image.on_serial_ports()
    with (
        Machine(memory="192M") as machine,
        Guest(machine, console=None, output=said.extend, errors=said.extend) as guest,
    ):
        image.load(machine)
        result = guest.run(timeout=240)
        assert all(region.kind is not RegionKind.BAR for region in machine.memory), "its registers exit"
        machine.audit()
        return result, bytes(said), machine.exit_reasons


def test_without_a_console_the_serial_ports_are_used() -> None:
    """The status and the errors of the guest's init, too; each byte is an exit there."""
    script = "echo out; echo err >&2; ls /sys/class/virtio-ports 2>/dev/null; exit 5"
    result, said, exits = run(False, script)
    assert (result.status, said) == (5, b"out\nerr\n")
    other, said, others = run(True, script)
    assert (other.status, said) == (5, b"out\nerr\nvport0p0\n")
    print(exits, others)


def test_standard_input_of_the_command_line_is_passed(edu: str) -> None:
    """With -i: a megabyte, then its end; without it, the command's input is empty."""
    typed = os.urandom(1_000_000)
    words = [sys.executable, "-m", "kvmpass", "assign", edu, "--memory", "192M"]
    script = "sha256sum; read -r line || exit 3"
    done = subprocess.run([*words, "-i", "--", "sh", "-c", script], input=typed, capture_output=True, timeout=200)
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout.decode() == f"{hashlib.sha256(typed).hexdigest()}  -\n"
    done = subprocess.run([*words, "--", "wc", "-c"], input=typed, capture_output=True, timeout=200)
    assert (done.returncode, done.stdout.split()) == (0, [b"0"])
    done = subprocess.run([*words, "-i"], input=typed, capture_output=True, timeout=60)
    assert done.returncode == 125
    assert b"-i passes standard input to a COMMAND" in done.stderr


class Screen:
    """A terminal on which kvmpass runs as its session's leader."""

    def __init__(self, *arguments: str) -> None:
        self._fd, user = pty.openpty()
        self.resize(30, 90)
        self._modes, self._user = termios.tcgetattr(user), user
        words = [sys.executable, "-m", "kvmpass", *arguments]
        self.program = subprocess.Popen(
            words, stdin=user, stdout=user, stderr=user, start_new_session=True, preexec_fn=self._control
        )

    def _control(self) -> None:
        ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: str, expected: str, seconds: float = 60) -> str:
        """Type; return what is shown up to ``expected``, a regular expression."""
        os.write(self._fd, keys.encode())
        shown, deadline = "", time.monotonic() + seconds
        while not re.search(expected, shown):
            assert time.monotonic() < deadline, f"{expected!r} does not come: {shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                shown += os.read(self._fd, 4096).decode(errors="replace")
        return shown

    def close(self) -> int:
        """Return the exit status. The terminal has its modes again."""
        status = self.program.wait(60)
        assert termios.tcgetattr(self._user) == self._modes
        return status

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        if self.program.poll() is None:
            self.program.terminate()
            self.program.wait(60)
        os.close(self._fd)
        os.close(self._user)


def test_a_command_on_a_terminal(edu: str) -> None:
    """A shell with editing and vi; resize; Ctrl-C and Ctrl-Z for what runs in it; its status. -e and -w."""
    where = ("-e", "WORD=a  b", "-e", "TERM=vt100", "-w", "/tmp")
    with Screen("assign", edu, "--memory", "192M", "-it", *where, "--", "sh") as screen:
        assert "job control" not in screen.type("", "/tmp # ", 120)
        screen.type("PS1='%''% '\r", "%% ")
        assert "30 90" in screen.type("stty size\r", r"\d+ \d+\r\n.*%% ")
        assert "/tmp a  b vt100" in screen.type('echo "$(pwd) $WORD $TERM"\r', r"vt100\r\n.*%% ")
        screen.type("sh -c 'echo sl\"\"eeping; exec sleep 1000'\r", "sleeping")
        screen.type("\x03", "%% ")
        assert "status=130" in screen.type("echo status=$?\r", r"status=\d+\r\n.*%% ")
        screen.type("sh -c 'echo sl\"\"eeping; exec sleep 1000'\r", "sleeping")
        screen.type("\x1a", r"Stopped[^%]*%% ")
        screen.type("fg\r", r"sleep 1000.*\r\n")
        screen.type("\x03", "%% ")
        screen.type("vi file\r", "~.*- file")
        screen.type("iword", "word")
        screen.type("\x1b", "- file")  # what follows it at once would be read as a key's sequence
        screen.type("yyp", "word")
        screen.type(":wq\r", "%% ")
        assert "word\r\nword" in screen.type("cat file\r", r"word\r\n.*%% ")
        screen.resize(31, 91)
        resized = "until [ \"$(stty size)\" = '31 91' ]; do usleep 50000; done; echo res''ized\r"
        screen.type(resized, r"resized\r\n.*%% ")
        assert "31 91" in screen.type("stty size\r", r"\d+ \d+\r\n.*%% ")
        screen.type("exit 3\r", "exit")
        assert screen.close() == 3


def test_the_way_out_of_a_terminal(edu: str) -> None:
    """Ctrl-] ends the guest while it boots, too."""
    with Screen("assign", edu, "--memory", "192M", "-t", "--", "sleep", "1000") as screen:
        screen.type("", r"Ctrl-\] ends the guest")
        time.sleep(1)
        screen.type("\x1d", "before its command reported a status")
        assert screen.close() == 126
