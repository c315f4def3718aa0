"""One list of what speaks against a device: every command judges by it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import one_answer
from support.host_tree import Host
from support.one_answer import KINDS, compare
from support.repository import ROOT

from kvmpass import host as library
from kvmpass.assignment import assign
from kvmpass.assignment import plan as planning
from kvmpass.cli.main import main
from kvmpass.errors import NotAssignable
from kvmpass.host import Bdf, Look
from kvmpass.host.blockers import blockers
from kvmpass.host.drivers import bind as binding
from kvmpass.host.view.inventory import inventory, take_inventory

GPU = Bdf(0, 1, 0, 0)
DEVICE = f"sys/bus/pci/devices/{GPU}"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.add(str(GPU), "amdgpu", 7, 0x038000, config=b"\x02\x10\x34\x12" + bytes(60))
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    for module in (planning, binding):
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
    bdf, cause = str(GPU), f"is in a BAR of {GPU}: vfio-pci cannot request that BAR"
    assert "no: BOOTFB uses a BAR" in run(capsys, "list")[1]
    [device] = json.loads(run(capsys, "list", "--json")[1])["devices"]
    assert (device["assignable"], [blocker["kind"] for blocker in device["blockers"]]) == (
        False,
        ["boot-framebuffer"],
    )
    assert "no: BOOTFB uses a BAR" in run(capsys, "show", bdf)[1]
    for command in ("doctor", "plan"):
        status, text = run(capsys, command, bdf)
        assert status == 1
        assert cause in " ".join(text.split())
    status, text = run(capsys, "bind", "--dry-run", bdf)
    assert (status, cause in text) == (0, True), "it can be bound, and not yet assigned"
    with pytest.raises(NotAssignable, match=cause):
        assign.check([GPU], Look(host))


def test_a_device_that_does_not_answer(host: Host) -> None:
    host.put(f"{DEVICE}/config", b"\xff" * 64)
    assert kinds(host) == ["device-no-response"]
    assert inventory(host).devices[0].blockers[0].brief == "does not respond (D0)"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "meanwhile"])
def test_looking_wakes_nobody(host: Host, meanwhile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that sleeps is not asked by ``list``; who is about to use it, or to examine it, asks."""
    asked: list[str] = []
    real = host.data

    def suspend() -> None:
        for name, text in (("power_state", "D3cold"), ("power/runtime_status", "suspended")):
            host.put(f"{DEVICE}/{name}", text)

    monkeypatch.setattr(host, "data", lambda *parts, size=-1: asked.append(parts[-1]) or real(*parts, size=size))
    if meanwhile:
        look = Look(host)
        assert look.require(GPU).power_state == "D0"
        suspend()
        assert [*blockers(host, look.require(GPU), look=look)] == []
    else:
        suspend()
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
    monkeypatch.setattr(
        module, "_REFUSING", [check for check in module._REFUSING if check.id != "device-framebuffer"]
    )
    one_answer._ASKED.clear()
    with pytest.raises(AssertionError, match="doctor"):
        compare(host, tmp_path / "state")


def test_every_kind_is_in_the_schema() -> None:
    definitions: dict[str, Any] = json.loads((ROOT / "docs/schemas/common.json").read_text())["$defs"]
    assert set(definitions["device_blocker"]["allOf"][1]["properties"]["kind"]["enum"]) == KINDS - {"no-device"}


# --- BARs

PLACED = "0xfe000000 0xfe003fff 0x40200"  # 32-bit memory
NOTHING = "0x0 0x0 0x0"
PORTS = "0xd000 0xd01f 0x40101"
WITHOUT = "a guest would get the device without it"


def registers(*values: int, header: int = 0) -> bytes:
    """The beginning of configuration space with those BARs."""
    bars = b"".join(value.to_bytes(4, "little") for value in values)
    return b"\x22\x10\x34\x12" + bytes(10) + bytes([header, 0]) + bars.ljust(0x30, b"\0")


def bars(host: Host, resource: list[str], config: bytes, **options: Any) -> tuple[list[str], str]:
    """The kinds of what blocks, and the causes of that and of warnings about BARs."""
    host.put(f"{DEVICE}/resource", "\n".join([*resource, *[NOTHING] * (7 - len(resource))]))
    host.put(f"{DEVICE}/config", config)
    [finding] = [finding for finding in library.diagnose(host, GPU) if finding.check == "device-bars"]
    return kinds(host), finding.blocker.cause if finding.blocker else ""


@pytest.mark.parametrize(
    ("resource", "values", "words"),
    [
        ([PLACED, NOTHING, NOTHING, NOTHING], (0xFE000000, 0, 0xC, 0), "BAR 2: "),
        ([PLACED, "0x0 0xfff 0x20040200"], (0xFE000000, 0), "BAR 1 (4 KiB): "),
        ([PLACED, "0x1000 0x1fff 0x20040200"], (0xFE000000, 0), "BAR 1 (4 KiB): "),
        ([PLACED, NOTHING, NOTHING, NOTHING, NOTHING], (0xFE000000, 0, 4, 0x20, 0xC), "BAR 2 and BAR 4: "),
        ([NOTHING, NOTHING, PLACED], (0x8, 0, 0xFE000000), "BAR 0: "),
    ],
)
def test_a_bar_without_an_address(host: Host, resource: list[str], values: tuple[int, ...], words: str) -> None:
    found, cause = bars(host, resource, registers(*values))
    assert found == ["bar-no-address"]
    assert cause.endswith(f"has assigned no address to {words}{WITHOUT}")


@pytest.mark.parametrize(
    ("resource", "config"),
    [
        ([PLACED], registers(0xFE000000)),
        (["0x4000000000 0x41ffffffff 0x14220c"], registers(0xC, 0x40)),  # the upper half is no BAR
        ([PLACED, NOTHING], registers(0xFE000000, 0xC, header=1)),  # bus numbers of a bridge
        ([PLACED, NOTHING], b"\xff" * 64),  # silent, which is another reason
        ([PLACED, NOTHING], b""),
        ([NOTHING] * 6 + ["0x0 0xffff 0x20046200"], registers()),  # a ROM, which nobody needs
        ([NOTHING] * 7 + ["0x0 0xffff 0x20140204"], registers()),  # a virtual function's
        ([], registers(0xFE000000)),  # a tree that was recorded without
    ],
)
def test_every_bar_has_its_address(host: Host, resource: list[str], config: bytes) -> None:
    if not resource:
        host.put(f"{DEVICE}/config", config)
        host.path(f"{DEVICE}/resource").unlink()
        assert kinds(host) == []
    else:
        found, cause = bars(host, resource, config)
        assert (set(found) <= {"device-no-response", "bridge"}, cause) == (True, "")


def test_ports_are_no_reason(host: Host) -> None:
    found, cause = bars(host, [PLACED, NOTHING], registers(0xFE000000, 1))
    assert found == []
    assert "has assigned no I/O ports to BAR 1" in cause


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["BAR 1 [mem size 0x20000000000 64bit pref]: can't assign; no space"], "BAR 1 (2 TiB)"),
        (["BAR 1: no space for [mem size 0x10000000]", "BAR 1: failed to assign [mem size 0x10000000]"], "(256 MiB)"),
        (["BAR 1: no space for [mem size 0x10000000]", "BAR 1: assigned [mem 0xc0000000-0xcfffffff]"], ""),
        (["BAR 1 [mem size 0x1000]: can't assign; no space", "BAR 1 [mem 0xc0000000-0xc0000fff]: assigned"], ""),
        (["BAR 7: no space for [mem size 0x10000000]"], ""),
    ],
)
def test_what_the_register_does_not_tell_the_log_does(host: Host, lines: list[str], words: str) -> None:
    records = [f"6,{number},1,-;pci {GPU}: {line}" for number, line in enumerate(lines)]
    others = ["6,90,1,-;pci 0000:09:00.0: BAR 1: no space for [mem size 0x1000]", "nonsense"]
    user = f"14,91,1,-;pci {GPU}: BAR 0 [mem size 0x1000]: can't assign; no space"
    host.put("dev/kmsg", "\n".join([*others, *records, user]))
    found, cause = bars(host, [PLACED, NOTHING], registers(0xFE000000, 0))
    assert (found, words in cause) == (["bar-no-address"] if words else [], True)


def test_what_has_no_address_is_not_compared(host: Host) -> None:
    host.put("proc/iomem", "00000000-00000fff : BOOTFB\n00001000-00001fff : BOOTFB")
    assert bars(host, ["0x1000 0x1fff 0x20040200", PORTS], registers(0, 0xD001))[0] == ["bar-no-address"]
    host.put("proc/iomem", "0000d000-0000d01f : BOOTFB")
    assert bars(host, [PLACED, PORTS], registers(0xFE000000, 0xD001)) == ([], "")


# --- many devices


def test_the_work_grows_with_the_number_of_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its square: files, links and directories that are read, for twice as many functions."""
    calls = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, count)

    work = []
    for number in (20, 40):
        host = Host(tmp_path / str(number))
        for index in range(number):
            bdf = f"0000:{index + 1:02x}:00.0"
            host.add(bdf, "nvme", index // 2, config=bytes(64))
            host.add_below(bdf, "sys/class/block", f"nvme{index}n1", dev=f"259:{index}")
            host.add_below(bdf, "sys/class/net", f"eth{index}")
            host.add_below(bdf, "sys/dev/char", f"240:{index}", uevent=f"DEVNAME=nvme{index}")
            host.process(1000 + index, "x", nodes=("/dev/null",))
        with monkeypatch.context() as patched:
            monkeypatch = patched
            for name in ("open", "readlink", "listdir"):
                counted(name)
            calls = 0
            assert len(inventory(host).devices) == number
        work.append(calls)
    Host.made.clear()
    assert work[1] < 2.2 * work[0]


@pytest.mark.parametrize("details, most", [(False, 29), (True, 36)])
def test_files_that_are_read_of_each_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, details: bool, most: int
) -> None:
    """Opens, links and listings of one more device, alone in its group."""
    seen: list[str] = []
    for name in ("open", "readlink", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *rest, real=real, **more: (seen.append(str(path)), real(path, *rest, **more))[1]
        )
    counts = []
    for number in (1, 11):
        host = Host(tmp_path / str(number))
        for index in range(number):
            host.add(f"0000:{index + 1:02x}:00.0", "nvme", index, config=bytes(64))
        seen.clear()
        assert len(take_inventory(host, (), details=details).devices) == number
        counts.append(len(seen))
    Host.made.clear()
    assert counts[1] - counts[0] <= 10 * most
