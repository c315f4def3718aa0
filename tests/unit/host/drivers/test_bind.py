"""Binding for good and giving back, against a made-up kernel: what it does, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from support.bind_stage import (
    BRIDGE,
    EDU,
    FIRST,
    NIC,
    NVME,
    SECOND,
    Stage,
)

from kvmpass.errors import BadAddress, DeviceInUse, DriverPinned, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host import borrow
from kvmpass.host.drivers.bind import Handover

# --- what it does


@pytest.mark.parametrize("bdf", [NVME, EDU, NIC])
def test_there_and_back(one: Stage, bdf: str) -> None:
    before = one.snapshot()
    [there] = one.bind(bdf)
    assert (there.outcome, there.before, there.after) == ("changed", before[bdf][0], "vfio-pci")
    assert one.host.state(bdf) == ("vfio-pci", "vfio-pci")
    record = json.loads((one.state / "bound" / f"{bdf}.json").read_text())
    assert (record["driver"], record["override"], record["operation"]) == (*before[bdf][:2], "bind")
    assert list((one.state / "journal").iterdir()) == []
    assert one.restore() == []
    [back] = one.unbind(bdf)
    assert (back.outcome, back.before, back.after) == ("changed", "vfio-pci", before[bdf][0])
    assert one.snapshot() == before


def test_the_order_of_the_writes_and_that_a_dry_run_tells_it(one: Stage) -> None:
    def told(results: list[Handover]) -> list[str]:
        return [step for result in results for step in result.steps]

    def written() -> list[str]:
        words = [f"echo {text.strip()} > /{path}".replace("echo  >", "echo >") for path, text in one.host.writes]
        one.host.writes.clear()
        return words

    plan = told(one.bind(NVME, dry_run=True))
    assert written() == []
    assert not one.state.exists()
    device = f"/sys/bus/pci/devices/{NVME}"
    assert plan == [
        f"echo vfio-pci > {device}/driver_override",
        f"echo {NVME} > /sys/bus/pci/drivers/nvme/unbind",
        f"echo {NVME} > /sys/bus/pci/drivers_probe",
    ]
    assert told(one.bind(NVME)) == plan == written()
    before = one.snapshot()
    plan = told(one.unbind(NVME, dry_run=True))
    assert one.snapshot() == before
    assert plan == [
        f"echo nvme > {device}/driver_override",
        f"echo {NVME} > /sys/bus/pci/drivers/vfio-pci/unbind",
        f"echo {NVME} > /sys/bus/pci/drivers_probe",
        f"echo > {device}/driver_override",
        f"echo auto > {device}/power/control",
    ]
    assert told(one.unbind(NVME)) == plan == written()


def test_the_module_is_loaded_when_it_is_missing(one: Stage) -> None:
    driver = one.host.path("sys/bus/pci/drivers/vfio-pci")
    for file in driver.iterdir():
        file.unlink()
    driver.rmdir()
    assert one.bind(NVME, dry_run=True)[0].steps[0] == "modprobe vfio-pci"
    assert not driver.exists()
    assert one.bind(NVME)[0].after == "vfio-pci"


def test_already_done(one: Stage) -> None:
    [there] = one.unbind(NVME)
    assert (there.outcome, there.before, there.after, there.steps) == ("already", "nvme", "nvme", ())
    one.bind(NVME)
    before = one.snapshot()
    one.host.writes.clear()
    [again] = one.bind(NVME)
    assert (again.outcome, again.after) == ("already", "vfio-pci")
    assert one.snapshot() == before
    assert one.host.writes == []


def test_bound_by_somebody_else(one: Stage) -> None:
    """Without a record the kernel finds the driver, or none; an override that is not ours is kept."""
    for bdf, driver in ((NVME, "nvme"), (EDU, None)):
        one.host.write(one.host.path("sys/bus/pci/devices", bdf, "driver_override"), "vfio-pci\n")
        if driver:
            one.host.write(one.host.path("sys/bus/pci/drivers", driver, "unbind"), bdf)
        one.host.write(one.host.path("sys/bus/pci/drivers_probe"), bdf)
        [plan] = one.unbind(bdf, dry_run=True)
        assert (plan.outcome, plan.after) == ("planned", "*")
        [result] = one.unbind(bdf)
        assert (result.outcome, result.after) == ("changed", driver)
        assert one.host.state(bdf) == (driver, None)
    one.host.write(one.host.path("sys/bus/pci/drivers/e1000e/unbind"), NIC)
    one.host._bind(NIC, "vfio-pci")
    one.unbind(NIC)
    assert one.host.state(NIC) == ("e1000e", "e1000e")


def test_vfio_pci_takes_it_again(one: Stage) -> None:
    """Told by vfio-pci.ids, or by new_id, to take all devices of that kind."""
    one.host.natural[EDU] = "vfio-pci"
    one.host._bind(EDU, "vfio-pci")
    before = one.snapshot()
    with pytest.raises(RestoreFailed, match=f"has bound {EDU} again") as caught:
        one.unbind(EDU)
    assert "remove_id" in caught.value.__notes__[0]
    assert one.snapshot() == before


def test_a_group(one: Stage) -> None:
    before = one.snapshot()
    [alone] = one.bind(FIRST)
    assert f"shares IOMMU group 11 with {SECOND} (driver nvme)" in alone.warnings[0]
    assert one.host.state(SECOND) == ("nvme", None)
    results = one.bind(FIRST, group=True)
    assert [(str(r.bdf), r.outcome, r.after) for r in results] == [
        (FIRST, "already", "vfio-pci"),
        (SECOND, "changed", "vfio-pci"),
        (BRIDGE, "excluded", "pcieport"),
    ]
    assert results[1].warnings == ()
    one.unbind(SECOND, group=True)
    assert one.snapshot() == before


def test_a_borrower_leaves_it_bound(one: Stage) -> None:
    one.bind(NVME)
    before = one.snapshot()
    with borrow(NVME, sysfs=one.host, state_dir=one.state):
        for operation in (one.bind, one.unbind):
            with pytest.raises(DeviceInUse, match=rf"assigned by process {os.getpid()} \("):
                operation(NVME, force=True)
            with pytest.raises(DeviceInUse, match="assigned by"):
                operation(NVME, dry_run=True)
        assert one.restore() == [(NVME, "owner-alive")]
    assert one.snapshot() == before


# --- refusals


def test_refused(one: Stage) -> None:
    one.refused(BadAddress, "named twice", NVME, "01:00.0")
    one.refused(BadAddress, "is not a PCI address", "nonsense")
    one.refused(NoSuchDevice, "there is no PCI device", NVME, "0000:7f:00.0")
    one.refused(NotAssignable, "is a bridge", BRIDGE, force=True)
    one.host.add("0000:05:00.0", "nvme")
    one.refused(NotAssignable, "has no IOMMU group", NVME, "0000:05:00.0", force=True)


def test_in_use(one: Stage) -> None:
    one.host.put("proc/net/route", "Iface D G F R U Metric Mask\neth0 00000000 0 0 0 0 0 00000000")
    one.host.add_below(NIC, "sys/class/net", "eth0")
    hints = one.refused(DeviceInUse, "default route goes through eth0", NVME, NIC)
    assert any("--force" in hint for hint in hints)
    [result] = one.bind(NIC, force=True)
    assert (result.outcome, result.after) == ("changed", "vfio-pci")
    assert "default route" in result.warnings[0]


def test_an_open_vfio_node_is_never_forced(made: Callable[[str], Stage]) -> None:
    one = made("unbind")
    one.host.process(4711, "qemu", nodes=("/dev/vfio/7",))
    for force in (False, True):
        match = rf"{NVME} is assigned by process 4711 \(qemu\)"
        one.refused(DeviceInUse, match, NVME, of="unbind", force=force)


def test_a_virtual_function_in_a_guest_is_never_forced(one: Stage) -> None:
    function = "0000:01:00.1"
    one.host.add(function, "vfio-pci", 8)
    one.host.put(f"sys/bus/pci/devices/{NVME}/sriov_numvfs", "1")
    one.host._symlink(f"sys/devices/pci0000:00/{NVME}/virtfn0", f"sys/devices/pci0000:00/{function}")
    one.refused(DeviceInUse, "1 virtual functions are enabled", NVME)
    one.host.process(4711, "qemu", nodes=("/dev/vfio/8",))
    match = rf"the virtual function {function}, assigned by process 4711 \(qemu\)"
    one.refused(DeviceInUse, match, NVME, force=True)


@pytest.mark.parametrize("name", [NVME, f"pci-{NVME}"])
def test_driverctl(one: Stage, name: str) -> None:
    before = one.snapshot()
    one.host.put(f"etc/driverctl.d/{name}", "nvme")
    hints = one.refused(DriverPinned, f"driverctl sets {NVME} to nvme", NVME)
    assert hints == [f"driverctl unset-override {NVME}", "use --force to bind it until then"]
    [result] = one.bind(NVME, force=True)
    assert "driverctl" in result.warnings[0]
    one.host.put(f"etc/driverctl.d/{name}", "vfio-pci")
    hints = one.refused(DriverPinned, f"driverctl sets {NVME} to vfio-pci", NVME, of="unbind")
    assert hints[1] == "use --force to unbind it until then"
    one.unbind(NVME, force=True)
    assert one.snapshot() == before
    assert one.bind(NVME)[0].warnings == ()


def test_without_privilege(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    before = one.snapshot()
    with pytest.raises(PermissionError, match="driver_override") as caught:
        one.bind(NVME)
    assert caught.value.__notes__ == ["run as root: this changes the device's driver"]
    assert one.snapshot() == before
    assert not one.state.exists()


def test_no_environment_variable_stands_for_force(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmpass.cli.main import kvmpass as command

    for name in ("bind", "unbind"):
        context = command.make_context("kvmpass", [name, "--help"], resilient_parsing=True)
        subcommand = command.get_command(context, name)
        assert subcommand is not None
        assert context.auto_envvar_prefix is None
        assert all(parameter.envvar is None for parameter in subcommand.params)


# --- the commands


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    from kvmpass.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def cli(one: Stage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(one.state))
    monkeypatch.setattr("kvmpass.host.drivers.bind.Sysfs", lambda: one.host)
    return lambda *words: command(monkeypatch, *words)


def test_commands(cli: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli("bind", NVME, EDU) == 0
    assert capfd.readouterr() == (f"{NVME}  nvme -> vfio-pci\n{EDU}  no driver -> vfio-pci\n", "")
    assert cli("bind", NVME) == 0
    assert capfd.readouterr() == (f"{NVME}  already on vfio-pci\n", "")
    assert cli("bind", "--group", FIRST) == 0
    assert capfd.readouterr().out == (
        f"{FIRST}  nvme -> vfio-pci\n{SECOND}  nvme -> vfio-pci\n{BRIDGE}  a bridge, not changed (pcieport)\n"
    )
    assert cli("unbind", NVME, EDU) == 0
    assert capfd.readouterr() == (f"{NVME}  vfio-pci -> nvme\n{EDU}  vfio-pci -> no driver\n", "")
    assert cli("unbind", NVME) == 0
    assert capfd.readouterr() == (f"{NVME}  already on nvme\n", "")
    assert cli("unbind", "--dry-run", SECOND) == 0
    out, err = capfd.readouterr()
    assert out.startswith(
        f"{SECOND}  vfio-pci -> nvme\n  echo nvme > /sys/bus/pci/devices/{SECOND}/driver_override\n"
    )
    assert err == "kvmpass: dry run: nothing was changed\n"
    assert max(map(len, out.splitlines())) <= 80
    assert cli("unbind", FIRST) == 0
    assert capfd.readouterr().err == ""


def test_documents(
    cli: Callable[..., int], capfd: pytest.CaptureFixture[str], valid: Callable[[str, str | bytes], Any]
) -> None:
    assert cli("bind", "--json", "--dry-run", "--group", FIRST) == 0
    document = valid("bind", capfd.readouterr().out)
    assert document["dry_run"] is True
    assert [device["outcome"] for device in document["devices"]] == ["planned", "planned", "excluded"]
    assert cli("bind", "--json", FIRST, EDU) == 0
    first, edu = valid("bind", capfd.readouterr().out)["devices"]
    assert (first["driver_before"], first["driver_after"], len(first["warnings"])) == ("nvme", "vfio-pci", 1)
    assert (edu["driver_before"], edu["driver_after"]) == (None, "vfio-pci")
    assert cli("unbind", "--json", FIRST, NVME) == 0
    assert [d["outcome"] for d in valid("unbind", capfd.readouterr().out)["devices"]] == ["changed", "already"]
    assert cli("bind", "--json", BRIDGE) == 1
    assert valid("error", capfd.readouterr().out)["error"]["type"] == "NotAssignable"
    assert cli("bind", "--json") == 2
    assert valid("error", capfd.readouterr().out)["error"]["type"] == "MissingParameter"
