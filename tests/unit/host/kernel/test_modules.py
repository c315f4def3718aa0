"""Where modules are, what modprobe says of them, and what driverctl has saved: one reader for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import DriverPinned
from kvmpass.host import Bdf, Look, Sysfs, bind, describe, diagnose
from kvmpass.host.blockers.use import borrowers
from kvmpass.host.drivers.driverctl import SavedOverride, saved_override
from kvmpass.host.kernel.modules import Module, ModuleStatus, modprobe_lines, module

RELEASE = "6.12.1-1-amd64"
NVME = Bdf(0, 1, 0, 0)
LINE = "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/vfio.ko.zst"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.put("proc/sys/kernel/osrelease", RELEASE)
    host.add(str(NVME), "nvme", 7)
    return host


# --- a recorded tree


@pytest.mark.parametrize("place", ["lib", "usr/lib", "run/booted-system/kernel-modules/lib"])
def test_wherever_the_modules_are(host: Host, place: str) -> None:
    host.put(f"{place}/modules/{RELEASE}/modules.dep", LINE)
    found = module(host, "vfio-pci")
    assert (found.status, found.seen) == (ModuleStatus.LOADABLE, f"/{place}/modules/{RELEASE}/modules.dep")
    assert found.value == "kernel/drivers/vfio/pci/vfio-pci.ko.zst"
    assert module(host, "vfio").status is ModuleStatus.MISSING, "what is needed has a line of its own"


def test_only_the_list_that_modprobe_reads(host: Host) -> None:
    text = b"\xb0\x07\xf4\x57\0\x02\0\x01\0H" + LINE.encode() + b"\0\0\x01Hkernel/drivers/vfio/vfio.ko.zst:\0"
    host.put(f"usr/lib/modules/{RELEASE}/modules.dep.bin", text)
    assert module(host, "vfio-pci").status is ModuleStatus.LOADABLE
    assert module(host, "vfio").status is ModuleStatus.LOADABLE
    assert module(host, "pci").status is ModuleStatus.MISSING


def test_a_release_that_is_not_the_running_one(host: Host) -> None:
    host.put("lib/modules/6.1.0/modules.dep", LINE)
    assert module(host, "vfio-pci").status is ModuleStatus.MISSING


def test_the_first_file_of_a_name_counts(host: Host) -> None:
    host.put(f"lib/modules/{RELEASE}/modules.dep", LINE)
    host.put("usr/lib/modprobe.d/50-vfio.conf", "install vfio-pci /bin/false")
    assert module(host, "vfio-pci").status is ModuleStatus.BLOCKED
    host.put("etc/modprobe.d/50-vfio.conf", "# emptied by the administrator")
    assert module(host, "vfio-pci").status is ModuleStatus.LOADABLE


def test_lines_of_modprobes_configuration(host: Host) -> None:
    host.put("etc/modprobe.d/b.conf", "options vfio-pci \\\n ids=1022:1234\n\n  # no\n")
    host.put("lib/modprobe.d/a.conf", "alias x y")
    host.put("etc/modprobe.d/readme", "install vfio-pci /bin/false")
    assert modprobe_lines(host) == [
        ("/lib/modprobe.d/a.conf", ["alias", "x", "y"]),
        ("/etc/modprobe.d/b.conf", ["options", "vfio-pci", "ids=1022:1234"]),
    ]


# --- this machine


def asked(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Module:
    tool = directory / "modprobe"
    tool.write_text(f'#!/bin/sh\n[ "$*" = "--show-depends no_such_module" ] || exit 9\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return module(Sysfs(), "no-such-module")


@pytest.mark.parametrize(
    ("script", "status", "value"),
    [
        ("echo insmod /odd/a.ko; echo 'insmod /odd/b.ko.xz x=1 '", ModuleStatus.LOADABLE, "/odd/b.ko.xz"),
        ("echo builtin no_such_module", ModuleStatus.BUILT_IN, "builtin no_such_module"),
        ("echo insmod /odd/a.ko; echo 'install /bin/false '", ModuleStatus.BLOCKED, "install /bin/false"),
        ("echo 'install /sbin/modprobe -i x'", ModuleStatus.LOADABLE, "install /sbin/modprobe -i x"),
        ("echo 'modprobe: FATAL: Module x not found in directory /y' >&2; exit 1", ModuleStatus.MISSING, "Module x"),
        ("exit 0", ModuleStatus.MISSING, "exit status 0"),
    ],
)
def test_modprobe_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: ModuleStatus, value: str
) -> None:
    found = asked(tmp_path, monkeypatch, script)
    assert (found.status, found.seen) == (status, "modprobe --show-depends no_such_module")
    assert found.value.startswith(value)


def test_without_modprobe_the_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpass.host.kernel.modules.modprobe_tool", lambda: None)
    found = module(Sysfs(), "no-such-module")
    assert (found.status, found.value) == (ModuleStatus.MISSING, "no_such_module not found")


@pytest.mark.parametrize("answer", [None, 5, [], ["x"], {"a": 1}, [0, 5, None], [None, None, None]])
def test_an_answer_that_was_recorded_may_be_anything(
    host: Host, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(host, "ask", lambda question, find: answer)
    assert borrowers(Look(host)) == {}


# --- driverctl


@pytest.mark.parametrize("name", [str(NVME), f"pci-{NVME}"])
@pytest.mark.parametrize(
    ("text", "driver", "words"), [("vfio-pci\n", "vfio-pci", "vfio-pci"), ("none", "none", "no driver")]
)
def test_both_names_of_its_files(host: Host, tmp_path: Path, name: str, text: str, driver: str, words: str) -> None:
    host.put(f"etc/driverctl.d/{name}", text + "\n# more")
    saved = saved_override(host, NVME)
    assert saved == SavedOverride(f"/etc/driverctl.d/{name}", driver)
    assert saved.words == words
    assert describe(host, NVME).driverctl == driver
    [finding] = [finding for finding in diagnose(host, NVME) if finding.check == "device-driver"]
    assert f"/etc/driverctl.d/{name}: {driver}" in [str(reading) for reading in finding.read]
    if driver == "none":
        with pytest.raises(DriverPinned, match=r"sets 0000:01:00\.0 to no driver"):
            bind([NVME], dry_run=True, sysfs=host, state_dir=tmp_path / "state")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_of_driverctl(host: Host, text: str) -> None:
    host.put(f"etc/driverctl.d/{NVME}", text)
    assert saved_override(host, NVME) is None
    assert describe(host, NVME).driverctl is None
