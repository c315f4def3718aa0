"""Directories of the host in the initramfs: what init mounts, and how a program starts in the root."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.served import MOUNTS, ROOT, UPPER, Entry, Served, add, in_root


def lines_of(tree: Tree, path: str) -> list[list[str]]:
    node = tree.get(path)
    assert node is not None
    return [line.split(" ") for line in node.data.decode().splitlines()]


def fstab(tree: Tree) -> list[list[str]]:
    """The lines of all tables that the script mounts, in that order."""
    tables = [words[1] for words in lines_of(tree, MOUNTS) if words[0] == "mount_all"]
    return [line for table in tables for line in lines_of(tree, table)]


def test_the_root_is_an_overlay_with_the_guests_own_directories() -> None:
    tree = Tree()
    assert add(tree, [Served("data", "/srv/data", writable=True), Served("root", "/")], empty=["/root"])
    lines = fstab(tree)
    assert lines[0] == ["root", "/kvmpass/lower", "virtiofs", "ro", "0", "0"]
    assert lines[1][:3] == ["overlay", ROOT, "overlay"]
    assert "lowerdir=/kvmpass/lower,upperdir=/kvmpass/upper,workdir=/kvmpass/work" in lines[1]
    own = {line[1]: line[0] for line in lines if line[3] == "rbind"}
    assert own == {ROOT + path: path for path in ("/dev", "/proc", "/run", "/sys", "/tmp")}
    assert lines[-2] == ["tmpfs", f"{ROOT}/root", "tmpfs", "mode=0700", "0", "0"]
    assert lines[-1] == ["data", f"{ROOT}/srv/data", "virtiofs", "rw", "0", "0"]
    assert lines_of(tree, MOUNTS)[1] == ["mkdir", "-p", f"{ROOT}/srv/data"]
    for path in (ROOT, UPPER, "/kvmpass/lower", "/kvmpass/work"):
        assert tree.is_directory(path)


def test_in_the_initramfs_a_directory_is_made_for_a_share() -> None:
    tree = Tree()
    assert not add(tree, [Served("two", "/a/b"), Served("one", "/a")])
    assert [line[:4] for line in fstab(tree)] == [["one", "/a", "virtiofs", "ro"], ["two", "/a/b", "virtiofs", "ro"]]
    assert lines_of(tree, MOUNTS)[0] == ["mkdir", "-p", "/a", "/a/b"]


def test_blanks_in_a_name_are_escaped() -> None:
    tree = Tree()
    add(tree, [Served("tag", "/my data")])
    assert fstab(tree) == [["tag", "/my\\040data", "virtiofs", "ro", "0", "0"]]


def test_a_program_starts_with_its_directory_home_and_path(tmp_path: Path) -> None:
    """Run by a shell on this host, with a chroot that does nothing."""
    for name, body in (("chroot", '#!/bin/sh\nshift\nexec "$@"\n'),):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    entry = Entry(directory=str(tmp_path), home="/home/a b", path=f"{tmp_path}:/usr/bin:/bin", shell="/bin/bash")
    (tmp_path / "script").write_bytes(entry.script(["sh", "-c", 'pwd; echo "$HOME $SHELL $1"', "name", "a 'b' $c"]))
    words = ["sh", str(tmp_path / "script")]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/bin"}, check=True)
    assert done.stdout == f"{tmp_path}\n/home/a b /bin/bash a 'b' $c\n"
    assert done.stderr == ""
    assert b"exec chroot /kvmpass/root /bin/sh -c" in entry.script(())
    assert entry.script(()).endswith(b" /bin/bash -l\n")
    assert entry.environment["HOME"] == "/home/a b"
    assert "PATH" not in Entry().environment


def test_a_directory_that_is_missing_is_no_reason_not_to_run(tmp_path: Path) -> None:
    (tmp_path / "chroot").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "chroot").chmod(0o755)
    (tmp_path / "script").write_bytes(Entry(directory="/missing").script(["echo", "ran"]))
    words = ["sh", str(tmp_path / "script")]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/bin"}, check=True)
    assert (done.stdout, done.stderr) == ("ran\n", "kvmpass: /missing cannot be entered: starting in /\n")


@pytest.mark.parametrize(
    "target, expected",
    [
        ("/usr/bin/x", "/usr/bin/x"),
        ("/bin/x", "/usr/bin/x"),
        ("/var/run/x", "/run/x"),
        ("/up/x", "/x"),
        ("/usr/../bin/./x", "/usr/bin/x"),
        ("/loop/x", "/loop/x"),
        ("/new/place", "/new/place"),
    ],
)
def test_symlinks_of_the_root_are_followed_in_it(tmp_path: Path, target: str, expected: str) -> None:
    for directory in ("usr/bin", "var", "run"):
        (tmp_path / directory).mkdir(parents=True)
    for name, goal in {"bin": "usr/bin", "var/run": "/run", "up": "../../..", "loop": "loop"}.items():
        (tmp_path / name).symlink_to(goal)
    found = in_root(tmp_path, target)
    assert found == expected or target.startswith("/loop")
    assert found.startswith("/")


def test_the_directories_are_those_of_root() -> None:
    tree = Tree()
    add(tree, [Served("root", "/")])
    node = tree.get(UPPER)
    assert node is not None
    assert stat.S_IMODE(node.mode) == 0o755, "the guest's root has the mode of the upper directory"
