"""``--root`` and ``--share``: which directory, as which user, where in the guest."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kvmpass.errors import DaemonError, ShareError
from kvmpass.files import User, caller
from kvmpass.guest import directories as module
from kvmpass.guest.directories import Directory, directories, entry, name_servers
from kvmpass.guest.image import GuestImage
from kvmpass.guest.spec import HOST, MINIMAL
from kvmpass.initramfs.served import Served
from kvmpass.memory import Backing, GuestMemory
from kvmpass.virtio.frontend import FrontEnd


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    return made


def share(text: str, root: str = MINIMAL) -> Directory:
    (found,) = [item for item in directories(root, [text]) if item.mount.target != "/"]
    return found


def test_by_default_there_is_none() -> None:
    assert directories(MINIMAL, []) == ()


def test_a_share_is_read_only_and_at_its_own_path(shared: Path) -> None:
    found = share(str(shared))
    assert (found.source, found.mount.target, found.mount.writable) == (shared, str(shared), False)
    assert found.user == caller()


def test_the_last_colon_separates_the_target(shared: Path) -> None:
    odd = shared.parent / "a:b,c"
    odd.mkdir()
    assert share(f"{odd}").mount.target == str(odd)
    assert share(f"{odd}:/x").source == odd
    assert share(f"{odd}:/x/../y/").mount.target == "/y"


def test_a_symlink_is_served_under_its_own_name(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared.parent / "link").symlink_to(shared)
    monkeypatch.chdir(shared.parent)
    found = share("link")
    assert (found.source, found.mount.target) == (shared, str(shared.parent / "link"))


def test_in_a_root_the_target_is_where_its_symlinks_lead(tmp_path: Path, shared: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/sh").symlink_to("dash")
    (root / "bin").symlink_to("usr/bin")
    (root / "srv").symlink_to("/var/srv")
    found = directories(str(root), [f"{shared}:/srv/x"])
    assert [item.mount.target for item in found] == ["/", "/var/srv/x"]
    assert found[0].source == root


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/missing", "No such file"),
        ("/etc/passwd", "is not a directory"),
        ("/etc:/", "is the guest's root"),
    ],
)
def test_what_cannot_be_shared_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ShareError, match=expected):
        directories(MINIMAL, [text])


@pytest.mark.parametrize("text", ["", ":/mnt", ",rw", ":/mnt,rw"])
def test_an_empty_name_is_not_the_current_directory(text: str) -> None:
    with pytest.raises(ShareError, match="--share: the name of the directory is empty"):
        directories(MINIMAL, [text])
    with pytest.raises(ShareError, match="--root: the name of the directory is empty"):
        directories("", [text])


def test_one_target_has_one_directory(shared: Path) -> None:
    with pytest.raises(ShareError, match="two directories for /x"):
        directories(MINIMAL, [f"{shared}:/x", f"/etc:{'/x'}"])


def test_a_root_has_a_shell(shared: Path) -> None:
    with pytest.raises(ShareError, match="has no bin/sh"):
        directories(str(shared), [])
    (host,) = directories(HOST, [])
    assert (host.source, host.mount) == (Path("/"), Served("kvmpass.root", "/"))


# --- who writes


def test_as_root_it_is_written_as_the_owner(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.files, "owner", lambda status: User(1234, 5))
    found = share(f"{shared}:/x,rw")
    assert (found.user, found.mount.writable) == (User(1234, 5), True)


def test_nothing_is_written_as_root(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.files, "owner", lambda status: None)
    with pytest.raises(ShareError, match="belongs to root") as caught:
        share(f"{shared},rw")
    assert caught.value.__notes__ == [f"give it to a user: chown USER {shared}"]


def test_another_user_writes_as_himself(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert share(f"{shared},rw").user.uid == 1234
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(ShareError, match="may not write"):
        share(f"{shared},rw")


# --- how programs start


def directory(source: Path, user: User | None = None) -> Directory:
    return Directory(source, Served("root", "/"), user or User(65534, 65534))


def test_in_the_hosts_root_it_is_as_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = entry(directory(Path("/")), HOST, {"PATH": "/opt/bin:/usr/bin", "SHELL": "/bin/sh"})
    assert found.directory == str(tmp_path)
    assert found.path.split(":")[:2] == ["/opt/bin", "/usr/bin"]
    assert "/usr/sbin" in found.path.split(":")
    assert len(found.path.split(":")) == len(set(found.path.split(":")))
    assert (found.home, found.shell) == ("/root", "/bin/sh"), "nobody has no home"
    assert entry(directory(Path("/")), HOST, {"SHELL": "/missing"}).shell == "/bin/sh"


def test_in_another_root_it_is_as_in_any_guest(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").touch()
    assert entry(directory(tmp_path), str(tmp_path), {"PATH": "/opt", "SHELL": "/bin/zsh"}).shell == "/bin/sh"
    (tmp_path / "bin/bash").symlink_to("/elsewhere")
    found = entry(directory(tmp_path), str(tmp_path), {})
    assert (found.directory, found.home, found.path, found.shell) == ("/", "/", "", "/bin/bash")
    (tmp_path / "root").mkdir()
    found = entry(directory(tmp_path), str(tmp_path), {})
    assert (found.directory, found.home) == ("/root", "/root")


def test_a_daemon_that_crashes_at_once_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory()

    class Machine:
        def add_filesystem(self, tag: str, daemon: socket.socket, *more: object) -> None:
            with daemon:
                FrontEnd(f"file system {tag}", daemon, memory, lambda reason: None)

    machine: Any = Machine()
    with TemporaryDirectory(dir="/var/tmp") as name:
        program = Path(name, "virtiofsd")
        program.write_text("#!/bin/sh\necho the reason >&2\nkill -SEGV $$\n")
        for path in (program, program.parent):
            path.chmod(0o755)
        monkeypatch.setattr("kvmpass.files.daemon.find_daemon", lambda: program)
        with pytest.raises((DaemonError, ShareError)) as failed:
            directory(Path("/")).serve(machine)
    if "user namespace" in str(failed.value):
        pytest.skip(f"{failed.value}: a machine with user namespaces makes it run")
    assert "the daemon of file system" in str(failed.value)
    assert f"{program}, which serves /, was ended by SIGSEGV: the reason" in failed.value.__notes__[-1]
    memory.close()


def test_name_servers_are_those_that_can_be_reached() -> None:
    assert b"127.0.0.53" not in name_servers()


def test_memory_is_shared_only_where_a_daemon_needs_it() -> None:
    def image(*served: Directory) -> GuestImage:
        return GuestImage(None, b"", "", directories=served)  # type: ignore[arg-type]

    assert image().backing() is Backing.ANONYMOUS
    assert image(directory(Path("/"))).backing() is Backing.MEMFD
    assert image(directory(Path("/"))).backing(Backing.HUGETLB_2M) is Backing.MEMFD_2M
    assert image().backing(Backing.HUGETLB_2M) is Backing.HUGETLB_2M
