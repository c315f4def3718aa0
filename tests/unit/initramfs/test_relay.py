"""The guest's program that copies, run here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvmpass.initramfs import elf, relay


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "relay"
    path.write_bytes(relay.program())
    path.chmod(0o755)
    return path


def test_it_is_a_static_elf_file() -> None:
    assert elf.is_elf(relay.program())
    assert len(relay.program()) < 300


def test_every_byte_arrives_before_the_end(program: Path) -> None:
    content = os.urandom(1_000_001)
    done = subprocess.run([program], input=content, capture_output=True, timeout=20, check=True)
    assert done.stdout == content


def test_what_is_there_is_copied_at_once(program: Path) -> None:
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as copy:
        assert copy.stdin is not None and copy.stdout is not None
        for word in (b"a", b"bc", b"def"):
            copy.stdin.write(word)
            assert copy.stdout.read(16) == word
        copy.stdin.close()
        assert copy.wait(20) == 0


def test_errors_end_it(program: Path) -> None:
    assert subprocess.run([program], stdin=subprocess.DEVNULL, timeout=20, check=False).returncode == 0
    directory = os.open("/", os.O_RDONLY)
    assert subprocess.run([program], stdin=directory, timeout=20, check=False).returncode != 0
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run([program], input=b"x", stdout=full, timeout=20, check=False).returncode == 1
    os.close(directory)
