"""The check of what it takes to serve files to a guest."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import ShareError
from kvmpass.host import Look
from kvmpass.host.check import CheckContext, Finding, Outcome, run_checks
from kvmpass.host.doctor.files import CHECKS


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.put("proc/sys/kernel/osrelease", "6.12.9-amd64")
    made.put("proc/sys/user/max_user_namespaces", "15000")
    made.put("proc/self/status", "Uid:\t1000\t1000\t1000\t1000")
    return made


def found(host: Host) -> Finding:
    (finding,) = run_checks(CHECKS, CheckContext(Look(host)))
    return finding


def test_a_host_that_can(host: Host) -> None:
    host.put("proc/sys/kernel/unprivileged_userns_clone", "1")
    host.put("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "0")
    finding = found(host)
    assert (finding.outcome, finding.summary) == (Outcome.PASS, "/usr/libexec/virtiofsd")
    assert len(finding.read) == 4
    host.path("usr/libexec/virtiofsd").unlink()
    host.put("usr/lib/qemu/virtiofsd", "")
    assert found(host).summary == "/usr/lib/qemu/virtiofsd"


def warned(host: Host, kind: str) -> Finding:
    finding = found(host)
    assert finding.blocker is not None
    assert (finding.outcome, finding.blocker.kind) == (Outcome.WARN, kind)
    assert isinstance(finding.blocker.exception(), ShareError)
    return finding


def test_no_daemon(host: Host) -> None:
    host.path("usr/libexec/virtiofsd").unlink()
    warned(host, "virtiofsd-missing")


def test_an_old_kernel(host: Host) -> None:
    host.put("proc/sys/kernel/osrelease", "5.10.0-30-amd64")
    assert "5.10 has no mount_setattr" in str(warned(host, "no-mount-setattr").blocker).replace(",", "")


@pytest.mark.parametrize(
    "file, forbids, wanted",
    [
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_no_user_namespaces(host: Host, file: str, forbids: str, wanted: str) -> None:
    host.put(f"proc/sys/{file}", forbids)
    blocker = warned(host, "user-namespaces-forbidden").blocker
    assert blocker is not None
    assert blocker.commands == (wanted,)
    host.put("proc/self/status", "Uid:\t0\t0\t0\t0")  # root may, unless nobody may
    assert (found(host).outcome is Outcome.PASS) == (not file.startswith("user/"))
