"""Completion: the candidates, and completion in a real bash."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.host_tree import Host

from kvmpass import host as library
from kvmpass.cli.completion import SHELLS, answer
from kvmpass.cli.main import COMMANDS, COMPLETE, kvmpass
from kvmpass.session.directory import GuestDirectory, GuestStatus

PROMPT = "ready> "
READY = f"(?s)done.*{PROMPT}"  # what is typed before is no request to fish


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path)
    host.put("usr/share/misc/pci.ids", "1022  Advanced Micro Devices, Inc. [AMD]\n\t1234  Fast: Drive")
    host.add("0000:01:00.0", "nvme", 7)
    host.add("0000:02:00.0", "e1000e", 8, 0x020000)
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path / "run"))
    with GuestDirectory.claim("lab") as directory:
        directory.write(GuestStatus("lab", os.getpid(), ("0000:01:00.0",), "running", ""))
        yield host


def candidates(shell: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    words = line.split(" ")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    assert answer(kvmpass, f"{shell}_complete") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "shell, line, expected",
    [
        ("bash", "kvmpass mon", "plain\tmonitor\tShow events of PCI devices,"),
        ("bash", "kvmpass show 0000:01", "plain\t0000:01:00.0\tNVMe: AMD Fast: Drive\n"),
        ("bash", "kvmpass show 0000:01:00.0 --js", "plain\t--json\t"),
        ("bash", "kvmpass list nv", "plain\tnvme\tdriver\n"),
        ("bash", "kvmpass monitor 02:", "plain\t02:00.0\tEthernet: AMD Fast: Drive\n"),
        ("bash", "kvmpass assign 0000:01:00.0 0000:0", "plain\t0000:02:00.0\t"),
        ("bash", "kvmpass assign 0000:01:00.0 -- /b", "file\t/b\t\n"),
        ("bash", "kvmpass completion z", "plain\tzsh\t\n"),
        ("bash", "kvmpass lab run --device nvm", "plain\tnvme\t\nplain\tnvme-ns\t\n"),
        ("bash", "kvmpass lab run --kernel f", "plain\tfull\t\n"),
        ("bash", "kvmpass lab run --kernel /bo", "file\t/bo\t\n"),
        ("zsh", "kvmpass show 0000:01", "plain\n0000\\:01\\:00.0\nNVMe: AMD Fast: Drive\n"),
        ("bash", "kvmpass exec la", "plain\tlab\t0000:01:00.0\n"),
        ("zsh", "kvmpass stop lab l", "plain\nlab\n0000:01:00.0\n"),
        ("bash", "kvmpass cp l", "plain\tlab:/\t0000:01:00.0\nfile\tl\t\n"),
        ("zsh", "kvmpass cp l", "plain\nlab\\:/\n0000:01:00.0\nfile\nl\n_\n"),
        ("bash", "kvmpass cp lab:/x /b", "file\t/b\t\n"),
        ("bash", "kvmpass cp lab:", "plain\tlab:/\t0000:01:00.0\nfile\tlab:\t\n"),
        ("bash", "kvmpass cp lab:/x", "\n"),
        ("bash", "kvmpass cp other:/x", "file\tother:/x\t\n"),
        ("fish", "kvmpass show 0000:01", "plain,0000:01:00.0\tNVMe: AMD Fast: Drive\n"),
    ],
)
def test_candidates(
    host: Host,
    shell: str,
    line: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert candidates(shell, line, monkeypatch, capsys).startswith(expected)


def test_every_command_is_offered(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = candidates("bash", "kvmpass ", monkeypatch, capsys).splitlines()
    assert {line.split("\t")[1] for line in lines} == set(COMMANDS)


def test_an_error_prints_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("", "kvmpass 'half a word", "kvmpass nonsense ", "kvmpass show --nonsense x "):
        candidates("bash", line, monkeypatch, capsys)
    assert answer(kvmpass, "tcsh_complete") == 1
    assert answer(kvmpass, "bash_nonsense") == 1

    def broken() -> Host:
        raise RuntimeError("anything")

    monkeypatch.setattr(library, "Sysfs", broken)
    monkeypatch.setenv("COMP_WORDS", "kvmpass show 0")
    for shell in SHELLS:
        monkeypatch.setenv("COMP_CWORD", "0" if shell == "fish" else "2")
        assert answer(kvmpass, f"{shell}_complete") == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_the_scripts_name_the_program(shell: str) -> None:
    result = CliRunner().invoke(kvmpass, ["completion", shell])
    assert result.exit_code == 0
    assert COMPLETE in result.output and "complete" in result.output


def test_an_unknown_shell_is_wrong_usage() -> None:
    with pytest.raises(click.BadParameter, match="'bash', 'zsh', 'fish'"):
        kvmpass.main(["completion", "tcsh"], standalone_mode=False)


# By shell: its options, and what it needs before it takes completions.
SHELL_OPTIONS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(kvmpass completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -U compinit; compinit -u -D; eval "$(kvmpass completion zsh)"'),
    "fish": (
        ["--no-config", "-i"],
        f"function fish_prompt; echo -n '{PROMPT}'; end; kvmpass completion fish | source",
    ),
}
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|\(B|[=>])|[\a\r]")


class Shell:
    """An interactive shell on its own terminal, with completion enabled."""

    def __init__(self, directory: Path, shell: str = "bash") -> None:
        program = directory / "kvmpass"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmpass "$@"\n')
        program.chmod(0o755)
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            environment = {
                "PATH": f"{directory}:/usr/bin:/bin",
                "TERM": "xterm" if shell == "fish" else "dumb",
                "PS1": PROMPT,
                "HISTFILE": "/dev/null",
                "HOME": str(directory),
            }
            os.execve(f"/usr/bin/{shell}", [shell, *SHELL_OPTIONS[shell][0]], environment)
        termios.tcsetwinsize(self._fd, (40, 100))  # fish shows no list on a terminal without a size
        self.type(f'{SHELL_OPTIONS[shell][1]}; echo do"ne"\n', READY)

    def type(self, keys: str, expected: str) -> str:
        """Type; return what the terminal shows up to ``expected``, a regular expression."""
        os.write(self._fd, keys.encode())
        shown, deadline = "", time.monotonic() + 30
        while not re.search(expected, shown):
            assert time.monotonic() < deadline, f"{expected!r} does not come: {shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                shown += ESCAPES.sub("", os.read(self._fd, 4096).decode(errors="replace"))
        return shown

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)


def test_a_real_bash(tmp_path: Path) -> None:
    bash = Shell(tmp_path)
    try:
        bash.type("kvmpass restor\t", "kvmpass restore ")
        bash.type("--js\t", "--json ")
        bash.type("\x15kvmpass completion \t\t", r"bash\s+zsh\s+fish")
    finally:
        bash.close()


@pytest.mark.usefixtures("host")
def test_guests_and_files_in_a_real_bash(tmp_path: Path) -> None:
    """One does not hide the other; a directory has a slash, and a blank is quoted."""
    here = tmp_path / "here"
    (here / "lab.d").mkdir(parents=True)
    (here / "lab notes").touch()
    (here / "other").touch()
    bash = Shell(tmp_path)
    try:
        bash.type(f"cd {here}; export KVMPASS_RUNTIME_DIR={tmp_path}/run; echo do'ne'\n", READY)
        shown = bash.type("kvmpass cp \t\t", r"other\s")
        assert re.search(r"lab:/\s+0000:01:00.0\s", shown) and "lab.d/" in shown and r"lab\ notes" in shown
        bash.type("lab\\ n\t", r"lab\\ notes ")
        bash.type("\x15kvmpass cp oth\t", "other ")
        bash.type("\x15kvmpass cp lab:\t", "lab:/")
    finally:
        bash.close()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_guests_and_files_in_other_shells(tmp_path: Path, name: str) -> None:
    if not Path("/usr/bin", name).exists():
        pytest.skip(f"no {name} here: apt-get install {name} makes it run")
    here = tmp_path / "here"
    (here / "lab.d").mkdir(parents=True)
    (here / "lab notes").touch()
    (here / "other").touch()
    shell = Shell(tmp_path, name)
    try:
        shell.type(f"cd {here}; export KVMPASS_RUNTIME_DIR={tmp_path}/run; echo do'ne'\n", READY)
        shown = shell.type("kvmpass cp \t", r"(?s)lab notes.*other|lab\\ notes.*other")
        assert "lab.d/" in shown and re.search(r"lab:/\s+(-- |\()0000:01:00.0", shown) and "notes" in shown
        shell.type("\x15kvmpass cp oth\t", "other ")
        shell.type("\x15kvmpass cp lab.\t", "lab.d/")
        shell.type("\x15kvmpass cp lab:\t", "lab:/")
    finally:
        shell.close()


def test_an_address_in_a_real_bash(tmp_path: Path) -> None:
    """Readline splits words at colons: the result must still be one address."""
    present = [path.name for path in Path("/sys/bus/pci/devices").glob("*")]
    typed = {name: name[:-2] for name in present if sum(other.startswith(name[:-2]) for other in present) == 1}
    if not typed:
        pytest.skip("no PCI device of this machine is alone in its slot: one that is makes it run")
    bdf = max(typed)
    bash = Shell(tmp_path)
    try:
        shown = bash.type(f"kvmpass show {typed[bdf]}\t", re.escape(bdf) + " ")
        assert shown.endswith(f"kvmpass show {bdf} ")
    finally:
        bash.close()


def test_a_request_of_a_shell_needs_no_arguments() -> None:
    """Through the real entry point: the request is in the environment only."""
    environment = {COMPLETE: "bash_complete", "COMP_WORDS": "kvmpass li", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "kvmpass"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("plain\tlist\t")
