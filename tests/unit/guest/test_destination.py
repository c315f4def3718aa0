"""``--copy-out SRC[:DST]``: what goes where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpass.errors import KvmpassError
from kvmpass.guest.destination import Destination


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "source", "directory", "name"),
    [
        ("/results", "/results", ".", "results"),
        ("/tmp/results/", "/tmp/results/", ".", "results"),
        ("/results:out", "/results", ".", "out"),
        ("/results:there", "/results", ".", "there"),
        ("/results:there/", "/results", "there", "results"),
        ("/results:link", "/results", ".", "there"),
        ("/results:link/", "/results", "there", "results"),
        ("/results:new/", "/results", "new", "results"),
        ("/results:new/out", "/results", "new", "out"),
        ("/results:.", "/results", ".", "results"),
        ("/results:there/..", "/results", ".", "results"),
        ("/results/.", "/results/.", ".", ""),
        ("/results/.:there", "/results/.", "there", ""),
        ("/results/.:new/", "/results/.", "new", ""),
        ("/:there", "/", "there", ""),
        ("/sys/bus/pci/devices/0000:00:01.0/resource:out", "/sys/bus/pci/devices/0000:00:01.0/resource", ".", "out"),
    ],
)
def test_places(here: Path, spec: str, source: str, directory: str, name: str) -> None:
    assert Destination.parse(spec) == Destination(source, Path(os.path.normpath(here / directory)), name)


@pytest.mark.parametrize(
    "spec", ["", "results", "results:out", ":out", "/results:", "/a\0b", "/results:a/b/c", "/x:file/"]
)
def test_refusals(here: Path, spec: str) -> None:
    (here / "file").write_text("")
    with pytest.raises(KvmpassError, match=r"--copy-out '"):
        Destination.parse(spec)


def test_nothing_is_created_before_there_is_something(here: Path) -> None:
    Destination.parse("/results:new/")
    assert not (here / "new").exists()
