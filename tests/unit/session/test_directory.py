"""Where guests that stay are found."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpass.errors import GuestError, KvmpassError
from kvmpass.session import directory
from kvmpass.session.directory import GuestDirectory, GuestStatus

STATUS = GuestStatus("one", 4711, ("0000:01:00.0",), "running", "2026-11-26T13:26:41Z")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def kill(claimed: GuestDirectory) -> None:
    """As the end of its process does."""
    os.close(claimed._fd)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".x", "a" * 65, "a b", "a\0", "ä"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(KvmpassError, match="cannot be the name of a guest"):
        GuestDirectory.claim(name)
    with pytest.raises(GuestError):
        directory.find(name)


def test_others_get_nothing(base: Path) -> None:
    with GuestDirectory.claim("one") as claimed:
        assert [base.stat().st_mode & 0o777, claimed.path.stat().st_mode & 0o777] == [0o700, 0o700]
    assert list(base.iterdir()) == []


def test_a_guest_is_found_by_name_and_by_device(base: Path, valid: Callable[[str, str], Any]) -> None:
    assert directory.guests() == []
    with GuestDirectory.claim("one") as claimed:
        claimed.write(STATUS)
        valid("guest", (claimed.path / directory.STATUS).read_text())
        assert directory.guests() == [STATUS]
        for text in ("one", "0000:01:00.0", "01:00.0"):
            assert directory.find(text) == base / "one"
        with pytest.raises(GuestError, match=r"no guest '02:00\.0' runs"):
            directory.find("02:00.0")


def test_a_name_is_taken_once() -> None:
    with GuestDirectory.claim("one"), pytest.raises(GuestError, match="a guest one runs already"):
        GuestDirectory.claim("one")
    GuestDirectory.claim("one").__exit__()


def test_a_dead_guest_is_replaced() -> None:
    dead = GuestDirectory.claim("one")
    dead.write(STATUS)
    kill(dead)
    assert [guest.state for guest in directory.guests()] == ["dead"]
    with GuestDirectory.claim("one"):
        assert [guest.state for guest in directory.guests()] == ["starting"]


def test_dead_guests_are_removed_and_others_stay(base: Path) -> None:
    dead = GuestDirectory.claim("dead")
    (dead.path / directory.CONSOLE).write_text("text")
    kill(dead)
    with GuestDirectory.claim("lives"):
        (base / "other").mkdir()
        (base / "other/file").touch()
        assert directory.remove_dead() == ["dead"]
        assert sorted(path.name for path in base.iterdir()) == ["lives", "other"]
        assert (base / "other/file").exists()


def test_a_reader_does_not_keep_a_guest_from_its_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(GuestDirectory.claim("one"))
    looking = os.open(base / "one", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(directory.time, "sleep", lambda seconds: os.close(looking))
    GuestDirectory.claim("one").__exit__()


def test_a_status_that_is_damaged(base: Path) -> None:
    with GuestDirectory.claim("one") as claimed:
        for text in ("", "[]", '{"pid": "x"}', '{"pid": 1, "devices": 3, "state": 1, "since": 2}'):
            (claimed.path / directory.STATUS).write_text(text)
            assert directory.guests() == [GuestStatus("one", 0, (), "starting", "")]


def test_a_base_that_others_may_write_to_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(KvmpassError, match="only this user may write to"):
        GuestDirectory.claim("one")


@pytest.mark.parametrize("variable, below", [("KVMPASS_RUNTIME_DIR", ""), ("XDG_RUNTIME_DIR", "kvmpass")])
def test_a_relative_base_stays_the_same_one(
    variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMPASS_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setenv(variable, "relative")
    monkeypatch.chdir(tmp_path)
    assert directory.base_directory() == tmp_path / "relative" / below


def test_another_user_is_denied(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of the kernel have a remedy."""

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    monkeypatch.setattr(Path, "is_dir", denied)
    for call in (directory.guests, lambda: directory.find("one"), lambda: directory.find("01:00.0")):
        with pytest.raises(PermissionError) as error:
            call()
        assert error.value.__notes__ == ["run it as the user who has started the guest"]
