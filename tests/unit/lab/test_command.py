"""QEMU's command line for an emulated host, and which QEMU may be used."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import qemu
from kvmpass.lab.command import CONTROL, TERMINAL, command_line
from kvmpass.lab.config import LabConfig
from kvmpass.lab.devices import QemuDevices
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.qemu import Emulator, judge

KERNEL = Kernel("stock", Path("/k"), "6.12")

OLD = "amd-iommu options:\n  intremap=<OnOffAuto>\n"
NEW = OLD + "  dma-remap=<bool>\n  xtsup=<bool>\n"


def emulator(monkeypatch: pytest.MonkeyPatch, properties: str | None = OLD) -> Emulator:
    monkeypatch.setattr(Emulator, "help", lambda self, device: properties)
    return Emulator("system", Path("/q"), (7, 2, 22), ("/q",))


def words(found: Emulator, config: LabConfig, devices: QemuDevices | None = None) -> list[str]:
    channels = {"kvmpass.out": 7, CONTROL: 8, TERMINAL: 9}
    return command_line(
        config, found, KERNEL, Path("/i"), devices or QemuDevices(), channels, Path("/c,d"), Path("/t")
    )


def after(arguments: list[str], key: str) -> list[str]:
    return [value for word, value in pairwise(arguments) if word == key]


def test_a_plain_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = words(emulator(monkeypatch), LabConfig(accel="tcg", append="quiet"))
    assert after(found, "-cpu") == ["EPYC-Milan,+svm"]
    assert after(found, "-append")[0].endswith("kvm.tsc_tolerance_ppm=100000 quiet")
    assert after(found, "-trace") == ["amdvi_translation_result"]
    assert "file,id=console,path=/c,,d" in found


def test_the_iommu_comes_before_the_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = words(emulator(monkeypatch), LabConfig(accel="tcg"), devices=QemuDevices(["-device", "edu"]))
    assert after(found, "-device")[0] == "amd-iommu,intremap=on"
    assert after(found, "-device")[-1] == "edu"


@pytest.mark.parametrize(
    ("without", "cpu", "iommu"),
    [
        ("svm", "EPYC-Milan,-svm", "amd-iommu,intremap=on,dma-remap=on,xtsup=on"),
        ("intremap", "EPYC-Milan,+svm", "amd-iommu,intremap=off,dma-remap=on"),
        ("iommu", "EPYC-Milan,+svm", None),
    ],
)
def test_a_host_without_a_feature(monkeypatch: pytest.MonkeyPatch, without: str, cpu: str, iommu: str | None) -> None:
    config = LabConfig(accel="tcg", without=frozenset({without}))
    found = words(emulator(monkeypatch, NEW), config)
    assert after(found, "-cpu") == [cpu]
    assert [word for word in after(found, "-device") if word.startswith("amd-iommu")] == ([iommu] if iommu else [])


def test_ports_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = words(emulator(monkeypatch), LabConfig(accel="tcg"))
    assert f"chardev:{CONTROL}" in found
    assert f"virtconsole,bus=lab-serial.0,chardev={TERMINAL},name={TERMINAL}" in found
    assert "virtserialport,bus=lab-serial.0,chardev=kvmpass.out,name=kvmpass.out" in found
    assert "socket,id=kvmpass.out,fd=7" in found


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    found = words(emulator(monkeypatch), LabConfig(accel="tcg", writable=(Path("/a"), Path("/b"))))
    shares = after(found, "-fsdev")
    assert "path=/," in shares[0] and shares[0].endswith("readonly=on")
    assert [("readonly" in share) for share in shares] == [True, False, False]
    assert "virtio-9p-pci,fsdev=lab-writable1,mount_tag=writable1,bus=pcie.0,addr=03.1,multifunction=on" in found


def test_an_emulator_without_the_iommu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match="no AMD IOMMU"):
        words(emulator(monkeypatch, None), LabConfig(accel="tcg"))


@pytest.mark.parametrize(
    ("version", "usable", "says"),
    [
        ((7, 2, 22), True, "tested"),
        ((11, 1, 3), True, "tested"),
        ((10, 0, 2), False, "IOAPIC"),
        ((10, 0, 8), False, "IOAPIC"),
        ((6, 2, 0), False, "too old"),
        ((8, 2, 2), True, "untested"),
        ((12, 0, 0), True, "untested"),
    ],
)
def test_versions(version: tuple[int, int, int], usable: bool, says: str) -> None:
    assert judge(version)[0] is usable
    assert says in judge(version)[1]


def test_a_broken_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_output", lambda *_: "QEMU emulator version 10.0.2\n")
    with pytest.raises(LabError, match=r"QEMU 10\.0\.2 .*/usr/bin/own.* broken"):
        qemu.find("/usr/bin/own")


def test_a_program_that_is_no_qemu() -> None:
    with pytest.raises(LabError, match="/bin/true is no QEMU system emulator"):
        qemu.find("/bin/true")
    with pytest.raises(LabError, match="/no/such/qemu cannot be run"):
        qemu.find("/no/such/qemu")


def test_root_ports_by_version() -> None:
    assert not Emulator("system", Path("/q"), (7, 2, 0), ("/q",)).root_ports
    assert Emulator("modern", Path("/q"), (11, 1, 3), ("/q",)).root_ports


def test_an_explicit_accelerator() -> None:
    assert qemu.accelerator("kvm") == "kvm"
    assert qemu.accelerator("tcg") == "tcg"
