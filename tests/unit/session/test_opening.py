"""How a session starts, or does not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpass.cli import assign
from kvmpass.cli.main import main
from kvmpass.errors import DeviceInUse
from kvmpass.guest import GuestSpec
from kvmpass.machine import Machine
from kvmpass.session import opening
from kvmpass.session.directory import GuestDirectory, GuestStatus

DEVICE = "0000:01:00.0"


@pytest.fixture(autouse=True)
def in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A device that is in use."""

    @contextlib.contextmanager
    def assigned(*arguments: Any, **options: Any) -> Iterator[Machine]:
        raise DeviceInUse(f"{DEVICE} is assigned by process 4711 (kvmpass)")
        yield

    monkeypatch.setattr(opening, "assigned", assigned)
    monkeypatch.setattr(assign, "assigned", assigned)
    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize("address", [DEVICE, "01:00.0"])
def test_who_wants_a_device_of_a_guest_learns_its_name(address: str) -> None:
    with GuestDirectory.claim("one") as directory:
        directory.write(GuestStatus("one", 4711, (DEVICE,), "running", ""))
        with pytest.raises(DeviceInUse, match=rf"^{DEVICE} is assigned to the guest one, process 4711") as error:
            opening.open_session([address], GuestSpec(session=True))
    assert error.value.__notes__ == ["stop it (kvmpass stop one), or choose another device"]


def test_who_has_a_device_that_is_no_guest_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that the guest which is being started: its directory names the device already."""
    with GuestDirectory.claim("one") as directory:
        directory.write(GuestStatus("one", os.getpid(), (DEVICE,), "starting", ""))
        with pytest.raises(DeviceInUse, match=r"is assigned by process 4711"):
            opening.open_session([DEVICE], GuestSpec(session=True))
    monkeypatch.delenv("KVMPASS_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(DeviceInUse, match=r"is assigned by process 4711"):
        opening.open_session([DEVICE], GuestSpec(session=True))


def test_so_does_who_wants_it_for_a_guest_that_does_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with GuestDirectory.claim("one") as directory:
        directory.write(GuestStatus("one", 4711, (DEVICE,), "running", ""))
        with pytest.raises(SystemExit) as ended:
            main(["assign", "01:00.0", "--", "true"])
    assert ended.value.code == 125
    assert capsys.readouterr().err.splitlines() == [
        f"kvmpass: {DEVICE} is assigned to the guest one, process 4711",
        "  hint: stop it (kvmpass stop one), or choose another device",
    ]
