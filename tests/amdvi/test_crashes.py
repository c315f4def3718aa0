"""Crashes and lockups of the guest's kernel: the guest ends by itself, with the cause."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpass import host
from kvmpass.crash import excerpt
from kvmpass.guest import Guest, GuestResult, GuestSpec, prepare
from kvmpass.machine import GuestOutcome, Machine

# The system call that `renice` makes becomes a bug, where the kernel then goes on.
NULL_WRITE = bytes.fromhex("31c0 8900")  # xor eax, eax; mov [rax], eax
SCRIPT = """
    awk '/ _text$/ { print "text", $1 } / __x64_sys_setpriority$/ { print "call", $1 }' /proc/kallsyms
    awk '/Kernel code/ { print "code", $1 }' /proc/iomem
    echo planted?; until [ -e /go ]; do read -r word </dev/ttyS0; >/go; done
    echo going; renice -n 1 -p 1; echo still here"""
CONSOLE = "  console: "  # before each line that is shown of it
STOCK = pytest.mark.amdvi(profile="stock", duration=25)
pytestmark = pytest.mark.amdvi(duration=12)


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmpass", *words]


# --- a driver under test


@pytest.fixture
def faulty(edu: str, faulty_module: Path) -> Iterator[Path]:
    """The module, which is the host's driver of the device, too, without its bugs."""
    subprocess.run(["/sbin/insmod", faulty_module], check=True)
    assert driver(edu) == "faulty"
    yield faulty_module
    subprocess.run(["/sbin/rmmod", "faulty"], check=True)


def crash(
    edu: str, faulty: Path, append: str, timeout: int, status: Path, *more: str
) -> tuple[int, dict[str, Any], list[str]]:
    """Assign to a guest that ends by itself; return its status, its status file, the console that is shown."""
    options = ("--memory", "384M", "--module", str(faulty), "--append", append, "--timeout", str(timeout), *more)
    result = subprocess.run(
        command("assign", edu, *options, "--status-file", str(status), "--", "sleep", "1000"),
        capture_output=True,
        text=True,
        timeout=timeout + 60,
        check=False,
    )
    assert (result.stdout, driver(edu)) == ("", "faulty"), result.stderr
    shown = [line.removeprefix(CONSOLE) for line in result.stderr.splitlines() if line.startswith(CONSOLE)]
    document = json.loads(status.read_text())
    assert document["exit_status"] == result.returncode
    return result.returncode, document, shown


@STOCK
@pytest.mark.parametrize(
    ("append", "first", "where"),
    [
        ("faulty.fault=oops", r"BUG: kernel NULL pointer dereference, address: 0000000000000000", "faulty_probe"),
        ("faulty.fault=loop watchdog_thresh=3", r"soft lockup - CPU#0 stuck for \d+s!", "faulty_probe"),
        ("faulty.fault=panic", r"Kernel panic - not syncing: faulty: the device cannot be", "faulty_work"),
    ],
    ids=["oops", "loop", "panic"],
)
def test_a_driver_that_crashes_ends_the_guest(
    edu: str, faulty: Path, tmp_path: Path, append: str, first: str, where: str
) -> None:
    status, document, shown = crash(edu, faulty, append, 200, tmp_path / "status.json")
    assert (status, document["outcome"], document["guest_exit_status"]) == (126, "panic", None), shown
    assert re.search(first, shown[0]), shown
    text = "\n".join(shown)
    assert f"{where}+0x" in text
    assert "Call Trace:" in text


@pytest.mark.amdvi(profile="stock", duration=65)
def test_a_loop_is_ended_by_the_timeout(edu: str, faulty: Path, tmp_path: Path) -> None:
    """An endless loop: the output begins with its soft lockup, the log with the boot."""
    log = tmp_path / "console.log"
    append = "faulty.fault=loop watchdog_thresh=3 softlockup_panic=0 loglevel=6"
    status, document, shown = crash(edu, faulty, append, 60, tmp_path / "status.json", "--console-log", str(log))
    assert (status, document["outcome"], document["guest_exit_status"]) == (124, "timeout", None), shown
    assert 60 <= document["seconds"] < 150
    assert "soft lockup - CPU#0 stuck for" in shown[0], shown
    assert "faulty_probe+0x" in "\n".join(shown)
    assert "Linux version" in log.read_text(errors="replace"), "the whole console"


# --- without one


def test_oops_continue_takes_precedence() -> None:
    """oops= of --append takes precedence: only the process is killed."""
    said = bytearray()
    image = prepare(GuestSpec(command=("sh", "-c", SCRIPT), append="nokaslr oops=continue"), [])
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
        machine.memory.write(int(words["code"].split("-")[0], 16) + offset, NULL_WRITE)
        guest.type(b"go\n")
        thread.join(220)
        assert results
    result = results[0]
    assert (result.outcome, result.status) == (GuestOutcome.POWEROFF, 0)
    assert "still here" in said.decode()
    assert "BUG: kernel NULL pointer dereference" in excerpt(result.console)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interruption_shows_the_console_and_is_told_in_words(edu: str, tmp_path: Path, number: int) -> None:
    status = tmp_path / "status.json"
    script = "echo 'of the console' >/dev/kmsg; echo up; sleep 1000"  # the kernel prints it before it returns
    options = ("--memory", "192M", "--append", "loglevel=5", "--status-file", str(status))
    process = subprocess.Popen(
        command("assign", edu, *options, "--", "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert f"kvmpass: interrupted by {name}; the guest's console:" in errors
    assert "of the console" in errors
    document = json.loads(status.read_text())
    assert (document["outcome"], document["error"]["cause"]) == ("interrupted", f"interrupted by {name}")


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
        [*words[:-1], "/dev/full", "--append", "loglevel=5", "--", "sh", "-c", "echo a line >/dev/kmsg"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--console-log: /dev/full: No space left on device: the rest is missing" in result.stderr
    assert driver(edu) == before
