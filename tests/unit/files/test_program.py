"""virtiofsd: where it is, and how it is called."""

from __future__ import annotations

from pathlib import Path

from kvmpass.files import find_daemon
from kvmpass.files.program import PLACES, arguments


def test_it_is_where_distributions_have_it() -> None:
    assert find_daemon(lambda place: False) is None
    assert find_daemon(lambda place: place == PLACES[1]) == Path("/usr/lib/qemu/virtiofsd")
    assert find_daemon(lambda place: True) == Path("/usr/libexec/virtiofsd")


def test_one_that_announces_mount_points_is_told_not_to(tmp_path: Path) -> None:
    """The overlay of a guest's root could not enter them; the older one does not know the option."""
    program = tmp_path / "virtiofsd"
    program.write_bytes(b"\x7fELF ... announce_submounts ...")
    words = (str(program), "--fd=3", "--rlimit-nofile=0", "-o", "source=/tmp,sandbox=chroot")
    assert arguments(program, 3, "/tmp") == words
    program.write_bytes(b"\x7fELF ... no-announce-submounts ...")
    assert arguments(program, 3, "/tmp") == (*words, "--no-announce-submounts")
    assert arguments(tmp_path / "missing", 3, "/tmp")[1:] == words[1:]
