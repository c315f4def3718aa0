"""Why the kernel does without an IOMMU or its remapping: every message of its driver has a cause and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host, ivhd, ivrs

from kvmpass import host as library
from kvmpass.errors import HostNotReady
from kvmpass.host import diagnose
from kvmpass.host.doctor import Finding, Outcome

IVRS = "sys/firmware/acpi/tables/IVRS"
BUG = "[Firmware Bug]: "

# As Linux 4.9 to 6.18 print them (drivers/iommu/amd_iommu_init.c, drivers/iommu/amd/init.c).
IOMMU = [
    ("ivrs-error", "AMD-Vi: IVRS table error: AE_BAD_CHECKSUM", "AE_BAD_CHECKSUM"),
    ("ivrs-checksum", f"AMD-Vi: {BUG}IVRS invalid checksum", "update the firmware"),
    ("ivrs-checksum", f"{BUG}AMD-Vi: IVRS invalid checksum", "kexec"),
    ("no-cx16", "AMD-Vi: Failed to initialize. The CMPXCHG16B feature is required.", "cx16"),
    (
        "iommu-registers-taken",
        "AMD-Vi: Can not reserve memory region fd200000-fd27ffff for mmio",
        "grep -i -e amd_iommu -e fd200000 /proc/iomem",
    ),
    ("ivhd-type", "AMD-Vi: Unsupported IVHD type 0x50", "type 0x50"),
    ("iommu-hardware", "AMD-Vi: IOMMU1: Failed to initialize IOMMU Hardware (error=-19)!", "error=-19"),
    ("stoney-ridge", "AMD-Vi: Disable IOMMU on Stoney Ridge", "amd_iommu=force_enable"),
    ("sme-active", "AMD-Vi: IOMMU not currently supported when SME is active", "mem_encrypt=off"),
    ("no-host-translation", "AMD-Vi: Host Address Translation is not supported.", "dma-remap=on"),
    (
        "no-host-translation",
        f"AMD-Vi: {BUG}Disable host address translation due to invalid translation level (0x7).",
        "0x7",
    ),
    ("too-many-iommus", "System has more IOMMUs than supported by this driver", "newer kernel"),
]
REMAPPING = [
    ("ioapic-not-in-ivrs", "6.12.0", f"AMD-Vi: {BUG}: IOAPIC[7] not in IVRS table", "ivrs_ioapic=7@00:14.0"),
    ("ioapic-not-in-ivrs", "4.9.0-12", f"{BUG}AMD-Vi: IOAPIC[32] not in IVRS table", "ivrs_ioapic[32]=00:14.0"),
    ("ioapic-not-in-ivrs", "6.12.0", "AMD-Vi: : IOAPIC[5] not in IVRS table", "ivrs_ioapic=5@00:14.0"),
    ("no-southbridge-ioapic", "6.12.0", f"AMD-Vi: {BUG}: No southbridge IOAPIC found", "ivrs_ioapic=ID@00:14.0"),
    ("no-southbridge-ioapic", "4.14", f"{BUG}AMD-Vi: No southbridge IOAPIC found", "ivrs_ioapic[ID]=00:14.0"),
    ("remapping-refused", "6.12.0", "AMD-Vi: Disabling interrupt remapping", "update the firmware"),
    ("remapping-refused", "3.10", "AMD-Vi: Disabling interrupt remapping due to BIOS Bug(s)", "update the firmware"),
    ("no-ioapic", "6.12.0", "Not enabling interrupt remapping due to skipped IO-APIC setup", "IOAPIC"),
]
COMPLAINTS = [
    ("ivrs-option", "AMD-Vi: Invalid command line: ivrs_ioapic=7@0x14.0", "ivrs_ioapic=7@0x14.0"),
    ("ivrs-option", "AMD-Vi: Early IOAPIC map overflow - ignoring ivrs_ioapic=9@00:14.0", "at most four"),
    ("ivrs-bug", "AMD-Vi: [Firmware Warn]: EFR mismatch. Use IVHD EFR (0x1 : 0x2), EFR2 (0x0 : 0x0).", "EFR"),
    ("ivrs-bug", f"AMD-Vi: {BUG}Invalid IVHD device type 0xf0", "0xf0"),
    ("iommu-timeout", "AMD-Vi: Completion-Wait loop timed out", "pci=noats"),
]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add("0000:01:00.0", "nvme", 7)
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.put("proc/sys/kernel/osrelease", "6.12.0")
    host.put(IVRS, ivrs(ivhd()))
    return host


def log(host: Host, *messages: str, priority: int = 3) -> None:
    host.put("dev/kmsg", "\n".join(f"{priority},{at},1,-;{text}" for at, text in enumerate(messages)))


def found(host: Host, outcome: Outcome = Outcome.FAIL) -> Finding:
    [finding] = [finding for finding in diagnose(host) if finding.outcome is outcome]
    assert finding.blocker is not None
    return finding


def words(finding: Finding) -> str:
    assert finding.blocker is not None
    return " ".join([finding.blocker.cause, finding.blocker.remedy, *finding.blocker.commands])


@pytest.mark.parametrize(("kind", "message", "word"), IOMMU)
def test_the_iommu_is_not_used(host: Host, kind: str, message: str, word: str) -> None:
    host.path("sys/class/iommu/ivhd0").rmdir()
    log(host, "Linux version 6.12", message)
    finding = found(host)
    assert (finding.check, finding.blocker and finding.blocker.kind) == ("iommu", kind)
    assert word in words(finding)
    assert message in [reading.value for reading in finding.read]
    with pytest.raises(HostNotReady, match="AMD-Vi"):
        library.doctor.check_host(host)


@pytest.mark.parametrize(("kind", "release", "message", "word"), REMAPPING)
def test_interrupts_are_not_remapped(host: Host, kind: str, release: str, message: str, word: str) -> None:
    host.put("proc/sys/kernel/osrelease", release)
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    log(host, message, "AMD-Vi: Disabling interrupt remapping")
    finding = found(host)
    assert (finding.check, finding.blocker and finding.blocker.kind) == ("interrupt-remapping", kind)
    assert word in words(finding)
    assert message in [reading.value for reading in finding.read]


@pytest.mark.parametrize(("kind", "message", "word"), COMPLAINTS)
def test_complaints(host: Host, kind: str, message: str, word: str) -> None:
    log(host, message)
    finding = found(host, Outcome.WARN)
    assert (finding.check, finding.blocker and finding.blocker.kind) == ("iommu-complaints", kind)
    assert word in words(finding)
    library.doctor.check_host(host)


def test_two_ioapics_and_what_is_on_the_command_line(host: Host) -> None:
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    host.put("proc/cmdline", "ivrs_ioapic=6@00:14.0")
    log(host, *[f"AMD-Vi: {BUG}: IOAPIC[{number}] not in IVRS table" for number in (7, 8, 7)])
    finding = found(host)
    assert "IOAPIC 7 and 8 is" in words(finding)
    assert "ivrs_ioapic=7@00:14.0 or ivrs_ioapic=8@00:14.0" in words(finding)
    assert "ivrs_ioapic=6@00:14.0" in [reading.value for reading in finding.read]


def test_the_command_line_comes_first(host: Host) -> None:
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    host.put("proc/cmdline", "intremap=nosid,off")
    log(host, "AMD-Vi: Disabling interrupt remapping")
    finding = found(host)
    assert finding.blocker is not None
    assert finding.blocker.kind == "intremap-off"
    assert finding.summary == "off: intremap=off in intremap=nosid,off"


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        (3, f"usb 1-1: Product: AMD-Vi: {BUG}: IOAPIC[7] not in IVRS table"),
        (3, "AMD-Vi: IOAPIC[7] not in IVRS table, perhaps"),
        (11, f"AMD-Vi: {BUG}: IOAPIC[7] not in IVRS table"),
    ],
)
def test_what_the_kernel_did_not_say(host: Host, priority: int, message: str) -> None:
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    log(host, message, priority=priority)
    finding = found(host)
    assert finding.blocker is not None
    assert finding.blocker.kind == "no-intremap"
    assert "intremap=off" not in words(finding), "nothing says that it is on the command line"


def test_a_log_whose_beginning_is_lost(host: Host) -> None:
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    host.put("dev/kmsg", "6,4711,1,-;eth0: link up")
    assert "its beginning is lost: journalctl -k -b may have it" in [reading.value for reading in found(host).read]
    host.path("dev/kmsg").unlink()
    assert "not readable: No such file or directory" in [reading.value for reading in found(host).read]
