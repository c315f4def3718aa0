"""What a hostile archive can do on the host: create files and directories beneath one directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmpass.errors import BadArchive
from kvmpass.guest import extract
from kvmpass.guest.archive import ArchiveReader
from kvmpass.guest.destination import Destination
from kvmpass.guest.extract import CopiedOut, Extraction
from kvmpass.initramfs.cpio import Node, newc

DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
Nodes = Sequence[tuple[str, Node]]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, beside one that must not change."""
    monkeypatch.delenv("SUDO_UID", raising=False)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("outside\n")
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def unpack(target: Path, nodes: Nodes, source: str = "/results", cut: int = 0) -> CopiedOut:
    extraction = Extraction(Destination.parse(f"{source}:{target}/"))
    try:
        data = newc(nodes)
        ArchiveReader(extraction).feed(data[: len(data) - cut])
        return extraction.result()
    finally:
        extraction.close()
        outside = target.parent / "outside"
        assert [path.name for path in outside.iterdir()] == ["file"]
        assert (outside / "file").read_text() == "outside\n"


def test_a_directory(target: Path) -> None:
    nodes = [
        (".", Node(DIRECTORY)),
        ("./sub", Node(stat.S_IFDIR | 0o500)),
        ("./sub/program", Node(stat.S_IFREG | 0o755, b"#!/bin/sh\n")),
        ("log", Node(FILE, b"x" * 100_000)),
        ("empty", Node(stat.S_IFREG)),
    ]
    result = unpack(target, nodes)
    assert result == CopiedOut("/results", str(target / "results"), 5, 100_010, (), None)
    assert (target / "results/log").read_bytes() == b"x" * 100_000
    assert (target / "results/sub/program").stat().st_mode == stat.S_IFREG | 0o755
    assert (target / "results/empty").stat().st_size == 0
    (target / "results/sub/another").touch()  # its owner can write to it, and read all
    assert unpack(target, nodes) == result, "again, over what is there"
    assert (target / "results/sub/another").exists()


def test_a_file_whatever_its_name(target: Path) -> None:
    for name in ("results", ".", "../../outside/file", "/etc/passwd"):
        assert unpack(target, [(name, Node(FILE, name.encode()))]).error is None
        assert (target / "results").read_text() == name


def test_only_the_content_of_a_directory(target: Path) -> None:
    assert unpack(target, [(".", Node(DIRECTORY)), ("a", Node(FILE, b"a"))], "/results/.").error is None
    assert (target / "a").read_text() == "a"
    result = unpack(target, [(".", Node(FILE))], "/results/.")
    assert result.error == "some of it was left out"
    assert result.left_out == (f"{target}: Is a directory",)


@pytest.mark.parametrize("name", ["..", "../outside/new", "/etc/new", "a/../../outside/new", "a//b", "a/", "./../b"])
def test_names_that_lead_outside(target: Path, name: str) -> None:
    with pytest.raises(BadArchive, match="has the name"):
        unpack(target, [(".", Node(DIRECTORY)), (name, Node(FILE, b"x"))])
    with pytest.raises(BadArchive, match="has the name"):
        unpack(target, [(name, Node(DIRECTORY))])
    assert [str(path.relative_to(target)) for path in target.rglob("*")] in (["results"], [])


def test_a_long_name_that_leads_outside_is_shown_in_short(target: Path) -> None:
    with pytest.raises(BadArchive, match=r"has the name '\.\./\?{197}…'$"):
        unpack(target, [(".", Node(DIRECTORY)), ("../" + "\x1b" * 4000, Node(FILE, b"x"))])


def test_other_types_are_left_out(target: Path) -> None:
    kinds = {stat.S_IFLNK: "a symlink", stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device"}
    kinds |= {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        0: "of an unknown type",
        0o170000: "of an unknown type",
    }
    nodes = [(f"node{number}", Node(kind | 0o777, b"/etc")) for number, kind in enumerate(kinds)]
    result = unpack(target, [(".", Node(DIRECTORY)), *nodes, ("log", Node(FILE, b"log"))])
    assert result.error is None
    assert result.left_out == tuple(f"results/node{number}: {kind}" for number, kind in enumerate(kinds.values()))
    assert [path.name for path in (target / "results").iterdir()] == ["log"]
    assert unpack(target, [(".", Node(LINK, b"/etc/passwd"))]).error == "some of it was left out"


def test_an_empty_hard_link_is_left_out(target: Path) -> None:
    data = newc([(".", Node(DIRECTORY)), ("first", Node(FILE)), ("second", Node(FILE, b"content"))])
    linked = data.replace(b"%08X%08X" % (0, 1), b"%08X%08X" % (0, 2))  # group, number of links
    extraction = Extraction(Destination.parse(f"/results:{target}/"))
    ArchiveReader(extraction).feed(linked)
    result = extraction.result()
    extraction.close()
    assert result.left_out == ("results/first: a hard link, whose content is elsewhere in the archive",)
    assert [path.name for path in (target / "results").iterdir()] == ["second"]


def test_symlinks_of_the_host_are_not_followed(target: Path) -> None:
    """Neither for a directory above a file, nor for the file, nor for a directory."""
    (target / "results").mkdir()
    (target / "results/sub").symlink_to("../../outside")
    (target / "results/file").symlink_to("../../outside/file")
    (target / "results/absolute").symlink_to(target.parent / "outside")
    nodes = [
        (".", Node(DIRECTORY)),
        ("sub/new", Node(FILE, b"new")),
        ("sub/file", Node(FILE, b"new")),
        ("absolute", Node(DIRECTORY)),
        ("file", Node(FILE, b"new")),
    ]
    result = unpack(target, nodes)
    assert result.error == "some of it was left out"
    assert len(result.left_out) == 3
    assert (target / "results/file").read_text() == "new"
    assert not (target / "results/file").is_symlink()


def test_a_file_with_other_links_is_replaced(target: Path) -> None:
    (target / "results").hardlink_to(target.parent / "outside/file")
    assert unpack(target, [(".", Node(FILE, b"new"))]).error is None
    assert (target / "results").read_text() == "new"


def test_what_is_not_a_file_is_not_replaced(target: Path) -> None:
    os.mkfifo(target / "results")
    result = unpack(target, [(".", Node(FILE, b"new"))])
    assert result.left_out == ("results: something that is not a file is there",)
    (target / "results").unlink()
    (target / "results").write_text("old")
    result = unpack(target, [(".", Node(DIRECTORY)), ("a", Node(FILE, b"new"))])
    assert (result.error, len(result.left_out)) == ("some of it was left out", 2)
    assert (target / "results").read_text() == "old"
    (target / "results").unlink()
    (target / "results").mkdir()
    assert unpack(target, [(".", Node(FILE, b"new"))]).error == "some of it was left out"
    assert (target / "results").is_dir()


def test_modes_are_masked(target: Path) -> None:
    before = os.umask(0o077)
    try:
        unpack(target, [(".", Node(stat.S_IFDIR | 0o7777)), ("a", Node(stat.S_IFREG | 0o7777))])
        private = [(target / "results").stat().st_mode, (target / "results/a").stat().st_mode]
        os.umask(0)
        unpack(target, [(".", Node(stat.S_IFDIR | 0o7777)), ("b", Node(stat.S_IFREG | 0o7777))])
        unpack(target, [(".", Node(stat.S_IFDIR | 0o7777))], "/more")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(mode) for mode in private] == [0o700, 0o700]
    assert stat.S_IMODE((target / "results/b").stat().st_mode) == 0o775
    assert stat.S_IMODE((target / "more").stat().st_mode) == 0o775


@pytest.mark.skipif(os.geteuid() != 0, reason="sudo makes root: run the tests as root")
def test_under_sudo_the_owner_is_the_caller(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65533")
    monkeypatch.setenv("SUDO_GID", "65532")
    target.rmdir()
    unpack(target, [(".", Node(DIRECTORY)), ("sub", Node(DIRECTORY)), ("sub/a", Node(FILE, b"a"))])
    for path in (target, target / "results", target / "results/sub", target / "results/sub/a"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65533, 65532)


def test_the_number_of_files_is_bounded(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "MAX_FILES", 10)
    result = unpack(target, [(".", Node(DIRECTORY)), *((f"f{n}", Node(FILE, b"x")) for n in range(50))])
    assert (result.files, result.bytes, result.error) == (10, 9, "more than 10 files")
    assert len([*(target / "results").iterdir()]) == 9


def test_the_size_is_bounded_before_it_is_written(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "MAX_BYTES", 1 << 30)
    data = newc([(".", Node(DIRECTORY)), ("a", Node(FILE, b"x" * 1000)), ("b", Node(FILE, b"x"))])
    large = data.replace(b"%08X%08X%08X" % (1, 0, 1), b"%08X%08X%08X" % (1, 0, 1 << 30))  # links, time, size
    extraction = Extraction(Destination.parse(f"/results:{target}/"))
    ArchiveReader(extraction).feed(large)
    result = extraction.result()
    extraction.close()
    assert (result.files, result.bytes, result.error) == (2, 1000, "more than 1 GiB")
    assert not (target / "results/b").exists()


def test_what_is_left_out_counts(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a guest does not send for ever."""
    monkeypatch.setattr(extract, "MAX_BYTES", 1500)
    (target / "a").mkdir()
    extraction = Extraction(Destination.parse(f"/results/.:{target}"))
    nodes = [(".", Node(DIRECTORY)), *(("a", Node(FILE, b"x" * 1000)) for _ in range(2))]
    ArchiveReader(extraction).feed(newc(nodes))
    result = extraction.result()
    extraction.close()
    assert (result.bytes, result.error) == (0, "more than 0 GiB")


def test_there_is_one_archive(target: Path) -> None:
    extraction = Extraction(Destination.parse(f"/results:{target}/"))
    archive = newc([(".", Node(DIRECTORY)), ("a", Node(FILE, b"x"))])
    ArchiveReader(extraction).feed(archive)
    for more in (newc([]), archive):
        with pytest.raises(BadArchive, match="more archives"):
            ArchiveReader(extraction).feed(more)
    assert extraction.result().error is None
    extraction.close()


def test_the_depth_is_bounded(target: Path) -> None:
    deep = ["/".join(["d"] * depth) for depth in range(1, extract.MAX_DEPTH + 5)]
    result = unpack(target, [(".", Node(DIRECTORY)), *((name, Node(DIRECTORY)) for name in deep)])
    assert result.files == extract.MAX_DEPTH
    assert result.left_out[0].endswith(f"more than {extract.MAX_DEPTH} directories deep")


def test_reports_are_bounded_and_printable(target: Path) -> None:
    nodes = [(f"\x1b[2J{n}" + "x" * 300, Node(LINK, b"/")) for n in range(100)]
    result = unpack(target, [(".", Node(DIRECTORY)), *nodes])
    assert len(result.left_out) == 17
    assert result.left_out[-1] == "and 84 more"
    assert all(line.isprintable() and len(line) < 230 for line in result.left_out)


def test_a_part_of_an_archive_is_kept_and_said(target: Path) -> None:
    result = unpack(
        target, [(".", Node(DIRECTORY)), ("a", Node(FILE, b"a" * 100)), ("b", Node(FILE, b"b" * 100))], cut=200
    )
    assert (result.files, result.error) == (2, "the guest has not sent all of it")
    assert (target / "results/a").read_bytes() == b"a" * 100
    assert unpack(target, []).error == "no such file or directory in the guest"


def test_a_full_disk_ends_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    result = unpack(target, [(".", Node(DIRECTORY)), ("a", Node(FILE, b"a")), ("b", Node(FILE, b"b"))])
    assert (result.files, result.error) == (1, "results/a: No space left on device")
    assert not (target / "results/b").exists()
