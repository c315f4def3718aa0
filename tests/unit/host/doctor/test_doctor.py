"""One thing is broken: exactly one check fails, and names it. Against a made-up host, what cannot be provoked."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.host_tree import Host, ivhd, ivmd, ivrs

from kvmpass import host as library
from kvmpass.errors import HostNotReady
from kvmpass.host import Bdf, diagnose
from kvmpass.host.doctor import Finding, Outcome
from kvmpass.host.doctor.ivrs import BadTable, parse_ivrs
from kvmpass.host.doctor.vital import VITAL
from kvmpass.layout import GIB, MIB, Range

NVME = Bdf(0, 1, 0, 0)
DEVICE = f"sys/bus/pci/devices/{NVME}"
IVRS = "sys/firmware/acpi/tables/IVRS"
CPU = "vendor_id : {}\nflags : fpu {}"
RELEASE = "proc/sys/kernel/osrelease"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(str(NVME), "nvme", 7)
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.put("proc/cmdline", "quiet")
    host.put("sys/bus/pci/devices/0000:01:00.0/config", b"\x22\x10\x34\x12" + bytes(60))
    return host


def change(host: Host, changes: dict[str, str | bytes | None]) -> None:
    for path, content in changes.items():
        if content is None:
            host.path(path).rename(host.root / f"away-{Path(path).name}")
        else:
            host.put(path, content)


def kinds(findings: list[Finding], outcome: Outcome) -> list[str]:
    return [finding.blocker.kind for finding in findings if finding.outcome is outcome and finding.blocker]


def found(host: Host, kind: str, bdf: Bdf | None = NVME, **options: Any) -> Finding:
    """The finding of that kind; nothing else is wrong."""
    findings = diagnose(host, bdf, **options)
    wrong = [finding for finding in findings if finding.blocker]
    assert [finding.blocker.kind for finding in wrong if finding.blocker] == [kind]
    assert host.writes == []
    return wrong[0]


def test_a_host_that_is_ready(host: Host) -> None:
    findings = diagnose(host, NVME)
    assert {finding.outcome for finding in findings} == {Outcome.PASS}
    assert {finding.check for finding in findings} == {check.id for check in library.doctor.CATALOGUE}
    assert all(finding.read or finding.check == "huge-pages" for finding in findings), "each says what it looked at"
    assert [finding for finding in diagnose(host) if finding.bdf] == []
    assert host.writes == []


NO_IOMMU: dict[str, str | bytes | None] = {"sys/class/iommu/ivhd0": None}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("not-amd", {"proc/cpuinfo": CPU.format("GenuineIntel", "vmx")}),
        ("svm-off", {"proc/cpuinfo": CPU.format("AuthenticAMD", ""), "dev/kvm": None}),
        ("other-kvm", {"proc/cpuinfo": CPU.format("AuthenticAMD", "")}),
        (
            "svm-locked",
            {
                "proc/cpuinfo": CPU.format("AuthenticAMD", ""),
                "dev/kvm": None,
                "dev/kmsg": "5,1,2,-;SVM disabled (by BIOS) in MSR_VM_CR",
            },
        ),
        ("svm-locked", {"dev/kvm": None, "dev/kmsg": "3,9,9,-;kvm: disabled by bios"}),
        ("kvm-amd-missing", {"dev/kvm": None, "sys/module/kvm_amd": None}),
        ("no-kvm", {"dev/kvm": None}),
        ("no-kvm-amd", {"sys/module/kvm_amd": None}),
        ("no-ivrs", NO_IOMMU),
        ("acpi-off", {**NO_IOMMU, "proc/cmdline": "acpi=off"}),
        ("empty-ivrs", {**NO_IOMMU, IVRS: ivrs()}),
        ("empty-ivrs", {**NO_IOMMU, IVRS: b"IVRS"}),
        ("iommu-off", {**NO_IOMMU, IVRS: ivrs(ivhd()), "proc/cmdline": "quiet amd_iommu=off"}),
        ("iommu-off", {**NO_IOMMU, IVRS: ivrs(ivhd()), "proc/cmdline": "iommu=pt,off"}),
        ("iommu-off", {**NO_IOMMU, IVRS: ivrs(ivhd()), "proc/cmdline": "amd-iommu=fullflush,off"}),
        ("iommu-unused", {**NO_IOMMU, IVRS: ivrs(ivhd()), "proc/cmdline": "quiet -- iommu=off"}),
        ("iommu-unused", {**NO_IOMMU, IVRS: ivrs(ivhd())}),
        ("no-groups", {IVRS: ivrs(ivhd()), "sys/kernel/iommu_groups": None}),
        ("no-intremap", {"sys/kernel/irq/9/chip_name": "IO-APIC"}),
        ("no-vfio-pci", {"sys/bus/pci/drivers/vfio-pci": None}),
        ("no-type1", {"sys/module/vfio_iommu_type1": None}),
        ("no-vfio-node", {"sys/module/vfio/parameters/x": "", "dev/vfio/vfio": None}),
        ("memory-short", {"proc/meminfo": "MemAvailable: 1000000 kB"}),
        ("memlock-low", {"proc/self/limits": "Max locked memory  8388608  8388608  bytes"}),
    ],
)
def test_one_failure(host: Host, kind: str, changes: dict[str, str | bytes | None]) -> None:
    change(host, changes)
    finding = found(host, kind)
    assert finding.outcome is Outcome.FAIL
    assert finding.blocker is not None
    assert finding.blocker.remedy
    assert finding.read


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("no-npt", {"proc/cpuinfo": CPU.format("AuthenticAMD", "svm")}),
        ("no-npt", {"sys/module/kvm_amd/parameters/npt": "N"}),
        ("idle-option", {"proc/cmdline": "amd_iommu=on iommu=pt"}),
        ("idle-option", {"proc/cmdline": "amd_iommu=pt,fullflush"}),
        ("idle-option", {"proc/cmdline": "iommu=pt,on"}),
        (
            "idle-option",
            {
                "dev/kmsg": '5,1,2,-;Unknown kernel command line parameters "BOOT_IMAGE=/vmlinuz ivrs_iopaic=7@0:1 '
                'vfio-pci.ids=1022:1", will be passed to user space.'
            },
        ),
        ("acs-override", {"proc/cmdline": "pcie_acs_override=downstream,multifunction"}),
        ("intremap-unknown", {"sys/kernel/irq/9/chip_name": ""}),
        ("unsafe-interrupts", {"sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "Y"}),
        ("unsafe-interrupts", {"sys/module/iommufd/parameters/allow_unsafe_interrupts": "Y"}),
        ("noiommu-mode", {"sys/module/vfio/parameters/enable_unsafe_noiommu_mode": "Y"}),
    ],
)
def test_one_warning(host: Host, kind: str, changes: dict[str, str | bytes | None]) -> None:
    change(host, changes)
    assert found(host, kind).outcome is Outcome.WARN
    library.doctor.check_host(host)


def test_iommu_pt_is_fine(host: Host) -> None:
    host.put("proc/cmdline", "iommu=pt amd_iommu=force_isolation")
    [finding] = [finding for finding in diagnose(host) if finding.check == "iommu-off"]
    assert (finding.outcome, finding.summary) == (Outcome.PASS, "iommu=pt amd_iommu=force_isolation")


def test_what_depends_is_skipped_and_says_on_what(host: Host) -> None:
    change(host, {"sys/class/iommu/ivhd0": None})
    needs = {finding.check: finding.needs for finding in diagnose(host, NVME) if finding.outcome is Outcome.SKIPPED}
    assert set(needs.values()) == {"firmware-iommu"}
    assert {"iommu-off", "iommu", "groups", "interrupt-remapping", "device-kind", "device-free"} <= set(needs)


def test_what_is_needed_comes_first() -> None:
    seen: set[str] = set()
    for check in library.doctor.CATALOGUE:
        assert set(check.needs) <= seen, check.id
        assert check.id not in seen
        seen.add(check.id)
        assert not (check.vital and check.device), f"{check.id}: refused by check_assignable, not by check_host"


def test_an_assignment_checks_all_that_is_vital() -> None:
    assert tuple(check for check in library.doctor.CATALOGUE if check.vital) == VITAL


def test_templates_can_be_filled() -> None:
    for check in library.doctor.CATALOGUE:
        for template in check.templates:
            texts = [template.brief, template.cause, template.remedy, *template.commands]
            names = {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}
            blocker = template.fill(**dict.fromkeys(names, "x"))
            assert "{" not in blocker.cause + blocker.remedy + "".join(blocker.commands)
            assert len(template.brief) <= 48, f"{template.kind}: too long for a line"


# --- modules


@pytest.mark.parametrize(
    ("files", "kind", "word"),
    [
        ({"lib/modules/6.1.0-9/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko.xz: a.ko\n"}, None, "loadable"),
        ({"lib/modules/6.1.0-9/modules.builtin": "kernel/drivers/vfio/pci/vfio-pci.ko"}, None, "built in"),
        ({"lib/modules/6.1.0-9/modules.dep": "kernel/vfio-pci-core.ko:"}, "no-vfio-pci", "missing"),
        (
            {
                "lib/modules/6.1.0-9/modules.dep": "kernel/vfio-pci.ko:",
                "etc/modprobe.d/x.conf": "# no\ninstall vfio_pci /bin/false",
            },
            "no-vfio-pci",
            "/etc/modprobe.d/x.conf: install vfio_pci /bin/false",
        ),
        (
            {"lib/modules/6.1.0-9/modules.dep": "kernel/vfio-pci.ko:", "proc/cmdline": "module_blacklist=a,vfio-pci"},
            "no-vfio-pci",
            "module_blacklist=a,vfio-pci",
        ),
        (
            {"lib/modules/6.1.0-9/modules.dep": "kernel/vfio-pci.ko:", "etc/modprobe.d/x.conf": "blacklist vfio-pci"},
            None,
            "loadable",
        ),
        (
            {"lib/modules/6.1.0-9/modules.dep": "kernel/vfio-pci.ko:", "proc/sys/kernel/modules_disabled": "1"},
            "no-vfio-pci",
            "modules_disabled",
        ),
    ],
)
def test_a_module(host: Host, files: dict[str, str | bytes | None], kind: str | None, word: str) -> None:
    host.put(RELEASE, "6.1.0-9")
    change(host, {"sys/bus/pci/drivers/vfio-pci": None, **files})
    findings = diagnose(host)
    assert kinds(findings, Outcome.FAIL) == ([kind] if kind else [])
    [finding] = [finding for finding in findings if finding.check == "vfio-pci"]
    assert word in (finding.blocker.cause + finding.summary if finding.blocker else finding.summary)
    if kind is None:
        library.doctor.check_host(host)
    else:
        with pytest.raises(HostNotReady, match="vfio-pci is missing"):
            library.doctor.check_host(host)


# --- the table IVRS


def test_the_table() -> None:
    table = parse_ivrs(
        ivrs(
            ivhd(),
            ivhd(0x11),
            ivhd(0x40, base=0xFD20_0000),
            ivmd(0x20, 0, 0, 0x8000_0000, 0x1000),
            ivmd(0x21, 0x0100, 0, 0x9000_0000, 0x2000, flags=0b0011),
            ivmd(0x22, 0x0100, 0x01FF, 0xA000_0000, 0x1000, flags=0b1001),
            ivmd(0x22, 0x0108, 0x01FF, 0xB000_0000, 0x1000, flags=0b1000),
            ivmd(0x21, 0x0100, 0, 0xC000_0000, 0, flags=0b0111),
            ivmd(0x21, 0x0100, 0, 0xC000_0001, 1, flags=0b0101),
            ivmd(0x21, 0x0100, 0, 0, 0, flags=0b0110),
        )
    )
    assert [(iommu.type, iommu.base) for iommu in table.iommus] == [
        (0x10, 0xFD00_0000),
        (0x11, 0xFD00_0000),
        (0x40, 0xFD20_0000),
    ]
    assert str(table) == "3 IVHD (types 10h, 11h, 40h; 40h is used), 7 IVMD"
    assert table.memory[0].range == Range(0x8000_0000, 0x1000)
    assert table.memory[5].range == Range(0xC000_1000, 0x1000), "whole pages, as the kernel makes them"
    assert table.direct == table.memory[:6]
    assert [str(block) for block in table.memory] == [
        "0x80000000-0x80000fff for all devices",
        "0x90000000-0x90001fff for 01:00.0, read-only",
        "0xa0000000-0xa0000fff for 01:00.0 to 01:1f.7, exclusion range: read-write since Linux 5.5",
        "0xb0000000-0xb0000fff for 01:01.0 to 01:1f.7, exclusion range: read-write since Linux 5.5",
        "0xc0000000 (0 bytes) for 01:00.0",
        "0xc0000001-0xc0000001 for 01:00.0, write-only",
        "0x0 (0 bytes) for 01:00.0, ignored by Linux",
    ]


def test_a_table_that_ends_badly(host: Host) -> None:
    """What can be read is shown, and where it ends; the kernel's own verdict decides."""
    data = ivrs(ivhd(), ivmd(0x20, 0, 0, 0x8000_0000, 0x1000), b"\x40\0\0\0")
    table = parse_ivrs(data)
    assert (len(table.iommus), len(table.memory)) == (1, 1)
    assert "the block at 0x68 (type 0x40) has an impossible size, 0" in str(table)
    host.put(IVRS, data)
    [finding] = [finding for finding in diagnose(host) if finding.check == "firmware-iommu"]
    assert finding.outcome is Outcome.PASS
    assert "impossible size" in str(finding.read[0])


def test_a_block_that_is_too_short() -> None:
    """The others are read, and it is named."""
    short = ivmd(0x21, 0x0100, 0, 0x9000_0000, 0x2000)[:24].replace(b"\x20\0", b"\x18\0", 1)
    table = parse_ivrs(ivrs(ivhd(), short, ivmd(0x20, 0, 0, 0x8000_0000, 0x1000)))
    assert (len(table.iommus), len(table.memory)) == (1, 1)
    assert table.damage == "the block at 0x48 (type 0x21) is too short, 24 bytes"


def test_a_wrong_checksum(host: Host) -> None:
    host.put(IVRS, ivrs(ivhd(), wrong=0x5C))
    [finding] = [finding for finding in diagnose(host) if finding.check == "firmware-iommu"]
    assert (finding.outcome, "wrong checksum" in str(finding.read[0])) == (Outcome.PASS, True), "it is in use"
    host.path("sys/class/iommu/ivhd0").rmdir()
    assert found(host, "ivrs-checksum").check == "firmware-iommu"


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("29d3:0", ["29d3:0: does not track which pages devices write"]),
        ("1000000000000:ffff", ["1000000000000:ffff: does not track which pages devices write"]),
        ("58f77ef22294a5a:0", ["58f77ef22294a5a:0: does not track which pages devices write"]),
        ("10000000000000:0", ["10000000000000:0: tracks which pages devices write"]),
        ("rubbish", []),
        ("fffffffffffffffff:0", []),
    ],
)
def test_whether_the_iommu_tracks_writes(host: Host, features: str, said: list[str]) -> None:
    host.put("sys/class/iommu/ivhd0/amd-iommu/features", f"{features}\n")
    [finding] = [finding for finding in diagnose(host) if finding.check == "iommu"]
    assert (finding.outcome, finding.summary) == (Outcome.PASS, "ivhd0")
    assert [reading.value for reading in finding.read] == ["ivhd0", *said]


@pytest.mark.parametrize("flags", [0b111, 0b1111, 0b1000])
def test_blocks_and_groups_agree(host: Host, flags: int) -> None:
    """Exclusion ranges are direct, too: never a group with a direct range beside a table that has none."""
    host.add("0000:02:00.0", "xhci_hcd", 9)
    host.put("sys/kernel/iommu_groups/9/reserved_regions", "0x000000009f000000 0x000000009fffffff direct")
    host.put(IVRS, ivrs(ivhd(), ivmd(0x21, 0x0200, 0, 0x9F00_0000, 0x100_0000, flags)))
    finding = found(host, "direct-mapped")
    assert any("IVMD 0x9f000000-0x9fffffff for 02:00.0" in str(reading) for reading in finding.read)
    assert "1 IVMD" in str(next(finding for finding in diagnose(host) if finding.check == "firmware-iommu").read[0])


@pytest.mark.parametrize(
    "line", ["0x9f000000 0x9effffff direct", "0x0 0xffffffffffffffff direct", "nonsense", "1 x y"]
)
def test_regions_of_no_bytes(host: Host, line: str) -> None:
    """The kernel makes them of a block of length 0, and refuses the device."""
    host.put("sys/kernel/iommu_groups/7/reserved_regions", f"{line}\n0xfee00000 0xfeefffff msi")
    host.put(RELEASE, "6.12.0")
    wanted = ["device-direct-mapped"] if "direct" in line else []
    findings = diagnose(host, NVME)
    assert kinds(findings, Outcome.FAIL) == wanted
    assert not wanted or "(0 bytes)" in "".join(str(reading) for find in findings for reading in find.read)


@pytest.mark.parametrize(
    "data", [b"", b"IVRS", bytes(64), ivrs(ivhd())[:-1], ivrs(b"\x10\0\2\0"), ivrs(b"\x10\0\x40\0")]
)
def test_a_broken_table(data: bytes) -> None:
    with pytest.raises(BadTable):
        parse_ivrs(data)


def test_memory_mapped_one_to_one(host: Host) -> None:
    host.add("0000:02:00.0", "xhci_hcd", 9)
    lines = "0x000000009f000000 0x000000009fffffff direct\n0x00000000fee00000 0x00000000feefffff msi"
    host.put("sys/kernel/iommu_groups/9/reserved_regions", lines)
    host.put(IVRS, ivrs(ivhd(), ivmd(0x21, 0x0200, 0, 0x9F00_0000, 0x100_0000)))
    host.put(RELEASE, "6.12.0-amd64")
    finding = found(host, "direct-mapped")
    assert finding.outcome is Outcome.WARN
    assert "0000:02:00.0" in finding.blocker.cause if finding.blocker else False
    assert "IVMD 0x9f000000-0x9fffffff for 02:00.0" in [reading.value for reading in finding.read]
    findings = diagnose(host, Bdf(0, 2, 0, 0))
    assert kinds(findings, Outcome.FAIL) == ["device-direct-mapped"]
    host.put(RELEASE, "6.1.0-9-amd64")
    findings = diagnose(host, Bdf(0, 2, 0, 0))
    assert kinds(findings, Outcome.FAIL) == []
    assert kinds(findings, Outcome.WARN) == ["direct-mapped", "device-direct-mapped-old"]


# --- the device


@pytest.mark.parametrize(
    ("kind", "outcome", "changes"),
    [
        ("device-no-response", Outcome.FAIL, {f"{DEVICE}/config": b"\xff" * 64, f"{DEVICE}/power_state": "D3cold"}),
        ("device-cold", Outcome.WARN, {f"{DEVICE}/power_state": "D3cold"}),
        ("bridge", Outcome.FAIL, {f"{DEVICE}/class": "0x060400"}),
        ("no-iommu", Outcome.FAIL, {"sys/kernel/iommu_groups/7/name": "vfio-noiommu"}),
        ("in-use", Outcome.FAIL, {f"{DEVICE}/boot_vga": "1"}),
        ("boot-framebuffer", Outcome.FAIL, {"proc/iomem": "fd000000-fe0fffff : PCI\n  fe001000-fe002fff : BOOTFB"}),
        (
            "boot-framebuffer-unknown",
            Outcome.WARN,
            {"proc/iomem": "00000000-00000000 : efifb", f"{DEVICE}/class": "0x030000"},
        ),
        ("no-reset", Outcome.WARN, {f"{DEVICE}/reset_method": None}),
        ("no-reset", Outcome.WARN, {f"{DEVICE}/reset_method": ""}),
        ("weak-reset", Outcome.WARN, {f"{DEVICE}/reset_method": "pm"}),
        ("override-ignored", Outcome.WARN, {f"{DEVICE}/driver_override": "vfio-pci"}),
        ("ids-ignored", Outcome.WARN, {"proc/cmdline": "vfio-pci.ids=10de:1,1022:1234"}),
        ("ids-ignored", Outcome.WARN, {"etc/modprobe.d/v.conf": "options vfio_pci disable_vga=1 ids=1022:1234"}),
        (
            "driver-rule",
            Outcome.WARN,
            {"etc/udev/rules.d/9.rules": f'KERNEL=="{NVME}", ATTR{{driver_override}}="nvme"'},
        ),
    ],
)
def test_a_device(host: Host, kind: str, outcome: Outcome, changes: dict[str, str | bytes | None]) -> None:
    if kind == "no-iommu":
        host.add("0000:02:00.0", None, 8)  # or the host has no group at all
    change(host, changes)
    findings = [finding for finding in diagnose(host, NVME) if finding.bdf and finding.blocker]
    assert [(finding.blocker.kind, finding.outcome) for finding in findings if finding.blocker] == [(kind, outcome)]


def test_no_such_device(host: Host) -> None:
    finding = found(host, "no-device", Bdf(0, 9, 0, 0))
    assert finding.outcome is Outcome.FAIL


def test_no_group(host: Host) -> None:
    host.add("0000:02:00.0", None, None)
    assert found(host, "no-group", Bdf(0, 2, 0, 0)).outcome is Outcome.FAIL


def test_a_sibling(host: Host) -> None:
    host.add("0000:01:00.1", "snd_hda_intel", 7, 0x040300)
    finding = found(host, "group-not-viable")
    assert "0000:01:00.1 1022:1234 (snd_hda_intel)" in finding.read[0].value
    assert diagnose(host, NVME, together=[Bdf(0, 1, 0, 1)])[-1].outcome is Outcome.PASS


def test_an_assigned_device(host: Host) -> None:
    host.process(123, "qemu", nodes=("/dev/vfio/7",))
    assert "process 123 (qemu)" in str(found(host, "assigned").blocker)


def test_a_framebuffer_elsewhere(host: Host) -> None:
    host.put("proc/iomem", "c0000000-c0ffffff : efifb\n00000000-00000000 : simplefb")
    assert kinds(diagnose(host, NVME), Outcome.FAIL) == []


def test_a_reset_of_the_whole_bus(host: Host) -> None:
    host.add("0000:01:00.1", None, 8)
    host.put(f"{DEVICE}/reset_method", "")
    assert "would reset 0000:01:00.1 too" in str(found(host, "no-reset").blocker)


def test_what_others_have_noted_about_the_driver(host: Host) -> None:
    host.path(f"{DEVICE}/driver").unlink()
    host._bind(str(NVME), "vfio-pci")
    host.put(f"etc/driverctl.d/{NVME}", "vfio-pci")
    host.put("etc/modprobe.d/vfio.conf", "options vfio-pci ids=1022:1234")
    host.put("proc/cmdline", "vfio_pci.ids=1022:1234:0:0 vfio-pci.ids=1022:4321")
    [finding] = [finding for finding in diagnose(host, NVME) if finding.check == "device-driver"]
    texts = [str(reading) for reading in finding.read]
    assert f"/etc/driverctl.d/{NVME}: vfio-pci" in texts
    assert "/etc/modprobe.d/vfio.conf: vfio-pci ids 1022:1234" in texts
    assert "/proc/cmdline: vfio-pci ids 1022:1234:0:0" in texts
    assert "1022:4321" not in "".join(texts)


# --- memory, rights


def test_huge_pages(host: Host) -> None:
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    change(host, {f"{pool}/free_hugepages": "512", f"{pool}/nr_hugepages": "600", f"{pool}/resv_hugepages": "12"})
    assert kinds(diagnose(host), Outcome.FAIL) == []
    finding = found(host, "huge-pages-short", None, memory=GIB, huge_page=2 * MIB)
    assert finding.blocker is not None
    assert finding.blocker.commands == (f"echo 612 > /{pool}/nr_hugepages",)
    assert kinds(diagnose(host, memory=1000 * MIB, huge_page=2 * MIB), Outcome.FAIL) == []


def test_memlock_is_moot_with_the_capability(host: Host) -> None:
    host.put("proc/self/limits", "Max locked memory  0  0  bytes")
    host.put("proc/self/status", "CapEff:\t000001ffffffffff")
    assert kinds(diagnose(host), Outcome.FAIL) == []


def closed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr("os.access", lambda path, *_, **__: not str(path).endswith(names))


def test_an_ordinary_user(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cause, though it may not open nodes, lock memory or change drivers."""
    host.put("proc/self/limits", "Max locked memory  8388608  8388608  bytes")
    host.put("dev/vfio/7", "")
    closed(monkeypatch, "dev/kvm", "dev/vfio/7", "driver_override", "drivers_probe")
    finding = found(host, "no-access")
    assert finding.blocker is not None
    assert "/dev/kvm, /dev/vfio/7" in finding.blocker.cause
    typed = "\n".join(finding.blocker.commands)
    assert 'SUBSYSTEM=="vfio", KERNEL=="7", GROUP="vfio", MODE="0660"' in typed
    assert "- memlock 1048576" in typed
    assert found(host, "no-access-kvm", None).check == "access"


def test_the_node_that_is_for_iommufd_is_not_asked_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(f"sys/bus/pci/devices/{NVME}/vfio-dev/vfio0/dev", "511:0")
    host.put("dev/vfio/7", "")
    host.put("dev/vfio/devices/vfio0", "")
    closed(monkeypatch, "dev/vfio/devices/vfio0")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}


def test_an_ordinary_user_with_every_node(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(monkeypatch, "driver_override", "drivers_probe")
    assert found(host, "no-driver-rights").outcome is Outcome.FAIL
    assert found(host, "drivers-need-root", None).outcome is Outcome.WARN
    host.path(f"{DEVICE}/driver").unlink()
    host._bind(str(NVME), "vfio-pci")
    assert kinds(diagnose(host, NVME), Outcome.FAIL) == []


# --- the command


def test_the_command(host: Host, monkeypatch: pytest.MonkeyPatch, valid: Callable[..., Any]) -> None:
    from kvmpass.cli.doctor import doctor

    monkeypatch.setattr(library, "Sysfs", lambda: host)

    def run(*arguments: str) -> tuple[str, object]:
        outcome = CliRunner().invoke(doctor, arguments, standalone_mode=False)
        assert outcome.exception is None, outcome.exception
        return outcome.output, outcome.return_value

    text, status = run(str(NVME))
    assert status == 0
    assert text.endswith(f"\nnothing failed, {len(library.doctor.CATALOGUE)} passed\n")
    assert "      read " not in text
    assert "read    /proc/cpuinfo: flags with svm" in run("-v")[0]
    host.put("proc/cmdline", "amd_iommu=on")
    assert run()[1] == 0
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    checks = sum(not check.device for check in library.doctor.CATALOGUE)
    text, status = run("--memory", "64M")
    assert status == 1
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "FAIL  Interrupt remapping" in text
    assert text.endswith(f"\n1 check failed, 1 warning, {checks - 2} passed\n")
    text, status = run("--json", "--memory", "64M", str(NVME))
    document = valid("doctor", text)
    assert (status, document["ok"], document["memory"], document["bdf"]) == (1, False, 64 * MIB, str(NVME))
    [blocker] = [finding["blocker"] for finding in document["findings"] if finding["outcome"] == "fail"]
    assert blocker["kind"] == "no-intremap"


def test_the_command_chooses_pages_as_assign_does(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmpass.cli.doctor import doctor

    monkeypatch.setattr(library, "Sysfs", lambda: host)
    for free, page, reason in ((31, None, "anonymous: "), (32, 2 * MIB, "hugetlb-2M: ")):
        for name in ("free", "nr"):
            host.put(f"sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages", str(free))
        result = CliRunner().invoke(doctor, ["--json", "--memory", "64M", "--hugepages", "auto"])
        assert json.loads(result.stdout)["huge_page"] == page
        assert f"kvmpass: backing {reason}" in result.stderr
