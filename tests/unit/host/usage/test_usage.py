"""What the host does with a device where no disk below it tells: who refuses, who asks for --force, who says no."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import DeviceInUse
from kvmpass.host import Bdf, Look, Sysfs, bind, check_assignable, describe
from kvmpass.host.blockers import blockers
from kvmpass.host.blockers.use import borrowers
from kvmpass.host.drivers.journal import Entry, boot_id
from kvmpass.host.kernel import processes
from kvmpass.host.kernel.processes import sockets_of, start_time
from kvmpass.host.usage.kernel import PROTOCOL

BDF = Bdf(0, 1, 0, 0)
DEVICE = f"sys/bus/pci/devices/{BDF}"
REAL = f"sys/devices/pci0000:00/{BDF}"
ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"
TCP = "  sl  local_address rem_address   st tx_queue\n"
MOUNT = "30 1 {} / {} rw,relatime shared:1 - {} {} {}"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def add(host: Host, driver: str | None, class_code: int) -> None:
    host.add(str(BDF), driver, 7, class_code)


def answer(host: Host) -> tuple[list[str], str]:
    """What blocks, and why."""
    found = list(blockers(host, host.device(BDF)))
    return [blocker.kind for blocker in found], "; ".join(blocker.cause for blocker in found)


def forced(host: Host, tmp_path: Path) -> bool:
    """Whether ``bind --force`` would take it."""
    try:
        bind([BDF], force=True, dry_run=True, sysfs=host, state_dir=tmp_path / "state")
    except DeviceInUse:
        return False
    return True


# --- storage


@pytest.mark.parametrize("class_code", [0x010400, 0x010802, 0x010601])
def test_members_of_an_array_that_is_shown_elsewhere(host: Host, tmp_path: Path, class_code: int) -> None:
    """AMD-RAID: its driver has the drives, and shows what it makes of them below no PCI function."""
    add(host, "rcbottom", class_code)
    host.path("sys/devices/virtual/scsi/host9").mkdir(parents=True)
    kinds, cause = answer(host)
    assert kinds == ["use-unknown"]
    assert "its driver, rcbottom, shows no disk" in cause
    with pytest.raises(DeviceInUse, match="it is unknown whether") as refused:
        check_assignable(host, BDF)
    assert "kvmpass bind --force 0000:01:00.0" in refused.value.__notes__[0]
    assert forced(host, tmp_path)
    found = describe(host, BDF)
    assert (found.uses, len(found.possible_uses)) == ((), 1)


@pytest.mark.parametrize(
    ("driver", "below"),
    [("ahci", None), ("nvme", None), ("mpi3mr", "scsi_host"), ("newdrv", "ata_port"), (None, None), ("pata_x", None)],
)
def test_a_controller_without_disks_is_idle(host: Host, driver: str | None, below: str | None) -> None:
    add(host, driver, 0x010601)
    if below:
        host.add_below(str(BDF), f"sys/class/{below}", "host3")
    assert answer(host) == ([], "")
    assert describe(host, BDF).possible_uses == ()


def test_a_member_of_a_btrfs(host: Host) -> None:
    """One member is among the mounts, the others are not."""
    add(host, "nvme", 0x010802)
    host.add_below(str(BDF), "sys/class/block", "nvme1n1", dev="259:4")
    host.put("proc/self/mountinfo", MOUNT.format("0:40", "/data", "btrfs", "/dev/nvme0n1", "rw"))
    assert answer(host)[0] == []
    host.path("sys/fs/btrfs/some-uuid/devices/nvme1n1").mkdir(parents=True)
    assert "/dev/nvme1n1 belongs to a mounted btrfs" in answer(host)[1]


def test_a_mount_that_only_another_namespace_has(host: Host) -> None:
    add(host, "nvme", 0x010802)
    host.add_below(str(BDF), "sys/class/block", "nvme1n1", dev="259:4")
    host._symlink("proc/self/ns/mnt", "/mnt:[1]")
    host.process(41, "bash")
    host._symlink("proc/41/ns/mnt", "/mnt:[1]")
    host.process(42, "containerd")
    host._symlink("proc/42/ns/mnt", "/mnt:[2]")
    host.put("proc/42/mountinfo", MOUNT.format("259:4", "/in\\040it", "ext4", "/dev/nvme1n1", "rw"))
    assert "/dev/nvme1n1 is mounted at /in it for process 42 (containerd)" in answer(host)[1]


# --- file systems that are a device


def virtio(host: Host, driver: str, **files: str) -> None:
    add(host, "virtio-pci", 0x000200)
    real = f"{REAL}/virtio3"
    for name, text in {"status": "0x7", **files}.items():
        host.put(f"{real}/{name}", text)
    host._symlink("sys/bus/virtio/devices/virtio3", real)
    host.path("sys/bus/virtio/drivers", driver).mkdir(parents=True)
    host._symlink(f"{real}/driver", f"sys/bus/virtio/drivers/{driver}")


def test_a_mounted_9p(host: Host, tmp_path: Path) -> None:
    virtio(host, "9pnet_virtio", mount_tag="home\0")
    host.put("proc/self/mountinfo", MOUNT.format("0:41", "/x", "9p", "other", "rw,trans=virtio"))
    assert answer(host)[0] == []
    host.put("proc/self/mountinfo", MOUNT.format("0:40", "/home/a", "9p", "home", "rw,trans=virtio"))
    kinds, cause = answer(host)
    assert kinds == ["mounted"]
    assert "its 9p (home) is mounted at /home/a; unbinding its driver would block" in cause
    assert not forced(host, tmp_path)


def test_a_9p_over_tcp_is_no_device(host: Host) -> None:
    virtio(host, "9pnet_virtio", mount_tag="home")
    host.put("proc/self/mountinfo", MOUNT.format("0:40", "/home/a", "9p", "home", "rw,trans=tcp"))
    assert answer(host)[0] == []


def test_a_9p_below_an_overlay(host: Host) -> None:
    """As in the emulated host itself: its root is the upper part of one whose lower part nobody sees."""
    virtio(host, "9pnet_virtio", mount_tag="root")
    host.put("proc/self/mountinfo", MOUNT.format("0:26", "/", "overlay", "overlay", "rw,lowerdir=/ro"))
    host.path("sys/class/bdi/9p-1").mkdir(parents=True)
    assert "a 9p is mounted where it is not visible, probably its own (root)" in answer(host)[1]
    host.put("proc/self/mountinfo", MOUNT.format("0:27", "/x", "9p", "other", "rw,trans=virtio"))
    assert answer(host)[0] == []


@pytest.mark.parametrize(
    ("tags", "source", "expected"),
    [
        (True, "share", "its virtio-fs (share) is mounted at /s;"),
        (True, "other", ""),
        (False, "other", "probably"),
    ],
)
def test_a_mounted_virtio_fs(host: Host, tmp_path: Path, tags: bool, source: str, expected: str) -> None:
    virtio(host, "virtiofs")
    if tags:
        host.put("sys/fs/virtiofs/2/tag", "share")
        host._symlink("sys/fs/virtiofs/2/device", f"{REAL}/virtio3")
    host.put("proc/self/mountinfo", MOUNT.format("0:50", "/s", "virtiofs", source, "rw"))
    kinds, cause = answer(host)
    assert (kinds, expected in cause) == (["mounted"] if expected else [], True)
    assert forced(host, tmp_path) is not bool(expected)


def test_flash_memory(host: Host) -> None:
    add(host, "intel-spi", 0x050100)
    host.add_below(str(BDF), "sys/class/mtd", "mtd4")
    host.put("proc/self/mountinfo", MOUNT.format("31:4", "/flash", "jffs2", "mtd4", "rw"))
    assert "mtd4 is mounted at /flash" in answer(host)[1]
    host.put("proc/self/mountinfo", "")
    assert answer(host)[0] == []
    host.put("sys/class/ubi/ubi0/mtd_num", "4")
    assert "mtd4 is held by ubi0" in answer(host)[1]


# --- network


def nic(host: Host, *names: str) -> None:
    add(host, "igb", 0x020000)
    for name in names:
        host.add_below(str(BDF), "sys/class/net", name)


@pytest.mark.parametrize(
    ("master", "expected"),
    [("bridge", "eth1 is a port of the bridge m0"), ("bonding", "is a port of the bond m0"), ("", "port of m0")],
)
def test_a_port_of_something(host: Host, tmp_path: Path, master: str, expected: str) -> None:
    nic(host, "eth1")
    host.path("sys/class/net/m0", master).mkdir(parents=True)
    host._symlink("sys/class/net/eth1/master", "sys/class/net/m0")
    kinds, cause = answer(host)
    assert (kinds, expected in cause) == (["in-use"], True)
    assert forced(host, tmp_path)


def test_a_vlan(host: Host) -> None:
    nic(host, "eth1")
    host.path("sys/class/net/eth1/upper_eth1.10").mkdir()
    host.path("sys/class/net/eth1.10").mkdir()
    assert "eth1 carries the interface eth1.10" in answer(host)[1]


MAPPED = "0" * 16 + "FFFF0000"
CONNECTED = "eth1\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"  # 192.168.2.0/24
NEARER = "eth2\t8002A8C0\t00000000\t0001\t0\t0\t0\tC0FFFFFF\t0\n"  # 192.168.2.128/26


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tcp": "0: 0102A8C0:0016 0502A8C0:C000 01 0"}, "192.168.2.5"),
        ({"tcp": "0: 0102A8C0:0016 0502A8C0:C000 06 0"}, ""),  # TIME_WAIT
        ({"tcp": "0: 0102A8C0:0016 0102A8C0:C000 01 0"}, ""),  # with itself
        ({"tcp": "0: 0102A8C0:0016 8502A8C0:C000 01 0"}, ""),  # through the other card
        ({"tcp": "0: 0102A8C0:0016 05000A0A:C000 01 0"}, ""),  # no way there
        ({"udp": "0: 0102A8C0:0016 0502A8C0:C000 01 0"}, "192.168.2.5"),
        ({"tcp6": f"0: {MAPPED}0102A8C0:16 {MAPPED}0502A8C0:C000 01 0"}, "192.168.2.5"),
        ({"tcp6": f"0: 000080FE{'0' * 23}1:16 0000000DB80D0120:zz 01 0"}, ""),
        ({"tcp6": f"0: 000080FE{'0' * 16}01000000:16 000080FE{'0' * 16}02000000:17 01 0"}, ""),  # on every link
        ({"udp": "0: 0102A8C0:0016 FB0000E0:14E9 01 0"}, ""),  # multicast
    ],
)
def test_a_connection_through_a_connected_route(host: Host, files: dict[str, str], expected: str) -> None:
    nic(host, "eth1")
    host.put("proc/net/route", ROUTE + CONNECTED + NEARER + "eth1\t000000E0\t0\t1\t0\t0\t0\t000000F0\t0\n")
    host.put("proc/net/ipv6_route", f"fe80{'0' * 28} 40 {'0' * 32} 00 {'0' * 32} 00000100 1 0 1 eth1")
    for name, line in files.items():
        host.put(f"proc/net/{name}", f"{TCP}{line}\n")
    kinds, cause = answer(host)
    assert kinds == (["in-use"] if expected else [])
    assert f"eth1 carries connections to {expected}" in cause if expected else not cause


def test_a_connection_over_ipv6_and_a_bridge(host: Host) -> None:
    nic(host, "eth1")
    host.path("sys/class/net/eth1/upper_br0").mkdir()
    host.path("sys/class/net/br0/bridge").mkdir(parents=True)
    zero = "0" * 32
    route = f"20010db8{'0' * 24} 20 {zero} 00 {zero} 00000100 1 0 1 br0"
    host.put("proc/net/ipv6_route", route)
    host.put("proc/net/tcp6", f"{TCP}0: B80D0120{'0' * 16}01000000:16 B80D0120{'0' * 16}02000000:C000 01 0")
    assert "eth1 carries connections to 2001:db8::2" in answer(host)[1]


@pytest.mark.parametrize("options", ["rw,vers=4.2,addr=192.168.2.9", "ro,addr=192.168.2.9,proto=tcp"])
def test_a_network_file_system(host: Host, options: str) -> None:
    nic(host, "eth1")
    host.put("proc/net/route", ROUTE + CONNECTED)
    host.put("proc/self/mountinfo", MOUNT.format("0:60", "/n", "nfs4", "server:/export", options))
    assert "eth1 carries connections to 192.168.2.9" in answer(host)[1]


def test_nvme_over_tcp(host: Host) -> None:
    nic(host, "eth1")
    host.put("proc/net/route", ROUTE + CONNECTED)
    host.put("sys/class/nvme/nvme5/transport", "tcp")
    host.put("sys/class/nvme/nvme5/address", "traddr=192.168.2.77,trsvcid=4420")
    assert "eth1 carries connections to 192.168.2.77" in answer(host)[1]


def test_a_route_that_nobody_is_seen_to_use(host: Host) -> None:
    """Not refused, and not said to be idle."""
    nic(host, "eth1")
    host.put("proc/net/route", ROUTE + CONNECTED + "eth1\t0000FEA9\t0\t1\t0\t0\t0\t0000FFFF\t0")
    assert answer(host)[0] == []
    assert describe(host, BDF).possible_uses == ("eth1 reaches 192.168.2.0/24: datagrams leave no trace",)


def test_an_interface_in_another_namespace(host: Host, tmp_path: Path) -> None:
    nic(host)
    assert answer(host)[0] == [], "no other namespace, no interface: nobody"
    host._symlink("proc/self/ns/net", "/net:[1]")
    head = "Inter-|\n face |\n"
    for pid, names in ((50, ["lo"]), (51, ["lo", "eth1"])):
        host.process(pid, "box")
        host._symlink(f"proc/{pid}/ns/net", f"/net:[{pid}]")
        host.put(f"proc/{pid}/net/dev", head + "\n".join(f"  {name}: 0" for name in names))
        kinds, cause = answer(host)
        assert kinds == (["use-unknown"] if pid == 51 else [])
    assert "shows no interface here, and other network namespaces have some (eth1 of process 51 (box))" in cause
    assert forced(host, tmp_path)


def test_a_namespace_without_a_process(host: Host) -> None:
    nic(host)
    host.put("run/netns/blue", "")
    assert "other network namespaces have some (those of blue)" in answer(host)[1]


# --- consoles

KEYBOARD = 'I: Bus=0003\nN: Name="Keys"\nS: Sysfs=/devices/{}/usb1/input/input4\nH: Handlers={}\nB: EV=120013\n{}'
LETTERS = "B: KEY=1000000000007 ff800000000007ff febeffdff3cfffff fffffffffffffffe\n"


@pytest.mark.parametrize(
    ("place", "handlers", "keys", "used"),
    [
        (f"pci0000:00/{BDF}", "sysrq kbd leds event3", LETTERS, True),
        (f"pci0000:00/{BDF}", "kbd event3", "", True),
        (f"pci0000:00/{BDF}", "kbd event3", "B: KEY=10000000000000 0\n", False),  # a power button
        (f"pci0000:00/{BDF}", "event3 mouse0", LETTERS, False),
        ("pci0000:00/0000:02:00.0", "sysrq kbd leds event3", LETTERS, False),
    ],
)
def test_a_keyboard_that_the_console_reads(host: Host, place: str, handlers: str, keys: str, used: bool) -> None:
    add(host, "xhci_hcd", 0x0C0330)
    other = KEYBOARD.format("platform/i8042", "sysrq kbd", LETTERS)
    host.put("proc/bus/input/devices", f"{other}\n{KEYBOARD.format(place, handlers, keys)}\n")
    kinds, cause = answer(host)
    assert (kinds, "the console reads the keyboard Keys" in cause) == (["in-use"] if used else [], used)


def test_a_serial_console(host: Host) -> None:
    add(host, "8250_exar", 0x070002)
    host.add_below(str(BDF), "sys/class/tty", "ttyS4")
    host.put("proc/consoles", "ttyS0                -W- (EC    a)    4:64\n")
    assert answer(host)[0] == []
    host.put("proc/consoles", "ttyS4                -W- (EC    a)    4:68\n")
    assert "the kernel's console is on ttyS4" in answer(host)[1]


def test_a_virtio_console(host: Host) -> None:
    virtio(host, "virtio_console")
    host.put("sys/class/tty/console/active", "tty0")
    assert answer(host)[0] == []
    host.put("sys/class/tty/console/active", "tty0 hvc0")
    assert "the kernel's console is on hvc0" in answer(host)[1]


def test_a_text_console_on_a_second_display(host: Host) -> None:
    add(host, "amdgpu", 0x030000)
    host.add_below(str(BDF), "sys/class/graphics", "fb0")
    host.put("sys/class/vtconsole/vtcon1/name", "(M) frame buffer device")
    host.put("sys/class/vtconsole/vtcon1/bind", "0")
    assert answer(host)[0] == []
    host.put("sys/class/vtconsole/vtcon1/bind", "1")
    assert "the text console is on it (fb0)" in answer(host)[1]


# --- nodes


@pytest.mark.parametrize(
    ("driver", "class_code", "name", "words"),
    [
        ("amdgpu", 0x030000, "dri/renderD128", "/dev/dri/renderD128 is open in process 77 (app) (GPU)"),
        ("snd_hda_intel", 0x040300, "snd/controlC1", "/dev/snd/controlC1 is open in process 77 (app) (sound)"),
        ("xhci_hcd", 0x0C0330, "input/event5", "/dev/input/event5 is open in process 77 (app) (input)"),
        ("xhci_hcd", 0x0C0330, "bus/usb/001/004", "(USB)"),
        ("sp5100", 0x088000, "watchdog1", "/dev/watchdog1 is open in process 77 (app)"),
    ],
)
def test_an_open_node(host: Host, driver: str, class_code: int, name: str, words: str) -> None:
    add(host, driver, class_code)
    host.add_below(str(BDF), "sys/dev/char", "240:9", uevent=f"MAJOR=240\nDEVNAME={name}")
    assert answer(host)[0] == []
    host.process(77, "app", nodes=(f"/dev/{name}",))
    kinds, cause = answer(host)
    assert (kinds, words in cause) == (["in-use"], True)


def test_a_client_of_the_proprietary_driver(host: Host) -> None:
    """Its nodes are not in sysfs."""
    add(host, "nvidia", 0x030000)
    host.put(f"proc/driver/nvidia/gpus/{BDF}/information", "Model: \t Some\nDevice Minor: \t 2\n")
    host.process(77, "other", nodes=("/dev/nvidia1",))
    assert answer(host)[0] == []
    host.process(78, "train", nodes=("/dev/nvidia2", "/dev/nvidiactl"))
    assert "/dev/nvidia2 is open in process 78 (train) (GPU)" in answer(host)[1]


def test_a_driver_in_user_space(host: Host) -> None:
    host.add(str(BDF), None, 7, 0x020000, resource0="")
    host.process(77, "dpdk", nodes=(f"/{REAL}/resource0",))
    assert f"/{REAL}/resource0 is open in process 77 (dpdk)" in answer(host)[1]


# --- the kernel


def test_dma_channels(host: Host) -> None:
    add(host, "ptdma", 0x108000)
    host.add_below(str(BDF), "sys/class/dma", "dma0chan0", in_use="0")
    assert answer(host)[0] == []
    host.put("sys/class/dma/dma0chan0/in_use", "1")
    assert "the kernel uses its DMA channel dma0chan0" in answer(host)[1]


def test_vsock_leaves_no_trace_in_a_tree(host: Host, tmp_path: Path) -> None:
    virtio(host, "vmw_vsock_virtio_transport")
    kinds, cause = answer(host)
    assert (kinds, "sockets over vsock may be open" in cause) == (["use-unknown"], True)
    assert forced(host, tmp_path)


def test_memory_that_the_kernel_has(host: Host) -> None:
    virtio(host, "virtio_mem")
    child = "  140000000-17fffffff : System RAM (virtio_mem)"
    host.put("proc/iomem", f"140000000-1ffffffff : virtio7\n{child}\n200000000-2ffffffff : virtio3")
    assert answer(host)[0] == []
    host.put("proc/iomem", f"140000000-1ffffffff : virtio3\n{child}")
    assert "its memory is in use by the kernel (virtio-mem)" in answer(host)[1]


def test_cxl_memory(host: Host) -> None:
    add(host, "cxl_pci", 0x050210)
    assert answer(host)[0] == ["use-unknown"]


@pytest.mark.parametrize(("name", "used"), [("0-0", False), ("domain0", False), ("0-0:1.1", False), ("0-301", True)])
def test_thunderbolt(host: Host, name: str, used: bool) -> None:
    add(host, "thunderbolt", 0x0C0340)
    host.add_below(str(BDF), "sys/bus/thunderbolt/devices", name)
    assert answer(host)[0] == (["in-use"] if used else [])


@pytest.mark.parametrize(("driver", "unseen"), [("ccp", 1), (None, 0), ("vfio-pci", 0), ("pci-stub", 0)])
def test_what_a_driver_does_for_the_kernel(host: Host, driver: str | None, unseen: int) -> None:
    """Not refused, and not said to be idle."""
    add(host, driver, 0x108000)
    assert answer(host)[0] == []
    found = describe(host, BDF).possible_uses
    assert len(found) == unseen
    assert all("what ccp does for the kernel leaves no trace" in text for text in found)


@pytest.mark.parametrize(("driver", "unseen"), [("virtio_balloon", 1), ("virtiofs", 0), ("virtio_rng", 1)])
def test_of_a_virtio_function_its_own_driver_is_named(host: Host, driver: str, unseen: int) -> None:
    virtio(host, driver)
    assert describe(host, BDF).possible_uses == (f"what {driver} does for the kernel leaves no trace",) * unseen


def test_nothing_is_added_where_a_use_is_seen(host: Host) -> None:
    nic(host, "eth1")
    host.put("proc/net/route", ROUTE + CONNECTED + "eth1\t00000000\t0102A8C0\t3\t0\t0\t0\t00000000\t0\n")
    found = describe(host, BDF)
    assert (found.uses, found.possible_uses) == (("the default route goes through eth1",), ())


def test_each_socket_is_asked_for_its_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, as root asks for AF_VSOCK."""
    own = os.getpid()
    names = Sysfs.names
    monkeypatch.setattr(Sysfs, "names", lambda self, *p: names(self, *p) if len(p) > 1 else [str(own)])
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        protocol = os.getxattr(f"/proc/self/fd/{one.fileno()}", "system.sockprotoname").rstrip(b"\0").decode()
        assert own in [process.pid for process in sockets_of(Sysfs(), protocol)]
        assert sockets_of(Sysfs(), PROTOCOL) == []
    assert processes.process(Sysfs(), own).pid == own
    try:
        vsock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError:
        pytest.skip("this kernel has no AF_VSOCK")
    with vsock:
        assert own in [process.pid for process in sockets_of(Sysfs(), PROTOCOL)]


def test_what_is_borrowed_is_known_before_a_node_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path))
    this, own = Sysfs(), os.getpid()
    started = start_time(this, own)
    assert started is not None
    (tmp_path / "journal").mkdir()
    for bdf, pid, ticks in (("00:1e.1", own, started), ("00:1e.2", own, started - 1), ("00:1e.3", 1 << 22, started)):
        address = Bdf.parse(bdf)
        entry = Entry(address, boot_id(this), pid, ticks, "me", None, None, None, None)
        (tmp_path / f"journal/{address}.json").write_text(entry.to_json())
    (tmp_path / "journal/0000:00:1e.4.json").write_text("{")
    (tmp_path / "journal/notes.json").write_text("{}")
    assert borrowers(Look(this)) == {Bdf(0, 0, 0x1E, 1): processes.Process(own, "me")}
    assert borrowers(Look(Host(tmp_path / "tree"))) == {}
