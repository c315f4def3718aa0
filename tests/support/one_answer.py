"""The same question, whether a device can be assigned, to everything that answers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.assignment.plan import plan
from kvmpass.cli.documents import device_document
from kvmpass.errors import DriverPinned, KvmpassError
from kvmpass.host import Blocker, Look, PciDevice, bind, check_assignable, describe, diagnose
from kvmpass.host.blockers import CHECKS
from kvmpass.host.blockers import blockers as reasons
from kvmpass.host.doctor import Outcome
from kvmpass.host.view.inventory import HostStatus, device_status, host_status
from support.host_tree import Host

Answer = list[tuple[str, str]]
_ASKED: set[tuple[object, ...]] = set()
KINDS = {template.kind for check in CHECKS for template in check.templates if not template.warning}


def compare(host: Host, state: Path) -> int:
    """Ask about every device of a tree, unless one with the same facts was asked; returns how many there are."""
    look, whole = Look(host), host_status(host)
    devices = host.devices()
    found = [list(reasons(host, device, look=look)) for device in devices]
    facts = (*devices, *map(str, found), whole)
    if facts not in _ASKED:
        _ASKED.add(facts)
        for device, blockers in zip(devices, found, strict=True):
            _compare(host, device, blockers, look, whole, state)
    return len(devices)


def _answer(found: list[Blocker]) -> Answer:
    return [(blocker.kind, blocker.cause) for blocker in found]


def _compare(host: Host, device: PciDevice, found: list[Blocker], look: Look, whole: HostStatus, state: Path) -> None:
    answer, bdf = _answer(found), device.bdf
    assert len({kind for kind, _ in answer}) == len(answer), "one reason of each kind"
    assert {kind for kind, _ in answer} <= KINDS

    status = device_status(look, device)
    assert _answer([*status.blockers]) == answer, "list"
    document = device_document(status, whole)
    assert [(blocker["kind"], blocker["cause"]) for blocker in document["blockers"]] == answer, "list --json"
    assert document["assignable"] is (whole.ready and not answer)
    assert _answer([*describe(host, bdf).status.blockers]) == answer, "show"

    findings = diagnose(host, bdf, look=look)
    skipped = {
        template.kind
        for check in CHECKS
        for template in check.templates
        if any(finding.check == check.id and finding.outcome is Outcome.SKIPPED for finding in findings)
    }
    seen = [pair for pair in answer if pair[0] not in skipped]  # what fails the host hides what follows from it
    failed = [finding.blocker for finding in findings if finding.outcome is Outcome.FAIL and finding.blocker]
    assert [pair for pair in _answer(failed) if pair[0] in KINDS] == seen, "doctor"
    planned = [blocker for blocker in plan([bdf], sysfs=host).blockers if blocker.bdf is not None]
    assert [pair for pair in _answer(planned) if pair[0] in KINDS] == seen, "plan"

    _assign(host, device, found)
    if device.driver != "vfio-pci":
        _bind(host, device, found, state)


def _assign(host: Host, device: PciDevice, found: list[Blocker]) -> None:
    if not found:
        assert check_assignable(host, device.bdf) == device, "assign"
        return
    with pytest.raises((KvmpassError, OSError)) as refused:
        check_assignable(host, device.bdf)
    assert str(refused.value) == found[0].cause, "assign"
    assert found[0].remedy in refused.value.__notes__


def _bind(host: Host, device: PciDevice, found: list[Blocker], state: Path) -> None:
    refusing = [blocker for blocker in found if not blocker.bindable]
    try:
        [result] = bind([device.bdf], dry_run=True, sysfs=host, state_dir=state)
    except DriverPinned:  # by another tool, at the next boot: of no interest to an assignment
        assert not refusing, "bind --dry-run"
    except (KvmpassError, OSError) as error:
        assert refusing, f"bind --dry-run: {error}"
        assert str(error) == refusing[0].cause, "bind --dry-run"
    else:
        assert not refusing, "bind --dry-run"
        warned = " ".join(result.warnings)
        assert all(blocker.cause in warned for blocker in found), "bind --dry-run"
