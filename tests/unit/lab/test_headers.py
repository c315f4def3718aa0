"""The stock kernel's headers, fetched from Debian's archive."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpass.cli.lab import lab
from kvmpass.errors import LabError
from kvmpass.lab import debian, headers, kernels, status
from kvmpass.lab.cache import Say

RELEASE = "6.12.1+deb12-amd64"
COMMON = "linux-headers-6.12.1+deb12-common"
TOOLS = "linux-kbuild-6.12.1+deb12"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache with a stock kernel, and an archive with its headers: the names of what is downloaded."""
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    boot = kernels.stock_root() / "boot"
    boot.mkdir(parents=True)
    (boot / f"vmlinuz-{RELEASE}").touch()
    done: list[str] = []

    def unpack(package: str, target: Path, say: Say) -> None:
        done.append(package)
        tree = target / "usr" / "src" / package
        tree.mkdir(parents=True)
        (tree / "Makefile").write_text(f"include /usr/src/{COMMON}/Makefile\n")
        (tree / "vmlinux").touch()

    def dependency(package: str, pattern: str) -> str:
        assert package == f"linux-headers-{RELEASE}"
        return COMMON if "common" in pattern else TOOLS

    monkeypatch.setattr(debian, "download_and_unpack", unpack)
    monkeypatch.setattr(debian, "dependency", dependency)
    return done


def test_headers_are_fetched_once_and_are_relocatable(downloads: list[str]) -> None:
    assert headers.cached(RELEASE) is None
    tree = headers.fetch(print)
    assert downloads == [f"linux-headers-{RELEASE}", COMMON, TOOLS]
    assert tree.name == f"linux-headers-{RELEASE}"
    assert (tree / "Makefile").read_text() == f"include ../{COMMON}/Makefile\n"
    assert not (tree / "vmlinux").exists(), "make would want pahole"
    assert headers.fetch(print) == tree == headers.cached(RELEASE)
    assert len(downloads) == 3
    headers.fetch(print, again=True)
    assert len(downloads) == 6


def test_the_command_prints_the_directory_only(downloads: list[str]) -> None:
    result = CliRunner().invoke(lab, ["headers"])
    assert (result.exit_code, result.stdout) == (0, f"{headers.cached(RELEASE)}\n")


def test_the_status_says_where_they_come_from(downloads: list[str]) -> None:
    def row() -> str:
        return next(row.text for row in status.rows() if row.part == "kernel stock")

    assert row() == f"{RELEASE}, cached; kvmpass lab headers fetches linux-headers-{RELEASE}"
    tree = headers.fetch(print)
    assert row() == f"{RELEASE}, cached; headers: {tree}"


def test_an_archive_with_a_newer_kernel_only(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(package: str, pattern: str) -> str:
        raise LabError(f"{package} is unknown to this machine's apt", debian.UNKNOWN)

    monkeypatch.setattr(debian, "dependency", unknown)
    with pytest.raises(LabError, match="is unknown to this machine's apt") as caught:
        headers.fetch(print)
    assert "kvmpass lab clean" in caught.value.__notes__[-1]
    assert headers.cached(RELEASE) is None
