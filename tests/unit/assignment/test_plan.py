"""Plans of assignments, on hosts made of files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.host_tree import Host

import kvmpass
from kvmpass.assignment import plan as planning
from kvmpass.assignment.assign import check_guest
from kvmpass.errors import BadAddress, HostNotReady, LayoutError
from kvmpass.host import Bdf, Look
from kvmpass.layout import GIB, MIB, Range, Reserved
from kvmpass.memory import Backing, RegionKind, plan_memory
from kvmpass.pci import preview_bars, preview_vectors
from kvmpass.pci.barspace import BarKind

NVME, SOUND, BRIDGE = "0000:01:00.0", "0000:01:00.1", "0000:00:01.0"
IO, MEMORY, MEMORY64 = 0x100, 0x200, 0x100200


def config_space(vectors: int = 17, table: int = 0x3000, pending: int = 0x3800) -> bytes:
    """With INTx, MSI (four messages) and MSI-X in BAR 0."""
    space = bytearray(256)
    struct.pack_into("<H", space, 0x06, 0x10)
    space[0x34], space[0x3D] = 0x40, 1
    struct.pack_into("<BBH", space, 0x40, 0x05, 0x50, 2 << 1)
    struct.pack_into("<BBHII", space, 0x50, 0x11, 0, vectors - 1, table, pending)
    return bytes(space)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(NVME, "nvme", 7)
    host.put(f"sys/bus/pci/devices/{NVME}/config", config_space())
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.put("proc/meminfo", "MemAvailable: 8388608 kB")
    host.put(
        "proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : svm npt\naddress sizes : 43 bits physical, 48 bits virtual"
    )
    return host


# --- parts of a plan


def test_memory_avoids_reserved_ranges() -> None:
    hole = Reserved(Range(5 * GIB, GIB), "reserved")
    made = plan_memory(6 * GIB, [hole], 40)
    assert [(region.name, region.range, region.kind) for region in made.regions] == [
        ("ram0", Range(0, 3 * GIB), RegionKind.RAM),
        ("ram1", Range(4 * GIB, GIB), RegionKind.RAM),
        ("ram2", Range(6 * GIB, 2 * GIB), RegionKind.RAM),
    ]
    assert (len(made.mapped), made.locked) == (3, 6 * GIB)
    assert {region.backing for region in plan_memory(GIB, (), 40, Backing.HUGETLB_1G).regions} == {Backing.HUGETLB_1G}


def test_vectors() -> None:
    found = preview_vectors(config_space())
    assert (found.msix, found.msi, found.intx) == (17, 4, True)
    assert found.trapped == ((0, Range(0x3000, 17 * 16)), (0, Range(0x3800, 8)))
    hidden = preview_vectors(config_space()[:64])
    assert (hidden.msix, hidden.msi, hidden.intx) == (None, None, True)
    assert preview_vectors(b"").intx is None
    assert preview_vectors(bytes(256)).msix == 0


def test_bars() -> None:
    lines = [(0x4000, MEMORY64), (0, 0), (0x20, IO), (0x100, MEMORY), (0x2000, MEMORY), (0, 0), (0x8000, MEMORY)]
    bars = {bar.name: bar for bar in preview_bars(lines, preview_vectors(config_space()))}
    assert set(bars) == {"bar0", "bar2", "bar3", "bar4", "rom"}
    assert bars["bar0"].kind is BarKind.MEMORY64
    assert bars["bar0"].mapped == (Range(0, 0x3000),)
    assert (bars["bar2"].kind, bars["bar2"].mapped) == (BarKind.IO, ())
    assert bars["bar3"].mapped == ()
    assert bars["bar4"].mapped == (Range(0, 0x2000),)
    assert bars["rom"].mapped == ()
    hidden = {bar.name: bar for bar in preview_bars(lines, preview_vectors(b""))}
    assert hidden["bar0"].mapped is None
    assert hidden["bar2"].mapped == ()


# --- plans


def test_a_plan(host: Host) -> None:
    host.add(BRIDGE, "pcieport", 7, 0x060400)
    made = kvmpass.plan([NVME], memory="4G", cpus=3, sysfs=host)
    assert made.blockers == ()
    [device] = made.devices
    assert (device.driver, device.group, device.reset_methods, device.vectors.msix) == ("nvme", 7, ("flr", "bus"), 17)
    assert [(str(sibling.device.bdf), sibling.role) for sibling in device.siblings] == [(BRIDGE, "bridge")]
    assert (made.map_calls, made.locked, made.confined) == (2, 4 * GIB, True)
    assert (made.phys_bits, made.phys_bits_source) == (43, "/proc/cpuinfo")
    assert made.memory is not None
    assert made.memory == plan_memory(4 * GIB, host.reserved_regions(), 43)
    assert (made.descriptors.fixed, made.descriptors.vectors) == (10 + 6 + 3 + 1 + 5, 17)
    assert host.writes == []


def test_daemons_take_descriptors(host: Host) -> None:
    """As counted of a machine with virtiofsd: ten, and three vectors in the guest; a memfd for each RAM region."""
    fixed = kvmpass.plan([NVME], memory="4G", sysfs=host).descriptors.fixed
    made = kvmpass.plan([NVME], memory="4G", daemons=2, sysfs=host)
    assert made.descriptors.fixed == fixed + 2 * 13 + 2


@pytest.mark.parametrize(("daemons", "backing"), [(0, Backing.ANONYMOUS), (0, Backing.MEMFD), (2, Backing.MEMFD)])
def test_the_descriptors_of_the_plan_are_those_that_are_checked(host: Host, daemons: int, backing: Backing) -> None:
    """By the plan's own blockers, and by an assignment."""

    def make() -> planning.Plan:
        return kvmpass.plan([NVME], memory="4G", backing=backing, daemons=daemons, sysfs=host)

    host.put("proc/meminfo", f"MemAvailable: {8 * GIB >> 10} kB")
    needed = make().descriptors.fixed
    for limit in (needed - 1, needed):
        host.put("proc/self/limits", f"Max open files {limit} {limit} files")
        refused = limit < needed
        assert [blocker.kind for blocker in make().blockers] == ["descriptors-low"] * refused
        with pytest.raises(HostNotReady, match=f"{needed} file descriptors") if refused else nullcontext():
            check_guest([Bdf.parse(NVME)], Look(host), 4 * GIB, backing, 1, daemons=daemons)


def test_the_back_end_is_part_of_the_plan(host: Host) -> None:
    made = kvmpass.plan([NVME], sysfs=host)
    assert str(made.backend) == "type1: this kernel has no /dev/iommu"
    assert [blocker.kind for blocker in kvmpass.plan([NVME], sysfs=host, backend="iommufd").blockers] == [
        "no-iommufd"
    ]
    fixed = made.descriptors.fixed
    host.put("dev/iommu", "")
    made = kvmpass.plan([NVME], sysfs=host)
    assert (str(made.backend), made.blockers) == ("iommufd: available to this user", ())
    assert made.descriptors.fixed == fixed - 1, "no group is opened, and the iommufd takes the container's place"
    assert str(kvmpass.plan([NVME], sysfs=host, backend="type1").backend) == "type1: requested"


def test_peer_to_peer_is_part_of_the_plan(host: Host) -> None:
    """One more map call for each memslot of a BAR; iommufd needs a kernel that maps BARs."""
    host.put("proc/sys/kernel/osrelease", "6.12.117")
    assert (kvmpass.plan([NVME], sysfs=host).p2p, kvmpass.plan([NVME], sysfs=host).peer_map_calls) == (False, 0)
    made = kvmpass.plan([NVME], sysfs=host, p2p=True)
    assert (made.p2p, made.map_calls, made.blockers) == (True, 1, ())
    assert made.peer_map_calls == sum(len(bar.mapped or ()) for bar in made.devices[0].bars) > 0
    host.put("dev/iommu", "")
    lacks = "iommufd maps BARs for peer-to-peer since Linux 6.19; this is Linux 6.12"
    assert str(kvmpass.plan([NVME], sysfs=host, p2p=True).backend) == f"type1: {lacks}"
    [blocker] = kvmpass.plan([NVME], sysfs=host, p2p=True, backend="iommufd").blockers
    assert (blocker.kind, lacks in blocker.cause) == ("no-iommufd", True)
    host.put("proc/sys/kernel/osrelease", "6.19.0")
    assert kvmpass.plan([NVME], sysfs=host, p2p=True, backend="iommufd").blockers == ()
    assert str(kvmpass.plan([NVME], sysfs=host, p2p=True).backend) == "iommufd: available to this user"
    host.put(f"sys/bus/pci/devices/{NVME}/config", config_space()[:64])
    assert kvmpass.plan([NVME], sysfs=host, p2p=True).peer_map_calls is None


def test_a_group_with_two_devices(host: Host) -> None:
    host.add(SOUND, "snd_hda_intel", 7, 0x040300)
    alone = kvmpass.plan([NVME], memory="64M", sysfs=host)
    assert [blocker.kind for blocker in alone.blockers] == ["group-not-viable"]
    assert [sibling.role for sibling in alone.devices[0].siblings] == ["blocks"]
    both = kvmpass.plan([NVME, SOUND], memory="64M", sysfs=host)
    assert both.blockers == ()
    assert [device.siblings[0].role for device in both.devices] == ["assigned", "assigned"]


def test_all_blockers(host: Host) -> None:
    host.add("0000:02:00.0", "xhci_hcd", 8)
    host.put("sys/bus/pci/devices/0000:02:00.0/boot_vga", "1")
    host.put("sys/kernel/irq/9/chip_name", "IO-APIC")
    made = kvmpass.plan([NVME, "02:00.0", NVME, "09:00.0"], memory="9G", sysfs=host)
    assert sorted((str(blocker.bdf), blocker.kind) for blocker in made.blockers) == [
        ("0000:02:00.0", "in-use"),
        ("0000:09:00.0", "no-device"),
        ("None", "memory-short"),
        ("None", "no-intremap"),
        ("None", "request"),
    ]
    assert [str(device.bdf) for device in made.devices] == [NVME, "0000:02:00.0"]
    with pytest.raises(BadAddress):
        kvmpass.plan(["nvme"], sysfs=host)
    with pytest.raises(LayoutError):
        kvmpass.plan([NVME], memory="plenty", sysfs=host)


def test_bars_and_memory_that_do_not_fit(host: Host) -> None:
    size = 1 << 30  # the window for 32-bit BARs has half of it
    host.put(f"sys/bus/pci/devices/{NVME}/resource", f"0x40000000 {0x40000000 + size - 1:#x} 0x200")
    [blocker] = kvmpass.plan([NVME], memory="64M", sysfs=host).blockers
    assert (str(blocker.bdf), blocker.kind) == (NVME, "request")
    assert "no room for a 32-bit memory BAR" in blocker.cause
    too_small = kvmpass.plan([NVME], memory="4K", sysfs=host)
    assert too_small.memory is None
    assert "at least 1 MiB" in too_small.blockers[-1].cause


def test_a_host_without_anything(tmp_path: Path) -> None:
    """Without KVM, IOMMU and AMD CPU."""
    host = Host(tmp_path)
    for path in ("dev/kvm", "sys/class/iommu/ivhd0", "sys/bus/pci/drivers/vfio-pci", "dev/vfio/vfio"):
        host.path(path).rename(tmp_path / Path(path).name)
    host.put("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : vmx")
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.add(NVME, "nvme", None)
    made = kvmpass.plan([NVME], memory="1G", sysfs=host)
    assert {blocker.kind for blocker in made.blockers} == {"not-amd", "no-ivrs", "no-vfio-pci"}
    assert (made.phys_bits, made.phys_bits_source, made.confined) == (40, "assumed", False)
    assert (made.map_calls, made.locked) == (1, GIB)


@pytest.fixture
def run(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, object]]:
    from kvmpass.cli.plan import plan

    monkeypatch.setattr(planning, "Sysfs", lambda: host)

    def run(*arguments: str) -> tuple[str, object]:
        outcome = CliRunner().invoke(plan, arguments, standalone_mode=False)
        assert outcome.exception is None, outcome.exception
        return outcome.output, outcome.return_value

    return run


def test_the_command(host: Host, run: Callable[..., Any], valid: Callable[..., Any]) -> None:
    text, status = run(NVME, "--memory", "4G")
    assert status == 0
    assert "driver  nvme -> vfio-pci -> nvme" in text
    assert "vectors 17 MSI-X, 4 MSI, INTx" in text
    assert "2 map calls, 4294967296 bytes locked (4 GiB)" in text
    assert "0xfd00000000-0xffffffffff reserved" in text
    assert "that the kernel maps" not in text
    regions = "sys/kernel/iommu_groups/7/reserved_regions"
    before = host.text(regions) or ""
    host.put(regions, f"0x1000000 0x1ffffff direct\n{before}")
    words = run(NVME, "--memory", "4G")[0]
    around, _, beside = words.partition("  reserved ranges that the kernel maps")
    assert "direct" not in around.partition("without guest memory")[2]
    assert "    0x1000000-0x1ffffff direct\n" in beside
    assert next(line for line in around.splitlines() if "ram0" in line).split()[1] == "0x0-0xbfffffff", "across it"
    host.put(regions, before)
    assert text.endswith("\nno blockers; nothing was changed\n")
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "memslot, no DMA" in text
    text = run(NVME, "--p2p")[0]
    assert "memslot, peer-to-peer DMA" in text
    assert "  peer-to-peer: 1 more map call while all BARs decode\n" in text
    assert all(len(line) <= 80 for line in text.splitlines()), text
    document = valid("plan", run(NVME, "--memory", "64M", "--json", "--p2p")[0])
    assert (document["p2p"], document["map_calls"], document["peer_map_calls"]) == (True, 1, 1)
    assert [(region["gpa"], region["iova"], region["size"]) for region in document["memory_regions"]] == [
        ("0x0", "0x0", 64 * MIB)
    ]
    host.put("sys/bus/pci/devices/0000:01:00.0/boot_vga", "1")
    text, status = run(NVME, "--memory", "64M")
    assert status == 1
    assert "blockers\n      cause   0000:01:00.0 is in use: it is the boot display" in text
    text, status = run(NVME, "--memory", "64M", "--json")
    assert (status, valid("plan", text)["blockers"][0]["kind"]) == (1, "in-use")


@pytest.mark.parametrize(
    ("options", "setting", "backing", "small"),
    [
        ((), "", "anonymous", False),
        (("--root", "host"), "always within_size advise [never] deny force", "memfd", True),
        (("--share", "/srv"), "", "memfd", True),
        (("--share", "/srv"), "always within_size [advise] never deny force", "memfd", False),
        (("--share", "/srv", "--hugepages", "2M"), "", "memfd-2M", False),
    ],
    ids=["private", "root", "share", "transparent", "pool"],
)
def test_memory_for_the_daemons_of_files(
    host: Host,
    run: Callable[..., Any],
    valid: Callable[..., Any],
    options: tuple[str, ...],
    setting: str,
    backing: str,
    small: bool,
) -> None:
    host.put("sys/kernel/mm/transparent_hugepage/shmem_enabled", setting)
    document = valid("plan", run(NVME, "--memory", "64M", "--json", *options)[0])
    assert [region["backing"] for region in document["memory_regions"]] == [backing]
    assert document["small_pages"] is small
    text = run(NVME, "--memory", "64M", *options)[0]
    assert ("pages of 4 KiB: memfds have no transparent huge pages on this host" in text) is small
    assert all(len(line) <= 80 for line in text.splitlines()), text


def test_the_nodes_of_its_memory(host: Host, run: Callable[..., Any], valid: Callable[..., Any]) -> None:
    assert valid("plan", run(NVME, "--memory", "64M", "--json")[0])["numa"] == {"nodes": [], "reason": ""}
    assert "NUMA" not in run(NVME, "--memory", "64M")[0]
    for node in (0, 1):
        host.put(f"sys/devices/system/node/node{node}/meminfo", "")
    host.put(f"sys/bus/pci/devices/{NVME}/numa_node", "1")
    document = valid("plan", run(NVME, "--memory", "64M", "--json")[0])
    assert document["numa"] == {"nodes": [1], "reason": "the devices are on it"}
    assert "  NUMA node 1 preferred: the devices are on it\n" in run(NVME, "--memory", "64M")[0]


def test_huge_pages_as_the_host_has_them(host: Host, run: Callable[..., Any], valid: Callable[..., Any]) -> None:
    host.put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "128")
    requested = (NVME, "--memory", "256M")
    text = run(*requested, "--hugepages", "auto")[0]
    assert "ram0  read-write  hugetlb-2M\n" in text
    assert "  backing hugetlb-2M: 1 GiB pages: 256 MiB is not a multiple; 2 MiB pages: 256\n    MiB free" in text
    assert all(len(line) <= 80 for line in text.splitlines()), text
    document = valid("plan", run(*requested, "--hugepages", "auto", "--share", "/srv", "--json")[0])
    assert document["memory_regions"][0]["backing"] == document["backing"]["name"] == "memfd-2M"
    assert document["backing"]["reason"].endswith("2 MiB pages: 256 MiB free, 256 MiB wanted")
    document = valid("plan", run(*requested, "--json")[0])
    assert document["backing"] == {"name": "anonymous", "reason": "no huge pages requested"}
    assert "backing anonymous:" not in run(*requested)[0]
