"""A host in a file: what was recorded gives the same answers, and what a stranger made does no harm."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.host_tree import Host, ivhd, ivmd, ivrs

from kvmpass.assignment.backing import choose_backing
from kvmpass.assignment.plan import plan
from kvmpass.cli import doctor as doctor_module
from kvmpass.cli.doctor import doctor, look_at_device, look_at_host
from kvmpass.cli.list import list as list_command
from kvmpass.cli.plan import plan as plan_command
from kvmpass.cli.show import show
from kvmpass.errors import KvmpassError
from kvmpass.host import Bdf, Sysfs, describe, diagnose
from kvmpass.host.record import open_recorded
from kvmpass.host.record.anonymity import Anonymity
from kvmpass.host.record.recorded import MANIFEST, BadRecord
from kvmpass.host.record.recording import Recorder, record
from kvmpass.host.view.inventory import inventory

NVME, NIC, GPU = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
IVRS = "sys/firmware/acpi/tables/IVRS"
COMMANDS_BY_NAME = {"list": list_command, "doctor": doctor, "show": show, "plan": plan_command}
MAC = "d8:5e:d3:01:02:03"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with a drive that is mounted, a card that has the default route, a card that a process has open."""
    host = Host(tmp_path / "host")
    header = b"\x22\x10\x34\x12" + bytes(60)
    serial = (0x0003 | 1 << 16).to_bytes(4, "little") + bytes(range(0xA0, 0xA8))
    host.add(NVME, "nvme", 7, config=header + bytes(0xC0) + serial + bytes(20))
    host.add(NIC, "igb", 8, 0x020000, config=header)
    host.add(GPU, "vfio-pci", 9, 0x030000, above="0000:00:01.0", config=header)
    host.add("0000:04:00.0", "xhci_hcd", 10, 0x0C0330, power_state="D3cold", power__runtime_status="suspended")
    host.add_below(NVME, "sys/class/block", "nvme0n1", dev="259:0", serial="S5H9NS0N")
    host.add_below(NIC, "sys/class/net", "enxd85ed3010203", address=MAC)
    host.put("proc/self/mountinfo", "25 1 259:0 / /home/alice rw - ext4 /dev/nvme0n1 rw")
    route = "enxd85ed3010203\t00000000\tFE01A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0"
    host.put(
        "proc/net/route",
        f"Iface\tDestination\tGateway\n{route}\nenxd85ed3010203\t0001A8C0\t00000000\t0001\t0\t0\t1\t00FFFFFF\t0\t0\t0",
    )
    host.process(4711, "qemu-system-x86", nodes=("/dev/vfio/9", "/dev/null", "/home/alice/disk.img"))
    host.put("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes")
    host.put("proc/cmdline", "root=UUID=0f3c7a52-aaaa-bbbb-cccc-0123456789ab amd_iommu=pt")
    host.put(IVRS, ivrs(ivhd(), ivmd(0x21, 0x0200, 0, 0x9F00_0000, 0x1000)))
    messages = [f"6,1,1,-;igb {NIC}: eth0: {MAC}", " SUBSYSTEM=pci", f" DEVICE=+pci:{NIC}"]
    messages += ["6,2,1,-;usb 1-1: SerialNumber: 0123 4567", "30,3,1,-;systemd[1]: a program's"]
    host.put("dev/kmsg", "\n".join(["6,0,1,-;Linux version 6.12", *messages]))
    host.put("etc/shadow", "root:secret")
    host.put(f"sys/bus/pci/devices/{NVME}/remove", "")
    host.put(f"sys/bus/pci/devices/{NVME}/numa_node", "1")
    for kib, pages in ((1 << 20, 3), (2 << 10, 999)):
        for place in ("sys/kernel/mm", "sys/devices/system/node/node0", "sys/devices/system/node/node1"):
            host.put(f"{place}/hugepages/hugepages-{kib}kB/free_hugepages", str(pages))
    return host


def answers(sysfs: Sysfs) -> list[object]:
    """All that the commands say."""
    found: list[object] = [inventory(sysfs), diagnose(sysfs), diagnose(sysfs, huge_page=2 << 20)]
    for device in sysfs.devices():
        found += [describe(sysfs, device.bdf), diagnose(sysfs, device.bdf), plan([device.bdf], sysfs=sysfs)]
        found += [choose_backing(sysfs, size, [device.bdf]) for size in (2 << 30, 512 << 20)]
    return found


def recorded(root: Path, archive: Path, anonymity: Anonymity | None = None) -> Recorder:
    recorder = Recorder(root)
    look_at_host(recorder)
    record(recorder, look_at_device)
    assert recorder.write_tar(archive, anonymity) > 0
    return recorder


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_the_same_answers(host: Host, tmp_path: Path, ending: str) -> None:
    archive = tmp_path / f"host{ending}"
    before = answers(host)
    recorded(host.root, archive)
    with open_recorded(archive) as tree:
        unpacked = tree.root
        assert answers(tree) == before
        assert tree.log().having("Linux") == ["Linux version 6.12"]
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path / "by-hand", filter="fully_trusted") if hasattr(tarfile, "data_filter") else (
                opened.extractall(tmp_path / "by-hand")
            )
    assert not unpacked.exists(), "what was unpacked is removed"
    with open_recorded(tmp_path / "by-hand") as tree:
        assert answers(tree) == before
    assert host.writes == []


def test_only_what_was_asked_for_is_read(host: Host, tmp_path: Path) -> None:
    """No other file, no register of a device that sleeps, nothing of what a program has written or has open."""
    recorded(host.root, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = {member.name: member for member in archive}
        text = b"".join(
            opened.read() for member in archive if member.isreg() and (opened := archive.extractfile(member))
        )
    assert "etc/shadow" not in members
    assert b"secret" not in text
    assert b"a program's" not in text
    assert [name for name in members if name.startswith("proc/4711/fd/")] == ["proc/4711/fd/0"]
    assert members["sys/devices/pci0000:00/0000:04:00.0/power_state"].size
    assert "sys/devices/pci0000:00/0000:04:00.0/config" not in members or (
        members["sys/devices/pci0000:00/0000:04:00.0/config"].size == 0
    )
    assert members["sys/devices/pci0000:00/0000:01:00.0/remove"].size == 0
    assert {stat.S_IFMT(member.mode) for member in members.values()} == {0}
    assert all(not name.startswith("/") and ".." not in name.split("/") for name in members)


def test_what_could_not_be_read_cannot_be_read_later(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Sysfs.data

    def refuse(self: Sysfs, *parts: str, size: int = -1) -> bytes:
        if "/".join(parts) == IVRS:
            raise PermissionError(13, "Permission denied", IVRS)
        return original(self, *parts, size=size)

    monkeypatch.setattr(Sysfs, "data", refuse)
    before = answers(host)
    recorded(host.root, tmp_path / "x.tar")
    monkeypatch.undo()
    with open_recorded(tmp_path / "x.tar") as tree:
        assert tree.exists(IVRS)
        assert answers(tree) == before
        with pytest.raises(PermissionError):
            tree.data(IVRS)


def test_nothing_can_be_changed_in_it(host: Host, tmp_path: Path) -> None:
    recorded(host.root, tmp_path / "x.tar")
    with open_recorded(tmp_path / "x.tar") as tree, pytest.raises(BadRecord, match="cannot be written"):
        tree.write(tree.path("sys/bus/pci/drivers_probe"), NVME)


def test_a_file_that_is_there_is_not_touched(host: Host, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_text("mine")
    with pytest.raises(FileExistsError):
        Recorder(host.root).write_tar(tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_text() == "mine"


def test_an_interrupt_leaves_no_file(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recorder = Recorder(host.root)
    look_at_host(recorder)
    monkeypatch.setattr(tarfile.TarFile, "addfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recorder.write_tar(tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()


def test_a_full_disk_leaves_no_file_and_names_it(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = Recorder(host.root)
    look_at_host(recorder)
    monkeypatch.setattr(tarfile.TarFile, "addfile", refuse)
    with pytest.raises(OSError, match="No space left") as refused:
        recorder.write_tar(tmp_path / "x.tar.gz")
    assert refused.value.filename == str(tmp_path / "x.tar.gz")
    assert refused.value.__notes__ == ["name a file in a directory where this user may write, and that has space"]
    assert not (tmp_path / "x.tar.gz").exists()


# --- addresses and serial numbers


def test_replaced_on_request(host: Host, tmp_path: Path) -> None:
    """Nothing of them is left in any byte of the archive, and the answers are the same but for them."""
    recorded(host.root, tmp_path / "x.tar", Anonymity("labhost"))
    data = (tmp_path / "x.tar").read_bytes().lower()
    for private in (
        MAC,
        "d85ed3010203",
        "s5h9ns0n",
        "0123 4567",
        "fe01a8c0",
        "0f3c7a52",
        "alice",
        "a0a1a2a3a4a5a6a7",
    ):
        assert private.encode() not in data, private
    assert bytes(range(0xA0, 0xA8)) not in data
    before = [
        (status.device.bdf, [blocker.kind for blocker in status.blockers]) for status in inventory(host).devices
    ]
    with open_recorded(tmp_path / "x.tar") as tree:
        found = inventory(tree)
        assert [
            (status.device.bdf, [blocker.kind for blocker in status.blockers]) for status in found.devices
        ] == before
        [finding] = [finding for finding in diagnose(tree, Bdf.parse(NIC)) if finding.check == "device-free"]
        assert finding.blocker is not None
        assert "the default route goes through enx0200000000" in finding.blocker.cause


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        (f"link/ether {MAC} brd ff:ff:ff:ff:ff:ff", ["ff:ff:ff:ff:ff:ff"], [MAC]),
        ("0000:01:00.0 8086:10d3 6.12.0-1-amd64 12:34:56", ["0000:01:00.0 8086:10d3 6.12.0-1-amd64 12:34:56"], []),
        ("10.1.2.3 and 127.0.0.1, 0.0.0.0", ["127.0.0.1", "0.0.0.0", "10."], ["10.1.2.3"]),
        ("addr=2001:db8:1::7 ::1 fe80::1234:5678", [], ["2001:db8:1::7", "1234:5678"]),
        ("nqn.2014-08.org.nvmexpress:uuid:x", ["nqn."], ["2014-08"]),
        ("Serial Number: ABC123, wwid=naa.5000c500a1b2c3d4", [], ["ABC123", "5000c500a1b2c3d4"]),
        ("/dev/disk/by-id/nvme-eui.0025385b71b00123-part1", ["/dev/disk/by-id/"], ["0025385b71b00123"]),
        ("on labhost: U: Uniq=55:44", ["on host"], ["labhost", "55:44"]),
        ("serial8250: ttyS0 at I/O 0x3f8", ["serial8250: ttyS0 at I/O 0x3f8"], []),
    ],
)
def test_texts(text: str, kept: list[str], gone: list[str]) -> None:
    anonymity = Anonymity("labhost")
    found = anonymity.text(text)
    for word in kept:
        assert word in found
    for word in gone:
        assert word not in found
    assert anonymity.text(text) == found, "the same by the same"


def test_what_lies_in_one_network_still_does() -> None:
    import ipaddress

    anonymity = Anonymity("x")
    for network, inside, outside in (
        ("10.1.16.0/20", "10.1.17.5", "10.1.32.5"),
        ("192.168.1.0/24", "192.168.1.77", "192.168.2.1"),
    ):
        place = ipaddress.ip_network(
            f"{anonymity.text(network.partition('/')[0])}/{network.partition('/')[2]}", strict=False
        )
        assert ipaddress.ip_address(anonymity.text(inside)) in place
        assert ipaddress.ip_address(anonymity.text(outside)) not in place
    as_hex = anonymity.content("proc/net/tcp", "file", b"0: 0511010A:1F90 00000000:0000 0A")
    assert ipaddress.ip_address(int.from_bytes(bytes.fromhex(as_hex.split()[1][:8].decode()), "little")) == (
        ipaddress.ip_address(anonymity.text("10.1.17.5"))
    )


# --- archives that somebody made


def made(path: Path, *entries: tuple[str, str, str]) -> Path:
    """An archive of ``(name, kind, content or target)``."""
    with tarfile.open(path, "w") as archive:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = {
                "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE,
                "node": tarfile.CHRTYPE, "directory": tarfile.DIRTYPE,
            }[kind]  # fmt: skip
            if kind in ("link", "hard"):
                info.linkname = content
            info.size = len(content) if kind == "file" else 0
            archive.addfile(info, io.BytesIO(content.encode()) if kind == "file" else None)
    return path


@pytest.mark.parametrize(
    "entries",
    [
        [("../evil", "file", "x")],
        [("/tmp/evil", "file", "x")],
        [("a/../../evil", "file", "x")],
        [("out", "link", "/etc")],
        [("out", "link", "../..")],
        [("out", "link", ".."), ("out/evil", "file", "x")],
        [("in", "directory", ""), ("way", "link", "in"), ("way/evil", "file", "x")],
        [("a", "link", "b/../.."), ("b", "directory", "")],
        [("d/e", "directory", ""), ("l", "link", "d/e"), ("m", "link", "l/../../../etc")],
        [("copy", "hard", "/etc/passwd")],
        [("pipe", "fifo", "")],
        [("node", "node", "")],
        [("twice", "file", "x"), ("twice", "file", "y")],
        [("twice", "link", "x"), ("twice", "file", "y")],
        [("proc/1/fdx/3", "link", "/etc/shadow")],
        [("proc/1/fd/3", "link", "/etc"), ("proc/1/fd/3/passwd", "file", "x")],
        [(MANIFEST, "file", "{")],
        [(MANIFEST, "file", '{"version": 999}')],
        [(MANIFEST, "file", "[]")],
        [(MANIFEST, "file", '{"version": 1, "answers": []}')],
        [],
    ],
)
def test_a_crafted_archive(tmp_path: Path, entries: list[tuple[str, str, str]]) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    before = sorted(Path(tmp_path).rglob("*"))
    archive = made(inside / "x.tar", *entries)
    with pytest.raises(BadRecord), open_recorded(archive):
        pytest.fail("it was opened")
    assert sorted(Path(tmp_path).rglob("*")) == [*before, archive], "nothing outside of it"


def test_no_archive_and_one_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tar").write_bytes(os.urandom(4096))
    with pytest.raises(BadRecord, match="not an archive"), open_recorded(tmp_path / "x.tar"):
        pass
    whole = made(tmp_path / "whole.tar", ("a", "file", "x" * 5000)).read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[:3000])
    with pytest.raises(BadRecord), open_recorded(tmp_path / "half.tar"):
        pass
    for name in ("_MOST_ENTRIES", "_MOST_BYTES", "_BIGGEST_FILE"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvmpass.host.record.recorded.{name}", 1)
            big = made(tmp_path / f"{name}.tar", ("a", "file", "xx"), ("b", "file", "xx"))
            with pytest.raises(BadRecord, match="too large for a recording"), open_recorded(big):
                pass
    with pytest.raises(FileNotFoundError), open_recorded(tmp_path / "none.tar"):
        pass


@pytest.mark.parametrize("kind", ["fifo", "out", "absolute"])
def test_a_crafted_directory(host: Host, kind: str) -> None:
    place = host.path("proc/version")
    {
        "fifo": lambda: os.mkfifo(place),
        "out": lambda: place.symlink_to("../../../etc/passwd"),
        "absolute": lambda: place.symlink_to(host.path("proc/cmdline")),
    }[kind]()
    with pytest.raises(BadRecord, match="proc/version"), open_recorded(host.root):
        pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("target", "inside"),
    [
        ("../../proc", True),
        ("../../..", False),
        ("../../../etc", False),
        ("up/..", False),  # not by its text, but by where the other link leads
        ("up/proc", True),
        ("./../../proc", True),
        ("../deep/../../../..", False),
        ("/proc", False),
        ("nowhere", True),
    ],
)
def test_a_link_stays_inside_or_is_refused(host: Host, target: str, inside: bool) -> None:
    """In a directory two levels down, beside a link to the top."""
    deep = host.path("one/deep")
    deep.mkdir(parents=True)
    (deep / "up").symlink_to("../..")
    (deep / "link").symlink_to(target)
    if inside:
        with open_recorded(host.root):
            pass
    else:
        with pytest.raises(BadRecord, match="one/deep/link is a link that leads out"), open_recorded(host.root):
            pytest.fail("it was opened")


def test_nothing_that_a_terminal_would_obey(host: Host, tmp_path: Path) -> None:
    host.put(f"sys/bus/pci/devices/{NVME}/power_state", "D0\x1b]0;evil\x07")
    host.add("0000:05:00.0", "evil\x1b[31m", 11)
    host.put("dev/kmsg", "6,0,1,-;AMD-Vi: \x1b[2J\x9b1m")
    host.put(MANIFEST, json.dumps({"version": 1, "closed": [], "answers": {"user name": "\x1b[1mroot"}}))
    host.put("sys/bus/virtio/devices/virtio0/mount_tag", b"root\0")
    with open_recorded(host.root) as tree:
        assert tree.text("sys/bus/virtio/devices/virtio0/mount_tag") == "root", "as the host's own readers take it"
        texts = repr([str(answers(tree)), *tree.log().having("AMD-Vi"), tree.ask("user name", lambda: "")])
        assert tree.device(Bdf.parse("0000:05:00.0")).driver == "evil?[31m"
    assert "\\x1b" not in texts
    assert "\\x9b" not in texts


def test_the_root_directory_is_no_record() -> None:
    with pytest.raises(BadRecord, match="this host"), open_recorded(Path("/")):
        pass


def test_damaged_records_end_in_an_error_or_an_answer(host: Host, tmp_path: Path) -> None:
    """Files cut, doubled, with other bytes; answers of other types: never anything that no command expects."""
    recorded(host.root, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        whole = [
            (member, opened.read() if (opened := archive.extractfile(member)) else b"")
            for member in archive
            if member.isreg()
        ]
        rest = [member for member in archive.getmembers() if not member.isreg()]
    dice = random.Random(5)
    ends: dict[bool, int] = {True: 0, False: 0}
    for turn in range(25):
        with tarfile.open(tmp_path / f"{turn}.tar", "w") as archive:
            for member in rest:
                archive.addfile(member)
            for info, content in whole:
                damaged = content
                if info.name == MANIFEST:
                    manifest = json.loads(content)
                    for question in manifest["answers"]:
                        if dice.random() < 0.1:
                            manifest["answers"][question] = dice.choice([None, [], {}, "x", -1, [1, 2, 3], True])
                    damaged = json.dumps(manifest).encode()
                elif content and dice.random() < 0.2:
                    at = dice.randrange(len(content))
                    damaged = content[:at] + dice.randbytes(dice.randint(0, 9)) + content[at + dice.randint(0, 9) :]
                info.size = len(damaged)
                archive.addfile(info, io.BytesIO(damaged))
        for words in (["list"], ["doctor", NVME], ["show", NIC], ["plan", GPU, "--memory", "64M"]):
            result = CliRunner().invoke(
                COMMANDS_BY_NAME[words[0]], [*words[1:], "--sysfs", str(tmp_path / f"{turn}.tar")]
            )
            fine = result.exception is None or isinstance(result.exception, (SystemExit, KvmpassError, OSError))
            assert fine, (turn, words, result.exception)
            ends[result.exception is None or isinstance(result.exception, SystemExit)] += 1
    assert ends[True] > 20


# --- the commands


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, host: Host) -> Iterator[Callable[..., tuple[int, str]]]:
    monkeypatch.setattr("kvmpass.cli.doctor.Recorder", lambda: Recorder(host.root))

    def run(*words: str, **environment: str) -> tuple[int, str]:
        result = CliRunner().invoke(doctor, words, env=environment, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.return_value, result.output

    yield run


def test_the_command(invoke: Callable[..., tuple[int, str]], tmp_path: Path, host: Host) -> None:
    archive = str(tmp_path / "host.tar.gz")
    status, output = invoke("--record", archive, "--json")
    assert (status, json.loads(output[: output.rindex("}") + 1])["file"]) == (0, archive)
    status, output = invoke("--sysfs", archive, "--json", NVME)
    document = json.loads(output)
    assert [finding["blocker"]["kind"] for finding in document["findings"] if finding["outcome"] == "fail"] == [
        "in-use"
    ]
    assert invoke("--json", NVME, KVMPASS_SYSFS=archive) == (status, output)
    with pytest.raises(Exception, match="--record cannot be used with --sysfs"):
        invoke("--record", str(tmp_path / "y.tar"), "--sysfs", archive)
    with pytest.raises(Exception, match="--anonymous needs --record"):
        invoke("--anonymous")
    with pytest.raises(FileExistsError):
        invoke("--record", archive)
    assert doctor_module.look_at_host is look_at_host
    assert replace(inventory(host)) == inventory(host)
