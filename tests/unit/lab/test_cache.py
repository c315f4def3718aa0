"""The lab's cache: its files, its locks, and the tools that fill it."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from kvmpass.cli.main import fail
from kvmpass.errors import LabError
from kvmpass.lab import cache


def test_a_directory_is_never_seen_incomplete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), cache.new_directory(tmp_path / "a") as draft:
        (draft / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.glob("*a*"))
    with cache.new_directory(tmp_path / "a") as draft:
        (draft / "whole").touch()
        assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]


def test_directories_of_killed_runs_are_removed(own_cache: Path) -> None:
    abandoned = own_cache / "runs" / "run-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "lock").touch()
    with cache.run_directory() as mine, cache.run_directory() as other:
        assert not abandoned.exists()
        assert mine.exists() and other.exists()
        with pytest.raises(LabError, match="running"):
            cache.clean()
    assert list((own_cache / "runs").iterdir()) == []


NAMED = "set KVMPASS_CACHE to use another directory than"


def test_a_cache_that_cannot_be_written_is_named(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **more: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(own_cache / "runs/run-x"))

    own_cache.parent.joinpath("file").write_text("")
    for place, change in ((own_cache, read_only), (own_cache.parent / "file", None)):
        with monkeypatch.context() as patch:
            patch.setenv("KVMPASS_CACHE", str(place))
            if change is not None:
                patch.setattr(tempfile, "mkdtemp", change)
            with pytest.raises(OSError) as refused, cache.run_directory():
                pass
            assert refused.value.__notes__ == [f"{NAMED} {place}"]


def test_a_full_cache_is_named_once(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """write(2) has no path; the output of tools counts, too; errors elsewhere get no hint."""
    note = f"kvmpass lab clean empties the cache; {NAMED} {own_cache}"
    with pytest.raises(OSError) as refused, cache.locked("one", print), cache.locked("two", print):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert refused.value.__notes__ == [note]
    fail("lab", refused.value, as_json=False)
    assert capsys.readouterr().err == f"kvmpass: {own_cache}: No space left on device\n  hint: {note}\n"
    with pytest.raises(LabError, match="unpacked: tar: No space left on device") as failed:
        cache.run_tool(["sh", "-c", "echo tar: No space left on device >&2; exit 1"], "not unpacked")
    assert failed.value.__notes__ == [note]
    with pytest.raises(OSError) as elsewhere, cache.locked("one", print):
        raise OSError(errno.EACCES, "", "/root/secret")
    assert not hasattr(elsewhere.value, "__notes__")


def test_clean_removes_the_cache(own_cache: Path) -> None:
    cache.write_atomic(own_cache / "kernels" / "x", b"x" * 10000)
    assert cache.clean() >= 10000
    assert not own_cache.exists()
    assert cache.clean() == 0


def test_clean_fails_while_the_cache_is_in_use(own_cache: Path) -> None:
    with cache.locked("full-kernel", print), pytest.raises(LabError, match="prepares full-kernel"):
        cache.clean()


def test_waiting_for_a_lock_is_reported(own_cache: Path) -> None:
    said: list[str] = []
    own_cache.mkdir()
    with (own_cache / ".kernel.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def say(line: str) -> None:
            said.append(line)
            fcntl.flock(other, fcntl.LOCK_UN)

        with cache.locked("kernel", say):
            pass
    assert said == ["waiting for another run that prepares kernel"]


def test_the_last_line_of_a_failed_tool() -> None:
    with pytest.raises(LabError, match="it failed: the reason"):
        cache.run_tool(["sh", "-c", "echo one; echo the reason >&2; exit 3"], "it failed")
