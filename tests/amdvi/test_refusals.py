"""Bad input: one clear line, the documented status, and a host that is exactly as it was."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.inside import LAB_ONLY

from kvmpass import host
from kvmpass.cli.main import main

NOBODY = 65534


def facts() -> list[tuple[object, ...]]:
    sysfs = host.Sysfs()
    return [(d.bdf, d.driver, d.driver_override, d.power_state) for d in sysfs.devices()]


@pytest.fixture(autouse=True)
def unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    before = facts()
    yield
    assert facts() == before
    assert list((tmp_path / "state").rglob("*.json")) == []


def refuse(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run ``kvmpass assign``; returns its one line of complaint."""
    with pytest.raises(SystemExit) as ended:
        main(["assign", *arguments, "--", "true"])
    return complaint(ended.value.code, *capfd.readouterr())


def complaint(status: object, output: str, errors: str) -> str:
    lines = [line for line in errors.splitlines() if not line.startswith("  hint: ")]
    assert (status, output, len(lines)) == (125, "", 1), errors
    assert lines[0].startswith("kvmpass: ")
    return lines[0].removeprefix("kvmpass: ")


def refuse_without(wrapper: tuple[str, ...], *arguments: str) -> str:
    """The same in a process of its own, started by ``wrapper``."""
    command = [*wrapper, sys.executable, "-m", "kvmpass", "assign", *arguments, "--", "true"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return complaint(result.returncode, result.stdout, result.stderr)


def refuse_as(user: int, tmp_path: Path, *arguments: str) -> str:
    """The same in a fork with another user's rights, who need not be able to read the interpreter."""
    for name in (
        "cli.assign",
        "guest.image",
        "host.blockers",
        "host.doctor.resources",
        "host.doctor.vital",
        "machine.machine",
    ):
        importlib.import_module(f"kvmpass.{name}")
    output, errors = tmp_path / "out", tmp_path / "err"
    output.touch()
    errors.touch()
    child = os.fork()
    if child == 0:
        status = 99
        with output.open("w") as sys.stdout, errors.open("w") as sys.stderr:
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                main(["assign", *arguments, "--", "true"])
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 98
        os._exit(status)
    _, result = os.waitpid(child, 0)
    return complaint(os.waitstatus_to_exitcode(result), output.read_text(), errors.read_text())


def test_an_invalid_address(capfd: pytest.CaptureFixture[str]) -> None:
    assert "'zz:zz' is not a PCI address" in refuse(capfd, "zz:zz")


def test_a_device_that_does_not_exist(capfd: pytest.CaptureFixture[str]) -> None:
    assert refuse(capfd, "0000:7f:1f.7") == "there is no PCI device 0000:7f:1f.7"


def test_a_bridge(capfd: pytest.CaptureFixture[str]) -> None:
    bridge = next(str(d.bdf) for d in host.Sysfs().devices() if d.is_bridge and d.group is not None)
    assert f"{bridge} is a bridge" in refuse(capfd, bridge)


@pytest.mark.amdvi(profile="sriov", qemu="system")
def test_a_device_without_a_group(capfd: pytest.CaptureFixture[str], virtual_function: str) -> None:
    if host.Sysfs().device(host.Bdf.parse(virtual_function)).group is not None:
        pytest.skip("this host's virtual functions have groups: it runs in the lab under QEMU 7.2")
    assert f"{virtual_function} has no IOMMU group" in refuse(capfd, virtual_function)


def test_a_sibling_in_use(capfd: pytest.CaptureFixture[str], multifunction: str) -> None:
    line = refuse(capfd, multifunction)
    assert re.search(rf"{multifunction} shares IOMMU group \d+ with .* \(driver \w+\), which the host uses", line)


def test_a_mounted_drive(capfd: pytest.CaptureFixture[str], nvme2: str, tmp_path: Path, destructive: None) -> None:
    node = next(Path(f"/sys/bus/pci/devices/{nvme2}").glob("nvme/nvme*/nvme*n1")).name
    subprocess.run(["/bin/busybox", "mke2fs", f"/dev/{node}"], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "ext4", f"/dev/{node}", str(tmp_path)], check=True)
    try:
        assert f"{nvme2} is in use" in (line := refuse(capfd, nvme2))
        assert str(tmp_path) in line
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_device_that_has_the_root_file_system(capfd: pytest.CaptureFixture[str], emulated_host: bool) -> None:
    """A 9p whose only mount is not visible, below an overlay: unbinding its driver would never return."""
    if not emulated_host:
        pytest.skip(f"this host's root is no 9p device: {LAB_ONLY}")
    tag = next(path for path in Path("/sys/bus/virtio/devices").glob("*/mount_tag") if "root" in path.read_text())
    root = tag.resolve().parents[1].name
    assert (
        f"{root} is in use: its 9p (root) is mounted" in (line := refused_bind(capfd, root)) or "not visible" in line
    )
    assert "unbinding its driver would block" in line


def refused_bind(capfd: pytest.CaptureFixture[str], bdf: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bind", "--force", bdf])
    return complaint(125 if ended.value.code == 1 else ended.value.code, *capfd.readouterr())


def test_a_card_with_a_connection(capfd: pytest.CaptureFixture[str], nic: str) -> None:
    """Not the default route: a route of its own, and a socket that is connected through it."""
    name = next(Path(f"/sys/bus/pci/devices/{nic}/net").iterdir()).name
    subprocess.run(["ip", "addr", "add", "10.77.0.1/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.connect(("10.77.0.2", 9))
            assert f"{name} carries connections to 10.77.0.2" in refuse(capfd, nic)
    finally:
        subprocess.run(["ip", "addr", "flush", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "down"], check=True)


@pytest.mark.amdvi(profile="odd")
def test_a_bar_without_an_address(capfd: pytest.CaptureFixture[str], ivshmem: str) -> None:
    """Nothing in ``resource``; the register, the kernel's log and the refusals tell."""
    lines = Path(f"/sys/bus/pci/devices/{ivshmem}/resource").read_text().splitlines()
    assert set(lines[2].split()) == {"0x" + "0" * 16}
    cause = "the kernel has assigned no address to BAR 2 (2 TiB): a guest would get the device without it"
    assert refuse(capfd, ivshmem) == f"{ivshmem}: {cause}"
    for command, status in (("list", 0), ("show", 0), ("doctor", 1), ("plan", 1)):
        with pytest.raises(SystemExit) as ended:
            main([command, ivshmem])
        assert ended.value.code == status
        text = " ".join(capfd.readouterr().out.split())
        assert ("no: BAR 2 without address" if command == "list" else cause) in text


def test_the_same_device_twice(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert "named twice" in refuse(capfd, edu, edu)


def test_no_kvm(capfd: pytest.CaptureFixture[str], edu: str, emulated_host: bool) -> None:
    if not emulated_host:
        pytest.skip(f"takes /dev/kvm away for a moment: {LAB_ONLY}")
    Path("/dev/kvm").rename("/dev/kvm.away")
    try:
        assert "/dev/kvm" in refuse(capfd, edu)
    finally:
        Path("/dev/kvm.away").rename("/dev/kvm")


def test_no_permission(edu: str, tmp_path: Path) -> None:
    line = refuse_as(NOBODY, tmp_path, edu)
    assert re.search(r"(?i)permission|privilege|root", line), line


def test_a_file_that_is_no_kernel(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert refuse(capfd, edu, "--kernel", "/bin/busybox").startswith("/bin/busybox: an ELF file")
    assert "No such file" in refuse(capfd, edu, "--kernel", "/nonexistent")


def test_more_memory_than_there_is(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    refused = refuse(capfd, edu, "--memory", "2000G")
    assert re.search(r"the guest needs \d+ MiB of memory, with [a-z ]+; \d+ MiB are available", refused)
    assert "is not a size" in refuse(capfd, edu, "--memory", "plenty")
    assert "at least 1 MiB" in refuse(capfd, edu, "--memory", "0")


def test_more_cpus_than_kvm_has(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert "this host's KVM takes 1 to" in refuse(capfd, edu, "--memory", "64M", "--cpus", "100000")
    assert "this host's KVM takes 1 to" in refuse(capfd, edu, "--memory", "64M", "--cpus", "0")


def test_memlock_too_low(edu: str) -> None:
    """CAP_IPC_LOCK overrides the limit, so it must go first."""
    assert shutil.which("setpriv")
    wrapper = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=8388608")
    line = refuse_without(wrapper, edu, "--memory", "64M")
    assert line == "the guest's 64 MiB must be locked in memory, this process may lock 8 MiB"


def test_no_command_after_the_dashes(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["assign", edu, "--"])
    assert ended.value.code == 125
    assert "missing COMMAND after --" in capfd.readouterr().err


@pytest.mark.amdvi(profile="no-svm")
def test_without_amd_v(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert "AMD-V" in refuse(capfd, edu)


@pytest.mark.amdvi(profile="no-iommu")
def test_without_amd_vi(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert "AMD-Vi is off" in refuse(capfd, edu)


@pytest.mark.amdvi(profile="no-intremap")
def test_without_interrupt_remapping(capfd: pytest.CaptureFixture[str], edu: str) -> None:
    assert "interrupt remapping is off" in refuse(capfd, edu)
