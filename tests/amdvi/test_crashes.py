"""A driver author's worst day: the guest's kernel crashes, or hangs. The guest ends by itself and shows the cause."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmpass import crash, host
from kvmpass.guest import Guest, GuestResult, GuestSpec, prepare
from kvmpass.machine import Machine
from kvmpass.machine.vcpus import Ending

# The system call that `renice` makes becomes a bug, as a driver under test might have it.
NULL_WRITE = bytes.fromhex("31c0 8900")  # xor eax, eax; mov [rax], eax
LOOP = bytes.fromhex("ebfe")  # jmp to itself
SCRIPT = """
    awk '/ _text$/ { print "text", $1 } / __x64_sys_setpriority$/ { print "call", $1 }' /proc/kallsyms
    awk '/Kernel code/ { print "code", $1 }' /proc/iomem
    echo planted?; until [ -e /go ]; do read -r word </dev/ttyS0; >/go; done
    echo going; renice -n 1 -p 1; echo still here"""


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def planted(code: bytes, append: str = "") -> tuple[GuestResult, str, float]:
    """A guest whose kernel runs ``code`` in that call; how it ended, what it said, and the seconds from there."""
    said = bytearray()
    image = prepare(GuestSpec(command=("sh", "-c", SCRIPT), append=f"nokaslr {append}"), [])
    with (
        Machine(memory="192M") as machine,
        Guest(machine, console=None, output=said.extend, errors=said.extend) as guest,
    ):
        image.load(machine)
        results: list[GuestResult] = []
        thread = threading.Thread(target=lambda: results.append(guest.run(timeout=200)))
        thread.start()
        deadline = time.monotonic() + 120
        while b"planted?" not in said:
            assert time.monotonic() < deadline and thread.is_alive(), said
            time.sleep(0.05)
        words = dict(line.split() for line in said.decode().splitlines() if len(line.split()) == 2)
        offset = int(words["call"], 16) - int(words["text"], 16)
        machine.memory.write(int(words["code"].split("-")[0], 16) + offset, code)
        started = time.monotonic()
        guest.type(b"go\n")
        thread.join(220)
        assert results
    return results[0], said.decode(), time.monotonic() - started


def test_an_oops_ends_the_guest_and_is_shown_from_its_begin() -> None:
    result, said, _ = planted(NULL_WRITE)
    assert (result.ending, result.status) == (Ending.PANIC, None)
    assert "still here" not in said
    shown = crash.excerpt(result.console)
    assert "BUG: kernel NULL pointer dereference, address: 0000000000000000" in shown[0]
    text = "\n".join(shown)
    assert "RIP: 0010:__x64_sys_setpriority+0x" in text
    assert "Call Trace:" in text
    assert "Kernel panic - not syncing: Fatal exception" in text


def test_an_oops_is_only_told_of_where_that_is_wanted() -> None:
    """oops= of --append takes precedence: only the process that ran into it dies."""
    result, said, _ = planted(NULL_WRITE, "oops=continue")
    assert (result.ending, result.status) == (Ending.POWEROFF, 0)
    assert "still here" in said
    assert "BUG: kernel NULL pointer dereference" in crash.excerpt(result.console)[0]


def test_a_busy_loop_in_the_kernel_ends_the_guest() -> None:
    if not Path("/proc/sys/kernel/softlockup_panic").exists():
        pytest.skip("this host's kernel, which the guest runs too, has no CONFIG_SOFTLOCKUP_DETECTOR")
    result, said, seconds = planted(LOOP, "watchdog_thresh=3")
    assert (result.ending, result.status) == (Ending.PANIC, None)
    assert "still here" not in said
    assert seconds > 3
    shown = crash.excerpt(result.console)
    assert "soft lockup - CPU#0 stuck for" in shown[0]
    assert any("RIP: 0010:__x64_sys_setpriority" in line for line in shown)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmpass", *words]


def test_the_time_is_up(edu: str, tmp_path: Path) -> None:
    status, console = tmp_path / "status.json", tmp_path / "console.log"
    before = driver(edu)
    options = ("--memory", "192M", "--timeout", "90", "--status-file", str(status), "--console-log", str(console))
    started = time.monotonic()
    result = subprocess.run(
        command("assign", edu, *options, "--append", "loglevel=7", "--", "sh", "-c", "echo out; sleep 1000"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (result.returncode, result.stdout) == (124, "out\n")
    assert 90 <= time.monotonic() - started < 180
    assert "the guest was out of time before its command reported a status" in result.stderr
    assert "  console: " in result.stderr
    document = json.loads(status.read_text())
    assert (document["outcome"], document["status"], document["exit_status"]) == ("timeout", None, 124)
    assert "Linux version" in console.read_text(errors="replace"), "all of the console, from its begin"
    assert driver(edu) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interruption_shows_the_console_and_is_told_in_words(edu: str, tmp_path: Path, number: int) -> None:
    status = tmp_path / "status.json"
    script = "echo up; echo 'of the console' >/dev/kmsg; sleep 1000"
    options = ("--memory", "192M", "--append", "loglevel=7", "--status-file", str(status))
    process = subprocess.Popen(
        command("assign", edu, *options, "--", "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert f"kvmpass: interrupted by {name}; the guest's console:" in errors
    assert "of the console" in errors
    document = json.loads(status.read_text())
    assert (document["outcome"], document["error"]) == ("interrupted", f"interrupted by {name}")


def test_a_console_log_that_cannot_be_written(edu: str, tmp_path: Path) -> None:
    """Refused before anything changes; a disk that fills up later does not end the guest."""
    before = driver(edu)
    missing = tmp_path / "no" / "log"
    words = command("assign", edu, "--memory", "192M", "--console-log")
    words += [str(missing)]
    result = subprocess.run([*words, "--", "true"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 125
    assert f"{missing}: No such file or directory" in result.stderr
    result = subprocess.run(
        [*words[:-1], "/dev/full", "--append", "loglevel=7", "--", "true"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--console-log: /dev/full: No space left on device: the rest is missing" in result.stderr
    assert driver(edu) == before
