"""The inventory and the description of a device, as values and as the commands print them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.config_spaces import IGB, NVME, ROOT_PORT
from support.host_tree import BOOT, Host

from kvmpass import host as library
from kvmpass.cli.main import main
from kvmpass.host import Bdf, describe
from kvmpass.host.drivers.journal import Entry
from kvmpass.host.view.inventory import DeviceStatus, HostStatus, Link, Sriov, inventory, take_inventory

Valid = Callable[[str, str | bytes], Any]
PORT, NVME_BDF, VF = "0000:00:01.0", "0000:01:00.0", "0000:01:00.1"
IOMMU, BRIDGE = "0000:00:00.2", "0000:00:03.0"
LINK = {"current_link_speed": "2.5 GT/s PCIe", "current_link_width": "4"}
BEST = {"max_link_speed": "16.0 GT/s PCIe", "max_link_width": "4"}
WINDOWS = "\n".join(["0x0 0x0 0x0"] * 13 + ["0xd000 0xdfff 0x101"] + ["0x0 0x0 0x0"] * 3)
RESOURCE = """\
0x00000000fe000000 0x00000000fe003fff 0x0000000000140204
0x0 0x0 0x0
0x000000000000d000 0x000000000000d01f 0x0000000000040101
0x0000004000000000 0x00000041ffffffff 0x000000000014220c
0x0 0x0 0x0
0x0000000000000000 0x0000000000000fff 0x0000000020040200
0x00000000fe100000 0x00000000fe10ffff 0x0000000000046200
0x00000000fe200000 0x00000000fe207fff 0x0000000000140204"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    host.add(IOMMU, class_code=0x080600)
    host.add(PORT, "pcieport", 1, 0x060400, config=ROOT_PORT, resource=WINDOWS)
    host.add(
        NVME_BDF,
        "nvme",
        7,
        above=PORT,
        config=NVME,
        numa_node="1",
        sriov_totalvfs="2",
        sriov_numvfs="1",
        subsystem_vendor="0x1af4",
        subsystem_device="0x1100",
        resource=RESOURCE,
        **LINK,
        **BEST,
    )
    host.add(VF, None, 8, above=PORT)
    host._symlink(f"sys/bus/pci/devices/{VF}/physfn", f"sys/bus/pci/devices/{NVME_BDF}")
    host._symlink(f"sys/bus/pci/devices/{NVME_BDF}/virtfn0", f"sys/bus/pci/devices/{VF}")
    host.add(BRIDGE, None, 9, 0x060400)
    host.add("0000:02:00.0", "e1000", 9, 0x020000, above=BRIDGE)
    host.add("0000:02:01.0", "vfio-pci", 9, 0x020000, above=BRIDGE)
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    return host


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    output, errors = capsys.readouterr()
    assert ended.value.code == status, errors
    return output, errors


def status_of(host: Host, bdf: str) -> DeviceStatus:
    return inventory(host, [bdf]).devices[0]


# --- values


def test_facts_of_a_device(host: Host) -> None:
    drive = status_of(host, NVME_BDF)
    assert drive.link == Link(2.5, 4, 16.0, 4)
    assert drive.sriov == Sriov(None, (Bdf.parse(VF),), 1, 2)
    assert status_of(host, VF).sriov == Sriov(Bdf.parse(NVME_BDF), (), 0, 0)
    assert status_of(host, IOMMU).link is None
    host.put(f"sys/bus/pci/devices/{VF}/max_link_speed", "Unknown")
    host.put(f"sys/bus/pci/devices/{VF}/max_link_width", "255")
    assert status_of(host, VF).link is None


def test_the_groups_are_those_of_the_devices(host: Host) -> None:
    found = inventory(host, ["02:00.0", IOMMU])
    assert [group.id for group in found.groups] == [9]
    assert [str(bdf) for bdf in found.groups[0].devices] == [BRIDGE, "0000:02:00.0", "0000:02:01.0"]
    assert [str(status.device.bdf) for status in found.devices] == [IOMMU, "0000:02:00.0"]


def test_what_is_in_the_way_is_named(host: Host) -> None:
    (blocker,) = status_of(host, "02:01.0").blockers
    assert (blocker.kind, [str(bdf) for bdf in blocker.blocked_by]) == ("group-not-viable", ["0000:02:00.0"])


def test_the_host_as_a_whole(host: Host) -> None:
    assert inventory(host).host == HostStatus()
    host.put("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : fpu")
    status = inventory(host).host
    assert (status.ready, status.permitted) == (False, True)
    assert status.blocker is not None
    assert "AMD-V" in status.blocker.cause


def test_this_user_may_not(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    status = inventory(host).host
    assert (status.ready, status.permitted) == (True, False)
    assert status.blocker is not None
    assert status.blocker.kind == "no-access"


def test_bars(host: Host) -> None:
    found = describe(host, Bdf.parse(NVME_BDF)).bars
    assert [(bar.name, bar.io, bar.bits, bar.prefetchable, bar.address, bar.size) for bar in found] == [
        ("bar0", False, 64, False, 0xFE000000, 0x4000),
        ("bar2", True, None, False, 0xD000, 32),
        ("bar3", False, 64, True, 0x4000000000, 8 << 30),
        ("bar5", False, 32, False, None, 0x1000),
        ("rom", False, 32, True, 0xFE100000, 0x10000),
        ("vf-bar0", False, 64, False, 0xFE200000, 0x8000),
    ]
    assert [bar.name for bar in describe(host, Bdf.parse(PORT)).bars] == ["window0"]


def test_surroundings(host: Host) -> None:
    drive = describe(host, Bdf.parse(NVME_BDF))
    assert [(str(bridge.bdf), bridge.kind, bridge.isolates) for bridge in drive.bridges] == [
        (PORT, "root port", True)
    ]
    assert drive.functions == () and drive.siblings == (), "a virtual function is no part of the device"
    card = describe(host, Bdf.parse("02:01.0"))
    assert [(str(sibling.device.bdf), sibling.role) for sibling in card.siblings] == [
        (BRIDGE, "bridge"),
        ("0000:02:00.0", "blocks"),
    ]
    assert not card.bridges[0].readable and card.bridges[0].isolates is None
    host.add("0000:02:01.1", None, 9, 0x020000, above=BRIDGE)
    assert [str(bdf) for bdf in describe(host, Bdf.parse("02:01.0")).functions] == ["0000:02:01.1"]


def test_driverctl(host: Host) -> None:
    host.put(f"etc/driverctl.d/{NVME_BDF}", "vfio-pci")
    assert describe(host, Bdf.parse(NVME_BDF)).driverctl == "vfio-pci"
    assert describe(host, Bdf.parse(PORT)).driverctl is None


# --- list


def test_list_for_people(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    output, errors = run(capsys, "list")
    assert output.splitlines() == [
        "Group  Device          Class       Driver    Assignable            Name",
        "    1    0000:00:01.0  PCI bridge  pcieport  no: is a bridge       1022:1234",
        "    7    0000:01:00.0  NVMe        nvme      no: in use here       1022:1234",
        "    8    0000:01:00.1  NVMe        -         yes                   1022:1234",
        "    9  ┬ 0000:00:03.0  PCI bridge  -         no: is a bridge       1022:1234",
        "       ├ 0000:02:00.0  Ethernet    e1000     yes                   1022:1234",
        "       └ 0000:02:01.0  Ethernet    vfio-pci  no: group not viable  1022:1234",
        "           the host uses 0000:02:00.0 of this group",
        "",
        "Devices without an IOMMU group: nothing would confine their DMA",
        "    -    0000:00:00.2  IOMMU       -         no: no IOMMU group    1022:1234",
    ]
    assert "cannot assign" not in errors


def test_the_character_device_and_the_back_end(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.put(f"sys/bus/pci/devices/{NVME_BDF}/vfio-dev/vfio5/dev", "511:5")
    host.put("dev/iommu", "")
    output, _ = run(capsys, "list", "--wide", NVME_BDF)
    assert "/dev/vfio/devices/vfio5" in output
    assert output.endswith("IOMMU back end iommufd: available to this user\n")
    output, _ = run(capsys, "show", NVME_BDF)
    assert "nvme, /dev/vfio/devices/vfio5" in output
    assert "\nBack end      iommufd: available to this user\n" in output


def test_a_narrow_terminal_and_more_facts(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    output, _ = run(capsys, "list", "--wide", NVME_BDF, VF)
    assert output.splitlines() == [
        "Group  Device        Class  Driver  Assignable",
        "    7  0000:01:00.0  NVMe   nvme    no: in use here",
        "         1022:1234",
        "         PCIe 2.5 GT/s x4 (max 16 GT/s x4) · NUMA node 1 ·",
        "         reset: flr, bus · 1 of 2 VFs enabled",
        "    8  0000:01:00.1  NVMe   -       yes",
        "         1022:1234",
        "         reset: flr, bus · virtual function of 0000:01:00.0",
        "IOMMU back end type1: this kernel has no /dev/iommu",
    ]


def test_a_device_on_vfio_pci_and_a_host_that_cannot(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.add("0000:05:00.0", "vfio-pci", 12)
    assert "yes, on vfio-pci" in run(capsys, "list", "05:00")[0]
    host.put("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu")
    assert not json.loads(run(capsys, "list", "05:00", "--json")[0])["devices"][0]["assignable"]
    output, errors = run(capsys, "list", "05:00")
    assert "no: host not ready" in output
    assert "this host cannot assign devices: this CPU is GenuineIntel" in errors
    assert run(capsys, "list", "-q", "05:00")[1] == ""


def test_list_as_a_document(host: Host, capsys: pytest.CaptureFixture[str], valid: Valid) -> None:
    output, _ = run(capsys, "list", "--json")
    document = valid("list", output)
    assert [device["bdf"] for device in document["devices"]] == [
        IOMMU,
        PORT,
        BRIDGE,
        NVME_BDF,
        VF,
        "0000:02:00.0",
        "0000:02:01.0",
    ]
    drive = document["devices"][3]
    assert drive["link"] == {"speed_gts": 2.5, "width": 4, "max_speed_gts": 16.0, "max_width": 4}
    assert [blocker["kind"] for blocker in drive["blockers"]] == ["in-use", "bar-no-address"]
    assert document["iommu_groups"][-1]["group"] == 9
    assert document["host"]["ready"]


def test_a_filter_that_selects_nothing(host: Host, capsys: pytest.CaptureFixture[str], valid: Valid) -> None:
    output, errors = run(capsys, "list", "eth7", status=1)
    assert output == "" and errors.startswith("kvmpass: no PCI device matches 'eth7'")
    output, errors = run(capsys, "list", "--json", "eth7", status=1)
    assert errors == "" and valid("error", output)["error"]["type"] == "NoSuchDevice"


# --- show


def test_show_for_people(host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output, _ = run(capsys, "show", NVME_BDF)
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    for line in (
        "0000:01:00.0  1022:1234",
        "Subsystem     1af4:1100",
        "SR-IOV        1 of 2 VFs enabled",
        "              0000:01:00.1",
        "Assignable    no: in use here",
        "              - 0000:01:00.0 is in use: see below",
        "In use        1 virtual functions are enabled on it and would be removed",
        "BARs          bar0       16 KiB  64-bit                at 0xfe000000",
        "              bar3        8 GiB  64-bit, prefetchable  at 0x4000000000",
        "              bar5        4 KiB  32-bit                no address",
        "              MSI-X: 63 vectors, table in BAR 0 at 0x2000, on",
        "              PCI Express: endpoint, function level reset",
        "IOMMU group   7, alone, default domain DMA-FQ",
        "Above it      0000:00:01.0 root port: isolates the devices behind it (ACS SV RR",
        "Reserved      0xfee00000-0xfeefffff: interrupt messages",
    ):
        assert line in lines, output


def test_show_without_rights(host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host.path("sys/bus/pci/devices", NVME_BDF, "config").write_bytes(NVME[:64])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    output, errors = run(capsys, "show", NVME_BDF)
    assert "Capabilities  unknown: without root the kernel shows only 64 bytes of configuration space" in output
    assert "other users' processes" in errors


@pytest.mark.parametrize("bdf", [IOMMU, PORT, BRIDGE, NVME_BDF, VF, "0000:02:00.0", "0000:02:01.0"])
def test_show_as_a_document(host: Host, capsys: pytest.CaptureFixture[str], valid: Valid, bdf: str) -> None:
    host.path("sys/bus/pci/devices", VF, "config").write_bytes(IGB)
    document = valid("show", run(capsys, "show", "--json", bdf)[0])
    assert document["device"]["bdf"] == bdf
    if bdf == NVME_BDF:
        assert document["capabilities"]["msix"]["table_offset"] == "0x2000"
        assert document["bars"][3]["address"] is None
        assert document["bridges"][0]["acs"]["enabled"] == ["SV", "RR", "CR", "UF"]


def test_what_a_killed_process_left_is_shown_with_its_remedy(
    host: Host, capsys: pytest.CaptureFixture[str], valid: Valid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    bdf = "0000:02:01.0"
    (tmp_path / "state/journal").mkdir(parents=True)
    (tmp_path / "state/journal/notes.json").write_text("{}")

    def left(pid: int, *, gone: bool = False, boot: str = BOOT) -> str:
        entry = Entry(Bdf.parse("0000:77:00.0" if gone else bdf), boot, pid, 1, "kvmpass", "e1000", None, None, None)
        (tmp_path / f"state/journal/{entry.bdf}.json").write_text(entry.to_json())
        return run(capsys, "list", NVME_BDF)[1]

    assert "restore" not in left(4_194_300, gone=True), "a device that was removed"
    assert "restore" not in left(4_194_300, boot="another"), "of another boot"
    assert f"kvmpass: a killed kvmpass did not restore {bdf}\n  hint: run kvmpass restore\n" in left(4_194_300)
    assert valid("list", run(capsys, "list", "--json")[0])["orphaned"] == [bdf]
    host.put("proc/300/stat", "300 (kvmpass) S " + "0 " * 18 + "1")
    assert "restore" not in left(300), "its process lives"


def test_show_of_a_device_that_a_guest_has(host: Host, capsys: pytest.CaptureFixture[str], valid: Valid) -> None:
    """By its own group's node, or for another device of the group."""
    host.add("0000:05:00.0", "vfio-pci", 12)
    shown = run(capsys, "show", "05:00.0")[0]
    assert "In use        no" in shown
    host.process(4711, "kvmpass", nodes=("/dev/vfio/12", "/dev/vfio/9"))
    shown = run(capsys, "show", "05:00.0")[0]
    assert "Assignable    no: already assigned\n" in shown
    assert "In use        assigned by process 4711 (kvmpass)\n" in shown
    uses = valid("show", run(capsys, "show", "--json", "02:01.0")[0])["uses"]
    assert uses == ["in IOMMU group 9, assigned by process 4711 (kvmpass)"]


def test_show_of_what_is_not_there(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no PCI device 0000:77:00.0" in run(capsys, "show", "77:00.0", status=1)[1]
    output, errors = run(capsys, "show", "02:00", status=2)
    assert output == "" and "02:00 matches: 0000:02:00.0" in errors


class CountingHost(Host):
    """A host whose reads are counted."""

    reads = 0

    def place(self, *parts: str) -> str:
        self.reads += 1
        return super().place(*parts)


def test_a_list_reads_little_of_each_function(tmp_path: Path) -> None:
    """A host has thousands of them: the calls for files and links that one more function, in its group, takes."""
    host = CountingHost(tmp_path)
    counts = []
    for number in range(1, 4):
        modalias = "pci:v00001022d00001234sv00000000sd00000000bc01sc08i02"
        host.add(f"0000:0{number}:00.0", driver="nvme", group=number, modalias=modalias)
        host.reads = 0
        found = take_inventory(host, [], details=False)
        counts.append(host.reads)
        assert len(found.devices) == number
    assert counts[2] - counts[1] == counts[1] - counts[0] <= 18


def test_the_identity_of_a_function_is_in_one_file(tmp_path: Path) -> None:
    """The kernel writes its modalias from the same fields as the files of their names."""
    host = Host(tmp_path)
    host.add("0000:01:00.0", modalias="pci:v0000144Dd0000A80Asv0000144Esd0000A801bc01sc08i02", vendor="0xffff")
    host.add("0000:02:00.0", class_code=0x020000, modalias="", vendor="0x8086", subsystem_vendor="0x8087")
    first, second = host.devices()
    ids = (first.vendor, first.device, first.subsystem_vendor, first.subsystem_device, first.class_code)
    assert ids == (0x144D, 0xA80A, 0x144E, 0xA801, 0x010802)
    ids = (second.vendor, second.device, second.subsystem_vendor, second.subsystem_device, second.class_code)
    assert ids == (0x8086, 0x1234, 0x8087, 0, 0x020000)
