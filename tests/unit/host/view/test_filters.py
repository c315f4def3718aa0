"""What people type for devices, and the names that devices have."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.host_tree import Host

from kvmpass import host as library
from kvmpass.cli import params
from kvmpass.cli.main import main
from kvmpass.errors import NoSuchDevice
from kvmpass.host import Bdf, Names
from kvmpass.host.view.classes import class_name
from kvmpass.host.view.filters import parse_filter, select

PCI_IDS = """\
# a comment
1022  Advanced Micro Devices, Inc. [AMD]
\t1234  Starship [Fast Drive]
\t\t1028 0001  PowerEdge
\t5678  Other
10de  NVIDIA Corporation
\t2204  GA102 [GeForce RTX 3090]
1af4  Red Hat, Inc.
C 01  Mass storage controller
\t08  Non-Volatile memory controller
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.put("usr/share/misc/pci.ids", PCI_IDS)
    host.add("0000:00:01.0", "pcieport", 1, 0x060400)
    host.add("0000:01:00.0", "nvme", 7)
    host.add("0000:01:00.1", "nvme", 7)
    host.add("0000:02:00.0", "nvidia", 8, 0x030000, vendor="0x10de", device="0x2204")
    host.add("0000:03:00.0", "r8169", 9, 0x020000)
    host.add("0000:04:00.0", None, 10, 0x010601)
    host.add_below("0000:01:00.0", "sys/class/block", "nvme0n1")
    host.add_below("0000:03:00.0", "sys/class/net", "eth0")
    host.add_below("0000:04:00.0", "sys/class/block", "sda")
    return host


def found(host: Host, *filters: str) -> list[str]:
    return [str(device.bdf) for device in select(host, filters)]


@pytest.mark.parametrize(
    "text, meaning, bdfs",
    [
        ("0000:01:00.0", "the address 0000:01:00.0", ["0000:01:00.0"]),
        ("01:00.1", "the address 0000:01:00.1", ["0000:01:00.1"]),
        ("01:00", "all functions of slot 0000:01:00", ["0000:01:00.0", "0000:01:00.1"]),
        ("0000:01:00", "all functions of slot 0000:01:00", ["0000:01:00.0", "0000:01:00.1"]),
        ("1:0.1", "device 00, function 1 of bus 01", ["0000:01:00.1"]),
        ("0:1:00.1", "device 00, function 1 of bus 01", ["0000:01:00.1"]),
        ("01.0", "device 01, function 0 of any bus", ["0000:00:01.0"]),
        ("0.1", "device 00, function 1 of any bus", ["0000:01:00.1"]),
        ("10de:2204", "vendor 10de, device 2204", ["0000:02:00.0"]),
        ("10DE:2204", "vendor 10de, device 2204", ["0000:02:00.0"]),
        ("eth0", "the network interface eth0", ["0000:03:00.0"]),
        ("nvme0n1", "the block device nvme0n1", ["0000:01:00.0"]),
        ("nvme", "the driver nvme", ["0000:01:00.0", "0000:01:00.1"]),
        ("0000:01:*", "a pattern", ["0000:01:00.0", "0000:01:00.1"]),
        ("*geforce*", "a pattern", ["0000:02:00.0"]),
        ("10de:*", "a pattern", ["0000:02:00.0"]),
        ("r81*", "a pattern", ["0000:03:00.0"]),
    ],
)
def test_what_a_text_stands_for(host: Host, text: str, meaning: str, bdfs: list[str]) -> None:
    assert parse_filter(host, text, Names(host)).meaning.startswith(meaning)
    assert found(host, text) == bdfs


def test_filters_are_a_union_by_address(host: Host) -> None:
    assert found(host, "eth0", "01:00.0", "01:00") == ["0000:01:00.0", "0000:01:00.1", "0000:03:00.0"]
    assert len(found(host)) == 6, "no filter: all"


def test_nodes_lead_to_their_function(host: Host) -> None:
    host.put("dev/sda1", "")
    real = "sys/devices/pci0000:00/0000:04:00.0/sub/sda/sda1"
    host.put(f"{real}/dev", "8:1")
    host.path("sys/class/block/sda1").symlink_to(host.path(real))
    host.path("dev/disk/by-label").mkdir(parents=True)
    host.path("dev/disk/by-label/home").symlink_to("../../sda1")
    assert found(host, "/dev/sda1") == found(host, "/dev/disk/by-label/home") == ["0000:04:00.0"]
    host.add_below("0000:02:00.0", "sys/dev/char", "226:0", uevent="MAJOR=226\nDEVNAME=dri/card0")
    host.put("dev/dri/card0", "")
    assert found(host, "/dev/dri/card0") == ["0000:02:00.0"]
    host.put("dev/vfio/7", "")
    assert found(host, "/dev/vfio/7") == ["0000:01:00.0", "0000:01:00.1"]


def test_what_lies_on_devices_stands_for_them(host: Host) -> None:
    """A volume over two drives, a bond over an interface; and a namespace that hangs below its subsystem."""
    for slave in ("nvme0n1", "sda"):
        host.put(f"sys/devices/virtual/block/dm-0/slaves/{slave}/size", "1")
    host.path("sys/class/block/dm-0").symlink_to(host.path("sys/devices/virtual/block/dm-0"))
    assert found(host, "dm-0") == ["0000:01:00.0", "0000:04:00.0"]
    host.put("sys/devices/virtual/net/bond0/lower_eth0/mtu", "1500")
    host.path("sys/class/net/bond0").symlink_to(host.path("sys/devices/virtual/net/bond0"))
    assert found(host, "bond0") == ["0000:03:00.0"]
    host.add_below("0000:01:00.1", "sys/class/nvme", "nvme1")
    shared = "sys/devices/virtual/nvme-subsystem/nvme-subsys1"
    host.put(f"{shared}/nvme1n1/size", "1")
    host.path(f"{shared}/nvme1").symlink_to(host.path("sys/class/nvme/nvme1").resolve())
    host.path("sys/class/nvme-subsystem").mkdir()
    host.path("sys/class/nvme-subsystem/nvme-subsys1").symlink_to(host.path(shared))
    host.path("sys/class/block/nvme1n1").symlink_to(host.path(f"{shared}/nvme1n1"))
    assert found(host, "nvme1n1") == ["0000:01:00.1"]


@pytest.mark.parametrize(
    "text, taken_for",
    [
        ("0000:09:00.0", "interpreted as the address 0000:09:00.0"),
        ("09:00", "interpreted as all functions of slot 0000:09:00"),
        ("1:1:00.1", "interpreted as device 00, function 1 of bus 01"),
        ("1f.7", "interpreted as device 1f, function 7 of any bus"),
        ("2f.0", "interpreted as a driver"),
        ("8086:1234", "interpreted as vendor 8086, device 1234"),
        ("/dev/null", "interpreted as the device node /dev/null, which is not on a PCI device"),
        ("br0", "interpreted as the network interface br0, which is not on a PCI device"),
        ("e1000e", "interpreted as the driver e1000e"),
        ("wlan7", "interpreted as a driver: no network interface"),
        ("*nothing*", "interpreted as a pattern"),
        ("", "interpreted as a driver"),
        ("../block", "interpreted as a driver"),
        ("0000:01", "interpreted as a driver"),
    ],
)
def test_a_filter_that_selects_nothing_says_what_it_was_taken_for(host: Host, text: str, taken_for: str) -> None:
    host.path("sys/class/net/br0").mkdir()
    host.add_driver("e1000e")
    with pytest.raises(NoSuchDevice, match=taken_for) as caught:
        select(host, ["eth0", text])
    assert repr(text) in str(caught.value)
    assert "10de:2204" in caught.value.__notes__[0]


def test_names(host: Host) -> None:
    names = Names(host)

    def of(bdf: str) -> tuple[str, str, str | None]:
        device = host.device(Bdf.parse(bdf))
        return names.of(device), names.short(device), names.subsystem(device)

    host.add("0000:05:00.0", vendor="0x1022", device="0x1234", subsystem_vendor="0x1028", subsystem_device="0x0001")
    host.add("0000:06:00.0", vendor="0x1af4", device="0x1234")
    host.add("0000:07:00.0", vendor="0xabcd", device="0x1234")
    full = "Advanced Micro Devices, Inc. [AMD] Starship [Fast Drive]"
    assert of("0000:05:00.0") == (full, "AMD Starship [Fast Drive]", "PowerEdge")
    assert of("0000:02:00.0")[1] == "NVIDIA GA102 [GeForce RTX 3090]"
    assert of("0000:06:00.0") == ("Red Hat, Inc. device 1234", "Red Hat device 1234", None)
    assert of("0000:07:00.0") == ("abcd:1234", "abcd:1234", None)


def test_without_a_database_names_are_numbers(tmp_path: Path) -> None:
    bare = Host(tmp_path)
    bare.add("0000:01:00.0")
    assert Names(bare).of(bare.device(Bdf.parse("01:00.0"))) == "1022:1234"


def test_class_name() -> None:
    assert [class_name(code) for code in (0x010802, 0x0C0330, 0x038000, 0x060400)] == [
        "NVMe",
        "USB",
        "display",
        "PCI bridge",
    ]
    assert class_name(0x770100) == "class 7701"


# --- arguments of commands


@pytest.fixture
def taking(host: Host, monkeypatch: pytest.MonkeyPatch) -> click.Command:
    monkeypatch.setattr(library, "Sysfs", lambda: host)

    @click.command()
    @click.argument("bdf", nargs=-1, type=params.BDF)
    def take(bdf: tuple[Bdf, ...]) -> None:
        click.echo(" ".join(map(str, bdf)))

    return take


def test_an_exact_address(taking: click.Command) -> None:
    assert CliRunner().invoke(taking, ["01:00.0", "0000:09:00.0"]).output == "0000:01:00.0 0000:09:00.0\n"


@pytest.mark.parametrize(
    "text, hint",
    [
        ("eth0", "eth0 matches: 0000:03:00.0"),
        ("01:00", "01:00 matches: 0000:01:00.0 0000:01:00.1"),
        ("01.0", "01.0 matches: 0000:00:01.0"),
        ("0.1", "0.1 matches: 0000:01:00.1"),
        ("1f.7", "kvmpass list shows"),
        ("*", "0000:01:00.1 0000:02:00.0 …"),
        ("zz:zz", "kvmpass list shows"),
    ],
)
def test_what_is_no_exact_address_is_wrong_usage(taking: click.Command, text: str, hint: str) -> None:
    result = CliRunner().invoke(taking, [text])
    error = result.exception
    assert isinstance(error, params.WrongDevice) and error.exit_code == 2
    assert str(error).startswith(f"{text!r} is not a PCI address")
    assert hint in "\n".join(error.__notes__)


@pytest.mark.parametrize("command", ["assign", "bind", "doctor", "plan", "show", "unbind"])
def test_each_command_offers_the_address_in_full(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    with pytest.raises(SystemExit) as ended:
        main([command, "03:00"])
    assert ended.value.code == (125 if command == "assign" else 2)
    assert "03:00 matches: 0000:03:00.0" in capsys.readouterr().err


def test_an_address_is_looked_for_on_the_recorded_host(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.add("ffff:05:02.0", None, 11)
    for words in (["show", "02.0", "--sysfs", str(host.root)], ["plan", "--sysfs", str(host.root), "02.0"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "02.0 matches: ffff:05:02.0" in capsys.readouterr().err


def test_completion_gives_addresses_with_names(taking: click.Command) -> None:
    context = click.Context(taking)
    context.params["bdf"] = (Bdf.parse("0000:01:00.1"),)
    items = params.BDF.shell_complete(context, taking.params[0], "0000:0")
    assert [item.value for item in items] == [
        "0000:00:01.0",
        "0000:01:00.0",
        "0000:02:00.0",
        "0000:03:00.0",
        "0000:04:00.0",
    ]
    assert items[2].help == "VGA: NVIDIA GA102 [GeForce RTX 3090]"
    assert [item.value for item in params.BDF.shell_complete(context, taking.params[0], "01:")] == ["01:00.0"]
    drivers = params.complete_filter(context, taking.params[0], "nv")
    assert [item.value for item in drivers] == ["nvidia", "nvme"]
