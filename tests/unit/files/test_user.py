"""As whom files are served: the caller, never root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpass.files import User, caller, owner
from kvmpass.files.user import sudo_caller


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, User(65534, 65534)),
        ({"SUDO_UID": "1000", "SUDO_GID": "100"}, User(1000, 100)),
        ({"SUDO_UID": "0", "SUDO_GID": "0"}, User(65534, 65534)),  # sudo by root
        ({"SUDO_UID": "1000"}, User(65534, 65534)),
        ({"SUDO_UID": "-1", "SUDO_GID": "1"}, User(65534, 65534)),
        ({"SUDO_UID": str(1 << 32), "SUDO_GID": "1"}, User(65534, 65534)),
    ],
)
def test_of_root(environment: dict[str, str], expected: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert caller(environment) == expected
    assert sudo_caller(environment) == (expected if expected.uid == 1000 else None)


def test_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says does not matter: it is the user's own."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    assert caller({"SUDO_UID": "1", "SUDO_GID": "1"}) == User(1234, 100)


def test_of_a_file(tmp_path: Path) -> None:
    """The owner's own group, not the file's, which may give more than the owner has."""
    status = list(tmp_path.stat())
    status[4], status[5] = 65534, 6
    found = owner(os.stat_result(status))
    assert found is not None
    assert (found.uid, found.gid) == (65534, 65534)
    assert found.name == "nobody"
    status[4] = 0
    assert owner(os.stat_result(status)) is None
    assert User(4_000_000_000, 1).name == "4000000000"
    assert User(4_000_000_000, 1).home is None
