"""The initramfs: its archive, and the command in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpass.initramfs.cpio import newc
from kvmpass.lab import initrd, script


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio: apt-get install cpio makes it run")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    data = newc({"d": initrd.DIRECTORY, "d/x": initrd.executable(b"five!"), "e": initrd.regular(b"")}.items())
    assert len(data) % 4 == 0
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=tmp_path, input=data, check=True)
    assert (tmp_path / "d" / "x").read_bytes() == b"five!"
    assert os.access(tmp_path / "d" / "x", os.X_OK)
    assert (tmp_path / "e").stat().st_size == 0


def test_the_command_survives_the_shell(tmp_path: Path) -> None:
    job = script.Job(["printf", "%s|", "a b", "it's", "$HOME", "ü"], tmp_path, {"PATH": "/usr/bin:/bin"}, ())
    done = subprocess.run(["sh"], input=script.command_script(job), stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == "a b|it's|$HOME|ü|"


def test_a_small_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    found = script.environment({"MORE": "1"})
    assert found["KVMPASS_LAB"] == found["MORE"] == "1"
    assert "SECRET" not in found
