"""The start of the guest's init, the real program: as PID 1 of namespaces, in which some mounts are refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.agent import PROGRAM

from kvmpass.boot.cmdline import QUIET

SECONDS = 20
SOURCE = Path(__file__).parents[3] / "cffi_build/agent/init.c"
UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount", "--net", "--uts"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the guest has of it."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone")
    for name in ("dev", "proc", "sys", "tmp", "run", "kvmpass", "usr/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(PROGRAM, tmp_path / "kvmpass/agent")
    (tmp_path / "init").symlink_to("/kvmpass/agent")
    return tmp_path


def start(root: Path) -> subprocess.CompletedProcess[str]:
    words = [*UNSHARE, "chroot", root, "/init", "of the kernel"]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)


def own(text: str) -> list[str]:
    """Lines that are not errors of this machine's kernel."""
    return [line for line in text.splitlines() if line.startswith("kvmpass: ")]


def test_file_systems_are_mounted_and_the_script_follows(root: Path) -> None:
    """The user of a namespace may mount all but devtmpfs, debugfs and tracefs; only the first is missed."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox-static")
    shutil.copy(busybox, root / "usr/bin/busybox")
    script = root / "kvmpass/init.sh"
    script.write_text(
        """#!/usr/bin/busybox sh
        echo "$0 $1 $$"; hostname; cd /dev; for link in fd std*; do echo $link $(busybox readlink $link); done
        while read -r source place kind rest; do echo "$kind $place"; done </proc/mounts
        """
    )
    script.chmod(0o755)
    done = start(root)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["/kvmpass/init.sh of the kernel 1", "kvmpass"]
    assert lines[2:6] == ["fd /proc/self/fd", "stderr fd/2", "stdin fd/0", "stdout fd/1"]
    mounted = ("devpts /dev/pts", "tmpfs /dev/shm", "proc /proc", "sysfs /sys", "tmpfs /tmp", "tmpfs /run")
    assert [line for line in lines[6:] if line in mounted] == [*mounted]
    assert own(done.stderr) == ["kvmpass: /dev was not mounted, error 1"]


def test_a_script_that_cannot_be_run_is_named(root: Path) -> None:
    done = start(root)
    assert done.returncode == 127
    assert own(done.stderr)[-1] == "kvmpass: /kvmpass/init.sh cannot be run, error 2"


def test_it_looks_for_the_level_of_the_command_line() -> None:
    assert re.findall(r'#define QUIET "(.*)"', SOURCE.read_text()) == [f" {QUIET}"]
