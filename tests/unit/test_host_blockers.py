"""One list of what speaks against a device: every command judges by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from host_tree import Host
from one_answer import KINDS, compare

from kvmpass import assignment, planning
from kvmpass import host as library
from kvmpass.cli.main import main
from kvmpass.errors import NotAssignable
from kvmpass.host import Bdf, blockers, handover, inventory

GPU = Bdf(0, 1, 0, 0)
DEVICE = f"sys/bus/pci/devices/{GPU}"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.add(str(GPU), "amdgpu", 7, 0x038000, config=b"\x02\x10\x34\x12" + bytes(60))
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    for module in (planning, handover):
        monkeypatch.setattr(module, "Sysfs", lambda: host)
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    return host


def kinds(host: Host, bdf: Bdf = GPU) -> list[str]:
    return [blocker.kind for blocker in blockers(host, host.device(bdf))]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output + errors


def test_a_framebuffer_in_a_bar_is_known_to_every_command(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.put("proc/iomem", "fe001000-fe002fff : BOOTFB")
    bdf, cause = str(GPU), f"lies in a BAR of {GPU}: vfio-pci cannot claim that BAR"
    assert "no: BOOTFB sits on it" in run(capsys, "list")[1]
    [device] = json.loads(run(capsys, "list", "--json")[1])["devices"]
    assert (device["assignable"], [one["kind"] for one in device["blockers"]]) == (False, ["boot-framebuffer"])
    assert "no: BOOTFB sits on it" in run(capsys, "show", bdf)[1]
    for command in ("doctor", "plan"):
        status, text = run(capsys, command, bdf)
        assert status == 1
        assert cause in " ".join(text.split())
    status, text = run(capsys, "bind", "--dry-run", bdf)
    assert (status, cause in text) == (0, True), "it can be bound, and not yet assigned"
    with pytest.raises(NotAssignable, match=cause):
        assignment.check([GPU], 1 << 26, host)


def test_a_device_that_does_not_answer(host: Host) -> None:
    host.put(f"{DEVICE}/config", b"\xff" * 64)
    assert kinds(host) == ["device-silent"]
    assert inventory(host).devices[0].blockers[0].brief == "does not answer (D0)"


def test_looking_wakes_nobody(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that sleeps is not asked by ``list``; who is about to use it, or to examine it, asks."""
    for name, text in (("power_state", "D3cold"), ("power/runtime_status", "suspended")):
        host.put(f"{DEVICE}/{name}", text)
    asked: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: asked.append(self.name) or real(self, *a, **k))
    inventory(host)
    assert "config" not in asked
    library.check_assignable(host, GPU)
    assert "config" in asked


def test_a_group_that_the_kernel_does_not_have(host: Host) -> None:
    host.path("sys/kernel/iommu_groups").rename(host.root / "away")
    assert kinds(host) == ["no-group"]
    assert inventory(host).groups == ()


def test_the_comparison_can_fail(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put("proc/iomem", "fe001000-fe002fff : BOOTFB")
    assert compare(host, tmp_path / "state") == 1
    module = __import__("kvmpass.host.blockers", fromlist=["_REFUSING"])
    monkeypatch.setattr(module, "_REFUSING", [one for one in module._REFUSING if one.id != "device-framebuffer"])
    with pytest.raises(AssertionError, match="doctor"):
        compare(host, tmp_path / "state")


@pytest.mark.parametrize("schema", ["list", "show"])
def test_every_kind_is_in_the_schemas(schema: str) -> None:
    text = (Path(__file__).parents[2] / f"docs/schemas/{schema}.json").read_text()
    definitions: dict[str, Any] = json.loads(text)["$defs"]
    assert set(definitions["blocker"]["properties"]["kind"]["enum"]) == KINDS - {"no-device"}
