"""What is covered in a tree that a guest sees."""

from __future__ import annotations

from kvmpass.files import VIRTUAL, covers

MOUNTS = [
    ("/", "ext4"),
    ("/proc", "proc"),
    ("/proc/sys/fs/binfmt_misc", "autofs"),
    ("/dev", "devtmpfs"),
    ("/dev/pts", "devpts"),
    ("/home", "btrfs"),
    ("/srv/jail/proc", "proc"),
    ("/srv/jail/data", "xfs"),
    ("/srv/jailed/sys", "sysfs"),
]


def test_of_the_root_the_kernels_own_file_systems_wherever_they_are() -> None:
    found = covers("/", MOUNTS)
    assert {"/dev", "/proc", "/sys", "/run", "/srv/jail/proc", "/srv/jailed/sys"} <= set(found)
    assert not {"/home", "/srv/jail/data", "/", ""} & set(found)
    assert found.index("/proc") < found.index("/proc/sys/fs/binfmt_misc"), "below a cover there is nothing to cover"


def test_of_another_directory_what_is_mounted_below_it() -> None:
    assert covers("/srv/jail", MOUNTS) == ["/proc"]
    assert covers("/home", MOUNTS) == []


def test_those_without_files_are_known() -> None:
    assert {"proc", "sysfs", "devtmpfs", "cgroup2", "debugfs", "securityfs"} <= VIRTUAL
    assert not {"ext4", "tmpfs", "overlay", "nfs", "fuse"} & VIRTUAL
