"""`kvmpass assign`: exit statuses, errors and the console log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvmpass.cli.assign import ConsoleLog, _show_console
from kvmpass.cli.ending import exit_status
from kvmpass.cli.main import main
from kvmpass.cli.output import error_text
from kvmpass.guest import GuestResult
from kvmpass.machine import GuestOutcome

# A guest that ends with status 0 and one file to copy, after which nothing can be imported; the arguments are the
# command's.
ENDED = """
import gc
import sys
from contextlib import contextmanager
from types import SimpleNamespace as Fake

class Upgrade:
    done = False

    def find_spec(self, name, path, target=None):
        if self.done:
            raise ImportError(f"{name} is another version's")

usual = gc.get_threshold()
upgrade = Upgrade()
sys.meta_path.insert(0, upgrade)

import kvmpass.cli.assign as module
from kvmpass.__main__ import main
from kvmpass.guest import CopiedOut, GuestResult
from kvmpass.machine import GuestOutcome

@contextmanager
def assigned(*arguments, **options):
    assert gc.get_threshold()[0] > usual[0]
    yield Fake(backend=None, devices=(), domain=Fake(p2p=False), exit_reasons={}, access_counts={})

@contextmanager
def guest(*arguments):
    copied = CopiedOut("/etc/hostname", "/tmp/hostname", 1, 5, (), None)
    yield Fake(status=0, result=lambda: GuestResult(GuestOutcome.POWEROFF, 0, (), "", (copied,)))

def follow(*arguments, **options):
    assert gc.get_threshold() == usual, "garbage of a guest that runs for days is not collected"
    upgrade.done = True

module.assigned, module._guest, module._follow = assigned, guest, follow
sys.argv[1:] = ["assign", *sys.argv[1:], "ffff:ff:1f.7", "--", "true"]
main()
"""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "interrupted by SIGINT"),
        (SystemExit(143), "interrupted by SIGTERM"),
        (SystemExit(129), "interrupted by SIGHUP"),
        (SystemExit(2), "2"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(), "ValueError"),
        (ValueError("a \x1b]0;title\x07\x9b31m\nb"), "a  ]0;title  31m\nb"),
    ],
)
def test_the_text_of_an_error(error: BaseException, text: str) -> None:
    assert error_text(error) == text


@pytest.mark.parametrize("command", [True, False])
def test_exit_statuses(command: bool) -> None:
    def status(outcome: GuestOutcome, reported: int | None = None) -> int:
        return exit_status(GuestResult(outcome, reported, (), ""), command=command)

    assert status(GuestOutcome.TIMEOUT) == 124
    assert status(GuestOutcome.PANIC) == 126
    assert status(GuestOutcome.FAULT) == 126
    assert status(GuestOutcome.POWEROFF) == (126 if command else 0)
    if command:
        assert status(GuestOutcome.TIMEOUT, 3) == 3


def test_the_console_is_shown_from_the_crash_on_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    _show_console("boot\n" * 100 + "BUG: \x1b[31mbad\n[end]\n")
    assert capsys.readouterr().err == "  console: BUG:  [31mbad\n  console: [end]\n"


def test_the_whole_console_goes_to_the_log_and_the_sink(tmp_path: Path) -> None:
    seen: list[bytes] = []
    log = ConsoleLog(tmp_path / "log")
    write = log.beside(seen.append)
    assert write is not None
    for part in (b"one", b"\xff\0", b"two"):
        write(part)
    log.close()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\xff\0two" == b"".join(seen)
    assert ConsoleLog(None).beside(None) is None


def test_a_log_that_cannot_be_made_is_refused_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        ConsoleLog(tmp_path / "missing" / "log")
    assert refused.value.__notes__ == ["name a file with --console-log that this user may write"]


def test_a_full_disk_is_reported_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[bytes] = []
    write = ConsoleLog(Path("/dev/full")).beside(seen.append)
    assert write is not None
    write(b"one")
    write(b"two")
    assert seen == [b"one", b"two"]
    expected = "kvmpass: --console-log: /dev/full: No space left on device: the rest is missing\n"
    assert capsys.readouterr().err == expected


def test_a_full_disk_under_log_and_standard_error_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    write = ConsoleLog(Path("/dev/full")).beside(seen.append)
    assert write is not None
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        write(b"one")
        monkeypatch.undo()
        with suppress(OSError):  # what is buffered still
            full.close()
    write(b"two")
    assert seen == [b"one", b"two"]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("assign ffff:ff:1f.7 ls -l", "kvmpass assign … -- COMMAND"),
        ("assign ffff:ff:1f.7 ls", "kvmpass assign … -- COMMAND"),
        ("lab run echo x", "kvmpass lab run … -- COMMAND"),
        ("exec guest ls -d /", "kvmpass exec … -- COMMAND"),
    ],
)
def test_a_command_without_its_separator(words: str, first: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kvmpass", *words.split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr.endswith(f"  hint: write -- before a COMMAND: {first}\n")


@pytest.mark.parametrize(
    "words", ["start", "start ffff:ff:1f.7 ls", "assign -d ffff:ff:1f.7 ls", "wait --none x", "lab selftests --none"]
)
def test_where_there_is_no_command_no_separator_is_missing(words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kvmpass", *words.split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (125, "")
    assert "before a COMMAND" not in result.stderr


def test_selftests_that_cannot_be_started_are_no_failure_of_a_test(tmp_path: Path) -> None:
    words = ["lab", "selftests", "--kernel-tree", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "kvmpass", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (125, "")
    assert "has no tools/testing/selftests/vfio" in result.stderr


@pytest.mark.parametrize("address", ["nvme", "ffff:ff:1f.7"])
def test_the_status_file_reports_a_wrong_address(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str], valid: Callable[..., Any]
) -> None:
    """An earlier run's result is replaced."""
    status = tmp_path / "status.json"
    status.write_text('{"outcome": "exited"}')
    with pytest.raises(SystemExit) as ended:
        main(["assign", address, "--status-file", str(status), "--", "true"])
    document = valid("status-file", status.read_text())
    assert (ended.value.code, document["exit_status"], document["outcome"], document["bdfs"]) == (
        125,
        125,
        "failed",
        [address],
    )
    assert document["error"]["cause"] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "errors", "exit_status"),
    [(["-v"], "/dev/null", 0), (["-v"], "/dev/full", 125), ([], "/dev/full", 0)],  # without -v only timings are lost
)
def test_the_end_of_a_guest_imports_nothing(
    tmp_path: Path, words: list[str], errors: str, exit_status: int, valid: Callable[..., Any]
) -> None:
    """An upgrade may have replaced the files meanwhile. How the guest has ended is kept if it cannot be printed."""
    status = tmp_path / "status.json"
    options = ["--timings", "--copy-out", f"/etc/hostname:{tmp_path}/hostname", "--status-file", str(status)]
    with Path(errors).open("w") as stderr:
        program = [sys.executable, "-c", ENDED, *words, *options]
        done = subprocess.run(program, stderr=stderr, timeout=60, check=False)
    document = valid("status-file", status.read_text())
    assert (document["outcome"], document["guest_exit_status"], len(document["copied_out"])) == ("exited", 0, 1)
    assert (document["exit_status"], done.returncode) == (exit_status, exit_status), document["error"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "Missing argument 'BDF...'."),
        ("--vfio-fd 9", "missing --iommu-fd: the descriptor of the IOMMU"),
        ("--iommu-fd 9 ffff:ff:1f.7", "missing --vfio-fd: the descriptors of the devices"),
        ("--iommu-fd 9 --vfio-fd nine", "Invalid value for '--vfio-fd'"),
        ("--iommu-fd 999 --vfio-fd 998", "descriptor 998 is not open"),
        ("--iommu-fd 0 --vfio-fd 0 --vfio-fd 1", "not a node of VFIO or iommufd"),
    ],
)
def test_descriptors_that_are_none(words: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["assign", *words.split(), "--", "true"])
    assert (ended.value.code, reason in capsys.readouterr().err) == (125, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("-d --vfio-fd 9 --iommu-fd 8", "-d outlives the process"),
        ("-d", "Missing argument 'BDF...'."),
        ("-d --status-file /tmp/kvmpass-none ffff:ff:1f.7", "-d has no --status-file"),
        ("-d --on-reboot restart ffff:ff:1f.7", "-d has no --on-reboot"),
        ("-d --status-file /tmp/kvmpass-none ffff:ff:1f.7", "hint: ask how the guest has ended"),
        ("-d --on-reboot restart ffff:ff:1f.7", "hint: wait for the guest's end, then start it again"),
        ("-d --timings ffff:ff:1f.7", "hint: measure a guest that ends with its command"),
        ("-d -i ffff:ff:1f.7", "-d has no -i"),
        ("-d ffff:ff:1f.7 -- true", "kvmpass exec ffff:ff:1f.7 -- COMMAND"),
        ("-d --name a/b ffff:ff:1f.7", "cannot be the name of a guest"),
        ("-d --name= ffff:ff:1f.7", "cannot be the name of a guest"),
        ("-d --initrd /etc/hostname --copy-out /a:/tmp/b ffff:ff:1f.7", "kvmpass cp"),
        ("--initrd /etc/hostname --copy-out /a:/b ffff:ff:1f.7 -- true", "COMMAND, --copy and --module need"),
        ("--name one ffff:ff:1f.7", "add -d"),
        ("--copy-out /tmp ffff:ff:1f.7", "or use -d"),
    ],
)
def test_guests_that_stay(
    words: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object) -> int:
        pytest.fail("a process was started")

    monkeypatch.setattr("kvmpass.cli.start.in_background", started)
    with pytest.raises(SystemExit) as ended:
        main(["assign", *words.split()])
    assert (ended.value.code, reason in capsys.readouterr().err) == (125, True)


def test_start_has_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["start", "--name", "one", "--", "ls"])
    assert (ended.value.code, "kvmpass exec one -- COMMAND" in capsys.readouterr().err) == (125, True)
