"""The kernel's command line: what the kernel makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.host.kernel.cmdline import CommandLine, matches_ids


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("  quiet\t ro\n", [("quiet", None), ("ro", None)]),
        ("iommu=pt iommu=off", [("iommu", "pt"), ("iommu", "off")]),
        ("amd-iommu=off", [("amd_iommu", "off")]),
        ("vfio-pci.ids=1-2", [("vfio_pci.ids", "1-2")]),
        ('dyndbg="file x.c +p" ro', [("dyndbg", "file x.c +p"), ("ro", None)]),
        ('"iommu=pt,off" ro', [("iommu", "pt,off"), ("ro", None)]),
        ("a= b==c", [("a", ""), ("b", "=c")]),
        ("ro -- iommu=off", [("ro", None)]),
        ("--x=1 ro", [("__x", "1"), ("ro", None)]),
        ('open="never closed ro', [("open", "never closed ro")]),
    ],
)
def test_parameters(text: str, wanted: list[tuple[str, str | None]]) -> None:
    assert [(parameter.name, parameter.value) for parameter in CommandLine(text).parameters] == wanted


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("iommu=off", ["iommu=off"]),
        ("iommu=pt,off", ["iommu=off in iommu=pt,off"]),
        ("iommu=offload", ["iommu=offload"]),
        ("iommu=usedac,off", []),  # nothing after usedac is read
        ("amd_iommu=fullflush,off", ["amd_iommu=off in amd_iommu=fullflush,off"]),
        ("amd-iommu=off", ["amd-iommu=off"]),
        ('amd_iommu="off"', ["amd_iommu=off"]),
        ("amd_iommu=on iommu=pt", []),
        ("amd_iommu=force_isolation", []),
        ("-- amd_iommu=off", []),
        ("xiommu=off intel_iommu=off", []),
        ("iommu", []),
    ],
)
def test_what_switches_the_iommu_off(text: str, off: list[str]) -> None:
    assert CommandLine(text).iommu_off() == [word.replace('"', "") for word in off] or text.count('"')
    assert bool(CommandLine(text).iommu_off()) is bool(off)


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("intremap=off", True),
        ("intremap=nosid,off", True),
        ("intremap=off,on", False),
        ("intremap=off intremap=on", False),
        ("nointremap", True),
        ("noapic", True),
        ("nosmp", True),
        ("maxcpus=0", True),
        ("maxcpus=1", False),
        ("intremap=nosid", False),
    ],
)
def test_what_switches_remapping_off(text: str, off: bool) -> None:
    assert bool(CommandLine(text).remapping_off()) is off


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("amd_iommu=on", ["amd_iommu=on"]),
        ("amd_iommu=pt", ["amd_iommu=pt"]),
        ("amd_iommu=fullflush,pt iommu=on,pt", ["iommu=on in iommu=on,pt", "amd_iommu=pt in amd_iommu=fullflush,pt"]),
        ("intel_iommu=on,sm_on", ["intel_iommu=on,sm_on"]),
        ("iommu=1 iommu=pt amd_iommu=pgtbl_v2 intremap=nosid", []),
        ("amd_iommu=pgtbl_v2,,off", []),
        ("intremap=enabled", ["intremap=enabled"]),
    ],
)
def test_what_the_kernel_ignores(text: str, words: list[str]) -> None:
    assert CommandLine(text).ignored() == words


def test_acs_override_and_ids() -> None:
    line = CommandLine(
        "pcie_acs_override=downstream,multifunction vfio-pci.ids=10de:2204,10de:1aef vfio_pci.ids=,1:2"
    )
    assert line.acs_override() == ["pcie_acs_override=downstream,multifunction"]
    assert line.vfio_ids() == ["10de:2204", "10de:1aef", "1:2"]
    assert CommandLine("pci=config_acs=10@pci:0:0 pcie_acs_override").acs_override() == []


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("10de:2204", True),
        ("10DE:2204", True),
        ("10de:2205", False),
        ("10de", False),  # the kernel wants two at least
        ("ffffffff:2204", True),
        ("10de:ffffffff", True),
        ("10de:2204:1043:87c0", True),
        ("10de:2204:1043:1", False),
        ("10de:2204:ffffffff:ffffffff:030000:ff0000", True),
        ("10de:2204:ffffffff:ffffffff:020000:ff0000", False),
        ("nonsense", False),
        ("1:2:3:4:5:6:7", False),
        ("", False),
    ],
)
def test_ids(entry: str, wanted: bool) -> None:
    assert matches_ids(entry, 0x10DE, 0x2204, (0x1043, 0x87C0), 0x030000) is wanted


@given(st.text(max_size=60))
def test_no_text_makes_it_raise(text: str) -> None:
    line = CommandLine(text)
    line.iommu_off(), line.remapping_off(), line.ignored(), line.acs_override(), line.vfio_ids(), line.acpi_off()
    assert not any(parameter.text.strip() == "" for parameter in line.parameters)
