"""Disks that somebody has claimed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvmpass.host import Sysfs
from kvmpass.host.usage import storage


@pytest.mark.parametrize(
    ("busy", "new", "claimed"), [(0, True, False), (3, True, False), (3, False, True), (9, True, True)]
)
def test_who_reads_the_partitions_of_a_new_disk_claims_it_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: int, new: bool, claimed: bool
) -> None:
    (tmp_path / "dev").mkdir()
    node = tmp_path / "dev/nvme0n1"
    node.touch()
    usual, asked, now = os.open, list[Path](), [100.0]

    def opened(path: Path, flags: int) -> int:
        asked.append(path)
        if len(asked) <= busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return usual(path, flags)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: now.append(now.pop() + 0.2))
    monkeypatch.setattr(storage, "_NEW_SECONDS", 1e9 if new else 0.0)
    assert storage._claimed_now(Sysfs(tmp_path), "nvme0n1") is claimed
    assert set(asked) == {node}
