"""Whole boards: what of them can be assigned, and that nothing is refused that need not be."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.host.view.inventory import inventory

ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
KEYBOARD = """I: Bus=0003
N: Name="Keys"
S: Sysfs=/devices/pci0000:00/0000:02:00.0/usb1/1-4/input/input4
H: Handlers=sysrq kbd leds event3
B: KEY=1000000000007 ff800000000007ff febeffdff3cfffff fffffffffffffffe
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def verdicts(host: Host) -> dict[str, str]:
    """The first reason against each device that is no bridge, by the address without domain 0."""
    found = {}
    for status in inventory(host).devices:
        kinds = [blocker.kind for blocker in status.blockers]
        if kinds[:1] != ["bridge"]:
            found[str(status.device.bdf).removeprefix("0000:")] = kinds[0] if kinds else ""
    return found


def test_a_desktop_board(host: Host) -> None:
    """As a B550 board has it: idle SATA in the chipset, two USB controllers, the root on a drive, two displays."""
    host.add("0000:00:00.2", class_code=0x080600)
    host.add("0000:00:01.1", "pcieport", 0, 0x060400)
    host.add("0000:00:14.0", "piix4_smbus", 10, 0x0C0500)
    host.add("0000:00:14.3", None, 10, 0x060100)
    host.add("0000:01:00.0", "nvme", 11, 0x010802)
    host.add_below("0000:01:00.0", "sys/class/block", "nvme0n1p2", dev="259:2")
    host.put("proc/self/mountinfo", "30 1 259:2 / / rw shared:1 - ext4 /dev/nvme0n1p2 rw")
    host.add("0000:02:00.0", "xhci_hcd", 12, 0x0C0330)
    host.add("0000:02:00.1", "ahci", 12, 0x010601)
    host.put("proc/bus/input/devices", KEYBOARD)
    host.add("0000:03:00.0", "r8169", 13, 0x020000)
    host.add_below("0000:03:00.0", "sys/class/net", "enp3s0")
    host.put("proc/net/route", ROUTE + "enp3s0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000")
    host.put("proc/net/tcp", "  sl  local\n   0: 0200000A:0016 0100007F:C000 01 0")
    host.add("0000:04:00.0", "iwlwifi", 14, 0x028000)
    host.add_below("0000:04:00.0", "sys/class/net", "wlp4s0")
    host.add("0000:05:00.0", "amdgpu", 15, 0x030000, boot_vga="1")
    host.add("0000:05:00.1", "snd_hda_intel", 15, 0x040300)
    host.add("0000:06:00.0", "nouveau", 16, 0x030000, boot_vga="0")
    host.add("0000:06:00.1", "snd_hda_intel", 17, 0x040300)
    host.add_below("0000:05:00.0", "sys/class/graphics", "fb0")
    host.add_below("0000:06:00.0", "sys/class/graphics", "fb1")
    host.put("sys/class/vtconsole/vtcon1/name", "(M) frame buffer device")
    host.put("sys/class/vtconsole/vtcon1/bind", "1")
    host.add("0000:07:00.1", "ccp", 18, 0x108000)
    host.add("0000:07:00.3", "xhci_hcd", 19, 0x0C0330)
    host.add("0000:07:00.4", "snd_hda_intel", 20, 0x040300)
    host.add_below("0000:06:00.0", "sys/dev/char", "226:1", uevent="DEVNAME=dri/card1")
    host.process(700, "Xorg", nodes=("/dev/dri/card0", "/dev/input/event3"))
    assert verdicts(host) == {
        "00:00.2": "no-group",
        "00:14.0": "",
        "01:00.0": "in-use",
        "02:00.0": "group-not-viable",
        "02:00.1": "group-not-viable",
        "03:00.0": "in-use",
        "04:00.0": "",
        "05:00.0": "group-not-viable",
        "05:00.1": "group-not-viable",
        "06:00.0": "",
        "06:00.1": "",
        "07:00.1": "",
        "07:00.3": "",
        "07:00.4": "",
    }


def test_a_router_board(host: Host) -> None:
    """As an apu2 has it: root ports and cards in one group, whose drivers are unbound but for one."""
    for number in range(1, 6):
        host.add(f"0000:00:02.{number}", "pcieport", 1, 0x060400)
    for number in range(1, 5):
        bdf = f"0000:0{number}:00.0"
        host.add(bdf, "igb" if number == 4 else None, 1, 0x020000, above=f"0000:00:02.{number}")
    assert verdicts(host) == {
        "01:00.0": "group-not-viable",
        "02:00.0": "group-not-viable",
        "03:00.0": "group-not-viable",
        "04:00.0": "",
    }


def test_drives_behind_another_domain(host: Host) -> None:
    """As VMD makes one: its own function carries what is below it, and each drive stands for itself."""
    host.add("0000:00:0e.0", "vmd", 5, 0x010400)
    host.add("10000:01:00.0", "nvme", 6, 0x010802, above="0000:00:0e.0/pci10000:00/10000:00:02.0")
    real = "sys/devices/pci0000:00/0000:00:0e.0/pci10000:00/10000:00:02.0/10000:01:00.0/nvme/nvme3/nvme3n1"
    host.put(f"{real}/dev", "259:9")
    host._symlink("sys/class/block/nvme3n1", real)
    assert verdicts(host) == {"00:0e.0": "", "10000:01:00.0": ""}
    host.put("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme3n1 partition 1 0 -2")
    assert verdicts(host) == {"00:0e.0": "in-use", "10000:01:00.0": "in-use"}
