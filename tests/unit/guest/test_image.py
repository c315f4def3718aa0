"""What a guest's image is made of, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import KvmpassError
from kvmpass.guest import GuestSpec, prepare


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GuestSpec(initrd=Path("own"), session=True, copy=("/etc/hostname:/x",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, modules=(Path("one.ko"),)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), command=("true",), copy_out=("/a",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, root="host"), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, shares=("/tmp",)), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, copy_out=("/a",)), "sends files"),
    ],
)
def test_an_initramfs_of_the_users_own_gets_nothing_more(spec: GuestSpec, reason: str) -> None:
    """Nothing would use it: not even its kernel is looked for."""
    with pytest.raises(KvmpassError, match=reason):
        prepare(spec, ())
