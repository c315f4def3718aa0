"""The inventory, and each refusal with its reason, against a made-up host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.host_tree import Host, ivhd, ivrs

from kvmpass import host as library
from kvmpass.errors import (
    BadAddress,
    DeviceInUse,
    GroupNotViable,
    HostNotReady,
    KvmpassError,
    NoSuchDevice,
    NotAssignable,
    NotEnoughMemory,
)
from kvmpass.host import Bdf, Sysfs, check_assignable
from kvmpass.host.doctor import check_host, check_memory
from kvmpass.layout import GIB, Range, Reserved

NVME = Bdf(0, 1, 0, 0)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(str(NVME), "nvme", 7)
    return host


# --- addresses


@given(st.builds(Bdf, *(st.integers(0, top) for top in (0xFFFF, 0xFF, 0x1F, 7))))
def test_an_address_survives_its_text(bdf: Bdf) -> None:
    assert Bdf.parse(str(bdf)) == bdf


def test_addresses() -> None:
    assert Bdf.parse("01:00.0") == NVME == Bdf.parse("0000:01:00.0")
    assert str(Bdf.parse("0a:1F.7")) == "0000:0a:1f.7"
    assert Bdf(0, 0, 4, 0) < Bdf(0, 0, 4, 1) < NVME


@pytest.mark.parametrize(
    "text", ["", "nvme0", "1:0.0", "01:20.0", "01:00.8", "0000:01:00", "01:00.0 x", "/dev/nvme0"]
)
def test_malformed(text: str) -> None:
    with pytest.raises(BadAddress, match=r"dddd:\]bb:dd\.f") as caught:
        Bdf.parse(text)
    assert repr(text) in str(caught.value)


# --- inventory


def test_a_device(host: Host) -> None:
    [device] = host.devices()
    assert device == host.device(NVME)
    assert (device.vendor, device.device, device.class_code) == (0x1022, 0x1234, 0x010802)
    assert (device.driver, device.driver_override, device.group, device.numa_node) == ("nvme", None, 7, None)
    assert (device.power_state, device.reset_methods, device.is_bridge) == ("D0", ("flr", "bus"), False)
    assert [part.size for part in device.resources] == [0x4000, 0]


def test_groups(host: Host) -> None:
    host.add("0000:01:00.1", None, 7)
    host.add("0000:02:00.0", None, 12)
    assert [group.id for group in host.groups()] == [7, 12]
    group = host.group(7)
    assert group.devices == (NVME, Bdf(0, 1, 0, 1))
    assert (group.type, group.no_iommu) == ("DMA-FQ", False)
    expected = [
        Reserved(Range(0xFEE00000, 0x100000), "msi"),
        Reserved(Range(0xFD00000000, 0x300000000), "reserved"),
    ]
    assert host.reserved_regions() == expected == list(group.reserved)


def test_an_empty_tree(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    assert (sysfs.devices(), sysfs.groups(), sysfs.reserved_regions()) == ([], [], [])


# --- the device


def test_assignable(host: Host) -> None:
    assert check_assignable(host, NVME).bdf == NVME
    assert host.writes == []


def test_no_such_device(host: Host) -> None:
    with pytest.raises(NoSuchDevice, match=r"0000:09:00\.0"):
        check_assignable(host, Bdf(0, 9, 0, 0))


@pytest.mark.parametrize("class_code", [0x060000, 0x060100, 0x060400])
def test_a_bridge(host: Host, class_code: int) -> None:
    host.add("0000:00:01.0", None, 3, class_code)
    with pytest.raises(NotAssignable, match="bridge"):
        check_assignable(host, Bdf(0, 0, 1, 0))


def test_a_bridge_by_its_header(host: Host) -> None:
    host.path("sys/bus/pci/devices", str(NVME), "config").write_bytes(bytes(14) + b"\x81" + bytes(49))
    with pytest.raises(NotAssignable, match="bridge"):
        check_assignable(host, NVME)


def test_no_group(host: Host) -> None:
    host.add("0000:00:02.0", None, None)
    with pytest.raises(NotAssignable, match="no IOMMU group"):
        check_assignable(host, Bdf(0, 0, 2, 0))


def test_a_no_iommu_group(host: Host) -> None:
    host.put("sys/kernel/iommu_groups/7/name", "vfio-noiommu")
    with pytest.raises(NotAssignable, match="no-IOMMU"):
        check_assignable(host, NVME)


def test_siblings(host: Host) -> None:
    host.add("0000:01:00.1", "snd_hda_intel", 7, 0x040300)
    host.add("0000:01:00.2", None, 7)
    host.add("0000:01:00.3", "vfio-pci", 7)
    host.add("0000:00:01.0", "pcieport", 7, 0x060400)
    with pytest.raises(GroupNotViable, match=r"group 7 with 0000:01:00\.1 \(driver snd_hda_intel\), which"):
        check_assignable(host, NVME)
    check_assignable(host, NVME, together=[Bdf(0, 1, 0, 1)])


def test_assigned_already(host: Host) -> None:
    host.process(123, "kvmpass", nodes=("/dev/null", "/dev/vfio/7"))
    with pytest.raises(DeviceInUse, match=r"0000:01:00\.0 is assigned by process 123 \(kvmpass\)\n"):
        check_assignable(host, NVME)


def test_assigned_through_its_own_node(host: Host) -> None:
    host.path("sys/bus/pci/devices", str(NVME), "vfio-dev/vfio3").mkdir(parents=True)
    host.process(123, "qemu", nodes=("/dev/vfio/devices/vfio3",))
    with pytest.raises(DeviceInUse, match=r"process 123 \(qemu\)"):
        check_assignable(host, NVME)


def test_a_sibling_is_assigned(host: Host) -> None:
    host.add("0000:01:00.1", "vfio-pci", 7)
    host.path("sys/bus/pci/devices/0000:01:00.1/vfio-dev/vfio4").mkdir(parents=True)
    host.process(123, "qemu", nodes=("/dev/vfio/devices/vfio4",))
    with pytest.raises(DeviceInUse, match=r"IOMMU group 7, assigned by process 123 \(qemu\)"):
        check_assignable(host, NVME)


def test_this_process_counts(host: Host) -> None:
    host.process(os.getpid(), "pytest", nodes=("/dev/vfio/7",))
    with pytest.raises(DeviceInUse, match="this very process"):
        check_assignable(host, NVME)


# --- what the host does with it

MOUNT = "30 1 {number} / /mnt/a\\040b rw - ext4 {source} rw"


@pytest.fixture
def disk(host: Host) -> Host:
    host.add_below(str(NVME), "sys/class/block", "nvme0n1", dev="259:0")
    host.add_below(str(NVME), "sys/class/block", "nvme0n1p1", dev="259:1")
    return host


@pytest.mark.parametrize(("number", "source"), [("259:1", "/dev/root"), ("0:40", "/dev/nvme0n1p1")])
def test_mounted(disk: Host, number: str, source: str) -> None:
    disk.put("proc/self/mountinfo", MOUNT.format(number=number, source=source))
    with pytest.raises(DeviceInUse, match=r"/dev/nvme0n1p1 is mounted at /mnt/a b\n"):
        check_assignable(disk, NVME)


def test_something_else_is_mounted(disk: Host) -> None:
    disk.put("proc/self/mountinfo", MOUNT.format(number="8:1", source="/dev/sda1"))
    check_assignable(disk, NVME)


def test_swap(disk: Host) -> None:
    disk.put("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2")
    with pytest.raises(DeviceInUse, match="/dev/nvme0n1p1 is swap"):
        check_assignable(disk, NVME)


def test_a_holder(disk: Host) -> None:
    disk.path("sys/class/block/nvme0n1p1/holders/dm-0").mkdir(parents=True)
    disk.put("sys/class/block/dm-0/dm/name", "vg-root")
    with pytest.raises(DeviceInUse, match="/dev/nvme0n1p1 is held by vg-root"):
        check_assignable(disk, NVME)


def test_namespaces_of_a_multipath_subsystem(host: Host) -> None:
    host.add_below(str(NVME), "sys/class/nvme", "nvme0")
    host.path("sys/class/nvme-subsystem/nvme-subsys0/nvme0").mkdir(parents=True)
    virtual = host.path("sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1")
    virtual.mkdir(parents=True)
    host.path("sys/class/block/nvme0n1").symlink_to(virtual)
    host.put("sys/class/block/nvme0n1/dev", "259:0")
    host.put("proc/self/mountinfo", MOUNT.format(number="259:0", source="/dev/nvme0n1"))
    with pytest.raises(DeviceInUse, match="mounted"):
        check_assignable(host, NVME)


def test_an_open_node(disk: Host) -> None:
    disk.add_below(str(NVME), "sys/dev/char", "240:0", uevent="MAJOR=240\nDEVNAME=nvme0")
    disk.process(55, "nvme", nodes=("/dev/nvme0",))
    disk.process(56, "systemd-udevd", nodes=("/dev/nvme0n1",))
    with pytest.raises(DeviceInUse, match=r"in use: /dev/nvme0 is open in process 55 \(nvme\)\n"):
        check_assignable(disk, NVME)


ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"


def test_the_default_route(host: Host) -> None:
    host.add_below(str(NVME), "sys/class/net", "eth0")
    host.put("proc/net/route", ROUTE + "eth0\t0000000A\t0\t1\t0\t0\t0\t000000FF\t0")
    check_assignable(host, NVME)
    host.put("proc/net/route", ROUTE + "eth0\t00000000\t0100000A\t3\t0\t0\t0\t00000000\t0")
    with pytest.raises(DeviceInUse, match=r"default route goes through eth0\n"):
        check_assignable(host, NVME)


def test_the_default_route_over_a_bridge(host: Host) -> None:
    host.add_below(str(NVME), "sys/class/net", "eth0")
    host.path("sys/class/net/eth0/upper_bond0").mkdir()
    host.path("sys/class/net/bond0/upper_br0").mkdir(parents=True)
    zero = "0" * 32
    host.put("proc/net/ipv6_route", f"{zero} 00 {zero} 00 fe80{'0' * 28} 00000400 1 0 3 br0")
    with pytest.raises(DeviceInUse, match=r"eth0 \(through br0\)"):
        check_assignable(host, NVME)


def test_the_boot_display(host: Host) -> None:
    host.put(f"sys/bus/pci/devices/{NVME}/boot_vga", "1")
    with pytest.raises(DeviceInUse, match="display"):
        check_assignable(host, NVME)


def test_virtual_functions(host: Host) -> None:
    host.put(f"sys/bus/pci/devices/{NVME}/sriov_numvfs", "4")
    with pytest.raises(DeviceInUse, match="4 virtual functions"):
        check_assignable(host, NVME)


# --- the host


def test_ready(host: Host) -> None:
    check_host(host)


CPU = "vendor_id : {}\nflags : fpu {}"
IVRS = ivrs(ivhd())


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"proc/cpuinfo": CPU.format("GenuineIntel", "vmx")}, "this CPU is GenuineIntel"),
        ({"proc/cpuinfo": CPU.format("AuthenticAMD", "")}, "KVM of this host is not AMD-V: the CPU shows no svm"),
        ({"proc/cpuinfo": CPU.format("AuthenticAMD", ""), "dev/kvm": None}, "AMD-V is absent or off"),
        ({"dev/kvm": None}, "/dev/kvm not found"),
        ({"sys/module/kvm_amd": None}, "not AMD-V: kvm_amd is not loaded"),
        ({"sys/class/iommu/ivhd0": None}, "AMD-Vi is off: the firmware describes no IOMMU"),
        (
            {"sys/class/iommu/ivhd0": None, "sys/firmware/acpi/tables/IVRS": IVRS, "proc/cmdline": "quiet iommu=off"},
            "AMD-Vi is off: iommu=off is on",
        ),
        ({"sys/class/iommu/ivhd0": None, "sys/firmware/acpi/tables/IVRS": IVRS}, "but the kernel does not use it"),
        ({"sys/kernel/irq/9/chip_name": "IO-APIC"}, "interrupt remapping is off"),
        (
            {"sys/kernel/irq/9/chip_name": "", "proc/interrupts": " 9: 0 IO-APIC 9-edge acpi"},
            "interrupt remapping is off",
        ),
        ({"sys/bus/pci/drivers/vfio-pci": None}, "vfio-pci is missing"),
    ],
)
def test_not_ready(host: Host, change: dict[str, str | bytes | None], cause: str) -> None:
    for path, text in change.items():
        if text is None:
            host.path(path).rename(host.root / "away")
        else:
            host.put(path, text)
    with pytest.raises(HostNotReady, match=cause) as caught:
        check_host(host)
    assert caught.value.__notes__
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("node", ["dev/kvm", "dev/vfio/vfio"])
def test_no_permission(host: Host, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr("os.access", lambda path, *_, **__: not str(path).endswith(node))
    with pytest.raises(PermissionError) as caught:
        check_host(host)
    assert caught.value.filename == f"/{node}"
    assert "root" in caught.value.__notes__[0]


def test_no_permission_to_borrow(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    with pytest.raises(PermissionError), library.borrow(NVME, sysfs=host, state_dir=tmp_path / "state"):
        pytest.fail("the block must not run")
    assert host.writes == []
    assert not (tmp_path / "state").exists()


def test_who_may_not_change_drivers_uses_what_is_on_vfio_pci(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    host.add("0000:03:00.0", "vfio-pci", 11)
    state = tmp_path / "state"
    with library.borrow("0000:03:00.0", sysfs=host, state_dir=state) as [device]:
        assert device.driver == "vfio-pci"
    with pytest.raises(PermissionError), library.borrow("0000:03:00.0", NVME, sysfs=host, state_dir=state):
        pytest.fail("the block must not run")
    assert host.writes == []
    assert not state.exists()


# --- the memory


def test_memory(host: Host) -> None:
    check_memory(host, 3 * GIB)
    text = "needs 5120 MiB of memory, with page tables and copies of files; 4096 MiB are available"
    with pytest.raises(NotEnoughMemory, match="needs 4288 MiB of memory"):
        check_memory(host, 4 * GIB)
    check_memory(host, 3 * GIB, overhead=GIB)
    with pytest.raises(NotEnoughMemory, match=text):
        check_memory(host, 3 * GIB, overhead=2 * GIB)
    with pytest.raises(NotEnoughMemory, match=text):
        check_memory(host, 0, overhead=5 * GIB)


def test_memlock(host: Host) -> None:
    host.put("proc/self/limits", f"Max locked memory         {8 << 20}              unlimited            bytes")
    with pytest.raises(
        NotEnoughMemory, match="1024 MiB must be locked in memory, this process may lock 8 MiB"
    ) as caught:
        check_memory(host, GIB)
    assert "ulimit -l 1048576" in caught.value.__notes__[0]
    host.put("proc/self/status", "CapEff:\t000001ffffffffff")
    check_memory(host, GIB)


def test_huge_pages(host: Host) -> None:
    host.put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "512")
    check_memory(host, GIB, huge_page=2 << 20)
    with pytest.raises(NotEnoughMemory, match="2048 KiB pages, 1024 MiB of them are free"):
        check_memory(host, 2 * GIB, huge_page=2 << 20)


# --- the command line


def test_restore_command(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from kvmpass.cli.restore import restore as command

    results: list[library.drivers.restore.Restored] = []
    monkeypatch.setattr(library, "restore", lambda say: results)

    def run() -> tuple[str, object]:
        outcome = CliRunner().invoke(command, standalone_mode=False)
        return outcome.output, outcome.return_value

    assert run() == ("nothing to restore\n", 0)
    results.append(library.drivers.restore.Restored(str(NVME), "restored", "driver nvme"))
    assert run() == ("0000:01:00.0: restored: driver nvme\n", 0)
    results.append(library.drivers.restore.Restored("0000:02:00.0", "failed", "why"))
    assert run() == ("0000:01:00.0: restored: driver nvme\n0000:02:00.0: failed: why\n", 1)


def test_every_refusal_is_one_of_ours() -> None:
    for kind in (BadAddress, NoSuchDevice, NotAssignable, GroupNotViable, DeviceInUse, HostNotReady, NotEnoughMemory):
        assert issubclass(kind, KvmpassError)
